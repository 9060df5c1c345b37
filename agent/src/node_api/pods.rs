//! `/pods`, `/runningpods/` and `/configz`.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use cri_shim::api::{ContainerState, PodSandboxState};
use k8s_openapi::api::core::v1::{Container, Pod, PodSpec};
use serde_json::{Value, json};

use super::{Failure, Shared};
use crate::pod::observed::names;

fn list(pods: Vec<Pod>) -> Result<Json<Value>, Failure> {
    let items: Vec<Value> = pods
        .iter()
        .map(|pod| {
            let mut value = serde_json::to_value(pod)?;
            if let Value::Object(fields) = &mut value {
                // Items of a list do not repeat their kind.
                fields.remove("apiVersion");
                fields.remove("kind");
            }
            Ok(value)
        })
        .collect::<Result<_, serde_json::Error>>()
        .map_err(|error| Failure::internal(error.to_string()))?;
    Ok(Json(json!({"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": items})))
}

/// The pods that should run here, with their statuses.
pub(super) async fn pods(State(shared): State<Arc<Shared>>) -> Result<Json<Value>, Failure> {
    let mut pods: Vec<Pod> = shared
        .sync
        .table()
        .pods()
        .into_iter()
        .filter(|view| view.source.is_some())
        .map(|view| {
            let mut pod = Pod::clone(&view.pod);
            pod.status = Some(view.status);
            pod
        })
        .collect();
    let key = |pod: &Pod| (pod.metadata.namespace.clone(), pod.metadata.name.clone());
    pods.sort_by_key(key);
    list(pods)
}

/// The pods that the runtime has running containers or sandboxes of, by name and image only.
pub(super) async fn running(State(shared): State<Arc<Shared>>) -> Result<Json<Value>, Failure> {
    let (sandboxes, containers) = tokio::try_join!(
        shared.runtime.list_pod_sandboxes(None),
        shared.runtime.list_containers(None)
    )
    .map_err(|error| Failure::internal(error.to_string()))?;
    let mut pods: BTreeMap<String, Pod> = BTreeMap::new();
    let mut pod_of = |labels: &std::collections::HashMap<String, String>,
                      container: Option<Container>| {
        let Some(uid) = labels.get(names::POD_UID) else { return };
        let pod = pods.entry(uid.clone()).or_insert_with(|| {
            let mut pod = Pod::default();
            pod.metadata.uid = Some(uid.clone());
            pod.metadata.name = labels.get(names::POD_NAME).cloned();
            pod.metadata.namespace = labels.get(names::POD_NAMESPACE).cloned();
            pod.spec = Some(PodSpec::default());
            pod
        });
        if let (Some(spec), Some(container)) = (&mut pod.spec, container) {
            spec.containers.push(container);
        }
    };
    for sandbox in &sandboxes {
        if sandbox.state() == PodSandboxState::SandboxReady {
            pod_of(&sandbox.labels, None);
        }
    }
    for container in &containers {
        if container.state() != ContainerState::ContainerRunning {
            continue;
        }
        let image = container.image.as_ref().map(|image| image.image.clone());
        let name = container.labels.get(names::CONTAINER_NAME).cloned().unwrap_or_default();
        pod_of(&container.labels, Some(Container { name, image, ..Container::default() }));
    }
    list(pods.into_values().collect())
}

/// The configuration in effect.
pub(super) async fn configz(State(shared): State<Arc<Shared>>) -> Json<Value> {
    Json(json!({"kubeletconfig": shared.config.configz}))
}
