//! What benchmarks read of a node: times, and the memory and CPU of a stack's processes.

use std::time::Duration;

use super::Node;
use super::command::{command_line, processes_of};

/// The median, in milliseconds.
///
/// # Panics
/// Without a sample.
pub fn p50(mut times: Vec<Duration>) -> f64 {
    times.sort();
    times[times.len() / 2].as_secs_f64() * 1e3
}

/// The processes of a node whose programs' names start with one of `stack`, and those that hold a
/// sandbox for a runtime that needs one.
pub fn stack_pids(node: &Node, stack: &[&str]) -> Vec<u32> {
    processes_of(node.init_pid())
        .into_iter()
        .filter(|pid| {
            let program = std::fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
            let name = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
            // The sandbox's own process, not a sleep of a container.
            let pause = command_line(*pid).starts_with("sleep 1000000000");
            pause || stack.iter().any(|s| name.starts_with(s))
        })
        .collect()
}

/// CPU time that they used so far, in seconds.
pub fn cpu_seconds(node: &Node, stack: &[&str]) -> f64 {
    stack_pids(node, stack)
        .into_iter()
        .map(|pid| {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            let rest = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
            let ticks = |n: usize| {
                rest.split_whitespace().nth(n).and_then(|t| t.parse::<f64>().ok()).unwrap_or(0.0)
            };
            (ticks(11) + ticks(12)) / 100.0
        })
        .sum()
}

/// Their memory, what is shared counted by share (PSS), in MiB.
pub fn pss_megabytes(node: &Node, stack: &[&str]) -> f64 {
    kilobytes(node, stack, "Pss:") / 1024.0
}

/// What they hold in memory that no file has, in KiB: the program's text comes and goes by itself.
pub fn anonymous_kilobytes(node: &Node, stack: &[&str]) -> f64 {
    kilobytes(node, stack, "Pss_Anon:")
}

fn kilobytes(node: &Node, stack: &[&str], field: &str) -> f64 {
    stack_pids(node, stack)
        .into_iter()
        .map(|pid| {
            let text =
                std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
            text.lines()
                .find_map(|l| l.strip_prefix(field)?.split_whitespace().next()?.parse::<f64>().ok())
                .unwrap_or(0.0)
        })
        .sum()
}
