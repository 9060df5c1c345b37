//! Runs a credential provider's program: a request on its input, an answer on its output, within a
//! minute and within bounds. A program that hangs is killed with all that it started.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use async_trait::async_trait;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;

use super::leftover;

/// How long a program may take, as under kubelet.
pub const TIMEOUT: Duration = Duration::from_secs(60);
/// An answer is smaller than this, bytes.
const MAX_ANSWER: usize = 1 << 20;
/// So much of what it says on its error output is told, bytes.
const MAX_WORDS: usize = 2048;
/// Once the program has ended, what it left running may hold its output open for so long.
const LINGER: Duration = Duration::from_secs(1);

/// Why there is no answer. Never with what the program wrote to its output.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExecError {
    /// It cannot be started.
    #[error("start {program}: {cause}")]
    Start {
        /// Its file.
        program: String,
        /// Why.
        cause: String,
    },
    /// It did not end in time, and was killed.
    #[error("{program} did not answer within {} s and was killed{words}", TIMEOUT.as_secs())]
    Timeout {
        /// Its file.
        program: String,
        /// What it said.
        words: String,
    },
    /// It ended with an error.
    #[error("{program} ended with {status}{words}")]
    Failed {
        /// Its file.
        program: String,
        /// How.
        status: String,
        /// What it said.
        words: String,
    },
    /// It answers without end.
    #[error("{program} answered more than {} KiB and was killed", MAX_ANSWER >> 10)]
    TooLong {
        /// Its file.
        program: String,
    },
}

/// One run.
pub struct Run {
    /// The program's file.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<String>,
    /// Variables beside the node's own.
    pub env: Vec<(String, String)>,
    /// What it reads.
    pub input: Vec<u8>,
    /// What must not be repeated of what it says.
    pub secret: String,
}

/// Runs programs.
#[async_trait]
pub trait Exec: Send + Sync + 'static {
    /// What the program wrote to its output.
    async fn run(&self, run: Run) -> Result<Vec<u8>, ExecError>;
}

/// Runs them for real.
pub struct Programs {
    /// By which they are found again if this agent is killed; see [`super::mark`].
    pub mark: String,
}

/// Ends what is left of the program's process group when the run is over, however it ends.
struct Group(Option<Pid>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(group) = self.0 {
            let _ = killpg(group, Signal::SIGKILL);
        }
    }
}

#[async_trait]
impl Exec for Programs {
    async fn run(&self, run: Run) -> Result<Vec<u8>, ExecError> {
        let program = run.program.display().to_string();
        let start = |cause: String| ExecError::Start { program: program.clone(), cause };
        let mut command = Command::new(&run.program);
        command
            .args(run.args.iter().map(OsString::from))
            .envs(run.env.iter().map(|(name, value)| (name, value)))
            .env(leftover::VARIABLE, &self.mark)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true);
        let mut child = command.spawn().map_err(|error| start(error.to_string()))?;
        let pid = child.id().and_then(|pid| i32::try_from(pid).ok()).map(Pid::from_raw);
        let mut group = Group(pid);
        let (stdin, stdout, stderr) =
            (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let (Some(mut stdin), Some(stdout), Some(stderr)) = (stdin, stdout, stderr) else {
            return Err(start("it has no pipes".to_owned()));
        };
        let (mut answer, mut said) = (Vec::new(), Vec::new());
        let input = run.input;
        // A program that does not read its input is no error.
        let write = async move {
            let _ = stdin.write_all(&input).await;
        };
        let ended = {
            let io = async {
                tokio::join!(write, take(stdout, &mut answer, MAX_ANSWER), drain(stderr, &mut said))
            };
            tokio::pin!(io);
            let whole = async {
                let (status, done) = tokio::select! {
                    status = child.wait() => (status, false),
                    (_, more, ()) = &mut io => {
                        if more {
                            return End::TooLong;
                        }
                        (child.wait().await, true)
                    }
                };
                if !done && let Ok((_, true, ())) = tokio::time::timeout(LINGER, &mut io).await {
                    return End::TooLong;
                }
                End::Status(status.map_err(|error| error.to_string()))
            };
            tokio::time::timeout(TIMEOUT, whole).await
        };
        let words = words(&said, &answer, &run.secret);
        match ended {
            Err(_) => Err(ExecError::Timeout { program, words }),
            Ok(End::TooLong) => Err(ExecError::TooLong { program }),
            Ok(End::Status(Ok(status))) => {
                // What it left running is its own business, as under kubelet.
                group.0 = None;
                match status.success() {
                    true => Ok(answer),
                    false => Err(ExecError::Failed { program, status: show(status), words }),
                }
            }
            Ok(End::Status(Err(cause))) => Err(start(cause)),
        }
    }
}

enum End {
    Status(Result<ExitStatus, String>),
    TooLong,
}

/// Reads up to `max` bytes; whether there are more.
async fn take(from: impl AsyncRead + Unpin, into: &mut Vec<u8>, max: usize) -> bool {
    let limit = u64::try_from(max).unwrap_or(u64::MAX).saturating_add(1);
    let _ = from.take(limit).read_to_end(into).await;
    into.len() > max
}

/// Reads to the end and keeps the beginning.
async fn drain(mut from: impl AsyncRead + Unpin, into: &mut Vec<u8>) {
    let mut buffer = [0; 1024];
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        let room = MAX_WORDS.saturating_sub(into.len());
        into.extend_from_slice(&buffer[..count.min(room)]);
    }
}

fn show(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt as _;
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (_, Some(signal)) => format!("signal {signal}"),
        _ => status.to_string(),
    }
}

/// What a program said, on one line, without `secret` and without any string of its answer that could
/// be one.
fn words(said: &[u8], answer: &[u8], secret: &str) -> String {
    let mut text = String::from_utf8_lossy(said).trim().to_owned();
    let mut secrets = vec![secret.to_owned()];
    // Also of an answer that is broken off.
    let answer = String::from_utf8_lossy(answer);
    secrets.extend(answer.split('"').filter(|part| part.len() >= 6).map(str::to_owned));
    secrets.sort_by_key(|secret| std::cmp::Reverse(secret.len()));
    for secret in secrets.iter().filter(|secret| !secret.is_empty()) {
        text = text.replace(secret.as_str(), "[hidden]");
    }
    let text: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    if text.is_empty() { text } else { format!(": {text}") }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;
    use std::path::Path;

    use super::*;

    /// Runs a shell script as a program.
    async fn run(dir: &Path, script: &str) -> Result<Vec<u8>, ExecError> {
        let program = dir.join("program");
        std::fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        let run = Run {
            program,
            args: vec!["one".into(), "two three".into()],
            env: vec![("WHO".into(), "me".into())],
            input: b"{\"image\":\"r.io/a\"}\n".to_vec(),
            secret: "the-token".into(),
        };
        Programs { mark: "1:1".into() }.run(run).await
    }

    #[tokio::test]
    async fn a_program_reads_writes_and_is_given_its_arguments() {
        let dir = tempfile::tempdir().unwrap();
        let said = run(dir.path(), "cat; echo \"$WHO $1 $2 ${PATH:+path}\"").await.unwrap();
        assert_eq!(
            String::from_utf8(said).unwrap(),
            "{\"image\":\"r.io/a\"}\nme one two three path\n"
        );
        // One that never reads, and one that leaves a child with its output.
        assert_eq!(run(dir.path(), "echo x").await.unwrap(), b"x\n");
        assert_eq!(run(dir.path(), "sleep 5 & echo x").await.unwrap(), b"x\n");
    }

    #[tokio::test]
    async fn what_fails_is_told_without_secrets() {
        let dir = tempfile::tempdir().unwrap();
        let script =
            "echo '{\"password\":\"hunter22\"}'; printf 'bad hunter22\\nand the-token' >&2; exit 3";
        let error = run(dir.path(), script).await.unwrap_err().to_string();
        assert!(error.ends_with("ended with exit code 3: bad [hidden] and [hidden]"), "{error}");
        let error = run(dir.path(), "kill -9 $$").await.unwrap_err().to_string();
        assert!(error.ends_with("ended with signal 9"), "{error}");
        let error = run(dir.path(), "cat /dev/zero").await.unwrap_err();
        assert!(matches!(error, ExecError::TooLong { .. }), "{error}");
        let gone = Run {
            program: dir.path().join("none"),
            args: vec![],
            env: vec![],
            input: vec![],
            secret: String::new(),
        };
        let error = Programs { mark: "1:1".into() }.run(gone).await.unwrap_err();
        assert!(matches!(error, ExecError::Start { .. }), "{error}");
    }

    #[tokio::test]
    async fn a_program_that_hangs_is_killed_with_its_children() {
        let dir = tempfile::tempdir().unwrap();
        let pids = dir.path().join("pids");
        let script =
            format!("sleep 1000 & echo $! $$ > {0}.new; mv {0}.new {0}; wait", pids.display());
        let folder = dir.path().to_owned();
        let running = tokio::spawn(async move { run(&folder, &script).await });
        while !pids.exists() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        // The minute passes at once.
        tokio::time::pause();
        let error = running.await.unwrap().unwrap_err();
        assert!(matches!(error, ExecError::Timeout { .. }), "{error}");
        tokio::time::resume();
        for pid in std::fs::read_to_string(&pids).unwrap().split_whitespace() {
            let state = || std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            let mut tries = 0;
            while !state().is_empty() && !state().contains(") Z ") {
                tries += 1;
                assert!(tries < 500, "{pid} runs on: {}", state());
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    }
}
