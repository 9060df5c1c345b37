//! What a plan is made of.

use jiff::Timestamp;

use crate::pod::backoff::Restart;
use crate::pod::facts::ProbeKind;
use crate::pod::observed::{ContainerId, SandboxId};
use crate::pod::spec::ContainerKind;

/// Why a container is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KillCause {
    /// Its liveness or startup probe failed.
    Probe(ProbeKind),
    /// The pod names another image now.
    Changed,
    /// It has other resources now, and its `resizePolicy` asks for a restart.
    Resized,
    /// Another one ended by a rule that starts the whole pod again (KEP-5532).
    RestartAll,
    /// The runtime lost track of it: ended before another is started in its place.
    Unknown,
    /// Its sandbox is gone; it is made anew in another one.
    SandboxChanged,
    /// The pod's work is done, or the pod ends.
    PodEnds,
}

/// One thing to do. Actions of one plan do not depend on one another and may run together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Put the pod's volumes in place.
    MountVolumes,
    /// Stop what is left of older sandboxes, then make a new one.
    CreateSandbox {
        /// How many sandboxes came before.
        attempt: u32,
        /// Sandboxes to stop first.
        stop: Vec<SandboxId>,
    },
    /// See that the container's image is on the node.
    EnsureImage {
        /// The container.
        name: String,
    },
    /// Create and start a container.
    Start(Start),
    /// Remove all instances, none of which runs, in this order, so that the pod starts again.
    Reset {
        /// The instances; those whose end is the cause last, so that it is known until then.
        ids: Vec<ContainerId>,
        /// When containers may start that caused it.
        waits: Vec<(String, Restart)>,
    },
    /// End one instance.
    Kill {
        /// The instance.
        id: ContainerId,
        /// The container.
        name: String,
        /// Why.
        cause: KillCause,
    },
}

/// A container to create and start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Start {
    /// The container.
    pub name: String,
    /// What it is to the pod.
    pub kind: ContainerKind,
    /// Where it is started.
    pub sandbox: SandboxId,
    /// How often it was restarted before.
    pub attempt: u32,
    /// Wait that this instance carries, in seconds.
    pub backoff: u64,
    /// Created but never started instances to remove first.
    pub leftovers: Vec<ContainerId>,
}

/// A container that waits before it is started again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackingOff {
    /// The container.
    pub name: String,
    /// Length of the wait in seconds.
    pub wait: u64,
    /// When it is over.
    pub until: Timestamp,
}

/// The next actions for a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// What to do now.
    pub actions: Vec<Action>,
    /// When to plan again, if nothing happens before.
    pub wake_at: Option<Timestamp>,
    /// Containers in CrashLoopBackOff.
    pub backing_off: Vec<BackingOff>,
}

impl Plan {
    pub(super) fn wake(&mut self, at: Timestamp) {
        self.wake_at = Some(self.wake_at.map_or(at, |other| other.min(at)));
    }
}
