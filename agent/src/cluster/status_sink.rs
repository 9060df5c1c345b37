//! Pod statuses to the API server: in order for each pod, the latest wins, many pods at once.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use k8s_openapi::api::core::v1::{Pod, PodStatus};
use kube::Client;
use kube::api::{DeleteParams, Patch, PatchParams, Preconditions};
use serde_json::{Map, Value, json};
use tokio::sync::{Semaphore, mpsc};

use crate::api::backoff::Backoff;
use crate::api::{self, REQUEST_TIMEOUT};
use crate::ids::{NamespacedName, PodUid};
use crate::pod::allocation::{IN_PROGRESS, PENDING};
use crate::report::StatusSink;
use crate::source::cluster::Deleting;

/// Requests under way at once.
const PARALLEL: usize = 24;
/// Annotation that tells the source of a pod.
const SOURCE: &str = "kubernetes.io/config.source";
/// A refusal (403) is tried again this often: the authorizer may learn of a pod after we do.
const REFUSALS: u32 = 5;

/// Sends statuses to the API server.
pub struct ClusterStatuses {
    shared: Arc<Shared>,
}

struct Shared {
    client: Client,
    slots: Mutex<HashMap<PodUid, Slot>>,
    /// UID of the mirror pod of each static pod in the API.
    mirrors: Mutex<HashMap<NamespacedName, PodUid>>,
    deleting: Arc<Deleting>,
    permits: Semaphore,
}

#[derive(Default)]
struct Slot {
    /// To be sent.
    next: Option<(Arc<Pod>, PodStatus)>,
    /// What the API server holds, as far as we know.
    sent: Option<Value>,
    /// For which UID of the API that was.
    sent_to: Option<PodUid>,
    /// The last status of a static pod, to be sent again to a new mirror pod.
    last: Option<(Arc<Pod>, PodStatus)>,
    gone: Option<Arc<Pod>>,
    working: bool,
}

/// One thing to do for a pod.
enum Work {
    Patch { pod: Arc<Pod>, target: PodUid, patch: Value, status: Value },
    Delete(Arc<Pod>),
    Nothing,
}

impl ClusterStatuses {
    /// Over `client`. `deletions` wakes the sink for pods whose deletion the API asks for after
    /// nothing of them is left here.
    pub fn new(
        client: Client,
        deleting: Arc<Deleting>,
        mut deletions: mpsc::UnboundedReceiver<PodUid>,
    ) -> Arc<Self> {
        let shared = Arc::new(Shared {
            client,
            slots: Mutex::default(),
            mirrors: Mutex::default(),
            deleting,
            permits: Semaphore::new(PARALLEL),
        });
        let weak = Arc::downgrade(&shared);
        tokio::spawn(async move {
            while let Some(uid) = deletions.recv().await {
                let Some(shared) = weak.upgrade() else { return };
                shared.work_on(&uid);
            }
        });
        Arc::new(Self { shared })
    }

    /// The mirror pod of the static pod `key` has this UID now, or is gone.
    pub fn mirror(&self, key: &NamespacedName, uid: Option<PodUid>) {
        let mut mirrors = lock(&self.shared.mirrors);
        match uid {
            None => {
                mirrors.remove(key);
                return;
            }
            Some(uid) => {
                if mirrors.insert(key.clone(), uid.clone()) == Some(uid) {
                    return;
                }
            }
        }
        drop(mirrors);
        let mut slots = lock(&self.shared.slots);
        let again: Vec<PodUid> = slots
            .iter_mut()
            .filter(|(_, slot)| {
                slot.last.as_ref().is_some_and(|(pod, _)| NamespacedName::of_pod(pod) == *key)
            })
            .map(|(uid, slot)| {
                slot.next = slot.last.clone();
                uid.clone()
            })
            .collect();
        drop(slots);
        again.iter().for_each(|uid| self.shared.work_on(uid));
    }
}

impl StatusSink for ClusterStatuses {
    fn publish(&self, pod: &Arc<Pod>, status: PodStatus) {
        let uid = PodUid::of(pod);
        {
            let mut slots = lock(&self.shared.slots);
            let slot = slots.entry(uid.clone()).or_default();
            if slot.gone.is_some() {
                return;
            }
            if is_static(pod) {
                slot.last = Some((pod.clone(), status.clone()));
            }
            slot.next = Some((pod.clone(), status));
        }
        self.shared.work_on(&uid);
    }

    fn gone(&self, pod: &Arc<Pod>) {
        let uid = PodUid::of(pod);
        {
            let mut slots = lock(&self.shared.slots);
            let slot = slots.entry(uid.clone()).or_default();
            slot.gone = Some(pod.clone());
            slot.last = None;
        }
        self.shared.work_on(&uid);
    }
}

impl Shared {
    /// Starts a worker for `uid` unless one is at it.
    fn work_on(self: &Arc<Self>, uid: &PodUid) {
        {
            let mut slots = lock(&self.slots);
            let Some(slot) = slots.get_mut(uid) else { return };
            if slot.working {
                return;
            }
            slot.working = true;
        }
        let (shared, uid) = (self.clone(), uid.clone());
        tokio::spawn(async move { shared.worker(uid).await });
    }

    async fn worker(self: Arc<Self>, uid: PodUid) {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(10));
        let mut refusals = 0;
        loop {
            let work = self.next_work(&uid);
            let Ok(permit) = self.permits.acquire().await else { return };
            let outcome = match work {
                Work::Nothing => return,
                Work::Patch { pod, target, patch, status } => {
                    self.patch(&uid, &pod, target, &patch, status).await
                }
                Work::Delete(pod) => self.delete(&uid, &pod).await,
            };
            drop(permit);
            match outcome {
                Outcome::Done => backoff.reset(),
                Outcome::Drop(cause) => {
                    refusals += 1;
                    if refusals > REFUSALS {
                        tracing::warn!(pod = %uid, %cause, "a pod status is refused; giving it up");
                        self.give_up(&uid);
                        refusals = 0;
                    } else {
                        tokio::time::sleep(backoff.next_delay()).await;
                    }
                }
                Outcome::Retry(cause) => {
                    tracing::debug!(pod = %uid, %cause, "sending the status of a pod again");
                    tokio::time::sleep(backoff.next_delay()).await;
                }
            }
        }
    }

    /// Decides what is next for `uid`; `Nothing` ends the worker under the same lock.
    fn next_work(&self, uid: &PodUid) -> Work {
        let mut slots = lock(&self.slots);
        let Some(slot) = slots.get_mut(uid) else { return Work::Nothing };
        while let Some((pod, status)) = slot.next.clone() {
            let Some(target) = self.target(&pod) else {
                // A static pod whose mirror is not there yet; `mirror` sends it again.
                slot.next = None;
                break;
            };
            let new = serde_json::to_value(&status).unwrap_or_default();
            let known = slot.sent.as_ref().filter(|_| slot.sent_to.as_ref() == Some(&target));
            let in_object = || {
                let fresh = slot.sent_to.is_none() && !is_static(&pod);
                fresh.then(|| serde_json::to_value(&pod.status).unwrap_or_default())
            };
            let old = known.cloned().or_else(in_object).unwrap_or(Value::Null);
            match plan_patch(&old, &new) {
                Some(status_patch) => {
                    let patch =
                        json!({"metadata": {"uid": target.as_str()}, "status": status_patch});
                    return Work::Patch { pod, target, patch, status: new };
                }
                None => {
                    slot.sent = Some(new);
                    slot.sent_to = Some(target);
                    slot.next = None;
                }
            }
        }
        if let Some(pod) = slot.gone.clone() {
            if is_static(&pod) {
                slots.remove(uid);
                return Work::Nothing;
            }
            let asked = pod.metadata.deletion_timestamp.is_some();
            match self.deleting.is_deleting(uid) {
                Some(true) => return Work::Delete(pod),
                // The API no longer has it, or the sync loop saw the deletion before this index.
                None if !asked => {
                    slots.remove(uid);
                    return Work::Nothing;
                }
                None => return Work::Delete(pod),
                Some(false) if asked => return Work::Delete(pod),
                Some(false) => {}
            }
        }
        slot.working = false;
        Work::Nothing
    }

    /// The UID that the API knows `pod` by.
    fn target(&self, pod: &Pod) -> Option<PodUid> {
        if is_static(pod) {
            lock(&self.mirrors).get(&NamespacedName::of_pod(pod)).cloned()
        } else {
            Some(PodUid::of(pod))
        }
    }

    fn api(&self, pod: &Pod) -> kube::Api<Pod> {
        let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
        kube::Api::namespaced(self.client.clone(), namespace)
    }

    async fn patch(
        &self,
        uid: &PodUid,
        pod: &Arc<Pod>,
        target: PodUid,
        patch: &Value,
        status: Value,
    ) -> Outcome {
        let key = NamespacedName::of_pod(pod);
        let (pods, params) = (self.api(pod), PatchParams::default());
        let body = Patch::Strategic(patch);
        let request = pods.patch_status(&key.name, &params, &body);
        let what = format!("patch the status of pod {key}");
        match api::timed(what, REQUEST_TIMEOUT, request).await {
            Ok(_) => {
                let mut slots = lock(&self.slots);
                if let Some(slot) = slots.get_mut(uid) {
                    slot.sent = Some(status);
                    slot.sent_to = Some(target);
                    // A later status that came meanwhile is compared with this one.
                    let same = slot.next.as_ref().is_some_and(|(p, s)| {
                        Arc::ptr_eq(p, pod) && serde_json::to_value(s).ok() == slot.sent
                    });
                    if same {
                        slot.next = None;
                    }
                }
                Outcome::Done
            }
            Err(error) => match error.code() {
                // The object is gone, or another pod has its name: nobody wants this status.
                // Any other conflict is a race with another writer.
                Some(code) if code == 404 || (code == 409 && error.to_string().contains("UID")) => {
                    self.give_up(uid);
                    Outcome::Done
                }
                Some(400..=499) if !error.is_retryable() && error.code() != Some(409) => {
                    Outcome::Drop(error.to_string())
                }
                _ => Outcome::Retry(error.to_string()),
            },
        }
    }

    async fn delete(&self, uid: &PodUid, pod: &Pod) -> Outcome {
        let key = NamespacedName::of_pod(pod);
        let preconditions =
            Preconditions { uid: Some(uid.to_string()), ..Preconditions::default() };
        let params = DeleteParams::default().grace_period(0).preconditions(preconditions);
        let pods = self.api(pod);
        let request = pods.delete(&key.name, &params);
        let what = format!("confirm the deletion of pod {key}");
        match api::timed(what, REQUEST_TIMEOUT, request).await {
            Ok(_) => {}
            Err(error) => match error.code() {
                Some(404 | 409) => {}
                Some(400..=499) if !error.is_retryable() => {
                    return Outcome::Drop(error.to_string());
                }
                _ => return Outcome::Retry(error.to_string()),
            },
        }
        lock(&self.slots).remove(uid);
        Outcome::Done
    }

    /// Drops what is pending for `uid`.
    fn give_up(&self, uid: &PodUid) {
        let mut slots = lock(&self.slots);
        if let Some(slot) = slots.get_mut(uid) {
            slot.next = None;
            if slot.gone.is_some() {
                slots.remove(uid);
            }
        }
    }
}

enum Outcome {
    Done,
    Retry(String),
    Drop(String),
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

/// Whether `pod` comes from a manifest on this node.
pub fn is_static(pod: &Pod) -> bool {
    pod.metadata
        .annotations
        .as_ref()
        .and_then(|a| a.get(SOURCE))
        .is_some_and(|source| source != "api")
}

/// The strategic merge patch that turns status `old` into `new`; `None` if they are equal.
///
/// Lists that the API merges by key are replaced whole, but for `conditions`, of which others own
/// some (readiness gates). Values that went are set to null.
fn plan_patch(old: &Value, new: &Value) -> Option<Value> {
    let empty = Map::new();
    let old = old.as_object().unwrap_or(&empty);
    let new = new.as_object().unwrap_or(&empty);
    let mut patch = Map::new();
    for (field, value) in new {
        if old.get(field) == Some(value) {
            continue;
        }
        let value = match (field.as_str(), value) {
            ("podIPs" | "hostIPs" | "resourceClaimStatuses", Value::Array(items)) => {
                let mut items = items.clone();
                items.push(json!({"$patch": "replace"}));
                Value::Array(items)
            }
            ("conditions", Value::Array(items)) => {
                let before = old.get(field).and_then(Value::as_array);
                let mut changed: Vec<Value> = items
                    .iter()
                    .filter(|c| !before.is_some_and(|b| b.contains(c)))
                    .map(|c| with_nulls(c, before))
                    .collect();
                // Others' conditions stay; those of a resize are ours and go with it.
                changed.extend([PENDING, IN_PROGRESS].into_iter().filter_map(|kind| {
                    let of = |list: &[Value]| list.iter().any(|c| c["type"] == kind);
                    let over = before.is_some_and(|before| of(before)) && !of(items);
                    over.then(|| json!({"type": kind, "$patch": "delete"}))
                }));
                if changed.is_empty() {
                    continue;
                }
                Value::Array(changed)
            }
            _ => value.clone(),
        };
        patch.insert(field.clone(), value);
    }
    for field in old.keys().filter(|field| !new.contains_key(*field)) {
        // Conditions of others stay.
        if field != "conditions" {
            patch.insert(field.clone(), Value::Null);
        }
    }
    (!patch.is_empty()).then_some(Value::Object(patch))
}

/// `condition` with nulls for what its predecessor of the same type had and it has not.
fn with_nulls(condition: &Value, before: Option<&Vec<Value>>) -> Value {
    let mut condition = condition.clone();
    let kind = condition.get("type").cloned();
    let old = before.into_iter().flatten().find(|c| c.get("type") == kind.as_ref());
    if let (Some(new), Some(old)) = (condition.as_object_mut(), old.and_then(Value::as_object)) {
        for field in old.keys() {
            new.entry(field.clone()).or_insert(Value::Null);
        }
    }
    condition
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_differences_are_sent() {
        let old = json!({"phase": "Pending", "message": "m", "podIPs": [{"ip": "1"}],
            "conditions": [{"type": "Ready", "status": "False", "reason": "R"},
                           {"type": "PodScheduled", "status": "True"}, {"type": "gate/x"}]});
        assert_eq!(plan_patch(&old, &old), None);
        let new = json!({"phase": "Running", "podIPs": [{"ip": "2"}],
            "conditions": [{"type": "Ready", "status": "True"},
                           {"type": "PodScheduled", "status": "True"}]});
        assert_eq!(
            plan_patch(&old, &new),
            Some(json!({
                "phase": "Running", "message": null,
                "podIPs": [{"ip": "2"}, {"$patch": "replace"}],
                "conditions": [{"type": "Ready", "status": "True", "reason": null}]
            }))
        );
        let without_gate = json!({"phase": "Pending", "message": "m", "podIPs": [{"ip": "1"}],
            "conditions": [{"type": "PodScheduled", "status": "True"},
                           {"type": "Ready", "status": "False", "reason": "R"}]});
        assert_eq!(plan_patch(&old, &without_gate), None);
        let ready = json!({"type": "Ready", "status": "True"});
        let resizing = json!({"conditions": [ready, {"type": "PodResizePending"}, {"type": "PodResizeInProgress"}]});
        let after = json!({"conditions": [ready, {"type": "PodResizeInProgress"}]});
        assert_eq!(
            plan_patch(&resizing, &after),
            Some(json!({"conditions": [{"type": "PodResizePending", "$patch": "delete"}]}))
        );
    }
}
