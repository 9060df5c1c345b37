//! CRI container config and image config to an OCI runtime spec: pure decisions.
//!
//! Everything the decision needs to know of the machine is in [`Host`], everything it needs of
//! the sandbox in [`Pod`]; the result is what the maker or an OCI runtime is given. Where the CRI leaves a choice
//! open, containerd's is taken, as that is what manifests in the field were written against.

use std::path::PathBuf;

use oci_spec::runtime::{LinuxBuilder, LinuxSeccomp, RootBuilder, Spec, SpecBuilder};

use crate::api;

pub mod annotations;
pub mod apparmor;
mod base;
pub mod capabilities;
pub mod cgroup_path;
pub mod devices;
pub mod mounts;
pub mod namespaces;
pub mod process;
pub mod resources;
pub mod seccomp;
pub mod security;
pub mod selinux;
pub mod stop_signal;
pub mod sysctl;
pub mod user;
pub mod userns;

pub use devices::HostDevice;
pub use namespaces::{PidNamespace, Pod, Userns};
pub use process::ImageDefaults;

/// What the machine offers, read once at start.
#[derive(Clone, Debug, Default)]
pub struct Host {
    /// Only the unified hierarchy (cgroup v2) is in use.
    pub cgroup_v2: bool,
    /// The v1 hierarchies by the names of their directories; empty on v2.
    pub cgroup_v1: Vec<String>,
    /// Memory cgroups account swap (`memory.memsw.*` on v1).
    pub swap_accounting: bool,
    /// The hugetlb controller is there.
    pub hugetlb: bool,
    /// SELinux is enabled in the running kernel.
    pub selinux: bool,
    /// Options of the node's own cgroup2 mount that a container's must repeat to keep them.
    pub cgroup_v2_options: Vec<String>,
    /// The kernel can make a mount read-only with all below it.
    pub recursive_read_only: bool,
    /// The capabilities this process may hand on, as a bit mask (`CapBnd` of `/proc/self/status`).
    pub capabilities: u64,
    /// The highest `RLIMIT_NOFILE` this process may hand on.
    pub max_open_files: u64,
}

/// A volume that an image declares.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Declared {
    /// The folder on the node.
    pub source: PathBuf,
    /// Where it appears in the container.
    pub target: PathBuf,
}

/// Everything a container's spec is decided from.
pub struct Inputs<'a> {
    /// The container's config as the kubelet gave it.
    pub config: &'a api::ContainerConfig,
    /// What its image says.
    pub image: &'a ImageDefaults,
    /// The sandbox it belongs to.
    pub pod: &'a Pod,
    /// The machine.
    pub host: &'a Host,
    /// Where its root file system is mounted while it is made.
    pub rootfs: PathBuf,
    /// Its cgroup, relative to the root of each hierarchy.
    pub cgroup: PathBuf,
    /// Where the monitor mounts its image volumes (see [`mounts::staged`]).
    pub image_volumes: PathBuf,
    /// The volumes that its image declares, already made.
    pub declared: Vec<Declared>,
    /// The base spec of the pod's runtime handler.
    pub base: Option<&'a Spec>,
    /// The `Localhost` seccomp profile it asks for, already read.
    pub localhost_seccomp: Option<LinuxSeccomp>,
    /// The AppArmor profile it enters, which is loaded (see [`apparmor::plan`]).
    pub apparmor: Option<String>,
    /// The SELinux labels it gets.
    pub labels: Option<selinux::Labels>,
    /// The device nodes it asks for (all of the host's when privileged), already looked up.
    pub devices: Vec<HostDevice>,
}

/// Why a container cannot be given a spec. Each says which field to change.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SpecError {
    /// Neither the config nor the image says what to run.
    #[error("no command specified: set `command` or `args`, or use an image with an entrypoint")]
    NoCommand,
    /// A capability name the kernel does not know.
    #[error("unknown capability {0:?} in securityContext.capabilities")]
    UnknownCapability(String),
    /// A feature this runtime does not have.
    #[error("{0} is not supported by this runtime; remove it from the pod")]
    Unsupported(&'static str),
    /// A profile the kernel cannot enforce.
    #[error("{0} is requested but not enabled in this node's kernel; remove it from the pod")]
    NotInKernel(&'static str),
    /// An AppArmor profile that cannot be entered.
    #[error("AppArmor profile {profile:?}: {reason}")]
    AppArmorProfile { profile: String, reason: &'static str },
    /// A level of SELinux that is none.
    #[error("SELinux level {0:?} is malformed; it looks like s0:c123,c456")]
    SeLinuxLevel(String),
    /// What only the unified hierarchy has.
    #[error("{0} need cgroup v2, and this node has v1; remove them from the pod")]
    NeedsCgroupV2(&'static str),
    /// A limit of swap without one of memory.
    #[error("a limit of swap needs a limit of memory; set both")]
    SwapAlone,
    /// A group without a user.
    #[error("runAsGroup is set without runAsUser; set both")]
    GroupWithoutUser,
    /// A mount with a relative or empty path.
    #[error("mount of {source_path:?} at {target:?}: {reason}")]
    BadMount { source_path: String, target: String, reason: &'static str },
    /// A user namespace that cannot be made, or is not the sandbox's.
    #[error(transparent)]
    Userns(#[from] userns::UsernsError),
    /// A sysctl that is not the pod's to set.
    #[error("sysctl {name:?} cannot be set for this pod: {reason}")]
    Sysctl { name: String, reason: &'static str },
    /// A name that cannot be a systemd slice.
    #[error("cgroup parent {0:?} is not a valid systemd slice name")]
    BadSlice(String),
    /// The built spec was refused by the OCI types.
    #[error("building the OCI spec failed: {0}")]
    Build(String),
}

impl From<oci_spec::OciSpecError> for SpecError {
    fn from(error: oci_spec::OciSpecError) -> Self {
        SpecError::Build(error.to_string())
    }
}

/// Refuses a config that could never be run in its sandbox, so that such a container is not created
/// at all.
pub fn check(
    config: &api::ContainerConfig,
    sandbox: &api::NamespaceOption,
    host: &Host,
) -> Result<(), SpecError> {
    let security = config.linux.as_ref().and_then(|l| l.security_context.as_ref());
    security::check(security, host)?;
    let options = security.and_then(|s| s.namespace_options.as_ref());
    userns::plan_container(options, Some(sandbox))?;
    capabilities::plan(security, host.capabilities)?;
    resources::check(config, host)?;
    mounts::check(&config.mounts, host)
}

/// Decides the whole OCI spec of a container. The user is left at root: names can only be resolved
/// against the mounted root file system (see [`user`]), which the monitor does.
pub fn plan_spec(inputs: &Inputs<'_>) -> Result<Spec, SpecError> {
    let security = inputs.config.linux.as_ref().and_then(|l| l.security_context.as_ref());
    let privileged = security.is_some_and(|s| s.privileged);
    security::check(security, inputs.host)?;

    let base =
        inputs.base.and_then(|b| b.process().as_ref()).and_then(|p| p.capabilities().as_ref());
    let capabilities = capabilities::plan_from(base, security, inputs.host.capabilities)?;
    let mut linux = LinuxBuilder::default()
        .namespaces(namespaces::plan(inputs.pod, security, inputs.host)?)
        .cgroups_path(inputs.cgroup.clone())
        .resources(resources::plan(inputs.config, &inputs.devices, privileged, inputs.host)?)
        .masked_paths(security::masked_paths(security))
        .readonly_paths(security::readonly_paths(security));
    if let Some(propagation) = mounts::rootfs_propagation(&inputs.config.mounts) {
        linux = linux.rootfs_propagation(propagation);
    }
    linux = match &inputs.pod.userns {
        None => linux.devices(devices::plan(&inputs.devices)?),
        // Nobody makes device nodes in a user namespace; those of the node are mounted.
        Some(userns) => {
            let [uids, gids] = userns.map.oci()?;
            linux.uid_mappings(uids).gid_mappings(gids)
        }
    };
    let mut linux = linux.build()?;
    linux.set_mount_label(inputs.labels.as_ref().map(|labels| labels.file.to_string()));
    linux.set_seccomp(seccomp::plan(
        security,
        capabilities.bounding(),
        inputs.localhost_seccomp.as_ref(),
    )?);

    let root = RootBuilder::default()
        .path(inputs.rootfs.clone())
        .readonly(security.is_some_and(|s| s.readonly_rootfs))
        .build()?;
    let mut spec = SpecBuilder::default()
        // What is needed; a later one is refused by runtimes that distributions still ship.
        .version("1.0.2")
        .root(root)
        .process(process::plan(inputs, security, capabilities.build()?)?)
        .mounts(mounts::plan(inputs, privileged)?)
        .linux(linux)
        .annotations(annotations::plan(inputs))
        .build()?;
    // The monitor's UTS namespace has it already.
    spec.set_hostname(None);
    if let Some(base) = inputs.base {
        base::fill_in(&mut spec, base, privileged);
    }
    Ok(spec)
}

#[cfg(test)]
mod field_tests;
#[cfg(test)]
mod tests;
