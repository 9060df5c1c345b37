//! One probe of one container instance, asked over and over.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{ObjectReference, Probe};

use super::verdict::Tally;
use super::{Outcome, Place, check};
use crate::metrics::{METRICS, ProbeLabels};
use crate::pod::clock::Clock;
use crate::pod::explain::Checked;
use crate::pod::facts::ProbeKind;
use crate::report::{EventSink, EventType};

/// One probe of one running instance.
pub struct ProbeTarget {
    /// Where to ask.
    pub place: Place,
    /// What to ask.
    pub probe: Probe,
    /// Which probe it is.
    pub kind: ProbeKind,
    /// The verdict that already stands.
    pub healthy: Option<bool>,
    /// Whom Events are about.
    pub regarding: ObjectReference,
    /// How long the container runs already.
    pub age: Duration,
    /// The instance ran before this agent started: the first check is put off by a random part of
    /// a period, so that an agent restart does not ask everybody at once.
    pub adopted: bool,
    /// The time.
    pub clock: Arc<dyn Clock>,
    /// Where to leave what came of it.
    pub last: Arc<LastCheck>,
}

/// What came of a probe last, for whoever asks why a pod is not ready.
#[derive(Debug, Default)]
pub struct LastCheck(Mutex<Option<Checked>>);

/// Most of an answer that is kept here, in characters.
const KEPT: usize = 400;

impl LastCheck {
    /// The last check, if there was one.
    pub fn get(&self) -> Option<Checked> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, outcome: &Outcome, at: Timestamp) {
        let short = |text: &String| text.chars().take(KEPT).collect::<String>();
        let outcome = match outcome {
            Outcome::Success => Outcome::Success,
            Outcome::Warning(text) => Outcome::Warning(short(text)),
            Outcome::Failure(text) => Outcome::Failure(short(text)),
            Outcome::Unknown(text) => Outcome::Unknown(short(text)),
        };
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let before = last.as_ref().map_or(0, |last| last.failures);
        let failures = match outcome {
            Outcome::Success | Outcome::Warning(_) => 0,
            Outcome::Failure(_) => before.saturating_add(1),
            Outcome::Unknown(_) => before,
        };
        *last = Some(Checked { at, outcome, failures });
    }
}

fn seconds(value: Option<i32>, default: u64) -> u64 {
    value.and_then(|v| u64::try_from(v).ok()).unwrap_or(default)
}

/// Asks until there is nothing more to ask, and calls `turned` each time the verdict changes.
pub async fn run_probe(
    target: ProbeTarget,
    events: Arc<dyn EventSink>,
    turned: impl Fn(bool) + Send,
) {
    let period = Duration::from_secs(seconds(target.probe.period_seconds, 10).max(1));
    let delay = Duration::from_secs(seconds(target.probe.initial_delay_seconds, 0));
    let mut first = delay.saturating_sub(target.age);
    if target.adopted {
        first = first.max(period.mul_f64(fastrand::f64()));
    }
    if !first.is_zero() {
        tokio::time::sleep(first).await;
    }
    let counted = Counted::new(&target);
    let mut tally = Tally::new(target.kind, &target.probe, target.healthy);
    let mut ticks = tokio::time::interval(period);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let began = std::time::Instant::now();
        let outcome = check(&target.place, &target.probe).await;
        counted.count(&outcome, began.elapsed());
        target.last.set(&outcome, target.clock.now());
        report(&target, events.as_ref(), &outcome);
        if let Some(healthy) = tally.count(&outcome) {
            turned(healthy);
        }
        if tally.finished() {
            return;
        }
    }
}

/// The probe's metrics, which go when it is asked no more.
struct Counted(ProbeLabels);

impl Counted {
    fn new(target: &ProbeTarget) -> Self {
        let pod = &target.regarding;
        let container = pod.field_path.as_deref().unwrap_or_default();
        let container = container.split_once('{').map_or(container, |(_, name)| name);
        Self(ProbeLabels {
            probe_type: target.kind.title().to_owned(),
            result: String::new(),
            container: container.trim_end_matches('}').to_owned(),
            pod: pod.name.clone().unwrap_or_default(),
            namespace: pod.namespace.clone().unwrap_or_default(),
            pod_uid: pod.uid.clone().unwrap_or_default(),
        })
    }

    fn count(&self, outcome: &Outcome, took: Duration) {
        let (result, took) = match outcome {
            Outcome::Success | Outcome::Warning(_) => ("successful", Some(took)),
            Outcome::Failure(_) => ("failed", None),
            Outcome::Unknown(_) => ("unknown", Some(took)),
        };
        METRICS.probed(&ProbeLabels { result: result.to_owned(), ..self.0.clone() }, took);
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        METRICS.forget_probe(&self.0);
    }
}

fn report(target: &ProbeTarget, events: &dyn EventSink, outcome: &Outcome) {
    let title = target.kind.title();
    let (reason, message) = match outcome {
        Outcome::Success => return,
        Outcome::Warning(text) => ("ProbeWarning", format!("{title} probe warning: {text}")),
        Outcome::Failure(text) => ("Unhealthy", format!("{title} probe failed: {text}")),
        Outcome::Unknown(text) => {
            ("Unhealthy", format!("{title} probe errored and resulted in unknown state: {text}"))
        }
    };
    events.record(target.regarding.clone(), EventType::Warning, reason, message);
}
