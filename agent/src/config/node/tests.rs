//! What flags and documents come to.

use clap::Parser;
use serde_json::json;

use super::*;
use crate::config::Threshold;
use crate::config::fields::parse_cidr;
use crate::eviction::Signal;

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

const PROXY: &str = "kind: KubeProxyConfiguration\napiVersion: kubeproxy.config.k8s.io/v1alpha1\n";

/// Every field of `KubeProxyConfiguration` takes effect, is refused, or is noted with a reason.
#[test]
fn fields_of_kube_proxys_configuration_are_refused_or_noted_where_they_cannot_hold() {
    for (text, why) in [
        ("featureGates: {X: 1}", "featureGates"),
        ("bindAddress: here", "bindAddress: \"here\" is no IP address"),
        ("healthzBindAddress: nowhere", "healthzBindAddress"),
        ("metricsBindAddress: 1.2.3.4:x", "metricsBindAddress"),
        ("showHiddenMetricsForVersion: '1.2'", "showHiddenMetricsForVersion"),
        ("mode: ipvs", "deprecated"),
        ("mode: kernelspace", "Windows"),
        ("mode: ebpf", "unknown"),
        ("iptables: {masqueradeBit: 32}", "iptables.masqueradeBit"),
        ("nftables: {masqueradeBit: 32}", "nftables.masqueradeBit"),
        ("nftables: {syncPeriod: -1s}", "nftables.syncPeriod"),
        ("nftables: {syncPeriod: 1s, minSyncPeriod: 2s}", "minSyncPeriod"),
        ("detectLocalMode: Guess", "detectLocalMode"),
        ("detectLocalMode: BridgeInterface", "detectLocal.bridgeInterface"),
        ("detectLocalMode: InterfaceNamePrefix", "detectLocal.interfaceNamePrefix"),
        ("clusterCIDR: 10.0.0.0/8,11.0.0.0/8", "one range of each family"),
        ("nodePortAddresses: [primary, 10.0.0.0/8]", "primary alone"),
        ("nodePortAddresses: [10.0.0.1]", "nodePortAddresses"),
        ("oomScoreAdj: -1001", "oomScoreAdj"),
        ("conntrack: {tcpEstablishedTimeout: -1s}", "conntrack.tcpEstablishedTimeout"),
        ("conntrack: {maxPerCore: -1}", "conntrack"),
        ("configSyncPeriod: -1s", "configSyncPeriod"),
        ("clientConnection: {burst: -1}", "clientConnection"),
        ("logging: {format: xml}", "logging.format"),
        ("winkernel: {sourceVip: 7}", "winkernel"),
        ("ipvs: {scheduler: 7}", "ipvs"),
    ] {
        let error = resolved("", &format!("{PROXY}{text}\n")).unwrap_err().to_string();
        assert!(error.contains(why), "{text}: {error}");
    }
    for (line, text, noted) in [
        ("", "featureGates: {NFTablesProxyMode: true}", ""),
        ("", "featureGates: {NFTablesProxyMode: false}", "featureGates.NFTablesProxyMode"),
        ("--only proxy --feature-gates A=true,B=false", "", "featureGates.A"),
        ("", "clientConnection: {qps: 7}", "clientConnection.qps"),
        ("--only proxy --kube-api-burst 7", "", "clientConnection.burst"),
        ("", "clientConnection: {contentType: application/json}", ""),
        ("", "clientConnection: {contentType: x}", "clientConnection.contentType"),
        ("", "clientConnection: {kubeconfig: /k}", "clientConnection.kubeconfig"),
        ("--only proxy", "clientConnection: {kubeconfig: /k}", ""),
        ("", "logging: {vmodule: [{filePattern: a, verbosity: 1}]}", "logging.vmodule"),
        ("", "windowsRunAsService: true", "windowsRunAsService"),
        ("", "portRange: 1-2", "portRange"),
        ("", "configSyncPeriod: 1m", "configSyncPeriod"),
        ("", "oomScoreAdj: -5", "oomScoreAdj"),
        ("--only proxy", "oomScoreAdj: -5", ""),
    ] {
        let notes = resolved(line, &format!("{PROXY}{text}\n")).unwrap().notes;
        let names: Vec<String> = notes
            .into_iter()
            .filter_map(|note| match note {
                Note::NoEffect { field, .. } => Some(field),
                _ => None,
            })
            .collect();
        match noted {
            "" => assert_eq!(names, [] as [&str; 0], "{line} {text}"),
            noted => assert!(names.iter().any(|n| n.ends_with(noted)), "{line} {text}: {names:?}"),
        }
    }
}

#[test]
fn fields_and_flags_of_kube_proxy_reach_the_proxy() {
    let proxy = |line: &str, text: &str| resolved(line, &format!("{PROXY}{text}\n")).unwrap().proxy;
    let is = |address: Option<SocketAddr>, text: &str| {
        assert_eq!(address.map(|a| a.to_string()).as_deref(), Some(text));
    };
    let plain = proxy("", "");
    is(plain.healthz_bind, "0.0.0.0:10256");
    is(plain.metrics_bind, "127.0.0.1:10249");
    assert_eq!((plain.min_sync_period, plain.oom_score_adj), (Duration::ZERO, None));
    // In nftables mode NodePorts are at the node's own address by default, and at 127.0.0.1.
    assert_eq!(plain.node_port_addresses, []);
    assert_eq!(proxy("", "mode: nftables").node_port_addresses.len(), 2);
    assert_eq!(proxy("--standalone", "mode: nftables").node_port_addresses, []);
    // Addresses are of the family of bindAddress.
    let bound = proxy("", "bindAddress: fd00::1");
    is(bound.healthz_bind, "[::]:10256");
    is(bound.metrics_bind, "[::1]:10249");
    assert_eq!(bound.bind_address.map(|a| a.to_string()).as_deref(), Some("fd00::1"));
    assert_eq!(proxy("", "bindAddress: '::'").bind_address, None);
    // kube-proxy's flags, where it runs alone; kubelet's of the same name, where it does not.
    let alone = "--only proxy --healthz-bind-address 1.2.3.4:5 --metrics-bind-address 6.7.8.9";
    is(proxy(alone, "healthzBindAddress: 9.9.9.9").healthz_bind, "1.2.3.4:5");
    is(proxy(alone, "").metrics_bind, "6.7.8.9:10249");
    let whole = resolved("--healthz-bind-address 1.2.3.4", PROXY).unwrap();
    is(whole.proxy.healthz_bind, "0.0.0.0:10256");
    is(whole.healthz, "1.2.3.4:10248");
    assert_eq!(proxy("--only proxy --healthz-port 0", "").healthz_bind, None);
    assert_eq!(proxy("--metrics-port 0", "").metrics_bind, None);
    let flags = proxy(
        "--only proxy --bind-address-hard-fail --profiling --iptables-masquerade-bit 7 \
         --iptables-localhost-nodeports=false --iptables-sync-period 10s \
         --iptables-min-sync-period 2s --detect-local-mode InterfaceNamePrefix \
         --pod-interface-name-prefix veth --oom-score-adj -5 --conntrack-max-per-core 0 \
         --conntrack-min 5 --conntrack-tcp-timeout-established 0 \
         --conntrack-tcp-timeout-close-wait 1m --conntrack-tcp-be-liberal \
         --conntrack-udp-timeout 3s --conntrack-udp-timeout-stream 4s --proxy-mode iptables \
         --masquerade-all --nodeport-addresses primary --cluster-cidr 10.0.0.0/8",
        "iptables: {masqueradeBit: 8, minSyncPeriod: 9s}\nnftables: {minSyncPeriod: 9s}",
    );
    assert!(flags.bind_hard_fail && flags.masquerade_all);
    assert!(!flags.localhost_node_ports);
    assert_eq!((flags.masquerade_bit, flags.sync_period.as_secs()), (7, 10));
    assert_eq!((flags.min_sync_period.as_secs(), flags.health_timeout.as_secs()), (2, 20));
    assert_eq!(flags.detect_local, ::proxy::DetectLocal::InterfaceNamePrefix("veth".to_owned()));
    assert_eq!(flags.oom_score_adj, Some(-5));
    let conntrack = flags.conntrack;
    assert_eq!((conntrack.max_per_core, conntrack.min), (Some(0), Some(5)));
    assert_eq!(conntrack.tcp_established_timeout, None);
    assert_eq!(conntrack.tcp_close_wait_timeout, Some(Duration::from_secs(60)));
    assert_eq!(conntrack.udp_timeout, Some(Duration::from_secs(3)));
    assert_eq!(conntrack.udp_stream_timeout, Some(Duration::from_secs(4)));
    assert!(conntrack.tcp_be_liberal);
    let logging = |line: &str| {
        let text = format!("{PROXY}logging: {{format: json, verbosity: 6}}\n");
        let config = resolved(line, &text).unwrap();
        (config.log_filter, config.log_json)
    };
    assert_eq!(logging(""), ("debug".to_owned(), true));
    assert_eq!(logging("-v 0 --logging-format text"), ("warn".to_owned(), false));
    let path = |line: &str| {
        let config = resolved(line, &format!("{PROXY}clientConnection: {{kubeconfig: /k}}"));
        config.unwrap().kubeconfig.unwrap()
    };
    assert_eq!(path("--only proxy"), PathBuf::from("/k"));
    assert_eq!(path(""), PathBuf::from(KUBECONFIG));
}

#[test]
fn the_proxys_configuration_is_shown_as_it_is_in_effect() {
    let pages =
        |line: &str, text: &str| resolved(line, &format!("{PROXY}{text}")).unwrap().proxy_pages;
    let usual = pages("--hostname-override n", "");
    assert!(!usual.profiling);
    let shown = &usual.configz;
    for (field, expected) in [
        ("/kind", json!("KubeProxyConfiguration")),
        ("/mode", json!("")),
        ("/hostnameOverride", json!("n")),
        ("/metricsBindAddress", json!("127.0.0.1:10249")),
        ("/conntrack/tcpCloseWaitTimeout", json!("1h0m0s")),
        ("/nftables/syncPeriod", json!("5m0s")),
        ("/ipvs/excludeCIDRs", json!(null)),
    ] {
        assert_eq!(shown.pointer(field), Some(&expected), "{field}: {shown}");
    }
    let given = pages(
        "--profiling --proxy-mode nftables --cluster-cidr 10.0.0.0/8,fd00::/8",
        "iptables: {masqueradeBit: 3}\nnftables: {masqueradeBit: 7, minSyncPeriod: 2s}\n\
         conntrack: {tcpCloseWaitTimeout: 0s, min: 0}\nlogging: {verbosity: 4}\n",
    );
    assert!(given.profiling);
    let shown = &given.configz;
    for (field, expected) in [
        ("/enableProfiling", json!(true)),
        ("/mode", json!("nftables")),
        ("/iptables/masqueradeBit", json!(3)),
        ("/nftables/masqueradeBit", json!(7)),
        ("/nftables/minSyncPeriod", json!("2s")),
        ("/conntrack/tcpCloseWaitTimeout", json!("0s")),
        ("/conntrack/min", json!(0)),
        ("/conntrack/maxPerCore", json!(32768)),
        ("/clusterCIDR", json!("10.0.0.0/8,fd00::/8")),
        ("/nodePortAddresses", json!(["primary", "127.0.0.0/8"])),
        ("/logging/verbosity", json!(4)),
    ] {
        assert_eq!(shown.pointer(field), Some(&expected), "{field}: {shown}");
    }
}

/// What docs/cis-benchmark.md says of the defaults.
#[test]
fn defaults_are_those_of_the_benchmark() {
    use crate::config::node_api::Authorization;
    let config = resolved("", "").unwrap();
    let api = &config.node_api;
    assert!(!api.authentication.anonymous, "4.2.1");
    assert!(matches!(api.authorization, Authorization::Webhook { .. }), "4.2.2");
    assert_eq!(api.read_only, None, "4.2.4");
    assert_eq!(config.proxy.metrics_bind.map(|at| at.ip().is_loopback()), Some(true), "4.3.1");
    // kubeadm writes a zero for the timeout, which is the default and not no limit.
    for file in ["", "streamingConnectionIdleTimeout: 0s\n"] {
        let config = resolved("", &format!("{KUBELET}{file}")).unwrap();
        assert_eq!(config.streaming.idle_timeout.as_secs(), 4 * 3600, "4.2.5");
    }
    let shown = &api.configz;
    assert_eq!(shown["makeIPTablesUtilChains"], true, "4.2.6");
    assert_eq!(shown["eventRecordQPS"], 50, "4.2.8");
    // Without a word about them, only suites with forward secrecy are spoken.
    assert!(api.tls.cipher_suites.is_empty(), "4.2.12");
    for suite in rustls::crypto::aws_lc_rs::DEFAULT_CIPHER_SUITES {
        let name = suite.suite().as_str().unwrap_or_default();
        assert!(name.starts_with("TLS13_") || name.starts_with("TLS_ECDHE_"), "{name}");
        assert!(!name.contains("CBC") && !name.contains("3DES"), "{name}");
    }
}

#[test]
fn thresholds_replace_the_defaults_or_join_them() {
    let of = |text: &str| {
        let config = resolved("", &format!("{KUBELET}{text}\n")).unwrap();
        let all = config.eviction.thresholds.iter().map(|t| (t.signal.name(), t.value));
        let all: BTreeMap<_, _> = all.collect();
        (all.len(), all.get("memory.available").copied())
    };
    let (small, large) = (Some(Threshold::Absolute(100 << 20)), Some(Threshold::Absolute(1 << 30)));
    // That of memory holds for the pods together, too, where they are held to what is theirs.
    assert_eq!(of(""), (6, small));
    assert_eq!(of("evictionHard: {memory.available: 1Gi}"), (2, large));
    let unbound = "enforceNodeAllocatable: [none]\nevictionHard: {memory.available: 1Gi}";
    assert_eq!(of(unbound), (1, large));
    let merge = "mergeDefaultEvictionSettings: true\n";
    assert_eq!(of(&format!("{merge}evictionHard: {{memory.available: 1Gi}}")), (6, large));
    assert_eq!(of(merge), (6, small));
    // The defaults do not come back where all are taken away.
    let file = format!("{KUBELET}evictionHard: {{memory.available: 0%, nodefs.available: 0%}}\n");
    let none = resolved("", &file).unwrap().eviction;
    assert_eq!(none.kept(Signal::Memory, 1 << 30), 0);
    assert_eq!(EvictionConfig::default().kept(Signal::Memory, 1 << 30), 100 << 20);
}

#[test]
fn a_status_is_reported_as_often_as_it_is_measured_where_only_that_is_set() {
    for (text, expected) in [
        ("", (10, 300)),
        ("nodeStatusUpdateFrequency: 0s", (10, 300)),
        ("nodeStatusUpdateFrequency: 20s", (20, 20)),
        ("nodeStatusUpdateFrequency: 20s\nnodeStatusReportFrequency: 1m", (20, 60)),
    ] {
        let config = resolved("", &format!("{KUBELET}{text}\n")).unwrap();
        let got = (
            config.node_status_update_frequency.as_secs(),
            config.node_status_report_frequency.as_secs(),
        );
        assert_eq!(got, expected, "{text}");
    }
}

#[test]
fn only_sysctls_of_a_pods_own_namespaces_may_be_allowed() {
    for (list, expected) in
        [("[kernel.msg*, net.core.somaxconn]", None), ("[kernel.msg*, vm.*]", Some("vm.*"))]
    {
        let file = format!("{KUBELET}allowedUnsafeSysctls: {list}\n");
        let refused = resolved("", &file).err().map(|error| error.to_string());
        assert_eq!(refused.is_some(), expected.is_some(), "{list}: {refused:?}");
        let named = |name| refused.as_ref().is_some_and(|text| text.contains(name));
        assert!(expected.is_none_or(named), "{list}: {refused:?}");
    }
}
