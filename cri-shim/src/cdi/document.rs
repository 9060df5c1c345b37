//! A CDI file: its fields, and what makes one valid.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;

use super::{Kind, Name};

/// Versions of the format there are, oldest first.
const VERSIONS: [&str; 8] =
    ["0.3.0", "0.4.0", "0.5.0", "0.6.0", "0.7.0", "0.8.0", "1.0.0", "1.1.0"];

const HOOKS: [&str; 6] =
    ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"];

/// Why a file is of no use.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum DocumentError {
    #[error("not readable: {0}")]
    Syntax(String),
    #[error("cdiVersion {0:?} is not known; 0.3.0 to 1.1.0 are")]
    Version(String),
    #[error("{what} needs cdiVersion {needed} or later, and the file says {said}")]
    TooOld { what: &'static str, needed: &'static str, said: String },
    #[error("{0}")]
    Invalid(String),
}

/// A file's content.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Document {
    pub cdi_version: String,
    pub kind: String,
    #[serde(default)]
    pub annotations: BTreeMap<String, String>,
    #[serde(default)]
    pub devices: Vec<Device>,
    /// For each container that gets any of the devices.
    #[serde(default)]
    pub container_edits: ContainerEdits,
}

/// One device.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Device {
    pub name: String,
    #[serde(default)]
    pub annotations: BTreeMap<String, String>,
    #[serde(default)]
    pub container_edits: ContainerEdits,
}

/// What changes in a container.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct ContainerEdits {
    pub env: Vec<String>,
    pub device_nodes: Vec<DeviceNode>,
    pub net_devices: Vec<NetDevice>,
    pub hooks: Vec<Hook>,
    pub mounts: Vec<Mount>,
    pub intel_rdt: Option<IntelRdt>,
    #[serde(rename = "additionalGids")]
    pub additional_gids: Vec<u32>,
}

/// A device node; what it does not say is the node's own.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct DeviceNode {
    pub path: String,
    pub host_path: String,
    pub r#type: String,
    pub major: i64,
    pub minor: i64,
    pub file_mode: Option<u32>,
    pub permissions: String,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
}

/// A network interface that moves into the pod.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct NetDevice {
    pub host_interface_name: String,
    pub name: String,
}

/// A program that is run around the container's start or end.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Hook {
    pub hook_name: String,
    pub path: String,
    pub args: Vec<String>,
    pub env: Vec<String>,
    /// Seconds.
    pub timeout: Option<i64>,
}

/// A mount.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Mount {
    pub host_path: String,
    pub container_path: String,
    pub options: Vec<String>,
    pub r#type: String,
}

/// Shares of cache and memory bandwidth (resctrl).
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct IntelRdt {
    #[serde(rename = "closID")]
    pub clos_id: String,
    #[serde(rename = "l3CacheSchema")]
    pub l3_cache_schema: String,
    #[serde(rename = "memBwSchema")]
    pub mem_bw_schema: String,
    pub schemata: Vec<String>,
    #[serde(rename = "enableMonitoring")]
    pub enable_monitoring: bool,
    #[serde(rename = "enableCMT")]
    pub enable_cmt: bool,
    #[serde(rename = "enableMBM")]
    pub enable_mbm: bool,
}

impl Document {
    /// Reads a file by the ending of its name.
    ///
    /// # Errors
    /// [`DocumentError`], also for what is well written and means nothing.
    pub fn parse(path: &Path, text: &str) -> Result<Self, DocumentError> {
        let json = path.extension().is_some_and(|ending| ending == "json");
        let document: Document = if json {
            serde_json::from_str(text).map_err(|e| DocumentError::Syntax(e.to_string()))?
        } else {
            // File modes are written 0666, as YAML 1.1 has it.
            let options =
                serde_saphyr::options! { legacy_octal_numbers: true, with_snippet: false };
            serde_saphyr::from_str_with_options(text, options)
                .map_err(|e| DocumentError::Syntax(first_line(&e.to_string())))?
        };
        document.check()?;
        Ok(document)
    }

    /// The names of its devices, in the file's order.
    pub fn names(&self) -> Result<Vec<Name>, DocumentError> {
        let invalid = |what: &str, reason| DocumentError::Invalid(format!("{what:?}: {reason}"));
        let kind = Kind::parse(&self.kind).map_err(|reason| invalid(&self.kind, reason))?;
        let name = |device: &Device| {
            Name::new(&kind, &device.name).map_err(|reason| invalid(&device.name, reason))
        };
        self.devices.iter().map(name).collect()
    }

    fn check(&self) -> Result<(), DocumentError> {
        let version = self.cdi_version.strip_prefix('v').unwrap_or(&self.cdi_version);
        let at = VERSIONS.iter().position(|known| *known == version);
        let at = at.ok_or_else(|| DocumentError::Version(self.cdi_version.clone()))?;
        let names = self.names()?;
        for (at, name) in names.iter().enumerate() {
            if names[..at].contains(name) {
                return Err(DocumentError::Invalid(format!("device {name} is there twice")));
            }
        }
        for device in &self.devices {
            if device.container_edits == ContainerEdits::default() {
                let text = format!("device {:?} has no containerEdits", device.name);
                return Err(DocumentError::Invalid(text));
            }
            device.container_edits.check()?;
        }
        self.container_edits.check()?;
        for (what, needed, used) in self.features() {
            if used && VERSIONS.iter().position(|known| *known == needed) > Some(at) {
                let said = self.cdi_version.clone();
                return Err(DocumentError::TooOld { what, needed, said });
            }
        }
        Ok(())
    }

    /// What later versions brought, and whether it is used.
    fn features(&self) -> [(&'static str, &'static str, bool); 7] {
        let edits = || {
            std::iter::once(&self.container_edits)
                .chain(self.devices.iter().map(|d| &d.container_edits))
        };
        let rdt =
            |used: fn(&IntelRdt) -> bool| edits().any(|e| e.intel_rdt.as_ref().is_some_and(used));
        let annotated = !self.annotations.is_empty()
            || self.devices.iter().any(|device| !device.annotations.is_empty());
        let dotted = Kind::parse(&self.kind).is_ok_and(|kind| kind.class().contains('.'));
        [
            (
                "the type of a mount",
                "0.4.0",
                edits().any(|e| e.mounts.iter().any(|m| !m.r#type.is_empty())),
            ),
            (
                "hostPath of a device node",
                "0.5.0",
                edits().any(|e| e.device_nodes.iter().any(|d| !d.host_path.is_empty())),
            ),
            ("annotations", "0.6.0", annotated),
            ("a class with a dot", "0.6.0", dotted),
            (
                "intelRdt or additionalGids",
                "0.7.0",
                edits().any(|e| e.intel_rdt.is_some() || !e.additional_gids.is_empty()),
            ),
            ("netDevices", "1.1.0", edits().any(|e| !e.net_devices.is_empty())),
            (
                "schemata or enableMonitoring of intelRdt",
                "1.1.0",
                rdt(|r| r.enable_monitoring || !r.schemata.is_empty()),
            ),
        ]
    }
}

impl ContainerEdits {
    fn check(&self) -> Result<(), DocumentError> {
        let invalid = |text: String| Err(DocumentError::Invalid(text));
        let variable = |entry: &String| entry.find('=').is_some_and(|at| at > 0);
        if let Some(bad) = self.env.iter().find(|entry| !variable(entry)) {
            return invalid(format!("env {bad:?} is not NAME=value"));
        }
        for device in &self.device_nodes {
            if device.path.is_empty() {
                return invalid("a device node has no path".to_owned());
            }
            if !["", "b", "c", "u", "p"].contains(&device.r#type.as_str()) {
                return invalid(format!("device {}: type {:?}", device.path, device.r#type));
            }
            if device.permissions.chars().any(|c| !"rwm".contains(c)) {
                return invalid(format!(
                    "device {}: permissions {:?}, may hold r, w and m",
                    device.path, device.permissions
                ));
            }
        }
        for hook in &self.hooks {
            if !HOOKS.contains(&hook.hook_name.as_str()) {
                return invalid(format!("hook {:?}, may be one of {HOOKS:?}", hook.hook_name));
            }
            if hook.path.is_empty() {
                return invalid(format!("a {} hook has no path", hook.hook_name));
            }
            if let Some(bad) = hook.env.iter().find(|entry| !variable(entry)) {
                return invalid(format!("env {bad:?} of hook {} is not NAME=value", hook.path));
            }
        }
        for mount in &self.mounts {
            if mount.host_path.is_empty() || mount.container_path.is_empty() {
                return invalid(format!(
                    "a mount needs hostPath and containerPath, has {:?} and {:?}",
                    mount.host_path, mount.container_path
                ));
            }
        }
        for device in &self.net_devices {
            if device.host_interface_name.is_empty() || device.name.is_empty() {
                return invalid("a netDevice needs hostInterfaceName and name".to_owned());
            }
        }
        if let Some(rdt) = &self.intel_rdt {
            let id = rdt.clos_id.as_str();
            if id.len() >= 4096 || id == "." || id == ".." || id.contains(['/', '\n']) {
                return invalid(format!("closID {id:?} is not a name"));
            }
        }
        Ok(())
    }
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Document, DocumentError> {
        Document::parse(Path::new("/etc/cdi/a.yaml"), text)
    }

    const WHOLE: &str = r#"
cdiVersion: "1.1.0"
kind: vendor.com/gpu
annotations: {a: b}
devices:
- name: "0"
  containerEdits:
    env: ["A=b"]
    deviceNodes:
    - {path: /dev/gpu0, hostPath: /dev/null, type: c, major: 1, minor: 3, fileMode: 0660, permissions: rw, uid: 7, gid: 8}
    netDevices: [{hostInterfaceName: eth7, name: rdma0}]
    mounts: [{hostPath: /lib/x, containerPath: /usr/lib/x, options: [ro, bind], type: bind}]
    hooks: [{hookName: createContainer, path: /bin/hook, args: [hook, one], env: [C=d], timeout: 3}]
    intelRdt: {closID: gold, l3CacheSchema: "L3:0=f", enableMonitoring: true}
    additionalGids: [44]
containerEdits:
  env: ["ALL=1"]
"#;

    #[test]
    fn every_field_is_read_and_file_modes_are_octal() {
        let document = parse(WHOLE).unwrap();
        let edits = &document.devices[0].container_edits;
        assert_eq!(edits.device_nodes[0].file_mode, Some(0o660));
        assert_eq!(edits.net_devices[0].name, "rdma0");
        assert_eq!(edits.hooks[0].timeout, Some(3));
        assert_eq!(edits.intel_rdt.as_ref().unwrap().clos_id, "gold");
        assert_eq!(edits.additional_gids, [44]);
        assert_eq!(document.container_edits.env, ["ALL=1"]);
        assert_eq!(document.names().unwrap()[0].to_string(), "vendor.com/gpu=0");
        let json = r#"{"cdiVersion":"0.3.0","kind":"v/c","devices":[{"name":"d","containerEdits":
            {"deviceNodes":[{"path":"/dev/x","fileMode":438}]}}]}"#;
        let document = Document::parse(Path::new("a.json"), json).unwrap();
        let nodes = &document.devices[0].container_edits.device_nodes;
        assert_eq!(nodes[0].file_mode, Some(0o666));
    }

    #[test]
    fn what_is_used_must_be_of_the_version() {
        let old = parse(&WHOLE.replace("1.1.0", "0.3.0")).unwrap_err();
        assert!(matches!(old, DocumentError::TooOld { needed: "0.4.0", .. }), "{old}");
        let old = parse(&WHOLE.replace("1.1.0", "1.0.0")).unwrap_err();
        let text = old.to_string();
        assert_eq!(text, "netDevices needs cdiVersion 1.1.0 or later, and the file says 1.0.0");
        for unknown in ["9.0.0", "0.2.0", "", "1"] {
            let error = parse(&WHOLE.replace("1.1.0", unknown)).unwrap_err();
            assert_eq!(error, DocumentError::Version(unknown.to_owned()));
        }
        let dotted = "cdiVersion: 0.5.0\nkind: v/c.d\n";
        assert!(matches!(parse(dotted), Err(DocumentError::TooOld { needed: "0.6.0", .. })));
    }

    #[test]
    fn nonsense_is_refused_and_named() {
        let cases = [
            ("kind: vendor.com/gpu", "kind: gpu", "no vendor"),
            ("hookName: createContainer", "hookName: create", "\"create\""),
            ("A=b", "=b", "NAME=value"),
            ("type: c,", "type: x,", "/dev/gpu0"),
            ("permissions: rw", "permissions: rx", "/dev/gpu0"),
            ("containerPath: /usr/lib/x", "containerPath: ''", "containerPath"),
            ("closID: gold", "closID: ../x", "closID"),
            ("additionalGids", "additionalGroups", "additionalGroups"),
            ("devices:\n", "devices:\n- {name: '0', containerEdits: {env: [A=b]}}\n", "twice"),
            ("devices:\n", "devices:\n- {name: '1', containerEdits: {}}\n", "no containerEdits"),
        ];
        for (from, to, part) in cases {
            let error = parse(&WHOLE.replace(from, to)).unwrap_err().to_string();
            assert!(error.contains(part), "{to}: {error}");
        }
    }
}
