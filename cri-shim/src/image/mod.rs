//! The image store: content-addressed layers on disk, pulled from registries or imported from
//! archives, and an index that names them.
//!
//! It is its own module, without a database or a daemon, so that `longshore image import` can work
//! on the same directory as a running shim: the index is one small file, replaced whole under a
//! file lock, and looked at again whenever it has changed. A layer is unpacked while it is
//! downloaded and becomes visible only after its digest was checked.

mod blob;
pub mod cli;
mod error;
#[cfg(fuzzing)]
pub mod fuzz;
mod import;
mod index;
mod layers;
pub(crate) mod layout;
mod lower;
mod manifest;
mod progress;
mod pull;
mod reference;
mod registry;
mod steps;
mod store;
mod sys;
pub(crate) use sys::get_xattr;
mod tar_stream;
mod unpack;
mod work;

pub use error::ImageError;
pub use progress::{LayerProgress, LayerState, PullCounts, PullProgress, pull_counts};
pub use reference::ImageReference;
pub use registry::init_tls;
pub use store::{FsInfo, Image, ImageId, ImageStore, ImportSource, StoreConfig};
