//! In-tree kinds that are CSI drivers' by now, in PersistentVolumes and written inline in pods: what of
//! CSI they stand for (the names and handles of k8s.io/csi-translation-lib, which the attach-detach
//! controller computes as well). Pure.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    AWSElasticBlockStoreVolumeSource, AzureDiskVolumeSource, CSIPersistentVolumeSource,
    GCEPersistentDiskVolumeSource, PersistentVolume, SecretReference, Volume,
    VsphereVirtualDiskVolumeSource,
};

use super::CsiVolume;

const EBS: &str = "ebs.csi.aws.com";
const AZURE_DISK: &str = "disk.csi.azure.com";
const AZURE_FILE: &str = "file.csi.azure.com";
const CINDER: &str = "cinder.csi.openstack.org";
const GCE: &str = "pd.csi.storage.gke.io";
const PORTWORX: &str = "pxd.portworx.com";
const VSPHERE: &str = "csi.vsphere.vmware.com";

const UNSPECIFIED: &str = "UNSPECIFIED";
const ZONE: &str = "topology.kubernetes.io/zone";
const OLD_ZONE: &str = "failure-domain.beta.kubernetes.io/zone";
/// Between the zones of a label that has more than one.
const ZONES: &str = "__";
const RESOURCE_GROUP: &str = "kubernetes.io/azure-file-resource-group";
const PORTWORX_SECRET: &str = "openstorage.io/auth-secret-name";
const PORTWORX_NAMESPACE: &str = "openstorage.io/auth-secret-namespace";

const ONCE: &str = "ReadWriteOnce";
const MANY: &str = "ReadWriteMany";
const READERS: &str = "ReadOnlyMany";

impl CsiVolume {
    /// The volume behind a PersistentVolume of an in-tree kind; `None` where it is of another.
    pub fn of_in_tree(pv: &PersistentVolume, read_only: bool) -> Option<Result<Self, String>> {
        let source = translate(pv)?;
        let volume = |csi: CSIPersistentVolumeSource| {
            let mut pv = pv.clone();
            let spec = pv.spec.get_or_insert_default();
            if csi.driver == GCE {
                spec.access_modes = spec.access_modes.take().map(compatible);
            }
            spec.csi = Some(csi);
            Self::of(&pv, read_only).ok_or_else(|| "it has no source".to_owned())
        };
        Some(source.and_then(volume))
    }

    /// The volume of an in-tree kind that is written inline in a pod of `namespace`; `None` where it is
    /// of another.
    pub fn of_inline_in_tree(volume: &Volume, namespace: &str) -> Option<Result<Self, String>> {
        let inline = translate_inline(volume, namespace)?;
        let volume = |Inline { name, csi, mode }: Inline| {
            let read_only = csi.read_only.unwrap_or(false);
            let mut pv = PersistentVolume::default();
            // It names a folder; kubelet writes such names so.
            pv.metadata.name = Some(name.replace('/', "~"));
            let spec = pv.spec.get_or_insert_default();
            spec.access_modes = Some(vec![mode.to_owned()]);
            spec.csi = Some(csi);
            Self::of(&pv, read_only).ok_or_else(|| "it has no source".to_owned())
        };
        Some(inline.and_then(volume))
    }
}

/// A volume written inline: there is one of the name on a node, as it names where it is staged.
struct Inline {
    name: String,
    csi: CSIPersistentVolumeSource,
    mode: &'static str,
}

fn translate(pv: &PersistentVolume) -> Option<Result<CSIPersistentVolumeSource, String>> {
    let spec = pv.spec.as_ref()?;
    let none = BTreeMap::new();
    let notes = pv.metadata.annotations.as_ref().unwrap_or(&none);
    if let Some(source) = &spec.aws_elastic_block_store {
        return Some(ebs(source));
    }
    if let Some(source) = &spec.azure_disk {
        return Some(azure_disk(source));
    }
    if let Some(source) = &spec.azure_file {
        let of_claim = spec.claim_ref.as_ref().and_then(|claim| claim.namespace.as_deref());
        let namespace = source.secret_namespace.as_deref().or(of_claim).unwrap_or_default();
        if namespace.is_empty() {
            return Some(Err("could not find a secret namespace in PersistentVolumeSource or \
                             ClaimRef"
                .into()));
        }
        let group = notes.get(RESOURCE_GROUP).map(String::as_str).unwrap_or_default();
        let name = pv.metadata.name.as_deref().unwrap_or_default();
        let share = Share { share: &source.share_name, secret: &source.secret_name, namespace };
        return Some(Ok(share.csi(group, name, source.read_only)));
    }
    if let Some(source) = &spec.cinder {
        return Some(Ok(plain(CINDER, &source.volume_id, &source.fs_type, source.read_only)));
    }
    if let Some(source) = &spec.gce_persistent_disk {
        let labels = pv.metadata.labels.as_ref().unwrap_or(&none);
        let label = |key: &str| labels.get(key).filter(|zone| !zone.is_empty());
        let zone = label(OLD_ZONE).or_else(|| label(ZONE)).map(String::as_str);
        return Some(gce(source, zone));
    }
    if let Some(source) = &spec.vsphere_volume {
        return Some(Ok(vsphere(source)));
    }
    let source = spec.portworx_volume.as_ref()?;
    let mut csi = plain(PORTWORX, &source.volume_id, &source.fs_type, None);
    if let (Some(name), Some(namespace)) =
        (notes.get(PORTWORX_SECRET), notes.get(PORTWORX_NAMESPACE))
    {
        let secret =
            Some(SecretReference { name: Some(name.clone()), namespace: Some(namespace.clone()) });
        csi.controller_publish_secret_ref = secret.clone();
        csi.controller_expand_secret_ref = secret.clone();
        csi.node_stage_secret_ref = secret.clone();
        csi.node_publish_secret_ref = secret.clone();
        csi.node_expand_secret_ref = secret;
    }
    Some(Ok(csi))
}

fn translate_inline(volume: &Volume, namespace: &str) -> Option<Result<Inline, String>> {
    let named = |driver: &str, id: &str| format!("{driver}-{id}");
    if let Some(source) = &volume.aws_elastic_block_store {
        return Some(ebs(source).map(|csi| Inline {
            name: named(EBS, &csi.volume_handle),
            csi,
            mode: ONCE,
        }));
    }
    if let Some(source) = &volume.azure_disk {
        let name = source.disk_uri.clone();
        return Some(azure_disk(source).map(|csi| Inline { name, csi, mode: ONCE }));
    }
    if let Some(source) = &volume.azure_file {
        let namespace = if namespace.is_empty() { "default" } else { namespace };
        let share = Share { share: &source.share_name, secret: &source.secret_name, namespace };
        let csi = share.csi("", &volume.name, source.read_only);
        return Some(Ok(Inline { name: csi.volume_handle.clone(), csi, mode: MANY }));
    }
    if let Some(source) = &volume.cinder {
        let csi = plain(CINDER, &source.volume_id, &source.fs_type, source.read_only);
        return Some(Ok(Inline { name: named(CINDER, &source.volume_id), csi, mode: ONCE }));
    }
    if let Some(source) = &volume.gce_persistent_disk {
        let mode = if source.read_only == Some(true) { READERS } else { ONCE };
        let name = named(GCE, &source.pd_name);
        return Some(gce(source, None).map(|csi| Inline { name, csi, mode }));
    }
    if let Some(source) = &volume.vsphere_volume {
        let name = named(VSPHERE, &source.volume_path);
        return Some(Ok(Inline { name, csi: vsphere(source), mode: ONCE }));
    }
    let source = volume.portworx_volume.as_ref()?;
    let mode = if source.read_only == Some(true) { READERS } else { ONCE };
    let csi = plain(PORTWORX, &source.volume_id, &source.fs_type, None);
    Some(Ok(Inline { name: named(PORTWORX, &source.volume_id), csi, mode }))
}

fn plain(
    driver: &str,
    handle: &str,
    fs_type: &Option<String>,
    read_only: Option<bool>,
) -> CSIPersistentVolumeSource {
    CSIPersistentVolumeSource {
        driver: driver.to_owned(),
        volume_handle: handle.to_owned(),
        read_only,
        fs_type: fs_type.clone(),
        ..CSIPersistentVolumeSource::default()
    }
}

fn with(
    mut csi: CSIPersistentVolumeSource,
    key: &str,
    value: impl Into<String>,
) -> CSIPersistentVolumeSource {
    csi.volume_attributes.get_or_insert_default().insert(key.to_owned(), value.into());
    csi
}

fn ebs(source: &AWSElasticBlockStoreVolumeSource) -> Result<CSIPersistentVolumeSource, String> {
    // `aws://<zone>/vol-x`, or as the cloud has it.
    let handle = match source.volume_id.strip_prefix("aws://") {
        None => source.volume_id.as_str(),
        Some(rest) => {
            let id = rest.split_once('/').map_or("", |(_, path)| path).trim_matches('/');
            if !id.starts_with("vol-") || id.contains('/') {
                return Err(format!("Invalid format for AWS volume ({})", source.volume_id));
            }
            id
        }
    };
    let csi = plain(EBS, handle, &source.fs_type, source.read_only);
    Ok(with(csi, "partition", source.partition.unwrap_or(0).to_string()))
}

fn azure_disk(source: &AzureDiskVolumeSource) -> Result<CSIPersistentVolumeSource, String> {
    if let Some(kind) = source.kind.as_ref().filter(|kind| !kind.eq_ignore_ascii_case("Managed")) {
        return Err(format!("kind({kind}) is not supported in csi migration"));
    }
    let csi = plain(AZURE_DISK, &source.disk_uri, &source.fs_type, source.read_only);
    let mut csi = with(csi, "kind", "Managed");
    if let Some(mode) = source.caching_mode.as_ref().filter(|mode| !mode.is_empty()) {
        csi = with(csi, "cachingmode", mode);
    }
    if let Some(fs_type) = &source.fs_type {
        csi = with(csi, "fstype", fs_type);
    }
    Ok(csi)
}

/// A share of Azure's, and the Secret that opens it.
struct Share<'a> {
    share: &'a str,
    secret: &'a str,
    namespace: &'a str,
}

impl Share<'_> {
    fn csi(&self, group: &str, name: &str, read_only: Option<bool>) -> CSIPersistentVolumeSource {
        let Self { share, secret, namespace } = self;
        let handle = format!("{group}#{}#{share}#{name}#{namespace}", account(secret));
        let mut csi = with(plain(AZURE_FILE, &handle, &None, read_only), "sharename", *share);
        csi.node_stage_secret_ref = Some(SecretReference {
            name: Some((*secret).to_owned()),
            namespace: Some((*namespace).to_owned()),
        });
        csi
    }
}

/// The storage account that a Secret's name tells of.
fn account(secret: &str) -> &str {
    let told = secret.split_once("azure-storage-account-").and_then(|(_, rest)| {
        let (account, _) = rest.rsplit_once("-secret")?;
        (!account.is_empty()).then_some(account)
    });
    told.unwrap_or(secret)
}

fn gce(
    source: &GCEPersistentDiskVolumeSource,
    zones: Option<&str>,
) -> Result<CSIPersistentVolumeSource, String> {
    let place = match zones {
        None => format!("zones/{UNSPECIFIED}"),
        Some(zones) if zones.contains(ZONES) => format!("regions/{}", region(zones)?),
        Some(zone) => format!("zones/{zone}"),
    };
    let handle = format!("projects/{UNSPECIFIED}/{place}/disks/{}", source.pd_name);
    let csi = plain(GCE, &handle, &source.fs_type, source.read_only);
    let partition = source.partition.filter(|n| *n != 0).map(|n| n.to_string());
    Ok(with(csi, "partition", partition.unwrap_or_default()))
}

/// The one region of all `zones`.
fn region(zones: &str) -> Result<String, String> {
    let mut found: Option<String> = None;
    for zone in zones.split(ZONES) {
        let parts: Vec<&str> = zone.split('-').collect();
        let [place, region, _] = parts.as_slice() else {
            return Err(format!(
                "failed to get region from zones: zone in unexpected format, expected: \
                 {{locale}}-{{region}}-{{zone}}, got: {zone}"
            ));
        };
        let region = format!("{place}-{region}");
        if found.get_or_insert_with(|| region.clone()) != &region {
            return Err(format!("failed to get region from zones: multiple in {zones}"));
        }
    }
    Ok(found.unwrap_or_default())
}

/// Access modes that the in-tree kind did not look at, and the driver refuses.
fn compatible(modes: Vec<String>) -> Vec<String> {
    let only_readers = !modes.is_empty() && modes.iter().all(|mode| mode == READERS);
    vec![if only_readers { READERS } else { ONCE }.to_owned()]
}

fn vsphere(source: &VsphereVirtualDiskVolumeSource) -> CSIPersistentVolumeSource {
    let csi = plain(VSPHERE, &source.volume_path, &source.fs_type, None);
    match source.storage_policy_name.as_ref().filter(|name| !name.is_empty()) {
        Some(policy) => with(csi, "storagepolicyname", policy),
        None => csi,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn pv(metadata: Value, spec: Value) -> Result<CsiVolume, String> {
        let mut metadata = metadata;
        metadata["name"] = json!("pv");
        let pv = serde_json::from_value(json!({"metadata": metadata, "spec": spec})).unwrap();
        CsiVolume::of_in_tree(&pv, false).unwrap()
    }

    fn inline(source: Value) -> CsiVolume {
        let mut volume = source;
        volume["name"] = json!("v");
        let volume = serde_json::from_value(volume).unwrap();
        CsiVolume::of_inline_in_tree(&volume, "ns").unwrap().unwrap()
    }

    fn attributes(volume: &CsiVolume) -> String {
        let all: Vec<String> = volume.attributes.iter().map(|(k, v)| format!("{k}={v}")).collect();
        all.join(" ")
    }

    #[test]
    fn persistent_volumes_are_those_of_drivers() {
        let ebs = |id: &str| {
            json!({"awsElasticBlockStore": {"volumeID": id, "fsType": "ext4",
            "partition": 1}, "accessModes": ["ReadWriteOnce"]})
        };
        let gce = json!({"gcePersistentDisk": {"pdName": "disk"}});
        let zone = |zone: &str| json!({"labels": {"topology.kubernetes.io/zone": zone}});
        let azure = json!({"azureDisk": {"diskName": "d", "diskURI": "/subscriptions/s/disks/d",
            "cachingMode": "ReadOnly", "fsType": "xfs", "kind": "managed"}});
        let file = json!({"azureFile": {"secretName": "azure-storage-account-acc-secret",
            "shareName": "share"}, "claimRef": {"namespace": "ns"}});
        let group = json!({"annotations": {"kubernetes.io/azure-file-resource-group": "rg"}});
        for (metadata, spec, driver, handle, told) in [
            (json!({}), ebs("vol-1"), EBS, "vol-1", "partition=1"),
            (json!({}), ebs("aws://us-east-1a/vol-2"), EBS, "vol-2", "partition=1"),
            (json!({}), ebs("aws:///vol-3"), EBS, "vol-3", "partition=1"),
            (
                json!({}),
                azure,
                AZURE_DISK,
                "/subscriptions/s/disks/d",
                "cachingmode=ReadOnly fstype=xfs kind=Managed",
            ),
            (group, file, AZURE_FILE, "rg#acc#share#pv#ns", "sharename=share"),
            (json!({}), json!({"cinder": {"volumeID": "c", "fsType": "ext4"}}), CINDER, "c", ""),
            (
                json!({}),
                gce.clone(),
                GCE,
                "projects/UNSPECIFIED/zones/UNSPECIFIED/disks/disk",
                "partition=",
            ),
            (
                zone("us-c1-a"),
                gce.clone(),
                GCE,
                "projects/UNSPECIFIED/zones/us-c1-a/disks/disk",
                "partition=",
            ),
            (
                zone("us-c1-a__us-c1-b"),
                gce,
                GCE,
                "projects/UNSPECIFIED/regions/us-c1/disks/disk",
                "partition=",
            ),
            (
                json!({}),
                json!({"vsphereVolume": {"volumePath": "[d] v/x.vmdk",
                "storagePolicyName": "gold"}}),
                VSPHERE,
                "[d] v/x.vmdk",
                "storagepolicyname=gold",
            ),
            (json!({}), json!({"portworxVolume": {"volumeID": "p"}}), PORTWORX, "p", ""),
        ] {
            let found = pv(metadata, spec.clone()).unwrap();
            assert_eq!((&*found.driver, &*found.handle), (driver, handle), "{spec}");
            assert_eq!((&*found.spec_name, found.ephemeral), ("pv", false), "{spec}");
            assert_eq!(attributes(&found), told, "{spec}");
        }
        let other = serde_json::from_value(json!({"spec": {"nfs": {"server": "s", "path": "/p"}}}));
        assert!(CsiVolume::of_in_tree(&other.unwrap(), false).is_none());
    }

    #[test]
    fn what_no_driver_could_take_is_refused() {
        for (spec, words) in [
            (json!({"awsElasticBlockStore": {"volumeID": "aws://z/disk-1"}}), "Invalid format"),
            (json!({"awsElasticBlockStore": {"volumeID": "aws://z/vol-1/x"}}), "Invalid format"),
            (
                json!({"azureDisk": {"diskName": "d", "diskURI": "u", "kind": "Dedicated"}}),
                "kind(Dedicated)",
            ),
            (json!({"azureFile": {"secretName": "s", "shareName": "x"}}), "secret namespace"),
        ] {
            let error = pv(json!({}), spec).unwrap_err();
            assert!(error.contains(words), "{error}");
        }
        let gce = json!({"gcePersistentDisk": {"pdName": "disk"}});
        for zones in ["us-c1-a__eu-w1-b", "us-c1__us-c1-b"] {
            let labels = json!({"labels": {"topology.kubernetes.io/zone": zones}});
            assert!(pv(labels, gce.clone()).unwrap_err().contains("region"), "{zones}");
        }
    }

    #[test]
    fn secrets_and_access_modes_are_those_of_the_driver() {
        let notes = json!({"annotations": {"openstorage.io/auth-secret-name": "s",
            "openstorage.io/auth-secret-namespace": "n"}});
        let found = pv(notes, json!({"portworxVolume": {"volumeID": "p"}})).unwrap();
        let secret = Some(crate::ids::NamespacedName::new("n", "s"));
        assert_eq!((&found.stage_secret, &found.publish_secret), (&secret, &secret));
        let file = json!({"azureFile": {"secretName": "plain", "shareName": "x",
            "secretNamespace": "sn"}});
        let found = pv(json!({}), file).unwrap();
        assert_eq!(found.stage_secret, Some(crate::ids::NamespacedName::new("sn", "plain")));
        assert_eq!(found.handle, "#plain#x#pv#sn");
        for (modes, expected) in [
            (json!(["ReadWriteMany"]), "ReadWriteOnce"),
            (json!(["ReadOnlyMany"]), "ReadOnlyMany"),
            (json!(["ReadOnlyMany", "ReadWriteOnce"]), "ReadWriteOnce"),
        ] {
            let gce = json!({"gcePersistentDisk": {"pdName": "disk"}, "accessModes": modes});
            assert_eq!(pv(json!({}), gce).unwrap().access_modes, Some(vec![expected.into()]));
        }
    }

    #[test]
    fn inline_volumes_are_named_by_what_they_are() {
        for (source, name, handle, mode) in [
            (
                json!({"awsElasticBlockStore": {"volumeID": "vol-1"}}),
                "ebs.csi.aws.com-vol-1",
                "vol-1",
                ONCE,
            ),
            (
                json!({"azureDisk": {"diskName": "d", "diskURI": "/s/disks/d"}}),
                "~s~disks~d",
                "/s/disks/d",
                ONCE,
            ),
            (
                json!({"azureFile": {"secretName": "s", "shareName": "x"}}),
                "#s#x#v#ns",
                "#s#x#v#ns",
                MANY,
            ),
            (json!({"cinder": {"volumeID": "c"}}), "cinder.csi.openstack.org-c", "c", ONCE),
            (
                json!({"gcePersistentDisk": {"pdName": "g", "readOnly": true}}),
                "pd.csi.storage.gke.io-g",
                "projects/UNSPECIFIED/zones/UNSPECIFIED/disks/g",
                READERS,
            ),
            (
                json!({"vsphereVolume": {"volumePath": "[d] x"}}),
                "csi.vsphere.vmware.com-[d] x",
                "[d] x",
                ONCE,
            ),
            (json!({"portworxVolume": {"volumeID": "p"}}), "pxd.portworx.com-p", "p", ONCE),
        ] {
            let found = inline(source.clone());
            assert_eq!((&*found.spec_name, &*found.handle), (name, handle), "{source}");
            assert_eq!(found.access_modes, Some(vec![mode.to_owned()]), "{source}");
            assert!(!found.ephemeral && !found.block, "{source}");
        }
        let none = Volume { name: "v".into(), ..Volume::default() };
        assert!(CsiVolume::of_inline_in_tree(&none, "ns").is_none());
    }
}
