//! Values of single flags and fields: read, or refused by the field's name.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use k8s_openapi::api::core::v1::Taint;
use proxy::config::{Conntrack, DetectLocal};

use super::ConfigError;

pub(super) fn detect_local(
    mode: &str,
    detail: super::kube_proxy::DetectLocal,
) -> Result<DetectLocal, ConfigError> {
    let named = |name: Option<String>, field: &str| {
        name.filter(|name| !name.is_empty()).ok_or_else(|| {
            ConfigError::invalid(
                format!("KubeProxyConfiguration.detectLocal.{field}"),
                format!("required with detectLocalMode {mode}"),
            )
        })
    };
    Ok(match mode {
        "" | "ClusterCIDR" => DetectLocal::ClusterCidr,
        "NodeCIDR" => DetectLocal::NodeCidr,
        "BridgeInterface" => {
            DetectLocal::BridgeInterface(named(detail.bridge_interface, "bridgeInterface")?)
        }
        "InterfaceNamePrefix" => DetectLocal::InterfaceNamePrefix(named(
            detail.interface_name_prefix,
            "interfaceNamePrefix",
        )?),
        other => {
            return Err(ConfigError::invalid(
                "KubeProxyConfiguration.detectLocalMode",
                format!(
                    "{other:?} is unknown; use ClusterCIDR, NodeCIDR, BridgeInterface or InterfaceNamePrefix"
                ),
            ));
        }
    })
}

/// What is not given has kube-proxy's defaults; 0 leaves the kernel's value.
pub(super) fn conntrack(given: super::kube_proxy::Conntrack) -> Result<Conntrack, ConfigError> {
    for (field, time) in [
        ("tcpEstablishedTimeout", given.tcp_established_timeout),
        ("tcpCloseWaitTimeout", given.tcp_close_wait_timeout),
        ("udpTimeout", given.udp_timeout),
        ("udpStreamTimeout", given.udp_stream_timeout),
    ] {
        if time.is_some_and(|time| time.is_negative()) {
            return Err(ConfigError::invalid(
                format!("KubeProxyConfiguration.conntrack.{field}"),
                "must not be negative",
            ));
        }
    }
    let time = |given: Option<kube::core::Duration>| {
        given.map(Duration::from).filter(|time| !time.is_zero())
    };
    let or = |given: Option<kube::core::Duration>, hours: u64| match given {
        None => Some(Duration::from_secs(hours * 3600)),
        given => time(given),
    };
    Ok(Conntrack {
        max_per_core: Some(given.max_per_core.unwrap_or(32 * 1024)),
        min: Some(given.min.unwrap_or(128 * 1024)),
        tcp_established_timeout: or(given.tcp_established_timeout, 24),
        tcp_close_wait_timeout: or(given.tcp_close_wait_timeout, 1),
        tcp_be_liberal: given.tcp_be_liberal.unwrap_or(false),
        udp_timeout: time(given.udp_timeout),
        udp_stream_timeout: time(given.udp_stream_timeout),
    })
}

pub(super) fn nonempty(text: &Option<String>) -> Option<&str> {
    text.as_deref().filter(|text| !text.is_empty())
}

/// A positive duration, or the default in seconds (upstream writes 0 for "default").
pub(super) fn period(given: Option<kube::core::Duration>, default: u64) -> Duration {
    given
        .filter(|duration| !duration.is_negative())
        .map(Duration::from)
        .filter(|duration| !duration.is_zero())
        .unwrap_or(Duration::from_secs(default))
}

pub(super) fn ip_or(field: &str, text: Option<&str>, default: &str) -> Result<IpAddr, ConfigError> {
    let text = text.filter(|text| !text.is_empty()).unwrap_or(default);
    text.parse().map_err(|_| ConfigError::invalid(field, format!("{text:?} is no IP address")))
}

/// `ip:port`, a bare IP (with `port`), or empty for none. `given: None` is the default.
pub(super) fn address(
    field: &str,
    given: Option<&str>,
    default: &str,
    port: u16,
) -> Result<Option<SocketAddr>, ConfigError> {
    let text = given.unwrap_or(default);
    if text.is_empty() {
        return Ok(None);
    }
    if let Ok(address) = text.parse::<SocketAddr>() {
        return Ok((address.port() != 0).then_some(address));
    }
    match text.parse::<IpAddr>() {
        Ok(ip) => Ok(Some(SocketAddr::new(ip, port))),
        Err(_) => Err(ConfigError::invalid(field, format!("{text:?} is no IP:port"))),
    }
}

/// The flag's ranges, else the file's comma separated ones; at most one of each family.
pub(super) fn cidrs(
    field: &str,
    flag: &[String],
    file: Option<&str>,
) -> Result<Vec<proxy::object::Cidr>, ConfigError> {
    let texts: Vec<&str> = if flag.is_empty() {
        file.unwrap_or_default().split(',').collect()
    } else {
        flag.iter().map(String::as_str).collect()
    };
    let mut ranges: Vec<proxy::object::Cidr> = Vec::new();
    for text in texts.into_iter().map(str::trim).filter(|text| !text.is_empty()) {
        let range = parse_cidr(text)
            .ok_or_else(|| ConfigError::invalid(field, format!("{text:?} is no CIDR")))?;
        if ranges.iter().any(|other| other.address.is_ipv4() == range.address.is_ipv4()) {
            return Err(ConfigError::invalid(field, "takes at most one range of each family"));
        }
        ranges.push(range);
    }
    Ok(ranges)
}

/// `address/prefix`, with the host bits cleared.
pub(super) fn parse_cidr(text: &str) -> Option<proxy::object::Cidr> {
    let (address, prefix) = text.split_once('/')?;
    let prefix_len: u8 = prefix.parse().ok()?;
    let address = match address.parse::<IpAddr>().ok()? {
        IpAddr::V4(ip) if prefix_len <= 32 => {
            let mask = u32::MAX.checked_shl(32 - u32::from(prefix_len)).unwrap_or(0);
            IpAddr::V4((u32::from(ip) & mask).into())
        }
        IpAddr::V6(ip) if prefix_len <= 128 => {
            let mask = u128::MAX.checked_shl(128 - u32::from(prefix_len)).unwrap_or(0);
            IpAddr::V6((u128::from(ip) & mask).into())
        }
        _ => return None,
    };
    Some(proxy::object::Cidr { address, prefix_len })
}

pub(super) fn parse_port_range(text: &str) -> Result<(u16, u16), ConfigError> {
    let parsed = text.split_once('-').and_then(|(first, last)| {
        let (first, last): (u16, u16) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        (first > 0 && first <= last).then_some((first, last))
    });
    parsed.ok_or_else(|| {
        ConfigError::invalid("--service-node-port-range", format!("{text:?} is no FIRST-LAST"))
    })
}

pub(super) fn parse_taint(text: &str) -> Result<Taint, ConfigError> {
    let parsed = text.rsplit_once(':').and_then(|(key, effect)| {
        let known = ["NoSchedule", "PreferNoSchedule", "NoExecute"].contains(&effect);
        let (key, value) = key.split_once('=').unwrap_or((key, ""));
        (known && !key.is_empty()).then(|| Taint {
            key: key.into(),
            value: (!value.is_empty()).then(|| value.into()),
            effect: effect.into(),
            time_added: None,
        })
    });
    parsed.ok_or_else(|| {
        ConfigError::invalid("--register-with-taints", format!("{text:?} is no key=value:Effect"))
    })
}

/// RFC 1123 subdomain, the shape of a node name.
pub(crate) fn is_dns1123_subdomain(name: &str) -> bool {
    name.len() <= 253 && name.split('.').all(is_dns1123_label)
}

/// RFC 1123 label.
pub(crate) fn is_dns1123_label(label: &str) -> bool {
    !label.is_empty()
        && label.len() <= 63
        && !label.starts_with('-')
        && !label.ends_with('-')
        && label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
}
