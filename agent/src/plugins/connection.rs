//! Connections to plugins.

use std::convert::Infallible;
use std::io;
use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tokio::sync::oneshot;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

const CONNECT: Duration = Duration::from_secs(10);

/// A channel to whoever listens at `socket`.
pub(crate) async fn connect(socket: &Path) -> Result<Channel, Status> {
    connect_with(socket, None).await
}

/// The same, and a future that ends with its first connection.
pub(crate) async fn connect_watched(
    socket: &Path,
) -> Result<(Channel, impl Future<Output = ()>), Status> {
    let (held, ended) = oneshot::channel();
    let channel = connect_with(socket, Some(held)).await?;
    Ok((channel, async move { drop(ended.await) }))
}

async fn connect_with(
    socket: &Path,
    held: Option<oneshot::Sender<Infallible>>,
) -> Result<Channel, Status> {
    let path = socket.to_path_buf();
    let held = Arc::new(Mutex::new(held));
    let connector = tower::service_fn(move |_| {
        let (path, held) = (path.clone(), held.clone());
        async move {
            let stream = UnixStream::connect(&path).await?;
            let held = held.lock().unwrap_or_else(PoisonError::into_inner).take();
            Ok::<_, io::Error>(TokioIo::new(Held { stream, _held: held }))
        }
    });
    // The address names nobody: the connector above decides where bytes go.
    let endpoint = Endpoint::from_static("http://localhost").connect_timeout(CONNECT);
    endpoint.connect_with_connector(connector).await.map_err(|error| {
        let cause = crate::api::chain(&error);
        Status::unavailable(format!("connect to {}: {cause}", socket.display()))
    })
}

/// A connection, and what is let go of with it.
struct Held {
    stream: UnixStream,
    _held: Option<oneshot::Sender<Infallible>>,
}

impl AsyncRead for Held {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Held {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
