//! Which namespaces a container gets: its own, the sandbox's or the node's.
//!
//! IPC and UTS namespaces of a sandbox are those its monitor lives in, so a container simply
//! inherits them; only network and PID namespaces are joined by path.

use std::collections::BTreeMap;
use std::path::PathBuf;

use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceBuilder, LinuxNamespaceType};

use super::userns::IdMap;
use super::{Host, SpecError};
use crate::api;

/// What of its sandbox a container's spec depends on.
#[derive(Clone, Debug, Default)]
pub struct Pod {
    /// The user namespace; none when the pod uses the node's.
    pub userns: Option<Userns>,
    /// The sandbox's id.
    pub id: String,
    /// Its name.
    pub metadata: api::PodSandboxMetadata,
    /// The pinned network namespace; none when the pod uses the node's.
    pub netns: Option<PathBuf>,
    /// The PID namespace the container is to be in.
    pub pid: PidNamespace,
    /// The hostname its processes see, for the `HOSTNAME` variable.
    pub hostname: String,
    /// The directory that becomes `/dev/shm`.
    pub shm: PathBuf,
    /// Files of the sandbox bound over those of the image: target to source.
    pub files: BTreeMap<&'static str, PathBuf>,
}

/// The user namespace of a pod, which its other namespaces belong to.
#[derive(Clone, Debug)]
pub struct Userns {
    /// Where it is pinned.
    pub path: PathBuf,
    /// Its ids.
    pub map: IdMap,
}

/// A container's PID namespace (CRI `NamespaceMode`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum PidNamespace {
    /// Its own.
    #[default]
    Container,
    /// The node's.
    Node,
    /// One that a process of the pod or another container holds: `/proc/<pid>/ns/pid`.
    Join(PathBuf),
}

/// The namespaces in the order the OCI runtime is to enter them.
pub(super) fn plan(
    pod: &Pod,
    security: Option<&api::LinuxContainerSecurityContext>,
    host: &Host,
) -> Result<Vec<LinuxNamespace>, SpecError> {
    let mut namespaces = Vec::new();
    if let Some(userns) = &pod.userns {
        namespaces.push(join(LinuxNamespaceType::User, userns.path.clone())?);
    }
    namespaces.push(new(LinuxNamespaceType::Mount)?);
    if host.cgroup_v2 && !security.is_some_and(|s| s.privileged) {
        namespaces.push(new(LinuxNamespaceType::Cgroup)?);
    }
    if let Some(path) = &pod.netns {
        namespaces.push(join(LinuxNamespaceType::Network, path.clone())?);
    }
    match &pod.pid {
        PidNamespace::Container => namespaces.push(new(LinuxNamespaceType::Pid)?),
        PidNamespace::Join(path) => namespaces.push(join(LinuxNamespaceType::Pid, path.clone())?),
        PidNamespace::Node => {}
    }
    Ok(namespaces)
}

fn new(typ: LinuxNamespaceType) -> Result<LinuxNamespace, SpecError> {
    Ok(LinuxNamespaceBuilder::default().typ(typ).build()?)
}

fn join(typ: LinuxNamespaceType, path: PathBuf) -> Result<LinuxNamespace, SpecError> {
    Ok(LinuxNamespaceBuilder::default().typ(typ).path(path).build()?)
}
