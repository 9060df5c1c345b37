//! Container events, in the order things happened, to every `GetContainerEvents` stream.
//!
//! A connected client loses none: what it has not taken yet waits for it, up to [`MAX_WAITING`].
//! A client that is further behind than that gets all that waits, in order, and then an error that
//! tells it to list and to connect again, rather than a stream with a gap it cannot see.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use prost::Message;
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::Status;
use tonic::codegen::BoxStream;

use super::Shim;
use super::store::Sandbox;
use crate::api::{ContainerEventResponse, ContainerEventType};
use crate::monitor::record;

/// What may wait for one client, in bytes of encoded events.
const MAX_WAITING: usize = 16 << 20;

/// The source of the streams.
#[derive(Default)]
pub struct Events {
    subscribers: Mutex<Vec<Subscriber>>,
    /// Held from looking at the pod to sending what was seen: no event is older than the one before
    /// it in the stream. A kubelet drops those that are.
    in_order: Mutex<()>,
}

struct Subscriber {
    events: UnboundedSender<Waiting>,
    /// Bytes that wait.
    waiting: Arc<AtomicUsize>,
}

enum Waiting {
    Event(Arc<ContainerEventResponse>, usize),
    FellBehind,
}

impl Events {
    /// A stream of what happens from now on.
    pub fn stream(&self) -> BoxStream<ContainerEventResponse> {
        let (sender, receiver) = unbounded_channel();
        let waiting = Arc::new(AtomicUsize::new(0));
        self.lock().push(Subscriber { events: sender, waiting: waiting.clone() });
        Box::pin(UnboundedReceiverStream::new(receiver).map(move |next| match next {
            Waiting::Event(event, size) => {
                waiting.fetch_sub(size, Ordering::Relaxed);
                Ok(Arc::unwrap_or_clone(event))
            }
            Waiting::FellBehind => Err(Status::resource_exhausted(format!(
                "the event stream was more than {} MiB behind; list the containers and open a new \
                 one",
                MAX_WAITING >> 20
            ))),
        }))
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Subscriber>> {
        self.subscribers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether anybody listens; forgets those who have gone.
    fn heard(&self) -> bool {
        let mut subscribers = self.lock();
        subscribers.retain(|s| !s.events.is_closed());
        !subscribers.is_empty()
    }

    fn send(&self, event: ContainerEventResponse) {
        let size = event.encoded_len();
        let event = Arc::new(event);
        self.lock().retain(|subscriber| {
            if subscriber.waiting.fetch_add(size, Ordering::Relaxed) + size > MAX_WAITING {
                let _ = subscriber.events.send(Waiting::FellBehind);
                return false;
            }
            subscriber.events.send(Waiting::Event(event.clone(), size)).is_ok()
        });
    }
}

impl Shim {
    /// Tells what happened to a container, or to a sandbox (by its id), with the state of the
    /// whole sandbox at this moment.
    pub fn emit(&self, kind: ContainerEventType, id: &str, sandbox_id: &str) {
        if self.events.heard() {
            self.emit_of(kind, id, self.store.find_sandbox(sandbox_id).as_deref());
        }
    }

    /// The same, where the store may not know the sandbox any more.
    pub fn emit_of(&self, kind: ContainerEventType, id: &str, sandbox: Option<&Sandbox>) {
        if !self.events.heard() {
            return;
        }
        let _in_order = self.events.in_order.lock().unwrap_or_else(PoisonError::into_inner);
        let containers = sandbox.map(|s| self.store.containers_of(&s.id)).unwrap_or_default();
        self.events.send(ContainerEventResponse {
            container_id: id.to_owned(),
            container_event_type: kind as i32,
            created_at: record::now(),
            pod_sandbox_status: sandbox.map(|s| self.sandbox_status(s)),
            containers_statuses: containers.iter().map(|c| self.container_status(c)).collect(),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(n: usize, length: usize) -> ContainerEventResponse {
        let container_id = format!("{n} {}", "x".repeat(length));
        ContainerEventResponse { container_id, ..Default::default() }
    }

    fn number(event: &ContainerEventResponse) -> Option<usize> {
        event.container_id.split_once(' ')?.0.parse().ok()
    }

    #[tokio::test]
    async fn a_slow_client_gets_all_in_order_or_a_whole_beginning_and_an_error() {
        let events = Events::default();
        let (mut slow, mut slower) = (events.stream(), events.stream());
        for n in 0..10_000 {
            events.send(event(n, 100));
        }
        for n in 0..10_000 {
            let next = slow.next().await.unwrap().unwrap();
            assert_eq!(number(&next), Some(n));
        }
        for n in 10_000..10_020 {
            events.send(event(n, 1 << 20));
        }
        let mut expected = 0;
        let error = loop {
            match slower.next().await.unwrap() {
                Ok(next) => assert_eq!(number(&next), Some(expected)),
                Err(error) => break error,
            }
            expected += 1;
        };
        assert_eq!(error.code(), tonic::Code::ResourceExhausted);
        assert!((10_010..10_016).contains(&expected), "{expected}");
        assert!(slower.next().await.is_none());
        drop(slow);
        assert!(!events.heard());
    }
}
