//! A container's log in the CRI format: `<RFC 3339 time> <stdout|stderr> <P|F> <text>`.
//!
//! A line longer than the buffer, or one whose rest has not come yet when the container ends, is
//! written in pieces tagged `P`; the piece with the end of the line is tagged `F`.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// The longest piece of a line in one entry, in bytes; what other CRI runtimes write.
pub const MAX_PIECE: usize = 16 * 1024;

/// Which stream a piece came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    Stdout,
    Stderr,
}

impl Source {
    fn name(self) -> &'static str {
        match self {
            Source::Stdout => "stdout",
            Source::Stderr => "stderr",
        }
    }
}

/// The file. Without a path everything is discarded.
pub struct Log {
    path: Option<PathBuf>,
    file: Option<File>,
}

impl Log {
    /// Opens the log for appending, making it (and its directory) when absent.
    pub fn open(path: Option<PathBuf>) -> io::Result<Self> {
        let file = path.as_deref().map(open).transpose()?;
        Ok(Log { path, file })
    }

    /// Opens the path again after a rotation. The old file stays in use when that fails.
    pub fn reopen(&mut self) -> io::Result<()> {
        if let Some(path) = &self.path {
            self.file = Some(open(path)?);
        }
        Ok(())
    }

    /// Takes away the log of a container that never ran: by its name it would count as a restart.
    pub fn forget(&self) {
        let empty = |path: &&PathBuf| std::fs::metadata(path).is_ok_and(|found| found.len() == 0);
        if let Some(path) = self.path.as_ref().filter(empty) {
            let _ = std::fs::remove_file(path);
        }
    }

    fn append(&mut self, entries: &[u8]) {
        if let Some(file) = &mut self.file {
            // A full disk loses output rather than block the container.
            let _ = file.write_all(entries);
        }
    }
}

fn open(path: &Path) -> io::Result<File> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)?;
    }
    OpenOptions::new().append(true).create(true).mode(0o640).open(path)
}

/// The unfinished line of one stream.
#[derive(Default)]
pub struct Lines {
    partial: Vec<u8>,
}

impl Lines {
    /// Takes output and writes the entries that it completes, all with the same time.
    pub fn push(&mut self, log: &mut Log, source: Source, stamp: &str, mut bytes: &[u8]) {
        let mut entries = Vec::with_capacity(bytes.len() + 64);
        while !bytes.is_empty() {
            let room = MAX_PIECE - self.partial.len();
            let window = &bytes[..bytes.len().min(room)];
            let (taken, end) = match window.iter().position(|b| *b == b'\n') {
                Some(at) => (at + 1, Some(true)),
                None if window.len() == room => (room, Some(false)),
                None => (window.len(), None),
            };
            let text = &bytes[..taken - usize::from(end == Some(true))];
            match end {
                Some(full) => {
                    entry(&mut entries, source, stamp, full, &[&self.partial, text]);
                    self.partial.clear();
                }
                None => self.partial.extend_from_slice(text),
            }
            bytes = &bytes[taken..];
        }
        if self.partial.is_empty() {
            self.partial = Vec::new();
        }
        if !entries.is_empty() {
            log.append(&entries);
        }
    }

    /// Writes what is left at the end of the stream.
    pub fn finish(&mut self, log: &mut Log, source: Source, stamp: &str) {
        if !self.partial.is_empty() {
            let mut entries = Vec::new();
            entry(&mut entries, source, stamp, false, &[&self.partial]);
            log.append(&entries);
            self.partial = Vec::new();
        }
    }
}

fn entry(out: &mut Vec<u8>, source: Source, stamp: &str, full: bool, parts: &[&[u8]]) {
    out.extend_from_slice(stamp.as_bytes());
    out.push(b' ');
    out.extend_from_slice(source.name().as_bytes());
    out.extend_from_slice(if full { b" F " } else { b" P " });
    for part in parts {
        out.extend_from_slice(part);
    }
    out.push(b'\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(chunks: &[&[u8]]) -> String {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pod/c.log");
        let mut log = Log::open(Some(path.clone())).unwrap();
        let mut lines = Lines::default();
        for chunk in chunks {
            lines.push(&mut log, Source::Stdout, "T", chunk);
        }
        lines.finish(&mut log, Source::Stdout, "T");
        std::fs::read_to_string(path).unwrap()
    }

    #[test]
    fn lines_are_whole_however_they_come() {
        assert_eq!(written(&[b"a\nb", b"c\n\n"]), "T stdout F a\nT stdout F bc\nT stdout F \n");
        assert_eq!(written(&[b"no end"]), "T stdout P no end\n");
    }

    #[test]
    fn a_long_line_is_written_in_pieces_and_ends_with_f() {
        let mut line = vec![b'x'; MAX_PIECE * 2 + 5];
        line.push(b'\n');
        let text = written(&[&line]);
        let tags: Vec<&str> = text.lines().map(|l| &l[9..10]).collect();
        assert_eq!(tags, ["P", "P", "F"]);
        let total: usize = text.lines().map(|l| l.len() - 11).sum();
        assert_eq!(total, MAX_PIECE * 2 + 5);
    }

    #[test]
    fn a_reopened_log_goes_on_in_the_new_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("c.log");
        let mut log = Log::open(Some(path.clone())).unwrap();
        let mut lines = Lines::default();
        lines.push(&mut log, Source::Stderr, "T", b"one\n");
        std::fs::rename(&path, directory.path().join("c.log.1")).unwrap();
        log.reopen().unwrap();
        lines.push(&mut log, Source::Stderr, "T", b"two\n");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "T stderr F two\n");
    }

    #[test]
    fn only_a_log_that_says_nothing_is_forgotten() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("c/0.log");
        Log::open(Some(path.clone())).unwrap().forget();
        assert!(!path.exists());
        let mut log = Log::open(Some(path.clone())).unwrap();
        Lines::default().push(&mut log, Source::Stdout, "T", b"said\n");
        log.forget();
        assert!(path.exists());
    }
}
