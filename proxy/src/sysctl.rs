//! Kernel settings that forwarding needs, in the network namespace of the calling thread. A value
//! that is right is left alone, so that a read-only `/proc/sys` is no problem where all is well.

use std::path::Path;

use crate::config::Config;
use crate::status::ProxyError;

/// Sets one value unless it is there; `at_least` leaves a higher one.
fn ensure(name: &str, value: u64, at_least: bool) -> Result<(), ProxyError> {
    let path = Path::new("/proc/sys").join(name);
    let there = std::fs::read_to_string(&path).ok().and_then(|v| v.trim().parse::<u64>().ok());
    match there {
        Some(found) if found == value || (at_least && found > value) => return Ok(()),
        _ => {}
    }
    std::fs::write(&path, value.to_string()).map_err(|error| ProxyError {
        object: format!("sysctl {}", name.replace('/', ".")),
        message: format!(
            "set {} to {value}: {error}; set it yourself with sysctl -w, or make /proc/sys writable",
            path.display()
        ),
    })
}

/// Whether anybody may write the value: root is refused too if not.
fn writable(name: &str) -> bool {
    use std::os::unix::fs::PermissionsExt;
    let metadata = std::fs::metadata(Path::new("/proc/sys").join(name));
    metadata.is_ok_and(|m| m.permissions().mode() & 0o200 != 0)
}

/// As upstream: a machine of many cores does not get a table of more than this by `maxPerCore`.
const MAX_SCALED: u64 = 1 << 20;

fn conntrack_max(scaled: u64, min: u64) -> u64 {
    if scaled > MAX_SCALED { MAX_SCALED } else { scaled.max(min) }
}

/// Sets this process's `oom_score_adj`; without the right to, it stays as it is.
fn oom_score_adj(score: i32) {
    let path = "/proc/self/oom_score_adj";
    if let Err(error) = std::fs::write(path, score.to_string()) {
        tracing::info!(score, %error, "oomScoreAdj is not set; it needs CAP_SYS_RESOURCE");
    }
}

/// Sets what the configuration asks for; tells what could not be set.
pub fn apply(config: &Config) -> Vec<ProxyError> {
    if !config.set_sysctls {
        return Vec::new();
    }
    let mut errors = Vec::new();
    config.oom_score_adj.into_iter().for_each(oom_score_adj);
    let mut set = |name: &str, value: u64, at_least: bool| {
        errors.extend(ensure(name, value, at_least).err());
    };
    set("net/ipv4/ip_forward", 1, false);
    let conntrack = &config.conntrack;
    let cpus = std::thread::available_parallelism().map_or(1, |n| n.get()) as u64;
    let max = conntrack
        .max_per_core
        .filter(|n| *n > 0)
        .map(|n| conntrack_max(u64::from(n) * cpus, conntrack.min.unwrap_or_default().into()));
    // In a network namespace of its own the limit is the host's to set.
    if let Some(max) = max.filter(|_| writable("net/netfilter/nf_conntrack_max")) {
        set("net/netfilter/nf_conntrack_max", max, true);
        // A quarter as many buckets, as the kernel chooses them itself; read-only in containers.
        let buckets = Path::new("/sys/module/nf_conntrack/parameters/hashsize");
        let there = std::fs::read_to_string(buckets).ok().and_then(|v| v.trim().parse().ok());
        if there.is_some_and(|there: u64| there < max / 4)
            && let Err(error) = std::fs::write(buckets, (max / 4).to_string())
        {
            tracing::info!(%error, "nf_conntrack's hash table stays as small as it is");
        }
    }
    for (name, value) in [
        ("nf_conntrack_tcp_timeout_established", conntrack.tcp_established_timeout),
        ("nf_conntrack_tcp_timeout_close_wait", conntrack.tcp_close_wait_timeout),
        ("nf_conntrack_udp_timeout", conntrack.udp_timeout),
        ("nf_conntrack_udp_timeout_stream", conntrack.udp_stream_timeout),
    ] {
        if let Some(value) = value.filter(|v| !v.is_zero()) {
            set(&format!("net/netfilter/{name}"), value.as_secs(), false);
        }
    }
    if conntrack.tcp_be_liberal {
        set("net/netfilter/nf_conntrack_tcp_be_liberal", 1, false);
    }
    errors
}

/// Whether connection tracking takes packets outside of a connection's window for part of it.
pub fn tcp_is_liberal() -> bool {
    let path = "/proc/sys/net/netfilter/nf_conntrack_tcp_be_liberal";
    std::fs::read_to_string(path).is_ok_and(|value| value.trim() != "0")
}

/// Lets IPv6 be forwarded: asked for when the first Service with an IPv6 address appears, as it
/// makes the node ignore router advertisements.
pub fn forward_ipv6() -> Result<(), ProxyError> {
    ensure("net/ipv6/conf/all/forwarding", 1, false)
}

/// Lets connections from 127.0.0.1 to a NodePort leave the node.
pub fn route_localnet() -> Result<(), ProxyError> {
    ensure("net/ipv4/conf/all/route_localnet", 1, false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_connections_grows_with_the_cores_up_to_a_million() {
        assert_eq!(conntrack_max(2 * 32_768, 131_072), 131_072);
        assert_eq!(conntrack_max(8 * 32_768, 131_072), 262_144);
        assert_eq!(conntrack_max(64 * 32_768, 131_072), 1_048_576);
        assert_eq!(conntrack_max(64 * 32_768, 4_000_000), 1_048_576);
    }
}
