//! Images as Debian's builders make them: pulled in both formats, imported as both archives, plain
//! and compressed.

use std::{fs, path::Path, process::Command};

use cri_shim::{
    image::{ImageStore, ImportSource},
    snapshot::{self, SnapshotStore},
};

use super::{
    fixture::{Registry, own_namespaces},
    runtime, store,
};

fn run(folder: &Path, line: &str) {
    let output = Command::new("sh")
        .args(["-ec", line])
        .current_dir(folder)
        .env("STORAGE_DRIVER", "vfs")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{line}: {said}");
}

/// The image at `source`, which skopeo reads, by every way into the store. It has `/etc/motd` with
/// "second" in it, and no `/etc/gone`.
fn check(folder: &Path, registry: &Registry, source: &str) {
    let state = tempfile::tempdir().unwrap();
    let store = store(state.path());
    let copy = |options: &str, target: &str| {
        let options = format!("--insecure-policy copy -q --dest-tls-verify=false {options}");
        run(folder, &format!("skopeo {options} {source} {target}"));
    };
    for format in ["oci", "v2s2"] {
        let name = registry.name(&format!("built:{format}"));
        copy(&format!("--format {format}"), &format!("docker://{name}"));
        runtime().block_on(store.pull(&name, None)).unwrap();
        look(state.path(), &store, &name);
    }
    let name = "quay.io/team/app:v3";
    for kind in ["docker-archive", "oci-archive"] {
        let _ = fs::remove_file(folder.join("a.tar"));
        copy("", &format!("{kind}:a.tar:{name}"));
        run(folder, "gzip -kf a.tar && zstd -qkf a.tar || :");
        for file in ["a.tar", "a.tar.gz", "a.tar.zst"] {
            let path = folder.join(file);
            // Debian does not install zstd by itself.
            if !path.exists() {
                continue;
            }
            runtime().block_on(store.import(ImportSource::File(path))).unwrap();
            look(state.path(), &store, name);
        }
    }
}

/// Mounts the image, and removes it.
fn look(state: &Path, store: &ImageStore, name: &str) {
    let image = store.status(name).unwrap().unwrap_or_else(|| panic!("no {name}"));
    let snapshots = SnapshotStore::open(state).unwrap();
    let rootfs = snapshots.prepare("c", &image).unwrap();
    snapshot::mount(&rootfs).unwrap();
    assert_eq!(fs::read_to_string(rootfs.merged.join("etc/motd")).unwrap(), "second\n");
    assert!(!rootfs.merged.join("etc/gone").exists());
    snapshots.remove("c").unwrap();
    store.remove(name).unwrap();
}

#[test]
fn of_umoci() {
    own_namespaces();
    let registry = Registry::start(None);
    let folder = tempfile::tempdir().unwrap();
    run(
        folder.path(),
        "mkdir one two; echo first > one/motd; echo x > one/gone; echo second > two/motd
         umoci init --layout layout; umoci new --image layout:v3
         umoci insert --image layout:v3 one /etc
         umoci insert --image layout:v3 two/motd /etc/motd
         umoci insert --image layout:v3 --whiteout /etc/gone",
    );
    check(folder.path(), &registry, "oci:layout:v3");
}

#[test]
fn of_buildah() {
    own_namespaces();
    let registry = Registry::start(None);
    // Its storage must not be on an overlay.
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    run(
        folder.path(),
        r#"export HOME=$PWD
           b() { buildah --root $PWD/root --runroot $PWD/run "$@"; }
           echo first > motd; echo x > gone
           c=$(b from scratch); b copy -q $c motd /etc/motd; b copy -q $c gone /etc/gone
           b config --cmd /bin/app --user 1000:1000 $c
           b commit -q $c base; b rm $c
           c=$(b from localhost/base); m=$(b mount $c)
           rm $m/etc/gone; echo second > $m/etc/motd; b umount $c
           b commit -q --format docker $c oci-archive:built.tar:v3"#,
    );
    check(folder.path(), &registry, "oci-archive:built.tar:v3");
}
