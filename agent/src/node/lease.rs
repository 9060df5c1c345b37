//! The node's Lease: the sign of life that the control plane watches.
//!
//! It is renewed on connections of its own and waits for nothing else on the node.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta, OwnerReference};
use kube::api::PostParams;
use kube::{Api, Client};
use tokio::sync::watch;

use crate::api::backoff::Backoff;
use crate::api::{self, ApiError, HEARTBEAT_TIMEOUT};
use crate::source::cluster::Errors;

/// Namespace of node Leases.
const NAMESPACE: &str = "kube-node-lease";

/// Renews the Lease of `node_name` for ever, four times in its duration.
pub async fn run(
    client: Client,
    node_name: String,
    duration_seconds: u32,
    node: watch::Receiver<Option<Arc<Node>>>,
    errors: Errors,
) {
    let leases: Api<Lease> = Api::namespaced(client, NAMESPACE);
    let interval = Duration::from_secs(u64::from(duration_seconds.max(4))) / 4;
    let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(7));
    let mut held: Option<Lease> = None;
    loop {
        let owner = node.borrow().as_ref().and_then(|node| owner(node));
        match renew(&leases, &node_name, duration_seconds, held.take(), owner).await {
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
) -> Result<Lease, ApiError> {
    let params = PostParams::default();
    let held = match held {
        Some(lease) => Some(lease),
        None => api::timed("get the node's Lease", HEARTBEAT_TIMEOUT, leases.get_opt(name)).await?,
    };
    match held {
        None => {
            let lease = next_lease(None, name, duration_seconds, owner, jiff::Timestamp::now());
            let create = leases.create(&params, &lease);
            api::timed("create the node's Lease", HEARTBEAT_TIMEOUT, create).await
        }
        Some(held) => {
            let lease =
                next_lease(Some(held), name, duration_seconds, owner, jiff::Timestamp::now());
            let replace = leases.replace(name, &params, &lease);
            api::timed("renew the node's Lease", HEARTBEAT_TIMEOUT, replace).await
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
