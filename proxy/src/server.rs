//! The HTTP servers: health, metrics, and one for each healthCheckNodePort. A port that is taken
//! does not stop the proxy: it is reported, and tried again.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{any, get};
use jiff::Timestamp;
use tokio::net::{TcpListener, TcpSocket};
use tokio::task::JoinHandle;

use crate::Error;
use crate::config::Mode;
use crate::health::Health;
use crate::metrics::Metrics;
use crate::object::{Cidr, NamespacedName};

/// What the servers answer from.
#[derive(Debug)]
pub struct Shared {
    health: Mutex<Health>,
    mode: Mutex<Mode>,
    local: Mutex<HashMap<NamespacedName, [usize; 2]>>,
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

/// Listens at an address, of IPv6 for IPv6 alone: IPv4 has a listener of its own.
fn listen(address: SocketAddr, only_v6: bool) -> std::io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    if address.is_ipv6() && only_v6 {
        nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::Ipv6V6Only, &true)?;
    }
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(128)
}

/// Listens, trying for as long as it takes; the problem is reported meanwhile.
async fn bind(shared: &Shared, address: SocketAddr, only_v6: bool) -> TcpListener {
    let what = format!("listener {address}");
    let mut wait = Duration::from_millis(250);
    loop {
        match listen(address, only_v6) {
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

/// Serves until the listener fails; with `hard_fail` a port that is taken is an error.
async fn serve(
    shared: Arc<Shared>,
    address: SocketAddr,
    hard_fail: bool,
    router: Router,
) -> Result<(), Error> {
    let listener = if hard_fail {
        listen(address, false).map_err(|source| Error::Bind { address, source })?
    } else {
        bind(&shared, address, false).await
    };
    serve_at(listener, router).await;
    Ok(())
}

async fn serve_at(listener: TcpListener, router: Router) {
    if let Err(error) = axum::serve(listener, router).await {
        tracing::error!(%error, "a server of the proxy ended");
    }
}

/// Serves `/healthz` and `/livez`.
pub async fn serve_health(
    shared: Arc<Shared>,
    address: SocketAddr,
    hard_fail: bool,
) -> Result<(), Error> {
    let (one, other) = (shared.clone(), shared.clone());
    let router = Router::new()
        .route("/healthz", any(move || async move { one.answer(true) }))
        .route("/livez", any(move || async move { other.answer(false) }));
    serve(shared, address, hard_fail, router).await
}

const PLAIN: [(header::HeaderName, &str); 2] = [
    (header::CONTENT_TYPE, "text/plain; charset=utf-8"),
    (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
];

/// What the program around the proxy shows at the metrics port.
#[derive(Default)]
pub struct MetricsPort {
    /// Pages about the process and its configuration; `/metrics`, `/proxyMode`, `/healthz` and
    /// `/metrics/slis` are the proxy's own.
    pub pages: Router,
    /// Makes the answer at `/metrics` of the proxy's own metrics, in OpenMetrics text. Without it
    /// these are the answer.
    pub metrics: Option<fn(&str) -> Response>,
}

/// `/metrics/slis`: the one check that kube-proxy has, and how often it was made.
fn slis(checks: u64) -> Response {
    let text = format!(
        "# HELP kubernetes_healthcheck This metric records the result of a single healthcheck.\n\
         # TYPE kubernetes_healthcheck gauge\n\
         kubernetes_healthcheck{{name=\"ping\",type=\"healthz\"}} 1\n\
         # HELP kubernetes_healthchecks_total This metric records the results of all healthcheck.\n\
         # TYPE kubernetes_healthchecks_total counter\n\
         kubernetes_healthchecks_total{{name=\"ping\",status=\"success\",type=\"healthz\"}} {checks}\n"
    );
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response()
}

/// Serves `/metrics`, `/proxyMode`, `/healthz` and what the program around the proxy shows.
pub async fn serve_metrics(
    shared: Arc<Shared>,
    address: SocketAddr,
    hard_fail: bool,
    port: MetricsPort,
) -> Result<(), Error> {
    let (one, other) = (shared.clone(), shared.clone());
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    let checks = Arc::new(AtomicU64::new(0));
    let told = checks.clone();
    let healthy = any(move || async move {
        checks.fetch_add(1, Ordering::Relaxed);
        (PLAIN, "ok")
    });
    let router = Router::new()
        .route(
            "/metrics",
            get(move || async move {
                if *lock(&one.mode) == Mode::Iptables
                    && let Ok(counts) = tokio::task::spawn_blocking(crate::iptables::counts).await
                {
                    one.metrics.iptables_packets(counts);
                }
                let own = one.metrics.encode();
                match port.metrics {
                    Some(metrics) => {
                        tokio::task::spawn_blocking(move || metrics(&own)).await.unwrap_or_default()
                    }
                    None => ([(header::CONTENT_TYPE, kind)], own).into_response(),
                }
            }),
        )
        .route("/proxyMode", any(move || async move { (PLAIN, lock(&other.mode).to_string()) }))
        .route("/healthz", healthy.clone())
        .route("/healthz/ping", healthy)
        .route("/metrics/slis", get(move || async move { slis(told.load(Ordering::Relaxed)) }))
        .merge(port.pages)
        .fallback(|| async { (StatusCode::NOT_FOUND, PLAIN, "404 page not found\n") });
    serve(shared, address, hard_fail, router).await
}

/// What a Service wants of its healthCheckNodePort.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HealthCheck {
    /// The port, 0 for none.
    pub port: u16,
    /// Whether the Service is of IPv4 and of IPv6: it is asked at addresses of these.
    pub families: [bool; 2],
    /// Ready endpoints on this node, by family.
    pub local_ready: [usize; 2],
}

#[derive(Debug)]
struct Served {
    wants: HealthCheck,
    listeners: HashMap<SocketAddr, JoinHandle<()>>,
}

/// The servers at healthCheckNodePorts: load balancers ask there whether this node has endpoints.
/// They listen where NodePorts are served.
#[derive(Debug)]
pub struct HealthCheckPorts {
    shared: Arc<Shared>,
    /// Where NodePorts are served; `None` is everywhere.
    cidrs: Option<Vec<Cidr>>,
    /// Addresses of this node within them, where they are not everywhere.
    local: Vec<IpAddr>,
    served: HashMap<NamespacedName, Served>,
}

/// Addresses of this node's interfaces.
fn local_addresses() -> Vec<IpAddr> {
    let interfaces = nix::ifaddrs::getifaddrs().inspect_err(|error| {
        tracing::warn!(%error, "cannot tell this node's addresses for healthCheckNodePorts");
    });
    let address = |interface: nix::ifaddrs::InterfaceAddress| {
        let address = interface.address?;
        let v4 = address.as_sockaddr_in().map(|v4| IpAddr::from(v4.ip()));
        v4.or(address.as_sockaddr_in6().map(|v6| IpAddr::from(v6.ip())))
    };
    interfaces.into_iter().flatten().filter_map(address).collect()
}

/// Where a Service's health check port listens.
fn plan_listeners(
    wants: HealthCheck,
    cidrs: Option<&[Cidr]>,
    local: &[IpAddr],
) -> BTreeSet<SocketAddr> {
    let mut all = BTreeSet::new();
    if wants.port == 0 {
        return all;
    }
    for (everywhere, wanted) in
        [IpAddr::from([0; 4]), IpAddr::from([0; 16])].into_iter().zip(wants.families)
    {
        let ipv4 = everywhere.is_ipv4();
        let of_family = || cidrs.into_iter().flatten().filter(move |c| c.is_ipv4() == ipv4);
        if !wanted {
            continue;
        }
        if cidrs.is_none() || of_family().any(|cidr| cidr.prefix_len == 0) {
            all.insert(SocketAddr::new(everywhere, wants.port));
            continue;
        }
        let within = local.iter().filter(|ip| of_family().any(|cidr| cidr.contains(**ip)));
        all.extend(within.map(|ip| SocketAddr::new(*ip, wants.port)));
    }
    all
}

impl HealthCheckPorts {
    /// None yet.
    pub fn new(shared: Arc<Shared>) -> Self {
        HealthCheckPorts { shared, cidrs: None, local: Vec::new(), served: HashMap::new() }
    }

    /// Where NodePorts are served now, and what this node's addresses are.
    pub fn refresh(&mut self, cidrs: Option<Vec<Cidr>>) {
        let local = match &cidrs {
            Some(_) if !self.served.is_empty() => local_addresses(),
            _ => Vec::new(),
        };
        if (&self.cidrs, &self.local) == (&cidrs, &local) {
            return;
        }
        (self.cidrs, self.local) = (cidrs, local);
        let all: Vec<_> = self.served.iter().map(|(name, s)| (name.clone(), s.wants)).collect();
        all.into_iter().for_each(|(name, wants)| self.set(&name, wants));
    }

    /// What a Service wants.
    pub fn set(&mut self, service: &NamespacedName, wants: HealthCheck) {
        if wants.port == 0 {
            lock(&self.shared.local).remove(service);
            for (address, task) in self.served.remove(service).into_iter().flat_map(|s| s.listeners)
            {
                self.close(address, &task);
            }
            return;
        }
        lock(&self.shared.local).insert(service.clone(), wants.local_ready);
        if self.cidrs.is_some() && self.local.is_empty() {
            self.local = local_addresses();
        }
        let planned = plan_listeners(wants, self.cidrs.as_deref(), &self.local);
        let before = self.served.remove(service).map(|served| served.listeners);
        let mut listeners = HashMap::new();
        for (address, task) in before.into_iter().flatten() {
            if planned.contains(&address) {
                listeners.insert(address, task);
            } else {
                self.close(address, &task);
            }
        }
        for address in planned {
            listeners.entry(address).or_insert_with(|| {
                let (shared, name) = (self.shared.clone(), service.clone());
                let family = usize::from(address.is_ipv6());
                let answers = shared.clone();
                let router = Router::new().fallback(move || {
                    let answer = check(&answers, &name, family);
                    async move { answer }
                });
                tokio::spawn(async move {
                    let listener = bind(&shared, address, true).await;
                    serve_at(listener, router).await;
                })
            });
        }
        self.served.insert(service.clone(), Served { wants, listeners });
    }

    fn close(&self, address: SocketAddr, task: &JoinHandle<()>) {
        task.abort();
        self.shared.report(&format!("listener {address}"), None);
    }
}

impl Drop for HealthCheckPorts {
    fn drop(&mut self) {
        self.served.values().flat_map(|s| s.listeners.values()).for_each(JoinHandle::abort);
    }
}

fn check(shared: &Shared, service: &NamespacedName, family: usize) -> Response {
    let count = lock(&shared.local).get(service).copied().unwrap_or_default()[family];
    let healthy = lock(&shared.health).is_healthy(Timestamp::now());
    let body = serde_json::json!({
        "service": { "namespace": &*service.namespace, "name": &*service.name },
        "localEndpoints": count,
        "serviceProxyHealthy": healthy,
    });
    let code = if count > 0 && healthy { 200 } else { 503 };
    json(code, body.to_string(), Some(count))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn health_checks_listen_where_node_ports_are_served() {
        let local: Vec<IpAddr> = ["127.0.0.1", "10.0.0.1", "192.168.1.1", "::1", "fd00::1"]
            .map(|a| a.parse().unwrap())
            .into();
        let at = |families, cidrs: Option<&[&str]>| {
            let cidrs: Option<Vec<Cidr>> =
                cidrs.map(|all| all.iter().map(|text| text.parse().unwrap()).collect());
            let wants = HealthCheck { port: 99, families, local_ready: [0; 2] };
            let all = plan_listeners(wants, cidrs.as_deref(), &local);
            all.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert_eq!(at([true, true], None), ["0.0.0.0:99", "[::]:99"]);
        assert_eq!(at([false, true], None), ["[::]:99"]);
        assert_eq!(at([true, true], Some(&["10.0.0.0/8", "::/0"])), ["10.0.0.1:99", "[::]:99"]);
        assert_eq!(at([true, true], Some(&["172.16.0.0/12"])), [] as [&str; 0]);
    }
}
