//! What a pod worker knows beside the runtime's answer: work in flight, failures that wait, what
//! probes say. Plain data, held by the worker and read by `plan` and `status`.

use std::collections::{BTreeMap, HashMap, HashSet};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::ResourceRequirements;

use super::allocation::{Pending, Progress};
use super::backoff::Restart;
use super::observed::ContainerId;

/// Which of a container's probes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ProbeKind {
    /// Restarts the container when it fails.
    Liveness,
    /// Takes the pod out of Services when it fails.
    Readiness,
    /// Holds the other two back until it succeeds.
    Startup,
}

impl ProbeKind {
    /// The name in Events (`Liveness probe failed: ...`).
    pub fn title(self) -> &'static str {
        match self {
            Self::Liveness => "Liveness",
            Self::Readiness => "Readiness",
            Self::Startup => "Startup",
        }
    }
}

/// What the probes of this pod's containers have found, by instance.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ProbeFacts {
    /// Instances whose startup probe succeeded.
    pub started: HashSet<ContainerId>,
    /// Instances whose readiness probe succeeds.
    pub ready: HashSet<ContainerId>,
    /// Instances that a liveness or startup probe condemned.
    pub failed: HashMap<ContainerId, ProbeKind>,
}

/// Why something is not there yet, and when it is tried again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Kubelet's reason (`ErrImagePull`, `CreateContainerConfigError`, ...).
    pub reason: String,
    /// For people.
    pub message: String,
    /// When it last failed.
    pub since: Timestamp,
    /// Next try.
    pub retry_at: Timestamp,
    /// How often it failed in a row.
    pub count: u32,
}

/// State of one step that must be done once for the pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Step {
    /// Not begun.
    #[default]
    Wanted,
    /// In flight.
    Busy,
    /// Done.
    Done,
    /// Failed; tried again later.
    Failed(Failure),
}

impl Step {
    /// Whether the step is to be begun now.
    pub fn due(&self, now: Timestamp) -> bool {
        match self {
            Self::Wanted => true,
            Self::Busy | Self::Done => false,
            Self::Failed(failure) => failure.retry_at <= now,
        }
    }

    /// When a failed step is tried again.
    pub fn retry_at(&self) -> Option<Timestamp> {
        match self {
            Self::Failed(failure) => Some(failure.retry_at),
            _ => None,
        }
    }
}

/// An image that is on the node, ready for one start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReadyImage {
    /// Reference to create the container with.
    pub image_ref: String,
    /// Numeric user of the image's configuration.
    pub uid: Option<i64>,
    /// User name of the image's configuration; empty where it is numeric or unset.
    pub username: String,
    /// The images of the volumes it mounts, by what the pod calls them.
    pub volumes: BTreeMap<String, String>,
}

/// Kubelet's reason for a sandbox that is not made as the pod's claims are not ready.
pub const FAILED_CLAIMS: &str = "FailedPrepareDynamicResources";

/// What a worker knows beside the runtime's answer.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// Devices of the pod, which come before all else.
    pub devices: Step,
    /// The return of its claims once nothing of it runs; `Done` is never set, the claims say it.
    pub claims: Step,
    /// Volumes of the pod.
    pub volumes: Step,
    /// The sandbox being made; `Done` is never set, the runtime's answer says it.
    pub sandbox: Step,
    /// Images by container, for the next start.
    pub images: BTreeMap<String, (Step, Option<ReadyImage>)>,
    /// Starts in flight, by container.
    pub starting: HashSet<String>,
    /// Starts that failed, by container.
    pub failures: BTreeMap<String, Failure>,
    /// Instances being killed.
    pub killing: HashSet<ContainerId>,
    /// Instances that were killed in order to be restarted, whatever their exit code.
    pub restart_after_kill: HashSet<ContainerId>,
    /// Restart counts known from elsewhere (log files, the last status) for containers of which
    /// the runtime holds no instance.
    pub known_restarts: BTreeMap<String, u32>,
    /// What the probes say.
    pub probes: ProbeFacts,
    /// The removal of all instances, so that the whole pod starts again.
    pub reset: Step,
    /// Containers whose instances were removed for that and that have none since.
    pub was_reset: HashSet<String>,
    /// When those of them may start whose end was the cause, and what wait they carry then.
    pub waits: BTreeMap<String, Restart>,
    /// Resources that change while containers run.
    pub resize: ResizeFacts,
}

/// A resize of the pod (KEP-1287).
#[derive(Clone, Debug, Default)]
pub struct ResizeFacts {
    /// Asked for, and not taken up.
    pub pending: Option<Pending>,
    /// Taken up, and not in effect everywhere.
    pub progress: Option<Progress>,
    /// The step in flight that puts it into effect.
    pub step: Step,
    /// What running instances have that are to have something else.
    pub has: BTreeMap<ContainerId, Option<ResourceRequirements>>,
}
