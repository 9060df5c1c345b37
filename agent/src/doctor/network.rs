//! DNS of the machine, and the network that pods would get.

use std::fs;
use std::net::{IpAddr, ToSocketAddrs};
use std::path::Path;

use serde_json::Value;

use super::{Finding, Place};

/// The resolver configuration that pods inherit, and whether names resolve.
pub fn dns(place: &Place) -> Vec<Finding> {
    let text = fs::read_to_string(&place.resolv_conf).ok();
    let mut findings = plan_dns(&place.resolv_conf, text.as_deref());
    if let Some(server) = &place.server
        && let Err(error) = server.to_socket_addrs()
    {
        findings.push(Finding::error(
            "dns",
            format!("{server} does not resolve: {error}"),
            "correct /etc/resolv.conf or the name; or join by an address",
        ));
    }
    findings
}

/// What is to be said of the resolver configuration `text` at `path`.
pub fn plan_dns(path: &Path, text: Option<&str>) -> Vec<Finding> {
    let check = "dns";
    let shown = path.display();
    let Some(text) = text else {
        return vec![Finding::error(
            check,
            format!("{shown} cannot be read: pods get no DNS beyond the cluster"),
            "create it, or name another one with --resolv-conf",
        )];
    };
    let of = |key: &str| -> Vec<&str> {
        let lines = text.lines().map(|line| line.split(['#', ';']).next().unwrap_or_default());
        lines
            .filter_map(|line| {
                let mut words = line.split_whitespace();
                (words.next() == Some(key)).then(|| words.collect::<Vec<_>>())
            })
            .flatten()
            .collect()
    };
    let servers = of("nameserver");
    let mut findings = Vec::new();
    if servers.is_empty() {
        findings.push(Finding::warning(
            check,
            format!("{shown} names no server: pods get no DNS beyond the cluster"),
            "add a nameserver",
        ));
    }
    let local = |server: &&&str| server.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback());
    if let Some(server) = servers.iter().find(local) {
        findings.push(Finding::warning(
            check,
            format!(
                "{shown} names {server}: inside a pod that address is the pod itself, and a cluster \
                 DNS that forwards to it asks itself for ever"
            ),
            "set resolvConf: /run/systemd/resolve/resolv.conf (systemd-resolved's list of real \
             servers) in the KubeletConfiguration, or --resolv-conf",
        ));
    }
    if servers.len() > 3 {
        findings.push(Finding::warning(
            check,
            format!("{shown} names {} servers; pods get the first three", servers.len()),
            "remove the others",
        ));
    }
    if findings.is_empty() {
        findings.push(Finding::ok(check, format!("servers {}", servers.join(", "))));
    }
    findings
}

/// The network of pods.
pub fn cni(place: &Place) -> Vec<Finding> {
    let mut files: Vec<_> = fs::read_dir(&place.cni_conf_dir)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| {
            let kind = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
            ["conf", "conflist", "json"].contains(&kind)
        })
        .collect();
    files.sort();
    let texts: Vec<(String, Option<String>)> = files
        .iter()
        .map(|path| (path.display().to_string(), fs::read_to_string(path).ok()))
        .collect();
    let has = |plugin: &str| place.cni_bin_dirs.iter().any(|dir| dir.join(plugin).is_file());
    vec![plan_cni(&texts, &has, &place.cni_conf_dir)]
}

/// `files` in their order, with their texts; `has` says whether a plugin is installed.
pub fn plan_cni(
    files: &[(String, Option<String>)],
    has: &dyn Fn(&str) -> bool,
    dir: &Path,
) -> Finding {
    let check = "cni";
    let mut broken = None;
    for (path, text) in files {
        let value = text.as_deref().and_then(|t| serde_json::from_str::<Value>(t).ok());
        let Some(value) = value else {
            broken.get_or_insert(path);
            continue;
        };
        let alone = std::slice::from_ref(&value);
        let plugins = value["plugins"].as_array().map_or(alone, Vec::as_slice);
        let named = plugins.iter().filter_map(|plugin| plugin["type"].as_str());
        let missing: Vec<&str> = named.filter(|plugin| !has(plugin)).collect();
        if missing.is_empty() {
            return Finding::ok(check, format!("{path}, and its plugins are installed"));
        }
        return Finding::error(
            check,
            format!("{path} needs {}, which is not installed", missing.join(", ")),
            "install the plugins (package containernetworking-plugins, or the network's DaemonSet), or \
             name their folder with --cni-bin-dir",
        );
    }
    match broken {
        Some(path) => Finding::error(
            check,
            format!("{path} is not JSON: no network for pods"),
            "correct or remove it",
        ),
        None => Finding::ok(
            check,
            format!(
                "no configuration in {}: pods use the built-in bridge until there is one",
                dir.display()
            ),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Level;

    #[test]
    fn resolvers_that_mean_the_pod_itself_are_warned_of() {
        let levels = |text| {
            let found = plan_dns(Path::new("/etc/resolv.conf"), text);
            found.into_iter().map(|f| f.level).collect::<Vec<_>>()
        };
        assert_eq!(levels(Some("nameserver 10.0.0.2\nsearch a\n")), [Level::Ok]);
        assert_eq!(levels(Some("nameserver 127.0.0.53 # stub\n")), [Level::Warning]);
        assert_eq!(levels(Some("# nameserver 10.0.0.2\n")), [Level::Warning]);
        assert_eq!(levels(None), [Level::Error]);
        let many = "nameserver 1.1.1.1\n".repeat(4);
        assert_eq!(levels(Some(&many)), [Level::Warning]);
    }

    #[test]
    fn the_network_in_use_needs_its_plugins() {
        let file =
            |text: &str| vec![("/etc/cni/net.d/10-x.conflist".to_owned(), Some(text.to_owned()))];
        let has = |plugin: &str| plugin == "bridge";
        let level = |files: &[(String, Option<String>)]| {
            plan_cni(files, &has, Path::new("/etc/cni/net.d")).level
        };
        assert_eq!(level(&[]), Level::Ok);
        assert_eq!(level(&file(r#"{"plugins": [{"type": "bridge"}]}"#)), Level::Ok);
        assert_eq!(level(&file(r#"{"type": "calico"}"#)), Level::Error);
        assert_eq!(
            level(&file(r#"{"plugins": [{"type": "bridge"}, {"type": "x"}]}"#)),
            Level::Error
        );
        assert_eq!(level(&file("{")), Level::Error);
        let mut both = file("{");
        both.extend(file(r#"{"type": "bridge"}"#));
        assert_eq!(level(&both), Level::Ok, "the first usable file counts");
    }
}
