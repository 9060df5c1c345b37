//! Keeps all pods together within what the node has for them, and what is reserved within its own
//! cgroups (`enforceNodeAllocatable`).
//!
//! A limit below what is in use is refused by the kernel; evictions make room, so it is tried again.

use std::sync::Arc;
use std::time::Duration;

use super::cgroup::Group;
use super::deps::Deps;
use crate::report::{EventType, node_reference};

/// How long to wait before a limit that was refused is tried again, as kubelet does.
const AGAIN: Duration = Duration::from_secs(60);

/// Sets all limits; ends once they are set.
pub(super) async fn enforce(deps: Arc<Deps>) {
    let node = node_reference(&deps.node.node_name);
    let mut left = deps.node.node_limits.clone();
    loop {
        let mut refused = Vec::new();
        for (group, limits) in left {
            let (event, reason, message) = match deps.cgroups.bound(&group, limits).await {
                Ok(()) => {
                    let message = match &group {
                        Group::Pods => "Updated Node Allocatable limit across pods".to_owned(),
                        Group::Reserved { whose, cgroup } => {
                            format!("Updated limits on {whose} reserved cgroup {cgroup}")
                        }
                    };
                    (EventType::Normal, "NodeAllocatableEnforced", message)
                }
                Err(error) => {
                    tracing::error!(%error, "cannot bound what the node's groups use; trying again");
                    refused.push((group, limits));
                    (EventType::Warning, "FailedNodeAllocatableEnforcement", error.to_string())
                }
            };
            deps.events.record(node.clone(), event, reason, message);
        }
        if refused.is_empty() {
            return;
        }
        left = refused;
        tokio::time::sleep(AGAIN).await;
    }
}
