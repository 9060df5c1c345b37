//! What the fuzz targets in `cri-shim/fuzz` call. Each looks at what must hold for any input.

use std::{fs, path::Path};

use super::{
    ImageReference,
    blob::{Expected, unpack_blob},
    lower, manifest, pull, registry,
    tar_stream::TarStream,
    unpack::{Limits, UnpackError, unpack},
};

const LIMITS: Limits = Limits { bytes: 1 << 20, entries: 200 };

/// Runs `work` on a folder, and sees that nothing beside it changed.
fn contained(work: impl FnOnce(&Path) -> Result<(), UnpackError>) {
    let outer = tempfile::tempdir_in("/dev/shm").expect("make a folder");
    let layer = outer.path().join("a/d");
    fs::create_dir_all(&layer).expect("make the layer's folder");
    fs::write(outer.path().join("victim"), "untouched").expect("write");
    match work(&layer) {
        Ok(()) | Err(UnpackError::Archive(_) | UnpackError::Source(_)) => {}
        Err(error) => panic!("not the archive's fault: {error}"),
    }
    let count = |path: &Path| fs::read_dir(path).expect("read").count();
    assert_eq!((count(outer.path()), count(&outer.path().join("a"))), (2, 1));
    let victim = fs::read_to_string(outer.path().join("victim")).expect("read");
    assert_eq!(victim, "untouched");
    crate::snapshot::remove_tree(&layer).expect("remove");
}

/// The unpacker: `data` as a tar, with its checksums put right, which no fuzzer guesses.
pub fn unpack_tar(data: &[u8]) {
    let mut data = data.to_vec();
    for block in data.chunks_exact_mut(512) {
        // Blocks that could be headers: of the tar kinds, or begun like one.
        if block[257..262] == *b"ustar" {
            block[148..156].fill(b' ');
            let sum: u32 = block.iter().map(|b| u32::from(*b)).sum();
            block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        }
    }
    contained(|layer| {
        let unpacked = unpack(&mut TarStream::new(data.as_slice()), layer, LIMITS)?;
        lower::complete(layer.parent().expect("the work folder"), &unpacked, &[])
    });
}

/// A layer as it comes: compressed or not, with digests that do not matter here.
pub fn blob(data: &[u8]) {
    let expected = Expected { blob: None, diff_id: String::new() };
    contained(|layer| unpack_blob(data, &expected, layer, LIMITS).map(|_| ()));
}

/// Manifests, indexes and configs.
pub fn documents(data: &[u8]) {
    if let Ok(manifest::Document::Index(entries)) = manifest::parse("x", data) {
        let _ = manifest::choose(&entries, &manifest::this_machine());
    }
    let _ = pull::parse_config(&"x", data);
}

/// References: what is understood is written back as something that means the same.
pub fn reference(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(reference) = ImageReference::parse(text) else { return };
    let again = ImageReference::parse(&reference.to_string());
    assert_eq!(again.expect("its own form"), reference);
    assert!(!reference.repository().split('/').any(|part| matches!(part, "" | "." | "..")));
}

/// `hosts.toml`, and what registries say they want.
pub fn hosts(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    registry::fuzz(text);
}
