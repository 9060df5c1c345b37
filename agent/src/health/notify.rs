//! systemd: READY when the node works, WATCHDOG while its loops go round. Ready is also when the start
//! is over, and what it needed can be let go of.

use std::sync::Arc;
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::sync::watch;

use super::check::Watched;

/// How often readiness is looked at before it is told.
const STEP: Duration = Duration::from_millis(100);

/// So long after the node is ready the code of its start is taken for done with, and again and again
/// what was needed once since, as after somebody flushed the rules. What is in use comes back by some
/// hundred faults that read nothing: a tenth of a millisecond.
const SETTLED: Duration = Duration::from_secs(10);

/// Lets go of code that has been used and is not any more.
async fn settle() {
    loop {
        tokio::time::sleep(SETTLED).await;
        crate::sys::unmap_unused_text();
    }
}

/// Tells systemd, if it listens, until `shutdown`.
pub async fn run(watched: Arc<Watched>, mut shutdown: watch::Receiver<bool>) -> anyhow::Result<()> {
    let mut ready = false;
    let period = sd_notify::watchdog_enabled().map(|period| period / 2);
    loop {
        let wait = if ready { period.unwrap_or(Duration::from_secs(3600)) } else { STEP };
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = crate::shutdown::requested(&mut shutdown) => return Ok(()),
        }
        let failures = match watched.check().await {
            Ok(()) if !ready => {
                ready = true;
                tracing::info!("ready");
                tell(&[NotifyState::Ready, NotifyState::Status("ready")]);
                tokio::spawn(settle());
                Vec::new()
            }
            Ok(()) => Vec::new(),
            Err(failures) => failures,
        };
        // A runtime that is away is not helped by a restart of ours; a loop that stands still is.
        let stuck = watched.stuck().await;
        if stuck.is_empty() {
            tell(&[NotifyState::Watchdog]);
        } else {
            tracing::error!(?stuck, "not feeding the watchdog");
        }
        if !failures.is_empty() && ready {
            tell(&[NotifyState::Status(&failures.join("; "))]);
        }
    }
}

/// The node is about to end.
pub fn stopping() {
    tell(&[NotifyState::Stopping]);
}

fn tell(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::debug!(%error, "cannot notify systemd");
    }
}
