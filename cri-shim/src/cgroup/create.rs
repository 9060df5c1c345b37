//! Making a container's cgroups with their limits, before its process is in them.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType, LinuxResources};

use super::{CONTROLLERS, Hierarchies, devices, limits};

/// The v2 controllers that containers are given where the node has them.
const V2_CONTROLLERS: [&str; 6] = ["cpu", "cpuset", "hugetlb", "io", "memory", "pids"];

/// Makes `cgroup` in every hierarchy, sets its limits, and bounds its devices.
///
/// # Errors
/// With the file or directory concerned.
pub fn create(cgroups: &Hierarchies, cgroup: &Path, resources: &LinuxResources) -> io::Result<()> {
    let rules = resources.devices().as_deref().unwrap_or_default();
    if cgroups.v2 {
        let directory = make_v2(cgroups, cgroup)?;
        devices::apply(&directory, rules)
            .map_err(|e| explained("restricting the devices of", &directory, &e))?;
    } else {
        make_v1(cgroups, cgroup)?;
        restrict_v1(&cgroups.controller("devices", cgroup), rules)?;
    }
    limits::apply(cgroups, cgroup, resources)
}

/// Makes `cgroup` in every hierarchy, without any limit.
///
/// # Errors
/// With the directory concerned.
pub fn make(cgroups: &Hierarchies, cgroup: &Path) -> io::Result<()> {
    if cgroups.v2 { make_v2(cgroups, cgroup).map(|_| ()) } else { make_v1(cgroups, cgroup) }
}

fn explained(what: &str, path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{what} {}: {error}", path.display()))
}

fn make_v2(cgroups: &Hierarchies, cgroup: &Path) -> io::Result<PathBuf> {
    let directory = cgroups.controller("", cgroup);
    let parent = directory.parent().unwrap_or(&directory);
    fs::create_dir_all(parent).map_err(|e| explained("making", parent, &e))?;
    // From the root down, as a controller comes only from above.
    let mut above: Vec<&Path> =
        parent.ancestors().take_while(|path| path.starts_with(super::ROOT)).collect();
    above.reverse();
    for level in above {
        enable(level).map_err(|e| explained("enabling the controllers of", level, &e))?;
    }
    match fs::create_dir(&directory) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
            Err(explained("making", &directory, &e))
        }
        _ => Ok(directory),
    }
}

/// Gives the children of a cgroup the controllers that it has itself.
fn enable(level: &Path) -> io::Result<()> {
    let read = |file: &str| fs::read_to_string(level.join(file));
    let (has, gives) = (read("cgroup.controllers")?, read("cgroup.subtree_control")?);
    let named = |text: &str, name: &str| text.split_whitespace().any(|word| word == name);
    let missing: Vec<String> = V2_CONTROLLERS
        .iter()
        .filter(|name| named(&has, name) && !named(&gives, name))
        .map(|name| format!("+{name}"))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    fs::write(level.join("cgroup.subtree_control"), missing.join(" "))
}

fn make_v1(cgroups: &Hierarchies, cgroup: &Path) -> io::Result<()> {
    let relative = cgroup.strip_prefix("/").unwrap_or(cgroup);
    for root in &cgroups.roots {
        let name = root.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let parts: Vec<&str> = name.split(',').collect();
        if !parts.iter().any(|part| CONTROLLERS.contains(part)) {
            continue;
        }
        let directory = root.join(relative);
        fs::create_dir_all(&directory).map_err(|e| explained("making", &directory, &e))?;
        if parts.contains(&"cpuset") {
            fill_cpuset(root, relative)?;
        }
    }
    Ok(())
}

/// A new cpuset is empty and takes nobody: what is empty takes over what its parent has.
fn fill_cpuset(root: &Path, relative: &Path) -> io::Result<()> {
    let mut directory = root.to_path_buf();
    for part in relative.components() {
        let parent = directory.clone();
        directory.push(part);
        for file in ["cpuset.cpus", "cpuset.mems"] {
            let path = directory.join(file);
            let has = fs::read_to_string(&path).map_err(|e| explained("reading", &path, &e))?;
            if has.trim().is_empty() {
                let given = fs::read_to_string(parent.join(file))?;
                fs::write(&path, given.trim()).map_err(|e| explained("filling", &path, &e))?;
            }
        }
    }
    Ok(())
}

/// The rules one after the other, as the kernel takes them (Documentation/admin-guide/cgroup-v1/
/// devices.rst).
fn restrict_v1(directory: &Path, rules: &[LinuxDeviceCgroup]) -> io::Result<()> {
    for rule in rules {
        let file = directory.join(if rule.allow() { "devices.allow" } else { "devices.deny" });
        let text = v1_rule(rule);
        fs::write(&file, &text)
            .map_err(|e| explained(&format!("writing {text:?} to"), &file, &e))?;
    }
    Ok(())
}

fn v1_rule(rule: &LinuxDeviceCgroup) -> String {
    let kind = match rule.typ() {
        Some(LinuxDeviceType::B) => 'b',
        Some(LinuxDeviceType::C | LinuxDeviceType::U) => 'c',
        _ => return "a".to_owned(),
    };
    let number = |n: Option<i64>| n.filter(|n| *n >= 0).map_or("*".to_owned(), |n| n.to_string());
    let access = rule.access().as_deref().unwrap_or("rwm");
    format!("{kind} {}:{} {access}", number(rule.major()), number(rule.minor()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::spec::devices::cgroup_rules;

    #[test]
    fn device_rules_in_v1s_words() {
        let words = |privileged| -> Vec<String> {
            cgroup_rules(&[], privileged).unwrap().iter().map(v1_rule).collect()
        };
        assert_eq!(words(true), ["a"]);
        assert_eq!(words(false)[..4], ["a", "c *:* m", "b *:* m", "c 1:3 rwm"]);
        assert!(words(false).contains(&"c 136:* rwm".to_owned()));
    }
}
