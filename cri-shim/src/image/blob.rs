//! A layer's way from its compressed bytes to files: checked, decompressed, checked again and
//! unpacked in one pass, so that nothing is stored twice.

use std::{
    fs,
    io::{self, BufReader, Read},
    path::Path,
    sync::mpsc::{self, Receiver, Sender, SyncSender},
    thread,
};

use sha2::{Digest, Sha256};

use super::{
    tar_stream::TarStream,
    unpack::{Limits, UnpackError, Unpacked, unpack},
};

/// What a layer must turn out to be.
#[derive(Debug, Clone)]
pub(crate) struct Expected {
    /// Digest and size of the bytes as they are transferred; unknown for plain archives.
    pub(crate) blob: Option<(String, u64)>,
    /// Digest of the tar inside.
    pub(crate) diff_id: String,
}

/// Reads a layer to its end and unpacks it into `folder`, which is made. Blocking.
///
/// Two threads share the work: one reads, sums and decompresses, the other sums and writes files.
/// An image's time is often that of its one large layer, which this nearly halves.
pub(crate) fn unpack_blob(
    source: impl Read + Send,
    expected: &Expected,
    folder: &Path,
    limits: Limits,
) -> Result<Unpacked, UnpackError> {
    fs::create_dir_all(folder).map_err(|source| UnpackError::Disk {
        operation: "create",
        path: folder.to_owned(),
        source,
    })?;
    let most = expected.blob.as_ref().map_or(u64::MAX, |(_, size)| *size);
    let (pipe, piped) = pipe();
    let (read, written) = thread::scope(|scope| {
        let reading = scope.spawn(move || read_blob(source, most, pipe));
        let written = write_files(piped, folder, limits);
        (reading.join().unwrap_or_else(|_| Err(io::Error::other("panicked"))), written)
    });
    // What the writer says of an archive that broke off is only a consequence.
    let (actual, size) = read.map_err(UnpackError::Source)?;
    let (unpacked, diff_id) = written?;
    if let Some((digest, announced)) = &expected.blob {
        if size != *announced {
            return Err(UnpackError::Archive(format!("{size} bytes instead of {announced}")));
        }
        check("digest", &actual, digest)?;
    }
    check("uncompressed digest", &diff_id, &expected.diff_id)?;
    Ok(unpacked)
}

/// The first thread's work; the digest and size of what it read. Ends early, as a success, when
/// nobody wants more.
fn read_blob(source: impl Read, most: u64, mut pipe: Pipe) -> io::Result<(String, u64)> {
    let mut sum = Sum::default();
    let blob = Summed { inner: source, sum: &mut sum, most };
    let mut decoded = decode(BufReader::with_capacity(64 * 1024, blob))?;
    while pipe.fill(&mut decoded)? {}
    drop(decoded);
    Ok(sum.take())
}

/// The second thread's work; also the digest of the tar.
fn write_files(
    piped: Piped,
    folder: &Path,
    limits: Limits,
) -> Result<(Unpacked, String), UnpackError> {
    let mut sum = Sum::default();
    // Compressed members beyond the tar are bounded like its files.
    let plain = Summed { inner: piped, sum: &mut sum, most: limits.bytes.saturating_mul(2) };
    let mut tar = TarStream::new(BufReader::with_capacity(128 * 1024, plain));
    let unpacked = unpack(&mut tar, folder, limits)?;
    // Padding after the archive's end belongs to the digests.
    let mut rest = tar.into_inner();
    io::copy(&mut rest, &mut io::sink()).map_err(UnpackError::Source)?;
    drop(rest);
    Ok((unpacked, sum.take().0))
}

/// Bytes in a piece on their way between the threads, and the most pieces under way.
const PIECE: usize = 128 * 1024;
const PIECES: usize = 4;

/// The end that decompressed bytes go into.
struct Pipe {
    full: SyncSender<Vec<u8>>,
    empty: Receiver<Vec<u8>>,
}

/// The end they come out of. Its own end is that of the archive, or of a reader that failed.
struct Piped {
    full: Receiver<Vec<u8>>,
    empty: Sender<Vec<u8>>,
    current: Vec<u8>,
    at: usize,
}

fn pipe() -> (Pipe, Piped) {
    let (full, filled) = mpsc::sync_channel(PIECES);
    let (empty, emptied) = mpsc::channel();
    let piped = Piped { full: filled, empty, current: Vec::new(), at: 0 };
    (Pipe { full, empty: emptied }, piped)
}

impl Pipe {
    /// Sends one piece on; false at the end, or when nobody wants it.
    fn fill(&mut self, source: &mut impl Read) -> io::Result<bool> {
        let mut piece = self.empty.try_recv().unwrap_or_default();
        piece.clear();
        piece.reserve(PIECE);
        let read = source.by_ref().take(PIECE as u64).read_to_end(&mut piece)?;
        Ok(read > 0 && self.full.send(piece).is_ok())
    }
}

impl Read for Piped {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.at == self.current.len() {
            // Whoever reads has ended if it does not take the piece back.
            let _ = self.empty.send(std::mem::take(&mut self.current));
            self.at = 0;
            match self.full.recv() {
                Ok(piece) => self.current = piece,
                Err(_) => return Ok(0),
            }
        }
        let rest = &self.current[self.at..];
        let most = buffer.len().min(rest.len());
        buffer[..most].copy_from_slice(&rest[..most]);
        self.at += most;
        Ok(most)
    }
}

fn check(what: &str, actual: &str, expected: &str) -> Result<(), UnpackError> {
    if actual == expected {
        Ok(())
    } else {
        Err(UnpackError::Archive(format!("its {what} is {actual} instead of {expected}")))
    }
}

/// `sha256:<hex>` of `bytes`.
pub(crate) fn digest_of(bytes: &[u8]) -> String {
    text(&Sha256::digest(bytes))
}

fn text(sum: &[u8]) -> String {
    use std::fmt::Write as _;
    sum.iter().fold("sha256:".to_owned(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Decompresses by what the bytes are; media types are often wrong, and archives have none.
pub(crate) fn decode<'a>(mut source: BufReader<impl Read + 'a>) -> io::Result<Box<dyn Read + 'a>> {
    let mut magic = [0; 4];
    let mut filled = 0;
    while filled < magic.len() {
        match source.read(&mut magic[filled..])? {
            0 => break,
            read => filled += read,
        }
    }
    let whole = io::Cursor::new(magic[..filled].to_vec()).chain(source);
    Ok(match magic {
        [0x1f, 0x8b, ..] => Box::new(flate2::bufread::MultiGzDecoder::new(
            BufReader::with_capacity(32 * 1024, whole),
        )),
        // A zstd frame, or a skippable one before it (RFC 8878 section 3.1.2).
        [0x28, 0xb5, 0x2f, 0xfd] | [0x50..=0x5f, 0x2a, 0x4d, 0x18] => {
            Box::new(zstd::stream::read::Decoder::new(whole)?)
        }
        _ => Box::new(whole),
    })
}

/// Digest and size of what passed through a [`Summed`] reader.
#[derive(Default)]
struct Sum {
    hasher: Sha256,
    read: u64,
}

impl Sum {
    fn take(self) -> (String, u64) {
        (text(&self.hasher.finalize()), self.read)
    }
}

/// A reader that sums what passes through, and fails beyond `most` bytes.
struct Summed<'a, R> {
    inner: R,
    sum: &'a mut Sum,
    most: u64,
}

impl<R: Read> Read for Summed<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.sum.hasher.update(&buffer[..read]);
        self.sum.read += read as u64;
        if self.sum.read > self.most {
            return Err(io::Error::other(format!("more than the announced {} bytes", self.most)));
        }
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    const LIMITS: Limits = Limits { bytes: 1 << 20, entries: 100 };

    fn tar_of(size: usize) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_size(size as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, "file", io::repeat(7).take(size as u64)).unwrap();
        builder.into_inner().unwrap()
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn run(blob: &[u8], expected: &Expected) -> Result<Unpacked, UnpackError> {
        let folder = tempfile::tempdir().unwrap();
        unpack_blob(blob, expected, &folder.path().join("d"), LIMITS)
    }

    #[test]
    fn every_compression_is_read_and_checked_on_both_sides() {
        let tar = tar_of(5000);
        let diff_id = digest_of(&tar);
        for blob in [tar.clone(), gzip(&tar), zstd::encode_all(&tar[..], 1).unwrap()] {
            let good = Expected {
                blob: Some((digest_of(&blob), blob.len() as u64)),
                diff_id: diff_id.clone(),
            };
            let unpacked = run(&blob, &good).unwrap();
            assert_eq!((unpacked.bytes, unpacked.inodes), (5000, 1));
            let mut wrong = good.clone();
            wrong.diff_id = digest_of(b"");
            assert!(run(&blob, &wrong).unwrap_err().to_string().contains("uncompressed digest"));
            let mut wrong = good.clone();
            wrong.blob = Some((digest_of(b""), blob.len() as u64));
            assert!(run(&blob, &wrong).unwrap_err().to_string().contains("its digest is"));
            let mut wrong = good.clone();
            wrong.blob = Some((digest_of(&blob), blob.len() as u64 - 1));
            assert!(
                run(&blob, &wrong).unwrap_err().to_string().contains("more than the announced")
            );
            assert!(run(&blob[..blob.len() / 2], &good).is_err());
        }
    }

    #[test]
    fn bombs_are_bounded() {
        let bomb = gzip(&tar_of(3 << 20));
        let expected = Expected { blob: None, diff_id: String::new() };
        let error = run(&bomb, &expected).unwrap_err().to_string();
        assert!(error.contains("more than 1048576 bytes"), "{error}");
        let tail = gzip(&vec![0; 4 << 20]);
        let error = run(&tail, &expected).unwrap_err().to_string();
        assert!(error.contains("more than the announced"), "{error}");
    }
}
