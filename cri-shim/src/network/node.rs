//! The node's network: CNI where a configuration is there, else the built-in bridge.
//!
//! Which of them connected a sandbox is in its record, so that a configuration that comes or goes
//! while sandboxes run leaves none behind.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, PoisonError},
};

use async_trait::async_trait;

use super::{
    Cidr, Network, NetworkConfig, NetworkError, NetworkResult, SandboxNetwork,
    bridge::{Bridge, Shared},
    cni::Cni,
    records::{Kind, Records},
};

/// Opens the node's network in the calling thread's network namespace; called within a tokio
/// runtime.
///
/// # Errors
/// [`NetworkError::Io`] when its state can't be read.
pub fn open(config: NetworkConfig) -> Result<Arc<dyn Network>, NetworkError> {
    let (records, known) = Records::open(&config.state_dir)?;
    let shared = Arc::new(Shared { records, known: Mutex::new(known) });
    let bridge = Bridge::open(&config, Arc::clone(&shared))?;
    let cni = Cni::new(&config, Arc::clone(&shared));
    Ok(Arc::new(NodeNetwork { shared, bridge, cni, cidrs: Mutex::new(None) }))
}

struct NodeNetwork {
    shared: Arc<Shared>,
    bridge: Bridge,
    cni: Cni,
    /// Blocks that came since the last setup.
    cidrs: Mutex<Option<Vec<Cidr>>>,
}

impl NodeNetwork {
    async fn take_cidrs(&self) {
        let cidrs = self.cidrs.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(cidrs) = cidrs {
            self.bridge.set_pod_cidrs(cidrs).await;
        }
    }
}

#[async_trait]
impl Network for NodeNetwork {
    async fn setup(&self, sandbox: &SandboxNetwork) -> Result<NetworkResult, NetworkError> {
        self.take_cidrs().await;
        let by_cni = self.shared.known().get(&sandbox.id).map(|r| matches!(r.kind, Kind::Cni(_)));
        match by_cni {
            Some(false) => self.bridge.setup(sandbox).await,
            Some(true) => self.cni.setup(sandbox).await,
            None => match self.cni.network()? {
                Some(_) => self.cni.setup(sandbox).await,
                None => self.bridge.setup(sandbox).await,
            },
        }
    }

    async fn teardown(&self, id: &str) -> Result<(), NetworkError> {
        let record = self.shared.known().get(id).cloned();
        match record {
            None => Ok(()),
            Some(record) => match &record.kind {
                Kind::Bridge { .. } => self.bridge.teardown(&record).await,
                Kind::Cni(_) => self.cni.teardown(&record).await,
            },
        }
    }

    fn status(&self) -> Result<(), String> {
        match self.cni.network() {
            Ok(Some(_)) => Ok(()),
            Ok(None) => self.bridge.status(),
            Err(error) => Err(error.to_string()),
        }
    }

    fn set_pod_cidrs(&self, cidrs: Vec<Cidr>) {
        *self.cidrs.lock().unwrap_or_else(PoisonError::into_inner) = Some(cidrs);
    }

    async fn collect(&self, keep: &[String]) -> Result<(), NetworkError> {
        self.take_cidrs().await;
        let keep: BTreeSet<&str> = keep.iter().map(String::as_str).collect();
        let gone: Vec<String> =
            self.shared.known().keys().filter(|id| !keep.contains(id.as_str())).cloned().collect();
        let mut failures = Vec::new();
        for id in gone {
            tracing::info!(sandbox = id, "removing the network of a sandbox that is gone");
            failures.extend(self.teardown(&id).await.err());
        }
        failures.extend(self.bridge.collect().await.err());
        if failures.is_empty() { Ok(()) } else { Err(NetworkError::Several(failures)) }
    }
}
