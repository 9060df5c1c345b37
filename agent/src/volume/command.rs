//! The system's own tools for file systems, each with a time in which it must end.

use std::io;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

/// What a tool said.
#[derive(Debug)]
pub(super) struct Said {
    pub(super) status: ExitStatus,
    /// Both of its outputs.
    pub(super) text: String,
}

/// Runs `program` from PATH. Blocking, for threads that may.
pub(super) fn run(program: &str, arguments: &[&str], patience: Duration) -> io::Result<Said> {
    let mut command = tokio::process::Command::new(program);
    command.args(arguments).env("LC_ALL", "C").stdin(Stdio::null()).kill_on_drop(true);
    tracing::debug!(program, ?arguments, "running a tool");
    let work = async { tokio::time::timeout(patience, command.output()).await };
    match tokio::runtime::Handle::current().block_on(work) {
        Ok(output) => {
            let output = output?;
            let text = [output.stdout, output.stderr].concat();
            let text = String::from_utf8_lossy(&text).trim().to_owned();
            Ok(Said { status: output.status, text })
        }
        Err(_) => Err(io::Error::new(
            io::ErrorKind::TimedOut,
            format!("{program} has not ended within {} s", patience.as_secs()),
        )),
    }
}

/// The arguments of mount(8).
pub(super) fn plan_mount(kind: &str, options: &[&str], source: &str, target: &Path) -> Vec<String> {
    let mut arguments = vec!["-t".to_owned(), kind.to_owned()];
    if !options.is_empty() {
        arguments.extend(["-o".to_owned(), options.join(",")]);
    }
    arguments.extend([source.to_owned(), target.display().to_string()]);
    arguments
}

/// Mounts by mount(8), which knows the options of every file system and has helpers for some; why not,
/// otherwise.
pub(super) fn mount(arguments: &[String], patience: Duration) -> Result<(), String> {
    let list: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let command = format!("mount {}", list.join(" "));
    match run("mount", &list, patience) {
        Ok(said) if said.status.success() => Ok(()),
        Ok(said) => Err(format!("mount failed: {}\n{command}\nOutput: {}", said.status, said.text)),
        Err(error) => Err(format!("mount failed: {error}\n{command}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_stand_before_what_is_mounted() {
        let of = |options: &[&str]| plan_mount("nfs", options, "s:/p", Path::new("/t"));
        assert_eq!(of(&[]), ["-t", "nfs", "s:/p", "/t"]);
        assert_eq!(of(&["hard", "ro"]), ["-t", "nfs", "-o", "hard,ro", "s:/p", "/t"]);
    }

    #[tokio::test]
    async fn a_tool_that_does_not_end_is_ended() {
        let work = tokio::task::spawn_blocking(|| {
            let said = run("sh", &["-c", "echo out; echo err >&2; exit 3"], Duration::from_secs(9));
            let late = run("sleep", &["60"], Duration::from_millis(50));
            (said.unwrap(), late.unwrap_err())
        });
        let (said, late) = work.await.unwrap();
        assert_eq!((said.status.code(), said.text.as_str()), (Some(3), "out\nerr"));
        assert_eq!(late.kind(), io::ErrorKind::TimedOut);
    }
}
