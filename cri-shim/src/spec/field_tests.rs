//! Fields of the CRI config that change the spec in ways of their own: image volumes, base specs,
//! paths, cgroups.

use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxDeviceType, Mount, PosixRlimitType, Spec};

use super::tests::{host, image, inputs, secured};
use super::*;
use crate::api::{self, MountPropagation};

/// In a sandbox of defaults.
fn check_alone(config: &api::ContainerConfig, host: &Host) -> Result<(), SpecError> {
    check(config, &api::NamespaceOption::default(), host)
}

fn planned(
    config: &api::ContainerConfig,
    host: &Host,
    base: Option<&Spec>,
) -> Result<Spec, SpecError> {
    let pod = Pod {
        id: "s1".into(),
        metadata: api::PodSandboxMetadata {
            name: "pod".into(),
            namespace: "default".into(),
            uid: "u1".into(),
            attempt: 0,
        },
        shm: "/run/shm".into(),
        ..Pod::default()
    };
    plan_spec(&Inputs { base, ..inputs(config, &image(), &pod, host) })
}

fn at<'a>(spec: &'a Spec, path: &str) -> Option<&'a Mount> {
    spec.mounts().as_ref()?.iter().find(|m| m.destination() == Path::new(path))
}

fn options(mount: &Mount) -> Vec<&str> {
    mount.options().iter().flatten().map(String::as_str).collect()
}

fn image_volume(path: &str) -> api::Mount {
    api::Mount {
        container_path: path.to_owned(),
        readonly: true,
        image: Some(api::ImageSpec { image: "sha256:1".into(), ..Default::default() }),
        ..Default::default()
    }
}

#[test]
fn image_volumes_are_bound_from_where_the_monitor_mounts_them() {
    let volume = api::Mount {
        container_path: "/plain".into(),
        host_path: "/data".into(),
        ..Default::default()
    };
    let mounts = vec![image_volume("/deep/er/first"), volume, image_volume("/second")];
    let config = api::ContainerConfig { mounts, ..Default::default() };
    assert_eq!(check_alone(&config, &host()), Ok(()));
    let spec = planned(&config, &host(), None).unwrap();
    for (path, source) in [("/deep/er/first", "/images/0"), ("/second", "/images/1")] {
        let mount = at(&spec, path).unwrap();
        assert_eq!(mount.source().as_deref(), Some(Path::new(source)));
        assert_eq!(options(mount), ["rbind", "rprivate", "ro"]);
    }
    let writable = api::Mount { readonly: false, ..image_volume("/a") };
    let both = api::Mount { host_path: "/data".into(), ..image_volume("/a") };
    let nameless = api::Mount { image: Some(api::ImageSpec::default()), ..image_volume("/a") };
    for bad in [writable, both, nameless, image_volume("")] {
        let config = api::ContainerConfig { mounts: vec![bad], ..Default::default() };
        assert!(matches!(check_alone(&config, &host()), Err(SpecError::BadMount { .. })));
    }
}

#[test]
fn a_volume_over_all_of_dev_leaves_nothing_of_ours_below_it() {
    let volume = |path: &str| api::Mount {
        container_path: path.to_owned(),
        host_path: "/data".to_owned(),
        ..Default::default()
    };
    let mounts = vec![volume("/dev/"), volume("/dev/mine")];
    let config = api::ContainerConfig { mounts, ..Default::default() };
    let spec = planned(&config, &host(), None).unwrap();
    let below: Vec<_> = spec
        .mounts()
        .iter()
        .flatten()
        .filter(|m| m.destination().starts_with("/dev"))
        .map(|m| m.destination().clone())
        .collect();
    assert_eq!(below, [PathBuf::from("/dev/"), PathBuf::from("/dev/mine")]);
}

#[test]
fn unmasked_means_unmasked() {
    let unmasked = secured(api::LinuxContainerSecurityContext::default());
    let spec = planned(&unmasked, &host(), None).unwrap();
    let linux = spec.linux().as_ref().unwrap();
    assert_eq!(linux.masked_paths().as_deref(), Some(&[][..]));
    assert_eq!(linux.readonly_paths().as_deref(), Some(&[][..]));
    // Of a caller that says nothing about security.
    let spec = planned(&api::ContainerConfig::default(), &host(), None).unwrap();
    assert!(!spec.linux().as_ref().unwrap().masked_paths().as_ref().unwrap().is_empty());
}

#[test]
fn recursive_read_only_is_refused_where_the_kernel_cannot() {
    let mounts = vec![api::Mount {
        container_path: "/x".into(),
        host_path: "/x".into(),
        readonly: true,
        recursive_read_only: true,
        propagation: MountPropagation::PropagationPrivate as i32,
        ..Default::default()
    }];
    let config = api::ContainerConfig { mounts, ..Default::default() };
    assert_eq!(check_alone(&config, &host()), Ok(()));
    let old = Host { recursive_read_only: false, ..host() };
    assert!(check_alone(&config, &old).unwrap_err().to_string().contains("5.12"));
}

#[test]
fn unified_keys_and_a_lone_swap_limit() {
    let limited = |resources| api::ContainerConfig {
        linux: Some(api::LinuxContainerConfig { resources: Some(resources), ..Default::default() }),
        ..Default::default()
    };
    let unified = limited(api::LinuxContainerResources {
        unified: [("memory.high".to_owned(), "1048576".to_owned())].into(),
        ..Default::default()
    });
    assert!(matches!(check_alone(&unified, &host()), Err(SpecError::NeedsCgroupV2(_))));
    let v2 = Host { cgroup_v2: true, swap_accounting: true, ..host() };
    assert_eq!(check_alone(&unified, &v2), Ok(()));
    let resources = |config: &api::ContainerConfig| {
        let spec = planned(config, &v2, None).unwrap();
        spec.linux().as_ref().unwrap().resources().clone().unwrap()
    };
    assert_eq!(resources(&unified).unified().as_ref().unwrap()["memory.high"], "1048576");
    let swap = |limit, swap| {
        limited(api::LinuxContainerResources {
            memory_limit_in_bytes: limit,
            memory_swap_limit_in_bytes: swap,
            ..Default::default()
        })
    };
    assert_eq!(check_alone(&swap(0, 4096), &v2), Err(SpecError::SwapAlone));
    assert_eq!(check_alone(&swap(0, -1), &v2), Ok(()));
    let memory = resources(&swap(1024, 4096)).memory().unwrap();
    assert_eq!((memory.limit(), memory.swap()), (Some(1024), Some(4096)));
}

/// Mounting cgroup2 in the node's cgroup namespace sets the options of all its mounts.
#[test]
fn a_privileged_container_does_not_take_options_from_the_nodes_cgroup_mount() {
    let v2 = Host {
        cgroup_v2: true,
        cgroup_v2_options: vec!["nsdelegate".into(), "memory_recursiveprot".into()],
        ..host()
    };
    let privileged =
        secured(api::LinuxContainerSecurityContext { privileged: true, ..Default::default() });
    let spec = planned(&privileged, &v2, None).unwrap();
    let shared = options(at(&spec, "/sys/fs/cgroup").unwrap());
    assert!(shared.contains(&"nsdelegate") && shared.contains(&"memory_recursiveprot"));
    let spec = planned(&api::ContainerConfig::default(), &v2, None).unwrap();
    assert!(!options(at(&spec, "/sys/fs/cgroup").unwrap()).contains(&"nsdelegate"));
}

#[test]
fn a_spec_says_where_it_comes_from() {
    let config = api::ContainerConfig {
        metadata: Some(api::ContainerMetadata { name: "c".into(), attempt: 2 }),
        image: Some(api::ImageSpec {
            image: "sha256:1".into(),
            user_specified_image: "busybox:1".into(),
            ..Default::default()
        }),
        ..Default::default()
    };
    let spec = planned(&config, &host(), None).unwrap();
    let annotations = spec.annotations().as_ref().unwrap();
    let of = |key: &str| annotations[&format!("io.kubernetes.cri.{key}")].as_str();
    assert_eq!(
        (of("container-type"), of("sandbox-id"), of("sandbox-uid")),
        ("container", "s1", "u1")
    );
    assert_eq!((of("sandbox-name"), of("sandbox-namespace")), ("pod", "default"));
    assert_eq!((of("container-name"), of("image-name")), ("c", "busybox:1"));
}

const BASE: &str = r#"{
    "ociVersion": "1.0.2",
    "process": {"cwd": "/", "user": {"uid": 0, "gid": 0}, "env": ["BASE=1", "PATH=/base"],
        "capabilities": {"bounding": ["CAP_KILL", "CAP_SYS_PTRACE"]},
        "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 10, "hard": 20},
                    {"type": "RLIMIT_CORE", "soft": 0, "hard": 0}]},
    "hooks": {"createRuntime": [{"path": "/bin/one"}], "poststop": [{"path": "/bin/two"}]},
    "annotations": {"a": "b", "io.kubernetes.cri.container-name": "x"},
    "mounts": [
        {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["size=1m"]},
        {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["size=1m"]},
        {"destination": "/extra", "type": "bind", "source": "/opt/extra", "options": ["rbind", "ro"]}],
    "linux": {"sysctl": {"net.core.somaxconn": "7"},
        "seccomp": {"defaultAction": "SCMP_ACT_LOG"},
        "devices": [{"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229}],
        "resources": {"devices": [{"allow": false, "access": "rwm"},
                                  {"allow": true, "type": "c", "major": 10, "minor": 229, "access": "rwm"}],
                      "pids": {"limit": 99}}}
}"#;

#[test]
fn a_base_spec_fills_in_what_nobody_decided() {
    let base: Spec = serde_json::from_str(BASE).unwrap();
    let spec = planned(&api::ContainerConfig::default(), &host(), Some(&base)).unwrap();
    let process = spec.process().as_ref().unwrap();
    let limit = |typ| process.rlimits().iter().flatten().find(|r| r.typ() == typ).unwrap().soft();
    assert_eq!((limit(PosixRlimitType::RlimitNofile), limit(PosixRlimitType::RlimitCore)), (10, 0));
    let env = process.env().as_ref().unwrap();
    assert!(env.contains(&"BASE=1".to_owned()));
    assert_eq!(env.iter().filter(|e| e.starts_with("PATH=")).count(), 1);
    let bounding = process.capabilities().as_ref().unwrap().bounding().clone().unwrap();
    assert_eq!(bounding.len(), 2);
    let hooks = spec.hooks().as_ref().unwrap();
    assert_eq!(hooks.create_runtime().as_ref().unwrap()[0].path(), Path::new("/bin/one"));
    assert_eq!(hooks.poststop().as_ref().unwrap().len(), 1);
    let annotations = spec.annotations().as_ref().unwrap();
    assert_eq!(annotations["a"], "b");
    assert_eq!(annotations["io.kubernetes.cri.container-name"], "");
    // The kernel's file systems as the base has them; the sandbox's own stay.
    assert_eq!(options(at(&spec, "/dev").unwrap()), ["size=1m"]);
    assert_eq!(at(&spec, "/dev/shm").unwrap().source().as_deref(), Some(Path::new("/run/shm")));
    assert!(at(&spec, "/extra").is_some());
    let linux = spec.linux().as_ref().unwrap();
    assert_eq!(linux.sysctl().as_ref().unwrap()["net.core.somaxconn"], "7");
    assert!(linux.seccomp().is_some());
    assert_eq!(linux.devices().as_ref().unwrap()[0].typ(), LinuxDeviceType::C);
    let resources = linux.resources().as_ref().unwrap();
    assert_eq!(resources.pids().unwrap().limit(), 99);
    let rules = resources.devices().as_ref().unwrap();
    assert!(rules.iter().any(|rule| rule.allow() && rule.minor() == Some(229)));
    // A second "deny everything" would take back what was allowed before it.
    assert_eq!(rules.iter().filter(|rule| !rule.allow()).count(), 1);
}

#[test]
fn a_privileged_container_keeps_its_freedom_over_a_base_spec() {
    let text = BASE.replace("/extra\"", "/sys\"").replace("\"bind\"", "\"sysfs\"");
    let base: Spec = serde_json::from_str(&text).unwrap();
    let config =
        secured(api::LinuxContainerSecurityContext { privileged: true, ..Default::default() });
    let spec = planned(&config, &host(), Some(&base)).unwrap();
    assert!(options(at(&spec, "/sys").unwrap()).contains(&"rw"));
    assert!(spec.linux().as_ref().unwrap().seccomp().is_none());
}

#[test]
fn labels_are_in_the_spec_and_a_privileged_containers_processes_have_none() {
    let image = image();
    let label = selinux::Label::parse("u:r:container_t:s0:c1,c2").unwrap();
    for privileged in [false, true] {
        let config =
            secured(api::LinuxContainerSecurityContext { privileged, ..Default::default() });
        let spec = plan_spec(&Inputs {
            cgroup: PathBuf::from("/c1"),
            apparmor: Some("strict".into()),
            labels: Some(selinux::Labels::of_process(label.clone(), None)),
            ..inputs(&config, &image, &Pod::default(), &host())
        })
        .unwrap();
        let process = spec.process().clone().unwrap();
        assert_eq!(process.apparmor_profile().as_deref(), Some("strict"));
        let expected = (!privileged).then(|| "u:r:container_t:s0:c1,c2".to_owned());
        assert_eq!(*process.selinux_label(), expected);
        let files = spec.linux().clone().unwrap().mount_label().clone();
        assert_eq!(files.as_deref(), Some("u:object_r:container_file_t:s0:c1,c2"));
    }
}
