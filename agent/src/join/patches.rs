//! kubeadm's `patches`: changes of this node's own to the KubeletConfiguration that the cluster has
//! for all. Reading the folder is apart from applying, which is pure.
//!
//! A file is named `kubeletconfiguration[suffix][+strategic|merge|json].(yaml|json)`; files count in
//! the order of their names, documents in that of the file. Files for kubeadm's other targets are a
//! control plane's business and left alone.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::json_patch;
use crate::standalone::yaml;

/// The one target that a worker has.
const TARGET: &str = "kubeletconfiguration";
/// A file larger than this is refused unread, in bytes.
const MAX_FILE: u64 = 1 << 20;

/// What is wrong with a patch.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("patch {}: {cause}", path.display())]
pub struct PatchError {
    /// The file, or the folder.
    pub path: PathBuf,
    /// In words, with what to do.
    pub cause: String,
}

/// How a patch is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PatchKind {
    /// Kubernetes' own kind, and the default. No list of KubeletConfiguration has a merge key, so it
    /// differs from `Merge` only by the directive `$patch`.
    Strategic,
    /// RFC 7386.
    Merge,
    /// RFC 6902.
    Json,
}

/// One patch.
#[derive(Clone, Debug, PartialEq)]
pub struct Patch {
    /// Where it was read.
    pub path: PathBuf,
    /// Its kind.
    pub kind: PatchKind,
    /// What it says.
    pub value: Value,
}

/// The kind that `name` stands for; `None` for a file that is not meant for a worker.
///
/// # Errors
/// In words, for an unknown kind.
pub fn plan_file(name: &str) -> Result<Option<PatchKind>, String> {
    let Some(stem) = name.strip_suffix(".yaml").or_else(|| name.strip_suffix(".json")) else {
        return Ok(None);
    };
    let Some(rest) = stem.strip_prefix(TARGET) else { return Ok(None) };
    match rest.split_once('+').map(|(_, kind)| kind) {
        None | Some("strategic") => Ok(Some(PatchKind::Strategic)),
        Some("merge") => Ok(Some(PatchKind::Merge)),
        Some("json") => Ok(Some(PatchKind::Json)),
        Some(other) => Err(format!(
            "unknown kind {other:?} after `+` in its name; write strategic, merge or json"
        )),
    }
}

/// Reads the patches for a worker in `dir` and the folders in it.
///
/// # Errors
/// When the folder or a patch cannot be read. Nothing is skipped: a node without one of its patches
/// would be another node.
pub fn read(dir: &Path) -> Result<Vec<Patch>, PatchError> {
    let wrong = |path: &Path, cause: String| PatchError { path: path.to_owned(), cause };
    let entries = std::fs::read_dir(dir).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let mut entries = entries.map_err(|e| {
        wrong(dir, format!("cannot read the folder: {e}; correct patches.directory (--patches)"))
    })?;
    entries.sort_by_key(std::fs::DirEntry::file_name);
    let mut all = Vec::new();
    for entry in entries {
        let path = entry.path();
        let kind = entry.file_type().map_err(|e| wrong(&path, e.to_string()))?;
        if kind.is_dir() {
            all.extend(read(&path)?);
            continue;
        }
        let name = entry.file_name();
        let Some(kind) = plan_file(&name.to_string_lossy()).map_err(|e| wrong(&path, e))? else {
            continue;
        };
        let failed = |e: std::io::Error| wrong(&path, format!("cannot read it: {e}"));
        if std::fs::metadata(&path).map_err(failed)?.len() > MAX_FILE {
            return Err(wrong(&path, format!("larger than {MAX_FILE} bytes")));
        }
        let text = std::fs::read(&path).map_err(failed)?;
        for document in yaml::values(&text) {
            let value = document
                .value
                .map_err(|e| wrong(&path, format!("document {}: {e}", document.number)))?;
            all.push(Patch { path: path.clone(), kind, value });
        }
    }
    Ok(all)
}

/// `document` with all of `patches` applied.
///
/// # Errors
/// When a patch does not fit.
pub fn plan_patched(mut document: Value, patches: &[Patch]) -> Result<Value, PatchError> {
    for patch in patches {
        let wrong = |cause: String| PatchError { path: patch.path.clone(), cause };
        let is_object = patch.value.is_object();
        match patch.kind {
            PatchKind::Json => {
                let steps: Vec<json_patch::Operation> = serde_json::from_value(patch.value.clone())
                    .map_err(|e| wrong(format!("not a list of JSON patch operations: {e}")))?;
                json_patch::apply(&mut document, steps).map_err(|e| {
                    wrong(format!("does not fit the cluster's KubeletConfiguration: {e}"))
                })?;
            }
            _ if !is_object => {
                let cause = "must be an object; a list of operations goes in a file +json";
                return Err(wrong(cause.to_owned()));
            }
            PatchKind::Merge => merge(&mut document, &patch.value),
            PatchKind::Strategic => strategic(&mut document, &patch.value).map_err(wrong)?,
        }
    }
    Ok(document)
}

/// RFC 7386.
fn merge(document: &mut Value, patch: &Value) {
    let Value::Object(fields) = patch else {
        *document = patch.clone();
        return;
    };
    if !document.is_object() {
        *document = Value::Object(Default::default());
    }
    let Value::Object(into) = document else { return };
    for (key, value) in fields {
        if value.is_null() {
            into.remove(key);
        } else {
            merge(into.entry(key.clone()).or_insert(Value::Null), value);
        }
    }
}

/// Kubernetes' strategic merge for a type without merge keys.
fn strategic(document: &mut Value, patch: &Value) -> Result<(), String> {
    let Value::Object(fields) = patch else {
        *document = patch.clone();
        return Ok(());
    };
    if let Some(other) = fields.keys().find(|key| key.starts_with('$') && *key != "$patch") {
        return Err(format!(
            "the directive {other} is not supported; write a +merge or +json patch"
        ));
    }
    match fields.get("$patch").map(|directive| directive.as_str().unwrap_or_default()) {
        None | Some("merge") => {}
        Some("replace") => {
            let kept = fields.iter().filter(|(key, _)| *key != "$patch");
            *document = Value::Object(kept.map(|(k, v)| (k.clone(), v.clone())).collect());
            return Ok(());
        }
        Some("delete") => {
            *document = Value::Object(Default::default());
            return Ok(());
        }
        Some(other) => return Err(format!("$patch: {other:?} is none of merge, replace, delete")),
    }
    if !document.is_object() {
        *document = Value::Object(Default::default());
    }
    let Value::Object(into) = document else { return Ok(()) };
    for (key, value) in fields.iter().filter(|(key, _)| *key != "$patch") {
        if value.is_null() {
            into.remove(key);
        } else {
            strategic(into.entry(key.clone()).or_insert(Value::Null), value)?;
        }
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use serde_json::json;

    use super::*;

    fn patch(kind: PatchKind, value: Value) -> Patch {
        Patch { path: "/p/kubeletconfiguration.yaml".into(), kind, value }
    }

    #[test]
    fn names_say_the_kind() {
        for (name, kind) in [
            ("kubeletconfiguration.yaml", Ok(Some(PatchKind::Strategic))),
            ("kubeletconfiguration0+merge.yaml", Ok(Some(PatchKind::Merge))),
            ("kubeletconfiguration-b+json.json", Ok(Some(PatchKind::Json))),
            ("kubeletconfiguration+strategic.json", Ok(Some(PatchKind::Strategic))),
            ("kubeletconfiguration.yml", Ok(None)),
            ("kube-apiserver+merge.yaml", Ok(None)),
            ("README", Ok(None)),
            ("kubeletconfiguration+mrge.yaml", Err(())),
            ("kubeletconfiguration+.yaml", Err(())),
        ] {
            assert_eq!(plan_file(name).map_err(drop), kind, "{name}");
        }
    }

    #[test]
    fn all_kinds_change_the_document_in_order() {
        let document =
            json!({"maxPods": 7, "featureGates": {"A": true, "B": true}, "clusterDNS": ["1", "2"]});
        let patches = [
            patch(PatchKind::Strategic, json!({"maxPods": 8, "featureGates": {"C": false}})),
            patch(PatchKind::Strategic, json!({"featureGates": {"A": null}, "clusterDNS": ["3"]})),
            patch(PatchKind::Merge, json!({"readOnlyPort": 0, "maxPods": null})),
            patch(PatchKind::Json, json!([{"op": "add", "path": "/clusterDNS/-", "value": "4"}])),
        ];
        let patched = plan_patched(document, &patches).unwrap();
        assert_eq!(
            patched,
            json!({"featureGates": {"B": true, "C": false}, "clusterDNS": ["3", "4"], "readOnlyPort": 0})
        );
    }

    #[test]
    fn directives_replace_and_delete() {
        let document = json!({"featureGates": {"A": true}, "evictionHard": {"x": "1"}});
        let patches = [patch(
            PatchKind::Strategic,
            json!({"featureGates": {"$patch": "replace", "B": true}, "evictionHard": {"$patch": "delete"}}),
        )];
        let patched = plan_patched(document, &patches).unwrap();
        assert_eq!(patched, json!({"featureGates": {"B": true}, "evictionHard": {}}));
    }

    #[test]
    fn what_does_not_fit_names_the_file() {
        for (kind, value, says) in [
            (PatchKind::Json, json!([{"op": "remove", "path": "/none"}]), "does not fit"),
            (PatchKind::Json, json!({"maxPods": 1}), "list of JSON patch operations"),
            (PatchKind::Merge, json!([1]), "must be an object"),
            (PatchKind::Strategic, json!({"a": {"$retainKeys": ["b"]}}), "$retainKeys"),
            (PatchKind::Strategic, json!({"$patch": "turn"}), "turn"),
        ] {
            let error = plan_patched(json!({}), &[patch(kind, value)]).unwrap_err().to_string();
            assert!(error.starts_with("patch /p/kubelet") && error.contains(says), "{error}");
        }
    }

    #[test]
    fn a_folder_is_read_in_the_order_of_its_names() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        write("kubeletconfiguration1.yaml", "maxPods: 2\n---\nmaxPods: 3\n");
        write("kubeletconfiguration0+json.json", r#"[{"op":"add","path":"/a","value":1}]"#);
        write("kube-scheduler.yaml", "spec: [\n");
        let found = read(dir.path()).unwrap();
        let kinds: Vec<_> = found.iter().map(|p| p.kind).collect();
        assert_eq!(kinds, [PatchKind::Json, PatchKind::Strategic, PatchKind::Strategic]);
        assert_eq!(plan_patched(json!({}), &found).unwrap(), json!({"a": 1, "maxPods": 3}));
        write("kubeletconfiguration2.yaml", "a: [\n");
        let error = read(dir.path()).unwrap_err().to_string();
        assert!(error.contains("kubeletconfiguration2.yaml: document 1: line"), "{error}");
        assert!(read(Path::new("/nowhere")).unwrap_err().to_string().contains("--patches"));
    }
}
