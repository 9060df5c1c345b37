//! Networks by CNI plugins, as the operator configured them.

mod config;
mod plugin;

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{
    NetworkConfig, NetworkError, NetworkResult, SandboxNetwork,
    bridge::Shared,
    netns,
    records::{self, Kind, Record},
};
pub(crate) use config::NetworkList;
use config::{plan_capabilities, plan_input, read_folder, read_ips};
use plugin::Call;

/// What DEL needs: the network as it was at ADD, whatever the folder holds by then.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Attachment {
    network: NetworkList,
    capabilities: Map<String, Value>,
    args: String,
    /// ADD's last result; none while ADD has not ended.
    result: Option<Value>,
}

pub(crate) struct Cni {
    folder: PathBuf,
    path: Vec<PathBuf>,
    shared: Arc<Shared>,
    cache: Mutex<Option<Cached>>,
}

/// A folder's network, and by what it is seen that the folder changed.
struct Cached {
    stamp: Vec<(PathBuf, u64, i64, i64)>,
    network: Result<Option<NetworkList>, (PathBuf, String)>,
}

impl Cni {
    pub(crate) fn new(config: &NetworkConfig, shared: Arc<Shared>) -> Self {
        Self {
            folder: config.cni_conf_dir.clone(),
            path: config.cni_bin_dirs.clone(),
            shared,
            cache: Mutex::new(None),
        }
    }

    /// The configured network, read again when a file changed.
    ///
    /// # Errors
    /// [`NetworkError::CniConfig`].
    pub(crate) fn network(&self) -> Result<Option<NetworkList>, NetworkError> {
        let fail =
            |path: &PathBuf, reason: String| NetworkError::CniConfig { path: path.clone(), reason };
        let files =
            config::list(&self.folder).map_err(|error| fail(&self.folder, error.to_string()))?;
        let stamp: Vec<_> = files
            .into_iter()
            .filter_map(|path| {
                let meta = fs::metadata(&path).ok()?;
                Some((path, meta.ino(), meta.mtime(), meta.mtime_nsec()))
            })
            .collect();
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        if cache.as_ref().is_none_or(|cached| cached.stamp != stamp) {
            let network = read_folder(&self.folder).map_err(|error| match error {
                NetworkError::CniConfig { path, reason } => (path, reason),
                other => (self.folder.clone(), other.to_string()),
            });
            *cache = Some(Cached { stamp, network });
        }
        match cache.as_ref().map(|cached| &cached.network) {
            Some(Ok(network)) => Ok(network.clone()),
            Some(Err((path, reason))) => Err(fail(path, reason.clone())),
            None => Ok(None),
        }
    }

    pub(crate) async fn setup(
        &self,
        sandbox: &SandboxNetwork,
    ) -> Result<NetworkResult, NetworkError> {
        records::check_id(&sandbox.id)?;
        let existing = self.shared.known().get(&sandbox.id).cloned();
        if let Some(record) = existing {
            if record.ready && netns::exists(&sandbox.netns) {
                // Not for the sandbox to fail by: plugins' checks are known to find faults that
                // are none, and taking a running pod's network away would be one.
                if let Err(error) = self.check(&record).await {
                    tracing::warn!(sandbox = sandbox.id, %error, "CNI check of a running sandbox");
                }
                return Ok(NetworkResult { ips: record.ips });
            }
            self.teardown(&record).await?;
        }
        let network = self.network()?.ok_or_else(|| NetworkError::CniConfig {
            path: self.folder.clone(),
            reason: "there is no network configuration".to_owned(),
        })?;
        let attachment = Attachment {
            network,
            capabilities: plan_capabilities(sandbox),
            args: arguments(sandbox),
            result: None,
        };
        // Written before the first plugin runs, so that a crash in the middle is undone by DEL.
        let mut record = Record::new(sandbox, Vec::new(), Kind::Cni(Box::new(attachment.clone())));
        self.shared.put(record.clone())?;
        let result = match self.add(&record, &attachment).await {
            Ok(result) => result,
            Err(error) => {
                if let Err(second) = self.teardown(&record).await {
                    tracing::warn!(sandbox = sandbox.id, error = %second, "DEL after a failed ADD");
                }
                return Err(error);
            }
        };
        record.ips = read_ips(&result);
        if record.ips.is_empty() {
            let failure = NetworkError::CniPlugin {
                plugin: attachment.network.plugins.last().map(kind_of).unwrap_or_default(),
                network: attachment.network.name.clone(),
                command: "ADD",
                reason: "the result has no address for the pod".to_owned(),
            };
            self.teardown(&record).await?;
            return Err(failure);
        }
        record.ready = true;
        record.kind = Kind::Cni(Box::new(Attachment { result: Some(result), ..attachment }));
        let ips = record.ips.clone();
        self.shared.put(record)?;
        Ok(NetworkResult { ips })
    }

    /// DEL of all plugins, last first. The record stays until all have done it.
    pub(crate) async fn teardown(&self, record: &Record) -> Result<(), NetworkError> {
        let Kind::Cni(attachment) = &record.kind else {
            return Ok(());
        };
        let mut failures = Vec::new();
        for plugin in attachment.network.plugins.iter().rev() {
            let previous = attachment.result.as_ref().filter(|_| attachment.network.knows_check());
            let done = self.call("DEL", record, attachment, plugin, previous).await;
            failures.extend(done.err());
        }
        match failures.len() {
            0 => self.shared.forget(&record.id),
            1 => Err(failures.remove(0)),
            _ => Err(NetworkError::Several(failures)),
        }
    }

    async fn add(&self, record: &Record, attachment: &Attachment) -> Result<Value, NetworkError> {
        let mut previous: Option<Value> = None;
        for plugin in &attachment.network.plugins {
            let result = self.call("ADD", record, attachment, plugin, previous.as_ref()).await?;
            previous = Some(result);
        }
        Ok(previous.unwrap_or(Value::Null))
    }

    async fn check(&self, record: &Record) -> Result<(), NetworkError> {
        let Kind::Cni(attachment) = &record.kind else {
            return Ok(());
        };
        if attachment.network.disable_check || !attachment.network.knows_check() {
            return Ok(());
        }
        for plugin in &attachment.network.plugins {
            self.call("CHECK", record, attachment, plugin, attachment.result.as_ref()).await?;
        }
        Ok(())
    }

    async fn call(
        &self,
        command: &'static str,
        record: &Record,
        attachment: &Attachment,
        plugin: &Map<String, Value>,
        previous: Option<&Value>,
    ) -> Result<Value, NetworkError> {
        let network = &attachment.network;
        let input = plan_input(network, plugin, &attachment.capabilities, previous);
        let exists = netns::exists(&record.netns);
        let call = Call {
            command,
            container: &record.id,
            netns: if exists { record.netns.display().to_string() } else { String::new() },
            args: &attachment.args,
            path: &self.path,
        };
        let kind = kind_of(plugin);
        plugin::run(&kind, &call, &input).await.map_err(|reason| NetworkError::CniPlugin {
            plugin: kind,
            network: network.name.clone(),
            command,
            reason,
        })
    }
}

fn kind_of(plugin: &Map<String, Value>) -> String {
    plugin.get("type").and_then(Value::as_str).unwrap_or_default().to_owned()
}

/// What Kubernetes' runtimes tell plugins of the pod. Semicolons and equals signs separate, and
/// can't be in these names.
fn arguments(sandbox: &SandboxNetwork) -> String {
    format!(
        "IgnoreUnknown=1;K8S_POD_NAMESPACE={};K8S_POD_NAME={};K8S_POD_INFRA_CONTAINER_ID={};\
         K8S_POD_UID={}",
        sandbox.namespace, sandbox.name, sandbox.id, sandbox.uid
    )
}
