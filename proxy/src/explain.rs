//! What happens to packets of a Service, and why an endpoint gets none of them: told from the same
//! plan that is programmed. Pure.

use std::net::{IpAddr, SocketAddr};

use serde::Serialize;

use crate::config::LocalTraffic;
use crate::object::{Cidr, Endpoint, EndpointSlice, NamespacedName, NodeHint, Service};
use crate::plan::{PortPlan, Prefer, ServicePlan, Topology, candidates, prefer, unusable};

/// Where a packet comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum From {
    /// This node itself.
    Node,
    /// What counts as a pod by `detectLocalMode`.
    Pod,
    /// From elsewhere.
    Outside,
}

/// What is asked.
#[derive(Clone, Debug, Default)]
pub struct Question {
    /// The client; all kinds of clients without.
    pub from: Option<IpAddr>,
    /// Where it connects to; all addresses of the Service without.
    pub to: Option<SocketAddr>,
}

/// A way that packets take.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Way {
    /// `cluster IP 10.96.0.10:53/udp`.
    pub to: String,
    /// The clients that it is for.
    pub from: Vec<From>,
    /// What happens.
    pub verdict: String,
    /// What becomes of the client's address.
    pub source: String,
    /// The endpoints that it may get.
    pub endpoints: Vec<SocketAddr>,
}

/// An endpoint of a port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct EndpointLine {
    /// Address and port.
    pub address: SocketAddr,
    /// Whether any way leads to it.
    pub used: bool,
    /// Why it is used, or why not.
    pub why: String,
}

/// A port of the Service in one family.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PortLine {
    /// `http 80/tcp, IPv4`.
    pub port: String,
    /// Its ways.
    pub ways: Vec<Way>,
    /// All endpoints that its slices have for it.
    pub endpoints: Vec<EndpointLine>,
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Explanation {
    /// Which Service.
    pub service: String,
    /// What is wrong with it.
    pub problems: Vec<String>,
    /// Its ports.
    pub ports: Vec<PortLine>,
}

/// What must be known for an answer.
pub struct Known<'a> {
    /// The Service as checked.
    pub service: &'a Service,
    /// Its slices.
    pub slices: &'a [&'a EndpointSlice],
    /// What is programmed of it.
    pub plan: &'a ServicePlan,
    /// The node.
    pub topology: &'a Topology,
    /// How pods' traffic is told.
    pub local: &'a LocalTraffic,
    /// Whether all traffic to cluster IPs is masqueraded.
    pub masquerade_all: bool,
    /// Where NodePorts are served; `None` is everywhere.
    pub node_ports: Option<&'a [Cidr]>,
    /// NodePorts at 127.0.0.1 too.
    pub localhost: bool,
    /// What is wrong with the Service.
    pub problems: Vec<String>,
}

impl Known<'_> {
    fn kind(&self, from: IpAddr) -> Vec<From> {
        if from.is_loopback() || self.topology.addresses.contains(&from) {
            return vec![From::Node];
        }
        match self.local {
            LocalTraffic::Cidrs(cidrs) if cidrs.iter().any(|c| c.contains(from)) => vec![From::Pod],
            LocalTraffic::Cidrs(_) | LocalTraffic::Unknown => vec![From::Outside],
            // The interface tells, not the address.
            LocalTraffic::Interface(_) | LocalTraffic::InterfacePrefix(_) => {
                vec![From::Pod, From::Outside]
            }
        }
    }

    /// Explains.
    pub fn explain(&self, question: &Question) -> Explanation {
        let key: &NamespacedName = &self.service.key;
        let family = question.from.or(question.to.map(|to| to.ip())).map(|ip| ip.is_ipv4());
        let ports = self
            .plan
            .ports
            .iter()
            .filter(|port| family.is_none_or(|ipv4| ipv4 == port.is_ipv4()))
            .map(|port| self.port(port, question))
            .filter(|line| question.to.is_none() || !line.ways.is_empty());
        Explanation {
            service: key.to_string(),
            problems: self.problems.clone(),
            ports: ports.collect(),
        }
    }

    fn port(&self, plan: &PortPlan, question: &Question) -> PortLine {
        let kinds = match question.from {
            Some(from) => self.kind(from),
            None => vec![From::Node, From::Pod, From::Outside],
        };
        let protocol = plan.protocol;
        let mut ways = Vec::new();
        let asked =
            |ip: IpAddr, port: u16| question.to.is_none_or(|to| to.port() == port && ip == to.ip());
        if asked(plan.cluster_ip, plan.port) {
            let to =
                format!("cluster IP {}/{protocol}", SocketAddr::new(plan.cluster_ip, plan.port));
            ways.extend(self.internal(plan, &to, &kinds));
        }
        for ip in &plan.external_ips {
            if !asked(*ip, plan.port) || *ip == plan.cluster_ip {
                continue;
            }
            let to = format!("external IP {}/{protocol}", SocketAddr::new(*ip, plan.port));
            let mut of_ip = self.external(plan, &to, &kinds);
            if plan.firewalled_ips.contains(ip) {
                let allowed = |from: IpAddr| plan.source_ranges.iter().any(|r| r.contains(from));
                let ranges: Vec<String> =
                    plan.source_ranges.iter().map(ToString::to_string).collect();
                match question.from {
                    Some(from) if !allowed(from) => of_ip.iter_mut().for_each(|way| {
                        way.verdict = format!(
                            "dropped: {from} is in none of loadBalancerSourceRanges ({})",
                            ranges.join(", ")
                        );
                        way.endpoints.clear();
                    }),
                    Some(_) => {}
                    None => of_ip.iter_mut().for_each(|way| {
                        let only = format!("; only from {}", ranges.join(", "));
                        way.verdict.push_str(&only);
                    }),
                }
            }
            ways.extend(of_ip);
        }
        let asked_of_node =
            question.to.is_none_or(|to| to.port() == plan.node_port && self.serves(to.ip()));
        if plan.node_port != 0 && asked_of_node {
            let at = self.node_port_places(plan.is_ipv4(), question.to.map(|to| to.ip()));
            let to = format!("NodePort {}/{protocol}{at}", plan.node_port);
            ways.extend(self.external(plan, &to, &kinds));
        }
        let name = if plan.name.is_empty() { String::new() } else { format!("{} ", plan.name) };
        let family = if plan.is_ipv4() { "IPv4" } else { "IPv6" };
        PortLine {
            port: format!("{name}{}/{protocol}, {family}", plan.port),
            ways,
            endpoints: self.endpoints(plan),
        }
    }

    /// Whether NodePorts are served at an address, if it is the node's.
    fn serves(&self, ip: IpAddr) -> bool {
        let loopback = !ip.is_loopback() || (ip.is_ipv4() && self.localhost);
        let mut within = self.node_ports.into_iter().flatten();
        loopback && (self.node_ports.is_none() || within.any(|cidr| cidr.contains(ip)))
    }

    /// Where NodePorts of a family are served, in words.
    fn node_port_places(&self, ipv4: bool, asked: Option<IpAddr>) -> String {
        if let Some(ip) = asked {
            let known = ip.is_loopback() || self.topology.addresses.contains(&ip);
            return if known { String::new() } else { format!(" (if {ip} is this node's)") };
        }
        let cidrs = self.node_ports.into_iter().flatten().filter(|cidr| cidr.is_ipv4() == ipv4);
        let cidrs: Vec<&Cidr> = cidrs.collect();
        if self.node_ports.is_none() || cidrs.iter().any(|cidr| cidr.prefix_len == 0) {
            return String::new();
        }
        let places: Vec<String> = cidrs.iter().map(ToString::to_string).collect();
        format!(" at {}", if places.is_empty() { "no address".into() } else { places.join(", ") })
    }

    fn picked(&self, plan: &PortPlan, endpoints: &[SocketAddr]) -> String {
        let affinity = plan.affinity.map_or(String::new(), |seconds| {
            format!(", the client's own for {seconds} s after its last connection")
        });
        match endpoints.len() {
            0 if plan.has_endpoints => {
                "dropped: there are endpoints, but none that this policy lets this node use".into()
            }
            0 => "rejected: there are no ready endpoints".to_owned(),
            1 => "goes to its one endpoint".to_owned(),
            n => format!("goes to one of {n} at random{affinity}"),
        }
    }

    fn way(
        &self,
        plan: &PortPlan,
        to: &str,
        from: Vec<From>,
        source: &str,
        list: &[SocketAddr],
    ) -> Way {
        Way {
            to: to.to_owned(),
            from,
            verdict: self.picked(plan, list),
            source: if list.is_empty() { "-".to_owned() } else { source.to_owned() },
            endpoints: list.to_vec(),
        }
    }

    fn internal(&self, plan: &PortPlan, to: &str, kinds: &[From]) -> Vec<Way> {
        const KEPT: &str = "kept, but for a pod that reaches itself";
        let masquerades = |kind: &From| match self.local {
            _ if self.masquerade_all => true,
            LocalTraffic::Unknown => false,
            _ => *kind != From::Pod,
        };
        let (hidden, kept): (Vec<From>, Vec<From>) = kinds.iter().partition(|k| masquerades(k));
        let mut ways = Vec::new();
        if !kept.is_empty() {
            ways.push(self.way(plan, to, kept, KEPT, plan.internal()));
        }
        if !hidden.is_empty() {
            ways.push(self.way(plan, to, hidden, "masqueraded", plan.internal()));
        }
        ways
    }

    fn external(&self, plan: &PortPlan, to: &str, kinds: &[From]) -> Vec<Way> {
        if !plan.external_local {
            return vec![self.way(plan, to, kinds.to_vec(), "masqueraded", &plan.cluster)];
        }
        let pods_known = !matches!(self.local, LocalTraffic::Unknown);
        let mut ways = Vec::new();
        for kind in kinds {
            let (source, list) = match kind {
                From::Node => ("masqueraded", &plan.cluster),
                From::Pod if pods_known => {
                    ("kept, but for a pod that reaches itself", &plan.cluster)
                }
                From::Pod | From::Outside => ("kept", &plan.local),
            };
            ways.push(self.way(plan, to, vec![*kind], source, list));
        }
        ways
    }

    fn endpoints(&self, plan: &PortPlan) -> Vec<EndpointLine> {
        let port = self.service.ports.iter().find(|port| {
            port.protocol == plan.protocol && port.port == plan.port && port.name == plan.name
        });
        let Some(port) = port else { return Vec::new() };
        let found = candidates(port, plan.is_ipv4(), self.slices);
        let near = prefer(found.values().copied(), self.topology);
        let mut lines: Vec<EndpointLine> = found
            .iter()
            .map(|(address, endpoint)| {
                let in_cluster = plan.cluster.contains(address);
                let in_local = plan.local.contains(address);
                EndpointLine {
                    address: *address,
                    used: in_cluster || in_local,
                    why: why(endpoint, in_cluster, in_local, plan, &near),
                }
            })
            .collect();
        for endpoint in self.slices.iter().flat_map(|slice| &slice.endpoints) {
            if endpoint.address.is_ipv4() == plan.is_ipv4()
                && let Some(why) = unusable(endpoint.address)
            {
                let address = SocketAddr::new(endpoint.address, 0);
                lines.push(EndpointLine { address, used: false, why: format!("it is {why}") });
            }
        }
        lines
    }
}

fn why(
    endpoint: &Endpoint,
    in_cluster: bool,
    in_local: bool,
    plan: &PortPlan,
    near: &Prefer,
) -> String {
    let terminating = endpoint.serving && endpoint.terminating && !endpoint.ready;
    let place = if endpoint.local { "on this node" } else { "on another node" };
    if in_cluster || in_local {
        let state = if terminating {
            "terminating, and still serving: there is no ready one"
        } else {
            "ready"
        };
        let only = match (in_cluster, in_local) {
            (true, false) if plan.internal_local || plan.external_local => {
                "; for traffic of policy Cluster only"
            }
            (false, true) if !plan.cluster.is_empty() => "; for traffic of policy Local only",
            _ => "",
        };
        let hint = match near {
            Prefer::SameNode if in_cluster => "; hinted for this node",
            Prefer::SameZone(_) if in_cluster => "; hinted for this zone",
            _ => "",
        };
        return format!("{state}, {place}{hint}{only}");
    }
    if terminating {
        return format!("terminating, {place}; there are ready ones");
    }
    if !endpoint.ready {
        return format!("not ready, {place}");
    }
    if !near.allows(endpoint) {
        return match near {
            Prefer::SameNode => {
                let whose =
                    if endpoint.node_hint == NodeHint::Others { "other nodes" } else { "none" };
                format!(
                    "ready, {place}, but hinted for {whose}, and this node has hints of its own"
                )
            }
            _ => {
                let zones: Vec<&str> = endpoint.zones.iter().map(|zone| &**zone).collect();
                format!(
                    "ready, {place}, but hinted for zone {}, which is not this node's",
                    zones.join(", ")
                )
            }
        };
    }
    format!("ready, but {place}, and the traffic policy is Local")
}

/// The words of the answer.
pub fn render(explanation: &Explanation) -> String {
    use std::fmt::Write;
    let mut out = format!("Service {}\n", explanation.service);
    // Writing to a string cannot fail.
    for problem in &explanation.problems {
        let _ = writeln!(out, "  problem: {problem}");
    }
    if explanation.ports.is_empty() {
        out.push_str(
            "  no port of it is at that address; a load balancer's address with ipMode Proxy is not this node's \
             to serve, and NodePorts are where nodePortAddresses says\n",
        );
    }
    for port in &explanation.ports {
        let _ = writeln!(out, "\nport {}", port.port);
        for way in &port.ways {
            let from: Vec<&str> = way
                .from
                .iter()
                .map(|from| match from {
                    From::Node => "this node",
                    From::Pod => "pods",
                    From::Outside => "elsewhere",
                })
                .collect();
            let _ = writeln!(out, "  {} from {}: {}", way.to, from.join(", "), way.verdict);
            if !way.endpoints.is_empty() {
                let list: Vec<String> = way.endpoints.iter().map(ToString::to_string).collect();
                let _ = writeln!(out, "    to {}; source address {}", list.join(", "), way.source);
            }
        }
        for line in &port.endpoints {
            let mark = if line.used { "used" } else { "not used" };
            let address = match line.address.port() {
                0 => line.address.ip().to_string(),
                _ => line.address.to_string(),
            };
            let _ = writeln!(out, "  endpoint {address}: {mark}: {}", line.why);
        }
        if port.endpoints.is_empty() {
            out.push_str("  no EndpointSlice has an endpoint for it\n");
        }
    }
    out
}
