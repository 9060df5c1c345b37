//! Why a pod has not ended yet, and why one that has does not run again.

use jiff::Timestamp;

use super::{ExplainInput, Reason, containers, failed_whole, failure, left, span, whole};
use crate::pod::facts::Step;
use crate::pod::status::Verdict;
use crate::source::PodSource;

pub(super) fn terminating(input: &ExplainInput<'_>, kill_at: Option<Timestamp>) -> Reason {
    let why = match (&input.pod.metadata.deletion_timestamp, input.verdict) {
        (Some(at), _) => format!("is being deleted (since {})", whole(at.0)),
        (None, Some(_)) => "is being ended for the reason above".into(),
        (None, None) => match input.source {
            Some(PodSource::File) => {
                "is being ended: its manifest is gone, or its work is over".into()
            }
            Some(PodSource::Cluster) => {
                "is being ended: the object is gone, or its work is over".into()
            }
            None => "is being ended: no manifest and no object names it any more".to_owned(),
        },
    };
    let mut waits: Vec<String> = input
        .facts
        .killing
        .iter()
        .filter_map(|id| input.observed.container(id))
        .map(|c| format!("container {} to end", c.name))
        .collect();
    waits.sort();
    if input.facts.sandbox == Step::Busy {
        waits.push("a sandbox that was being made".into());
    }
    if input.facts.devices == Step::Busy {
        waits.push("devices that were being allocated".into());
    }
    if let Step::Failed(failed) = &input.facts.claims {
        return failure(
            "resource claims",
            failed,
            "its containers have ended; the DRA driver must take its claims back: see the log of the \
             driver's pod on this node",
            input.now,
        );
    }
    if input.facts.claims == Step::Busy {
        waits.push("the DRA drivers of its claims to take these back".into());
    }
    if input.facts.volumes == Step::Busy {
        waits.push("volumes that were being put in place".into());
    }
    waits.extend(input.facts.starting.iter().map(|name| format!("the start of container {name}")));
    let waits =
        if waits.is_empty() { String::new() } else { format!(", waits for {}", waits.join(", ")) };
    let next = match kill_at {
        Some(at) if at > input.now => {
            format!("SIGKILL in {}, when the grace period is over", span(left(at, input.now)))
        }
        _ => "the grace period is over: what still runs gets SIGKILL; a process that outlives it \
              hangs in the kernel (`ps` shows state D)"
            .to_owned(),
    };
    let reason = Reason::new("pod", format!("{why}{waits}"), next);
    match kill_at {
        Some(at) => reason.again(at, input.now),
        None => reason,
    }
}

pub(super) fn tearing_down(input: &ExplainInput<'_>, step: &Step) -> Reason {
    match step {
        Step::Failed(failed) => failure(
            "pod",
            failed,
            "its containers have ended; remove what holds the mount or the cgroup it names",
            input.now,
        ),
        _ => Reason::new(
            "pod",
            "its containers have ended; network, volumes and cgroup are being taken away",
            "wait; the object goes when nothing is left",
        ),
    }
}

pub(super) fn finished(input: &ExplainInput<'_>, phase: &str) -> Option<Reason> {
    if input.verdict.is_some() {
        return None;
    }
    let reason = input.status.and_then(|s| s.reason.as_deref());
    if let (Some(reason), message) =
        (reason, input.status.and_then(|s| s.message.clone()).unwrap_or_default())
    {
        return Some(failed_whole(&Verdict { message, ..Verdict::new(reason) }));
    }
    if phase == "Succeeded" {
        return Some(Reason::new("pod", "its work is done: all containers ended with 0", "none"));
    }
    let ended = containers::ended_badly(input);
    Some(Reason::new(
        "pod",
        format!("has ended and is not started again{ended}"),
        "`kubectl logs` (or the files in /var/log/pods) show the containers' last words",
    ))
}
