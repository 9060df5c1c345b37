//! The claims on disk, in kubelet's file and format, so that a node can change hands both ways.
//!
//! `{"Data": "<JSON as text>", "Checksum": n}` with the CRC-32 of the text. What is read is not held to
//! the checksum: a file that parses is whole, as it is only ever replaced as a whole, and to forget
//! what is prepared would leave it prepared for ever.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::claim_store::{Claim, ClaimStore, Device};
use crate::ids::{NamespacedName, PodUid};
use crate::join::files::{FileError, write_atomic};

/// Kubelet's name for it, in its root directory.
pub const FILE: &str = "dra_manager_state";
const KIND: &str = "DRACheckpoint";
const VERSION: &str = "checkpoint.dra.kubelet.k8s.io/v1";

#[derive(Debug, Serialize, Deserialize)]
struct Whole {
    #[serde(rename = "Data")]
    data: String,
    #[serde(rename = "Checksum", default)]
    checksum: u32,
}

#[derive(Debug, Serialize, Deserialize)]
struct Data {
    kind: String,
    #[serde(rename = "apiVersion")]
    version: String,
    #[serde(rename = "ClaimInfoStateList")]
    claims: Option<Vec<Entry>>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Entry {
    #[serde(rename = "ClaimUID")]
    uid: String,
    #[serde(rename = "ClaimName")]
    name: String,
    namespace: String,
    #[serde(rename = "PodUIDs")]
    pods: Option<BTreeMap<String, Nothing>>,
    #[serde(rename = "DriverState")]
    drivers: Option<BTreeMap<String, OfDriver>>,
}

/// Go writes a set as a map to nothing.
#[derive(Debug, Serialize, Deserialize)]
struct Nothing {}

#[derive(Debug, Serialize, Deserialize)]
struct OfDriver {
    #[serde(rename = "Devices")]
    devices: Option<Vec<OfDevice>>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct OfDevice {
    pool_name: String,
    device_name: String,
    #[serde(rename = "ShareID")]
    share: Option<String>,
    request_names: Option<Vec<String>>,
    #[serde(rename = "CDIDeviceIDs")]
    cdi: Option<Vec<String>>,
}

/// What is empty is `null` in Go.
fn some<T>(list: Vec<T>) -> Option<Vec<T>> {
    (!list.is_empty()).then_some(list)
}

/// The text of the file.
pub fn encode(store: &ClaimStore) -> Vec<u8> {
    let device = |device: &Device| OfDevice {
        pool_name: device.pool.clone(),
        device_name: device.device.clone(),
        share: device.share.clone(),
        request_names: some(device.requests.clone()),
        cdi: some(device.cdi.clone()),
    };
    let entry = |(key, claim): (&NamespacedName, &Claim)| Entry {
        uid: claim.uid.clone(),
        name: key.name.to_string(),
        namespace: key.namespace.to_string(),
        pods: Some(claim.pods.iter().map(|pod| (pod.to_string(), Nothing {})).collect()),
        drivers: Some(
            claim
                .drivers
                .iter()
                .map(|(name, devices)| {
                    let devices = some(devices.iter().map(device).collect());
                    (name.clone(), OfDriver { devices })
                })
                .collect(),
        ),
    };
    let data = Data {
        kind: KIND.into(),
        version: VERSION.into(),
        claims: Some(store.all().map(entry).collect()),
    };
    // Maps with texts as keys always have a JSON form.
    let data = serde_json::to_string(&data).unwrap_or_default();
    let mut checksum = flate2::Crc::new();
    checksum.update(data.as_bytes());
    serde_json::to_vec(&Whole { checksum: checksum.sum(), data }).unwrap_or_default()
}

fn decode(text: &[u8]) -> serde_json::Result<ClaimStore> {
    let whole: Whole = serde_json::from_slice(text)?;
    let data: Data = serde_json::from_str(&whole.data)?;
    let device = |device: OfDevice| Device {
        pool: device.pool_name,
        device: device.device_name,
        share: device.share,
        requests: device.request_names.unwrap_or_default(),
        cdi: device.cdi.unwrap_or_default(),
    };
    let claims = data.claims.into_iter().flatten().map(|entry| {
        let drivers = entry.drivers.into_iter().flatten().map(|(name, own)| {
            let devices = own.devices.into_iter().flatten().map(device).collect();
            (name, devices)
        });
        let claim = Claim {
            uid: entry.uid,
            pods: entry.pods.into_iter().flatten().map(|(uid, _)| PodUid::from(&*uid)).collect(),
            drivers: drivers.collect(),
            prepared: false,
        };
        (NamespacedName::new(&entry.namespace, &entry.name), claim)
    });
    Ok(ClaimStore::of(claims))
}

/// What an earlier agent, or kubelet, knew.
pub fn read(root: &Path) -> io::Result<ClaimStore> {
    let lost = "claims that pods had may stay prepared until their drivers find them";
    Ok(read_file(&root.join(FILE), lost, decode)?.unwrap_or_default())
}

/// What a file says; `None` if there is none. One that cannot be read is set aside, with a word on what
/// that means: what runs goes on.
pub fn read_file<T>(
    path: &Path,
    lost: &str,
    decode: impl Fn(&[u8]) -> serde_json::Result<T>,
) -> io::Result<Option<T>> {
    let text = match std::fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    match decode(&text) {
        Ok(known) => Ok(Some(known)),
        Err(error) => {
            let mut aside = path.as_os_str().to_owned();
            aside.push(".unreadable");
            tracing::error!(
                file = %path.display(), %error, aside = %Path::new(&aside).display(), lost,
                "cannot read what is known of resource claims; the file is set aside"
            );
            std::fs::rename(path, &aside)?;
            Ok(None)
        }
    }
}

/// Puts the text in place, whole or not at all.
pub fn write(root: &Path, text: &[u8]) -> Result<(), FileError> {
    write_atomic(&root.join(FILE), 0o600, text)
}

#[cfg(test)]
mod tests {
    use super::super::claim_store::tests::device;
    use super::*;

    fn store() -> ClaimStore {
        let claim = Claim {
            uid: "cu".into(),
            pods: [PodUid::from("p1"), PodUid::from("p2")].into(),
            drivers: [
                ("a.example".into(), vec![device("d", &["r"], &["v/c=d"])]),
                ("b.example".into(), Vec::new()),
            ]
            .into(),
            prepared: false,
        };
        ClaimStore::of([(NamespacedName::new("n", "c"), claim)])
    }

    #[test]
    fn the_file_is_as_kubelet_has_it() {
        let text = encode(&store());
        let data = "{\"kind\":\"DRACheckpoint\",\"apiVersion\":\"checkpoint.dra.kubelet.k8s.io/v1\",\
            \"ClaimInfoStateList\":[{\"ClaimUID\":\"cu\",\"ClaimName\":\"c\",\"Namespace\":\"n\",\
            \"PodUIDs\":{\"p1\":{},\"p2\":{}},\"DriverState\":{\"a.example\":{\"Devices\":[{\
            \"PoolName\":\"p\",\"DeviceName\":\"d\",\"ShareID\":null,\"RequestNames\":[\"r\"],\
            \"CDIDeviceIDs\":[\"v/c=d\"]}]},\"b.example\":{\"Devices\":null}}}]}";
        let json: serde_json::Value = serde_json::from_slice(&text).unwrap();
        assert_eq!(json["Data"], data);
        assert_eq!(json["Checksum"], 1927290774);
        assert_eq!(decode(&text).unwrap(), store());
    }

    #[test]
    fn what_is_broken_is_set_aside_and_nothing_is_no_error() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(read(folder.path()).unwrap(), ClaimStore::default());
        for broken in ["", "[]", "{\"Data\":\"{\"}"] {
            std::fs::write(folder.path().join(FILE), broken).unwrap();
            assert_eq!(read(folder.path()).unwrap(), ClaimStore::default());
            let aside = folder.path().join("dra_manager_state.unreadable");
            assert_eq!(std::fs::read_to_string(aside).unwrap(), broken);
        }
    }
}
