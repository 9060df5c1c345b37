//! What flags and documents come to.

use clap::Parser;

use super::*;
use crate::config::fields::parse_cidr;

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    flags: NodeFlags,
}

fn resolved(line: &str, file: &str) -> Result<NodeConfig, ConfigError> {
    let args = std::iter::once("run").chain(line.split_whitespace());
    let flags = Line::try_parse_from(args).unwrap().flags;
    let host = Host { hostname: "Box-1".into(), systemd_cgroups: false };
    resolve(&flags, crate::config::parse(file.as_bytes())?, &host)
}

const KUBELET: &str = "kind: KubeletConfiguration\napiVersion: kubelet.config.k8s.io/v1beta1\n";

#[test]
fn flags_win_over_files_and_files_over_defaults() {
    let config = resolved("", "").unwrap();
    assert_eq!(config.node_name, "box-1");
    assert_eq!(config.max_pods, 110);
    assert_eq!(config.kubeconfig.as_deref(), Some(KUBECONFIG.as_ref()));
    assert_eq!(config.healthz.map(|a| a.to_string()).as_deref(), Some("127.0.0.1:10248"));
    assert!(config.parts.cri);
    let file = format!("{KUBELET}maxPods: 50\nhealthzPort: 0\nclusterDNS: [10.0.0.10]\n");
    let config = resolved("", &file).unwrap();
    assert_eq!((config.max_pods, config.healthz), (50, None));
    let config = resolved("--max-pods 70 --cluster-dns 1.1.1.1,::1", &file).unwrap();
    assert_eq!((config.max_pods, config.cluster_dns.len()), (70, 2));
}

#[test]
fn standalone_needs_no_kubeconfig_and_has_a_folder() {
    let config = resolved("--standalone", "").unwrap();
    assert_eq!(config.kubeconfig, None);
    assert_eq!(config.pod_manifest_path.as_deref(), Some(MANIFESTS.as_ref()));
    let config = resolved("--standalone --manifests /m", "").unwrap();
    assert_eq!(config.pod_manifest_path.as_deref(), Some("/m".as_ref()));
    let config = resolved("--container-runtime-endpoint unix:///c.sock", "").unwrap();
    assert!(!config.parts.cri);
    let config = resolved("--only proxy", "").unwrap();
    assert_eq!(config.parts, Parts { agent: false, proxy: true, cri: false });
}

#[test]
fn the_runtime_is_told_of_handlers_and_devices() {
    let head = "kind: LongshoreConfiguration\napiVersion: longshore.io/v1alpha1\n";
    let config = resolved("", head).unwrap();
    assert_eq!((config.cdi_spec_dirs, config.runtime_handlers.len()), (None, 0));
    let file = format!(
        "{head}cdiSpecDirs: [/etc/cdi, /opt/cdi]\nruntimeHandlers:\n  gpu: {{baseSpec: /etc/gpu.json}}\n  \
         kata: {{path: /opt/kata/bin/kata-runtime}}\n"
    );
    let config = resolved("", &file).unwrap();
    assert_eq!(config.cdi_spec_dirs.unwrap().len(), 2);
    let handler = |path: Option<&str>, base: Option<&str>| RuntimeHandler {
        path: path.map(PathBuf::from),
        base_spec: base.map(PathBuf::from),
    };
    assert_eq!(config.runtime_handlers["gpu"], handler(None, Some("/etc/gpu.json")));
    let kata = handler(Some("/opt/kata/bin/kata-runtime"), None);
    assert_eq!(config.runtime_handlers["kata"], kata);
    let misspelt = format!("{head}runtimeHandlers: {{kata: {{program: /x}}}}\n");
    assert!(resolved("", &misspelt).unwrap_err().to_string().contains("program"));
}

#[test]
fn bad_values_name_their_field() {
    for (line, file, expected) in [
        ("--hostname-override a_b", String::new(), "--hostname-override"),
        ("--pod-cidr 10.0.0.0", String::new(), "--pod-cidr"),
        ("--pod-cidr 10.0.0.0/8,11.0.0.0/8", String::new(), "--pod-cidr"),
        ("--service-node-port-range 9-1", String::new(), "--service-node-port-range"),
        ("--proxy-healthz-bind-address x", String::new(), "--proxy-healthz-bind-address"),
        ("", format!("{KUBELET}evictionHard: {{memory.available: lots}}"), "evictionHard.memory"),
        ("", format!("{KUBELET}cgroupDriver: cgroupsv3"), "cgroupDriver"),
        (
            "",
            "kind: KubeProxyConfiguration\napiVersion: kubeproxy.config.k8s.io/v1alpha1\nmode: ipvs".into(),
            "KubeProxyConfiguration.mode",
        ),
    ] {
        let error = resolved(line, &file).unwrap_err().to_string();
        assert!(error.contains(expected), "{line} {file}: {error}");
    }
}

#[test]
fn cidrs_lose_their_host_bits() {
    let text = |cidr| parse_cidr(cidr).map(|c| format!("{}/{}", c.address, c.prefix_len));
    assert_eq!(text("10.1.2.3/16").as_deref(), Some("10.1.0.0/16"));
    assert_eq!(text("10.1.2.3/0").as_deref(), Some("0.0.0.0/0"));
    assert_eq!(text("fd00::1/64").as_deref(), Some("fd00::/64"));
    assert_eq!(text("10.0.0.0/33"), None);
}

#[test]
fn a_mode_takes_its_own_section_and_an_open_mode_either() {
    let head = "kind: KubeProxyConfiguration\napiVersion: kubeproxy.config.k8s.io/v1alpha1\n";
    let of_iptables = "iptables: {masqueradeAll: true, masqueradeBit: 9, syncPeriod: 7s}\n";
    let of_nftables = "nftables: {masqueradeAll: true, masqueradeBit: 9, syncPeriod: 7s}\n";
    for (mode, section, taken) in [
        ("iptables", of_iptables, true),
        ("iptables", of_nftables, false),
        ("nftables", of_iptables, false),
        ("nftables", of_nftables, true),
        ("''", of_iptables, true),
        ("''", of_nftables, true),
    ] {
        let file = format!("{head}mode: {mode}\n{section}");
        let proxy = resolved("", &file).unwrap().proxy;
        let expected = if taken { (true, 9, 7) } else { (false, 14, 300) };
        let got = (proxy.masquerade_all, proxy.masquerade_bit, proxy.sync_period.as_secs());
        assert_eq!(got, expected, "{file}");
    }
}
