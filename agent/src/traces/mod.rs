//! Traces of what the node does, as `KubeletConfiguration.tracing` asks: syncs of pods, calls to the
//! runtime and to the API server, and requests to the node API, by OTLP over gRPC.
//!
//! Without that field nothing of it is set up: no thread, no connection, and a look at one pointer
//! where a span would begin. With it, spans wait in a queue of bounded length for a thread of its
//! own, and what a collector that is away or slow does not take is dropped.

mod carry;
mod export;
#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::sync::OnceLock;
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use opentelemetry::KeyValue;
use opentelemetry::propagation::TextMapPropagator;
use opentelemetry::trace::{
    SpanBuilder, SpanKind, Status, TraceContextExt, Tracer, TracerProvider,
};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{
    BatchConfigBuilder, BatchSpanProcessor, Sampler, SdkTracer, SdkTracerProvider,
};

pub(crate) use self::carry::{in_headers, in_metadata, of_headers};
use self::export::Exporter;
use crate::config::tracing::Tracing;
use crate::ids::{NamespacedName, PodUid};

pub(crate) use opentelemetry::Context;
pub(crate) use opentelemetry::trace::{FutureExt, SpanKind as Kind};

/// Spans that wait for the collector at most; beyond that they are dropped.
const QUEUE: usize = 2048;
/// How long the last spans may take to go out when the node stops.
const LAST: Duration = Duration::from_secs(2);

static TRACER: OnceLock<SdkTracer> = OnceLock::new();

/// Why there are no traces.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TraceError {
    /// The endpoint.
    #[error("KubeletConfiguration.tracing.endpoint {endpoint:?}: {cause}")]
    Endpoint {
        /// As configured.
        endpoint: String,
        /// Why not.
        cause: String,
    },
}

/// Traces that are being taken.
pub(crate) struct Traces(SdkTracerProvider);

impl Traces {
    /// Begins to take them. Within a runtime, on which the collector is spoken to.
    pub(crate) fn start(config: &Tracing, host_name: &str) -> Result<Self, TraceError> {
        let provider = provider(config, host_name)?;
        let _ = TRACER.set(provider.tracer("longshore"));
        // The built-in runtime's spans join by these.
        opentelemetry::global::set_tracer_provider(provider.clone());
        opentelemetry::global::set_text_map_propagator(TraceContextPropagator::new());
        tracing::info!(
            endpoint = config.endpoint,
            per_million = config.sampling_rate_per_million,
            "traces are taken"
        );
        Ok(Self(provider))
    }

    /// Sends what waits, and ends. Blocking, while the runtime still runs.
    pub(crate) fn end(self) {
        if let Err(error) = self.0.shutdown_with_timeout(LAST) {
            tracing::debug!(%error, "the last traces were not sent");
        }
    }
}

fn provider(config: &Tracing, host_name: &str) -> Result<SdkTracerProvider, TraceError> {
    let exporter = Exporter::new(config)?;
    let batches = BatchConfigBuilder::default().with_max_queue_size(QUEUE).build();
    let processor = BatchSpanProcessor::builder(exporter).with_batch_config(batches).build();
    let sampler = match config.sampling_rate_per_million {
        0 => Sampler::AlwaysOff,
        rate => Sampler::TraceIdRatioBased(f64::from(rate) / 1e6),
    };
    let resource = Resource::builder_empty()
        .with_attributes([
            KeyValue::new("service.name", "kubelet"),
            KeyValue::new("host.name", host_name.to_owned()),
        ])
        .build();
    Ok(SdkTracerProvider::builder()
        .with_sampler(Sampler::ParentBased(Box::new(sampler)))
        .with_span_processor(processor)
        .with_resource(resource)
        .build())
}

/// What a span says of its object.
pub(crate) type Attributes = Vec<KeyValue>;

/// An attribute of a span.
pub(crate) fn attribute(key: &'static str, value: impl Into<opentelemetry::Value>) -> KeyValue {
    KeyValue::new(key, value)
}

fn begin(
    name: Cow<'static, str>,
    kind: SpanKind,
    build: impl FnOnce(SpanBuilder) -> SpanBuilder,
    parent: &Context,
) -> Option<Context> {
    let tracer = TRACER.get()?;
    let builder = build(tracer.span_builder(name).with_kind(kind));
    let span = tracer.build_with_context(builder, parent);
    Some(parent.with_span(span))
}

/// Begins a span under the one that the caller is in. It ends with its last user. `None` where
/// nothing is traced; then `name` and `attributes` are not even made.
pub(crate) fn span(
    kind: SpanKind,
    what: impl FnOnce() -> (Cow<'static, str>, Attributes),
) -> Option<Context> {
    TRACER.get()?;
    let (name, attributes) = what();
    begin(name, kind, |span| span.with_attributes(attributes), &Context::current())
}

/// Begins a trace of its own that links to where the request came from: as upstream's public
/// endpoint, so that no client decides what is sampled.
pub(crate) fn request(
    headers: &hyper::HeaderMap,
    what: impl FnOnce() -> (Cow<'static, str>, Attributes),
) -> Option<Context> {
    TRACER.get()?;
    let (name, attributes) = what();
    let from = TraceContextPropagator::new().extract(&of_headers(headers));
    let from = from.span().span_context().clone();
    let linked = |span: SpanBuilder| {
        let span = span.with_attributes(attributes);
        match from.is_valid() {
            true => span.with_links(vec![opentelemetry::trace::Link::with_context(from)]),
            false => span,
        }
    };
    begin(name, SpanKind::Server, linked, &Context::new())
}

/// A span of a pod's turn.
pub(crate) fn pod_span(name: &'static str, pod: &Pod) -> Option<Context> {
    span(SpanKind::Internal, || {
        let meta = &pod.metadata;
        let text = |text: &Option<String>| text.clone().unwrap_or_default();
        let attributes = vec![
            attribute("k8s.pod.uid", PodUid::of(pod).to_string()),
            attribute("k8s.pod", NamespacedName::of_pod(pod).to_string()),
            attribute("k8s.pod.name", text(&meta.name)),
            attribute("k8s.namespace.name", text(&meta.namespace)),
        ];
        (name.into(), attributes)
    })
}

/// A span of a call to the runtime.
pub(crate) fn runtime_call(verb: &'static str) -> Option<Context> {
    span(SpanKind::Client, || {
        let service = match verb {
            "ListImages" | "ImageStatus" | "PullImage" | "RemoveImage" | "ImageFsInfo" => {
                "runtime.v1.ImageService"
            }
            _ => "runtime.v1.RuntimeService",
        };
        let attributes = vec![
            attribute("rpc.system", "grpc"),
            attribute("rpc.service", service),
            attribute("rpc.method", verb),
        ];
        (format!("{service}/{verb}").into(), attributes)
    })
}

/// Says how it went.
pub(crate) fn ended(span: &Context, attributes: Attributes, error: Option<String>) {
    let span = span.span();
    span.set_attributes(attributes);
    if let Some(error) = error {
        span.set_status(Status::error(error));
    }
    span.end();
}

/// Runs `future` in `span`, if there is one.
pub(crate) async fn within<F: Future>(span: Option<&Context>, future: F) -> F::Output {
    match span {
        Some(span) => future.with_context(span.clone()).await,
        None => future.await,
    }
}
