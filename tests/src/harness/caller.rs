//! A client of the raw wire: JSON out, code and JSON back. Tests look at objects as the API shows
//! them, without a typed client in between that would hide what is odd.

use std::time::Duration;

use anyhow::{Result, bail};
use futures::stream::BoxStream;
use futures::{StreamExt as _, TryStreamExt as _};
use http_body_util::BodyExt as _;
use kube::client::Body;
use serde_json::Value;

/// Content type of objects.
pub const JSON: &str = "application/json";
/// RFC 7396.
pub const MERGE: &str = "application/merge-patch+json";
/// Kubernetes' own.
pub const STRATEGIC: &str = "application/strategic-merge-patch+json";
/// RFC 6902.
pub const JSON_PATCH: &str = "application/json-patch+json";

/// A client of the raw wire.
#[derive(Clone)]
pub struct Caller(pub kube::Client);

impl Caller {
    /// One request.
    ///
    /// # Panics
    /// When the server cannot be reached.
    pub async fn send(&self, method: &str, path: &str, kind: &str, body: &Value) -> (u16, Value) {
        let bytes = if body.is_null() { Vec::new() } else { body.to_string().into_bytes() };
        let request = || {
            hyper::Request::builder()
                .method(method)
                .uri(path)
                .header("content-type", kind)
                .header("accept", JSON)
                .body(Body::from(bytes.clone()))
                .unwrap()
        };
        let response = match self.0.send(request()).await {
            // An idle connection may be closed while it is taken for another request.
            Err(_) if method == "GET" => self.0.send(request()).await.unwrap(),
            response => response.unwrap(),
        };
        let code = response.status().as_u16();
        let bytes = response.into_body().collect().await.unwrap().to_bytes();
        (code, serde_json::from_slice(&bytes).unwrap_or(Value::Null))
    }

    /// GET.
    pub async fn get(&self, path: &str) -> (u16, Value) {
        self.send("GET", path, JSON, &Value::Null).await
    }

    /// POST.
    pub async fn post(&self, path: &str, body: Value) -> (u16, Value) {
        self.send("POST", path, JSON, &body).await
    }

    /// PUT.
    pub async fn put(&self, path: &str, body: Value) -> (u16, Value) {
        self.send("PUT", path, JSON, &body).await
    }

    /// PATCH of a content type.
    pub async fn patch(&self, path: &str, kind: &str, body: Value) -> (u16, Value) {
        self.send("PATCH", path, kind, &body).await
    }

    /// DELETE with options (null for none).
    pub async fn delete(&self, path: &str, options: Value) -> (u16, Value) {
        self.send("DELETE", path, JSON, &options).await
    }

    /// The events of a watch, as they come.
    ///
    /// # Panics
    /// When the watch is refused.
    pub async fn stream(&self, path: &str) -> BoxStream<'static, Value> {
        let request = hyper::Request::get(path).body(Body::empty()).unwrap();
        let response = self.0.send(request).await.unwrap();
        assert_eq!(response.status().as_u16(), 200, "{path}");
        let body = response.into_body().into_data_stream().boxed();
        futures::stream::unfold((body, Vec::new()), |(mut body, mut buffer)| async move {
            loop {
                if let Some(end) = buffer.iter().position(|b| *b == b'\n') {
                    let line: Vec<u8> = buffer.drain(..=end).collect();
                    let event = serde_json::from_slice(&line).unwrap();
                    return Some((event, (body, buffer)));
                }
                buffer.extend_from_slice(&body.try_next().await.ok()??);
            }
        })
        .boxed()
    }

    /// The events of a watch until `enough` says so, or 10 seconds.
    pub async fn watch(&self, path: &str, enough: impl Fn(&[Value]) -> bool) -> Vec<Value> {
        let (mut stream, mut events) = (self.stream(path).await, Vec::new());
        let _ = tokio::time::timeout(Duration::from_secs(10), async {
            while let Some(event) = stream.next().await {
                events.push(event);
                if enough(&events) {
                    return;
                }
            }
        })
        .await;
        events
    }

    /// The object at `path`.
    ///
    /// # Errors
    /// With the server's answer, when it is not 2xx.
    pub async fn read(&self, path: &str) -> Result<Value> {
        good("GET", path, self.get(path).await)
    }

    /// Creates `object` in the collection at `path`.
    ///
    /// # Errors
    /// As [`Caller::read`].
    pub async fn create(&self, path: &str, object: Value) -> Result<Value> {
        good("POST", path, self.post(path, object).await)
    }

    /// Deletes the object at `path`.
    ///
    /// # Errors
    /// As [`Caller::read`].
    pub async fn remove(&self, path: &str) -> Result<Value> {
        good("DELETE", path, self.delete(path, Value::Null).await)
    }
}

fn good(method: &str, path: &str, (code, body): (u16, Value)) -> Result<Value> {
    if code / 100 != 2 {
        bail!("{method} {path}: {code} {}", body["message"]);
    }
    Ok(body)
}
