//! Container events, in the order things happened, to every `GetContainerEvents` stream.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::broadcast;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::BroadcastStream;
use tonic::Status;
use tonic::codegen::BoxStream;

use super::Shim;
use super::store::Sandbox;
use crate::api::{ContainerEventResponse, ContainerEventType};
use crate::monitor::record;

/// Events a slow stream may be behind before it is ended, so that its client lists again.
const BACKLOG: usize = 4096;

/// The source of the streams.
pub struct Events {
    sender: broadcast::Sender<Arc<ContainerEventResponse>>,
    /// Held from looking at the pod to sending what was seen: no event is older than the one before
    /// it in the stream. A kubelet drops those that are.
    in_order: Mutex<()>,
}

impl Default for Events {
    fn default() -> Self {
        Events { sender: broadcast::Sender::new(BACKLOG), in_order: Mutex::new(()) }
    }
}

impl Events {
    /// A stream of what happens from now on.
    pub fn stream(&self) -> BoxStream<ContainerEventResponse> {
        let events = BroadcastStream::new(self.sender.subscribe());
        Box::pin(events.map(|event| match event {
            Ok(event) => Ok(ContainerEventResponse::clone(&event)),
            Err(lag) => Err(Status::resource_exhausted(format!(
                "the event stream fell behind ({lag}); list the containers and open a new one"
            ))),
        }))
    }
}

impl Shim {
    /// Tells what happened to a container, or to a sandbox (by its id), with the state of the
    /// whole sandbox at this moment.
    pub fn emit(&self, kind: ContainerEventType, id: &str, sandbox_id: &str) {
        if self.events.sender.receiver_count() > 0 {
            self.emit_of(kind, id, self.store.find_sandbox(sandbox_id).as_deref());
        }
    }

    /// The same, where the store may not know the sandbox any more.
    pub fn emit_of(&self, kind: ContainerEventType, id: &str, sandbox: Option<&Sandbox>) {
        if self.events.sender.receiver_count() == 0 {
            return;
        }
        let _in_order = self.events.in_order.lock().unwrap_or_else(PoisonError::into_inner);
        let containers = sandbox.map(|s| self.store.containers_of(&s.id)).unwrap_or_default();
        let event = ContainerEventResponse {
            container_id: id.to_owned(),
            container_event_type: kind as i32,
            created_at: record::now(),
            pod_sandbox_status: sandbox.map(|s| self.sandbox_status(s)),
            containers_statuses: containers.iter().map(|c| self.container_status(c)).collect(),
        };
        // No stream is no error.
        let _ = self.events.sender.send(Arc::new(event));
    }
}
