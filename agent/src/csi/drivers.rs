//! The CSI drivers that are registered on this node, and what each says of the node.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use super::CsiError;
use super::client::Client;
use super::wire::csi::NodeGetInfoResponse;

/// What a driver says of the node it runs on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct NodeInfo {
    /// The node as the driver knows it.
    pub(super) node_id: String,
    /// Volumes of the driver that the node takes; `None` is any number.
    pub(super) max_volumes: Option<i32>,
    /// Where the node is.
    pub(super) topology: BTreeMap<String, String>,
}

impl From<NodeGetInfoResponse> for NodeInfo {
    fn from(told: NodeGetInfoResponse) -> Self {
        let max = told.max_volumes_per_node;
        Self {
            node_id: told.node_id,
            max_volumes: (max > 0).then(|| i32::try_from(max).unwrap_or(i32::MAX)),
            topology: told
                .accessible_topology
                .map(|topology| topology.segments.into_iter().collect())
                .unwrap_or_default(),
        }
    }
}

/// What the API shall say of drivers: of one that went, `None`; of one that never came, nothing, as
/// it may still come.
pub(super) type Infos = BTreeMap<String, Option<NodeInfo>>;

#[derive(Debug)]
struct Driver {
    /// The socket by which it made itself known.
    registration: PathBuf,
    endpoint: PathBuf,
    version: (u64, u64, u64),
}

/// Registered drivers by name.
#[derive(Debug)]
pub(super) struct Drivers {
    drivers: Mutex<BTreeMap<String, Driver>>,
    infos: watch::Sender<Arc<Infos>>,
}

impl Default for Drivers {
    fn default() -> Self {
        Self { drivers: Mutex::default(), infos: watch::Sender::new(Arc::default()) }
    }
}

impl Drivers {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Driver>> {
        self.drivers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the API shall say, as it changes.
    pub(super) fn infos(&self) -> watch::Receiver<Arc<Infos>> {
        self.infos.subscribe()
    }

    /// The driver `name`.
    pub(super) fn client(&self, name: &str) -> Result<Client, CsiError> {
        match self.lock().get(name) {
            Some(driver) => Ok(Client::new(name, &driver.endpoint)),
            None => Err(CsiError::NoDriver(name.to_owned())),
        }
    }

    /// Why `name` of `version` cannot be registered by way of `registration`, if it cannot.
    pub(super) fn conflict(
        &self,
        name: &str,
        registration: &Path,
        version: (u64, u64, u64),
    ) -> Option<String> {
        let drivers = self.lock();
        let other = drivers.get(name).filter(|d| d.registration != registration)?;
        (other.version >= version).then(|| {
            let (major, minor, patch) = other.version;
            format!(
                "another driver with the name {name:?} is already registered with the supported \
                 version {major}.{minor}.{patch}"
            )
        })
    }

    /// `name` answers at `endpoint`.
    pub(super) fn put(
        &self,
        name: &str,
        registration: &Path,
        endpoint: &Path,
        version: (u64, u64, u64),
    ) {
        let (registration, endpoint) = (registration.to_owned(), endpoint.to_owned());
        self.lock().insert(name.to_owned(), Driver { registration, endpoint, version });
    }

    /// What it says of the node.
    pub(super) fn tell(&self, name: &str, info: Option<NodeInfo>) {
        self.infos.send_if_modified(|infos| {
            if infos.get(name) == Some(&info) {
                return false;
            }
            Arc::make_mut(infos).insert(name.to_owned(), info);
            true
        });
    }

    /// What was registered by way of `registration` is no more; whether it was there.
    pub(super) fn remove(&self, name: &str, registration: &Path) -> bool {
        let mut drivers = self.lock();
        // Another socket may have taken its place.
        let ours = drivers.get(name).is_some_and(|d| d.registration == registration);
        if ours {
            drivers.remove(name);
        }
        ours
    }
}

/// The highest version that a driver speaks and this node understands: any 1.x.
pub(super) fn usable_version(told: &[String]) -> Option<(u64, u64, u64)> {
    let parse = |text: &String| {
        let text = text.strip_prefix('v').unwrap_or(text);
        let mut parts = text.split('.').map(|part| part.parse::<u64>().ok());
        let version = (parts.next()??, parts.next()??, parts.next().unwrap_or(Some(0))?);
        parts.next().is_none().then_some(version)
    };
    told.iter().filter_map(parse).filter(|(major, ..)| *major == 1).max()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_highest_version_of_ours_is_taken() {
        let of = |told: &[&str]| {
            usable_version(&told.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>())
        };
        assert_eq!(of(&["1.0.0"]), Some((1, 0, 0)));
        assert_eq!(of(&["0.3.0", "v1.2", "1.10.0", "2.0.0"]), Some((1, 10, 0)));
        for odd in [&[][..], &["0.3.0"], &["2.0.0"], &["one"], &["1"], &["1.0.0.0"], &["1.x"]] {
            assert_eq!(of(odd), None, "{odd:?}");
        }
    }

    #[test]
    fn a_name_belongs_to_the_socket_that_has_the_newer_driver() {
        let drivers = Drivers::default();
        let (one, two) = (Path::new("/r/one"), Path::new("/r/two"));
        drivers.put("d", one, Path::new("/p/one"), (1, 2, 0));
        assert_eq!(drivers.conflict("d", one, (1, 0, 0)), None, "it may come again");
        assert!(drivers.conflict("d", two, (1, 2, 0)).is_some());
        assert_eq!(drivers.conflict("d", two, (1, 3, 0)), None);
        drivers.put("d", two, Path::new("/p/two"), (1, 3, 0));
        assert!(!drivers.remove("d", one), "it is the other's");
        assert!(drivers.client("d").is_ok());
        assert!(drivers.remove("d", two));
        assert!(drivers.client("d").is_err());
    }

    #[test]
    fn limits_are_what_a_csinode_can_hold() {
        let told = |max| {
            NodeInfo::from(NodeGetInfoResponse {
                node_id: "n".into(),
                max_volumes_per_node: max,
                accessible_topology: None,
            })
        };
        for (max, expected) in [(0, None), (-1, None), (5, Some(5)), (i64::MAX, Some(i32::MAX))] {
            assert_eq!(told(max).max_volumes, expected);
        }
    }
}
