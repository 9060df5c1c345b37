//! Dying at every step of importing, retagging and removing: whatever is there afterwards is whole,
//! and the same again comes to the same end.

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::process::ExitStatusExt,
    path::Path,
    process::Command,
    sync::{
        LazyLock,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use super::super::{ImageStore, ImportSource, StoreConfig, blob::digest_of};

const DIE_AT: &str = "LONGSHORE_TEST_DIE_AT";
const DO: &str = "LONGSHORE_TEST_DO";

/// Ends this process, without a word to anybody, at the step that the test wants.
pub(super) fn die_here(_: &str) {
    static AT: LazyLock<Option<usize>> = LazyLock::new(|| std::env::var(DIE_AT).ok()?.parse().ok());
    static DONE: AtomicUsize = AtomicUsize::new(0);
    if AT.is_some_and(|at| at == DONE.fetch_add(1, Ordering::SeqCst)) {
        std::process::abort();
    }
}

fn tar(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (path, data) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(data.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, path, *data).unwrap();
    }
    builder.into_inner().unwrap()
}

/// Two layers: one that stands alone, one that depends on it.
fn archive(tag: &str) -> Vec<u8> {
    let layers = [tar(&[("base", b"base")]), tar(&[("deep/in/top", tag.as_bytes())])];
    let diff_ids = layers.each_ref().map(|layer| digest_of(layer));
    let config = serde_json::json!({"architecture": "amd64", "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": diff_ids}})
    .to_string();
    let manifest = serde_json::json!([{"Config": "c.json", "RepoTags": ["app:v1"],
        "Layers": ["0.tar", "1.tar"]}])
    .to_string();
    tar(&[
        ("manifest.json", manifest.as_bytes()),
        ("c.json", config.as_bytes()),
        ("0.tar", &layers[0]),
        ("1.tar", &layers[1]),
    ])
}

fn open(folder: &Path) -> ImageStore {
    ImageStore::open(StoreConfig::new(folder)).unwrap()
}

fn run(folder: &Path, what: &str) {
    let store = open(folder);
    match what.split_once(' ') {
        Some(("import", tag)) => {
            let source = ImportSource::Reader(Box::new(io::Cursor::new(archive(tag))));
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            runtime.block_on(store.import(source)).unwrap();
        }
        _ => store.remove("app:v1").unwrap(),
    }
}

/// The other half of the test, in a process of its own.
#[test]
#[ignore = "run by dying_at_any_step_leaves_nothing_half_visible"]
fn child() {
    let what = std::env::var(DO).unwrap();
    let (folder, what) = what.split_once(' ').unwrap();
    run(Path::new(folder), what);
}

/// Whether it came to its end.
fn run_and_die(folder: &Path, what: &str, at: usize) -> bool {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "image::steps::tests::child", "--ignored"])
        .env(DO, format!("{} {what}", folder.display()))
        .env(DIE_AT, at.to_string())
        .output()
        .unwrap();
    let died = output.status.signal() == Some(libc::SIGABRT);
    assert!(died || output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    !died
}

/// What each image reads as: its names, and the content of its topmost layer.
fn seen(folder: &Path) -> BTreeMap<String, String> {
    let store = open(folder);
    let images = folder.join("images");
    assert_eq!(fs::read_dir(images.join("tmp")).unwrap().count(), 0);
    for entry in fs::read_dir(images.join("layers")).unwrap() {
        assert!(entry.unwrap().path().join("layer.json").exists(), "a half layer is in place");
    }
    let list = store.list().unwrap();
    assert_eq!(fs::read_dir(images.join("configs")).unwrap().count(), list.len());
    list.iter()
        .map(|image| {
            let files = |at: usize| store.shared.layout.layer_files(&image.layers[at]);
            assert_eq!(fs::read_to_string(files(0).join("base")).unwrap(), "base");
            let top = fs::read_to_string(files(1).join("deep/in/top")).unwrap();
            (top, image.repo_tags.join(","))
        })
        .collect()
}

#[test]
fn dying_at_any_step_leaves_nothing_half_visible() {
    let tag = "docker.io/library/app:v1".to_owned();
    let one = || BTreeMap::from([("one".to_owned(), tag.clone())]);
    let both =
        || BTreeMap::from([("one".to_owned(), String::new()), ("two".to_owned(), tag.clone())]);
    let only_old = || BTreeMap::from([("one".to_owned(), String::new())]);
    for (prepare, what, before, after) in [
        (&[][..], "import one", BTreeMap::new(), one()),
        (&["import one"], "import two", one(), both()),
        (&["import one", "import two"], "remove", both(), only_old()),
        (&["import one"], "remove", one(), BTreeMap::new()),
    ] {
        let mut at = 0;
        loop {
            let folder = tempfile::tempdir().unwrap();
            for step in prepare {
                run(folder.path(), step);
            }
            let finished = run_and_die(folder.path(), what, at);
            let now = seen(folder.path());
            assert!(now == after || !finished && now == before, "{what} at {at}: {now:?}");
            run(folder.path(), what);
            assert_eq!(seen(folder.path()), after, "{what} again after {at}");
            // Nothing is left of what was removed, once nobody can be coming back for it.
            let mut config = StoreConfig::new(folder.path());
            config.orphan_life = Duration::ZERO;
            let store = ImageStore::open(config).unwrap();
            let wanted = after.len() + usize::from(!after.is_empty());
            let layers = fs::read_dir(folder.path().join("images/layers")).unwrap().count();
            assert_eq!(layers, wanted, "{what} at {at}");
            drop(store);
            if finished {
                break;
            }
            at += 1;
        }
        assert!(at > 4, "{what} has only {at} steps");
    }
}
