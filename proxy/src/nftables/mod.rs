//! The nftables backend: a few large maps keyed by address, protocol and port hold what differs
//! from Service to Service; chains hold behaviours ("pick one of four", "masquerade, then pick one
//! of four"), so that a change of a Service is a few map elements. The large maps lead to chains by
//! way of numbers ([`kinds`]), so that such an element costs the same among however many.
//!
//! ```text
//! prerouting, output -> services: address . protocol . port  map @service-kinds  -> 4
//!                                                            4  vmap @kinds      -> pick-4
//!                                 (node's address) protocol . port  map @node-port-kinds -> ...
//! pick-4: dnat to address . protocol . port . random mod 4  map @endpoints
//! ```
//!
//! The version before led to chains at once, by verdict maps of other names. They are taken over from
//! Service by Service ([`names::Dispatch`], `repair`).

mod anew;
pub mod backend;
pub mod base;
mod batches;
pub mod chains;
pub mod entries;
pub mod kinds;
pub mod names;
mod repair;
pub mod ruleset;
