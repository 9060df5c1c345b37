//! Files with holes, as GNU tar writes them: the old header of type `S`, and the PAX forms 0.0, 0.1
//! and 1.0 (GNU tar manual, "Storing Sparse Files"). The stream holds only a file's pieces; a map
//! says where each belongs. `lastlog` of a machine with large user ids is one of hundreds of
//! gigabytes, of a few kilobytes.

use std::io::Read;

use super::{MAX_EXTENSION, Member, TarError, TarStream, number, text};

/// The most pieces of one file. 1.0's map is part of the data, so no limit of headers holds there.
const MAX_PIECES: usize = (MAX_EXTENSION / 16) as usize;

/// Where a file's pieces belong.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct SparseMap {
    /// Offset and length of each, ascending, none overlapping.
    pub(crate) pieces: Vec<(u64, u64)>,
    /// The file's size with its holes.
    pub(crate) size: u64,
}

/// What the PAX records of a member say of holes.
#[derive(Debug, Default)]
pub(super) struct SparseRecords {
    major: Option<u64>,
    minor: Option<u64>,
    name: Option<Vec<u8>>,
    size: Option<u64>,
    /// Offsets and lengths in turn.
    map: Vec<u64>,
    any: bool,
}

impl SparseRecords {
    /// Takes the record `GNU.sparse.<key>`; nothing if it is malformed.
    pub(super) fn read(&mut self, key: &[u8], value: &[u8]) -> Option<()> {
        let number = || text(value)?.parse::<u64>().ok();
        self.any = true;
        match key {
            b"major" => self.major = Some(number()?),
            b"minor" => self.minor = Some(number()?),
            b"name" => self.name = Some(value.to_vec()),
            b"size" | b"realsize" => self.size = Some(number()?),
            b"offset" | b"numbytes" => self.map.push(number()?),
            b"map" => {
                for number in text(value)?.split(',').filter(|number| !number.is_empty()) {
                    self.map.push(number.parse().ok()?);
                }
            }
            // `numblocks` counts what follows anyway.
            _ => {}
        }
        Some(())
    }
}

impl<R: Read> TarStream<R> {
    /// Completes `member`, a file whose data comes next, if it has holes.
    pub(super) fn read_sparse(
        &mut self,
        header: &tar::Header,
        records: SparseRecords,
        member: &mut Member,
    ) -> Result<(), TarError> {
        let (numbers, size) = match (header.as_bytes()[156], records.any) {
            (b'S', _) => self.read_old_map(header)?,
            (_, false) => return Ok(()),
            (_, true) => {
                let size = records.size.ok_or_else(|| malformed("without a size"))?;
                let numbers = match (records.major, records.minor) {
                    (Some(1), Some(0)) => self.read_map_in_data()?,
                    (None, None) | (Some(0), _) => records.map,
                    _ => return Err(malformed("of an unknown version")),
                };
                if let Some(name) = records.name {
                    member.path = name;
                }
                (numbers, size)
            }
        };
        member.size = self.left;
        member.sparse = Some(checked(&numbers, size, self.left)?);
        Ok(())
    }

    /// Four pieces in the header, further ones in blocks of 21 after it.
    fn read_old_map(&mut self, header: &tar::Header) -> Result<(Vec<u64>, u64), TarError> {
        let size = number(&header.as_bytes()[483..495])?;
        let mut numbers = Vec::new();
        let mut block = *header.as_bytes();
        let (mut at, mut count, mut more_at) = (386, 4, 482);
        loop {
            for piece in 0..count {
                let (offset, length) = block[at + piece * 24..][..24].split_at(12);
                // An unused place is empty.
                if length[0] == 0 {
                    break;
                }
                numbers.push(number(offset)?);
                numbers.push(number(length)?);
            }
            if block[more_at] == 0 {
                return Ok((numbers, size));
            }
            if numbers.len() > 2 * MAX_PIECES {
                return Err(malformed("of too many pieces"));
            }
            if !self.fill(&mut block)? {
                return Err(malformed("that breaks off"));
            }
            (at, count, more_at) = (0, 21, 504);
        }
    }

    /// Decimal lines at the data's start, the first their number, up to a whole block.
    fn read_map_in_data(&mut self) -> Result<Vec<u64>, TarError> {
        let mut numbers = Vec::new();
        let mut wanted = None;
        let mut line = Vec::new();
        let mut block = [0; 512];
        loop {
            if self.left < 512 {
                return Err(malformed("that breaks off"));
            }
            self.read_exact(&mut block).map_err(super::truncated)?;
            for byte in block {
                if byte != b'\n' {
                    line.push(byte);
                    if line.len() > 20 {
                        return Err(malformed("with a number that is none"));
                    }
                    continue;
                }
                let value = text(&line).and_then(|line| line.parse::<u64>().ok());
                let value = value.ok_or_else(|| malformed("with a number that is none"))?;
                line.clear();
                match wanted {
                    None if value as usize <= MAX_PIECES => wanted = Some(2 * value as usize),
                    None => return Err(malformed("of too many pieces")),
                    Some(_) => numbers.push(value),
                }
                if wanted == Some(numbers.len()) {
                    return Ok(numbers);
                }
            }
        }
    }
}

/// The map that `numbers` are, if its pieces are in order and are just what the stream has.
fn checked(numbers: &[u64], size: u64, stored: u64) -> Result<SparseMap, TarError> {
    let (pairs, odd) = numbers.as_chunks::<2>();
    if !odd.is_empty() || pairs.len() > MAX_PIECES {
        return Err(malformed("of an odd number of numbers, or too many"));
    }
    let (mut end, mut sum) = (0_u64, 0_u64);
    for [offset, length] in pairs {
        let next = offset.checked_add(*length).filter(|next| *offset >= end && *next <= size);
        end =
            next.ok_or_else(|| malformed("of pieces that overlap or lie beyond the file's end"))?;
        sum += length;
    }
    // Sizes are what seeking takes.
    if sum != stored || i64::try_from(size).is_err() {
        return Err(malformed("of other sizes than the data's"));
    }
    let pieces = pairs.iter().map(|[offset, length]| (*offset, *length));
    Ok(SparseMap { pieces: pieces.filter(|(_, length)| *length > 0).collect(), size })
}

fn malformed(how: &str) -> TarError {
    TarError::Format(format!("a map of holes {how}"))
}

#[cfg(test)]
mod tests {
    use super::{super::tests::all, *};

    fn header(kind: u8, size: usize) -> tar::Header {
        let mut header = tar::Header::new_gnu();
        header.as_mut_bytes()[..4].copy_from_slice(b"name");
        header.as_mut_bytes()[156] = kind;
        header.set_size(size as u64);
        header.set_mode(0o600);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header
    }

    fn archive(pax: &[(&str, &str)], data: &[u8]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        builder.append_pax_extensions(pax.iter().map(|(k, v)| (*k, v.as_bytes()))).unwrap();
        let mut header = header(b'0', data.len());
        header.set_cksum();
        builder.append(&header, data).unwrap();
        builder.into_inner().unwrap()
    }

    fn map(pieces: &[(u64, u64)], size: u64) -> Option<SparseMap> {
        Some(SparseMap { pieces: pieces.to_vec(), size })
    }

    #[test]
    fn each_form_of_pax_is_read() {
        let size = ("GNU.sparse.size", "10000");
        let old = [
            size,
            ("GNU.sparse.numblocks", "2"),
            ("GNU.sparse.offset", "512"),
            ("GNU.sparse.numbytes", "3"),
            ("GNU.sparse.offset", "9999"),
            ("GNU.sparse.numbytes", "1"),
        ];
        let middle =
            [size, ("GNU.sparse.map", "512,3,9999,1,10000,0"), ("GNU.sparse.name", "real")];
        let new = [
            ("GNU.sparse.major", "1"),
            ("GNU.sparse.minor", "0"),
            ("GNU.sparse.realsize", "10000"),
            ("GNU.sparse.name", "real"),
        ];
        let mut mapped = b"2\n512\n3\n9999\n1\n".to_vec();
        mapped.resize(512, 0);
        mapped.extend(b"abcd");
        let read = |pax: &[(&str, &str)], data: &[u8], name: &str| {
            let [(member, data)] = &all(&archive(pax, data)).unwrap()[..] else { panic!() };
            assert_eq!(member.sparse, map(&[(512, 3), (9999, 1)], 10_000), "{pax:?}");
            assert_eq!((member.path.as_slice(), member.size), (name.as_bytes(), 4));
            assert_eq!(data, b"abcd");
        };
        read(&old, b"abcd", "name");
        read(&middle, b"abcd", "real");
        read(&new, &mapped, "real");
    }

    #[test]
    fn the_old_header_and_its_further_blocks_are_read() {
        let pieces: Vec<(u64, u64)> = (0..30).map(|n| (n * 1000, 2)).collect();
        let mut header = header(b'S', 60);
        let field = |bytes: &mut [u8], at: usize, value: u64| {
            bytes[at..at + 12].copy_from_slice(format!("{value:011o}\0").as_bytes());
        };
        for (n, (offset, length)) in pieces[..4].iter().enumerate() {
            field(header.as_mut_bytes(), 386 + n * 24, *offset);
            field(header.as_mut_bytes(), 398 + n * 24, *length);
        }
        header.as_mut_bytes()[482] = 1;
        field(header.as_mut_bytes(), 483, 40_000);
        header.set_cksum();
        let mut bytes = header.as_bytes().to_vec();
        for (rest, more) in [(&pieces[4..25], 1), (&pieces[25..], 0)] {
            let mut block = [0; 512];
            for (n, (offset, length)) in rest.iter().enumerate() {
                field(&mut block, n * 24, *offset);
                field(&mut block, n * 24 + 12, *length);
            }
            block[504] = more;
            bytes.extend(block);
        }
        bytes.extend([b'x'; 60]);
        let [(member, data)] = &all(&bytes).unwrap()[..] else { panic!() };
        assert_eq!((member.sparse.clone(), data.len()), (map(&pieces, 40_000), 60));
    }

    #[test]
    fn maps_that_lie_are_refused() {
        for numbers in [
            &[0, 5][..],
            &[0, 4, 4],
            &[0, 2, 1, 2],
            &[98, 4],
            &[u64::MAX, 4],
            &[4, u64::MAX],
            &[50, 2, 10, 2],
        ] {
            assert!(checked(numbers, 100, 4).is_err(), "{numbers:?}");
        }
        assert!(checked(&[0, 4], u64::MAX, 4).is_err());
        assert!(checked(&[], 1 << 40, 0).is_ok());
        let new =
            [("GNU.sparse.major", "1"), ("GNU.sparse.minor", "0"), ("GNU.sparse.realsize", "9")];
        for text in ["99999999\n", "x\n", "1\n0\n", "111111111111111111111111\n"] {
            let mut data = text.as_bytes().to_vec();
            data.resize(512, 0);
            assert!(all(&archive(&new, &data)).is_err(), "{text:?}");
        }
    }
}
