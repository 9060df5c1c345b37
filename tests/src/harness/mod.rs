//! A node under test: the real `longshore` binary in network, mount and PID namespaces and a
//! cgroup subtree of its own, on a small network with the control plane and an outside client.
//!
//! Everything hangs on one process per node, PID 1 of its namespaces: when it dies, by the test's
//! end or by the test's death, the kernel takes processes, mounts and veths along. What outlives
//! it (named network namespaces, cgroups, the work folder) is removed on drop, and swept at the
//! start of the next run of the same test.

pub mod caller;
pub mod cluster;
pub mod command;
pub mod containerd;
pub mod csi;
pub mod devices;
pub mod dra;
pub mod eventually;
pub mod image;
pub mod lab;
pub mod leaks;
pub mod measure;
pub mod net;
pub mod node;
pub mod peers;
pub mod scripted;

pub use cluster::Cluster;
pub use eventually::{eventually, eventually_within};
pub use lab::{Lab, NetNs};
pub use node::{Node, NodeOptions, longshore_binary};
