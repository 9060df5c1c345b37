//! Pods: what should run is brought about over the CRI, one worker task per pod.
//!
//! Pure: `plan`, `status`, `qos`, `backoff`, ...; loops: `worker`, `sync`; effects: the traits that
//! the composition root passes in.

pub mod admit;
pub mod allocation;
pub mod backoff;
mod caretaker;
pub mod cgroup;
pub mod clock;
pub mod config;
mod deps;
mod events;
pub mod explain;
pub mod facts;
mod garbage;
mod hooks;
mod image_garbage;
pub mod image_name;
pub mod images;
pub mod keyring;
mod logs;
mod node_limits;
pub(crate) mod node_shutdown;
pub mod observed;
mod orphans;
pub mod plan;
mod pressure;
pub mod qos;
pub mod quantity;
pub mod spec;
pub mod status;
mod storage;
mod store;
mod sync;
pub mod sysctls;
pub mod table;
#[cfg(test)]
pub(crate) mod testing;
mod userns;
mod worker;

pub use sync::{ExplainError, PodQuery, SyncHandle, SyncLoop};
pub use table::{PodTable, PodView};
#[cfg(test)]
mod tests;
