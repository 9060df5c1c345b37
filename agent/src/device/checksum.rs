//! The checksum that kubelet holds its checkpoint to: FNV-1a (32 bits) of the data as Go prints it, types
//! and all. With it a kubelet that comes back to the node takes the file. Pure.

use std::fmt::Write as _;

use super::checkpoint::Data;

/// Of `data` with its entries in this order.
pub(super) fn of(data: &Data) -> u64 {
    of_text(&printed(data))
}

/// Of what Go prints.
pub(crate) fn of_text(printed: &str) -> u64 {
    // FNV's offset basis and prime.
    let hash = printed
        .bytes()
        .fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    u64::from(hash)
}

fn printed(data: &Data) -> String {
    let mut text =
        "(checkpoint.checkpointData){PodDeviceEntries:([]checkpoint.PodDevicesEntry)[".to_owned();
    let join = |parts: Vec<String>| parts.join(" ");
    let entries = data.entries.iter().map(|entry| {
        let nodes = entry.devices.iter().map(|(node, ids)| format!("{node}:[{}]", ids.join(" ")));
        let response = entry.response.iter().map(u8::to_string);
        format!(
            "{{PodUID:(string){} ContainerName:(string){} ResourceName:(string){} \
             DeviceIDs:(checkpoint.DevicesPerNUMA)map[{}] AllocResp:([]uint8)[{}]}}",
            entry.pod_uid,
            entry.container,
            entry.resource,
            join(nodes.collect()),
            join(response.collect()),
        )
    });
    text += &join(entries.collect());
    let registered = data.registered.iter().map(|(name, ids)| match ids {
        Some(ids) => format!("{name}:[{}]", ids.join(" ")),
        None => format!("{name}:<nil>"),
    });
    let registered = join(registered.collect());
    // Writing to a string does not fail.
    let _ = write!(text, "] RegisteredDevices:(map[string][]string)map[{registered}]}}");
    text
}

#[cfg(test)]
mod tests {
    use super::super::checkpoint::Entry;
    use super::*;

    #[test]
    fn kubelets_own_checksums_are_met() {
        // As `MarshalCheckpoint` of kubelet 1.36 has them.
        let text = |list: &[&str]| list.iter().map(|id| (*id).to_owned()).collect::<Vec<_>>();
        let entry = |uid: &str, name: &str, devices: &[(i64, &[&str])], response: &[u8]| Entry {
            pod_uid: uid.into(),
            container: name.into(),
            resource: "example.com/dev".into(),
            devices: devices.iter().map(|(node, ids)| (*node, text(ids))).collect(),
            response: response.into(),
        };
        let data = Data {
            entries: vec![
                entry(
                    "u-1",
                    "c",
                    &[(10, &["z"]), (-1, &["b"]), (0, &["a", "c"])],
                    &[10, 6, 10, 1, 65, 18, 1, 49, 200],
                ),
                entry("u-2", "d", &[(-1, &["d\"\\é\n"])], &[]),
            ],
            registered: [
                ("example.com/dev".into(), Some(text(&["a", "b"]))),
                ("example.com/no".into(), Some(Vec::new())),
            ]
            .into(),
        };
        assert_eq!(of(&data), 3_603_353_105);
        assert_eq!(of(&Data::default()), 2_932_075_448);
    }
}
