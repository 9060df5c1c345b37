//! When the node is short of something, and which pod goes for it. Pure.
//!
//! As kubelet does: a hard threshold counts at once, a soft one after it was crossed for its grace
//! period; what was crossed counts until the minimum reclaim on top is free again. One pod at a time
//! goes, the one that is over its requests, of least priority, and furthest over.

mod config;
mod rank;
mod tracker;

pub use config::{EvictionConfig, EvictionThreshold, Settings, usual_hard};
pub use rank::{Candidate, ContainerUsage, PodUsage, Words, plan_victims, words};
pub use tracker::{Observations, Tracker, Turn, observe};

/// What is measured of the node, by the name that thresholds have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Signal {
    /// Bytes of memory.
    Memory,
    /// Bytes of the memory that all pods together may use.
    PodsMemory,
    /// Bytes of the root directory's file system.
    NodeFs,
    /// Its inodes.
    NodeFsInodes,
    /// Bytes of the images' file system.
    ImageFs,
    /// Its inodes.
    ImageFsInodes,
    /// Bytes of the file system of containers' layers.
    ContainerFs,
    /// Its inodes.
    ContainerFsInodes,
    /// Process ids.
    Pids,
}

/// What lies on which file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disks {
    /// Everything on one.
    One,
    /// Images and containers' layers on one of their own.
    ImagesApart,
    /// Images on one of their own; containers' layers are with the volumes and logs.
    ImagesAlone,
}

/// What of no use to anybody is removed before pods go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Leftovers {
    /// Containers that have ended, those of pods that are over included.
    pub containers: bool,
    /// Images that no container uses.
    pub images: bool,
}

impl Signal {
    /// In the order in which they are reclaimed: memory first, as nothing else helps without.
    pub const ALL: [Self; 9] = [
        Self::Memory,
        Self::PodsMemory,
        Self::NodeFs,
        Self::NodeFsInodes,
        Self::ImageFs,
        Self::ImageFsInodes,
        Self::ContainerFs,
        Self::ContainerFsInodes,
        Self::Pids,
    ];

    /// Its name in thresholds and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory.available",
            Self::PodsMemory => "allocatableMemory.available",
            Self::NodeFs => "nodefs.available",
            Self::NodeFsInodes => "nodefs.inodesFree",
            Self::ImageFs => "imagefs.available",
            Self::ImageFsInodes => "imagefs.inodesFree",
            Self::ContainerFs => "containerfs.available",
            Self::ContainerFsInodes => "containerfs.inodesFree",
            Self::Pids => "pid.available",
        }
    }

    /// The resource that is short.
    pub fn resource(self) -> Resource {
        match self {
            Self::Memory | Self::PodsMemory => Resource::Memory,
            Self::NodeFs | Self::ImageFs | Self::ContainerFs => Resource::Disk,
            Self::NodeFsInodes | Self::ImageFsInodes | Self::ContainerFsInodes => Resource::Inodes,
            Self::Pids => Resource::Pids,
        }
    }

    /// Whether it is of the file system that images lie on.
    pub fn is_of_images(self) -> bool {
        matches!(self, Self::ImageFs | Self::ImageFsInodes)
    }

    /// What is removed first where it is short.
    pub fn leftovers(self, disks: Disks) -> Leftovers {
        let disk = matches!(self.resource(), Resource::Disk | Resource::Inodes);
        let both = Leftovers { containers: true, images: true };
        match (disk, disks, self.is_of_images()) {
            (false, ..) | (_, Disks::ImagesApart, false) => Leftovers::default(),
            (true, Disks::One, _) | (true, Disks::ImagesApart, true) => both,
            (true, Disks::ImagesAlone, images) => Leftovers { containers: !images, images },
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_removed_before_pods_go_lies_where_it_is_short() {
        let of = |containers, images| Leftovers { containers, images };
        for (signal, disks, expected) in [
            (Signal::Memory, Disks::One, of(false, false)),
            (Signal::PodsMemory, Disks::One, of(false, false)),
            (Signal::Pids, Disks::ImagesAlone, of(false, false)),
            (Signal::NodeFs, Disks::One, of(true, true)),
            (Signal::ImageFsInodes, Disks::One, of(true, true)),
            (Signal::NodeFsInodes, Disks::ImagesApart, of(false, false)),
            (Signal::ImageFs, Disks::ImagesApart, of(true, true)),
            (Signal::NodeFs, Disks::ImagesAlone, of(true, false)),
            (Signal::ImageFs, Disks::ImagesAlone, of(false, true)),
        ] {
            assert_eq!(signal.leftovers(disks), expected, "{signal:?} {disks:?}");
        }
    }
}
