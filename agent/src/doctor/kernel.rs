//! The kernel: its version, and the features that containers and Services are made of.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use super::Finding;

const CHECK: &str = "kernel";
/// `openat2`, `clone3`, `pidfd`: without them nothing runs.
const OLDEST: (u32, u32) = (5, 6);

/// What the kernel shows of itself.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// `uname -r`.
    pub release: String,
    /// Names in /proc/filesystems.
    pub filesystems: BTreeSet<String>,
    /// Names of modules that are loaded, built in, or lie in /lib/modules.
    pub modules: BTreeSet<String>,
    /// Whether the modules of the running kernel can be listed at all.
    pub modules_known: bool,
    /// `actions_avail` of seccomp is there.
    pub seccomp: bool,
    /// net.ipv4.ip_forward.
    pub ip_forward: Option<bool>,
    /// user.max_user_namespaces.
    pub user_namespaces: Option<u64>,
}

/// What must be there, as a module or built in, and what for.
const MODULES: [(&str, &str, bool); 7] = [
    ("overlay", "file systems of containers", true),
    ("veth", "networks of pods", true),
    ("bridge", "the built-in network of pods", true),
    ("nf_conntrack", "Services", true),
    ("nf_tables", "Services and the built-in network", true),
    ("br_netfilter", "Services of pods on one bridge with iptables", false),
    ("nf_nat", "Services", true),
];

/// Looks at this kernel.
pub fn check() -> Vec<Finding> {
    plan_kernel(&gather())
}

/// The findings.
pub fn plan_kernel(facts: &Facts) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut parts = facts.release.split(['.', '-', '+']).map_while(|n| n.parse::<u32>().ok());
    let version = (parts.next().unwrap_or(0), parts.next().unwrap_or(0));
    if version < OLDEST {
        findings.push(Finding::error(
            CHECK,
            format!("Linux {} is too old", facts.release),
            format!("upgrade to Linux {}.{} or newer", OLDEST.0, OLDEST.1),
        ));
    }
    for (module, purpose, needed) in MODULES {
        let there = facts.modules.contains(module) || facts.filesystems.contains(module);
        if there || !facts.modules_known {
            continue;
        }
        let message = format!("no {module} ({purpose})");
        let remedy = format!(
            "modprobe {module}; if it is not found, install the kernel's extra modules or a kernel \
             with {module}"
        );
        findings.push(match needed {
            true => Finding::error(CHECK, message, remedy),
            false => Finding::warning(CHECK, message, remedy),
        });
    }
    if !facts.seccomp {
        findings.push(Finding::warning(
            CHECK,
            "no seccomp: containers run without the default profile",
            "boot a kernel with CONFIG_SECCOMP_FILTER",
        ));
    }
    if facts.ip_forward == Some(false) {
        findings.push(Finding::warning(
            CHECK,
            "net.ipv4.ip_forward is 0: pods would reach nothing outside of this node",
            "longshore turns it on when it starts; to keep it on, put net.ipv4.ip_forward=1 into \
             /etc/sysctl.d/90-kubernetes.conf",
        ));
    }
    if facts.user_namespaces == Some(0) {
        findings.push(Finding::warning(
            CHECK,
            "user.max_user_namespaces is 0: pods with hostUsers: false are refused",
            "sysctl -w user.max_user_namespaces=65536",
        ));
    }
    if findings.is_empty() {
        findings.push(Finding::ok(CHECK, format!("Linux {} has what is needed", facts.release)));
    }
    findings
}

fn gather() -> Facts {
    let text = |path: &str| fs::read_to_string(path).ok().map(|t| t.trim().to_owned());
    let release = text("/proc/sys/kernel/osrelease").unwrap_or_default();
    let filesystems = text("/proc/filesystems").unwrap_or_default();
    let filesystems = filesystems.lines().filter_map(|l| l.split_whitespace().last());
    let mut modules: BTreeSet<String> = text("/proc/modules")
        .unwrap_or_default()
        .lines()
        .filter_map(|line| line.split_whitespace().next().map(str::to_owned))
        .collect();
    for entry in fs::read_dir("/sys/module").into_iter().flatten().flatten() {
        modules.insert(entry.file_name().to_string_lossy().into_owned());
    }
    // Everything in it is a path: kernel/net/bridge/bridge.ko.xz
    let folder = Path::new("/lib/modules").join(&release);
    let (mut known, name) = (false, |path: &str| {
        let file = path.rsplit('/').next().unwrap_or(path);
        file.split(".ko").next().unwrap_or(file).replace('-', "_")
    });
    for list in ["modules.builtin", "modules.dep"] {
        let Ok(text) = fs::read_to_string(folder.join(list)) else { continue };
        known |= list == "modules.dep";
        modules.extend(text.lines().map(|l| name(l.split(':').next().unwrap_or(l))));
    }
    Facts {
        filesystems: filesystems.map(str::to_owned).collect(),
        modules,
        modules_known: known,
        seccomp: Path::new("/proc/sys/kernel/seccomp/actions_avail").exists(),
        ip_forward: text("/proc/sys/net/ipv4/ip_forward").map(|t| t != "0"),
        user_namespaces: text("/proc/sys/user/max_user_namespaces").and_then(|t| t.parse().ok()),
        release,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Level;

    fn whole() -> Facts {
        Facts {
            release: "6.1.0-18-amd64".to_owned(),
            modules: MODULES.map(|(name, ..)| name.to_owned()).into(),
            modules_known: true,
            seccomp: true,
            ip_forward: Some(true),
            user_namespaces: Some(1000),
            ..Facts::default()
        }
    }

    #[test]
    fn what_is_missing_is_named_with_its_remedy() {
        let found = |facts: Facts| {
            let findings = plan_kernel(&facts);
            assert!(findings.iter().all(|f| f.level == Level::Ok || f.remedy.is_some()));
            findings.into_iter().map(|f| (f.level, f.message)).collect::<Vec<_>>()
        };
        assert_eq!(found(whole())[0].0, Level::Ok);
        let old = Facts { release: "4.19.0".to_owned(), ..whole() };
        assert_eq!(found(old)[0], (Level::Error, "Linux 4.19.0 is too old".to_owned()));
        let mut bare = whole();
        bare.modules.remove("overlay");
        assert_eq!(found(bare.clone())[0].0, Level::Error);
        bare.filesystems.insert("overlay".to_owned());
        assert_eq!(found(bare)[0].0, Level::Ok, "built in");
        let unknown = Facts { modules: BTreeSet::new(), modules_known: false, ..whole() };
        assert_eq!(
            found(unknown)[0].0,
            Level::Ok,
            "where modules cannot be listed, none is missed"
        );
        let still = Facts { ip_forward: Some(false), user_namespaces: Some(0), ..whole() };
        assert_eq!(found(still).len(), 2);
    }

    #[test]
    fn this_kernel_runs_tests_and_so_would_run_pods() {
        assert!(check().iter().all(|f| f.level != Level::Error), "{:?}", check());
    }
}
