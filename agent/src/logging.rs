//! The log: one filter over one writer, which can be replaced while the node runs
//! (`/debug/flags/v` of the node API).

use std::sync::OnceLock;

use tracing_subscriber::EnvFilter;

/// Why the log cannot be set.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// `--log-level`.
    #[error("--log-level: {0}")]
    Filter(#[from] tracing_subscriber::filter::ParseError),
    /// Something logs already.
    #[error("start logging: {0}")]
    Taken(String),
    /// A verbosity that is not one, as klog says it.
    #[error("failed set klog.logging.verbosity {0}: it is a number from 0 to 10")]
    Verbosity(String),
    /// This process began without `start`.
    #[error("the log of this process cannot be changed")]
    Fixed,
}

/// Replaces the filter.
type Replace = Box<dyn Fn(EnvFilter) -> Result<(), String> + Send + Sync>;

static REPLACE: OnceLock<Replace> = OnceLock::new();

/// The filter of a verbosity as Kubernetes counts it, 0 to 10.
pub(crate) fn filter_of(verbosity: u8) -> &'static str {
    match verbosity {
        0 => "warn",
        1..=3 => "info",
        4..=5 => "info,agent=debug,proxy=debug,cri_shim=debug",
        6..=7 => "debug",
        _ => "trace",
    }
}

/// Begins to log to standard error what `filter` lets through, as text or as JSON.
pub(crate) fn start(filter: &str, json: bool) -> Result<(), LogError> {
    let log = tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::try_new(filter)?)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()));
    let (started, replace): (_, Replace) = if json {
        let log = log.json().with_filter_reloading();
        let handle = log.reload_handle();
        let replace = move |filter| handle.reload(filter).map_err(|error| error.to_string());
        (log.try_init(), Box::new(replace))
    } else {
        let log = log.with_filter_reloading();
        let handle = log.reload_handle();
        let replace = move |filter| handle.reload(filter).map_err(|error| error.to_string());
        (log.try_init(), Box::new(replace))
    };
    started.map_err(|error| LogError::Taken(error.to_string()))?;
    let _ = REPLACE.set(replace);
    Ok(())
}

/// Sets the verbosity from now on, whatever flags said; until the next start.
pub(crate) fn set_verbosity(text: &str) -> Result<u8, LogError> {
    let level = parse_verbosity(text).ok_or_else(|| LogError::Verbosity(text.into()))?;
    let replace = REPLACE.get().ok_or(LogError::Fixed)?;
    replace(EnvFilter::try_new(filter_of(level))?).map_err(LogError::Taken)?;
    tracing::warn!(level, "the log's verbosity was set by the node API");
    Ok(level)
}

fn parse_verbosity(text: &str) -> Option<u8> {
    // klog takes any int32; what is beyond the most says no more than the most.
    let level: i32 = text.parse().ok()?;
    u8::try_from(level.min(10)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verbosities_are_numbers() {
        for (text, expected) in [
            ("0", Some(0)),
            ("4", Some(4)),
            ("99", Some(10)),
            ("-1", None),
            ("", None),
            ("4\n", None),
            ("debug", None),
        ] {
            assert_eq!(parse_verbosity(text), expected, "{text:?}");
        }
        for level in 0..=10 {
            assert!(EnvFilter::try_new(filter_of(level)).is_ok());
        }
    }
}
