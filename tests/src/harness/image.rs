//! The example image, made from Debian's static busybox and this crate's `workload` program: a
//! docker-archive tar, so that no registry is needed.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use serde_json::json;
use sha2::{Digest as _, Sha256};

use crate::control_plane::pki::hex;

/// Name of the image that examples and tests use.
pub const IMAGE: &str = "longshore.local/demo/busybox:1";

/// Name of the image that holds a pod's namespaces for a runtime that needs a process for that.
pub const PAUSE: &str = "longshore.local/pause:1";

/// Writes the image as a docker-archive tar.
///
/// # Errors
/// When busybox-static is not installed, or the file cannot be written.
pub fn write_archive(
    to: &Path,
    names: &[&str],
    workload: Option<&Path>,
    command: &[&str],
) -> Result<()> {
    let layer = layer(workload)?;
    let diff_id = format!("sha256:{}", hex(&Sha256::digest(&layer)));
    let config = json!({
        "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
        "os": "linux",
        "config": {"Env": ["PATH=/bin", "IMAGE=demo"], "Cmd": command, "WorkingDir": "/"},
        "rootfs": {"type": "layers", "diff_ids": [diff_id]},
        "history": [{"created_by": "longshore example image"}],
        "created": "1970-01-01T00:00:00Z",
    })
    .to_string();
    let config_name = format!("{}.json", hex(&Sha256::digest(&config)));
    let manifest =
        json!([{"Config": config_name, "RepoTags": names, "Layers": ["layer.tar"]}]).to_string();
    let temporary = to.with_extension("partial");
    let file = std::fs::File::create(&temporary)
        .with_context(|| format!("create {}", temporary.display()))?;
    let mut archive = tar::Builder::new(file);
    for (name, bytes) in [
        ("layer.tar", layer.as_slice()),
        (config_name.as_str(), config.as_bytes()),
        ("manifest.json", manifest.as_bytes()),
    ] {
        add(&mut archive, name, bytes, 0o644)?;
    }
    archive.into_inner()?.flush()?;
    std::fs::rename(&temporary, to).with_context(|| format!("rename to {}", to.display()))
}

fn add(archive: &mut tar::Builder<impl Write>, name: &str, bytes: &[u8], mode: u32) -> Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_size(bytes.len() as u64);
    header.set_mode(mode);
    Ok(archive.append_data(&mut header, name, bytes)?)
}

fn special(
    archive: &mut tar::Builder<impl Write>,
    kind: tar::EntryType,
    name: &str,
    target: &str,
    mode: u32,
) -> Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_size(0);
    header.set_mode(mode);
    if kind.is_symlink() {
        archive.append_link(&mut header, name, target)?;
    } else {
        archive.append_data(&mut header, name, std::io::empty())?;
    }
    Ok(())
}

/// Debian's static busybox.
fn busybox() -> Result<PathBuf> {
    for path in ["/bin/busybox", "/usr/bin/busybox"] {
        let bytes = std::fs::read(path).unwrap_or_default();
        if bytes.starts_with(b"\x7fELF") && !contains(&bytes, b"/ld-linux") {
            return Ok(path.into());
        }
    }
    bail!("no static busybox: apt-get install busybox-static")
}

fn contains(bytes: &[u8], needle: &[u8]) -> bool {
    bytes.windows(needle.len()).any(|w| w == needle)
}

fn layer(workload: Option<&Path>) -> Result<Vec<u8>> {
    let busybox = busybox()?;
    let applets = Command::new(&busybox).arg("--list").output().context("list the applets")?;
    let mut archive = tar::Builder::new(Vec::new());
    for (name, mode) in [
        ("bin/", 0o755),
        ("etc/", 0o755),
        ("tmp/", 0o1777),
        ("var/", 0o755),
        ("data/", 0o755),
        ("root/", 0o700),
        ("home/", 0o755),
        ("proc/", 0o755),
        ("sys/", 0o755),
        ("dev/", 0o755),
        ("lib/", 0o755),
        ("lib64/", 0o755),
    ] {
        special(&mut archive, tar::EntryType::Directory, name, "", mode)?;
    }
    add(&mut archive, "bin/busybox", &std::fs::read(&busybox)?, 0o755)?;
    for applet in String::from_utf8_lossy(&applets.stdout).lines().filter(|a| *a != "busybox") {
        special(&mut archive, tar::EntryType::Symlink, &format!("bin/{applet}"), "busybox", 0o777)?;
    }
    add(
        &mut archive,
        "etc/passwd",
        b"root:x:0:0:root:/root:/bin/sh\ndemo:x:1000:1000:demo:/home:/bin/sh\n",
        0o644,
    )?;
    add(&mut archive, "etc/group", b"root:x:0:\ndemo:x:1000:\nextra:x:2000:demo\n", 0o644)?;
    if let Some(workload) = workload {
        add(&mut archive, "bin/workload", &std::fs::read(workload)?, 0o755)?;
        for library in libraries(workload)? {
            let name = library.trim_start_matches('/').to_owned();
            add(&mut archive, &name, &std::fs::read(&library)?, 0o755)?;
        }
    }
    Ok(archive.into_inner()?)
}

/// The shared libraries that the loader would load for `program`.
fn libraries(program: &Path) -> Result<BTreeSet<String>> {
    let output = Command::new("ldd").arg(program).output().context("run ldd")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(text.split_whitespace().filter(|word| word.starts_with('/')).map(str::to_owned).collect())
}
