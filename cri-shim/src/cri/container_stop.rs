//! StopContainer: the stop signal, a wait, then SIGKILL to everything in the container.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tonic::Status;

use super::store::Container;
use super::{PATIENCE, Shim, internal};
use crate::api;
use crate::crash::point;
use crate::monitor::protocol::Request;

impl Shim {
    pub(super) async fn stop_container(
        self: &Arc<Self>,
        request: api::StopContainerRequest,
    ) -> Result<api::StopContainerResponse, Status> {
        let Some(container) = self.store.named_container(&request.container_id)? else {
            return Ok(api::StopContainerResponse {});
        };
        let grace = Duration::from_secs(u64::try_from(request.timeout).unwrap_or(0));
        let this = self.clone();
        tokio::spawn(async move { this.stop(&container, grace).await })
            .await
            .map_err(|e| internal("stopping the container", e))??;
        Ok(api::StopContainerResponse {})
    }

    /// Ends a container within `grace` and waits for its end. Does not hold the container's lock
    /// while it waits, so that another call with a shorter grace can cut this one short.
    pub(super) async fn stop(&self, container: &Container, grace: Duration) -> Result<(), Status> {
        self.settle(container).await;
        if container.state() != api::ContainerState::ContainerRunning {
            return Ok(());
        }
        if !grace.is_zero() {
            let signal = container.record().stop_signal;
            self.signal(container, signal, false).await?;
            point("stop container: signalled");
            if tokio::time::timeout(grace, container.exited()).await.is_ok() {
                return Ok(());
            }
        }
        self.signal(container, libc::SIGKILL, true).await?;
        point("stop container: killed");
        if tokio::time::timeout(PATIENCE, container.exited()).await.is_ok() {
            return Ok(());
        }
        Err(Status::deadline_exceeded(format!(
            "container {} was sent SIGKILL and is still there; it may wait for a device or a \
             network file system",
            container.id
        )))
    }

    /// Ends a container at once.
    pub(super) async fn stop_now(&self, container: &Container) -> Result<(), Status> {
        self.stop(container, Duration::ZERO).await
    }

    /// Lets a start that is under way end, one way or the other.
    pub(super) async fn settle(&self, container: &Container) {
        let mut status = container.status.subscribe();
        let _ = tokio::time::timeout(PATIENCE, status.wait_for(|s| !s.starting)).await;
    }

    async fn signal(&self, container: &Container, signal: i32, all: bool) -> Result<(), Status> {
        let request = Request::Kill { container: container.id.clone(), signal, all };
        let call = container.sandbox.monitor.call(&request);
        match tokio::time::timeout(PATIENCE, call).await {
            Ok(Ok(_)) => Ok(()),
            // A monitor that died takes this way: its watcher kills and records, maybe only now.
            _ if container.state() == api::ContainerState::ContainerExited => Ok(()),
            Ok(Err(error)) if nobody_answers(&error) => {
                match tokio::time::timeout(PATIENCE, container.exited()).await {
                    Ok(_) => Ok(()),
                    Err(_) => Err(internal("signalling the container", error)),
                }
            }
            Ok(Err(error)) => Err(internal("signalling the container", error)),
            Err(_) => Err(Status::deadline_exceeded("the pod's monitor does not answer")),
        }
    }
}

/// Whether a call failed because the monitor is gone, not because of what it said.
fn nobody_answers(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionRefused
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::BrokenPipe
            | io::ErrorKind::UnexpectedEof
            | io::ErrorKind::NotFound
    )
}
