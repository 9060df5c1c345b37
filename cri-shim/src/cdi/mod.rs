//! CDI, the Container Device Interface: what a device needs in a container besides its node
//! (mounts, variables, hooks), written down by the device's vendor in a file on the node.
//!
//! A container asks for devices by name (`vendor/class=device`) in the CRI's `CDI_devices` or in
//! annotations. The folders are read for each container that asks and for no other: files come and
//! go with drivers, and a device that was told stale would be worse than a few small files read.
//! Rules: <https://github.com/cncf-tags/container-device-interface/blob/main/SPEC.md>.

use std::path::PathBuf;

mod apply;
mod document;
mod folder;
mod name;
mod registry;
mod request;

pub use apply::{Edits, Owner};
pub use document::{Document, DocumentError};
pub use folder::load;
pub use name::{Kind, Name};
pub use registry::{File, Registry};
pub use request::requested;

/// Why devices cannot be given to a container. Each names the device, and the file where there is
/// one.
#[derive(Debug, thiserror::Error)]
pub enum CdiError {
    /// An annotation or `CDI_devices` entry that is not a name.
    #[error("CDI device {device:?}: {reason}; a name is vendor.com/class=device")]
    BadName { device: String, reason: &'static str },
    /// No file has the device.
    #[error("CDI device {device} is in no file of {directories}{hint}")]
    Unknown { device: String, directories: String, hint: String },
    /// Two files of the same folder have the device.
    #[error("CDI device {device} is in both {first} and {second}; remove it from one", first = first.display(), second = second.display())]
    Conflict { device: String, first: PathBuf, second: PathBuf },
    /// What a file says cannot be done on this machine.
    #[error("CDI device {device} ({file}): {reason}", file = file.display())]
    Edit { device: String, file: PathBuf, reason: String },
}
