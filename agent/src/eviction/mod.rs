//! When the node is short of something, and which pod goes for it. Pure.
//!
//! As kubelet does: a hard threshold counts at once, a soft one after it was crossed for its grace
//! period; what was crossed counts until the minimum reclaim on top is free again. One pod at a time
//! goes, the one that is over its requests, of least priority, and furthest over.

mod config;
mod rank;
mod tracker;

pub use config::{EvictionConfig, EvictionThreshold, Settings, usual_hard};
pub use rank::{Candidate, ContainerUsage, PodUsage, plan_victims, words};
pub use tracker::{Observations, Tracker, Turn, observe};

/// What is measured of the node, by the name that thresholds have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Signal {
    /// Bytes of memory.
    Memory,
    /// Bytes of the root directory's file system.
    NodeFs,
    /// Its inodes.
    NodeFsInodes,
    /// Bytes of the images' file system.
    ImageFs,
    /// Its inodes.
    ImageFsInodes,
    /// Process ids.
    Pids,
}

impl Signal {
    /// In the order in which they are reclaimed: memory first, as nothing else helps without.
    pub const ALL: [Self; 6] = [
        Self::Memory,
        Self::NodeFs,
        Self::NodeFsInodes,
        Self::ImageFs,
        Self::ImageFsInodes,
        Self::Pids,
    ];

    /// Its name in thresholds and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory.available",
            Self::NodeFs => "nodefs.available",
            Self::NodeFsInodes => "nodefs.inodesFree",
            Self::ImageFs => "imagefs.available",
            Self::ImageFsInodes => "imagefs.inodesFree",
            Self::Pids => "pid.available",
        }
    }

    /// The resource that is short.
    pub fn resource(self) -> Resource {
        match self {
            Self::Memory => Resource::Memory,
            Self::NodeFs | Self::ImageFs => Resource::Disk,
            Self::NodeFsInodes | Self::ImageFsInodes => Resource::Inodes,
            Self::Pids => Resource::Pids,
        }
    }
}

/// What pods use up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resource {
    /// Bytes of memory.
    Memory,
    /// Bytes of local disk.
    Disk,
    /// Inodes of local disk.
    Inodes,
    /// Process ids.
    Pids,
}

impl Resource {
    /// As pods request it, and as people are told.
    pub fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Disk => "ephemeral-storage",
            Self::Inodes => "inodes",
            Self::Pids => "pids",
        }
    }
}
