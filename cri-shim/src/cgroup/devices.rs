//! Which devices a container may use, on cgroup v2: a program the kernel asks at each open and mknod.
//!
//! v1 has a file for it; v2 has BPF_PROG_TYPE_CGROUP_DEVICE only (kernel:
//! Documentation/admin-guide/cgroup-v2.rst, "Device controller"). It takes a program of a few
//! instructions, for which libbpf would be much.

use std::io;
use std::path::Path;

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

use super::sys;

/// One instruction, as the kernel reads it: opcode, registers (destination below, source above),
/// jump offset, immediate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Instruction {
    code: u8,
    registers: u8,
    offset: i16,
    immediate: i32,
}

// linux/bpf.h: classes, sizes and operations, as they are combined here.
const LOAD_WORD: u8 = 0x61;
const AND: u8 = 0x54;
const SHIFT_RIGHT: u8 = 0x74;
const COPY: u8 = 0xbc;
const SET: u8 = 0xb7;
const JUMP_UNLESS_EQUAL: u8 = 0x55;
const EXIT: u8 = 0x95;

// Registers: the verdict, the context, and what is loaded from it.
const VERDICT: u8 = 0;
const CONTEXT: u8 = 1;
const TYPE: u8 = 2;
const ACCESS: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;

const BLOCK: i32 = 1;
const CHARACTER: i32 = 2;
/// mknod, read and write.
const EVERYTHING: i32 = 7;

fn instruction(code: u8, to: u8, from: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction { code, registers: to | (from << 4), offset, immediate }
}

/// The program for `rules`, of which the last that matches counts; without a match the access is
/// denied. `None` when everything is allowed.
pub fn program(rules: &[LinuxDeviceCgroup]) -> Option<Vec<Instruction>> {
    // struct bpf_cgroup_dev_ctx: access in the upper and type in the lower half, major, minor.
    let mut program = vec![
        instruction(LOAD_WORD, TYPE, CONTEXT, 0, 0),
        instruction(AND, TYPE, 0, 0, 0xffff),
        instruction(LOAD_WORD, ACCESS, CONTEXT, 0, 0),
        instruction(SHIFT_RIGHT, ACCESS, 0, 0, 16),
        instruction(LOAD_WORD, MAJOR, CONTEXT, 4, 0),
        instruction(LOAD_WORD, MINOR, CONTEXT, 8, 0),
    ];
    for rule in rules.iter().rev() {
        let conditions = conditions(rule);
        if conditions.is_empty() {
            // Earlier rules are never asked.
            if rule.allow() && program.len() == 6 {
                return None;
            }
            program.extend(verdict(rule.allow()));
            return Some(program);
        }
        // From each condition that does not hold to behind the verdict.
        let length = conditions.len() + 2;
        for (at, mut instruction) in conditions.into_iter().enumerate() {
            if instruction.code == JUMP_UNLESS_EQUAL {
                instruction.offset = i16::try_from(length - at - 1).unwrap_or(i16::MAX);
            }
            program.push(instruction);
        }
        program.extend(verdict(rule.allow()));
    }
    program.extend(verdict(false));
    Some(program)
}

fn verdict(allow: bool) -> [Instruction; 2] {
    [instruction(SET, VERDICT, 0, 0, allow.into()), instruction(EXIT, 0, 0, 0, 0)]
}

/// What must hold for a rule to decide; nothing if it always does.
fn conditions(rule: &LinuxDeviceCgroup) -> Vec<Instruction> {
    let unless = |register, value| instruction(JUMP_UNLESS_EQUAL, register, 0, 0, value);
    let mut conditions = Vec::new();
    match rule.typ() {
        Some(LinuxDeviceType::B) => conditions.push(unless(TYPE, BLOCK)),
        Some(LinuxDeviceType::C | LinuxDeviceType::U) => conditions.push(unless(TYPE, CHARACTER)),
        _ => {}
    }
    let access = access(rule.access().as_deref());
    if access != EVERYTHING {
        // An allowing rule must cover all that is asked for.
        conditions.push(instruction(COPY, VERDICT, ACCESS, 0, 0));
        conditions.push(instruction(AND, VERDICT, 0, 0, EVERYTHING & !access));
        conditions.push(unless(VERDICT, 0));
    }
    for (register, number) in [(MAJOR, rule.major()), (MINOR, rule.minor())] {
        if let Some(number) = number.and_then(|n| i32::try_from(n).ok()).filter(|n| *n >= 0) {
            conditions.push(unless(register, number));
        }
    }
    conditions
}

fn access(text: Option<&str>) -> i32 {
    let Some(text) = text else { return EVERYTHING };
    [('m', 1), ('r', 2), ('w', 4)]
        .iter()
        .filter(|(c, _)| text.contains(*c))
        .map(|(_, bit)| bit)
        .sum()
}

/// Binds the processes in the v2 cgroup at `directory` and below to `rules`.
///
/// # Errors
/// The kernel's: BPF is missing, or the caller may not load programs.
pub fn apply(directory: &Path, rules: &[LinuxDeviceCgroup]) -> io::Result<()> {
    match program(rules) {
        Some(program) => sys::attach_device_program(directory, &program),
        None => Ok(()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::fs::{self, File, OpenOptions};
    use std::path::PathBuf;

    use super::*;
    use crate::spec::devices::cgroup_rules;

    /// What the kernel's interpreter does with the few instructions used here.
    fn ask(program: &[Instruction], typ: i32, access: i32, major: i32, minor: i32) -> bool {
        let mut registers = [0i32; 6];
        let mut at = 0;
        loop {
            let i = program[at];
            let (to, from) = (usize::from(i.registers & 15), usize::from(i.registers >> 4));
            at += 1;
            match i.code {
                LOAD_WORD => {
                    registers[to] = match i.offset {
                        0 => (access << 16) | typ,
                        4 => major,
                        _ => minor,
                    }
                }
                AND => registers[to] &= i.immediate,
                SHIFT_RIGHT => registers[to] >>= i.immediate,
                COPY => registers[to] = registers[from],
                SET => registers[to] = i.immediate,
                JUMP_UNLESS_EQUAL if registers[to] != i.immediate => at += i.offset as usize,
                JUMP_UNLESS_EQUAL => {}
                EXIT => return registers[0] == 1,
                other => unreachable!("{other:#x}"),
            }
        }
    }

    #[test]
    fn a_container_makes_any_node_and_uses_few() {
        let program = program(&cgroup_rules(&[], false).unwrap()).unwrap();
        for (typ, access, major, minor, allowed) in [
            (CHARACTER, 6, 1, 3, true),     // /dev/null
            (CHARACTER, 2, 1, 11, false),   // /dev/kmsg
            (CHARACTER, 1, 1, 11, true),    // its mknod
            (CHARACTER, 6, 136, 7, true),   // a terminal
            (BLOCK, 1, 8, 0, true),         // mknod of a disk
            (BLOCK, 2, 8, 0, false),        // reading it
            (BLOCK, 6, 1, 3, false),        // a number of the other kind
            (CHARACTER, 7, 10, 200, true),  // a tunnel
            (CHARACTER, 7, 10, 229, false), // FUSE
        ] {
            assert_eq!(ask(&program, typ, access, major, minor), allowed, "{typ} {major}:{minor}");
        }
    }

    #[test]
    fn privileged_containers_have_no_program() {
        assert_eq!(program(&cgroup_rules(&[], true).unwrap()), None);
    }

    /// A cgroup of the unified hierarchy, wherever it is mounted and whatever controllers it has.
    fn unified() -> PathBuf {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let line = mounts.lines().find(|line| line.contains(" - cgroup2 ")).unwrap();
        line.split(' ').nth(4).unwrap().into()
    }

    #[test]
    fn the_kernel_denies_what_the_rules_do() {
        let root = unified();
        let own = fs::read_to_string("/proc/self/cgroup").unwrap();
        let own = own.lines().find_map(|line| line.strip_prefix("0::/")).unwrap().to_owned();
        let cgroup = root.join(format!("longshore-test-devices-{}", std::process::id()));
        fs::create_dir(&cgroup).unwrap();
        apply(&cgroup, &cgroup_rules(&[], false).unwrap()).unwrap();
        let pid = std::process::id().to_string();
        fs::write(cgroup.join("cgroup.procs"), &pid).unwrap();
        let null = OpenOptions::new().write(true).open("/dev/null");
        let denied = File::open("/dev/kmsg");
        fs::write(root.join(own).join("cgroup.procs"), &pid).unwrap();
        let allowed_again = File::open("/dev/kmsg");
        fs::remove_dir(&cgroup).unwrap();
        null.unwrap();
        assert_eq!(denied.unwrap_err().raw_os_error(), Some(libc::EPERM));
        allowed_again.unwrap();
    }
}
