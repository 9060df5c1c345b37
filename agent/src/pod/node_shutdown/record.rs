//! When the last graceful shutdown began and ended, on disk under kubelet's name and in its form, for
//! the metrics of the boot after it.

use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::join::files::{FileError, write_atomic};

/// The file, in the root dir.
const NAME: &str = "graceful_node_shutdown_state";
/// Go's zero time: not yet.
const NEVER: &str = "0001-01-01T00:00:00Z";

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Times {
    start_time: String,
    end_time: String,
}

/// The file.
pub(super) struct Record(PathBuf);

impl Record {
    pub(super) fn below(root_dir: &Path) -> Self {
        Self(root_dir.join(NAME))
    }

    /// Start and end, if there was a shutdown that was seen to its end.
    pub(super) fn load(&self) -> Option<(Timestamp, Option<Timestamp>)> {
        let bytes = match std::fs::read(&self.0) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return None,
            Err(error) => {
                tracing::warn!(path = %self.0.display(), %error,
                    "cannot read when the node was last shut down");
                return None;
            }
        };
        match serde_json::from_slice::<Times>(&bytes) {
            Ok(times) => {
                let time = |text: &str| text.parse().ok().filter(|_| text != NEVER);
                Some((time(&times.start_time)?, time(&times.end_time)))
            }
            Err(error) => {
                tracing::warn!(path = %self.0.display(), %error,
                    "what says when the node was last shut down is unreadable; it is written anew \
                     at the next shutdown");
                None
            }
        }
    }

    /// Writes it whole; a failure holds nothing up.
    pub(super) fn store(&self, start: Timestamp, end: Option<Timestamp>) {
        if let Err(error) = self.write(start, end) {
            tracing::warn!(path = %self.0.display(), %error,
                "cannot note when the node shuts down");
        }
    }

    fn write(&self, start: Timestamp, end: Option<Timestamp>) -> Result<(), FileError> {
        let times = Times {
            start_time: start.to_string(),
            end_time: end.map_or_else(|| NEVER.to_owned(), |end| end.to_string()),
        };
        // Strings alone can always be written.
        write_atomic(&self.0, 0o600, &serde_json::to_vec(&times).unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_kept_as_kubelet_keeps_them() {
        let dir = tempfile::tempdir().unwrap();
        let record = Record::below(dir.path());
        assert_eq!(record.load(), None);
        let at = |s| Timestamp::from_second(s).unwrap();
        record.store(at(5), None);
        assert_eq!(record.load(), Some((at(5), None)));
        let path = dir.path().join("graceful_node_shutdown_state");
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(
            text,
            r#"{"startTime":"1970-01-01T00:00:05Z","endTime":"0001-01-01T00:00:00Z"}"#
        );
        record.store(at(5), Some(at(9)));
        assert_eq!(record.load(), Some((at(5), Some(at(9)))));
        // As Go writes it.
        let go =
            r#"{"startTime":"2026-11-28T10:00:00.5+01:00","endTime":"2026-11-28T10:00:30+01:00"}"#;
        std::fs::write(&path, go).unwrap();
        let (start, end) = record.load().unwrap();
        assert_eq!(end.unwrap().duration_since(start).as_millis(), 29_500);
        std::fs::write(&path, "{").unwrap();
        assert_eq!(record.load(), None);
    }
}
