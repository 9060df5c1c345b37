//! The options of a mount, as an OCI spec has them (config.md, "Mounts"), sorted by what they are
//! for: pure.

use crate::mount::attr;

/// What a list of options comes to.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Options {
    /// An existing place instead of a file system of its own; with what is below it.
    pub bind: bool,
    pub recursive: bool,
    /// `MOUNT_ATTR_*` of the mount itself.
    pub attributes: u64,
    /// `MOUNT_ATTR_*` of everything that comes with it.
    pub recursive_attributes: u64,
    /// `MS_PRIVATE` and the like, and whether for everything that comes with it.
    pub propagation: Option<(u64, bool)>,
    /// What is the file system's own.
    pub data: Vec<String>,
}

/// Sorts options. Those that take an attribute away again matter to a new file system only, where
/// they undo an earlier one: a bound place keeps what it was mounted with.
pub(super) fn parse(options: &[String]) -> Options {
    let mut parsed = Options::default();
    for option in options {
        match option.as_str() {
            "bind" => parsed.bind = true,
            "rbind" => (parsed.bind, parsed.recursive) = (true, true),
            "defaults" | "relatime" | "async" | "rw" | "suid" | "dev" | "exec" | "atime"
            | "diratime" | "symfollow" => parsed.attributes &= !cleared(option),
            other => match (attribute(other), propagation(other)) {
                (Some((flag, false)), _) => parsed.attributes |= flag,
                (Some((flag, true)), _) => parsed.recursive_attributes |= flag,
                (None, Some(how)) => parsed.propagation = Some(how),
                (None, None) => parsed.data.push(other.to_owned()),
            },
        }
    }
    parsed
}

fn cleared(option: &str) -> u64 {
    match option {
        "rw" => attr::RDONLY,
        "suid" => attr::NOSUID,
        "dev" => attr::NODEV,
        "exec" => attr::NOEXEC,
        "diratime" => attr::NODIRATIME,
        "symfollow" => attr::NOSYMFOLLOW,
        "atime" | "relatime" => attr::NOATIME | attr::STRICTATIME,
        _ => 0,
    }
}

/// An attribute, and whether it is for everything that comes with the mount (`rro` and its like).
fn attribute(option: &str) -> Option<(u64, bool)> {
    let flag = |name: &str| {
        Some(match name {
            "ro" => attr::RDONLY,
            "nosuid" => attr::NOSUID,
            "nodev" => attr::NODEV,
            "noexec" => attr::NOEXEC,
            "noatime" => attr::NOATIME,
            "strictatime" => attr::STRICTATIME,
            "nodiratime" => attr::NODIRATIME,
            "nosymfollow" => attr::NOSYMFOLLOW,
            _ => return None,
        })
    };
    flag(option)
        .map(|f| (f, false))
        .or_else(|| option.strip_prefix('r').and_then(flag).map(|f| (f, true)))
}

fn propagation(option: &str) -> Option<(u64, bool)> {
    let how = |name: &str| {
        Some(match name {
            "private" => libc::MS_PRIVATE,
            "slave" => libc::MS_SLAVE,
            "shared" => libc::MS_SHARED,
            "unbindable" => libc::MS_UNBINDABLE,
            _ => return None,
        })
    };
    how(option)
        .map(|h| (h, false))
        .or_else(|| option.strip_prefix('r').and_then(how).map(|h| (h, true)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(options: &[&str]) -> Options {
        parse(&options.iter().map(|o| (*o).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn a_file_systems_own_options_are_told_from_the_mounts() {
        let tmpfs = parsed(&["nosuid", "strictatime", "mode=755", "size=65536k"]);
        assert_eq!(tmpfs.attributes, attr::NOSUID | attr::STRICTATIME);
        assert_eq!(tmpfs.data, ["mode=755", "size=65536k"]);
        assert!(!tmpfs.bind);
    }

    #[test]
    fn volumes() {
        let volume = parsed(&["rbind", "rslave", "ro"]);
        let expected = Options {
            bind: true,
            recursive: true,
            attributes: attr::RDONLY,
            propagation: Some((libc::MS_SLAVE, true)),
            ..Options::default()
        };
        assert_eq!(volume, expected);
        let all = parsed(&["rbind", "rprivate", "rro"]);
        assert_eq!((all.attributes, all.recursive_attributes), (0, attr::RDONLY));
        assert_eq!(parsed(&["bind", "shared"]).propagation, Some((libc::MS_SHARED, false)));
        assert!(!parsed(&["bind"]).recursive);
    }

    #[test]
    fn the_last_word_counts() {
        assert_eq!(parsed(&["ro", "rw"]).attributes, 0);
        assert_eq!(parsed(&["rw", "ro"]).attributes, attr::RDONLY);
    }
}
