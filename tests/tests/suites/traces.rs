//! Traces of a real node: the agent's spans and those of the built-in runtime are of one trace.

use std::sync::{Arc, Mutex};

use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::trace::v1::Span;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use tests::harness::{Lab, Node, NodeOptions, eventually};
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;

#[derive(Clone, Default)]
struct Collector(Arc<Mutex<Vec<Span>>>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: tonic::Request<ExportTraceServiceRequest>,
    ) -> Result<tonic::Response<ExportTraceServiceResponse>, tonic::Status> {
        let of = request.into_inner().resource_spans.into_iter().flat_map(|r| r.scope_spans);
        self.0.lock().unwrap().extend(of.flat_map(|scope| scope.spans));
        Ok(tonic::Response::new(ExportTraceServiceResponse::default()))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_is_traced_from_its_sync_into_the_runtime() {
    let lab = Lab::new("traces").unwrap();
    let mut node = Node::new(&lab, NodeOptions::default()).await.unwrap();
    // A socket in a file reaches across the namespaces.
    let socket = lab.dir().join("otel.sock");
    std::fs::write(
        lab.dir().join("kubelet.yaml"),
        format!(
            "kind: KubeletConfiguration\napiVersion: kubelet.config.k8s.io/v1beta1\n\
             tracing: {{endpoint: \"unix://{}\", samplingRatePerMillion: 1000000}}\n",
            socket.display()
        ),
    )
    .unwrap();
    let config = format!("--config={}", lab.dir().join("kubelet.yaml").display());
    node.start(&[
        "--standalone",
        "--manifests",
        "/etc/kubernetes/manifests",
        "--pod-cidr=10.244.7.0/24",
        &config,
    ])
    .unwrap();
    node.ready().await;
    // It comes later than the node, which went on without it.
    let collector = Collector::default();
    let server = tonic::transport::Server::builder()
        .add_service(TraceServiceServer::new(collector.clone()))
        .serve_with_incoming(UnixListenerStream::new(UnixListener::bind(&socket).unwrap()));
    let serving = tokio::spawn(server);
    node.import_example_image().unwrap();
    node.put_manifest(
        "web.yaml",
        "{apiVersion: v1, kind: Pod, metadata: {name: web}, spec: {terminationGracePeriodSeconds: 1, \
         containers: [{name: c, image: \"longshore.local/demo/busybox:1\", command: [sleep, \"1000\"]}]}}",
    )
    .unwrap();
    let named = |spans: &[Span], name: &str, kind: SpanKind| {
        spans
            .iter()
            .filter(|s| s.name == name && s.kind == kind as i32)
            .cloned()
            .collect::<Vec<_>>()
    };
    eventually("the making of a sandbox is one trace", async || {
        let spans = collector.0.lock().unwrap().clone();
        let verb = "runtime.v1.RuntimeService/RunPodSandbox";
        let turns = named(&spans, "syncPod", SpanKind::Internal);
        let found = named(&spans, verb, SpanKind::Server).into_iter().any(|served| {
            named(&spans, verb, SpanKind::Client).iter().any(|call| {
                call.span_id == served.parent_span_id
                    && call.trace_id == served.trace_id
                    && turns.iter().any(|turn| {
                        turn.span_id == call.parent_span_id && turn.trace_id == call.trace_id
                    })
            })
        });
        let names: Vec<_> = spans.iter().map(|s| (&s.name, s.kind)).collect();
        if found { Ok(()) } else { Err(anyhow::anyhow!("{names:?}")) }
    })
    .await;
    node.remove_manifest("web.yaml").unwrap();
    node.nothing_of_pods_left().await;
    let spans = collector.0.lock().unwrap().clone();
    for name in ["syncTerminatingPod", "syncTerminatedPod"] {
        eventually(name, async || {
            let spans = collector.0.lock().unwrap().clone();
            if named(&spans, name, SpanKind::Internal).is_empty() { Err("not yet") } else { Ok(()) }
        })
        .await;
    }
    // Streams that last as long as their client are no spans.
    assert!(!spans.iter().any(|span| span.name.ends_with("GetContainerEvents")));
    node.end(nix::sys::signal::Signal::SIGTERM).await;
    serving.abort();
}
