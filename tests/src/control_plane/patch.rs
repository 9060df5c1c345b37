//! Patches as pure functions on JSON: RFC 7396 merge patch, RFC 6902 JSON patch, and Kubernetes'
//! strategic merge (sig-api-machinery/strategic-merge-patch.md) for the lists that types declare
//! a merge key for.

use serde_json::{Map, Value};

/// RFC 7396.
pub fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    if let Value::Object(target) = target {
        for (key, value) in patch {
            if value.is_null() {
                target.remove(key);
            } else {
                merge(target.entry(key.clone()).or_insert(Value::Null), value);
            }
        }
    }
}

/// How a list of objects is merged.
enum ListMerge {
    /// The patch's list takes its place.
    Atomic,
    /// Elements with the same value of this key are one.
    By(&'static str),
    /// A set of strings or numbers.
    Set,
}

/// `patchStrategy` and `patchMergeKey` of the core types, by the field's name; `parent` tells a
/// container's ports from a Service's.
fn list_merge(parent: &str, field: &str) -> ListMerge {
    match (parent, field) {
        ("spec", "ports") => ListMerge::By("port"),
        (_, "ports") => ListMerge::By("containerPort"),
        (
            _,
            "containers"
            | "initContainers"
            | "ephemeralContainers"
            | "volumes"
            | "env"
            | "imagePullSecrets"
            | "schedulingGates"
            | "resourceClaims"
            | "resourceClaimStatuses"
            | "secrets"
            | "drivers"
            | "allocatedResourcesStatus",
        ) => ListMerge::By("name"),
        (_, "volumeMounts") => ListMerge::By("mountPath"),
        (_, "volumeDevices") => ListMerge::By("devicePath"),
        (_, "conditions" | "addresses") => ListMerge::By("type"),
        (_, "podIPs" | "hostIPs" | "hostAliases") => ListMerge::By("ip"),
        (_, "topologySpreadConstraints") => ListMerge::By("topologyKey"),
        (_, "ownerReferences") => ListMerge::By("uid"),
        (_, "podCIDRs" | "finalizers") => ListMerge::Set,
        _ => ListMerge::Atomic,
    }
}

/// Strategic merge of `patch` into `target`.
///
/// # Errors
/// A sentence naming the directive or list that makes no sense.
pub fn strategic(target: &mut Value, patch: &Value) -> Result<(), String> {
    strategic_at("", target, patch)
}

fn strategic_at(parent: &str, target: &mut Value, patch: &Value) -> Result<(), String> {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return Ok(());
    };
    match patch.get("$patch").and_then(Value::as_str) {
        Some("replace") => {
            let mut whole = patch.clone();
            whole.remove("$patch");
            *target = Value::Object(whole);
            return Ok(());
        }
        Some("delete") => {
            *target = Value::Object(Map::new());
            return Ok(());
        }
        Some("merge") | None => {}
        Some(other) => return Err(format!("unknown patch directive {other:?} at {parent}")),
    }
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    let Value::Object(target) = target else { return Ok(()) };
    if let Some(Value::Array(keep)) = patch.get("$retainKeys") {
        target.retain(|k, _| keep.iter().any(|name| name == k.as_str()));
    }
    for (key, value) in patch {
        if let Some(field) = key.strip_prefix("$deleteFromPrimitiveList/") {
            let gone = value.as_array().cloned().unwrap_or_default();
            if let Some(Value::Array(list)) = target.get_mut(field) {
                list.retain(|v| !gone.contains(v));
            }
            continue;
        }
        if key.starts_with('$') {
            continue;
        }
        match value {
            Value::Null => {
                target.remove(key);
            }
            Value::Array(items) => {
                let slot = target.entry(key.clone()).or_insert_with(|| Value::Array(Vec::new()));
                merge_list(parent, key, slot, items)?;
            }
            Value::Object(_) => {
                strategic_at(key, target.entry(key.clone()).or_insert(Value::Null), value)?;
            }
            scalar => {
                target.insert(key.clone(), scalar.clone());
            }
        }
    }
    Ok(())
}

fn merge_list(
    parent: &str,
    field: &str,
    target: &mut Value,
    items: &[Value],
) -> Result<(), String> {
    if !target.is_array() {
        *target = Value::Array(Vec::new());
    }
    let Value::Array(list) = target else { return Ok(()) };
    if items.iter().any(|i| i["$patch"] == "replace") {
        *list = items.iter().filter(|i| i["$patch"] != "replace").cloned().collect();
        return Ok(());
    }
    match list_merge(parent, field) {
        ListMerge::Atomic => *list = items.to_vec(),
        ListMerge::Set => {
            for item in items {
                if !list.contains(item) {
                    list.push(item.clone());
                }
            }
        }
        ListMerge::By(key) => {
            for item in items {
                let id = &item[key];
                if id.is_null() {
                    return Err(format!("map: {item} does not contain declared merge key: {key}"));
                }
                let at = list.iter().position(|old| old[key] == *id);
                if item["$patch"] == "delete" {
                    list.retain(|old| old[key] != *id);
                } else if let Some(at) = at {
                    strategic_at(field, &mut list[at], item)?;
                } else {
                    let mut fresh = Value::Null;
                    strategic_at(field, &mut fresh, item)?;
                    list.push(fresh);
                }
            }
        }
    }
    Ok(())
}

/// RFC 6902.
///
/// # Errors
/// Which operation failed and why; nothing is changed then.
pub fn json_patch(target: &mut Value, operations: &Value) -> Result<(), String> {
    let Value::Array(operations) = operations else {
        return Err("a JSON patch is a list of operations".into());
    };
    let mut work = target.clone();
    for operation in operations {
        let path = operation["path"].as_str().unwrap_or_default();
        let value = operation["value"].clone();
        match operation["op"].as_str().unwrap_or_default() {
            "add" => put(&mut work, path, value, true)?,
            "replace" => {
                work.pointer(path).ok_or_else(|| format!("replace: no value at {path}"))?;
                put(&mut work, path, value, false)?;
            }
            "remove" => {
                take(&mut work, path)?;
            }
            "test" => {
                if work.pointer(path) != Some(&value) {
                    return Err(format!("testing value {path} failed"));
                }
            }
            "move" => {
                let moved = take(&mut work, operation["from"].as_str().unwrap_or_default())?;
                put(&mut work, path, moved, true)?;
            }
            "copy" => {
                let from = operation["from"].as_str().unwrap_or_default();
                let copied = work
                    .pointer(from)
                    .cloned()
                    .ok_or_else(|| format!("copy: nothing at {from}"))?;
                put(&mut work, path, copied, true)?;
            }
            other => return Err(format!("unknown operation {other:?}")),
        }
    }
    *target = work;
    Ok(())
}

fn split(path: &str) -> Result<(&str, String), String> {
    let (parent, last) = path.rsplit_once('/').ok_or_else(|| format!("bad path {path:?}"))?;
    Ok((parent, last.replace("~1", "/").replace("~0", "~")))
}

fn put(root: &mut Value, path: &str, value: Value, insert: bool) -> Result<(), String> {
    if path.is_empty() {
        *root = value;
        return Ok(());
    }
    let (parent, last) = split(path)?;
    match root.pointer_mut(parent) {
        Some(Value::Object(map)) => {
            map.insert(last, value);
        }
        Some(Value::Array(list)) if last == "-" => list.push(value),
        Some(Value::Array(list)) => {
            let at: usize = last.parse().map_err(|_| format!("bad index in {path}"))?;
            if at > list.len() || (!insert && at == list.len()) {
                return Err(format!("index out of range in {path}"));
            }
            if insert {
                list.insert(at, value);
            } else {
                list[at] = value;
            }
        }
        _ => return Err(format!("no such parent: {path}")),
    }
    Ok(())
}

fn take(root: &mut Value, path: &str) -> Result<Value, String> {
    let (parent, last) = split(path)?;
    let missing = || format!("remove: no value at {path}");
    match root.pointer_mut(parent) {
        Some(Value::Object(map)) => map.remove(&last).ok_or_else(missing),
        Some(Value::Array(list)) => {
            let at: usize = last.parse().map_err(|_| missing())?;
            if at < list.len() { Ok(list.remove(at)) } else { Err(missing()) }
        }
        _ => Err(missing()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn strategic_merge_joins_lists_by_their_key() {
        for (before, patch, after) in [
            (
                json!({"status": {"conditions": [{"type": "Ready", "status": "False", "reason": "x"}]}}),
                json!({"status": {"$setElementOrder/conditions": [{"type": "Ready"}, {"type": "PodScheduled"}],
                    "conditions": [{"type": "Ready", "status": "True", "reason": null},
                                   {"type": "PodScheduled", "status": "True"}]}}),
                json!({"status": {"conditions": [{"type": "Ready", "status": "True"},
                                                 {"type": "PodScheduled", "status": "True"}]}}),
            ),
            (
                json!({"status": {"containerStatuses": [{"name": "a"}, {"name": "b"}]}}),
                json!({"status": {"containerStatuses": [{"name": "b", "ready": true}]}}),
                json!({"status": {"containerStatuses": [{"name": "b", "ready": true}]}}),
            ),
            (
                json!({"spec": {"containers": [{"name": "a", "image": "1"}, {"name": "b", "image": "2"}]}}),
                json!({"spec": {"containers": [{"name": "b", "image": "3"}, {"name": "a", "$patch": "delete"}]}}),
                json!({"spec": {"containers": [{"name": "b", "image": "3"}]}}),
            ),
            (
                json!({"metadata": {"finalizers": ["x", "y"]}}),
                json!({"metadata": {"$deleteFromPrimitiveList/finalizers": ["x"], "finalizers": ["z"]}}),
                json!({"metadata": {"finalizers": ["y", "z"]}}),
            ),
            (
                json!({"spec": {"ports": [{"port": 80, "nodePort": 1}]}}),
                json!({"spec": {"ports": [{"port": 80, "targetPort": 8080}]}}),
                json!({"spec": {"ports": [{"port": 80, "nodePort": 1, "targetPort": 8080}]}}),
            ),
            (
                json!({"spec": {"podCIDRs": ["a"], "taints": [{"key": "a"}]}}),
                json!({"spec": {"taints": [{"key": "b"}], "$retainKeys": ["taints"]}}),
                json!({"spec": {"taints": [{"key": "b"}]}}),
            ),
        ] {
            let mut target = before.clone();
            strategic(&mut target, &patch).unwrap();
            assert_eq!(target, after, "{before} + {patch}");
        }
    }

    #[test]
    fn json_patch_is_all_or_nothing() {
        let mut target = json!({"a": [1, 2], "b": {"c~d": 1}});
        let good = json!([{"op": "add", "path": "/a/-", "value": 3}, {"op": "remove", "path": "/a/0"},
            {"op": "replace", "path": "/b/c~0d", "value": 5}, {"op": "test", "path": "/a/0", "value": 2}]);
        json_patch(&mut target, &good).unwrap();
        assert_eq!(target, json!({"a": [2, 3], "b": {"c~d": 5}}));
        let bad = json!([{"op": "remove", "path": "/a"}, {"op": "remove", "path": "/nothing"}]);
        assert!(json_patch(&mut target, &bad).is_err());
        assert_eq!(target, json!({"a": [2, 3], "b": {"c~d": 5}}));
    }
}
