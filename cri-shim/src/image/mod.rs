//! The image store: content-addressed layers on disk, pulled from registries or imported from
//! archives, and an index that names them.
//!
//! It is its own module, without a database or a daemon, so that `longshore image import` can work
//! on the same directory as a running shim: the index is one small file, replaced whole under a
//! file lock, and looked at again whenever it has changed. A layer is unpacked while it is
//! downloaded and becomes visible only after its digest was checked.

mod error;
mod import;
mod index;
pub(crate) mod layout;
mod pull;
mod reference;
mod store;
mod work;

pub use error::ImageError;
pub use reference::ImageReference;
pub use store::{FsInfo, Image, ImageId, ImageStore, ImportSource, StoreConfig};
