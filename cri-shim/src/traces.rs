//! Spans of the calls that the shim answers, under those of whoever calls (`traceparent`). They go
//! where the process that hosts the shim has set OpenTelemetry up to send them.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context as Task, Poll};

use futures::future::Either;
use hyper::header::{HeaderMap, HeaderName};
use hyper::{Request, Response};
use opentelemetry::propagation::Extractor;
use opentelemetry::trace::{FutureExt, SpanKind, Status, TraceContextExt, Tracer};
use opentelemetry::{KeyValue, global};

/// Makes spans around a service, where `on`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Traces {
    pub(crate) on: bool,
}

/// A service with spans around its calls.
#[derive(Clone, Debug)]
pub(crate) struct Traced<S> {
    inner: S,
    on: bool,
}

impl<S> tower::Layer<S> for Traces {
    type Service = Traced<S>;

    fn layer(&self, inner: S) -> Traced<S> {
        Traced { inner, on: self.on }
    }
}

struct Headers<'a>(&'a HeaderMap);

impl Extractor for Headers<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.to_str().ok()
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(HeaderName::as_str).collect()
    }
}

/// What one call comes to.
type Answer<R, E> = Pin<Box<dyn Future<Output = Result<R, E>> + Send>>;

impl<S, B, R> tower::Service<Request<B>> for Traced<S>
where
    S: tower::Service<Request<B>, Response = Response<R>>,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Either<S::Future, Answer<S::Response, S::Error>>;

    fn poll_ready(&mut self, task: &mut Task<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(task)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let path = request.uri().path().trim_start_matches('/');
        // Events are a stream that lasts as long as its client.
        let Some((service, verb)) =
            path.split_once('/').filter(|(_, verb)| self.on && *verb != "GetContainerEvents")
        else {
            return Either::Left(self.inner.call(request));
        };
        let parent = global::get_text_map_propagator(|propagator| {
            propagator.extract(&Headers(request.headers()))
        });
        let tracer = global::tracer("longshore-cri");
        let attributes = [
            KeyValue::new("rpc.system", "grpc"),
            KeyValue::new("rpc.service", service.to_owned()),
            KeyValue::new("rpc.method", verb.to_owned()),
        ];
        let span = tracer
            .span_builder(path.to_owned())
            .with_kind(SpanKind::Server)
            .with_attributes(attributes);
        let span = parent.with_span(tracer.build_with_context(span, &parent));
        let answer = self.inner.call(request).with_context(span.clone());
        Either::Right(Box::pin(async move {
            let answer = answer.await;
            if let Ok(answer) = &answer
                && let Some(code) = answer.headers().get("grpc-status")
                && code != "0"
            {
                let message = answer.headers().get("grpc-message").and_then(|m| m.to_str().ok());
                span.span().set_status(Status::error(message.unwrap_or_default().to_owned()));
            }
            answer
        }))
    }
}
