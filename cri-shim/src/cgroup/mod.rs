//! Containers' cgroups as directories: who is in them, killing, removal, out-of-memory counts.
//!
//! One place for the unified hierarchy (v2) and for one hierarchy per controller (v1), and cheap
//! enough for the monitor: no allocation that outlives a call.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nix::sys::signal::{Signal, kill};
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};
use nix::unistd::Pid;

pub mod create;
pub mod detail;
pub mod devices;
pub mod limits;
pub mod pressure;
pub mod rate;
pub mod stats;
mod sys;

/// Where cgroup file systems are mounted.
pub const ROOT: &str = "/sys/fs/cgroup";

/// The v1 controllers containers are put under.
const CONTROLLERS: [&str; 9] =
    ["blkio", "cpu", "cpuacct", "cpuset", "devices", "freezer", "hugetlb", "memory", "pids"];

/// The hierarchies of this machine.
#[derive(Clone, Debug)]
pub struct Hierarchies {
    /// The unified hierarchy has the controllers.
    pub v2: bool,
    roots: Vec<PathBuf>,
}

impl Hierarchies {
    /// Looks at what is mounted at [`ROOT`].
    pub fn find() -> io::Result<Self> {
        let root = PathBuf::from(ROOT);
        if statfs(&root)?.filesystem_type() == CGROUP2_SUPER_MAGIC {
            return Ok(Hierarchies { v2: true, roots: vec![root] });
        }
        let mut roots = Vec::new();
        for entry in fs::read_dir(&root)? {
            let entry = entry?;
            // Links such as `cpu` -> `cpu,cpuacct` name a hierarchy twice.
            if entry.file_type()?.is_dir() && entry.path().join("cgroup.procs").exists() {
                roots.push(entry.path());
            }
        }
        roots.sort();
        Ok(Hierarchies { v2: false, roots })
    }

    /// The v1 hierarchies in which a container has cgroups, by directory name.
    pub fn v1_controllers(&self) -> Vec<String> {
        if self.v2 {
            return Vec::new();
        }
        let named = |root: &PathBuf| Some(root.file_name()?.to_str()?.to_owned());
        self.roots
            .iter()
            .filter_map(named)
            .filter(|name| name.split(',').any(|part| CONTROLLERS.contains(&part)))
            .collect()
    }

    /// The directory of `cgroup` in every hierarchy that has it.
    pub fn directories(&self, cgroup: &Path) -> impl Iterator<Item = PathBuf> {
        let relative = cgroup.strip_prefix("/").unwrap_or(cgroup).to_path_buf();
        self.roots.iter().map(move |root| root.join(&relative)).filter(|path| path.exists())
    }

    /// The directory of `cgroup` under one v1 controller, or in the unified hierarchy.
    pub fn controller(&self, controller: &str, cgroup: &Path) -> PathBuf {
        let relative = cgroup.strip_prefix("/").unwrap_or(cgroup);
        let base = PathBuf::from(ROOT);
        if self.v2 { base.join(relative) } else { base.join(controller).join(relative) }
    }

    /// Puts the calling process into `cgroup`, and there into a group of its own by which it and all
    /// it starts are known: in the unified hierarchy, or in the freezer's, which says nothing about
    /// resources.
    pub fn join(&self, cgroup: &Path, group: &str) -> Result<(), (PathBuf, io::Error)> {
        let tracking = self.controller("freezer", cgroup);
        for mut directory in self.directories(cgroup) {
            if directory == tracking {
                let own = directory.join(group);
                if fs::create_dir(&own).is_ok() {
                    directory = own;
                }
            }
            fs::write(directory.join("cgroup.procs"), "0").map_err(|e| (directory, e))?;
        }
        Ok(())
    }

    /// Makes the same group on v2 and opens it, for a process to begin in.
    pub fn group(&self, cgroup: &Path, group: &str) -> Result<fs::File, (PathBuf, io::Error)> {
        let directory = self.controller("", cgroup);
        let own = directory.join(group);
        let directory = if fs::create_dir(&own).is_ok() { own } else { directory };
        fs::File::open(&directory).map_err(|e| (directory, e))
    }

    /// The processes in `cgroup` and below it.
    pub fn processes(&self, cgroup: &Path) -> Vec<Pid> {
        let mut pids = Vec::new();
        for directory in self.directories(cgroup) {
            collect(&directory, &mut pids);
            if !pids.is_empty() {
                break;
            }
        }
        pids
    }

    /// Sends SIGKILL to everything in `cgroup`; also to what is forked meanwhile.
    pub fn kill(&self, cgroup: &Path) {
        if self.v2 {
            for directory in self.directories(cgroup) {
                if fs::write(directory.join("cgroup.kill"), "1").is_ok() {
                    return;
                }
            }
        }
        // A fork bomb can outrun one pass, not many.
        let mut before = Vec::new();
        for _ in 0..100 {
            let pids = self.processes(cgroup);
            if pids.is_empty() || pids == before {
                break;
            }
            for pid in &pids {
                let _ = kill(*pid, Signal::SIGKILL);
            }
            before = pids;
        }
        // The frozen of v1 do not even die.
        if !self.v2 && !before.is_empty() {
            thaw(&self.controller("freezer", cgroup));
        }
    }

    /// Removes `cgroup` and what is below it. `false` when something is still in it.
    pub fn remove(&self, cgroup: &Path) -> bool {
        let mut gone = true;
        for directory in self.directories(cgroup) {
            gone &= remove_tree(&directory);
        }
        gone
    }

    /// How many processes of `cgroup` the kernel killed for want of memory; `None` when it is gone.
    /// On v2 those below it count too.
    pub fn oom_kills(&self, cgroup: &Path) -> Option<u64> {
        let directory = self.controller("memory", cgroup);
        let file = if self.v2 { "memory.events" } else { "memory.oom_control" };
        let text = fs::read_to_string(directory.join(file)).ok()?;
        Some(field(&text, "oom_kill").unwrap_or(0))
    }

    /// The same of the cgroup that `cgroup` is in, where it counts those below it.
    pub fn oom_kills_around(&self, cgroup: &Path) -> Option<u64> {
        self.oom_kills(cgroup.parent().filter(|_| self.v2)?)
    }
}

/// The value of a `name value` line.
pub fn field(text: &str, name: &str) -> Option<u64> {
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .find(|(key, _)| *key == name)
        .and_then(|(_, value)| value.trim().parse().ok())
}

fn collect(directory: &Path, pids: &mut Vec<Pid>) {
    if let Ok(text) = fs::read_to_string(directory.join("cgroup.procs")) {
        pids.extend(text.lines().filter_map(|l| l.parse().ok()).map(Pid::from_raw));
    }
    for child in children(directory) {
        collect(&child, pids);
    }
}

fn children(directory: &Path) -> impl Iterator<Item = PathBuf> {
    fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|t| t.is_dir()))
        .map(|entry| entry.path())
}

fn thaw(directory: &Path) {
    let _ = fs::write(directory.join("freezer.state"), "THAWED");
    for child in children(directory) {
        thaw(&child);
    }
}

fn remove_tree(directory: &Path) -> bool {
    match fs::remove_dir(directory) {
        Ok(()) => true,
        Err(e) if e.kind() == io::ErrorKind::NotFound => true,
        Err(_) => {
            for child in children(directory) {
                remove_tree(&child);
            }
            match fs::remove_dir(directory) {
                Ok(()) => true,
                Err(e) => e.kind() == io::ErrorKind::NotFound,
            }
        }
    }
}
