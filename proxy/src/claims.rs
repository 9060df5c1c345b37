//! Who may use which address and port: two Services cannot share one. The first to claim it keeps
//! it; the other is told, and gets it when the first lets go.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;

use crate::object::{NamespacedName, Protocol};

/// Something that one Service at most can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Claim {
    /// A cluster IP, all ports of it.
    ClusterIp(IpAddr),
    /// A port at an address.
    Address(IpAddr, Protocol, u16),
    /// A port at the node's addresses.
    NodePort(Protocol, u16),
}

impl std::fmt::Display for Claim {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Claim::ClusterIp(ip) => write!(f, "cluster IP {ip}"),
            Claim::Address(ip, protocol, port) => write!(f, "address {ip} {protocol} port {port}"),
            Claim::NodePort(protocol, port) => write!(f, "NodePort {port} ({protocol})"),
        }
    }
}

/// All claims.
#[derive(Clone, Debug, Default)]
pub struct Claims {
    owners: HashMap<Claim, NamespacedName>,
    waiting: HashMap<Claim, BTreeSet<NamespacedName>>,
}

impl Claims {
    /// Replaces the claims of a Service, `had` by `wanted`. Tells which were refused, with their owners, and which
    /// Services may now get what they had been refused.
    pub fn replace(
        &mut self,
        service: &NamespacedName,
        had: Vec<Claim>,
        mut wanted: Vec<Claim>,
    ) -> (Vec<(Claim, NamespacedName)>, BTreeSet<NamespacedName>) {
        wanted.sort_unstable();
        wanted.dedup();
        let mut woken = BTreeSet::new();
        for claim in had {
            if wanted.binary_search(&claim).is_ok() {
                continue;
            }
            if self.owners.get(&claim) == Some(service) {
                self.owners.remove(&claim);
                woken.extend(self.waiting.remove(&claim).unwrap_or_default());
            } else if let Some(waiting) = self.waiting.get_mut(&claim) {
                waiting.remove(service);
                if waiting.is_empty() {
                    self.waiting.remove(&claim);
                }
            }
        }
        let mut refused = Vec::new();
        for claim in &wanted {
            let owner = self.owners.entry(*claim).or_insert_with(|| service.clone());
            if owner != service {
                refused.push((*claim, owner.clone()));
                self.waiting.entry(*claim).or_default().insert(service.clone());
            }
        }
        woken.remove(service);
        (refused, woken)
    }
}
