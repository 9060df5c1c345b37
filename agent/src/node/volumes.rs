//! `status.volumesInUse`: attachable volumes that must not be detached, as they are mounted here.
//!
//! What pods use now is told by who mounts it. An earlier agent, or a kubelet whose place was taken
//! (`join --adopt`), may have left more: what was listed stays as long as files say that the volume
//! is there (`vol_data.json`), then it goes, so that the attach-detach controller can detach it.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;

/// Unique names of CSI volumes begin so; `<driver>^<handle>` follows.
const CSI: &str = "kubernetes.io/csi/";

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct VolumeData {
    driver_name: String,
    volume_handle: String,
}

/// What the Node shall say, where it said `told` and pods use what is `wanted`.
pub(super) fn in_use(root: &Path, told: &[String], mut wanted: BTreeSet<String>) -> Vec<String> {
    let left: Vec<String> = told.iter().filter(|name| !wanted.contains(*name)).cloned().collect();
    wanted.extend(still_in_use(root, &left));
    wanted.into_iter().collect()
}

/// Those of the volumes `told` that the kubelet's folder `root` still has.
fn still_in_use(root: &Path, told: &[String]) -> Vec<String> {
    if told.is_empty() {
        return Vec::new();
    }
    let of_pods: Vec<PathBuf> = entries(&root.join("pods"))
        .map(|pod| pod.join("volumes"))
        .flat_map(|v| entries(&v))
        .collect();
    let csi = of_pods.iter().filter(|plugin| plugin.ends_with("kubernetes.io~csi"));
    let mounted = csi.flat_map(|plugin| entries(plugin)).map(|volume| volume.join("vol_data.json"));
    let devices = entries(&root.join("plugins/kubernetes.io/csi/volumeDevices"))
        .map(|volume| volume.join("data/vol_data.json"));
    // Staged for the node, whether a pod has it or not.
    let staged = entries(&root.join("plugins/kubernetes.io/csi"))
        .filter(|driver| !driver.ends_with("volumeDevices"))
        .flat_map(|driver| entries(&driver))
        .map(|volume| volume.join("vol_data.json"));
    let there: BTreeSet<String> =
        mounted.chain(devices).chain(staged).filter_map(|file| name(&file)).collect();
    let has_plugin = |name: &str| {
        let folder = name.splitn(3, '/').take(2).collect::<Vec<_>>().join("~");
        of_pods.iter().any(|found| found.ends_with(&folder) && entries(found).next().is_some())
    };
    let stays = |name: &&String| {
        if name.starts_with(CSI) { there.contains(*name) } else { has_plugin(name) }
    };
    told.iter().filter(stays).cloned().collect()
}

fn name(file: &Path) -> Option<String> {
    let data: VolumeData = serde_json::from_slice(&fs::read(file).ok()?).ok()?;
    Some(format!("{CSI}{}^{}", data.driver_name, data.volume_handle))
}

fn entries(folder: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_kubelet_left_is_in_use_while_its_files_are_there() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, driver: &str, handle: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            let data =
                serde_json::json!({"driverName": driver, "volumeHandle": handle, "specVolID": "x"});
            fs::write(path, data.to_string()).unwrap();
        };
        write("pods/u/volumes/kubernetes.io~csi/pv-1/vol_data.json", "d.example", "1");
        write("plugins/kubernetes.io/csi/volumeDevices/pv-2/data/vol_data.json", "d.example", "2");
        fs::create_dir_all(root.path().join("pods/u/volumes/kubernetes.io~iscsi/pv-3")).unwrap();
        let told = [
            "kubernetes.io/csi/d.example^1",
            "kubernetes.io/csi/d.example^2",
            "kubernetes.io/csi/d.example^gone",
            "kubernetes.io/iscsi/10.0.0.1:3260:iqn:0",
            "kubernetes.io/fc/gone",
        ]
        .map(str::to_owned);
        let stay = still_in_use(root.path(), &told);
        assert_eq!(stay, [&told[0], &told[1], &told[3]].map(String::clone));
        fs::remove_dir_all(root.path().join("pods")).unwrap();
        assert_eq!(still_in_use(root.path(), &told), [told[1].clone()]);
        write("plugins/kubernetes.io/csi/d.example/0123/vol_data.json", "d.example", "1");
        let wanted = BTreeSet::from(["kubernetes.io/csi/d.example^new".to_owned()]);
        let said = in_use(root.path(), &told, wanted);
        assert_eq!(said, [&told[0], &told[1], "kubernetes.io/csi/d.example^new"]);
    }
}
