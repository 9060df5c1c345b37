//! Which sysctls a sandbox may set: those of namespaces it has to itself. Any other would be the
//! node's, for every pod on it.

use std::collections::{BTreeMap, HashMap};

use super::SpecError;
use crate::api::{NamespaceMode, NamespaceOption};

/// System V IPC, besides `fs.mqueue.*`.
const IPC: [&str; 8] = [
    "kernel.msgmax",
    "kernel.msgmnb",
    "kernel.msgmni",
    "kernel.sem",
    "kernel.shmall",
    "kernel.shmmax",
    "kernel.shmmni",
    "kernel.shm_rmid_forced",
];

/// What pods with a network of their own may do unprivileged, as with containerd 2: bind ports below
/// 1024, and ping.
const NETWORK_DEFAULTS: [(&str, &str); 2] =
    [("net.ipv4.ip_unprivileged_port_start", "0"), ("net.ipv4.ping_group_range", "0 2147483647")];

/// The sysctls of a sandbox by their paths below `/proc/sys`, with the defaults of its own network.
///
/// # Errors
/// [`SpecError::Sysctl`].
pub fn plan(
    asked: &HashMap<String, String>,
    namespaces: &NamespaceOption,
) -> Result<BTreeMap<String, String>, SpecError> {
    let own_network = namespaces.network() != NamespaceMode::Node;
    let own_ipc = namespaces.ipc() != NamespaceMode::Node;
    let own_users =
        namespaces.userns_options.as_ref().is_some_and(|u| u.mode() != NamespaceMode::Node);
    let mut planned = BTreeMap::new();
    for (name, value) in asked {
        let dotted = dotted(name);
        let refused = |reason| Err(SpecError::Sysctl { name: name.clone(), reason });
        let network = dotted.starts_with("net.");
        let ipc = IPC.contains(&dotted.as_str()) || dotted.starts_with("fs.mqueue.");
        let path = exchange(&dotted);
        if path.split('/').any(|part| matches!(part, "" | "." | "..")) {
            return refused("it is not a name");
        }
        if network && !own_network {
            return refused("the pod uses the node's network (hostNetwork)");
        }
        if ipc && !own_ipc {
            return refused("the pod uses the node's IPC namespace (hostIPC)");
        }
        if dotted == "kernel.hostname" {
            return refused("set the pod's hostname instead");
        }
        if dotted == "kernel.domainname" && !own_network {
            return refused("the pod uses the node's host name (hostNetwork)");
        }
        if !network && !ipc && dotted != "kernel.domainname" {
            return refused("it is the node's, not a namespace's");
        }
        planned.insert(path, value.clone());
    }
    if own_network {
        for (name, value) in NETWORK_DEFAULTS {
            // A user namespace has no group 2147483647.
            let unmapped = own_users && name.ends_with("ping_group_range");
            if !unmapped {
                planned.entry(exchange(name)).or_insert_with(|| value.to_owned());
            }
        }
    }
    Ok(planned)
}

/// The spelling with dots. sysctl(8) knows two: dots, or slashes where a part holds a dot. The first
/// that is met says which it is.
fn dotted(name: &str) -> String {
    match name.find(['.', '/']).map(|at| name.as_bytes()[at]) {
        Some(b'/') => exchange(name),
        _ => name.to_owned(),
    }
}

/// From one spelling to the other.
fn exchange(name: &str) -> String {
    let other = |c| match c {
        '/' => '.',
        '.' => '/',
        other => other,
    };
    name.chars().map(other).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn planned(name: &str, options: &NamespaceOption) -> Result<BTreeMap<String, String>, String> {
        let asked = [(name.to_owned(), "1".to_owned())].into();
        plan(&asked, options).map_err(|e| e.to_string())
    }

    #[test]
    fn only_what_is_the_pods_own_may_be_set() {
        let node = NamespaceMode::Node as i32;
        let own = NamespaceOption::default();
        let host_network = NamespaceOption { network: node, ..Default::default() };
        let host_ipc = NamespaceOption { ipc: node, ..Default::default() };
        for good in [
            "net.core.somaxconn",
            "net/ipv4/conf/eth0.1/forwarding",
            "kernel.sem",
            "kernel.shm_rmid_forced",
            "fs.mqueue.msg_max",
            "kernel.domainname",
        ] {
            let path = if good.contains('/') { good.to_owned() } else { exchange(good) };
            assert_eq!(planned(good, &own).unwrap()[&path], "1");
        }
        assert!(
            planned("net.ipv4.conf.eth0/1.forwarding", &own)
                .unwrap()
                .contains_key("net/ipv4/conf/eth0.1/forwarding")
        );
        for node_wide in ["vm.swappiness", "kernel.panic", "fs.file-max", "kernel.hostname"] {
            let refused = planned(node_wide, &own).unwrap_err();
            assert!(refused.contains(node_wide), "{refused}");
        }
        for bad in ["", "net..x/", "net/../kernel/panic", "net.//.kernel.panic", "/net"] {
            assert!(planned(bad, &own).is_err(), "{bad}");
        }
        assert!(planned("net.core.somaxconn", &host_network).unwrap_err().contains("hostNetwork"));
        assert!(planned("net/core/somaxconn", &host_network).unwrap_err().contains("hostNetwork"));
        assert!(planned("kernel.domainname", &host_network).is_err());
        assert!(planned("kernel.sem", &host_ipc).unwrap_err().contains("hostIPC"));
        assert!(planned("kernel.sem", &host_network).is_ok());
    }

    #[test]
    fn pods_with_their_own_network_may_bind_low_ports_and_ping() {
        let port = "net/ipv4/ip_unprivileged_port_start";
        let ping = "net/ipv4/ping_group_range";
        let own = planned("net.core.somaxconn", &NamespaceOption::default()).unwrap();
        assert_eq!((own[port].as_str(), own[ping].as_str()), ("0", "0 2147483647"));
        let said = planned("net/ipv4/ip_unprivileged_port_start", &NamespaceOption::default());
        assert_eq!(said.unwrap()[port], "1");
        let host = NamespaceOption { network: NamespaceMode::Node as i32, ..Default::default() };
        assert!(plan(&HashMap::new(), &host).unwrap().is_empty());
        let users =
            crate::api::UserNamespace { mode: NamespaceMode::Pod as i32, ..Default::default() };
        let mapped = NamespaceOption { userns_options: Some(users), ..Default::default() };
        let mapped = plan(&HashMap::new(), &mapped).unwrap();
        assert_eq!(mapped.keys().collect::<Vec<_>>(), [port]);
    }
}
