//! The tests' CSI driver on a node, and the part of the control plane that it needs: somebody who
//! attaches and detaches.

use std::ops::Deref;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

use super::caller::{Caller, MERGE};
use super::eventually;
use super::node::{Node, built};
use super::scripted::Scripted;

/// STAGE_UNSTAGE_VOLUME.
pub const STAGE: i32 = 1;
/// GET_VOLUME_STATS.
pub const STATS: i32 = 2;
/// EXPAND_VOLUME.
pub const EXPAND: i32 = 3;
/// VOLUME_MOUNT_GROUP.
pub const MOUNT_GROUP: i32 = 6;

/// A driver that runs on a node.
pub struct CsiDriver {
    name: String,
    scripted: Scripted,
    socket: PathBuf,
    options: Value,
}

impl Deref for CsiDriver {
    type Target = Scripted;

    fn deref(&self) -> &Scripted {
        &self.scripted
    }
}

impl CsiDriver {
    /// Starts the driver `name` with these capabilities and waits until the node has taken it.
    ///
    /// # Errors
    /// When it cannot be started.
    pub async fn start(node: &Node, name: &str, capabilities: &[i32]) -> Result<Self> {
        let options = json!({"capabilities": capabilities, "nodeId": format!("id-of-{}", node.name()),
            "maxVolumes": 7, "topology": {"topology.test.example/rack": "r1"}, "versions": ["1.0.0"]});
        let mut driver = Self::prepare(node, name, options);
        driver.spawn(node)?;
        driver.registered(1).await;
        Ok(driver)
    }

    /// One that is not started yet.
    pub fn prepare(node: &Node, name: &str, options: Value) -> Self {
        Self {
            name: name.to_owned(),
            scripted: Scripted::prepare(node, Path::new("/var/lib/csi-test").join(name)),
            socket: PathBuf::from(format!("/var/lib/kubelet/plugins_registry/{name}-reg.sock")),
            options,
        }
    }

    /// Starts it (again).
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn spawn(&mut self, node: &Node) -> Result<()> {
        let mut command = node.command(built("csi-driver")?);
        command.arg(&self.name).arg(&self.scripted.inside).arg(&self.socket);
        self.scripted.spawn(command.arg(self.options.to_string()))
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The folder that is the volume `handle`, as the test reaches it.
    pub fn volume(&self, handle: &str) -> PathBuf {
        self.folder.join("volumes").join(handle)
    }

    /// The file that is the volume `handle` as a device, as the test reaches it.
    pub fn disk(&self, handle: &str) -> PathBuf {
        let node = self.options["nodeId"].as_str().unwrap_or_default();
        self.folder.join("disks").join(format!("disk.{node}.{handle}.img"))
    }

    /// What it was asked for the volume `handle`, in order.
    pub fn verbs(&self, handle: &str) -> Vec<String> {
        let of = |call: &Value| call["volume"] == handle;
        self.calls().iter().filter(|c| of(c)).map(|c| text(&c["verb"])).collect()
    }

    /// The last call of `verb` for the volume `handle`.
    ///
    /// # Errors
    /// When there was none.
    pub fn last(&self, verb: &str, handle: &str) -> Result<Value> {
        let wanted = |call: &Value| call["verb"] == verb && call["volume"] == handle;
        self.calls().into_iter().rfind(wanted).with_context(|| format!("no {verb} of {handle}"))
    }

    /// Waits until it was told so often that it is registered.
    pub async fn registered(&self, times: usize) {
        eventually("the CSI driver is registered", async || {
            let calls = self.calls();
            let told: Vec<&Value> = calls.iter().filter(|c| c["verb"] == "notify").collect();
            let good = told.iter().filter(|c| c["registered"] == true).count();
            if good >= times { Ok(()) } else { bail!("{told:?}") }
        })
        .await;
    }

    /// Kills it; its socket stays, as after a crash, or goes, as when it is taken away.
    ///
    /// # Errors
    /// When the socket cannot be removed.
    pub fn stop(&mut self, node: &Node, socket_too: bool) -> Result<()> {
        self.scripted.end();
        if socket_too {
            std::fs::remove_file(node.path(&self.socket.display().to_string()))?;
        }
        Ok(())
    }
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

/// Makes a CSIDriver object, a PersistentVolume of it and a claim that is bound to that.
pub struct Volumes<'a> {
    /// The administrator.
    pub admin: &'a Caller,
    /// Namespace of the claims.
    pub namespace: &'a str,
    /// The driver's name.
    pub driver: &'a str,
}

impl Volumes<'_> {
    /// The CSIDriver object.
    ///
    /// # Errors
    /// When it is refused.
    pub async fn driver_object(&self, spec: Value) -> Result<Value> {
        let object = json!({"metadata": {"name": self.driver}, "spec": spec});
        self.admin.create("/apis/storage.k8s.io/v1/csidrivers", object).await
    }

    /// A claim `name` that is bound to a PersistentVolume of the same name and handle.
    ///
    /// # Errors
    /// When it is refused.
    pub async fn claim(&self, name: &str, source: Value) -> Result<()> {
        let mut csi = json!({"driver": self.driver, "volumeHandle": name, "fsType": "ext4"});
        let map = csi.as_object_mut().context("an object")?;
        map.extend(source.as_object().cloned().unwrap_or_default());
        self.claim_of(name, json!({"csi": csi})).await
    }

    /// As [`Volumes::claim`], with a volume that is given as a device.
    ///
    /// # Errors
    /// When it is refused.
    pub async fn device(&self, name: &str) -> Result<()> {
        let csi = json!({"driver": self.driver, "volumeHandle": name});
        self.claim_of(name, json!({"volumeMode": "Block", "csi": csi})).await
    }

    /// A claim `name` that is bound to a PersistentVolume of the same name made of `source`.
    ///
    /// # Errors
    /// When it is refused.
    pub async fn claim_of(&self, name: &str, source: Value) -> Result<()> {
        let claims = format!("/api/v1/namespaces/{}/persistentvolumeclaims", self.namespace);
        let common = json!({"accessModes": ["ReadWriteOnce"], "storageClassName": "",
            "volumeMode": "Filesystem"});
        let with = |more: Value| {
            let mut spec = common.clone();
            if let (Some(spec), Some(more)) = (spec.as_object_mut(), more.as_object()) {
                spec.extend(more.clone());
            }
            spec
        };
        let spec = with(json!({"volumeName": name, "resources": {"requests": {"storage": "1Gi"}}}));
        let claim = json!({"metadata": {"name": name}, "spec": spec});
        let claim = self.admin.create(&claims, claim).await?;
        let mut spec = with(json!({"capacity": {"storage": "1Gi"}, "claimRef": {
            "kind": "PersistentVolumeClaim", "namespace": self.namespace, "name": name,
            "uid": claim["metadata"]["uid"]}}));
        if let (Some(spec), Some(source)) = (spec.as_object_mut(), source.as_object()) {
            spec.extend(source.clone());
        }
        let pv = json!({"metadata": {"name": name}, "spec": spec});
        self.admin.create("/api/v1/persistentvolumes", pv).await?;
        self.phase(name, "Bound").await
    }

    /// Sets the claim's phase, as the controller does.
    ///
    /// # Errors
    /// When it is refused.
    pub async fn phase(&self, name: &str, phase: &str) -> Result<()> {
        let claims = format!("/api/v1/namespaces/{}/persistentvolumeclaims", self.namespace);
        let status = json!({"status": {"phase": phase, "capacity": {"storage": "1Gi"}}});
        let path = format!("{claims}/{name}/status");
        match self.admin.patch(&path, MERGE, status).await {
            (200, _) => Ok(()),
            (code, answer) => bail!("set the phase of {name}: {code} {answer}"),
        }
    }

    /// Attaches `handle` to the node as the attach-detach controller and an attacher do: once the Node
    /// says that it is in use, or at once.
    ///
    /// # Errors
    /// When it is refused.
    pub async fn attach(&self, node: &str, handle: &str, metadata: Value) -> Result<()> {
        let name = attachment_name(handle, self.driver, node);
        let object = json!({"metadata": {"name": name}, "spec": {"attacher": self.driver,
            "nodeName": node, "source": {"persistentVolumeName": handle}}});
        self.admin.create("/apis/storage.k8s.io/v1/volumeattachments", object).await?;
        let path = format!("/apis/storage.k8s.io/v1/volumeattachments/{name}/status");
        let status = json!({"status": {"attached": true, "attachmentMetadata": metadata}});
        let (code, answer) = self.admin.patch(&path, MERGE, status).await;
        if code != 200 {
            bail!("attach {handle}: {code} {answer}");
        }
        let path = format!("/api/v1/nodes/{node}/status");
        let attached = json!({"status": {"volumesAttached": [{"devicePath": "",
            "name": unique_name(self.driver, handle)}]}});
        match self.admin.patch(&path, MERGE, attached).await {
            (200, _) => Ok(()),
            (code, answer) => bail!("tell the node of {handle}: {code} {answer}"),
        }
    }

    /// Waits until the Node says that `handle` is in use, or is not any more.
    pub async fn in_use(&self, node: &str, handle: &str, wanted: bool) {
        let name = unique_name(self.driver, handle);
        eventually(&format!("{name} in use: {wanted}"), async || {
            let node = self.admin.read(&format!("/api/v1/nodes/{node}")).await?;
            let used = &node["status"]["volumesInUse"];
            let found = used.as_array().is_some_and(|all| all.iter().any(|v| *v == name));
            if found == wanted { Ok(()) } else { bail!("{used}") }
        })
        .await;
    }
}

/// The name in a Node's status.
pub fn unique_name(driver: &str, handle: &str) -> String {
    format!("kubernetes.io/csi/{driver}^{handle}")
}

/// The name of a VolumeAttachment.
pub fn attachment_name(handle: &str, driver: &str, node: &str) -> String {
    use sha2::Digest as _;
    let hash = sha2::Sha256::digest(format!("{handle}{driver}{node}"));
    format!("csi-{}", crate::control_plane::pki::hex(&hash))
}
