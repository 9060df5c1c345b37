//! The proxy's metrics port (10249): the pages that kube-proxy has there beside its metrics.
//!
//! The port asks nobody for permission, as upstream's does not, so that what changes the process or
//! costs CPU time (`/debug/`) is there only with `enableProfiling`.

use axum::routing::{any, get};
use axum::{Json, Router};
use proxy::MetricsPort;
use serde_json::json;

use super::{metrics, profiles, zpages};
use crate::config::ProxyPages;

/// The pages of a proxy that is configured so, in a process that runs since `started`.
pub fn proxy_port(config: ProxyPages, started: jiff::Timestamp) -> MetricsPort {
    let ProxyPages { configz, profiling } = config;
    let configz = Json(json!({"kubeproxy.config.k8s.io": configz}));
    let paths = "/configz /flagz /healthz /metrics /proxyMode";
    let mut pages = Router::new()
        .route("/configz", get(async move || configz))
        .route("/flagz", get(async || zpages::flags_of("kube-proxy")))
        .route("/statusz", get(async move || zpages::status_of("kube-proxy", started, paths)));
    if profiling {
        pages = pages.route("/debug/flags/v", any(zpages::set_verbosity)).merge(profiles::pages());
    } else {
        let off = "profiling is off: enableProfiling (--profiling) switches it on\n";
        let off = any(move || async move { super::Failure::not_found(off) });
        pages = pages.route("/debug/{*page}", off);
    }
    MetricsPort { pages, metrics: Some(metrics::of_proxy) }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::io::{Read, Write};

    use super::*;
    use crate::metrics::{ClientLabels, METRICS};

    async fn asked(profiling: bool, paths: &'static [&'static str]) -> Vec<String> {
        let configz = json!({"mode": "nftables"});
        let port = proxy_port(ProxyPages { configz, profiling }, jiff::Timestamp::UNIX_EPOCH);
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move { axum::serve(listener, port.pages).await });
        let ask = move |request: &&str| {
            let mut stream = std::net::TcpStream::connect(address).unwrap();
            let head = "Host: node\r\nConnection: close\r\nContent-Length: 0\r\n\r\n";
            write!(stream, "{request} HTTP/1.1\r\n{head}").unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            answer.strip_prefix("HTTP/1.1 ").unwrap().to_owned()
        };
        let all = move || paths.iter().map(ask).collect();
        tokio::task::spawn_blocking(all).await.unwrap()
    }

    #[tokio::test]
    async fn the_proxys_port_shows_what_kube_proxys_does() {
        let pages = &["GET /configz", "GET /statusz", "GET /flagz", "GET /debug/pprof/"];
        let answers = asked(true, pages).await;
        for (answer, part) in answers.iter().zip([
            "{\"kubeproxy.config.k8s.io\":{\"mode\":\"nftables\"}}",
            "kube-proxy statusz\n",
            "kube-proxy flagz\n",
            "<a href='profile'>",
        ]) {
            assert!(answer.starts_with("200") && answer.contains(part), "{answer}");
        }
        let answers = asked(true, &["GET /debug/flags/v", "GET /debug/pprof/heap"]).await;
        assert!(answers[0].starts_with("406") && answers[1].starts_with("501"), "{answers:?}");
    }

    #[tokio::test]
    async fn nothing_costs_time_or_changes_the_process_unless_asked_for() {
        let answers = asked(false, &["PUT /debug/flags/v", "GET /debug/pprof/profile"]).await;
        for answer in answers {
            assert!(answer.starts_with("404") && answer.contains("enableProfiling"), "{answer}");
        }
    }

    #[tokio::test]
    async fn metrics_are_the_proxys_own_and_the_processs() {
        let (code, method) = ("200".to_owned(), "GET".to_owned());
        let labels = ClientLabels { code, method, host: "api:6443".to_owned() };
        METRICS.client_request(&labels, std::time::Duration::from_millis(1));
        let own = "# HELP a_b c\n# TYPE a_b counter\na_b_total 1\n# EOF\n";
        let answer = metrics::of_proxy(own);
        let body = axum::body::to_bytes(answer.into_body(), 1 << 20).await.unwrap();
        let text = String::from_utf8(body.to_vec()).unwrap();
        for line in
            ["# TYPE a_b_total counter\n", "\nprocess_open_fds ", "\nkubernetes_build_info{"]
        {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
        assert!(text.contains("rest_client_request") && !text.contains("kubelet_"), "{text}");
        assert!(!text.contains("# EOF"), "{text}");
    }
}
