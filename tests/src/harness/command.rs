//! Running the host's tools, with errors that say what was run and what it said.

use std::process::{Command, Output};

use anyhow::{Context as _, Result, bail};

/// Runs a command line (no quoting: split at white space).
///
/// # Errors
/// When it cannot be started or fails.
pub fn run(line: &str) -> Result<String> {
    let words: Vec<&str> = line.split_whitespace().collect();
    run_words(&words)
}

/// Runs a command given word by word.
///
/// # Errors
/// When it cannot be started or fails.
pub fn run_words(words: &[&str]) -> Result<String> {
    let (program, arguments) = words.split_first().context("an empty command")?;
    let output = Command::new(program)
        .args(arguments)
        .output()
        .with_context(|| format!("start {program}: is it installed?"))?;
    checked(&words.join(" "), &output)
}

/// The standard output of a command that must have succeeded.
///
/// # Errors
/// With its standard error, when it did not.
pub fn checked(what: &str, output: &Output) -> Result<String> {
    if !output.status.success() {
        bail!(
            "{what}: {}: {}{}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim(),
            String::from_utf8_lossy(&output.stdout).trim(),
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Every process in the PID namespace of `init` or in one below it, whoever started it; not `init`
/// itself.
pub fn processes_of(init: u32) -> Vec<u32> {
    let namespace = |pid: u32| std::fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
    let Some(own) = namespace(init) else { return Vec::new() };
    let mut found: std::collections::BTreeSet<u32> =
        all_processes().into_iter().filter(|pid| namespace(*pid).as_ref() == Some(&own)).collect();
    for pid in found.clone() {
        found.extend(descendants(pid));
    }
    found.remove(&init);
    found.into_iter().collect()
}

fn all_processes() -> Vec<u32> {
    std::fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect()
}

/// Every process below `root` (not itself), by the parent links of /proc.
pub fn descendants(root: u32) -> Vec<u32> {
    let parents: Vec<(u32, u32)> =
        all_processes().into_iter().filter_map(|pid| Some((pid, parent_of(pid)?))).collect();
    let mut found = vec![root];
    let mut at = 0;
    while let Some(parent) = found.get(at).copied() {
        found.extend(parents.iter().filter(|(_, p)| *p == parent).map(|(pid, _)| *pid));
        at += 1;
    }
    found.remove(0);
    found
}

/// The parent of a process.
pub fn parent_of(pid: u32) -> Option<u32> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command, in parentheses, may hold anything.
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(1)?.parse().ok()
}

/// The command line of a process, for messages.
pub fn command_line(pid: u32) -> String {
    let raw = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&raw).replace('\0', " ").trim().to_owned()
}
