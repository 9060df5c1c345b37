//! Values to typed objects, with the field named where it fails.

use std::collections::BTreeSet;

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, Secret, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

/// An object that a manifest may hold.
#[derive(Clone, PartialEq)]
pub enum Object {
    /// A pod, as written, and the hash of its document.
    Pod(Box<Pod>, DocumentHash),
    /// A Service.
    Service(Box<Service>),
    /// An EndpointSlice.
    EndpointSlice(Box<EndpointSlice>),
    /// A ConfigMap.
    ConfigMap(Box<ConfigMap>),
    /// A Secret.
    Secret(Box<Secret>),
}

impl std::fmt::Debug for Object {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (kind, metadata) = match self {
            Self::Pod(object, _) => ("Pod", &object.metadata),
            Self::Service(object) => ("Service", &object.metadata),
            Self::EndpointSlice(object) => ("EndpointSlice", &object.metadata),
            Self::ConfigMap(object) => ("ConfigMap", &object.metadata),
            Self::Secret(object) => ("Secret", &object.metadata),
        };
        write!(f, "{kind} {:?}", metadata.name.as_deref().unwrap_or_default())
    }
}

/// Hash of a document's content: indifferent to comments, layout and the order of keys, and to
/// what this version of longshore makes of it, so that an upgrade restarts no static pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DocumentHash(Vec<u8>);

impl DocumentHash {
    /// The UID of the static pod that this document describes, on `node`. The file's name is not
    /// in it: moving a manifest restarts nothing.
    pub fn uid(&self, node: &str) -> String {
        let mut hash = Sha256::new();
        for part in [&self.0[..], node.as_bytes()] {
            hash.update(part.len().to_le_bytes());
            hash.update(part);
        }
        hash.finalize()[..16].iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// Why a document is no object.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// `kind` or `apiVersion` is missing or none that a manifest may hold.
    #[error(
        "kind {kind:?} of apiVersion {api_version:?} is not taken from manifests; \
         expected Pod, Service, ConfigMap or Secret (v1), or EndpointSlice (discovery.k8s.io/v1)"
    )]
    Kind {
        /// As written.
        kind: String,
        /// As written.
        api_version: String,
    },
    /// A field does not hold what it must.
    #[error("{field}: {cause}")]
    Field {
        /// Path of the field.
        field: String,
        /// What is wrong.
        cause: String,
    },
    /// The API knows no such field: ignoring it would run something else than was meant.
    #[error("{field}: unknown field")]
    UnknownField {
        /// Path of the field.
        field: String,
    },
}

/// The objects of one document: one, or those of a `List` or `PodList`.
pub fn decode(value: Value) -> Vec<Result<Object, DecodeError>> {
    let kind = value.get("kind").and_then(Value::as_str).unwrap_or_default();
    let kind_is_list = kind == "List";
    let pods = kind == "PodList" && value.get("apiVersion").and_then(Value::as_str) == Some("v1");
    // The items of a typed list need not say what they are.
    let item = |mut item: Value| {
        if let Value::Object(fields) = &mut item
            && pods
        {
            fields.entry("kind").or_insert_with(|| "Pod".into());
            fields.entry("apiVersion").or_insert_with(|| "v1".into());
        }
        decode_one(item)
    };
    match value {
        Value::Object(mut list) if pods || kind_is_list => match list.remove("items") {
            Some(Value::Array(items)) => items.into_iter().map(item).collect(),
            Some(Value::Null) | None if pods => Vec::new(),
            _ => vec![Err(DecodeError::Field {
                field: "items".into(),
                cause: "a List needs a list of items".into(),
            })],
        },
        other => vec![decode_one(other)],
    }
}

fn decode_one(mut value: Value) -> Result<Object, DecodeError> {
    let text = |name: &str| value.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
    let (kind, api_version) = (text("kind"), text("apiVersion"));
    match (kind.as_str(), api_version.as_str()) {
        ("Pod", "v1") => {
            // The status is this node's to tell.
            if let Value::Object(pod) = &mut value {
                pod.remove("status");
            }
            let hash = DocumentHash(canonical(&value).into_bytes());
            quantities_to_text(&mut value);
            Ok(Object::Pod(typed(value)?, hash))
        }
        ("Service", "v1") => Ok(Object::Service(typed(value)?)),
        ("EndpointSlice", "discovery.k8s.io/v1") => Ok(Object::EndpointSlice(typed(value)?)),
        ("ConfigMap", "v1") => Ok(Object::ConfigMap(typed(value)?)),
        ("Secret", "v1") => Ok(Object::Secret(Box::new(secret(value)?))),
        _ => Err(DecodeError::Kind { kind, api_version }),
    }
}

/// Reads `value` as `T`, and refuses fields that `T` does not have.
fn typed<T: DeserializeOwned + Serialize>(value: Value) -> Result<Box<T>, DecodeError> {
    let object: T = serde_path_to_error::deserialize(&value).map_err(|error| {
        let field = error.path().to_string();
        DecodeError::Field { field, cause: error.into_inner().to_string() }
    })?;
    // What the typed object cannot say again, it did not know.
    let known = serde_json::to_value(&object)
        .map_err(|error| DecodeError::Field { field: ".".into(), cause: error.to_string() })?;
    if let Some(field) = unknown_field(&value, &known, "") {
        return Err(DecodeError::UnknownField { field });
    }
    Ok(Box::new(object))
}

/// A Secret, without ever putting one of its values into an error.
fn secret(mut value: Value) -> Result<Secret, DecodeError> {
    let take = |value: &mut Value, name: &str| -> Result<Map<String, Value>, DecodeError> {
        match value.as_object_mut().and_then(|fields| fields.remove(name)) {
            None | Some(Value::Null) => Ok(Map::new()),
            Some(Value::Object(entries)) => Ok(entries),
            Some(_) => Err(DecodeError::Field {
                field: name.into(),
                cause: "must be a map of strings".into(),
            }),
        }
    };
    let data = take(&mut value, "data")?;
    let string_data = take(&mut value, "stringData")?;
    let mut secret: Secret = *typed(value)?;
    let mut entries = std::collections::BTreeMap::new();
    for (key, entry) in data {
        let field = format!("data.{key}");
        let bytes = match entry {
            Value::Null => Some(Vec::new()),
            Value::String(text) => base64(&text),
            _ => None,
        };
        let bytes = bytes.ok_or_else(|| DecodeError::Field {
            field,
            cause: "must be base64 text (plain text goes into stringData)".into(),
        })?;
        entries.insert(key, ByteString(bytes));
    }
    for (key, entry) in string_data {
        let Value::String(text) = entry else {
            return Err(DecodeError::Field {
                field: format!("stringData.{key}"),
                cause: "must be a string; put it in quotes".into(),
            });
        };
        entries.insert(key, ByteString(text.into_bytes()));
    }
    secret.data = Some(entries);
    Ok(secret)
}

fn base64(text: &str) -> Option<Vec<u8>> {
    use base64::Engine as _;
    let compact: String = text.chars().filter(|c| !c.is_ascii_whitespace()).collect();
    base64::engine::general_purpose::STANDARD.decode(compact).ok()
}

/// The path of a field of `given` that `known` does not have. Nulls say nothing.
fn unknown_field(given: &Value, known: &Value, path: &str) -> Option<String> {
    match (given, known) {
        (Value::Object(given), Value::Object(known)) => given.iter().find_map(|(name, value)| {
            let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
            match known.get(name) {
                Some(known) => unknown_field(value, known, &path),
                None if is_empty(value) => None,
                None => Some(path),
            }
        }),
        (Value::Array(given), Value::Array(known)) => {
            given.iter().zip(known).enumerate().find_map(|(i, (given, known))| {
                unknown_field(given, known, &format!("{path}[{i}]"))
            })
        }
        _ => None,
    }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        _ => false,
    }
}

/// Quantities may be written as bare numbers (`cpu: 1`); the typed object holds text.
fn quantities_to_text(pod: &mut Value) {
    fn numbers(list: Option<&mut Value>) {
        if let Some(Value::Object(list)) = list {
            for quantity in list.values_mut() {
                if let Value::Number(number) = quantity {
                    *quantity = Value::String(number.to_string());
                }
            }
        }
    }
    fn resources(of: &mut Value) {
        if let Some(resources) = of.get_mut("resources") {
            numbers(resources.get_mut("limits"));
            numbers(resources.get_mut("requests"));
        }
    }
    fn divisor(of: &mut Value) {
        if let Some(Value::Number(number)) =
            of.get("resourceFieldRef").and_then(|reference| reference.get("divisor")).cloned()
        {
            of["resourceFieldRef"]["divisor"] = Value::String(number.to_string());
        }
    }
    let Some(spec) = pod.get_mut("spec") else { return };
    resources(spec);
    numbers(spec.get_mut("overhead"));
    for name in ["containers", "initContainers", "ephemeralContainers"] {
        for container in spec.get_mut(name).and_then(Value::as_array_mut).into_iter().flatten() {
            resources(container);
            for env in container.get_mut("env").and_then(Value::as_array_mut).into_iter().flatten()
            {
                if let Some(from) = env.get_mut("valueFrom") {
                    divisor(from);
                }
            }
        }
    }
    for volume in spec.get_mut("volumes").and_then(Value::as_array_mut).into_iter().flatten() {
        if let Some(Value::Number(number)) =
            volume.get("emptyDir").and_then(|source| source.get("sizeLimit")).cloned()
        {
            volume["emptyDir"]["sizeLimit"] = Value::String(number.to_string());
        }
        let items = |of: Option<&mut Value>| {
            let items = of.and_then(|of| of.get_mut("items")).and_then(Value::as_array_mut);
            items.into_iter().flatten().for_each(divisor);
        };
        items(volume.get_mut("downwardAPI"));
        let sources = volume.get_mut("projected").and_then(|of| of.get_mut("sources"));
        for source in sources.and_then(Value::as_array_mut).into_iter().flatten() {
            items(source.get_mut("downwardAPI"));
        }
    }
}

/// JSON with sorted keys and no blanks, nulls left out.
fn canonical(value: &Value) -> String {
    match value {
        Value::Object(fields) => {
            let names: BTreeSet<&String> = fields.keys().collect();
            let entries: Vec<String> = names
                .into_iter()
                .filter(|name| !fields[*name].is_null())
                .map(|name| format!("{}:{}", Value::from(name.as_str()), canonical(&fields[name])))
                .collect();
            format!("{{{}}}", entries.join(","))
        }
        Value::Array(items) => {
            format!("[{}]", items.iter().map(canonical).collect::<Vec<_>>().join(","))
        }
        scalar => scalar.to_string(),
    }
}
