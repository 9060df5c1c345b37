//! The unit, the package, cgroup v2 and a reboot, under a real systemd in an emulated machine.
//!
//! The machine under the other suites has no systemd and cgroup v1; this one boots Debian's cloud
//! kernel in `qemu-system-x86_64` with software emulation. `tests/vm/guest.sh` is the part inside.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

/// How long the machine may say nothing. Emulation is slow (two boots and all between take four
/// minutes on a quiet machine, many more on a busy one), but what goes on is said every few seconds.
const SILENCE: Duration = Duration::from_secs(600);
/// Of the console, when the machine did not finish.
const LAST_WORDS: usize = 80;

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

/// What the machine finds under /opt: the package, an image, manifests, its part of the test.
fn payload(work: &Path) -> Result<PathBuf> {
    let tests = workspace().join("tests/vm");
    let payload = work.join("payload");
    for folder in ["late", "selinux", "graceful"] {
        std::fs::create_dir_all(payload.join("manifests").join(folder))?;
    }
    // A debug build is ten times as large with its symbols, and packing is quick where it need not
    // be small.
    let strip = |from: &Path, to: &Path| must(Command::new("strip").arg("-o").arg(to).arg(from));
    let binary = work.join("longshore");
    strip(&tests::harness::longshore_binary()?, &binary)?;
    strip(
        Path::new(env!("CARGO_BIN_EXE_test-control-plane")),
        &payload.join("test-control-plane"),
    )?;
    let dist = work.join("dist");
    must(
        Command::new(workspace().join("systemd/deb/build.sh"))
            .args([&binary, &dist])
            .env("DPKG_DEB_COMPRESSOR_TYPE", "gzip")
            .env("DPKG_DEB_COMPRESSOR_LEVEL", "1"),
    )?;
    let deb = std::fs::read_dir(&dist)?.next().context("no package was built")??.path();
    std::fs::copy(deb, payload.join("longshore.deb"))?;
    must(Command::new(workspace().join("examples/image.sh")).arg(payload.join("image.tar")))?;
    for (from, name, to) in [
        (workspace().join("examples"), "web.yaml", "manifests"),
        (workspace().join("examples"), "worker.yaml", "manifests"),
        (tests.join("manifests"), "hungry.yaml", "manifests"),
        (tests.join("manifests"), "curious.yaml", "manifests"),
        (tests.join("manifests"), "stranger.yaml", "manifests"),
        (tests.join("manifests"), "late.yaml", "manifests/late"),
        (tests.join("manifests"), "apparmor.yaml", "manifests/late"),
        (tests.join("manifests"), "selinux.yaml", "manifests/selinux"),
        (tests.join("manifests"), "graceful.yaml", "manifests/graceful"),
        (tests, "guest.sh", "."),
    ] {
        std::fs::copy(from.join(name), payload.join(to).join(name))?;
    }
    let image = work.join("payload.img");
    std::fs::File::create(&image)?.set_len(1 << 30)?;
    must(Command::new("mke2fs").args(["-q", "-t", "ext4", "-d"]).args([&payload, &image]))?;
    Ok(image)
}

/// An emulated machine, ended with the test.
struct Machine(Child);

impl Machine {
    /// `more` is of the kernel's command line.
    fn boot(base: &Path, work: &Path, payload: &Path, more: &str) -> Result<Machine> {
        let disk = work.join("disk.qcow2");
        let create = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b"];
        must(Command::new("qemu-img").args(create).arg(base.join("base.img")).arg(&disk))?;
        let drive = |file: &Path, options: &str| {
            format!("file={},{options},if=virtio,cache=unsafe", file.display())
        };
        // A getty on the console would hang it up for the test's output.
        let kernel = format!(
            "root=/dev/vda rw console=ttyS0 quiet systemd.mask=serial-getty@ttyS0.service {more}"
        );
        let child = Command::new("qemu-system-x86_64")
            .args(["-accel", "tcg,thread=multi", "-smp", "2", "-m", "2048", "-nographic"])
            .args(["-nic", "none", "-append", &kernel])
            .arg("-kernel")
            .arg(base.join("vmlinuz"))
            .arg("-initrd")
            .arg(base.join("initrd.img"))
            .args(["-drive", &drive(&disk, "format=qcow2")])
            .args(["-drive", &drive(payload, "format=raw,readonly=on")])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start qemu-system-x86_64: install qemu-system-x86")?;
        Ok(Machine(child))
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn lines_of(console: ChildStdout) -> Receiver<String> {
    let (lines, received) = channel();
    std::thread::spawn(move || {
        for line in BufReader::new(console).split(b'\n').map_while(Result::ok) {
            if lines.send(String::from_utf8_lossy(&line).trim_end().to_owned()).is_err() {
                break;
            }
        }
    });
    received
}

/// Boots a machine and reads its results to its end.
fn run(more: &str) -> Result<()> {
    let base = Path::new(env!("CARGO_TARGET_TMPDIR")).join("vm");
    must(Command::new(workspace().join("tests/vm/base.sh")).arg(&base))?;
    let work = tempfile::tempdir()?;
    let payload = payload(work.path())?;
    let start = Instant::now();
    let mut machine = Machine::boot(&base, work.path(), &payload, more)?;
    let received = lines_of(machine.0.stdout.take().context("no console")?);

    let mut console = Vec::new();
    let mut failed = Vec::new();
    let mut done = false;
    // The end of the console is the end of the machine; so is its silence.
    while let Ok(line) = received.recv_timeout(SILENCE) {
        writeln!(std::io::stdout(), "{:5.1} {line}", start.elapsed().as_secs_f64())?;
        if let Some(result) = line.find("RESULT ").map(|at| line[at + 7..].to_owned()) {
            done |= result.starts_with("done ok");
            if result.split(' ').nth(1) == Some("failed") {
                failed.push(result);
            }
        }
        console.push(line);
    }
    drop(machine);
    ensure!(failed.is_empty(), "failed in the machine:\n{}", failed.join("\n"));
    ensure!(done, "the machine did not finish; its last words:\n{}", {
        console.split_off(console.len().saturating_sub(LAST_WORDS)).join("\n")
    });
    Ok(())
}

#[test]
#[ignore = "boots an emulated machine twice, which takes minutes: make test-vm"]
fn unit_package_watchdog_reboot_and_reset() -> Result<()> {
    run("")
}

#[test]
#[ignore = "boots an emulated machine, which takes minutes: make test-vm"]
fn containers_and_their_files_are_labelled_under_selinux() -> Result<()> {
    run("security=selinux selinux=1 enforcing=1")
}
