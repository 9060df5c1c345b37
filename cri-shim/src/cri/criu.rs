//! How CRIU is called for a container of the built-in runtime: what it must know is not the
//! container's own.
//!
//! CRIU recreates everything it dumps, so what comes from outside has to be named: bind mounts, the
//! pod's network namespace and a PID namespace that others share. The names are those that runc
//! gives them (libcontainer/criu_linux.go), so that what restores runc's checkpoints restores these.

use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};
use nix::sys::stat::stat;
use oci_spec::runtime::Spec;
use procfs::FromRead;
use procfs::process::MountInfos;
use prost::Message;

use self::wire::{ExternalMount, Options, Request, RequestType, Response};

#[allow(missing_docs, reason = "CRIU's names, explained in its own documentation")]
mod wire {
    tonic::include_proto!("criu");
}

/// What a running container's processes look like.
#[derive(Debug, Default)]
pub(super) struct Facts {
    /// Its first process.
    pub(super) pid: i32,
    /// The network namespace's inode, where it is not the node's.
    pub(super) network: Option<u64>,
    /// The PID namespace's inode, where the process is not its first.
    pub(super) pids: Option<u64>,
    /// Where its processes can be frozen.
    pub(super) freezer: Option<PathBuf>,
    /// Mount points in its mount namespace, in order, and file systems' types.
    pub(super) mounts: Vec<(PathBuf, String)>,
    /// What its standard input, output and error are.
    pub(super) streams: Vec<String>,
}

impl Facts {
    /// Looks at a process.
    pub(super) fn look(pid: i32, freezer: Option<PathBuf>) -> io::Result<Self> {
        let namespace = |pid: &str, kind: &str| -> io::Result<u64> {
            Ok(stat(format!("/proc/{pid}/ns/{kind}").as_str())?.st_ino)
        };
        let process = pid.to_string();
        let other = |kind| -> io::Result<Option<u64>> {
            let inode = namespace(&process, kind)?;
            Ok(Some(inode).filter(|inode| namespace("self", kind).ok() != Some(*inode)))
        };
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let first = status
            .lines()
            .find_map(|line| line.strip_prefix("NSpid:"))
            .and_then(|pids| pids.split_whitespace().last())
            == Some("1");
        let mounts = MountInfos::from_file(format!("/proc/{pid}/mountinfo"))
            .map_err(|e| io::Error::other(e.to_string()))?;
        let stream = |fd: u8| fs::read_link(format!("/proc/{pid}/fd/{fd}"));
        Ok(Facts {
            pid,
            network: other("net")?,
            pids: if first { None } else { other("pid")? },
            freezer,
            mounts: mounts.into_iter().map(|mount| (mount.mount_point, mount.fs_type)).collect(),
            streams: (0..3)
                .map(|fd| stream(fd).map_or_else(|_| "/dev/null".to_owned(), |l| shown(&l)))
                .collect(),
        })
    }
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

/// What CRIU is to do: dump the processes and leave them running.
pub(super) fn plan_dump(spec: &Spec, facts: &Facts, limit: Duration) -> Options {
    let namespaces = [("net", facts.network, "extRootNetNS"), ("pid", facts.pids, "extRootPidNS")];
    let outside = namespaces
        .into_iter()
        .filter_map(|(kind, inode, name)| Some(format!("{kind}[{}]:{name}", inode?)));
    let mount = |path: String| ExternalMount { key: path.clone(), val: path };
    Options {
        pid: Some(facts.pid),
        leave_running: Some(true),
        log_level: Some(4),
        log_file: Some("dump.log".to_owned()),
        timeout: Some(limit.as_secs().clamp(1, 3600) as u32),
        // What a server in a pod has at any time: connections, sockets of others, locks, a terminal
        // whose other end the monitor holds, files that were deleted.
        tcp_established: Some(true),
        ext_unix_sk: Some(true),
        file_locks: Some(true),
        shell_job: Some(true),
        orphan_pts_master: Some(true),
        link_remap: Some(true),
        freeze_cgroup: facts.freezer.as_deref().map(shown),
        external: outside.collect(),
        ext_mnt: foreign_mounts(spec, &facts.mounts).into_iter().map(mount).collect(),
        ..Options::default()
    }
}

/// Has `program` do it, with its images and its log in folders of those names.
pub(super) async fn apply_dump(
    program: &Path,
    mut options: Options,
    images: &Path,
    work: &Path,
    limit: Duration,
) -> Result<(), DumpError> {
    let folder = |path: &Path| fs::File::open(path);
    let (images, work) = (folder(images)?, folder(work)?);
    // It opens them through /proc, by our numbers.
    options.images_dir_fd = images.as_raw_fd();
    options.work_dir_fd = Some(work.as_raw_fd());
    let request = Request { r#type: RequestType::Dump.into(), opts: Some(options) };
    let (ours, theirs) =
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
            .map_err(io::Error::from)?;
    send(ours.as_raw_fd(), &request.encode_to_vec(), MsgFlags::MSG_NOSIGNAL)
        .map_err(io::Error::from)?;
    let mut command = tokio::process::Command::new(program);
    command.args(["swrk", "0"]).stdin(Stdio::from(theirs));
    command.stdout(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
    let mut child = command.spawn()?;
    drop(command);
    let ended = tokio::time::timeout(limit, child.wait()).await.map_err(|_| DumpError::Late)??;
    let mut answer = vec![0; 64 << 10];
    let length = recv(ours.as_raw_fd(), &mut answer, MsgFlags::MSG_DONTWAIT).unwrap_or(0);
    match Response::decode(&answer[..length]) {
        Ok(response) if response.success => Ok(()),
        Ok(Response { cr_errmsg: Some(message), .. }) if !message.trim().is_empty() => {
            Err(DumpError::Failed(message.trim().to_owned()))
        }
        _ => Err(DumpError::Failed(ended.to_string())),
    }
}

/// Why there is no dump.
#[derive(Debug, thiserror::Error)]
pub(super) enum DumpError {
    /// CRIU could not be run.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// It was killed.
    #[error("it did not end in time")]
    Late,
    /// What it says, or how it ended.
    #[error("{0}")]
    Failed(String),
}

/// The mount points whose files are not the container's own.
fn foreign_mounts(spec: &Spec, mounts: &[(PathBuf, String)]) -> Vec<String> {
    let foreign: Vec<&Path> = spec
        .mounts()
        .iter()
        .flatten()
        .filter(|mount| {
            let bind = |option: &String| option == "bind" || option == "rbind";
            mount.options().iter().flatten().any(bind)
                || matches!(mount.typ().as_deref(), Some("bind" | "cgroup"))
        })
        .map(|mount| mount.destination().as_path())
        .collect();
    let linux = spec.linux().as_ref();
    let masked = linux.and_then(|linux| linux.masked_paths().as_ref()).into_iter().flatten();
    let masked: Vec<&Path> = masked.map(Path::new).collect();
    let mut found: Vec<String> = mounts
        .iter()
        .filter(|(point, kind)| {
            // A masked folder is an empty tmpfs of the container's own, a masked file a device.
            point != Path::new("/")
                && (foreign.iter().any(|path| point.starts_with(path))
                    || kind != "tmpfs" && masked.contains(&point.as_path()))
        })
        .map(|(point, _)| shown(point))
        .collect();
    found.dedup();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> Spec {
        serde_json::from_value(serde_json::json!({
            "ociVersion": "1.2.0",
            "mounts": [
                {"destination": "/proc", "type": "proc"},
                {"destination": "/dev", "type": "tmpfs"},
                {"destination": "/data", "type": "bind", "source": "/d", "options": ["rbind"]},
                {"destination": "/etc/hosts", "source": "/h", "options": ["bind", "ro"]},
            ],
            "linux": {"maskedPaths": ["/proc/kcore", "/proc/acpi", "/proc/absent"]},
        }))
        .unwrap()
    }

    #[test]
    fn mounts_from_outside_are_named() {
        let mounts = [
            ("/", "overlay"),
            ("/proc", "proc"),
            ("/dev", "tmpfs"),
            ("/data", "ext4"),
            ("/data/deep", "tmpfs"),
            ("/database", "tmpfs"),
            ("/etc/hosts", "ext4"),
            ("/proc/kcore", "devtmpfs"),
            ("/proc/acpi", "tmpfs"),
        ];
        let mounts = mounts.map(|(path, kind)| (PathBuf::from(path), kind.to_owned()));
        assert_eq!(
            foreign_mounts(&spec(), &mounts),
            ["/data", "/data/deep", "/etc/hosts", "/proc/kcore"]
        );
    }

    #[test]
    fn namespaces_of_the_pod_stay_outside() {
        let facts = Facts {
            pid: 42,
            network: Some(7),
            freezer: Some("/sys/fs/cgroup/freezer/c".into()),
            ..Facts::default()
        };
        let plan = |facts: &Facts| plan_dump(&spec(), facts, Duration::from_secs(60));
        let said = plan(&facts);
        assert_eq!((said.pid, said.leave_running, said.timeout), (Some(42), Some(true), Some(60)));
        assert_eq!(said.external, ["net[7]:extRootNetNS"]);
        assert_eq!(said.freeze_cgroup.as_deref(), Some("/sys/fs/cgroup/freezer/c"));
        let shared = plan(&Facts { pids: Some(8), network: None, ..facts });
        assert_eq!(shared.external, ["pid[8]:extRootPidNS"]);
    }
}
