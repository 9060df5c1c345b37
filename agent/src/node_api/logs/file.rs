//! A log on disk and its rotations, read forward.
//!
//! A rotation renames `0.log` to `0.log.<time>` and opens a new `0.log`. A reader keeps the file it
//! has open, so that nothing written to it is lost, and goes on with the next younger file only when
//! there is one. What the writer put into the old file before it changed over is read before the new
//! one, however late it came.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

/// Bytes read at once.
const CHUNK: usize = 128 << 10;
/// Longest entry; what is longer is not of a log.
const MAX_ENTRY: usize = 1 << 20;

/// Which file, whatever its name is now; with its birth, as numbers are used again.
type Mark = (u64, u64, Option<SystemTime>);

/// A place in a log.
#[derive(Debug)]
pub(super) struct LogFile {
    /// All who read the log share it.
    path: Arc<Path>,
    file: File,
    at: u64,
    /// The beginning of an entry whose end is not written yet.
    rest: Box<[u8]>,
    /// Files of this log that are older than this reader, or read.
    passed: Box<[Mark]>,
}

/// What reading gave.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Read {
    /// Whole entries, each with its newline.
    Lines(Vec<u8>),
    /// Nothing more now.
    End,
}

impl LogFile {
    /// Opens `path` at its beginning, or `tail` lines before its end.
    pub(super) fn open(path: Arc<Path>, tail: Option<u64>) -> io::Result<Self> {
        let file = File::open(&path)?;
        let at = match tail {
            Some(lines) => tail_start(&file, lines)?,
            None => 0,
        };
        let mut log = Self { path, file, at, rest: Box::default(), passed: Box::default() };
        let ours = mark(&log.file.metadata()?);
        let siblings = log.siblings()?;
        log.passed = siblings.into_iter().map(|(_, mark)| mark).filter(|m| *m != ours).collect();
        Ok(log)
    }

    /// Entries that are there, as many as fit into a chunk; goes on to younger files.
    pub(super) fn read(&mut self) -> io::Result<Read> {
        let mut rest = std::mem::take(&mut self.rest).into_vec();
        loop {
            let size = self.file.metadata()?.size();
            if size < self.at {
                // Truncated in place: from the start again.
                (self.at, rest) = (0, Vec::new());
            }
            // No buffer where there is nothing to read: many wait, few read.
            let left = usize::try_from(size - self.at).unwrap_or(CHUNK).min(CHUNK);
            let mut read = 0;
            if left > 0 {
                let before = rest.len();
                rest.resize(before + left, 0);
                read = self.file.read_at(&mut rest[before..], self.at)?;
                rest.truncate(before + read);
                self.at += read as u64;
            }
            if read == 0 {
                self.rest = rest.into();
                if !self.go_on()? {
                    return Ok(Read::End);
                }
                rest = std::mem::take(&mut self.rest).into_vec();
                continue;
            }
            match rest.iter().rposition(|byte| *byte == b'\n') {
                Some(last) => {
                    self.rest = rest.split_off(last + 1).into();
                    return Ok(Read::Lines(rest));
                }
                None if rest.len() > MAX_ENTRY => {
                    return Err(io::Error::other("an entry is longer than 1 MiB"));
                }
                None => {}
            }
        }
    }

    /// What was written of an entry without its end.
    pub(super) fn take_rest(&mut self) -> Box<[u8]> {
        std::mem::take(&mut self.rest)
    }

    /// Goes on to the next younger file, if there is one with something in it.
    fn go_on(&mut self) -> io::Result<bool> {
        let ours = mark(&self.file.metadata()?);
        if fs::metadata(&self.path).is_ok_and(|meta| mark(&meta) == ours) {
            return Ok(false);
        }
        let siblings = self.siblings()?;
        // An empty one says that the writer may not have changed over yet.
        let younger = siblings.iter().filter(|(_, m)| *m != ours && !self.passed.contains(m));
        let next = younger.into_iter().find_map(|(path, _)| {
            let file = File::open(path).ok()?;
            file.metadata().is_ok_and(|meta| meta.size() > 0).then_some(file)
        });
        let Some(file) = next else { return Ok(false) };
        let mut more = [0];
        if self.file.read_at(&mut more, self.at)? > 0 {
            return Ok(true);
        }
        let there = |mark: &&Mark| siblings.iter().any(|(_, other)| other == *mark);
        self.passed = self.passed.iter().filter(there).copied().chain([ours]).collect();
        (self.file, self.at) = (file, 0);
        self.rest = Box::default();
        Ok(true)
    }

    /// The files of this log: the rotations by name, which is by time, and then the current one.
    fn siblings(&self) -> io::Result<Vec<(PathBuf, Mark)>> {
        let dir = self.path.parent().unwrap_or(Path::new("/"));
        let stem = self.path.file_name().unwrap_or_default().to_string_lossy().into_owned() + ".";
        let mut rotated = Vec::new();
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let packed = name.ends_with(".gz") || name.ends_with(".tmp");
            if name.starts_with(&stem) && !packed {
                rotated.push(entry.path());
            }
        }
        rotated.sort();
        rotated.push(self.path.to_path_buf());
        let marked = rotated.into_iter().filter_map(|path| {
            let mark = mark(&fs::metadata(&path).ok()?);
            Some((path, mark))
        });
        Ok(marked.collect())
    }
}

fn mark(meta: &fs::Metadata) -> Mark {
    (meta.dev(), meta.ino(), meta.created().ok())
}

/// Where the last `lines` lines of `file` begin.
fn tail_start(file: &File, lines: u64) -> io::Result<u64> {
    let mut end = file.metadata()?.size();
    if lines == 0 {
        return Ok(end);
    }
    let (mut seen, mut block) = (0, vec![0; 64 << 10]);
    let whole = end;
    while end > 0 {
        let from = end.saturating_sub(block.len() as u64);
        let part = &mut block[..(end - from) as usize];
        file.read_exact_at(part, from)?;
        for (at, byte) in part.iter().enumerate().rev() {
            let at = from + at as u64;
            // The last byte's newline ends the last line and begins none.
            if *byte == b'\n' && at + 1 != whole {
                seen += 1;
                if seen == lines {
                    return Ok(at + 1);
                }
            }
        }
        end = from;
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::io::Write;

    use super::*;

    fn append(path: &Path, text: &str) {
        let mut file = OpenOptions::new().create(true).append(true).open(path).unwrap();
        file.write_all(text.as_bytes()).unwrap();
    }

    fn all(log: &mut LogFile) -> String {
        let mut text = Vec::new();
        while let Read::Lines(lines) = log.read().unwrap() {
            text.extend(lines);
        }
        String::from_utf8(text).unwrap()
    }

    #[test]
    fn the_tail_is_counted_in_lines() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        append(&path, "a\nb\nc\n");
        for (tail, expected) in
            [(0, ""), (1, "c\n"), (2, "b\nc\n"), (3, "a\nb\nc\n"), (9, "a\nb\nc\n")]
        {
            assert_eq!(
                all(&mut LogFile::open(path.clone().into(), Some(tail)).unwrap()),
                expected,
                "{tail}"
            );
        }
        let long = "x".repeat(100_000);
        append(&path, &format!("{long}\n{long}\n"));
        let got = all(&mut LogFile::open(path.clone().into(), Some(2)).unwrap());
        assert_eq!(got.len(), 200_002);
    }

    #[test]
    fn an_entry_is_given_out_when_it_is_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        append(&path, "one\ntw");
        let mut log = LogFile::open(path.clone().into(), None).unwrap();
        assert_eq!(all(&mut log), "one\n");
        append(&path, "o\n");
        assert_eq!(all(&mut log), "two\n");
        append(&path, "end");
        assert_eq!(all(&mut log), "");
        assert_eq!(*log.take_rest(), *b"end");
    }

    #[test]
    fn nothing_is_lost_or_told_twice_across_rotations() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        let rotate = |to: &str| fs::rename(&path, dir.path().join(format!("0.log.{to}"))).unwrap();
        append(&path, "1\n");
        let mut log = LogFile::open(path.clone().into(), None).unwrap();
        assert_eq!(all(&mut log), "1\n");
        append(&path, "2\n");
        rotate("20260101-000001");
        // The writer still has the old file.
        append(&dir.path().join("0.log.20260101-000001"), "3\n");
        assert_eq!(all(&mut log), "2\n3\n");
        append(&path, "");
        append(&dir.path().join("0.log.20260101-000001"), "4\n");
        assert_eq!(all(&mut log), "4\n");
        append(&path, "5\n");
        // Three more while nobody looks.
        for n in 2..5 {
            rotate(&format!("20260101-00000{n}"));
            append(&path, &format!("{}\n", n + 4));
        }
        assert_eq!(all(&mut log), "5\n6\n7\n8\n");
        // Ours is packed and removed.
        rotate("20260101-000005");
        append(&path, "9\n");
        fs::remove_file(dir.path().join("0.log.20260101-000005")).unwrap();
        assert_eq!(all(&mut log), "9\n");
    }
}
