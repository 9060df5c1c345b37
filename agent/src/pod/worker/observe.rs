//! Looking at what the runtime holds of the pod: everything at first and when in doubt, else just
//! what changed.

use std::collections::HashMap;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use jiff::SignedDuration;
use k8s_openapi::api::core::v1::ContainerStatus;

use super::{Stale, State, Worker};
use crate::pod::facts::ProbeKind;
use crate::pod::logs::known_restarts;
use crate::pod::observed::{Container, ContainerId, ContainerState, Sandbox, SandboxId, names};
use crate::runtime::RuntimeError;

/// How long before a runtime that did not answer is asked again.
const RETRY: SignedDuration = SignedDuration::from_secs(1);
/// Longest message of a container's last words, in bytes.
const MAX_MESSAGE: u64 = 4096;
/// Longest message taken from a log, in bytes and lines.
const MAX_LOG: u64 = 2048;
const MAX_LOG_LINES: usize = 80;

impl Worker {
    /// Looks at what is stale. False where the runtime did not answer: then nothing is decided.
    pub(super) async fn refresh(&mut self) -> bool {
        let over = matches!(self.state, State::TearingDown { .. } | State::Finished);
        if over && !self.stale.all {
            // Nothing runs; what is being taken away is looked at only in doubt.
            self.stale = Default::default();
            return true;
        }
        let looked = if self.stale.all {
            self.look_at_all().await
        } else if self.stale.ids.is_empty() {
            // A start may come back with a container that has ended already.
            self.last_words().await;
            return true;
        } else {
            self.look_at_some().await
        };
        match looked {
            Ok(()) => {
                let early = std::mem::take(&mut self.stale.early);
                self.stale = Stale { early, ..Stale::default() };
                self.last_words().await;
                let alive: Vec<_> = self
                    .observed
                    .containers
                    .iter()
                    .filter(|c| c.state == ContainerState::Running)
                    .map(|c| c.id.clone())
                    .collect();
                let probes = &mut self.facts.probes;
                probes.started.retain(|id| alive.contains(id));
                probes.ready.retain(|id| alive.contains(id));
                probes.failed.retain(|id, _| alive.contains(id));
                // A kill is over when its instance is, whenever its call comes back.
                let over = |id: &ContainerId| {
                    self.observed.container(id).is_none_or(|c| c.state == ContainerState::Exited)
                };
                self.facts.killing.retain(|id| !over(id));
                let known = &self.observed.containers;
                self.facts.restart_after_kill.retain(|id| known.iter().any(|c| c.id == *id));
                true
            }
            Err(error) => {
                tracing::warn!(pod = %self.uid, %error, "cannot look at the pod's containers");
                self.stale.all = true;
                self.stale.retry_at = Some(self.deps.clock.now() + RETRY);
                false
            }
        }
    }

    async fn look_at_all(&mut self) -> Result<(), RuntimeError> {
        let runtime = &self.deps.runtime;
        let uid = Some(self.uid.as_str());
        let (sandboxes, containers) =
            tokio::try_join!(runtime.list_pod_sandboxes(uid), runtime.list_containers(uid))?;
        let statuses = futures::future::join_all(
            sandboxes.iter().map(|s| async { runtime.pod_sandbox_status(&s.id).await }),
        );
        let known: HashMap<ContainerId, Container> =
            self.observed.containers.drain(..).map(|c| (c.id.clone(), c)).collect();
        let known = &known;
        let details = futures::future::join_all(containers.into_iter().map(|c| async move {
            let id = ContainerId::from(c.id.as_str());
            // What has ended does not change any more.
            if let Some(old) = known.get(&id)
                && old.state == ContainerState::Exited
            {
                return Ok(old.clone());
            }
            let status = runtime.container_status(&c.id).await?;
            Ok(Container::from_cri(status, SandboxId::from(c.pod_sandbox_id.as_str())))
        }));
        let (statuses, details) = tokio::join!(statuses, details);
        self.observed.sandboxes.clear();
        for status in statuses {
            match status {
                Ok(response) => {
                    self.observed.sandboxes.extend(response.status.as_ref().map(Sandbox::from_cri));
                }
                Err(error) if error.is_not_found() => {}
                Err(error) => return Err(error),
            }
        }
        for detail in details {
            match detail {
                Ok(container) => self.observed.containers.push(container),
                Err(error) if RuntimeError::is_not_found(&error) => {}
                Err(error) => return Err(error),
            }
        }
        self.observed.sort();
        Ok(())
    }

    async fn look_at_some(&mut self) -> Result<(), RuntimeError> {
        for id in self.stale.ids.clone() {
            let runtime = &self.deps.runtime;
            let sandbox = self.observed.sandboxes.iter().position(|s| s.id.as_str() == id);
            if let Some(at) = sandbox {
                match runtime.pod_sandbox_status(&id).await {
                    Ok(response) => {
                        if let Some(status) = &response.status {
                            self.observed.sandboxes[at] = Sandbox::from_cri(status);
                        }
                    }
                    Err(error) if error.is_not_found() => {
                        self.observed.sandboxes.remove(at);
                    }
                    Err(error) => return Err(error),
                }
                continue;
            }
            let container = self.observed.containers.iter().position(|c| c.id.as_str() == id);
            let Some(at) = container else {
                // Not one we know: made by a step in flight, which may have seen it before this
                // change, or by a stranger.
                if self.facts.starting.is_empty() && self.facts.sandbox != super::Step::Busy {
                    self.stale.early.clear();
                    return self.look_at_all().await;
                }
                self.stale.early.insert(id);
                continue;
            };
            if self.observed.containers[at].state == ContainerState::Exited {
                continue;
            }
            match runtime.container_status(&id).await {
                Ok(status) => {
                    let sandbox = self.observed.containers[at].sandbox.clone();
                    self.observed.containers[at] = Container::from_cri(status, sandbox);
                }
                Err(error) if error.is_not_found() => {
                    self.observed.containers.remove(at);
                }
                Err(error) => return Err(error),
            }
        }
        self.observed.sort();
        Ok(())
    }

    /// What a step in flight made is known now; whether it has changed since that step saw it.
    pub(super) fn known(&mut self, id: &str) {
        if self.stale.early.remove(id) {
            self.stale.ids.insert(id.to_owned());
        }
    }

    /// Takes over what an earlier agent left: restart counts, and what probes had found.
    pub(super) async fn seed(&mut self) {
        let logs = self.deps.node.pod_log_dir(&self.pod);
        let found = tokio::task::spawn_blocking(move || known_restarts(&logs)).await;
        let mut known = found.unwrap_or_default();
        let previous = self.previous.clone().unwrap_or_default();
        let lists = [previous.container_statuses, previous.init_container_statuses];
        for status in lists.iter().flatten().flatten() {
            let gone = self.observed.latest(&status.name).is_none();
            let ran = status.container_id.is_some();
            if gone && ran {
                // One that was only made is made again under its number.
                let waiting = status.state.as_ref().and_then(|state| state.waiting.as_ref());
                let made_only = waiting.is_some_and(|waiting| {
                    matches!(
                        waiting.reason.as_deref(),
                        Some("ContainerCreating" | "PodInitializing")
                    )
                });
                let next = u32::try_from(status.restart_count).unwrap_or(0) + u32::from(!made_only);
                let entry = known.entry(status.name.clone()).or_default();
                *entry = (*entry).max(next);
            }
            self.seed_probes(status);
        }
        self.facts.known_restarts = known;
    }

    fn seed_probes(&mut self, status: &ContainerStatus) {
        let Some(id) = status.container_id.as_deref().and_then(|id| id.split_once("://")) else {
            return;
        };
        let id = ContainerId::from(id.1);
        let running =
            self.observed.container(&id).is_some_and(|c| c.state == ContainerState::Running);
        if !running {
            return;
        }
        if status.started == Some(true) {
            self.facts.probes.started.insert(id.clone());
        }
        if status.ready {
            self.facts.probes.ready.insert(id);
        }
    }

    pub(super) fn probed(&mut self, id: ContainerId, kind: ProbeKind, healthy: bool) {
        let probes = &mut self.facts.probes;
        match (kind, healthy) {
            (ProbeKind::Readiness, true) => {
                probes.ready.insert(id);
            }
            (ProbeKind::Readiness, false) => {
                probes.ready.remove(&id);
            }
            (ProbeKind::Startup, true) => {
                probes.started.insert(id);
            }
            (ProbeKind::Liveness, true) => {}
            (ProbeKind::Liveness | ProbeKind::Startup, false) => {
                probes.failed.insert(id, kind);
            }
        }
    }

    /// Reads the termination messages of what has ended since.
    async fn last_words(&mut self) {
        let spec = super::spec_of(&self.pod);
        for container in &mut self.observed.containers {
            if container.state != ContainerState::Exited || container.termination_message.is_some()
            {
                continue;
            }
            let file = container.annotations.get(names::MESSAGE_FILE).cloned();
            let fallback = container
                .annotations
                .get(names::TERMINATION_MESSAGE_POLICY)
                .is_some_and(|p| p == "FallbackToLogsOnError");
            let named = super::find_container(spec, &container.name).is_some();
            if (file.is_none() && !fallback) || !named {
                container.termination_message = Some(String::new());
                continue;
            }
            let (log, code) = (container.log_path.clone(), container.exit_code);
            let words = tokio::task::spawn_blocking(move || {
                let own = file.and_then(|f| head(Path::new(&f))).unwrap_or_default();
                if own.is_empty() && fallback && code != 0 && !log.is_empty() {
                    return log_tail(Path::new(&log)).unwrap_or_default();
                }
                own
            });
            container.termination_message = Some(words.await.unwrap_or_default());
        }
    }
}

/// The beginning of a message file. The container could write it: only a plain file counts.
fn head(path: &Path) -> Option<String> {
    if !std::fs::symlink_metadata(path).ok()?.is_file() {
        return None;
    }
    let mut bytes = Vec::new();
    std::fs::File::open(path).ok()?.take(MAX_MESSAGE).read_to_end(&mut bytes).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

/// The last lines of a log in CRI format, without times and tags.
fn log_tail(path: &Path) -> Option<String> {
    let mut file = std::fs::File::open(path).ok()?;
    let length = file.metadata().ok()?.len();
    // Lines carry their time and stream besides the text.
    let from = length.saturating_sub(4 * MAX_LOG);
    file.seek(SeekFrom::Start(from)).ok()?;
    let mut bytes = Vec::new();
    file.take(4 * MAX_LOG).read_to_end(&mut bytes).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().skip(usize::from(from > 0)).collect();
    let mut out = String::new();
    for line in &lines[lines.len().saturating_sub(MAX_LOG_LINES)..] {
        let mut parts = line.splitn(4, ' ');
        let (tag, content) = (parts.nth(2).unwrap_or("F"), parts.next().unwrap_or(""));
        out.push_str(content);
        if tag.starts_with('F') {
            out.push('\n');
        }
    }
    let limit = usize::try_from(MAX_LOG).unwrap_or(usize::MAX);
    while out.len() > limit {
        let cut = out.len() - limit;
        let cut = (cut..=out.len()).find(|i| out.is_char_boundary(*i)).unwrap_or(0);
        out.drain(..cut);
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_of_a_log_is_its_text() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        let line = |tag: &str, text: &str| format!("2026-01-01T00:00:00.0Z stdout {tag} {text}\n");
        std::fs::write(&path, line("F", "one") + &line("P", "tw") + &line("F", "o x")).unwrap();
        assert_eq!(log_tail(&path).unwrap(), "one\ntwo x\n");
        std::fs::write(&path, line("F", "é").repeat(5000)).unwrap();
        let tail = log_tail(&path).unwrap();
        assert_eq!(tail.lines().count(), MAX_LOG_LINES);
    }
}
