//! Subresources and kinds that are calls rather than objects: tokens, bindings, evictions, CSR
//! approval, token and access reviews.

use std::sync::Arc;

use serde_json::{Value, json};

use super::auth::{self, User};
use super::error::ApiError;
use super::pki::Pki;
use super::request::RequestInfo;
use super::resources::known;
use super::store::Store;
use super::write;

/// `serviceaccounts/token`: a token bound to a pod (KEP-1205).
///
/// # Errors
/// 404 when account or pod do not exist, 409 when the bound UID is another's, 400 and 422 for bad
/// requests.
pub fn token(
    store: &Store,
    pki: &Pki,
    user: &User,
    info: &RequestInfo,
    mut request: Value,
) -> Result<Value, ApiError> {
    let accounts = known("serviceaccounts");
    let account = store
        .get(accounts, &info.namespace, &info.name)
        .ok_or_else(|| ApiError::not_found(accounts, &info.name))?;
    let seconds = request["spec"]["expirationSeconds"].as_i64().unwrap_or(3600);
    if seconds < 600 {
        return Err(ApiError::invalid(
            accounts,
            &info.name,
            "spec.expirationSeconds",
            format!("Invalid value: {seconds}: may not specify a duration less than 10 minutes"),
        ));
    }
    let audiences = match request["spec"]["audiences"].as_array().filter(|a| !a.is_empty()) {
        Some(list) => json!(list),
        None => json!([ISSUER]),
    };
    let mut bound = json!({"namespace": info.namespace,
        "serviceaccount": {"name": info.name, "uid": account["metadata"]["uid"]}});
    let reference = &request["spec"]["boundObjectRef"];
    if reference["kind"] == "Pod" {
        let pod_name = reference["name"].as_str().unwrap_or_default();
        let pod = store
            .get(known("pods"), &info.namespace, pod_name)
            .ok_or_else(|| ApiError::not_found(known("pods"), pod_name))?;
        let uid = reference["uid"].as_str().unwrap_or_default();
        if !uid.is_empty() && pod["metadata"]["uid"] != uid {
            return Err(ApiError::conflict(
                known("pods"),
                pod_name,
                "the UID in the bound object reference does not match the UID in record",
            ));
        }
        if pod["spec"]["serviceAccountName"] != info.name.as_str() {
            return Err(ApiError::bad_request(format!(
                "cannot bind token for serviceaccount \"{}\" to pod running with different serviceaccount name.",
                info.name
            )));
        }
        bound["pod"] = json!({"name": pod_name, "uid": pod["metadata"]["uid"]});
    }
    if let Some(node) = user.node()
        && bound["pod"].is_null()
    {
        return Err(ApiError::forbidden(
            accounts,
            &info.name,
            format!("node requested token not bound to a pod ({node})"),
        ));
    }
    let now = jiff::Timestamp::now();
    let expires = now + jiff::SignedDuration::from_secs(seconds);
    let token = pki.token(&json!({
        "iss": ISSUER, "aud": audiences, "iat": now.as_second(), "nbf": now.as_second(),
        "exp": expires.as_second(), "jti": write::new_uid(), "kubernetes.io": bound,
        "sub": format!("system:serviceaccount:{}:{}", info.namespace, info.name),
    }));
    request["kind"] = "TokenRequest".into();
    request["apiVersion"] = "authentication.k8s.io/v1".into();
    request["metadata"] = json!({"name": info.name, "namespace": info.namespace,
        "creationTimestamp": write::now()});
    request["spec"]["audiences"] = audiences;
    request["spec"]["expirationSeconds"] = seconds.into();
    request["status"] = json!({"token": token,
        "expirationTimestamp": expires.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()});
    Ok(request)
}

/// Issuer and default audience of tokens.
pub const ISSUER: &str = "https://kubernetes.default.svc.cluster.local";

/// `pods/binding`: assigns a pod to a node.
///
/// # Errors
/// 404, or 409 when it is bound already.
pub fn binding(
    store: &Store,
    user: &User,
    info: &RequestInfo,
    binding: &Value,
) -> Result<Value, ApiError> {
    let node = binding["target"]["name"].as_str().unwrap_or_default().to_owned();
    let mut plain = info.clone();
    plain.subresource = String::new();
    plain.verb = "update";
    write::update(store, user, known("pods"), &plain, &mut |old| {
        if let Some(other) = old["spec"]["nodeName"].as_str().filter(|n| !n.is_empty()) {
            return Err(ApiError::conflict(
                known("pods"),
                &info.name,
                format!("pod {} is already assigned to node \"{other}\"", info.name),
            ));
        }
        let mut new = old.clone();
        new["spec"]["nodeName"] = node.clone().into();
        Ok(new)
    })?;
    Ok(success())
}

/// A `Status` that says Success.
pub fn success() -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201})
}

/// `certificatesigningrequests/approval`.
///
/// # Errors
/// As of an update.
pub fn approval(
    store: &Store,
    user: &User,
    info: &RequestInfo,
    change: write::Change<'_>,
) -> Result<Arc<Value>, ApiError> {
    let mut as_status = info.clone();
    as_status.subresource = "status".into();
    write::update(store, user, known("certificatesigningrequests"), &as_status, &mut |old| {
        let asked = change(old)?;
        let mut new = old.clone();
        new["metadata"]["resourceVersion"] = asked["metadata"]["resourceVersion"].clone();
        new["status"]["conditions"] = asked["status"]["conditions"].clone();
        for condition in new["status"]["conditions"].as_array_mut().into_iter().flatten() {
            if condition["lastUpdateTime"].is_null() {
                condition["lastUpdateTime"] = write::now().into();
            }
            if condition["lastTransitionTime"].is_null() {
                condition["lastTransitionTime"] = write::now().into();
            }
        }
        Ok(new)
    })
}

/// `tokenreviews`: whose token is this.
pub fn token_review(store: &Store, pki: &Pki, mut review: Value) -> Value {
    let token = review["spec"]["token"].as_str().unwrap_or_default().to_owned();
    review["status"] = match auth::user_of_token(store, pki, &token) {
        Some(user) => json!({"authenticated": true,
            "user": {"username": user.name, "uid": user.uid, "groups": user.groups},
            "audiences": [ISSUER]}),
        None => json!({"authenticated": false, "error": "invalid bearer token"}),
    };
    review
}

/// `subjectaccessreviews` and `selfsubjectaccessreviews`: may they do this.
pub fn access_review(store: &Store, user: &User, mut review: Value, own: bool) -> Value {
    let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
    let spec = &review["spec"];
    let subject = if own {
        user.clone()
    } else {
        let groups = spec["groups"].as_array().into_iter().flatten().map(text).collect();
        User { name: text(&spec["user"]), groups, uid: String::new() }
    };
    let mut info = RequestInfo::default();
    let attributes = &spec["resourceAttributes"];
    let verb_source = if attributes.is_object() {
        info.group = text(&attributes["group"]);
        info.plural = text(&attributes["resource"]);
        info.subresource = text(&attributes["subresource"]);
        info.namespace = text(&attributes["namespace"]);
        info.name = text(&attributes["name"]);
        text(&attributes["verb"])
    } else {
        info.path = text(&spec["nonResourceAttributes"]["path"]);
        text(&spec["nonResourceAttributes"]["verb"])
    };
    info.verb = [
        "get",
        "list",
        "watch",
        "create",
        "update",
        "patch",
        "delete",
        "deletecollection",
        "post",
        "put",
        "head",
        "proxy",
    ]
    .into_iter()
    .find(|v| *v == verb_source)
    .unwrap_or("other");
    review["status"] = match auth::authorize(store, &subject, &info) {
        Ok(()) => json!({"allowed": true}),
        Err(reason) => json!({"allowed": false, "reason": reason}),
    };
    review
}
