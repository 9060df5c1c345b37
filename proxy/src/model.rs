//! What the proxy has been told, and what follows from it for each Service. A change touches only
//! the Services that it concerns.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use crate::backend::Environment;
use crate::claims::{Claim, Claims};
use crate::explain::{Explanation, Known, Question};
use crate::object::{Change, Cidr, EndpointSlice, NamespacedName, NodeState, Service};
use crate::plan::{Granted, ServicePlan, Topology, local_ready, plan_port, unusable};
use crate::question::ServiceHealth;

/// A Service whose plan changed.
#[derive(Clone, Debug)]
pub struct PlanChange {
    /// Which.
    pub service: NamespacedName,
    /// What was planned before.
    pub old: Option<Arc<ServicePlan>>,
    /// What is planned now; `None` if nothing is left of it.
    pub new: Option<Arc<ServicePlan>>,
}

/// A Service as checked, with what it is granted of what it asks for.
#[derive(Clone, Debug)]
struct Checked {
    service: Service,
    /// Rare, and so out of the way.
    trouble: Option<Box<Trouble>>,
}

/// What is wrong with a Service.
#[derive(Clone, Debug, Default)]
struct Trouble {
    errors: Vec<String>,
    refused: BTreeMap<Claim, NamespacedName>,
}

impl Checked {
    fn new(
        service: Service,
        errors: Vec<String>,
        refused: Vec<(Claim, NamespacedName)>,
    ) -> Checked {
        let trouble = Trouble { errors, refused: refused.into_iter().collect() };
        let none = trouble.errors.is_empty() && trouble.refused.is_empty();
        Checked { service, trouble: (!none).then(|| Box::new(trouble)) }
    }
}

/// Names that many objects have, kept once.
#[derive(Clone, Debug, Default)]
struct Names {
    known: HashSet<Arc<str>>,
    /// At so many names those that nobody uses any more are forgotten.
    sweep_at: usize,
}

impl Names {
    fn share(&mut self, name: &mut Arc<str>) {
        match self.known.get(name) {
            Some(known) => name.clone_from(known),
            None => {
                if self.known.len() >= self.sweep_at {
                    self.known.retain(|name| Arc::strong_count(name) > 1);
                    self.sweep_at = (self.known.len() * 2).max(256);
                }
                self.known.insert(name.clone());
            }
        }
    }
}

/// The model.
#[derive(Clone, Debug, Default)]
pub struct Model {
    services: HashMap<NamespacedName, Checked>,
    slices: HashMap<NamespacedName, EndpointSlice>,
    /// Names of the slices of a Service, sorted.
    slices_of: HashMap<NamespacedName, Vec<Arc<str>>>,
    names: Names,
    claims: Claims,
    plans: HashMap<NamespacedName, Arc<ServicePlan>>,
    dirty: BTreeSet<NamespacedName>,
    topology: Topology,
    node: NodeState,
    /// Ranges of cluster IPs, where they have been told.
    pub service_cidrs: Option<Vec<Cidr>>,
    endpoints: usize,
    /// Changes that happened before this are not measured: they waited for a restart, not for us.
    measured_since: i64,
    /// When changes happened that are still to be planned.
    triggers: Vec<i64>,
    errors: BTreeMap<NamespacedName, Vec<String>>,
    /// Services and slices have been told completely once.
    pub synced: bool,
    /// Why they cannot be had.
    pub source_error: Option<String>,
    /// Changes of Services seen.
    pub service_changes: u64,
    /// Changes of slices seen.
    pub endpoint_changes: u64,
}

impl Model {
    /// An empty model for the node of that name.
    pub fn new(node_name: &str) -> Self {
        Model {
            topology: Topology { node_name: node_name.into(), ..Topology::default() },
            ..Model::default()
        }
    }

    /// The node as last told.
    pub fn node(&self) -> &NodeState {
        &self.node
    }

    /// Services known.
    pub fn services(&self) -> usize {
        self.services.len()
    }

    /// Endpoints in all slices.
    pub fn endpoints(&self) -> usize {
        self.endpoints
    }

    /// What is wrong with Services, by Service.
    pub fn errors(&self) -> &BTreeMap<NamespacedName, Vec<String>> {
        &self.errors
    }

    /// The plan of every Service.
    pub fn plans(&self) -> impl Iterator<Item = (&NamespacedName, &Arc<ServicePlan>)> {
        self.plans.iter()
    }

    /// Measures changes of endpoints that happened at `since` (milliseconds since the epoch) or later.
    pub fn note_triggers_since(&mut self, since: i64) {
        self.measured_since = since;
    }

    /// When the changes happened that were taken in since this was last asked.
    pub fn take_triggers(&mut self) -> Vec<i64> {
        std::mem::take(&mut self.triggers)
    }

    /// Whether a change waits to be planned.
    pub fn is_dirty(&self) -> bool {
        !self.dirty.is_empty()
    }

    /// Takes a change in.
    pub fn apply(&mut self, change: Change) {
        match change {
            Change::Service(service) => {
                self.service_changes += 1;
                self.put_service(service);
            }
            Change::ServiceGone(key) => {
                self.service_changes += 1;
                self.remove_service(&key);
            }
            Change::Slice(slice) => {
                self.endpoint_changes += 1;
                self.put_slice(slice);
            }
            Change::SliceGone(key) => {
                self.endpoint_changes += 1;
                self.remove_slice(&key);
            }
            Change::Synced => self.synced = true,
            Change::ServiceCidrs(mut cidrs) => {
                cidrs.sort_unstable();
                cidrs.dedup();
                self.service_cidrs = Some(cidrs);
            }
            Change::Node(node) => self.put_node(node),
            Change::SourceError(error) => self.source_error = error,
        }
    }

    fn put_node(&mut self, node: NodeState) {
        if self.topology.zone != node.zone || self.topology.addresses != node.addresses {
            self.topology.zone = node.zone.clone();
            self.topology.addresses = node.addresses.clone();
            self.dirty.extend(self.services.keys().cloned());
        }
        self.node = node;
    }

    fn put_service(&mut self, service: Service) {
        let before = self.services.get(&service.key).map(|known| &known.service);
        if before == Some(&service) {
            return;
        }
        let had = before.map(wanted).unwrap_or_default();
        let (mut service, errors) = check(service);
        self.names.share(&mut service.key.namespace);
        if let Some((known, _)) = self.slices_of.get_key_value(&service.key) {
            service.key = known.clone();
        }
        let key = service.key.clone();
        service.shrink();
        service.ports.iter_mut().for_each(|port| self.names.share(&mut port.name));
        let (refused, woken) = self.claims.replace(&key, had, wanted(&service));
        self.services.insert(key.clone(), Checked::new(service, errors, refused));
        self.dirty.insert(key);
        self.wake(woken);
    }

    fn remove_service(&mut self, key: &NamespacedName) {
        let Some(known) = self.services.remove(key) else { return };
        let (_, woken) = self.claims.replace(key, wanted(&known.service), Vec::new());
        self.dirty.insert(key.clone());
        self.wake(woken);
    }

    /// Lets Services claim again what another has let go.
    fn wake(&mut self, woken: BTreeSet<NamespacedName>) {
        for key in woken {
            let Some(known) = self.services.remove(&key) else { continue };
            let wanted = wanted(&known.service);
            let (refused, _) = self.claims.replace(&key, wanted.clone(), wanted);
            let errors = known.trouble.map(|trouble| trouble.errors).unwrap_or_default();
            self.services.insert(key.clone(), Checked::new(known.service, errors, refused));
            self.dirty.insert(key);
        }
    }

    fn put_slice(&mut self, mut slice: EndpointSlice) {
        self.names.share(&mut slice.key.namespace);
        slice.ports.iter_mut().for_each(|port| self.names.share(&mut port.name));
        let zones = slice.endpoints.iter_mut().flat_map(|endpoint| &mut endpoint.zones);
        zones.for_each(|zone| self.names.share(zone));
        slice.endpoints.shrink_to_fit();
        slice.ports.shrink_to_fit();
        let mut owner =
            NamespacedName { namespace: slice.key.namespace.clone(), name: slice.service.clone() };
        // One name for the Service, its slices and what is kept by it.
        if let Some((known, _)) = self.services.get_key_value(&owner) {
            owner = known.clone();
        } else if let Some((known, _)) = self.slices_of.get_key_value(&owner) {
            owner = known.clone();
        }
        slice.service = owner.name.clone();
        self.endpoints += slice.endpoints.len();
        let key = slice.key.clone();
        let triggered = slice.triggered.filter(|at| *at >= self.measured_since);
        let before = self.slices.get(&key).and_then(|old| old.triggered);
        if self.measured_since > 0 && triggered != before {
            self.triggers.extend(triggered);
        }
        if let Some(old) = self.slices.insert(key.clone(), slice) {
            self.endpoints -= old.endpoints.len();
            if old.service != owner.name {
                self.detach(&key, old.service);
            }
        }
        let names = self.slices_of.entry(owner.clone()).or_default();
        if let Err(at) = names.binary_search(&key.name) {
            names.reserve_exact(1);
            names.insert(at, key.name);
        }
        self.dirty.insert(owner);
    }

    fn remove_slice(&mut self, key: &NamespacedName) {
        if let Some(old) = self.slices.remove(key) {
            self.endpoints -= old.endpoints.len();
            self.detach(key, old.service);
        }
    }

    fn detach(&mut self, slice: &NamespacedName, service: Arc<str>) {
        let owner = NamespacedName { namespace: slice.namespace.clone(), name: service };
        if let Some(names) = self.slices_of.get_mut(&owner) {
            names.retain(|name| *name != slice.name);
            if names.is_empty() {
                self.slices_of.remove(&owner);
            }
        }
        self.dirty.insert(owner);
    }

    /// What happens to packets of a Service; `None` if there is none of that name.
    pub fn explain(
        &self,
        key: &NamespacedName,
        question: &Question,
        environment: &Environment,
    ) -> Option<Explanation> {
        let service = &self.services.get(key)?.service;
        let slices = self.slices(key);
        let known = Known {
            service,
            slices: &slices,
            plan: self.plans.get(key)?,
            topology: &self.topology,
            local: &environment.local,
            masquerade_all: environment.masquerade_all,
            node_ports: environment.node_ports.as_deref(),
            localhost: environment.localhost,
            problems: self.errors.get(key).cloned().unwrap_or_default(),
        };
        Some(known.explain(question))
    }

    /// How the endpoints of Services are, the worst first; at most `limit` of them.
    pub fn health(&self, limit: usize) -> Vec<ServiceHealth> {
        let mut found: Vec<_> = self
            .services
            .keys()
            .map(|key| {
                let (ready, endpoints) = count(&self.slices(key));
                (ready > 0, ready == endpoints, key, ready, endpoints)
            })
            .collect();
        found.sort_unstable_by_key(|(some, all, key, ..)| (*some, *all, *key));
        let told = found.into_iter().take(limit).filter_map(|(.., key, ready, endpoints)| {
            let service = self.services.get(key)?.service.clone();
            Some(ServiceHealth { service, ready, endpoints })
        });
        told.collect()
    }

    fn slices(&self, key: &NamespacedName) -> Vec<&EndpointSlice> {
        let names = self.slices_of.get(key);
        let slice = |name: &Arc<str>| {
            let namespace = key.namespace.clone();
            self.slices.get(&NamespacedName { namespace, name: name.clone() })
        };
        names.into_iter().flatten().filter_map(slice).collect()
    }

    /// Plans the Services that changes concern, and tells those whose plan is now another.
    pub fn take_changes(&mut self) -> Vec<PlanChange> {
        let mut changes = Vec::new();
        for key in std::mem::take(&mut self.dirty) {
            let (new, errors) = match self.services.get(&key) {
                Some(known) => self.plan(&key, known),
                None => (None, Vec::new()),
            };
            if errors.is_empty() {
                self.errors.remove(&key);
            } else {
                self.errors.insert(key.clone(), errors);
            }
            let old = match &new {
                Some(new) if self.plans.get(&key) == Some(new) => continue,
                Some(new) => self.plans.insert(key.clone(), new.clone()),
                None => self.plans.remove(&key),
            };
            if old.is_some() || new.is_some() {
                changes.push(PlanChange { service: key, old, new });
            }
        }
        changes
    }

    fn plan(
        &self,
        key: &NamespacedName,
        known: &Checked,
    ) -> (Option<Arc<ServicePlan>>, Vec<String>) {
        let service = &known.service;
        let trouble = known.trouble.as_deref();
        let mut errors = trouble.map(|t| t.errors.clone()).unwrap_or_default();
        errors.extend(trouble.into_iter().flat_map(|t| &t.refused).map(told));
        let slices = self.slices(key);
        for endpoint in slices.iter().flat_map(|slice| &slice.endpoints) {
            if let Some(why) = unusable(endpoint.address) {
                errors.push(format!("endpoint {} is left out: it is {why}", endpoint.address));
            }
        }
        errors.dedup();
        let free = |claim: &Claim| trouble.is_none_or(|t| !t.refused.contains_key(claim));
        let mut ports = Vec::new();
        for cluster_ip in &service.cluster_ips {
            if !free(&Claim::ClusterIp(*cluster_ip)) {
                continue;
            }
            for port in &service.ports {
                let at = |ips: &[IpAddr]| -> Vec<IpAddr> {
                    ips.iter()
                        .filter(|ip| ip.is_ipv4() == cluster_ip.is_ipv4())
                        .filter(|ip| free(&Claim::Address(**ip, port.protocol, port.port)))
                        .copied()
                        .collect()
                };
                if !free(&Claim::Address(*cluster_ip, port.protocol, port.port)) {
                    continue;
                }
                let node_port = Some(port.node_port)
                    .filter(|number| free(&Claim::NodePort(port.protocol, *number)))
                    .unwrap_or_default();
                let granted = Granted {
                    cluster_ip: *cluster_ip,
                    external_ips: at(&service.external_ips),
                    load_balancer_ips: at(&service.load_balancer_ips),
                    node_port,
                };
                ports.push(plan_port(service, port, granted, &slices, &self.topology));
            }
        }
        ports.shrink_to_fit();
        let plan = ServicePlan {
            ports,
            health_check_node_port: service.health_check_node_port,
            local_ready: local_ready(&slices),
        };
        (Some(Arc::new(plan)), errors)
    }
}

fn told((claim, owner): (&Claim, &NamespacedName)) -> String {
    format!("{claim} is left out: Service {owner} has it; give one of the two another")
}

fn wanted(service: &Service) -> Vec<Claim> {
    let mut claims: Vec<Claim> =
        service.cluster_ips.iter().map(|ip| Claim::ClusterIp(*ip)).collect();
    for port in &service.ports {
        let ips = service
            .cluster_ips
            .iter()
            .chain(&service.external_ips)
            .chain(&service.load_balancer_ips);
        claims.extend(ips.map(|ip| Claim::Address(*ip, port.protocol, port.port)));
        if port.node_port != 0 {
            claims.push(Claim::NodePort(port.protocol, port.node_port));
        }
    }
    claims
}

/// Leaves out what cannot be programmed, and says why; the rest of the Service is served.
fn check(mut service: Service) -> (Service, Vec<String>) {
    let mut errors = Vec::new();
    for (what, ips) in [
        ("cluster IP", &mut service.cluster_ips),
        ("external IP", &mut service.external_ips),
        ("load balancer IP", &mut service.load_balancer_ips),
    ] {
        ips.retain(|ip| match unusable(*ip) {
            Some(why) => {
                errors.push(format!("{what} {ip} is left out: it is {why}"));
                false
            }
            None => true,
        });
    }
    let mut families = HashSet::new();
    service.cluster_ips.retain(|ip| {
        let first = families.insert(ip.is_ipv4());
        if !first {
            errors.push(format!("cluster IP {ip} is left out: there is one of its family already"));
        }
        first
    });
    // A range that is left out must not open the Service to everybody: it stays in the list, where
    // planning skips it.
    for range in &service.load_balancer_source_ranges {
        if range.prefix_len > if range.address.is_ipv4() { 32 } else { 128 } {
            errors.push(format!("source range {range} is left out: the prefix is too long"));
        }
    }
    let mut numbers = HashSet::new();
    let mut node_ports = HashSet::new();
    service.ports.retain_mut(|port| {
        if port.port == 0 {
            errors.push(format!("port {:?} is left out: its number is 0", port.name));
            return false;
        }
        if !numbers.insert((port.protocol, port.port)) {
            errors.push(format!(
                "port {:?} is left out: {} {} is there already",
                port.name, port.protocol, port.port
            ));
            return false;
        }
        if port.node_port != 0 && !node_ports.insert((port.protocol, port.node_port)) {
            errors.push(format!(
                "NodePort {} of port {:?} is left out: another port of the Service has it",
                port.node_port, port.name
            ));
            port.node_port = 0;
        }
        true
    });
    (service, errors)
}

/// Ready endpoints and all: of both families the larger number, as one endpoint has an address of
/// each. An address that two slices hold (it moves from one to the other) counts once.
fn count(slices: &[&EndpointSlice]) -> (usize, usize) {
    let of_family = |ipv4: bool| {
        let mut known: HashMap<IpAddr, bool> = HashMap::new();
        let endpoints = slices.iter().flat_map(|slice| &slice.endpoints);
        for endpoint in endpoints.filter(|e| e.address.is_ipv4() == ipv4) {
            *known.entry(endpoint.address).or_default() |= endpoint.ready;
        }
        (known.values().filter(|ready| **ready).count(), known.len())
    };
    let (four, six) = (of_family(true), of_family(false));
    (four.0.max(six.0), four.1.max(six.1))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::object::{Endpoint, NodeHint, TrafficPolicy};

    fn key(name: &str) -> NamespacedName {
        NamespacedName { namespace: "d".into(), name: name.into() }
    }

    fn service(name: &str) -> Change {
        Change::Service(Service {
            key: key(name),
            cluster_ips: vec!["10.96.0.1".parse().unwrap()],
            external_ips: Vec::new(),
            load_balancer_ips: Vec::new(),
            load_balancer_source_ranges: Vec::new(),
            ports: Vec::new(),
            session_affinity: None,
            internal_traffic_policy: TrafficPolicy::Cluster,
            external_traffic_policy: TrafficPolicy::Cluster,
            health_check_node_port: 0,
        })
    }

    fn slice(name: &str, service: &str, endpoints: &[(&str, bool)]) -> Change {
        let endpoint = |(address, ready): &(&str, bool)| Endpoint {
            address: address.parse().unwrap(),
            ready: *ready,
            serving: *ready,
            terminating: false,
            local: false,
            zones: Vec::new(),
            node_hint: NodeHint::None,
        };
        Change::Slice(EndpointSlice {
            key: key(name),
            service: service.into(),
            ports: Vec::new(),
            endpoints: endpoints.iter().map(endpoint).collect(),
            triggered: None,
        })
    }

    #[test]
    fn the_worst_services_come_first_and_endpoints_count_once() {
        let mut model = Model::new("n");
        for change in [
            service("a-good"),
            service("b-some"),
            service("c-none"),
            service("d-empty"),
            // Both families, and an address in two slices.
            slice("a4", "a-good", &[("10.0.0.1", true), ("10.0.0.2", false)]),
            slice("a4b", "a-good", &[("10.0.0.2", true)]),
            slice("a6", "a-good", &[("fd00::1", true), ("fd00::2", true)]),
            slice("b", "b-some", &[("10.0.1.1", true), ("10.0.1.2", false)]),
            slice("c", "c-none", &[("10.0.2.1", false)]),
        ] {
            model.apply(change);
        }
        let told = |limit| -> Vec<(String, usize, usize)> {
            let health = model.health(limit).into_iter();
            health.map(|h| (h.service.key.name.to_string(), h.ready, h.endpoints)).collect()
        };
        let all = [("c-none", 0, 1), ("d-empty", 0, 0), ("b-some", 1, 2), ("a-good", 2, 2)]
            .map(|(name, ready, all)| (name.to_owned(), ready, all));
        assert_eq!(told(usize::MAX), all);
        assert_eq!(told(2), all[..2]);
    }
}
