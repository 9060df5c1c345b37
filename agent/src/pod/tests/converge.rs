//! Laws of `plan`: applied to a small model of a runtime it converges, plans nothing twice, and can
//! begin anew at any step.

use proptest::prelude::*;

use crate::pod::facts::{Facts, ReadyImage, Step};
use crate::pod::observed::{ContainerState, Observed, names};
use crate::pod::plan::{Action, plan, plan_end};
use crate::pod::testing::{at, instance, pod, sandbox};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Pod;

/// Applies one action to what is observed, as a runtime would; panics at what one would refuse.
fn apply(action: Action, observed: &mut Observed, facts: &mut Facts, now: Timestamp) {
    match action {
        Action::MountVolumes => {
            assert_ne!(facts.volumes, Step::Done, "volumes mounted twice");
            facts.volumes = Step::Done;
        }
        Action::CreateSandbox { attempt, stop } => {
            for old in &mut observed.sandboxes {
                assert!(stop.contains(&old.id), "an older sandbox is left as it is");
                old.ready = false;
            }
            assert!(observed.sandboxes.iter().all(|s| s.attempt != attempt), "reserved name");
            let mut new = sandbox(attempt);
            new.created_at = now;
            observed.sandboxes.push(new);
        }
        Action::EnsureImage { name } => {
            let image = ReadyImage {
                image_ref: "i".into(),
                uid: None,
                username: String::new(),
                volumes: Default::default(),
            };
            let before = facts.images.insert(name, (Step::Done, Some(image)));
            assert!(before.is_none_or(|(_, ready)| ready.is_none()), "image wanted twice");
        }
        Action::Start(start) => {
            observed.containers.retain(|c| !start.leftovers.contains(&c.id));
            let home = observed.sandboxes.iter().find(|s| s.id == start.sandbox).unwrap();
            assert!(home.ready, "started in a sandbox that is not ready");
            let twin = observed
                .containers
                .iter()
                .any(|c| *c.name == start.name && c.attempt == start.attempt);
            assert!(!twin, "{} {} is reserved", start.name, start.attempt);
            assert!(
                !observed
                    .containers
                    .iter()
                    .any(|c| *c.name == start.name && c.state == ContainerState::Running),
                "two instances of {} run",
                start.name
            );
            let mut new = instance(&start.name, start.attempt, now, ContainerState::Running);
            new.sandbox = start.sandbox;
            new.annotations.insert(names::BACKOFF.into(), start.backoff.to_string());
            observed.containers.push(new);
            facts.images.remove(&start.name);
        }
        Action::Reset { ids, .. } => {
            for gone in observed.containers.iter().filter(|c| ids.contains(&c.id)) {
                assert_ne!(gone.state, ContainerState::Running, "removed while it runs");
                let known = facts.known_restarts.entry(gone.name.to_string()).or_default();
                *known = (*known).max(gone.attempt + 1);
            }
            observed.containers.retain(|c| !ids.contains(&c.id));
        }
        Action::Kill { id, .. } => end(observed, &id.0, 143, now),
    }
    observed.sort();
}

fn end(observed: &mut Observed, id: &str, code: i32, now: Timestamp) {
    let found = observed.containers.iter_mut().find(|c| c.id.as_str() == id).unwrap();
    found.state = ContainerState::Exited;
    found.exit_code = code;
    found.finished_at = Some(now);
}

/// Plans and applies until nothing is left to do now. An agent that was killed has no facts.
fn settle(
    pod: &Pod,
    observed: &mut Observed,
    facts: &mut Facts,
    now: &mut Timestamp,
    kill_at: Option<usize>,
) -> usize {
    let mut steps = 0;
    for _ in 0..500 {
        let plan = plan(pod, observed, facts, *now, 300);
        let Some(action) = plan.actions.into_iter().next() else {
            match plan.wake_at {
                Some(at) if at > *now => {
                    *now = at;
                    continue;
                }
                Some(_) => panic!("planned to wake in the past, and to do nothing then"),
                None => return steps,
            }
        };
        apply(action, observed, facts, *now);
        // Init containers end well.
        let inits = pod.spec.as_ref().unwrap().init_containers.iter().flatten();
        for c in inits.filter(|c| c.restart_policy.is_none()) {
            let running = observed
                .latest(&c.name)
                .filter(|i| i.state == ContainerState::Running)
                .map(|i| i.id.clone());
            if let Some(id) = running {
                end(observed, id.as_str(), 0, *now);
            }
        }
        steps += 1;
        if kill_at == Some(steps) {
            *facts = Facts::default();
        }
        *now += SignedDuration::from_millis(10);
    }
    panic!("does not settle: {observed:#?}");
}

fn spec() -> impl Strategy<Value = String> {
    let policy = prop_oneof![Just("Always"), Just("OnFailure"), Just("Never")];
    (policy, 0..3usize, proptest::collection::vec(any::<bool>(), 0..3)).prop_map(
        |(policy, mains, inits)| {
            let inits: Vec<String> = inits
                .iter()
                .enumerate()
                .map(|(n, sidecar)| {
                    let restart = if *sidecar { r#","restartPolicy":"Always""# } else { "" };
                    format!(r#"{{"name":"i{n}","image":"x"{restart}}}"#)
                })
                .collect();
            let mains: Vec<String> =
                (0..=mains).map(|n| format!(r#"{{"name":"m{n}","image":"x"}}"#)).collect();
            format!(
                r#"{{"restartPolicy":"{policy}","initContainers":[{}],"containers":[{}]}}"#,
                inits.join(","),
                mains.join(",")
            )
        },
    )
}

/// `a` ends, and wants all to start again, before `b` was started: that comes first.
#[test]
fn all_are_started_before_all_restart() {
    let pod = pod(r#"{"restartPolicy":"Never","containers":[
            {"name":"a","image":"i","restartPolicy":"Never","restartPolicyRules":[
                {"action":"RestartAllContainers","exitCodes":{"operator":"In","values":[88]}}]},
            {"name":"b","image":"i"}]}"#);
    let (mut observed, mut facts, mut now) = (Observed::default(), Facts::default(), at(0));
    settle(&pod, &mut observed, &mut facts, &mut now, None);
    let b = observed.latest("b").unwrap().id.clone();
    observed.containers.retain(|c| c.id != b);
    let a = observed.latest("a").unwrap().id.clone();
    end(&mut observed, a.as_str(), 88, now);
    let actions = |facts: &Facts| plan(&pod, &observed, facts, now, 300).actions;
    let is_start = |action: &Action| match action {
        Action::EnsureImage { name } => name == "b",
        Action::Start(start) => start.name == "b",
        _ => false,
    };
    let planned = actions(&facts);
    assert!(!planned.is_empty() && planned.iter().all(is_start), "{planned:?}");
    // One that was started before and removed is not waited for, nor is any without a sandbox.
    facts.known_restarts.insert("b".to_owned(), 1);
    assert!(matches!(&actions(&facts)[..], [Action::Reset { .. }]));
    let (mut observed, mut facts) = (observed.clone(), Facts::default());
    settle(&pod, &mut observed, &mut facts, &mut now, None);
    for name in ["a", "b"] {
        let latest = observed.latest(name).unwrap();
        assert_eq!((latest.state, latest.attempt), (ContainerState::Running, 1), "{name}");
    }
}

proptest! {
    #[test]
    fn a_pod_comes_up_whenever_the_agent_is_killed(spec in spec(), kill_at in 0..12usize) {
        let pod = pod(&spec);
        let (mut observed, mut facts, mut now) = (Observed::default(), Facts::default(), at(0));
        settle(&pod, &mut observed, &mut facts, &mut now, Some(kill_at));
        let spec = pod.spec.as_ref().unwrap();
        for c in &spec.containers {
            let latest = observed.latest(&c.name).unwrap();
            prop_assert_eq!(latest.state, ContainerState::Running);
            prop_assert_eq!(latest.attempt, 0);
        }
        // Sidecars run, in one sandbox with the rest.
        for c in spec.init_containers.iter().flatten().filter(|c| c.restart_policy.is_some()) {
            prop_assert_eq!(observed.latest(&c.name).unwrap().state, ContainerState::Running);
        }
        prop_assert_eq!(observed.sandboxes.len(), 1);
        // And nothing more is planned, with or without memory.
        facts.volumes = Step::Done;
        prop_assert_eq!(plan(&pod, &observed, &facts, now, 300).actions, vec![]);
    }

    #[test]
    fn crashes_and_lost_sandboxes_are_overcome(
        spec in spec(),
        blows in proptest::collection::vec((0..3usize, 0..2i32, any::<bool>()), 1..6),
    ) {
        let pod = pod(&spec);
        let always = spec.contains(r#"{"restartPolicy":"Always","#);
        let (mut observed, mut facts, mut now) = (Observed::default(), Facts::default(), at(0));
        settle(&pod, &mut observed, &mut facts, &mut now, None);
        for (which, code, sandbox) in blows {
            let running: Vec<_> = observed
                .containers
                .iter()
                .filter(|c| c.state == ContainerState::Running)
                .map(|c| c.id.clone())
                .collect();
            if sandbox {
                for id in &running {
                    end(&mut observed, id.as_str(), 137, now);
                }
                observed.sandboxes.iter_mut().for_each(|s| s.ready = false);
            } else if let Some(id) = running.get(which) {
                end(&mut observed, id.as_str(), code, now);
            }
            settle(&pod, &mut observed, &mut facts, &mut now, None);
        }
        if always {
            for c in &pod.spec.as_ref().unwrap().containers {
                prop_assert_eq!(observed.latest(&c.name).unwrap().state, ContainerState::Running);
            }
        }
    }

    #[test]
    fn an_end_ends_everything_sidecars_last(spec in spec()) {
        let pod = pod(&spec);
        let (mut observed, mut facts, mut now) = (Observed::default(), Facts::default(), at(0));
        settle(&pod, &mut observed, &mut facts, &mut now, None);
        let mut order = Vec::new();
        loop {
            let stage = plan_end(&pod, &observed, &facts);
            if stage.is_empty() {
                break;
            }
            for id in stage {
                order.push(observed.container(&id).unwrap().name.to_string());
                end(&mut observed, id.as_str(), 143, now);
            }
        }
        prop_assert!(!observed.any_alive());
        let first_sidecar = order.iter().position(|n| n.starts_with('i'));
        if let Some(at) = first_sidecar {
            prop_assert!(order[at..].iter().all(|n| n.starts_with('i')), "{order:?}");
            prop_assert!(order[at..].windows(2).all(|w| w[0] > w[1]), "{order:?}");
        }
    }
}
