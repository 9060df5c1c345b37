use super::*;

use proptest::prelude::*;

fn written(chunks: &[&[u8]]) -> Vec<u8> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("pod/c.log");
    let mut log = Log::open(Some(path.clone()), None).unwrap();
    let mut lines = Lines::default();
    for chunk in chunks {
        lines.push(&mut log, Source::Stdout, "T", chunk);
    }
    lines.finish(&mut log, Source::Stdout, "T");
    fs::read(path).unwrap()
}

fn text(chunks: &[&[u8]]) -> String {
    String::from_utf8(written(chunks)).unwrap()
}

/// What a reader of the log makes of it: pieces joined to lines.
fn joined(log: &[u8]) -> Vec<u8> {
    let mut output = Vec::new();
    for entry in log.split_inclusive(|b| *b == b'\n') {
        let entry = entry.strip_suffix(b"\n").expect("an entry is torn");
        let text = entry.strip_prefix(b"T stdout ").expect("an entry without its head");
        let (tag, text) = text.split_at(2);
        assert!(text.len() <= MAX_PIECE, "an entry of {}", text.len());
        output.extend_from_slice(text);
        match tag {
            b"F " => output.push(b'\n'),
            b"P " => {}
            _ => panic!("no tag"),
        }
    }
    output
}

#[test]
fn lines_are_whole_however_they_come() {
    assert_eq!(text(&[b"a\nb", b"c\n\n"]), "T stdout F a\nT stdout F bc\nT stdout F \n");
    assert_eq!(text(&[b"no end"]), "T stdout P no end\n");
    assert_eq!(text(&[]), "");
}

#[test]
fn a_carriage_return_goes_with_the_newline_only() {
    assert_eq!(
        text(&[b"a\r\n", b"b\r", b"\nc\rd\n"]),
        "T stdout F a\nT stdout F b\nT stdout F c\rd\n"
    );
    assert_eq!(text(&[b"\r\n\r", b"\r\n"]), "T stdout F \nT stdout F \r\n");
    assert_eq!(text(&[b"end\r"]), "T stdout P end\r\n");
}

#[test]
fn a_long_line_is_written_in_pieces_and_ends_with_f() {
    let tags = |line: &[u8]| -> Vec<(char, usize)> {
        let log = text(&[line]);
        log.split_terminator('\n').map(|l| (char::from(l.as_bytes()[9]), l.len() - 11)).collect()
    };
    let line = |length: usize, end: &str| [vec![b'x'; length], end.into()].concat();
    assert_eq!(
        tags(&line(MAX_PIECE * 2 + 5, "\n")),
        [('P', MAX_PIECE), ('P', MAX_PIECE), ('F', 5)]
    );
    for end in ["\n", "\r\n"] {
        assert_eq!(tags(&line(MAX_PIECE, end)), [('F', MAX_PIECE)]);
        assert_eq!(tags(&line(MAX_PIECE * 2, end)), [('P', MAX_PIECE), ('F', MAX_PIECE)]);
    }
    assert_eq!(tags(&line(MAX_PIECE, "")), [('P', MAX_PIECE)]);
    assert_eq!(tags(&line(MAX_PIECE, "\r")), [('P', MAX_PIECE), ('P', 1)]);
}

#[test]
fn a_reopened_log_goes_on_in_the_new_file() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("c.log");
    let mut log = Log::open(Some(path.clone()), None).unwrap();
    let mut lines = Lines::default();
    lines.push(&mut log, Source::Stderr, "T", b"one\n");
    fs::rename(&path, directory.path().join("c.log.1")).unwrap();
    lines.push(&mut log, Source::Stderr, "T", b"still\n");
    log.reopen().unwrap();
    lines.push(&mut log, Source::Stderr, "T", b"two\n");
    let old = fs::read_to_string(directory.path().join("c.log.1")).unwrap();
    assert_eq!(old, "T stderr F one\nT stderr F still\n");
    assert_eq!(fs::read_to_string(&path).unwrap(), "T stderr F two\n");
}

#[test]
fn a_removed_log_is_made_again_but_not_its_folder() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("pod/c.log");
    let mut log = Log::open(Some(path.clone()), None).unwrap();
    let mut lines = Lines::default();
    lines.push(&mut log, Source::Stdout, "T", b"one\n");
    fs::remove_file(&path).unwrap();
    lines.push(&mut log, Source::Stdout, "T", b"two\n");
    assert_eq!(fs::read_to_string(&path).unwrap(), "T stdout F two\n");
    fs::remove_dir_all(path.parent().unwrap()).unwrap();
    lines.push(&mut log, Source::Stdout, "T", b"three\n");
    assert!(!path.parent().unwrap().exists());
}

#[test]
fn an_entry_cut_off_by_a_crash_is_ended_before_the_next() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("c.log");
    fs::write(&path, "T stdout F whole\nT stdout F to").unwrap();
    let mut log = Log::open(Some(path.clone()), None).unwrap();
    Lines::default().push(&mut log, Source::Stdout, "T", b"next\n");
    let text = fs::read_to_string(&path).unwrap();
    assert_eq!(text, "T stdout F whole\nT stdout F to\nT stdout F next\n");
}

/// On a file system of one page of its own.
#[test]
fn a_full_disk_loses_entries_and_tears_none() {
    use nix::mount::{MsFlags, mount};
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
    let private = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let kind = Some("tmpfs");
    mount(kind, directory.path(), kind, MsFlags::empty(), Some("size=16k")).unwrap();
    let path = directory.path().join("c.log");
    let mut log = Log::open(Some(path.clone()), None).unwrap();
    let mut lines = Lines::default();
    let line = [vec![b'x'; 700], b"\n".to_vec()].concat();
    lines.push(&mut log, Source::Stdout, "T", &line.repeat(40));
    let full = fs::read(&path).unwrap();
    assert!(full.len() > 8 << 10 && full.len() < 40 * line.len(), "{}", full.len());
    assert_eq!(joined(&full).len() % line.len(), 0);
    // Once there is room again it goes on.
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(0).unwrap();
    lines.push(&mut log, Source::Stdout, "T", b"again\n");
    assert_eq!(fs::read_to_string(&path).unwrap(), "T stdout F again\n");
    drop(log);
    nix::mount::umount(directory.path()).unwrap();
}

/// All files of a rotated log, oldest first.
fn files(directory: &Path) -> Vec<(String, Vec<u8>)> {
    let mut rotated: Vec<_> = fs::read_dir(directory)
        .unwrap()
        .flatten()
        .map(|e| (e.file_name().into_string().unwrap(), fs::read(e.path()).unwrap()))
        .collect();
    // `c.log` is the youngest and sorts first.
    rotated.sort();
    rotated.rotate_left(1);
    rotated
}

#[test]
fn the_size_limit_is_exact_and_the_oldest_go() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("c.log");
    let rotation = LogRotation { max_size: 95, max_files: 3 };
    let mut log = Log::open(Some(path), Some(rotation)).unwrap();
    let mut lines = Lines::default();
    // An entry has 19 bytes: five fill a file to the byte.
    let output: Vec<u8> = (0..23).flat_map(|n| format!("line{n:03}\n").into_bytes()).collect();
    lines.push(&mut log, Source::Stdout, "T", &output);
    let files = files(directory.path());
    let lengths: Vec<usize> = files.iter().map(|(_, bytes)| bytes.len()).collect();
    assert_eq!(lengths, [95, 95, 57]);
    let all: Vec<u8> = files.into_iter().flat_map(|(_, bytes)| bytes).collect();
    assert_eq!(joined(&all), output[output.len() - 13 * 8..]);
    // One that is longer than the limit has a file of its own.
    lines.push(&mut log, Source::Stdout, "T", &[b'x'; 300]);
    lines.push(&mut log, Source::Stdout, "T", b"\n");
    assert_eq!(super::tests::files(directory.path()).last().unwrap().1.len(), 312);
}

proptest! {
    /// Whatever comes, in whatever pieces, is in the log: each file whole entries within the
    /// limit, and all of them together the output.
    #[test]
    fn nothing_is_lost_torn_or_too_long(
        parts in prop::collection::vec(
            prop_oneof![
                prop::collection::vec(prop_oneof![Just(b'\n'), any::<u8>()], 0..40),
                (0usize..40_000, any::<u8>()).prop_map(|(length, byte)| vec![byte; length]),
            ],
            1..12,
        ),
        max_size in 20_000u64..60_000,
    ) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("c.log");
        let rotation = LogRotation { max_size, max_files: 1000 };
        let mut log = Log::open(Some(path), Some(rotation)).unwrap();
        let mut lines = Lines::default();
        for part in &parts {
            lines.push(&mut log, Source::Stdout, "T", part);
        }
        lines.finish(&mut log, Source::Stdout, "T");
        let mut all = Vec::new();
        for (_, bytes) in files(directory.path()) {
            prop_assert!(bytes.len() as u64 <= max_size);
            prop_assert!(bytes.is_empty() || bytes.ends_with(b"\n"));
            all.extend(bytes);
        }
        let mut expected: Vec<u8> = Vec::new();
        for byte in parts.concat() {
            if byte == b'\n' && expected.last() == Some(&b'\r') {
                expected.pop();
            }
            expected.push(byte);
        }
        prop_assert_eq!(joined(&all), expected);
    }
}
