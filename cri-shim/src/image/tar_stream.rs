//! Reading a tar from an untrusted stream, member by member, in bounded memory.
//!
//! The `tar` crate reads headers' extensions (long names, PAX records) whole, however long they
//! claim to be; a layer comes from anywhere, so here each extension has a limit. Formats: ustar,
//! GNU long names and base-256 numbers, PAX (POSIX.1-2001 pax, "Extended Header"), GNU's sparse files.

use std::{
    io::{self, Read},
    ops::Range,
};

mod sparse;
pub(crate) use sparse::SparseMap;
use sparse::SparseRecords;

/// The most the extension headers before one member may hold; Go's writer stays far below.
const MAX_EXTENSION: u64 = 1 << 20;

/// What a member is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    File,
    HardLink,
    Symlink,
    Directory,
    Fifo,
    /// Character or block device.
    Device,
}

/// One member; its data follows in the stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Member {
    pub(crate) path: Vec<u8>,
    pub(crate) kind: Kind,
    /// Target of a link.
    pub(crate) link: Vec<u8>,
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Seconds and nanoseconds.
    pub(crate) mtime: (i64, u32),
    /// Bytes of data in the stream: of a file with holes, those of its pieces.
    pub(crate) size: u64,
    /// Where the data belongs, if the file has holes.
    pub(crate) sparse: Option<SparseMap>,
    pub(crate) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// Why a stream can't be read on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TarError {
    #[error("not a valid tar: {0}")]
    Format(String),
    #[error(transparent)]
    Read(#[from] io::Error),
}

/// A tar being read. Between two calls of [`TarStream::next`], reading gives the member's data.
pub(crate) struct TarStream<R> {
    inner: R,
    /// Bytes of the current member not read yet, and the padding after them.
    left: u64,
    padding: u64,
    /// Bytes consumed so far: where the current member's data starts right after `next`.
    position: u64,
    /// Bytes of the extensions of the member to come.
    extension_bytes: u64,
    done: bool,
}

#[derive(Default)]
struct Extensions {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u32>,
    gid: Option<u32>,
    mtime: Option<(i64, u32)>,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    sparse: SparseRecords,
}

impl<R: Read> TarStream<R> {
    pub(crate) fn new(inner: R) -> Self {
        Self { inner, left: 0, padding: 0, position: 0, extension_bytes: 0, done: false }
    }

    /// Where the current member's data starts in the stream.
    pub(crate) fn position(&self) -> u64 {
        self.position
    }

    /// The stream behind the tar, for what follows its end.
    pub(crate) fn into_inner(self) -> R {
        self.inner
    }

    /// Skips to the next member; none at the end of the archive.
    pub(crate) fn next(&mut self) -> Result<Option<Member>, TarError> {
        let mut extensions = Extensions::default();
        self.extension_bytes = 0;
        while !self.done {
            self.skip()?;
            let mut header = tar::Header::new_old();
            if !self.fill(header.as_mut_bytes())? || header.as_bytes().iter().all(|b| *b == 0) {
                self.done = true;
                break;
            }
            check_sum(&header)?;
            let size =
                extensions.size.take().map_or_else(|| number(&header.as_bytes()[SIZE]), Ok)?;
            self.left = size;
            self.padding = size.wrapping_neg() % 512;
            match header.as_bytes()[156] {
                b'L' => extensions.path = Some(without_nul(self.extension(size)?)),
                b'K' => extensions.link = Some(without_nul(self.extension(size)?)),
                b'x' => {
                    let records = self.extension(size)?;
                    read_pax(&records, &mut extensions)?;
                }
                // Global records name the commit of a `git archive`; nothing that layers use.
                b'g' => drop(self.extension(size)?),
                flag => {
                    let records = std::mem::take(&mut extensions.sparse);
                    let mut member = member(&header, flag, size, extensions)?;
                    if member.kind == Kind::File {
                        self.read_sparse(&header, records, &mut member)?;
                    }
                    if !matches!(member.kind, Kind::File) {
                        // Only files have data; some writers note a size for hard links all the same.
                        if member.kind != Kind::HardLink && size > 0 {
                            return Err(TarError::Format(format!(
                                "{} has data but is no file",
                                String::from_utf8_lossy(&member.path)
                            )));
                        }
                        self.left = 0;
                        self.padding = 0;
                    }
                    return Ok(Some(member));
                }
            }
        }
        Ok(None)
    }

    fn extension(&mut self, size: u64) -> Result<Vec<u8>, TarError> {
        // Each counts as the block that its header is, so that empty ones have an end too.
        let total = self.extension_bytes.saturating_add(size).saturating_add(512);
        if total > MAX_EXTENSION {
            return Err(TarError::Format(format!("header extensions of {total} bytes")));
        }
        self.extension_bytes = total;
        let mut content = vec![0; size as usize];
        self.read_exact(&mut content).map_err(truncated)?;
        Ok(content)
    }

    /// Drops the rest of the current member. An archive may end without the padding of its last
    /// member and without the blocks that mark its end: umoci writes such, and others read them.
    fn skip(&mut self) -> Result<(), TarError> {
        let rest = self.left + self.padding;
        let skipped = io::copy(&mut (&mut self.inner).take(rest), &mut io::sink())?;
        if skipped < self.left {
            return Err(truncated(io::ErrorKind::UnexpectedEof.into()));
        }
        self.position += rest;
        (self.left, self.padding) = (0, 0);
        Ok(())
    }

    /// Reads one block; false at a clean end of the stream.
    fn fill(&mut self, block: &mut [u8; 512]) -> Result<bool, TarError> {
        let mut filled = 0;
        while filled < block.len() {
            match self.inner.read(&mut block[filled..]) {
                Ok(0) if filled == 0 => return Ok(false),
                Ok(0) => return Err(truncated(io::ErrorKind::UnexpectedEof.into())),
                Ok(n) => filled += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.position += 512;
        Ok(true)
    }
}

impl<R: Read> Read for TarStream<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = buffer.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        if most == 0 {
            return Ok(0);
        }
        let read = self.inner.read(&mut buffer[..most])?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.left -= read as u64;
        self.position += read as u64;
        Ok(read)
    }
}

fn truncated(error: io::Error) -> TarError {
    if error.kind() == io::ErrorKind::UnexpectedEof {
        TarError::Format("it ends in the middle of a member".to_owned())
    } else {
        TarError::Read(error)
    }
}

const MODE: Range<usize> = 100..108;
const UID: Range<usize> = 108..116;
const GID: Range<usize> = 116..124;
const SIZE: Range<usize> = 124..136;
const MTIME: Range<usize> = 136..148;

/// A numeric field: octal, blank for zero, or GNU's base 256 (first bit set).
fn number(bytes: &[u8]) -> Result<u64, TarError> {
    if bytes[0] & 0x80 != 0 {
        let (high, low) = bytes.split_at(bytes.len() - 8);
        let fits = high.iter().enumerate().all(|(n, b)| *b == if n == 0 { 0x80 } else { 0 });
        let value = low.iter().fold(0, |value, b| value << 8 | u64::from(*b));
        // An 8-byte field's own first bit is the marker.
        let value = if high.is_empty() { value & !(1 << 63) } else { value };
        return if fits && value < 1 << 62 {
            Ok(value)
        } else {
            Err(TarError::Format("a number out of range".to_owned()))
        };
    }
    let digits = bytes.split(|b| *b == 0).next().and_then(text).unwrap_or("?").trim();
    if digits.is_empty() {
        return Ok(0);
    }
    u64::from_str_radix(digits, 8)
        .map_err(|_| TarError::Format(format!("{digits:?} is not an octal number")))
}

fn check_sum(header: &tar::Header) -> Result<(), TarError> {
    let bytes = header.as_bytes();
    // The checksum counts its own field as spaces.
    let sum: u32 = bytes[..148].iter().chain(&bytes[156..]).map(|b| u32::from(*b)).sum::<u32>()
        + 8 * u32::from(b' ');
    match number(&bytes[148..156]) {
        Ok(want) if want == u64::from(sum) => Ok(()),
        _ => Err(TarError::Format("a header's checksum is wrong".to_owned())),
    }
}

fn member(
    header: &tar::Header,
    flag: u8,
    size: u64,
    extensions: Extensions,
) -> Result<Member, TarError> {
    let path = extensions.path.unwrap_or_else(|| header.path_bytes().into_owned());
    let kind = match flag {
        // Old archives mark folders by a slash alone.
        b'0' | 0 | b'7' if path.ends_with(b"/") => Kind::Directory,
        b'0' | 0 | b'7' | b'S' => Kind::File,
        b'1' => Kind::HardLink,
        b'2' => Kind::Symlink,
        b'3' | b'4' => Kind::Device,
        b'5' => Kind::Directory,
        b'6' => Kind::Fifo,
        other => {
            return Err(TarError::Format(format!(
                "{}: members of type {:?} are not supported",
                String::from_utf8_lossy(&path),
                char::from(other)
            )));
        }
    };
    let link = extensions
        .link
        .or_else(|| header.link_name_bytes().map(|link| link.into_owned()))
        .unwrap_or_default();
    let id = |field: Range<usize>| -> Result<u32, TarError> {
        u32::try_from(number(&header.as_bytes()[field])?)
            .map_err(|_| TarError::Format("an owner beyond 32 bits".to_owned()))
    };
    let mtime = match extensions.mtime {
        Some(mtime) => mtime,
        None => (i64::try_from(number(&header.as_bytes()[MTIME]).unwrap_or(0)).unwrap_or(0), 0),
    };
    Ok(Member {
        path,
        kind,
        link,
        mode: (number(&header.as_bytes()[MODE])? & 0o7777) as u32,
        uid: extensions.uid.map_or_else(|| id(UID), Ok)?,
        gid: extensions.gid.map_or_else(|| id(GID), Ok)?,
        mtime,
        size,
        sparse: None,
        xattrs: extensions.xattrs,
    })
}

fn without_nul(mut name: Vec<u8>) -> Vec<u8> {
    if let Some(end) = name.iter().position(|b| *b == 0) {
        name.truncate(end);
    }
    name
}

/// Records are `<length> <key>=<value>\n`, where the length counts the whole record.
fn read_pax(mut records: &[u8], into: &mut Extensions) -> Result<(), TarError> {
    let bad = || TarError::Format("a malformed PAX record".to_owned());
    while !records.is_empty() && records[0] != 0 {
        let space = records.iter().position(|b| *b == b' ').ok_or_else(bad)?;
        let length: usize = text(&records[..space]).and_then(|t| t.parse().ok()).ok_or_else(bad)?;
        if length <= space + 1 || length > records.len() || records[length - 1] != b'\n' {
            return Err(bad());
        }
        let record = &records[space + 1..length - 1];
        records = &records[length..];
        let equals = record.iter().position(|b| *b == b'=').ok_or_else(bad)?;
        let (key, value) = (&record[..equals], &record[equals + 1..]);
        let number = || text(value).and_then(|t| t.parse::<u64>().ok()).ok_or_else(bad);
        match key {
            b"path" => into.path = Some(value.to_vec()),
            b"linkpath" => into.link = Some(value.to_vec()),
            b"size" => into.size = Some(number()?),
            b"uid" => into.uid = Some(u32::try_from(number()?).map_err(|_| bad())?),
            b"gid" => into.gid = Some(u32::try_from(number()?).map_err(|_| bad())?),
            b"mtime" => into.mtime = Some(text(value).and_then(time).ok_or_else(bad)?),
            _ => {
                if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                    into.xattrs.push((name.to_vec(), value.to_vec()));
                } else if let Some(key) = key.strip_prefix(b"GNU.sparse.") {
                    into.sparse.read(key, value).ok_or_else(bad)?;
                }
            }
        }
    }
    Ok(())
}

fn text(bytes: &[u8]) -> Option<&str> {
    std::str::from_utf8(bytes).ok()
}

/// Seconds with an optional fraction.
fn time(text: &str) -> Option<(i64, u32)> {
    let (seconds, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds: i64 = seconds.parse().ok()?;
    let digits: String = fraction.chars().chain("000000000".chars()).take(9).collect();
    let nanos: u32 = digits.parse().ok()?;
    // Nanoseconds count upwards, also before 1970.
    Some(if text.starts_with('-') && nanos > 0 {
        (seconds - 1, 1_000_000_000 - nanos)
    } else {
        (seconds, nanos)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn all(bytes: &[u8]) -> Result<Vec<(Member, Vec<u8>)>, TarError> {
        let mut stream = TarStream::new(bytes);
        let mut members = Vec::new();
        while let Some(member) = stream.next()? {
            let mut data = Vec::new();
            stream.read_to_end(&mut data)?;
            members.push((member, data));
        }
        Ok(members)
    }

    #[test]
    fn reads_what_the_tar_crate_writes() {
        let mut builder = tar::Builder::new(Vec::new());
        let long = format!("{}/file", "d".repeat(150));
        let mut header = tar::Header::new_gnu();
        header.set_size(3);
        header.set_mode(0o4755);
        header.set_uid(3_000_000);
        header.set_mtime(77);
        let pax: [(&str, &[u8]); 2] = [("SCHILY.xattr.user.x", b"a=b\n\0"), ("mtime", b"-1.5")];
        builder.append_pax_extensions(pax).unwrap();
        builder.append_data(&mut header, &long, &b"abc"[..]).unwrap();
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(tar::EntryType::Symlink);
        header.set_size(0);
        header.set_mode(0o777);
        builder.append_link(&mut header, "link", "/etc/x").unwrap();
        let members = all(&builder.into_inner().unwrap()).unwrap();
        assert_eq!(members.len(), 2);
        let (file, data) = &members[0];
        assert_eq!((file.path.as_slice(), data.as_slice()), (long.as_bytes(), &b"abc"[..]));
        assert_eq!((file.mode, file.uid, file.mtime), (0o4755, 3_000_000, (-2, 500_000_000)));
        assert_eq!(file.xattrs, [(b"user.x".to_vec(), b"a=b\n\0".to_vec())]);
        assert_eq!(
            (members[1].0.kind, members[1].0.link.as_slice()),
            (Kind::Symlink, &b"/etc/x"[..])
        );
    }

    #[test]
    fn garbage_and_oversized_extensions_are_refused() {
        assert!(all(&[]).unwrap().is_empty());
        assert!(all(&[0; 1024]).unwrap().is_empty());
        assert!(matches!(all(&[7; 512]), Err(TarError::Format(_))));
        assert!(matches!(all(&[0x41; 100]), Err(TarError::Format(_))));
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::GNULongName);
        header.set_size(1 << 40);
        header.set_cksum();
        assert!(matches!(all(header.as_bytes()), Err(TarError::Format(_))));
        // Many small ones come to the same.
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::XHeader);
        header.set_size(512);
        header.set_cksum();
        let record = format!("512 SCHILY.xattr.user.x={}\n", "v".repeat(512 - 25));
        let flood = [header.as_bytes(), record.as_bytes()].concat().repeat(2000);
        let error = all(&flood).unwrap_err().to_string();
        assert!(error.contains("header extensions"), "{error}");
        for pax in ["x", "9 path=a", "99 path=a\n", "4 x\n", "10 uid=-1\n"] {
            assert!(read_pax(pax.as_bytes(), &mut Extensions::default()).is_err(), "{pax:?}");
        }
    }

    #[test]
    fn an_archive_may_end_with_its_last_byte() {
        let mut builder = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_size(3);
        builder.append_data(&mut header, "file", &b"abc"[..]).unwrap();
        let bytes = builder.into_inner().unwrap();
        assert_eq!(all(&bytes[..515]).unwrap()[0].1, b"abc");
        assert!(all(&bytes[..514]).is_err());
        // What is not read is missed just the same.
        let mut stream = TarStream::new(&bytes[..514]);
        stream.next().unwrap();
        assert!(stream.next().is_err());
    }

    proptest::proptest! {
        #[test]
        fn never_panics(bytes in proptest::collection::vec(0u8.., 0..2048), flag in 0u8..) {
            let mut archive = tar::Header::new_gnu();
            let _ = archive.set_path("x");
            archive.as_mut_bytes()[156] = flag;
            archive.set_size(bytes.len() as u64);
            archive.set_cksum();
            let mut whole = archive.as_bytes().to_vec();
            whole.extend(bytes);
            let _ = all(&whole);
        }
    }
}
