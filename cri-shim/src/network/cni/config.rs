//! CNI network configurations: finding, reading and checking them, and what goes to a plugin.
//! Pure, but for [`read_folder`]. Source: the CNI specification 1.1, sections 1 and 2.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde_json::{Map, Value, json};

use crate::network::{NetworkError, SandboxNetwork};

/// A network: its plugins in the order of ADD.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub(crate) struct NetworkList {
    pub(crate) name: String,
    pub(crate) cni_version: String,
    pub(crate) plugins: Vec<Map<String, Value>>,
    #[serde(default)]
    pub(crate) disable_check: bool,
}

impl NetworkList {
    /// Reads a `.conflist`, or a `.conf` with a single plugin.
    ///
    /// # Errors
    /// What is wrong, for a message that names the file.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let value: Map<String, Value> =
            serde_json::from_str(text).map_err(|error| error.to_string())?;
        let name = match value.get("name").and_then(Value::as_str) {
            Some(name) if is_name(name) => name.to_owned(),
            Some(name) => return Err(format!("{name:?} is no network name")),
            None => return Err("it has no name".to_owned()),
        };
        let cni_version =
            value.get("cniVersion").and_then(Value::as_str).unwrap_or("0.1.0").to_owned();
        let disable_check = match value.get("disableCheck") {
            Some(Value::Bool(disable)) => *disable,
            Some(Value::String(text)) => text == "true",
            _ => false,
        };
        let plugins = match value.get("plugins") {
            Some(Value::Array(plugins)) => plugins
                .iter()
                .map(|plugin| plugin.as_object().cloned().ok_or("a plugin is no object"))
                .collect::<Result<Vec<_>, _>>()?,
            Some(_) => return Err("its plugins are no list".to_owned()),
            None => vec![value],
        };
        if plugins.is_empty() {
            return Err("it has no plugins".to_owned());
        }
        for plugin in &plugins {
            match plugin.get("type").and_then(Value::as_str) {
                Some(kind) if is_name(kind) => {}
                _ => return Err("a plugin has no valid type".to_owned()),
            }
        }
        Ok(Self { name, cni_version, plugins, disable_check })
    }

    /// Whether plugins of this version know CHECK and DEL's prevResult (0.4.0).
    pub(crate) fn knows_check(&self) -> bool {
        let mut parts = self.cni_version.split('.').map(|part| part.parse::<u32>().unwrap_or(0));
        let version = (parts.next().unwrap_or(0), parts.next().unwrap_or(0));
        version >= (0, 4)
    }
}

/// Names become part of paths: letters, digits, `_`, `.`, `-`, starting with one of the first two.
fn is_name(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-'))
}

/// What a plugin reads on its standard input.
pub(crate) fn plan_input(
    network: &NetworkList,
    plugin: &Map<String, Value>,
    capabilities: &Map<String, Value>,
    previous: Option<&Value>,
) -> Value {
    let mut input = plugin.clone();
    input.insert("name".to_owned(), json!(network.name));
    input.insert("cniVersion".to_owned(), json!(network.cni_version));
    let wanted: Map<String, Value> = plugin
        .get("capabilities")
        .and_then(Value::as_object)
        .into_iter()
        .flatten()
        .filter(|(_, on)| on.as_bool() == Some(true))
        .filter_map(|(name, _)| Some((name.clone(), capabilities.get(name)?.clone())))
        .collect();
    input.remove("capabilities");
    if !wanted.is_empty() {
        input.insert("runtimeConfig".to_owned(), Value::Object(wanted));
    }
    if let Some(previous) = previous {
        input.insert("prevResult".to_owned(), previous.clone());
    }
    Value::Object(input)
}

/// What the sandbox has to give to plugins that ask for it
/// (CNI conventions: portMappings, bandwidth, pod annotations).
pub(crate) fn plan_capabilities(sandbox: &SandboxNetwork) -> Map<String, Value> {
    let mut capabilities = Map::new();
    let ports: Vec<_> = sandbox
        .port_mappings
        .iter()
        .map(|port| {
            json!({
                "hostPort": port.host_port,
                "containerPort": port.container_port,
                "protocol": port.protocol.to_string(),
                "hostIP": port.host_ip.map(|ip| ip.to_string()).unwrap_or_default(),
            })
        })
        .collect();
    if !ports.is_empty() {
        capabilities.insert("portMappings".to_owned(), Value::Array(ports));
    }
    let rate = |name: &str| sandbox.annotations.get(name).and_then(|text| bits(text));
    let mut bandwidth = Map::new();
    for (annotation, key) in [
        ("kubernetes.io/ingress-bandwidth", "ingress"),
        ("kubernetes.io/egress-bandwidth", "egress"),
    ] {
        if let Some(rate) = rate(annotation) {
            bandwidth.insert(format!("{key}Rate"), json!(rate));
            // As much as one second may burst: what the kubelet's own shaping gave.
            bandwidth.insert(format!("{key}Burst"), json!(rate.min(u64::from(u32::MAX))));
        }
    }
    if !bandwidth.is_empty() {
        capabilities.insert("bandwidth".to_owned(), Value::Object(bandwidth));
    }
    capabilities.insert("io.kubernetes.cri.pod-annotations".to_owned(), json!(sandbox.annotations));
    capabilities
}

/// A Kubernetes quantity such as `10M`, in bits per second.
fn bits(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match &text[digits.len()..] {
        "" => 1,
        "k" => 1_000,
        "M" => 1_000_000,
        "G" => 1_000_000_000,
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(unit)
}

/// The pod's addresses in a result of any version.
pub(crate) fn read_ips(result: &Value) -> Vec<std::net::IpAddr> {
    let address = |text: &Value| text.as_str()?.split('/').next()?.parse().ok();
    let interfaces = result.get("interfaces").and_then(Value::as_array);
    let in_pod = |ip: &Value| {
        let at = ip.get("interface").and_then(Value::as_u64);
        match (at.and_then(|at| usize::try_from(at).ok()), interfaces) {
            (Some(at), Some(interfaces)) => interfaces
                .get(at)
                .and_then(|interface| interface.get("sandbox")?.as_str())
                .is_some_and(|sandbox| !sandbox.is_empty()),
            _ => true,
        }
    };
    let mut ips: Vec<_> = result
        .get("ips")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter(|ip| in_pod(ip))
        .filter_map(|ip| address(ip.get("address")?))
        .collect();
    // Version 0.2 and before.
    ips.extend(["ip4", "ip6"].iter().filter_map(|key| address(result.get(key)?.get("ip")?)));
    ips
}

/// The network of a folder: the first file, by name, that can be used. None when there is no file.
///
/// # Errors
/// [`NetworkError::CniConfig`] when there are files, but none can be used.
pub(crate) fn read_folder(folder: &Path) -> Result<Option<NetworkList>, NetworkError> {
    let fail = |path: PathBuf, reason: String| NetworkError::CniConfig { path, reason };
    let mut failure = None;
    for path in list(folder).map_err(|error| fail(folder.to_owned(), error.to_string()))? {
        let read = fs::read_to_string(&path)
            .map_err(|error| error.to_string())
            .and_then(|text| NetworkList::parse(&text));
        match read {
            Ok(network) => return Ok(Some(network)),
            Err(reason) => {
                tracing::warn!(path = %path.display(), reason, "CNI configuration left out");
                failure.get_or_insert_with(|| fail(path, reason));
            }
        }
    }
    failure.map_or(Ok(None), Err)
}

/// The configuration files of a folder, by name.
pub(crate) fn list(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut paths: Vec<_> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| {
            let extension = path.extension().and_then(|extension| extension.to_str());
            matches!(extension, Some("conf" | "conflist" | "json"))
        })
        .collect();
    paths.sort();
    Ok(paths)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_and_single_plugins_are_read() {
        let list = NetworkList::parse(
            r#"{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"bridge"},{"type":"portmap"}]}"#,
        )
        .unwrap();
        assert_eq!((list.plugins.len(), list.knows_check()), (2, true));
        let one = NetworkList::parse(r#"{"cniVersion":"0.3.1","name":"n","type":"ptp"}"#).unwrap();
        assert_eq!((one.plugins.len(), one.knows_check()), (1, false));
        for (text, want) in [
            ("{", "EOF"),
            (r#"{"plugins":[]}"#, "no name"),
            (r#"{"name":"../x","type":"y"}"#, "network name"),
            (r#"{"name":"n","plugins":[]}"#, "no plugins"),
            (r#"{"name":"n","plugins":[{}]}"#, "no valid type"),
            (r#"{"name":"n","type":"../../bin/sh"}"#, "no valid type"),
        ] {
            let error = NetworkList::parse(text).unwrap_err();
            assert!(error.contains(want), "{text}: {error}");
        }
    }

    #[test]
    fn plugins_get_what_they_ask_for() {
        let network = NetworkList::parse(
            r#"{"cniVersion":"1.0.0","name":"n","plugins":[
                {"type":"a","capabilities":{"portMappings":true,"bandwidth":false}},{"type":"b"}]}"#,
        )
        .unwrap();
        let mut capabilities = Map::new();
        capabilities.insert("portMappings".to_owned(), json!([1]));
        capabilities.insert("bandwidth".to_owned(), json!({}));
        let previous = json!({"ips": []});
        assert_eq!(
            plan_input(&network, &network.plugins[0], &capabilities, Some(&previous)),
            json!({"type": "a", "name": "n", "cniVersion": "1.0.0",
                "runtimeConfig": {"portMappings": [1]}, "prevResult": {"ips": []}})
        );
        assert_eq!(
            plan_input(&network, &network.plugins[1], &capabilities, None),
            json!({"type": "b", "name": "n", "cniVersion": "1.0.0"})
        );
    }

    #[test]
    fn addresses_are_read_from_every_version() {
        let result = json!({
            "interfaces": [{"name": "br"}, {"name": "eth0", "sandbox": "/ns"}],
            "ips": [{"address": "10.0.0.1/24", "interface": 0},
                {"address": "10.0.0.2/24", "interface": 1}, {"address": "fd00::2/64"}]});
        let ips: Vec<_> = read_ips(&result).iter().map(ToString::to_string).collect();
        assert_eq!(ips, ["10.0.0.2", "fd00::2"]);
        let old = json!({"ip4": {"ip": "10.0.0.3/24"}});
        assert_eq!(read_ips(&old).len(), 1);
        assert!(read_ips(&json!(null)).is_empty());
        assert_eq!(bits("10M"), Some(10_000_000));
        assert_eq!(bits("x"), None);
    }
}
