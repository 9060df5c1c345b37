//! CNI network configurations: what a file says, and what goes to a plugin. Pure.
//! Source: the CNI specification 1.1, section 1.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::version::{Version, plan_choices};

/// A network: its plugins in the order of ADD.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub(crate) struct NetworkList {
    pub(crate) name: String,
    /// The version that plugins are run with.
    pub(crate) cni_version: String,
    /// All versions the configuration may be run with, newest first; one or none when there is
    /// nothing to choose.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) choices: Vec<String>,
    pub(crate) plugins: Vec<Map<String, Value>>,
    #[serde(default)]
    pub(crate) disable_check: bool,
    #[serde(default)]
    pub(crate) disable_gc: bool,
    /// The file's text, for those that read it elsewhere.
    #[serde(default)]
    pub(crate) source: String,
}

/// A file as read, whose plugins may be continued in a folder beside it.
#[derive(Debug)]
pub(crate) struct File {
    network: NetworkList,
    only_inlined: bool,
}

impl File {
    /// Reads a list of plugins, or a configuration of a single one.
    ///
    /// # Errors
    /// What is wrong, for a message that names the file.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let value: Map<String, Value> =
            serde_json::from_str(text).map_err(|error| error.to_string())?;
        let name = match value.get("name") {
            Some(Value::String(name)) if is_name(name) => name.clone(),
            Some(name) => return Err(format!("{name} is no network name")),
            None => return Err("it has no name".to_owned()),
        };
        let one = match value.get("cniVersion") {
            None => None,
            Some(Value::String(text)) => Some(text.as_str()),
            Some(_) => return Err("its cniVersion is no text".to_owned()),
        };
        let list: Vec<&str> = match value.get("cniVersions") {
            None => Vec::new(),
            Some(Value::Array(list)) => list
                .iter()
                .map(|version| version.as_str().ok_or("its cniVersions are no list of texts"))
                .collect::<Result<_, _>>()?,
            Some(_) => return Err("its cniVersions are no list of texts".to_owned()),
        };
        let choices: Vec<String> =
            plan_choices(one, &list)?.iter().map(ToString::to_string).collect();
        // Plugins see the version in the words of whoever wrote it, where there is no choice.
        let cni_version = match one {
            Some(text) if list.is_empty() && !text.is_empty() => text.to_owned(),
            _ => choices.first().cloned().unwrap_or_default(),
        };
        let disable_check = read_bool(&value, "disableCheck")?;
        let disable_gc = read_bool(&value, "disableGC")?;
        let only_inlined = read_bool(&value, "loadOnlyInlinedPlugins")?;
        let plugins = match value.get("plugins") {
            Some(Value::Array(plugins)) if plugins.is_empty() => {
                return Err("it has no plugins".to_owned());
            }
            Some(Value::Array(plugins)) => plugins
                .iter()
                .map(|plugin| plugin.as_object().cloned().ok_or("a plugin is no object"))
                .collect::<Result<Vec<_>, _>>()?,
            Some(_) => return Err("its plugins are no list".to_owned()),
            None if value.contains_key("type") => vec![value.clone()],
            None if only_inlined => {
                return Err("loadOnlyInlinedPlugins is set, but it has no plugins".to_owned());
            }
            None => Vec::new(),
        };
        // Only lists have a folder of further plugins.
        let only_inlined = only_inlined || value.contains_key("type");
        plugins.iter().try_for_each(check_plugin)?;
        let network = NetworkList {
            name,
            cni_version,
            choices: if choices.len() > 1 { choices } else { Vec::new() },
            plugins,
            disable_check,
            disable_gc,
            source: text.to_owned(),
        };
        Ok(Self { network, only_inlined })
    }

    /// The name of the folder beside the file whose `.conf` files are further plugins, if there may
    /// be one.
    pub(crate) fn folder(&self) -> Option<&str> {
        (!self.only_inlined).then_some(self.network.name.as_str())
    }

    /// The network, with the texts of its folder, in order.
    ///
    /// # Errors
    /// What is wrong; with the file of the folder where it is in one.
    pub(crate) fn finish(self, folder: &[(&Path, String)]) -> Result<NetworkList, String> {
        let mut network = self.network;
        for (path, text) in folder {
            let plugin = serde_json::from_str::<Map<String, Value>>(text)
                .map_err(|error| error.to_string())
                .and_then(|plugin| check_plugin(&plugin).map(|()| plugin));
            network.plugins.push(plugin.map_err(|reason| format!("{}: {reason}", path.display()))?);
        }
        if network.plugins.is_empty() {
            return Err("it has no plugins".to_owned());
        }
        Ok(network)
    }
}

impl NetworkList {
    /// Whether its plugins know what came with `version`.
    pub(crate) fn knows(&self, version: Version) -> bool {
        self.cni_version.parse::<Version>().is_ok_and(|own| own >= version)
    }
}

/// The program's name of a plugin.
pub(crate) fn kind(plugin: &Map<String, Value>) -> &str {
    plugin.get("type").and_then(Value::as_str).unwrap_or_default()
}

fn check_plugin(plugin: &Map<String, Value>) -> Result<(), String> {
    if is_name(kind(plugin)) { Ok(()) } else { Err("a plugin has no valid type".to_owned()) }
}

/// As upstream's library reads it: true or false, or their names.
fn read_bool(value: &Map<String, Value>, key: &str) -> Result<bool, String> {
    match value.get(key) {
        None => Ok(false),
        Some(Value::Bool(is)) => Ok(*is),
        Some(Value::String(text)) if text.eq_ignore_ascii_case("true") => Ok(true),
        Some(Value::String(text)) if text.eq_ignore_ascii_case("false") => Ok(false),
        Some(other) => Err(format!("{key} is neither true nor false: {other}")),
    }
}

/// Names become part of paths: letters, digits, `_`, `.`, `-`, starting with one of the first two.
fn is_name(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-'))
}

/// What a plugin reads on its standard input about a sandbox.
pub(crate) fn plan_input(
    network: &NetworkList,
    plugin: &Map<String, Value>,
    capabilities: &Map<String, Value>,
    previous: Option<&Value>,
) -> Value {
    let mut input = base(network, plugin);
    let wanted: Map<String, Value> = plugin
        .get("capabilities")
        .and_then(Value::as_object)
        .into_iter()
        .flatten()
        .filter(|(_, on)| on.as_bool() == Some(true))
        .filter_map(|(name, _)| Some((name.clone(), capabilities.get(name)?.clone())))
        .collect();
    if !wanted.is_empty() {
        input.insert("runtimeConfig".to_owned(), Value::Object(wanted));
    }
    if let Some(previous) = previous {
        input.insert("prevResult".to_owned(), previous.clone());
    }
    Value::Object(input)
}

/// What a plugin reads for GC: all attachments that are still wanted, as container and interface.
pub(crate) fn plan_gc_input(
    network: &NetworkList,
    plugin: &Map<String, Value>,
    valid: &[(String, String)],
) -> Value {
    let valid: Vec<_> = valid
        .iter()
        .map(|(container, interface)| json!({"containerID": container, "ifname": interface}))
        .collect();
    let mut input = base(network, plugin);
    // The specification and upstream's first implementation called it differently.
    for key in ["cni.dev/valid-attachments", "cni.dev/attachments"] {
        input.insert(key.to_owned(), Value::Array(valid.clone()));
    }
    Value::Object(input)
}

/// What a plugin reads for STATUS.
pub(crate) fn plan_status_input(network: &NetworkList, plugin: &Map<String, Value>) -> Value {
    Value::Object(base(network, plugin))
}

fn base(network: &NetworkList, plugin: &Map<String, Value>) -> Map<String, Value> {
    let mut input = plugin.clone();
    input.remove("capabilities");
    input.insert("name".to_owned(), json!(network.name));
    input.insert("cniVersion".to_owned(), json!(network.cni_version));
    input
}

#[cfg(test)]
pub(crate) fn list(text: &str) -> Result<NetworkList, String> {
    File::parse(text)?.finish(&[])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_and_single_plugins_are_read() {
        let network = list(
            r#"{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"bridge"},{"type":"portmap"}]}"#,
        )
        .unwrap();
        assert_eq!((network.plugins.len(), network.knows(Version::CHECK)), (2, true));
        assert!(!network.knows(Version::GC));
        let one = list(r#"{"cniVersion":"0.3.1","name":"n","type":"ptp"}"#).unwrap();
        assert_eq!((one.plugins.len(), one.knows(Version::CHECK)), (1, false));
        let none = list(r#"{"name":"n","type":"ptp"}"#).unwrap();
        assert_eq!(none.cni_version, "0.1.0");
        for (text, want) in [
            ("{", "EOF"),
            ("[]", "map"),
            (r#"{"plugins":[]}"#, "no name"),
            (r#"{"name":"../x","type":"y"}"#, "network name"),
            (r#"{"name":7,"type":"y"}"#, "network name"),
            (r#"{"name":"n","plugins":[]}"#, "no plugins"),
            (r#"{"name":"n","plugins":{}}"#, "no list"),
            (r#"{"name":"n","plugins":[7]}"#, "no object"),
            (r#"{"name":"n"}"#, "no plugins"),
            (r#"{"name":"n","plugins":[{}]}"#, "no valid type"),
            (r#"{"name":"n","type":"../../bin/sh"}"#, "no valid type"),
            (r#"{"name":"n","type":"t","cniVersion":1}"#, "no text"),
            (r#"{"name":"n","type":"t","cniVersion":"7.0.0"}"#, "newer than"),
            (r#"{"name":"n","type":"t","cniVersions":[1]}"#, "list of texts"),
            (r#"{"name":"n","type":"t","disableCheck":1}"#, "disableCheck"),
            (r#"{"name":"n","type":"t","disableGC":"yes"}"#, "disableGC"),
            (r#"{"name":"n","loadOnlyInlinedPlugins":true}"#, "loadOnlyInlinedPlugins"),
        ] {
            let error = list(text).unwrap_err();
            assert!(error.contains(want), "{text}: {error}");
        }
    }

    #[test]
    fn one_of_several_versions_is_chosen() {
        let network = list(
            r#"{"cniVersion":"0.4.0","cniVersions":["1.0.0","1.1.0","9.9.9"],"name":"n",
                "disableGC":"TRUE","disableCheck":true,"plugins":[{"type":"a"}]}"#,
        )
        .unwrap();
        assert_eq!(network.cni_version, "1.1.0");
        assert_eq!(network.choices, ["1.1.0", "1.0.0", "0.4.0"]);
        assert!(network.disable_gc && network.disable_check && network.knows(Version::GC));
    }

    #[test]
    fn a_folder_continues_the_list_unless_it_may_not() {
        let folder = |text: &str| vec![(Path::new("/f/10-a.conf"), text.to_owned())];
        let file = File::parse(r#"{"cniVersion":"1.1.0","name":"n"}"#).unwrap();
        assert_eq!(file.folder(), Some("n"));
        assert_eq!(kind(&file.finish(&folder(r#"{"type":"a"}"#)).unwrap().plugins[0]), "a");
        let text = r#"{"cniVersion":"1.1.0","name":"n","plugins":[{"type":"x"}]}"#;
        let file = File::parse(text).unwrap();
        assert_eq!(file.finish(&folder(r#"{"type":"a"}"#)).unwrap().plugins.len(), 2);
        let error = File::parse(text).unwrap().finish(&folder("{}")).unwrap_err();
        assert!(error.contains("/f/10-a.conf") && error.contains("no valid type"), "{error}");
        let text = r#"{"name":"n","loadOnlyInlinedPlugins":true,"plugins":[{"type":"x"}]}"#;
        assert_eq!(File::parse(text).unwrap().folder(), None);
        assert_eq!(File::parse(r#"{"name":"n","type":"x"}"#).unwrap().folder(), None);
    }

    #[test]
    fn plugins_get_what_they_ask_for() {
        let network = list(
            r#"{"cniVersion":"1.1.0","name":"n","plugins":[
                {"type":"a","capabilities":{"portMappings":true,"bandwidth":false}},{"type":"b"}]}"#,
        )
        .unwrap();
        let mut capabilities = Map::new();
        capabilities.insert("portMappings".to_owned(), json!([1]));
        capabilities.insert("bandwidth".to_owned(), json!({}));
        let previous = json!({"ips": []});
        assert_eq!(
            plan_input(&network, &network.plugins[0], &capabilities, Some(&previous)),
            json!({"type": "a", "name": "n", "cniVersion": "1.1.0",
                "runtimeConfig": {"portMappings": [1]}, "prevResult": {"ips": []}})
        );
        assert_eq!(
            plan_input(&network, &network.plugins[1], &capabilities, None),
            json!({"type": "b", "name": "n", "cniVersion": "1.1.0"})
        );
        assert_eq!(
            plan_status_input(&network, &network.plugins[0]),
            json!({"type": "a", "name": "n", "cniVersion": "1.1.0"})
        );
        let valid = json!([{"containerID": "c", "ifname": "eth0"}]);
        assert_eq!(
            plan_gc_input(&network, &network.plugins[1], &[("c".to_owned(), "eth0".to_owned())]),
            json!({"type": "b", "name": "n", "cniVersion": "1.1.0",
                "cni.dev/valid-attachments": valid, "cni.dev/attachments": valid})
        );
    }
}
