//! SELinux: the labels of a container's processes and of its files. Pure.
//!
//! A pod's containers share one level, so that they can share volumes, and no two pods have the same
//! pair of categories (multi-category security), so that they cannot. What a pod asks for replaces
//! parts of the policy's own labels for containers, as go-selinux does it for containerd and CRI-O.

use std::collections::HashSet;
use std::fmt;

use super::SpecError;
use crate::api;

/// Categories that pairs are made of: `c0` to `c1023`, as in the policies of distributions.
const CATEGORIES: u32 = 1024;

/// A label: `user:role:type`, and `:level` where the policy has levels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Label {
    user: String,
    role: String,
    kind: String,
    level: Option<String>,
}

impl Label {
    /// Takes a label apart. A level may have colons itself.
    pub fn parse(text: &str) -> Option<Label> {
        let mut parts = text.trim().splitn(4, ':').map(str::to_owned);
        let (user, role, kind) = (parts.next()?, parts.next()?, parts.next()?);
        let whole = [&user, &role, &kind].iter().all(|part| !part.is_empty());
        whole.then(|| Label { user, role, kind, level: parts.next() })
    }

    /// Its level, if it has one.
    pub fn level(&self) -> Option<&str> {
        self.level.as_deref()
    }
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.user, self.role, self.kind)?;
        self.level.iter().try_for_each(|level| write!(f, ":{level}"))
    }
}

/// The policy's labels for containers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Defaults {
    process: Label,
    file: Label,
    /// Of what all containers may read and run and none may change.
    shared: Option<Label>,
}

impl Defaults {
    /// Those that distributions' policies have, for a pod that asks for a label under a policy that
    /// names none: what does not exist in it, the kernel refuses.
    pub fn usual() -> Self {
        let label = |role: &str, kind: &str| Label {
            user: "system_u".to_owned(),
            role: role.to_owned(),
            kind: kind.to_owned(),
            level: Some("s0".to_owned()),
        };
        Defaults {
            process: label("system_r", "container_t"),
            file: label("object_r", "container_file_t"),
            shared: None,
        }
    }

    /// Reads the policy's `contexts/lxc_contexts`: lines such as `process = "a:b:c:s0"`.
    pub fn parse(text: &str) -> Option<Self> {
        let value = |name: &str| {
            let value = text.lines().find_map(|line| {
                let (key, value) = line.split_once('=')?;
                (key.trim() == name).then(|| value.trim().trim_matches('"'))
            })?;
            Label::parse(value)
        };
        let shared = value("ro_file");
        Some(Defaults { process: value("process")?, file: value("file")?, shared })
    }

    /// The label of images' layers on disk, where the policy has one. Containers see their own
    /// label on every file, but what a program maps is checked against the file on disk too.
    pub fn layers(&self) -> Option<&Label> {
        self.shared.as_ref()
    }
}

/// The labels of a pod or a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Labels {
    /// Of its processes.
    pub process: Label,
    /// Of its root file system, its temporary file systems and its volumes.
    pub file: Label,
}

impl Labels {
    /// `process` alone, as it was recorded, with the files' label that belongs to it.
    pub fn of_process(process: Label, defaults: Option<&Defaults>) -> Self {
        let file = defaults.map_or_else(|| Defaults::usual().file, |d| d.file.clone());
        let file = Label { user: process.user.clone(), level: process.level.clone(), ..file };
        Labels { process, file }
    }
}

/// Whether a pod or container asks for a label at all.
pub fn is_asked(options: Option<&api::SeLinuxOption>) -> bool {
    options.is_some_and(|o| {
        [&o.user, &o.role, &o.r#type, &o.level].iter().any(|field| !field.is_empty())
    })
}

/// The labels of something that asks for `options`, over `under`: the policy's for a pod, the pod's
/// for a container. `None` when nothing is asked and there is nothing below.
pub fn plan(under: Option<&Labels>, options: Option<&api::SeLinuxOption>) -> Option<Labels> {
    if !is_asked(options) {
        return under.cloned();
    }
    let usual = Defaults::usual();
    let Labels { mut process, mut file } =
        under.cloned().unwrap_or(Labels { process: usual.process, file: usual.file });
    let options = options?;
    let replace = |part: &mut String, asked: &String| {
        if !asked.is_empty() {
            part.clone_from(asked);
        }
    };
    replace(&mut process.user, &options.user);
    replace(&mut file.user, &options.user);
    replace(&mut process.role, &options.role);
    replace(&mut process.kind, &options.r#type);
    if !options.level.is_empty() {
        process.level = Some(options.level.clone());
        file.level = Some(options.level.clone());
    }
    Some(Labels { process, file })
}

/// The labels of a pod: the policy's, with a pair of categories that no other pod has unless it asks
/// for a level. `levels` says whether the policy has any.
pub fn plan_pod(
    defaults: Option<&Defaults>,
    options: Option<&api::SeLinuxOption>,
    levels: bool,
    taken: &HashSet<String>,
    random: impl FnMut(u32) -> u32,
) -> Option<Labels> {
    let own = Defaults::usual();
    let defaults = match (defaults, is_asked(options)) {
        (Some(defaults), _) => defaults,
        (None, true) => &own,
        (None, false) => return None,
    };
    let mut under = Labels { process: defaults.process.clone(), file: defaults.file.clone() };
    let asked = options.is_some_and(|o| !o.level.is_empty());
    let level = match (levels, asked) {
        (false, _) => None,
        (true, true) => Some(String::new()),
        (true, false) => Some(pick_level(taken, random)),
    };
    under.process.level.clone_from(&level);
    under.file.level = level;
    plan(Some(&under), options)
}

/// A pair of categories that is not taken; one that is, when there is no other to be found.
fn pick_level(taken: &HashSet<String>, mut random: impl FnMut(u32) -> u32) -> String {
    let pair = |a: u32, b: u32| format!("s0:c{},c{}", a.min(b), a.max(b));
    let mut last = String::new();
    for _ in 0..1000 {
        let (a, b) = (random(CATEGORIES), random(CATEGORIES));
        if a == b {
            continue;
        }
        last = pair(a, b);
        if !taken.contains(&last) {
            return last;
        }
    }
    // Half a million pairs: nearly all are taken, or chance is not what it should be.
    let mut all = (0..CATEGORIES).flat_map(|a| (a + 1..CATEGORIES).map(move |b| (a, b)));
    all.find_map(|(a, b)| Some(pair(a, b)).filter(|level| !taken.contains(level))).unwrap_or(last)
}

/// Types of policies for containers that nothing confines, which network plugins and CSI drivers ask
/// for wherever they run.
const UNCONFINED: [&str; 2] = ["spc_t", "unconfined_t"];

/// Whether options name what should confine the container. A level alone keeps pods apart under a
/// policy; without one, Kubernetes' conformance tests want such pods to run.
fn confines(options: &api::SeLinuxOption) -> bool {
    let kind = options.r#type.as_str();
    !kind.is_empty() && !UNCONFINED.contains(&kind)
}

/// Refuses what this node cannot do, and a level that is none: `s0`, `s0-s1`, `s0:c1,c3.c9`. Without
/// SELinux in the kernel, options that name no type to confine by have no effect.
///
/// # Errors
/// [`SpecError::NotInKernel`] without SELinux, [`SpecError::SeLinuxLevel`].
pub fn check(options: Option<&api::SeLinuxOption>, enabled: bool) -> Result<(), SpecError> {
    if !is_asked(options) {
        return Ok(());
    }
    if !enabled && options.is_some_and(confines) {
        return Err(SpecError::NotInKernel("seLinuxOptions"));
    }
    match options.map(|o| o.level.as_str()).filter(|level| !level.is_empty()) {
        Some(level) if !is_level(level) => Err(SpecError::SeLinuxLevel(level.to_owned())),
        _ => Ok(()),
    }
}

fn is_level(text: &str) -> bool {
    let number = |text: &str, prefix: char, digits: usize| {
        text.strip_prefix(prefix).is_some_and(|n| {
            (1..=digits).contains(&n.len()) && n.bytes().all(|b| b.is_ascii_digit())
        })
    };
    let sensitivity = |text: &str| number(text, 's', 1);
    let category = |text: &str| number(text, 'c', 4);
    let range = |text: &str, one: &dyn Fn(&str) -> bool, separator| match text.split_once(separator)
    {
        Some((from, to)) => one(from) && one(to),
        None => one(text),
    };
    let (sensitivities, categories) = match text.split_once(':') {
        Some((sensitivities, categories)) => (sensitivities, Some(categories)),
        None => (text, None),
    };
    range(sensitivities, &sensitivity, '-')
        && categories.is_none_or(|all| all.split(',').all(|one| range(one, &category, '.')))
}

/// Directories of the node that belong to everybody: a volume that is one of them keeps its labels,
/// as relabelling it would break the node.
const SHARED: [&str; 24] = [
    "/",
    "/bin",
    "/boot",
    "/dev",
    "/etc",
    "/etc/passwd",
    "/etc/pki",
    "/etc/shadow",
    "/home",
    "/lib",
    "/lib64",
    "/media",
    "/opt",
    "/proc",
    "/root",
    "/run",
    "/sbin",
    "/srv",
    "/sys",
    "/tmp",
    "/usr",
    "/var",
    "/var/lib",
    "/var/log",
];

/// Whether a volume's place on the node may be relabelled. The path has no links in it.
pub fn may_relabel(path: &std::path::Path) -> bool {
    !SHARED.iter().any(|shared| std::path::Path::new(shared) == path)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn options(user: &str, role: &str, kind: &str, level: &str) -> api::SeLinuxOption {
        let text = str::to_owned;
        api::SeLinuxOption {
            user: text(user),
            role: text(role),
            r#type: text(kind),
            level: text(level),
        }
    }

    /// One that repeats what it is given.
    fn dice(rolls: &[u32]) -> impl FnMut(u32) -> u32 + '_ {
        let mut rolls = rolls.iter().copied().cycle();
        move |_| rolls.next().unwrap()
    }

    const POLICY: &str = "process = \"system_u:system_r:svirt_lxc_net_t:s0\"\n\
        content = \"system_u:object_r:virt_var_lib_t:s0\"\n\
        file = \"system_u:object_r:svirt_lxc_file_t:s0\"\nsandbox_lxc_process = \"x\"\n\
        ro_file = \"system_u:object_r:svirt_lxc_ro_t:s0\"\n";

    #[test]
    fn labels_are_taken_apart_and_put_together() {
        for text in ["a:b:c", "a:b:c:s0", "system_u:system_r:container_t:s0-s0:c0.c1023"] {
            assert_eq!(Label::parse(text).unwrap().to_string(), text);
        }
        assert_eq!(Label::parse("a:b:c:s0:c1,c2").unwrap().level(), Some("s0:c1,c2"));
        for text in ["", "kernel", "a:b", "a::c"] {
            assert_eq!(Label::parse(text), None, "{text}");
        }
        let file = Defaults::parse(POLICY).unwrap().file;
        assert_eq!(file.to_string(), "system_u:object_r:svirt_lxc_file_t:s0");
        let layers = |text: &str| Defaults::parse(text).unwrap().layers().map(Label::to_string);
        assert_eq!(layers(POLICY).as_deref(), Some("system_u:object_r:svirt_lxc_ro_t:s0"));
        assert_eq!(layers("process=\"a:b:c\"\nfile=\"a:b:c\""), None);
        assert_eq!(Defaults::parse("process = \"a:b:c\"\n"), None);
    }

    #[test]
    fn a_pod_gets_the_policys_labels_with_categories_of_its_own() {
        let policy = Defaults::parse(POLICY).unwrap();
        let taken = HashSet::from(["s0:c3,c7".to_owned()]);
        let nothing = HashSet::new();
        let seen = |labels: Option<Labels>| {
            let labels = labels.unwrap();
            (labels.process.to_string(), labels.file.to_string())
        };
        let own = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        let pod = plan_pod(Some(&policy), None, true, &taken, dice(&[7, 3, 5, 5, 9, 4]));
        assert_eq!(
            seen(pod),
            own(
                "system_u:system_r:svirt_lxc_net_t:s0:c4,c9",
                "system_u:object_r:svirt_lxc_file_t:s0:c4,c9"
            )
        );
        let asked = options("", "", "mine_t", "s0:c1,c2");
        let pod = plan_pod(Some(&policy), Some(&asked), true, &taken, dice(&[1]));
        assert_eq!(
            seen(pod),
            own("system_u:system_r:mine_t:s0:c1,c2", "system_u:object_r:svirt_lxc_file_t:s0:c1,c2")
        );
        // A policy without levels, and one without labels for containers.
        let pod = plan_pod(Some(&policy), None, false, &taken, dice(&[1, 2]));
        assert_eq!(pod.unwrap().process.to_string(), "system_u:system_r:svirt_lxc_net_t");
        let asked = options("", "", "mine_t", "");
        let pod = plan_pod(None, Some(&asked), true, &nothing, dice(&[1, 2]));
        assert_eq!(
            seen(pod),
            own("system_u:system_r:mine_t:s0:c1,c2", "system_u:object_r:container_file_t:s0:c1,c2")
        );
        let none = options("", "", "", "");
        assert_eq!(plan_pod(None, Some(&none), true, &nothing, dice(&[1, 2])), None);
    }

    #[test]
    fn a_container_changes_its_pods_labels_and_keeps_the_level() {
        let pod = Label::parse("system_u:system_r:container_t:s0:c1,c2").unwrap();
        let pod = Labels::of_process(pod, None);
        assert_eq!(pod.file.to_string(), "system_u:object_r:container_file_t:s0:c1,c2");
        for (asked, process, file) in [
            (options("", "", "", ""), "system_u:system_r:container_t", "system_u:object_r"),
            (options("", "", "web_t", ""), "system_u:system_r:web_t", "system_u:object_r"),
            (options("u", "r", "", ""), "u:r:container_t", "u:object_r"),
        ] {
            let labels = plan(Some(&pod), Some(&asked)).unwrap();
            assert_eq!(labels.process.to_string(), format!("{process}:s0:c1,c2"));
            assert_eq!(labels.file.to_string(), format!("{file}:container_file_t:s0:c1,c2"));
        }
        let labels = plan(Some(&pod), Some(&options("", "", "", "s0:c8"))).unwrap();
        assert_eq!((labels.process.level(), labels.file.level()), (Some("s0:c8"), Some("s0:c8")));
        assert_eq!(plan(None, None), None);
    }

    #[test]
    fn no_pair_of_categories_is_given_twice() {
        let mut taken = HashSet::new();
        for _ in 0..50 {
            // Chance that always comes to the same.
            let level = pick_level(&taken, dice(&[1, 2]));
            assert!(taken.insert(level.clone()), "{level}");
            assert!(is_level(&level), "{level}");
        }
    }

    #[test]
    fn what_cannot_be_had_is_refused() {
        // On a kernel without SELinux: the last two are of Kubernetes' conformance tests and of
        // network plugins.
        for (asked, fine) in [
            (options("", "", "t", ""), false),
            (options("", "", "container_t", "s0:c1,c2"), false),
            (options("", "", "", "nonsense"), false),
            (options("", "", "", ""), true),
            (options("system_u", "system_r", "", ""), true),
            (options("", "", "", "s0:c0,c1"), true),
            (options("", "", "spc_t", "s0"), true),
        ] {
            assert_eq!(check(Some(&asked), false).is_ok(), fine, "{asked:?}");
        }
        for (level, fine) in [
            ("s0", true),
            ("s0-s1", true),
            ("s0:c1", true),
            ("s0-s0:c0.c1023", true),
            ("s0:c1,c3.c9,c11", true),
            ("s10", false),
            ("s0:", false),
            ("s0:c1,", false),
            ("s0:c12345", false),
            ("c1", false),
            ("s0:c1.c2.c3", false),
            ("s0-", false),
        ] {
            assert_eq!(check(Some(&options("", "", "", level)), true).is_ok(), fine, "{level}");
        }
    }

    #[test]
    fn the_nodes_own_directories_keep_their_labels() {
        use std::path::Path;
        for path in ["/", "/etc", "/etc/", "/usr", "/var/lib"] {
            assert!(!may_relabel(Path::new(path)), "{path}");
        }
        for path in ["/srv/data", "/var/lib/kubelet/pods/1/volumes/v", "/etc/app"] {
            assert!(may_relabel(Path::new(path)), "{path}");
        }
    }
}
