//! `/containerLogs/{namespace}/{pod}/{container}`: what `kubectl logs` shows.

pub(super) mod follow;

mod body;
mod file;
mod line;
pub(super) mod options;

use std::path::PathBuf;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Path, RawQuery, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use k8s_openapi::api::core::v1::{ContainerStatus, PodStatus};
use tokio::sync::Semaphore;

use self::body::LogBody;
use self::file::LogFile;
use self::follow::{Followers, Instance, Wake};
use self::options::{LogOptions, Refused};
use super::{Failure, Shared};
use crate::ids::PodUid;
use crate::pod::spec::{find_container, spec_of};

/// Serves a log.
pub(super) async fn container_logs(
    State(shared): State<Arc<Shared>>,
    Path((namespace, name, container)): Path<(String, String, String)>,
    RawQuery(query): RawQuery,
) -> Result<Response, Failure> {
    let query = query.unwrap_or_default();
    let options =
        LogOptions::parse(&query, jiff::Timestamp::now()).map_err(|error| match error {
            Refused::Unreadable => {
                Failure::bad_request(r#"{"message": "Unable to decode query."}"#)
            }
            Refused::Invalid => Failure(
                StatusCode::UNPROCESSABLE_ENTITY,
                r#"{"message": "Invalid request."}"#.into(),
            ),
        })?;
    let opening = OPENING.acquire().await;
    let view = shared
        .sync
        .table()
        .named(&namespace, &name)
        .ok_or_else(|| Failure::not_found(format!("pod {name:?} does not exist")))?;
    if find_container(spec_of(&view.pod), &container).is_none() {
        return Err(Failure::not_found(format!(
            "container {container:?} not found in pod {name:?}"
        )));
    }
    let id = instance_id(&view.status, &name, &container, options.previous)
        .map_err(Failure::bad_request)?;
    let uid = PodUid::of(&view.pod);
    drop(view);
    let status = shared
        .runtime
        .container_status(&id)
        .await
        .map_err(|error| Failure::bad_request(format!("the log of container {id}: {error}")))?;
    let path = PathBuf::from(&status.log_path);
    let wake = if options.follow {
        let instance = Instance { uid, name: container, id };
        Some(follow(&shared.followers, &path, instance)?)
    } else {
        None
    };
    let tail = options.tail;
    let opened = wake.as_ref().map_or_else(|| path.as_path().into(), Wake::path);
    let file = tokio::task::spawn_blocking(move || LogFile::open(opened, tail)).await;
    drop(opening);
    let file = file.map_err(|error| Failure::internal(error.to_string()))?.map_err(|error| {
        Failure::bad_request(format!("failed to open log file {}: {error}", path.display()))
    })?;
    let log = Body::new(LogBody::new(file, &options, wake));
    Ok(([(header::CONTENT_TYPE, "text/plain")], log).into_response())
}

fn follow(
    followers: &Arc<Followers>,
    path: &std::path::Path,
    instance: Instance,
) -> Result<Wake, Failure> {
    followers.follow(path, instance).map_err(|error| {
        Failure::internal(format!(
            "cannot watch {}: {error}; see fs.inotify.max_user_watches and max_user_instances",
            path.display()
        ))
    })
}

/// Logs that are being opened at once: what opening takes is not needed a thousand times.
static OPENING: Semaphore = Semaphore::const_new(16);
/// The id of the instance whose log is wanted, or why there is none, in upstream's words.
fn instance_id(
    status: &PodStatus,
    pod: &str,
    container: &str,
    previous: bool,
) -> Result<String, String> {
    let all = [
        &status.container_statuses,
        &status.init_container_statuses,
        &status.ephemeral_container_statuses,
    ];
    let found: Option<&ContainerStatus> =
        all.into_iter().flatten().flatten().find(|status| status.name == container);
    let Some(found) = found else {
        return Err(format!("container {container:?} in pod {pod:?} is not available"));
    };
    let state = found.state.clone().unwrap_or_default();
    let last = found.last_state.as_ref().and_then(|last| last.terminated.as_ref());
    let last_id = last.and_then(|last| last.container_id.clone()).filter(|id| !id.is_empty());
    let id = if previous {
        last_id.ok_or_else(|| {
            format!("previous terminated container {container:?} in pod {pod:?} not found")
        })?
    } else if state.running.is_some() {
        found.container_id.clone().unwrap_or_default()
    } else if let Some(ended) = state.terminated {
        ended
            .container_id
            .filter(|id| !id.is_empty())
            .or(last_id)
            .ok_or_else(|| format!("container {container:?} in pod {pod:?} is terminated"))?
    } else if last.is_some() {
        last_id.ok_or_else(|| format!("container {container:?} in pod {pod:?} is terminated"))?
    } else {
        let reason = state.waiting.and_then(|waiting| waiting.reason).unwrap_or_default();
        let why = match reason.as_str() {
            "" => "no logs yet",
            "ErrImagePull" => "image can't be pulled",
            "ImagePullBackOff" => "trying and failing to pull image",
            other => other,
        };
        return Err(format!("container {container:?} in pod {pod:?} is waiting to start: {why}"));
    };
    Ok(id.split_once("://").map_or(id.clone(), |(_, id)| id.to_owned()))
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::{
        ContainerState, ContainerStateRunning, ContainerStateTerminated, ContainerStateWaiting,
    };

    use super::*;

    fn runs() -> ContainerState {
        ContainerState {
            running: Some(ContainerStateRunning::default()),
            ..ContainerState::default()
        }
    }

    fn ended(id: &str) -> ContainerState {
        let terminated = ContainerStateTerminated {
            container_id: Some(id.into()).filter(|id: &String| !id.is_empty()),
            ..ContainerStateTerminated::default()
        };
        ContainerState { terminated: Some(terminated), ..ContainerState::default() }
    }

    fn waits(reason: &str) -> ContainerState {
        let waiting = ContainerStateWaiting {
            reason: Some(reason.into()),
            ..ContainerStateWaiting::default()
        };
        ContainerState { waiting: Some(waiting), ..ContainerState::default() }
    }

    #[test]
    fn the_log_is_of_the_instance_that_upstream_would_show() {
        let ask = |state: ContainerState, last: Option<ContainerState>, previous| {
            let status = ContainerStatus {
                name: "c".into(),
                container_id: Some("cri://now".into()),
                state: Some(state),
                last_state: last,
                ..ContainerStatus::default()
            };
            let status =
                PodStatus { container_statuses: Some(vec![status]), ..PodStatus::default() };
            instance_id(&status, "p", "c", previous)
        };
        assert_eq!(ask(runs(), Some(ended("cri://old")), false).unwrap(), "now");
        assert_eq!(ask(runs(), Some(ended("cri://old")), true).unwrap(), "old");
        assert_eq!(ask(ended("cri://end"), None, false).unwrap(), "end");
        assert_eq!(ask(waits("CrashLoopBackOff"), Some(ended("cri://old")), false).unwrap(), "old");
        for (state, last, previous, expected) in [
            (runs(), None, true, "previous terminated container \"c\" in pod \"p\" not found"),
            (ended(""), None, false, "container \"c\" in pod \"p\" is terminated"),
            (
                waits("ImagePullBackOff"),
                None,
                false,
                "container \"c\" in pod \"p\" is waiting to start: trying and failing to pull image",
            ),
            (
                waits("ContainerCreating"),
                None,
                false,
                "container \"c\" in pod \"p\" is waiting to start: ContainerCreating",
            ),
        ] {
            assert_eq!(ask(state, last, previous).unwrap_err(), expected);
        }
        let none = instance_id(&PodStatus::default(), "p", "c", false).unwrap_err();
        assert_eq!(none, "container \"c\" in pod \"p\" is not available");
    }
}
