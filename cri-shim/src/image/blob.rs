//! A layer's way from its compressed bytes to files: checked, decompressed, checked again and
//! unpacked in one pass, so that nothing is stored twice.

use std::{
    cell::RefCell,
    fs,
    io::{self, BufReader, Read},
    path::Path,
    rc::Rc,
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
pub(crate) fn unpack_blob(
    source: impl Read,
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
    let (blob, blob_sum) = Summed::new(source, most);
    let decoded = decode(BufReader::with_capacity(64 * 1024, blob)).map_err(UnpackError::Source)?;
    // Compressed members beyond the tar are bounded like its files.
    let (plain, plain_sum) = Summed::new(decoded, limits.bytes.saturating_mul(2));
    let mut tar = TarStream::new(BufReader::with_capacity(128 * 1024, plain));
    let unpacked = unpack(&mut tar, folder, limits)?;
    // Padding after the archive's end belongs to both digests.
    let mut rest = tar.into_inner();
    io::copy(&mut rest, &mut io::sink()).map_err(UnpackError::Source)?;
    let mut rest = rest.into_inner().inner;
    io::copy(&mut rest, &mut io::sink()).map_err(UnpackError::Source)?;
    drop(rest);
    if let Some((digest, size)) = &expected.blob {
        let (actual, read) = blob_sum.take();
        if read != *size {
            return Err(UnpackError::Archive(format!("{read} bytes instead of {size}")));
        }
        check("digest", &actual, digest)?;
    }
    check("uncompressed digest", &plain_sum.take().0, &expected.diff_id)?;
    Ok(unpacked)
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

/// The digest of what passed through a [`Summed`] reader.
struct Sum(Rc<RefCell<(Sha256, u64)>>);

impl Sum {
    fn take(&self) -> (String, u64) {
        let (hasher, read) = &*self.0.borrow();
        (text(&hasher.clone().finalize()), *read)
    }
}

/// A reader that sums what passes through, and fails beyond `most` bytes.
struct Summed<R> {
    inner: R,
    sum: Rc<RefCell<(Sha256, u64)>>,
    most: u64,
}

impl<R> Summed<R> {
    fn new(inner: R, most: u64) -> (Self, Sum) {
        let sum = Rc::new(RefCell::new((Sha256::new(), 0)));
        (Self { inner, sum: Rc::clone(&sum), most }, Sum(sum))
    }
}

impl<R: Read> Read for Summed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        let (hasher, total) = &mut *self.sum.borrow_mut();
        hasher.update(&buffer[..read]);
        *total += read as u64;
        if *total > self.most {
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
