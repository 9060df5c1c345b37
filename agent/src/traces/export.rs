//! The way to the collector.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use opentelemetry_otlp::{SpanExporter, WithExportConfig, WithTonicConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::{OTelSdkError, OTelSdkResult};
use opentelemetry_sdk::trace::{SpanData, SpanExporter as Export};
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

use super::TraceError;
use crate::config::tracing::Tracing;

/// How long the collector may take for a batch.
const PATIENCE: Duration = Duration::from_secs(10);

/// Sends batches on the runtime's threads, and says once that the collector is away and once that it
/// is back.
#[derive(Clone, Debug)]
pub(super) struct Exporter {
    inner: Arc<SpanExporter>,
    runtime: tokio::runtime::Handle,
    away: Arc<AtomicBool>,
    endpoint: Arc<str>,
}

impl Exporter {
    pub(super) fn new(config: &Tracing) -> Result<Self, TraceError> {
        let wrong =
            |cause: String| TraceError::Endpoint { endpoint: config.endpoint.clone(), cause };
        let channel = channel(&config.endpoint).map_err(wrong)?;
        let inner = SpanExporter::builder()
            .with_tonic()
            .with_channel(channel)
            .with_timeout(PATIENCE)
            .build()
            .map_err(|error| wrong(error.to_string()))?;
        Ok(Self {
            inner: Arc::new(inner),
            runtime: tokio::runtime::Handle::current(),
            away: Arc::default(),
            endpoint: config.endpoint.as_str().into(),
        })
    }
}

/// Connects when the first batch goes out, and again whenever that is needed.
fn channel(endpoint: &str) -> Result<Channel, String> {
    if let Some(path) = endpoint.strip_prefix("unix:") {
        // Both `unix:/path` and `unix:///path`.
        let path = format!("/{}", path.trim_start_matches('/'));
        let connector = tower::service_fn(move |_| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        });
        let endpoint = Endpoint::from_static("http://localhost").connect_timeout(PATIENCE);
        return Ok(endpoint.connect_with_connector_lazy(connector));
    }
    let address = endpoint.strip_prefix("dns:").unwrap_or(endpoint).trim_start_matches('/');
    Endpoint::from_shared(format!("http://{address}"))
        .map(|endpoint| endpoint.connect_timeout(PATIENCE).connect_lazy())
        .map_err(|error| error.to_string())
}

impl Export for Exporter {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let inner = self.inner.clone();
        // The thread that calls has no runtime, and the exporter's waiting needs one.
        let sent = self
            .runtime
            .spawn(async move { tokio::time::timeout(PATIENCE, inner.export(batch)).await });
        let sent = match sent.await {
            Ok(Ok(sent)) => sent,
            Ok(Err(_)) => Err(OTelSdkError::Timeout(PATIENCE)),
            Err(error) => Err(OTelSdkError::InternalFailure(error.to_string())),
        };
        match &sent {
            Ok(()) if self.away.swap(false, Ordering::Relaxed) => {
                tracing::info!(endpoint = %self.endpoint, "the collector of traces is back");
            }
            Err(error) if !self.away.swap(true, Ordering::Relaxed) => tracing::warn!(
                endpoint = %self.endpoint,
                %error,
                "the collector of traces takes none; they are dropped until it does \
                 (KubeletConfiguration.tracing.endpoint)"
            ),
            _ => {}
        }
        sent
    }

    fn set_resource(&mut self, resource: &Resource) {
        if let Some(inner) = Arc::get_mut(&mut self.inner) {
            inner.set_resource(resource);
        }
    }
}
