//! Security settings of sandboxes and containers: users, groups, capabilities, profiles, namespaces.

use cri_shim::api;
use k8s_openapi::api::core::v1::{
    AppArmorProfile, Container, Pod, PodSecurityContext, PodSpec, SELinuxOptions, SeccompProfile,
    SecurityContext,
};

use super::ConfigError;
use crate::node_context::NodeContext;
use crate::pod::facts::ReadyImage;
use crate::pod::spec::{host_network, spec_of};
use crate::pod::status::pod_label;

/// Paths in /proc and /sys that a container must not see.
const MASKED: [&str; 12] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
];
/// Paths in /proc that a container must not write.
const READONLY: [&str; 5] =
    ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

fn pod_context(spec: &PodSpec) -> PodSecurityContext {
    spec.security_context.clone().unwrap_or_default()
}

fn int(value: i64) -> api::Int64Value {
    api::Int64Value { value }
}

fn selinux(options: &SELinuxOptions) -> api::SeLinuxOption {
    let text = |t: &Option<String>| t.clone().unwrap_or_default();
    api::SeLinuxOption {
        user: text(&options.user),
        role: text(&options.role),
        r#type: text(&options.type_),
        level: text(&options.level),
    }
}

fn profile(
    kind: &str,
    localhost: Option<&String>,
    root: Option<&std::path::Path>,
) -> api::SecurityProfile {
    use api::security_profile::ProfileType;
    let (kind, localhost_ref) = match kind {
        "Unconfined" => (ProfileType::Unconfined, String::new()),
        "Localhost" => {
            let name = localhost.cloned().unwrap_or_default();
            let name = match root {
                Some(root) => root.join("seccomp").join(name).display().to_string(),
                None => name,
            };
            (ProfileType::Localhost, name)
        }
        _ => (ProfileType::RuntimeDefault, String::new()),
    };
    api::SecurityProfile { profile_type: kind.into(), localhost_ref }
}

fn seccomp(
    own: Option<&SeccompProfile>,
    pod: Option<&SeccompProfile>,
    privileged: bool,
    node: &NodeContext,
) -> api::SecurityProfile {
    if privileged {
        return profile("Unconfined", None, None);
    }
    match own.or(pod) {
        Some(p) => profile(&p.type_, p.localhost_profile.as_ref(), Some(&node.root_dir)),
        None if node.seccomp_default => profile("RuntimeDefault", None, None),
        None => profile("Unconfined", None, None),
    }
}

/// Pods of older clients, and static ones, say the profile of each container in annotations.
const APPARMOR_ANNOTATION: &str = "container.apparmor.security.beta.kubernetes.io/";

/// The AppArmor profile of a container: its own, that of the older annotation, or the pod's.
fn apparmor_profile(pod: &Pod, container: &Container) -> Option<AppArmorProfile> {
    let own = container.security_context.as_ref().and_then(|s| s.app_armor_profile.clone());
    let annotated = || {
        let key = format!("{APPARMOR_ANNOTATION}{}", container.name);
        let text = pod.metadata.annotations.as_ref()?.get(&key)?;
        let (type_, localhost_profile) = match &**text {
            "runtime/default" => ("RuntimeDefault", None),
            "unconfined" => ("Unconfined", None),
            other => ("Localhost", Some(other.strip_prefix("localhost/")?.to_owned())),
        };
        Some(AppArmorProfile { type_: type_.to_owned(), localhost_profile })
    };
    let shared = || spec_of(pod).security_context.as_ref()?.app_armor_profile.clone();
    own.or_else(annotated).or_else(shared)
}

/// What is wrong with a pod's wishes for AppArmor on a node that has it or not, in kubelet's words.
pub fn check_apparmor(pod: &Pod, enabled: bool) -> Result<(), String> {
    let spec = spec_of(pod);
    let inits = spec.init_containers.iter().flatten();
    let containers = || inits.clone().chain(&spec.containers);
    let confines = |p: &AppArmorProfile| p.type_ != "Unconfined";
    let own = |c: &Container| {
        let security = c.security_context.as_ref();
        security.and_then(|s| s.app_armor_profile.as_ref()).is_some_and(confines)
    };
    let annotations = pod.metadata.annotations.iter().flatten();
    let required = pod_context(spec).app_armor_profile.as_ref().is_some_and(confines)
        || containers().any(own)
        || annotations
            .into_iter()
            .any(|(key, value)| key.starts_with(APPARMOR_ANNOTATION) && value != "unconfined");
    if !required {
        return Ok(());
    }
    if !enabled {
        return Err("AppArmor is not enabled on the host".to_owned());
    }
    let nameless = |p: &AppArmorProfile| {
        p.type_ == "Localhost" && p.localhost_profile.as_deref().unwrap_or("").trim().is_empty()
    };
    match containers().find(|c| apparmor_profile(pod, c).as_ref().is_some_and(nameless)) {
        Some(container) => {
            Err(format!("invalid empty AppArmor profile name of container {}", container.name))
        }
        None => Ok(()),
    }
}

/// The AppArmor profile for the runtime, also as runtimes before CRI's `apparmor` field take it.
fn apparmor(pod: &Pod, container: &Container) -> (Option<api::SecurityProfile>, String) {
    let Some(asked) = apparmor_profile(pod, container) else { return (None, String::new()) };
    let name = asked.localhost_profile.as_ref();
    let older = match &*asked.type_ {
        "Localhost" => format!("localhost/{}", name.map_or("", String::as_str)),
        "Unconfined" => "unconfined".to_owned(),
        _ => "runtime/default".to_owned(),
    };
    (Some(profile(&asked.type_, name, None)), older)
}

/// Namespaces of the sandbox and of containers that target no other. `userns` is whose ids they use.
pub fn namespaces(spec: &PodSpec, userns: &api::UserNamespace) -> api::NamespaceOption {
    use api::NamespaceMode as Mode;
    let node_or = |on_node: Option<bool>, other: Mode| {
        if on_node.unwrap_or(false) { Mode::Node } else { other }
    };
    let shared_pid = spec.share_process_namespace.unwrap_or(false);
    let pid = if shared_pid { Mode::Pod } else { Mode::Container };
    api::NamespaceOption {
        network: node_or(Some(host_network(spec)), Mode::Pod).into(),
        pid: node_or(spec.host_pid, pid).into(),
        ipc: node_or(spec.host_ipc, Mode::Pod).into(),
        target_id: String::new(),
        userns_options: Some(userns.clone()),
    }
}

fn groups(context: &PodSecurityContext) -> Vec<i64> {
    let mut groups: Vec<i64> = context.fs_group.into_iter().collect();
    groups.extend(context.supplemental_groups.iter().flatten());
    groups
}

fn groups_policy(context: &PodSecurityContext) -> i32 {
    match context.supplemental_groups_policy.as_deref() {
        Some("Strict") => api::SupplementalGroupsPolicy::Strict.into(),
        _ => api::SupplementalGroupsPolicy::Merge.into(),
    }
}

/// Whether any container of the pod is privileged: its sandbox is then, too.
fn any_privileged(spec: &PodSpec) -> bool {
    let inits = spec.init_containers.iter().flatten();
    spec.containers
        .iter()
        .chain(inits)
        .any(|c| c.security_context.as_ref().and_then(|s| s.privileged).unwrap_or(false))
}

/// Security settings of the sandbox.
pub fn sandbox_security(
    pod: &Pod,
    node: &NodeContext,
    userns: &api::UserNamespace,
) -> api::LinuxSandboxSecurityContext {
    let spec = spec_of(pod);
    let context = pod_context(spec);
    let privileged = any_privileged(spec);
    let seccomp = match (&context.seccomp_profile, privileged) {
        // The sandbox itself runs nothing of the pod's.
        (_, true) => profile("Unconfined", None, None),
        (Some(p), _) => profile(&p.type_, p.localhost_profile.as_ref(), Some(&node.root_dir)),
        (None, _) => profile("RuntimeDefault", None, None),
    };
    api::LinuxSandboxSecurityContext {
        namespace_options: Some(namespaces(spec, userns)),
        selinux_options: context.se_linux_options.as_ref().map(selinux),
        run_as_user: context.run_as_user.map(int),
        run_as_group: context.run_as_group.map(int),
        supplemental_groups: groups(&context),
        supplemental_groups_policy: groups_policy(&context),
        privileged,
        seccomp: Some(seccomp),
        ..Default::default()
    }
}

/// Security settings of a container made from `image`. `target` is the container whose process
/// namespace an ephemeral container joins.
pub fn container_security(
    pod: &Pod,
    container: &Container,
    image: &ReadyImage,
    target: Option<&str>,
    node: &NodeContext,
    userns: &api::UserNamespace,
) -> Result<api::LinuxContainerSecurityContext, ConfigError> {
    let spec = spec_of(pod);
    let shared = pod_context(spec);
    let own = container.security_context.clone().unwrap_or_default();
    let run_as_user = own.run_as_user.or(shared.run_as_user);
    let non_root = own.run_as_non_root.or(shared.run_as_non_root).unwrap_or(false);
    if non_root {
        check_non_root(pod, container, run_as_user, image)?;
    }
    let privileged = own.privileged.unwrap_or(false);
    let mut namespace_options = namespaces(spec, userns);
    if let Some(target) = target {
        namespace_options.pid = api::NamespaceMode::Target.into();
        namespace_options.target_id = target.to_owned();
    }
    let unmasked = privileged || own.proc_mount.as_deref() == Some("Unmasked");
    let paths = |list: &[&str]| -> Vec<String> {
        if unmasked { Vec::new() } else { list.iter().map(|p| (*p).to_owned()).collect() }
    };
    let seccomp =
        seccomp(own.seccomp_profile.as_ref(), shared.seccomp_profile.as_ref(), privileged, node);
    let (confinement, older) = apparmor(pod, container);
    // With a user set, the image's does not count; without one, the image's.
    let (uid, username) = match run_as_user {
        Some(uid) => (Some(uid), String::new()),
        None => (image.uid, image.username.clone()),
    };
    Ok(api::LinuxContainerSecurityContext {
        capabilities: Some(capabilities(&own)),
        privileged,
        namespace_options: Some(namespace_options),
        selinux_options: own
            .se_linux_options
            .as_ref()
            .or(shared.se_linux_options.as_ref())
            .map(selinux),
        run_as_user: uid.filter(|_| username.is_empty()).map(int),
        run_as_group: own.run_as_group.or(shared.run_as_group).map(int),
        run_as_username: username,
        readonly_rootfs: own.read_only_root_filesystem.unwrap_or(false),
        supplemental_groups: groups(&shared),
        supplemental_groups_policy: groups_policy(&shared),
        no_new_privs: no_new_privileges(&own),
        masked_paths: paths(&MASKED),
        readonly_paths: paths(&READONLY),
        seccomp: Some(seccomp),
        apparmor: confinement,
        #[allow(deprecated, reason = "runtimes before CRI's `apparmor` field read it")]
        apparmor_profile: older,
        ..Default::default()
    })
}

fn capabilities(own: &SecurityContext) -> api::Capability {
    let Some(caps) = &own.capabilities else { return api::Capability::default() };
    api::Capability {
        add_capabilities: caps.add.clone().unwrap_or_default(),
        drop_capabilities: caps.drop.clone().unwrap_or_default(),
        add_ambient_capabilities: Vec::new(),
    }
}

/// `allowPrivilegeEscalation: false` is no_new_privs; privilege already given makes it moot.
fn no_new_privileges(own: &SecurityContext) -> bool {
    own.allow_privilege_escalation == Some(false)
}

fn check_non_root(
    pod: &Pod,
    container: &Container,
    run_as_user: Option<i64>,
    image: &ReadyImage,
) -> Result<(), ConfigError> {
    let whose = format!("(pod: \"{}\", container: {})", pod_label(pod), container.name);
    match run_as_user {
        Some(0) => Err(ConfigError::RunsAsRoot(format!(
            "container's runAsUser breaks non-root policy {whose}"
        ))),
        Some(_) => Ok(()),
        None if !image.username.is_empty() => Err(ConfigError::RunsAsRoot(format!(
            "container has runAsNonRoot and image has non-numeric user ({}), cannot verify user is non-root {whose}",
            image.username
        ))),
        None if image.uid.unwrap_or(0) == 0 => Err(ConfigError::RunsAsRoot(format!(
            "container has runAsNonRoot and image will run as root {whose}"
        ))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::testing::pod;

    fn image(uid: Option<i64>, username: &str) -> ReadyImage {
        ReadyImage {
            image_ref: "i".into(),
            uid,
            username: username.into(),
            volumes: Default::default(),
        }
    }

    fn security(
        spec: &str,
        image: &ReadyImage,
    ) -> Result<api::LinuxContainerSecurityContext, ConfigError> {
        let pod = pod(spec);
        let (node, userns) = (NodeContext::new("n", vec![]), api::UserNamespace::default());
        container_security(&pod, &spec_of(&pod).containers[0], image, None, &node, &userns)
    }

    #[test]
    fn non_root_is_checked_against_the_image() {
        let spec = r#"{"securityContext":{"runAsNonRoot":true},"containers":[{"name":"c"}]}"#;
        for (image, fine) in [
            (image(Some(0), ""), false),
            (image(None, ""), false),
            (image(Some(7), ""), true),
            (image(None, "www"), false),
        ] {
            assert_eq!(security(spec, &image).is_ok(), fine, "{image:?}");
        }
        let own = r#"{"securityContext":{"runAsNonRoot":true},"containers":[{"name":"c","securityContext":{"runAsUser":0}}]}"#;
        assert!(security(own, &image(Some(7), "")).is_err());
    }

    #[test]
    fn containers_override_their_pod() {
        let spec = r#"{"securityContext":{"runAsUser":1,"runAsGroup":2,"fsGroup":3,"supplementalGroups":[4]},
            "containers":[{"name":"c","securityContext":{"runAsUser":9,"allowPrivilegeEscalation":false,"readOnlyRootFilesystem":true,"capabilities":{"drop":["ALL"]}}}]}"#;
        let s = security(spec, &image(Some(0), "")).unwrap();
        assert_eq!(s.run_as_user.unwrap().value, 9);
        assert_eq!(s.run_as_group.unwrap().value, 2);
        assert_eq!(s.supplemental_groups, [3, 4]);
        assert!(s.no_new_privs && s.readonly_rootfs);
        assert_eq!(s.capabilities.unwrap().drop_capabilities, ["ALL"]);
        assert_eq!(s.masked_paths.len(), MASKED.len());
    }

    fn pod_with(annotations: &str, pod_profile: &str, own: &str) -> Pod {
        let mut pod = pod(&format!(
            r#"{{"securityContext":{{{pod_profile}}},
                "initContainers":[{{"name":"i"}}],
                "containers":[{{"name":"c","securityContext":{{{own}}}}}]}}"#
        ));
        pod.metadata.annotations = serde_json::from_str(annotations).unwrap();
        pod
    }

    const KEY: &str = "container.apparmor.security.beta.kubernetes.io/c";
    const DEFAULT: &str = r#""appArmorProfile":{"type":"RuntimeDefault"}"#;
    const FREE: &str = r#""appArmorProfile":{"type":"Unconfined"}"#;
    const LOCAL: &str = r#""appArmorProfile":{"type":"Localhost","localhostProfile":"l"}"#;

    #[test]
    fn a_containers_own_apparmor_profile_wins_then_the_annotation_then_the_pods() {
        let said = |text: &str| format!(r#"{{"{KEY}":"{text}"}}"#);
        for (annotations, pod_profile, own, expected) in [
            ("{}".to_owned(), "", "", ""),
            ("{}".to_owned(), DEFAULT, "", "runtime/default"),
            ("{}".to_owned(), DEFAULT, LOCAL, "localhost/l"),
            (said("localhost/a"), DEFAULT, "", "localhost/a"),
            (said("localhost/a"), "", FREE, "unconfined"),
            (said("runtime/default"), FREE, "", "runtime/default"),
            (said("unconfined"), LOCAL, "", "unconfined"),
            // None at all, and so the pod's.
            (said("strange"), LOCAL, "", "localhost/l"),
            (said("strange"), "", "", ""),
        ] {
            let pod = pod_with(&annotations, pod_profile, own);
            let (profile, older) = apparmor(&pod, &spec_of(&pod).containers[0]);
            assert_eq!(older, expected, "{annotations} {pod_profile} {own}");
            assert_eq!(profile.is_none(), expected.is_empty());
            let name = expected.strip_prefix("localhost/").unwrap_or_default();
            assert_eq!(profile.unwrap_or_default().localhost_ref, name);
        }
    }

    #[test]
    fn pods_that_ask_for_apparmor_are_refused_where_there_is_none() {
        let off = Some("AppArmor is not enabled on the host");
        let nameless = r#""appArmorProfile":{"type":"Localhost","localhostProfile":" "}"#;
        let named = Some("invalid empty AppArmor profile name of container c");
        for (annotations, pod_profile, own, without, with) in [
            ("{}", "", "", None, None),
            ("{}", FREE, FREE, None, None),
            ("{}", DEFAULT, "", off, None),
            ("{}", "", LOCAL, off, None),
            ("{}", FREE, nameless, off, named),
            (&*format!(r#"{{"{KEY}":"runtime/default"}}"#), "", "", off, None),
            (&*format!(r#"{{"{KEY}":"unconfined"}}"#), "", "", None, None),
            (&*format!(r#"{{"{KEY}":"localhost/"}}"#), "", "", off, named),
        ] {
            let pod = pod_with(annotations, pod_profile, own);
            let refused = |enabled| check_apparmor(&pod, enabled).err();
            assert_eq!(refused(false).as_deref(), without, "{annotations} {pod_profile} {own}");
            assert_eq!(refused(true).as_deref(), with, "{annotations} {pod_profile} {own}");
        }
    }

    #[test]
    fn privileged_sees_everything() {
        let spec = r#"{"containers":[{"name":"c","securityContext":{"privileged":true,"seccompProfile":{"type":"RuntimeDefault"}}}]}"#;
        let s = security(spec, &image(None, "")).unwrap();
        assert!(s.privileged && s.masked_paths.is_empty());
        assert_eq!(
            s.seccomp.unwrap().profile_type(),
            api::security_profile::ProfileType::Unconfined
        );
    }
}
