//! A driver of the tests' own on a node: told to misbehave by files in its folder, and asked by them what
//! it was called for (see [`crate::driver`]).

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::command;
use super::node::Node;

/// Its folder and its process.
pub struct Scripted {
    /// As the node sees it.
    pub(super) inside: PathBuf,
    /// As the test does.
    pub(super) folder: PathBuf,
    child: Option<Child>,
}

impl Scripted {
    /// One that is not started yet.
    pub(super) fn prepare(node: &Node, inside: PathBuf) -> Self {
        let folder = node.path(&inside.display().to_string());
        Self { inside, folder, child: None }
    }

    pub(super) fn spawn(&mut self, command: &mut Command) -> Result<()> {
        let child = command.stdout(Stdio::null()).spawn();
        self.child = Some(child.with_context(|| format!("start {command:?}"))?);
        Ok(())
    }

    /// Makes `verb` fail with a gRPC code and words, or work again.
    ///
    /// # Errors
    /// What the file system says.
    pub fn fail(&self, verb: &str, with: Option<&str>) -> Result<()> {
        self.tell(&format!("fail-{verb}"), with)
    }

    /// Makes `verb` hang, or go on.
    ///
    /// # Errors
    /// What the file system says.
    pub fn hang(&self, verb: &str, hang: bool) -> Result<()> {
        self.tell(&format!("hang-{verb}"), hang.then_some(""))
    }

    fn tell(&self, file: &str, text: Option<&str>) -> Result<()> {
        let path = self.folder.join(file);
        match text {
            Some(text) => Ok(std::fs::write(path, text)?),
            None => Ok(std::fs::remove_file(path)?),
        }
    }

    /// What it was asked so far.
    pub fn calls(&self) -> Vec<Value> {
        let text = std::fs::read_to_string(self.folder.join("calls.jsonl")).unwrap_or_default();
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// Kills it; its socket stays, as after a crash.
    pub(super) fn end(&mut self) {
        let Some(mut child) = self.child.take() else { return };
        // nsenter forks to enter the PID namespace.
        for pid in command::descendants(child.id()) {
            let pid = nix::unistd::Pid::from_raw(pid as i32);
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
        }
        let _ = child.kill();
        let _ = child.wait();
    }
}

impl Drop for Scripted {
    fn drop(&mut self) {
        self.end();
    }
}
