//! Lifecycle hooks: what a container asks to be done after its start and before its end.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{ContainerPort, LifecycleHandler};

use crate::probe::http::check_http;
use crate::probe::{Outcome, resolve_port};
use crate::runtime::Runtime;

/// Where a hook is run.
pub(crate) struct HookPlace {
    pub(crate) runtime: Arc<dyn Runtime>,
    pub(crate) container_id: String,
    pub(crate) pod_ip: Option<IpAddr>,
    pub(crate) ports: Vec<ContainerPort>,
}

/// Runs the hook to its end. The caller limits the time.
pub(crate) async fn run_hook(hook: &LifecycleHandler, place: &HookPlace) -> Result<(), String> {
    if let Some(exec) = &hook.exec {
        let command = exec.command.as_deref().unwrap_or_default();
        let output = place
            .runtime
            .exec_sync(&place.container_id, command, Duration::ZERO)
            .await
            .map_err(|e| e.to_string())?;
        return if output.exit_code == 0 {
            Ok(())
        } else {
            Err(format!("command {command:?} exited with {}", output.exit_code))
        };
    }
    if let Some(get) = &hook.http_get {
        let port = resolve_port(&get.port, &place.ports)?;
        return match check_http(get, port, place.pod_ip).await {
            Outcome::Success | Outcome::Warning(_) => Ok(()),
            Outcome::Failure(why) | Outcome::Unknown(why) => Err(why),
        };
    }
    if let Some(sleep) = &hook.sleep {
        tokio::time::sleep(Duration::from_secs(u64::try_from(sleep.seconds).unwrap_or(0))).await;
        return Ok(());
    }
    // As in kubelet: tcpSocket is taken by the API for old objects' sake, and never ran.
    Err("invalid handler: only exec, httpGet and sleep can be run".into())
}
