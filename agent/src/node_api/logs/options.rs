//! `PodLogOptions` from a query, with upstream's conversions and checks. Pure.

use jiff::{SignedDuration, Timestamp};

/// Which of a container's streams.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Streams {
    /// Both, as they come.
    #[default]
    All,
    /// Standard output only.
    Stdout,
    /// Standard error only.
    Stderr,
}

/// What of a log is wanted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LogOptions {
    /// Go on until the container ends.
    pub follow: bool,
    /// Of the instance before.
    pub previous: bool,
    /// Nothing older.
    pub since: Option<Timestamp>,
    /// Times before the lines.
    pub timestamps: bool,
    /// The last lines only.
    pub tail: Option<u64>,
    /// No more than this many bytes.
    pub limit: Option<u64>,
    /// Of these streams.
    pub streams: Streams,
}

/// Why a query is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// It cannot be read: 400.
    Unreadable,
    /// It can be read and makes no sense: 422.
    Invalid,
}

/// Names and values of a query string.
pub fn query(text: &str) -> Vec<(String, String)> {
    text.split('&')
        .filter(|pair| !pair.is_empty())
        .map(|pair| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            (unescape(name), unescape(value))
        })
        .collect()
}

fn unescape(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        let hex = |byte: Option<&u8>| byte.and_then(|b| char::from(*b).to_digit(16));
        match (*first, hex(tail.first()), hex(tail.get(1))) {
            (b'%', Some(high), Some(low)) => {
                bytes.push((high * 16 + low) as u8);
                rest = &tail[2..];
                continue;
            }
            (b'+', ..) => bytes.push(b' '),
            (other, ..) => bytes.push(other),
        }
        rest = tail;
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

impl LogOptions {
    /// Reads them from `text` at time `now`.
    pub fn parse(text: &str, now: Timestamp) -> Result<Self, Refused> {
        let pairs = query(text);
        let first = |name: &str| {
            pairs.iter().find(|(found, _)| found == name).map(|(_, value)| value.as_str())
        };
        let flag = |name: &str| {
            first(name).is_some_and(|v| !matches!(v.to_lowercase().as_str(), "false" | "0"))
        };
        let number = |name: &str| -> Result<Option<i64>, Refused> {
            first(name).map(|v| v.parse().map_err(|_| Refused::Unreadable)).transpose()
        };
        // An old name of `tailLines`.
        let tail = match first("tail").filter(|tail| !tail.is_empty()) {
            Some("all") => None,
            Some(tail) => Some(tail.parse::<i64>().map_err(|_| Refused::Unreadable)?),
            None => number("tailLines")?,
        };
        let limit = number("limitBytes")?;
        let seconds = number("sinceSeconds")?;
        let time = match first("sinceTime").filter(|text| !text.is_empty() && *text != "null") {
            Some(text) => Some(text.parse::<Timestamp>().map_err(|_| Refused::Unreadable)?),
            None => None,
        };
        let streams = match first("stream") {
            None | Some("" | "All") => Streams::All,
            Some("Stdout") => Streams::Stdout,
            Some("Stderr") => Streams::Stderr,
            Some(_) => return Err(Refused::Invalid),
        };
        if streams != Streams::All && tail.is_some() || seconds.is_some() && time.is_some() {
            return Err(Refused::Invalid);
        }
        let since = match seconds {
            Some(seconds) if seconds < 1 => return Err(Refused::Invalid),
            Some(seconds) => {
                Some(now.checked_sub(SignedDuration::from_secs(seconds)).unwrap_or(Timestamp::MIN))
            }
            None => time,
        };
        let positive = |number: Option<i64>, least: i64| match number {
            Some(number) if number < least => Err(Refused::Invalid),
            number => Ok(number.map(i64::unsigned_abs)),
        };
        Ok(Self {
            follow: flag("follow"),
            previous: flag("previous"),
            since,
            timestamps: flag("timestamps"),
            tail: positive(tail, 0)?,
            limit: positive(limit, 1)?,
            streams,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<LogOptions, Refused> {
        LogOptions::parse(text, Timestamp::from_second(1_000_000).unwrap())
    }

    #[test]
    fn options_are_read_as_upstream_reads_them() {
        assert_eq!(parse("").unwrap(), LogOptions::default());
        let all = parse(
            "follow=true&previous=1&timestamps=yes&tailLines=5&limitBytes=10&sinceSeconds=60",
        )
        .unwrap();
        assert!(all.follow && all.previous && all.timestamps);
        assert_eq!((all.tail, all.limit), (Some(5), Some(10)));
        assert_eq!(all.since, Some(Timestamp::from_second(999_940).unwrap()));
        assert!(!parse("follow=False&previous=0").unwrap().follow);
        let time = parse("sinceTime=2026-01-02T03%3A04%3A05%2B01%3A00").unwrap().since.unwrap();
        assert_eq!(time.to_string(), "2026-01-02T02:04:05Z");
        assert_eq!(parse("tail=7").unwrap().tail, Some(7));
        assert_eq!(parse("tail=all&tailLines=3").unwrap().tail, None);
        assert_eq!(parse("stream=Stderr").unwrap().streams, Streams::Stderr);
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for text in ["tailLines=x", "limitBytes=", "sinceTime=soon", "sinceSeconds=1.5"] {
            assert_eq!(parse(text), Err(Refused::Unreadable), "{text}");
        }
        for text in [
            "tailLines=-1",
            "limitBytes=0",
            "sinceSeconds=0",
            "sinceSeconds=1&sinceTime=2026-01-02T03:04:05Z",
            "stream=both",
            "stream=Stdout&tailLines=1",
        ] {
            assert_eq!(parse(text), Err(Refused::Invalid), "{text}");
        }
    }
}
