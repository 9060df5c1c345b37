//! The hooks of a spec (OCI runtime spec, config.md, "POSIX-platform Hooks"): programs that are run
//! at points of a container's life, with its state on their standard input.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use oci_spec::runtime::Hook;
use serde_json::json;

/// How long a hook may take that does not say.
const PATIENCE: Duration = Duration::from_secs(60);

/// The most that is told of what a failing hook said, in bytes.
const MAX_WORDS: usize = 2048;

/// What hooks are told of the container (OCI runtime spec, runtime.md, "State").
pub(crate) struct State<'a> {
    pub id: &'a str,
    pub bundle: &'a Path,
    /// `creating`, `created`, `running` or `stopped`.
    pub status: &'static str,
    /// The first process as the node counts.
    pub pid: i32,
    /// The spec's annotations.
    pub annotations: Option<&'a HashMap<String, String>>,
}

/// Runs hooks one after the other; the first that fails ends it.
///
/// # Errors
/// With the hook's program and what it said.
pub(crate) fn run(hooks: &[Hook], state: &State<'_>) -> Result<(), String> {
    let text = json!({"ociVersion": "1.0.2", "id": state.id, "status": state.status,
        "pid": state.pid, "bundle": state.bundle,
        "annotations": state.annotations.unwrap_or(&HashMap::new())})
    .to_string();
    for hook in hooks {
        let path = hook.path().display();
        run_one(hook, &text).map_err(|e| format!("running the hook {path}: {e}"))?;
    }
    Ok(())
}

fn run_one(hook: &Hook, state: &str) -> io::Result<()> {
    let mut command = Command::new(hook.path());
    if let Some((name, arguments)) = hook.args().as_ref().and_then(|args| args.split_first()) {
        command.arg0(name).args(arguments);
    }
    let variables = hook.env().iter().flatten().filter_map(|entry| entry.split_once('='));
    command.env_clear().envs(variables);
    // A file, not a pipe: a hook need not read it, and may have ended when we write.
    let mut input = File::from(memfd_create(c"state", MFdFlags::MFD_CLOEXEC)?);
    input.write_all(state.as_bytes())?;
    input.rewind()?;
    command.stdin(Stdio::from(input)).stdout(Stdio::null()).stderr(Stdio::piped());
    let limit = hook.timeout().and_then(|t| u64::try_from(t).ok()).map(Duration::from_secs);
    let end = Instant::now() + limit.unwrap_or(PATIENCE);
    let mut child = command.spawn()?;
    let mut words = Vec::new();
    if let Some(mut errors) = child.stderr.take() {
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let mut polled = [PollFd::new(errors.as_fd(), PollFlags::POLLIN)];
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            if poll(&mut polled, timeout)? == 0 {
                let _ = child.kill();
                let _ = child.wait();
                let limit = limit.unwrap_or(PATIENCE).as_secs();
                return Err(io::Error::other(format!("it did not end within {limit} s")));
            }
            let mut buffer = [0u8; 512];
            match errors.read(&mut buffer)? {
                0 => break,
                read => words.extend_from_slice(&buffer[..read]),
            }
            words.truncate(MAX_WORDS);
        }
    }
    let status = child.wait()?;
    if status.success() {
        return Ok(());
    }
    let words = String::from_utf8_lossy(&words);
    Err(io::Error::other(format!("{status}: {}", words.trim())))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn hook(script: &str, timeout: Option<i64>) -> Hook {
        serde_json::from_value(json!({"path": "/bin/sh", "args": ["sh", "-c", script],
            "env": ["WHERE=here"], "timeout": timeout}))
        .unwrap()
    }

    fn state() -> State<'static> {
        State {
            id: "c1",
            bundle: Path::new("/bundle"),
            status: "creating",
            pid: 42,
            annotations: None,
        }
    }

    /// Of a pipe nobody reads the launching process would die, which ignores no signals.
    #[test]
    fn a_hook_is_told_by_a_file() {
        run(&[hook("test -f /proc/self/fd/0", None)], &state()).unwrap();
    }

    #[test]
    fn hooks_are_given_the_state_and_their_own_environment() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("said");
        let script = format!("read -r state; echo \"$WHERE $state $HOME\" > {}", file.display());
        run(&[hook(&script, None)], &state()).unwrap();
        let said = std::fs::read_to_string(file).unwrap();
        let text = said.trim().strip_prefix("here ").unwrap();
        let told: serde_json::Value = serde_json::from_str(text.trim()).unwrap();
        assert_eq!(
            (&told["id"], &told["pid"], &told["bundle"]),
            (&json!("c1"), &json!(42), &json!("/bundle"))
        );
    }

    #[test]
    fn a_hook_that_fails_or_hangs_is_named() {
        let error = run(&[hook("echo no device >&2; exit 3", None)], &state()).unwrap_err();
        assert!(error.contains("/bin/sh") && error.contains("no device"), "{error}");
        let error = run(&[hook("exec sleep 100", Some(1))], &state()).unwrap_err();
        assert!(error.contains("within 1 s"), "{error}");
    }
}
