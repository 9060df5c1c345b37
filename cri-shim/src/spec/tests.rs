//! Rules of the spec, as tables.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{Capability, LinuxNamespaceType, Spec};
use proptest::prelude::*;

use super::user::{UserRequest, resolve};
use super::*;
use crate::api::{self, MountPropagation};
use crate::config::CgroupDriver;

pub(super) fn host() -> Host {
    Host {
        max_open_files: 1 << 20,
        capabilities: u64::MAX,
        recursive_read_only: true,
        ..Host::default()
    }
}

fn spec_of(config: &api::ContainerConfig, pod: &Pod, host: &Host) -> Result<Spec, SpecError> {
    plan_spec(&inputs(config, &image(), pod, host))
}

pub(super) fn image() -> ImageDefaults {
    ImageDefaults { cmd: vec!["/app".into()], ..ImageDefaults::default() }
}

/// With nothing that the node adds.
pub(super) fn inputs<'a>(
    config: &'a api::ContainerConfig,
    image: &'a ImageDefaults,
    pod: &'a Pod,
    host: &'a Host,
) -> Inputs<'a> {
    Inputs {
        config,
        image,
        pod,
        host,
        rootfs: PathBuf::from("/rootfs"),
        cgroup: PathBuf::from("/kubepods/pod1/c1"),
        image_volumes: PathBuf::from("/images"),
        declared: Vec::new(),
        base: None,
        localhost_seccomp: None,
        apparmor: None,
        labels: None,
        devices: Vec::new(),
    }
}

pub(super) fn secured(security: api::LinuxContainerSecurityContext) -> api::ContainerConfig {
    api::ContainerConfig {
        linux: Some(api::LinuxContainerConfig {
            security_context: Some(security),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn capabilities(add: &[&str], drop: &[&str]) -> HashSet<Capability> {
    let list = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect();
    let security = api::LinuxContainerSecurityContext {
        capabilities: Some(api::Capability {
            add_capabilities: list(add),
            drop_capabilities: list(drop),
            ..Default::default()
        }),
        ..Default::default()
    };
    capabilities::plan(Some(&security), u64::MAX).unwrap().bounding().clone()
}

#[test]
fn command_and_args_against_entrypoint_and_cmd() {
    let image = ImageDefaults {
        entrypoint: vec!["/entry".into()],
        cmd: vec!["cmd".into()],
        ..ImageDefaults::default()
    };
    let cases: [(&[&str], &[&str], &[&str]); 4] = [
        (&[], &[], &["/entry", "cmd"]),
        (&[], &["arg"], &["/entry", "arg"]),
        (&["/run"], &[], &["/run"]),
        (&["/run"], &["arg"], &["/run", "arg"]),
    ];
    for (command, args, expected) in cases {
        let config = api::ContainerConfig {
            command: command.iter().map(|s| (*s).to_owned()).collect(),
            args: args.iter().map(|s| (*s).to_owned()).collect(),
            ..Default::default()
        };
        assert_eq!(process::arguments(&config, &image).unwrap(), expected);
    }
    let nothing = process::arguments(&api::ContainerConfig::default(), &ImageDefaults::default());
    assert_eq!(nothing, Err(SpecError::NoCommand));
}

#[test]
fn pod_variables_override_those_of_the_image_in_place() {
    let image = ImageDefaults { env: vec!["A=1".into(), "B=2".into()], ..Default::default() };
    let config = api::ContainerConfig {
        envs: vec![
            api::KeyValue { key: "B".into(), value: b"3=4".to_vec() },
            api::KeyValue { key: "C".into(), value: b"5".to_vec() },
        ],
        ..Default::default()
    };
    let environment = process::environment(&config, &image, "web");
    let path = format!("PATH={}", process::DEFAULT_PATH);
    assert_eq!(environment, [path.as_str(), "HOSTNAME=web", "A=1", "B=3=4", "C=5"]);
}

#[test]
fn capability_sets() {
    assert_eq!(capabilities(&[], &[]).len(), 14);
    assert_eq!(capabilities(&["ALL"], &[]).len(), capabilities::ALL.len());
    assert!(capabilities(&[], &["ALL"]).is_empty());
    assert_eq!(
        capabilities(&["NET_BIND_SERVICE"], &["ALL"]),
        HashSet::from([Capability::NetBindService])
    );
    assert!(!capabilities(&["ALL"], &["CAP_NET_RAW"]).contains(&Capability::NetRaw));
    assert!(capabilities(&["cap_sys_admin"], &[]).contains(&Capability::SysAdmin));
    let bad = api::LinuxContainerSecurityContext {
        capabilities: Some(api::Capability {
            add_capabilities: vec!["NO_SUCH".into()],
            ..Default::default()
        }),
        ..Default::default()
    };
    let refused = capabilities::plan(Some(&bad), u64::MAX).unwrap_err();
    assert_eq!(refused, SpecError::UnknownCapability("NO_SUCH".into()));
}

#[test]
fn a_privileged_container_is_held_back_by_nothing() {
    let config = secured(api::LinuxContainerSecurityContext {
        privileged: true,
        no_new_privs: true,
        seccomp: Some(api::SecurityProfile::default()),
        ..Default::default()
    });
    let spec = spec_of(&config, &Pod::default(), &host()).unwrap();
    let linux = spec.linux().as_ref().unwrap();
    assert!(linux.seccomp().is_none());
    assert!(linux.masked_paths().as_ref().is_none_or(Vec::is_empty));
    assert!(linux.readonly_paths().as_ref().is_none_or(Vec::is_empty));
    let process = spec.process().as_ref().unwrap();
    assert_eq!(process.no_new_privileges(), None);
    let sys = spec.mounts().as_ref().unwrap().iter().find(|m| m.destination() == Path::new("/sys"));
    assert!(sys.unwrap().options().as_ref().unwrap().contains(&"rw".to_owned()));
}

#[test]
fn an_ordinary_container_is_confined() {
    let config = secured(api::LinuxContainerSecurityContext {
        no_new_privs: true,
        readonly_rootfs: true,
        seccomp: Some(api::SecurityProfile::default()),
        masked_paths: vec!["/proc/kcore".into()],
        readonly_paths: vec!["/proc/sys".into()],
        ..Default::default()
    });
    let spec = spec_of(&config, &Pod::default(), &host()).unwrap();
    let linux = spec.linux().as_ref().unwrap();
    assert!(linux.seccomp().is_some());
    assert_eq!(linux.masked_paths().as_deref(), Some(&["/proc/kcore".to_owned()][..]));
    assert_eq!(linux.readonly_paths().as_deref(), Some(&["/proc/sys".to_owned()][..]));
    assert_eq!(spec.process().as_ref().unwrap().no_new_privileges(), Some(true));
    assert_eq!(spec.root().as_ref().unwrap().readonly(), Some(true));
    assert!(spec.hostname().is_none());
}

#[test]
fn namespaces_follow_the_pod() {
    let kinds = |pod: &Pod| -> Vec<(LinuxNamespaceType, Option<PathBuf>)> {
        let spec = spec_of(&api::ContainerConfig::default(), pod, &host()).unwrap();
        let namespaces = spec.linux().as_ref().unwrap().namespaces().clone().unwrap();
        namespaces.iter().map(|n| (n.typ(), n.path().clone())).collect()
    };
    let own = Pod { netns: Some("/run/netns/a".into()), ..Pod::default() };
    assert_eq!(
        kinds(&own),
        [
            (LinuxNamespaceType::Mount, None),
            (LinuxNamespaceType::Network, Some("/run/netns/a".into())),
            (LinuxNamespaceType::Pid, None),
        ]
    );
    let node = Pod { pid: PidNamespace::Node, ..Pod::default() };
    assert_eq!(kinds(&node), [(LinuxNamespaceType::Mount, None)]);
    let shared = Pod { pid: PidNamespace::Join("/proc/7/ns/pid".into()), ..Pod::default() };
    assert!(kinds(&shared).contains(&(LinuxNamespaceType::Pid, Some("/proc/7/ns/pid".into()))));
}

#[test]
fn what_the_kernel_cannot_enforce_is_refused() {
    let selinux = secured(api::LinuxContainerSecurityContext {
        selinux_options: Some(api::SeLinuxOption { r#type: "web_t".into(), ..Default::default() }),
        ..Default::default()
    });
    let error = spec_of(&selinux, &Pod::default(), &host()).unwrap_err();
    assert!(matches!(error, SpecError::NotInKernel(_)), "{error}");
}

#[test]
fn volumes_come_after_what_they_are_mounted_in_and_replace_defaults() {
    let volume = |container: &str, readonly: bool, propagation: MountPropagation| api::Mount {
        container_path: container.to_owned(),
        host_path: "/data".to_owned(),
        readonly,
        propagation: propagation as i32,
        ..Default::default()
    };
    let config = api::ContainerConfig {
        mounts: vec![
            volume("/a/b/c", true, MountPropagation::PropagationPrivate),
            volume("/a", false, MountPropagation::PropagationBidirectional),
            volume("/etc/hosts/", false, MountPropagation::PropagationPrivate),
        ],
        ..Default::default()
    };
    let files = [("/etc/hosts", PathBuf::from("/sandbox/hosts"))].into_iter().collect();
    let pod = Pod { files, ..Pod::default() };
    let spec = spec_of(&config, &pod, &host()).unwrap();
    let mounts = spec.mounts().as_ref().unwrap();
    let at = |path: &str| mounts.iter().position(|m| m.destination() == Path::new(path)).unwrap();
    assert!(at("/a") < at("/a/b/c"));
    let hosts: Vec<_> =
        mounts.iter().filter(|m| m.destination().starts_with("/etc/hosts")).collect();
    assert_eq!(hosts.len(), 1);
    assert_eq!(hosts[0].source().as_deref(), Some(Path::new("/data")));
    assert!(mounts[at("/a/b/c")].options().as_ref().unwrap().contains(&"ro".to_owned()));
    assert_eq!(spec.linux().as_ref().unwrap().rootfs_propagation().as_deref(), Some("shared"));

    let relative = api::ContainerConfig {
        mounts: vec![api::Mount { container_path: "/x".into(), ..Default::default() }],
        ..Default::default()
    };
    let refused = spec_of(&relative, &Pod::default(), &host()).unwrap_err();
    assert!(matches!(refused, SpecError::BadMount { .. }));
}

#[test]
fn a_memory_limit_leaves_no_swap() {
    let resources = |swap| api::LinuxContainerResources {
        memory_limit_in_bytes: 100,
        memory_swap_limit_in_bytes: swap,
        ..Default::default()
    };
    let swap = |swap, accounting| {
        let host = Host { swap_accounting: accounting, ..host() };
        let planned = super::resources::plan_limits(&resources(swap), &host).unwrap();
        planned.memory().as_ref().and_then(|m| m.swap())
    };
    assert_eq!(swap(0, true), Some(100));
    assert_eq!(swap(150, true), Some(150));
    assert_eq!(swap(0, false), None);
}

#[test]
fn configs_that_can_never_run_are_refused_at_creation() {
    let group = secured(api::LinuxContainerSecurityContext {
        run_as_group: Some(api::Int64Value { value: 1 }),
        ..Default::default()
    });
    assert_eq!(
        check(&group, &api::NamespaceOption::default(), &host()),
        Err(SpecError::GroupWithoutUser)
    );
    let recursive = |readonly, propagation: MountPropagation| api::ContainerConfig {
        mounts: vec![api::Mount {
            container_path: "/x".into(),
            host_path: "/x".into(),
            readonly,
            recursive_read_only: true,
            propagation: propagation as i32,
            ..Default::default()
        }],
        ..Default::default()
    };
    use MountPropagation::*;
    assert!(
        check(&recursive(true, PropagationPrivate), &api::NamespaceOption::default(), &host())
            .is_ok()
    );
    assert!(
        check(&recursive(false, PropagationPrivate), &api::NamespaceOption::default(), &host())
            .is_err()
    );
    assert!(
        check(
            &recursive(true, PropagationHostToContainer),
            &api::NamespaceOption::default(),
            &host()
        )
        .is_err()
    );
    assert!(
        check(
            &recursive(true, PropagationBidirectional),
            &api::NamespaceOption::default(),
            &host()
        )
        .is_err()
    );
}

#[test]
fn all_capabilities_are_those_the_node_has() {
    let privileged = api::LinuxContainerSecurityContext { privileged: true, ..Default::default() };
    let without_resource = !(1 << 24);
    let sets = capabilities::plan(Some(&privileged), without_resource).unwrap();
    assert_eq!(sets.bounding().len(), capabilities::ALL.len() - 1);
    assert!(!sets.bounding().contains(&Capability::SysResource));
}

#[test]
fn stop_signals() {
    let cases = [
        ("SIGTERM", Some(15)),
        ("usr1", Some(10)),
        ("9", Some(9)),
        ("SIGRTMIN+3", Some(37)),
        ("SIGRTMINPLUS3", Some(37)),
        ("SIGRTMAXMINUS1", Some(63)),
        ("SIGPOLL", Some(29)),
        ("0", None),
        ("SIGNOPE", None),
        ("", None),
    ];
    for (text, expected) in cases {
        assert_eq!(stop_signal::parse(text), expected, "{text}");
    }
    let config = api::ContainerConfig::default();
    assert_eq!(stop_signal::plan(&config, "SIGQUIT"), 3);
    let given = api::ContainerConfig { stop_signal: api::Signal::Sigusr2 as i32, ..config };
    assert_eq!(stop_signal::plan(&given, "SIGQUIT"), 12);
}

#[test]
fn systemd_names_spell_their_ancestors() {
    let cases = [
        (
            "kubepods-burstable-podx.slice",
            "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podx.slice",
        ),
        ("/kubepods.slice/kubepods-podx.slice", "/kubepods.slice/kubepods-podx.slice"),
        ("-.slice", "/"),
    ];
    for (name, path) in cases {
        let found = cgroup_path::parent(name, CgroupDriver::Systemd).unwrap();
        assert_eq!(found, Path::new(path));
    }
    assert!(cgroup_path::parent("a--b.slice", CgroupDriver::Systemd).is_err());
    assert!(cgroup_path::parent("/kubepods/../x", CgroupDriver::Cgroupfs).is_err());
    let parent = cgroup_path::parent("/kubepods/podx/", CgroupDriver::Cgroupfs).unwrap();
    assert_eq!(parent, Path::new("/kubepods/podx"));
}

const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nweb:x:1000:1001::/home/web:/bin/sh\nodd line\n7:x:70:71::/seven:\n";
const GROUP: &str = "root:x:0:\nwww:x:1001:\nextra:x:2000:web,other\n";

#[test]
fn users_are_resolved_in_the_containers_files() {
    let asked = |user: &str| UserRequest { user: user.to_owned(), ..UserRequest::default() };
    let found = |request: &UserRequest| {
        let identity = resolve(request, PASSWD, GROUP).unwrap();
        (identity.uid, identity.gid, identity.groups, identity.home)
    };
    assert_eq!(found(&asked("")), (0, 0, vec![0], "/root".into()));
    assert_eq!(found(&asked("web")), (1000, 1001, vec![1001, 2000], "/home/web".into()));
    assert_eq!(found(&asked("1000")), (1000, 1001, vec![1001, 2000], "/home/web".into()));
    assert_eq!(found(&asked("web:extra")), (1000, 2000, vec![2000], "/home/web".into()));
    assert_eq!(found(&asked("4242")), (4242, 0, vec![0], "/".into()));
    assert_eq!(found(&asked("4242:99")), (4242, 99, vec![99], "/".into()));
    // A number is never a name.
    assert_eq!(found(&asked("7")).0, 7);
    let full = UserRequest { gid: Some(5), supplemental: vec![6, 2000], ..asked("web") };
    assert_eq!(found(&full).2, [5, 2000, 6]);
    let strict = UserRequest { strict: true, supplemental: vec![6], ..asked("web") };
    assert_eq!(found(&strict).2, [1001, 6]);
    assert!(resolve(&asked("nobody"), PASSWD, GROUP).is_err());
    assert!(resolve(&asked("web:nogroup"), PASSWD, GROUP).is_err());
    assert_eq!(resolve(&asked("12"), "", "").unwrap().uid, 12);
}

proptest! {
    #[test]
    fn hostile_files_never_make_a_numeric_user_somebody_else(
        uid in 1u32..100_000,
        passwd in "[a-z0-9:\n]{0,200}",
        group in "[a-z0-9:,\n]{0,200}",
    ) {
        let request = UserRequest {
            user: uid.to_string(),
            gid: Some(uid),
            strict: true,
            ..UserRequest::default()
        };
        if let Ok(identity) = resolve(&request, &passwd, &group) {
            prop_assert_eq!(identity.uid, uid);
            prop_assert_eq!(identity.gid, uid);
            prop_assert_eq!(identity.groups, vec![uid]);
        }
    }

    #[test]
    fn setting_variables_never_repeats_a_key(keys in proptest::collection::vec("[A-C]", 0..12)) {
        let config = api::ContainerConfig {
            envs: keys
                .iter()
                .map(|key| api::KeyValue { key: key.clone(), value: b"v".to_vec() })
                .collect(),
            ..Default::default()
        };
        let environment = process::environment(&config, &ImageDefaults::default(), "h");
        let names: Vec<_> = environment.iter().filter_map(|e| e.split_once('=')).map(|e| e.0).collect();
        let unique: HashSet<_> = names.iter().collect();
        prop_assert_eq!(names.len(), unique.len());
    }
}

#[test]
fn a_pod_with_users_of_its_own() {
    let ids = |first| vec![api::IdMapping { host_id: first, container_id: 0, length: 65_536 }];
    let map = userns::plan_mappings(&ids(65_536), &ids(65_536)).unwrap();
    let pod = Pod {
        userns: Some(Userns { path: "/run/userns/pod".into(), map }),
        netns: Some("/run/netns/pod".into()),
        files: [("/etc/hosts", PathBuf::from("/state/hosts"))].into(),
        shm: "/run/shm".into(),
        ..Pod::default()
    };
    let mut config = secured(api::LinuxContainerSecurityContext::default());
    config.mounts = vec![api::Mount {
        host_path: "/data".into(),
        container_path: "/data".into(),
        uid_mappings: ids(65_536),
        gid_mappings: ids(65_536),
        ..Default::default()
    }];
    let device = HostDevice {
        host: "/dev/real".into(),
        path: "/dev/seen".into(),
        kind: oci_spec::runtime::LinuxDeviceType::C,
        major: 10,
        minor: 1,
        mode: 0o600,
        uid: 0,
        gid: 0,
        access: "rw".into(),
    };
    let spec = plan_spec(&Inputs {
        cgroup: PathBuf::from("/c1"),
        devices: vec![device],
        ..inputs(&config, &image(), &pod, &host())
    })
    .unwrap();
    let linux = spec.linux().clone().unwrap();
    // The one that owns the others is entered first.
    let first = linux.namespaces().clone().unwrap().remove(0);
    assert_eq!(first.typ(), LinuxNamespaceType::User);
    assert_eq!(first.path().as_deref(), Some(Path::new("/run/userns/pod")));
    let told = (linux.uid_mappings().clone(), linux.gid_mappings().clone());
    let expected = map.oci().unwrap();
    assert_eq!(told, (Some(expected[0].clone()), Some(expected[1].clone())));
    // A node in a user namespace is not made but mounted; its cgroup's leave is the same.
    assert!(linux.devices().as_ref().is_none_or(Vec::is_empty));
    let rules = linux.resources().as_ref().and_then(|r| r.devices().clone()).unwrap();
    assert!(rules.iter().any(|rule| rule.major() == Some(10) && rule.minor() == Some(1)));
    let mounts = spec.mounts().clone().unwrap();
    let at = |target: &str| mounts.iter().find(|m| m.destination() == Path::new(target)).unwrap();
    assert_eq!(at("/dev/seen").source().as_deref(), Some(Path::new("/dev/real")));
    for (target, mapped) in
        [("/etc/hosts", true), ("/data", true), ("/dev/shm", false), ("/dev/seen", false)]
    {
        let mount = at(target);
        assert_eq!(mount.uid_mappings().is_some(), mapped, "{target}");
        assert_eq!(mount.gid_mappings().is_some(), mapped, "{target}");
    }
    config.mounts[0].gid_mappings.clear();
    let refused = check(&config, &api::NamespaceOption::default(), &host()).unwrap_err();
    let expected = userns::UsernsError::Ranges { kind: "GID", count: 0 };
    assert_eq!(refused, SpecError::Userns(expected));
}

#[test]
fn what_a_volume_replaces_comes_whole() {
    let host = Host { cgroup_v1: vec!["cpu".into(), "memory".into()], ..host() };
    let volume = |path: &str| api::Mount {
        host_path: path.into(),
        container_path: path.into(),
        ..Default::default()
    };
    let below = |volumes: Vec<api::Mount>| {
        let config = api::ContainerConfig { mounts: volumes, ..secured(Default::default()) };
        let spec = spec_of(&config, &Pod::default(), &host).unwrap();
        let targets = spec.mounts().iter().flatten().map(|mount| mount.destination().clone());
        targets.filter(|path| path.starts_with("/sys/fs/cgroup")).collect::<Vec<_>>()
    };
    assert_eq!(below(vec![volume("/sys/fs/cgroup")]), [PathBuf::from("/sys/fs/cgroup")]);
    assert_eq!(below(vec![volume("/sys")]).len(), 3);
    assert_eq!(below(Vec::new()).len(), 3);
}

#[test]
fn an_images_volumes_are_where_nothing_else_is() {
    let given = api::Mount { container_path: "/given/".into(), ..Default::default() };
    let image =
        ["/b", "a/", "/a", "/given", "/proc/x", "/sys", "/", "/etc/hosts", "/../up", "/etc"];
    let image = image.map(str::to_owned);
    let expected = ["/a", "/b", "/etc", "/up"].map(PathBuf::from);
    assert_eq!(mounts::declared(&image, std::slice::from_ref(&given)), expected);
    let config = secured(Default::default());
    let declared = vec![Declared { source: "/c/volumes/0".into(), target: "/a".into() }];
    let (pod, host, image) = (Pod::default(), host(), self::image());
    let spec = plan_spec(&Inputs { declared, ..inputs(&config, &image, &pod, &host) }).unwrap();
    let at = spec.mounts().iter().flatten().find(|m| m.destination() == Path::new("/a")).unwrap();
    assert_eq!(at.source().as_deref(), Some(Path::new("/c/volumes/0")));
    assert!(at.options().iter().flatten().any(|option| option == "rw"));
}

#[test]
fn every_container_may_make_itself_a_tunnel() {
    let spec = spec_of(&secured(Default::default()), &Pod::default(), &host()).unwrap();
    let resources = spec.linux().as_ref().and_then(|linux| linux.resources().clone()).unwrap();
    let tun = |rule: &oci_spec::runtime::LinuxDeviceCgroup| {
        rule.allow() && rule.major() == Some(10) && rule.minor() == Some(200)
    };
    assert!(resources.devices().iter().flatten().any(tun));
}
