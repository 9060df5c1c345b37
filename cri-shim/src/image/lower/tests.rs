use std::{fs, os::unix::fs::MetadataExt};

use tar::EntryType::{Directory as Dir, Link, Regular as File, Symlink as Sym};

use super::{super::unpack::tests::Place, *};

fn text(place: &Place, path: &str) -> String {
    fs::read_to_string(place.layer.join(path)).unwrap()
}

/// The names in a layer's folder.
fn list(place: &Place, path: &str) -> Vec<String> {
    let entries = fs::read_dir(place.layer.join(path)).unwrap();
    let mut names: Vec<_> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn implied_folders_inherit_from_the_nearest_layer() {
    let (bottom, lower, upper) = (Place::new(), Place::new(), Place::new());
    bottom.unpack_over(&[(Dir, "var", ""), (Dir, "var/mail", "")], &[]).unwrap();
    lower.unpack_over(&[(File, "etc/x", "")], &[&bottom]).unwrap();
    upper.unpack_over(&[(File, "var/mail/me", "x")], &[&lower, &bottom]).unwrap();
    let mail = upper.meta("var/mail");
    assert_eq!((mail.mode() & 0o777, mail.uid(), mail.mtime()), (0o750, 1000, 1_000_000));
}

#[test]
fn an_implied_folder_that_a_later_member_replaced_is_nothing_to_complete() {
    let (lower, upper) = (Place::new(), Place::new());
    lower.unpack_over(&[(Dir, "a", "")], &[]).unwrap();
    upper.unpack_over(&[(File, "a/b", "x"), (File, "a", "file")], &[&lower]).unwrap();
    assert_eq!(text(&upper, "a"), "file");
}

#[test]
fn hard_links_reach_files_of_lower_layers() {
    let (bottom, lower, upper) = (Place::new(), Place::new(), Place::new());
    bottom.unpack_over(&[(Dir, "opt", ""), (File, "opt/tool", "tool")], &[]).unwrap();
    lower
        .unpack_over(&[(Sym, "alias", "opt"), (File, "gone", "x"), (File, "old", "y")], &[&bottom])
        .unwrap();
    let members = [
        (Link, "usr/first", "opt/tool"),
        (Link, "second", "usr/first"),
        // By a link of a layer in between.
        (Link, "third", "alias/tool"),
        // In place of something below, and something that a later member replaces.
        (Link, "old", "opt/tool"),
        (Link, "fourth", "opt/tool"),
        (File, "fourth", "own"),
        (Link, "fifth", "fourth"),
    ];
    upper.unpack_over(&members, &[&lower, &bottom]).unwrap();
    for path in ["usr/first", "second", "third", "old", "opt/tool"] {
        let meta = upper.meta(path);
        assert!(meta.is_file(), "{path}");
        assert_eq!((meta.nlink(), meta.uid(), meta.mode() & 0o777), (5, 1000, 0o640), "{path}");
        assert_eq!(text(&upper, path), "tool");
    }
    assert_eq!((text(&upper, "fourth"), text(&upper, "fifth")), ("own".into(), "own".into()));
    assert_eq!(upper.meta("opt").mode() & 0o777, 0o750);
    // What a layer hides is not there to be linked, nor is what no layer has.
    for (hide, target) in [(".wh.gone", "gone"), (".wh.other", "nothing"), (".wh.x", "opt")] {
        let upper = Place::new();
        let members = [(File, hide, ""), (Link, "link", target)];
        let error = upper.unpack_over(&members, &[&lower, &bottom]).unwrap_err();
        assert!(matches!(error, UnpackError::Archive(_)), "{target}: {error}");
        assert!(error.to_string().contains("hard link"), "{error}");
    }
}

#[test]
fn an_implied_folder_is_where_a_lower_link_leads() {
    let (lower, upper) = (Place::new(), Place::new());
    let merged_usr = [
        (Dir, "usr", ""),
        (Dir, "usr/lib", ""),
        (Dir, "usr/lib/x", ""),
        (Sym, "lib", "usr/lib"),
        (Sym, "lib64", "/lib"),
        (Sym, "dangling", "nowhere"),
        (Sym, "out", "../../.."),
    ];
    lower.unpack_over(&merged_usr, &[]).unwrap();
    let members = [
        (File, "lib/a", "a"),
        (File, "lib/x/deep/b", "b"),
        (File, "lib64/c", "c"),
        (File, "lib/.wh.gone", ""),
        (Link, "lib/link", "lib/a"),
        (File, "usr/lib/own", "own"),
        (File, "dangling/d", "d"),
        (File, "out/victim", "evil"),
    ];
    upper.unpack_over(&members, &[&lower]).unwrap();
    assert_eq!(list(&upper, ""), ["dangling", "usr", "victim"]);
    assert_eq!(list(&upper, "usr/lib"), ["a", "c", "gone", "link", "own", "x"]);
    assert_eq!(text(&upper, "usr/lib/x/deep/b"), "b");
    assert_eq!(upper.meta("usr/lib/link").nlink(), 2);
    for path in ["usr", "usr/lib", "usr/lib/x"] {
        assert_eq!(
            (upper.meta(path).mode() & 0o777, upper.meta(path).uid()),
            (0o750, 1000),
            "{path}"
        );
    }
}

#[test]
fn a_folder_that_the_layer_describes_replaces_a_lower_link() {
    let (lower, upper) = (Place::new(), Place::new());
    lower.unpack_over(&[(Dir, "usr", ""), (Sym, "lib", "usr")], &[]).unwrap();
    upper.unpack_over(&[(Dir, "lib", ""), (File, "lib/a", "a")], &[&lower]).unwrap();
    assert_eq!(list(&upper, ""), ["lib"]);
}
