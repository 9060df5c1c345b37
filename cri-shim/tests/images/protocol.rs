//! How the store speaks to registries: logins, redirects, errors, ranges, proxies.

use std::{
    collections::HashMap,
    fs,
    path::Path,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use cri_shim::{
    api::AuthConfig,
    image::{ImageError, ImageStore, StoreConfig},
};

use super::{
    fixture::{ImageSpec, digest, own_namespaces},
    runtime,
    server::{Answer, Request, Server},
    store,
};

/// What a registry holds, by the end of its path.
#[derive(Clone)]
struct Content(Arc<HashMap<String, Vec<u8>>>);

impl Content {
    fn of(image: &ImageSpec) -> Self {
        let manifest = image.manifest();
        let mut content = HashMap::from([
            ("manifests/v1".to_owned(), manifest.clone()),
            (format!("manifests/{}", digest(&manifest)), manifest),
            (format!("blobs/{}", image.config_digest()), image.config()),
        ]);
        for layer in &image.layers {
            content.insert(format!("blobs/{}", digest(&layer.blob)), layer.blob.clone());
        }
        Self(Arc::new(content))
    }

    /// The plain answer, with ranges.
    fn answer(&self, request: &Request) -> Answer {
        let path = request.path.split('?').next().unwrap();
        let Some((_, body)) = self.0.iter().find(|(end, _)| path.ends_with(end.as_str())) else {
            let said = r#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"not here"}]}"#;
            return Answer::new(404, said);
        };
        let from = request.header("range").and_then(|range| {
            range.strip_prefix("bytes=")?.strip_suffix('-')?.parse::<usize>().ok()
        });
        match from {
            None => Answer::new(200, body.clone()),
            Some(from) => {
                let range = format!("bytes {from}-{}/{}", body.len() - 1, body.len());
                Answer::new(206, &body[from..]).with("Content-Range", range)
            }
        }
    }
}

fn user() -> Option<AuthConfig> {
    Some(AuthConfig {
        username: "joe".to_owned(),
        password: "s3cret".to_owned(),
        ..Default::default()
    })
}

/// `joe:s3cret`.
const BASIC: &str = "Basic am9lOnMzY3JldA==";

fn name(server: &Server) -> String {
    format!("{}/team/app:v1", server.address)
}

fn hosts(folder: &Path, registry: &str, text: &str) {
    let folder = folder.join("certs.d").join(registry);
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join("hosts.toml"), text).unwrap();
}

fn pull(store: &ImageStore, name: &str, auth: Option<AuthConfig>) -> Result<String, ImageError> {
    runtime().block_on(store.pull(name, auth)).map(|id| id.to_string())
}

/// A registry that wants tokens, each good for `uses` requests, and the service that gives them.
fn token_registry(content: Content, uses: usize, life: u64) -> (Server, Arc<Server>) {
    let given = Arc::new(AtomicUsize::new(0));
    let used = Arc::new(AtomicUsize::new(0));
    let (counter, fresh) = (Arc::clone(&given), Arc::clone(&used));
    let service = Arc::new(Server::start(move |request| {
        let known = request.header("authorization") == Some(BASIC)
            || request.body.contains("refresh_token=id-token");
        if !known {
            return Answer::new(401, r#"{"details":"s3cret was wrong"}"#);
        }
        fresh.store(0, Ordering::SeqCst);
        let number = counter.fetch_add(1, Ordering::SeqCst) + 1;
        let body = format!(r#"{{"token":"t{number}","expires_in":{life}}}"#);
        Answer::new(200, body)
    }));
    let realm = format!("http://{}/token", service.address);
    let registry = Server::start(move |request| {
        let good = format!("Bearer t{}", given.load(Ordering::SeqCst));
        if request.header("authorization") != Some(&good)
            || used.fetch_add(1, Ordering::SeqCst) >= uses
        {
            let challenge = format!("Bearer realm=\"{realm}\",service=\"reg\"");
            return Answer::new(401, "").with("WWW-Authenticate", challenge);
        }
        content.answer(request)
    });
    (registry, service)
}

#[test]
fn tokens_are_fetched_once_and_renewed_when_they_end() {
    own_namespaces();
    let content = Content::of(&super::example());
    let folder = tempfile::tempdir().unwrap();
    let store = store(folder.path());

    let (registry, service) = token_registry(content.clone(), usize::MAX, 300);
    pull(&store, &name(&registry), user()).unwrap();
    let asked = service.requests();
    assert_eq!(asked.len(), 1, "{asked:?}");
    assert_eq!(asked[0].path, "/token?service=reg&scope=repository%3Ateam%2Fapp%3Apull");
    // The password goes to the service alone.
    assert!(registry.requests().iter().all(|r| r.header("authorization") != Some(BASIC)));

    // Ones that the registry forgets early, and ones whose time is over at once.
    for (uses, life) in [(1, 300), (usize::MAX, 1)] {
        store.remove(&name(&registry)).unwrap();
        let mut config = StoreConfig::new(folder.path());
        config.orphan_life = Duration::ZERO;
        // Layers side by side would use up one another's tokens.
        config.parallel = 1;
        let store = ImageStore::open(config).unwrap();
        let (registry, service) = token_registry(content.clone(), uses, life);
        pull(&store, &name(&registry), user()).unwrap();
        assert!(service.requests().len() > 2, "{uses} {life}");
        store.remove(&name(&registry)).unwrap();
    }
}

#[test]
fn a_document_of_another_size_than_announced_is_refused() {
    own_namespaces();
    let image = super::example();
    let mut content = (*Content::of(&image).0).clone();
    let mut manifest: serde_json::Value = serde_json::from_slice(&image.manifest()).unwrap();
    let size = image.config().len() + 1;
    manifest["config"]["size"] = size.into();
    content.insert("manifests/v1".to_owned(), serde_json::to_vec(&manifest).unwrap());
    let registry = Content(Arc::new(content));
    let registry = Server::start(move |request| registry.answer(request));
    let folder = tempfile::tempdir().unwrap();
    let error = pull(&store(folder.path()), &name(&registry), None).unwrap_err();
    assert!(matches!(error, ImageError::Corrupt { .. }), "{error}");
    assert!(error.to_string().contains(&format!("instead of {size}")), "{error}");
}

#[test]
fn every_kind_of_credentials_is_used_and_none_is_told() {
    own_namespaces();
    let content = Content::of(&super::example());
    let folder = tempfile::tempdir().unwrap();
    let store = store(folder.path());
    let (registry, service) = token_registry(content.clone(), usize::MAX, 300);
    let identity = AuthConfig { identity_token: "id-token".to_owned(), ..Default::default() };
    pull(&store, &name(&registry), Some(identity)).unwrap();
    let asked = &service.requests()[0];
    assert_eq!(asked.method, "POST");
    assert!(asked.body.contains("grant_type=refresh_token&"), "{}", asked.body);

    let bearer = Server::start(move |request| match request.header("authorization") {
        Some("Bearer mine") => content.answer(request),
        _ => Answer::new(401, "").with("WWW-Authenticate", "Bearer realm=\"http://x/\""),
    });
    let token = |token: &str| AuthConfig { registry_token: token.to_owned(), ..Default::default() };
    pull(&store, &name(&bearer), Some(token("mine"))).unwrap();

    let wrong = AuthConfig { password: "other-secret".to_owned(), ..user().unwrap() };
    for (registry, auth) in
        [(&registry, Some(wrong)), (&registry, None), (&bearer, Some(token("other-secret")))]
    {
        let error = pull(&store, &name(registry), auth).unwrap_err();
        assert!(matches!(error, ImageError::Unauthorized { .. }), "{error}");
        assert!(!format!("{error:?}").contains("secret"), "{error:?}");
    }
}

#[test]
fn a_password_is_not_sent_to_a_token_service_in_plain() {
    own_namespaces();
    // TLS by a certificate of its own would be needed for the registry; a mirror over plain http is
    // configured so, but its token service is not.
    let registry = Server::start(|_| {
        let challenge = "Bearer realm=\"http://auth.example.test/token\"";
        Answer::new(401, "").with("WWW-Authenticate", challenge)
    });
    let folder = tempfile::tempdir().unwrap();
    let store = store(folder.path());
    let error = pull(&store, &name(&registry), user()).unwrap_err();
    // The registry itself is spoken to in plain here, so that the service may be; nobody is there.
    assert!(matches!(error, ImageError::Network { .. }), "{error}");
    assert!(error.to_string().contains("auth.example.test"), "{error}");
    assert!(!error.to_string().contains("s3cret"), "{error}");
}

#[test]
fn redirects_are_followed_without_credentials() {
    own_namespaces();
    let content = Content::of(&super::example());
    let storage = {
        let content = content.clone();
        Server::start(move |request| content.answer(request))
    };
    let target = storage.address;
    let registry = Server::start(move |request| match request.header("authorization") {
        Some(BASIC) if request.path.contains("/blobs/") => {
            let digest = request.path.split("/blobs/").nth(1).unwrap();
            Answer::new(307, "")
                .with("Location", format!("http://{target}/data/blobs/{digest}?signature=abc"))
        }
        Some(BASIC) => content.answer(request),
        _ => Answer::new(401, "").with("WWW-Authenticate", "Basic realm=\"x\""),
    });
    let folder = tempfile::tempdir().unwrap();
    let address = registry.address;
    let text =
        format!("[host.\"http://{address}\"]\n[host.\"http://{address}\".header]\nx-key = \"k3y\"");
    hosts(folder.path(), &address.to_string(), &text);
    let store = store(folder.path());
    pull(&store, &name(&registry), user()).unwrap();
    assert_eq!(storage.about("signature=abc").len(), 4);
    for request in storage.requests() {
        assert!(request.header("authorization").is_none() && request.header("x-key").is_none());
    }
    assert!(registry.requests().iter().all(|request| request.header("x-key") == Some("k3y")));

    // In circles, and to where no registry keeps its blobs.
    for (to, want) in [("/v2/x/manifests/v1", "redirects"), ("file:///etc/passwd", "redirects to")]
    {
        let lost = Server::start(move |_| Answer::new(302, "").with("Location", to));
        let error = pull(&store, &name(&lost), user()).unwrap_err().to_string();
        assert!(error.contains(want), "{error}");
    }
}

#[test]
fn busy_registries_are_asked_again_when_they_say() {
    own_namespaces();
    let content = Content::of(&super::example());
    for (status, wait) in [(429, Some("1")), (503, None), (500, None)] {
        let content = content.clone();
        let busy = AtomicUsize::new(0);
        let registry = Server::start(move |request| {
            // Every first request of a kind.
            let first = busy.fetch_add(1, Ordering::SeqCst).is_multiple_of(2);
            let answer = Answer::new(status, "");
            match wait {
                _ if !first => content.answer(request),
                Some(wait) => answer.with("Retry-After", wait),
                None => answer,
            }
        });
        let folder = tempfile::tempdir().unwrap();
        let mut config = StoreConfig::new(folder.path());
        config.parallel = 1;
        let store = ImageStore::open(config).unwrap();
        let started = std::time::Instant::now();
        pull(&store, &name(&registry), None).unwrap();
        if wait.is_some() {
            assert!(started.elapsed() >= Duration::from_secs(1));
        }
    }
    // What will not get better is not asked for again.
    let registry =
        Server::start(|_| Answer::new(403, r#"{"errors":[{"code":"DENIED","message":"quota"}]}"#));
    let folder = tempfile::tempdir().unwrap();
    let error = pull(&store(folder.path()), &name(&registry), None).unwrap_err();
    assert!(matches!(error, ImageError::Unauthorized { .. }), "{error}");
    assert!(error.to_string().contains("DENIED: quota"), "{error}");
    assert_eq!(registry.requests().len(), 1);
}

#[test]
fn a_blob_goes_on_at_the_next_host_where_the_first_broke_off() {
    own_namespaces();
    let image = super::example();
    let content = Content::of(&image);
    let blob = &image.layers[0].blob;
    let (path, half) = (format!("/blobs/{}", digest(blob)), blob.len() / 2);
    let mirror = {
        let (content, path) = (content.clone(), path.clone());
        let asked = AtomicUsize::new(0);
        Server::start(move |request| {
            if !request.path.contains(&path) {
                return content.answer(request);
            }
            match asked.fetch_add(1, Ordering::SeqCst) {
                0 => Answer { cut: Some(half), ..content.answer(request) },
                _ => Answer::new(404, ""),
            }
        })
    };
    let origin = Server::start(move |request| content.answer(request));
    let folder = tempfile::tempdir().unwrap();
    let text =
        format!("server = \"http://{}\"\n[host.\"http://{}\"]", origin.address, mirror.address);
    hosts(folder.path(), "example.test", &text);
    let store = store(folder.path());
    pull(&store, "example.test/team/app:v1", None).unwrap();
    let rest = origin.requests();
    let range = format!("bytes={half}-");
    assert_eq!(rest.len(), 1, "{rest:?}");
    assert_eq!(rest[0].header("range"), Some(range.as_str()));
    assert!(mirror.requests().iter().all(|r| r.path.contains("ns=example.test")));
}

#[test]
fn mirrors_that_may_not_resolve_serve_what_was_resolved() {
    own_namespaces();
    let content = Content::of(&super::example());
    let serve = |content: &Content| {
        let content = content.clone();
        Server::start(move |request| content.answer(request))
    };
    let (mirror, origin) = (serve(&content), serve(&content));
    let folder = tempfile::tempdir().unwrap();
    let text = format!(
        "server = \"http://{}\"\n[host.\"http://{}\"]\ncapabilities = [\"pull\"]",
        origin.address, mirror.address
    );
    hosts(folder.path(), "_default", &text);
    pull(&store(folder.path()), "example.test/team/app:v1", None).unwrap();
    assert_eq!(origin.requests().len(), 1);
    assert!(mirror.about("/manifests/v1").is_empty());
    assert_eq!(mirror.about("/blobs/").len(), 4);
}

#[test]
fn a_pull_without_progress_is_given_up() {
    own_namespaces();
    let content = Content::of(&super::example());
    let registry = Server::start(move |request| Answer {
        silent: request.path.contains("/blobs/"),
        ..content.answer(request)
    });
    let folder = tempfile::tempdir().unwrap();
    let mut config = StoreConfig::new(folder.path());
    config.progress_timeout = Duration::from_millis(300);
    let store = ImageStore::open(config).unwrap();
    let error = pull(&store, &name(&registry), None).unwrap_err();
    assert!(error.to_string().contains("no progress"), "{error}");
    assert!(store.pulls().is_empty());
}

#[test]
fn a_pull_that_was_killed_goes_on_with_the_layers_it_has() {
    own_namespaces();
    let image = super::example();
    let content = Content::of(&image);
    let last = format!("/blobs/{}", digest(&image.layers[2].blob));
    let broken = Arc::new(AtomicUsize::new(0));
    let registry = {
        let broken = Arc::clone(&broken);
        Server::start(move |request| match request.path.contains(&last) {
            true if broken.load(Ordering::SeqCst) == 0 => Answer::new(404, ""),
            _ => content.answer(request),
        })
    };
    let folder = tempfile::tempdir().unwrap();
    {
        let store = store(folder.path());
        pull(&store, &name(&registry), None).unwrap_err();
        assert!(store.list().unwrap().is_empty());
    }
    let layers = || super::names(&folder.path().join("images/layers"));
    // The others may have been cancelled half-way; what is there is whole.
    let started = std::time::Instant::now();
    while !super::names(&folder.path().join("images/tmp")).is_empty() {
        assert!(started.elapsed().as_secs() < 20);
        std::thread::yield_now();
    }
    let whole = layers();
    broken.store(1, Ordering::SeqCst);
    // The next daemon finds them.
    let store = store(folder.path());
    assert_eq!(layers(), whole);
    let before = registry.about("/blobs/").len();
    pull(&store, &name(&registry), None).unwrap();
    // The config, and the layers that were missing.
    assert_eq!(registry.about("/blobs/").len() - before, 1 + 3 - whole.len());
}

/// The other half of the next test: a process has its proxies from its environment.
#[test]
#[ignore = "run by proxies_come_from_the_environment"]
fn proxied() {
    let folder = tempfile::tempdir().unwrap();
    let name = std::env::var("LONGSHORE_TEST_IMAGE").unwrap();
    pull(&store(folder.path()), &name, None).unwrap();
}

#[test]
fn proxies_come_from_the_environment() {
    own_namespaces();
    let content = Content::of(&super::example());
    let serve = || {
        let content = content.clone();
        Server::start(move |request| match request.method.as_str() {
            // Over TLS it will not go.
            "CONNECT" => Answer::new(502, ""),
            _ => content.answer(request),
        })
    };
    let run = |image: &str, variables: &[(&str, &str)]| {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "protocol::proxied", "--ignored"]);
        for name in ["HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY"] {
            command.env_remove(name).env_remove(name.to_lowercase());
        }
        command.env("LONGSHORE_TEST_IMAGE", image).envs(variables.iter().copied());
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    };
    for (http, https) in [("HTTP_PROXY", "HTTPS_PROXY"), ("http_proxy", "https_proxy")] {
        let proxy = serve();
        let address = format!("http://{}", proxy.address);
        run("127.0.0.1:9/team/app:v1", &[(http, &address), (https, &address)]);
        assert!(!proxy.about("http://127.0.0.1:9/v2/team/app/blobs/").is_empty());
        assert!(proxy.requests().iter().any(|request| request.method == "CONNECT"));
    }
    for (variable, list) in [("NO_PROXY", "x.test,127.0.0.0/8"), ("no_proxy", "127.0.0.1")] {
        let (proxy, registry) = (serve(), serve());
        let address = format!("http://{}", proxy.address);
        let proxies = [("HTTP_PROXY", &*address), ("HTTPS_PROXY", &*address), (variable, list)];
        run(&name(&registry), &proxies);
        assert!(proxy.requests().is_empty() && !registry.requests().is_empty());
    }
}
