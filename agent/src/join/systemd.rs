//! The systemd unit, where systemd runs this machine.

use std::path::Path;
use std::time::Duration;

use tokio::process::Command;

/// The unit.
pub const UNIT: &str = "longshore.service";
/// Longest wait for `systemctl`; the unit is Type=notify and may take a while to be ready.
const TIMEOUT: Duration = Duration::from_secs(90);

/// What became of the unit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UnitOutcome {
    /// systemd is not the init of this machine.
    NoSystemd,
    /// The unit is not installed.
    NoUnit,
    /// Done.
    Done,
    /// `systemctl` failed.
    Failed(String),
}

/// Whether systemd runs this machine (sd_booted(3)).
pub fn booted() -> bool {
    Path::new("/run/systemd/system").is_dir()
}

/// Enables the unit and starts it, or restarts it if it runs, so that it takes new credentials.
pub async fn enable_and_start() -> UnitOutcome {
    match installed().await {
        UnitOutcome::Done => {}
        other => return other,
    }
    match systemctl(&["enable", "--quiet", UNIT]).await {
        UnitOutcome::Done => systemctl(&["restart", UNIT]).await,
        other => other,
    }
}

/// Stops the unit and disables it.
pub async fn stop_and_disable() -> UnitOutcome {
    match installed().await {
        UnitOutcome::Done => systemctl(&["disable", "--now", "--quiet", UNIT]).await,
        other => other,
    }
}

/// Stops the kubelet's unit and keeps it from starting again.
pub async fn retire_kubelet() -> UnitOutcome {
    match booted() {
        true => systemctl(&["disable", "--now", "--quiet", "kubelet.service"]).await,
        false => UnitOutcome::NoSystemd,
    }
}

async fn installed() -> UnitOutcome {
    if !booted() {
        return UnitOutcome::NoSystemd;
    }
    match systemctl(&["cat", UNIT]).await {
        UnitOutcome::Failed(_) => UnitOutcome::NoUnit,
        other => other,
    }
}

async fn systemctl(arguments: &[&str]) -> UnitOutcome {
    let run = Command::new("systemctl").args(arguments).kill_on_drop(true).output();
    match tokio::time::timeout(TIMEOUT, run).await {
        Ok(Ok(output)) if output.status.success() => UnitOutcome::Done,
        Ok(Ok(output)) => {
            let said = String::from_utf8_lossy(&output.stderr);
            let said = said.lines().next().unwrap_or("no reason is given");
            UnitOutcome::Failed(format!("systemctl {}: {said}", arguments.join(" ")))
        }
        Ok(Err(error)) => UnitOutcome::Failed(format!("cannot run systemctl: {error}")),
        Err(_) => UnitOutcome::Failed(format!(
            "systemctl {} did not end within {} s; see `journalctl -u {UNIT}`",
            arguments.join(" "),
            TIMEOUT.as_secs()
        )),
    }
}
