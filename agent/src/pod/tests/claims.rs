//! Claims are prepared before a sandbox is made, and given back before a status says that the pod is
//! over.

use std::collections::{BTreeSet, HashSet};

use super::*;
use crate::device::Statuses;
use crate::dra::{DraError, PodClaims};

/// Claims of the pods named so.
#[derive(Default)]
pub(super) struct Claimed {
    pods: BTreeSet<PodUid>,
    fails: bool,
    hangs: bool,
    keeps: bool,
    /// What was asked, in order.
    asked: Vec<String>,
    /// Pods that have claims.
    held: BTreeSet<PodUid>,
    news: Option<broadcast::Sender<PodUid>>,
}

fn failure() -> DraError {
    DraError::NotRegistered("d.example".into())
}

#[async_trait]
impl PodClaims for World {
    async fn prepare(&self, pod: &Pod) -> Result<(), DraError> {
        let uid = PodUid::of(pod);
        let hangs = {
            let claimed = &mut self.recorded.lock().unwrap().claims;
            if !claimed.pods.contains(&uid) {
                return Ok(());
            }
            claimed.asked.push(format!("prepare {uid}"));
            if claimed.fails {
                return Err(failure());
            }
            claimed.held.insert(uid);
            claimed.hangs
        };
        if hangs {
            std::future::pending::<()>().await;
        }
        Ok(())
    }

    async fn unprepare(&self, pod: &PodUid) -> Result<(), DraError> {
        let claimed = &mut self.recorded.lock().unwrap().claims;
        claimed.asked.push(format!("unprepare {pod}"));
        if claimed.keeps {
            return Err(failure());
        }
        claimed.held.remove(pod);
        Ok(())
    }

    fn holds(&self, pod: &PodUid) -> bool {
        self.recorded.lock().unwrap().claims.held.contains(pod)
    }

    fn cdi_devices(&self, pod: &Pod, _: &Container) -> Result<Vec<String>, DraError> {
        let held = self.holds(&PodUid::of(pod));
        Ok(if held { vec!["v/k=1".to_owned()] } else { Vec::new() })
    }

    fn retain(&self, _: &HashSet<PodUid>) {}

    fn statuses(&self, _: &Pod) -> Statuses {
        Statuses::default()
    }

    fn news(&self) -> broadcast::Receiver<PodUid> {
        let claimed = &mut self.recorded.lock().unwrap().claims;
        claimed.news.get_or_insert_with(|| broadcast::Sender::new(8)).subscribe()
    }
}

fn claimed<T>(rig: &Rig, of: impl FnOnce(&mut Claimed) -> T) -> T {
    of(&mut rig.world.recorded.lock().unwrap().claims)
}

/// A node on which the pod `a` has a claim.
async fn rig() -> (Rig, Arc<Pod>) {
    let rig = Rig::new().await;
    claimed(&rig, |claimed| claimed.pods.insert(PodUid::from("a")));
    (rig, named("a", ONE))
}

fn sandboxes(rig: &Rig) -> usize {
    rig.runtime.calls().iter().filter(|call| call.starts_with("RunPodSandbox")).count()
}

#[tokio::test(start_paused = true)]
async fn no_sandbox_is_made_before_the_claims_are_prepared() {
    let (rig, pod) = rig().await;
    claimed(&rig, |claimed| claimed.fails = true);
    rig.set(&pod).await;
    rig.until("tried again", |r| claimed(r, |claimed| claimed.asked.len() >= 3)).await;
    assert_eq!(sandboxes(&rig), 0);
    let told =
        rig.events().into_iter().find(|(reason, _)| reason == "FailedPrepareDynamicResources");
    let (_, message) = told.unwrap();
    assert!(
        message.starts_with(
            "Failed to prepare dynamic resources: prepare dynamic resources: DRA driver d.example is \
             not registered"
        ),
        "{message}"
    );
    claimed(&rig, |claimed| claimed.fails = false);
    rig.until_ready("a").await;
    // Nothing was prepared for it, and its end asks nobody.
    claimed(&rig, |claimed| claimed.asked.clear());
    rig.set(&named("b", ONE)).await;
    rig.until_ready("b").await;
    rig.set(&deleted(&named("b", ONE), 1)).await;
    rig.until("gone", |r| r.gone("b")).await;
    assert_eq!(claimed(&rig, |claimed| claimed.asked.clone()), Vec::<String>::new());
}

#[tokio::test(start_paused = true)]
async fn a_pod_is_over_once_its_claims_are_given_back() {
    let (rig, pod) = rig().await;
    rig.set(&pod).await;
    rig.until_ready("a").await;
    claimed(&rig, |claimed| claimed.keeps = true);
    rig.set(&deleted(&pod, 1)).await;
    rig.until("tried again", |r| claimed(r, |claimed| claimed.asked.len() >= 3)).await;
    assert!(!rig.gone("a"));
    let phase = rig.status("a").unwrap().phase;
    assert!(!matches!(phase.as_deref(), Some("Succeeded" | "Failed")), "{phase:?}");
    assert!(rig.reasons().contains(&"FailedKillPod".to_owned()));
    claimed(&rig, |claimed| claimed.keeps = false);
    rig.until("gone", |r| r.gone("a")).await;
    assert_eq!(claimed(&rig, |claimed| claimed.held.len()), 0);
}

#[tokio::test(start_paused = true)]
async fn a_pod_whose_driver_hangs_can_be_deleted() {
    let (rig, pod) = rig().await;
    claimed(&rig, |claimed| claimed.hangs = true);
    rig.set(&pod).await;
    rig.until("asked", |r| claimed(r, |claimed| !claimed.asked.is_empty())).await;
    rig.set(&deleted(&pod, 30)).await;
    rig.until("gone", |r| r.gone("a")).await;
    assert_eq!(claimed(&rig, |claimed| claimed.asked.clone()), ["prepare a", "unprepare a"]);
    assert_eq!(sandboxes(&rig), 0);
}

#[tokio::test(start_paused = true)]
async fn a_restart_prepares_nothing_for_a_sandbox_that_is_there() {
    let (mut rig, pod) = rig().await;
    rig.set(&pod).await;
    rig.until_ready("a").await;
    rig.restart(std::slice::from_ref(&pod)).await;
    rig.until_ready("a").await;
    assert_eq!(claimed(&rig, |claimed| claimed.asked.clone()), ["prepare a"]);
    // A pod that went meanwhile gives back what it had.
    rig.restart(&[]).await;
    rig.until("given back", |r| claimed(r, |claimed| claimed.held.is_empty())).await;
}
