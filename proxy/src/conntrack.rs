//! Datagram flows that a change has made stale: a client that keeps its port would go on talking to
//! an endpoint that is gone, as the kernel translates by the flow's first packet.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};

use nft::{Client, Family, Flow};

use crate::model::PlanChange;
use crate::object::Protocol;
use crate::plan::PortPlan;

/// Where flows may go now, for the addresses and ports that changed.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Stale {
    addresses: HashMap<SocketAddr, HashSet<SocketAddr>>,
    node_ports: HashMap<u16, HashSet<SocketAddr>>,
}

fn endpoints(port: Option<&PortPlan>) -> HashSet<SocketAddr> {
    port.map(|p| p.cluster.iter().chain(&p.local).copied().collect()).unwrap_or_default()
}

impl Stale {
    /// What changes make stale: UDP ports that lost an endpoint or got their first.
    pub fn of(changes: &[PlanChange]) -> Stale {
        let mut stale = Stale::default();
        for change in changes {
            let ports = |plan: &Option<std::sync::Arc<crate::plan::ServicePlan>>| -> Vec<PortPlan> {
                plan.as_ref()
                    .map(|plan| {
                        let udp = plan.ports.iter().filter(|p| p.protocol == Protocol::Udp);
                        udp.cloned().collect()
                    })
                    .unwrap_or_default()
            };
            let (old, new) = (ports(&change.old), ports(&change.new));
            let same = |a: &PortPlan, b: &PortPlan| {
                a.cluster_ip == b.cluster_ip && a.port == b.port && a.node_port == b.node_port
            };
            for port in &new {
                let before = endpoints(old.iter().find(|p| same(p, port)));
                let now = endpoints(Some(port));
                let lost = before.difference(&now).next().is_some();
                if lost || (before.is_empty() && !now.is_empty()) {
                    stale.add(port, &now);
                }
            }
            for port in old.iter().filter(|p| !new.iter().any(|n| same(p, n))) {
                if !endpoints(Some(port)).is_empty() {
                    stale.add(port, &HashSet::new());
                }
            }
        }
        stale
    }

    fn add(&mut self, port: &PortPlan, now: &HashSet<SocketAddr>) {
        let ips = std::iter::once(&port.cluster_ip).chain(&port.external_ips);
        for ip in ips {
            let allowed = self.addresses.entry(SocketAddr::new(*ip, port.port)).or_default();
            allowed.extend(now);
        }
        if port.node_port != 0 {
            self.node_ports.entry(port.node_port).or_default().extend(now);
        }
    }

    /// Whether nothing is.
    pub fn is_empty(&self) -> bool {
        self.addresses.is_empty() && self.node_ports.is_empty()
    }

    /// Whether a flow is stale.
    fn has(&self, destination: SocketAddr, answering: SocketAddr, node: &[IpAddr]) -> bool {
        let translated = destination != answering;
        match self.addresses.get(&destination) {
            Some(allowed) => !allowed.contains(&answering) && (translated || !allowed.is_empty()),
            None => self.node_ports.get(&destination.port()).is_some_and(|allowed| {
                !allowed.contains(&answering)
                    && (translated || (!allowed.is_empty() && node.contains(&destination.ip())))
            }),
        }
    }

    /// Deletes stale flows; tells how many of IPv4 and IPv6. Blocks.
    ///
    /// # Errors
    /// If connection tracking cannot be read, or a flow not be deleted.
    pub fn delete(&self, node: &[IpAddr]) -> Result<[usize; 2], nft::Error> {
        let mut client = Client::new()?;
        let mut deleted = [0; 2];
        for family in [Family::Ip, Family::Ip6] {
            let ipv4 = family == Family::Ip;
            let concerned = !self.node_ports.is_empty()
                || self.addresses.keys().any(|address| address.is_ipv4() == ipv4);
            if !concerned {
                continue;
            }
            let flows = client.flows(family, 17)?;
            let is_stale = |flow: &&Flow| self.has(flow.destination, flow.answering, node);
            for flow in flows.iter().filter(is_stale) {
                client.delete_flow(flow)?;
                deleted[usize::from(!ipv4)] += 1;
            }
        }
        Ok(deleted)
    }
}
