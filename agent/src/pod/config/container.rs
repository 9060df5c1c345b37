//! The CRI configuration of a container.

use std::collections::HashMap;

use cri_shim::api;
use k8s_openapi::api::core::v1::{Container, Pod};

use super::ConfigError;
use super::expand::expand;
use super::sandbox::pod_labels;
use super::security::container_security;
use crate::device::RunOptions;
use crate::node_context::NodeContext;
use crate::pod::facts::ReadyImage;
use crate::pod::observed::names;
use crate::pod::spec::spec_of;

/// Where kubelet lets containers leave their last words unless told otherwise.
pub const DEFAULT_MESSAGE_PATH: &str = "/dev/termination-log";

/// What a container is made from.
#[derive(Clone, Debug)]
pub struct ContainerInput<'a> {
    /// The pod.
    pub pod: &'a Pod,
    /// The container.
    pub container: &'a Container,
    /// How often it was restarted before.
    pub attempt: u32,
    /// Wait that this instance carries, in seconds.
    pub backoff: u64,
    /// Its image.
    pub image: &'a ReadyImage,
    /// Its environment.
    pub env: &'a [(String, String)],
    /// Its volumes, hosts file and message file.
    pub mounts: Vec<api::Mount>,
    /// Host path of its message file, if it has one.
    pub message_file: Option<&'a str>,
    /// Container whose processes an ephemeral container sees.
    pub target: Option<&'a str>,
    /// What its devices bring, but for environment and mounts.
    pub devices: &'a RunOptions,
    /// Whose ids it uses: its sandbox's word.
    pub userns: &'a api::UserNamespace,
    /// The node.
    pub node: &'a NodeContext,
    /// What of the machine it may use, and where it runs.
    pub resources: api::LinuxContainerResources,
}

/// The container's configuration.
pub fn container_config(input: ContainerInput<'_>) -> Result<api::ContainerConfig, ConfigError> {
    let ContainerInput { pod, container, .. } = input;
    let values: HashMap<&str, &str> = input.env.iter().map(|(k, v)| (&**k, &**v)).collect();
    let expanded = |list: &Option<Vec<String>>| -> Vec<String> {
        list.iter().flatten().map(|text| expand(text, |name| values.get(name).copied())).collect()
    };
    let mut labels = pod_labels(pod);
    labels.insert(names::CONTAINER_NAME.to_owned(), container.name.clone());
    Ok(api::ContainerConfig {
        metadata: Some(api::ContainerMetadata {
            name: container.name.clone(),
            attempt: input.attempt,
        }),
        image: Some(api::ImageSpec {
            image: input.image.image_ref.clone(),
            user_specified_image: container.image.clone().unwrap_or_default(),
            ..Default::default()
        }),
        command: expanded(&container.command),
        args: expanded(&container.args),
        working_dir: container.working_dir.clone().unwrap_or_default(),
        envs: input
            .env
            .iter()
            .map(|(key, value)| api::KeyValue {
                key: key.clone(),
                value: value.clone().into_bytes(),
            })
            .collect(),
        annotations: annotations(&input),
        log_path: format!("{}/{}.log", container.name, input.attempt),
        stdin: container.stdin.unwrap_or(false),
        stdin_once: container.stdin_once.unwrap_or(false),
        tty: container.tty.unwrap_or(false),
        linux: Some(api::LinuxContainerConfig {
            resources: Some(input.resources),
            security_context: Some(container_security(
                pod,
                container,
                input.image,
                input.target,
                input.node,
                input.userns,
            )?),
        }),
        stop_signal: stop_signal(container)?,
        devices: input.devices.devices.clone(),
        cdi_devices: input.devices.cdi_devices.clone(),
        mounts: input.mounts,
        labels,
        ..Default::default()
    })
}

fn annotations(input: &ContainerInput<'_>) -> HashMap<String, String> {
    let c = input.container;
    let mut all: HashMap<String, String> = input.devices.annotations.clone().into_iter().collect();
    let mut set = |name: &str, value: String| all.insert(name.to_owned(), value);
    set(names::RESTART_COUNT, input.attempt.to_string());
    set(
        names::TERMINATION_MESSAGE_PATH,
        c.termination_message_path.clone().unwrap_or_else(|| DEFAULT_MESSAGE_PATH.into()),
    );
    set(
        names::TERMINATION_MESSAGE_POLICY,
        c.termination_message_policy.clone().unwrap_or_else(|| "File".into()),
    );
    if let Some(grace) = spec_of(input.pod).termination_grace_period_seconds {
        set(names::POD_GRACE, grace.to_string());
    }
    if let Some(ports) = &c.ports
        && let Ok(json) = serde_json::to_string(ports)
    {
        set(names::PORTS, json);
    }
    if let Some(hook) = c.lifecycle.as_ref().and_then(|l| l.pre_stop.as_ref())
        && let Ok(json) = serde_json::to_string(hook)
    {
        set(names::PRE_STOP, json);
    }
    set(names::IMAGE, c.image.clone().unwrap_or_default());
    set(names::BACKOFF, input.backoff.to_string());
    if let Some(path) = input.message_file {
        set(names::MESSAGE_FILE, path.to_owned());
    }
    all
}

/// `lifecycle.stopSignal` (KEP-4960); the image's own where the pod names none.
fn stop_signal(container: &Container) -> Result<i32, ConfigError> {
    let Some(name) = container.lifecycle.as_ref().and_then(|l| l.stop_signal.as_deref()) else {
        return Ok(api::Signal::RuntimeDefault.into());
    };
    // The wire's names have no plus and minus signs.
    let wire = name.replace('+', "PLUS").replace('-', "MINUS");
    api::Signal::from_str_name(&wire)
        .map(Into::into)
        .ok_or_else(|| ConfigError::Invalid(format!("lifecycle.stopSignal {name:?} is no signal")))
}
