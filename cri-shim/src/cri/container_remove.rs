//! RemoveContainer: stops what runs, then takes everything away.

use std::sync::Arc;

use tonic::Status;

use super::store::Container;
use super::{Shim, blocking, internal, poststop};
use crate::api::{self, ContainerEventType};
use crate::crash::point;
use crate::state::{ignore_absent, remove_directory};

impl Shim {
    pub(super) async fn remove_container(
        self: &Arc<Self>,
        request: api::RemoveContainerRequest,
    ) -> Result<api::RemoveContainerResponse, Status> {
        if let Some(container) = self.store.named_container(&request.container_id)? {
            let this = self.clone();
            tokio::spawn(async move { this.remove_one(&container).await })
                .await
                .map_err(|e| internal("removing the container", e))??;
        }
        Ok(api::RemoveContainerResponse {})
    }

    pub(super) async fn remove_one(
        self: &Arc<Self>,
        container: &Arc<Container>,
    ) -> Result<(), Status> {
        self.stop_now(container).await?;
        let _changing = container.changing.lock().await;
        if self.store.find_container(&container.id).is_none() {
            return Ok(());
        }
        poststop::run(self.layout.clone(), container.clone()).await;
        let (layout, snapshots) = (self.layout.clone(), self.snapshots.clone());
        let cgroup = container.record().cgroup.clone();
        let id = container.id.clone();
        // The cgroup before the record, which alone knows where it is. An abandoned start may have
        // left a process that is about to die.
        self.cgroups.kill(&cgroup);
        self.remove_cgroup(&cgroup).await;
        point("remove container: cgroup removed");
        blocking(move || {
            // The record first: what is left of an interrupted removal is then known for what it is.
            remove_directory(&layout.container(&id))
                .map_err(|e| internal("removing the container's directory", e))?;
            point("remove container: directory removed");
            ignore_absent(std::fs::remove_dir_all(layout.bundle(&id)))
                .map_err(|e| internal("removing the container's bundle", e))?;
            point("remove container: bundle removed");
            snapshots
                .remove(&id)
                .map_err(|e| internal("removing the container's root file system", e))
        })
        .await??;
        point("remove container: snapshot removed");
        container.end_told().await;
        // The event shows the pod without it.
        self.store.drop_container(&container.id);
        self.emit(ContainerEventType::ContainerDeletedEvent, &container.id, &container.sandbox.id);
        Ok(())
    }
}
