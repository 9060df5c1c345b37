//! Services, EndpointSlices and ServiceCIDRs, for the proxy and for the environment of containers.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use kube::Client;
use proxy::object::{Change, NamespacedName as ProxyKey};
use tokio::sync::mpsc;

use super::list::{List, text};
use super::{AWAY_AFTER, Errors};
use crate::api::watch::{Failure, Seen, Watch};
use crate::cluster::objects::Services;
use crate::cluster::store::Store;
use crate::ids::NamespacedName;
use crate::source::proxy_object::{
    HEADLESS, SERVICE_PROXY_NAME, TRIGGER_TIME, cidrs, key, service_change, slice_change,
};

/// Where Services and slices go.
#[derive(Clone)]
pub struct ServiceLoops {
    /// To the proxy.
    pub proxy: mpsc::Sender<Change>,
    /// For the service environment variables of pods, if this process runs any.
    pub services: Option<Arc<Services>>,
    /// This node.
    pub node_name: String,
    /// Whether the proxy is served by this process.
    pub serve: bool,
    /// Shown in status.
    pub errors: Errors,
    /// Which of the two kinds have been told once.
    pub synced: Arc<Synced>,
}

/// Counts what has been told completely.
#[derive(Default)]
pub struct Synced(Mutex<(bool, bool)>);

impl Synced {
    /// True exactly once: when both are complete.
    fn note(&self, slices: bool) -> bool {
        let mut told = self.0.lock().unwrap_or_else(|e| e.into_inner());
        let before = told.0 && told.1;
        if slices {
            told.1 = true
        } else {
            told.0 = true
        }
        !before && told.0 && told.1
    }
}

impl ServiceLoops {
    async fn send(&self, change: Change) {
        if self.serve {
            let _ = self.proxy.send(change).await;
        }
    }

    async fn complete(&self, slices: bool) {
        if self.synced.note(slices) {
            self.send(Change::Synced).await;
        }
    }

    /// Runs for ever: Services.
    pub async fn run_services(self, client: Client, store: Store) {
        let mut watch = Watch::<Service>::new(kube::Api::all(client), "");
        let mut list = List::default();
        let away = tokio::time::sleep(AWAY_AFTER);
        tokio::pin!(away);
        loop {
            let seen = tokio::select! {
                seen = watch.next() => seen,
                () = &mut away, if !list.told => {
                    self.last_known_services(&mut list, &store).await;
                    continue;
                }
            };
            match seen {
                Seen::Restarted => list.restart(),
                Seen::Listed(service) => {
                    if list.note(&service) {
                        self.service(service, &store).await;
                    }
                }
                Seen::Complete => {
                    self.errors.clear("services");
                    for gone in list.complete(&store) {
                        self.service_gone(gone).await;
                    }
                    self.complete(false).await;
                    tokio::task::spawn_blocking(crate::sys::release_memory);
                }
                Seen::Applied(service) => {
                    self.errors.clear("services");
                    list.note(&service);
                    self.service(service, &store).await;
                }
                Seen::Deleted(service) => {
                    let gone = key(&service.metadata);
                    list.forget(&gone);
                    store.remove(&text(&gone));
                    self.service_gone(gone).await;
                }
                Seen::Failed(failure) => {
                    if !list.told {
                        self.last_known_services(&mut list, &store).await;
                    }
                    self.failed("services", failure).await;
                }
            }
        }
    }

    async fn service(&self, mut service: Service, store: &Store) {
        trim_service(&mut service);
        let key = key(&service.metadata);
        store.put(&text(&key), &service);
        self.send(service_change(&service)).await;
        if let Some(services) = &self.services {
            services.put(&ours(&key), &service);
        }
    }

    async fn service_gone(&self, gone: ProxyKey) {
        if let Some(services) = &self.services {
            services.remove(&ours(&gone));
        }
        self.send(Change::ServiceGone(gone)).await;
    }

    async fn last_known_services(&self, list: &mut List, store: &Store) {
        list.told = true;
        // With nothing on disk an earlier run's rules are the best there is.
        let Some(services) = store.load::<Service>() else { return };
        for service in services {
            list.recall(&service);
            self.service(service, store).await;
        }
        self.complete(false).await;
    }

    /// Runs for ever: EndpointSlices.
    pub async fn run_slices(self, client: Client, store: Store) {
        let selector = format!("!{HEADLESS}");
        let mut watch = Watch::<EndpointSlice>::new(kube::Api::all(client), "").labels(&selector);
        let mut list = List::default();
        let mut refused = false;
        let away = tokio::time::sleep(AWAY_AFTER);
        tokio::pin!(away);
        loop {
            let seen = tokio::select! {
                seen = watch.next() => seen,
                () = &mut away, if !list.told && !refused => {
                    self.last_known_slices(&mut list, &store).await;
                    continue;
                }
            };
            match seen {
                Seen::Restarted => list.restart(),
                Seen::Listed(slice) => {
                    if list.note(&slice) {
                        self.slice(slice, &store).await;
                    }
                }
                Seen::Complete => {
                    self.errors.clear("endpointslices");
                    self.send(Change::SourceError(None)).await;
                    for gone in list.complete(&store) {
                        self.send(Change::SliceGone(gone)).await;
                    }
                    self.complete(true).await;
                    tokio::task::spawn_blocking(crate::sys::release_memory);
                }
                Seen::Applied(slice) => {
                    self.errors.clear("endpointslices");
                    list.note(&slice);
                    self.slice(slice, &store).await;
                }
                Seen::Deleted(slice) => {
                    let gone = key(&slice.metadata);
                    list.forget(&gone);
                    store.remove(&text(&gone));
                    self.send(Change::SliceGone(gone)).await;
                }
                Seen::Failed(failure) => {
                    refused = failure.forbidden;
                    if !list.told && !refused {
                        self.last_known_slices(&mut list, &store).await;
                    }
                    self.failed("endpointslices", failure).await;
                }
            }
        }
    }

    async fn slice(&self, mut slice: EndpointSlice, store: &Store) {
        slice.metadata.managed_fields = None;
        slice.metadata.owner_references = None;
        if let Some(annotations) = &mut slice.metadata.annotations {
            annotations.retain(|name, _| name == TRIGGER_TIME);
        }
        store.put(&text(&key(&slice.metadata)), &slice);
        self.send(slice_change(&slice, &self.node_name)).await;
    }

    async fn last_known_slices(&self, list: &mut List, store: &Store) {
        list.told = true;
        let Some(slices) = store.load::<EndpointSlice>() else { return };
        for slice in slices {
            list.recall(&slice);
            self.slice(slice, store).await;
        }
        self.complete(true).await;
    }

    async fn failed(&self, what: &'static str, failure: Failure) {
        let message = if failure.forbidden {
            format!(
                "not allowed to read {what}: {}; an administrator grants it with: longshore \
                 cluster-setup | kubectl apply -f -",
                failure.message
            )
        } else {
            format!("cannot read {what}: {}", failure.message)
        };
        if failure.forbidden {
            self.send(Change::SourceError(Some(message.clone()))).await;
        }
        self.errors.set(what, message);
    }
}

/// Takes away what neither the proxy nor the environment needs: a node holds every Service there is.
fn trim_service(service: &mut Service) {
    let metadata = &mut service.metadata;
    metadata.managed_fields = None;
    metadata.annotations = None;
    metadata.owner_references = None;
    metadata.finalizers = None;
    if let Some(labels) = &mut metadata.labels {
        labels.retain(|label, _| label == SERVICE_PROXY_NAME || label == HEADLESS);
    }
    if let Some(spec) = &mut service.spec {
        spec.selector = None;
    }
}

/// Runs for ever: ranges of cluster IPs, for the proxy. Nothing depends on them but that packets to
/// addresses that no Service has end here: who may not read them goes without.
pub async fn run_service_cidrs(client: Client, proxy: mpsc::Sender<Change>) {
    let mut watch = Watch::<ServiceCIDR>::new(kube::Api::all(client), "");
    let mut known: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut listed = BTreeMap::new();
    loop {
        let of = |object: ServiceCIDR| {
            let cidrs = object.spec.and_then(|spec| spec.cidrs).unwrap_or_default();
            (object.metadata.name.unwrap_or_default(), cidrs)
        };
        match watch.next().await {
            Seen::Restarted => {
                listed = BTreeMap::new();
                continue;
            }
            Seen::Listed(object) => {
                listed.extend([of(object)]);
                continue;
            }
            Seen::Complete => known = std::mem::take(&mut listed),
            Seen::Applied(object) => known.extend([of(object)]),
            Seen::Deleted(object) => drop(known.remove(&of(object).0)),
            Seen::Failed(failure) => {
                tracing::debug!(message = failure.message, "ServiceCIDRs are not known");
                continue;
            }
        }
        let all: Vec<String> = known.values().flatten().cloned().collect();
        let cidrs = cidrs(&all).into_iter().map(|cidr| cidr.network()).collect();
        let _ = proxy.send(Change::ServiceCidrs(cidrs)).await;
    }
}

fn ours(key: &ProxyKey) -> NamespacedName {
    NamespacedName { namespace: key.namespace.clone(), name: key.name.clone() }
}
