//! The nftables backend: a few large maps keyed by address, protocol and port hold what differs
//! from Service to Service; chains hold behaviours ("pick one of four", "masquerade, then pick one
//! of four"), so that a change of a Service is a few map elements.
//!
//! ```text
//! prerouting, output -> services: address . protocol . port  vmap @services  -> pick-4
//!                                 (node's address) protocol . port  vmap @node-ports
//! pick-4: dnat to address . protocol . port . random mod 4  map @endpoints
//! ```

pub mod backend;
pub mod base;
pub mod chains;
pub mod entries;
pub mod names;
pub mod ruleset;
