//! The node's Lease: the sign of life that the control plane watches.
//!
//! It is renewed on connections of its own and waits for nothing else on the node. Two agents under
//! one name renew the same Lease: each finds renewals that are not its own, and says so.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::api::core::v1::{Node, ObjectReference};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta, OwnerReference};
use kube::api::PostParams;
use kube::{Api, Client};
use tokio::sync::watch;

use crate::api::backoff::Backoff;
use crate::api::{self, ApiError, HEARTBEAT_TIMEOUT};
use crate::report::{EventSink, EventType};
use crate::source::cluster::Errors;

/// Namespace of node Leases.
const NAMESPACE: &str = "kube-node-lease";

/// Name of the error that two agents have one name.
const RIVAL: &str = "node name";

/// Renews the Lease of `node_name` for ever, four times in its duration.
pub async fn run(
    client: Client,
    node_name: String,
    duration_seconds: u32,
    node: watch::Receiver<Option<Arc<Node>>>,
    errors: Errors,
    events: Arc<dyn EventSink>,
) {
    let leases: Api<Lease> = Api::namespaced(client, NAMESPACE);
    let interval = Duration::from_secs(u64::from(duration_seconds.max(4))) / 4;
    let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(7));
    let mut held: Option<Lease> = None;
    let mut rivals = Rivals::new(duration_seconds);
    loop {
        let owner = node.borrow().as_ref().and_then(|node| owner(node));
        let renewed =
            renew(&leases, &node_name, duration_seconds, held.take(), owner, &mut rivals).await;
        tell_of_rivals(&mut rivals, &node_name, &node, &errors, &*events);
        match renewed {
            Ok(lease) => {
                held = Some(lease);
                errors.clear("lease");
                backoff.reset();
                tokio::time::sleep(interval.mul_f64(1.0 - 0.04 * fastrand::f64())).await;
            }
            Err(error) => {
                // `held` is forgotten: the Lease is read anew.
                errors.set("lease", error.to_string());
                tokio::time::sleep(backoff.next_delay().min(interval)).await;
            }
        }
    }
}

fn owner(node: &Node) -> Option<OwnerReference> {
    Some(OwnerReference {
        api_version: "v1".to_owned(),
        kind: "Node".to_owned(),
        name: node.metadata.name.clone()?,
        uid: node.metadata.uid.clone()?,
        controller: None,
        block_owner_deletion: None,
    })
}

async fn renew(
    leases: &Api<Lease>,
    name: &str,
    duration_seconds: u32,
    held: Option<Lease>,
    owner: Option<OwnerReference>,
    rivals: &mut Rivals,
) -> Result<Lease, ApiError> {
    let params = PostParams::default();
    let held = match held {
        Some(lease) => Some(lease),
        None => {
            let get = leases.get_opt(name);
            let found = api::timed("get the node's Lease", HEARTBEAT_TIMEOUT, get).await?;
            rivals.found(renewed_at(found.as_ref()), jiff::Timestamp::now());
            found
        }
    };
    let now = rivals.writing(jiff::Timestamp::now());
    match held {
        None => {
            let lease = next_lease(None, name, duration_seconds, owner, now);
            let create = leases.create(&params, &lease);
            api::timed("create the node's Lease", HEARTBEAT_TIMEOUT, create).await
        }
        Some(held) => {
            let lease = next_lease(Some(held), name, duration_seconds, owner, now);
            let replace = leases.replace(name, &params, &lease);
            api::timed("renew the node's Lease", HEARTBEAT_TIMEOUT, replace).await
        }
    }
}

fn renewed_at(lease: Option<&Lease>) -> Option<jiff::Timestamp> {
    Some(lease?.spec.as_ref()?.renew_time.as_ref()?.0)
}

fn tell_of_rivals(
    rivals: &mut Rivals,
    name: &str,
    node: &watch::Receiver<Option<Arc<Node>>>,
    errors: &Errors,
    events: &dyn EventSink,
) {
    match rivals.verdict(jiff::Timestamp::now()) {
        Verdict::Alone => errors.clear(RIVAL),
        Verdict::Same => {}
        Verdict::Rival => {
            let node = node.borrow().clone();
            let addresses = node.and_then(|n| n.status.clone()?.addresses).unwrap_or_default();
            let addresses: Vec<String> = addresses.into_iter().map(|a| a.address).collect();
            let message = format!(
                "another agent renews the Lease of node {name}: two machines (or a kubelet on this \
                 one) run under one name and fight over its pods and its status; stop one of them, \
                 or join it under another --node-name; the node is now told to be at {}",
                addresses.join(", ")
            );
            let regarding = ObjectReference {
                kind: Some("Node".to_owned()),
                name: Some(name.to_owned()),
                uid: Some(name.to_owned()),
                ..ObjectReference::default()
            };
            events.record(regarding, EventType::Warning, "NodeNameConflict", message.clone());
            errors.set(RIVAL, message);
        }
    }
}

/// What the renewals found say of other agents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// There is none (any more).
    Alone,
    /// As before.
    Same,
    /// There is one, newly.
    Rival,
}

/// Renewals of the Lease that are not this agent's. One may be its own, from a time before (the
/// answer was lost); several since it writes are another's.
#[derive(Debug)]
struct Rivals {
    /// How long a sighting counts.
    memory: jiff::SignedDuration,
    /// Times that this agent wrote, the last of them.
    wrote: [Option<jiff::Timestamp>; 2],
    /// When a foreign renewal was found, the last two.
    seen: [Option<jiff::Timestamp>; 2],
    told: bool,
}

impl Rivals {
    fn new(duration_seconds: u32) -> Self {
        Self {
            memory: jiff::SignedDuration::from_secs(i64::from(duration_seconds) * 4),
            wrote: [None; 2],
            seen: [None; 2],
            told: false,
        }
    }

    /// Notes that this agent writes at `now`; returns the time as the API keeps it (microseconds).
    fn writing(&mut self, now: jiff::Timestamp) -> jiff::Timestamp {
        let now = jiff::Timestamp::from_microsecond(now.as_microsecond()).unwrap_or(now);
        self.wrote = [self.wrote[1], Some(now)];
        now
    }

    /// Notes that the Lease was found renewed at `renewed`.
    fn found(&mut self, renewed: Option<jiff::Timestamp>, now: jiff::Timestamp) {
        let foreign = renewed.is_some() && !self.wrote.contains(&renewed);
        if self.wrote[1].is_some() && foreign {
            self.seen = [self.seen[1], Some(now)];
        }
    }

    fn verdict(&mut self, now: jiff::Timestamp) -> Verdict {
        let recent =
            |at: Option<jiff::Timestamp>| at.is_some_and(|at| now.duration_since(at) < self.memory);
        let rival = self.seen.into_iter().all(recent);
        match (self.told, rival) {
            (false, true) => {
                self.told = true;
                Verdict::Rival
            }
            (true, false) if !recent(self.seen[1]) => {
                self.told = false;
                Verdict::Alone
            }
            _ => Verdict::Same,
        }
    }
}

/// The Lease to write: `held` renewed at `now`, owned by the node as soon as its UID is known.
fn next_lease(
    held: Option<Lease>,
    name: &str,
    duration_seconds: u32,
    owner: Option<OwnerReference>,
    now: jiff::Timestamp,
) -> Lease {
    let mut lease = held.unwrap_or_else(|| Lease {
        metadata: ObjectMeta {
            name: Some(name.to_owned()),
            namespace: Some(NAMESPACE.to_owned()),
            ..ObjectMeta::default()
        },
        ..Lease::default()
    });
    lease.metadata.managed_fields = None;
    if let Some(owner) = owner {
        lease.metadata.owner_references = Some(vec![owner]);
    }
    let spec = lease.spec.get_or_insert_with(LeaseSpec::default);
    spec.holder_identity = Some(name.to_owned());
    spec.lease_duration_seconds = i32::try_from(duration_seconds).ok();
    spec.renew_time = Some(MicroTime(now));
    lease
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn renewals_by_another_are_noticed_and_own_ones_are_not() {
        let at = |s| jiff::Timestamp::from_second(s).unwrap();
        let mut rivals = Rivals::new(40);
        // An earlier run's renewal, found at the start.
        rivals.found(Some(at(90)), at(100));
        let first = rivals.writing(at(100));
        assert_eq!(rivals.verdict(at(100)), Verdict::Same);
        // Our own, whose answer was lost.
        rivals.found(Some(first), at(110));
        rivals.writing(at(110));
        rivals.found(Some(at(109)), at(120));
        assert_eq!(rivals.verdict(at(120)), Verdict::Same, "one alone says nothing");
        rivals.writing(at(120));
        rivals.found(Some(at(119)), at(130));
        assert_eq!(rivals.verdict(at(130)), Verdict::Rival);
        assert_eq!(rivals.verdict(at(140)), Verdict::Same);
        assert_eq!(rivals.verdict(at(289)), Verdict::Same);
        assert_eq!(rivals.verdict(at(290)), Verdict::Alone);
        assert_eq!(rivals.verdict(at(300)), Verdict::Same);
    }

    #[test]
    fn a_renewed_lease_keeps_its_version_and_gets_its_owner() {
        let at = |s| jiff::Timestamp::from_second(s).unwrap();
        let mut first = next_lease(None, "n", 40, None, at(1));
        assert_eq!(first.metadata.owner_references, None);
        first.metadata.resource_version = Some("7".to_owned());
        let node = Node {
            metadata: ObjectMeta {
                name: Some("n".to_owned()),
                uid: Some("u".to_owned()),
                ..ObjectMeta::default()
            },
            ..Node::default()
        };
        let second = next_lease(Some(first), "n", 40, owner(&node), at(2));
        assert_eq!(second.metadata.resource_version.as_deref(), Some("7"));
        assert_eq!(second.metadata.owner_references.unwrap()[0].uid, "u");
        let spec = second.spec.unwrap();
        assert_eq!(spec.renew_time, Some(MicroTime(at(2))));
        assert_eq!(spec.lease_duration_seconds, Some(40));
    }
}
