//! A container's log in the CRI format: `<RFC 3339 time> <stdout|stderr> <P|F> <text>`.
//!
//! A line longer than [`MAX_PIECE`], or one whose rest has not come yet when the container ends, is
//! written in pieces tagged `P`; the piece with the end of the line is tagged `F`. As with
//! containerd, a carriage return before the newline is part of the end of the line.
//!
//! Entries are gathered and written many at once, always whole: no file ends within one, whether it
//! was rotated or the disk is full. What a full disk has no room for is lost, as a container must
//! not wait for the disk.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use memchr::{memchr, memrchr};

use super::protocol::LogRotation;
use super::record;

/// The longest piece of a line in one entry, in bytes; what containerd writes.
pub const MAX_PIECE: usize = 16 * 1024;

/// Entries are written once they take so many bytes, and at the end of what was read at once.
const BATCH: usize = 128 << 10;

/// Which stream a piece came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    Stdout,
    Stderr,
}

impl Source {
    fn name(self) -> &'static [u8] {
        match self {
            Source::Stdout => b" stdout",
            Source::Stderr => b" stderr",
        }
    }
}

/// The file. Without a path everything is discarded.
pub struct Log {
    path: Option<PathBuf>,
    file: Option<File>,
    rotation: Option<LogRotation>,
    /// Bytes in the file.
    size: u64,
    pending: Vec<u8>,
}

impl Log {
    /// Opens the log for appending, making it (and its directory) when absent.
    pub fn open(path: Option<PathBuf>, rotation: Option<LogRotation>) -> io::Result<Self> {
        let mut log = Log { path, file: None, rotation, size: 0, pending: Vec::new() };
        if let Some(path) = &log.path {
            if let Some(parent) = path.parent() {
                fs::create_dir_all(parent)?;
            }
            let file = open(path)?;
            log.take(file)?;
        }
        Ok(log)
    }

    /// Opens the path again after a rotation. The old file stays in use when that fails.
    pub fn reopen(&mut self) -> io::Result<()> {
        let Some(path) = &self.path else { return Ok(()) };
        let file = open(path)?;
        self.flush();
        self.take(file)
    }

    fn take(&mut self, mut file: File) -> io::Result<()> {
        let length = file.metadata()?.len();
        self.size = length + end_torn_entry(&mut file, length)?;
        self.file = Some(file);
        Ok(())
    }

    /// Takes away the log of a container that never ran: by its name it would count as a restart.
    pub fn forget(&self) {
        let empty = |path: &&PathBuf| fs::metadata(path).is_ok_and(|found| found.len() == 0);
        if let Some(path) = self.path.as_ref().filter(empty) {
            let _ = fs::remove_file(path);
        }
    }

    /// Adds an entry.
    fn entry(&mut self, head: &[u8], text: [&[u8]; 2]) {
        if self.file.is_none() {
            return;
        }
        let length = head.len() + text[0].len() + text[1].len() + 1;
        self.make_room(length as u64);
        if self.pending.len() + length > BATCH {
            self.flush();
        }
        self.pending.reserve(length);
        self.pending.extend_from_slice(head);
        self.pending.extend_from_slice(text[0]);
        self.pending.extend_from_slice(text[1]);
        self.pending.push(b'\n');
    }

    /// Rotates if an entry of `length` bytes would make the file too long.
    fn make_room(&mut self, length: u64) {
        let Some(rotation) = self.rotation else { return };
        let fits = |size: u64| size == 0 || size + length <= rotation.max_size;
        if fits(self.size + self.pending.len() as u64) {
            return;
        }
        self.flush();
        // Somebody may have cut it short.
        if let Some(Ok(meta)) = self.file.as_ref().map(File::metadata) {
            self.size = meta.len();
        }
        if !fits(self.size)
            && let Some(path) = self.path.clone()
            && let Ok(file) = rotate(&path, rotation.max_files)
        {
            let _ = self.take(file);
        }
    }

    /// Writes the entries that were added.
    fn flush(&mut self) {
        let pending = std::mem::take(&mut self.pending);
        let (Some(file), Some(path)) = (&mut self.file, &self.path) else { return };
        if pending.is_empty() {
            return;
        }
        // Removed under us: whoever did that wants no more of the old, not nothing of the new. A
        // folder that is gone too is not made again, or it would outlive the pod.
        if file.metadata().is_ok_and(|meta| meta.nlink() == 0)
            && let Ok(again) = open(path)
        {
            *file = again;
            self.size = 0;
        }
        let written = write_whole_entries(file, &pending);
        self.size += written as u64;
    }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).read(true).create(true).mode(0o640).open(path)
}

/// Ends an entry that a monitor's sudden death has cut off; the number of bytes that took.
fn end_torn_entry(file: &mut File, length: u64) -> io::Result<u64> {
    if length == 0 {
        return Ok(0);
    }
    let mut last = [0u8; 1];
    file.seek(SeekFrom::Start(length - 1))?;
    file.read_exact(&mut last)?;
    if last == *b"\n" {
        return Ok(0);
    }
    file.write_all(b"\n")?;
    Ok(1)
}

/// Appends as many whole entries as there is room for; the number of bytes.
fn write_whole_entries(file: &mut File, entries: &[u8]) -> usize {
    let mut written = 0;
    while written < entries.len() {
        match file.write(&entries[written..]) {
            Ok(0) => break,
            Ok(count) => written += count,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    if written == entries.len() {
        return written;
    }
    let whole = memrchr(b'\n', &entries[..written]).map_or(0, |at| at + 1);
    if let (true, Ok(meta)) = (whole < written, file.metadata()) {
        let _ = file.set_len(meta.len().saturating_sub((written - whole) as u64));
    }
    whole
}

/// Renames the log as the kubelet does, `<log>.<date>-<time>` (with the fraction of the second, as
/// many may fall into one), opens a new one and removes the oldest beyond `max_files`.
fn rotate(path: &Path, max_files: u32) -> io::Result<File> {
    let (Some(directory), Some(name)) = (path.parent(), path.file_name().and_then(|n| n.to_str()))
    else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let stamp = record::rfc3339(record::now()).replace(['-', ':', 'Z'], "").replace('T', "-");
    let rotated = directory.join(format!("{name}.{stamp}"));
    fs::rename(path, &rotated)?;
    let file = open(path).inspect_err(|_| {
        let _ = fs::rename(&rotated, path);
    })?;
    let prefix = format!("{name}.");
    let mut old: Vec<String> = fs::read_dir(directory)?
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|other| other.starts_with(&prefix))
        .collect();
    old.sort();
    let keep = max_files.max(2) as usize - 1;
    for name in old.iter().take(old.len().saturating_sub(keep)) {
        let _ = fs::remove_file(directory.join(name));
    }
    Ok(file)
}

/// What entries of one time begin with.
struct Heads {
    full: Vec<u8>,
    partial: Vec<u8>,
}

impl Heads {
    fn new(source: Source, stamp: &str) -> Self {
        let head = |tag: &[u8]| [stamp.as_bytes(), source.name(), tag].concat();
        Heads { full: head(b" F "), partial: head(b" P ") }
    }
}

/// The unfinished line of one stream.
#[derive(Default)]
pub struct Lines {
    /// At most [`MAX_PIECE`], and a carriage return of which it is not known what follows.
    partial: Vec<u8>,
}

impl Lines {
    /// Takes output and writes the entries that it completes, all with the same time.
    pub fn push(&mut self, log: &mut Log, source: Source, stamp: &str, mut bytes: &[u8]) {
        log.pending.reserve(bytes.len() + bytes.len() / 2);
        let heads = Heads::new(source, stamp);
        while let Some(at) = memchr(b'\n', bytes) {
            let line = &bytes[..at];
            let text = match line.strip_suffix(b"\r") {
                Some(text) => text,
                None => {
                    if line.is_empty() && self.partial.last() == Some(&b'\r') {
                        self.partial.pop();
                    }
                    line
                }
            };
            let text = self.pieces(log, &heads, text);
            log.entry(&heads.full, [&self.partial, text]);
            self.partial.clear();
            bytes = &bytes[at + 1..];
        }
        if !bytes.is_empty() {
            let (text, rest) = match bytes.strip_suffix(b"\r") {
                Some(text) => (text, &b"\r"[..]),
                None => (bytes, &b""[..]),
            };
            let text = self.pieces(log, &heads, text);
            self.partial.extend_from_slice(text);
            self.partial.extend_from_slice(rest);
        }
        if self.partial.is_empty() {
            self.partial = Vec::new();
        }
        log.flush();
    }

    /// Writes what is left at the end of the stream.
    pub fn finish(&mut self, log: &mut Log, source: Source, stamp: &str) {
        let heads = Heads::new(source, stamp);
        self.pieces(log, &heads, b"");
        if !self.partial.is_empty() {
            log.entry(&heads.partial, [&self.partial, b""]);
            self.partial = Vec::new();
        }
        log.flush();
    }

    /// Writes what is too long for one entry; what is left of `text`.
    fn pieces<'a>(&mut self, log: &mut Log, heads: &Heads, mut text: &'a [u8]) -> &'a [u8] {
        while self.partial.len() + text.len() > MAX_PIECE {
            if self.partial.len() >= MAX_PIECE {
                log.entry(&heads.partial, [&self.partial[..MAX_PIECE], b""]);
                self.partial.drain(..MAX_PIECE);
            } else {
                let (piece, rest) = text.split_at(MAX_PIECE - self.partial.len());
                log.entry(&heads.partial, [&self.partial, piece]);
                self.partial.clear();
                text = rest;
            }
        }
        text
    }
}

#[cfg(test)]
mod tests;
