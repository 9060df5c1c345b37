//! Standalone: pods, Services, EndpointSlices, ConfigMaps and Secrets from a folder of manifests,
//! doing for one node what an API server and its controllers would do for it.
//!
//! Floor 1: `yaml` (text to values), `decode` (values to objects), `defaults`, `validate`,
//! `folder` (what changed between two readings), `allocate` (clusterIPs and NodePorts),
//! `endpoints` (selector to slices). The loop is `source::file`.

pub mod allocate;
pub mod decode;
pub mod defaults;
pub mod endpoints;
pub mod folder;
pub mod keep;
pub mod services;
pub mod store;
pub mod validate;
pub mod yaml;
