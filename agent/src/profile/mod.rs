//! Profiles of this process's CPU time, in the form that `go tool pprof` reads.
//!
//! The kernel takes the samples (perf_event_open(2)): it copies each running thread's registers and
//! the top of its stack into a ring, and the stack is unwound afterwards, from `.eh_frame`. No signal
//! interrupts a system call and nothing unwinds inside a handler, where a lock that the interrupted
//! thread holds would be the end of the node. Nothing is set up, read or kept until a profile is asked for.

mod image;
mod pprof;
mod sys;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, TryLockError};
use std::time::{Duration, Instant};

use self::image::Images;
pub use self::image::symbolize;
use self::sys::{Raw, Ring};

/// Time between two samples of a running thread: Go's 100 a second.
const PERIOD: Duration = Duration::from_millis(10);
/// How often the rings are emptied; each holds seven samples.
const DRAIN: Duration = Duration::from_millis(25);
/// Threads that are sampled, 128 KiB of ring each.
const THREADS: usize = 256;
/// Stacks that are told apart; what is beyond is counted without a stack.
const STACKS: usize = 65_536;

/// Why there is no profile.
#[derive(Debug, thiserror::Error)]
pub enum ProfileError {
    /// As Go says it.
    #[error("Could not enable CPU profiling: cpu profiling already in use")]
    InUse,
    /// The kernel does not take samples.
    #[error(
        "Could not enable CPU profiling: perf_event_open: {0}; it needs CAP_PERFMON or \
         CAP_SYS_ADMIN and a kernel with CONFIG_PERF_EVENTS"
    )]
    Refused(std::io::Error),
    /// `/proc` cannot be read.
    #[error("Could not enable CPU profiling: read /proc/self: {0}")]
    Proc(String),
}

/// A stack, innermost address first, and the thread it was seen on.
type Stack = (String, Vec<u64>);

/// What was counted.
#[derive(Default)]
struct Counted {
    stacks: BTreeMap<Stack, u64>,
    lost: u64,
}

impl Counted {
    fn add(&mut self, stack: Stack) {
        if self.stacks.len() >= STACKS && !self.stacks.contains_key(&stack) {
            *self.stacks.entry((stack.0, Vec::new())).or_default() += 1;
        } else {
            *self.stacks.entry(stack).or_default() += 1;
        }
    }
}

/// The CPU time of all threads for `duration`, or until `stop`: pprof's protobuf in gzip. Blocking;
/// one at a time.
pub fn cpu(duration: Duration, stop: &AtomicBool) -> Result<Vec<u8>, ProfileError> {
    static ONE: Mutex<()> = Mutex::new(());
    let _one = match ONE.try_lock() {
        Ok(guard) => guard,
        Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
        Err(TryLockError::WouldBlock) => return Err(ProfileError::InUse),
    };
    // Reading the tables takes its time, which is not the profile's.
    let mut images = Images::load().map_err(ProfileError::Proc)?;
    let (started, began) = (jiff::Timestamp::now(), Instant::now());
    let mut threads = Threads::default();
    let mut counted = Counted::default();
    threads.look()?;
    let mut round = 0_u32;
    loop {
        let left = duration.saturating_sub(began.elapsed());
        if left.is_zero() || stop.load(Ordering::Relaxed) {
            break;
        }
        std::thread::park_timeout(left.min(DRAIN));
        threads.drain(&mut images, &mut counted);
        round += 1;
        if round.is_multiple_of(4) {
            threads.look()?;
        }
    }
    drop(threads);
    let body = pprof::encode(&counted, &images, started.as_nanosecond(), began.elapsed(), PERIOD);
    drop((images, counted));
    crate::sys::release_memory();
    Ok(body)
}

/// The threads that are sampled.
#[derive(Default)]
struct Threads {
    rings: BTreeMap<i32, (String, Ring)>,
}

impl Threads {
    /// Finds threads that are new; those that have ended are let go by `drain`.
    fn look(&mut self) -> Result<(), ProfileError> {
        let me = nix::unistd::gettid().as_raw();
        let listed = std::fs::read_dir("/proc/self/task")
            .map_err(|error| ProfileError::Proc(error.to_string()))?;
        let listed: BTreeSet<i32> = listed
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .filter(|thread| *thread != me)
            .collect();
        self.rings.retain(|thread, _| listed.contains(thread));
        for thread in listed {
            if self.rings.len() >= THREADS || self.rings.contains_key(&thread) {
                continue;
            }
            match Ring::open(thread, PERIOD) {
                Ok(ring) => {
                    self.rings.insert(thread, (name(thread), ring));
                }
                // It has ended meanwhile.
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
                Err(error) => return Err(ProfileError::Refused(error)),
            }
        }
        Ok(())
    }

    fn drain(&mut self, images: &mut Images, counted: &mut Counted) {
        for (name, ring) in self.rings.values_mut() {
            ring.drain(|raw| match raw {
                Raw::Lost(count) => counted.lost += count,
                Raw::Sample(sample) => counted.add((name.clone(), images.unwind(&sample))),
            });
        }
    }
}

/// What a thread is called.
fn name(thread: i32) -> String {
    let read = std::fs::read_to_string(format!("/proc/self/task/{thread}/comm"));
    read.map(|name| name.trim_end().to_owned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[inline(never)]
    fn burn_for_the_profile(stop: &AtomicBool) -> u64 {
        let mut sum = 0_u64;
        while !stop.load(Ordering::Relaxed) {
            for number in 0..10_000_u64 {
                sum = std::hint::black_box(sum.wrapping_mul(31).wrapping_add(number));
            }
        }
        sum
    }

    #[test]
    fn a_busy_function_is_found_with_its_callers_and_one_profile_is_taken_at_a_time() {
        let stop = AtomicBool::new(false);
        let (second, profile) = std::thread::scope(|scope| {
            let spinning = std::thread::Builder::new().name("spinner".into());
            spinning.spawn_scoped(scope, || burn_for_the_profile(&stop)).unwrap();
            let never = AtomicBool::new(false);
            let taken = scope.spawn(move || {
                loop {
                    match cpu(Duration::from_secs(3), &never) {
                        // The test's second one was first.
                        Err(ProfileError::InUse) => std::thread::yield_now(),
                        taken => break taken,
                    }
                }
            });
            // The second is refused while the first is under way.
            let second = loop {
                match cpu(Duration::ZERO, &AtomicBool::new(true)) {
                    Err(error) => break error,
                    Ok(_) => std::thread::park_timeout(Duration::from_millis(50)),
                }
            };
            let taken = taken.join();
            stop.store(true, Ordering::Relaxed);
            (second, taken)
        });
        assert!(matches!(second, ProfileError::InUse), "{second}");
        let profile = pprof::read(&profile.unwrap().unwrap());
        let found = profile.stacks.iter().find(|(thread, names, _)| {
            thread == "spinner" && names.iter().any(|name| name.contains("burn_for_the_profile"))
        });
        let (_, names, _) = found.unwrap_or_else(|| panic!("not there: {:?}", profile.stacks));
        assert!(names.len() > 4, "with its callers: {names:?}");
        assert!(
            names.iter().any(|name| name.contains("thread")),
            "down to the thread's beginning: {names:?}"
        );
        assert_eq!(profile.types, [("samples", "count"), ("cpu", "nanoseconds")].map(own));
        assert_eq!(profile.period, PERIOD.as_nanos() as i64);
        for (_, _, values) in &profile.stacks {
            assert_eq!(values[1], values[0] * profile.period);
        }
    }

    fn own((a, b): (&str, &str)) -> (String, String) {
        (a.to_owned(), b.to_owned())
    }

    #[test]
    fn stacks_beyond_the_bound_are_counted_together() {
        let mut counted = Counted::default();
        for address in 0..STACKS as u64 + 10 {
            counted.add(("t".into(), vec![address]));
        }
        counted.add(("t".into(), vec![1]));
        assert_eq!(counted.stacks.len(), STACKS + 1);
        assert_eq!(counted.stacks[&("t".to_owned(), vec![])], 10);
        assert_eq!(counted.stacks[&("t".to_owned(), vec![1])], 2);
    }

    #[test]
    fn addresses_have_names() {
        let address = burn_for_the_profile as fn(&AtomicBool) -> u64 as usize as u64;
        let named = symbolize(&[address, 1]).unwrap();
        assert!(named[0].as_deref().unwrap().contains("burn_for_the_profile"), "{named:?}");
        assert_eq!(named[1], None);
    }
}
