//! Node conditions from measurements, with kubelet's thresholds, reasons and messages. Pure.

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::NodeCondition;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

/// Which pressures there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pressure {
    /// memory.available.
    pub memory: bool,
    /// nodefs and imagefs, bytes and inodes.
    pub disk: bool,
    /// pid.available.
    pub pid: bool,
}

impl Pressure {
    /// Names of the conditions that hold.
    pub fn names(self) -> impl Iterator<Item = &'static str> {
        let all = [
            (self.memory, "MemoryPressure"),
            (self.disk, "DiskPressure"),
            (self.pid, "PIDPressure"),
        ];
        all.into_iter().filter_map(|(on, name)| on.then_some(name))
    }
}

/// When each pressure was last seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LastSeen {
    memory: Option<Timestamp>,
    disk: Option<Timestamp>,
    pid: Option<Timestamp>,
}

impl LastSeen {
    /// Notes `now`'s pressure; returns the pressure to report, which stays for `transition` after
    /// it was last seen (`evictionPressureTransitionPeriod`).
    pub fn note(
        &mut self,
        pressure: Pressure,
        now: Timestamp,
        transition: SignedDuration,
    ) -> Pressure {
        let held = |last: &mut Option<Timestamp>, seen: bool| {
            if seen {
                *last = Some(now);
            }
            last.is_some_and(|at| now == at || now.duration_since(at) < transition)
        };
        Pressure {
            memory: held(&mut self.memory, pressure.memory),
            disk: held(&mut self.disk, pressure.disk),
            pid: held(&mut self.pid, pressure.pid),
        }
    }
}

/// The four conditions in kubelet's order. `not_ready` says why pods cannot run; empty is ready.
/// `before` gives the times of conditions that do not change.
pub fn conditions(
    pressure: Pressure,
    not_ready: &[String],
    before: &[NodeCondition],
    now: Timestamp,
) -> Vec<NodeCondition> {
    let pressures = [
        (
            "MemoryPressure",
            pressure.memory,
            ("KubeletHasInsufficientMemory", "kubelet has insufficient memory available"),
            ("KubeletHasSufficientMemory", "kubelet has sufficient memory available"),
        ),
        (
            "DiskPressure",
            pressure.disk,
            ("KubeletHasDiskPressure", "kubelet has disk pressure"),
            ("KubeletHasNoDiskPressure", "kubelet has no disk pressure"),
        ),
        (
            "PIDPressure",
            pressure.pid,
            ("KubeletHasInsufficientPID", "kubelet has insufficient PID available"),
            ("KubeletHasSufficientPID", "kubelet has sufficient PID available"),
        ),
    ];
    let mut conditions: Vec<NodeCondition> = pressures
        .into_iter()
        .map(|(kind, on, bad, good)| {
            let (reason, message) = if on { bad } else { good };
            condition(kind, on, reason, message.to_owned(), before, now)
        })
        .collect();
    let (reason, message) = match not_ready {
        [] => ("KubeletReady", "kubelet is posting ready status".to_owned()),
        [one] => ("KubeletNotReady", one.clone()),
        several => ("KubeletNotReady", format!("[{}]", several.join(", "))),
    };
    conditions.push(condition("Ready", not_ready.is_empty(), reason, message, before, now));
    conditions
}

/// Gives conditions that are as they were `before` the time since when they are so.
pub fn keep_transitions(conditions: &mut [NodeCondition], before: &[NodeCondition]) {
    for condition in conditions {
        let same = before
            .iter()
            .find(|old| old.type_ == condition.type_ && old.status == condition.status);
        if let Some(since) = same.and_then(|old| old.last_transition_time.clone()) {
            condition.last_transition_time = Some(since);
        }
    }
}

fn condition(
    kind: &str,
    on: bool,
    reason: &str,
    message: String,
    before: &[NodeCondition],
    now: Timestamp,
) -> NodeCondition {
    let status = if on { "True" } else { "False" };
    let since = before
        .iter()
        .find(|c| c.type_ == kind && c.status == status)
        .and_then(|c| c.last_transition_time.clone());
    NodeCondition {
        type_: kind.to_owned(),
        status: status.to_owned(),
        reason: Some(reason.to_owned()),
        message: Some(message),
        last_heartbeat_time: Some(Time(now)),
        last_transition_time: Some(since.unwrap_or(Time(now))),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn a_pressure_stays_for_as_long_as_configured() {
        let five = SignedDuration::from_mins(5);
        let at = |s| Timestamp::from_second(s).unwrap();
        let (on, off) = (Pressure { disk: true, ..Pressure::default() }, Pressure::default());
        let mut last = LastSeen::default();
        assert_eq!(last.note(off, at(0), five), off);
        assert_eq!(last.note(on, at(10), five), on);
        assert_eq!(last.note(off, at(309), five), on);
        assert_eq!(last.note(off, at(310), five), off);
        let second = SignedDuration::from_secs(1);
        assert_eq!(last.note(on, at(400), second), on);
        assert_eq!(last.note(off, at(401), second), off);
    }

    #[test]
    fn a_restart_is_no_transition() {
        let at = |s| Timestamp::from_second(s).unwrap();
        let before = conditions(Pressure::default(), &[], &[], at(1));
        let full = Pressure { disk: true, ..Pressure::default() };
        let mut after = conditions(full, &[], &[], at(9));
        keep_transitions(&mut after, &before);
        for condition in &after {
            let since = if condition.type_ == "DiskPressure" { at(9) } else { at(1) };
            assert_eq!(condition.last_transition_time, Some(Time(since)), "{}", condition.type_);
        }
    }

    #[test]
    fn times_of_transition_stay_until_the_status_changes() {
        let at = |s| Timestamp::from_second(s).unwrap();
        let first = conditions(Pressure::default(), &[], &[], at(1));
        let ready = first.last().unwrap();
        assert_eq!((ready.type_.as_str(), ready.status.as_str()), ("Ready", "True"));
        assert_eq!(ready.message.as_deref(), Some("kubelet is posting ready status"));
        let second = conditions(Pressure::default(), &[], &first, at(2));
        assert_eq!(second[3].last_transition_time, Some(Time(at(1))));
        assert_eq!(second[3].last_heartbeat_time, Some(Time(at(2))));
        let broken = ["a".to_owned(), "b".to_owned()];
        let third = conditions(Pressure::default(), &broken, &second, at(3));
        assert_eq!(third[3].last_transition_time, Some(Time(at(3))));
        assert_eq!(third[3].reason.as_deref(), Some("KubeletNotReady"));
        assert_eq!(third[3].message.as_deref(), Some("[a, b]"));
    }
}
