//! Random Services and EndpointSlices, as an API server may hold them, and the addresses to try.

use std::net::{IpAddr, SocketAddr};

use serde_json::{Value, json};

use crate::net::{NODE, Place, pod_ip};
use crate::probe::{Target, Transport};

/// Name of the node.
pub const NODE_NAME: &str = "node";

/// A port that no Service has.
pub const UNKNOWN_PORT: u16 = 4;

/// splitmix64: the same numbers for the same seed, everywhere.
pub struct Dice(pub u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % sides as u64) as usize
    }

    fn one_in(&mut self, sides: usize) -> bool {
        self.roll(sides) == 0
    }

    fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from[self.roll(from.len())].clone()
    }

    /// Whether a Service goes.
    pub fn roll_out(&mut self) -> bool {
        self.one_in(6)
    }

    fn policy(&mut self) -> &'static str {
        if self.one_in(3) { "Local" } else { "Cluster" }
    }
}

/// What a node is configured with: fields of `KubeProxyConfiguration`.
pub fn configuration(dice: &mut Dice) -> Value {
    let mut config =
        json!({"clusterCIDR": dice.pick(&["10.88.0.0/16,fd88::/48", "10.88.0.0/16", ""])});
    match dice.roll(6) {
        0 => config["detectLocalMode"] = json!("NodeCIDR"),
        1 => {
            config["detectLocalMode"] = json!("BridgeInterface");
            config["detectLocal"] = json!({"bridgeInterface": "pod0"});
        }
        2 => {
            config["detectLocalMode"] = json!("InterfaceNamePrefix");
            config["detectLocal"] = json!({"interfaceNamePrefix": "pod"});
        }
        _ => {}
    }
    let section =
        json!({"masqueradeAll": dice.one_in(5), "masqueradeBit": dice.pick(&[14, 0, 31])});
    config["nftables"] = section.clone();
    config["iptables"] = section;
    config["iptables"]["localhostNodePorts"] = json!(!dice.one_in(3));
    config["nodePortAddresses"] = dice.pick(&[
        json!([]),
        json!(["primary"]),
        json!(["192.168.50.0/24"]),
        json!(["fd50::/64"]),
        json!(["127.0.0.0/8", "192.168.50.0/24", "::1/128", "fd88::/64"]),
        json!(["10.0.0.0/8", "0.0.0.0/0"]),
    ]);
    config
}

/// The node's object.
pub fn node() -> Value {
    let addresses: Vec<Value> =
        NODE[..2].iter().map(|a| json!({"type": "InternalIP", "address": a})).collect();
    json!({"apiVersion": "v1", "kind": "Node",
        "metadata": {"name": NODE_NAME, "labels": {"topology.kubernetes.io/zone": "here"}},
        "spec": {"podCIDR": "10.88.0.0/24", "podCIDRs": ["10.88.0.0/24", "fd88::/64"]},
        "status": {"addresses": addresses}})
}

/// The ranges of cluster IPs, of which the markers have some.
pub fn service_cidrs() -> Value {
    json!({"apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR", "metadata": {"name": "kubernetes"},
        "spec": {"cidrs": ["10.96.0.0/16", "fd96::/112"]}, "status": {}})
}

/// A port of a Service: name, protocol, number.
type Port = (&'static str, &'static str, u16);

const PORTS: [&[Port]; 6] = [
    &[("", "TCP", 80)],
    &[("http", "TCP", 80), ("dns", "UDP", 53)],
    &[("http", "TCP", 80), ("alt", "TCP", 443), ("dns", "UDP", 53), ("dns-tcp", "TCP", 53)],
    &[("last", "UDP", 65535), ("first", "TCP", 1)],
    &[("sip", "SCTP", 5060), ("http", "TCP", 80)],
    &[("s1ap", "SCTP", 36412), ("dns", "UDP", 53), ("dns-sctp", "SCTP", 53)],
];

/// A random Service `number`.
pub fn service(dice: &mut Dice, number: u8) -> Value {
    let ip = |v4: &str, v6: &str, ipv4: bool| {
        if ipv4 { format!("{v4}.{number}") } else { format!("{v6}{number:x}") }
    };
    let families: &[bool] =
        [&[true, false] as &[bool], &[false, true], &[true], &[false]][dice.roll(4)];
    let cluster_ips: Vec<String> =
        families.iter().map(|ipv4| ip("10.96.0", "fd96::", *ipv4)).collect();
    let names: Vec<&str> = families.iter().map(|v4| if *v4 { "IPv4" } else { "IPv6" }).collect();
    let kind = dice.pick(&["ClusterIP", "NodePort", "NodePort", "LoadBalancer", "LoadBalancer"]);
    let ports = dice.pick(&PORTS);
    let node_port = |index: usize, (_, _, port): Port| {
        // A number may be one Service's by TCP and by UDP.
        let offset = if port == 53 { 9 } else { index as u16 };
        if kind == "ClusterIP" { 0 } else { 30_000 + u16::from(number) * 10 + offset }
    };
    let ports: Vec<Value> = ports
        .iter()
        .enumerate()
        .map(|(index, port)| {
            json!({"name": port.0, "protocol": port.1, "port": port.2, "targetPort": 8080,
                "nodePort": node_port(index, *port)})
        })
        .collect();
    let mut spec = json!({"type": kind, "clusterIP": cluster_ips[0], "clusterIPs": cluster_ips,
        "ipFamilies": names, "ipFamilyPolicy": if families.len() == 2 { "PreferDualStack" } else { "SingleStack" },
        "ports": ports, "sessionAffinity": "None", "internalTrafficPolicy": dice.policy()});
    if dice.one_in(4) {
        spec["sessionAffinity"] = json!("ClientIP");
        spec["sessionAffinityConfig"] = json!({"clientIP": {"timeoutSeconds": 600}});
    }
    if dice.one_in(2) {
        let mut ips = vec![ip("203.0.113", "", true), ip("", "2001:db8::", false)];
        if number == 1 && dice.one_in(4) {
            ips.push(NODE[0].to_owned());
        }
        spec["externalIPs"] = json!(ips);
    }
    if kind != "ClusterIP" || spec.get("externalIPs").is_some() {
        spec["externalTrafficPolicy"] = json!(dice.policy());
    }
    let mut status = json!({});
    if kind == "LoadBalancer" {
        if spec["externalTrafficPolicy"] == "Local" {
            spec["healthCheckNodePort"] = json!(32_000 + u16::from(number));
        }
        let mode = dice.pick(&[json!("VIP"), json!("VIP"), json!("Proxy"), Value::Null]);
        let ingress = [ip("198.51.100", "", true), ip("", "2001:db8:1::", false)];
        status = json!({"loadBalancer": {"ingress": ingress.iter().map(|ip| {
            json!({"ip": ip, "ipMode": mode})
        }).collect::<Vec<_>>()}});
        let ranges: &[&str] = match dice.roll(8) {
            0 => &["192.168.50.0/24"],
            1 => &["10.88.0.0/30", "192.0.2.0/24", " 192.168.50.1/32 "],
            2 => &["0.0.0.0/0"],
            3 => &["192.0.2.0/24", "0.0.0.0/0"],
            4 => &["fd50::/64"],
            5 => &["10.88.0.0/16", "192.168.50.2/32", "fd88::/64"],
            _ => &[],
        };
        spec["loadBalancerSourceRanges"] = json!(ranges);
    }
    let mut labels = json!({});
    match dice.roll(24) {
        0 => {
            spec["clusterIP"] = json!("None");
            spec["clusterIPs"] = json!(["None"]);
        }
        1 => labels["service.kubernetes.io/service-proxy-name"] = json!("another"),
        2 => spec["type"] = json!("ExternalName"),
        _ => {}
    }
    json!({"apiVersion": "v1", "kind": "Service", "spec": spec, "status": status,
        "metadata": {"namespace": "default", "name": format!("svc{number}"), "labels": labels}})
}

fn condition(dice: &mut Dice, likely: bool) -> Value {
    match dice.roll(6) {
        0 => Value::Null,
        1 => json!(!likely),
        _ => json!(likely),
    }
}

fn endpoint(dice: &mut Dice, pod: usize, ipv4: bool, hints: bool) -> Value {
    let well = !dice.one_in(3);
    let (serves, ends) = (well || dice.one_in(2), !well && dice.one_in(2));
    let mut endpoint = json!({"addresses": [pod_ip(pod, ipv4)], "conditions": {
        "ready": condition(dice, well),
        "serving": condition(dice, serves),
        "terminating": condition(dice, ends)}});
    // The pod that asks is here: only what runs here may talk to itself.
    match dice.roll(3) {
        _ if pod == 0 => endpoint["nodeName"] = json!(NODE_NAME),
        0 => endpoint["nodeName"] = json!("other"),
        1 => endpoint["nodeName"] = json!(NODE_NAME),
        _ => {}
    }
    if hints {
        let zones: &[&str] =
            [&["here"] as &[&str], &["there"], &["there", "here"], &[]][dice.roll(4)];
        let nodes: &[&str] = [&[NODE_NAME] as &[&str], &["other"], &[], &[]][dice.roll(4)];
        let named = |names: &[&str]| names.iter().map(|n| json!({"name": n})).collect::<Vec<_>>();
        endpoint["hints"] = json!({"forZones": named(zones), "forNodes": named(nodes)});
    }
    endpoint
}

/// Slices of a Service: two for each family, maybe with ports of their own, maybe with the same
/// endpoint in both.
pub fn slices(dice: &mut Dice, number: u8, service: &Value) -> Vec<Value> {
    let mut all = Vec::new();
    let (hints, none) = (dice.one_in(3), dice.one_in(8));
    let labels = match dice.roll(16) {
        0 => json!({"service.kubernetes.io/headless": ""}),
        1 => json!({"service.kubernetes.io/service-proxy-name": "another"}),
        _ => json!({}),
    };
    for ipv4 in [true, false] {
        let second_port = if dice.one_in(3) { 8081 } else { 8080 };
        let mut lists = [Vec::new(), Vec::new()];
        for pod in 0..crate::net::PODS.len() {
            if none || dice.one_in(4) {
                continue;
            }
            let one = endpoint(dice, pod, ipv4, hints);
            // Some are told twice, as while a slice is split.
            match dice.roll(5) {
                0 => {
                    lists[0].push(one.clone());
                    lists[1].push(one);
                }
                1 => lists[1].push(one),
                _ => lists[0].push(one),
            }
        }
        for (which, endpoints) in lists.into_iter().enumerate() {
            let target = if which == 0 { 8080 } else { second_port };
            let ports: Vec<Value> = service["spec"]["ports"]
                .as_array()
                .into_iter()
                .flatten()
                // A named port may be one that only some pods have.
                .filter(|_| which == 0 || !dice.one_in(5))
                .map(|port| {
                    let number = if port["name"] == "alt" { 8443 } else { target };
                    json!({"name": port["name"], "protocol": port["protocol"], "port": number})
                })
                .collect();
            let mut labels = labels.clone();
            labels["kubernetes.io/service-name"] = json!(format!("svc{number}"));
            let family = if ipv4 { "IPv4" } else { "IPv6" };
            let name = format!("svc{number}-{}-{which}", family.to_lowercase());
            all.push(json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
                "metadata": {"namespace": "default", "name": name, "labels": labels},
                "addressType": family, "ports": ports, "endpoints": endpoints}));
        }
    }
    all
}

/// Objects that nobody should be hurt by: clashes, endpoints that lead nowhere or back, many ports,
/// names at their limits. None of their addresses is tried.
pub fn hostile() -> Vec<(&'static str, Value)> {
    let long = "a".repeat(63);
    let plain = |name: &str, n: u8, spec: Value| {
        let mut all = json!({"type": "NodePort", "clusterIP": format!("10.96.7.{n}"),
            "clusterIPs": [format!("10.96.7.{n}"), format!("fd96::7:{n:x}")],
            "ipFamilies": ["IPv4", "IPv6"], "ipFamilyPolicy": "PreferDualStack",
            "sessionAffinity": "None", "internalTrafficPolicy": "Cluster",
            "externalTrafficPolicy": "Cluster",
            "ports": [{"name": "p", "protocol": "TCP", "port": 80, "targetPort": 8080, "nodePort": 31_000 + u16::from(n)}]});
        for (field, value) in spec.as_object().into_iter().flatten() {
            all[field] = value.clone();
        }
        (
            "services",
            json!({"apiVersion": "v1", "kind": "Service", "spec": all, "status": {},
            "metadata": {"namespace": "default", "name": name}}),
        )
    };
    let slice = |service: &str, ipv4: bool, address: &str| {
        let family = if ipv4 { "IPv4" } else { "IPv6" };
        let name = format!("{service}-{}", family.to_lowercase());
        (
            "endpointslices",
            json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {"namespace": "default", "name": name, "labels": {"kubernetes.io/service-name": service}},
            "addressType": family, "ports": [{"name": "p", "protocol": "TCP", "port": 8080}],
            "endpoints": [{"addresses": [address], "conditions": {"ready": true}}]}),
        )
    };
    let clash = json!({"externalIPs": ["203.0.113.99"], "ports": [
        {"name": "p", "protocol": "TCP", "port": 80, "targetPort": 8080, "nodePort": 31_999}]});
    let many: Vec<Value> = (0..200)
        .map(|i| json!({"name": format!("p{i}"), "protocol": "TCP", "port": 2000 + i, "targetPort": 8080, "nodePort": 31_100 + i}))
        .collect();
    vec![
        plain("clash1", 1, clash.clone()),
        slice("clash1", true, "10.88.0.2"),
        plain("clash2", 2, clash),
        slice("clash2", true, "10.88.0.3"),
        plain("loopback", 3, json!({})),
        slice("loopback", true, "127.0.0.1"),
        slice("loopback", false, "::1"),
        plain("itself", 4, json!({})),
        slice("itself", true, NODE[0]),
        slice("itself", false, NODE[1]),
        plain("vip", 5, json!({})),
        slice("vip", true, "10.96.0.1"),
        plain("many", 6, json!({"ports": many})),
        plain(&long, 7, json!({})),
        slice(&long, true, "10.88.0.2"),
    ]
}

/// The marker: what it is reached at tells that everything before it has been programmed.
pub fn marker(round: u16) -> (Vec<(&'static str, Value)>, Vec<SocketAddr>, String) {
    let ips = ["10.96.9.9", "fd96::9:9"];
    let (port, target) = (1000 + round, 9000 + round % 4);
    let service = json!({"apiVersion": "v1", "kind": "Service", "status": {},
        "metadata": {"namespace": "default", "name": "marker"},
        "spec": {"type": "ClusterIP", "clusterIP": ips[0], "clusterIPs": ips, "ipFamilies": ["IPv4", "IPv6"],
            "ipFamilyPolicy": "PreferDualStack", "sessionAffinity": "None", "internalTrafficPolicy": "Cluster",
            "ports": [{"name": "p", "protocol": "TCP", "port": port, "targetPort": target}]}});
    let slice = |ipv4: bool| {
        let family = if ipv4 { "IPv4" } else { "IPv6" };
        json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {"namespace": "default", "name": format!("marker-{}", family.to_lowercase()),
                "labels": {"kubernetes.io/service-name": "marker"}},
            "addressType": family, "ports": [{"name": "p", "protocol": "TCP", "port": target}],
            "endpoints": [{"addresses": [pod_ip(0, ipv4)], "nodeName": NODE_NAME, "conditions": {"ready": true}}]})
    };
    let objects = vec![
        ("services", service),
        ("endpointslices", slice(true)),
        ("endpointslices", slice(false)),
    ];
    let at = ips.map(|ip| SocketAddr::new(ip.parse().expect("address"), port));
    (objects, at.to_vec(), format!("a:{target} "))
}

/// Every address of a Service, from every place.
pub fn targets(service: &Value) -> Vec<Target> {
    let spec = &service["spec"];
    let affinity = spec["sessionAffinity"] == "ClientIP";
    let number = service["metadata"]["name"].as_str().and_then(|name| name.bytes().last());
    let ips_of = |value: &Value| -> Vec<IpAddr> {
        let texts = value.as_array().into_iter().flatten().filter_map(Value::as_str);
        texts.filter_map(|text| text.parse().ok()).collect()
    };
    let mut ips = ips_of(&spec["clusterIPs"]);
    ips.extend(ips_of(&spec["externalIPs"]));
    let ingress = service["status"]["loadBalancer"]["ingress"].as_array();
    ips.extend(
        ingress.into_iter().flatten().filter_map(|i| i["ip"].as_str()?.parse::<IpAddr>().ok()),
    );
    let mut all = Vec::new();
    let mut add = |index: u16, place, by, to: SocketAddr| {
        let together = u16::from(number.unwrap_or(0)) * 32 + index * 2 + u16::from(to.is_ipv4());
        all.push(Target { place, by, to, sticky: affinity.then_some(together) });
    };
    for (index, port) in (0..).zip(spec["ports"].as_array().into_iter().flatten()) {
        let mut add = |place, by, to| add(index, place, by, to);
        let by = match port["protocol"].as_str() {
            Some("UDP") => Transport::Udp,
            Some("SCTP") => Transport::Sctp,
            _ => Transport::Tcp,
        };
        let number = |field: &str| port[field].as_u64().unwrap_or_default() as u16;
        for place in Place::ALL {
            ips.iter().for_each(|ip| add(place, by, SocketAddr::new(*ip, number("port"))));
            if number("nodePort") != 0 {
                for ip in NODE {
                    let ip = ip.parse().expect("address");
                    add(place, by, SocketAddr::new(ip, number("nodePort")));
                }
            }
        }
        if number("nodePort") != 0 {
            for ip in ["127.0.0.1", "::1"] {
                let ip = ip.parse().expect("address");
                add(Place::Node, by, SocketAddr::new(ip, number("nodePort")));
            }
        }
    }
    // An address that no Service has.
    for ip in ["10.96.200.200", "fd96::c8c8"] {
        let to = SocketAddr::new(ip.parse().expect("address"), UNKNOWN_PORT);
        Place::ALL.into_iter().for_each(|place| add(15, place, Transport::Tcp, to));
    }
    // A port that the Service does not have.
    for ip in ips_of(&spec["clusterIPs"]) {
        Place::ALL
            .into_iter()
            .for_each(|place| add(15, place, Transport::Tcp, SocketAddr::new(ip, UNKNOWN_PORT)));
    }
    all.sort_unstable();
    all.dedup();
    all
}
