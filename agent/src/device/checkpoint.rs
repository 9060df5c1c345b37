//! The assignments on disk, in kubelet's file and format, so that a node can change hands both ways.
//!
//! `{"Data": {"PodDeviceEntries": [...], "RegisteredDevices": {...}}, "Checksum": n}`. What is read
//! is not held to the checksum: a file that parses is whole, as it is only ever replaced as a whole, and
//! to forget what running containers have would give their devices to others.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use base64::engine::general_purpose::STANDARD as BASE64;
use prost::Message as _;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::assignments::{Assigned, Assignments};
use super::checksum;
use super::inventory::Inventory;
use super::wire::ContainerAllocateResponse;
use crate::ids::PodUid;
use crate::join::files::{FileError, write_atomic};

/// Kubelet's name for it, in the folder of plugins.
pub const FILE: &str = "kubelet_internal_checkpoint";

/// One container's devices of one resource.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Entry {
    #[serde(rename = "PodUID")]
    pub(super) pod_uid: String,
    #[serde(rename = "ContainerName")]
    pub(super) container: String,
    #[serde(rename = "ResourceName")]
    pub(super) resource: String,
    /// By NUMA node; -1 is none.
    #[serde(rename = "DeviceIDs", deserialize_with = "or_empty")]
    pub(super) devices: BTreeMap<i64, Vec<String>>,
    /// The plugin's answer, as it came over the wire.
    #[serde(rename = "AllocResp", with = "base64_text")]
    pub(super) response: Vec<u8>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Data {
    #[serde(rename = "PodDeviceEntries", default, deserialize_with = "or_empty")]
    pub(super) entries: Vec<Entry>,
    /// Healthy devices by resource; only the resources count.
    #[serde(rename = "RegisteredDevices", default, deserialize_with = "or_empty")]
    pub(super) registered: BTreeMap<String, Option<Vec<String>>>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Whole {
    #[serde(rename = "Data")]
    data: Data,
    #[serde(rename = "Checksum", default)]
    checksum: u64,
}

/// Go writes `null` for what is empty.
fn or_empty<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Deserialize<'de> + Default,
{
    Ok(Option::<T>::deserialize(deserializer)?.unwrap_or_default())
}

mod base64_text {
    use base64::Engine as _;
    use serde::{Deserializer, Serializer, de};

    use super::{BASE64, Deserialize};

    pub(super) fn serialize<S: Serializer>(bytes: &[u8], to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&BASE64.encode(bytes))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<u8>, D::Error> {
        let text = Option::<String>::deserialize(from)?.unwrap_or_default();
        BASE64.decode(text).map_err(de::Error::custom)
    }
}

/// The text of the file.
pub fn encode(assignments: &Assignments, inventory: &Inventory) -> Vec<u8> {
    let entries = assignments.all().map(|(uid, container, resource, own)| Entry {
        pod_uid: uid.to_string(),
        container: container.to_owned(),
        resource: resource.to_owned(),
        devices: own.devices.clone(),
        response: own.response.encode_to_vec(),
    });
    let registered = inventory.all_usable().into_iter();
    let data = Data {
        entries: entries.collect(),
        registered: registered
            .map(|(name, devices)| (name, Some(devices.into_keys().collect())))
            .collect(),
    };
    let checksum = checksum::of(&data);
    // Maps with text and numbers as keys always have a JSON form.
    serde_json::to_vec(&Whole { data, checksum }).unwrap_or_default()
}

/// What the text says; an entry whose answer cannot be read is left out.
fn decode(text: &[u8], now: Instant) -> serde_json::Result<(Assignments, Inventory)> {
    let Whole { data, .. } = serde_json::from_slice(text)?;
    let mut assignments = Assignments::default();
    for Entry { pod_uid, container, resource, devices, response } in data.entries {
        match ContainerAllocateResponse::decode(&*response) {
            Ok(response) => {
                let uid = PodUid::from(&*pod_uid);
                assignments.insert(&uid, &container, &resource, Assigned { devices, response });
            }
            Err(error) => tracing::error!(
                pod_uid, container, resource, %error,
                "cannot read how a container was given its devices: it gets them anew at its next start"
            ),
        }
    }
    Ok((assignments, Inventory::remembered(data.registered.into_keys(), now)))
}

/// What an earlier agent, or kubelet, knew; `None` if there was none. A file that cannot be read is set
/// aside: what runs goes on.
pub fn read(folder: &Path, now: Instant) -> io::Result<Option<(Assignments, Inventory)>> {
    let path = folder.join(FILE);
    let text = match std::fs::read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    match decode(&text, now) {
        Ok(known) => Ok(Some(known)),
        Err(error) => {
            let aside: PathBuf = folder.join(format!("{FILE}.unreadable"));
            tracing::error!(
                file = %path.display(), %error, aside = %aside.display(),
                "cannot read which containers have which devices; the file is set aside. Containers \
                 that run keep theirs, and others may be given the same: restart pods with devices"
            );
            std::fs::rename(&path, &aside)?;
            Ok(Some(Default::default()))
        }
    }
}

/// Puts the text in place, whole or not at all.
pub fn write(folder: &Path, text: &[u8]) -> Result<(), FileError> {
    write_atomic(&folder.join(FILE), 0o600, text)
}

#[cfg(test)]
mod tests {
    use super::super::inventory::Options;
    use super::super::inventory::tests::device;
    use super::super::wire;
    use super::*;

    const R: &str = "example.com/dev";

    #[test]
    fn what_is_written_is_read_again() {
        let folder = tempfile::tempdir().unwrap();
        assert!(read(folder.path(), Instant::now()).unwrap().is_none());
        let mut inventory = Inventory::default();
        inventory.connected(R, 1, Options::default());
        inventory.told(R, 1, &[device("a", true, &[0]), device("b", true, &[])]);
        let mut all = Assignments::default();
        let response = wire::ContainerAllocateResponse {
            envs: [("A".into(), "1".into()), ("B".into(), "2".into())].into(),
            ..Default::default()
        };
        let ids = ["a", "b"].map(String::from).into();
        let own = Assigned::new(&inventory, R, &ids, response);
        all.insert(&PodUid::from("u"), "c", R, own);
        let text = encode(&all, &inventory);
        write(folder.path(), &text).unwrap();
        let (read_all, read_inventory) = read(folder.path(), Instant::now()).unwrap().unwrap();
        assert_eq!(read_all, all);
        assert!(read_inventory.registered(R) && read_inventory.usable(R).is_empty());
        let json: serde_json::Value = serde_json::from_slice(&text).unwrap();
        let entry = &json["Data"]["PodDeviceEntries"][0];
        assert_eq!(entry["DeviceIDs"], serde_json::json!({"0": ["a"], "-1": ["b"]}));
        assert_eq!(entry["AllocResp"], "CgYKAUESATEKBgoBQhIBMg==");
    }

    #[test]
    fn what_kubelet_wrote_is_read_and_what_is_broken_is_set_aside() {
        let folder = tempfile::tempdir().unwrap();
        let put = |text: &str| std::fs::write(folder.path().join(FILE), text).unwrap();
        let get = || read(folder.path(), Instant::now()).unwrap().unwrap();
        put(
            r#"{"Data":{"PodDeviceEntries":[{"PodUID":"u","ContainerName":"c","ResourceName":"example.com/dev","DeviceIDs":{"-1":["x","y"]},"AllocResp":"CgYKAUESATE="},
            {"PodUID":"u","ContainerName":"d","ResourceName":"example.com/dev","DeviceIDs":null,"AllocResp":""}],
            "RegisteredDevices":{"example.com/dev":["x","y","z"],"example.com/no":null}},"Checksum":3}"#,
        );
        let (all, inventory) = get();
        let own = all.get(&PodUid::from("u"), "c", R).unwrap();
        assert_eq!(own.ids().len(), 2);
        assert_eq!(own.response.envs["A"], "1");
        assert!(inventory.registered(R) && inventory.registered("example.com/no"));
        put(r#"{"Data":{"PodDeviceEntries":null,"RegisteredDevices":{}},"Checksum":3}"#);
        assert_eq!(get().0, Assignments::default());
        for broken in
            ["", "{\"Data\":{\"PodDeviceEntr", "[]", "{\"Data\":{\"PodDeviceEntries\":[{}]}}"]
        {
            put(broken);
            assert_eq!(get().0, Assignments::default(), "{broken}");
            let aside = folder.path().join(format!("{FILE}.unreadable"));
            assert_eq!(std::fs::read_to_string(aside).unwrap(), broken);
        }
    }
}
