//! One container's status.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{
    Container as SpecContainer, ContainerState as ApiState, ContainerStateRunning,
    ContainerStateTerminated, ContainerStateWaiting, ContainerStatus, ContainerUser,
    LinuxContainerUser, VolumeMountStatus,
};

use super::{StatusInput, time};
use crate::pod::backoff::go_duration;
use crate::pod::facts::{Failure, Step};
use crate::pod::observed::{Container, ContainerState};
use crate::pod::plan::wants_start;
use crate::pod::spec::{ContainerKind, spec_of};
use crate::pod::status::Ending;

/// For how many seconds a failed pull is shown as `ErrImagePull`, before `ImagePullBackOff`.
pub(crate) const PULL_ERROR_SHOWN_SECONDS: i64 = 3;

/// Reason of containers that were removed to start the pod again.
pub(super) const RESTARTING_ALL: &str = "RestartingAllContainers";

/// Exit code of a container whose own is not known.
const UNKNOWN_EXIT_CODE: i32 = 137;

/// Makes container statuses of one pod.
#[derive(Clone, Copy)]
pub(super) struct ContainerView<'a> {
    pub(super) input: StatusInput<'a>,
    pub(super) has_init: bool,
}

impl ContainerView<'_> {
    /// The status of `container`; `old` is the one before.
    pub(super) fn status(
        &self,
        container: &SpecContainer,
        kind: ContainerKind,
        old: Option<&ContainerStatus>,
    ) -> ContainerStatus {
        let instances = self.input.observed.instances(&container.name);
        let mut status = match instances.first() {
            Some(latest) => {
                let mut status = self.of_instance(container, latest, old);
                if let Some(before) =
                    instances[1..].iter().find(|i| i.state == ContainerState::Exited)
                {
                    status.last_state = Some(terminated(self.input.runtime_name, before));
                } else {
                    status.last_state = carried_last_state(&status, old);
                }
                status
            }
            None => self.without_instance(container, kind, old),
        };
        self.waiting(container, kind, instances.first().copied(), &mut status);
        self.readiness(container, kind, instances.first().copied(), &mut status);
        status
    }

    fn default_reason(&self) -> &'static str {
        if self.has_init { "PodInitializing" } else { "ContainerCreating" }
    }

    /// A container of which the runtime has no instance: never made, or forgotten.
    fn without_instance(
        &self,
        container: &SpecContainer,
        kind: ContainerKind,
        old: Option<&ContainerStatus>,
    ) -> ContainerStatus {
        let mut status = ContainerStatus {
            name: container.name.clone(),
            image: container.image.clone().unwrap_or_default(),
            state: Some(waiting(self.default_reason(), None)),
            started: Some(false),
            volume_mounts: volume_mounts(container),
            restart_count: self
                .input
                .facts
                .known_restarts
                .get(&container.name)
                .and_then(|n| i32::try_from(*n).ok())
                .unwrap_or(0),
            ..Default::default()
        };
        if let Some(old) = old {
            let state = old.state.clone().unwrap_or_default();
            let removed = self.input.facts.was_reset.contains(&container.name);
            if removed && state.waiting.is_none() {
                let why = "The container is removed because RestartAllContainers in place";
                status.state = Some(waiting(RESTARTING_ALL, Some(why.into())));
                status.last_state = Some(ApiState {
                    terminated: Some(ContainerStateTerminated {
                        reason: Some(RESTARTING_ALL.into()),
                        message: Some(why.into()),
                        exit_code: UNKNOWN_EXIT_CODE,
                        ..Default::default()
                    }),
                    ..Default::default()
                });
                status.restart_count = status.restart_count.max(old.restart_count + 1);
                return status;
            }
            if state.terminated.is_some() {
                return old.clone();
            }
            status.restart_count = status.restart_count.max(old.restart_count);
            status.last_state.clone_from(&old.last_state);
            let had_last = old.last_state.as_ref().is_some_and(|s| s.terminated.is_some());
            if state.running.is_some() && !had_last {
                let lost = unknown_end(
                    "The container could not be located when the pod was deleted.  The container used to be Running",
                );
                if self.input.ending == Ending::Not {
                    status.last_state = Some(lost);
                } else {
                    status.state = Some(lost);
                }
            }
        }
        let spec = spec_of(self.input.pod);
        let mains_made =
            spec.containers.iter().any(|c| self.input.observed.latest(&c.name).is_some());
        if kind == ContainerKind::Init && mains_made {
            status.state = Some(ApiState {
                terminated: Some(ContainerStateTerminated {
                    reason: Some("Completed".into()),
                    message: Some(
                        "Unable to get init container status from container runtime and pod has been initialized, treat it as exited normally"
                            .into(),
                    ),
                    exit_code: 0,
                    ..Default::default()
                }),
                ..Default::default()
            });
        }
        status
    }

    fn of_instance(
        &self,
        container: &SpecContainer,
        latest: &Container,
        old: Option<&ContainerStatus>,
    ) -> ContainerStatus {
        let runtime = self.input.runtime_name;
        let state = match latest.state {
            ContainerState::Running => ApiState {
                running: Some(ContainerStateRunning { started_at: latest.started_at.map(time) }),
                ..Default::default()
            },
            ContainerState::Exited => terminated(runtime, latest),
            ContainerState::Created => waiting(self.default_reason(), None),
            ContainerState::Unknown => {
                let ran =
                    old.is_some_and(|o| o.state.as_ref().is_some_and(|s| s.running.is_some()));
                if ran {
                    unknown_end("The container could not be located when the pod was terminated")
                } else {
                    waiting(self.default_reason(), None)
                }
            }
        };
        let resources = container.resources.clone();
        let allocated = resources.as_ref().and_then(|r| r.requests.clone());
        let resources = match self.input.facts.resize.has.get(&latest.id) {
            Some(has) if latest.state == ContainerState::Running => has.clone(),
            _ => resources,
        };
        ContainerStatus {
            name: container.name.clone(),
            image: latest.image.clone(),
            image_id: latest.image_ref.clone(),
            container_id: Some(format!("{runtime}://{}", latest.id)),
            restart_count: i32::try_from(latest.attempt).unwrap_or(i32::MAX),
            state: Some(state),
            allocated_resources: allocated,
            resources,
            user: latest.user.as_ref().map(|user| ContainerUser {
                linux: Some(LinuxContainerUser {
                    uid: user.uid,
                    gid: user.gid,
                    supplemental_groups: (!user.supplemental_groups.is_empty())
                        .then(|| user.supplemental_groups.clone()),
                }),
            }),
            volume_mounts: volume_mounts(container),
            ..Default::default()
        }
    }

    /// A container that is to be started but cannot be yet says why.
    fn waiting(
        &self,
        container: &SpecContainer,
        kind: ContainerKind,
        latest: Option<&Container>,
        status: &mut ContainerStatus,
    ) {
        if self.input.ending != Ending::Not || self.input.verdict.is_some() {
            return;
        }
        let spec = spec_of(self.input.pod);
        if !wants_start(spec, container, kind, latest, self.input.facts)
            || (kind == ContainerKind::Init && latest.is_some_and(Container::succeeded))
        {
            return;
        }
        let Some((reason, message)) = self.waiting_reason(container) else { return };
        if let Some(state) = status.state.take()
            && state.terminated.is_some()
        {
            status.last_state = Some(state);
        }
        status.state = Some(waiting(&reason, Some(message)));
    }

    fn waiting_reason(&self, container: &SpecContainer) -> Option<(String, String)> {
        let name = &container.name;
        let facts = self.input.facts;
        if let Some(wait) = self.input.backing_off.iter().find(|b| b.name == *name) {
            let pod = pod_label(self.input.pod);
            return Some((
                "CrashLoopBackOff".into(),
                format!(
                    "back-off {} restarting failed container={name} pod={pod}",
                    go_duration(wait.wait)
                ),
            ));
        }
        if let Some((Step::Failed(failure), _)) = facts.images.get(name) {
            return Some(pull_reason(failure, container, self.input.now));
        }
        let failure = facts.failures.get(name)?;
        Some((failure.reason.clone(), failure.message.clone()))
    }

    fn readiness(
        &self,
        container: &SpecContainer,
        kind: ContainerKind,
        latest: Option<&Container>,
        status: &mut ContainerStatus,
    ) {
        let running = status.state.as_ref().is_some_and(|s| s.running.is_some());
        let probes = &self.input.facts.probes;
        let started = running
            && latest.is_some_and(|l| {
                container.startup_probe.is_none() || probes.started.contains(&l.id)
            });
        match kind {
            ContainerKind::Init => {
                let done = status
                    .state
                    .as_ref()
                    .and_then(|s| s.terminated.as_ref())
                    .is_some_and(|t| t.exit_code == 0);
                status.ready = done;
                status.started = Some(started);
            }
            ContainerKind::Sidecar | ContainerKind::Main => {
                status.started = Some(started);
                status.ready = started
                    && latest.is_some_and(|l| {
                        container.readiness_probe.is_none() || probes.ready.contains(&l.id)
                    });
            }
            ContainerKind::Ephemeral => status.started = None,
        }
    }
}

/// `name_namespace(uid)`, kubelet's way to name a pod in messages.
pub(crate) fn pod_label(pod: &k8s_openapi::api::core::v1::Pod) -> String {
    let key = crate::ids::NamespacedName::of_pod(pod);
    let uid = pod.metadata.uid.as_deref().unwrap_or_default();
    format!("{}_{}({uid})", key.name, key.namespace)
}

/// The reason shown for a failed pull: the error at first, then the wait.
fn pull_reason(failure: &Failure, container: &SpecContainer, now: Timestamp) -> (String, String) {
    let shown = now.duration_since(failure.since).as_secs();
    if failure.reason == "ErrImagePull" && shown >= PULL_ERROR_SHOWN_SECONDS {
        let image = container.image.as_deref().unwrap_or_default();
        return (
            "ImagePullBackOff".into(),
            format!("Back-off pulling image \"{image}\": ErrImagePull: {}", failure.message),
        );
    }
    (failure.reason.clone(), failure.message.clone())
}

fn waiting(reason: &str, message: Option<String>) -> ApiState {
    ApiState {
        waiting: Some(ContainerStateWaiting { reason: Some(reason.to_owned()), message }),
        ..Default::default()
    }
}

/// The end of a container of which nobody knows how it was.
pub(super) fn unknown_end(message: &str) -> ApiState {
    ApiState {
        terminated: Some(ContainerStateTerminated {
            reason: Some("ContainerStatusUnknown".into()),
            message: Some(message.to_owned()),
            exit_code: UNKNOWN_EXIT_CODE,
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// The state of an instance that has ended.
fn terminated(runtime: &str, instance: &Container) -> ApiState {
    let reason = if instance.reason.is_empty() {
        if instance.exit_code == 0 { "Completed" } else { "Error" }
    } else {
        &instance.reason
    };
    let message = match (&*instance.message, instance.termination_message.as_deref()) {
        ("", None | Some("")) => None,
        ("", Some(own)) => Some(own.to_owned()),
        (runtime, None | Some("")) => Some(runtime.to_owned()),
        (runtime, Some(own)) => Some(format!("{runtime}: {own}")),
    };
    ApiState {
        terminated: Some(ContainerStateTerminated {
            container_id: Some(format!("{runtime}://{}", instance.id)),
            exit_code: instance.exit_code,
            reason: Some(reason.to_owned()),
            message,
            started_at: instance.started_at.map(time),
            finished_at: instance.finished_at.map(time),
            signal: None,
        }),
        ..Default::default()
    }
}

/// The last state where the runtime has forgotten the instance before.
fn carried_last_state(status: &ContainerStatus, old: Option<&ContainerStatus>) -> Option<ApiState> {
    let old = old?;
    if status.restart_count == 0 {
        return None;
    }
    if old.container_id != status.container_id
        && let Some(state) = &old.state
        && state.terminated.is_some()
    {
        return Some(state.clone());
    }
    old.last_state.clone().filter(|s| s.terminated.is_some())
}

fn volume_mounts(container: &SpecContainer) -> Option<Vec<VolumeMountStatus>> {
    let mounts = container.volume_mounts.as_ref()?;
    Some(
        mounts
            .iter()
            .map(|m| VolumeMountStatus {
                name: m.name.clone(),
                mount_path: m.mount_path.clone(),
                read_only: m.read_only,
                recursive_read_only: m.read_only.unwrap_or(false).then(|| {
                    match m.recursive_read_only.as_deref() {
                        Some("Enabled" | "IfPossible") => "Enabled".to_owned(),
                        _ => "Disabled".to_owned(),
                    }
                }),
                ..Default::default()
            })
            .collect(),
    )
}
