//! What CDI devices change in a container: pure, but for the look at device nodes, which the caller
//! passes in.

use std::io;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{
    Hook, HookBuilder, Hooks, LinuxDeviceType, LinuxIntelRdt, Mount, MountBuilder, Spec,
};

use super::document::{self, ContainerEdits, DeviceNode};
use super::{CdiError, Name};
use crate::spec::{HostDevice, mounts};

/// The edits of all devices of a container, each with where it comes from.
#[derive(Debug, Default)]
pub struct Edits {
    parts: Vec<Part>,
}

#[derive(Debug)]
struct Part {
    device: String,
    file: PathBuf,
    edits: ContainerEdits,
}

impl Part {
    fn failed(&self, reason: impl Into<String>) -> CdiError {
        CdiError::Edit {
            device: self.device.clone(),
            file: self.file.clone(),
            reason: reason.into(),
        }
    }
}

/// Whom device nodes belong to that do not say: the container's user, where the pod names it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Owner {
    pub uid: Option<u32>,
    pub gid: Option<u32>,
}

impl Edits {
    pub(super) fn add(&mut self, name: &Name, file: &Path, edits: &ContainerEdits) {
        self.parts.push(Part {
            device: name.to_string(),
            file: file.to_path_buf(),
            edits: edits.clone(),
        });
    }

    /// The variables, in order.
    pub fn environment(&self) -> Vec<String> {
        self.parts.iter().flat_map(|part| part.edits.env.clone()).collect()
    }

    /// Groups the container's process is in besides its own.
    pub fn groups(&self) -> impl Iterator<Item = u32> {
        self.parts.iter().flat_map(|p| &p.edits.additional_gids).copied().filter(|gid| *gid != 0)
    }

    /// The device nodes. `look` tells what a path of the node is, with its container path set.
    ///
    /// # Errors
    /// [`CdiError::Edit`]: what is there is not what the file says.
    pub fn devices(
        &self,
        owner: Owner,
        look: impl Fn(&Path) -> io::Result<HostDevice>,
    ) -> Result<Vec<HostDevice>, CdiError> {
        let mut devices = Vec::new();
        for part in &self.parts {
            for node in &part.edits.device_nodes {
                devices.push(device(node, owner, &look).map_err(|reason| part.failed(reason))?);
            }
        }
        Ok(devices)
    }

    /// Applies all but devices and groups.
    ///
    /// # Errors
    /// [`CdiError::Edit`] for what this runtime cannot do.
    pub fn apply(&self, spec: &mut Spec) -> Result<(), CdiError> {
        for part in &self.parts {
            if let Some(device) = part.edits.net_devices.first() {
                return Err(part.failed(format!(
                    "moving the network interface {:?} into a pod is not supported by this \
                     runtime; give the pod the interface with a CNI plugin (host-device)",
                    device.host_interface_name
                )));
            }
            self::environment(spec, &part.edits.env);
            add_mounts(spec, &part.edits.mounts).map_err(|reason| part.failed(reason))?;
            for hook in &part.edits.hooks {
                add_hook(spec, hook).map_err(|reason| part.failed(reason))?;
            }
            if let (Some(rdt), Some(linux)) = (&part.edits.intel_rdt, spec.linux_mut()) {
                linux.set_intel_rdt(Some(intel_rdt(rdt)));
            }
        }
        Ok(())
    }
}

fn environment(spec: &mut Spec, variables: &[String]) {
    let Some(process) = spec.process_mut() else { return };
    let mut all = process.env().clone().unwrap_or_default();
    for variable in variables {
        crate::spec::process::set(&mut all, variable.clone());
    }
    process.set_env(Some(all));
}

fn device(
    node: &DeviceNode,
    owner: Owner,
    look: impl Fn(&Path) -> io::Result<HostDevice>,
) -> Result<HostDevice, String> {
    let source = if node.host_path.is_empty() { &node.path } else { &node.host_path };
    let said = match node.r#type.as_str() {
        "b" => Some(LinuxDeviceType::B),
        "c" | "u" => Some(LinuxDeviceType::C),
        "p" => Some(LinuxDeviceType::P),
        _ => None,
    };
    let mut device = match said {
        // Known well enough: the node itself need not have it.
        Some(kind) if node.major != 0 || kind == LinuxDeviceType::P => HostDevice {
            kind,
            major: node.major,
            minor: node.minor,
            mode: 0o666,
            ..HostDevice::at(Path::new(source))
        },
        _ => {
            let found = look(Path::new(source)).map_err(|e| format!("device {source}: {e}"))?;
            if said.is_some_and(|kind| kind != found.kind) {
                return Err(format!(
                    "device {source} is of type {}, not {}",
                    found.kind.as_str(),
                    node.r#type
                ));
            }
            found
        }
    };
    device.path = PathBuf::from(&node.path);
    device.access =
        if node.permissions.is_empty() { "rwm".to_owned() } else { node.permissions.clone() };
    if let Some(mode) = node.file_mode {
        device.mode = mode & 0o7777;
    }
    device.uid = node.uid.or(owner.uid).unwrap_or(0);
    device.gid = node.gid.or(owner.gid).unwrap_or(0);
    Ok(device)
}

fn add_mounts(spec: &mut Spec, added: &[document::Mount]) -> Result<(), String> {
    if added.is_empty() {
        return Ok(());
    }
    let mut all = spec.mounts().clone().unwrap_or_default();
    for mount in added {
        let made = oci_mount(mount).map_err(|e| format!("mount {}: {e}", mount.container_path))?;
        mounts::place(&mut all, made);
    }
    spec.set_mounts(Some(all));
    Ok(())
}

fn oci_mount(mount: &document::Mount) -> Result<Mount, oci_spec::OciSpecError> {
    let mut options = mount.options.clone();
    // A type is rarely given, and only of a bind mount: the host path says so.
    let kind = if mount.r#type.is_empty() { "bind" } else { &mount.r#type };
    if kind == "bind" && !options.iter().any(|o| o == "bind" || o == "rbind") {
        options.push("rbind".to_owned());
    }
    MountBuilder::default()
        .destination(&mount.container_path)
        .typ(kind)
        .source(&mount.host_path)
        .options(options)
        .build()
}

fn add_hook(spec: &mut Spec, hook: &document::Hook) -> Result<(), String> {
    let mut made = HookBuilder::default().path(&hook.path);
    if !hook.args.is_empty() {
        made = made.args(hook.args.clone());
    }
    if !hook.env.is_empty() {
        made = made.env(hook.env.clone());
    }
    if let Some(timeout) = hook.timeout {
        made = made.timeout(timeout);
    }
    let made = made.build().map_err(|e| format!("hook {}: {e}", hook.path))?;
    let mut hooks = spec.hooks().clone().unwrap_or_default();
    push_hook(&mut hooks, &hook.hook_name, made);
    spec.set_hooks(Some(hooks));
    Ok(())
}

#[allow(deprecated, reason = "prestart is, and vendors' files still name it")]
fn push_hook(hooks: &mut Hooks, name: &str, hook: Hook) {
    let list = match name {
        "prestart" => hooks.prestart_mut(),
        "createRuntime" => hooks.create_runtime_mut(),
        "createContainer" => hooks.create_container_mut(),
        "startContainer" => hooks.start_container_mut(),
        "poststart" => hooks.poststart_mut(),
        _ => hooks.poststop_mut(),
    };
    list.get_or_insert_default().push(hook);
}

#[allow(deprecated, reason = "the older words for monitoring")]
fn intel_rdt(rdt: &document::IntelRdt) -> LinuxIntelRdt {
    let some = |text: &String| (!text.is_empty()).then(|| text.clone());
    let mut made = LinuxIntelRdt::default();
    made.set_clos_id(some(&rdt.clos_id));
    made.set_l3_cache_schema(some(&rdt.l3_cache_schema));
    made.set_mem_bw_schema(some(&rdt.mem_bw_schema));
    made.set_schemata((!rdt.schemata.is_empty()).then(|| rdt.schemata.clone()));
    // The two older words for it are what OCI runtimes took before.
    made.set_enable_monitoring(rdt.enable_monitoring.then_some(true));
    made.set_enable_cmt(rdt.enable_cmt.then_some(true));
    made.set_enable_mbm(rdt.enable_mbm.then_some(true));
    made
}

#[cfg(test)]
mod tests {
    use super::super::{Document, File, Registry};
    use super::*;

    fn edits(yaml: &str) -> Edits {
        let path = PathBuf::from("/etc/cdi/v.yaml");
        let text =
            format!("cdiVersion: 1.1.0\nkind: v/c\ndevices:\n- name: d\n  containerEdits:\n{yaml}");
        let document = Document::parse(&path, &text);
        assert!(document.is_ok(), "{document:?}");
        let file = File { path, priority: 0, document };
        Registry::new(Vec::new(), vec![file]).resolve(&["v/c=d".parse().unwrap()]).unwrap()
    }

    fn spec() -> Spec {
        let text = r#"{"ociVersion":"1.0.2","process":{"cwd":"/","user":{"uid":0,"gid":0},"env":["A=1"]},
            "linux":{},"mounts":[{"destination":"/proc","type":"proc","source":"proc"},
            {"destination":"/usr/lib/x","type":"bind","source":"/old","options":["rbind"]}]}"#;
        serde_json::from_str(text).unwrap()
    }

    /// A character device 7:8 of mode 0640, whatever is asked for.
    fn look(path: &Path) -> io::Result<HostDevice> {
        Ok(HostDevice { major: 7, minor: 8, mode: 0o640, uid: 3, ..HostDevice::at(path) })
    }

    #[test]
    fn variables_mounts_and_hooks_are_added() {
        let edits = edits(
            "    env: [A=2, B=3]
    mounts:
    - {hostPath: /h/x, containerPath: /usr/lib/x, options: [ro, nosuid, bind]}
    - {hostPath: /h, containerPath: /usr}
    - {hostPath: tmpfs, containerPath: /t, type: tmpfs, options: [size=1m]}
    hooks:
    - {hookName: createContainer, path: /bin/hook, args: [hook, one], env: [C=d], timeout: 3}
    - {hookName: prestart, path: /bin/old}
    - {hookName: poststop, path: /bin/last}
    intelRdt: {closID: gold, enableMonitoring: true}
    additionalGids: [44, 0]
",
        );
        let mut spec = spec();
        edits.apply(&mut spec).unwrap();
        assert_eq!(spec.process().as_ref().unwrap().env().as_deref().unwrap(), ["A=2", "B=3"]);
        let mounts: Vec<(String, String)> = spec
            .mounts()
            .iter()
            .flatten()
            .map(|m| {
                let options = m.options().clone().unwrap_or_default().join(",");
                (m.destination().display().to_string(), options)
            })
            .collect();
        let expected =
            [("/proc", ""), ("/usr", "rbind"), ("/t", "size=1m"), ("/usr/lib/x", "ro,nosuid,bind")];
        assert_eq!(mounts, expected.map(|(a, b)| (a.to_owned(), b.to_owned())));
        let hooks = spec.hooks().as_ref().unwrap();
        let hook = &hooks.create_container().as_ref().unwrap()[0];
        assert_eq!((hook.path(), hook.timeout()), (&PathBuf::from("/bin/hook"), Some(3)));
        assert_eq!(hook.args().as_deref().unwrap(), ["hook", "one"]);
        assert_eq!(hook.env().as_deref().unwrap(), ["C=d"]);
        #[allow(deprecated, reason = "files still name it")]
        let prestart = hooks.prestart();
        assert_eq!(prestart.as_ref().unwrap().len(), 1);
        assert_eq!(hooks.poststop().as_ref().unwrap().len(), 1);
        let rdt = spec.linux().as_ref().unwrap().intel_rdt().clone().unwrap();
        assert_eq!(rdt.clos_id().as_deref(), Some("gold"));
        assert_eq!(edits.groups().collect::<Vec<_>>(), [44]);
    }

    #[test]
    fn what_a_device_node_does_not_say_is_looked_up() {
        let edits = edits(
            "    deviceNodes:
    - {path: /dev/a}
    - {path: /dev/b, hostPath: /dev/host, fileMode: 0600, permissions: r, uid: 1, gid: 2}
    - {path: /dev/d, type: b, major: 9, minor: 5}
    - {path: /run/fifo, type: p}
",
        );
        let owner = Owner { uid: Some(1000), gid: None };
        let devices = edits.devices(owner, look).unwrap();
        let shown: Vec<_> = devices
            .iter()
            .map(|d| {
                let path = d.path.to_str().unwrap();
                (path, d.kind.as_str(), d.major, d.minor, d.mode, d.uid, d.gid, d.access.as_str())
            })
            .collect();
        assert_eq!(
            shown,
            [
                ("/dev/a", "c", 7, 8, 0o640, 1000, 0, "rwm"),
                ("/dev/b", "c", 7, 8, 0o600, 1, 2, "r"),
                ("/dev/d", "b", 9, 5, 0o666, 1000, 0, "rwm"),
                ("/run/fifo", "p", 0, 0, 0o666, 1000, 0, "rwm"),
            ]
        );
    }

    #[test]
    fn what_cannot_be_done_names_device_and_file() {
        let wrong = edits("    deviceNodes: [{path: /dev/a, type: b}]\n");
        let missing = edits("    deviceNodes: [{path: /dev/none}]\n");
        let none = |_: &Path| Err(io::ErrorKind::NotFound.into());
        let errors = [
            wrong.devices(Owner::default(), look).unwrap_err(),
            missing.devices(Owner::default(), none).unwrap_err(),
            edits("    netDevices: [{hostInterfaceName: eth7, name: a}]\n")
                .apply(&mut spec())
                .unwrap_err(),
        ];
        for (error, part) in errors.iter().zip(["type c, not b", "/dev/none", "eth7"]) {
            let text = error.to_string();
            assert!(text.starts_with("CDI device v/c=d (/etc/cdi/v.yaml): "), "{text}");
            assert!(text.contains(part), "{text}");
        }
    }
}
