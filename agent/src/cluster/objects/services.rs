//! What containers are told of Services by environment variables.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

use k8s_openapi::api::core::v1::{Service, ServicePort, ServiceSpec};

use crate::ids::NamespacedName;

/// By name.
type InNamespace = HashMap<Arc<str>, Linked>;

/// What environment variables tell of a Service: a node knows all of them, and starts pods of few.
struct Linked {
    cluster_ip: Box<str>,
    ports: Box<[LinkedPort]>,
}

struct LinkedPort {
    name: Option<Box<str>>,
    protocol: Option<Box<str>>,
    port: i32,
}

impl Linked {
    /// `None` for one that variables do not tell of.
    fn of(service: &Service) -> Option<Linked> {
        let spec = service.spec.as_ref()?;
        let cluster_ip = spec.cluster_ip.as_deref().filter(|ip| !matches!(*ip, "" | "None"))?;
        let ports = spec.ports.iter().flatten().map(|port| LinkedPort {
            name: port.name.as_deref().map(Box::from),
            protocol: port.protocol.as_deref().filter(|p| *p != "TCP").map(Box::from),
            port: port.port,
        });
        Some(Linked { cluster_ip: cluster_ip.into(), ports: ports.collect() })
    }

    fn service(&self, namespace: &str, name: &str) -> Arc<Service> {
        let ports = self.ports.iter().map(|port| ServicePort {
            name: port.name.as_deref().map(str::to_owned),
            protocol: Some(port.protocol.as_deref().unwrap_or("TCP").to_owned()),
            port: port.port,
            ..ServicePort::default()
        });
        let spec = ServiceSpec {
            cluster_ip: Some(self.cluster_ip.to_string()),
            ports: Some(ports.collect()),
            ..ServiceSpec::default()
        };
        let mut service = Service { spec: Some(spec), ..Service::default() };
        service.metadata.namespace = Some(namespace.to_owned());
        service.metadata.name = Some(name.to_owned());
        Arc::new(service)
    }
}

/// Services by namespace, for the service environment variables.
#[derive(Default)]
pub struct Services(Mutex<HashMap<Arc<str>, InNamespace>>);

impl Services {
    fn lock(&self) -> MutexGuard<'_, HashMap<Arc<str>, InNamespace>> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Holds what of `service` containers are told.
    pub fn put(&self, key: &NamespacedName, service: &Service) {
        match Linked::of(service) {
            Some(linked) => {
                let mut all = self.lock();
                all.entry(key.namespace.clone()).or_default().insert(key.name.clone(), linked);
            }
            None => self.remove(key),
        }
    }

    /// Forgets it.
    pub fn remove(&self, key: &NamespacedName) {
        let mut all = self.lock();
        if let Some(services) = all.get_mut(&key.namespace) {
            services.remove(&key.name);
            if services.is_empty() {
                all.remove(&key.namespace);
            }
        }
    }

    pub(super) fn of(&self, namespace: &str) -> Vec<Arc<Service>> {
        let all = self.lock();
        let own = all.get(namespace).into_iter().flatten();
        let mut found: Vec<_> =
            own.map(|(name, service)| service.service(namespace, name)).collect();
        if namespace != "default"
            && let Some(api) = all.get("default").and_then(|s| s.get("kubernetes"))
        {
            found.push(api.service("default", "kubernetes"));
        }
        found
    }
}
