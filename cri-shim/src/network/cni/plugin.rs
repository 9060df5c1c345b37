//! Running one CNI plugin (CNI specification 1.1, section 4 "Plugin Execution Protocol").

use std::{
    io,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use serde::Deserialize;
use serde_json::Value;
use tokio::{io::AsyncWriteExt, process::Command};

/// How long a plugin may take: IPAM over DHCP is slow, a hung plugin must not hold a pod for ever.
const TIMEOUT: Duration = Duration::from_secs(90);

/// What plugins are told beside their input.
#[derive(Debug, Clone)]
pub(crate) struct Call<'a> {
    pub(crate) command: &'static str,
    pub(crate) container: &'a str,
    /// Empty when the namespace is gone.
    pub(crate) netns: String,
    pub(crate) args: &'a str,
    pub(crate) path: &'a [PathBuf],
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

/// Runs plugin `kind` with `input`; its result, or what went wrong.
///
/// # Errors
/// The plugin's own message, its standard error, or how it ended.
pub(crate) async fn run(kind: &str, call: &Call<'_>, input: &Value) -> Result<Value, String> {
    let program = find(kind, call.path).ok_or_else(|| {
        let folders: Vec<_> = call.path.iter().map(|path| path.display().to_string()).collect();
        format!("not found in {}; install it there", folders.join(", "))
    })?;
    let search = std::env::join_paths(call.path).map_err(|error| error.to_string())?;
    let mut child = Command::new(program)
        .env("CNI_COMMAND", call.command)
        .env("CNI_CONTAINERID", call.container)
        .env("CNI_NETNS", &call.netns)
        .env("CNI_IFNAME", "eth0")
        .env("CNI_ARGS", call.args)
        .env("CNI_PATH", search)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| format!("cannot be run: {error}"))?;
    let text = serde_json::to_vec(input).map_err(|error| error.to_string())?;
    let stdin = child.stdin.take();
    let feed = async {
        if let Some(mut stdin) = stdin {
            match stdin.write_all(&text).await {
                // It ended without reading all; its answer says more.
                Err(error) if error.kind() != io::ErrorKind::BrokenPipe => return Err(error),
                _ => {}
            }
        }
        Ok(())
    };
    let both = async { tokio::try_join!(feed, child.wait_with_output()) };
    let output = match tokio::time::timeout(TIMEOUT, both).await {
        Ok(Ok(((), output))) => output,
        Ok(Err(error)) => return Err(error.to_string()),
        Err(_) => return Err(format!("no answer in {} s; it was killed", TIMEOUT.as_secs())),
    };
    let stderr = shorten(&output.stderr);
    if output.status.success() {
        if output.stdout.iter().all(u8::is_ascii_whitespace) {
            return Ok(Value::Null);
        }
        return serde_json::from_slice(&output.stdout).map_err(|error| {
            format!("its result is no JSON ({error}): {}", shorten(&output.stdout))
        });
    }
    let mut reason = match serde_json::from_slice::<PluginError>(&output.stdout) {
        Ok(PluginError { code, msg, details }) if !msg.is_empty() => {
            let details = if details.is_empty() { details } else { format!(": {details}") };
            format!("{msg}{details} (code {code})")
        }
        _ => format!("{} {}", output.status, shorten(&output.stdout)).trim().to_owned(),
    };
    if !stderr.is_empty() {
        reason = format!("{reason}; {stderr}");
    }
    Err(reason)
}

fn find(kind: &str, path: &[PathBuf]) -> Option<PathBuf> {
    path.iter().map(|folder| folder.join(kind)).find(|file: &PathBuf| is_program(file))
}

fn is_program(file: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    file.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

fn shorten(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let text = text.trim();
    match text.char_indices().nth(1000) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}
