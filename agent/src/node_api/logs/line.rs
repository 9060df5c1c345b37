//! Entries of a container's log, and what a client sees of them. Pure.
//!
//! An entry is `<RFC 3339 time> <stdout|stderr> <P|F> <text>`; `P` is a piece of a line that goes on
//! in the next entry of its stream.

use jiff::Timestamp;

use super::options::{LogOptions, Streams};

/// One entry, as it lies in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry<'a> {
    stamp: &'a str,
    stdout: bool,
    /// With its newline, unless the line goes on.
    text: &'a [u8],
}

/// `line` without its newline.
fn parse(line: &[u8], ended: bool) -> Option<(Entry<'_>, bool)> {
    let mut parts = line.splitn(4, |byte| *byte == b' ');
    let stamp = std::str::from_utf8(parts.next()?).ok()?;
    let stdout = match parts.next()? {
        b"stdout" => true,
        b"stderr" => false,
        _ => return None,
    };
    let tags = parts.next()?;
    let partial = tags.split(|byte| *byte == b':').next() == Some(b"P");
    let text = parts.next().unwrap_or_default();
    Some((Entry { stamp, stdout, text }, ended && !partial))
}

/// Turns entries into what the client asked for.
#[derive(Debug)]
pub(super) struct Shaper {
    /// Boxed, as few ask for it and many wait.
    since: Option<Box<Timestamp>>,
    timestamps: bool,
    streams: Streams,
    left: u64,
    /// The last line written has ended.
    fresh: bool,
    /// Complaints about entries that are none, made once.
    complained: bool,
}

impl Shaper {
    pub(super) fn new(options: &LogOptions) -> Self {
        Self {
            since: options.since.map(Box::new),
            timestamps: options.timestamps,
            streams: options.streams,
            left: options.limit.unwrap_or(u64::MAX),
            fresh: true,
            complained: false,
        }
    }

    /// No more is wanted.
    pub(super) fn is_done(&self) -> bool {
        self.left == 0
    }

    /// Adds what is to be seen of `line` to `out`; `ended` says that it had a newline.
    pub(super) fn push(&mut self, line: &[u8], ended: bool, out: &mut Vec<u8>) {
        let Some((entry, whole)) = parse(line, ended) else {
            if !std::mem::replace(&mut self.complained, true) {
                tracing::warn!("a container's log has lines that are no log entries");
            }
            return;
        };
        let fresh = std::mem::replace(&mut self.fresh, whole);
        if let Some(since) = &self.since
            && entry.stamp.parse::<Timestamp>().is_ok_and(|at| at < **since)
        {
            return;
        }
        match (self.streams, entry.stdout) {
            (Streams::Stdout, false) | (Streams::Stderr, true) => return,
            _ => {}
        }
        let from = out.len();
        if self.timestamps && fresh {
            fixed_width(entry.stamp, out);
            out.push(b' ');
        }
        out.extend_from_slice(entry.text);
        if whole {
            out.push(b'\n');
        }
        let written = (out.len() - from) as u64;
        if written > self.left {
            out.truncate(from + self.left as usize);
        }
        self.left = self.left.saturating_sub(written);
    }
}

/// The time with nine digits of a second, in the zone that it was written in.
fn fixed_width(stamp: &str, out: &mut Vec<u8>) {
    let zone = stamp.rfind(['Z', '+']).or_else(|| stamp.rfind('-').filter(|at| *at > 10));
    let (time, zone) = stamp.split_at(zone.unwrap_or(stamp.len()));
    let (seconds, fraction) = time.split_once('.').unwrap_or((time, ""));
    out.extend_from_slice(seconds.as_bytes());
    out.push(b'.');
    out.extend_from_slice(fraction.as_bytes());
    out.extend(std::iter::repeat_n(b'0', 9usize.saturating_sub(fraction.len())));
    out.extend_from_slice(zone.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &[&str] = &[
        "2026-01-02T03:04:05.1Z stdout F one",
        "2026-01-02T03:04:06.123456789+02:00 stderr F two",
        "2026-01-02T03:04:07Z stdout P thr",
        "2026-01-02T03:04:07.5Z stdout F ee",
        "junk",
        "2026-01-02T03:04:08Z stdout F ",
    ];

    fn shaped(query: &str) -> String {
        let mut shaper = Shaper::new(&LogOptions::parse(query, Timestamp::now()).unwrap());
        let mut out = Vec::new();
        for line in LOG {
            if !shaper.is_done() {
                shaper.push(line.as_bytes(), true, &mut out);
            }
        }
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn the_client_sees_what_it_asked_for() {
        assert_eq!(shaped(""), "one\ntwo\nthree\n\n");
        assert_eq!(shaped("stream=Stderr"), "two\n");
        assert_eq!(shaped("stream=Stdout"), "one\nthree\n\n");
        assert_eq!(shaped("limitBytes=6"), "one\ntw");
        assert_eq!(shaped("stream=Stderr&limitBytes=2"), "tw");
        assert_eq!(shaped("sinceTime=2026-01-02T03:04:07Z"), "three\n\n");
        assert_eq!(
            shaped("timestamps=true"),
            "2026-01-02T03:04:05.100000000Z one\n\
             2026-01-02T03:04:06.123456789+02:00 two\n\
             2026-01-02T03:04:07.000000000Z three\n\
             2026-01-02T03:04:08.000000000Z \n"
        );
    }

    #[test]
    fn an_entry_cut_off_is_shown_without_a_newline() {
        let mut shaper = Shaper::new(&LogOptions::default());
        let mut out = Vec::new();
        shaper.push(b"2026-01-02T03:04:05Z stdout F ha", false, &mut out);
        assert_eq!(out, b"ha");
    }
}
