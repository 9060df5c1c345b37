//! Tables of statuses, at the lowest floor.

use crate::device::Statuses;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::PodStatus;

use super::condition;
use crate::node_context::NodeContext;
use crate::pod::facts::Facts;
use crate::pod::observed::{Container, ContainerState, Observed};
use crate::pod::status::{Ending, StatusInput, pod_status};
use crate::pod::testing::{at, exited, instance, pod, running, sandbox};

fn status(
    spec: &str,
    containers: Vec<Container>,
    ending: Ending,
    previous: Option<&PodStatus>,
    now: Timestamp,
) -> PodStatus {
    let mut observed = Observed { sandboxes: vec![sandbox(0)], containers };
    observed.sort();
    pod_status(StatusInput {
        pod: &pod(spec),
        observed: &observed,
        facts: &Facts::default(),
        backing_off: &[],
        previous,
        ending,
        verdict: None,
        devices: &Statuses::default(),
        node: &NodeContext::new("n", vec!["192.168.0.1".parse().unwrap()]),
        runtime_name: "r",
        start_time: at(0),
        now,
    })
}

#[test]
fn phases() {
    let done = |name: &str, code| exited(name, 0, at(1), at(2), code);
    let up = |name: &str| running(name, 0, at(1));
    let two = r#""containers":[{"name":"a"},{"name":"b"}]"#;
    let init = r#""initContainers":[{"name":"i"}],"containers":[{"name":"a"}]"#;
    let side =
        r#""initContainers":[{"name":"s","restartPolicy":"Always"}],"containers":[{"name":"a"}]"#;
    let not = Ending::Not;
    for (policy, spec, containers, ending, phase) in [
        ("Always", two, vec![], not, "Pending"),
        ("Always", two, vec![up("a")], not, "Pending"),
        ("Always", two, vec![up("a"), up("b")], not, "Running"),
        ("Always", two, vec![up("a"), done("b", 1)], not, "Running"),
        ("Always", two, vec![done("a", 0), done("b", 0)], not, "Running"),
        ("OnFailure", two, vec![done("a", 0), done("b", 1)], not, "Running"),
        ("OnFailure", two, vec![done("a", 0), done("b", 0)], not, "Succeeded"),
        ("Never", two, vec![done("a", 0), done("b", 1)], not, "Failed"),
        ("Never", two, vec![done("a", 0), up("b")], not, "Running"),
        ("Always", two, vec![done("a", 143), done("b", 0)], Ending::Terminated, "Failed"),
        ("Always", two, vec![done("a", 0), done("b", 0)], Ending::Terminated, "Succeeded"),
        ("Always", init, vec![up("i")], not, "Pending"),
        ("Always", init, vec![done("i", 1)], not, "Pending"),
        ("Never", init, vec![done("i", 1)], not, "Failed"),
        ("Always", init, vec![done("i", 0), up("a")], not, "Running"),
        ("Always", side, vec![up("s")], not, "Pending"),
        ("Always", side, vec![up("s"), up("a")], not, "Running"),
        ("Never", side, vec![up("s"), done("a", 0)], not, "Running"),
        ("Never", side, vec![done("s", 137), done("a", 0)], not, "Succeeded"),
    ] {
        let spec = format!(r#"{{"restartPolicy":"{policy}",{spec}}}"#);
        let found = status(&spec, containers, ending, None, at(3));
        assert_eq!(found.phase.as_deref(), Some(phase), "{spec} {ending:?}");
    }
}

#[test]
fn conditions_keep_their_times() {
    let spec = r#"{"containers":[{"name":"a"}]}"#;
    let first = status(spec, vec![], Ending::Not, None, at(1));
    assert_eq!(condition(&first, "Ready"), Some("False"));
    assert_eq!(condition(&first, "Initialized"), Some("True"));
    assert_eq!(condition(&first, "PodReadyToStartContainers"), Some("True"));
    let second = status(spec, vec![running("a", 0, at(4))], Ending::Not, Some(&first), at(5));
    let times: Vec<(String, Timestamp)> = second
        .conditions
        .unwrap()
        .into_iter()
        .map(|c| (c.type_, c.last_transition_time.unwrap().0))
        .collect();
    let expected = [
        ("PodReadyToStartContainers", at(1)),
        ("Initialized", at(1)),
        ("Ready", at(5)),
        ("ContainersReady", at(5)),
        ("PodScheduled", at(1)),
    ];
    assert_eq!(times, expected.map(|(kind, at)| (kind.to_owned(), at)));
}

#[test]
fn unready_containers_are_named() {
    let spec = r#"{"initContainers":[{"name":"i"}],"containers":[{"name":"a"},{"name":"b"}]}"#;
    let found = status(spec, vec![running("i", 0, at(1))], Ending::Not, None, at(2));
    let conditions = found.conditions.unwrap();
    let message = |kind: &str| {
        let c = conditions.iter().find(|c| c.type_ == kind).unwrap();
        (c.reason.clone().unwrap(), c.message.clone().unwrap())
    };
    assert_eq!(
        message("Initialized"),
        ("ContainersNotInitialized".into(), "containers with incomplete status: [i]".into())
    );
    assert_eq!(
        message("Ready"),
        ("ContainersNotReady".into(), "containers with unready status: [a b]".into())
    );
    let a = &found.container_statuses.unwrap()[0];
    let waiting = a.state.as_ref().unwrap().waiting.as_ref().unwrap();
    assert_eq!(waiting.reason.as_deref(), Some("PodInitializing"));
}

#[test]
fn readiness_gates_wait_for_their_owner() {
    let spec = r#"{"readinessGates":[{"conditionType":"x/y"}],"containers":[{"name":"a"}]}"#;
    let found = status(spec, vec![running("a", 0, at(1))], Ending::Not, None, at(2));
    assert_eq!(condition(&found, "ContainersReady"), Some("True"));
    assert_eq!(condition(&found, "Ready"), Some("False"));
}

#[test]
fn what_was_before_shows_as_last_state() {
    let spec = r#"{"containers":[{"name":"a"}]}"#;
    let mut dead = exited("a", 4, at(1), at(2), 137);
    dead.reason = "OOMKilled".into();
    dead.termination_message = Some("so long".into());
    let found = status(spec, vec![dead, running("a", 5, at(3))], Ending::Not, None, at(4));
    let a = &found.container_statuses.as_ref().unwrap()[0];
    assert_eq!(a.restart_count, 5);
    let last = a.last_state.as_ref().unwrap().terminated.as_ref().unwrap();
    assert_eq!(last.reason.as_deref(), Some("OOMKilled"));
    assert_eq!(last.message.as_deref(), Some("so long"));
    assert_eq!(last.container_id.as_deref(), Some("r://a-4"));
    // The runtime has forgotten it: the status before remembers.
    let next = status(spec, vec![running("a", 5, at(3))], Ending::Not, Some(&found), at(5));
    assert_eq!(next.container_statuses.unwrap()[0].last_state, a.last_state);
}

#[test]
fn a_running_container_that_vanished_is_told_so() {
    let spec = r#"{"containers":[{"name":"a"}]}"#;
    let before = status(spec, vec![running("a", 0, at(1))], Ending::Not, None, at(2));
    let found = status(spec, vec![], Ending::Terminated, Some(&before), at(3));
    let a = &found.container_statuses.unwrap()[0];
    let state = a.state.as_ref().unwrap().terminated.as_ref().unwrap();
    assert_eq!((state.exit_code, state.reason.as_deref()), (137, Some("ContainerStatusUnknown")));
    let created = instance("a", 0, at(1), ContainerState::Created);
    let found = status(spec, vec![created], Ending::Not, None, at(3));
    assert!(found.container_statuses.unwrap()[0].state.as_ref().unwrap().waiting.is_some());
}

#[test]
fn what_was_said_of_a_phase_stays_with_it() {
    let spec = r#"{"containers":[{"name":"a"}]}"#;
    let up = || vec![running("a", 0, at(1))];
    let lost = PodStatus {
        phase: Some("Running".into()),
        reason: Some("NodeLost".into()),
        message: Some("not heard of".into()),
        ..PodStatus::default()
    };
    let same = status(spec, up(), Ending::Not, Some(&lost), at(3));
    assert_eq!((same.reason, same.message), (lost.reason.clone(), lost.message.clone()));
    let pending = PodStatus { phase: Some("Pending".into()), ..lost };
    let other = status(spec, up(), Ending::Not, Some(&pending), at(3));
    assert_eq!((other.reason, other.message), (None, None));
}

#[test]
fn a_pod_that_is_over_has_no_container_that_waits() {
    let ends = |status: &PodStatus| -> Vec<(String, Option<i32>)> {
        let lists = [&status.init_container_statuses, &status.container_statuses];
        let all = lists.into_iter().flatten().flatten();
        all.map(|s| {
            let end = s.state.as_ref().and_then(|s| s.terminated.as_ref());
            (s.name.clone(), end.map(|t| t.exit_code))
        })
        .collect()
    };
    let two = r#"{"containers":[{"name":"a"},{"name":"b"}]}"#;
    let init = r#"{"initContainers":[{"name":"i"},{"name":"j"}],"containers":[{"name":"a"}]}"#;
    let done = |name: &str, code| exited(name, 0, at(1), at(2), code);
    for (spec, containers, expected) in [
        (two, vec![done("a", 143)], vec![("a", Some(143)), ("b", Some(137))]),
        (two, vec![], vec![("a", Some(137)), ("b", Some(137))]),
        (init, vec![], vec![("i", Some(137)), ("j", None), ("a", None)]),
        (init, vec![done("i", 0)], vec![("i", Some(0)), ("j", None), ("a", None)]),
        (
            init,
            vec![done("i", 0), done("j", 0)],
            vec![("i", Some(0)), ("j", Some(0)), ("a", Some(137))],
        ),
    ] {
        let over = status(spec, containers, Ending::Terminated, None, at(3));
        let expected: Vec<_> = expected.into_iter().map(|(n, c)| (n.to_owned(), c)).collect();
        assert_eq!(ends(&over), expected, "{spec}");
        assert_eq!(over.phase.as_deref(), Some("Failed"), "{spec}");
    }
    let refused = PodStatus {
        phase: Some("Failed".into()),
        message: Some("Pod was rejected: no".into()),
        ..PodStatus::default()
    };
    let over = status(two, vec![], Ending::Terminated, Some(&refused), at(3));
    assert_eq!(ends(&over), [("a".to_owned(), None), ("b".to_owned(), None)]);
}
