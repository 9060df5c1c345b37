//! The `poststop` hooks of a container (of a base spec or a CDI device): run when it has ended.
//!
//! They are noted beside the container's record when it starts and the note goes when they have run,
//! so that they also run after a crash of the shim: at the latest when the container is removed.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use oci_spec::runtime::{Hook, Spec};
use serde::{Deserialize, Serialize};

use super::blocking;
use super::store::Container;
use crate::monitor::{hooks, record};
use crate::state::{Layout, ignore_absent};

const NOTE: &str = "poststop.json";

#[derive(Serialize, Deserialize)]
struct Note {
    hooks: Vec<Hook>,
    bundle: PathBuf,
    annotations: Option<HashMap<String, String>>,
}

/// Notes the hooks of a container that is about to start.
pub(super) fn note(layout: &Layout, id: &str, spec: &Spec) -> io::Result<()> {
    let hooks = spec.hooks().as_ref().and_then(|hooks| hooks.poststop().clone());
    let Some(hooks) = hooks.filter(|hooks| !hooks.is_empty()) else { return Ok(()) };
    let (bundle, annotations) = (layout.bundle(id), spec.annotations().clone());
    record::write(&layout.container(id), NOTE, &Note { hooks, bundle, annotations })
}

/// Runs what is noted, once. A hook that fails is logged: nothing can be made undone any more.
pub(super) async fn run(layout: Layout, container: Arc<Container>) {
    let directory = layout.container(&container.id);
    if !directory.join(NOTE).exists() {
        return;
    }
    let _running = container.poststop.lock().await;
    let id = container.id.clone();
    let done = blocking(move || {
        let Some(note) = record::read::<Note>(&directory, NOTE)? else { return Ok(()) };
        let state = hooks::State {
            id: &id,
            bundle: &note.bundle,
            status: "stopped",
            pid: 0,
            annotations: note.annotations.as_ref(),
        };
        for hook in &note.hooks {
            if let Err(error) = hooks::run(std::slice::from_ref(hook), &state) {
                tracing::warn!(container = id, error, "a poststop hook failed");
            }
        }
        ignore_absent(fs::remove_file(directory.join(NOTE)))
    })
    .await;
    match done {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!(container = container.id, %error, "poststop hooks"),
        Err(error) => tracing::warn!(container = container.id, %error, "poststop hooks"),
    }
}
