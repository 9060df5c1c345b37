//! The process of a container: arguments, environment, working directory, limits.

use std::path::PathBuf;

use oci_spec::runtime::{
    LinuxCapabilities, PosixRlimitBuilder, PosixRlimitType, Process, ProcessBuilder, UserBuilder,
};

use super::{Inputs, SpecError};
use crate::api;

/// Where programs are looked for when neither image nor pod sets `PATH`.
pub const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The most files a container's process may open, as far as the node allows.
const OPEN_FILES: u64 = 1 << 20;

/// What an image says about how to run it (OCI image spec, `config`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImageDefaults {
    pub user: String,
    pub env: Vec<String>,
    pub entrypoint: Vec<String>,
    pub cmd: Vec<String>,
    pub working_dir: String,
    pub stop_signal: String,
    /// Paths that are volumes where the pod has none of its own.
    pub volumes: Vec<String>,
}

pub(super) fn plan(
    inputs: &Inputs<'_>,
    security: Option<&api::LinuxContainerSecurityContext>,
    capabilities: LinuxCapabilities,
) -> Result<Process, SpecError> {
    let config = inputs.config;
    let files = OPEN_FILES.min(inputs.host.max_open_files);
    let rlimit = PosixRlimitBuilder::default()
        .typ(PosixRlimitType::RlimitNofile)
        .soft(files)
        .hard(files)
        .build()?;
    let resources = config.linux.as_ref().and_then(|l| l.resources.as_ref());
    let mut process = ProcessBuilder::default()
        .terminal(config.tty)
        .user(UserBuilder::default().build()?)
        .args(arguments(config, inputs.image)?)
        .env(environment(config, inputs.image, &inputs.pod.hostname))
        .cwd(working_dir(config, inputs.image))
        .capabilities(capabilities)
        .rlimits(vec![rlimit])
        // Always said, so that nothing is inherited from the monitor.
        .oom_score_adj(resources.map_or(0, |r| r.oom_score_adj) as i32);
    if let Some(profile) = &inputs.apparmor {
        process = process.apparmor_profile(profile);
    }
    // A privileged container's processes are what the node's own are; its files still are its own.
    if let Some(labels) = inputs.labels.as_ref().filter(|_| security.is_none_or(|s| !s.privileged))
    {
        process = process.selinux_label(labels.process.to_string());
    }
    let mut process = process.build()?;
    // Absent, not false: some runtimes take a present value as "the filter may be loaded without
    // CAP_SYS_ADMIN".
    process
        .set_no_new_privileges(security.filter(|s| s.no_new_privs && !s.privileged).map(|_| true));
    Ok(process)
}

/// `command` replaces the image's entrypoint and command, `args` only the image's command.
pub fn arguments(
    config: &api::ContainerConfig,
    image: &ImageDefaults,
) -> Result<Vec<String>, SpecError> {
    let mut arguments = config.command.clone();
    let mut rest = config.args.clone();
    if arguments.is_empty() {
        arguments = image.entrypoint.clone();
        if rest.is_empty() {
            rest = image.cmd.clone();
        }
    }
    arguments.append(&mut rest);
    match arguments.first() {
        Some(program) if !program.is_empty() => Ok(arguments),
        _ => Err(SpecError::NoCommand),
    }
}

/// The image's variables, overridden in place by the pod's, then what every container gets.
pub fn environment(
    config: &api::ContainerConfig,
    image: &ImageDefaults,
    hostname: &str,
) -> Vec<String> {
    let mut environment: Vec<String> = Vec::new();
    if !image.env.iter().any(|e| e.starts_with("PATH=")) {
        environment.push(format!("PATH={DEFAULT_PATH}"));
    }
    if !hostname.is_empty() {
        environment.push(format!("HOSTNAME={hostname}"));
    }
    if config.tty {
        environment.push("TERM=xterm".to_owned());
    }
    for entry in &image.env {
        set(&mut environment, entry.clone());
    }
    for pair in &config.envs {
        set(&mut environment, format!("{}={}", pair.key, String::from_utf8_lossy(&pair.value)));
    }
    environment
}

/// Sets a `NAME=value`, in the place of one of the same name.
pub(crate) fn set(environment: &mut Vec<String>, entry: String) {
    let key = entry.split_once('=').map_or(entry.as_str(), |(key, _)| key);
    let same = |other: &String| other.split_once('=').map_or(other.as_str(), |(k, _)| k) == key;
    match environment.iter().position(same) {
        Some(at) => environment[at] = entry,
        None => environment.push(entry),
    }
}

/// The pod's `workingDir`, else the image's, else `/`; a relative one is taken from `/`.
pub fn working_dir(config: &api::ContainerConfig, image: &ImageDefaults) -> PathBuf {
    let chosen = [&config.working_dir, &image.working_dir].into_iter().find(|d| !d.is_empty());
    PathBuf::from("/").join(chosen.map_or("/", String::as_str))
}
