use std::{
    fs,
    os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink},
};

use tar::EntryType;

use super::{super::lower::complete, *};

const LIMITS: Limits = Limits { bytes: 1 << 20, entries: 1000 };

/// Members as (type, path, link target or content).
fn archive(members: &[(EntryType, &str, &str)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (kind, path, text) in members {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(*kind);
        header.set_mode(if *kind == EntryType::Directory { 0o750 } else { 0o640 });
        header.set_uid(1000);
        header.set_gid(1001);
        header.set_mtime(1_000_000);
        // Written by hand: the crate's own setters refuse what the tests are about.
        let name = &mut header.as_mut_bytes()[..100];
        name[..path.len()].copy_from_slice(path.as_bytes());
        let is_link = matches!(kind, EntryType::Symlink | EntryType::Link);
        if is_link {
            header.as_mut_bytes()[157..157 + text.len()].copy_from_slice(text.as_bytes());
        }
        let data = if *kind == EntryType::Regular { text.as_bytes() } else { b"" };
        header.set_size(data.len() as u64);
        header.set_cksum();
        bytes.extend(header.as_bytes());
        bytes.extend(data);
        bytes.resize(bytes.len().next_multiple_of(512), 0);
    }
    bytes.resize(bytes.len() + 1024, 0);
    bytes
}

/// A layer folder inside a folder that nothing may be written to.
pub(in crate::image) struct Place {
    outer: tempfile::TempDir,
    pub(in crate::image) layer: PathBuf,
}

impl Place {
    pub(in crate::image) fn new() -> Self {
        let outer = tempfile::tempdir().unwrap();
        fs::write(outer.path().join("victim"), "untouched").unwrap();
        let layer = outer.path().join("a/d");
        fs::create_dir_all(&layer).unwrap();
        Self { outer, layer }
    }

    fn unpack(&self, members: &[(EntryType, &str, &str)]) -> Result<Unpacked, UnpackError> {
        self.unpack_over(members, &[])
    }

    /// Unpacks and completes with the layers `below`, the nearest first.
    pub(in crate::image) fn unpack_over(
        &self,
        members: &[(EntryType, &str, &str)],
        below: &[&Place],
    ) -> Result<Unpacked, UnpackError> {
        let bytes = archive(members);
        let below: Vec<_> = below.iter().map(|place| place.layer.clone()).collect();
        let result = unpack(&mut TarStream::new(bytes.as_slice()), &self.layer, LIMITS)
            .and_then(|done| complete(&self.outer.path().join("a"), &done, &below).map(|()| done));
        let names: Vec<_> =
            fs::read_dir(self.outer.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names.len(), 2, "something was written outside: {names:?}");
        assert_eq!(fs::read_dir(self.outer.path().join("a")).unwrap().count(), 1);
        let victim = fs::symlink_metadata(self.outer.path().join("victim")).unwrap();
        assert_eq!((victim.nlink(), victim.uid(), victim.len()), (1, 0, 9));
        result
    }

    pub(in crate::image) fn meta(&self, path: &str) -> fs::Metadata {
        fs::symlink_metadata(self.layer.join(path)).unwrap()
    }
}

use EntryType::{Block, Char, Directory as Dir, Fifo, Link, Regular as File, Symlink as Sym};

#[test]
fn owners_modes_times_and_kinds_are_kept() {
    let place = Place::new();
    let done = place
        .unpack(&[
            (Dir, "./", ""),
            (Dir, "etc/", ""),
            (File, "etc/passwd", "root"),
            (Sym, "etc/link", "/etc/passwd"),
            (Link, "etc/hard", "etc/passwd"),
            (Fifo, "etc/pipe", ""),
            (File, "deep/in/file", "x"),
        ])
        .unwrap();
    assert_eq!(done.implicit, [Path::new("deep"), Path::new("deep/in")]);
    assert_eq!((done.bytes, done.inodes), (5, 9));
    let passwd = place.meta("etc/passwd");
    assert_eq!(
        (passwd.mode() & 0o7777, passwd.uid(), passwd.gid(), passwd.mtime(), passwd.nlink()),
        (0o640, 1000, 1001, 1_000_000, 2)
    );
    for path in ["", "etc", "etc/link", "etc/pipe"] {
        let meta = place.meta(path);
        assert_eq!((meta.uid(), meta.mtime()), (1000, 1_000_000), "{path}");
    }
    assert_eq!(place.meta("etc").permissions().mode() & 0o777, 0o750);
    assert!(place.meta("etc/pipe").file_type().is_fifo());
    assert_eq!(place.meta("deep/in").mode() & 0o777, 0o755);
}

#[test]
fn paths_out_of_the_layer_are_refused_or_contained() {
    for members in [
        &[(File, "../victim", "evil")][..],
        &[(File, "a/../../../victim", "evil")],
        &[(Dir, "..", "")],
        &[(Link, "x", "../../victim")],
        &[(Link, "x", "/etc/hostname")],
        &[(Sym, "up", ".."), (Link, "x", "up/../victim")],
        &[(Link, "x", "missing")],
        &[(Dir, "d", ""), (Link, "x", "d")],
        &[(File, "f", ""), (File, "f/below", "")],
        &[(Sym, "loop", "loop"), (File, "loop/x", "")],
        &[(File, ".wh.", "")],
        &[(File, ".wh..", "")],
        &[(File, ".wh...", "")],
        &[(File, "d/.wh...", "")],
        &[(Sym, "empty", "")],
    ] {
        let place = Place::new();
        let error = place.unpack(members).unwrap_err();
        assert!(matches!(error, UnpackError::Archive(_)), "{members:?}: {error}");
    }
    for (members, lands) in [
        (&[(File, "/etc/abs", "evil")][..], "etc/abs"),
        (&[(Sym, "up", "../.."), (File, "up/victim", "evil")], "victim"),
        (&[(Sym, "root", "/"), (File, "root/victim", "evil")], "victim"),
        (&[(Dir, "real", ""), (Sym, "l", "/real"), (File, "l/f", "evil")], "real/f"),
        (&[(Sym, "f", "../victim"), (File, "f", "evil")], "f"),
        (&[(Sym, "d", "../.."), (Dir, "d", ""), (File, "d/victim", "evil")], "d/victim"),
        // What hides or replaces things by way of a link stays inside as well.
        (&[(Sym, "d", "/.."), (File, "d/.wh.victim", ""), (File, "d/x", "evil")], "x"),
        (&[(Sym, "d", "../.."), (File, "d/.wh..wh..opq", ""), (File, "d/x", "evil")], "x"),
    ] {
        let place = Place::new();
        place.unpack(members).unwrap();
        assert_eq!(fs::read_to_string(place.layer.join(lands)).unwrap(), "evil", "{members:?}");
        assert!(place.meta(lands).is_file());
    }
}

#[test]
fn a_planted_link_to_a_process_is_not_followed() {
    let place = Place::new();
    symlink("/proc/self/root", place.layer.join("proc")).unwrap();
    let error = place.unpack(&[(File, "proc/victim", "evil")]).unwrap_err();
    assert!(matches!(error, UnpackError::Archive(_)), "{error}");
}

#[test]
fn devices_are_left_out() {
    let place = Place::new();
    let done =
        place.unpack(&[(Char, "null", ""), (Block, "sda", ""), (File, "dev/console", "")]).unwrap();
    assert_eq!(done.inodes, 2);
    assert!(!place.layer.join("null").exists() && !place.layer.join("sda").exists());
}

#[test]
fn whiteouts_become_overlayfs_own() {
    let place = Place::new();
    place
        .unpack(&[
            (File, "etc/.wh.gone", ""),
            (Dir, "opt/", ""),
            (File, "opt/.wh..wh..opq", ""),
            (File, "opt/kept", "x"),
            (File, ".wh..wh.plnk", ""),
            // Hidden below and made anew here, in both orders.
            (File, ".wh.before", ""),
            (File, "before/file", "x"),
            (Dir, "after", ""),
            (File, ".wh.after", ""),
            (File, ".wh.file", ""),
            (File, "file", "x"),
        ])
        .unwrap();
    let gone = place.meta("etc/gone");
    assert!(gone.file_type().is_char_device() && gone.rdev() == 0);
    for (path, opaque) in [("opt", true), ("before", true), ("after", true), ("etc", false)] {
        let folder = fs::File::open(place.layer.join(path)).unwrap();
        let value = sys::get_xattr(&folder, c"trusted.overlay.opaque");
        assert_eq!(value.is_ok_and(|value| value == b"y"), opaque, "{path}");
    }
    assert!(place.meta("file").is_file());
    assert!(
        !place.layer.join(".wh..wh.plnk").exists()
            && !place.layer.join("opt/.wh..wh..opq").exists()
    );
}

#[test]
fn later_members_replace_earlier_ones() {
    let place = Place::new();
    place
        .unpack(&[
            (Dir, "x", ""),
            (File, "x/y", "1"),
            (File, "x", "file"),
            (File, "z", "old, longer"),
            (File, "z", "new"),
            (Sym, "s", "z"),
            (Dir, "s", ""),
        ])
        .unwrap();
    assert_eq!(fs::read_to_string(place.layer.join("x")).unwrap(), "file");
    assert_eq!(fs::read_to_string(place.layer.join("z")).unwrap(), "new");
    assert!(place.meta("s").is_dir());
}

#[test]
fn capabilities_are_kept_and_overlay_markers_refused() {
    let place = Place::new();
    let mut builder = tar::Builder::new(Vec::new());
    // cap_net_bind_service=ep, revision 2.
    let capability: &[u8] = &[1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let records: [(&str, &[u8]); 3] = [
        ("SCHILY.xattr.security.capability", capability),
        ("SCHILY.xattr.trusted.overlay.redirect", b"/etc"),
        ("SCHILY.xattr.user.note", b"hi"),
    ];
    builder.append_pax_extensions(records).unwrap();
    let mut header = tar::Header::new_ustar();
    header.set_mode(0o6755);
    header.set_size(1);
    header.set_uid(5);
    builder.append_data(&mut header, "bin", &b"x"[..]).unwrap();
    let bytes = builder.into_inner().unwrap();
    unpack(&mut TarStream::new(bytes.as_slice()), &place.layer, LIMITS).unwrap();
    let file = fs::File::open(place.layer.join("bin")).unwrap();
    assert_eq!(sys::get_xattr(&file, c"security.capability").unwrap(), capability);
    assert_eq!(sys::get_xattr(&file, c"user.note").unwrap(), b"hi");
    assert!(sys::get_xattr(&file, c"trusted.overlay.redirect").is_err());
    assert_eq!(file.metadata().unwrap().mode() & 0o7777, 0o6755);
}

#[test]
fn floods_are_bounded() {
    let place = Place::new();
    let many: Vec<_> = (0..LIMITS.entries + 1).map(|n| format!("f{n}")).collect();
    let members: Vec<_> = many.iter().map(|name| (File, name.as_str(), "")).collect();
    let error = place.unpack(&members).unwrap_err().to_string();
    assert!(error.contains("more than 1000 files"), "{error}");
}

#[test]
fn holes_are_read_as_gnu_tar_writes_them() {
    let folder = tempfile::tempdir().unwrap();
    let file = fs::File::create(folder.path().join("sparse")).unwrap();
    // More pieces than a header has room for.
    for piece in 0..60 {
        std::os::unix::fs::FileExt::write_all_at(&file, b"data", piece * (1 << 20)).unwrap();
    }
    file.set_len(100 << 20).unwrap();
    let content = fs::read(folder.path().join("sparse")).unwrap();
    for format in ["gnu", "0.0", "0.1", "1.0"] {
        let version = match format {
            "gnu" => "--format=gnu".to_owned(),
            version => format!("--sparse-version={version}"),
        };
        let mut tar = std::process::Command::new("tar");
        tar.args(["-c", "--sparse", &version, "sparse"]).current_dir(folder.path());
        if format != "gnu" {
            tar.arg("--format=pax");
        }
        let bytes = tar.output().unwrap().stdout;
        let place = Place::new();
        unpack(&mut TarStream::new(bytes.as_slice()), &place.layer, LIMITS).unwrap();
        assert!(fs::read(place.layer.join("sparse")).unwrap() == content, "{format}");
        assert!(place.meta("sparse").blocks() < 60 * 8 + 64, "{format}");
    }
}

#[test]
fn holes_are_left_out() {
    let place = Place::new();
    let mut builder = tar::Builder::new(Vec::new());
    let records: [(&str, &[u8]); 2] =
        [("GNU.sparse.size", b"300000000000"), ("GNU.sparse.map", b"0,3,5000,2,299999999999,1")];
    builder.append_pax_extensions(records).unwrap();
    let mut header = tar::Header::new_ustar();
    header.set_mode(0o600);
    header.set_size(6);
    builder.append_data(&mut header, "lastlog", &b"abcdez"[..]).unwrap();
    let bytes = builder.into_inner().unwrap();
    let done = unpack(&mut TarStream::new(bytes.as_slice()), &place.layer, LIMITS).unwrap();
    let meta = place.meta("lastlog");
    assert_eq!((done.bytes, meta.len()), (6, 300_000_000_000));
    assert!(meta.blocks() < 100, "{} blocks", meta.blocks());
    let file = fs::File::open(place.layer.join("lastlog")).unwrap();
    let read = |at, length| {
        let mut bytes = vec![0; length];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, at).unwrap();
        bytes
    };
    assert_eq!((read(0, 5), read(4999, 4)), (b"abc\0\0".to_vec(), b"\0de\0".to_vec()));
    assert_eq!(read(299_999_999_998, 2), b"\0z");
}

#[test]
fn names_that_no_filesystem_takes_are_the_archives_fault() {
    let long = "n".repeat(256);
    let deep = "d/".repeat(2040);
    for (path, link) in [
        (long.clone(), String::new()),
        (format!("{deep}{deep}file"), String::new()),
        ("link".to_owned(), "t".repeat(5000)),
        ("nul\0byte".to_owned(), String::new()),
    ] {
        let mut builder = tar::Builder::new(Vec::new());
        let pax = [("path", path.as_bytes()), ("linkpath", link.as_bytes())];
        builder.append_pax_extensions(pax.into_iter().filter(|(_, v)| !v.is_empty())).unwrap();
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(if link.is_empty() { File } else { Sym });
        header.set_size(0);
        header.set_mode(0o644);
        header.set_cksum();
        builder.append(&header, &b""[..]).unwrap();
        let place = Place::new();
        let bytes = builder.into_inner().unwrap();
        let error = unpack(&mut TarStream::new(bytes.as_slice()), &place.layer, LIMITS);
        assert!(matches!(error, Err(UnpackError::Archive(_))), "{path:.20}: {error:?}");
    }
}

#[test]
fn attributes_too_large_are_the_archives_fault() {
    let place = Place::new();
    let mut builder = tar::Builder::new(Vec::new());
    builder.append_pax_extensions([("SCHILY.xattr.user.big", &vec![b'v'; 70_000][..])]).unwrap();
    let mut header = tar::Header::new_ustar();
    header.set_size(0);
    builder.append_data(&mut header, "file", &b""[..]).unwrap();
    let bytes = builder.into_inner().unwrap();
    let error = unpack(&mut TarStream::new(bytes.as_slice()), &place.layer, LIMITS).unwrap_err();
    assert!(matches!(error, UnpackError::Archive(_)), "{error:?}");
}

#[test]
fn a_tree_deeper_than_a_path_is_unpacked_and_removed() {
    let place = Place::new();
    // Links shorten the way down, each 40 levels further.
    let down = "d/".repeat(40);
    let mut members = Vec::new();
    for n in 0..20 {
        let above = if n == 0 { String::new() } else { format!("l{}/", n - 1) };
        members.push((Dir, format!("{above}{down}"), String::new()));
        members.push((Sym, format!("l{n}"), format!("{above}{down}")));
    }
    let members: Vec<_> = members.iter().map(|(k, p, l)| (*k, p.as_str(), l.as_str())).collect();
    place.unpack(&members).unwrap();
    crate::snapshot::remove_tree(&place.layer).unwrap();
    assert!(!place.layer.exists());
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(300))]

    /// Whatever an archive says, nothing is touched outside its folder ([`Place::unpack`] looks).
    #[test]
    fn no_archive_reaches_out(members in proptest::collection::vec(
        (
            proptest::sample::select(vec![File, Dir, Sym, Link, Fifo, Char, Block]),
            "(/|\\.\\./)?(a|b|c|\\.\\.|\\.|victim|\\.wh\\.a|\\.wh\\.\\.wh\\.\\.opq|\\.wh\\.victim)(/(a|b|\\.\\.|victim|\\.wh\\.b)){0,3}",
            "(/|\\.\\./\\.\\./|\\.\\./)?(a|b|victim|\\.\\.|proc/self/root)(/(a|b|victim|\\.\\.)){0,2}",
        ),
        1..12,
    )) {
        let members: Vec<_> =
            members.iter().map(|(k, p, l)| (*k, p.as_str(), l.as_str())).collect();
        // Refused by the archive's fault, or contained.
        if let Err(error) = Place::new().unpack(&members) {
            proptest::prop_assert!(matches!(error, UnpackError::Archive(_)), "{error:?}");
        }
    }
}
