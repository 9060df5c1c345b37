//! The one check that `/healthz`, READY and the watchdog share.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Node;
use proxy::ProxyStatus;
use tokio::sync::watch;

use super::recent::RecentEvents;
use crate::config::{NodeConfig, Note};
use crate::node_api::LiveUsage;
use crate::pod::SyncHandle;
use crate::standalone::folder::Problem;
use crate::standalone::store::Store;

/// A loop that does not answer for so long is stuck.
const LIMIT: Duration = Duration::from_secs(5);
/// The proxy's loop turns at least once in its own period; this long without is stuck.
const PROXY_LIMIT: Duration = Duration::from_secs(120);

/// What is watched. What a process does not run is `None` and never fails.
pub struct Watched {
    /// The node's name.
    pub node_name: String,
    /// The node's addresses.
    pub node_ips: Vec<IpAddr>,
    /// No control plane.
    pub standalone: bool,
    /// When this process began.
    pub started: Timestamp,
    /// Where the runtime is.
    pub runtime_endpoint: String,
    /// The folder of manifests.
    pub manifest_path: Option<PathBuf>,
    /// The sync loop.
    pub sync: Option<SyncHandle>,
    /// The proxy.
    pub proxy: Option<watch::Receiver<ProxyStatus>>,
    /// Who answers questions about Services.
    pub asker: Option<proxy::question::Asker>,
    /// CPU and memory of the node and its pods.
    pub usage: Option<LiveUsage>,
    /// Events of late, in a cluster.
    pub recent: Option<Arc<RecentEvents>>,
    /// A standalone node's objects.
    pub store: Option<Arc<Store>>,
    /// The node's object in a cluster.
    pub node: Option<watch::Receiver<Option<Arc<Node>>>>,
    /// What the cluster's loops last failed at.
    pub errors: Option<watch::Receiver<BTreeMap<&'static str, String>>>,
    /// What is wrong in the folder of manifests.
    pub manifests: Option<watch::Receiver<Vec<Problem>>>,
    /// What the configuration asks for in vain.
    pub notes: Vec<Note>,
}

impl Watched {
    /// Nothing yet.
    pub fn new(config: &NodeConfig) -> Self {
        Self {
            manifest_path: config.pod_manifest_path.clone(),
            notes: config.notes.clone(),
            ..Self::of_nothing(&config.node_name, config.standalone)
        }
    }

    /// Of a node that runs nothing.
    pub(crate) fn of_nothing(node_name: &str, standalone: bool) -> Self {
        Self {
            node_name: node_name.to_owned(),
            node_ips: Vec::new(),
            standalone,
            started: Timestamp::now(),
            runtime_endpoint: String::new(),
            manifest_path: None,
            sync: None,
            proxy: None,
            asker: None,
            usage: None,
            recent: None,
            store: None,
            node: None,
            errors: None,
            manifests: None,
            notes: Vec::new(),
        }
    }

    /// Whether everything that runs here goes round, and the runtime answers.
    pub async fn check(&self) -> Result<(), Vec<String>> {
        let mut failures = Vec::new();
        failures.extend(self.stuck().await);
        if let Some(sync) = &self.sync
            && let Some(error) = sync.table().health().runtime_error
        {
            failures.push(format!("container runtime {}: {error}", self.runtime_endpoint));
        }
        if failures.is_empty() { Ok(()) } else { Err(failures) }
    }

    /// Loops that do not go round: only a restart helps.
    pub async fn stuck(&self) -> Vec<String> {
        let mut failures = Vec::new();
        if let Some(sync) = &self.sync
            && !sync.alive(LIMIT).await
        {
            failures.push(format!("the sync loop has not answered for {} s", LIMIT.as_secs()));
        }
        if let Some(proxy) = &self.proxy {
            let idle = proxy.borrow().last_turn.elapsed();
            if idle > PROXY_LIMIT {
                failures.push(format!("the proxy's loop stands still for {} s", idle.as_secs()));
            }
        }
        failures
    }
}
