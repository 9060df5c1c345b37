//! Logs of pods on disk: folders, links by container, rotation for runtimes that leave it to the
//! agent.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::Pod;

use super::observed::{Container, ContainerId};
use crate::ids::NamespacedName;
use crate::node_context::NodeContext;

/// Restart counts that log files of earlier instances tell of: one more than the highest number.
pub(crate) fn known_restarts(pod_logs: &Path) -> BTreeMap<String, u32> {
    let mut known = BTreeMap::new();
    let Ok(containers) = std::fs::read_dir(pod_logs) else { return known };
    for container in containers.flatten() {
        let Ok(logs) = std::fs::read_dir(container.path()) else { continue };
        let highest = logs
            .flatten()
            .filter_map(|l| l.file_name().into_string().ok())
            .filter_map(|name| name.split('.').next()?.parse::<u32>().ok())
            .max();
        if let (Some(highest), Ok(name)) = (highest, container.file_name().into_string()) {
            known.insert(name, highest + 1);
        }
    }
    known
}

/// `/var/log/containers/<pod>_<namespace>_<container>-<id>.log`, which log collectors read.
fn link_path(node: &NodeContext, pod: &Pod, container: &str, id: &str) -> PathBuf {
    let key = NamespacedName::of_pod(pod);
    let mut stem = format!("{}_{}_{container}", key.name, key.namespace);
    // File names end at 255 bytes.
    stem.truncate(251 - id.len().min(200) - 1);
    node.container_logs_dir.join(format!("{stem}-{id}.log"))
}

/// Links the log of a started container. A link that fails costs nothing but itself.
pub(crate) async fn link_log(
    node: &NodeContext,
    pod: &Pod,
    container: &str,
    attempt: u32,
    id: &str,
) {
    let link = link_path(node, pod, container, id);
    let target = node.pod_log_dir(pod).join(container).join(format!("{attempt}.log"));
    let made = async {
        tokio::fs::create_dir_all(&node.container_logs_dir).await?;
        match tokio::fs::symlink(&target, &link).await {
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
            other => other,
        }
    };
    if let Err(error) = made.await {
        tracing::warn!(link = %link.display(), %error, "cannot link a container's log");
    }
}

/// Removes the log of one dead instance, its rotations and its link.
pub(crate) async fn remove_container_logs(node: &NodeContext, pod: &Pod, instance: &Container) {
    remove_instance_logs(node, pod, &instance.name, instance.attempt, &instance.id).await;
}

/// As [`remove_container_logs`], of the instance number `attempt`.
pub(crate) async fn remove_instance_logs(
    node: &NodeContext,
    pod: &Pod,
    name: &str,
    attempt: u32,
    id: &ContainerId,
) {
    let dir = node.pod_log_dir(pod).join(name);
    let stem = format!("{attempt}.log");
    if let Ok(mut entries) = tokio::fs::read_dir(&dir).await {
        while let Ok(Some(entry)) = entries.next_entry().await {
            let ours = entry.file_name().to_str().is_some_and(|name| {
                name == stem || name.strip_prefix(&stem).is_some_and(|rest| rest.starts_with('.'))
            });
            if ours {
                let _ = tokio::fs::remove_file(entry.path()).await;
            }
        }
    }
    let link = link_path(node, pod, name, id.as_str());
    let _ = tokio::fs::remove_file(link).await;
}

/// Removes all logs of a pod and the links to them.
pub(crate) async fn remove_pod_logs(node: &NodeContext, pod: &Pod) -> Result<(), String> {
    let dir = node.pod_log_dir(pod);
    let key = NamespacedName::of_pod(pod);
    let prefix = format!("{}_{}_", key.name, key.namespace);
    let links = node.container_logs_dir.clone();
    let work = tokio::task::spawn_blocking(move || {
        if let Ok(entries) = std::fs::read_dir(&links) {
            for entry in entries.flatten() {
                let named = entry.file_name().to_str().is_some_and(|n| n.starts_with(&prefix));
                // Another pod of this name keeps its own.
                if named && std::fs::read_link(entry.path()).is_ok_and(|to| to.starts_with(&dir)) {
                    let _ = std::fs::remove_file(entry.path());
                }
            }
        }
        match std::fs::remove_dir_all(&dir) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(format!("remove logs {}: {error}", dir.display()))
            }
            _ => Ok(()),
        }
    });
    work.await.unwrap_or_else(|error| Err(error.to_string()))
}

/// Removes links that lead nowhere any more.
pub(crate) fn remove_dangling_links(node: &NodeContext) {
    let Ok(entries) = std::fs::read_dir(&node.container_logs_dir) else { return };
    for entry in entries.flatten() {
        let path = entry.path();
        let dangling = std::fs::read_link(&path)
            .is_ok_and(|to| to.starts_with(&node.pod_logs_dir) && !to.exists());
        if dangling {
            let _ = std::fs::remove_file(&path);
        }
    }
}
