//! The sockets in `plugins_registry`: whose plugin each is, and that it is registered.
//!
//! The folder is watched, and read as a whole at each change, so that what happened while nobody
//! looked counts as well: after a restart every plugin is registered again by its socket.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use inotify::WatchMask;
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::Instant;
use tonic::Status;

use super::wire::registration_client::RegistrationClient;
use super::wire::{InfoRequest, PluginInfo, RegistrationStatus};
use super::{PluginHandler, Refusal, connect, in_time};
use crate::folder_events::{self, Events};
use crate::shutdown;

/// The folder is read again at least this often.
const RESCAN: Duration = Duration::from_secs(60);
/// Events that come together are one look.
const SETTLE: Duration = Duration::from_millis(20);
/// How long a plugin may take to say who it is, and to take the answer.
const ASK: Duration = Duration::from_secs(5);
const FIRST_RETRY: Duration = Duration::from_millis(500);
const LONGEST_RETRY: Duration = Duration::from_secs(120);
/// Plugins that are taken notice of.
const MAX_SOCKETS: usize = 1000;
/// Folders below the registry are looked into so deep.
const MAX_DEPTH: usize = 4;

/// Which socket it is: one that was made anew at the same path is another.
type Identity = (u64, u64, i64, i64);

/// A plugin that is registered: its type and its name.
type Named = (&'static str, String);

#[derive(Debug)]
struct Plugin {
    identity: Identity,
    /// What its path registered.
    named: Option<Named>,
    /// Failures in a row.
    failures: u32,
    state: State,
}

#[derive(Debug)]
enum State {
    Registering(AbortHandle),
    Registered,
    Failed { retry_at: Instant },
}

/// Why a plugin is not registered.
#[derive(Debug, thiserror::Error)]
enum RegistryError {
    #[error("{verb} at socket {}: {}", socket.display(), status.message())]
    Unanswered { verb: &'static str, socket: PathBuf, status: Status },
    #[error("RegisterPlugin error -- no handler registered for plugin type: {kind} at socket {}", socket.display())]
    NoHandler { kind: String, socket: PathBuf },
    #[error("RegisterPlugin error -- {0}")]
    Refused(#[from] Refusal),
}

/// A registration that has ended, and what it registered.
type Ended = (PathBuf, Identity, Result<Named, RegistryError>);

/// Keeps what is registered as the sockets say.
pub struct Registry {
    folders: [PathBuf; 2],
    handlers: Arc<[Arc<dyn PluginHandler>]>,
    plugins: BTreeMap<PathBuf, Plugin>,
    work: JoinSet<Ended>,
}

/// What a look at the folder calls for, in this order.
#[derive(Debug, PartialEq, Eq)]
struct Plan {
    gone: Vec<PathBuf>,
    register: Vec<(PathBuf, Identity)>,
}

/// Compares the sockets that there are with what is known of them. Pure.
fn plan(
    known: &BTreeMap<PathBuf, Plugin>,
    found: &BTreeMap<PathBuf, Identity>,
    now: Instant,
) -> Plan {
    let wanted = |path: &PathBuf, identity: &Identity| match known.get(path) {
        None => true,
        Some(plugin) if plugin.identity != *identity => true,
        Some(Plugin { state: State::Failed { retry_at }, .. }) => *retry_at <= now,
        Some(_) => false,
    };
    Plan {
        gone: known.keys().filter(|path| !found.contains_key(*path)).cloned().collect(),
        register: found
            .iter()
            .filter(|(path, identity)| wanted(path, identity))
            .map(|(path, identity)| (path.clone(), *identity))
            .collect(),
    }
}

impl Registry {
    /// Over the folders of the agent's root.
    pub fn new(root: &Path, handlers: Vec<Arc<dyn PluginHandler>>) -> Self {
        Self {
            // Where plugins make themselves known, and where they have their own folders.
            folders: [root.join("plugins_registry"), root.join("plugins")],
            handlers: handlers.into(),
            plugins: BTreeMap::new(),
            work: JoinSet::new(),
        }
    }

    fn handler(&self, kind: &str) -> Option<&Arc<dyn PluginHandler>> {
        self.handlers.iter().find(|handler| handler.kind() == kind)
    }

    fn unregistered(&self, (kind, name): &Named, socket: &Path) {
        if let Some(handler) = self.handler(kind) {
            handler.unregistered(name, socket);
        }
    }

    /// Runs until `shutdown` turns true.
    pub async fn run(mut self, mut shutdown: watch::Receiver<bool>) {
        let folder = self.folders[0].clone();
        for folder in &self.folders {
            if let Err(error) = fs::create_dir_all(folder) {
                tracing::error!(folder = %folder.display(), %error, "no plugin can register");
            }
        }
        let mut events: Option<Events> = None;
        loop {
            // Watched before it is read, so that nothing falls between.
            if events.is_none() {
                events = folder_events::watch(&folder, WatchMask::empty())
                    .inspect_err(|error| {
                        tracing::warn!(folder = %folder.display(), %error,
                            "cannot watch for plugins; looking once a minute");
                    })
                    .ok();
            }
            self.look(&folder, events.as_ref());
            let retries = self.plugins.values().filter_map(|plugin| match plugin.state {
                State::Failed { retry_at } => Some(retry_at),
                _ => None,
            });
            let wake = retries.min().into_iter().chain([Instant::now() + RESCAN]).min();
            tokio::select! {
                alive = folder_events::next(&mut events) => {
                    if !alive {
                        events = None;
                    }
                    tokio::time::sleep(SETTLE).await;
                }
                Some(ended) = self.work.join_next() => {
                    // One that was called off says nothing.
                    if let Ok(ended) = ended {
                        self.ended(ended);
                    }
                }
                () = tokio::time::sleep_until(wake.unwrap_or_else(Instant::now)) => {}
                () = shutdown::requested(&mut shutdown) => return,
            }
        }
    }

    fn look(&mut self, folder: &Path, events: Option<&Events>) {
        let mut found = BTreeMap::new();
        if let Err(error) = sockets(folder, 0, events, &mut found) {
            // The folder as a whole being away says nothing about what is registered.
            tracing::warn!(folder = %folder.display(), %error, "cannot look for plugins");
            return;
        }
        let Plan { gone, register } = plan(&self.plugins, &found, Instant::now());
        for path in gone {
            let Some(plugin) = self.plugins.remove(&path) else { continue };
            if let State::Registering(work) = plugin.state {
                work.abort();
            }
            if let Some(named) = plugin.named {
                self.unregistered(&named, &path);
            }
        }
        for (path, identity) in register {
            let (mut named, mut failures) = (None, 0);
            if let Some(before) = self.plugins.remove(&path) {
                // A new socket in the old one's place is no removal: nobody need hear of it.
                named = before.named;
                if before.identity == identity {
                    failures = before.failures;
                }
                if let State::Registering(work) = before.state {
                    work.abort();
                }
            }
            let (handlers, socket) = (self.handlers.clone(), path.clone());
            let work = self.work.spawn(async move {
                let result = register_plugin(&handlers, &socket).await;
                (socket, identity, result)
            });
            let state = State::Registering(work);
            self.plugins.insert(path, Plugin { identity, named, failures, state });
        }
    }

    fn ended(&mut self, (path, identity, result): Ended) {
        let Some(plugin) = self.plugins.get_mut(&path).filter(|p| p.identity == identity) else {
            return;
        };
        match result {
            Ok(named) => {
                plugin.state = State::Registered;
                plugin.failures = 0;
                let before = plugin.named.replace(named.clone());
                if let Some(handler) = self.handler(named.0) {
                    handler.registered(&named.1);
                }
                if let Some(before) = before.filter(|before| *before != named) {
                    self.unregistered(&before, &path);
                }
            }
            Err(error) => {
                if plugin.failures == 0 {
                    tracing::warn!(socket = %path.display(), %error, "cannot register a plugin yet");
                }
                let wait = FIRST_RETRY.saturating_mul(1 << plugin.failures.min(16));
                plugin.failures += 1;
                plugin.state = State::Failed { retry_at: Instant::now() + wait.min(LONGEST_RETRY) };
            }
        }
    }
}

/// Registers whoever listens at `socket`, and tells it so; who it is.
async fn register_plugin(
    handlers: &[Arc<dyn PluginHandler>],
    socket: &Path,
) -> Result<Named, RegistryError> {
    let unanswered =
        |verb| move |status| RegistryError::Unanswered { verb, socket: socket.to_owned(), status };
    let asking = async {
        let mut plugin = RegistrationClient::new(connect(socket).await?);
        let info = plugin.get_info(InfoRequest {}).await?.into_inner();
        Ok((plugin, info))
    };
    let (mut plugin, info) = in_time(ASK, asking).await.map_err(unanswered("GetInfo"))?;
    let name = info.name.clone();
    let result = take(handlers, socket, info).await;
    let status = match &result {
        Ok(_) => RegistrationStatus { plugin_registered: true, error: String::new() },
        Err(error) => RegistrationStatus { plugin_registered: false, error: error.to_string() },
    };
    let telling = async { plugin.notify_registration_status(status).await };
    let told = in_time(ASK, telling).await.map_err(unanswered("NotifyRegistrationStatus"));
    let handler = result?;
    if let Err(error) = told {
        handler.untold(&name, socket);
        return Err(error);
    }
    Ok((handler.kind(), name))
}

/// Has a plugin taken into use by whom it is for.
async fn take<'a>(
    handlers: &'a [Arc<dyn PluginHandler>],
    socket: &Path,
    info: PluginInfo,
) -> Result<&'a Arc<dyn PluginHandler>, RegistryError> {
    let handler = handlers.iter().find(|handler| handler.kind() == info.r#type);
    let Some(handler) = handler else {
        return Err(RegistryError::NoHandler { kind: info.r#type, socket: socket.to_owned() });
    };
    handler.take(socket, info).await?;
    Ok(handler)
}

/// Sockets in `folder` and below, which are watched from now on.
fn sockets(
    folder: &Path,
    depth: usize,
    events: Option<&Events>,
    found: &mut BTreeMap<PathBuf, Identity>,
) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_name().as_encoded_bytes().starts_with(b".") || found.len() >= MAX_SOCKETS {
            continue;
        }
        // It may be gone by now.
        let Ok(metadata) = entry.metadata() else { continue };
        let path = entry.path();
        if metadata.is_dir() && depth < MAX_DEPTH {
            if let Some(events) = events {
                // Without a watch it is still looked into, by the clock.
                let _ = events.watches().add(&path, folder_events::entries());
            }
            // A folder that went meanwhile has no sockets.
            let _ = sockets(&path, depth + 1, events, found);
        } else if metadata.file_type().is_socket() {
            let identity =
                (metadata.dev(), metadata.ino(), metadata.ctime(), metadata.ctime_nsec());
            found.insert(path, identity);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_look_registers_what_is_new_and_forgets_what_is_gone() {
        let now = Instant::now();
        let soon = now + Duration::from_secs(1);
        let plugin = |identity, state| Plugin { identity, named: None, failures: 0, state };
        let one: Identity = (1, 1, 0, 0);
        let two: Identity = (1, 1, 0, 1);
        let known = BTreeMap::from([
            ("gone".into(), plugin(one, State::Registered)),
            ("same".into(), plugin(one, State::Registered)),
            ("anew".into(), plugin(one, State::Registered)),
            ("due".into(), plugin(one, State::Failed { retry_at: now })),
            ("waits".into(), plugin(one, State::Failed { retry_at: soon })),
            ("waits-anew".into(), plugin(one, State::Failed { retry_at: soon })),
        ]);
        let found = ["same", "due", "waits", "new"].map(|path| (path.into(), one));
        let anew = ["anew", "waits-anew"].map(|path| (path.into(), two));
        let found: BTreeMap<PathBuf, Identity> = found.into_iter().chain(anew).collect();
        let plan = plan(&known, &found, now);
        assert_eq!(plan.gone, [Path::new("gone")]);
        let register: Vec<_> = plan.register.iter().map(|(p, _)| p.to_str().unwrap()).collect();
        assert_eq!(register, ["anew", "due", "new", "waits-anew"]);
    }

    #[test]
    fn only_sockets_count_wherever_they_are() {
        let folder = tempfile::tempdir().unwrap();
        let bind = |name: &str| std::os::unix::net::UnixListener::bind(folder.path().join(name));
        fs::create_dir_all(folder.path().join("deep/er")).unwrap();
        fs::write(folder.path().join("file"), "").unwrap();
        let _listening = ["a.sock", "deep/er/b.sock", ".hidden"].map(|name| bind(name).unwrap());
        let mut found = BTreeMap::new();
        sockets(folder.path(), 0, None, &mut found).unwrap();
        let names: Vec<_> = found.keys().map(|p| p.strip_prefix(folder.path()).unwrap()).collect();
        assert_eq!(names, [Path::new("a.sock"), Path::new("deep/er/b.sock")]);
        let before = found.clone();
        fs::remove_file(folder.path().join("a.sock")).unwrap();
        let _again = bind("a.sock").unwrap();
        let mut now = BTreeMap::new();
        sockets(folder.path(), 0, None, &mut now).unwrap();
        let path = folder.path().join("a.sock");
        assert_ne!(before[&path], now[&path], "made anew, and taken for the same");
    }
}
