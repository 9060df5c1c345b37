//! `secret`: the keys of a Secret as files, in memory only.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Secret;

use super::VolumeError;
use super::config_map::Selection;
use super::payload::{File, Payload};

/// The files of a Secret, `None` if it does not exist.
pub(super) fn payload(
    object: Option<&Secret>,
    selection: &Selection<'_>,
) -> Result<Payload, VolumeError> {
    let entries = object
        .map(|object| object.data.iter().flatten().map(|(k, v)| (k.as_str(), &v.0[..])).collect());
    keyed_payload("secret", entries, selection)
}

/// The selected entries of an object of `kind`; `None` is an object that does not exist.
pub(super) fn keyed_payload(
    kind: &'static str,
    entries: Option<BTreeMap<&str, &[u8]>>,
    selection: &Selection<'_>,
) -> Result<Payload, VolumeError> {
    let volume = selection.volume;
    let Some(entries) = entries else {
        return if selection.optional {
            Ok(Payload::default())
        } else {
            let what = format!("{kind} {:?}", selection.name);
            Err(VolumeError::NotFound { volume: volume.into(), what })
        };
    };
    let mut payload = Payload::default();
    let mut add = |path: &str, data: &[u8], mode: u32| {
        payload
            .insert(path, File { data: data.to_vec(), mode, uid: 0 })
            .map_err(|reason| VolumeError::Invalid { volume: volume.into(), reason })
    };
    match selection.items.filter(|items| !items.is_empty()) {
        None => {
            for (key, data) in entries {
                add(key, data, selection.default_mode)?;
            }
        }
        Some(items) => {
            for item in items {
                let Some(data) = entries.get(item.key.as_str()) else {
                    if selection.optional {
                        continue;
                    }
                    let what = format!("{kind} {:?} key {:?}", selection.name, item.key);
                    return Err(VolumeError::NotFound { volume: volume.into(), what });
                };
                add(&item.path, data, item.mode.map_or(selection.default_mode, mode_bits))?;
            }
        }
    }
    Ok(payload)
}

/// Permission bits of an API mode.
pub(super) fn mode_bits(mode: i32) -> u32 {
    mode.unsigned_abs() & 0o777
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::KeyToPath;

    use super::*;

    #[test]
    fn keys_are_selected_and_missing_ones_named() {
        let entries = || Some(BTreeMap::from([("a", &b"1"[..]), ("b", &b"2"[..])]));
        let item =
            |key: &str, path: &str, mode| KeyToPath { key: key.into(), path: path.into(), mode };
        let run = |entries, items: Option<Vec<KeyToPath>>, optional| {
            let selection = Selection {
                volume: "v",
                name: "o",
                items: items.as_ref(),
                default_mode: 0o644,
                optional,
            };
            keyed_payload("configmap", entries, &selection)
        };
        let paths = |payload: Result<Payload, VolumeError>| -> Vec<(String, u32)> {
            payload.unwrap().files().map(|(p, f)| (p.to_owned(), f.mode)).collect()
        };
        assert_eq!(paths(run(entries(), None, false)), [("a".into(), 0o644), ("b".into(), 0o644)]);
        let items = vec![item("b", "x/y", Some(0o400))];
        assert_eq!(paths(run(entries(), Some(items), false)), [("x/y".into(), 0o400)]);
        let missing = vec![item("z", "z", None), item("a", "a", None)];
        let error = run(entries(), Some(missing.clone()), false).unwrap_err().to_string();
        assert_eq!(error, "volume \"v\": configmap \"o\" key \"z\" not found");
        assert_eq!(paths(run(entries(), Some(missing), true)), [("a".into(), 0o644)]);
        assert!(run(None, None, false).is_err());
        assert_eq!(paths(run(None, None, true)), []);
        assert!(run(entries(), Some(vec![item("a", "../x", None)]), false).is_err());
    }
}
