//! Connections: TCP, TLS, HTTP/1.1 (with upgrades) or HTTP/2, each bounded.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use nix::sys::socket::{setsockopt, sockopt};
use rustls::pki_types::CertificateDer;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tower::ServiceExt;

use super::door::{Door, Hurry, Visitor, sent_away};

/// Longest head of a request: a command line of `kubectl exec` travels in it.
const MAX_HEAD: usize = 512 << 10;
/// A request's head must be there after this time; so long a connection may idle, too. Longer than
/// Go's clients keep idle connections (90 s).
const HEAD: Duration = Duration::from_secs(120);
/// A silent peer is asked whether it lives (Go: 15 s), and given up after the ninth time.
const KEEPALIVE: u32 = 15;
/// How long to wait when the process has no file descriptors left.
const BREATHE: Duration = Duration::from_millis(50);

/// What handlers know of the connection.
#[derive(Clone)]
pub(super) struct Peer {
    /// The client's certificates, leaf first; only their possession is proven.
    pub(super) certificates: Arc<[CertificateDer<'static>]>,
    /// Where the client is.
    pub(super) address: SocketAddr,
    pub(super) visitor: Arc<Visitor>,
}

/// Serves `routes` until `shutdown`; plain HTTP without `tls`.
pub(super) async fn serve(
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
    routes: Router,
    hurry: Hurry,
    mut shutdown: watch::Receiver<bool>,
) {
    let door = Door::default();
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next(), if !connections.is_empty() => continue,
            () = crate::shutdown::requested(&mut shutdown) => return,
        };
        let (stream, address) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::debug!(%error, "the node API cannot accept a connection");
                tokio::time::sleep(BREATHE).await;
                continue;
            }
        };
        let Some((visitor, told)) = door.enter() else {
            tracing::warn!(%address, "the node API has no room for another connection");
            continue;
        };
        let (tls, routes, visitor) = (tls.clone(), routes.clone(), Arc::new(visitor));
        connections.spawn(async move {
            tokio::select! {
                () = one(stream, address, tls, routes, visitor, hurry) => {}
                () = sent_away(told) => {}
            }
        });
    }
}

async fn one(
    stream: TcpStream,
    address: SocketAddr,
    tls: Option<TlsAcceptor>,
    routes: Router,
    visitor: Arc<Visitor>,
    hurry: Hurry,
) {
    let _ = stream.set_nodelay(true);
    let _ = setsockopt(&stream, sockopt::KeepAlive, &true);
    let _ = setsockopt(&stream, sockopt::TcpKeepIdle, &KEEPALIVE);
    let _ = setsockopt(&stream, sockopt::TcpKeepInterval, &KEEPALIVE);
    let late = overdue(visitor.clone(), hurry);
    let Some(tls) = tls else {
        let peer = Peer { certificates: Arc::new([]), address, visitor };
        let http = http(stream, false, routes, peer);
        tokio::select! { () = http => {}, () = late => {} }
        return;
    };
    let stream = match tokio::time::timeout(hurry.handshake, tls.accept(stream)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => {
            tracing::debug!(%address, %error, "no TLS with a client of the node API");
            return;
        }
        Err(_) => return,
    };
    let session = stream.get_ref().1;
    let http2 = session.alpn_protocol() == Some(b"h2");
    let certificates = session.peer_certificates().unwrap_or_default();
    let certificates = certificates.iter().map(|c| c.clone().into_owned()).collect();
    let peer = Peer { certificates, address, visitor };
    let http = Box::pin(http(stream, http2, routes, peer));
    tokio::select! { () = http => {}, () = late => {} }
}

/// Returns when a first request is overdue.
async fn overdue(visitor: Arc<Visitor>, hurry: Hurry) {
    tokio::time::sleep(hurry.handshake + hurry.first_request).await;
    if !visitor.is_stranger() {
        drop(visitor);
        std::future::pending::<()>().await;
    }
}

async fn http<S>(stream: S, http2: bool, routes: Router, peer: Peer)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let address = peer.address;
    let answer = move |mut request: Request<Body>| {
        request.extensions_mut().insert(peer.clone());
        routes.clone().oneshot(request)
    };
    let served = if http2 {
        super::http2::serve(stream, answer).await
    } else {
        let service = service_fn(move |request: Request<Incoming>| {
            // Boxed, so that an answer that has begun does not keep the room of its beginning.
            Box::pin(answer(request.map(Body::new)))
        });
        http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD)
            .max_buf_size(MAX_HEAD)
            .serve_connection(TokioIo::new(stream), service)
            .with_upgrades()
            .await
            .map_err(std::io::Error::other)
    };
    if let Err(error) = served {
        tracing::debug!(%address, %error, "a connection of the node API ended");
    }
}
