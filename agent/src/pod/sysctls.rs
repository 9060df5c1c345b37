//! Which sysctls a pod may set. Pure.
//!
//! Only those of the pod's own namespaces can be set without changing the node for all. Of them the
//! safe ones need no permission; the rest are for `allowedUnsafeSysctls` to allow. The runtime
//! checks names and namespaces once more.

use k8s_openapi::api::core::v1::Pod;

use super::spec::{host_network, spec_of};

/// Sysctls that affect nobody but the pod, on the kernels that this node runs on (Kubernetes' docs,
/// "Using sysctls in a Kubernetes Cluster").
const SAFE: [&str; 12] = [
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.ping_group_range",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
    "net.ipv4.tcp_rmem",
    "net.ipv4.tcp_wmem",
];

/// Names, or beginnings of names before a `*`, of the IPC namespace (`ipc_namespaces(7)`).
const IPC: [&str; 10] = [
    "kernel.sem",
    "kernel.shm",
    "kernel.shmall",
    "kernel.shmmax",
    "kernel.shmmni",
    "kernel.shm_rmid_forced",
    "kernel.msg",
    "kernel.msgmax",
    "kernel.msgmnb",
    "kernel.msgmni",
];

/// The namespace that a sysctl belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Namespace {
    /// System V IPC and POSIX message queues.
    Ipc,
    /// The network.
    Net,
}

/// The name with dots between its parts, as `sysctl(8)` understands it: what separates first
/// separates everywhere, and the other of `.` and `/` belongs to the parts (`net/ipv4/conf/eth0.1/x`).
fn normalize(name: &str) -> String {
    let swap = |c| match c {
        '.' => '/',
        '/' => '.',
        other => other,
    };
    match name.find(['.', '/']).map(|at| &name[at..=at]) {
        Some("/") => name.chars().map(swap).collect(),
        _ => name.to_owned(),
    }
}

/// The namespace of a sysctl or of a pattern that ends in `*`; `None` for what all pods share.
pub fn namespace(pattern: &str) -> Option<Namespace> {
    let name = normalize(pattern);
    let name = name.split('*').next().unwrap_or_default();
    if IPC.contains(&name) || name.starts_with("fs.mqueue.") {
        Some(Namespace::Ipc)
    } else if name.starts_with("net.") {
        Some(Namespace::Net)
    } else {
        None
    }
}

/// Why a pod must not run with the sysctls it asks for, in upstream's words; `allowed` are names and
/// patterns of `allowedUnsafeSysctls`.
///
/// # Errors
/// The first sysctl that is neither safe nor allowed, or that is of a namespace which the pod shares
/// with the node.
pub fn check(pod: &Pod, allowed: &[String]) -> Result<(), String> {
    let spec = spec_of(pod);
    let sysctls = spec.security_context.as_ref().and_then(|c| c.sysctls.as_deref());
    for sysctl in sysctls.unwrap_or_default() {
        let name = normalize(&sysctl.name);
        let covers = |pattern: &String| match normalize(pattern).strip_suffix('*') {
            Some(prefix) => name.starts_with(prefix),
            None => normalize(pattern) == name,
        };
        if !SAFE.contains(&&*name) && !allowed.iter().any(covers) {
            return Err(format!("{name:?} not allowlisted"));
        }
        let shared = match namespace(&name) {
            Some(Namespace::Ipc) if spec.host_ipc == Some(true) => "IPC",
            Some(Namespace::Net) if host_network(spec) => "Net",
            _ => continue,
        };
        return Err(format!("{name:?} not allowed with host {shared} enabled"));
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_sysctl_reads_them() {
        for (name, expected) in [
            ("net.ipv4.ip_forward", "net.ipv4.ip_forward"),
            ("net/ipv4/ip_forward", "net.ipv4.ip_forward"),
            ("net.ipv4.conf.eth0/1.x", "net.ipv4.conf.eth0/1.x"),
            ("net/ipv4/conf/eth0.1/x", "net.ipv4.conf.eth0/1.x"),
            ("plain", "plain"),
            ("", ""),
        ] {
            assert_eq!(normalize(name), expected, "{name}");
        }
    }

    #[test]
    fn each_belongs_to_a_namespace_or_to_all() {
        use Namespace::{Ipc, Net};
        for (name, expected) in [
            ("kernel.sem", Some(Ipc)),
            ("kernel.shm*", Some(Ipc)),
            ("kernel.msg*", Some(Ipc)),
            ("kernel/shmmax", Some(Ipc)),
            ("fs.mqueue.msg_max", Some(Ipc)),
            ("fs.mqueue.*", Some(Ipc)),
            ("net.core.somaxconn", Some(Net)),
            ("net.*", Some(Net)),
            ("net*", None),
            ("kernel.panic", None),
            ("vm.swappiness", None),
            ("*", None),
        ] {
            assert_eq!(namespace(name), expected, "{name}");
        }
    }

    #[test]
    fn what_is_neither_safe_nor_allowed_is_forbidden() {
        let verdict = |name: &str, extra: &str| {
            let pod = format!(
                r#"{{"spec":{{"containers":[],"securityContext":{{"sysctls":[{{"name":"{name}","value":"1"}}]}}{extra}}}}}"#
            );
            let allowed = ["kernel.msg*", "net/core/somaxconn"].map(str::to_owned);
            check(&serde_json::from_str(&pod).unwrap(), &allowed)
        };
        let forbidden = |text: &str| Err(text.to_owned());
        for (name, extra, expected) in [
            ("kernel.shm_rmid_forced", "", Ok(())),
            ("net/ipv4/tcp_syncookies", "", Ok(())),
            ("kernel.msgmax", "", Ok(())),
            ("net.core.somaxconn", "", Ok(())),
            ("net.core.somaxconn2", "", forbidden("\"net.core.somaxconn2\" not allowlisted")),
            ("kernel.sem", "", forbidden("\"kernel.sem\" not allowlisted")),
            (
                "kernel.msgmax",
                r#","hostIPC":true"#,
                forbidden("\"kernel.msgmax\" not allowed with host IPC enabled"),
            ),
            (
                "net.ipv4.tcp_syncookies",
                r#","hostNetwork":true"#,
                forbidden("\"net.ipv4.tcp_syncookies\" not allowed with host Net enabled"),
            ),
            ("net.ipv4.tcp_syncookies", r#","hostIPC":true"#, Ok(())),
        ] {
            assert_eq!(verdict(name, extra), expected, "{name} {extra}");
        }
        assert_eq!(check(&Pod::default(), &[]), Ok(()));
    }
}
