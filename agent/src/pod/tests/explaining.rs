//! What a worker says of its own pod.

use super::super::explain::{Explanation, render};
use super::super::{ExplainError, PodQuery};
use super::*;
use crate::runtime::ExecOutput;
use crate::runtime::fake::Behaviour;

fn query(uid: &str) -> PodQuery {
    PodQuery { key: NamespacedName::new("default", &format!("pod-{uid}")), uid: None }
}

async fn explained(rig: &Rig, uid: &str) -> Explanation {
    rig.handle.explain(query(uid), Duration::from_secs(5)).await.unwrap()
}

/// The one reason about `object`.
fn about<'a>(explanation: &'a Explanation, object: &str) -> &'a super::super::explain::Reason {
    let found: Vec<_> = explanation.reasons.iter().filter(|r| r.object == object).collect();
    assert_eq!(found.len(), 1, "{object}: {explanation:#?}");
    found[0]
}

#[tokio::test(start_paused = true)]
async fn all_is_well_with_a_pod_that_is_ready() {
    let rig = Rig::new().await;
    rig.set(&named("a", ONE)).await;
    rig.until_ready("a").await;
    let well = explained(&rig, "a").await;
    assert!(well.well && well.ready && well.reasons.is_empty(), "{well:#?}");
    assert_eq!((&*well.uid, well.source.as_deref()), ("a", Some("manifest")));
    assert!(
        render(&well).starts_with("pod default/pod-a runs and is ready\n"),
        "{}",
        render(&well)
    );
    // By UID it is the same pod.
    let by_uid =
        PodQuery { key: NamespacedName::new("default", "a"), uid: Some(PodUid::from("a")) };
    assert_eq!(rig.handle.explain(by_uid, Duration::from_secs(5)).await.unwrap(), well);
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_nobody_names_is_an_error() {
    let rig = Rig::new().await;
    rig.until("synced", |r| r.handle.table().health().synced).await;
    let error = rig.handle.explain(query("x"), Duration::from_secs(5)).await.unwrap_err();
    assert_eq!(error, ExplainError::Unknown("default/pod-x".into()));
}

#[tokio::test(start_paused = true)]
async fn a_failed_pull_names_the_image_and_the_time_left() {
    let rig = Rig::new().await;
    let spec = r#"{"initContainers":[
        {"name":"i","image":"none:1","imagePullPolicy":"Never"},
        {"name":"j","image":"img:1","imagePullPolicy":"Never"}],
      "containers":[{"name":"c","image":"img:1","imagePullPolicy":"Never"}]}"#;
    rig.set(&named("a", spec)).await;
    rig.until("told", |r| r.reasons().contains(&"ErrImageNeverPull".into())).await;
    rig.sleep(1).await;
    let e = explained(&rig, "a").await;
    assert!(!e.well && !e.ready);
    let image = about(&e, "init container i, image none:1 (1 of 2)");
    assert!(image.cause.starts_with("ErrImageNeverPull: "), "{}", image.cause);
    assert!(image.next_step.contains("image import"), "{}", image.next_step);
    let left = image.retry_in_seconds.unwrap();
    assert!((1..=10).contains(&left), "{left}");
    let others = about(&e, "containers j, c");
    assert_eq!(others.cause, "not made yet, waits for init container i");
    assert!(e.plans_again_at.is_some());
}

#[tokio::test(start_paused = true)]
async fn a_crash_loop_tells_the_last_end_and_the_time_left() {
    let rig = Rig::new().await;
    rig.set(&named("a", ONE)).await;
    rig.until_ready("a").await;
    for _ in 0..2 {
        rig.runtime.exit("c", 7);
        rig.sleep(1).await;
    }
    let e = explained(&rig, "a").await;
    let reason = about(&e, "container c");
    assert!(reason.cause.starts_with("CrashLoopBackOff: ended with exit code 7"), "{reason:#?}");
    assert!(reason.cause.contains("waits 10s between restarts"), "{reason:#?}");
    assert!(reason.retry_in_seconds.is_some_and(|left| (1..10).contains(&left)), "{reason:#?}");
}

#[tokio::test(start_paused = true)]
async fn a_probe_that_fails_is_told_with_its_last_words() {
    let rig = Rig::new().await;
    let said =
        |code| ExecOutput { exit_code: code, stdout: b"no way".to_vec(), stderr: Vec::new() };
    rig.runtime.on_exec("ready", said(1));
    let spec = r#"{"containers":[{"name":"c","image":"img:1","imagePullPolicy":"Never",
      "readinessProbe":{"exec":{"command":["ready"]},"periodSeconds":2}}]}"#;
    rig.set(&named("a", spec)).await;
    rig.until_phase("a", "Running").await;
    rig.sleep(9).await;
    let e = explained(&rig, "a").await;
    let reason = about(&e, "container c");
    assert!(reason.cause.starts_with("readiness probe does not succeed; last, "), "{reason:#?}");
    assert!(reason.cause.ends_with("in a row): no way"), "{reason:#?}");
    assert!(!reason.cause.contains("(1 in a row)"), "{reason:#?}");
    assert!(render(&e).starts_with("pod default/pod-a runs but is not ready\n"), "{}", render(&e));
}

#[tokio::test(start_paused = true)]
async fn the_pod_network_and_volumes_hold_containers_back() {
    let rig = Rig::new().await;
    rig.network.send_replace(false);
    rig.world.recorded.lock().unwrap().mount_fails = true;
    rig.set(&named("a", ONE)).await;
    rig.until("told", |r| r.reasons().contains(&"FailedMount".into())).await;
    let e = explained(&rig, "a").await;
    assert!(about(&e, "pod network").cause.contains("podCIDR"));
    let volumes = about(&e, "volumes");
    assert!(volumes.cause.starts_with("FailedMount: ") && volumes.retry_in_seconds.is_some());
    assert!(e.planned.contains(&"in progress: make the sandbox".into()), "{:?}", e.planned);
    assert_eq!(about(&e, "container c").cause, "not made yet, waits for what is named above");
    // Nothing is left of it once it is over.
    rig.world.recorded.lock().unwrap().mount_fails = false;
    rig.network.send_replace(true);
    rig.until_ready("a").await;
    assert!(explained(&rig, "a").await.reasons.is_empty());
}

#[tokio::test(start_paused = true)]
async fn an_end_in_progress_tells_what_it_waits_for() {
    let rig = Rig::new().await;
    let pod = named("a", ONE);
    rig.set(&pod).await;
    rig.until_ready("a").await;
    let slow = Behaviour { ends_in: Duration::from_secs(60), ..Behaviour::default() };
    rig.runtime.behave("c", slow);
    rig.set(&deleted(&pod, 30)).await;
    rig.sleep(5).await;
    let e = explained(&rig, "a").await;
    assert_eq!((&*e.worker, e.well), ("Terminating", false));
    let reason = about(&e, "pod");
    assert!(reason.cause.ends_with("waits for container c to end"), "{reason:#?}");
    assert!(reason.retry_in_seconds.is_some_and(|left| (1..=25).contains(&left)), "{reason:#?}");
}

#[tokio::test(start_paused = true)]
async fn a_gate_that_nobody_opens_is_named() {
    let rig = Rig::new().await;
    let spec = r#"{"readinessGates":[{"conditionType":"example.com/gate"}],
      "containers":[{"name":"c","image":"img:1","imagePullPolicy":"Never"}]}"#;
    rig.set(&named("a", spec)).await;
    rig.until("containers ready", |r| {
        r.status("a").is_some_and(|s| condition(&s, "ContainersReady") == Some("True"))
    })
    .await;
    let e = explained(&rig, "a").await;
    assert!(about(&e, "readiness gates").cause.contains("example.com/gate"));
    assert!(!e.well);
}
