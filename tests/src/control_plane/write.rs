//! create, update, patch and delete, with the rules of object metadata: names, UIDs, versions,
//! generations, graceful deletion, finalizers.

use std::sync::Arc;

use serde_json::{Value, json};

use super::admission::{admit, random_suffix, restrict_node};
use super::auth::User;
use super::error::ApiError;
use super::patch;
use super::pki::hex;
use super::request::RequestInfo;
use super::resources::{Resource, known};
use super::store::{Store, Write};

/// Now, as the API writes it (RFC 3339, whole seconds).
pub fn now() -> String {
    jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// A random UUID.
pub fn new_uid() -> String {
    let mut bytes = [0u8; 16];
    bytes.fill_with(|| fastrand::u8(..));
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let text = hex(&bytes);
    [&text[..8], &text[8..12], &text[12..16], &text[16..20], &text[20..]].join("-")
}

/// Creates `object`.
///
/// # Errors
/// 400, 403, 404 (namespace), 409, 422.
pub fn create(
    store: &Store,
    user: &User,
    resource: &'static Resource,
    info: &RequestInfo,
    mut object: Value,
) -> Result<Arc<Value>, ApiError> {
    check_kind(resource, &object)?;
    if !object["metadata"].is_object() {
        object["metadata"] = json!({});
    }
    if !object["metadata"]["resourceVersion"].as_str().unwrap_or_default().is_empty() {
        // 500 without a reason is what the real one answers.
        return Err(ApiError {
            reason: "",
            ..ApiError::internal("resourceVersion should not be set on objects to be created")
        });
    }
    let prefix = object["metadata"]["generateName"].as_str().unwrap_or_default().to_owned();
    if object["metadata"]["name"].as_str().is_none_or(str::is_empty) {
        if prefix.is_empty() {
            return Err(ApiError::invalid(
                resource,
                "",
                "metadata.name",
                "Required value: name or generateName is required",
            ));
        }
        object["metadata"]["name"] = format!("{prefix}{}", random_suffix()).into();
    }
    let name = object["metadata"]["name"].as_str().unwrap_or_default().to_owned();
    check_name(resource, &name)?;
    settle_namespace(store, resource, info, &mut object)?;
    let meta = &mut object["metadata"];
    meta["uid"] = new_uid().into();
    meta["creationTimestamp"] = now().into();
    for field in ["deletionTimestamp", "deletionGracePeriodSeconds", "selfLink"] {
        if let Some(map) = meta.as_object_mut() {
            map.remove(field);
        }
    }
    if resource.generation {
        meta["generation"] = 1.into();
    }
    restrict_node(user, resource, "create", "", &name, &object, None)?;
    match resource.plural {
        "certificatesigningrequests" => {
            object["spec"]["username"] = user.name.clone().into();
            object["spec"]["groups"] = json!(user.groups);
            object["status"] = json!({});
        }
        // Nodes bring their first status along; others start without one.
        "nodes" => {}
        _ if resource.status => {
            if let Some(map) = object.as_object_mut() {
                map.remove("status");
            }
        }
        _ => {}
    }
    admit(store, resource, &mut object, None)?;
    if info.flag("dryRun") || info.param("dryRun") == "All" {
        return Ok(Arc::new(object));
    }
    let namespace = object["metadata"]["namespace"].as_str().unwrap_or_default().to_owned();
    store.write(resource, &namespace, &name, |old| match old {
        Some(_) => Err(ApiError::already_exists(resource, &name)),
        None => Ok(Write::Put(object)),
    })
}

fn check_kind(resource: &Resource, object: &Value) -> Result<(), ApiError> {
    if !object.is_object() {
        return Err(ApiError::bad_request("the body is no object"));
    }
    let kind = object["kind"].as_str().unwrap_or(resource.kind);
    let version = object["apiVersion"].as_str().map_or(resource.api_version(), str::to_owned);
    if kind != resource.kind || version != resource.api_version() {
        return Err(ApiError::bad_request(format!(
            "the API version and kind in the data ({version}, {kind}) do not match the expected ({}, {})",
            resource.api_version(),
            resource.kind
        )));
    }
    Ok(())
}

fn check_name(resource: &Resource, name: &str) -> Result<(), ApiError> {
    // RBAC names are path segments; all others DNS subdomains.
    if resource.group == "rbac.authorization.k8s.io" {
        return Ok(());
    }
    // The names of bundles begin with their signers', with colons.
    let bundle = resource.plural == "clustertrustbundles";
    let good = !name.is_empty()
        && name.len() <= 253
        && name.split(|c| c == '.' || (bundle && c == ':')).all(|label| {
            !label.is_empty()
                && label.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')
                && !label.starts_with('-')
                && !label.ends_with('-')
        });
    if good {
        return Ok(());
    }
    Err(ApiError::invalid(
        resource,
        name,
        "metadata.name",
        format!(
            "Invalid value: \"{name}\": a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and end with an alphanumeric character"
        ),
    ))
}

fn settle_namespace(
    store: &Store,
    resource: &'static Resource,
    info: &RequestInfo,
    object: &mut Value,
) -> Result<(), ApiError> {
    if !resource.namespaced {
        return Ok(());
    }
    let inside = object["metadata"]["namespace"].as_str().unwrap_or_default();
    if !inside.is_empty() && inside != info.namespace {
        return Err(ApiError::bad_request(format!(
            "the namespace of the provided object does not match the namespace sent on the request ({inside}, {})",
            info.namespace
        )));
    }
    if store.get(known("namespaces"), "", &info.namespace).is_none() {
        return Err(ApiError::not_found(known("namespaces"), &info.namespace));
    }
    object["metadata"]["namespace"] = info.namespace.clone().into();
    Ok(())
}

/// What an update or patch makes of the object that is stored.
pub type Change<'a> = &'a mut dyn FnMut(&Value) -> Result<Value, ApiError>;

/// Applies `change` to the object (or its `status`), under the rules of an update.
///
/// # Errors
/// 403, 404, 409, 422, and what `change` returns.
pub fn update(
    store: &Store,
    user: &User,
    resource: &'static Resource,
    info: &RequestInfo,
    change: Change<'_>,
) -> Result<Arc<Value>, ApiError> {
    let name = info.name.as_str();
    let status = info.subresource == "status";
    if status && !resource.status {
        return Err(ApiError::no_such_path());
    }
    // Admission looks at other objects, so it runs outside the lock, and the write only goes
    // through if nobody was faster; as in the API server.
    for _ in 0..20 {
        let old = store
            .get(resource, &info.namespace, name)
            .ok_or_else(|| ApiError::not_found(resource, name))?;
        let mut new = change(&old)?;
        check_kind(resource, &new)?;
        if info.subresource == "resize" {
            new = resized(&old, &new);
        }
        carry_over(resource, name, info.verb, status, &old, &mut new)?;
        restrict_node(user, resource, info.verb, &info.subresource, name, &new, Some(&old))?;
        if !status && info.subresource != "resize" {
            admit(store, resource, &mut new, Some(&old))?;
        }
        if resource.generation && !status && spec_changed(&old, &new) {
            let generation = old["metadata"]["generation"].as_i64().unwrap_or(0) + 1;
            new["metadata"]["generation"] = generation.into();
        }
        let expected = &old["metadata"]["resourceVersion"];
        let written = store.write(resource, &info.namespace, name, |current| {
            let current = current.ok_or_else(|| ApiError::not_found(resource, name))?;
            if current["metadata"]["resourceVersion"] != *expected {
                return Ok(Write::Keep);
            }
            Ok(if finished(&new) { Write::Remove(new.clone()) } else { Write::Put(new.clone()) })
        })?;
        if written["metadata"]["resourceVersion"] != *expected || same_but_version(&written, &new) {
            return Ok(written);
        }
    }
    Err(ApiError::stale(resource, name))
}

/// `old` with the resources of `new`: nothing else is changed by way of `resize`.
fn resized(old: &Value, new: &Value) -> Value {
    let mut resized = old.clone();
    resized["metadata"]["resourceVersion"] = new["metadata"]["resourceVersion"].clone();
    let set = |place: &mut Value, from: &Value| match (place.as_object_mut(), from) {
        (Some(place), Value::Null) => drop(place.remove("resources")),
        (Some(place), from) => drop(place.insert("resources".into(), from.clone())),
        (None, _) => {}
    };
    set(&mut resized["spec"], &new["spec"]["resources"]);
    for list in ["containers", "initContainers"] {
        let asked = new["spec"][list].as_array().cloned().unwrap_or_default();
        for container in resized["spec"][list].as_array_mut().into_iter().flatten() {
            if let Some(asked) = asked.iter().find(|c| c["name"] == container["name"]) {
                set(container, &asked["resources"]);
            }
        }
    }
    resized
}

fn same_but_version(a: &Value, b: &Value) -> bool {
    let strip = |v: &Value| {
        let mut v = v.clone();
        v["metadata"]["resourceVersion"] = Value::Null;
        v
    };
    strip(a) == strip(b)
}

fn spec_changed(old: &Value, new: &Value) -> bool {
    let body = |v: &Value| {
        let mut v = v.clone();
        if let Some(map) = v.as_object_mut() {
            map.remove("metadata");
            map.remove("status");
        }
        v
    };
    body(old) != body(new)
}

/// Deleted, and nobody holds it any more.
fn finished(object: &Value) -> bool {
    let meta = &object["metadata"];
    !meta["deletionTimestamp"].is_null()
        && meta["finalizers"].as_array().is_none_or(Vec::is_empty)
        && meta["deletionGracePeriodSeconds"].as_i64().unwrap_or(0) == 0
}

/// What a client cannot change comes from the stored object.
fn carry_over(
    resource: &'static Resource,
    name: &str,
    verb: &str,
    status: bool,
    old: &Value,
    new: &mut Value,
) -> Result<(), ApiError> {
    if !new["metadata"].is_object() {
        new["metadata"] = json!({});
    }
    let was = &old["metadata"];
    let asked = new["metadata"]["name"].as_str().unwrap_or_default();
    if asked != name {
        return Err(ApiError::bad_request(format!(
            "the name of the object ({asked}) does not match the name on the URL ({name})"
        )));
    }
    let uid = new["metadata"]["uid"].as_str().unwrap_or_default();
    if !uid.is_empty() && was["uid"] != uid {
        if verb == "patch" {
            let why = format!("Invalid value: \"{uid}\": field is immutable");
            return Err(ApiError::invalid(resource, name, "metadata.uid", why));
        }
        return Err(ApiError::conflict(
            resource,
            name,
            format!(
                "Precondition failed: UID in precondition: {uid}, UID in object meta: {}",
                was["uid"].as_str().unwrap_or_default()
            ),
        ));
    }
    let version = new["metadata"]["resourceVersion"].as_str().unwrap_or_default();
    if !version.is_empty() && was["resourceVersion"] != version {
        return Err(ApiError::stale(resource, name));
    }
    for field in [
        "uid",
        "creationTimestamp",
        "resourceVersion",
        "generation",
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
        "namespace",
        "generateName",
    ] {
        if was[field].is_null() {
            if let Some(map) = new["metadata"].as_object_mut() {
                map.remove(field);
            }
        } else {
            new["metadata"][field] = was[field].clone();
        }
    }
    let Some(map) = new.as_object_mut() else { return Ok(()) };
    map.insert("kind".into(), resource.kind.into());
    map.insert("apiVersion".into(), resource.api_version().into());
    if status {
        let status = map.remove("status").unwrap_or_else(|| json!({}));
        let meta = map.remove("metadata").unwrap_or_else(|| json!({}));
        *new = old.clone();
        new["metadata"] = meta;
        new["status"] = status;
        if was["ownerReferences"].is_null() {
            if let Some(meta) = new["metadata"].as_object_mut() {
                meta.remove("ownerReferences");
            }
        } else {
            new["metadata"]["ownerReferences"] = was["ownerReferences"].clone();
        }
    } else if resource.status {
        match old.get("status") {
            Some(status) => map.insert("status".into(), status.clone()),
            None => map.remove("status"),
        };
    }
    Ok(())
}

/// Applies a patch body of `content_type` to `old`.
///
/// # Errors
/// 400 for a patch that cannot be applied, 415 for an unknown kind.
pub fn apply_patch(content_type: &str, body: &Value, old: &Value) -> Result<Value, ApiError> {
    let mut new = old.clone();
    match content_type {
        "application/merge-patch+json" => patch::merge(&mut new, body),
        "application/json-patch+json" => patch::json_patch(&mut new, body).map_err(|why| {
            ApiError { code: 422, reason: "Invalid", message: why, details: Value::Null }
        })?,
        "application/strategic-merge-patch+json" | "application/apply-patch+yaml" => {
            patch::strategic(&mut new, body).map_err(ApiError::bad_request)?;
        }
        other => return Err(ApiError::unsupported_media_type(other)),
    }
    Ok(new)
}

/// What a delete returns.
pub enum Deleted {
    /// The object, still there until its grace period is over (or gone just now, for pods).
    Object(Arc<Value>),
    /// It is gone.
    Done(Arc<Value>),
}

/// Deletes an object, gracefully where it is a pod.
///
/// # Errors
/// 403, 404, 409 (preconditions).
pub fn delete(
    store: &Store,
    user: &User,
    resource: &'static Resource,
    info: &RequestInfo,
    options: &Value,
) -> Result<Deleted, ApiError> {
    let name = info.name.as_str();
    let asked = options["gracePeriodSeconds"]
        .as_i64()
        .or_else(|| info.param("gracePeriodSeconds").parse().ok());
    let mut gone = false;
    let object = store.write(resource, &info.namespace, name, |old| {
        let old = old.ok_or_else(|| ApiError::not_found(resource, name))?;
        restrict_node(user, resource, "delete", "", name, old, Some(old))?;
        let meta = &old["metadata"];
        for (field, label) in [("uid", "UID"), ("resourceVersion", "ResourceVersion")] {
            let wanted = &options["preconditions"][field];
            if !wanted.is_null() && *wanted != meta[field] {
                return Err(ApiError::conflict(
                    resource,
                    name,
                    format!("the {label} in the precondition ({}) does not match the {label} in record ({}). The object might have been deleted and then recreated",
                        wanted.as_str().unwrap_or_default(), meta[field].as_str().unwrap_or_default()),
                ));
            }
        }
        let grace = if resource.plural == "pods" { pod_grace(old, asked) } else { 0 };
        let held = meta["finalizers"].as_array().is_some_and(|f| !f.is_empty());
        if grace == 0 && !held {
            gone = true;
            return Ok(Write::Remove((**old).clone()));
        }
        let earlier = meta["deletionGracePeriodSeconds"].as_i64();
        if !meta["deletionTimestamp"].is_null() && earlier.is_some_and(|e| grace >= e) {
            return Ok(Write::Keep);
        }
        let mut new = (**old).clone();
        let at = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(grace);
        let meta = &mut new["metadata"];
        meta["deletionTimestamp"] = at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string().into();
        meta["deletionGracePeriodSeconds"] = grace.into();
        if let Some(generation) = meta["generation"].as_i64() {
            meta["generation"] = (generation + 1).into();
        }
        Ok(Write::Put(new))
    })?;
    if gone && resource.plural != "pods" {
        Ok(Deleted::Done(object))
    } else {
        Ok(Deleted::Object(object))
    }
}

/// The grace period of a pod's deletion: none for one that no node runs or that has ended.
fn pod_grace(pod: &Value, asked: Option<i64>) -> i64 {
    let own = pod["spec"]["terminationGracePeriodSeconds"].as_i64().unwrap_or(30);
    let unbound = pod["spec"]["nodeName"].as_str().is_none_or(str::is_empty);
    let ended = matches!(pod["status"]["phase"].as_str(), Some("Succeeded" | "Failed"));
    if unbound || ended {
        return 0;
    }
    match asked.unwrap_or(own) {
        negative if negative < 0 => 1,
        grace => grace,
    }
}
