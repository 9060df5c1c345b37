//! The last step of a container's or an exec's process: running its program.
//!
//! A program that cannot be run is an error of the start (as with other runtimes), not a container
//! that exits oddly.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::unistd::{AccessFlags, access, execve};
use oci_spec::runtime::Process;

use crate::spec::process::DEFAULT_PATH;

/// Replaces this process by the program; returns only with the reason why not.
pub(super) fn run(process: &Process) -> String {
    let program = match find(process) {
        Ok(program) => program,
        Err(message) => return message,
    };
    let strings = |list: &Option<Vec<String>>| -> Vec<CString> {
        list.iter().flatten().filter_map(|s| CString::new(s.as_bytes()).ok()).collect()
    };
    let Ok(path) = CString::new(program.as_os_str().as_bytes()) else {
        return format!("{:?}: path with a NUL byte", program);
    };
    let errno = match execve(&path, &strings(process.args()), &strings(process.env())) {
        Ok(never) => match never {},
        Err(errno) => errno,
    };
    let hint = match errno {
        Errno::ENOENT => " (its interpreter or loader is missing in the image)",
        Errno::ENOEXEC => " (built for another architecture, or a script without #!)",
        _ => "",
    };
    format!("exec {:?}: {}{hint}", program, errno.desc().to_lowercase())
}

/// The program file: a path as it is, a name looked up in the process's `PATH`.
fn find(process: &Process) -> Result<PathBuf, String> {
    let name = process.args().as_ref().and_then(|a| a.first()).ok_or("no program to run")?;
    if name.contains('/') {
        return match access(name.as_str(), AccessFlags::X_OK) {
            Ok(()) if Path::new(name).is_dir() => Err(format!("exec: {name:?}: is a directory")),
            Ok(()) => Ok(PathBuf::from(name)),
            Err(Errno::ENOENT | Errno::ENOTDIR) => {
                Err(format!("exec: {name:?}: stat {name}: no such file or directory"))
            }
            Err(errno) => Err(format!("exec: {name:?}: {}", errno.desc().to_lowercase())),
        };
    }
    let path = process
        .env()
        .iter()
        .flatten()
        .find_map(|e| e.strip_prefix("PATH="))
        .unwrap_or(DEFAULT_PATH);
    let mut denied = false;
    for directory in path.split(':') {
        let candidate = Path::new(if directory.is_empty() { "." } else { directory }).join(name);
        match access(&candidate, AccessFlags::X_OK) {
            Ok(()) if candidate.is_file() => return Ok(candidate),
            Err(Errno::EACCES) => denied = true,
            _ => {}
        }
    }
    if denied {
        return Err(format!("exec: {name:?}: permission denied"));
    }
    Err(format!("exec: {name:?}: executable file not found in $PATH"))
}
