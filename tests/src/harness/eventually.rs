//! Waiting for the world to be as expected: with a deadline, and with the last state in the
//! failure.

use std::fmt::Display;
use std::time::Duration;

use tokio::time::Instant;

/// How long things may take unless a test says otherwise. Generous: two slow cores run several
/// tests at once; a test that passes does not wait for it.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until `check` returns a value.
///
/// # Panics
/// When it has not within [`PATIENCE`]: with `what` and the last refusal.
pub async fn eventually<T, E: Display>(what: &str, check: impl AsyncFnMut() -> Result<T, E>) -> T {
    eventually_within(PATIENCE, what, check).await
}

/// As [`eventually`], within `patience`.
///
/// # Panics
/// As there.
pub async fn eventually_within<T, E: Display>(
    patience: Duration,
    what: &str,
    mut check: impl AsyncFnMut() -> Result<T, E>,
) -> T {
    let start = Instant::now();
    loop {
        let last = match check().await {
            Ok(value) => return value,
            Err(last) => last,
        };
        assert!(start.elapsed() < patience, "not within {patience:?}: {what}\nlast seen: {last:#}");
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
}
