//! The user namespace of a pod (`hostUsers: false`): which ids of the node its containers' ids are.
//!
//! The kubelet gives every such pod a range of ids of its own. What is taken here is what containerd
//! takes: one range for users, one for groups, the same for the sandbox and all its containers.

use oci_spec::runtime::{LinuxIdMapping, LinuxIdMappingBuilder};
use serde::{Deserialize, Serialize};

use super::SpecError;
use crate::api::{self, NamespaceMode};

/// A range of ids inside a namespace and what they are outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdRange {
    /// The first id inside.
    pub container: u32,
    /// The first id outside.
    pub host: u32,
    /// How many there are.
    pub length: u32,
}

impl IdRange {
    /// What an id inside is outside; nothing where it is not mapped.
    pub fn to_host(self, id: u32) -> Option<u32> {
        let offset = id.checked_sub(self.container).filter(|offset| *offset < self.length)?;
        self.host.checked_add(offset)
    }

    /// A line of `/proc/<pid>/uid_map`, `user_namespaces(7)`.
    pub fn line(self) -> String {
        format!("{} {} {}\n", self.container, self.host, self.length)
    }
}

/// The ids of a user namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdMap {
    /// User ids.
    pub uids: IdRange,
    /// Group ids.
    pub gids: IdRange,
}

/// Why a user namespace cannot be made as it was asked for.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum UsernsError {
    /// A mode that means nothing here.
    #[error("unsupported user namespace mode {0}; the kubelet sends POD or NODE")]
    Mode(&'static str),
    /// The node's own namespace has no mappings.
    #[error("user namespace mode NODE with mappings; leave them out, or ask for mode POD")]
    NodeWithMappings,
    /// More or fewer than one range.
    #[error("{kind} mapping: exactly one range is supported, got {count}")]
    Ranges {
        /// `UID` or `GID`.
        kind: &'static str,
        /// How many there were.
        count: usize,
    },
    /// A range that is empty or goes beyond the ids there are.
    #[error(
        "{kind} mapping of {length} ids from {container} to {host}: ids go from 0 to 4294967294"
    )]
    Range {
        /// `UID` or `GID`.
        kind: &'static str,
        /// The first id inside.
        container: u32,
        /// The first id outside.
        host: u32,
        /// How many there are.
        length: u32,
    },
    /// Nobody would be root inside, so nothing could be set up there.
    #[error("{0} mapping: id 0 of the containers must be mapped")]
    RootUnmapped(&'static str),
    /// Root inside would be root outside.
    #[error("{0} mapping: id 0 of the node must not be mapped")]
    HostRoot(&'static str),
    /// Another namespace of the pod would be the node's and not be ruled from the pod's own users.
    #[error(
        "hostUsers: false cannot be combined with {0}: true; the node's namespace is not the \
         pod's to change"
    )]
    HostNamespace(&'static str),
    /// The container's mapping is not its sandbox's.
    #[error("the container's user namespace is not its sandbox's: {container} and {sandbox}")]
    Differs {
        /// What the container asks for.
        container: String,
        /// What the sandbox has.
        sandbox: String,
    },
    /// A user that the namespace does not have.
    #[error(
        "{kind} {id} is not mapped in the pod's user namespace, which has {first} to {last}; \
         choose another, or raise userNamespaces.idsPerPod in the node's KubeletConfiguration"
    )]
    Unmapped {
        /// `user` or `group`.
        kind: &'static str,
        /// The id inside.
        id: u32,
        /// The first mapped one.
        first: u32,
        /// The last mapped one.
        last: u32,
    },
}

impl IdMap {
    /// What a user and a group of the container are on the node.
    ///
    /// # Errors
    /// [`UsernsError::Unmapped`].
    pub fn to_host(&self, uid: u32, gid: u32) -> Result<(u32, u32), UsernsError> {
        Ok((one(self.uids, uid, "user")?, one(self.gids, gid, "group")?))
    }

    /// Root of the container on the node.
    ///
    /// # Errors
    /// [`UsernsError::Unmapped`].
    pub fn root(&self) -> Result<(u32, u32), UsernsError> {
        self.to_host(0, 0)
    }

    /// Refuses who cannot be in the namespace.
    ///
    /// # Errors
    /// [`UsernsError::Unmapped`].
    pub fn check(&self, uid: u32, gid: u32, groups: &[u32]) -> Result<(), UsernsError> {
        self.to_host(uid, gid)?;
        groups.iter().try_for_each(|gid| one(self.gids, *gid, "group").map(|_| ()))
    }

    /// As the OCI spec writes it: users, groups.
    pub(super) fn oci(&self) -> Result<[Vec<LinuxIdMapping>; 2], SpecError> {
        let line = |range: IdRange| {
            let mapping = LinuxIdMappingBuilder::default()
                .container_id(range.container)
                .host_id(range.host)
                .size(range.length)
                .build()?;
            Ok::<_, SpecError>(vec![mapping])
        };
        Ok([line(self.uids)?, line(self.gids)?])
    }

    /// From the OCI spec's; nothing where it is not one range each.
    pub fn from_oci(uids: &[LinuxIdMapping], gids: &[LinuxIdMapping]) -> Option<Self> {
        let range = |lines: &[LinuxIdMapping]| match lines {
            [line] => Some(IdRange {
                container: line.container_id(),
                host: line.host_id(),
                length: line.size(),
            }),
            _ => None,
        };
        Some(IdMap { uids: range(uids)?, gids: range(gids)? })
    }
}

fn one(range: IdRange, id: u32, kind: &'static str) -> Result<u32, UsernsError> {
    let last = range.container.saturating_add(range.length - 1);
    range.to_host(id).ok_or(UsernsError::Unmapped { kind, id, first: range.container, last })
}

/// The mapping of a sandbox or container; none in the node's user namespace.
///
/// # Errors
/// What the CRI allows and no runtime can make.
pub fn plan(options: Option<&api::NamespaceOption>) -> Result<Option<IdMap>, UsernsError> {
    let Some((options, userns)) = options.and_then(|o| Some((o, o.userns_options.as_ref()?)))
    else {
        return Ok(None);
    };
    match userns.mode() {
        NamespaceMode::Node if userns.uids.is_empty() && userns.gids.is_empty() => Ok(None),
        NamespaceMode::Node => Err(UsernsError::NodeWithMappings),
        NamespaceMode::Pod => {
            let hosts = [
                (options.network(), "hostNetwork"),
                (options.ipc(), "hostIPC"),
                (options.pid(), "hostPID"),
            ];
            if let Some((_, field)) = hosts.iter().find(|(mode, _)| *mode == NamespaceMode::Node) {
                return Err(UsernsError::HostNamespace(field));
            }
            let map = plan_mappings(&userns.uids, &userns.gids)?;
            for (range, kind) in [(map.uids, "UID"), (map.gids, "GID")] {
                if range.container != 0 {
                    return Err(UsernsError::RootUnmapped(kind));
                }
                if range.host == 0 {
                    return Err(UsernsError::HostRoot(kind));
                }
            }
            Ok(Some(map))
        }
        mode => Err(UsernsError::Mode(mode.as_str_name())),
    }
}

/// Mappings as the CRI writes them, of a namespace or of a mount.
///
/// # Errors
/// [`UsernsError::Ranges`], [`UsernsError::Range`].
pub fn plan_mappings(
    uids: &[api::IdMapping],
    gids: &[api::IdMapping],
) -> Result<IdMap, UsernsError> {
    Ok(IdMap { uids: plan_range(uids, "UID")?, gids: plan_range(gids, "GID")? })
}

fn plan_range(mappings: &[api::IdMapping], kind: &'static str) -> Result<IdRange, UsernsError> {
    let [mapping] = mappings else {
        return Err(UsernsError::Ranges { kind, count: mappings.len() });
    };
    let (container, host, length) = (mapping.container_id, mapping.host_id, mapping.length);
    // The last 32-bit number means "no id".
    let fits = |first: u32| first.checked_add(length).is_some();
    if length == 0 || !fits(container) || !fits(host) {
        return Err(UsernsError::Range { kind, container, host, length });
    }
    Ok(IdRange { container, host, length })
}

/// The mapping of a container, which has to be its sandbox's.
///
/// # Errors
/// As [`plan`], and [`UsernsError::Differs`].
pub fn plan_container(
    container: Option<&api::NamespaceOption>,
    sandbox: Option<&api::NamespaceOption>,
) -> Result<Option<IdMap>, UsernsError> {
    let (asked, given) = (plan(container)?, plan(sandbox)?);
    if asked == given {
        return Ok(given);
    }
    let name = |map: Option<IdMap>| match map {
        None => "the node's".to_owned(),
        Some(map) => {
            format!("users {}, groups {}", map.uids.line().trim_end(), map.gids.line().trim_end())
        }
    };
    Err(UsernsError::Differs { container: name(asked), sandbox: name(given) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping(container_id: u32, host_id: u32, length: u32) -> Vec<api::IdMapping> {
        vec![api::IdMapping { host_id, container_id, length }]
    }

    fn options(
        mode: NamespaceMode,
        uids: Vec<api::IdMapping>,
        gids: Vec<api::IdMapping>,
    ) -> api::NamespaceOption {
        let userns = api::UserNamespace { mode: mode as i32, uids, gids };
        api::NamespaceOption { userns_options: Some(userns), ..Default::default() }
    }

    #[test]
    fn what_is_asked_for_and_what_is_refused() {
        use NamespaceMode::{Container, Node, Pod};
        let good = || mapping(0, 65536, 65536);
        let range = IdRange { container: 0, host: 65536, length: 65536 };
        let map = IdMap { uids: range, gids: range };
        let two = || [good(), mapping(65536, 1 << 20, 1)].concat();
        let ranges = |kind, count| Err(UsernsError::Ranges { kind, count });
        let bad = |kind, container, host, length| {
            Err(UsernsError::Range { kind, container, host, length })
        };
        let cases = [
            (Node, vec![], vec![], Ok(None)),
            (Node, good(), vec![], Err(UsernsError::NodeWithMappings)),
            (Pod, good(), good(), Ok(Some(map))),
            (Pod, vec![], vec![], ranges("UID", 0)),
            (Pod, good(), vec![], ranges("GID", 0)),
            (Pod, two(), good(), ranges("UID", 2)),
            (Pod, good(), mapping(0, 65536, 0), bad("GID", 0, 65536, 0)),
            (Pod, mapping(0, u32::MAX, 1), good(), bad("UID", 0, u32::MAX, 1)),
            (Pod, mapping(1, 65536, 65535), good(), Err(UsernsError::RootUnmapped("UID"))),
            (Pod, good(), mapping(0, 0, 65536), Err(UsernsError::HostRoot("GID"))),
            (Container, good(), good(), Err(UsernsError::Mode("CONTAINER"))),
        ];
        for (mode, uids, gids, expected) in cases {
            let asked = options(mode, uids, gids);
            assert_eq!(plan(Some(&asked)), expected, "{asked:?}");
        }
        assert_eq!(plan(None), Ok(None));
        assert_eq!(plan(Some(&api::NamespaceOption::default())), Ok(None));
    }

    #[test]
    fn the_nodes_namespaces_are_not_for_a_pod_with_users_of_its_own() {
        let asked = || options(NamespaceMode::Pod, mapping(0, 65536, 8), mapping(0, 65536, 8));
        let node = NamespaceMode::Node as i32;
        for (change, field) in [
            (api::NamespaceOption { network: node, ..asked() }, "hostNetwork"),
            (api::NamespaceOption { ipc: node, ..asked() }, "hostIPC"),
            (api::NamespaceOption { pid: node, ..asked() }, "hostPID"),
        ] {
            assert_eq!(plan(Some(&change)), Err(UsernsError::HostNamespace(field)));
        }
    }

    #[test]
    fn a_container_has_the_mapping_of_its_sandbox() {
        let of = |host| options(NamespaceMode::Pod, mapping(0, host, 8), mapping(0, host, 8));
        let node = options(NamespaceMode::Node, vec![], vec![]);
        assert!(plan_container(Some(&of(8)), Some(&of(8))).is_ok_and(|map| map.is_some()));
        assert_eq!(plan_container(None, Some(&node)), Ok(None));
        for (container, sandbox) in [(of(8), of(16)), (of(8), node.clone()), (node, of(8))] {
            let refused = plan_container(Some(&container), Some(&sandbox));
            assert!(matches!(refused, Err(UsernsError::Differs { .. })), "{refused:?}");
        }
    }

    #[test]
    fn ids_outside_and_who_has_none() {
        let range = IdRange { container: 0, host: 131_072, length: 65_536 };
        let map = IdMap { uids: range, gids: range };
        assert_eq!(map.root(), Ok((131_072, 131_072)));
        assert_eq!(map.to_host(1000, 65_535), Ok((132_072, 196_607)));
        assert!(map.check(1000, 1000, &[0, 65_535]).is_ok());
        for refused in
            [map.check(65_536, 0, &[]), map.check(0, 65_536, &[]), map.check(0, 0, &[1, 70_000])]
        {
            assert!(matches!(refused, Err(UsernsError::Unmapped { last: 65_535, .. })));
        }
        assert_eq!(range.line(), "0 131072 65536\n");
        let [uids, gids] = map.oci().unwrap();
        assert_eq!(IdMap::from_oci(&uids, &gids), Some(map));
        assert_eq!(IdMap::from_oci(&uids, &[]), None);
    }
}
