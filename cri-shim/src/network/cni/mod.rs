//! Networks by CNI plugins, as the operator configured them.
//!
//! What was done for a sandbox is in its record before the first plugin runs, so that whatever cuts
//! it off is undone by DEL. No lock is held while a plugin runs, but for one that keeps ADD and GC
//! apart.

mod cache;
mod capabilities;
mod config;
mod folder;
mod plugin;
mod processes;
mod result;
mod version;

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::MetadataExt,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::{
    NetworkConfig, NetworkError, NetworkResult, SandboxNetwork,
    bridge::Shared,
    netns,
    records::{self, Kind, Record},
};
use cache::{Cache, Entry};
use capabilities::{plan_arguments, plan_capabilities};
pub(crate) use config::NetworkList;
use config::{kind, plan_gc_input, plan_input, plan_status_input};
use folder::Folder;
use plugin::{Call, Failed};
pub(crate) use result::{INTERFACE, show_interface};
use result::{Outcome, with_version};
use version::{Version, plan_version};

/// How long a good STATUS counts: the kubelet asks every few seconds, and a plugin is a process.
const STATUS_COUNTS: Duration = Duration::from_secs(20);
/// How long plugins may take over STATUS and VERSION, which nobody waits for gladly.
const PROMPT: Duration = Duration::from_secs(10);

/// What DEL needs: the network as it was at ADD, whatever the folder holds by then.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Attachment {
    network: NetworkList,
    capabilities: Map<String, Value>,
    /// `CNI_ARGS`
    args: String,
    /// ADD's last result; none while ADD has not ended.
    result: Option<Value>,
    /// How many plugins were begun by an ADD that failed; none when that is not known, or all were.
    #[serde(default)]
    begun: Option<usize>,
}

pub(crate) struct Cni {
    folder: Folder,
    path: Vec<PathBuf>,
    timeout: Duration,
    cache: Cache,
    shared: Arc<Shared>,
    chosen: tokio::sync::Mutex<Option<Chosen>>,
    status: tokio::sync::Mutex<Option<(Instant, NetworkList)>>,
    /// Read by ADD, written by GC: a plugin that collects would take away what one adds, when the
    /// list of what is wanted was made before.
    collecting: tokio::sync::RwLock<()>,
    /// What was said of a GC that failed, to say it once.
    gc_failure: Mutex<Option<String>>,
}

/// A network with a version that its plugins know, and what that was decided by.
struct Chosen {
    generation: u64,
    plugins: Vec<Option<(u64, i64, i64)>>,
    network: NetworkList,
}

impl Cni {
    pub(crate) fn new(config: &NetworkConfig, shared: Arc<Shared>) -> Self {
        Self {
            folder: Folder::new(config.cni_conf_dir.clone()),
            path: config.cni_bin_dirs.clone(),
            timeout: config.cni_timeout,
            cache: Cache::new(&config.cni_cache_dir),
            shared,
            chosen: tokio::sync::Mutex::default(),
            status: tokio::sync::Mutex::default(),
            collecting: tokio::sync::RwLock::default(),
            gc_failure: Mutex::default(),
        }
    }

    /// Whether there is a usable configuration.
    ///
    /// # Errors
    /// [`NetworkError::CniConfig`] when there is one, but not usable.
    pub(crate) fn is_configured(&self) -> Result<bool, NetworkError> {
        Ok(self.folder.network()?.is_some())
    }

    /// The configured network. Where its configuration leaves the version open, the newest that all
    /// its plugins know is taken.
    async fn network(&self) -> Result<Option<NetworkList>, NetworkError> {
        let Some(network) = self.folder.network()? else {
            return Ok(None);
        };
        if network.choices.len() < 2 {
            return Ok(Some((*network).clone()));
        }
        let generation = self.folder.load().generation;
        let mut chosen = self.chosen.lock().await;
        let plugins: Vec<_> = network.plugins.iter().map(|p| self.stamp(kind(p))).collect();
        if let Some(known) = chosen.as_ref()
            && known.generation == generation
            && known.plugins == plugins
        {
            return Ok(Some(known.network.clone()));
        }
        let ask = network.plugins.iter().map(|p| plugin::versions(kind(p), &self.path, PROMPT));
        let told: Vec<_> = futures::future::join_all(ask)
            .await
            .into_iter()
            .map(|versions| versions.unwrap_or_default())
            .collect();
        let choices: Vec<Version> =
            network.choices.iter().filter_map(|text| text.parse().ok()).collect();
        let mut network = (*network).clone();
        network.cni_version = plan_version(&choices, &told).to_string();
        tracing::info!(network = network.name, version = network.cni_version, "CNI version chosen");
        *chosen = Some(Chosen { generation, plugins, network: network.clone() });
        Ok(Some(network))
    }

    fn stamp(&self, kind: &str) -> Option<(u64, i64, i64)> {
        let meta = fs::metadata(plugin::find(kind, &self.path)?).ok()?;
        Some((meta.ino(), meta.mtime(), meta.mtime_nsec()))
    }

    pub(crate) async fn setup(
        &self,
        sandbox: &SandboxNetwork,
    ) -> Result<NetworkResult, NetworkError> {
        records::check_id(&sandbox.id)?;
        let existing = self.shared.known().get(&sandbox.id).cloned();
        if let Some(record) = existing {
            if record.ready
                && netns::exists(&sandbox.netns)
                && let Kind::Cni(attachment) = &record.kind
            {
                // Not for the sandbox to fail by: plugins' checks are known to find faults that
                // are none, and taking a running pod's network away would be one.
                if let Err(error) = self.check(&record).await {
                    tracing::warn!(sandbox = sandbox.id, %error, "CNI check of a running sandbox");
                }
                let result = attachment.result.as_ref().unwrap_or(&Value::Null);
                return Ok(given(result::read(result).unwrap_or_default()));
            }
            self.teardown(&record).await?;
        }
        let network = self.network().await?.ok_or_else(|| NetworkError::CniConfig {
            path: self.folder.path().to_owned(),
            reason: "there is no network configuration".to_owned(),
        })?;
        let arguments: Vec<_> =
            plan_arguments(sandbox).iter().map(|(key, value)| format!("{key}={value}")).collect();
        let mut attachment = Attachment {
            network,
            capabilities: plan_capabilities(sandbox)?,
            args: arguments.join(";"),
            result: None,
            begun: None,
        };
        let mut record = Record::new(sandbox, Vec::new(), Kind::Cni(Box::new(attachment.clone())));
        let _adding = self.collecting.read().await;
        self.shared.put(record.clone())?;
        let outcome = match self.add(&record, &mut attachment).await {
            Ok(outcome) => outcome,
            Err(error) => {
                record.kind = Kind::Cni(Box::new(attachment));
                if let Err(second) = self.teardown(&record).await {
                    // What is left is in the record, and tried again.
                    let _ = self.shared.put(record);
                    return Err(NetworkError::Several(vec![error, second]));
                }
                return Err(error);
            }
        };
        record.ips = outcome.ips.clone();
        record.ready = true;
        self.cache.put(&Entry {
            network: &attachment.network.name,
            container: &record.id,
            netns: &record.netns,
            config: &attachment.network.source,
            arguments: &attachment.args,
            capabilities: &attachment.capabilities,
            result: attachment.result.as_ref().unwrap_or(&Value::Null),
        });
        record.kind = Kind::Cni(Box::new(attachment));
        self.shared.put(record)?;
        Ok(given(outcome))
    }

    /// ADD of all plugins, each with the result of the one before.
    async fn add(
        &self,
        record: &Record,
        attachment: &mut Attachment,
    ) -> Result<Outcome, NetworkError> {
        let mut previous: Option<Value> = None;
        let network = &attachment.network;
        for (n, plugin) in network.plugins.iter().enumerate() {
            match self.call("ADD", record, attachment, plugin, previous.as_ref()).await {
                Ok(result) => previous = Some(with_version(result, &network.cni_version)),
                Err(failed) => {
                    let error = failure(network, plugin, "ADD", failed.reason);
                    // One that never ran has nothing to undo, and could not either.
                    attachment.begun = Some(n + usize::from(!failed.absent));
                    return Err(error);
                }
            }
        }
        let result = previous.unwrap_or(Value::Null);
        let outcome = result::read(&result).and_then(|outcome| {
            if outcome.ips.is_empty() {
                return Err(format!("the result has no address for the pod's {INTERFACE}"));
            }
            Ok(outcome)
        });
        match outcome {
            Ok(outcome) => {
                attachment.result = Some(result);
                Ok(outcome)
            }
            Err(reason) => {
                let last = network.plugins.last().cloned().unwrap_or_default();
                Err(failure(network, &last, "ADD", reason))
            }
        }
    }

    /// DEL of all plugins, last first. It ends at the first that fails, as the specification has it:
    /// an address must not become free while a host port still leads to it. The record stays until
    /// all have done it.
    pub(crate) async fn teardown(&self, record: &Record) -> Result<(), NetworkError> {
        let Kind::Cni(attachment) = &record.kind else {
            return Ok(());
        };
        if !record.ready {
            // An ADD that an earlier shim began may still run.
            processes::kill_of(&record.id, &record.netns.display().to_string());
        }
        let network = &attachment.network;
        let previous = attachment.result.as_ref().filter(|_| network.knows(Version::CHECK));
        let begun = attachment.begun.unwrap_or(network.plugins.len()).min(network.plugins.len());
        for plugin in network.plugins[..begun].iter().rev() {
            self.call("DEL", record, attachment, plugin, previous)
                .await
                .map_err(|failed| failure(network, plugin, "DEL", failed.reason))?;
        }
        self.cache.remove(&network.name, &record.id);
        self.shared.forget(&record.id)
    }

    async fn check(&self, record: &Record) -> Result<(), NetworkError> {
        let Kind::Cni(attachment) = &record.kind else {
            return Ok(());
        };
        let network = &attachment.network;
        if network.disable_check || !network.knows(Version::CHECK) {
            return Ok(());
        }
        for plugin in &network.plugins {
            self.call("CHECK", record, attachment, plugin, attachment.result.as_ref())
                .await
                .map_err(|failed| failure(network, plugin, "CHECK", failed.reason))?;
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
    ) -> Result<Value, Failed> {
        let input = plan_input(&attachment.network, plugin, &attachment.capabilities, previous);
        let exists = netns::exists(&record.netns);
        let call = Call {
            command,
            container: &record.id,
            netns: if exists { record.netns.display().to_string() } else { String::new() },
            interface: INTERFACE,
            arguments: &attachment.args,
            path: &self.path,
            timeout: self.timeout,
        };
        plugin::run(kind(plugin), &call, &input).await
    }

    /// Whether sandboxes can be connected: the configuration is usable, its plugins are installed,
    /// and say so themselves where they know STATUS.
    pub(crate) async fn status(&self) -> Result<(), NetworkError> {
        let Some(network) = self.network().await? else {
            return Ok(());
        };
        for plugin in &network.plugins {
            if plugin::find(kind(plugin), &self.path).is_none() {
                let folders: Vec<_> = self.path.iter().map(|p| p.display().to_string()).collect();
                return Err(NetworkError::CniMissing {
                    plugin: kind(plugin).to_owned(),
                    network: network.name.clone(),
                    folders: folders.join(", "),
                });
            }
        }
        if !network.knows(Version::GC) {
            return Ok(());
        }
        // One at a time: who comes meanwhile takes the same answer.
        let mut last = self.status.lock().await;
        if let Some((when, of)) = last.as_ref()
            && when.elapsed() < STATUS_COUNTS
            && *of == network
        {
            return Ok(());
        }
        *last = None;
        let call = Call::of_network("STATUS", &self.path, self.timeout.min(PROMPT));
        for plugin in &network.plugins {
            plugin::run(kind(plugin), &call, &plan_status_input(&network, plugin))
                .await
                .map_err(|failed| failure(&network, plugin, "STATUS", failed.reason))?;
        }
        *last = Some((Instant::now(), network));
        Ok(())
    }

    /// Has the plugins take away what belongs to no living sandbox, where they know GC. False when
    /// sandboxes are being connected just now: to be tried again.
    pub(crate) async fn collect(&self, gone: &BTreeSet<String>) -> bool {
        let network = match self.network().await {
            Ok(Some(network)) if network.knows(Version::GC) && !network.disable_gc => network,
            _ => return true,
        };
        let Ok(_alone) = self.collecting.try_write() else {
            return false;
        };
        let mut valid: BTreeSet<(String, String)> =
            self.cache.living(&network.name).into_iter().collect();
        for record in self.shared.known().values() {
            if matches!(&record.kind, Kind::Cni(a) if a.network.name == network.name) {
                valid.insert((record.id.clone(), INTERFACE.to_owned()));
            }
        }
        valid.retain(|(container, _)| !gone.contains(container));
        let valid: Vec<_> = valid.into_iter().collect();
        let call = Call::of_network("GC", &self.path, self.timeout);
        let mut failures = Vec::new();
        for plugin in &network.plugins {
            let input = plan_gc_input(&network, plugin, &valid);
            let done = plugin::run(kind(plugin), &call, &input).await;
            failures
                .extend(done.err().map(|f| failure(&network, plugin, "GC", f.reason).to_string()));
        }
        let failures = (!failures.is_empty()).then(|| failures.join("; "));
        let mut said = self.gc_failure.lock().unwrap_or_else(PoisonError::into_inner);
        if failures != *said
            && let Some(error) = &failures
        {
            tracing::warn!(error, "leftovers of a CNI network may remain");
        }
        *said = failures;
        true
    }

    /// The configuration in containerd's words (`crictl info`), and what is wrong with it.
    pub(crate) fn describe(&self) -> (Value, Result<(), String>) {
        let loaded = self.folder.load();
        let networks: Vec<_> = loaded
            .network
            .iter()
            .map(|(_, network)| {
                let plugins: Vec<_> = network
                    .plugins
                    .iter()
                    .map(|plugin| {
                        json!({"Network": plugin, "Source": Value::Object(plugin.clone()).to_string()})
                    })
                    .collect();
                json!({"IFName": INTERFACE, "Config": {"Name": network.name,
                    "CNIVersion": network.cni_version, "Plugins": plugins, "Source": network.source}})
            })
            .collect();
        let config = json!({
            "PluginDirs": self.path,
            "PluginConfDir": self.folder.path(),
            "PluginMaxConfNum": 1,
            "Prefix": "eth",
            "Networks": networks,
        });
        let problems: Vec<_> = loaded
            .problems
            .iter()
            .map(|problem| format!("{}: {}", problem.path.display(), problem.reason))
            .collect();
        (config, if problems.is_empty() { Ok(()) } else { Err(problems.join("; ")) })
    }
}

fn given(outcome: Outcome) -> NetworkResult {
    NetworkResult { ips: outcome.ips, dns: outcome.dns, shown: outcome.shown }
}

fn failure(
    network: &NetworkList,
    plugin: &Map<String, Value>,
    command: &'static str,
    reason: String,
) -> NetworkError {
    NetworkError::CniPlugin {
        plugin: kind(plugin).to_owned(),
        network: network.name.clone(),
        command,
        reason,
    }
}
