//! Short ways to write pods and instances in tests.

use std::collections::HashMap;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Pod;

use super::observed::{Container, ContainerId, ContainerState, Sandbox, SandboxId};

/// `seconds` after the tests' beginning of time.
pub fn at(seconds: i64) -> Timestamp {
    Timestamp::from_second(1_700_000_000).unwrap() + SignedDuration::from_secs(seconds)
}

/// A pod `default/p` with UID `u` and this spec, in JSON.
pub fn pod(spec: &str) -> Pod {
    let spec: serde_json::Value = serde_json::from_str(spec).unwrap();
    serde_json::from_value(serde_json::json!({
        "metadata": {"name": "p", "namespace": "default", "uid": "u", "generation": 1},
        "spec": spec,
    }))
    .unwrap()
}

/// An instance that was created at `created` and is in `state`.
pub fn instance(name: &str, attempt: u32, created: Timestamp, state: ContainerState) -> Container {
    Container {
        id: ContainerId::from(format!("{name}-{attempt}").as_str()),
        sandbox: SandboxId::from("s0"),
        name: name.into(),
        attempt,
        state,
        created_at: created,
        started_at: (state != ContainerState::Created).then_some(created),
        finished_at: None,
        exit_code: 0,
        reason: String::new(),
        message: String::new(),
        image: "img".into(),
        image_ref: "img@sha256:0".into(),
        image_id: "sha256:0".into(),
        annotations: HashMap::new(),
        resources: None,
        user: None,
        log_path: String::new(),
        termination_message: None,
    }
}

/// A running instance.
pub fn running(name: &str, attempt: u32, created: Timestamp) -> Container {
    instance(name, attempt, created, ContainerState::Running)
}

/// An instance that ended.
pub fn exited(name: &str, attempt: u32, from: Timestamp, to: Timestamp, code: i32) -> Container {
    Container {
        finished_at: Some(to),
        exit_code: code,
        ..instance(name, attempt, from, ContainerState::Exited)
    }
}

/// Sandbox `s<attempt>`, ready, with an address.
pub fn sandbox(attempt: u32) -> Sandbox {
    Sandbox {
        id: SandboxId::from(format!("s{attempt}").as_str()),
        attempt,
        ready: true,
        created_at: at(0),
        ips: vec!["10.0.0.1".into()],
    }
}
