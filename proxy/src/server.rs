//! The HTTP servers: health, metrics, and one for each healthCheckNodePort. A port that is taken
//! does not stop the proxy: it is reported, and tried again.

use std::collections::{BTreeMap, HashMap};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use jiff::Timestamp;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use crate::config::Mode;
use crate::health::Health;
use crate::metrics::Metrics;
use crate::object::NamespacedName;

/// What the servers answer from.
#[derive(Debug)]
pub struct Shared {
    health: Mutex<Health>,
    mode: Mutex<Mode>,
    local: Mutex<HashMap<NamespacedName, usize>>,
    errors: Mutex<BTreeMap<String, String>>,
    /// Woken when `errors` changes.
    pub errors_changed: tokio::sync::Notify,
    /// Metrics.
    pub metrics: Arc<Metrics>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// Nothing known yet.
    pub fn new(metrics: Arc<Metrics>) -> Arc<Self> {
        Arc::new(Shared {
            health: Mutex::default(),
            mode: Mutex::default(),
            local: Mutex::default(),
            errors: Mutex::default(),
            errors_changed: tokio::sync::Notify::new(),
            metrics,
        })
    }

    /// Changes what health is computed from.
    pub fn update_health(&self, update: impl FnOnce(&mut Health)) {
        update(&mut lock(&self.health));
    }

    /// Tells which backend is in use.
    pub fn set_mode(&self, mode: Mode) {
        *lock(&self.mode) = mode;
    }

    /// Problems of the servers.
    pub fn errors(&self) -> BTreeMap<String, String> {
        lock(&self.errors).clone()
    }

    fn report(&self, object: &str, message: Option<String>) {
        let mut errors = lock(&self.errors);
        let changed = match message {
            Some(message) => errors.insert(object.to_owned(), message.clone()) != Some(message),
            None => errors.remove(object).is_some(),
        };
        drop(errors);
        if changed {
            self.errors_changed.notify_one();
        }
    }

    fn answer(&self, healthz: bool) -> Response {
        let (code, body) = lock(&self.health).answer(Timestamp::now(), healthz);
        self.metrics.answered(healthz, code);
        let body = serde_json::to_string(&body).unwrap_or_default();
        json(code, body, None)
    }
}

fn json(code: u16, body: String, weight: Option<usize>) -> Response {
    let code = StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let headers =
        [(header::CONTENT_TYPE, "application/json"), (header::X_CONTENT_TYPE_OPTIONS, "nosniff")];
    let mut response = (code, headers, body).into_response();
    if let Some(weight) = weight {
        response.headers_mut().insert("x-load-balancing-endpoint-weight", weight.into());
    }
    response
}

/// Binds, trying for as long as it takes; the problem is reported meanwhile.
async fn bind(shared: &Shared, addresses: &[SocketAddr]) -> TcpListener {
    let what = addresses.first().map(|a| format!("listener {a}")).unwrap_or_default();
    let mut wait = Duration::from_millis(250);
    loop {
        match TcpListener::bind(addresses).await {
            Ok(listener) => {
                shared.report(&what, None);
                return listener;
            }
            Err(error) => {
                tracing::warn!(listener = what, %error, "cannot listen, trying again");
                let message =
                    format!("listen: {error}; free the port or choose another, it is tried again");
                shared.report(&what, Some(message));
            }
        }
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(Duration::from_secs(10));
    }
}

async fn serve(shared: Arc<Shared>, addresses: Vec<SocketAddr>, router: Router) {
    let listener = bind(&shared, &addresses).await;
    if let Err(error) = axum::serve(listener, router).await {
        tracing::error!(%error, "a server of the proxy ended");
    }
}

/// Serves `/healthz` and `/livez`.
pub async fn serve_health(shared: Arc<Shared>, address: SocketAddr) {
    let (one, other) = (shared.clone(), shared.clone());
    let router = Router::new()
        .route("/healthz", get(move || async move { one.answer(true) }))
        .route("/livez", get(move || async move { other.answer(false) }));
    serve(shared, vec![address], router).await;
}

/// Serves `/metrics`, `/proxyMode` and `/healthz`.
pub async fn serve_metrics(shared: Arc<Shared>, address: SocketAddr) {
    let (one, other) = (shared.clone(), shared.clone());
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    let router = Router::new()
        .route(
            "/metrics",
            get(move || async move {
                if *lock(&one.mode) == Mode::Iptables
                    && let Ok(counts) = tokio::task::spawn_blocking(crate::iptables::counts).await
                {
                    one.metrics.iptables_packets(counts);
                }
                ([(header::CONTENT_TYPE, kind)], one.metrics.encode())
            }),
        )
        .route("/proxyMode", get(move || async move { lock(&other.mode).to_string() }))
        .route("/healthz", get(|| async { "ok" }));
    serve(shared, vec![address], router).await;
}

/// The servers at healthCheckNodePorts: load balancers ask there whether this node has endpoints.
#[derive(Debug)]
pub struct HealthCheckPorts {
    shared: Arc<Shared>,
    running: HashMap<NamespacedName, (u16, JoinHandle<()>)>,
}

impl HealthCheckPorts {
    /// None yet.
    pub fn new(shared: Arc<Shared>) -> Self {
        HealthCheckPorts { shared, running: HashMap::new() }
    }

    /// A Service's port (0 for none) and number of ready endpoints on this node.
    pub fn set(&mut self, service: &NamespacedName, port: u16, local_ready: usize) {
        if port != 0 {
            lock(&self.shared.local).insert(service.clone(), local_ready);
        }
        if self.running.get(service).map_or(0, |(port, _)| *port) == port {
            return;
        }
        if let Some((old, task)) = self.running.remove(service) {
            task.abort();
            self.shared.report(&format!("listener [::]:{old}"), None);
        }
        if port == 0 {
            lock(&self.shared.local).remove(service);
            return;
        }
        let shared = self.shared.clone();
        let name = service.clone();
        let router = Router::new().fallback(move || {
            let answer = check(&shared, &name);
            async move { answer }
        });
        // IPv4 alone where IPv6 is switched off.
        let addresses = vec![
            SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)),
            SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)),
        ];
        let task = tokio::spawn(serve(self.shared.clone(), addresses, router));
        self.running.insert(service.clone(), (port, task));
    }
}

impl Drop for HealthCheckPorts {
    fn drop(&mut self) {
        self.running.values().for_each(|(_, task)| task.abort());
    }
}

fn check(shared: &Shared, service: &NamespacedName) -> Response {
    let count = lock(&shared.local).get(service).copied().unwrap_or_default();
    let healthy = lock(&shared.health).is_healthy(Timestamp::now());
    let body = serde_json::json!({
        "service": { "namespace": &*service.namespace, "name": &*service.name },
        "localEndpoints": count,
        "serviceProxyHealthy": healthy,
    });
    let code = if count > 0 && healthy { 200 } else { 503 };
    json(code, body.to_string(), Some(count))
}
