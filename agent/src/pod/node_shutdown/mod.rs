//! Ends the pods of a node that shuts down, in groups by priority (KEP-2000, KEP-2712).
//!
//! logind tells of the shutdown before it happens and waits while its lock is held
//! (`node::logind`). Ordinary pods go first, so that what they need (network, storage) still runs
//! while they end; each group has its time, and the next begins when it is over or nothing of the
//! group is left, volumes included.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use jiff::SignedDuration;
use k8s_openapi::api::core::v1::{ObjectReference, Pod};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use super::deps::Deps;
use super::spec::spec_of;
use super::status::{Verdict, is_terminal};
use super::table::PodView;
use super::worker::Eviction;
use crate::ids::PodUid;
use crate::metrics::METRICS;
use crate::node::logind::{Lock, Told};
use crate::node_context::ShutdownGrace;
use crate::report::EventType;

mod record;

use record::Record;

/// Why a pod was ended, in kubelet's words.
const REASON: &str = "Terminated";
const MESSAGE: &str = "Pod was terminated in response to imminent node shutdown.";
/// Why a pod is not let in.
const REFUSED: &str = "NodeShutdown";
const REFUSED_MESSAGE: &str = "Pod was rejected as the node is shutting down.";

/// Refuses every pod.
pub(super) fn refusal() -> Verdict {
    Verdict { message: REFUSED_MESSAGE.to_owned(), ..Verdict::new(REFUSED) }
}

/// Whether a pod of this status ended with an earlier shutdown. A static pod has nobody to make
/// another one of it: it runs again once the node does.
pub(super) fn ended_by(status: &k8s_openapi::api::core::v1::PodStatus) -> bool {
    status.reason.as_deref() == Some(REASON) && status.message.as_deref() == Some(MESSAGE)
}

/// Which of `graces` (the lowest priority first, not empty) `pod` ends with: the last one that is not
/// above its priority, or the first.
fn group_of(graces: &[ShutdownGrace], pod: &Pod) -> usize {
    let priority = spec_of(pod).priority.unwrap_or(0);
    graces.partition_point(|grace| grace.priority <= priority).saturating_sub(1)
}

/// How long a shutdown is to be held up at most.
pub(crate) fn longest(graces: &[ShutdownGrace]) -> Duration {
    Duration::from_secs(graces.iter().map(|grace| u64::from(grace.seconds)).sum())
}

/// Ends pods whenever a shutdown is told, and says in `shutting_down` while there is one.
pub(super) async fn watch(
    deps: Arc<Deps>,
    mut told: mpsc::Receiver<Told>,
    shutting_down: watch::Sender<bool>,
    evictions: mpsc::UnboundedSender<(PodUid, Eviction)>,
) {
    if deps.node.shutdown_grace.is_empty() {
        return;
    }
    let record = Record::below(&deps.node.root_dir);
    if let Some((start, end)) = record.load() {
        METRICS.graceful_shutdown(start, end);
    }
    // All that holds the shutdown up: a second signal must not let go of the first one's.
    let mut locks: Vec<Lock> = Vec::new();
    let mut next = told.recv().await;
    while let Some(news) = next.take() {
        match news {
            Told::Cancelled => {
                say(&deps, "Shutdown manager detected shutdown cancellation");
                shutting_down.send_replace(false);
                locks.clear();
            }
            Told::Shutdown(lock) => {
                locks.push(lock);
                say(&deps, "Shutdown manager detected shutdown event");
                shutting_down.send_replace(true);
                let start = deps.clock.now();
                METRICS.graceful_shutdown(start, None);
                record.store(start, None);
                tokio::select! {
                    () = end_pods(&deps, &evictions) => {}
                    news = told.recv() => {
                        next = news;
                        continue;
                    }
                }
                let end = deps.clock.now();
                METRICS.graceful_shutdown(start, Some(end));
                record.store(start, Some(end));
                tracing::info!(
                    "the pods have ended, or their time is over; the node may shut down"
                );
                locks.clear();
            }
        }
        next = told.recv().await;
    }
}

fn say(deps: &Deps, message: &str) {
    let name = Some(deps.node.node_name.clone());
    let kind = Some("Node".into());
    let node = ObjectReference { kind, uid: name.clone(), name, ..Default::default() };
    tracing::info!("{message}");
    deps.events.record(node, EventType::Normal, "NodeShutdown", message.to_owned());
}

/// Ends all pods, group by group.
async fn end_pods(deps: &Deps, evictions: &mpsc::UnboundedSender<(PodUid, Eviction)>) {
    let graces = &deps.node.shutdown_grace;
    let mut told: HashSet<PodUid> = HashSet::new();
    let mut changes = deps.table.changes();
    for (group, grace) in graces.iter().enumerate() {
        let until = Instant::now() + Duration::from_secs(grace.seconds.into());
        let mut left: HashSet<PodUid> = HashSet::new();
        loop {
            changes.borrow_and_update();
            let views = deps.table.pods();
            // One that was let in just before the signal may show only now.
            for view in views.iter().filter(|view| due(view, graces, group)) {
                let uid = PodUid::of(&view.pod);
                if told.insert(uid.clone()) {
                    left.insert(uid.clone());
                    let grace = SignedDuration::from_secs(grace.seconds.into());
                    let verdict = Verdict { message: MESSAGE.to_owned(), ..Verdict::new(REASON) };
                    let verdict = Verdict { disrupts: true, ..verdict };
                    let eviction = Eviction { verdict, grace, event: None };
                    if evictions.send((uid, eviction)).is_err() {
                        return;
                    }
                }
            }
            left.retain(|uid| {
                let view = views.iter().find(|view| PodUid::of(&view.pod) == *uid);
                view.is_some_and(|view| !view.finished)
            });
            if left.is_empty() {
                break;
            }
            tokio::select! {
                changed = changes.changed() => if changed.is_err() { return },
                () = tokio::time::sleep_until(until) => {
                    let pods = left.len();
                    tracing::warn!(
                        pods, priority = grace.priority, seconds = grace.seconds,
                        "pods have not ended within their part of the shutdown"
                    );
                    break;
                }
            }
        }
    }
}

/// Whether a pod is to end with `group` at the latest, and has not ended.
fn due(view: &PodView, graces: &[ShutdownGrace], group: usize) -> bool {
    !view.finished
        && !is_terminal(view.status.phase.as_deref())
        && group_of(graces, &view.pod) <= group
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::testing::pod;

    #[test]
    fn pods_go_with_the_last_group_that_is_not_above_them() {
        let grace = |priority| ShutdownGrace { priority, seconds: 1 };
        let graces = [grace(0), grace(1000), grace(2_000_000_000)];
        for (priority, group) in [
            (None, 0),
            (Some(-7), 0),
            (Some(0), 0),
            (Some(999), 0),
            (Some(1000), 1),
            (Some(1_999_999_999), 1),
            (Some(2_000_000_000), 2),
            (Some(2_000_001_000), 2),
        ] {
            let mut pod = pod(r#"{"containers":[]}"#);
            pod.spec.as_mut().unwrap().priority = priority;
            assert_eq!(group_of(&graces, &pod), group, "{priority:?}");
        }
        assert_eq!(longest(&graces), Duration::from_secs(3));
    }
}
