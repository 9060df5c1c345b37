//! Who asks, and may they: client certificates, bootstrap tokens, ServiceAccount tokens; RBAC from
//! stored objects; the Node authorizer, by which a node reads only what its pods use.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::pki::Pki;
use super::request::RequestInfo;
use super::resources::known;
use super::store::Store;

/// The authenticated user.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct User {
    /// Name.
    pub name: String,
    /// Groups.
    pub groups: Vec<String>,
    /// UID, for ServiceAccounts.
    pub uid: String,
}

impl User {
    /// Whether it is in `group`.
    pub fn in_group(&self, group: &str) -> bool {
        self.groups.iter().any(|g| g == group)
    }

    /// The node it speaks for, if it is one.
    pub fn node(&self) -> Option<&str> {
        self.name.strip_prefix("system:node:").filter(|_| self.in_group("system:nodes"))
    }

    fn new(name: impl Into<String>, groups: &[&str]) -> Self {
        Self {
            name: name.into(),
            groups: groups.iter().map(ToString::to_string).collect(),
            uid: String::new(),
        }
    }
}

/// The user of a client certificate (CN, O), already verified by TLS.
pub fn user_of_certificate(der: &[u8]) -> Option<User> {
    let (_, cert) = x509_parser::parse_x509_certificate(der).ok()?;
    let name = cert.subject().iter_common_name().next()?.as_str().ok()?.to_owned();
    let mut groups: Vec<String> = cert
        .subject()
        .iter_organization()
        .filter_map(|o| o.as_str().ok().map(str::to_owned))
        .collect();
    groups.push("system:authenticated".into());
    Some(User { name, groups, uid: String::new() })
}

/// The user of a bearer token; `None` is 401.
pub fn user_of_token(store: &Store, pki: &Pki, token: &str) -> Option<User> {
    if let Some(claims) = pki.claims(token) {
        let account = &claims["kubernetes.io"]["serviceaccount"];
        let namespace = claims["kubernetes.io"]["namespace"].as_str()?;
        let name = account["name"].as_str()?;
        let live = store.get(known("serviceaccounts"), namespace, name)?;
        if live["metadata"]["uid"] != account["uid"] {
            return None;
        }
        let mut user = User::new(
            format!("system:serviceaccount:{namespace}:{name}"),
            &["system:serviceaccounts", "system:authenticated"],
        );
        user.groups.push(format!("system:serviceaccounts:{namespace}"));
        user.uid = account["uid"].as_str()?.into();
        return Some(user);
    }
    let (id, secret) = token.split_once('.')?;
    let object = store.get(known("secrets"), "kube-system", &format!("bootstrap-token-{id}"))?;
    let data = |key: &str| super::admission::secret_text(&object, key);
    if object["type"] != "bootstrap.kubernetes.io/token"
        || data("token-secret")? != secret
        || data("usage-bootstrap-authentication").as_deref() != Some("true")
        || expired(data("expiration"))
    {
        return None;
    }
    let mut user = User::new(
        format!("system:bootstrap:{id}"),
        &["system:bootstrappers", "system:authenticated"],
    );
    let extra = data("auth-extra-groups").unwrap_or_default();
    user.groups.extend(extra.split(',').filter(|g| !g.is_empty()).map(str::to_owned));
    Some(user)
}

/// Whether a bootstrap token's expiration has passed; a malformed one counts as passed.
pub fn expired(expiration: Option<String>) -> bool {
    expiration.is_some_and(|text| {
        text.parse::<jiff::Timestamp>().map_or(true, |at| at <= jiff::Timestamp::now())
    })
}

/// A request without credentials.
pub fn anonymous() -> User {
    User::new("system:anonymous", &["system:unauthenticated"])
}

/// Whether `user` may do `info`; the error is the reason to tell.
///
/// # Errors
/// The sentence after "forbidden: ".
pub fn authorize(store: &Store, user: &User, info: &RequestInfo) -> Result<(), String> {
    if user.in_group("system:masters") {
        return Ok(());
    }
    let mut reason = String::new();
    if let Some(node) = user.node() {
        match authorize_node(store, node, info) {
            Ok(()) => return Ok(()),
            Err(why) => reason = why,
        }
    }
    if rbac_allows(store, user, info) {
        return Ok(());
    }
    let mut message = if info.is_resource() {
        let scope = if info.namespace.is_empty() {
            "at the cluster scope".to_owned()
        } else {
            format!("in the namespace \"{}\"", info.namespace)
        };
        format!(
            "User \"{}\" cannot {} resource \"{}\" in API group \"{}\" {scope}",
            user.name,
            info.verb,
            info.rbac_resource(),
            info.group
        )
    } else {
        format!("User \"{}\" cannot {} path \"{}\"", user.name, info.verb, info.path)
    };
    if !reason.is_empty() {
        message.push_str(": ");
        message.push_str(&reason);
    }
    Err(message)
}

fn rbac_allows(store: &Store, user: &User, info: &RequestInfo) -> bool {
    let applies = |binding: &Value| {
        binding["subjects"].as_array().into_iter().flatten().any(|subject| {
            let name = subject["name"].as_str().unwrap_or_default();
            match subject["kind"].as_str().unwrap_or_default() {
                "User" => name == user.name,
                "Group" => user.in_group(name),
                "ServiceAccount" => {
                    let ns = subject["namespace"].as_str().unwrap_or_default();
                    user.name == format!("system:serviceaccount:{ns}:{name}")
                }
                _ => false,
            }
        })
    };
    let role_allows = |binding: &Value, namespace: &str| {
        let reference = &binding["roleRef"];
        let name = reference["name"].as_str().unwrap_or_default();
        let role = if reference["kind"] == "Role" {
            store.get(known("roles"), namespace, name)
        } else {
            store.get(known("clusterroles"), "", name)
        };
        role.is_some_and(|role| {
            role["rules"].as_array().into_iter().flatten().any(|rule| rule_allows(rule, info))
        })
    };
    store
        .all(known("clusterrolebindings"), "")
        .iter()
        .any(|binding| applies(binding) && role_allows(binding, ""))
        || (!info.namespace.is_empty()
            && store
                .all(known("rolebindings"), &info.namespace)
                .iter()
                .any(|binding| applies(binding) && role_allows(binding, &info.namespace)))
}

fn rule_allows(rule: &Value, info: &RequestInfo) -> bool {
    let has = |field: &str, wanted: &str| {
        rule[field].as_array().into_iter().flatten().any(|v| v == "*" || v == wanted)
    };
    if !info.is_resource() {
        return has("verbs", info.verb)
            && rule["nonResourceURLs"].as_array().into_iter().flatten().any(|url| {
                let url = url.as_str().unwrap_or_default();
                url.strip_suffix('*').map_or(url == info.path, |p| info.path.starts_with(p))
            });
    }
    let any_name = rule["resourceNames"].as_array().is_none_or(Vec::is_empty);
    has("verbs", info.verb)
        && has("apiGroups", &info.group)
        && has("resources", &info.rbac_resource())
        && (any_name || has("resourceNames", &info.name))
}

/// What pods of a node refer to.
#[derive(Default, Debug)]
struct References {
    secrets: BTreeSet<String>,
    config_maps: BTreeSet<String>,
}

fn references_of(pod: &Value) -> References {
    let mut found = References::default();
    let spec = &pod["spec"];
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let add = |set: &mut BTreeSet<String>, name: &Value| {
        if let Some(name) = name.as_str() {
            set.insert(name.into());
        }
    };
    for secret in list(&spec["imagePullSecrets"]) {
        add(&mut found.secrets, &secret["name"]);
    }
    for volume in list(&spec["volumes"]) {
        add(&mut found.secrets, &volume["secret"]["secretName"]);
        add(&mut found.config_maps, &volume["configMap"]["name"]);
        add(&mut found.secrets, &volume["csi"]["nodePublishSecretRef"]["name"]);
        for source in list(&volume["projected"]["sources"]) {
            add(&mut found.secrets, &source["secret"]["name"]);
            add(&mut found.config_maps, &source["configMap"]["name"]);
        }
    }
    for kind in ["containers", "initContainers", "ephemeralContainers"] {
        for container in list(&spec[kind]) {
            for env in list(&container["env"]) {
                add(&mut found.secrets, &env["valueFrom"]["secretKeyRef"]["name"]);
                add(&mut found.config_maps, &env["valueFrom"]["configMapKeyRef"]["name"]);
            }
            for env in list(&container["envFrom"]) {
                add(&mut found.secrets, &env["secretRef"]["name"]);
                add(&mut found.config_maps, &env["configMapRef"]["name"]);
            }
        }
    }
    found
}

/// Claims that a pod uses.
fn claims_of(pod: &Value) -> Vec<String> {
    let name = pod["metadata"]["name"].as_str().unwrap_or_default();
    let claim = |volume: &Value| {
        if volume["ephemeral"].is_object() {
            return Some(format!("{name}-{}", volume["name"].as_str()?));
        }
        volume["persistentVolumeClaim"]["claimName"].as_str().map(str::to_owned)
    };
    pod["spec"]["volumes"].as_array().into_iter().flatten().filter_map(claim).collect()
}

/// ResourceClaims of the pod.
fn resource_claims_of(pod: &Value) -> Vec<String> {
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let named = list(&pod["spec"]["resourceClaims"]);
    let told = list(&pod["status"]["resourceClaimStatuses"]);
    let extended = &pod["status"]["extendedResourceClaimStatus"]["resourceClaimName"];
    let all = named.iter().chain(&told).filter_map(|claim| text(&claim["resourceClaimName"]));
    all.chain(text(extended)).collect()
}

/// PersistentVolumes behind them.
fn volumes_of(store: &Store, pod: &Value) -> Vec<String> {
    let namespace = pod["metadata"]["namespace"].as_str().unwrap_or_default();
    let bound = |claim: String| {
        let claim = store.get(known("persistentvolumeclaims"), namespace, &claim)?;
        claim["spec"]["volumeName"].as_str().map(str::to_owned)
    };
    claims_of(pod).into_iter().filter_map(bound).collect()
}

/// Secrets that a PersistentVolume names, by namespace and name.
fn secrets_of(store: &Store, volume: &str) -> Vec<(String, String)> {
    let Some(volume) = store.get(known("persistentvolumes"), "", volume) else { return Vec::new() };
    let fields = ["nodeStageSecretRef", "nodePublishSecretRef", "nodeExpandSecretRef"];
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let named = fields.map(|field| {
        let reference = &volume["spec"]["csi"][field];
        (text(&reference["namespace"]), text(&reference["name"]))
    });
    named.into_iter().filter(|(_, name)| !name.is_empty()).collect()
}

/// The Node authorizer (KEP-279, with the field selectors of KEP-4601).
fn authorize_node(store: &Store, node: &str, info: &RequestInfo) -> Result<(), String> {
    let deny = |why: &str| Err(why.to_owned());
    let read = matches!(info.verb, "get" | "list" | "watch");
    let pods_here =
        || store.all(known("pods"), "").into_iter().filter(move |p| p["spec"]["nodeName"] == node);
    let selector = info.selector().map_err(|e| e.message)?;
    let by_name = selector.required_field("metadata.name").unwrap_or(&info.name).to_owned();
    match (info.group.as_str(), info.plural.as_str()) {
        ("", "secrets" | "configmaps") => {
            if !read || !info.subresource.is_empty() {
                return deny("can only read resources of this type");
            }
            if by_name.is_empty() {
                return deny("No Object name found");
            }
            let used = pods_here().any(|pod| {
                let references = references_of(&pod);
                let set = if info.plural == "secrets" {
                    references.secrets
                } else {
                    references.config_maps
                };
                pod["metadata"]["namespace"] == info.namespace.as_str() && set.contains(&by_name)
            });
            let of_volume = || {
                info.plural == "secrets"
                    && pods_here().any(|pod| {
                        volumes_of(store, &pod).iter().any(|name| {
                            secrets_of(store, name)
                                .contains(&(info.namespace.clone(), by_name.clone()))
                        })
                    })
            };
            if used || of_volume() {
                Ok(())
            } else {
                Err(format!("no relationship found between node '{node}' and this object"))
            }
        }
        ("", "persistentvolumeclaims" | "persistentvolumes")
        | ("storage.k8s.io", "volumeattachments") => {
            // Of claims that grow the node says how far it is.
            let tells = info.plural == "persistentvolumeclaims"
                && info.subresource == "status"
                && matches!(info.verb, "get" | "update" | "patch");
            if !tells && (info.verb != "get" || !info.subresource.is_empty()) {
                return deny("can only get individual resources of this type");
            }
            let related = match info.plural.as_str() {
                "persistentvolumeclaims" => pods_here().any(|pod| {
                    pod["metadata"]["namespace"] == info.namespace.as_str()
                        && claims_of(&pod).contains(&info.name)
                }),
                "persistentvolumes" => {
                    pods_here().any(|pod| volumes_of(store, &pod).contains(&info.name))
                }
                _ => store
                    .get(known("volumeattachments"), "", &info.name)
                    .is_some_and(|attachment| attachment["spec"]["nodeName"] == node),
            };
            if related {
                Ok(())
            } else {
                Err(format!("no relationship found between node '{node}' and this object"))
            }
        }
        ("resource.k8s.io", "resourceclaims") => {
            if info.verb != "get" || !info.subresource.is_empty() {
                return deny("can only get individual resources of this type");
            }
            let used = pods_here().any(|pod| {
                pod["metadata"]["namespace"] == info.namespace.as_str()
                    && resource_claims_of(&pod).contains(&info.name)
            });
            if used {
                Ok(())
            } else {
                Err(format!("no relationship found between node '{node}' and this object"))
            }
        }
        ("resource.k8s.io", "resourceslices") => {
            let own = selector.required_field("spec.nodeName") == Some(node);
            if own && matches!(info.verb, "list" | "watch" | "deletecollection") {
                Ok(())
            } else {
                deny(
                    "can only list/watch/deletecollection resourceslices with nodeName field selector",
                )
            }
        }
        ("certificates.k8s.io", "podcertificaterequests") => {
            let own = selector.required_field("spec.nodeName") == Some(node);
            match (info.verb, info.subresource.as_str()) {
                ("create", "") => Ok(()),
                ("list" | "watch", "") if own => Ok(()),
                _ => {
                    deny("can only list/watch podcertificaterequests with nodeName field selector")
                }
            }
        }
        ("", "serviceaccounts") => {
            let used = pods_here().any(|pod| {
                pod["metadata"]["namespace"] == info.namespace.as_str()
                    && pod["spec"]["serviceAccountName"] == info.name.as_str()
            });
            match (info.verb, info.subresource.as_str(), used) {
                ("get", "", true) | ("create", "token", true) => Ok(()),
                (_, _, false) => {
                    Err(format!("no relationship found between node '{node}' and this object"))
                }
                _ => deny("can only create tokens for individual service accounts"),
            }
        }
        ("", "nodes") => match info.verb {
            "create" if info.subresource.is_empty() => Ok(()),
            "get" | "list" | "watch" if by_name == node => Ok(()),
            "update" | "patch" if matches!(info.subresource.as_str(), "" | "status") => Ok(()),
            _ => Err(format!("node '{node}' cannot read all nodes, only its own Node object")),
        },
        ("", "pods") => match (info.verb, info.subresource.as_str()) {
            ("create" | "delete", "") | ("update" | "patch", "status") | ("create", "eviction") => {
                Ok(())
            }
            ("get", "") => {
                if pods_here().any(|p| {
                    p["metadata"]["namespace"] == info.namespace.as_str()
                        && p["metadata"]["name"] == info.name.as_str()
                }) {
                    Ok(())
                } else {
                    Err(format!("no relationship found between node '{node}' and this object"))
                }
            }
            ("list" | "watch", "") if selector.required_field("spec.nodeName") == Some(node) => {
                Ok(())
            }
            _ => deny("can only list/watch pods with spec.nodeName field selector"),
        },
        ("coordination.k8s.io", "leases") => {
            let own = info.namespace == "kube-node-lease"
                && (info.name == node || (info.verb == "create" && info.name.is_empty()));
            if own && matches!(info.verb, "get" | "create" | "update" | "patch" | "delete") {
                Ok(())
            } else {
                deny("can only access node lease with the same name as the requesting node")
            }
        }
        ("storage.k8s.io", "csinodes") => {
            if info.name == node || info.verb == "create" {
                Ok(())
            } else {
                deny("can only access CSINode with the same name as the requesting node")
            }
        }
        _ if node_rules().iter().any(|rule| rule_allows(rule, info)) => Ok(()),
        _ => Err(String::new()),
    }
}

fn rule(group: &str, resources: &[&str], verbs: &[&str]) -> Value {
    json!({"apiGroups": [group], "resources": resources, "verbs": verbs})
}

/// What every node may do with the kinds that are not divided by node.
fn node_rules() -> Vec<Value> {
    let read = ["get", "list", "watch"];
    vec![
        rule("authentication.k8s.io", &["tokenreviews"], &["create"]),
        rule(
            "authorization.k8s.io",
            &["subjectaccessreviews", "localsubjectaccessreviews"],
            &["create"],
        ),
        rule("", &["services"], &read),
        rule("", &["events"], &["create", "update", "patch"]),
        rule("events.k8s.io", &["events"], &["create", "update", "patch"]),
        rule("", &["endpoints"], &["get"]),
        rule(
            "certificates.k8s.io",
            &["certificatesigningrequests"],
            &["create", "get", "list", "watch"],
        ),
        rule("certificates.k8s.io", &["clustertrustbundles"], &read),
        rule("storage.k8s.io", &["csidrivers"], &read),
        rule("node.k8s.io", &["runtimeclasses"], &read),
    ]
}

/// The RBAC objects that a kubeadm cluster has for what a node touches: discovery for everybody,
/// cluster-info for strangers, CSRs for bootstrap tokens.
pub fn bootstrap_policy() -> Vec<Value> {
    const API: &str = "rbac.authorization.k8s.io/v1";
    let role = |kind: &str, namespace: &str, name: &str, rules: Vec<Value>| {
        let mut object =
            json!({"apiVersion": API, "kind": kind, "metadata": {"name": name}, "rules": rules});
        if !namespace.is_empty() {
            object["metadata"]["namespace"] = namespace.into();
        }
        object
    };
    let bind = |kind: &str, namespace: &str, name: &str, to: &str, groups: &[&str]| {
        let subjects: Vec<Value> = groups
            .iter()
            .map(|g| json!({"kind": "Group", "name": g, "apiGroup": "rbac.authorization.k8s.io"}))
            .collect();
        let mut object = json!({"apiVersion": API, "kind": kind, "metadata": {"name": name},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io",
                "kind": if kind == "RoleBinding" && to.starts_with("kubeadm:") { "Role" } else { "ClusterRole" },
                "name": to},
            "subjects": subjects});
        if !namespace.is_empty() {
            object["metadata"]["namespace"] = namespace.into();
        }
        object
    };
    let token_group = "system:bootstrappers:kubeadm:default-node-token";
    let info = "kubeadm:bootstrap-signer-clusterinfo";
    let url = |urls: &[&str]| json!({"nonResourceURLs": urls, "verbs": ["get"]});
    let mut named = rule("", &["configmaps"], &["get"]);
    named["resourceNames"] = json!(["cluster-info"]);
    vec![
        role(
            "ClusterRole",
            "",
            "system:public-info-viewer",
            vec![url(&["/healthz", "/livez", "/readyz", "/version", "/version/"])],
        ),
        role(
            "ClusterRole",
            "",
            "system:discovery",
            vec![url(&["/api", "/api/*", "/apis", "/apis/*", "/openapi", "/openapi/*"])],
        ),
        bind(
            "ClusterRoleBinding",
            "",
            "system:public-info-viewer",
            "system:public-info-viewer",
            &["system:authenticated", "system:unauthenticated"],
        ),
        bind(
            "ClusterRoleBinding",
            "",
            "system:discovery",
            "system:discovery",
            &["system:authenticated"],
        ),
        role(
            "ClusterRole",
            "",
            "system:node-bootstrapper",
            vec![rule(
                "certificates.k8s.io",
                &["certificatesigningrequests"],
                &["create", "get", "list", "watch"],
            )],
        ),
        bind(
            "ClusterRoleBinding",
            "",
            "kubeadm:kubelet-bootstrap",
            "system:node-bootstrapper",
            &[token_group],
        ),
        role("ClusterRole", "", "kubeadm:get-nodes", vec![rule("", &["nodes"], &["get"])]),
        bind("ClusterRoleBinding", "", "kubeadm:get-nodes", "kubeadm:get-nodes", &[token_group]),
        role("Role", "kube-public", info, vec![named]),
        bind("RoleBinding", "kube-public", info, info, &["system:unauthenticated"]),
    ]
}
