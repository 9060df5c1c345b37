//! Containers of RuntimeClass handlers: an OCI runtime's own program makes and starts them.
//!
//! The runtime inherits the mount namespace with the container's root file system and the
//! container's streams; what it leaves behind when it ends, the container's first process, becomes
//! the monitor's child as with the built-in runtime, and is followed, logged and entered alike.

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio as ProcessStdio};

use super::frame;
use super::launch::{Progress, Stdio, accept_terminal};
use super::protocol::StartContainer;
use crate::spec::user::Identity;

/// Creates and starts the container.
pub(super) fn launch(
    runtime: &Path,
    start: &StartContainer,
    stdio: Stdio,
    identity: Identity,
    progress: &UnixStream,
) -> Result<(), String> {
    let log = start.bundle.join("runtime.log");
    let pid_file = start.bundle.join("pid");
    let console = start.bundle.join("console.sock");
    let terminal = if start.tty {
        let _ = fs::remove_file(&console);
        Some(UnixListener::bind(&console).map_err(|e| format!("binding the console: {e}"))?)
    } else {
        None
    };
    let command = |verb: &str| {
        let mut command = Command::new(runtime);
        command.arg("--root").arg(start.bundle.join("oci"));
        command.arg("--log").arg(&log).args(["--log-format", "json", verb]);
        command.stdin(ProcessStdio::null()).stdout(ProcessStdio::null());
        command.stderr(ProcessStdio::null());
        command
    };
    let mut create = command("create");
    create.arg("--bundle").arg(&start.bundle).arg("--pid-file").arg(&pid_file);
    if start.tty {
        create.arg("--console-socket").arg(&console);
    } else {
        let given = |fd: Option<OwnedFd>| fd.map_or_else(ProcessStdio::null, ProcessStdio::from);
        create.stdin(given(stdio.stdin));
        create.stdout(given(stdio.stdout));
        create.stderr(given(stdio.stderr));
    }
    run(create.arg(&start.id), &log)?;
    // Its ends of the streams would keep them open.
    drop(create);
    let text = fs::read_to_string(&pid_file)
        .map_err(|e| format!("reading {}: {e}", pid_file.display()))?;
    let pid = text.trim().parse().map_err(|_| format!("{text:?} is not a process id"))?;
    let master = terminal.as_ref().map(accept_terminal).transpose()?;
    let fds: Vec<_> = master.iter().map(AsRawFd::as_raw_fd).collect();
    frame::send(progress, &Progress::Created { pid, user: identity }, &fds)
        .map_err(|e| format!("reporting to the monitor: {e}"))?;
    run(command("start").arg(&start.id), &log)?;
    frame::send(progress, &Progress::Running, &[]).map_err(|e| format!("reporting: {e}"))
}

/// Runs the runtime to its end; what it has to say about a failure is in its log.
fn run(command: &mut Command, log: &Path) -> Result<(), String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let status = command.status().map_err(|e| format!("running {program}: {e}"))?;
    if status.success() {
        return Ok(());
    }
    let text = fs::read_to_string(log).unwrap_or_default();
    Err(last_error(&text).unwrap_or_else(|| format!("{program} ended with {status}")))
}

/// The last error of a log of JSON lines.
pub(crate) fn last_error(log: &str) -> Option<String> {
    let said = |line: &str| {
        let entry: serde_json::Value = serde_json::from_str(line).ok()?;
        (entry["level"] == "error").then(|| entry["msg"].as_str().unwrap_or_default().to_owned())
    };
    log.lines().rev().find_map(said)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_error_is_what_is_told() {
        let log = "{\"level\":\"error\",\"msg\":\"first\"}\n\
                   {\"level\":\"error\",\"msg\":\"last\"}\n{\"level\":\"debug\",\"msg\":\"x\"}\nrubbish";
        assert_eq!(last_error(log), Some("last".to_owned()));
        assert_eq!(last_error(""), None);
    }
}
