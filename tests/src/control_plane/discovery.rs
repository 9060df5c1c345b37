//! Discovery: which groups, versions and resources there are, enough for kubectl and kube-rs.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::resources::{RESOURCES, Resource};

const VERBS: &[&str] =
    &["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"];

/// The answer to a discovery path, if it is one.
pub fn answer(path: &str) -> Option<Value> {
    let parts: Vec<&str> = path.split('/').filter(|p| !p.is_empty()).collect();
    match parts.as_slice() {
        ["api"] => Some(json!({"kind": "APIVersions", "versions": ["v1"],
            "serverAddressByClientCIDRs": []})),
        ["apis"] => {
            let groups: BTreeSet<&str> =
                RESOURCES.iter().map(|r| r.group).chain(REVIEWS.iter().map(|r| r.0)).collect();
            let groups: Vec<Value> =
                groups.into_iter().filter(|g| !g.is_empty()).map(group).collect();
            Some(json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}))
        }
        ["apis", name] => has_group(name).then(|| {
            let mut value = group(name);
            value["kind"] = "APIGroup".into();
            value["apiVersion"] = "v1".into();
            value
        }),
        ["api", "v1"] => Some(resource_list("", "v1")),
        ["apis", name, version] => {
            versions(name).contains(version).then(|| resource_list(name, version))
        }
        ["version"] => Some(json!({"major": "1", "minor": "36", "gitVersion": "v1.36.0",
            "gitCommit": "", "gitTreeState": "clean", "buildDate": "1970-01-01T00:00:00Z",
            "goVersion": "none", "compiler": "rustc", "platform": "linux/amd64"})),
        _ => None,
    }
}

/// Kinds that are calls: group, plural, kind.
const REVIEWS: &[(&str, &str, &str)] = &[
    ("authentication.k8s.io", "tokenreviews", "TokenReview"),
    ("authorization.k8s.io", "subjectaccessreviews", "SubjectAccessReview"),
    ("authorization.k8s.io", "selfsubjectaccessreviews", "SelfSubjectAccessReview"),
];

fn has_group(name: &str) -> bool {
    RESOURCES.iter().any(|r| r.group == name) || REVIEWS.iter().any(|r| r.0 == name)
}

fn group(name: &str) -> Value {
    let versions = versions(name);
    let versions: Vec<Value> = versions
        .iter()
        .map(|version| json!({"groupVersion": format!("{name}/{version}"), "version": version}))
        .collect();
    json!({"name": name, "preferredVersion": versions.first(), "versions": versions})
}

/// The versions of a group, the preferred one first.
fn versions(group: &str) -> BTreeSet<&'static str> {
    let stored = RESOURCES.iter().filter(|r| r.group == group).map(|r| r.version);
    stored.chain(REVIEWS.iter().filter(|r| r.0 == group).map(|_| "v1")).collect()
}

fn resource_list(group: &str, version: &str) -> Value {
    let group_version =
        if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") };
    let mut resources = Vec::new();
    for resource in RESOURCES.iter().filter(|r| r.group == group && r.version == version) {
        resources.push(entry(resource, "", resource.kind, VERBS));
        if resource.status {
            resources.push(entry(resource, "/status", resource.kind, &["get", "patch", "update"]));
        }
        let calls: &[(&str, &str)] = match resource.plural {
            "pods" => &[("/binding", "Binding"), ("/eviction", "Eviction")],
            "serviceaccounts" => &[("/token", "TokenRequest")],
            "certificatesigningrequests" => &[("/approval", "CertificateSigningRequest")],
            _ => &[],
        };
        for (suffix, kind) in calls {
            resources.push(entry(resource, suffix, kind, &["create"]));
        }
    }
    for (_, plural, kind) in REVIEWS.iter().filter(|r| r.0 == group && version == "v1") {
        resources.push(json!({"name": plural, "singularName": kind.to_lowercase(),
            "namespaced": false, "kind": kind, "verbs": ["create"]}));
    }
    json!({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group_version,
        "resources": resources})
}

fn entry(resource: &Resource, suffix: &str, kind: &str, verbs: &[&str]) -> Value {
    let mut value = json!({"name": format!("{}{suffix}", resource.plural),
        "singularName": if suffix.is_empty() { resource.kind.to_lowercase() } else { String::new() },
        "namespaced": resource.namespaced, "kind": kind, "verbs": verbs});
    if suffix.is_empty() && !resource.short.is_empty() {
        value["shortNames"] = json!(resource.short);
    }
    match kind {
        "Eviction" => {
            value["group"] = "policy".into();
            value["version"] = "v1".into();
        }
        "TokenRequest" => {
            value["group"] = "authentication.k8s.io".into();
            value["version"] = "v1".into();
        }
        _ => {}
    }
    value
}
