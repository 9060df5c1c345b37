//! The image store against a real registry (Debian's docker-registry on loopback, in a network
//! namespace of the test's own), real archives, and real overlay mounts. Needs root.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test ends where something fails")]

#[path = "images/builders.rs"]
mod builders;
#[path = "images/fixture.rs"]
mod fixture;
#[path = "images/protocol.rs"]
mod protocol;
#[path = "images/server.rs"]
mod server;

use std::time::Duration;
use std::{
    fs,
    os::unix::fs::{MetadataExt, symlink},
    path::Path,
    process::Command,
};

use cri_shim::{
    api::AuthConfig,
    image::{ImageError, ImageStore, ImportSource, StoreConfig},
    snapshot::{self, SnapshotStore},
};
use fixture::{
    Entry, ImageSpec, Layer, Registry, Tls, digest, docker_archive, oci_layout, own_namespaces,
};

fn store(folder: &Path) -> ImageStore {
    let mut config = StoreConfig::new(folder);
    config.registry_dirs = vec![folder.join("certs.d")];
    config.retries = 2;
    ImageStore::open(config).unwrap()
}

fn runtime() -> tokio::runtime::Runtime {
    // Its threads are made after the namespaces are entered.
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// Three layers: a base, one that changes and hides, one that adds.
fn example() -> ImageSpec {
    ImageSpec::new(vec![
        Layer::gzip(&[
            Entry::Dir("etc", 0o755),
            Entry::File("etc/base", b"base"),
            Entry::File("etc/gone", b"gone"),
            Entry::Dir("opt", 0o700),
            Entry::File("opt/old", b"old"),
            Entry::Dir("var", 0o711),
        ]),
        Layer::zstd(&[
            Entry::File("etc/.wh.gone", b""),
            Entry::Dir("opt", 0o700),
            Entry::File("opt/.wh..wh..opq", b""),
            Entry::File("opt/new", b"new"),
        ]),
        Layer::plain(&[Entry::File("var/late", b"late")]),
    ])
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn check_rootfs(state: &Path, store: &ImageStore, name: &str) {
    let snapshots = SnapshotStore::open(state).unwrap();
    let image = store.status(name).unwrap().unwrap();
    let rootfs = snapshots.prepare("c1", &image).unwrap();
    snapshot::mount(&rootfs).unwrap();
    let merged = &rootfs.merged;
    assert!(snapshot::is_mounted(merged));
    assert_eq!(names(&merged.join("etc")), ["base"]);
    assert_eq!(names(&merged.join("opt")), ["new"]);
    assert_eq!(fs::read_to_string(merged.join("var/late")).unwrap(), "late");
    // Not described by the layer that adds to it, so it keeps the mode it has below.
    assert_eq!(fs::metadata(merged.join("var")).unwrap().mode() & 0o777, 0o711);
    fs::write(merged.join("etc/mine"), vec![1; 10_000]).unwrap();
    fs::remove_file(merged.join("etc/base")).unwrap();
    let usage = snapshots.usage("c1").unwrap();
    assert!(usage.bytes >= 10_000 && usage.inodes == 3, "{usage:?}");

    let error = store.remove(name).unwrap_err();
    assert!(matches!(error, ImageError::InUse { .. }), "{error}");
    // A second start finds the snapshot and prepares the same.
    let again = SnapshotStore::open(state).unwrap();
    assert_eq!(again.prepare("c1", &image).unwrap(), rootfs);
    again.remove("c1").unwrap();
    again.remove("c1").unwrap();
    assert!(again.list().unwrap().is_empty());
    store.remove(name).unwrap();
    store.remove(name).unwrap();
    assert!(store.status(name).unwrap().is_none());
    assert!(names(&state.join("images/layers")).is_empty());
    assert!(names(&state.join("images/configs")).is_empty());
    assert!(names(&state.join("images/tmp")).is_empty());
    assert_eq!(store.fs_info().unwrap().used_bytes, 0);
}

#[test]
fn a_pulled_image_becomes_a_root_filesystem_and_goes_again() {
    own_namespaces();
    let registry = Registry::start(None);
    registry.push("app", "v1", &example());
    let folder = tempfile::tempdir().unwrap();
    let store = store(folder.path());
    let name = registry.name("app:v1");
    let id = runtime().block_on(store.pull(&name, None)).unwrap();
    assert_eq!(id.as_str(), example().config_digest());
    let image = store.status(&name).unwrap().unwrap();
    assert_eq!(image.repo_tags, std::slice::from_ref(&name));
    assert_eq!(image.repo_digests.len(), 1);
    assert_eq!(image.layers.len(), 3);
    assert_eq!(store.fs_info().unwrap().used_bytes, image.size);
    check_rootfs(folder.path(), &store, &name);
}

#[test]
fn pulls_by_digest_and_by_platform() {
    own_namespaces();
    let registry = Registry::start(None);
    let other = ImageSpec::new(vec![Layer::plain(&[Entry::File("wrong", b"")])]);
    let digest = registry.push_index("multi", "latest", &example(), &other);
    let folder = tempfile::tempdir().unwrap();
    let store = store(folder.path());
    let by_digest = registry.name(&format!("multi@{digest}"));
    let runtime = runtime();
    let id = runtime.block_on(store.pull(&by_digest, None)).unwrap();
    assert_eq!(id.as_str(), example().config_digest());
    let image = store.status(&by_digest).unwrap().unwrap();
    assert!(image.repo_tags.is_empty());
    assert_eq!(image.repo_digests, std::slice::from_ref(&by_digest));
    // The tag is one more name of the same image.
    runtime.block_on(store.pull(&registry.name("multi"), None)).unwrap();
    assert_eq!(store.list().unwrap().len(), 1);
    assert_eq!(store.status(id.as_str()).unwrap().unwrap().repo_tags.len(), 1);
}

#[test]
fn failures_are_told_apart_and_leave_nothing() {
    own_namespaces();
    let registry = Registry::start(None);
    let folder = tempfile::tempdir().unwrap();
    let store = store(folder.path());
    let runtime = runtime();
    let pull = |name: &str| runtime.block_on(store.pull(name, None)).unwrap_err();

    let error = pull(&registry.name("nothing:here"));
    assert!(matches!(error, ImageError::NotFound { .. }), "{error}");
    let error = pull("127.0.0.1:9/app");
    assert!(matches!(error, ImageError::Network { .. }), "{error}");
    assert!(error.to_string().contains("refused"), "{error}");
    let error = pull("Bad Name");
    assert!(matches!(error, ImageError::InvalidReference { .. }), "{error}");

    let mut lying = example();
    lying.diff_ids[0] = digest(b"something else");
    registry.push("lying", "v1", &lying);
    let error = pull(&registry.name("lying:v1"));
    assert!(matches!(error, ImageError::Corrupt { .. }), "{error}");
    assert!(error.to_string().contains("uncompressed digest"), "{error}");

    registry.push("corrupt", "v1", &example());
    registry.damage(&example().layers[1].blob);
    let error = pull(&registry.name("corrupt:v1"));
    assert!(matches!(error, ImageError::Corrupt { .. }), "{error}");
    assert!(error.to_string().contains(&digest(&example().layers[1].blob)), "{error}");

    assert!(store.list().unwrap().is_empty());
    // Layers beside the broken one stop on their own, a moment later.
    let started = std::time::Instant::now();
    while !names(&folder.path().join("images/tmp")).is_empty() {
        assert!(started.elapsed().as_secs() < 20);
        std::thread::yield_now();
    }
    drop(store);
    // Whole layers stay a while, for the next try; no longer than that.
    let mut config = StoreConfig::new(folder.path());
    config.orphan_life = Duration::ZERO;
    ImageStore::open(config).unwrap();
    assert!(names(&folder.path().join("images/layers")).is_empty());
}

#[test]
fn credentials_are_asked_for_and_used() {
    own_namespaces();
    let registry = Registry::start(Some(("joe", "s3cret")));
    registry.push("private", "v1", &example());
    let folder = tempfile::tempdir().unwrap();
    let store = store(folder.path());
    let name = registry.name("private:v1");
    let runtime = runtime();
    let auth = |password: &str| {
        let (username, password) = ("joe".to_owned(), password.to_owned());
        Some(AuthConfig { username, password, ..Default::default() })
    };
    for auth in [None, auth("wrong")] {
        let error = runtime.block_on(store.pull(&name, auth)).unwrap_err();
        assert!(matches!(error, ImageError::Unauthorized { .. }), "{error}");
        assert!(!error.to_string().contains("wrong"), "{error}");
    }
    runtime.block_on(store.pull(&name, auth("s3cret"))).unwrap();
}

#[test]
fn parallel_pulls_do_the_work_once() {
    own_namespaces();
    let registry = Registry::start(None);
    registry.push("app", "v1", &example());
    registry.push("app", "v2", &example());
    let folder = tempfile::tempdir().unwrap();
    let store = store(folder.path());
    runtime().block_on(async {
        let pulls = (0..8).map(|n| {
            let store = store.clone();
            let name = registry.name(if n % 2 == 0 { "app:v1" } else { "app:v2" });
            tokio::spawn(async move { store.pull(&name, None).await })
        });
        for pull in pulls.collect::<Vec<_>>() {
            pull.await.unwrap().unwrap();
        }
    });
    assert_eq!(store.list().unwrap().len(), 1);
    for layer in &example().layers {
        assert_eq!(registry.downloads(&digest(&layer.blob)), 1);
    }
}

#[test]
fn a_mirror_is_asked_first_and_the_registry_after_it() {
    own_namespaces();
    let registry = Registry::start(None);
    registry.push("library/app", "v1", &example());
    let folder = tempfile::tempdir().unwrap();
    let hosts = folder.path().join("certs.d/example.test:5000");
    fs::create_dir_all(&hosts).unwrap();
    let text = format!(
        "[host.\"http://127.0.0.1:9\"]\n[host.\"http://{}\"]\ncapabilities = [\"pull\", \"resolve\"]\n",
        registry.address
    );
    fs::write(hosts.join("hosts.toml"), text).unwrap();
    let store = store(folder.path());
    let name = "example.test:5000/library/app:v1";
    runtime().block_on(store.pull(name, None)).unwrap();
    assert_eq!(store.status(name).unwrap().unwrap().repo_tags, [name]);
    fs::write(hosts.join("hosts.toml"), "[host.\"https://x\"]\nclient = \"c\"").unwrap();
    let error = runtime().block_on(store.pull(name, None)).unwrap_err();
    assert!(matches!(error, ImageError::Config { .. }), "{error}");
}

#[test]
fn archives_are_imported_beside_a_running_store() {
    own_namespaces();
    let folder = tempfile::tempdir().unwrap();
    let running = store(folder.path());
    assert!(running.list().unwrap().is_empty());
    let importer = ImageStore::open_shared(StoreConfig::new(folder.path())).unwrap();
    let runtime = runtime();
    let archive = folder.path().join("docker.tar");
    fs::write(&archive, docker_archive(&example(), &["app:v1", "quay.io/x/app"])).unwrap();
    let ids = runtime.block_on(importer.import(ImportSource::File(archive.clone()))).unwrap();
    assert_eq!(ids.len(), 1);
    let image = running.status("app:v1").unwrap().unwrap();
    assert_eq!(image.repo_tags, ["docker.io/library/app:v1", "quay.io/x/app:latest"]);
    assert_eq!(image.id, ids[0]);

    // The same image as an OCI layout, compressed and streamed, is only one more name.
    let oci = oci_layout(&example(), "registry.local/team/app:v2");
    let packed = zstd::encode_all(&oci[..], 1).unwrap();
    let source = ImportSource::Reader(Box::new(std::io::Cursor::new(packed)));
    runtime.block_on(importer.import(source)).unwrap();
    let image = running.status("registry.local/team/app:v2").unwrap().unwrap();
    assert_eq!((image.id.as_str(), image.repo_tags.len()), (ids[0].as_str(), 3));
    assert_eq!(image.repo_digests.len(), 1);
    assert_eq!(running.list().unwrap().len(), 1);
    fs::remove_file(archive).unwrap();
    check_rootfs(folder.path(), &running, "app:v1");
}

#[test]
fn damaged_archives_are_refused() {
    own_namespaces();
    let folder = tempfile::tempdir().unwrap();
    let store = store(folder.path());
    let runtime = runtime();
    let import = |bytes: Vec<u8>| {
        let source = ImportSource::Reader(Box::new(std::io::Cursor::new(bytes)));
        runtime.block_on(store.import(source)).unwrap_err()
    };
    let good = docker_archive(&example(), &["app:v1"]);
    let mut cut = good.clone();
    cut.truncate(good.len() / 2);
    let mut flipped = oci_layout(&example(), "a.b/c:v1");
    let layer = &example().layers[2].blob;
    let at = flipped.windows(layer.len()).position(|window| window == layer).unwrap();
    flipped[at + layer.len() - 1024 - 500] ^= 1;
    for (bytes, want) in [
        (cut, "ends in the middle"),
        (flipped, "instead of"),
        (b"not a tar at all".repeat(100), "not a valid tar"),
        (vec![0; 2048], "neither manifest.json"),
        (Vec::new(), "neither manifest.json"),
    ] {
        let error = import(bytes).to_string();
        assert!(error.contains(want), "{want}: {error}");
    }
    assert!(store.list().unwrap().is_empty());
}

#[test]
fn a_crash_leaves_nothing_half_visible() {
    own_namespaces();
    let folder = tempfile::tempdir().unwrap();
    let images = folder.path().join("images");
    {
        let store = store(folder.path());
        let archive = docker_archive(&example(), &["app:v1"]);
        let source = ImportSource::Reader(Box::new(std::io::Cursor::new(archive)));
        runtime().block_on(store.import(source)).unwrap();
    }
    let kept = names(&images.join("layers"));
    fs::create_dir_all(images.join("tmp/work1/0/d/etc")).unwrap();
    fs::create_dir_all(images.join("layers/0123456789abcdef01234567/d")).unwrap();
    fs::write(images.join("configs/.new123"), "{").unwrap();
    symlink("/etc", images.join("tmp/link")).unwrap();
    fs::create_dir_all(folder.path().join("snapshots/half/upper")).unwrap();
    let store = store(folder.path());
    assert!(names(&images.join("tmp")).is_empty());
    assert_eq!(names(&images.join("layers")), kept);
    assert_eq!(names(&images.join("configs")).len(), 1);
    assert!(SnapshotStore::open(folder.path()).unwrap().list().unwrap().is_empty());
    assert!(Path::new("/etc/passwd").exists());

    // An unreadable index is set aside, and the image imported again.
    fs::write(images.join("index.json"), "{\"version\":1,").unwrap();
    assert!(store.list().unwrap().is_empty());
    assert!(images.join("index.json.unreadable").exists());
    let archive = docker_archive(&example(), &["app:v1"]);
    let source = ImportSource::Reader(Box::new(std::io::Cursor::new(archive)));
    runtime().block_on(store.import(source)).unwrap();
    check_rootfs(folder.path(), &store, "app:v1");
}

#[test]
fn many_layers_are_mounted() {
    own_namespaces();
    let folder = tempfile::tempdir().unwrap();
    let store = store(folder.path());
    let layers = (0..200)
        .map(|n| {
            let path: &'static str = format!("f{n}").leak();
            Layer::plain(&[Entry::File(path, b"x")])
        })
        .collect();
    let archive = docker_archive(&ImageSpec::new(layers), &["tall:v1"]);
    let source = ImportSource::Reader(Box::new(std::io::Cursor::new(archive)));
    runtime().block_on(store.import(source)).unwrap();
    let snapshots = SnapshotStore::open(folder.path()).unwrap();
    let rootfs = snapshots.prepare("c", &store.status("tall:v1").unwrap().unwrap()).unwrap();
    snapshot::mount(&rootfs).unwrap();
    assert_eq!(names(&rootfs.merged).len(), 200);
    snapshots.remove("c").unwrap();
}

#[test]
fn skopeo_and_the_registry_agree_with_the_store() {
    own_namespaces();
    let registry = Registry::start(None);
    // Docker's own format knows no zstd.
    let mut image = example();
    image.layers[1].blob = image.layers[1].tar.clone();
    image.layers[1].media_type = image.layers[2].media_type;
    registry.push("app", "v1", &image);
    let folder = tempfile::tempdir().unwrap();
    let store = store(folder.path());
    for (format, file) in [("docker-archive", "d.tar"), ("oci-archive", "o.tar")] {
        let path = folder.path().join(file);
        let target = format!("{format}:{}:{}", path.display(), "quay.io/team/app:v9");
        let copied = Command::new("skopeo")
            .args(["--insecure-policy", "copy", "-q", "--src-tls-verify=false"])
            .arg(format!("docker://{}", registry.name("app:v1")))
            .arg(target)
            .status()
            .unwrap();
        assert!(copied.success());
        runtime().block_on(store.import(ImportSource::File(path))).unwrap();
        check_rootfs(folder.path(), &store, "quay.io/team/app:v9");
    }
}

#[test]
fn tls_registries_are_trusted_by_system_roots_or_their_own_ca() {
    own_namespaces();
    let source = Registry::start(None);
    source.push("app", "v1", &example());
    let registry = source.beside(Some(("joe", "s3cret")), Tls::Server);
    let folder = tempfile::tempdir().unwrap();
    let store = store(folder.path());
    let name = registry.name("app:v1");
    let auth = Some(AuthConfig {
        username: "joe".to_owned(),
        password: "s3cret".to_owned(),
        ..Default::default()
    });
    let pull = |auth| runtime().block_on(store.pull(&name, auth));
    // No certificate of the system vouches for it, and nothing is sent to it in plain.
    let error = pull(auth.clone()).unwrap_err();
    assert!(matches!(error, ImageError::Network { .. }), "{error}");
    assert!(error.to_string().contains("certificate"), "{error}");

    let hosts = folder.path().join("certs.d").join(registry.address.to_string());
    fs::create_dir_all(&hosts).unwrap();
    fs::copy(registry.file("ca.pem"), hosts.join("ca.crt")).unwrap();
    let error = pull(None).unwrap_err();
    assert!(matches!(error, ImageError::Unauthorized { .. }), "{error}");
    pull(auth.clone()).unwrap();
    store.remove(&name).unwrap();

    let url = format!("https://{}", registry.address);
    fs::write(hosts.join("hosts.toml"), format!("server = \"{url}\"\nca = \"no.pem\"")).unwrap();
    let error = pull(auth.clone()).unwrap_err();
    assert!(error.to_string().contains("no.pem"), "{error}");
    fs::write(hosts.join("hosts.toml"), format!("server = \"{url}\"\nskip_verify = true")).unwrap();
    pull(auth).unwrap();
}

#[test]
fn registries_that_want_client_certificates_get_them() {
    own_namespaces();
    let source = Registry::start(None);
    source.push("app", "v1", &example());
    let (registry, other) = (source.beside(None, Tls::Client), source.beside(None, Tls::Client));
    let folder = tempfile::tempdir().unwrap();
    let store = store(folder.path());
    let name = registry.name("app:v1");
    let address = registry.address;
    let hosts = folder.path().join(format!("certs.d/127.0.0.1_{}_", address.port()));
    fs::create_dir_all(&hosts).unwrap();
    let copy = |from: &Registry, name: &str, to: &str| {
        fs::copy(from.file(name), hosts.join(to)).unwrap();
    };
    let pull = |client: &str| {
        let text = format!("[host.\"https://{address}\"]\nca = [\"ca.pem\"]\n{client}\n");
        fs::write(hosts.join("hosts.toml"), text).unwrap();
        let pulled = runtime().block_on(store.pull(&name, None));
        store.remove(&name).unwrap();
        pulled
    };
    copy(&registry, "ca.pem", "ca.pem");
    for file in ["client.pem", "client.key"] {
        copy(&registry, file, file);
        copy(&other, file, &format!("other-{file}"));
    }
    let both =
        ["client.pem", "client.key"].map(|file| fs::read_to_string(hosts.join(file)).unwrap());
    fs::write(hosts.join("both.pem"), both.concat()).unwrap();

    let error = pull("").unwrap_err();
    assert!(matches!(error, ImageError::Network { .. }), "{error}");
    let error = pull("client = [[\"other-client.pem\", \"other-client.key\"]]").unwrap_err();
    assert!(matches!(error, ImageError::Network { .. }), "{error}");
    for good in [
        "\"both.pem\"",
        "[\"both.pem\"]",
        "[[\"client.pem\", \"client.key\"]]",
        // Of several, the one that the registry's CA has issued.
        "[[\"other-client.pem\", \"other-client.key\"], [\"client.pem\", \"client.key\"]]",
    ] {
        pull(&format!("client = {good}")).unwrap_or_else(|error| panic!("{good}: {error}"));
    }
    for (bad, want) in [
        ("\"client.pem\"", "no usable private key"),
        ("[[\"client.pem\", \"other-client.key\"]]", "does not fit"),
        ("\"client.key\"", "no client certificate"),
    ] {
        let error = pull(&format!("client = {bad}")).unwrap_err();
        assert!(matches!(error, ImageError::Config { .. }), "{error}");
        assert!(error.to_string().contains(want), "{bad}: {error}");
        assert!(!error.to_string().contains("BEGIN"), "{error}");
    }
}

#[test]
fn a_machine_without_certificates_says_what_to_install() {
    own_namespaces();
    let registry = Registry::start(None);
    registry.push("app", "v1", &example());
    let secure = registry.beside(None, Tls::Server);
    let folder = tempfile::tempdir().unwrap();
    // An empty folder in place of the system's certificates, in this mount namespace.
    let empty = folder.path().join("empty");
    fs::create_dir(&empty).unwrap();
    for certs in ["/etc/ssl/certs", "/usr/lib/ssl", "/usr/share/ca-certificates"] {
        if Path::new(certs).is_dir() {
            nix::mount::mount(
                Some(&empty),
                certs,
                None::<&str>,
                nix::mount::MsFlags::MS_BIND,
                None::<&str>,
            )
            .unwrap();
        }
    }
    let store = store(folder.path());
    let pull = |name: &str| runtime().block_on(store.pull(name, None));
    let error = pull(&secure.name("app:v1")).unwrap_err();
    assert!(error.to_string().contains("install the package ca-certificates"), "{error}");
    // What needs none of them works.
    pull(&registry.name("app:v1")).unwrap();
    let hosts = folder.path().join("certs.d").join(secure.address.to_string());
    fs::create_dir_all(&hosts).unwrap();
    fs::copy(secure.file("ca.pem"), hosts.join("ca.crt")).unwrap();
    pull(&secure.name("app:v1")).unwrap();
}

#[test]
fn a_broken_download_is_taken_up_where_it_ended() {
    own_namespaces();
    let registry = Registry::start(None);
    // Nothing that compresses.
    let mut state = 1u64;
    let noise: Vec<u8> = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    })
    .take(3_000_000)
    .collect();
    assert!(zstd::encode_all(&noise[..], 1).unwrap().len() > 2_900_000);
    let image = ImageSpec::new(vec![Layer::gzip(&[Entry::File("big", noise.leak())])]);
    registry.push("app", "v1", &image);
    let proxy = fixture::cutting_proxy(registry.address, 1_000_000);
    let folder = tempfile::tempdir().unwrap();
    let store = store(folder.path());
    let name = format!("{proxy}/app:v1");
    let id = runtime().block_on(store.pull(&name, None)).unwrap();
    assert_eq!(id.as_str(), image.config_digest());
}

#[test]
fn a_full_disk_is_said_to_be_full() {
    own_namespaces();
    let folder = tempfile::tempdir().unwrap();
    nix::mount::mount(
        Some("tmpfs"),
        folder.path(),
        Some("tmpfs"),
        nix::mount::MsFlags::empty(),
        Some("size=2m"),
    )
    .unwrap();
    let store = store(folder.path());
    let big = ImageSpec::new(vec![Layer::gzip(&[Entry::File("big", vec![0; 5_000_000].leak())])]);
    let archive = docker_archive(&example(), &["small:v1"]);
    let source = ImportSource::Reader(Box::new(std::io::Cursor::new(archive)));
    runtime().block_on(store.import(source)).unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), docker_archive(&big, &["big:v1"])).unwrap();
    let source = ImportSource::File(file.path().to_owned());
    let error = runtime().block_on(store.import(source)).unwrap_err();
    assert!(matches!(error, ImageError::NoSpace { .. }), "{error}");
    // What was there before is as it was, and the room is free again.
    assert_eq!(store.list().unwrap().len(), 1);
    assert!(names(&folder.path().join("images/tmp")).is_empty());
    check_rootfs(folder.path(), &store, "small:v1");
    nix::mount::umount2(folder.path(), nix::mount::MntFlags::MNT_DETACH).unwrap();
}
