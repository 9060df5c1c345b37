//! Making the pod's sandbox, once its claims are prepared.

use std::sync::Arc;

use cri_shim::api;
use k8s_openapi::api::core::v1::Pod;

use super::{Done, Step, Worker};
use crate::dra::DraError;
use crate::ids::PodUid;
use crate::metrics::METRICS;
use crate::pod::config::dns::parse_resolv_conf;
use crate::pod::config::sandbox::sandbox_config;
use crate::pod::deps::Deps;
use crate::pod::facts::FAILED_CLAIMS;
use crate::pod::observed::SandboxId;
use crate::pod::qos::qos_class;
use crate::pod::spec::spec_of;
use crate::pod::userns;
use crate::report::EventType;

impl Worker {
    pub(super) fn create_sandbox(&mut self, attempt: u32, stop: Vec<SandboxId>) {
        let failed = match &self.facts.sandbox {
            Step::Failed(failure) => failure.count,
            _ => 0,
        };
        if !stop.is_empty() && failed == 0 {
            self.deps.pod_event(
                &self.pod,
                EventType::Normal,
                "SandboxChanged",
                "Pod sandbox changed, it will be killed and re-created.".into(),
            );
        }
        self.facts.sandbox = Step::Busy;
        let (deps, pod) = (self.deps.clone(), self.pod.clone());
        let task = self.begin_task(async move {
            if let Err(error) = deps.claims.prepare(&pod).await {
                return Done::Sandbox(failed, Err(SandboxFailure::claims(&error)));
            }
            let made = make(&deps, &pod, attempt, &stop).await.map(Box::new);
            METRICS.pod_sandbox_made(made.is_err());
            if spec_of(&pod).host_users == Some(false) {
                METRICS.user_namespaced_pod_started(made.is_err());
            }
            Done::Sandbox(failed, made.map_err(SandboxFailure::sandbox))
        });
        self.making = Some(task);
    }
}

/// A sandbox that was made, and from what.
#[derive(Debug)]
pub(super) struct Made {
    pub(super) status: api::PodSandboxStatus,
    pub(super) config: Arc<api::PodSandboxConfig>,
}

/// Why there is none, in kubelet's words.
#[derive(Clone, Debug)]
pub(super) struct SandboxFailure {
    pub(super) reason: &'static str,
    /// What failed.
    pub(super) what: &'static str,
    pub(super) message: String,
}

impl SandboxFailure {
    fn sandbox(message: String) -> Self {
        Self { reason: "FailedCreatePodSandBox", what: "create pod sandbox", message }
    }

    fn claims(error: &DraError) -> Self {
        let message = format!("prepare dynamic resources: {error}");
        Self { reason: FAILED_CLAIMS, what: "prepare dynamic resources", message }
    }
}

async fn make(
    deps: &Deps,
    pod: &Arc<Pod>,
    attempt: u32,
    stop: &[SandboxId],
) -> Result<Made, String> {
    for id in stop {
        deps.runtime.stop_pod_sandbox(id.as_str()).await.map_err(|e| e.to_string())?;
    }
    if !spec_of(pod).host_network.unwrap_or(false) {
        deps.network_ready().await;
    }
    let handler = handler(deps, pod).await?;
    let config = config(deps, pod, attempt, &handler).await?;
    let logs = config.log_directory.clone();
    tokio::fs::create_dir_all(&logs)
        .await
        .map_err(|e| format!("create log directory {logs}: {e}"))?;
    let kept = Arc::new(config.clone());
    let began = std::time::Instant::now();
    let run = deps.runtime.run_pod_sandbox(config, &handler).await;
    METRICS.sandbox_run(&handler, began.elapsed(), run.is_err());
    let id = run.map_err(|e| e.message)?;
    let response = deps.runtime.pod_sandbox_status(&id).await.map_err(|e| e.to_string())?;
    let status =
        response.status.ok_or_else(|| format!("the runtime sent no status of sandbox {id}"))?;
    Ok(Made { status, config: kept })
}

/// The runtime's name of the pod's RuntimeClass; empty is the default.
pub(super) async fn handler(deps: &Deps, pod: &Pod) -> Result<String, String> {
    let class = spec_of(pod).runtime_class_name.as_deref().filter(|name| !name.is_empty());
    let Some(class) = class else { return Ok(String::new()) };
    match deps.objects.runtime_handler(class).await {
        Ok(Some(handler)) => Ok(handler),
        Ok(None) => Err(format!("RuntimeClass {class:?} not found")),
        Err(error) => Err(error.to_string()),
    }
}

/// The configuration of the pod's sandbox number `attempt`, with its cgroup and its range of ids in
/// place.
pub(super) async fn config(
    deps: &Deps,
    pod: &Pod,
    attempt: u32,
    handler: &str,
) -> Result<api::PodSandboxConfig, String> {
    let userns = userns::options(deps, pod, handler).await.map_err(|e| e.to_string())?;
    let limits = deps.pod_limits(pod);
    let parent = deps
        .cgroups
        .ensure(&PodUid::of(pod), qos_class(pod), limits)
        .await
        .map_err(|e| e.to_string())?;
    let path = &deps.node.resolv_conf;
    let text = if path.as_os_str().is_empty() {
        String::new()
    } else {
        tokio::fs::read_to_string(path)
            .await
            .map_err(|e| format!("read resolver configuration {}: {e}", path.display()))?
    };
    let host = parse_resolv_conf(&text);
    sandbox_config(pod, attempt, &deps.node, &host, (&parent, limits), &userns)
        .map_err(|e| e.to_string())
}
