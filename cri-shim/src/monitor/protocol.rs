//! What a shim and a monitor say to each other over the monitor's unix socket.
//!
//! A frame is a little-endian `u32` length and that many bytes of JSON; file descriptors travel
//! with the first byte.
//!
//! A monitor outlives the program that started it, so a newer shim must be able to manage an older
//! monitor. Therefore:
//! * Fields are only ever added, with a default. Neither side minds a field it does not know.
//! * The first exchange tells the versions, and a shim asks nothing of a monitor that its version
//!   does not know ([`Request::needs`]). What a monitor would do wrongly without knowing a field
//!   needs a version too.
//! * A monitor answers only with replies that the request's version had.
//!
//! `protocol/tests.rs` holds what each version said, word for word.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::spec::user::{Identity, UserRequest};
use crate::spec::userns::IdMap;

/// The protocol this program speaks. 2 added terminals of execs, [`Request::Attach`] and
/// [`Request::CloseStdin`]; 3 added user namespaces, and `force` to [`Request::Exit`] and `rotation`
/// to [`StartContainer`], which a monitor may do without; 4 added image volumes.
pub const VERSION: u32 = 4;

/// The first version that knows terminals of execs and attached clients.
const STREAMING: u32 = 2;

/// The first version that knows user namespaces.
const USERNS: u32 = 3;

/// The first version that knows image volumes.
const IMAGE_VOLUMES: u32 = 4;

/// The longest frame either side accepts, in bytes.
pub const MAX_FRAME: usize = 1 << 20;

/// What the shim asks a monitor.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Request {
    /// Opens every connection. Answered by [`Reply::Hello`].
    Hello { version: u32 },
    /// From now on this connection gets [`Reply::Exited`] of every container.
    Subscribe,
    /// Makes and starts a container. Answered by [`Reply::Started`] or [`Reply::Failed`]; closing
    /// the connection before that abandons the start.
    Start(Box<StartContainer>),
    /// Sends a signal to a container's first process, or to all of its processes. Answered by
    /// [`Reply::Done`], also when it is gone already.
    Kill { container: String, signal: i32, all: bool },
    /// Runs a process in a container; standard input, output and error come with the frame, or
    /// none of them when it gets a terminal. Answered by [`Reply::Done`] once it runs (with the
    /// terminal) and [`Reply::ExecExited`] at its end; closing the connection kills it and what it
    /// started.
    Exec {
        container: String,
        arguments: Vec<String>,
        #[serde(default)]
        tty: bool,
    },
    /// From now on copies the container's output to the pipes that come with the frame, standard
    /// output first, until the connection is closed. Answered by [`Reply::Done`], with the
    /// container's terminal or the other end of its standard input if it has one.
    Attach { container: String, stdout: bool, stderr: bool },
    /// Ends the container's standard input. Answered by [`Reply::Done`].
    CloseStdin { container: String },
    /// Closes and opens the log again, after it was renamed.
    ReopenLog { container: String },
    /// Ends the monitor. Refused while a container runs, unless the containers are to end too.
    /// Answered by [`Reply::Done`]; the end of the connection is the end of the process.
    Exit {
        #[serde(default)]
        force: bool,
    },
}

impl Request {
    /// The first version of the protocol whose monitors do what this asks.
    pub fn needs(&self) -> u32 {
        match self {
            Request::Attach { .. }
            | Request::CloseStdin { .. }
            | Request::Exec { tty: true, .. } => STREAMING,
            // Without knowing them, it would run the container without its volumes.
            Request::Start(start) if !start.image_volumes.is_empty() => IMAGE_VOLUMES,
            // Without knowing it, it would run the container as the node's root.
            Request::Start(start) if start.userns.is_some() => USERNS,
            _ => 1,
        }
    }
}

/// A container to start.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StartContainer {
    pub id: String,
    /// The directory with `config.json`, and where the OCI runtime keeps its state of the container.
    pub bundle: PathBuf,
    /// The overlay to mount for it.
    pub rootfs: Overlay,
    pub user: UserRequest,
    /// The container's cgroup, relative to the root of each hierarchy.
    pub cgroup: PathBuf,
    /// Where its output goes; nowhere when absent.
    pub log: Option<PathBuf>,
    /// The directory that gets `started.json` and `exited.json`.
    pub records: PathBuf,
    /// Keeps its standard input open.
    pub stdin: bool,
    /// Gives it a terminal.
    pub tty: bool,
    /// The program of an external OCI runtime that makes it.
    #[serde(default)]
    pub runtime: Option<PathBuf>,
    /// The pod's user namespace.
    #[serde(default)]
    pub userns: Option<Userns>,
    /// When its log is rotated without being told; never when absent.
    #[serde(default)]
    pub rotation: Option<LogRotation>,
    /// Images whose files are volumes of it.
    #[serde(default)]
    pub image_volumes: Vec<ImageVolume>,
}

/// A user namespace.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Userns {
    /// Where it is pinned.
    pub path: PathBuf,
    /// Its ids.
    pub map: IdMap,
}

/// How much is kept of a container's log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogRotation {
    /// The most a file holds, in bytes; only an entry that is longer is longer.
    pub max_size: u64,
    /// How many files are kept, the one that is written to among them; at least 2.
    pub max_files: u32,
}

/// An image that is mounted as a volume.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ImageVolume {
    /// Its id, for errors.
    pub image: String,
    /// Uppermost first.
    pub layers: Vec<PathBuf>,
    /// The part of it that is wanted; all when empty.
    pub sub_path: String,
    /// The mount point, in the container's own mount namespace.
    pub target: PathBuf,
}

/// The parts of an overlay mount, uppermost layer first.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Overlay {
    pub lower: Vec<PathBuf>,
    pub upper: PathBuf,
    pub work: PathBuf,
    /// The mount point, in the container's own mount namespace.
    pub target: PathBuf,
}

/// What a monitor says.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum Reply {
    Hello {
        version: u32,
        pid: i32,
        /// The first process of the pod's shared PID namespace.
        init: Option<i32>,
    },
    /// What was asked has been done.
    Done,
    /// What was asked could not be done; the text is for people.
    Failed {
        message: String,
    },
    Started(Started),
    ExecExited {
        code: i32,
    },
    Exited {
        container: String,
        exit: Exited,
    },
}

/// The record of a start, also on disk as `started.json`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Started {
    pub pid: i32,
    /// Nanoseconds since the epoch.
    pub at: i64,
    pub user: Identity,
}

/// The record of an end, also on disk as `exited.json`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exited {
    /// The exit code as a shell gives it: 128 + signal for a killed process.
    pub code: i32,
    #[serde(default)]
    pub signal: i32,
    /// Nanoseconds since the epoch.
    pub at: i64,
    #[serde(default)]
    pub oom_killed: bool,
    /// A CamelCase reason that overrides the one the code implies, such as `StartError`.
    #[serde(default)]
    pub reason: String,
    #[serde(default)]
    pub message: String,
}

/// What the shim asks the zygote. Both are of the same program, so this needs no versions.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum ZygoteRequest {
    /// A monitor for one pod.
    Spawn(Box<SpawnMonitor>),
    /// Whether pods can have user namespaces: tried with the folder of image layers and a mount
    /// that does not propagate.
    ProbeUserns { layers: PathBuf, area: PathBuf },
}

/// A monitor for one pod.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SpawnMonitor {
    /// Where the monitor listens.
    pub socket: PathBuf,
    /// A UTS namespace of its own with this host name; the node's when absent.
    pub hostname: Option<String>,
    /// An IPC namespace of its own.
    pub ipc: bool,
    /// A PID namespace that the pod's containers share.
    pub shared_pid: bool,
    /// A user namespace that the others belong to, to be made and pinned with the network
    /// namespace.
    pub userns: Option<Userns>,
    /// The pod's network namespace, for sysctls.
    pub netns: Option<PathBuf>,
    /// Sysctls to set, by dotted name.
    pub sysctls: BTreeMap<String, String>,
    /// `cgroup.procs` files the monitor writes itself into; best effort.
    pub cgroup_procs: Vec<PathBuf>,
}

/// The zygote's answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Spawned {
    /// Empty when the monitor listens, or pods can have user namespaces.
    pub error: String,
}

#[cfg(test)]
mod tests;
