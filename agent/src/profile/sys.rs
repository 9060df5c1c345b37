//! Sampling one thread by perf_event_open(2): numbers and layouts of `linux/perf_event.h`.

#![allow(
    unsafe_code,
    reason = "a system call without a wrapper and the ring it shares with the kernel"
)]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// PERF_TYPE_SOFTWARE with PERF_COUNT_SW_CPU_CLOCK: the time that the thread runs.
const SOFTWARE: u32 = 1;
const CPU_CLOCK: u64 = 0;
/// PERF_SAMPLE_REGS_USER | PERF_SAMPLE_STACK_USER.
const SAMPLE_TYPE: u64 = 1 << 12 | 1 << 13;
/// `exclude_kernel` of the flags.
const EXCLUDE_KERNEL: u64 = 1 << 5;
/// PERF_FLAG_FD_CLOEXEC.
const CLOEXEC: libc::c_ulong = 8;
/// PERF_ATTR_SIZE_VER5, the last field of which is `sample_max_stack`.
const ATTR_SIZE: usize = 112;
/// PERF_RECORD_LOST, PERF_RECORD_SAMPLE.
const LOST: u32 = 2;
const SAMPLE: u32 = 9;
/// Where `data_head` and `data_tail` are in the ring's first page.
const HEAD: usize = 1024;
const TAIL: usize = 1032;
/// How much of a stack is copied, a multiple of eight.
const STACK: u32 = 16 << 10;
/// The ring beside its first page; a power of two of pages, whatever their size up to 64 KiB.
const RING: usize = 128 << 10;

/// Registers that unwinding begins with.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Registers {
    pub(super) pc: u64,
    pub(super) sp: u64,
    pub(super) fp: u64,
    /// The link register where there is one.
    #[cfg_attr(target_arch = "x86_64", expect(dead_code, reason = "none on this processor"))]
    pub(super) lr: u64,
}

/// PERF_REG_X86_{BP,SP,IP}.
#[cfg(target_arch = "x86_64")]
const REGISTERS: u64 = 1 << 6 | 1 << 7 | 1 << 8;
/// PERF_REG_ARM64_{X29,LR,SP,PC}.
#[cfg(target_arch = "aarch64")]
const REGISTERS: u64 = 1 << 29 | 1 << 30 | 1 << 31 | 1 << 32;

#[cfg(target_arch = "x86_64")]
fn registers(values: &[u64]) -> Option<Registers> {
    let [fp, sp, pc] = *values else { return None };
    Some(Registers { pc, sp, fp, lr: 0 })
}

#[cfg(target_arch = "aarch64")]
fn registers(values: &[u64]) -> Option<Registers> {
    let [fp, lr, sp, pc] = *values else { return None };
    Some(Registers { pc, sp, fp, lr })
}

/// A sample: registers, and the stack from `sp` up.
#[derive(Debug)]
pub(super) struct Sample {
    pub(super) registers: Registers,
    pub(super) stack: Vec<u64>,
}

/// What the ring holds.
pub(super) enum Raw {
    Sample(Sample),
    /// So many did not fit.
    Lost(u64),
}

/// A thread's samples.
pub(super) struct Ring {
    memory: NonNull<libc::c_void>,
    size: usize,
    page: usize,
    // Closed after the memory is unmapped.
    _event: OwnedFd,
}

// SAFETY: the memory belongs to this value alone; the kernel shares it whatever thread reads it.
unsafe impl Send for Ring {}

impl Ring {
    /// Begins to sample `thread`; where the kernel's own time may not be seen, without it.
    pub(super) fn open(thread: i32, period: Duration) -> io::Result<Self> {
        let event = event(thread, period, 0).or_else(|error| match error.raw_os_error() {
            Some(libc::EACCES | libc::EPERM) => event(thread, period, EXCLUDE_KERNEL),
            _ => Err(error),
        })?;
        let page = procfs::page_size() as usize;
        let size = page + RING;
        // SAFETY: a new mapping of a descriptor that is open, at a place of the kernel's choice.
        let memory = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                event.as_raw_fd(),
                0,
            )
        };
        if memory == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let memory = NonNull::new(memory).ok_or_else(|| io::Error::other("mapped at zero"))?;
        Ok(Self { memory, size, page, _event: event })
    }

    fn counter(&self, at: usize) -> &AtomicU64 {
        // SAFETY: both offsets are eight-aligned and within the first page, which lives as long as
        // `self`; the kernel reads and writes them as whole words.
        unsafe { &*self.memory.as_ptr().cast::<u8>().add(at).cast::<AtomicU64>() }
    }

    /// The word at `position` of the stream of records. The kernel writes none between tail and head.
    fn word(&self, position: u64) -> u64 {
        let at = self.page + ((position % RING as u64) as usize & !7);
        // SAFETY: eight-aligned and within the mapping.
        unsafe { self.memory.as_ptr().cast::<u8>().add(at).cast::<u64>().read_volatile() }
    }

    /// Takes all that the ring holds.
    pub(super) fn drain(&mut self, mut each: impl FnMut(Raw)) {
        let head = self.counter(HEAD).load(Ordering::Acquire);
        let mut tail = self.counter(TAIL).load(Ordering::Relaxed);
        while tail < head {
            // type: u32, misc: u16, size: u16.
            let header = self.word(tail);
            let (kind, size) = (header.to_le() as u32, header.to_le() >> 48);
            if size < 8 || size > head - tail {
                break;
            }
            let words: Vec<u64> =
                (tail + 8..tail + size).step_by(8).map(|at| self.word(at)).collect();
            match kind {
                LOST => each(Raw::Lost(words.get(1).copied().unwrap_or(1))),
                SAMPLE => {
                    if let Some(sample) = sample(&words) {
                        each(Raw::Sample(sample));
                    }
                }
                _ => {}
            }
            tail += size;
        }
        self.counter(TAIL).store(head, Ordering::Release);
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: what `open` mapped, and nothing refers to it any more.
        unsafe { libc::munmap(self.memory.as_ptr(), self.size) };
    }
}

/// A record's body: abi, registers, size, stack, size that was there. `None` for a thread without
/// a user's side.
fn sample(words: &[u64]) -> Option<Sample> {
    let (abi, rest) = words.split_first()?;
    if *abi == 0 {
        return None;
    }
    let (values, rest) = rest.split_at_checked(REGISTERS.count_ones() as usize)?;
    let registers = registers(values)?;
    let (size, rest) = rest.split_first()?;
    let (stack, there) = rest.split_at_checked((*size / 8) as usize)?;
    let there = there.first().map_or(0, |there| (*there / 8) as usize);
    Some(Sample { registers, stack: stack.get(..there).unwrap_or(stack).to_vec() })
}

fn event(thread: i32, period: Duration, flags: u64) -> io::Result<OwnedFd> {
    let mut attr = [0_u64; ATTR_SIZE / 8];
    // type: u32, size: u32; config; sample_period; sample_type; read_format; flags; ...
    attr[0] = both(SOFTWARE, ATTR_SIZE as u32);
    attr[1] = CPU_CLOCK;
    attr[2] = period.as_nanos() as u64;
    attr[3] = SAMPLE_TYPE;
    attr[5] = flags;
    attr[10] = REGISTERS;
    // sample_stack_user: u32, clockid: i32.
    attr[11] = both(STACK, 0);
    // SAFETY: the structure is as large as it says and outlives the call; the result is a new
    // descriptor or an error.
    unsafe {
        let (any_cpu, no_group) = (-1, -1);
        let made = libc::syscall(
            libc::SYS_perf_event_open,
            attr.as_ptr(),
            thread,
            any_cpu,
            no_group,
            CLOEXEC,
        );
        if made < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(OwnedFd::from_raw_fd(made as i32))
    }
}

/// Two neighbours of 32 bits as one word in memory.
fn both(first: u32, second: u32) -> u64 {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&first.to_ne_bytes());
    bytes[4..].copy_from_slice(&second.to_ne_bytes());
    u64::from_ne_bytes(bytes)
}
