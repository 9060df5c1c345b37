//! Names: the maps, and the chains that stand for behaviours.

use std::fmt;

use nft::{DataType, Family, Set};

/// Name of the table in each family.
pub const TABLE: &str = "longshore-proxy";

/// Name of the table of upstream's proxy.
pub const UPSTREAM_TABLE: &str = "kube-proxy";

/// Which key a lookup uses: a virtual address with its port, or a port of the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Origin {
    /// Cluster, external and load-balancer IPs.
    Vip,
    /// NodePorts.
    NodePort,
}

/// Which endpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Policy {
    /// Of the cluster.
    Cluster,
    /// Of this node.
    Local,
}

impl Policy {
    /// Both.
    pub const ALL: [Policy; 2] = [Policy::Cluster, Policy::Local];
}

/// A set of data maps: endpoints by origin and policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Pool {
    /// Key.
    pub origin: Origin,
    /// Endpoints.
    pub policy: Policy,
}

impl Pool {
    /// All four.
    pub const ALL: [Pool; 4] = [
        Pool { origin: Origin::Vip, policy: Policy::Cluster },
        Pool { origin: Origin::Vip, policy: Policy::Local },
        Pool { origin: Origin::NodePort, policy: Policy::Cluster },
        Pool { origin: Origin::NodePort, policy: Policy::Local },
    ];

    /// The pool that names what is kept by affinity: it is the same for every address.
    pub fn kept(policy: Policy) -> Pool {
        Pool { origin: Origin::Vip, policy }
    }

    fn prefix(self) -> &'static str {
        match (self.origin, self.policy) {
            (Origin::Vip, Policy::Cluster) => "",
            (Origin::Vip, Policy::Local) => "local-",
            (Origin::NodePort, Policy::Cluster) => "node-port-",
            (Origin::NodePort, Policy::Local) => "node-port-local-",
        }
    }
}

/// A map or set whose elements come from Services.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum MapId {
    /// Endpoints by key and index.
    Endpoints(Pool),
    /// With affinity: endpoints by the port's number and slot, whatever address the client used.
    Kept(Policy),
    /// With affinity: the number of the kind that an index of a port means, which is a slot's.
    Picks(Pool),
    /// With affinity: the port's number.
    Ids(Origin),
    /// Chain by number of a [`Kind`](super::kinds::Kind) that is a slot. Chains that other kinds lead
    /// to look into it, so that it cannot be the same map as theirs.
    SlotKinds,
    /// Chain by number of a [`Kind`](super::kinds::Kind) that picks an endpoint.
    Kinds,
    /// Reject or drop by number. It is a map of its own, as the kernel holds all chains of a map to what
    /// the hooks allow from which any rule looks into it: no translation where packets are filtered.
    Refusals,
    /// Cluster IPs that are in use.
    ClusterIps,
    /// Local endpoints, as source and destination: a pod that talks to itself.
    Hairpin,
    /// Who may talk to a firewalled address.
    FirewallSources,
    /// Load-balancer addresses with source ranges.
    Firewalled,
    /// Number of the kind that packets meet.
    Numbers(Dispatch),
    /// What the version before had for [`MapId::Picks`]: slot chains, of which each port had its own.
    /// They are only ever taken over from.
    PicksBefore(Policy),
}

/// What is looked up to tell what packets meet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Dispatch {
    /// Addresses, with protocol and port.
    Services,
    /// Traffic of this node and its pods, where policy Local makes it differ.
    Inside(Origin),
    /// Ports of the node, with protocol.
    NodePorts,
    /// What has no endpoints: it is rejected or dropped.
    NoEndpoints(Origin),
}

impl Dispatch {
    /// All six.
    pub const ALL: [Dispatch; 6] = [
        Dispatch::Services,
        Dispatch::Inside(Origin::Vip),
        Dispatch::Inside(Origin::NodePort),
        Dispatch::NodePorts,
        Dispatch::NoEndpoints(Origin::Vip),
        Dispatch::NoEndpoints(Origin::NodePort),
    ];

    /// Name of its map of numbers.
    fn name(self) -> &'static str {
        match self {
            Dispatch::Services => "service-kinds",
            Dispatch::Inside(Origin::Vip) => "inside-service-kinds",
            Dispatch::Inside(Origin::NodePort) => "inside-node-port-kinds",
            Dispatch::NodePorts => "node-port-kinds",
            Dispatch::NoEndpoints(Origin::Vip) => "no-endpoint-kinds",
            Dispatch::NoEndpoints(Origin::NodePort) => "no-endpoint-node-port-kinds",
        }
    }

    /// The map by which its numbers lead on.
    pub fn leads_by(self) -> MapId {
        match self {
            Dispatch::NoEndpoints(_) => MapId::Refusals,
            Dispatch::Services | Dispatch::Inside(_) | Dispatch::NodePorts => MapId::Kinds,
        }
    }

    /// Its key.
    pub fn origin(self) -> Origin {
        match self {
            Dispatch::Services => Origin::Vip,
            Dispatch::NodePorts => Origin::NodePort,
            Dispatch::Inside(origin) | Dispatch::NoEndpoints(origin) => origin,
        }
    }
}

impl fmt::Display for MapId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            MapId::Endpoints(pool) => write!(f, "{}endpoints", pool.prefix()),
            MapId::Kept(policy) => write!(f, "{}kept", Pool::kept(*policy).prefix()),
            MapId::Picks(pool) => write!(f, "{}pick-slots", pool.prefix()),
            MapId::PicksBefore(policy) => write!(f, "{}picks", Pool::kept(*policy).prefix()),
            MapId::Ids(Origin::Vip) => f.write_str("sticky-ids"),
            MapId::Ids(Origin::NodePort) => f.write_str("node-port-sticky-ids"),
            MapId::SlotKinds => f.write_str("slot-kinds"),
            MapId::Kinds => f.write_str("kinds"),
            MapId::Refusals => f.write_str("refusals"),
            MapId::ClusterIps => f.write_str("cluster-ips"),
            MapId::Hairpin => f.write_str("hairpin"),
            MapId::FirewallSources => f.write_str("firewall-sources"),
            MapId::Firewalled => f.write_str("firewalled"),
            MapId::Numbers(dispatch) => f.write_str(dispatch.name()),
        }
    }
}

impl MapId {
    /// The maps that tell which slot each endpoint has.
    pub fn with_slots() -> Vec<MapId> {
        let kept = Policy::ALL.map(MapId::Kept);
        Pool::ALL.map(MapId::Endpoints).into_iter().chain(kept).collect()
    }

    /// The maps of the version before that this one has not.
    pub fn before() -> [MapId; 2] {
        Policy::ALL.map(MapId::PicksBefore)
    }

    /// Every map that this version makes.
    pub fn all() -> Vec<MapId> {
        let mut all = Vec::new();
        all.extend(Pool::ALL.map(MapId::Endpoints));
        all.extend(Policy::ALL.map(MapId::Kept));
        all.extend(Pool::ALL.map(MapId::Picks));
        all.extend([
            MapId::Ids(Origin::Vip),
            MapId::Ids(Origin::NodePort),
            MapId::SlotKinds,
            MapId::Kinds,
            MapId::Refusals,
            MapId::ClusterIps,
            MapId::Hairpin,
            MapId::FirewallSources,
            MapId::Firewalled,
        ]);
        all.extend(Dispatch::ALL.map(MapId::Numbers));
        all
    }

    /// The map's shape.
    pub fn set(self, family: Family) -> Set {
        let name = self.to_string();
        let address = address_type(family);
        let vip = key_types(Origin::Vip, family);
        match self {
            MapId::Endpoints(pool) => Set::map(
                name,
                &[key_types(pool.origin, family), vec![DataType::Mark]].concat(),
                &[address, DataType::InetService],
            ),
            MapId::Kept(_) => {
                Set::map(name, &[DataType::Mark, DataType::Mark], &[address, DataType::InetService])
            }
            MapId::Picks(_) => {
                let pair = [DataType::Mark, DataType::Mark];
                Set::map(name, &pair, &pair)
            }
            MapId::PicksBefore(_) => Set::verdict_map(name, &[DataType::Mark, DataType::Mark]),
            MapId::Ids(origin) => {
                Set::map(name, &key_types(origin, family), &[DataType::Mark, DataType::Mark])
            }
            MapId::ClusterIps => Set::plain(name, &[address]),
            MapId::Hairpin => Set::plain(name, &[vec![address], vip].concat()),
            MapId::FirewallSources => {
                Set { interval: true, ..Set::plain(name, &[vip, vec![address]].concat()) }
            }
            MapId::Firewalled => Set::plain(name, &vip),
            MapId::Kinds | MapId::SlotKinds | MapId::Refusals => {
                Set::verdict_map(name, &[DataType::Mark])
            }
            MapId::Numbers(dispatch) => {
                let key = key_types(dispatch.origin(), family);
                Set::map(name, &key, &[DataType::Mark, DataType::Mark])
            }
        }
    }
}

/// Type of an address.
pub fn address_type(family: Family) -> DataType {
    if family == Family::Ip { DataType::Ipv4Addr } else { DataType::Ipv6Addr }
}

/// Types of a key.
pub fn key_types(origin: Origin, family: Family) -> Vec<DataType> {
    match origin {
        Origin::Vip => {
            vec![address_type(family), DataType::InetProto, DataType::InetService]
        }
        Origin::NodePort => vec![DataType::InetProto, DataType::InetService],
    }
}

/// Who is with which slot, by client and number of the port: one set for each slot, filled by the
/// packets. What a client was given at one address of a port counts at all of them.
pub fn affinity_set(slot: u32, family: Family) -> Set {
    Set {
        dynamic: true,
        timeout: true,
        // A bound, so that forged sources cannot fill the kernel's memory.
        size: Some(262_144),
        ..Set::plain(affinity_name(slot), &[address_type(family), DataType::Mark])
    }
}

/// Name of that set.
pub fn affinity_name(slot: u32) -> String {
    format!("affinity-{slot}")
}

/// Whether a set of that name is one of them.
pub fn is_affinity(name: &str) -> bool {
    name.strip_prefix("affinity-").is_some_and(|slot| slot.parse::<u32>().is_ok())
}

/// The number of the port with affinity that a chain of the version before is for, if it is for one.
pub fn id_of(chain: &str) -> Option<u32> {
    u32::from_str_radix(chain.rsplit_once("-for-")?.1, 16).ok()
}

/// How a behaviour treats the source address before it picks an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Masquerade {
    /// Keeps it.
    Never,
    /// Marks it for masquerading.
    Always,
    /// Marks it if it is this node's own.
    IfNode,
}

/// How an endpoint is picked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Choice {
    /// At random, one of `count`.
    Random {
        /// Number of endpoints.
        count: u32,
    },
    /// The one that the client had before, else one of `count` at random.
    Sticky {
        /// Seconds after its last connection that a client is forgotten.
        timeout: u32,
        /// Number of endpoints.
        count: u32,
        /// Slots to look into: a power of two above the highest in use, so that there are few such
        /// chains however often endpoints come and go.
        slots: u32,
    },
}

/// A chain that stands for a behaviour.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Behaviour {
    /// With affinity: translates to the endpoint in a slot and remembers the client, or forgets it if
    /// the slot is empty.
    Slot {
        /// Maps, and the key by which the port's number is found.
        pool: Pool,
        /// Seconds.
        timeout: u32,
        /// Slot.
        slot: u32,
    },
    /// With affinity: finds the slot that the client has.
    Recall {
        /// Maps, and the key by which the port's number is found.
        pool: Pool,
        /// Seconds.
        timeout: u32,
        /// Slots to look into.
        slots: u32,
    },
    /// Picks an endpoint.
    Pick {
        /// Maps.
        pool: Pool,
        /// How.
        choice: Choice,
        /// What comes before.
        masquerade: Masquerade,
    },
}

impl fmt::Display for Behaviour {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Behaviour::Slot { pool, timeout, slot } => {
                write!(f, "{}slot-{timeout}s-{slot}", pool.prefix())
            }
            Behaviour::Recall { pool, timeout, slots } => {
                write!(f, "{}recall-{timeout}s-of-{slots}", pool.prefix())
            }
            Behaviour::Pick { pool, choice, masquerade } => {
                f.write_str(match masquerade {
                    Masquerade::Never => "",
                    Masquerade::Always => "masquerade-",
                    Masquerade::IfNode => "inside-",
                })?;
                f.write_str(pool.prefix())?;
                match choice {
                    Choice::Random { count } => write!(f, "pick-{count}"),
                    Choice::Sticky { timeout, count, slots } => {
                        write!(f, "sticky-{timeout}s-{count}-of-{slots}")
                    }
                }
            }
        }
    }
}
