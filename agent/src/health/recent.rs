//! The last Events of a node in a cluster, for `longshore status` and `longshore top`: the API
//! server may be away, and then nobody else has them.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::ObjectReference;

use super::status::EventLine;
use crate::report::{EventSink, EventType};

/// Events kept.
const KEPT: usize = 100;

/// Passes Events on and keeps the last ones.
pub struct RecentEvents {
    onward: Arc<dyn EventSink>,
    kept: Mutex<VecDeque<EventLine>>,
}

impl RecentEvents {
    /// Passes on to `onward`.
    pub fn new(onward: Arc<dyn EventSink>) -> Self {
        Self { onward, kept: Mutex::default() }
    }

    /// The newest last.
    pub fn lines(&self) -> Vec<EventLine> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }
}

impl EventSink for RecentEvents {
    fn record(&self, regarding: ObjectReference, kind: EventType, reason: &str, message: String) {
        self.record_annotated(regarding, kind, reason, message, BTreeMap::new());
    }

    fn record_annotated(
        &self,
        regarding: ObjectReference,
        kind: EventType,
        reason: &str,
        message: String,
        annotations: BTreeMap<String, String>,
    ) {
        let part = |part: &Option<String>| part.clone().unwrap_or_default();
        let mut line = EventLine {
            last: Timestamp::now().to_string(),
            kind: match kind {
                EventType::Normal => "Normal".into(),
                EventType::Warning => "Warning".into(),
            },
            object: match &regarding.namespace {
                Some(namespace) => {
                    format!("{} {namespace}/{}", part(&regarding.kind), part(&regarding.name))
                }
                None => format!("{} {}", part(&regarding.kind), part(&regarding.name)),
            },
            reason: reason.to_owned(),
            message: message.clone(),
            count: 1,
        };
        {
            let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
            let same = kept.iter().position(|old| {
                (&old.object, &old.reason, &old.message)
                    == (&line.object, &line.reason, &line.message)
            });
            if let Some(old) = same.and_then(|at| kept.remove(at)) {
                line.count += old.count;
            }
            if kept.len() == KEPT {
                kept.pop_front();
            }
            kept.push_back(line);
        }
        self.onward.record_annotated(regarding, kind, reason, message, annotations);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Count(Mutex<usize>);

    impl EventSink for Count {
        fn record(&self, _: ObjectReference, _: EventType, _: &str, _: String) {
            *self.0.lock().unwrap() += 1;
        }
    }

    #[test]
    fn the_last_events_are_kept_and_repeats_counted() {
        let onward = Arc::new(Count::default());
        let recent = RecentEvents::new(onward.clone());
        let pod = |name: &str| ObjectReference {
            kind: Some("Pod".into()),
            namespace: Some("d".into()),
            name: Some(name.into()),
            ..Default::default()
        };
        recent.record(pod("a"), EventType::Warning, "BackOff", "m".into());
        for n in 0..KEPT - 1 {
            recent.record(pod(&format!("p{n}")), EventType::Normal, "Started", String::new());
        }
        recent.record(pod("a"), EventType::Warning, "BackOff", "m".into());
        let lines = recent.lines();
        assert_eq!(lines.len(), KEPT);
        let last = lines.last().unwrap();
        assert_eq!((&*last.object, last.count, &*last.kind), ("Pod d/a", 2, "Warning"));
        recent.record(pod("new"), EventType::Normal, "Started", String::new());
        let lines = recent.lines();
        assert_eq!((lines.len(), &*lines[0].object), (KEPT, "Pod d/p1"));
        assert_eq!(*onward.0.lock().unwrap(), KEPT + 2);
    }
}
