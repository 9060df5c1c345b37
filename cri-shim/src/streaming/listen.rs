//! The HTTP side of the server: connections, TLS, requests and their upgrades.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use hyper::body::Incoming;
use hyper::header::{CONNECTION, CONTENT_TYPE, HeaderValue, UPGRADE};
use hyper::service::service_fn;
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::forward::{self, Channels};
use super::session::{Streams, Wanted};
use super::spdy::headers::Headers;
use super::upgrade::{self, Endpoint, Refusal, Upgrade, negotiate};
use super::websocket::{accept_key, channels};
use super::wire::{Framing, Source, Wire};
use super::{Runtime, StreamConfig, StreamError, Streaming, Urls, Waiting, command, spdy};

/// Connections that may still be without a request. The oldest makes room for one more: who has a
/// request sends it at once, so that a flood of silent connections keeps nobody out.
const MAX_IDLE: usize = 2048;
/// How long a client may take for its TLS handshake and its request's headers.
const HEADERS: Duration = Duration::from_secs(10);
/// The longest request headers, in bytes.
const MAX_HEADERS: usize = 16 << 10;

/// WebSocket's codes for an end in order and for a broken protocol.
const NORMAL: u16 = 1000;
const PROTOCOL_ERROR: u16 = 1002;

/// What all connections share.
struct Server {
    config: StreamConfig,
    runtime: Arc<dyn Runtime>,
    urls: Arc<Urls>,
    stopped: watch::Receiver<bool>,
}

/// Reads a certificate chain and its key.
pub(super) fn tls(chain: &Path, key: &Path) -> Result<TlsAcceptor, StreamError> {
    let failed = |path: &Path| {
        let path = path.to_path_buf();
        move |why: &dyn std::fmt::Display| StreamError::Tls { path, why: why.to_string() }
    };
    let certificates = CertificateDer::pem_file_iter(chain)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|e| failed(chain)(&e))?;
    let private = PrivateKeyDer::from_pem_file(key).map_err(|e| failed(key)(&e))?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map(|builder| builder.with_no_client_auth())
        .and_then(|builder| builder.with_single_cert(certificates, private))
        .map_err(|e| failed(chain)(&e))?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

pub(super) async fn serve(
    streaming: Streaming,
    runtime: Arc<dyn Runtime>,
    stop: impl Future<Output = ()>,
) {
    let Streaming { config, listener, tls, urls } = streaming;
    let (stopping, stopped) = watch::channel(false);
    let server = Arc::new(Server { config, runtime, urls, stopped });
    let mut recent: VecDeque<AbortHandle> = VecDeque::new();
    let accepting = async {
        loop {
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // Out of descriptors, or the client left: neither is cured by haste.
                    tracing::warn!(%error, "accepting a streaming client");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            while recent.front().is_some_and(AbortHandle::is_finished) || recent.len() >= MAX_IDLE {
                if let Some(oldest) = recent.pop_front() {
                    oldest.abort();
                }
            }
            let connection = tokio::spawn(server.clone().connection(stream, tls.clone()));
            recent.push_back(connection.abort_handle());
        }
    };
    tokio::select! {
        () = accepting => {}
        () = stop => {}
    }
    stopping.send_replace(true);
}

impl Server {
    /// Serves one connection up to its upgrade, or its end without one.
    async fn connection(self: Arc<Self>, stream: TcpStream, tls: Option<TlsAcceptor>) {
        let _ = stream.set_nodelay(true);
        let _ = nix::sys::socket::setsockopt(&stream, nix::sys::socket::sockopt::KeepAlive, &true);
        match tls {
            None => self.http(TokioIo::new(stream)).await,
            Some(tls) => {
                let handshake = tokio::time::timeout(HEADERS, tls.accept(stream)).await;
                if let Ok(Ok(stream)) = handshake {
                    self.http(TokioIo::new(stream)).await;
                }
            }
        }
    }

    async fn http<I>(self: Arc<Self>, io: I)
    where
        I: hyper::rt::Read + hyper::rt::Write + Send + Unpin + 'static,
    {
        let mut stopped = self.stopped.clone();
        let service = service_fn(move |request| {
            let answer = self.clone().answer(request);
            async move { Ok::<_, Infallible>(answer) }
        });
        let connection = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEADERS)
            .max_buf_size(MAX_HEADERS)
            .serve_connection(io, service)
            .with_upgrades();
        tokio::select! {
            // What a client did wrong before its upgrade is its own affair.
            _ = connection => {}
            _ = stopped.wait_for(|stopped| *stopped) => {}
        }
    }

    fn answer(self: Arc<Self>, mut request: Request<Incoming>) -> Response<String> {
        if request.method() != Method::GET && request.method() != Method::POST {
            return text(StatusCode::METHOD_NOT_ALLOWED, "use GET or POST".to_owned());
        }
        let path = request.uri().path().to_owned();
        let Some((kind, token)) = path.trim_start_matches('/').split_once('/') else {
            return not_found();
        };
        let endpoint = match kind {
            "exec" | "attach" => Endpoint::Command,
            "portforward" => Endpoint::PortForward,
            _ => return not_found(),
        };
        // Decided before the token is spent, which a client may then use again in another way.
        let upgrade = match negotiate(request.headers(), endpoint) {
            Ok(upgrade) => upgrade,
            Err(refusal) => return refused(refusal),
        };
        let Some(waiting) = self.urls.take(token) else { return not_found() };
        if !matches!(
            (kind, &waiting),
            ("exec", Waiting::Exec(_))
                | ("attach", Waiting::Attach(_))
                | ("portforward", Waiting::PortForward(_))
        ) {
            return not_found();
        }
        let answer = switching(&upgrade);
        let upgraded = hyper::upgrade::on(&mut request);
        tokio::spawn(self.upgraded(upgraded, upgrade, waiting));
        answer
    }

    async fn upgraded(self: Arc<Self>, upgraded: OnUpgrade, upgrade: Upgrade, waiting: Waiting) {
        let Ok(upgraded) = upgraded.await else { return };
        let mut stopped = self.stopped.clone();
        tokio::select! {
            () = self.session(upgraded, upgrade, waiting) => {}
            _ = stopped.wait_for(|stopped| *stopped) => {}
        }
    }

    async fn session(&self, upgraded: Upgraded, upgrade: Upgrade, waiting: Waiting) {
        let Some((reader, writer, read, socket)) = halves(upgraded) else { return };
        let source = Source::new(reader, read, socket, self.config.idle_timeout);
        let (mut source, framing) = match &upgrade {
            Upgrade::Spdy { .. } => (source, Framing::Spdy),
            Upgrade::Tunnel { .. } => (source.tunnelled(), Framing::TunnelledSpdy),
            Upgrade::Channels { protocol, .. } => {
                let base64 = upgrade::channels(*protocol).base64;
                (source, Framing::Channels { base64 })
            }
        };
        let wire = Arc::new(Wire::new(writer, framing));
        let broken = match upgrade {
            Upgrade::Spdy { protocol } | Upgrade::Tunnel { protocol, .. } => {
                self.spdy(&mut source, &wire, protocol, waiting).await
            }
            Upgrade::Channels { protocol, .. } => {
                self.channels(&mut source, &wire, protocol, waiting).await
            }
        };
        if wire.is_gone() {
            return;
        }
        wire.close(if broken { PROTOCOL_ERROR } else { NORMAL }).await;
        if !broken {
            source.linger().await;
        }
    }

    /// Whether the client broke the protocol.
    async fn spdy(
        &self,
        source: &mut Source,
        wire: &Arc<Wire>,
        protocol: &'static str,
        waiting: Waiting,
    ) -> bool {
        let (sender, opened) = mpsc::channel(64);
        let acceptable: fn(&Headers) -> bool = match waiting {
            Waiting::PortForward(_) => forward::acceptable,
            Waiting::Exec(_) | Waiting::Attach(_) => |_| true,
        };
        let reading = spdy::serve(source, wire, sender, acceptable);
        let work = async {
            let limit = self.config.creation_timeout;
            let version = upgrade::version(Some(protocol));
            match &waiting {
                Waiting::PortForward(request) => {
                    forward::streams(&self.runtime, &request.pod_sandbox_id, opened, limit).await;
                }
                Waiting::Exec(_) | Waiting::Attach(_) => {
                    let wanted = wanted(&waiting);
                    let streams = Streams::gather(opened, wanted, version, limit).await;
                    if let Some(streams) = streams {
                        self.command(wire, &waiting, streams).await;
                    }
                }
            }
        };
        both(wire, reading, work).await
    }

    /// Whether the client broke the protocol.
    async fn channels(
        &self,
        source: &mut Source,
        wire: &Arc<Wire>,
        protocol: Option<&'static str>,
        waiting: Waiting,
    ) -> bool {
        let channel_protocol = upgrade::channels(protocol);
        if let Waiting::PortForward(request) = &waiting {
            let ports: Vec<u16> = request
                .port
                .iter()
                .filter_map(|port| u16::try_from(*port).ok())
                .take(120)
                .collect();
            let (connections, senders) = Channels::new(wire, &ports);
            let reading = channels::serve(source, wire, senders, channel_protocol);
            let work = async {
                tokio::select! {
                    () = connections.serve(&self.runtime, &request.pod_sandbox_id) => {}
                    () = wire.gone() => {}
                }
            };
            return both(wire, reading, work).await;
        }
        let wanted = wanted(&waiting);
        let version = upgrade::version(protocol);
        let (streams, senders) = Streams::channels(wire, wanted, version);
        // Clients wait for a first message, which has nothing in it.
        if wire.data(Streams::first_channel(wanted), &[], false).await.is_err() {
            return false;
        }
        let reading = channels::serve(source, wire, senders, channel_protocol);
        both(wire, reading, self.command(wire, &waiting, streams)).await
    }

    async fn command(&self, wire: &Arc<Wire>, waiting: &Waiting, streams: Streams) {
        match waiting {
            Waiting::Exec(request) => command::exec(&self.runtime, wire, request, streams).await,
            Waiting::Attach(request) => {
                command::attach(&self.runtime, wire, request, streams).await;
            }
            Waiting::PortForward(_) => {}
        }
    }
}

/// Reads from the client while `work` is done; the client's end is the work's. Whether the client
/// broke the protocol.
async fn both(
    wire: &Wire,
    reading: impl Future<Output = std::io::Result<()>>,
    work: impl Future<Output = ()>,
) -> bool {
    tokio::pin!(reading, work);
    tokio::select! {
        () = &mut work => return false,
        read = &mut reading => match read {
            Err(error) if error.kind() == std::io::ErrorKind::Other => {
                tracing::debug!(%error, "a streaming client broke its protocol");
                return true;
            }
            Ok(()) | Err(_) => wire.leave(),
        },
    }
    // It sees that the client is gone and clears up.
    work.await;
    false
}

fn wanted(waiting: &Waiting) -> Wanted {
    match waiting {
        Waiting::Exec(r) => {
            Wanted { stdin: r.stdin, stdout: r.stdout, stderr: r.stderr, tty: r.tty }
        }
        Waiting::Attach(r) => {
            Wanted { stdin: r.stdin, stdout: r.stdout, stderr: r.stderr, tty: r.tty }
        }
        Waiting::PortForward(_) => Wanted::default(),
    }
}

type Reader = Box<dyn AsyncRead + Send + Sync + Unpin>;
type Writer = Box<dyn AsyncWrite + Send + Unpin>;

/// The connection under an upgrade, what had been read of it already, and its socket; `None` for a
/// connection that is not one of ours.
fn halves(upgraded: Upgraded) -> Option<(Reader, Writer, BytesMut, Option<OwnedFd>)> {
    let upgraded = match upgraded.downcast::<TokioIo<TcpStream>>() {
        Ok(parts) => {
            let stream = parts.io.into_inner();
            let socket = stream.as_fd().try_clone_to_owned().ok();
            let (reader, writer) = stream.into_split();
            let read = BytesMut::from(&parts.read_buf[..]);
            return Some((Box::new(reader), Box::new(writer), read, socket));
        }
        Err(upgraded) => upgraded,
    };
    let parts = upgraded.downcast::<TokioIo<TlsStream<TcpStream>>>().ok()?;
    let stream = parts.io.into_inner();
    let socket = stream.get_ref().0.as_fd().try_clone_to_owned().ok();
    let (reader, writer) = tokio::io::split(stream);
    let read = BytesMut::from(&parts.read_buf[..]);
    Some((Box::new(reader), Box::new(writer), read, socket))
}

fn switching(upgrade: &Upgrade) -> Response<String> {
    let mut response = Response::new(String::new());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    let (name, key, protocol) = match upgrade {
        Upgrade::Spdy { protocol } => {
            headers.insert("x-stream-protocol-version", HeaderValue::from_static(protocol));
            ("SPDY/3.1", None, None)
        }
        Upgrade::Tunnel { protocol, key } => ("websocket", Some(key), Some(*protocol)),
        Upgrade::Channels { protocol, key } => ("websocket", Some(key), *protocol),
    };
    headers.insert(UPGRADE, HeaderValue::from_static(name));
    if let Some(protocol) = protocol {
        headers.insert("sec-websocket-protocol", HeaderValue::from_static(protocol));
    }
    // Base64 is a header's value always.
    if let Some(Ok(answer)) = key.map(|key| HeaderValue::from_str(&accept_key(key))) {
        headers.insert("sec-websocket-accept", answer);
    }
    response
}

fn refused(refusal: Refusal) -> Response<String> {
    let status = StatusCode::from_u16(refusal.status).unwrap_or(StatusCode::BAD_REQUEST);
    let mut response = text(status, refusal.message);
    for (name, value) in refusal.headers {
        response.headers_mut().append(name, HeaderValue::from_static(value));
    }
    response
}

fn not_found() -> Response<String> {
    text(StatusCode::NOT_FOUND, "no such stream, or its token was used or is too old".to_owned())
}

fn text(status: StatusCode, message: String) -> Response<String> {
    let mut response = Response::new(message + "\n");
    *response.status_mut() = status;
    let kind = HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}
