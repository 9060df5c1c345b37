//! The node API as clients meet it: every endpoint for every kind of client, over real TLS.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use http_body_util::{BodyExt, Empty};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::*;
use crate::api::ApiError;
use crate::config::node_api::{Authentication, Authorization, ServerTls, TlsVersion};
use crate::pod::clock::SystemClock;
use crate::runtime::fake::FakeRuntime;

const NODE: &str = "n1";
/// Whom the API server shows itself as.
const API_SERVER: &str = "kube-apiserver-kubelet-client";

/// All endpoints, with the subresources that open them.
const ENDPOINTS: &[(&str, &str, &[&str])] = &[
    ("GET", "/healthz", &["healthz", "proxy"]),
    ("GET", "/healthz/ping", &["healthz", "proxy"]),
    ("GET", "/pods", &["pods", "proxy"]),
    ("GET", "/pods/", &["pods", "proxy"]),
    ("GET", "/runningpods", &["pods", "proxy"]),
    ("GET", "/runningpods/", &["pods", "proxy"]),
    ("GET", "/configz", &["configz", "proxy"]),
    ("GET", "/stats/summary", &["stats"]),
    ("GET", "/metrics", &["metrics"]),
    ("GET", "/metrics/cadvisor", &["metrics"]),
    ("GET", "/metrics/resource", &["metrics"]),
    ("GET", "/metrics/probes", &["metrics"]),
    ("GET", "/metrics/slis", &["metrics"]),
    ("GET", "/logs", &["log"]),
    ("GET", "/logs/", &["log"]),
    ("GET", "/logs/syslog", &["log"]),
    ("GET", "/statusz", &["statusz"]),
    ("GET", "/flagz", &["configz"]),
    ("GET", "/debug/pprof", &["proxy"]),
    ("GET", "/debug/pprof/", &["proxy"]),
    ("GET", "/debug/pprof/profile?seconds=1", &["proxy"]),
    ("GET", "/debug/pprof/cmdline", &["proxy"]),
    ("GET", "/debug/pprof/symbol", &["proxy"]),
    ("POST", "/debug/pprof/symbol", &["proxy"]),
    ("GET", "/debug/pprof/goroutine?debug=1", &["proxy"]),
    ("GET", "/debug/pprof/heap", &["proxy"]),
    ("GET", "/debug/pprof/trace", &["proxy"]),
    ("PUT", "/debug/flags/v", &["proxy"]),
    ("GET", "/containerLogs/ns/p/c", &["proxy"]),
    ("POST", "/exec/ns/p/c?command=x&output=1", &["proxy"]),
    ("GET", "/exec/ns/p/c?command=x&output=1", &["proxy"]),
    ("POST", "/exec/ns/p/u/c?command=x&output=1", &["proxy"]),
    ("POST", "/attach/ns/p/c?output=1", &["proxy"]),
    ("POST", "/attach/ns/p/u/c?output=1", &["proxy"]),
    ("POST", "/portForward/ns/p", &["proxy"]),
    ("POST", "/portForward/ns/p/u", &["proxy"]),
    ("POST", "/run/ns/p/c?cmd=x", &["proxy"]),
    ("POST", "/run/ns/p/u/c?cmd=x", &["proxy"]),
    ("POST", "/checkpoint/ns/p/c", &["checkpoint"]),
    ("GET", "/no/such/path", &["proxy"]),
    ("GET", "/%70ods", &["pods", "proxy"]),
];

/// Lets the API server do all, and user `reader` what a monitoring stack is granted.
#[derive(Default)]
struct Rules {
    tokens_asked: AtomicUsize,
    accesses_asked: AtomicUsize,
}

#[async_trait]
impl Reviews for Arc<Rules> {
    async fn token(&self, token: &str) -> Result<Option<Identity>, ApiError> {
        self.tokens_asked.fetch_add(1, Ordering::Relaxed);
        let user = match token {
            "reader-token" => "reader",
            "bob-token" => "bob",
            _ => return Ok(None),
        };
        Ok(Some(Identity { user: user.into(), ..Identity::default() }))
    }

    async fn access(&self, node: &str, who: &Identity, access: &Access) -> Result<bool, ApiError> {
        self.accesses_asked.fetch_add(1, Ordering::Relaxed);
        assert_eq!(node, NODE);
        assert!(
            who.groups.iter().any(|group| group.starts_with("system:")),
            "everybody has a group: {who:?}"
        );
        Ok(who.user == API_SERVER
            || who.user == "reader"
                && ["metrics", "stats", "healthz", "pods"].contains(&access.subresource)
                && access.verb == "get")
    }
}

struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

pub(super) type Pair = (CertificateDer<'static>, PrivateKeyDer<'static>);

impl Authority {
    fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let pem = params.self_signed(&key).unwrap().pem();
        Self { issuer: Issuer::new(params, key), pem }
    }

    fn issue(&self, user: &str, group: &str, expired: bool) -> Pair {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, user);
        params.distinguished_name.push(DnType::OrganizationName, group);
        params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
        if expired {
            params.not_before = rcgen::date_time_ymd(2020, 1, 1);
            params.not_after = rcgen::date_time_ymd(2020, 2, 1);
        }
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        (certificate.der().clone(), PrivateKeyDer::try_from(key.serialize_der()).unwrap())
    }
}

pub(super) struct Rig {
    address: SocketAddr,
    authority: Authority,
    rules: Arc<Rules>,
    _stop: watch::Sender<bool>,
    _dir: tempfile::TempDir,
    tls: Certificate,
}

/// Somebody who may do everything.
pub(super) fn admin(rig: &Rig) -> Pair {
    rig.authority.issue(API_SERVER, "g", false)
}

pub(super) async fn rig(change: impl FnOnce(&mut NodeApiConfig)) -> Rig {
    hurried(change, Hurry::default()).await
}

async fn hurried(change: impl FnOnce(&mut NodeApiConfig), hurry: Hurry) -> Rig {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    let ca = dir.path().join("ca.crt");
    std::fs::write(&ca, &authority.pem).unwrap();
    let mut config = NodeApiConfig {
        enabled: true,
        address: ([127, 0, 0, 1], 0).into(),
        read_only: None,
        tls: ServerTls {
            files: None,
            bootstrap: false,
            min_version: TlsVersion::V12,
            cipher_suites: Vec::new(),
            curves: Vec::new(),
        },
        authentication: Authentication {
            client_ca: Some(ca),
            webhook: true,
            cache_ttl: Duration::from_secs(60),
            anonymous: false,
        },
        authorization: Authorization::Webhook {
            allowed_ttl: Duration::from_secs(60),
            denied_ttl: Duration::from_secs(60),
        },
        debugging_handlers: true,
        system_log_handler: true,
        system_log_query: false,
        profiling_handler: true,
        debug_flags_handler: true,
        configz: serde_json::Value::Null,
    };
    change(&mut config);
    let mut node = NodeContext::new(NODE, vec![[127, 0, 0, 1].into()]);
    node.root_dir = dir.path().into();
    let node = Arc::new(node);
    let sync = SyncHandle::idle();
    let rules = Arc::new(Rules::default());
    let watched = Watched::of_nothing(NODE, true);
    let api = NodeApi {
        node,
        names: vec![NODE.into()],
        config,
        cert_dir: dir.path().join("pki"),
        sync,
        runtime: Arc::new(FakeRuntime::new(Arc::new(SystemClock), false)),
        volumes: None,
        watched: Arc::new(watched),
    };
    let reviews: Box<dyn Reviews> = Box::new(rules.clone());
    let mut listening = api.listen(Some(reviews)).await.unwrap();
    listening.hurry = hurry;
    let address = listening.listener.local_addr().unwrap();
    let (stop, stopped) = watch::channel(false);
    tokio::spawn(listening.serve(stopped));
    let pki = dir.path().join("pki");
    let tls = Certificate::of(&pki.join("kubelet.crt"), &pki.join("kubelet.key"));
    Rig { address, authority, rules, _stop: stop, _dir: dir, tls }
}

impl Rig {
    async fn connect(&self, pair: Option<Pair>) -> Option<TlsStream<TcpStream>> {
        let mut roots = rustls::RootCertStore::empty();
        assert!(self.tls.is_there());
        let pem = std::fs::read(self._dir.path().join("pki/kubelet.crt")).unwrap();
        use rustls::pki_types::pem::PemObject;
        roots.add(CertificateDer::from_pem_slice(&pem).unwrap()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots);
        let config = match pair {
            Some((chain, key)) => builder.with_client_auth_cert(vec![chain], key).unwrap(),
            None => builder.with_no_client_auth(),
        };
        let stream = TcpStream::connect(self.address).await.ok()?;
        let connector = TlsConnector::from(Arc::new(config));
        connector.connect(NODE.try_into().unwrap(), stream).await.ok()
    }

    pub(super) async fn ask(
        &self,
        method: &str,
        path: &str,
        pair: Option<Pair>,
        token: Option<&str>,
    ) -> (u16, String) {
        let stream = self.connect(pair).await.unwrap();
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        let mut request = hyper::Request::builder().method(method).uri(path).header("host", "n");
        if let Some(token) = token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        let request = request.body(Empty::<Bytes>::new()).unwrap();
        let response = sender.send_request(request).await.unwrap();
        let status = response.status().as_u16();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8_lossy(&body).into_owned())
    }
}

#[tokio::test]
async fn every_endpoint_lets_in_who_may_and_nobody_else() {
    let rig = rig(|_| {}).await;
    let issue = |user, group| rig.authority.issue(user, group, false);
    let stranger = Authority::new();
    for (method, path, opened_by) in ENDPOINTS {
        let reader = *method == "GET"
            && opened_by.iter().any(|s| ["metrics", "stats", "healthz", "pods"].contains(s));
        let passes = |status: u16| status != 401 && status != 403;
        let cases: [(&str, Option<Pair>, Option<&str>, u16); 9] = [
            ("nobody", None, None, 401),
            ("a bad token", None, Some("nonsense"), 401),
            ("a token of somebody without rights", None, Some("bob-token"), 403),
            ("a monitoring token", None, Some("reader-token"), if reader { 0 } else { 403 }),
            ("a certificate of the wrong group", Some(issue("bob", "dev")), None, 403),
            ("another node", Some(issue("system:node:n2", "system:nodes")), None, 403),
            (
                "an expired certificate",
                Some(rig.authority.issue(API_SERVER, "system:masters", true)),
                None,
                401,
            ),
            (
                "a certificate of another authority",
                Some(stranger.issue(API_SERVER, "system:masters", false)),
                None,
                401,
            ),
            ("the API server", Some(issue(API_SERVER, "kubeadm:cluster-admins")), None, 0),
        ];
        for (who, pair, token, expected) in cases {
            let (status, body) = rig.ask(method, path, pair, token).await;
            match expected {
                0 => assert!(passes(status), "{method} {path} by {who}: {status} {body}"),
                code => assert_eq!(status, code, "{method} {path} by {who}: {body}"),
            }
            assert!(!body.contains("token"), "{body}");
        }
    }
}

/// A route that is added has its line in the table above.
#[test]
fn every_route_is_tried_with_every_identity() {
    let fits = |route: &str, path: &str| {
        let path = path.split('?').next().unwrap_or_default();
        let (mut parts, mut given) = (route.split('/'), path.split('/'));
        loop {
            match (parts.next(), given.next()) {
                (None, None) => return true,
                (Some(part), Some(given)) if part.starts_with("{*") => return !given.is_empty(),
                (Some(part), Some(given)) if part.starts_with('{') && !given.is_empty() => {}
                (Some(part), Some(given)) if part == given => {}
                _ => return false,
            }
        }
    };
    let routes = include_str!("routes.rs").split(".route(\"").skip(1);
    let routes: Vec<_> = routes.filter_map(|rest| rest.split('"').next()).collect();
    assert!(routes.len() > 30, "{routes:?}");
    for route in routes {
        assert!(ENDPOINTS.iter().any(|(_, path, _)| fits(route, path)), "{route} is not tried");
    }
}

#[tokio::test]
async fn answers_of_the_cluster_are_kept() {
    let rig = rig(|_| {}).await;
    for _ in 0..5 {
        let (status, _) = rig.ask("GET", "/healthz/ping", None, Some("reader-token")).await;
        assert_eq!(status, 200);
        let (status, body) = rig.ask("GET", "/configz", None, Some("reader-token")).await;
        assert_eq!(status, 403);
        assert_eq!(
            body,
            "Forbidden (user=reader, verb=get, resource=nodes, subresource(s)=[configz proxy])\n"
        );
    }
    assert_eq!(rig.rules.tokens_asked.load(Ordering::Relaxed), 1);
    assert_eq!(rig.rules.accesses_asked.load(Ordering::Relaxed), 3);
}

#[tokio::test]
async fn anonymous_clients_are_somebody_where_that_is_configured() {
    let rig = rig(|config| {
        config.authentication.anonymous = true;
        config.authorization = Authorization::AlwaysAllow;
    })
    .await;
    assert_eq!(rig.ask("GET", "/healthz/ping", None, None).await.0, 200);
    // Bad credentials are worse than none.
    assert_eq!(rig.ask("GET", "/healthz/ping", None, Some("nonsense")).await.0, 401);
    let expired = rig.authority.issue(API_SERVER, "g", true);
    assert_eq!(rig.ask("GET", "/healthz/ping", Some(expired), None).await.0, 401);
}

#[tokio::test]
async fn switches_close_what_they_name() {
    let rig = rig(|config| {
        config.debugging_handlers = false;
    })
    .await;
    let me = || Some(rig.authority.issue(API_SERVER, "g", false));
    for path in [
        "/exec/ns/p/c",
        "/containerLogs/ns/p/c",
        "/runningpods/",
        "/debug/pprof/",
        "/debug/pprof/profile",
    ] {
        assert_eq!(rig.ask("GET", path, me(), None).await.0, 405, "{path}");
    }
    assert_eq!(rig.ask("PUT", "/debug/flags/v", me(), None).await.0, 404);
    assert_eq!(rig.ask("GET", "/pods", me(), None).await.0, 200);
}

#[tokio::test]
async fn profiles_and_the_log_s_verbosity_are_served_where_they_are_switched_on() {
    let rig = rig(|_| {}).await;
    let me = || Some(rig.authority.issue(API_SERVER, "g", false));
    let (status, index) = rig.ask("GET", "/debug/pprof/", me(), None).await;
    assert_eq!(status, 200);
    // Each profile of the list is there, if only to say that it is not taken.
    let names: Vec<_> =
        index.split("<a href='").skip(1).map(|a| a.split('\'').next().unwrap()).collect();
    assert!(names.contains(&"profile") && names.contains(&"heap"), "{index}");
    for name in names {
        let name = if name == "profile" { "profile?seconds=1" } else { name };
        let (status, body) = rig.ask("GET", &format!("/debug/pprof/{name}"), me(), None).await;
        let expected = match name {
            "allocs" | "block" | "heap" | "mutex" | "trace" => 501,
            _ => 200,
        };
        assert_eq!(status, expected, "{name}: {body}");
        assert!(status == 200 || body.starts_with("unimplemented: "), "{body}");
    }
    assert_eq!(rig.ask("GET", "/debug/pprof/nonsense", me(), None).await.0, 404);
    assert_eq!(rig.ask("GET", "/debug/pprof/profile?seconds=99999", me(), None).await.0, 400);
    let (_, threads) = rig.ask("GET", "/debug/pprof/goroutine?debug=2", me(), None).await;
    assert!(threads.contains("tasks: ") && threads.contains("thread "), "{threads}");
    let (status, body) = rig.ask("GET", "/debug/flags/v", me(), None).await;
    assert_eq!((status, body.as_str()), (406, "unsupported http method\n"));
    let (status, body) = rig.ask("PUT", "/debug/flags/v", me(), None).await;
    assert_eq!(status, 400, "an empty verbosity: {body}");
    let off = self::rig(|config| {
        config.profiling_handler = false;
        config.debug_flags_handler = false;
    })
    .await;
    for (method, path, says) in [
        ("GET", "/debug/pprof/", "profiling endpoint is disabled.\n"),
        ("GET", "/debug/pprof/profile", "profiling endpoint is disabled.\n"),
        ("GET", "/debug/pprof/heap", "profiling endpoint is disabled.\n"),
        ("PUT", "/debug/flags/v", "flags endpoint is disabled.\n"),
    ] {
        let me = Some(off.authority.issue(API_SERVER, "g", false));
        assert_eq!(off.ask(method, path, me, None).await, (405, says.to_owned()), "{path}");
    }
}

#[tokio::test]
async fn strangers_in_numbers_do_not_keep_anybody_out() {
    let rig = rig(|_| {}).await;
    let mut idle = Vec::new();
    let limit = nix::sys::resource::Resource::RLIMIT_NOFILE;
    let (_, most) = nix::sys::resource::getrlimit(limit).unwrap();
    nix::sys::resource::setrlimit(limit, most, most).unwrap();
    for count in 1..=10_000 {
        idle.push(TcpStream::connect(rig.address).await.unwrap());
        if count % 1000 == 0 {
            let me = rig.authority.issue(API_SERVER, "g", false);
            let (status, _) = rig.ask("GET", "/healthz/ping", Some(me), None).await;
            assert_eq!(status, 200, "among {count}");
        }
    }
    // All but the few that are let wait are closed, the oldest first.
    for stream in &mut idle[..9_400] {
        let closed = tokio::time::timeout(Duration::from_secs(60), stream.read(&mut [0; 1])).await;
        assert!(matches!(closed, Ok(Ok(0) | Err(_))), "the oldest of too many are closed");
    }
}

#[tokio::test]
async fn who_takes_too_long_to_say_something_is_sent_away() {
    let short = Duration::from_millis(300);
    let rig = hurried(|_| {}, Hurry { handshake: short, first_request: short }).await;
    let ended = async |mut from: Box<dyn tokio::io::AsyncRead + Unpin>| {
        let mut answer = Vec::new();
        let _ = tokio::time::timeout(Duration::from_secs(60), from.read_to_end(&mut answer))
            .await
            .expect("it is sent away");
        assert_eq!(String::from_utf8_lossy(&answer), "");
    };
    // A byte at a time, of a handshake and of a head, for ever.
    let dribble = async |mut to: Box<dyn tokio::io::AsyncWrite + Unpin>, text: &'static [u8]| {
        for byte in text.iter().cycle() {
            if to.write_all(&[*byte]).await.is_err() || to.flush().await.is_err() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let (from, to) = TcpStream::connect(rig.address).await.unwrap().into_split();
    // The record of a ClientHello that is said to be long.
    tokio::select! {
        () = ended(Box::new(from)) => {}
        () = dribble(Box::new(to), &[0x16, 3, 1, 0x3f, 0xff, 1]) => {}
    }
    let me = rig.authority.issue(API_SERVER, "g", false);
    let (from, to) = tokio::io::split(rig.connect(Some(me)).await.unwrap());
    tokio::select! {
        () = ended(Box::new(from)) => {}
        () = dribble(Box::new(to), b"GET /pods HTTP/1.1\r\nx: y\r\n") => {}
    }
    // Who has been let in once may take its time.
    let me = rig.authority.issue(API_SERVER, "g", false);
    let (mut from, mut to) = tokio::io::split(rig.connect(Some(me)).await.unwrap());
    for _ in 0..2 {
        to.write_all(b"GET /healthz/ping HTTP/1.1\r\nhost: n\r\n\r\n").await.unwrap();
        to.flush().await.unwrap();
        let mut answer = Vec::new();
        while !answer.ends_with(b"ok") {
            answer.push(from.read_u8().await.unwrap());
        }
        tokio::time::sleep(short * 4).await;
    }
}

#[tokio::test]
async fn no_request_hides_in_another() {
    let rig = rig(|_| {}).await;
    let hidden = "GET /healthz/ping HTTP/1.1\r\nhost: n\r\nconnection: close\r\n\r\n";
    let length = hidden.len();
    for (head, answers) in [
        // Two lengths: the chunks count, and nothing after them is read.
        (format!("content-length: {length}\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"), 1),
        (format!("transfer-encoding: chunked\r\ncontent-length: {length}\r\n\r\n0\r\n\r\n"), 1),
        // Lengths that are none.
        ("content-length: 0\r\ncontent-length: 5\r\n\r\n".into(), 1),
        ("content-length: +0\r\n\r\n".into(), 1),
        ("content-length: 0, 0\r\n\r\n".into(), 1),
        ("content-length: -1\r\n\r\n".into(), 1),
        ("content-length: 99999999999999999999\r\n\r\n".into(), 1),
        // Encodings that are not understood.
        ("transfer-encoding: identity\r\n\r\n".into(), 1),
        ("transfer-encoding: chunked, identity\r\n\r\n".into(), 1),
        ("transfer-encoding: xchunked\r\n\r\n".into(), 1),
        // Headers that some read and some do not.
        ("transfer-encoding : chunked\r\n\r\n0\r\n\r\n".into(), 1),
        ("x: y\r\n content-length: 3\r\n\r\n".into(), 1),
        // In order: one after the other, each judged for itself.
        ("\r\n".into(), 2),
    ] {
        let me = rig.authority.issue(API_SERVER, "g", false);
        let (mut from, mut to) = tokio::io::split(rig.connect(Some(me)).await.unwrap());
        let text = format!("POST /no/such/path HTTP/1.1\r\nhost: n\r\n{head}{hidden}");
        to.write_all(text.as_bytes()).await.unwrap();
        to.flush().await.unwrap();
        let mut answer = Vec::new();
        let _ = tokio::time::timeout(Duration::from_secs(60), from.read_to_end(&mut answer))
            .await
            .expect("it ends");
        let answer = String::from_utf8_lossy(&answer);
        assert_eq!(answer.matches("HTTP/1.1 ").count(), answers, "{head:?}: {answer}");
        assert_eq!(answer.contains("HTTP/1.1 200"), answers == 2, "{head:?}: {answer}");
    }
}

#[tokio::test]
async fn a_token_counts_for_the_request_that_has_it() {
    let rig = rig(|_| {}).await;
    let (mut from, mut to) = tokio::io::split(rig.connect(None).await.unwrap());
    let ask = |token: &str| format!("GET /healthz/ping HTTP/1.1\r\nhost: n\r\n{token}\r\n");
    let text = ask("authorization: Bearer reader-token\r\n") + &ask("");
    to.write_all(text.as_bytes()).await.unwrap();
    to.flush().await.unwrap();
    let mut answer = String::new();
    while !answer.ends_with("Unauthorized") {
        let byte = tokio::time::timeout(Duration::from_secs(60), from.read_u8()).await;
        answer.push(char::from(byte.expect("answered").unwrap()));
    }
    let codes: Vec<_> = answer.split("HTTP/1.1 ").skip(1).map(|a| &a[..3]).collect();
    assert_eq!(codes, ["200", "401"], "{answer}");
}

#[tokio::test]
async fn requests_that_are_none_are_refused() {
    let rig = rig(|_| {}).await;
    for text in [
        // The bound is on what is buffered, which may be up to twice the longest head.
        format!("GET /pods HTTP/1.1\r\nhost: n\r\nx: {}\r\n\r\n", "x".repeat(2 << 20)),
        "GET /pods HTTP/1.1\r\nhost: n\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n".into(),
        "GET /pods HTTP/1.1\r\nhost: n\r\nbad header\r\n\r\n".into(),
        format!("GET /pods HTTP/1.1\r\nhost: n\r\n{}\r\n", "x: y\r\n".repeat(1000)),
    ] {
        let me = rig.authority.issue(API_SERVER, "g", false);
        let stream = rig.connect(Some(me)).await.unwrap();
        let (mut from, mut to) = tokio::io::split(stream);
        let mut answer = Vec::new();
        let write = async {
            let _ = to.write_all(text.as_bytes()).await;
            let _ = to.flush().await;
        };
        // What is refused early closes the connection while the rest is still being sent.
        let both = async { tokio::join!(write, from.read_to_end(&mut answer)) };
        let _ = tokio::time::timeout(Duration::from_secs(30), both).await.expect("closed");
        let answer = String::from_utf8_lossy(&answer);
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{answer}");
    }
    let me = rig.authority.issue(API_SERVER, "g", false);
    assert_eq!(rig.ask("GET", "/pods", Some(me), None).await.0, 200);
}
