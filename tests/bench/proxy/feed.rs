//! An API server that holds nothing but Services, their slices and one node, and tells of changes at
//! once: list (in pages), watch, and the streamed list that newer clients ask for. What a proxy makes
//! of a change is then its own time, not a control plane's.

use std::collections::{BTreeMap, HashMap};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::Result;
use axum::Router;
use axum::body::Body;
use axum::extract::{Query, Request, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{any, get};
use axum::serve::ListenerExt as _;
use serde_json::{Value, json};
use tokio::sync::mpsc;

/// Endpoints of each Service.
pub const ENDPOINTS: u32 = 4;
/// The node's name.
pub const NODE: &str = "bench";

/// A kind's objects, as JSON, and who watches them.
#[derive(Default)]
struct Kind {
    /// By number, with the version of the last change.
    objects: BTreeMap<u32, (u64, Arc<str>)>,
    watchers: Vec<mpsc::UnboundedSender<String>>,
}

#[derive(Default)]
struct Objects {
    version: u64,
    /// How often each Service's endpoint was replaced.
    rounds: HashMap<u32, u32>,
    services: Kind,
    slices: Kind,
    node: Kind,
}

/// The server.
#[derive(Clone, Default)]
pub struct Feed(Arc<Mutex<Objects>>);

#[derive(serde::Deserialize)]
#[serde(rename_all = "camelCase")]
struct Options {
    #[serde(default)]
    watch: String,
    #[serde(default)]
    limit: usize,
    #[serde(default, rename = "continue")]
    from: String,
    #[serde(default)]
    send_initial_events: String,
    #[serde(default)]
    resource_version: String,
}

/// The cluster IP of a Service.
pub fn vip(number: u32) -> SocketAddr {
    (Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 64, 0, 1)) + number), 80).into()
}

/// An object's metadata, of about the size that a real one has.
fn metadata(name: &str, version: u64, labels: &Value) -> Value {
    json!({"name": name, "namespace": "default", "uid": format!("9d3c2f58-0000-4000-8000-{:012x}", version),
        "resourceVersion": version.to_string(), "creationTimestamp": "2026-01-02T03:04:05Z", "labels": labels,
        "managedFields": [{"manager": "kube-controller-manager", "operation": "Update", "apiVersion": "v1",
            "time": "2026-01-02T03:04:05Z", "fieldsType": "FieldsV1",
            "fieldsV1": {"f:metadata": {"f:labels": {".": {}, "f:app": {}}}, "f:spec": {"f:ports": {}, "f:selector": {}}}}]})
}

/// Every Service has it, or none.
fn affinity() -> &'static str {
    if std::env::var_os("LONGSHORE_BENCH_AFFINITY").is_some() { "ClientIP" } else { "None" }
}

fn service(number: u32, version: u64) -> Value {
    let name = format!("service-{number}");
    let ip = vip(number).ip();
    json!({"apiVersion": "v1", "kind": "Service", "metadata": metadata(&name, version, &json!({"app": name})),
        "spec": {"clusterIP": ip, "clusterIPs": [ip], "type": "ClusterIP", "ipFamilies": ["IPv4"],
            "ipFamilyPolicy": "SingleStack", "internalTrafficPolicy": "Cluster", "sessionAffinity": affinity(),
            "selector": {"app": name}, "ports": [{"name": "http", "protocol": "TCP", "port": 80, "targetPort": 8080}]},
        "status": {"loadBalancer": {}}})
}

/// Addresses of a Service's endpoints: the last is another in each round.
fn endpoints(number: u32, round: u32) -> Vec<Ipv4Addr> {
    let base = u32::from(Ipv4Addr::new(10, 128, 0, 1)) + number * 8;
    let offset = |i: u32| if i + 1 == ENDPOINTS { i + round % 2 } else { i };
    (0..ENDPOINTS).map(|i| Ipv4Addr::from(base + offset(i))).collect()
}

fn slice(number: u32, addresses: &[Ipv4Addr], version: u64) -> Value {
    let name = format!("service-{number}");
    let endpoint = |(i, address): (usize, &Ipv4Addr)| {
        json!({"addresses": [address], "nodeName": format!("node-{}", number % 100),
            "zone": "a", "conditions": {"ready": true, "serving": true, "terminating": false},
            "targetRef": {"kind": "Pod", "namespace": "default", "name": format!("{name}-7d4b9c6f5-{i}"),
                "uid": format!("9d3c2f58-0000-4000-9000-{:012x}", u32::from(*address))}})
    };
    let endpoints: Vec<Value> = addresses.iter().enumerate().map(endpoint).collect();
    let labels = json!({"kubernetes.io/service-name": name, "app": name,
        "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io"});
    json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": metadata(&format!("{name}-abcde"), version, &labels), "addressType": "IPv4",
        "ports": [{"name": "http", "protocol": "TCP", "port": 8080}], "endpoints": endpoints})
}

impl Kind {
    fn tell(&mut self, kind: &str, object: &str) {
        let line = format!("{{\"type\":\"{kind}\",\"object\":{object}}}\n");
        self.watchers.retain(|watcher| watcher.send(line.clone()).is_ok());
    }

    fn put(&mut self, number: u32, version: u64, object: &Value) {
        let text: Arc<str> = object.to_string().into();
        let new = !self.objects.contains_key(&number);
        self.tell(if new { "ADDED" } else { "MODIFIED" }, &text);
        self.objects.insert(number, (version, text));
    }
}

impl Feed {
    fn lock(&self) -> MutexGuard<'_, Objects> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// With so many Services.
    pub fn new(services: u32) -> Self {
        let feed = Feed::default();
        let node = json!({"apiVersion": "v1", "kind": "Node",
            "metadata": {"name": NODE, "uid": "1", "resourceVersion": "1"}, "spec": {"podCIDR": "10.128.0.0/24"},
            "status": {"addresses": [{"type": "InternalIP", "address": "192.168.99.1"}]}});
        feed.lock().node.put(0, 1, &node);
        (0..services).for_each(|number| feed.add(number));
        feed
    }

    /// Adds a Service with its slice.
    pub fn add(&self, number: u32) {
        self.add_with(number, &endpoints(number, 0));
    }

    /// Adds a Service with endpoints at these addresses.
    pub fn add_with(&self, number: u32, addresses: &[Ipv4Addr]) {
        let mut all = self.lock();
        all.version += 1;
        let version = all.version;
        all.services.put(number, version, &service(number, version));
        all.slices.put(number, version, &slice(number, addresses, version));
    }

    /// Replaces an endpoint of a Service.
    pub fn flip(&self, number: u32) {
        let mut all = self.lock();
        all.version += 1;
        let version = all.version;
        let round = all.rounds.entry(number).or_default();
        *round += 1;
        let round = *round;
        all.slices.put(number, version, &slice(number, &endpoints(number, round), version));
    }

    /// Serves at a port of 127.0.0.1; tells the port.
    ///
    /// # Errors
    /// If it cannot listen.
    pub async fn serve(&self) -> Result<u16> {
        let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await?;
        let port = listener.local_addr()?.port();
        let of = |pick: fn(&mut Objects) -> &mut Kind, api: &'static str, list: &'static str| {
            get(move |State(feed): State<Feed>, Query(options): Query<Options>| async move {
                feed.answer(pick, api, list, &options)
            })
        };
        let router = Router::new()
            .route("/api/v1/services", of(|o| &mut o.services, "v1", "ServiceList"))
            .route("/api/v1/nodes", of(|o| &mut o.node, "v1", "NodeList"))
            .route(
                "/api/v1/nodes/bench",
                get(|State(feed): State<Feed>| async move {
                    json_answer(feed.lock().node.objects[&0].1.to_string())
                }),
            )
            .route(
                "/apis/discovery.k8s.io/v1/endpointslices",
                of(|o| &mut o.slices, "discovery.k8s.io/v1", "EndpointSliceList"),
            )
            .fallback(any(nothing))
            .with_state(self.clone());
        // As Go's servers do: else an event waits for what the one before is answered by.
        let listener = listener.tap_io(|stream| {
            let _ = stream.set_nodelay(true);
        });
        tokio::spawn(async move { axum::serve(listener, router).await });
        Ok(port)
    }

    fn answer(
        &self,
        pick: fn(&mut Objects) -> &mut Kind,
        api: &str,
        list: &str,
        options: &Options,
    ) -> Response {
        let mut all = self.lock();
        let version = all.version;
        let kind = pick(&mut all);
        if !options.watch.is_empty() && options.watch != "false" && options.watch != "0" {
            let (watcher, told) = mpsc::unbounded_channel();
            let initial = options.send_initial_events == "true";
            // What changed after the list that the watch goes on from is told, as by the API server.
            let since: u64 =
                if initial { 0 } else { options.resource_version.parse().unwrap_or(u64::MAX) };
            let kind_of = if initial { "ADDED" } else { "MODIFIED" };
            for (_, object) in kind.objects.values().filter(|(version, _)| *version > since) {
                let line = format!("{{\"type\":\"{kind_of}\",\"object\":{object}}}\n");
                let _ = watcher.send(line);
            }
            if initial {
                let mark = json!({"type": "BOOKMARK", "object": {"apiVersion": api, "kind": list.trim_end_matches("List"),
                    "metadata": {"resourceVersion": version.to_string(), "annotations": {"k8s.io/initial-events-end": "true"}}}});
                let _ = watcher.send(format!("{mark}\n"));
            }
            kind.watchers.push(watcher);
            let lines = futures::stream::unfold(told, |mut told| async {
                let line = told.recv().await?;
                Some((Ok::<_, std::convert::Infallible>(line), told))
            });
            let headers = [(header::CONTENT_TYPE, "application/json")];
            return (headers, Body::from_stream(lines)).into_response();
        }
        let from: usize = options.from.parse().unwrap_or(0);
        let limit = if options.limit == 0 { usize::MAX } else { options.limit };
        let to = from.saturating_add(limit).min(kind.objects.len());
        let more = if to < kind.objects.len() { to.to_string() } else { String::new() };
        let metadata = json!({"resourceVersion": version.to_string(), "continue": more});
        let items = kind.objects.values().skip(from).take(limit);
        let items: Vec<&str> = items.map(|(_, object)| &**object).collect();
        let items = items.join(",");
        json_answer(format!(
            "{{\"apiVersion\":\"{api}\",\"kind\":\"{list}\",\"metadata\":{metadata},\"items\":[{items}]}}"
        ))
    }
}

fn json_answer(body: String) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], body).into_response()
}

/// Events and the like are taken and forgotten; other kinds have no objects.
async fn nothing(request: Request) -> Response {
    if request.method() == axum::http::Method::POST {
        return (StatusCode::CREATED, json_answer("{}".to_owned())).into_response();
    }
    let status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404,
        "message": format!("nothing at {}", request.uri())});
    (StatusCode::NOT_FOUND, json_answer(status.to_string())).into_response()
}
