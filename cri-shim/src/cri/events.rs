//! Container events, in the order things happened, to every `GetContainerEvents` stream.

use std::sync::Arc;

use tokio::sync::broadcast;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::BroadcastStream;
use tonic::Status;
use tonic::codegen::BoxStream;

use super::Shim;
use crate::api::{ContainerEventResponse, ContainerEventType};
use crate::monitor::record;

/// Events a slow stream may be behind before it is ended, so that its client lists again.
const BACKLOG: usize = 4096;

/// The source of the streams.
pub struct Events(broadcast::Sender<Arc<ContainerEventResponse>>);

impl Default for Events {
    fn default() -> Self {
        Events(broadcast::Sender::new(BACKLOG))
    }
}

impl Events {
    /// A stream of what happens from now on.
    pub fn stream(&self) -> BoxStream<ContainerEventResponse> {
        let events = BroadcastStream::new(self.0.subscribe());
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
        if self.events.0.receiver_count() == 0 {
            return;
        }
        let sandbox = self.store.find_sandbox(sandbox_id);
        let event = ContainerEventResponse {
            container_id: id.to_owned(),
            container_event_type: kind as i32,
            created_at: record::now(),
            pod_sandbox_status: sandbox.map(|s| self.sandbox_status(&s)),
            containers_statuses: self
                .store
                .containers_of(sandbox_id)
                .iter()
                .map(|c| self.container_status(c))
                .collect(),
        };
        // No stream is no error.
        let _ = self.events.0.send(Arc::new(event));
    }
}
