//! What the proxy tells about itself: to `longshore status`, to the systemd watchdog, to tests.

use std::time::{Duration, Instant};

use jiff::Timestamp;

use crate::config::Mode;

/// A problem that the proxy met and works around; the rest goes on.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
pub struct ProxyError {
    /// What it concerns: `Service default/web`, `listener 0.0.0.0:10256`, `sysctl ...`.
    pub object: String,
    /// What is wrong and what to do.
    pub message: String,
}

/// A snapshot of the proxy's state.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct ProxyStatus {
    /// The backend in use, once chosen.
    #[serde(serialize_with = "as_text")]
    pub mode: Mode,
    /// Services being served.
    pub services: usize,
    /// Endpoints in the slices known, counted per slice.
    pub endpoints: usize,
    /// Whether services and slices have been told completely.
    pub synced: bool,
    /// When the kernel last took a change, or was last found to be right.
    #[serde(serialize_with = "timestamp")]
    pub last_sync: Option<Timestamp>,
    /// How long the last batch took in the kernel.
    pub last_sync_duration: Duration,
    /// Changes that the kernel has not taken yet.
    pub pending: usize,
    /// Why Services or slices cannot be had.
    pub source_error: Option<String>,
    /// What is wrong now, by object; empty if nothing is.
    pub errors: Vec<ProxyError>,
    /// The last time the loop turned; the watchdog's measure.
    #[serde(skip)]
    pub last_turn: Instant,
}

impl Default for ProxyStatus {
    fn default() -> Self {
        ProxyStatus {
            mode: Mode::Auto,
            services: 0,
            endpoints: 0,
            synced: false,
            last_sync: None,
            last_sync_duration: Duration::ZERO,
            pending: 0,
            source_error: None,
            errors: Vec::new(),
            last_turn: Instant::now(),
        }
    }
}

impl ProxyStatus {
    /// Whether the loop has turned within `within`: what the watchdog asks. The loop turns at
    /// least every 5 seconds when nothing happens.
    pub fn alive(&self, within: Duration) -> bool {
        self.last_turn.elapsed() < within
    }
}

fn as_text<S: serde::Serializer>(mode: &Mode, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(mode)
}

fn timestamp<S: serde::Serializer>(
    time: &Option<Timestamp>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    match time {
        Some(time) => serializer.collect_str(time),
        None => serializer.serialize_none(),
    }
}
