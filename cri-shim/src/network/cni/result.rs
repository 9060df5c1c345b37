//! What ADD gave: the pod's addresses and DNS, in results of every version of the specification
//! (0.1.0 to 1.1.0), and the form in which containerd shows it. Pure.

use std::net::IpAddr;

use serde_json::{Map, Value, json};

use crate::network::Dns;

/// The pod's interface, as Kubernetes' runtimes name it.
pub(crate) const INTERFACE: &str = "eth0";

/// A result's parts that matter to a sandbox.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Outcome {
    /// The addresses of [`INTERFACE`], the primary one first: the first of IPv4, if there is one.
    pub(crate) ips: Vec<IpAddr>,
    /// None when the result names no server.
    pub(crate) dns: Option<Dns>,
    /// The result as `crictl inspectp` shows it over containerd.
    pub(crate) shown: Value,
}

/// One address of a result.
struct Address {
    interface: Option<usize>,
    ip: IpAddr,
    gateway: String,
}

/// Reads a result.
///
/// # Errors
/// What is wrong with it.
pub(crate) fn read(result: &Value) -> Result<Outcome, String> {
    let interfaces = match result.get("interfaces") {
        None | Some(Value::Null) => &[] as &[Value],
        Some(Value::Array(interfaces)) => interfaces,
        Some(_) => return Err("interfaces are no list".to_owned()),
    };
    let addresses = addresses(result)?;
    let text = |value: &Value, key: &str| -> String {
        value.get(key).and_then(Value::as_str).unwrap_or_default().to_owned()
    };
    let any_inside = interfaces.iter().any(|i| !text(i, "sandbox").is_empty());
    let mut ips = Vec::new();
    let mut shown = Map::new();
    shown.insert(INTERFACE.to_owned(), show_interface(&Value::Null));
    for interface in interfaces {
        shown.insert(text(interface, "name"), show_interface(interface));
    }
    for address in &addresses {
        let name = match address.interface {
            None => INTERFACE.to_owned(),
            Some(at) => {
                let interface = interfaces
                    .get(at)
                    .ok_or_else(|| format!("address {} is of no interface", address.ip))?;
                let inside = !any_inside || !text(interface, "sandbox").is_empty();
                if inside && text(interface, "name") == INTERFACE {
                    ips.push(address.ip);
                }
                text(interface, "name")
            }
        };
        if address.interface.is_none() {
            ips.push(address.ip);
        }
        if let Some(Value::Array(list)) = shown.get_mut(&name).and_then(|i| i.get_mut("IPConfigs"))
        {
            list.push(json!({"IP": address.ip.to_string(), "Gateway": address.gateway}));
        }
    }
    if let Some(primary) = ips.iter().position(IpAddr::is_ipv4) {
        ips[..=primary].rotate_right(1);
    }
    let mut seen = std::collections::BTreeSet::new();
    ips.retain(|ip| seen.insert(*ip));
    let dns = result.get("dns").cloned().unwrap_or_else(|| json!({}));
    let list = |key: &str| -> Vec<String> {
        let list = dns.get(key).and_then(Value::as_array).into_iter().flatten();
        // Each becomes a word of resolv.conf.
        list.filter_map(Value::as_str)
            .filter(|word| !word.is_empty() && !word.contains(char::is_whitespace))
            .map(str::to_owned)
            .collect()
    };
    let mut searches = list("search");
    if searches.is_empty() {
        let domain = dns.get("domain").and_then(Value::as_str).filter(|domain| !domain.is_empty());
        searches.extend(domain.filter(|d| !d.contains(char::is_whitespace)).map(str::to_owned));
    }
    let read = Dns { servers: list("nameservers"), searches, options: list("options") };
    Ok(Outcome {
        ips,
        dns: (!read.servers.is_empty()).then_some(read),
        shown: json!({"Interfaces": shown, "DNS": [dns], "Routes": routes(result)}),
    })
}

/// A result that tells its version: old plugins leave it out, the next in the chain must not guess.
pub(crate) fn with_version(mut result: Value, version: &str) -> Value {
    if let Some(result) = result.as_object_mut()
        && result.get("cniVersion").and_then(Value::as_str).is_none_or(str::is_empty)
    {
        result.insert("cniVersion".to_owned(), json!(version));
    }
    result
}

fn addresses(result: &Value) -> Result<Vec<Address>, String> {
    let parse = |text: &Value| -> Result<IpAddr, String> {
        let address = text.as_str().and_then(|text| text.split('/').next()?.parse().ok());
        address.ok_or_else(|| format!("{text} is no address"))
    };
    let gateway = |value: &Value| -> String {
        value.get("gateway").and_then(Value::as_str).unwrap_or_default().to_owned()
    };
    let mut found = Vec::new();
    for ip in result.get("ips").and_then(Value::as_array).into_iter().flatten() {
        let interface = match ip.get("interface") {
            None | Some(Value::Null) => None,
            Some(at) => Some(
                at.as_u64()
                    .and_then(|at| usize::try_from(at).ok())
                    .ok_or_else(|| format!("{at} is no interface"))?,
            ),
        };
        let address = ip.get("address").unwrap_or(&Value::Null);
        found.push(Address { interface, ip: parse(address)?, gateway: gateway(ip) });
    }
    // 0.2.0 and before.
    for old in ["ip4", "ip6"].iter().filter_map(|key| result.get(key)).filter(|v| v.is_object()) {
        let ip = parse(old.get("ip").unwrap_or(&Value::Null))?;
        found.push(Address { interface: None, ip, gateway: gateway(old) });
    }
    Ok(found)
}

fn routes(result: &Value) -> Vec<Value> {
    let lists = [
        result.get("routes"),
        result.get("ip4").and_then(|ip| ip.get("routes")),
        result.get("ip6").and_then(|ip| ip.get("routes")),
    ];
    lists.into_iter().flatten().filter_map(Value::as_array).flatten().cloned().collect()
}

/// One interface in containerd's words.
pub(crate) fn show_interface(interface: &Value) -> Value {
    let text = |key: &str| interface.get(key).and_then(Value::as_str).unwrap_or_default();
    json!({
        "IPConfigs": [],
        "Mac": text("mac"),
        "Sandbox": text("sandbox"),
        "PciID": text("pciID"),
        "SocketPath": text("socketPath"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ips(result: &Value) -> Vec<String> {
        read(result).unwrap().ips.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn addresses_are_read_from_every_version() {
        for version in ["0.1.0", "0.2.0"] {
            let old = json!({"cniVersion": version, "ip4": {"ip": "10.0.0.3/24", "gateway": "10.0.0.1",
                "routes": [{"dst": "0.0.0.0/0"}]}, "ip6": {"ip": "fd00::3/64"}});
            assert_eq!(ips(&old), ["10.0.0.3", "fd00::3"]);
            let shown = read(&old).unwrap().shown;
            assert_eq!(shown["Interfaces"]["eth0"]["IPConfigs"][0]["Gateway"], "10.0.0.1");
            assert_eq!(shown["Routes"], json!([{"dst": "0.0.0.0/0"}]));
        }
        for version in ["0.3.0", "0.3.1", "0.4.0"] {
            let result = json!({"cniVersion": version,
                "interfaces": [{"name": "br", "mac": "m"}, {"name": "eth0", "sandbox": "/ns"}],
                "ips": [{"version": "4", "address": "10.0.0.1/24", "interface": 0},
                    {"version": "6", "address": "fd00::2/64", "interface": 1},
                    {"version": "4", "address": "10.0.0.2/24", "interface": 1}]});
            assert_eq!(ips(&result), ["10.0.0.2", "fd00::2"], "IPv4 is the primary one");
        }
        let new = json!({"cniVersion": "1.1.0",
            "interfaces": [{"name": "eth0", "sandbox": "", "mtu": 1500},
                {"name": "eth0", "sandbox": "/ns", "mtu": 1400, "pciID": "p", "socketPath": "s"},
                {"name": "net1", "sandbox": "/ns"}],
            "ips": [{"address": "192.168.0.1/24", "interface": 0},
                {"address": "10.0.0.2/24", "interface": 1}, {"address": "10.0.0.2/24", "interface": 1},
                {"address": "10.9.0.2/24", "interface": 2}, {"address": "fd00::2/64"}],
            "routes": [{"dst": "::/0", "mtu": 1300, "table": 7, "scope": 0}]});
        assert_eq!(ips(&new), ["10.0.0.2", "fd00::2"]);
        assert_eq!(read(&new).unwrap().shown["Interfaces"]["eth0"]["PciID"], "p");
        assert_eq!(ips(&json!(null)), Vec::<String>::new());
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        for (result, want) in [
            (json!({"ips": [{"address": "x"}]}), "no address"),
            (json!({"ips": [{}]}), "no address"),
            (json!({"ips": [{"address": "10.0.0.1/8", "interface": 3}]}), "of no interface"),
            (json!({"ips": [{"address": "10.0.0.1/8", "interface": -1}]}), "no interface"),
            (json!({"ip4": {"ip": 7}}), "no address"),
            (json!({"interfaces": 7}), "no list"),
        ] {
            let error = read(&result).unwrap_err();
            assert!(error.contains(want), "{result}: {error}");
        }
    }

    #[test]
    fn dns_is_given_when_a_server_is_named() {
        let dns = |value: Value| read(&json!({"dns": value})).unwrap().dns;
        let given = dns(json!({"nameservers": ["10.1.0.1", "a b"], "domain": "d.local",
            "options": ["ndots:2"]}))
        .unwrap();
        assert_eq!(
            (given.servers, given.searches),
            (vec!["10.1.0.1".to_owned()], vec!["d.local".to_owned()])
        );
        assert!(dns(json!({"domain": "d"})).is_none() && dns(json!({})).is_none());
        let both =
            dns(json!({"nameservers": ["1.1.1.1"], "domain": "d", "search": ["s"]})).unwrap();
        assert_eq!(both.searches, ["s"]);
    }

    #[test]
    fn a_missing_version_is_filled_in() {
        assert_eq!(with_version(json!({}), "0.2.0"), json!({"cniVersion": "0.2.0"}));
        let told = json!({"cniVersion": "1.0.0"});
        assert_eq!(with_version(told.clone(), "0.2.0"), told);
    }
}
