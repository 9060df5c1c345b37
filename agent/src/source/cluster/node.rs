//! The node's own object.

use std::sync::Arc;

use k8s_openapi::api::core::v1::Node;
use kube::Client;
use proxy::object::{Change, NodeState};
use tokio::sync::{mpsc, watch};

use super::Errors;
use crate::api::watch::{Seen, Watch};
use crate::cluster::store::Store;
use crate::source::proxy_object::node_state;

/// Runs for ever: the node's own object, also for the proxy.
pub async fn run_node(
    client: Client,
    node_name: String,
    node: watch::Sender<Option<Arc<Node>>>,
    proxy: Option<mpsc::Sender<Change>>,
    store: Store,
    errors: Errors,
) {
    let fields = format!("metadata.name={node_name}");
    let mut watch = Watch::<Node>::new(kube::Api::all(client), &fields);
    let mut told: Option<NodeState> = None;
    let mut listed = None;
    let mut known = false;
    loop {
        let seen = match watch.next().await {
            Seen::Restarted => {
                listed = None;
                continue;
            }
            Seen::Listed(object) => {
                listed = Some(object);
                continue;
            }
            Seen::Complete => listed.take(),
            Seen::Applied(object) => Some(object),
            Seen::Deleted(_) => None,
            Seen::Failed(failure) => {
                errors.set("node", failure.message);
                if known {
                    continue;
                }
                store
                    .load::<Node>()
                    .into_iter()
                    .flatten()
                    .find(|n| n.metadata.name.as_ref() == Some(&node_name))
            }
        };
        known = true;
        let seen = seen.map(|mut object| {
            object.metadata.managed_fields = None;
            Arc::new(object)
        });
        if let Some(object) = &seen {
            errors.clear("node");
            let mut stored = (**object).clone();
            // What changes with every heartbeat is not worth writing.
            if let Some(status) = &mut stored.status {
                status.conditions = None;
                status.images = None;
            }
            stored.metadata.resource_version = None;
            store.put(&node_name, &stored);
            let state = node_state(object);
            if let Some(proxy) = &proxy
                && told.as_ref() != Some(&state)
            {
                let _ = proxy.send(Change::Node(state.clone())).await;
                told = Some(state);
            }
        }
        node.send_replace(seen);
    }
}
