//! `RestartAllContainers`: the end of one container starts the pod again in its sandbox.

use k8s_openapi::api::core::v1::PodCondition;

use super::*;
use crate::runtime::fake::Behaviour;

/// Two init containers, a sidecar, a worker whose exit 88 starts all again, and one that is Never.
const SPEC: &str = r#"{"restartPolicy":"Never","initContainers":[
    {"name":"i","image":"img:1","imagePullPolicy":"Never"},
    {"name":"s","image":"img:1","imagePullPolicy":"Never","restartPolicy":"Always"},
    {"name":"j","image":"img:1","imagePullPolicy":"Never"}],
  "containers":[
    {"name":"c","image":"img:1","imagePullPolicy":"Never","restartPolicy":"Never","restartPolicyRules":[
      {"action":"RestartAllContainers","exitCodes":{"operator":"In","values":[88]}}]},
    {"name":"d","image":"img:1","imagePullPolicy":"Never"}]}"#;

fn told(rig: &Rig) -> Option<PodCondition> {
    let all = rig.status("a")?.conditions?;
    all.into_iter().find(|c| c.type_ == "AllContainersRestarting")
}

/// Restart counts of i, s, j, c, d once all run (or have run).
fn counts(rig: &Rig) -> Option<[i32; 5]> {
    is_ready(&rig.status("a")?)
        .then(|| ["i", "s", "j", "c", "d"].map(|name| rig.container("a", name).restart_count))
}

async fn ready(rig: &Rig, restarts: i32) {
    rig.until(&format!("ready with {restarts} restarts"), |r| counts(r) == Some([restarts; 5]))
        .await;
}

fn inits_end_well(rig: &Rig) {
    for name in ["i", "j"] {
        let ends = Behaviour { runs_for: Some(Duration::from_millis(100)), ..Behaviour::default() };
        rig.runtime.behave(name, ends);
    }
}

/// The calls after the first `skip` that start or remove, as `verb container`.
fn starts(rig: &Rig, skip: usize) -> Vec<String> {
    let calls = rig.runtime.calls();
    let made = calls[skip..].iter().filter_map(|c| c.strip_prefix("CreateContainer "));
    made.map(str::to_owned).collect()
}

#[tokio::test(start_paused = true)]
async fn one_end_starts_the_whole_pod_again() {
    let rig = Rig::new().await;
    inits_end_well(&rig);
    rig.set(&named("a", SPEC)).await;
    ready(&rig, 0).await;
    let off = told(&rig).unwrap();
    assert_eq!((off.status.as_str(), off.reason), ("False", None));
    let (sandboxes, before) = (rig.runtime.held().0, rig.runtime.calls().len());
    let first = starts(&rig, 0);

    rig.runtime.exit("c", 88);
    ready(&rig, 1).await;
    assert_eq!(rig.status("a").unwrap().phase.as_deref(), Some("Running"));
    assert_eq!(rig.runtime.held().0, sandboxes, "the sandbox is kept");
    assert_eq!(starts(&rig, before).len(), first.len(), "each was made once more");
    assert_eq!(told(&rig).unwrap().status, "False");
    let last = rig.container("a", "d").last_state.unwrap().terminated.unwrap();
    assert_eq!(last.reason.as_deref(), Some("RestartingAllContainers"));
    assert_eq!(last.exit_code, 137);

    // What was told on the way: the condition, and never another phase than these.
    let recorded = rig.world.recorded.lock().unwrap().statuses.clone();
    let all: Vec<_> = recorded.iter().map(|(_, s)| s).collect();
    let on = all.iter().flat_map(|s| s.conditions.iter().flatten());
    let on = on.filter(|c| c.type_ == "AllContainersRestarting" && c.status == "True");
    assert!(on.clone().count() > 0);
    for condition in on {
        assert_eq!(condition.reason.as_deref(), Some("RestartAllContainersStarted"));
        assert_eq!(condition.message.as_deref(), Some("container exited with restart policy rule"));
    }
    assert!(all.iter().all(|s| s.phase.as_deref() != Some("Failed")));
    let initialized = |s: &&&PodStatus| condition(s, "Initialized") == Some("True");
    let first_initialized = all.iter().position(|s| initialized(&s)).unwrap();
    assert!(all[first_initialized..].iter().all(|s| initialized(&s)), "initialized stays");

    // Any other end is what the policy says.
    rig.runtime.exit("c", 3);
    rig.sleep(5).await;
    assert_eq!(rig.status("a").unwrap().phase.as_deref(), Some("Running"));
    assert_eq!(rig.container("a", "d").restart_count, 1);
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_starts_again_and_again_waits() {
    let rig = Rig::new().await;
    inits_end_well(&rig);
    rig.set(&named("a", SPEC)).await;
    for restarts in 0..2 {
        ready(&rig, restarts).await;
        rig.runtime.exit("c", 88);
    }
    // The second time the container that causes it waits, as any that crashes.
    rig.until("back-off", |r| {
        let state = r.container("a", "c").state.unwrap_or_default();
        state.waiting.and_then(|w| w.reason).as_deref() == Some("CrashLoopBackOff")
    })
    .await;
    ready(&rig, 2).await;
}

#[tokio::test(start_paused = true)]
async fn a_restart_of_the_agent_in_the_midst_changes_nothing() {
    let mut rig = Rig::new().await;
    inits_end_well(&rig);
    let pod = named("a", SPEC);
    rig.set(&pod).await;
    ready(&rig, 0).await;
    // The first removal is refused, so that it stops half-way.
    rig.runtime.fail_next("RemoveContainer", "busy");
    rig.runtime.exit("c", 88);
    rig.until("refused", |r| r.runtime.calls().iter().any(|c| c.starts_with("RemoveContainer")))
        .await;
    rig.restart(std::slice::from_ref(&pod)).await;
    ready(&rig, 1).await;
    rig.set(&deleted(&pod, 1)).await;
    rig.until("gone", |r| r.gone("a")).await;
    assert_eq!(rig.runtime.held(), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn one_that_was_not_started_yet_restarts_as_well() {
    let rig = Rig::new().await;
    inits_end_well(&rig);
    // `c` ends while `d` is not made yet.
    let ends = Behaviour { runs_for: Some(Duration::ZERO), exit_code: 88, ..Behaviour::default() };
    rig.runtime.behave("c", ends);
    rig.runtime.delay("CreateContainer", Duration::from_millis(200));
    rig.set(&named("a", SPEC)).await;
    let started = |r: &Rig| {
        let calls = r.runtime.calls();
        let made = calls.iter().position(|c| c == "CreateContainer c 0");
        made.is_some_and(|at| calls[at..].iter().any(|c| c.starts_with("StartContainer")))
    };
    rig.until("started", started).await;
    rig.runtime.behave("c", Behaviour::default());
    ready(&rig, 1).await;
    assert!(starts(&rig, 0).contains(&"d 0".to_owned()));
}

#[tokio::test(start_paused = true)]
async fn one_that_cannot_start_holds_no_restart_of_all_back() {
    let rig = Rig::new().await;
    inits_end_well(&rig);
    let spec = SPEC.replace(r#"{"name":"d","image":"img:1""#, r#"{"name":"d","image":"none:1""#);
    rig.set(&named("a", &spec)).await;
    let runs = |r: &Rig, restarts| {
        let c = r.container("a", "c");
        c.restart_count == restarts && c.state.is_some_and(|state| state.running.is_some())
    };
    rig.until("up", |r| r.status("a").is_some_and(|_| runs(r, 0))).await;
    rig.runtime.exit("c", 88);
    rig.until("up again", |r| runs(r, 1)).await;
}
