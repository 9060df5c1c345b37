//! The few controllers that a node cannot do without: EndpointSlices from Services and pods, the
//! CSR approver and signer, default ServiceAccounts and CA bundle per namespace, the bootstrap
//! signer. Level-triggered: each pass compares all there is, at every change of the store.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use super::admission::secret_text;
use super::auth::{User, expired};
use super::pki::{Pki, detached_jws};
use super::request::RequestInfo;
use super::resources::{Resource, known};
use super::store::{Store, Write};
use super::{csr, write};

/// What the controllers share.
pub struct Controllers {
    /// The objects.
    pub store: Arc<Store>,
    /// The CA.
    pub pki: Arc<Pki>,
    /// Whether CSRs of joining nodes are approved by themselves.
    pub approve: AtomicBool,
    /// For how long certificates are signed.
    pub signing_seconds: AtomicU64,
}

impl Controllers {
    fn sign_for(&self) -> Duration {
        Duration::from_secs(self.signing_seconds.load(Ordering::Relaxed))
    }

    /// Runs until the store goes away.
    pub async fn run(self: Arc<Self>) {
        let mut changed = self.store.subscribe();
        let mut seen = 0;
        loop {
            changed.mark_unchanged();
            if self.store.version() != seen {
                seen = self.store.version();
                self.pass(seen);
            }
            if changed.changed().await.is_err() {
                return;
            }
            // A burst of writes is one pass.
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    fn pass(&self, _version: u64) {
        self.namespaces();
        self.endpoint_slices();
        self.certificates();
        self.cluster_info();
    }

    fn ensure(&self, kind: &'static Resource, object: Value) {
        let namespace = object["metadata"]["namespace"].as_str().unwrap_or_default().to_owned();
        let info = RequestInfo { namespace, verb: "create", ..RequestInfo::default() };
        if let Err(error) = write::create(&self.store, &system(), kind, &info, object)
            && error.code != 409
        {
            tracing::warn!(kind = kind.kind, message = error.message, "controller cannot create");
        }
    }

    fn namespaces(&self) {
        for namespace in self.store.all(known("namespaces"), "") {
            let name = namespace["metadata"]["name"].as_str().unwrap_or_default();
            if self.store.get(known("serviceaccounts"), name, "default").is_none() {
                self.ensure(
                    known("serviceaccounts"),
                    json!({"metadata": {"name": "default", "namespace": name}}),
                );
            }
            if self.store.get(known("configmaps"), name, "kube-root-ca.crt").is_none() {
                self.ensure(
                    known("configmaps"),
                    json!({"metadata": {"name": "kube-root-ca.crt", "namespace": name},
                        "data": {"ca.crt": self.pki.ca_pem()}}),
                );
            }
        }
    }

    fn endpoint_slices(&self) {
        let kind = known("endpointslices");
        let mut wanted = BTreeSet::new();
        for service in self.store.all(known("services"), "") {
            let namespace = service["metadata"]["namespace"].as_str().unwrap_or_default();
            let Some(selector) = service["spec"]["selector"].as_object() else { continue };
            let pods: Vec<_> = self
                .store
                .all(known("pods"), namespace)
                .into_iter()
                .filter(|pod| selector.iter().all(|(k, v)| pod["metadata"]["labels"][k] == *v))
                .collect();
            for family in service["spec"]["ipFamilies"].as_array().into_iter().flatten() {
                for slice in slices(&service, family.as_str().unwrap_or("IPv4"), &pods) {
                    let name = slice["metadata"]["name"].as_str().unwrap_or_default().to_owned();
                    wanted.insert((namespace.to_owned(), name));
                    self.put(kind, slice);
                }
            }
        }
        for slice in self.store.all(kind, "") {
            let key = super::store::key_of(&slice);
            let ours =
                slice["metadata"]["labels"]["endpointslice.kubernetes.io/managed-by"] == MANAGED_BY;
            if ours && !wanted.contains(&key) {
                let _ = self.store.write(kind, &key.0, &key.1, |old| {
                    Ok(old.map_or(Write::Keep, |old| Write::Remove((**old).clone())))
                });
            }
        }
    }

    /// Stores `object` over what is there, keeping its identity; nothing if it is the same.
    fn put(&self, kind: &'static Resource, mut object: Value) {
        object["apiVersion"] = kind.api_version().into();
        object["kind"] = kind.kind.into();
        let (namespace, name) = super::store::key_of(&object);
        let _ = self.store.write(kind, &namespace, &name, |old| {
            for field in ["uid", "creationTimestamp", "resourceVersion", "generation"] {
                match old {
                    Some(old) => object["metadata"][field] = old["metadata"][field].clone(),
                    None if field == "uid" => object["metadata"][field] = write::new_uid().into(),
                    None if field == "creationTimestamp" => {
                        object["metadata"][field] = write::now().into();
                    }
                    None if field == "generation" => object["metadata"][field] = 1.into(),
                    None => {}
                }
            }
            if old.is_some_and(|old| **old != object)
                && let Some(generation) = object["metadata"]["generation"].as_i64()
            {
                object["metadata"]["generation"] = (generation + 1).into();
            }
            Ok(Write::Put(object))
        });
    }

    fn certificates(&self) {
        let kind = known("certificatesigningrequests");
        for request in self.store.all(kind, "") {
            let name = request["metadata"]["name"].as_str().unwrap_or_default();
            if !request["status"]["certificate"].is_null() {
                continue;
            }
            let mut new = (*request).clone();
            if self.approve.load(Ordering::Relaxed)
                && new["status"]["conditions"].is_null()
                && csr::auto_approved(&new)
            {
                new["status"]["conditions"] = json!([{"type": "Approved", "status": "True",
                    "reason": "AutoApproved", "message": "Auto approving kubelet client certificate after SubjectAccessReview.",
                    "lastUpdateTime": write::now(), "lastTransitionTime": write::now()}]);
            }
            if csr::is_approved(&new) {
                match csr::sign(&self.pki, &new, self.sign_for()) {
                    Ok(pem) => new["status"]["certificate"] = STANDARD.encode(pem).into(),
                    Err(why) => {
                        if let Some(conditions) = new["status"]["conditions"].as_array_mut() {
                            conditions.push(json!({"type": "Failed", "status": "True",
                                "reason": "SigningError", "message": format!("{why:#}"),
                                "lastUpdateTime": write::now(), "lastTransitionTime": write::now()}));
                        }
                    }
                }
            }
            if new == *request {
                continue;
            }
            let _ = self.store.write(kind, "", name, |old| {
                Ok(match old {
                    Some(old) if **old == *request => Write::Put(new),
                    _ => Write::Keep,
                })
            });
        }
    }

    /// Signs `kube-public/cluster-info` for every live signing token.
    fn cluster_info(&self) {
        let kind = known("configmaps");
        let Some(info) = self.store.get(kind, "kube-public", "cluster-info") else { return };
        let kubeconfig = info["data"]["kubeconfig"].as_str().unwrap_or_default().to_owned();
        let mut data = json!({"kubeconfig": kubeconfig});
        for secret in self.store.all(known("secrets"), "kube-system") {
            if secret["type"] != "bootstrap.kubernetes.io/token" {
                continue;
            }
            let text = |key: &str| secret_text(&secret, key);
            let (Some(id), Some(token_secret)) = (text("token-id"), text("token-secret")) else {
                continue;
            };
            if text("usage-bootstrap-signing").as_deref() == Some("true")
                && !expired(text("expiration"))
            {
                data[format!("jws-kubeconfig-{id}")] =
                    detached_jws(&id, &token_secret, &kubeconfig).into();
            }
        }
        if info["data"] != data {
            let mut new = (*info).clone();
            new["data"] = data;
            let _ = self.store.write(kind, "kube-public", "cluster-info", |_| Ok(Write::Put(new)));
        }
    }
}

const MANAGED_BY: &str = "endpointslice-controller.k8s.io";

/// The control plane itself.
pub fn system() -> User {
    User {
        name: "system:control-plane".into(),
        groups: vec!["system:masters".into(), "system:authenticated".into()],
        uid: String::new(),
    }
}

fn pod_ip<'a>(pod: &'a Value, family: &str) -> Option<&'a str> {
    pod["status"]["podIPs"]
        .as_array()?
        .iter()
        .filter_map(|ip| ip["ip"].as_str())
        .find(|ip| ip.contains(':') == (family == "IPv6"))
}

/// The ports that a pod serves a Service's ports on; `None` where a named port has no match.
fn target_port(port: &Value, pod: &Value) -> Option<u64> {
    let Some(name) = port["targetPort"].as_str() else {
        return port["targetPort"].as_u64();
    };
    pod["spec"]["containers"]
        .as_array()?
        .iter()
        .flat_map(|c| c["ports"].as_array().into_iter().flatten())
        .find(|p| p["name"] == name && p["protocol"] == port["protocol"])?["containerPort"]
        .as_u64()
}

/// The slices of one Service and family: pods whose ports resolve alike share one, 100 endpoints
/// each at most.
fn slices(service: &Value, family: &str, pods: &[Arc<Value>]) -> Vec<Value> {
    let publish = service["spec"]["publishNotReadyAddresses"] == true;
    let mut groups: Vec<(Vec<Value>, Vec<Value>)> = Vec::new();
    for pod in pods {
        if matches!(pod["status"]["phase"].as_str(), Some("Succeeded" | "Failed")) {
            continue;
        }
        let Some(ip) = pod_ip(pod, family) else { continue };
        let ports: Vec<Value> = service["spec"]["ports"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|p| {
                Some(json!({"name": p["name"].as_str().unwrap_or_default(),
                    "protocol": p["protocol"], "port": target_port(p, pod)?}))
            })
            .collect();
        let serving = pod["status"]["conditions"]
            .as_array()
            .into_iter()
            .flatten()
            .any(|c| c["type"] == "Ready" && c["status"] == "True");
        let terminating = !pod["metadata"]["deletionTimestamp"].is_null();
        let endpoint = json!({"addresses": [ip],
            "conditions": {"ready": publish || (serving && !terminating), "serving": serving,
                "terminating": terminating},
            "nodeName": pod["spec"]["nodeName"],
            "targetRef": {"kind": "Pod", "namespace": pod["metadata"]["namespace"],
                "name": pod["metadata"]["name"], "uid": pod["metadata"]["uid"]}});
        match groups.iter_mut().find(|(p, _)| *p == ports) {
            Some((_, endpoints)) => endpoints.push(endpoint),
            None => groups.push((ports, vec![endpoint])),
        }
    }
    if groups.is_empty() {
        groups.push((Vec::new(), Vec::new()));
    }
    let name = service["metadata"]["name"].as_str().unwrap_or_default();
    let mut slices = Vec::new();
    for (ports, endpoints) in groups {
        let chunks: Vec<&[Value]> =
            if endpoints.is_empty() { vec![&[]] } else { endpoints.chunks(100).collect() };
        for chunk in chunks {
            slices.push(json!({
                "metadata": {"name": format!("{name}-{}-{}", family.to_lowercase(), slices.len()),
                    "namespace": service["metadata"]["namespace"],
                    "labels": {"kubernetes.io/service-name": name,
                        "endpointslice.kubernetes.io/managed-by": MANAGED_BY},
                    "ownerReferences": [{"apiVersion": "v1", "kind": "Service", "name": name,
                        "uid": service["metadata"]["uid"], "controller": true, "blockOwnerDeletion": true}]},
                "addressType": family, "ports": ports, "endpoints": chunk,
            }));
        }
    }
    slices
}
