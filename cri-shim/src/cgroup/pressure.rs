//! Pressure stall information (PSI): how long a cgroup's tasks waited for CPU, memory or I/O.
//!
//! The unified hierarchy (v2) has it, unless the kernel was started with `psi=0`; v1 has none.

use std::fs;
use std::path::Path;

use super::Hierarchies;

/// Stalls for one resource.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Pressure {
    /// At least one task waited.
    pub some: Stall,
    /// All tasks that were not idle waited. Kernels before 5.13 have none for CPU.
    pub full: Stall,
}

/// How long, in total and of the time just passed.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Stall {
    /// Microseconds since the cgroup was made.
    pub total: u64,
    /// Percent of the last 10, 60 and 300 seconds.
    pub avg10: f64,
    pub avg60: f64,
    pub avg300: f64,
}

/// The pressure on `resource` (`cpu`, `memory`, `io`) in a cgroup; `None` where the kernel has none.
pub fn read(cgroups: &Hierarchies, cgroup: &Path, resource: &str) -> Option<Pressure> {
    if !cgroups.v2 {
        return None;
    }
    let file = cgroups.controller("", cgroup).join(format!("{resource}.pressure"));
    parse(&fs::read_to_string(file).ok()?)
}

/// Parses `some avg10=0.00 avg60=0.00 avg300=0.00 total=0` and the same of `full`.
pub fn parse(text: &str) -> Option<Pressure> {
    let stall = |kind: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(kind))?;
        let mut stall = Stall::default();
        for (name, value) in line.split_whitespace().filter_map(|pair| pair.split_once('=')) {
            match name {
                "total" => stall.total = value.parse().ok()?,
                "avg10" => stall.avg10 = value.parse().ok()?,
                "avg60" => stall.avg60 = value.parse().ok()?,
                "avg300" => stall.avg300 = value.parse().ok()?,
                _ => {}
            }
        }
        Some(stall)
    };
    Some(Pressure { some: stall("some ")?, full: stall("full ").unwrap_or_default() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_lines_are_read_and_a_missing_one_is_zero() {
        let some = "some avg10=1.50 avg60=0.25 avg300=0.05 total=1234\n";
        let full = "full avg10=0.50 avg60=0.00 avg300=0.00 total=34\n";
        let some_stall = Stall { total: 1234, avg10: 1.5, avg60: 0.25, avg300: 0.05 };
        let full_stall = Stall { total: 34, avg10: 0.5, ..Stall::default() };
        assert_eq!(
            parse(&format!("{some}{full}")),
            Some(Pressure { some: some_stall.clone(), full: full_stall })
        );
        assert_eq!(parse(some), Some(Pressure { some: some_stall, full: Stall::default() }));
        assert_eq!(parse(""), None);
        assert_eq!(parse("some avg10=x"), None);
    }
}
