//! The ports that a node serves on, and who holds them.

use std::collections::BTreeMap;
use std::fs;

use super::Finding;

const CHECK: &str = "ports";

/// Port, what for, whether the node does not start without it.
const PORTS: [(u16, &str, bool); 4] = [
    (10250, "node API (--port)", true),
    (10248, "agent /healthz (--healthz-port)", true),
    (10256, "proxy /healthz (--proxy-healthz-bind-address)", false),
    (10249, "proxy metrics (--proxy-metrics-bind-address)", false),
];

/// Looks at them.
pub fn check(longshore_runs: bool) -> Vec<Finding> {
    let tables = ["/proc/net/tcp", "/proc/net/tcp6"];
    let text: String =
        tables.into_iter().filter_map(|table| fs::read_to_string(table).ok()).collect();
    let listening = listening(&text);
    let holders = PORTS
        .into_iter()
        .filter_map(|(port, ..)| Some((port, holder(*listening.get(&port)?))))
        .collect();
    plan_ports(&holders, longshore_runs)
}

/// `holders`: port to the name of the program that listens, where it is known.
pub fn plan_ports(holders: &BTreeMap<u16, Option<String>>, longshore_runs: bool) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (port, purpose, needed) in PORTS {
        let Some(holder) = holders.get(&port) else { continue };
        let own = holder.as_deref().is_some_and(|name| name.starts_with("longshore"));
        if own || (holder.is_none() && longshore_runs) {
            continue;
        }
        let who = holder.clone().unwrap_or_else(|| "another process".to_owned());
        let message = format!("{who} listens on {port}, which is for the {purpose}");
        let remedy =
            format!("stop {who} (ss -lptn 'sport = :{port}' shows it), or take another port");
        findings.push(match needed {
            true => Finding::error(CHECK, message, remedy),
            false => Finding::warning(CHECK, message, remedy),
        });
    }
    if findings.is_empty() {
        let state = if holders.is_empty() { "free" } else { "longshore's own" };
        findings.push(Finding::ok(CHECK, format!("10250, 10248, 10256 and 10249 are {state}")));
    }
    findings
}

/// Listening ports of a `/proc/net/tcp`, with their inodes.
fn listening(text: &str) -> BTreeMap<u16, u64> {
    /// TCP_LISTEN of net/tcp_states.h.
    const LISTEN: &str = "0A";
    text.lines()
        .filter_map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            (words.get(3) == Some(&LISTEN)).then_some(())?;
            let port = u16::from_str_radix(words.get(1)?.rsplit(':').next()?, 16).ok()?;
            Some((port, words.get(9)?.parse().ok()?))
        })
        .collect()
}

/// The program that has the socket `inode` open.
fn holder(inode: u64) -> Option<String> {
    let wanted = format!("socket:[{inode}]");
    for entry in fs::read_dir("/proc").ok()?.flatten() {
        let folder = entry.path();
        let files = fs::read_dir(folder.join("fd")).into_iter().flatten().flatten();
        let holds = |e: &fs::DirEntry| {
            fs::read_link(e.path()).is_ok_and(|to| to.as_os_str() == wanted.as_str())
        };
        if files.into_iter().any(|e| holds(&e)) {
            let name = fs::read_to_string(folder.join("comm")).ok()?;
            return Some(name.trim().to_owned());
        }
    }
    None
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::doctor::Level;

    #[test]
    fn whoever_holds_a_port_is_named_unless_it_is_this_node() {
        let held = |name: Option<&str>| [(10250, name.map(str::to_owned))].into();
        let first = |name, runs| plan_ports(&held(name), runs).remove(0);
        let kubelet = first(Some("kubelet"), true);
        assert_eq!(kubelet.level, Level::Error);
        assert!(kubelet.message.starts_with("kubelet listens on 10250"), "{}", kubelet.message);
        assert_eq!(first(Some("longshore"), true).level, Level::Ok);
        assert_eq!(first(None, true).level, Level::Ok);
        assert_eq!(first(None, false).level, Level::Error);
        assert_eq!(plan_ports(&BTreeMap::new(), false)[0].level, Level::Ok);
    }

    #[test]
    fn the_kernels_tables_lead_to_the_program() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let text = fs::read_to_string("/proc/net/tcp").unwrap();
        let inode = listening(&text)[&port];
        let own = fs::read_to_string("/proc/self/comm").unwrap();
        assert_eq!(holder(inode).as_deref(), Some(own.trim()));
    }
}
