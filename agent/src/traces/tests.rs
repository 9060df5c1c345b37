//! Traces as a collector gets them, over real gRPC.

use std::sync::{Arc, Mutex};

use http_body_util::Full;
use hyper::body::Bytes;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use opentelemetry::trace::Span as _;
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::trace::v1::Span;
use tokio::net::{TcpListener, UnixListener};
use tokio_stream::wrappers::TcpListenerStream;

use super::*;
use crate::runtime::Runtime;
use crate::runtime::cri::CriRuntime;

/// Keeps what it is sent.
#[derive(Clone, Default)]
struct Collector(Arc<Mutex<Vec<ExportTraceServiceRequest>>>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: tonic::Request<ExportTraceServiceRequest>,
    ) -> Result<tonic::Response<ExportTraceServiceResponse>, tonic::Status> {
        self.0.lock().unwrap().push(request.into_inner());
        Ok(tonic::Response::new(ExportTraceServiceResponse::default()))
    }
}

impl Collector {
    fn serve(&self, listener: TcpListener) {
        let server = tonic::transport::Server::builder()
            .add_service(TraceServiceServer::new(self.clone()))
            .serve_with_incoming(TcpListenerStream::new(listener));
        tokio::spawn(server);
    }

    fn spans(&self) -> Vec<Span> {
        let requests = self.0.lock().unwrap();
        let all = requests.iter().flat_map(|r| &r.resource_spans).flat_map(|r| &r.scope_spans);
        all.flat_map(|s| s.spans.clone()).collect()
    }

    /// Attributes of who sent them.
    fn resource(&self) -> Vec<(String, String)> {
        let requests = self.0.lock().unwrap();
        let resource = requests[0].resource_spans[0].resource.clone().unwrap();
        resource.attributes.into_iter().map(|a| (a.key, format!("{:?}", a.value))).collect()
    }
}

async fn collector() -> (TcpListener, Tracing) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = listener.local_addr().unwrap().to_string();
    (listener, Tracing { endpoint, sampling_rate_per_million: 1_000_000 })
}

/// A runtime that knows no verb, and keeps what calls say of their spans.
fn runtime(socket: &std::path::Path) -> Arc<Mutex<Vec<String>>> {
    let listener = UnixListener::bind(socket).unwrap();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let told = seen.clone();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let told = told.clone();
            let service = service_fn(move |request: hyper::Request<hyper::body::Incoming>| {
                let parent = request.headers().get("traceparent");
                let parent = parent.map(|value| value.to_str().unwrap().to_owned());
                told.lock().unwrap().extend(parent);
                async {
                    hyper::Response::builder()
                        .header("content-type", "application/grpc")
                        .header("grpc-status", "12")
                        .body(Full::<Bytes>::default())
                }
            });
            let serving = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                .serve_connection(TokioIo::new(stream), service);
            tokio::spawn(serving);
        }
    });
    seen
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pods_turn_the_calls_in_it_and_requests_are_one_trace_each() {
    // Before: nothing is made, not even the names.
    assert!(span(Kind::Internal, || unreachable!("not asked for")).is_none());
    let (listener, tracing) = collector().await;
    let collector = Collector::default();
    collector.serve(listener);
    let traces = Traces::start(&tracing, "host-1").unwrap();
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("cri.sock");
    let seen = runtime(&socket);
    let cri = CriRuntime::new(socket.to_str().unwrap(), Duration::from_secs(30)).unwrap();
    let pod = Pod {
        metadata: kube::core::ObjectMeta {
            name: Some("web".into()),
            namespace: Some("shop".into()),
            uid: Some("uid-1".into()),
            ..Default::default()
        },
        ..Pod::default()
    };
    let turn = pod_span("syncPod", &pod).unwrap();
    within(Some(&turn), async { cri.version().await.unwrap_err() }).await;
    drop(turn);
    let mut headers = hyper::HeaderMap::new();
    let remote = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    headers.insert("traceparent", remote.parse().unwrap());
    let asked = request(&headers, || ("GET /pods".into(), Vec::new())).unwrap();
    ended(&asked, vec![attribute("http.response.status_code", 200)], None);
    drop(asked);
    tokio::task::spawn_blocking(move || traces.end()).await.unwrap();

    let spans = collector.spans();
    let named = |name: &str| {
        spans.iter().find(|span| span.name == name).unwrap_or_else(|| panic!("{name}: {spans:?}"))
    };
    let (turn, call) = (named("syncPod"), named("runtime.v1.RuntimeService/Version"));
    assert_eq!(turn.parent_span_id, Vec::<u8>::new(), "a trace of its own");
    assert_eq!((&call.trace_id, &call.parent_span_id), (&turn.trace_id, &turn.span_id));
    assert!(turn.end_time_unix_nano >= call.end_time_unix_nano, "it ends with what it began");
    let attributes: Vec<_> = turn.attributes.iter().map(|a| a.key.as_str()).collect();
    assert_eq!(attributes, ["k8s.pod.uid", "k8s.pod", "k8s.pod.name", "k8s.namespace.name"]);
    assert_eq!(call.status.as_ref().unwrap().code, 2, "an error: {call:?}");
    // The runtime is told which span its own are under.
    let told = format!("00-{}-{}-01", hex(&call.trace_id), hex(&call.span_id));
    assert_eq!(*seen.lock().unwrap(), [told]);
    // A client of the node API is linked to, and decides nothing.
    let asked = named("GET /pods");
    assert_eq!(asked.parent_span_id, Vec::<u8>::new());
    assert_ne!(hex(&asked.trace_id), "0af7651916cd43dd8448eb211c80319c");
    assert_eq!(hex(&asked.links[0].trace_id), "0af7651916cd43dd8448eb211c80319c");
    assert_eq!(hex(&asked.links[0].span_id), "b7ad6b7169203331");
    let resource = collector.resource();
    for (key, value) in [("service.name", "kubelet"), ("host.name", "host-1")] {
        assert!(resource.iter().any(|(k, v)| k == key && v.contains(value)), "{key}: {resource:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collector_that_takes_nothing_costs_no_more_than_a_full_queue() {
    const MADE: usize = 20_000;
    let (listener, tracing) = collector().await;
    let traces = Traces(provider(&tracing, "host-1").unwrap());
    let tracer = traces.0.tracer("test");
    for _ in 0..MADE {
        // Never waits, whatever becomes of it.
        tracer.span_builder("s").with_kind(SpanKind::Internal).start(&tracer).end();
    }
    let collector = Collector::default();
    collector.serve(listener);
    tokio::task::spawn_blocking(move || traces.end()).await.unwrap();
    let got = collector.spans().len();
    assert!(got > 0, "what waited was sent once the collector was there");
    assert!(got <= 2 * QUEUE, "and the rest was not kept: {got} of {MADE}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_collector_at_all_ends_nothing() {
    let (listener, tracing) = collector().await;
    drop(listener);
    let traces = Traces(provider(&tracing, "host-1").unwrap());
    let tracer = traces.0.tracer("test");
    for _ in 0..3 {
        tracer.span_builder("s").with_kind(SpanKind::Internal).start(&tracer).end();
        assert!(traces.0.force_flush().is_err());
    }
    tokio::task::spawn_blocking(move || traces.end()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_sampled_unless_a_rate_is_given() {
    let (listener, mut tracing) = collector().await;
    tracing.sampling_rate_per_million = 0;
    let collector = Collector::default();
    collector.serve(listener);
    let traces = Traces(provider(&tracing, "host-1").unwrap());
    let tracer = traces.0.tracer("test");
    tracer.span_builder("s").with_kind(SpanKind::Internal).start(&tracer).end();
    tokio::task::spawn_blocking(move || traces.end()).await.unwrap();
    assert!(collector.spans().is_empty());
}
