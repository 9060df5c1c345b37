//! The unit, the package, cgroup v2 and a reboot, under a real systemd in an emulated machine.
//!
//! The machine under the other suites has no systemd and cgroup v1; this one boots Debian's cloud
//! kernel in `qemu-system-x86_64` with software emulation. `tests/vm/guest.sh` is the part inside.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

/// Emulation is slow; two boots and two restarts take three minutes on a quiet machine.
const LIMIT: Duration = Duration::from_secs(1500);

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the workspace").into()
}

fn must(command: &mut Command) -> Result<()> {
    let output = command.output().with_context(|| format!("cannot run {command:?}"))?;
    ensure!(
        output.status.success(),
        "{command:?} ended with {}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

#[test]
#[ignore = "boots an emulated machine twice, which takes minutes: make test-vm"]
fn unit_package_watchdog_reboot_and_reset() -> Result<()> {
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("vm");
    let tests = workspace().join("tests/vm");
    must(Command::new(tests.join("base.sh")).arg(&cache))?;

    let work = tempfile::tempdir()?;
    let payload = work.path().join("payload");
    std::fs::create_dir_all(payload.join("manifests"))?;
    let binary = tests::harness::longshore_binary()?;
    let dist = work.path().join("dist");
    must(Command::new(workspace().join("systemd/deb/build.sh")).arg(&binary).arg(&dist))?;
    let deb = std::fs::read_dir(&dist)?.next().context("no package was built")??.path();
    std::fs::copy(deb, payload.join("longshore.deb"))?;
    must(Command::new(workspace().join("examples/image.sh")).arg(payload.join("image.tar")))?;
    for manifest in ["web.yaml", "worker.yaml"] {
        std::fs::copy(
            workspace().join("examples").join(manifest),
            payload.join("manifests").join(manifest),
        )?;
    }
    std::fs::copy(tests.join("guest.sh"), payload.join("guest.sh"))?;
    let payload_image = work.path().join("payload.img");
    std::fs::File::create(&payload_image)?.set_len(1 << 30)?;
    must(
        Command::new("mke2fs").args(["-q", "-t", "ext4", "-d"]).arg(&payload).arg(&payload_image),
    )?;
    let disk = work.path().join("disk.qcow2");
    must(
        Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"])
            .arg(cache.join("base.img"))
            .arg(&disk),
    )?;

    let mut machine = Command::new("qemu-system-x86_64")
        .args(["-accel", "tcg,thread=multi", "-smp", "2", "-m", "2048", "-nographic"])
        .args(["-nic", "none"])
        .arg("-kernel")
        .arg(cache.join("vmlinuz"))
        .arg("-initrd")
        .arg(cache.join("initrd.img"))
        .args([
            "-append",
            "root=/dev/vda rw console=ttyS0 quiet systemd.mask=serial-getty@ttyS0.service",
        ])
        .arg("-drive")
        .arg(format!("file={},format=qcow2,if=virtio,cache=unsafe", disk.display()))
        .arg("-drive")
        .arg(format!(
            "file={},format=raw,if=virtio,readonly=on,cache=unsafe",
            payload_image.display()
        ))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start qemu-system-x86_64: install qemu-system-x86")?;
    let console = machine.stdout.take().context("no console")?;
    let (lines, received) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(console).split(b'\n').map_while(Result::ok) {
            if lines.send(String::from_utf8_lossy(&line).trim_end().to_owned()).is_err() {
                break;
            }
        }
    });

    let end = Instant::now() + LIMIT;
    let mut console = Vec::new();
    let mut failed = Vec::new();
    let mut done = false;
    while let Ok(line) = received.recv_timeout(end.saturating_duration_since(Instant::now())) {
        writeln!(std::io::stdout(), "{line}")?;
        if let Some(result) = line.find("RESULT ").map(|at| line[at + 7..].to_owned()) {
            done |= result.starts_with("done ok");
            if result.split(' ').nth(1) == Some("failed") {
                failed.push(result);
            }
        }
        console.push(line);
    }
    // The end of the console is the end of the machine, or the limit.
    let _ = machine.kill();
    machine.wait()?;
    ensure!(failed.is_empty(), "failed in the machine:\n{}", failed.join("\n"));
    ensure!(done, "the machine did not finish; its last words:\n{}", {
        console.split_off(console.len().saturating_sub(40)).join("\n")
    });
    Ok(())
}
