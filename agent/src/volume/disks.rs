//! File systems on block devices of `local` PersistentVolumes: mounted once for the node, for as long as
//! any pod uses them.
//!
//! A device on which nothing is found gets a file system. One that holds anything is mounted as it is,
//! or not at all: what blkid cannot judge, or what the kernel says is in use, is never written to.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use super::VolumeError;
use super::command::{mount, plan_mount, run};
use super::layout::{Layout, Plugin};
use super::local::LocalVolume;
use super::mounts::mounts_below;
use super::teardown::unmount_below;

/// A file system is of this type where the volume names none.
const DEFAULT: &str = "ext4";
/// blkid, and mount(8), end in that time.
const SOON: Duration = Duration::from_secs(120);
/// Making and checking a file system takes as long as the device is large.
const LONG: Duration = Duration::from_secs(6 * 3600);
/// fsck's: all errors were put right.
const CORRECTED: i32 = 1;
/// fsck's: some were not.
const UNCORRECTED: i32 = 4;
/// blkid's: there is nothing that it knows.
const NOTHING: i32 = 2;

/// What a device holds.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Holds {
    Nothing,
    /// A file system, or another thing of that name.
    Type(String),
    /// A partition table.
    Partitions,
}

/// What blkid said, by its exit code.
fn judge(code: Option<i32>, text: &str) -> Result<Holds, String> {
    match code {
        Some(NOTHING) => return Ok(Holds::Nothing),
        Some(0) => {}
        _ => return Err(format!("blkid cannot tell what it holds: {text}")),
    }
    let mut kind = None;
    for line in text.lines().filter(|line| !line.is_empty()) {
        match line.split_once('=') {
            Some(("PTTYPE", _)) => return Ok(Holds::Partitions),
            Some(("TYPE", name)) => kind = Some(name.to_owned()),
            Some(_) => {}
            None => return Err(format!("blkid returns invalid output: {text}")),
        }
    }
    // Something was found, whatever it is.
    kind.map(Holds::Type).ok_or_else(|| format!("blkid returns invalid output: {text}"))
}

/// What to do with a device before it is mounted.
#[derive(Debug, PartialEq, Eq)]
enum Before {
    Make,
    Check,
    Nothing,
}

fn plan(holds: &Holds, read_only: bool) -> Result<Before, String> {
    match (holds, read_only) {
        (Holds::Nothing, true) => Err("it holds no file system, and is used read-only".into()),
        (Holds::Nothing, false) => Ok(Before::Make),
        (Holds::Type(_) | Holds::Partitions, false) => Ok(Before::Check),
        (Holds::Type(_) | Holds::Partitions, true) => Ok(Before::Nothing),
    }
}

/// The arguments of mkfs.
fn make_arguments<'a>(kind: &str, device: &'a str) -> Vec<&'a str> {
    match kind {
        "ext3" | "ext4" => vec!["-F", "-m0", device],
        "xfs" => vec!["-f", device],
        _ => vec![device],
    }
}

/// The type that `volume` asks for; it names a program.
fn kind_of(volume: &LocalVolume) -> Result<&str, String> {
    let kind = volume.fs_type.as_deref().filter(|kind| !kind.is_empty()).unwrap_or(DEFAULT);
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
    if kind.chars().all(good) {
        return Ok(kind);
    }
    Err(format!("local.fsType {kind:?} is no name of a file system"))
}

/// The devices of this node that have a file system of a PersistentVolume.
pub(super) struct Disks {
    layout: Layout,
    /// Who works on one, by the PersistentVolume's name: one at a time.
    busy: Mutex<HashMap<String, Weak<Mutex<()>>>>,
}

impl Disks {
    pub(super) fn new(layout: &Layout) -> Self {
        Self { layout: layout.clone(), busy: Mutex::default() }
    }

    fn one(&self, name: &str) -> Arc<Mutex<()>> {
        let mut busy = lock(&self.busy);
        if let Some(found) = busy.get(name).and_then(Weak::upgrade) {
            return found;
        }
        busy.retain(|_, mutex| mutex.strong_count() > 0);
        let mutex = Arc::new(Mutex::new(()));
        busy.insert(name.to_owned(), Arc::downgrade(&mutex));
        mutex
    }

    /// Mounts the file system of the device, unless it is; where it is then. The pod's own folder of the
    /// volume, which says that it is used, is there already.
    pub(super) fn mounted(
        &self,
        volume: &LocalVolume,
        device: &Path,
    ) -> Result<PathBuf, VolumeError> {
        let invalid = |reason: String| VolumeError::Invalid {
            volume: volume.name.clone(),
            reason: format!("local: failed to mount device {}: {reason}", device.display()),
        };
        let one = self.one(&volume.name);
        let _only = lock(&one);
        let target = self.layout.local_mount(&volume.name);
        fs::create_dir_all(&target).map_err(VolumeError::io("create", &target))?;
        let resolved = target.canonicalize().map_err(VolumeError::io("look at", &target))?;
        if mounts_below(&resolved)?.contains(&resolved) {
            return Ok(target);
        }
        let mounted = bring_about(volume, device, &target);
        if mounted.is_err() {
            let _ = fs::remove_dir(&target);
        }
        mounted.map_err(invalid)?;
        Ok(target)
    }

    /// Unmounts what no pod uses any more.
    pub(super) fn release(&self) -> Result<(), VolumeError> {
        let folder = self.layout.local_mounts();
        let entries = match fs::read_dir(&folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other.map_err(VolumeError::io("read", &folder))?,
        };
        for name in entries.filter_map(Result::ok).filter_map(|e| e.file_name().into_string().ok())
        {
            let one = self.one(&name);
            // Whoever works on it has a pod that uses it, and may take hours.
            let Ok(_only) = one.try_lock() else { continue };
            if self.is_used(&name)? {
                continue;
            }
            let target = self.layout.local_mount(&name);
            let resolved = target.canonicalize().map_err(VolumeError::io("look at", &target))?;
            unmount_below(&resolved)?;
            fs::remove_dir(&target).map_err(VolumeError::io("remove", &target))?;
        }
        Ok(())
    }

    fn is_used(&self, name: &str) -> Result<bool, VolumeError> {
        let pods = self.layout.pods();
        let entries = match fs::read_dir(&pods) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            other => other.map_err(VolumeError::io("read", &pods))?,
        };
        let uses = |pod: fs::DirEntry| {
            let uid = crate::ids::PodUid::from(pod.file_name().to_string_lossy().as_ref());
            self.layout.volume(&uid, Plugin::Local, name).exists()
        };
        Ok(entries.filter_map(Result::ok).any(uses))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn bring_about(volume: &LocalVolume, device: &Path, target: &Path) -> Result<(), String> {
    let (kind, path) = (kind_of(volume)?, device.to_string_lossy().into_owned());
    let probe = ["-p", "-s", "TYPE", "-s", "PTTYPE", "-o", "export", &path];
    let said = run("blkid", &probe, SOON)
        .map_err(|error| format!("cannot run blkid: {error}; install util-linux"))?;
    let holds = judge(said.status.code(), &said.text)?;
    match plan(&holds, volume.read_only)? {
        Before::Make => make(kind, &path)?,
        Before::Check => {
            if holds != Holds::Type(kind.to_owned()) {
                tracing::warn!(device = path, kind, ?holds, "a device holds something else");
            }
            check(&path)?;
        }
        Before::Nothing => {}
    }
    let mut options: Vec<&str> = volume.options.iter().map(String::as_str).collect();
    if volume.read_only {
        options.push("ro");
    }
    options.push("defaults");
    mount(&plan_mount(kind, &options, &path, target), SOON)
}

fn make(kind: &str, device: &str) -> Result<(), String> {
    // The kernel grants it to nobody while the device is mounted, or is a part of another.
    match fs::OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(device) {
        // mkfs asks for it as well.
        Ok(exclusive) => drop(exclusive),
        Err(error) => return Err(format!("it holds no file system, but is in use: {error}")),
    }
    tracing::info!(device, kind, "making a file system on a device that holds nothing");
    let program = format!("mkfs.{kind}");
    match run(&program, &make_arguments(kind, device), LONG) {
        Ok(said) if said.status.success() => Ok(()),
        Ok(said) => Err(format!("{program} failed: {}: {}", said.status, said.text)),
        Err(error) => Err(format!("cannot run {program}: {error}; install it")),
    }
}

fn check(device: &str) -> Result<(), String> {
    match run("fsck", &["-a", device], LONG) {
        Ok(said) => match said.status.code() {
            Some(0) => {}
            Some(CORRECTED) => tracing::info!(device, "fsck put errors right"),
            Some(UNCORRECTED) => {
                return Err(format!(
                    "fsck found errors that it could not put right: {}",
                    said.text
                ));
            }
            _ => tracing::info!(device, said = said.text, "fsck could not check a device"),
        },
        Err(error) => tracing::warn!(device, %error, "a device is mounted without a check"),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_holds_nothing_is_written_to() {
        let ext4 = || Holds::Type("ext4".into());
        for (code, text, expected) in [
            (Some(2), "", Ok(Holds::Nothing)),
            (Some(0), "DEVNAME=/dev/x\nTYPE=ext4", Ok(ext4())),
            (Some(0), "DEVNAME=/dev/x\nPTTYPE=gpt", Ok(Holds::Partitions)),
            (Some(0), "TYPE=vfat\nPTTYPE=dos", Ok(Holds::Partitions)),
            (Some(0), "TYPE=crypto_LUKS", Ok(Holds::Type("crypto_LUKS".into()))),
            (Some(0), "", Err(())),
            (Some(0), "odd", Err(())),
            (Some(8), "ambivalent result", Err(())),
            (Some(4), "", Err(())),
            (None, "", Err(())),
        ] {
            assert_eq!(judge(code, text).map_err(drop), expected, "{code:?} {text:?}");
        }
        assert_eq!(plan(&Holds::Nothing, false), Ok(Before::Make));
        assert!(plan(&Holds::Nothing, true).is_err());
        for holds in [ext4(), Holds::Partitions] {
            assert_eq!(plan(&holds, false), Ok(Before::Check));
            assert_eq!(plan(&holds, true), Ok(Before::Nothing));
        }
    }

    #[test]
    fn a_type_names_a_program_and_no_path() {
        let of = |kind: Option<&str>| {
            let volume = LocalVolume { fs_type: kind.map(str::to_owned), ..LocalVolume::default() };
            kind_of(&volume).map(str::to_owned)
        };
        assert_eq!(of(None).as_deref(), Ok("ext4"));
        assert_eq!(of(Some("")).as_deref(), Ok("ext4"));
        assert_eq!(of(Some("xfs")).as_deref(), Ok("xfs"));
        assert!(of(Some("/../sh")).is_err());
        assert_eq!(make_arguments("ext4", "/dev/x"), ["-F", "-m0", "/dev/x"]);
        assert_eq!(make_arguments("xfs", "/dev/x"), ["-f", "/dev/x"]);
        assert_eq!(make_arguments("btrfs", "/dev/x"), ["/dev/x"]);
    }

    #[test]
    fn what_a_pod_has_a_folder_of_is_used() {
        let root = tempfile::tempdir().unwrap();
        let layout = Layout::new(root.path());
        let disks = Disks::new(&layout);
        disks.release().unwrap();
        for name in ["used", "free"] {
            fs::create_dir_all(layout.local_mount(name)).unwrap();
        }
        let of_pod = layout.volume(&crate::ids::PodUid::from("u"), Plugin::Local, "used");
        fs::create_dir_all(of_pod).unwrap();
        disks.release().unwrap();
        assert!(layout.local_mount("used").exists() && !layout.local_mount("free").exists());
    }
}
