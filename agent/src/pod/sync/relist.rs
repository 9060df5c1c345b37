//! What the runtime says: its events, and what differs from one listing to the next.

use std::collections::HashMap;
use std::sync::Arc;

use cri_shim::api;
use k8s_openapi::api::core::v1::Pod;
use tokio::time::Instant;

use super::Loop;
use super::listing::list;
use crate::ids::{NamespacedName, PodUid};
use crate::metrics::METRICS;
use crate::pod::worker::{Begin, Message};

impl Loop {
    pub(super) fn event(&mut self, event: &api::ContainerEventResponse) {
        use api::ContainerEventType as Kind;
        let sandbox = event.pod_sandbox_status.as_ref();
        let uid = sandbox
            .and_then(|s| s.metadata.as_ref())
            .map(|m| PodUid::from(&*m.uid))
            .or_else(|| self.known.0.get(&event.container_id).map(|seen| seen.uid.clone()));
        let told = match &uid {
            Some(uid) => self.workers.get(uid),
            None => None,
        };
        match (told, event.container_event_type()) {
            // What the worker begins it hears of from the runtime's answer.
            (Some(_), Kind::ContainerCreatedEvent | Kind::ContainerStartedEvent) => {}
            (Some(worker), _) => {
                let _ = worker.inbox.send(Message::Look(event.container_id.clone()));
            }
            // An event that does not say whose it is concerns anybody.
            (None, Kind::ContainerStoppedEvent) if uid.is_none() => {
                for worker in self.workers.values() {
                    let _ = worker.inbox.send(Message::LookAtAll);
                }
            }
            (None, _) => {}
        }
    }

    /// Lists the runtime and passes on what differs from the listing before.
    pub(super) async fn relist(&mut self) {
        let began = Instant::now();
        let listed = list(&self.deps.runtime).await;
        let last = self.relisted.replace(began);
        METRICS.relisted(began.elapsed(), last.map(|last| began.duration_since(last)));
        let snapshot = match listed {
            Ok(snapshot) => snapshot,
            Err(error) => {
                tracing::warn!(%error, "cannot list what the container runtime holds");
                self.deps.table.update_health(|h| h.runtime_error = Some(error.to_string()));
                return;
            }
        };
        self.deps.table.update_health(|h| h.runtime_error = None);
        let before = std::mem::replace(&mut self.known, snapshot);
        let now = &self.known.0;
        let gone = before.0.iter().filter(|(id, _)| !now.contains_key(*id));
        let news = now.iter().filter(|(id, seen)| before.0.get(*id) != Some(seen));
        for (id, seen) in gone.chain(news) {
            if let Some(worker) = self.workers.get(&seen.uid) {
                let _ = worker.inbox.send(Message::Look(id.clone()));
            }
        }
        if self.unsynced.is_empty() {
            let strangers: HashMap<PodUid, NamespacedName> = now
                .values()
                .filter(|seen| !self.workers.contains_key(&seen.uid))
                .map(|seen| (seen.uid.clone(), seen.key.clone()))
                .collect();
            for (uid, key) in strangers {
                self.end_orphan(uid, key);
            }
            self.deps.claims.retain(&self.workers.keys().cloned().collect());
        }
    }

    /// Ends what runs for a pod that no source knows.
    pub(super) fn end_orphan(&mut self, uid: PodUid, key: NamespacedName) {
        METRICS.orphan_found();
        tracing::info!(pod = %key, %uid, "no source names this pod: its containers are ended");
        let mut pod = Pod::default();
        pod.metadata.name = Some(key.name.to_string());
        pod.metadata.namespace = Some(key.namespace.to_string());
        pod.metadata.uid = Some(uid.to_string());
        let begin = Begin {
            pod: Arc::new(pod),
            source: None,
            adopt: true,
            remove: true,
            saved: self.deps.store.load(&uid),
            verdict: None,
            pending: None,
            over: self.over.clone(),
        };
        self.spawn(uid, key, begin);
    }
}
