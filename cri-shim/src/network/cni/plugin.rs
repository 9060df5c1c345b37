//! Running one CNI plugin (CNI specification 1.1, section 4 "Plugin Execution Protocol").
//!
//! A plugin is a program of somebody else: what it writes is bounded, its time is, and when that is
//! over everything it started ends with it.

use std::{
    io,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use serde::Deserialize;
use serde_json::Value;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt},
    process::{Child, Command},
};

use super::{processes, version::Version};

/// How long a plugin that has ended may keep its output open by what it started.
const LINGER: Duration = Duration::from_secs(2);
/// The largest result, in bytes.
const LARGEST_RESULT: usize = 1 << 20;
/// What is kept of the standard error, in bytes.
const KEPT_ERRORS: usize = 16 << 10;
/// What is shown of a plugin's words, in characters.
const SHOWN: usize = 1000;
/// How often, and after what time, a program that is just being replaced is tried again.
const BUSY: (u32, Duration) = (10, Duration::from_millis(200));

/// What plugins are told beside their input.
#[derive(Debug, Clone)]
pub(crate) struct Call<'a> {
    pub(crate) command: &'static str,
    /// Empty for commands that are about no sandbox.
    pub(crate) container: &'a str,
    /// Empty when the namespace is gone.
    pub(crate) netns: String,
    pub(crate) interface: &'a str,
    /// `CNI_ARGS`
    pub(crate) arguments: &'a str,
    pub(crate) path: &'a [PathBuf],
    pub(crate) timeout: Duration,
}

impl<'a> Call<'a> {
    /// A call that is about no sandbox: GC, STATUS, VERSION.
    pub(crate) fn of_network(
        command: &'static str,
        path: &'a [PathBuf],
        timeout: Duration,
    ) -> Self {
        let netns = String::new();
        Self { command, container: "", netns, interface: "", arguments: "", path, timeout }
    }
}

#[derive(Deserialize)]
struct PluginError {
    #[serde(default)]
    code: u64,
    #[serde(default)]
    msg: String,
    #[serde(default)]
    details: String,
}

/// Why a plugin gave no result.
#[derive(Debug, Clone)]
pub(crate) struct Failed {
    /// The plugin's own message, its standard error, or how it ended.
    pub(crate) reason: String,
    /// It did not even begin.
    pub(crate) absent: bool,
}

impl Failed {
    fn new(reason: impl Into<String>) -> Self {
        Self { reason: reason.into(), absent: false }
    }
}

/// Runs plugin `kind` with `input`; its result.
///
/// # Errors
/// [`Failed`].
pub(crate) async fn run(kind: &str, call: &Call<'_>, input: &Value) -> Result<Value, Failed> {
    let program = find(kind, call.path).ok_or_else(|| {
        let folders: Vec<_> = call.path.iter().map(|path| path.display().to_string()).collect();
        let reason = format!("not found in {}; install it there", folders.join(", "));
        Failed { reason, absent: true }
    })?;
    let mark = processes::Mark::new(call.container, &call.netns);
    let mut child = spawn(&program, call, &mark)
        .await
        .map_err(|error| Failed { reason: format!("cannot be run: {error}"), absent: true })?;
    let text = serde_json::to_vec(input).map_err(|error| Failed::new(error.to_string()))?;
    let ended = tokio::time::timeout(call.timeout, converse(&mut child, &text)).await;
    let answer = match ended {
        Ok(Ok(answer)) => answer,
        Ok(Err(error)) => {
            processes::kill(&mark);
            return Err(Failed::new(error.to_string()));
        }
        Err(_) => {
            processes::kill(&mark);
            let seconds = call.timeout.as_secs_f32();
            return Err(Failed::new(format!(
                "no answer in {seconds} s; it was killed with all it started"
            )));
        }
    };
    answer.read()
}

/// The versions a plugin says it knows. One that does not know the question knows 0.1.0.
pub(crate) async fn versions(
    kind: &str,
    path: &[PathBuf],
    timeout: Duration,
) -> Result<Vec<Version>, Failed> {
    let call = Call::of_network("VERSION", path, timeout);
    let input = serde_json::json!({"cniVersion": Version::NEWEST.to_string()});
    match run(kind, &call, &input).await {
        Ok(answer) => {
            let list = answer.get("supportedVersions").and_then(Value::as_array);
            let texts = list.into_iter().flatten().filter_map(Value::as_str);
            Ok(texts.filter_map(|text| text.parse().ok()).collect())
        }
        Err(failed) if failed.reason.contains("unknown CNI_COMMAND") => Ok(vec![Version::OLDEST]),
        Err(failed) => Err(failed),
    }
}

async fn spawn(program: &Path, call: &Call<'_>, mark: &processes::Mark) -> io::Result<Child> {
    let search = std::env::join_paths(call.path).map_err(io::Error::other)?;
    let mut command = Command::new(program);
    command
        .env("CNI_COMMAND", call.command)
        .env("CNI_CONTAINERID", call.container)
        .env("CNI_NETNS", &call.netns)
        .env("CNI_IFNAME", call.interface)
        .env("CNI_ARGS", call.arguments)
        .env("CNI_PATH", search)
        .env(processes::VARIABLE, mark.value())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true);
    let mut tries = 0;
    loop {
        match command.spawn() {
            Err(error) if error.kind() == io::ErrorKind::ExecutableFileBusy && tries < BUSY.0 => {
                tries += 1;
                tokio::time::sleep(BUSY.1).await;
            }
            other => return other,
        }
    }
}

struct Answer {
    status: ExitStatus,
    result: Vec<u8>,
    too_large: bool,
    errors: Vec<u8>,
}

async fn converse(child: &mut Child, input: &[u8]) -> io::Result<Answer> {
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let feed = async {
        if let Some(mut stdin) = stdin {
            match stdin.write_all(input).await {
                // It ended without reading all; its answer says more.
                Err(error) if error.kind() != io::ErrorKind::BrokenPipe => return Err(error),
                _ => {}
            }
        }
        Ok(())
    };
    let (mut result, mut errors) = (Kept::first(LARGEST_RESULT), Kept::last(KEPT_ERRORS));
    let status = {
        let listen =
            async { tokio::try_join!(feed, result.fill(stdout), errors.fill(stderr)).map(drop) };
        tokio::pin!(listen);
        tokio::select! {
            heard = &mut listen => {
                heard?;
                child.wait().await?
            }
            status = child.wait() => {
                let status = status?;
                // What it left running may hold its output open; all it said itself is there.
                if let Ok(heard) = tokio::time::timeout(LINGER, &mut listen).await {
                    heard?;
                }
                status
            }
        }
    };
    Ok(Answer { status, too_large: result.lost, result: result.bytes, errors: errors.bytes })
}

/// A bounded part of what is read.
struct Kept {
    bytes: Vec<u8>,
    most: usize,
    keep_last: bool,
    lost: bool,
}

impl Kept {
    fn first(most: usize) -> Self {
        Self { bytes: Vec::new(), most, keep_last: false, lost: false }
    }

    fn last(most: usize) -> Self {
        Self { keep_last: true, ..Self::first(most) }
    }

    async fn fill(&mut self, from: Option<impl AsyncRead + Unpin>) -> io::Result<()> {
        let Some(mut from) = from else {
            return Ok(());
        };
        let mut buffer = [0; 8 << 10];
        loop {
            let read = from.read(&mut buffer).await?;
            if read == 0 {
                return Ok(());
            }
            self.add(&buffer[..read]);
        }
    }

    fn add(&mut self, bytes: &[u8]) {
        if self.keep_last {
            self.bytes.extend_from_slice(bytes);
            let over = self.bytes.len().saturating_sub(self.most);
            self.bytes.drain(..over);
            self.lost |= over > 0;
        } else {
            let room = self.most - self.bytes.len();
            self.bytes.extend_from_slice(&bytes[..bytes.len().min(room)]);
            self.lost |= bytes.len() > room;
        }
    }
}

impl Answer {
    fn read(self) -> Result<Value, Failed> {
        if self.status.success() {
            if self.result.iter().all(u8::is_ascii_whitespace) {
                return Ok(Value::Null);
            }
            if self.too_large {
                let reason = format!("its result is larger than {LARGEST_RESULT} bytes");
                return Err(Failed::new(reason));
            }
            return serde_json::from_slice(&self.result).map_err(|error| {
                let shown = shorten(&self.result, false);
                Failed::new(format!("its result is no JSON ({error}): {shown}"))
            });
        }
        let mut reason = match serde_json::from_slice::<PluginError>(&self.result) {
            Ok(PluginError { code, msg, details }) if !msg.is_empty() => {
                let msg = shorten(msg.as_bytes(), false);
                let details = shorten(details.as_bytes(), false);
                let details = if details.is_empty() { details } else { format!(": {details}") };
                format!("{msg}{details} (code {code})")
            }
            _ => format!("{} {}", self.status, shorten(&self.result, false)).trim().to_owned(),
        };
        let errors = shorten(&self.errors, true);
        if !errors.is_empty() {
            reason = format!("{reason}; {errors}");
        }
        Err(Failed::new(reason))
    }
}

/// Where plugin `kind` is.
pub(crate) fn find(kind: &str, path: &[PathBuf]) -> Option<PathBuf> {
    path.iter().map(|folder| folder.join(kind)).find(|file: &PathBuf| is_program(file))
}

fn is_program(file: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    file.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

/// The first or the last of what a plugin said.
fn shorten(bytes: &[u8], last: bool) -> String {
    let text = String::from_utf8_lossy(bytes);
    let text = text.trim();
    let count = text.chars().count();
    if count <= SHOWN {
        return text.to_owned();
    }
    if last {
        format!("…{}", text.chars().skip(count - SHOWN).collect::<String>())
    } else {
        format!("{}…", text.chars().take(SHOWN).collect::<String>())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn plugin(folder: &Path, script: &str) {
        let path = folder.join("p");
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// Each test is a process.
    fn netns() -> String {
        format!("/ns{}", std::process::id())
    }

    fn call(path: &[PathBuf], seconds: f32) -> Call<'_> {
        Call {
            command: "ADD",
            container: "c",
            netns: netns(),
            interface: "eth0",
            arguments: "",
            path,
            timeout: Duration::from_secs_f32(seconds),
        }
    }

    fn alive(pid: &str) -> bool {
        // A killed process that nobody has waited for yet is dead.
        std::fs::read_to_string(format!("/proc/{}/stat", pid.trim()))
            .is_ok_and(|stat| !stat.contains(") Z "))
    }

    #[tokio::test]
    async fn a_hung_plugin_is_killed_with_all_it_started() {
        let folder = tempfile::tempdir().unwrap();
        let pids = folder.path().join("pids");
        plugin(
            folder.path(),
            &format!(
                "sleep 300 & echo $! >> {0}\nsetsid sh -c 'echo $$ >> {0}; sleep 300 & echo $! >> {0}; wait' &\n\
                 sleep 300",
                pids.display()
            ),
        );
        let path = [folder.path().to_owned()];
        let failed = run("p", &call(&path, 1.0), &Value::Null).await.unwrap_err();
        assert!(failed.reason.contains("killed") && !failed.absent, "{failed:?}");
        let pids = std::fs::read_to_string(pids).unwrap();
        assert_eq!(pids.lines().count(), 3, "{pids}");
        for _ in 0..100 {
            if !pids.lines().any(alive) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("something lives on: {pids}");
    }

    #[tokio::test]
    async fn what_a_plugin_leaves_running_does_not_hold_its_answer() {
        let folder = tempfile::tempdir().unwrap();
        plugin(folder.path(), "sleep 20 &\necho '{\"a\":1}'");
        let path = [folder.path().to_owned()];
        let result = run("p", &call(&path, 15.0), &Value::Null).await.unwrap();
        assert_eq!(result, serde_json::json!({"a": 1}));
        processes::kill_of("c", &netns());
    }

    #[tokio::test]
    async fn its_words_are_bounded_and_the_last_errors_shown() {
        let folder = tempfile::tempdir().unwrap();
        let path = [folder.path().to_owned()];
        plugin(folder.path(), "head -c 3000000 /dev/zero | tr '\\0' x\nexit 0");
        let failed = run("p", &call(&path, 20.0), &Value::Null).await.unwrap_err();
        assert!(failed.reason.contains("larger than"), "{failed:?}");
        plugin(
            folder.path(),
            "head -c 300000 /dev/zero | tr '\\0' x >&2\necho the end >&2\necho not json\nexit 7",
        );
        let reason = run("p", &call(&path, 20.0), &Value::Null).await.unwrap_err().reason;
        for want in ["exit status: 7", "not json", "the end"] {
            assert!(reason.contains(want), "{want}: {reason}");
        }
        assert!(reason.len() < 4000);
        let absent = run("q", &call(&path, 1.0), &Value::Null).await.unwrap_err();
        assert!(absent.absent && absent.reason.contains("not found in"), "{absent:?}");
    }

    #[tokio::test]
    async fn plugins_tell_their_versions() {
        let folder = tempfile::tempdir().unwrap();
        let path = [folder.path().to_owned()];
        let ask = || versions("p", &path, Duration::from_secs(20));
        plugin(
            folder.path(),
            "[ $CNI_COMMAND = VERSION ] && echo '{\"cniVersion\":\"1.1.0\",\"supportedVersions\":[\"1.0.0\",\"1.1.0\",\"x\"]}'",
        );
        let told: Vec<_> = ask().await.unwrap().iter().map(ToString::to_string).collect();
        assert_eq!(told, ["1.0.0", "1.1.0"]);
        plugin(
            folder.path(),
            "echo '{\"code\":4,\"msg\":\"unknown CNI_COMMAND: VERSION\"}'; exit 1",
        );
        assert_eq!(ask().await.unwrap(), [Version::OLDEST]);
        plugin(folder.path(), "exit 1");
        assert!(ask().await.is_err());
    }
}
