//! What can go wrong with a pod's network.

use std::{io, net::IpAddr, path::PathBuf};

use super::{Cidr, PortMapping};

/// A network operation that failed.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// A kernel or file operation failed.
    #[error("{operation} {object}: {source}")]
    Io {
        /// What was being done.
        operation: &'static str,
        /// With what.
        object: String,
        /// Why it failed.
        source: io::Error,
    },
    /// A netlink request was refused.
    #[error("{operation} {object}: {reason}")]
    Netlink {
        /// What was being done.
        operation: &'static str,
        /// With what.
        object: String,
        /// What the kernel said.
        reason: String,
    },
    /// No address is left in the block.
    #[error("no free address in {cidr} ({used} in use); give the node a larger pod CIDR")]
    Exhausted {
        /// The block.
        cidr: Cidr,
        /// Addresses in use.
        used: usize,
    },
    /// Another sandbox has the host port.
    #[error(
        "host port {port} is taken by sandbox {owner} (pod {owner_pod}); choose another hostPort \
         or hostIP"
    )]
    PortTaken {
        /// The port asked for.
        port: HostPort,
        /// Who has it.
        owner: String,
        /// The owner's pod as namespace/name.
        owner_pod: String,
    },
    /// A port mapping that can't be made.
    #[error("host port {port}: {reason}")]
    BadPort {
        /// The port asked for.
        port: HostPort,
        /// Why not.
        reason: &'static str,
    },
    /// An annotation that can't be followed.
    #[error("annotation {annotation}: {value:?}: {reason}; correct the pod's manifest")]
    BadAnnotation {
        /// The annotation's name.
        annotation: &'static str,
        /// Its value, shortened.
        value: String,
        /// What is wrong.
        reason: &'static str,
    },
    /// A CNI configuration that can't be used.
    #[error("CNI configuration {path}: {reason}")]
    CniConfig {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A plugin of the configured network is not installed.
    #[error("CNI plugin {plugin} of network {network} is not in {folders}; install it there")]
    CniMissing {
        /// The plugin's type.
        plugin: String,
        /// The network's name.
        network: String,
        /// Where it was looked for.
        folders: String,
    },
    /// A CNI plugin failed.
    #[error("CNI plugin {plugin} of network {network}: {command} failed: {reason}")]
    CniPlugin {
        /// The plugin's type.
        plugin: String,
        /// The network's name.
        network: String,
        /// ADD, DEL, CHECK, GC, STATUS or VERSION.
        command: &'static str,
        /// The plugin's message, its standard error, or how it ended.
        reason: String,
    },
    /// Several teardown steps failed; the rest was done.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Several(Vec<NetworkError>),
}

/// A host port, for messages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostPort(pub PortMapping);

impl std::fmt::Display for HostPort {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let PortMapping { protocol, host_ip, host_port, .. } = &self.0;
        match host_ip {
            None => write!(f, "{host_port}/{protocol}"),
            Some(IpAddr::V6(ip)) => write!(f, "[{ip}]:{host_port}/{protocol}"),
            Some(ip) => write!(f, "{ip}:{host_port}/{protocol}"),
        }
    }
}

impl NetworkError {
    pub(crate) fn io(
        operation: &'static str,
        object: impl std::fmt::Display,
    ) -> impl FnOnce(io::Error) -> Self {
        let object = object.to_string();
        move |source| Self::Io { operation, object, source }
    }

    pub(crate) fn errno(
        operation: &'static str,
        object: impl std::fmt::Display,
    ) -> impl FnOnce(nix::Error) -> Self {
        let object = object.to_string();
        move |errno| Self::Io { operation, object, source: errno.into() }
    }
}
