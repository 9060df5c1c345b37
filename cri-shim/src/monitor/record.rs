//! The start and exit records of a container on disk, and the clock they are stamped with.
//!
//! A record is written whole: a temporary file, then a rename. It is not synced here: a record
//! must survive the death of any process, which the page cache does, and after a power loss no
//! container runs anyway; the shim syncs the file system behind the monitors' backs (see
//! `state::durability`), so that exit codes outlive that too without a start waiting for the disk.

use std::fs;
use std::io;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;
use serde::de::DeserializeOwned;

pub const STARTED: &str = "started.json";
pub const EXITED: &str = "exited.json";

/// Writes `directory/name` in one step.
pub fn write<T: Serialize>(directory: &Path, name: &str, record: &T) -> io::Result<()> {
    let temporary = directory.join(format!(".{name}.tmp"));
    let written = fs::write(&temporary, serde_json::to_vec(record)?)
        .and_then(|()| fs::rename(&temporary, directory.join(name)));
    if written.is_err() {
        // Of a full disk, half of one.
        let _ = fs::remove_file(&temporary);
    }
    written
}

/// Reads `directory/name`; `None` when there is none. An unreadable one is set aside as
/// `<name>.bad` and reported as an error.
pub fn read<T: DeserializeOwned>(directory: &Path, name: &str) -> io::Result<Option<T>> {
    let path = directory.join(name);
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e),
    };
    match serde_json::from_slice(&bytes) {
        Ok(record) => Ok(Some(record)),
        Err(error) => Err(set_aside(directory, name, &error)),
    }
}

/// Renames a record that cannot be used to `<name>.bad`; the error that says so.
pub fn set_aside(directory: &Path, name: &str, error: &impl std::fmt::Display) -> io::Error {
    let path = directory.join(name);
    let _ = fs::rename(&path, directory.join(format!("{name}.bad")));
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("{}: {error}; set aside as {name}.bad", path.display()),
    )
}

/// Nanoseconds since the epoch.
pub fn now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as i64)
}

/// A time in RFC 3339 with nanoseconds, in UTC. Written out here, as the monitor is too small a
/// process for a calendar library (days-to-date after Howard Hinnant's civil calendar algorithm).
pub fn rfc3339(nanoseconds: i64) -> String {
    let seconds = nanoseconds.div_euclid(1_000_000_000);
    let fraction = nanoseconds.rem_euclid(1_000_000_000);
    let (days, second) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_index = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_index + 2) / 5 + 1;
    let month = if month_index < 10 { month_index + 3 } else { month_index - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    let (hour, minute, second) = (second / 3_600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{fraction:09}Z")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::monitor::protocol::Exited;

    #[test]
    fn times_are_written_in_rfc_3339() {
        assert_eq!(rfc3339(0), "1970-01-01T00:00:00.000000000Z");
        assert_eq!(rfc3339(951_827_696_000_000_007), "2000-02-29T12:34:56.000000007Z");
        assert_eq!(rfc3339(4_102_444_799_999_999_999), "2099-12-31T23:59:59.999999999Z");
    }

    #[test]
    fn a_torn_record_is_set_aside() {
        let directory = tempfile::tempdir().unwrap();
        assert!(read::<Exited>(directory.path(), EXITED).unwrap().is_none());
        let exit = Exited { code: 3, ..Exited::default() };
        write(directory.path(), EXITED, &exit).unwrap();
        assert_eq!(read::<Exited>(directory.path(), EXITED).unwrap(), Some(exit));
        std::fs::write(directory.path().join(EXITED), b"{\"code\":").unwrap();
        assert!(read::<Exited>(directory.path(), EXITED).is_err());
        assert!(directory.path().join("exited.json.bad").exists());
        assert!(read::<Exited>(directory.path(), EXITED).unwrap().is_none());
    }
}
