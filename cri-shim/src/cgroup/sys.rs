//! bpf(2), which has no wrapper in nix: loading a program and attaching it to a cgroup.
#![allow(unsafe_code, reason = "bpf(2) takes a union by pointer")]

use std::fs::File;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;

use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};

use super::devices::Instruction;

const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_PROG_ATTACH: libc::c_int = 8;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
/// Programs of others, as systemd's, are asked too; all must allow.
const BPF_F_ALLOW_MULTI: u32 = 2;

/// The beginning of `union bpf_attr` for BPF_PROG_LOAD; the kernel takes the rest as zero.
#[repr(C)]
struct Load {
    program_type: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buffer: u64,
    kernel_version: u32,
    flags: u32,
}

/// The same for BPF_PROG_ATTACH.
#[repr(C)]
struct Attach {
    target: u32,
    program: u32,
    attach_type: u32,
    flags: u32,
}

pub(super) fn attach_device_program(cgroup: &Path, program: &[Instruction]) -> io::Result<()> {
    // Before 5.11 programs count as locked memory.
    let _ = setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY);
    let program = load(program)?;
    let cgroup = File::open(cgroup)?;
    let descriptor = |fd: RawFd| u32::try_from(fd).map_err(io::Error::other);
    let attach = Attach {
        target: descriptor(cgroup.as_raw_fd())?,
        program: descriptor(program.as_raw_fd())?,
        attach_type: BPF_CGROUP_DEVICE,
        flags: BPF_F_ALLOW_MULTI,
    };
    call(BPF_PROG_ATTACH, &attach).map(drop)
}

fn load(program: &[Instruction]) -> io::Result<OwnedFd> {
    let load = Load {
        program_type: BPF_PROG_TYPE_CGROUP_DEVICE,
        instruction_count: u32::try_from(program.len()).map_err(io::Error::other)?,
        instructions: program.as_ptr() as u64,
        // No helper that demands the GPL is called.
        license: c"Apache-2.0".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log_buffer: 0,
        kernel_version: 0,
        flags: 0,
    };
    let fd = call(BPF_PROG_LOAD, &load)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn call<T>(command: libc::c_int, attributes: &T) -> io::Result<RawFd> {
    // SAFETY: `attributes` is a `repr(C)` beginning of the union without padding, of the length
    // told; what it points to outlives the call, and the kernel only reads it.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attributes), size_of::<T>())
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    RawFd::try_from(result).map_err(io::Error::other)
}
