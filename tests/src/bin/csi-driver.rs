//! A CSI driver for tests: its volumes are folders of the node, bound where they are asked for, or
//! files of the node behind loop devices, where a device is asked for.
//!
//! It holds whoever asks to the protocol: what is not staged cannot be published, what is published
//! cannot be unstaged, a target's parent must be there, a Secret must come where the volume says so.
//! What it did is what the kernel has mounted; it remembers nothing, so it can be replaced at any
//! time. Files in its folder tell it to misbehave, and it writes down what it was asked.
//!
//! `csi-driver NAME FOLDER REGISTRATION-SOCKET OPTIONS-AS-JSON`

#![allow(clippy::print_stderr, reason = "a tool for tests")]

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use anyhow::Context as _;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde::Deserialize;
use serde_json::{Value, json};
use tonic::{Request, Response, Status};

#[allow(clippy::all, clippy::pedantic, missing_docs, dead_code, reason = "generated code")]
mod csi {
    tonic::include_proto!("csi.v1");
}

use csi::identity_server::{Identity, IdentityServer};
use csi::node_server::{Node, NodeServer};
use csi::volume_capability::AccessType;
use tests::driver::registration::PluginInfo;
use tests::driver::{Registrar, Script, listen};

/// How it shall be.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
struct Options {
    /// Numbers of `NodeServiceCapability.RPC.Type`.
    capabilities: Vec<i32>,
    node_id: String,
    max_volumes: i64,
    topology: HashMap<String, String>,
    versions: Vec<String>,
}

struct Driver {
    name: String,
    script: Script,
    options: Options,
}

type Answer<T> = Result<Response<T>, Status>;

impl Driver {
    async fn begin(&self, verb: &str, call: Value) -> Result<(), Status> {
        self.script.begin(verb, call).await
    }

    fn stages(&self) -> bool {
        self.options.capabilities.contains(&1)
    }

    /// The folder that is the volume.
    fn volume(&self, id: &str) -> Result<PathBuf, Status> {
        if id.is_empty() || id.contains('/') {
            return Err(Status::invalid_argument(format!("volume_id {id:?}")));
        }
        let folder = self.script.0.join("volumes").join(id);
        fs::create_dir_all(&folder)?;
        Ok(folder)
    }

    /// The file that is the volume as a device. Its name says whose it is, for a loop device outlives
    /// all else of a test.
    fn disk(&self, id: &str) -> Result<PathBuf, Status> {
        let folder = self.script.0.join("disks");
        fs::create_dir_all(&folder)?;
        Ok(folder.join(format!("disk.{}.{id}.img", self.options.node_id)))
    }

    /// The loop device of the volume, if it is attached.
    fn attached(&self, id: &str) -> Result<Option<PathBuf>, Status> {
        let disk = self.disk(id)?;
        if !disk.exists() {
            return Ok(None);
        }
        let told = losetup(&["--noheadings", "--output", "NAME", "--associated"], &disk)?;
        Ok(told.lines().next().map(|line| PathBuf::from(line.trim())))
    }

    fn attach(&self, id: &str) -> Result<PathBuf, Status> {
        if let Some(device) = self.attached(id)? {
            return Ok(device);
        }
        let disk = self.disk(id)?;
        fs::File::options().create(true).append(true).open(&disk)?.set_len(1 << 20)?;
        let told = losetup(&["--find", "--show"], &disk)?;
        Ok(PathBuf::from(told.trim()))
    }

    /// Detaches the volume's device, which nothing must show any more.
    fn detach(&self, id: &str) -> Result<(), Status> {
        let Some(device) = self.attached(id)? else { return Ok(()) };
        if let Some(point) = shown(&device)? {
            let words = format!("device is still published at {}", point.display());
            return Err(Status::failed_precondition(words));
        }
        losetup(&["--detach"], &device).map(drop)
    }
}

fn losetup(options: &[&str], path: &Path) -> Result<String, Status> {
    let output = Command::new("losetup").args(options).arg(path).output()?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        return Err(Status::internal(format!("losetup: {said}")));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Where a device is bound, if it is.
fn shown(device: &Path) -> Result<Option<PathBuf>, Status> {
    let name = device.file_name().unwrap_or_default();
    let is = |root: &str| Path::new(root).file_name() == Some(name);
    Ok(mounts()?.into_iter().find(|(_, root)| is(root)).map(|(point, _)| point))
}

fn is_block(capability: Option<&csi::VolumeCapability>) -> bool {
    capability.is_some_and(|c| matches!(c.access_type, Some(AccessType::Block(_))))
}

/// Mount points, each with the path in its file system that it shows.
fn mounts() -> Result<Vec<(PathBuf, String)>, Status> {
    let table = fs::read_to_string("/proc/self/mountinfo")?;
    let parse = |line: &str| {
        let fields: Vec<&str> = line.split(' ').collect();
        Some((PathBuf::from(fields.get(4)?), (*fields.get(3)?).to_owned()))
    };
    Ok(table.lines().filter_map(parse).collect())
}

fn is_mounted(path: &Path) -> Result<bool, Status> {
    Ok(mounts()?.iter().any(|(point, _)| point == path))
}

fn bind(source: &Path, target: &Path, read_only: bool) -> Result<(), Status> {
    let kernel = |errno: nix::errno::Errno| Status::internal(format!("mount: {}", errno.desc()));
    if !is_mounted(target)? {
        mount(Some(source), target, None::<&str>, MsFlags::MS_BIND, None::<&str>)
            .map_err(kernel)?;
    }
    if read_only {
        let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        mount(None::<&str>, target, None::<&str>, flags, None::<&str>).map_err(kernel)?;
    }
    Ok(())
}

fn unbind(target: &Path) -> Result<(), Status> {
    while is_mounted(target)? {
        umount2(target, MntFlags::UMOUNT_NOFOLLOW)
            .map_err(|errno| Status::internal(format!("umount: {}", errno.desc())))?;
    }
    Ok(())
}

/// Whether the capability is one that this driver can do.
fn check(capability: Option<&csi::VolumeCapability>) -> Result<Value, Status> {
    let capability = capability.ok_or_else(|| Status::invalid_argument("no volume_capability"))?;
    let mode = capability.access_mode.as_ref().map_or(0, |mode| mode.mode);
    if mode == 0 {
        return Err(Status::invalid_argument("no access_mode"));
    }
    match &capability.access_type {
        Some(AccessType::Mount(mount)) => Ok(json!({"mode": mode, "fsType": mount.fs_type,
            "mountFlags": mount.mount_flags, "group": mount.volume_mount_group})),
        Some(AccessType::Block(_)) => Ok(json!({"mode": mode, "block": true})),
        None => Err(Status::invalid_argument("no access_type")),
    }
}

/// A volume may want a Secret with a key.
fn check_secret(
    wanted: &str,
    context: &HashMap<String, String>,
    secrets: &HashMap<String, String>,
) -> Result<(), Status> {
    match context.get(wanted) {
        Some(key) if !secrets.contains_key(key) => {
            Err(Status::unauthenticated(format!("no secret {key}")))
        }
        _ => Ok(()),
    }
}

fn sorted(map: &HashMap<String, String>) -> BTreeMap<&String, &String> {
    map.iter().collect()
}

#[tonic::async_trait]
impl Node for Driver {
    async fn node_stage_volume(
        &self,
        request: Request<csi::NodeStageVolumeRequest>,
    ) -> Answer<csi::NodeStageVolumeResponse> {
        let r = request.into_inner();
        self.begin(
            "stage",
            json!({"volume": r.volume_id, "path": r.staging_target_path,
            "publishContext": sorted(&r.publish_context), "secrets": sorted(&r.secrets),
            "context": sorted(&r.volume_context)}),
        )
        .await?;
        check(r.volume_capability.as_ref())?;
        check_secret("stageSecret", &r.volume_context, &r.secrets)?;
        let (source, target) = (self.volume(&r.volume_id)?, Path::new(&r.staging_target_path));
        if !target.is_dir() {
            return Err(Status::failed_precondition("staging_target_path is no folder"));
        }
        if is_block(r.volume_capability.as_ref()) {
            self.attach(&r.volume_id)?;
            return Ok(Response::new(csi::NodeStageVolumeResponse {}));
        }
        bind(&source, target, false)?;
        Ok(Response::new(csi::NodeStageVolumeResponse {}))
    }

    async fn node_unstage_volume(
        &self,
        request: Request<csi::NodeUnstageVolumeRequest>,
    ) -> Answer<csi::NodeUnstageVolumeResponse> {
        let r = request.into_inner();
        self.begin("unstage", json!({"volume": r.volume_id, "path": r.staging_target_path}))
            .await?;
        let shown = self.volume(&r.volume_id)?;
        let staging = Path::new(&r.staging_target_path);
        // Whatever else shows the volume is published.
        let root = mounts()?.into_iter().find(|(point, _)| point == staging).map(|(_, root)| root);
        if let Some(root) = root
            && let Some((other, _)) = mounts()?
                .iter()
                .find(|(point, of)| *of == root && point != staging && !shown.starts_with(point))
        {
            let words = format!("volume is still published at {}", other.display());
            return Err(Status::failed_precondition(words));
        }
        unbind(staging)?;
        self.detach(&r.volume_id)?;
        Ok(Response::new(csi::NodeUnstageVolumeResponse {}))
    }

    async fn node_publish_volume(
        &self,
        request: Request<csi::NodePublishVolumeRequest>,
    ) -> Answer<csi::NodePublishVolumeResponse> {
        let r = request.into_inner();
        let capability = check(r.volume_capability.as_ref())?;
        self.begin(
            "publish",
            json!({"volume": r.volume_id, "path": r.target_path,
            "staging": r.staging_target_path, "readonly": r.readonly, "capability": capability,
            "publishContext": sorted(&r.publish_context), "secrets": sorted(&r.secrets),
            "context": sorted(&r.volume_context)}),
        )
        .await?;
        check_secret("publishSecret", &r.volume_context, &r.secrets)?;
        let target = Path::new(&r.target_path);
        if !target.parent().is_some_and(Path::is_dir) {
            return Err(Status::failed_precondition("the target's parent is not there"));
        }
        if is_block(r.volume_capability.as_ref()) {
            let device = match self.attached(&r.volume_id)? {
                Some(device) => device,
                None if self.stages() => {
                    return Err(Status::failed_precondition("volume is not staged"));
                }
                None => self.attach(&r.volume_id)?,
            };
            fs::File::options().create(true).append(true).open(target)?;
            bind(&device, target, false)?;
            return Ok(Response::new(csi::NodePublishVolumeResponse {}));
        }
        let ephemeral = r.volume_context.get("csi.storage.k8s.io/ephemeral");
        let mut source = self.volume(&r.volume_id)?;
        if self.stages() && ephemeral.is_none_or(|text| text != "true") {
            source = PathBuf::from(&r.staging_target_path);
            if !is_mounted(&source)? {
                return Err(Status::failed_precondition("volume is not staged"));
            }
        }
        if !target.exists() {
            fs::create_dir(target)?;
        }
        bind(&source, target, r.readonly)?;
        if ephemeral.is_some_and(|text| text == "true") {
            fs::write(target.join("context.json"), json!(sorted(&r.volume_context)).to_string())?;
        }
        Ok(Response::new(csi::NodePublishVolumeResponse {}))
    }

    async fn node_unpublish_volume(
        &self,
        request: Request<csi::NodeUnpublishVolumeRequest>,
    ) -> Answer<csi::NodeUnpublishVolumeResponse> {
        let r = request.into_inner();
        self.begin("unpublish", json!({"volume": r.volume_id, "path": r.target_path})).await?;
        let target = Path::new(&r.target_path);
        unbind(target)?;
        let removed =
            if target.is_dir() { fs::remove_dir(target) } else { fs::remove_file(target) };
        match removed {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
        if !self.stages() {
            self.detach(&r.volume_id)?;
        }
        Ok(Response::new(csi::NodeUnpublishVolumeResponse {}))
    }

    async fn node_get_volume_stats(
        &self,
        request: Request<csi::NodeGetVolumeStatsRequest>,
    ) -> Answer<csi::NodeGetVolumeStatsResponse> {
        let r = request.into_inner();
        if !is_mounted(Path::new(&r.volume_path))? {
            return Err(Status::not_found("no volume is published there"));
        }
        let usage = |unit| csi::VolumeUsage { available: 60, total: 100, used: 40, unit };
        let usage = vec![usage(1), usage(2)];
        Ok(Response::new(csi::NodeGetVolumeStatsResponse { usage, volume_condition: None }))
    }

    async fn node_expand_volume(
        &self,
        request: Request<csi::NodeExpandVolumeRequest>,
    ) -> Answer<csi::NodeExpandVolumeResponse> {
        let r = request.into_inner();
        let wanted = r.capacity_range.map_or(0, |range| range.required_bytes);
        self.begin(
            "expand",
            json!({"volume": r.volume_id, "path": r.volume_path,
            "staging": r.staging_target_path, "bytes": wanted}),
        )
        .await?;
        if !is_mounted(Path::new(&r.volume_path))? {
            return Err(Status::not_found("no volume is published there"));
        }
        Ok(Response::new(csi::NodeExpandVolumeResponse { capacity_bytes: wanted }))
    }

    async fn node_get_capabilities(
        &self,
        _: Request<csi::NodeGetCapabilitiesRequest>,
    ) -> Answer<csi::NodeGetCapabilitiesResponse> {
        use csi::node_service_capability::{Rpc, Type};
        let capability = |number: &i32| csi::NodeServiceCapability {
            r#type: Some(Type::Rpc(Rpc { r#type: *number })),
        };
        let capabilities = self.options.capabilities.iter().map(capability).collect();
        Ok(Response::new(csi::NodeGetCapabilitiesResponse { capabilities }))
    }

    async fn node_get_info(
        &self,
        _: Request<csi::NodeGetInfoRequest>,
    ) -> Answer<csi::NodeGetInfoResponse> {
        self.begin("info", json!({})).await?;
        let Options { node_id, max_volumes, topology, .. } = self.options.clone();
        Ok(Response::new(csi::NodeGetInfoResponse {
            node_id,
            max_volumes_per_node: max_volumes,
            accessible_topology: Some(csi::Topology { segments: topology }),
        }))
    }
}

#[tonic::async_trait]
impl Identity for Driver {
    async fn get_plugin_info(
        &self,
        _: Request<csi::GetPluginInfoRequest>,
    ) -> Answer<csi::GetPluginInfoResponse> {
        Ok(Response::new(csi::GetPluginInfoResponse {
            name: self.name.clone(),
            vendor_version: "1".into(),
            manifest: HashMap::new(),
        }))
    }

    async fn get_plugin_capabilities(
        &self,
        _: Request<csi::GetPluginCapabilitiesRequest>,
    ) -> Answer<csi::GetPluginCapabilitiesResponse> {
        Ok(Response::new(csi::GetPluginCapabilitiesResponse { capabilities: Vec::new() }))
    }

    async fn probe(&self, _: Request<csi::ProbeRequest>) -> Answer<csi::ProbeResponse> {
        Ok(Response::new(csi::ProbeResponse { ready: Some(true) }))
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [name, folder, socket, options] = &arguments[..] else {
        anyhow::bail!("usage: csi-driver NAME FOLDER REGISTRATION-SOCKET OPTIONS-AS-JSON");
    };
    let options: Options = serde_json::from_str(options).context("read the options")?;
    let folder = PathBuf::from(folder);
    fs::create_dir_all(&folder)?;
    let endpoint = folder.join("csi.sock");
    let driver = Arc::new(Driver { name: name.clone(), script: Script(folder), options });
    let serving = tonic::transport::Server::builder()
        .add_service(NodeServer::from_arc(driver.clone()))
        .add_service(IdentityServer::from_arc(driver.clone()))
        .serve_with_incoming(listen(&endpoint)?);
    let info = PluginInfo {
        r#type: "CSIPlugin".into(),
        name: driver.name.clone(),
        endpoint: endpoint.display().to_string(),
        supported_versions: driver.options.versions.clone(),
    };
    let registering = tonic::transport::Server::builder()
        .add_service(Registrar::service(driver.script.clone(), info))
        .serve_with_incoming(listen(Path::new(socket))?);
    tokio::try_join!(serving, registering)?;
    Ok(())
}
