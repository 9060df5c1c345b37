//! Device nodes a container gets and what its cgroup lets it do with them.

use std::path::{Path, PathBuf};

use oci_spec::runtime::{
    LinuxDevice, LinuxDeviceBuilder, LinuxDeviceCgroup, LinuxDeviceCgroupBuilder, LinuxDeviceType,
};

use super::SpecError;

/// A device node of the host, as looked up for a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostDevice {
    /// Where it is on the host.
    pub host: PathBuf,
    /// Where it appears in the container.
    pub path: PathBuf,
    /// Block, character or FIFO.
    pub kind: LinuxDeviceType,
    pub major: i64,
    pub minor: i64,
    /// Permission bits of the node.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// What the cgroup allows: a subset of `rwm`.
    pub access: String,
}

/// Devices every container may use: null, zero, full, random, urandom, tty, console, ptmx, pts, and
/// net/tun, which VPNs make for themselves, as (major, minor); `None` is any.
const DEFAULT: [(i64, Option<i64>); 10] = [
    (1, Some(3)),
    (1, Some(5)),
    (1, Some(7)),
    (1, Some(8)),
    (1, Some(9)),
    (5, Some(0)),
    (5, Some(1)),
    (5, Some(2)),
    (136, None),
    (10, Some(200)),
];

impl HostDevice {
    /// One at the same path, of which nothing else is known yet.
    pub fn at(path: &Path) -> Self {
        HostDevice {
            host: path.to_path_buf(),
            path: path.to_path_buf(),
            kind: LinuxDeviceType::C,
            major: 0,
            minor: 0,
            mode: 0o666,
            uid: 0,
            gid: 0,
            access: "rwm".to_owned(),
        }
    }
}

pub(super) fn plan(devices: &[HostDevice]) -> Result<Vec<LinuxDevice>, SpecError> {
    devices
        .iter()
        .map(|device| {
            Ok(LinuxDeviceBuilder::default()
                .path(device.path.clone())
                .typ(device.kind)
                .major(device.major)
                .minor(device.minor)
                .file_mode(device.mode)
                .uid(device.uid)
                .gid(device.gid)
                .build()?)
        })
        .collect()
}

/// Deny everything, then allow making nodes and using the default and the given devices; a
/// privileged container is denied nothing.
pub(crate) fn cgroup_rules(
    devices: &[HostDevice],
    privileged: bool,
) -> Result<Vec<LinuxDeviceCgroup>, SpecError> {
    let rule = |allow: bool, typ: LinuxDeviceType, access: &str| {
        LinuxDeviceCgroupBuilder::default().allow(allow).typ(typ).access(access)
    };
    if privileged {
        return Ok(vec![rule(true, LinuxDeviceType::A, "rwm").build()?]);
    }
    let mut rules = vec![
        rule(false, LinuxDeviceType::A, "rwm").build()?,
        rule(true, LinuxDeviceType::C, "m").build()?,
        rule(true, LinuxDeviceType::B, "m").build()?,
    ];
    for (major, minor) in DEFAULT {
        let mut allowed = rule(true, LinuxDeviceType::C, "rwm").major(major);
        if let Some(minor) = minor {
            allowed = allowed.minor(minor);
        }
        rules.push(allowed.build()?);
    }
    for device in devices.iter().filter(|device| device.kind != LinuxDeviceType::P) {
        rules.push(
            rule(true, device.kind, &device.access)
                .major(device.major)
                .minor(device.minor)
                .build()?,
        );
    }
    Ok(rules)
}
