//! The files of a sandbox that its containers see: `/etc/hosts`, `/etc/hostname`,
//! `/etc/resolv.conf`.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::api;
use crate::network::Dns;

/// Files of the sandbox and where they appear in its containers.
const FILES: [(&str, &str); 3] =
    [("hostname", "/etc/hostname"), ("hosts", "/etc/hosts"), ("resolv.conf", "/etc/resolv.conf")];

/// Writes the files into the sandbox's directory.
pub(super) fn write(
    directory: &Path,
    config: &api::PodSandboxConfig,
    hostname: &str,
    host_network: bool,
) -> io::Result<()> {
    fs::write(directory.join("hostname"), format!("{hostname}\n"))?;
    let hosts = if host_network { fs::read_to_string("/etc/hosts").ok() } else { None };
    fs::write(directory.join("hosts"), hosts.unwrap_or_else(|| plan_hosts(hostname)))?;
    let resolv = match &config.dns_config {
        // Also one that says nothing: a pod with `dnsPolicy: None` has what it says.
        Some(dns) => plan_resolv(dns),
        None => fs::read_to_string("/etc/resolv.conf").unwrap_or_default(),
    };
    fs::write(directory.join("resolv.conf"), resolv)
}

/// Writes the resolver's configuration that came with the network, for a sandbox that has none.
pub(super) fn take_dns(
    directory: &Path,
    config: &api::PodSandboxConfig,
    dns: &Dns,
) -> io::Result<()> {
    if config.dns_config.is_some() {
        return Ok(());
    }
    let dns = api::DnsConfig {
        servers: dns.servers.clone(),
        searches: dns.searches.clone(),
        options: dns.options.clone(),
    };
    fs::write(directory.join("resolv.conf"), plan_resolv(&dns))
}

/// Where each file is bound.
pub(super) fn bindings(directory: &Path) -> BTreeMap<&'static str, PathBuf> {
    FILES.iter().map(|(name, target)| (*target, directory.join(name))).collect()
}

fn plan_hosts(hostname: &str) -> String {
    format!(
        "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n127.0.1.1\t{hostname}\n"
    )
}

/// resolv.conf(5) of a pod's DNS configuration.
fn plan_resolv(dns: &api::DnsConfig) -> String {
    let mut text = String::new();
    if !dns.searches.is_empty() {
        text.push_str(&format!("search {}\n", dns.searches.join(" ")));
    }
    for server in &dns.servers {
        text.push_str(&format!("nameserver {server}\n"));
    }
    if !dns.options.is_empty() {
        text.push_str(&format!("options {}\n", dns.options.join(" ")));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolv_conf_names_search_servers_and_options() {
        let dns = api::DnsConfig {
            servers: vec!["10.96.0.10".into()],
            searches: vec!["default.svc.cluster.local".into(), "svc.cluster.local".into()],
            options: vec!["ndots:5".into()],
        };
        assert_eq!(
            plan_resolv(&dns),
            "search default.svc.cluster.local svc.cluster.local\nnameserver 10.96.0.10\noptions ndots:5\n"
        );
    }

    #[test]
    fn a_dns_configuration_that_says_nothing_is_not_the_nodes() {
        let folder = tempfile::tempdir().unwrap();
        let read = || fs::read_to_string(folder.path().join("resolv.conf")).unwrap_or_default();
        let mut config = api::PodSandboxConfig::default();
        write(folder.path(), &config, "h", false).unwrap();
        assert_eq!(read(), fs::read_to_string("/etc/resolv.conf").unwrap_or_default());
        config.dns_config = Some(api::DnsConfig::default());
        write(folder.path(), &config, "h", false).unwrap();
        assert_eq!(read(), "");
    }

    #[test]
    fn dns_of_the_network_is_for_sandboxes_without_their_own() {
        let folder = tempfile::tempdir().unwrap();
        let dns = Dns { servers: vec!["10.9.0.1".into()], ..Dns::default() };
        let read = || fs::read_to_string(folder.path().join("resolv.conf")).unwrap_or_default();
        let own = api::DnsConfig { servers: vec!["10.96.0.10".into()], ..Default::default() };
        let with = api::PodSandboxConfig { dns_config: Some(own), ..Default::default() };
        take_dns(folder.path(), &with, &dns).unwrap();
        assert_eq!(read(), "");
        take_dns(folder.path(), &api::PodSandboxConfig::default(), &dns).unwrap();
        assert_eq!(read(), "nameserver 10.9.0.1\n");
    }
}
