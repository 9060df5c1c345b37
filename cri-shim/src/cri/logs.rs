//! ReopenContainerLog, which the kubelet calls after it renamed a log to rotate it.

use tonic::Status;

use super::container_list::running;
use super::{PATIENCE, Shim, internal};
use crate::api;
use crate::monitor::protocol::Request;

impl Shim {
    pub(super) async fn reopen_container_log(
        &self,
        request: api::ReopenContainerLogRequest,
    ) -> Result<api::ReopenContainerLogResponse, Status> {
        let container = self.store.container(&request.container_id)?;
        running(&container)?;
        let reopen = Request::ReopenLog { container: container.id.clone() };
        let call = container.sandbox.monitor.call(&reopen);
        tokio::time::timeout(PATIENCE, call)
            .await
            .map_err(|_| Status::deadline_exceeded("the pod's monitor does not answer"))?
            .map_err(|e| internal("reopening the log", e))?;
        Ok(api::ReopenContainerLogResponse {})
    }
}
