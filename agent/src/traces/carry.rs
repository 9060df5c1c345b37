//! A span's identity on the wire: `traceparent` among HTTP's headers and gRPC's metadata.

use hyper::HeaderMap;
use hyper::header::{HeaderName, HeaderValue};
use opentelemetry::Context;
use opentelemetry::propagation::{Extractor, Injector, TextMapPropagator};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use tonic::metadata::{MetadataKey, MetadataMap};

struct Into<'a>(&'a mut HeaderMap);

impl Injector for Into<'_> {
    fn set(&mut self, key: &str, value: String) {
        if let (Ok(key), Ok(value)) = (HeaderName::try_from(key), HeaderValue::try_from(value)) {
            self.0.insert(key, value);
        }
    }
}

struct Of<'a>(&'a HeaderMap);

impl Extractor for Of<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.to_str().ok()
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(HeaderName::as_str).collect()
    }
}

struct IntoMetadata<'a>(&'a mut MetadataMap);

impl Injector for IntoMetadata<'_> {
    fn set(&mut self, key: &str, value: String) {
        if let (Ok(key), Ok(value)) = (MetadataKey::from_bytes(key.as_bytes()), value.try_into()) {
            self.0.insert(key, value);
        }
    }
}

/// Where a request says that it comes from.
pub(crate) fn of_headers(headers: &HeaderMap) -> impl Extractor + '_ {
    Of(headers)
}

/// Tells an HTTP server which span the request is of.
pub(crate) fn in_headers(span: &Context, headers: &mut HeaderMap) {
    TraceContextPropagator::new().inject_context(span, &mut Into(headers));
}

/// Tells a gRPC server which span a call is of: the one that the task is in, if any.
pub(crate) fn in_metadata(
    mut request: tonic::Request<()>,
) -> Result<tonic::Request<()>, tonic::Status> {
    if super::TRACER.get().is_some() {
        let mut metadata = IntoMetadata(request.metadata_mut());
        TraceContextPropagator::new().inject_context(&Context::current(), &mut metadata);
    }
    Ok(request)
}
