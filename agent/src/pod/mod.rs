//! Pods: what should run is brought about over the CRI, one worker task per pod.
//!
//! Pure: `plan`, `status`, `qos`, `backoff`, ...; loops: `worker`, `sync`; effects: the traits that
//! the composition root passes in.

pub mod backoff;
pub mod cgroup;
pub mod config;
pub mod facts;
pub mod image_name;
pub mod images;
pub mod keyring;
pub mod observed;
pub mod plan;
pub mod qos;
pub mod quantity;
pub mod spec;
pub mod status;
#[cfg(test)]
pub(crate) mod testing;
