//! `KubeProxyConfiguration` as the proxy is told it: every field takes effect, is refused, or is
//! noted with the reason why it changes nothing here. Checks are upstream's.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use proxy::object::Cidr;
use proxy::{Mode, NodePortAddresses};

use super::fields::{address, conntrack, detect_local, nonempty};
use super::kube_proxy::{ClientConnection, KubeProxyConfiguration, Logging};
use super::{ConfigError, Note};
use crate::cli::{NodeFlags, ProxyModeFlag};

/// The version whose hidden metrics may be asked for: the last one before the API level.
const LAST_VERSION: &str = "1.35";

/// Features of kube-proxy that are always on here.
const ALWAYS_ON: [&str; 7] = [
    "KubeProxyDrainingTerminatingNodes",
    "LoadBalancerIPMode",
    "NFTablesProxyMode",
    "PreferSameTrafficDistribution",
    "ServiceInternalTrafficPolicy",
    "ServiceTrafficDistribution",
    "TopologyAwareHints",
];

/// What the proxy's configuration is resolved with.
pub(super) struct Around<'a> {
    /// The flags.
    pub flags: &'a NodeFlags,
    /// The agent runs in the same process.
    pub with_agent: bool,
    /// Nobody but this node makes Services.
    pub standalone: bool,
    /// Name of the node.
    pub node_name: &'a str,
    /// Ranges of the cluster's pods.
    pub cluster_cidrs: Vec<Cidr>,
    /// Ranges of cluster IPs, where they are known.
    pub service_cidrs: Vec<Cidr>,
}

fn refused(field: &str, reason: impl ToString) -> ConfigError {
    ConfigError::invalid(format!("KubeProxyConfiguration.{field}"), reason)
}

fn no_effect(field: &str, value: impl ToString, reason: &'static str) -> Note {
    let field = format!("KubeProxyConfiguration.{field}");
    Note::NoEffect { field, value: value.to_string(), reason }
}

/// Decides everything that the proxy is told.
pub(super) fn resolve(
    document: KubeProxyConfiguration,
    around: Around<'_>,
    notes: &mut Vec<Note>,
) -> Result<proxy::Config, ConfigError> {
    let Around { flags, with_agent, standalone, node_name, cluster_cidrs, service_cidrs } = around;
    let mode = mode(flags.proxy_mode, document.mode.as_deref().unwrap_or_default())?;
    let iptables = document.iptables.clone().unwrap_or_default();
    let nftables = document.nftables.clone().unwrap_or_default();
    // Where the mode is left open, upstream's is iptables, so that a file may say it in either section.
    let (use_nftables, use_iptables) = (mode != Mode::Iptables, mode != Mode::Nftables);
    let pick = |own: Option<Duration>, other: Option<Duration>| {
        own.filter(|_| use_nftables).or(other.filter(|_| use_iptables))
    };
    let time = |field: &str, given: Option<kube::core::Duration>| match given {
        Some(given) if given.is_negative() => Err(refused(field, "must not be negative")),
        // Upstream writes 0 for its default.
        given => Ok(given.map(Duration::from).filter(|given| !given.is_zero())),
    };
    let sync_period = pick(
        time("nftables.syncPeriod", nftables.sync_period)?,
        time("iptables.syncPeriod", iptables.sync_period)?,
    );
    let min_sync_period = pick(
        time("nftables.minSyncPeriod", nftables.min_sync_period)?,
        time("iptables.minSyncPeriod", iptables.min_sync_period)?,
    )
    .unwrap_or_default();
    let defaults = proxy::Config::default();
    if sync_period.unwrap_or(defaults.sync_period) < min_sync_period {
        return Err(refused(
            "minSyncPeriod",
            format!("{min_sync_period:?} is longer than syncPeriod; changes would wait for ever"),
        ));
    }
    for (section, bit) in
        [("iptables", iptables.masquerade_bit), ("nftables", nftables.masquerade_bit)]
    {
        if let Some(bit) = bit.filter(|bit| *bit > 31) {
            let field = format!("{section}.masqueradeBit");
            return Err(refused(&field, format!("{bit} is not between 0 and 31")));
        }
    }
    let masquerade_bit = nftables
        .masquerade_bit
        .filter(|_| use_nftables)
        .or(iptables.masquerade_bit.filter(|_| use_iptables))
        .unwrap_or(defaults.masquerade_bit);
    let masquerade_all = flags.masquerade_all
        || (use_nftables && nftables.masquerade_all == Some(true))
        || (use_iptables && iptables.masquerade_all == Some(true));

    let bind_address: Option<IpAddr> = nonempty(&document.bind_address)
        .map(|text| {
            text.parse().map_err(|_| refused("bindAddress", format!("{text:?} is no IP address")))
        })
        .transpose()?;
    let ipv6 = bind_address.is_some_and(|address| address.is_ipv6());
    let (healthz_flag, metrics_flag) = bind_flags(flags, with_agent, ipv6);
    let bind = |flag: (&str, Option<String>), field: (&str, &Option<String>), ip: &str, port| {
        let default = format!("{ip}:{port}");
        match flag.1 {
            Some(given) => address(flag.0, Some(&given), &default, port),
            None => {
                let name = format!("KubeProxyConfiguration.{}", field.0);
                address(&name, nonempty(field.1), &default, port)
            }
        }
    };
    let (any, loopback) = if ipv6 { ("[::]", "[::1]") } else { ("0.0.0.0", "127.0.0.1") };
    let healthz_bind = bind(
        ("--proxy-healthz-bind-address", healthz_flag),
        ("healthzBindAddress", &document.healthz_bind_address),
        any,
        10256,
    )?;
    let metrics_bind = bind(
        ("--proxy-metrics-bind-address", metrics_flag),
        ("metricsBindAddress", &document.metrics_bind_address),
        loopback,
        10249,
    )?;
    if let Some(version) = nonempty(&document.show_hidden_metrics_for_version)
        && version != LAST_VERSION
    {
        return Err(refused(
            "showHiddenMetricsForVersion",
            format!("{version:?} must be omitted or {LAST_VERSION:?}, the last minor version"),
        ));
    }
    if let Some(score) = document.oom_score_adj.filter(|n| !(-1000..=1000).contains(n)) {
        return Err(refused("oomScoreAdj", format!("{score} is not between -1000 and 1000")));
    }
    if document.config_sync_period.is_some_and(|period| period.is_negative()) {
        return Err(refused("configSyncPeriod", "must be greater than 0"));
    }
    without_effect(&document, flags, with_agent, notes);
    let oom_score_adj = (!with_agent).then(|| document.oom_score_adj.unwrap_or(-999));
    Ok(proxy::Config {
        mode,
        node_name: node_name.to_owned(),
        bind_address: bind_address.filter(|address| !address.is_unspecified()),
        masquerade_all,
        cluster_cidrs,
        detect_local: detect_local(
            document.detect_local_mode.as_deref().unwrap_or_default(),
            document.detect_local.unwrap_or_default(),
        )?,
        service_cidrs,
        node_port_addresses: match node_port_addresses(flags, document.node_port_addresses)? {
            // Upstream's default of this mode; it has no NodePorts at 127.0.0.1.
            none if none.is_empty() && mode == Mode::Nftables && !standalone => {
                let loopback = Cidr { address: [127, 0, 0, 0].into(), prefix_len: 8 };
                vec![NodePortAddresses::Primary, NodePortAddresses::Cidr(loopback)]
            }
            given => given,
        },
        localhost_node_ports: iptables.localhost_node_ports.unwrap_or(true),
        masquerade_bit,
        healthz_bind,
        metrics_bind,
        bind_hard_fail: document.bind_address_hard_fail.unwrap_or(false),
        oom_score_adj,
        conntrack: conntrack(document.conntrack.unwrap_or_default())?,
        sync_period: sync_period.unwrap_or(defaults.sync_period),
        min_sync_period,
        health_timeout: sync_period.map_or(defaults.health_timeout, |period| period * 2),
        set_sysctls: true,
    })
}

/// The mode, or why it cannot be had.
fn mode(flag: Option<ProxyModeFlag>, given: &str) -> Result<Mode, ConfigError> {
    match flag {
        Some(ProxyModeFlag::Auto) => return Ok(Mode::Auto),
        Some(ProxyModeFlag::Nftables) => return Ok(Mode::Nftables),
        Some(ProxyModeFlag::Iptables) => return Ok(Mode::Iptables),
        None => {}
    }
    match given {
        "" | "auto" => Ok(Mode::Auto),
        "nftables" => Ok(Mode::Nftables),
        "iptables" => Ok(Mode::Iptables),
        "ipvs" => Err(refused(
            "mode",
            "\"ipvs\" is not provided: upstream has deprecated it (KEP-5495), and its schedulers have no \
             equivalent in netfilter; use nftables, which serves the same Services, or leave it empty",
        )),
        "kernelspace" => Err(refused("mode", "\"kernelspace\" is a mode of Windows; use nftables")),
        other => Err(refused(
            "mode",
            format!("{other:?} is unknown; use nftables, iptables or leave it empty"),
        )),
    }
}

/// What flags say of the health and metrics ports. `--healthz-bind-address` and `--healthz-port` are
/// kubelet's flags and kube-proxy's: they mean the proxy's port where no agent runs.
fn bind_flags(flags: &NodeFlags, with_agent: bool, ipv6: bool) -> (Option<String>, Option<String>) {
    let (any, loopback) = if ipv6 { ("[::]", "[::1]") } else { ("0.0.0.0", "127.0.0.1") };
    let mut healthz = flags.proxy_healthz_bind_address.clone();
    if !with_agent {
        healthz = healthz
            .or(flags.healthz_bind_address.clone())
            .or(flags.healthz_port.map(|port| format!("{any}:{port}")));
    }
    let port = flags.kube_proxy.metrics_port.map(|port| format!("{loopback}:{port}"));
    (healthz, flags.proxy_metrics_bind_address.clone().or(port))
}

fn node_port_addresses(
    flags: &NodeFlags,
    given: Option<Vec<String>>,
) -> Result<Vec<NodePortAddresses>, ConfigError> {
    let (field, texts) = if flags.nodeport_addresses.is_empty() {
        ("KubeProxyConfiguration.nodePortAddresses", given.unwrap_or_default())
    } else {
        ("--nodeport-addresses", flags.nodeport_addresses.clone())
    };
    let wrong = |cause: String| ConfigError::invalid(field, cause);
    let all = texts
        .iter()
        .map(|text| text.parse::<NodePortAddresses>().map_err(wrong))
        .collect::<Result<Vec<_>, _>>()?;
    if all.len() > 1 && all.contains(&NodePortAddresses::Primary) {
        return Err(wrong("takes either primary alone or CIDRs".to_owned()));
    }
    Ok(all)
}

/// Notes what is asked for and changes nothing here.
fn without_effect(
    document: &KubeProxyConfiguration,
    flags: &NodeFlags,
    with_agent: bool,
    notes: &mut Vec<Note>,
) {
    let gates = document.feature_gates.iter().flatten().map(|(name, on)| (name.clone(), *on));
    let of_flags = flags.kube_proxy.feature_gates.iter().map(|gate| match gate.split_once('=') {
        Some((name, value)) => (name.to_owned(), value == "true"),
        None => (gate.clone(), true),
    });
    for (name, on) in gates.chain(of_flags) {
        if !(on && ALWAYS_ON.contains(&name.as_str())) {
            notes.push(no_effect(
                &format!("featureGates.{name}"),
                on,
                "the proxy has no feature gates: what kube-proxy 1.36 does by default is always on",
            ));
        }
    }
    if let Some(ClientConnection { kubeconfig, accept_content_types, content_type, qps, burst }) =
        &document.client_connection
    {
        if let Some(path) =
            nonempty(kubeconfig).filter(|_| with_agent && flags.kubeconfig.is_none())
        {
            let reason = "the agent runs here too, with the node's own credentials (--kubeconfig)";
            notes.push(no_effect("clientConnection.kubeconfig", path, reason));
        }
        for (field, kind) in
            [("acceptContentTypes", accept_content_types), ("contentType", content_type)]
        {
            if let Some(kind) = nonempty(kind).filter(|kind| *kind != "application/json") {
                let reason = "requests and answers are application/json";
                notes.push(no_effect(&format!("clientConnection.{field}"), kind, reason));
            }
        }
        let reason =
            "the proxy's lists and watches are not limited: it has one of each kind of object";
        if let Some(qps) = qps.filter(|qps| *qps != 0.0) {
            notes.push(no_effect("clientConnection.qps", qps, reason));
        }
        if let Some(burst) = burst.filter(|burst| *burst != 0) {
            notes.push(no_effect("clientConnection.burst", burst, reason));
        }
    }
    if let Some(Logging { vmodule, .. }) = &document.logging
        && let Some(vmodule) = vmodule.as_ref().filter(|vmodule| !vmodule.is_empty())
    {
        let reason = "it names Go source files; use --log-level target=level,...";
        notes.push(no_effect("logging.vmodule", format!("{vmodule:?}"), reason));
    }
    if document.windows_run_as_service == Some(true) {
        notes.push(no_effect("windowsRunAsService", true, "this is Linux"));
    }
    if let Some(range) = nonempty(&document.port_range) {
        notes.push(no_effect("portRange", range, "no kube-proxy since 1.26 uses it"));
    }
    if let Some(score) = document.oom_score_adj.filter(|_| with_agent) {
        let reason = "the agent runs in the same process; the unit's OOMScoreAdjust holds";
        notes.push(no_effect("oomScoreAdj", score, reason));
    }
    if let Some(period) = document.config_sync_period.map(Duration::from).filter(|p| !p.is_zero()) {
        let reason =
            "every change is watched, and what is known is compared with the kernel by syncPeriod";
        notes.push(no_effect("configSyncPeriod", format!("{period:?}"), reason));
    }
}

/// The log's filter and whether it is JSON, as far as `logging` says.
pub(super) fn logging(
    kind: &str,
    document: &Option<Logging>,
) -> Result<(Option<u8>, bool), ConfigError> {
    let logging = document.clone().unwrap_or_default();
    let json = match logging.format.as_deref().unwrap_or_default() {
        "" | "text" => false,
        "json" => true,
        other => {
            return Err(ConfigError::invalid(
                format!("{kind}.logging.format"),
                format!("{other:?} is unknown; use text or json"),
            ));
        }
    };
    Ok((logging.verbosity.filter(|verbosity| *verbosity != 0), json))
}

/// `--healthz-bind-address` as the agent's: an IP address alone.
pub(super) fn agents_healthz(text: &str) -> Result<IpAddr, ConfigError> {
    let parsed = text.parse().or_else(|_| text.parse::<SocketAddr>().map(|address| address.ip()));
    parsed.map_err(|_| {
        ConfigError::invalid("--healthz-bind-address", format!("{text:?} is no IP address"))
    })
}
