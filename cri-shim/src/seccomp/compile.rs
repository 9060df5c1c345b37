//! A profile of the OCI runtime spec (config-linux.md, "Seccomp") to a program, by libseccomp.

use std::collections::HashSet;
use std::io::{self, Read, Seek};

use libseccomp::{
    ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall,
};
use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag,
    LinuxSeccompOperator,
};

use super::Program;

/// Why a profile has no program.
#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    /// Nobody would answer the notifications.
    #[error("the seccomp profile uses SCMP_ACT_NOTIFY, which this runtime does not support")]
    Notify,
    /// An error number that is none.
    #[error("the seccomp profile has the error number {0}, which is out of range")]
    Errno(u32),
    /// libseccomp's word.
    #[error("compiling the seccomp profile: {0}; check its architectures and arguments")]
    Library(#[from] libseccomp::error::SeccompError),
    /// The program could not be kept.
    #[error("keeping the seccomp program: {0}")]
    Io(#[from] io::Error),
}

// linux/seccomp.h: SECCOMP_FILTER_FLAG_*.
const LOG: u32 = 1 << 1;
const SPEC_ALLOW: u32 = 1 << 2;

/// A binary tree over the numbers of system calls instead of a list, so that none is late.
const BINARY_TREE: u32 = 2;

/// Compiles a profile. System calls that libseccomp does not know are skipped: a profile serves
/// newer and older machines.
///
/// # Errors
/// [`SeccompError`], for a profile that asks for what cannot be had.
pub fn compile(profile: &LinuxSeccomp) -> Result<Program, SeccompError> {
    let default = action(profile.default_action(), profile.default_errno_ret())?;
    let mut filter = ScmpFilterContext::new(default)?;
    filter.set_ctl_optimize(BINARY_TREE)?;
    for arch in profile.architectures().iter().flatten() {
        filter.add_arch(architecture(*arch))?;
    }
    for rule in profile.syscalls().iter().flatten() {
        let action = action(rule.action(), rule.errno_ret())?;
        if action == default {
            continue;
        }
        let conditions: Vec<_> = rule.args().iter().flatten().map(condition).collect();
        let arguments: HashSet<_> = rule.args().iter().flatten().map(|a| a.index()).collect();
        for name in rule.names() {
            let Ok(call) = ScmpSyscall::from_name(name) else { continue };
            if arguments.len() == conditions.len() {
                filter.add_rule_conditional(action, call, &conditions)?;
                continue;
            }
            // libseccomp takes one condition an argument in a rule; runc makes rules of the others.
            for condition in &conditions {
                filter.add_rule_conditional(action, call, std::slice::from_ref(condition))?;
            }
        }
    }
    let flags = profile.flags().iter().flatten().fold(0, |flags, flag| match flag {
        LinuxSeccompFilterFlag::SeccompFilterFlagLog => flags | LOG,
        LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => flags | SPEC_ALLOW,
        // For threads, and for notifications: the process that loads it has neither.
        LinuxSeccompFilterFlag::SeccompFilterFlagTsync
        | LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => flags,
    });
    let mut file = tempfile::tempfile()?;
    filter.export_bpf(&file)?;
    let mut instructions = Vec::new();
    file.rewind()?;
    file.read_to_end(&mut instructions)?;
    Ok(Program { flags, instructions })
}

fn action(action: LinuxSeccompAction, errno: Option<u32>) -> Result<ScmpAction, SeccompError> {
    let errno = errno.unwrap_or(libc::EPERM as u32);
    let small = i16::try_from(errno).map_err(|_| SeccompError::Errno(errno))?;
    Ok(match action {
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => {
            ScmpAction::KillThread
        }
        LinuxSeccompAction::ScmpActKillProcess => ScmpAction::KillProcess,
        LinuxSeccompAction::ScmpActTrap => ScmpAction::Trap,
        LinuxSeccompAction::ScmpActErrno => ScmpAction::Errno(small.into()),
        LinuxSeccompAction::ScmpActTrace => ScmpAction::Trace(errno as u16),
        LinuxSeccompAction::ScmpActAllow => ScmpAction::Allow,
        LinuxSeccompAction::ScmpActLog => ScmpAction::Log,
        LinuxSeccompAction::ScmpActNotify => return Err(SeccompError::Notify),
    })
}

fn condition(arg: &LinuxSeccompArg) -> ScmpArgCompare {
    let (value, second) = (arg.value(), arg.value_two().unwrap_or(0));
    let (operator, value) = match arg.op() {
        LinuxSeccompOperator::ScmpCmpNe => (ScmpCompareOp::NotEqual, value),
        LinuxSeccompOperator::ScmpCmpLt => (ScmpCompareOp::Less, value),
        LinuxSeccompOperator::ScmpCmpLe => (ScmpCompareOp::LessOrEqual, value),
        LinuxSeccompOperator::ScmpCmpEq => (ScmpCompareOp::Equal, value),
        LinuxSeccompOperator::ScmpCmpGe => (ScmpCompareOp::GreaterEqual, value),
        LinuxSeccompOperator::ScmpCmpGt => (ScmpCompareOp::Greater, value),
        // The spec's value is the mask, its second the datum (seccomp_rule_add(3)).
        LinuxSeccompOperator::ScmpCmpMaskedEq => (ScmpCompareOp::MaskedEqual(value), second),
    };
    ScmpArgCompare::new(arg.index() as u32, operator, value)
}

fn architecture(arch: Arch) -> ScmpArch {
    match arch {
        Arch::ScmpArchNative => ScmpArch::Native,
        Arch::ScmpArchX86 => ScmpArch::X86,
        Arch::ScmpArchX86_64 => ScmpArch::X8664,
        Arch::ScmpArchX32 => ScmpArch::X32,
        Arch::ScmpArchArm => ScmpArch::Arm,
        Arch::ScmpArchAarch64 => ScmpArch::Aarch64,
        Arch::ScmpArchMips => ScmpArch::Mips,
        Arch::ScmpArchMips64 => ScmpArch::Mips64,
        Arch::ScmpArchMips64n32 => ScmpArch::Mips64N32,
        Arch::ScmpArchMipsel => ScmpArch::Mipsel,
        Arch::ScmpArchMipsel64 => ScmpArch::Mipsel64,
        Arch::ScmpArchMipsel64n32 => ScmpArch::Mipsel64N32,
        Arch::ScmpArchPpc => ScmpArch::Ppc,
        Arch::ScmpArchPpc64 => ScmpArch::Ppc64,
        Arch::ScmpArchPpc64le => ScmpArch::Ppc64Le,
        Arch::ScmpArchS390 => ScmpArch::S390,
        Arch::ScmpArchS390x => ScmpArch::S390X,
        Arch::ScmpArchRiscv64 => ScmpArch::Riscv64,
        Arch::ScmpArchParisc => ScmpArch::Parisc,
        Arch::ScmpArchParisc64 => ScmpArch::Parisc64,
        Arch::ScmpArchLoongarch64 => ScmpArch::Loongarch64,
        Arch::ScmpArchM68k => ScmpArch::M68k,
        Arch::ScmpArchSh => ScmpArch::Sh,
        Arch::ScmpArchSheb => ScmpArch::Sheb,
    }
}
