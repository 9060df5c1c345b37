//! Events to the API server, as kubelet writes them: core/v1, repeats counted, floods cut off.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::Duration;

use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::Client;
use kube::api::{Patch, PatchParams, PostParams};
use serde_json::json;
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::api::backoff::Backoff;
use crate::api::{self, REQUEST_TIMEOUT};
use crate::report::{EventSink, EventType};
use crate::token_bucket::TokenBucket;

/// Events waiting to be sent; more are dropped.
const QUEUE: usize = 1024;
/// Events remembered for counting repeats (client-go: 4096).
const REMEMBERED: usize = 4096;
/// One object may cause this many Events at once ...
const BURST: f64 = 25.0;
/// ... and one more each time this passes (client-go's spam filter).
const REFILL: Duration = Duration::from_secs(300);
/// Tries of one Event (client-go: 12).
const TRIES: u32 = 12;
/// Longest message (the API's limit is 1024).
const MAX_MESSAGE: usize = 1024;
/// What writes these Events, by the name that dashboards and people filter for.
const COMPONENT: &str = "kubelet";

struct Recorded {
    regarding: ObjectReference,
    kind: EventType,
    reason: String,
    message: String,
    annotations: BTreeMap<String, String>,
    at: jiff::Timestamp,
}

/// Sends Events to the API server.
pub struct ClusterEvents {
    queue: mpsc::Sender<Recorded>,
}

impl ClusterEvents {
    /// Over `client`, on behalf of node `host`, at most `per_second` (0: no limit) with bursts of
    /// `burst`.
    pub fn new(client: Client, host: &str, per_second: u32, burst: u32) -> Self {
        let (queue, rx) = mpsc::channel(QUEUE);
        let sender = Sender {
            client,
            host: host.to_owned(),
            memory: Memory::default(),
            pace: (per_second > 0).then(|| {
                TokenBucket::new(f64::from(burst.max(1)), Duration::from_secs(1) / per_second)
            }),
        };
        tokio::spawn(sender.run(rx));
        Self { queue }
    }
}

impl EventSink for ClusterEvents {
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
        let (at, reason) = (jiff::Timestamp::now(), reason.to_owned());
        let recorded = Recorded { regarding, kind, reason, message, annotations, at };
        if self.queue.try_send(recorded).is_err() {
            tracing::debug!("too many Events wait for the API server; one is dropped");
        }
    }
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct Same {
    object: (String, String, String, String),
    kind: EventType,
    reason: String,
    message: String,
}

#[derive(Clone)]
struct Sent {
    name: String,
    namespace: String,
    count: i32,
}

#[derive(Default)]
struct Memory {
    sent: HashMap<Same, Sent>,
    order: VecDeque<Same>,
    spam: HashMap<(String, String), TokenBucket>,
}

impl Memory {
    fn allows(&mut self, event: &Recorded, now: Instant) -> bool {
        let object = &event.regarding;
        let key = (
            object.namespace.clone().unwrap_or_default(),
            object.uid.clone().or_else(|| object.name.clone()).unwrap_or_default(),
        );
        if self.spam.len() > REMEMBERED {
            self.spam.retain(|_, bucket| !bucket.is_full(now));
        }
        self.spam.entry(key).or_insert_with(|| TokenBucket::new(BURST, REFILL)).take(now)
    }

    fn remember(&mut self, same: Same, sent: Sent) {
        if self.sent.insert(same.clone(), sent).is_none() {
            self.order.push_back(same);
        }
        while self.order.len() > REMEMBERED {
            if let Some(old) = self.order.pop_front() {
                self.sent.remove(&old);
            }
        }
    }
}

struct Sender {
    client: Client,
    host: String,
    memory: Memory,
    pace: Option<TokenBucket>,
}

impl Sender {
    async fn run(mut self, mut queue: mpsc::Receiver<Recorded>) {
        while let Some(event) = queue.recv().await {
            if !self.memory.allows(&event, Instant::now()) {
                tracing::debug!(reason = event.reason, "an object causes too many Events");
                continue;
            }
            if let Some(pace) = &mut self.pace {
                let wait = pace.wait(Instant::now());
                if !wait.is_zero() {
                    tokio::time::sleep(wait).await;
                }
            }
            self.send(event).await;
        }
    }

    async fn send(&mut self, event: Recorded) {
        let object = &event.regarding;
        let same = Same {
            object: (
                object.kind.clone().unwrap_or_default(),
                object.namespace.clone().unwrap_or_default(),
                object.uid.clone().or_else(|| object.name.clone()).unwrap_or_default(),
                object.field_path.clone().unwrap_or_default(),
            ),
            kind: event.kind,
            reason: event.reason.clone(),
            message: event.message.clone(),
        };
        let mut backoff = Backoff::new(Duration::from_millis(500), Duration::from_secs(10));
        let mut before = self.memory.sent.get(&same).cloned();
        for _ in 0..TRIES {
            let outcome = match &before {
                Some(sent) => self.count(sent, event.at).await,
                None => self.create(&event).await,
            };
            match outcome {
                Ok(sent) => {
                    self.memory.remember(same, sent);
                    return;
                }
                // The Event of before has expired.
                Err(error) if error.code() == Some(404) && before.is_some() => before = None,
                Err(error) if error.is_retryable() => {
                    tracing::debug!(%error, "an Event is sent again");
                    tokio::time::sleep(backoff.next_delay()).await;
                }
                Err(error) => {
                    tracing::debug!(%error, reason = event.reason, "an Event is refused");
                    return;
                }
            }
        }
    }

    async fn create(&self, event: &Recorded) -> Result<Sent, api::ApiError> {
        let new = new_event(event, &self.host);
        let namespace = new.metadata.namespace.clone().unwrap_or_default();
        let events: kube::Api<Event> = kube::Api::namespaced(self.client.clone(), &namespace);
        let params = PostParams::default();
        let what = format!("create Event {}", event.reason);
        api::timed(what, REQUEST_TIMEOUT, events.create(&params, &new)).await?;
        Ok(Sent { name: new.metadata.name.unwrap_or_default(), namespace, count: 1 })
    }

    async fn count(&self, sent: &Sent, at: jiff::Timestamp) -> Result<Sent, api::ApiError> {
        let events: kube::Api<Event> = kube::Api::namespaced(self.client.clone(), &sent.namespace);
        let count = sent.count.saturating_add(1);
        let patch = Patch::Strategic(json!({"count": count, "lastTimestamp": Time(at)}));
        let params = PatchParams::default();
        let what = format!("count Event {}", sent.name);
        api::timed(what, REQUEST_TIMEOUT, events.patch(&sent.name, &params, &patch)).await?;
        Ok(Sent { count, ..sent.clone() })
    }
}

fn new_event(event: &Recorded, host: &str) -> Event {
    let object = &event.regarding;
    let namespace = object.namespace.clone().filter(|n| !n.is_empty());
    let namespace = namespace.unwrap_or_else(|| "default".to_owned());
    let nanos = event.at.as_nanosecond();
    let mut message = event.message.clone();
    if message.len() > MAX_MESSAGE {
        let mut end = MAX_MESSAGE;
        while !message.is_char_boundary(end) {
            end -= 1;
        }
        message.truncate(end);
    }
    Event {
        metadata: ObjectMeta {
            name: Some(format!("{}.{nanos:x}", object.name.as_deref().unwrap_or_default())),
            namespace: Some(namespace),
            annotations: Some(event.annotations.clone()).filter(|all| !all.is_empty()),
            ..ObjectMeta::default()
        },
        involved_object: object.clone(),
        reason: Some(event.reason.clone()),
        message: Some(message),
        type_: Some(
            match event.kind {
                EventType::Normal => "Normal",
                EventType::Warning => "Warning",
            }
            .to_owned(),
        ),
        source: Some(EventSource {
            component: Some(COMPONENT.to_owned()),
            host: Some(host.to_owned()),
        }),
        reporting_component: Some(COMPONENT.to_owned()),
        reporting_instance: Some(host.to_owned()),
        count: Some(1),
        first_timestamp: Some(Time(event.at)),
        last_timestamp: Some(Time(event.at)),
        ..Event::default()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn recorded(message: &str) -> Recorded {
        Recorded {
            regarding: ObjectReference { name: Some("p".into()), ..Default::default() },
            kind: EventType::Normal,
            reason: "R".into(),
            message: message.into(),
            annotations: BTreeMap::new(),
            at: jiff::Timestamp::from_second(1).unwrap(),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn one_object_is_cut_off_and_let_through_again_later() {
        let mut memory = Memory::default();
        let start = Instant::now();
        let passed = (0..100).filter(|_| memory.allows(&recorded("m"), start)).count();
        assert_eq!(passed, 25);
        assert!(!memory.allows(&recorded("m"), start + REFILL / 2));
        assert!(memory.allows(&recorded("m"), start + REFILL));
    }

    #[test]
    fn long_messages_are_cut_between_characters() {
        let event = new_event(&recorded(&"é".repeat(1000)), "host");
        assert_eq!(event.message.unwrap().len(), 1024);
        assert_eq!(event.metadata.namespace.unwrap(), "default");
        assert_eq!(event.metadata.name.unwrap(), format!("p.{:x}", 1_000_000_000));
    }
}
