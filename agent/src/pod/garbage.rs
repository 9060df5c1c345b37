//! Dead containers that nobody needs any more.
//!
//! A container's worker keeps the number of its dead instances as it starts new ones. What goes by age
//! or by the number of all goes here, and what is left of pods that are over where the disk is full:
//! their statuses are known without it.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use cri_shim::api;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use tokio::time::MissedTickBehavior;

use super::deps::Deps;
use super::logs::remove_instance_logs;
use super::observed::{ContainerId, names};
use crate::ids::PodUid;
use crate::node_context::GcLimits;
use crate::report::{EventType, node_reference};

/// How often what is too old or too many is looked for, as under kubelet.
const PERIOD: Duration = Duration::from_secs(60);

/// A container that has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Dead {
    id: String,
    pod: PodUid,
    name: String,
    attempt: u32,
    created: Timestamp,
    /// Where its last words are.
    words: Option<String>,
}

/// Which of the dead go: all of the pods in `over`, and the oldest of each container and of all where
/// there are more than is kept. What is too young goes for no reason.
fn plan_removals(
    dead: Vec<Dead>,
    over: &HashSet<PodUid>,
    limits: &GcLimits,
    now: Timestamp,
) -> Vec<Dead> {
    let old = |dead: &Dead| {
        let age = Duration::try_from(now.duration_since(dead.created));
        age.unwrap_or_default() >= limits.dead_min_age
    };
    let (mut gone, rest): (Vec<_>, Vec<_>) =
        dead.into_iter().filter(old).partition(|dead| over.contains(&dead.pod));
    let mut kept: BTreeMap<(PodUid, String), Vec<Dead>> = BTreeMap::new();
    for one in rest {
        kept.entry((one.pod.clone(), one.name.clone())).or_default().push(one);
    }
    let mut keep = |kept: &mut BTreeMap<_, Vec<Dead>>, most: usize| {
        for all in kept.values_mut() {
            all.sort_by_key(|dead| Reverse(dead.created));
            gone.extend(all.drain(most.min(all.len())..));
        }
    };
    keep(&mut kept, limits.dead_per_container);
    let count = |kept: &BTreeMap<_, Vec<Dead>>| kept.values().map(Vec::len).sum::<usize>();
    if let Some(most) = limits.dead_in_all
        && count(&kept) > most
    {
        // An equal number of each, at least one; then the oldest of all.
        let each = (most / kept.len()).max(1);
        keep(&mut kept, each);
        let mut left: Vec<Dead> = kept.into_values().flatten().collect();
        left.sort_by_key(|dead| Reverse(dead.created));
        gone.extend(left.drain(most.min(left.len())..));
    }
    gone
}

/// A container of a listing, if it has ended.
fn dead(container: api::Container) -> Option<Dead> {
    if container.state() != api::ContainerState::ContainerExited {
        return None;
    }
    let metadata = container.metadata?;
    Some(Dead {
        pod: PodUid::from(&**container.labels.get(names::POD_UID)?),
        words: container.annotations.get(names::MESSAGE_FILE).cloned(),
        created: Timestamp::from_nanosecond(container.created_at.into()).unwrap_or_default(),
        id: container.id,
        name: metadata.name,
        attempt: metadata.attempt,
    })
}

/// Whether any container goes by age or by the number of all: the number of each its worker keeps.
pub(super) fn is_due(limits: &GcLimits) -> bool {
    limits.dead_in_all.is_some() || !limits.dead_min_age.is_zero() || limits.dead_per_container == 0
}

/// Removes what is too old or too many, for ever.
pub(super) async fn watch(deps: Arc<Deps>) {
    let mut ticks = tokio::time::interval(PERIOD);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        if let Err(error) = remove(&deps, &HashSet::new()).await {
            tracing::warn!(error, "container garbage collection");
            let node = node_reference(&deps.node.node_name);
            deps.events.record(node, EventType::Warning, "ContainerGCFailed", error);
        }
    }
}

/// Removes that, and all that is left in the runtime of pods that are over.
pub(super) async fn collect_all(deps: &Deps) -> Result<(), String> {
    let views = deps.table.pods();
    let over: HashSet<PodUid> =
        views.iter().filter(|view| view.finished).map(|view| PodUid::of(&view.pod)).collect();
    remove(deps, &over).await?;
    let sandboxes = deps.runtime.list_pod_sandboxes(None).await.map_err(|e| e.to_string())?;
    let left = deps.runtime.list_containers(None).await.map_err(|e| e.to_string())?;
    for sandbox in sandboxes {
        let uid = sandbox.metadata.as_ref().map(|m| PodUid::from(&*m.uid));
        let of_one_over = uid.is_some_and(|uid| over.contains(&uid));
        let ready = sandbox.state() == api::PodSandboxState::SandboxReady;
        if !of_one_over || ready || left.iter().any(|c| c.pod_sandbox_id == sandbox.id) {
            continue;
        }
        if let Err(error) = deps.runtime.remove_pod_sandbox(&sandbox.id).await {
            tracing::warn!(sandbox = sandbox.id, %error, "cannot remove the sandbox of a pod that is over");
        }
    }
    Ok(())
}

async fn remove(deps: &Deps, over: &HashSet<PodUid>) -> Result<(), String> {
    let listed = deps.runtime.list_containers(None).await.map_err(|e| e.to_string())?;
    // What no pod here knows is an orphan, which is taken away as a whole.
    let pods: HashMap<PodUid, Arc<Pod>> =
        deps.table.pods().into_iter().map(|view| (PodUid::of(&view.pod), view.pod)).collect();
    let all = listed.into_iter().filter_map(dead).filter(|dead| pods.contains_key(&dead.pod));
    for one in plan_removals(all.collect(), over, &deps.node.gc, deps.clock.now()) {
        let Some(pod) = pods.get(&one.pod) else { continue };
        match deps.runtime.remove_container(&one.id).await {
            Ok(()) => {
                tracing::info!(container = one.id, name = one.name, "removed a dead container");
                let id = ContainerId::from(&*one.id);
                remove_instance_logs(&deps.node, pod, &one.name, one.attempt, &id).await;
                if let Some(words) = one.words {
                    // Gone already, or gone with the pod.
                    let _ = tokio::fs::remove_file(words).await;
                }
            }
            Err(error) => {
                tracing::warn!(container = one.id, %error, "cannot remove a dead container");
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::testing::at;

    fn of(pod: &str, name: &str, created: i64) -> Dead {
        Dead {
            id: format!("{pod}-{name}-{created}"),
            pod: PodUid::from(pod),
            name: name.to_owned(),
            attempt: 0,
            created: at(created),
            words: None,
        }
    }

    #[test]
    fn the_oldest_go_where_there_are_more_than_are_kept() {
        let all = vec![of("p", "a", 1), of("p", "a", 2), of("p", "b", 3), of("q", "a", 4)];
        let plan = |limits: GcLimits, over: &[&str]| {
            let over = over.iter().map(|uid| PodUid::from(*uid)).collect();
            let mut gone: Vec<String> = plan_removals(all.clone(), &over, &limits, at(10))
                .into_iter()
                .map(|dead| dead.id)
                .collect();
            gone.sort();
            gone
        };
        let usual = GcLimits::default;
        assert_eq!(plan(usual(), &[]), ["p-a-1"], "one of each is kept");
        assert_eq!(plan(usual(), &["p"]), ["p-a-1", "p-a-2", "p-b-3"]);
        let many = GcLimits { dead_per_container: usize::MAX, ..usual() };
        assert!(plan(many.clone(), &[]).is_empty());
        let young = GcLimits { dead_min_age: Duration::from_secs(9), ..usual() };
        assert!(plan(young.clone(), &[]).is_empty(), "the only one that is old enough is kept");
        assert_eq!(plan(young, &["p"]), ["p-a-1"]);
        let in_all = |most| GcLimits { dead_in_all: Some(most), ..many.clone() };
        assert_eq!(plan(in_all(4), &[]), [""; 0]);
        assert_eq!(plan(in_all(3), &[]), ["p-a-1"], "of whom there are most");
        assert_eq!(plan(in_all(1), &[]), ["p-a-1", "p-a-2", "p-b-3"]);
        assert_eq!(plan(in_all(0), &[]).len(), 4);
    }
}
