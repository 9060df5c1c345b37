//! ConfigMaps, Secrets, tokens, Services and the node from the API server.
//!
//! Each ConfigMap and Secret that a pod here uses has a watch of its own, by name, because the Node
//! authorizer grants no more. What was last seen stays while the control plane is away.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use async_trait::async_trait;
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::authentication::v1::{TokenRequestSpec, TokenRequestStatus};
use k8s_openapi::api::certificates::v1beta1::{ClusterTrustBundle, PodCertificateRequest};
use k8s_openapi::api::core::v1::{
    ConfigMap, Node, PersistentVolume, PersistentVolumeClaim, Pod, Secret, Service, ServiceAccount,
};
use k8s_openapi::api::node::v1::RuntimeClass;
use k8s_openapi::api::resource::v1::ResourceClaim;
use k8s_openapi::api::storage::v1::{CSIDriver, VolumeAttachment};
use kube::Resource;
use kube::api::{Patch, PatchParams, PostParams};
use serde::de::DeserializeOwned;
use tokio::sync::{Notify, broadcast, watch};
use tokio::task::AbortHandle;

pub use self::services::Services;
use self::tokens::{expiry, must_renew, request_token, token_key};
use super::one::{Known, Look, One, answer};
use super::references;
use super::set::{Set, Wanted, Watched};
use super::storage::Storage;
use super::store::Store;
use crate::api::{self, Api, ApiError, REQUEST_TIMEOUT};
use crate::ids::{NamespacedName, PodUid};
use crate::objects::{ObjectError, ObjectRef, Objects};

mod services;
mod tokens;

/// Tokens kept beyond those of running pods.
const MAX_TOKENS: usize = 4096;

enum Held {
    ConfigMap(watch::Receiver<Known<ConfigMap>>),
    Secret(watch::Receiver<Known<Secret>>),
}

struct Entry {
    pods: HashSet<PodUid>,
    held: Held,
    task: AbortHandle,
    /// A pod has come that it was not looked at for.
    anew: bool,
    /// Has it looked at again.
    again: Arc<Notify>,
}

#[derive(Default)]
struct Retained {
    entries: HashMap<ObjectRef, Entry>,
    by_pod: HashMap<PodUid, Vec<ObjectRef>>,
}

/// Objects from an API server.
pub struct ClusterObjects {
    api: Api,
    node: watch::Receiver<Option<Arc<Node>>>,
    services: Arc<Services>,
    retained: Mutex<Retained>,
    tokens: Mutex<HashMap<String, TokenRequestStatus>>,
    changes: broadcast::Sender<ObjectRef>,
    maps: Store,
    secrets: Store,
    token_store: Store,
    /// Handlers by RuntimeClass, as far as pods here needed them.
    handlers: Mutex<HashMap<String, String>>,
    handler_store: Store,
    storage: Storage,
    bundles: Watched<ClusterTrustBundle>,
    bundle_store: Store,
    requests: Watched<PodCertificateRequest>,
    earlier: OnceLock<Earlier>,
    look: Look,
}

#[derive(Default)]
struct Earlier {
    maps: HashMap<NamespacedName, Arc<ConfigMap>>,
    secrets: HashMap<NamespacedName, Arc<Secret>>,
}

impl ClusterObjects {
    /// Over `api`; `stores` keep ConfigMaps, Secrets, tokens, handlers, what is known of claims and
    /// their volumes, and trust bundles (files 0600) for a restart while the control plane is away.
    pub fn new(
        api: Api,
        node: watch::Receiver<Option<Arc<Node>>>,
        services: Arc<Services>,
        stores: [Store; 6],
        look: Look,
    ) -> Arc<Self> {
        let [maps, secrets, token_store, handler_store, storage, bundle_store] = stores;
        let handlers = handler_store.load::<(String, String)>().into_iter().flatten().collect();
        let tokens = token_store
            .load::<(String, TokenRequestStatus)>()
            .into_iter()
            .flatten()
            .collect::<HashMap<_, _>>();
        Arc::new(Self {
            storage: Storage::new(api.clone(), storage),
            api,
            node,
            services,
            retained: Mutex::default(),
            tokens: Mutex::new(tokens),
            changes: broadcast::channel(1024).0,
            maps,
            secrets,
            token_store,
            handlers: Mutex::new(handlers),
            handler_store,
            bundles: Watched::default(),
            bundle_store,
            requests: Watched::default(),
            earlier: OnceLock::new(),
            look,
        })
    }

    /// Objects of an earlier run; read from disk when first needed.
    fn earlier(&self) -> &Earlier {
        self.earlier.get_or_init(|| Earlier {
            maps: self.maps.load::<ConfigMap>().into_iter().flatten().map(keyed).collect(),
            secrets: self.secrets.load::<Secret>().into_iter().flatten().map(keyed).collect(),
        })
    }

    fn retained(&self) -> MutexGuard<'_, Retained> {
        self.retained.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// `None` for what is not held.
    fn hold(&self, reference: &ObjectRef) -> Option<(Held, AbortHandle, Arc<Notify>)> {
        // Read before the first watch may write over it.
        let earlier = self.earlier();
        match reference {
            ObjectRef::ConfigMap(key) => {
                let before = earlier.maps.get(key).cloned();
                let (rx, task, again) =
                    self.look_at_one(reference, key, before, "ConfigMap", &self.maps);
                Some((Held::ConfigMap(rx), task, again))
            }
            ObjectRef::Secret(key) => {
                let before = earlier.secrets.get(key).cloned();
                let (rx, task, again) =
                    self.look_at_one(reference, key, before, "Secret", &self.secrets);
                Some((Held::Secret(rx), task, again))
            }
            ObjectRef::CsiDriver(_) | ObjectRef::TrustBundles | ObjectRef::CertificateRequests => {
                None
            }
        }
    }

    fn look_at_one<K>(
        &self,
        reference: &ObjectRef,
        key: &NamespacedName,
        before: Option<Arc<K>>,
        kind: &'static str,
        store: &Store,
    ) -> (watch::Receiver<Known<K>>, AbortHandle, Arc<Notify>)
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>
            + Clone
            + serde::Serialize
            + DeserializeOwned
            + std::fmt::Debug
            + Send
            + Sync
            + 'static,
    {
        let (tx, rx) = watch::channel(Known::Nothing);
        let objects = kube::Api::namespaced(self.api.objects.clone(), &key.namespace);
        let one = One {
            key: key.clone(),
            reference: reference.clone(),
            kind,
            before,
            tx,
            changes: self.changes.clone(),
            store: store.clone(),
        };
        let again = Arc::new(Notify::new());
        let run = one.run(objects, self.look, self.node.clone(), again.clone());
        (rx, tokio::spawn(run).abort_handle(), again)
    }

    async fn get_directly<K>(
        &self,
        key: &NamespacedName,
        kind: &'static str,
    ) -> Result<Option<Arc<K>>, ObjectError>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>
            + Clone
            + DeserializeOwned
            + std::fmt::Debug,
    {
        let objects: kube::Api<K> = kube::Api::namespaced(self.api.objects.clone(), &key.namespace);
        let what = format!("get {kind} {key}");
        match api::timed(what, REQUEST_TIMEOUT, objects.get_opt(&key.name)).await {
            Ok(object) => Ok(object.map(Arc::new)),
            Err(error) => Err(object_error(kind, key, &error)),
        }
    }

    /// What is held of an object, or the object as it is now where that is not good enough.
    async fn get_held<K>(
        &self,
        key: &NamespacedName,
        kind: &'static str,
        reference: ObjectRef,
        of: impl Fn(&Held) -> Option<watch::Receiver<Known<K>>>,
    ) -> Result<Option<Arc<K>>, ObjectError>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>
            + Clone
            + DeserializeOwned
            + std::fmt::Debug,
    {
        let held = self
            .retained()
            .entries
            .get(&reference)
            .and_then(|entry| Some((of(&entry.held)?, entry.is_stale(self.look))));
        match held {
            Some((rx, false)) => answer(rx, kind, key).await,
            Some((rx, true)) => {
                let now = self.get_directly(key, kind).await;
                self.look_again(&reference, now.is_ok());
                // What was last seen serves while the control plane is away.
                if matches!(now, Err(ObjectError::Unavailable { .. })) {
                    return answer(rx, kind, key).await;
                }
                now
            }
            None => self.get_directly(key, kind).await,
        }
    }

    fn tokens(&self) -> MutexGuard<'_, HashMap<String, TokenRequestStatus>> {
        self.tokens.lock().unwrap_or_else(|e| e.into_inner())
    }
}

pub(super) fn keyed<K: Resource>(object: K) -> (NamespacedName, Arc<K>) {
    let meta = object.meta();
    let key = NamespacedName::new(
        meta.namespace.as_deref().unwrap_or("default"),
        meta.name.as_deref().unwrap_or_default(),
    );
    (key, Arc::new(object))
}

pub(super) fn object_error(
    kind: &'static str,
    key: &NamespacedName,
    error: &ApiError,
) -> ObjectError {
    let (key, cause) = (key.clone(), error.to_string());
    match error.code() {
        Some(403) => ObjectError::Forbidden { kind, key, cause },
        _ => ObjectError::Unavailable { kind, key, cause },
    }
}

#[async_trait]
impl Objects for ClusterObjects {
    async fn config_map(
        &self,
        key: &NamespacedName,
    ) -> Result<Option<Arc<ConfigMap>>, ObjectError> {
        let of = |held: &Held| match held {
            Held::ConfigMap(rx) => Some(rx.clone()),
            Held::Secret(_) => None,
        };
        self.get_held(key, "ConfigMap", ObjectRef::ConfigMap(key.clone()), of).await
    }

    async fn secret(&self, key: &NamespacedName) -> Result<Option<Arc<Secret>>, ObjectError> {
        let of = |held: &Held| match held {
            Held::Secret(rx) => Some(rx.clone()),
            Held::ConfigMap(_) => None,
        };
        self.get_held(key, "Secret", ObjectRef::Secret(key.clone()), of).await
    }

    async fn service_account(
        &self,
        key: &NamespacedName,
    ) -> Result<Option<Arc<ServiceAccount>>, ObjectError> {
        self.get_directly(key, "ServiceAccount").await
    }

    async fn service_account_token(
        &self,
        account: &NamespacedName,
        spec: TokenRequestSpec,
    ) -> Result<TokenRequestStatus, ObjectError> {
        let cache_key = token_key(account, &spec);
        let held = self.tokens().get(&cache_key).cloned();
        let now = jiff::Timestamp::now().as_second();
        let life = spec.expiration_seconds.unwrap_or(3600);
        if let Some(token) = &held
            && !must_renew(expiry(token), life, now)
        {
            return Ok(token.clone());
        }
        match request_token(self.api.main.clone(), account, spec).await {
            Ok(token) => {
                let mut tokens = self.tokens();
                tokens.insert(cache_key.clone(), token.clone());
                if tokens.len() > MAX_TOKENS {
                    tokens.retain(|_, t| expiry(t) > now);
                }
                drop(tokens);
                self.token_store.put(&cache_key, &(&cache_key, &token));
                Ok(token)
            }
            // An old token is better than none while the control plane is away.
            Err(error) => match held {
                Some(token) if error.code().is_none() => Ok(token),
                _ => Err(object_error("ServiceAccount token", account, &error)),
            },
        }
    }

    async fn runtime_handler(&self, class: &str) -> Result<Option<String>, ObjectError> {
        let classes: kube::Api<RuntimeClass> = kube::Api::all(self.api.objects.clone());
        let what = format!("get RuntimeClass {class}");
        let found = api::timed(what, REQUEST_TIMEOUT, classes.get_opt(class)).await;
        let mut handlers = self.handlers.lock().unwrap_or_else(|e| e.into_inner());
        match found {
            Ok(Some(found)) => {
                let (name, handler) = (class.to_owned(), found.handler);
                if handlers.insert(name.clone(), handler.clone()).as_ref() != Some(&handler) {
                    self.handler_store.put(class, &(name, handler.clone()));
                }
                Ok(Some(handler))
            }
            Ok(None) => {
                handlers.remove(class);
                self.handler_store.remove(class);
                Ok(None)
            }
            // What is known serves while the control plane is away; a handler never changes.
            Err(error) => match handlers.get(class) {
                Some(handler) if error.code().is_none() => Ok(Some(handler.clone())),
                _ => Err(object_error("RuntimeClass", &NamespacedName::new("", class), &error)),
            },
        }
    }

    async fn claim(
        &self,
        key: &NamespacedName,
    ) -> Result<Option<Arc<PersistentVolumeClaim>>, ObjectError> {
        let objects = kube::Api::namespaced(self.api.objects.clone(), &key.namespace);
        self.storage.get("PersistentVolumeClaim", key, &objects).await
    }

    async fn patch_claim_status(
        &self,
        key: &NamespacedName,
        patch: serde_json::Value,
    ) -> Result<(), ObjectError> {
        let claims: kube::Api<PersistentVolumeClaim> =
            kube::Api::namespaced(self.api.main.clone(), &key.namespace);
        let (params, patch) = (PatchParams::default(), Patch::Merge(patch));
        let request = claims.patch_status(&key.name, &params, &patch);
        let what = format!("patch the status of PersistentVolumeClaim {key}");
        match api::timed(what, REQUEST_TIMEOUT, request).await {
            Ok(_) => Ok(()),
            Err(error) => Err(object_error("PersistentVolumeClaim", key, &error)),
        }
    }

    async fn persistent_volume(
        &self,
        name: &str,
    ) -> Result<Option<Arc<PersistentVolume>>, ObjectError> {
        self.storage.get_of_cluster("PersistentVolume", name).await
    }

    async fn volume_attachment(
        &self,
        name: &str,
    ) -> Result<Option<Arc<VolumeAttachment>>, ObjectError> {
        self.storage.get_of_cluster("VolumeAttachment", name).await
    }

    async fn csi_driver(&self, name: &str) -> Result<Option<Arc<CSIDriver>>, ObjectError> {
        self.storage.get_of_cluster("CSIDriver", name).await
    }

    async fn resource_claim(
        &self,
        key: &NamespacedName,
    ) -> Result<Option<Arc<ResourceClaim>>, ObjectError> {
        let objects = kube::Api::namespaced(self.api.objects.clone(), &key.namespace);
        self.storage.get("ResourceClaim", key, &objects).await
    }

    async fn trust_bundles(&self) -> Result<Vec<Arc<ClusterTrustBundle>>, ObjectError> {
        let kind = "ClusterTrustBundle";
        let seen = self.bundles.seen(|| Wanted {
            objects: kube::Api::all(self.api.objects.clone()),
            fields: String::new(),
            kind,
            reference: ObjectRef::TrustBundles,
            changes: self.changes.clone(),
            store: Some(self.bundle_store.clone()),
        });
        let all = answer(seen, kind, &NamespacedName::new("", "*")).await?;
        Ok(all.map(|all| all.values().cloned().collect()).unwrap_or_default())
    }

    async fn request_certificate(
        &self,
        request: PodCertificateRequest,
    ) -> Result<NamespacedName, ObjectError> {
        // What becomes of it is not to be missed.
        self.certificate_requests(&request.spec.node_name);
        let namespace = request.metadata.namespace.clone().unwrap_or_default();
        let requests: kube::Api<PodCertificateRequest> =
            kube::Api::namespaced(self.api.main.clone(), &namespace);
        let what = format!("create a PodCertificateRequest of pod {}", request.spec.pod_name);
        let params = PostParams::default();
        let made = api::timed(what, REQUEST_TIMEOUT, requests.create(&params, &request)).await;
        let key = NamespacedName::new(&namespace, &request.spec.pod_name);
        let made =
            made.map_err(|error| object_error("PodCertificateRequest of pod", &key, &error))?;
        Ok(NamespacedName::new(&namespace, made.metadata.name.as_deref().unwrap_or_default()))
    }

    async fn certificate_request(
        &self,
        node: &str,
        key: &NamespacedName,
    ) -> Result<Option<Arc<PodCertificateRequest>>, ObjectError> {
        let all = answer(self.certificate_requests(node), "PodCertificateRequest", key).await?;
        Ok(all.and_then(|all| all.get(key).cloned()))
    }

    fn services(&self, namespace: &str) -> Vec<Arc<Service>> {
        self.services.of(namespace)
    }

    fn node(&self) -> Option<Arc<Node>> {
        self.node.borrow().clone()
    }

    fn retain(&self, pod: &Pod) {
        let (uid, references) = (PodUid::of(pod), references::of_pod(pod));
        let mut retained = self.retained();
        let before = retained.by_pod.insert(uid.clone(), references.clone()).unwrap_or_default();
        for reference in &references {
            match retained.entries.get_mut(reference) {
                Some(entry) => {
                    entry.anew |= entry.pods.insert(uid.clone());
                }
                None => {
                    let Some((held, task, again)) = self.hold(reference) else { continue };
                    let pods = [uid.clone()].into();
                    let entry = Entry { pods, held, task, anew: false, again };
                    retained.entries.insert(reference.clone(), entry);
                }
            }
        }
        for reference in before.iter().filter(|r| !references.contains(r)) {
            self.let_go(&mut retained, reference, &uid);
        }
    }

    fn release(&self, uid: &PodUid) {
        let mut retained = self.retained();
        for reference in retained.by_pod.remove(uid).unwrap_or_default() {
            self.let_go(&mut retained, &reference, uid);
        }
        drop(retained);
        let bound = format!("/{uid}");
        self.tokens().retain(|key, _| !key.ends_with(&bound));
        self.token_store.keep(|key| !key.ends_with(&bound));
    }

    fn changes(&self) -> broadcast::Receiver<ObjectRef> {
        self.changes.subscribe()
    }

    fn announce(&self, changed: ObjectRef) {
        // Nobody listening is fine.
        let _ = self.changes.send(changed);
    }
}

impl Entry {
    /// Whether what is held is not to be given away as it is.
    fn is_stale(&self, look: Look) -> bool {
        match look {
            Look::Watch => false,
            Look::Cache => self.anew,
            Look::Get(_) => true,
        }
    }
}

impl ClusterObjects {
    /// Has an object looked at by whoever holds it: a caller has seen it as it is now.
    fn look_again(&self, reference: &ObjectRef, seen: bool) {
        if let Some(entry) = self.retained().entries.get_mut(reference) {
            entry.anew &= !seen;
            entry.again.notify_one();
        }
    }

    fn certificate_requests(
        &self,
        node: &str,
    ) -> watch::Receiver<Known<Set<PodCertificateRequest>>> {
        self.requests.seen(|| Wanted {
            objects: kube::Api::all(self.api.objects.clone()),
            fields: format!("spec.nodeName={node}"),
            kind: "PodCertificateRequest",
            reference: ObjectRef::CertificateRequests,
            changes: self.changes.clone(),
            store: None,
        })
    }

    fn let_go(&self, retained: &mut Retained, reference: &ObjectRef, uid: &PodUid) {
        let Some(entry) = retained.entries.get_mut(reference) else { return };
        entry.pods.remove(uid);
        if entry.pods.is_empty() {
            entry.task.abort();
            retained.entries.remove(reference);
            match reference {
                ObjectRef::ConfigMap(key) => self.maps.remove(&key.to_string()),
                ObjectRef::Secret(key) => self.secrets.remove(&key.to_string()),
                ObjectRef::CsiDriver(_)
                | ObjectRef::TrustBundles
                | ObjectRef::CertificateRequests => {}
            }
        }
    }
}

impl Drop for ClusterObjects {
    fn drop(&mut self) {
        self.retained().entries.values().for_each(|entry| entry.task.abort());
    }
}
