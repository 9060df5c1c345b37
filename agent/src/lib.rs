//! The kubelet's work: pods that should run here, brought about over the CRI.
//!
//! Floors: pure decisions (`pod::plan`, `pod::status`, ...), loops, effects behind small traits.
//! `ARCHITECTURE.md` has the map.

pub mod api;
pub mod cli;
pub mod cluster;
mod compose;
pub mod config;
pub mod credential;
pub mod csi;
pub mod device;
pub mod doctor;
pub mod dra;
pub mod eviction;
mod folder_events;
pub mod health;
pub mod ids;
pub mod join;
mod logging;
pub mod metrics;
pub mod node;
pub mod node_api;
pub mod node_context;
pub mod numa;
pub mod objects;
pub mod plugins;
pub mod pod;
pub mod pod_resources;
pub mod probe;
mod profile;
pub mod proxy_api;
pub mod pulled;
pub mod report;
pub mod reset;
pub mod runtime;
mod shutdown;
pub mod source;
pub mod standalone;
mod sys;
mod token_bucket;
mod traces;
pub mod user_ids;
pub mod volume;
