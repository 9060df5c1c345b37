//! `/exec`, `/attach`, `/portForward` and `/run`.
//!
//! The runtime says where its streaming server takes the session; the client's upgraded connection is
//! joined to one there, and the bytes of SPDY or WebSocket pass as they are. When either side goes,
//! the other is closed: nothing of a session outlives its client.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Path, Request, State};
use axum::http::{HeaderMap, HeaderName, StatusCode, Uri, Version, header};
use axum::response::{IntoResponse, Response};
use cri_shim::api;
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;

use super::logs::options::query;
use super::{Failure, Shared};
use crate::pod::spec::find_container;
use crate::pod::table::PodView;
use crate::runtime::{RuntimeError, RuntimeErrorKind};

/// Longest wait for the runtime's streaming server to take the session.
const CONNECT: Duration = Duration::from_secs(30);
/// Bytes under way in each direction.
const BUFFER: usize = 32 << 10;
/// A side that does not take its end is dropped after this time.
const FAREWELL: Duration = Duration::from_secs(10);
/// Longest `/run`.
const RUN: Duration = Duration::from_secs(600);
/// Most of the runtime's words that are passed on where it refuses.
const MAX_REFUSAL: usize = 64 << 10;

type Names = Path<(String, String, String)>;
type NamesAndUid = Path<(String, String, String, String)>;
type Answer = Result<Response, Failure>;

pub(super) async fn exec(s: State<Arc<Shared>>, Path((ns, pod, c)): Names, r: Request) -> Answer {
    exec_in(&s, (&ns, &pod, ""), &c, r).await
}

pub(super) async fn exec_uid(
    s: State<Arc<Shared>>,
    Path((ns, pod, uid, c)): NamesAndUid,
    r: Request,
) -> Answer {
    exec_in(&s, (&ns, &pod, &uid), &c, r).await
}

pub(super) async fn attach(s: State<Arc<Shared>>, Path((ns, pod, c)): Names, r: Request) -> Answer {
    attach_to(&s, (&ns, &pod, ""), &c, r).await
}

pub(super) async fn attach_uid(
    s: State<Arc<Shared>>,
    Path((ns, pod, uid, c)): NamesAndUid,
    r: Request,
) -> Answer {
    attach_to(&s, (&ns, &pod, &uid), &c, r).await
}

pub(super) async fn run(s: State<Arc<Shared>>, Path((ns, pod, c)): Names, r: Request) -> Answer {
    run_in(&s, (&ns, &pod, ""), &c, r.uri()).await
}

pub(super) async fn run_uid(
    s: State<Arc<Shared>>,
    Path((ns, pod, uid, c)): NamesAndUid,
    r: Request,
) -> Answer {
    run_in(&s, (&ns, &pod, &uid), &c, r.uri()).await
}

pub(super) async fn port_forward(
    s: State<Arc<Shared>>,
    Path((ns, pod)): Path<(String, String)>,
    r: Request,
) -> Answer {
    port_forward_to(&s, (&ns, &pod, ""), r).await
}

pub(super) async fn port_forward_uid(
    s: State<Arc<Shared>>,
    Path((ns, pod, uid)): Names,
    r: Request,
) -> Answer {
    port_forward_to(&s, (&ns, &pod, &uid), r).await
}

/// Which streams of the process the client wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Streams {
    stdin: bool,
    stdout: bool,
    stderr: bool,
    tty: bool,
}

impl Streams {
    fn of(query: &[(String, String)]) -> Result<Self, Failure> {
        let on = |name: &str| {
            query.iter().find(|(found, _)| found == name).is_some_and(|(_, value)| value == "1")
        };
        let tty = on("tty");
        // A terminal has one output.
        let streams =
            Self { stdin: on("input"), stdout: on("output"), stderr: on("error") && !tty, tty };
        if !streams.stdin && !streams.stdout && !streams.stderr {
            return Err(Failure::bad_request(
                "you must specify at least 1 of stdin, stdout, stderr",
            ));
        }
        Ok(streams)
    }
}

fn pod(shared: &Shared, (namespace, name, uid): (&str, &str, &str)) -> Result<PodView, Failure> {
    let view = shared.sync.table().named(namespace, name);
    let view = view.ok_or_else(|| Failure::not_found("pod does not exist"))?;
    if !uid.is_empty() && view.pod.metadata.uid.as_deref() != Some(uid) {
        return Err(Failure::not_found("pod not found"));
    }
    Ok(view)
}

/// The id of container `name`, if it runs.
fn running(shared: &Shared, view: &PodView, name: &str) -> Option<String> {
    let id = view.containers.get(name)?;
    let uid = crate::ids::PodUid::of(&view.pod);
    shared.sync.table().runs(&uid, name, id).then(|| id.clone())
}

/// What the runtime's refusal is to an HTTP client.
fn refused(error: &RuntimeError) -> Failure {
    let status = match error.kind {
        RuntimeErrorKind::NotFound => StatusCode::NOT_FOUND,
        RuntimeErrorKind::Unimplemented => StatusCode::NOT_IMPLEMENTED,
        RuntimeErrorKind::Unavailable | RuntimeErrorKind::Timeout => {
            StatusCode::SERVICE_UNAVAILABLE
        }
        RuntimeErrorKind::Failed => StatusCode::INTERNAL_SERVER_ERROR,
    };
    Failure(status, error.to_string())
}

async fn exec_in(
    shared: &Shared,
    key: (&str, &str, &str),
    container: &str,
    request: Request,
) -> Answer {
    let query = query(request.uri().query().unwrap_or_default());
    let streams = Streams::of(&query)?;
    let view = pod(shared, key)?;
    let id = running(shared, &view, container)
        .ok_or_else(|| Failure::internal(format!("container not found ({container:?})")))?;
    let cmd = query.into_iter().filter(|(name, _)| name == "command").map(|(_, v)| v).collect();
    let asked = api::ExecRequest {
        container_id: id,
        cmd,
        tty: streams.tty,
        stdin: streams.stdin,
        stdout: streams.stdout,
        stderr: streams.stderr,
    };
    let url = shared.runtime.exec(asked).await.map_err(|error| refused(&error))?;
    join(&url, request).await
}

async fn attach_to(
    shared: &Shared,
    key: (&str, &str, &str),
    container: &str,
    request: Request,
) -> Answer {
    let mut streams = Streams::of(&query(request.uri().query().unwrap_or_default()))?;
    let view = pod(shared, key)?;
    let missing = || {
        let (namespace, pod, _) = key;
        Failure::internal(format!("container {container} not found in pod {pod}_{namespace}"))
    };
    let id = running(shared, &view, container).ok_or_else(missing)?;
    // Whether there is a terminal was decided when the container was made.
    let spec = view.pod.spec.as_ref().and_then(|spec| find_container(spec, container));
    streams.tty = spec.ok_or_else(missing)?.0.tty.unwrap_or(false);
    let asked = api::AttachRequest {
        container_id: id,
        stdin: streams.stdin,
        tty: streams.tty,
        stdout: streams.stdout,
        stderr: streams.stderr && !streams.tty,
    };
    let url = shared.runtime.attach(asked).await.map_err(|error| refused(&error))?;
    join(&url, request).await
}

async fn port_forward_to(shared: &Shared, key: (&str, &str, &str), request: Request) -> Answer {
    let websocket = request
        .headers()
        .get(header::UPGRADE)
        .is_some_and(|upgrade| upgrade.as_bytes().eq_ignore_ascii_case(b"websocket"));
    let tunnel = protocols(request.headers()).any(|name| name.starts_with("SPDY/3.1+"));
    let mut ports = Vec::new();
    if websocket && !tunnel {
        for (name, value) in query(request.uri().query().unwrap_or_default()) {
            for port in value.split(',').filter(|_| name == "port") {
                let number = port.parse::<u16>().ok().filter(|port| *port > 0);
                let number = number.ok_or_else(|| {
                    Failure::bad_request(format!("unable to parse {port:?} as a port"))
                })?;
                ports.push(i32::from(number));
            }
        }
        if ports.is_empty() {
            return Err(Failure::bad_request("query parameter \"port\" is required"));
        }
    }
    let view = pod(shared, key)?;
    let (namespace, name, _) = key;
    let sandbox = view.sandbox.ok_or_else(|| {
        Failure::internal(format!("pod not found ({:?})", format!("{name}_{namespace}")))
    })?;
    let asked = api::PortForwardRequest { pod_sandbox_id: sandbox, port: ports };
    let url = shared.runtime.port_forward(asked).await.map_err(|error| refused(&error))?;
    join(&url, request).await
}

async fn run_in(shared: &Shared, key: (&str, &str, &str), container: &str, uri: &Uri) -> Answer {
    let view = pod(shared, key)?;
    let id = running(shared, &view, container)
        .ok_or_else(|| Failure::internal(format!("container not found ({container:?})")))?;
    let query = query(uri.query().unwrap_or_default());
    let line = query.into_iter().find(|(name, _)| name == "cmd").map(|(_, line)| line);
    let line = line.unwrap_or_default();
    let command: Vec<String> = line.split(' ').map(str::to_owned).collect();
    let out =
        shared.runtime.exec_sync(&id, &command, RUN).await.map_err(|error| refused(&error))?;
    let mut said = out.stdout;
    said.extend(out.stderr);
    if out.exit_code != 0 {
        let said = String::from_utf8_lossy(&said).into_owned();
        return Err(Failure::internal(format!(
            "command '{line}' exited with {}: {said}",
            out.exit_code
        )));
    }
    Ok(([(header::CONTENT_TYPE, "application/json")], said).into_response())
}

fn protocols(headers: &HeaderMap) -> impl Iterator<Item = &str> {
    headers
        .get_all(header::SEC_WEBSOCKET_PROTOCOL)
        .into_iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
}

/// Joins the client of `request` with the streaming server at `url`.
async fn join(url: &str, mut request: Request) -> Answer {
    let upgrade = request.headers().get(header::UPGRADE).cloned();
    if upgrade.is_none() || request.version() != Version::HTTP_11 {
        return Err(Failure::bad_request("Upgrade request required"));
    }
    let unusable = |cause: String| {
        // The URL names the session, which is a secret.
        Failure::internal(format!("the runtime's streaming server: {cause}"))
    };
    let uri: Uri = url.parse().map_err(|_| unusable("its address cannot be read".into()))?;
    let host = uri.host().unwrap_or_default().trim_matches(['[', ']']).to_owned();
    let port = uri.port_u16().unwrap_or(80);
    if uri.scheme_str() != Some("http") {
        return Err(unusable(format!("{:?} is not spoken", uri.scheme_str().unwrap_or_default())));
    }
    let asked = passed_on(&uri, &request).map_err(unusable)?;
    let joined = async {
        let stream = TcpStream::connect((host.as_str(), port)).await.map_err(|e| e.to_string())?;
        let _ = stream.set_nodelay(true);
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake::<_, Body>(TokioIo::new(stream))
                .await
                .map_err(|error| error.to_string())?;
        // Ends with the session, or when `sender` and the response are dropped.
        tokio::spawn(connection.with_upgrades());
        let response = sender.send_request(asked).await;
        response.map_err(|error| error.to_string())
    };
    let response = match tokio::time::timeout(CONNECT, joined).await {
        Ok(joined) => joined.map_err(unusable)?,
        Err(_) => return Err(unusable(format!("no answer within {} s", CONNECT.as_secs()))),
    };
    let (head, body) = response.into_parts();
    if head.status != StatusCode::SWITCHING_PROTOCOLS {
        let body = http_body_util::Limited::new(body, MAX_REFUSAL);
        let said = http_body_util::BodyExt::collect(body).await;
        let said = said.map(|said| said.to_bytes()).unwrap_or_default();
        return Ok((head.status, said).into_response());
    }
    let theirs = hyper::upgrade::on(axum::http::Response::from_parts(head.clone(), body));
    let ours = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        let upgraded = tokio::time::timeout(CONNECT, async { tokio::try_join!(ours, theirs) });
        match upgraded.await {
            Ok(Ok((ours, theirs))) => pass_bytes(ours, theirs).await,
            Ok(Err(error)) => tracing::debug!(%error, "a session could not begin"),
            Err(_) => tracing::debug!("a session did not begin in time"),
        }
    });
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    *response.headers_mut() = head.headers;
    Ok(response)
}

/// The request as the streaming server gets it: its own address, the client's protocol headers, and
/// no credentials.
fn passed_on(uri: &Uri, request: &Request) -> Result<axum::http::Request<Body>, String> {
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    let mut asked = axum::http::Request::builder()
        .method(request.method().clone())
        .uri(path)
        .body(Body::empty())
        .map_err(|error| error.to_string())?;
    let headers = asked.headers_mut();
    let wanted = |name: &HeaderName| {
        let name = name.as_str();
        matches!(name, "connection" | "upgrade" | "x-stream-protocol-version" | "origin")
            || name.starts_with("sec-websocket-")
    };
    for (name, value) in request.headers() {
        if wanted(name) {
            headers.append(name.clone(), value.clone());
        }
    }
    let host = uri.authority().map_or("localhost", |authority| authority.as_str());
    headers.insert(header::HOST, host.parse().map_err(|_| "its address is odd".to_owned())?);
    Ok(asked)
}

/// Passes bytes both ways until either side has no more.
async fn pass_bytes(ours: Upgraded, theirs: Upgraded) {
    let (mut client_in, mut client_out) = tokio::io::split(TokioIo::new(ours));
    let (mut runtime_in, mut runtime_out) = tokio::io::split(TokioIo::new(theirs));
    tokio::select! {
        _ = pass(&mut client_in, &mut runtime_out) => {}
        _ = pass(&mut runtime_in, &mut client_out) => {}
    }
    let farewell = async {
        let _ = tokio::join!(client_out.shutdown(), runtime_out.shutdown());
    };
    let _ = tokio::time::timeout(FAREWELL, farewell).await;
}

/// One direction. The buffer is there while there is something to pass.
async fn pass<R, W>(from: &mut R, to: &mut W) -> std::io::Result<()>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let mut buffer = vec![0; BUFFER];
    loop {
        let read = from.read(&mut buffer).await?;
        if read == 0 {
            return Ok(());
        }
        to.write_all(&buffer[..read]).await?;
        to.flush().await?;
    }
}
