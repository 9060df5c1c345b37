//! The API server, this node's certificates, and its object.

use std::path::Path;

use k8s_openapi::api::core::v1::Node;

use super::{Finding, Place};
use crate::api::kubeconfig::{Endpoint, Identity};
use crate::api::{self, REQUEST_TIMEOUT};
use crate::join::csr::NodeCertificate;
use crate::join::discover;
use crate::join::error::JoinError;
use crate::join::files::Paths;

const CERTIFICATES: &str = "certificates";

fn paths(place: &Place) -> Paths {
    Paths { kubernetes_dir: place.kubernetes_dir.clone(), root_dir: place.root_dir.clone() }
}

/// The client certificate of kubelet.conf and the certificates of the node API.
pub fn certificates(place: &Place) -> Vec<Finding> {
    let paths = paths(place);
    let (conf, now) = (paths.kubelet_conf(), jiff::Timestamp::now().as_second());
    let bootstrap = paths.bootstrap_conf().exists();
    if !conf.exists() {
        return vec![match bootstrap {
            true => Finding::ok(
                CERTIFICATES,
                "not joined yet: a certificate is asked for with bootstrap-kubelet.conf",
            ),
            false => Finding::ok(CERTIFICATES, "not joined: there are no credentials yet"),
        }];
    }
    let mut findings = match Endpoint::load(&conf) {
        Err(error) => vec![Finding::error(CERTIFICATES, error.to_string(), JOIN_AGAIN)],
        Ok(Endpoint { identity: Identity::Certificate { chain, .. }, .. }) => {
            vec![plan_certificate(&conf, NodeCertificate::read(&chain).as_ref(), now, bootstrap)]
        }
        Ok(_) => vec![Finding::ok(CERTIFICATES, format!("{} uses a token", conf.display()))],
    };
    let serving = paths.cert_dir().join("kubelet-server-current.pem");
    if let Some(certificate) = std::fs::read(&serving).ok().and_then(|p| NodeCertificate::read(&p))
        && !certificate.is_valid_at(now)
    {
        findings.push(Finding::warning(
            CERTIFICATES,
            format!("the serving certificate {} has expired", serving.display()),
            "approve the node's request: kubectl get csr; kubectl certificate approve NAME",
        ));
    }
    findings
}

const JOIN_AGAIN: &str = "join again with a new token: on the control plane run `kubeadm token create \
                          --print-join-command`, then here `longshore join` with what it prints";

/// What is to be said of the client certificate in `conf`; `None` is one that is not a node's.
/// `bootstrap`: whether there is a bootstrap kubeconfig.
pub fn plan_certificate(
    conf: &Path,
    certificate: Option<&NodeCertificate>,
    now: i64,
    bootstrap: bool,
) -> Finding {
    let conf = conf.display();
    let Some(certificate) = certificate else {
        return Finding::error(
            CERTIFICATES,
            format!("{conf} holds no node's certificate"),
            JOIN_AGAIN,
        );
    };
    let name = &certificate.node_name;
    let until = jiff::Timestamp::from_second(certificate.not_after).unwrap_or_default();
    if now < certificate.not_before {
        return Finding::error(
            CERTIFICATES,
            format!("the certificate of node {name} is not valid yet: the clock is wrong"),
            "timedatectl set-ntp true",
        );
    }
    if now >= certificate.not_after {
        let message = format!("the certificate of node {name} expired at {until}");
        return match bootstrap {
            true => Finding::warning(
                CERTIFICATES,
                message,
                "longshore asks for a new one with bootstrap-kubelet.conf when it runs",
            ),
            false => Finding::error(CERTIFICATES, message, JOIN_AGAIN),
        };
    }
    let life = certificate.not_after - certificate.not_before;
    if certificate.not_after - now < life / 20 {
        return Finding::warning(
            CERTIFICATES,
            format!("the certificate of node {name} expires at {until} and is not renewed"),
            "see `longshore status` and the logs of longshore; approve its request: kubectl get csr",
        );
    }
    Finding::ok(CERTIFICATES, format!("node {name}, good until {until}"))
}

/// Whether the API server is there, has the same time, and knows this node.
pub async fn api(place: &Place) -> Vec<Finding> {
    let check = "api";
    let joined = Endpoint::load(&paths(place).kubelet_conf()).ok();
    let endpoint = match (&place.server, joined) {
        (Some(server), _) => Endpoint {
            server: format!("https://{server}"),
            ca: None,
            insecure: true,
            server_name: None,
            identity: Identity::Anonymous,
        },
        (None, Some(endpoint)) => endpoint,
        (None, None) => {
            return vec![Finding::ok(
                check,
                "not joined; give HOST:PORT of an API server to see whether it can be reached",
            )];
        }
    };
    if let Err(error) = discover::ready(&endpoint, std::time::Duration::ZERO, &|_| {}).await {
        return vec![of_error(&error)];
    }
    let mut findings = vec![Finding::ok(check, format!("{} answers", endpoint.server))];
    if let Identity::Certificate { chain, .. } = &endpoint.identity
        && let Some(certificate) = NodeCertificate::read(chain)
    {
        findings.push(registered(&endpoint, &certificate.node_name).await);
    }
    findings
}

/// An error's message and remedy: they are told apart by a semicolon.
fn of_error(error: &JoinError) -> Finding {
    let text = error.to_string();
    let (message, remedy) = text.rsplit_once("; ").unwrap_or((&text, "see the message"));
    let check = if matches!(error, JoinError::ClockSkew { .. }) { "time" } else { "api" };
    Finding::error(check, message, remedy)
}

async fn registered(endpoint: &Endpoint, name: &str) -> Finding {
    let check = "node";
    let look = async {
        let nodes: kube::Api<Node> = kube::Api::all(api::client(endpoint)?);
        api::timed(format!("get node {name}"), REQUEST_TIMEOUT, nodes.get_opt(name)).await
    };
    match look.await {
        Ok(Some(node)) => plan_node(name, &node),
        Ok(None) => Finding::warning(
            check,
            format!("the cluster has no node {name}"),
            "start longshore: it registers the node",
        ),
        Err(error) if error.code() == Some(401) => Finding::error(
            check,
            format!("{} no longer takes this node's certificate", endpoint.server),
            JOIN_AGAIN,
        ),
        Err(error) => Finding::error(check, error.to_string(), "see the logs of kube-apiserver"),
    }
}

/// What is to be said of the node's object.
pub fn plan_node(name: &str, node: &Node) -> Finding {
    let conditions = node.status.as_ref().and_then(|s| s.conditions.as_deref()).unwrap_or_default();
    let ready = conditions.iter().find(|c| c.type_ == "Ready");
    match ready {
        Some(ready) if ready.status == "True" => Finding::ok("node", format!("{name} is Ready")),
        Some(ready) => Finding::warning(
            "node",
            format!("{name} is not Ready: {}", ready.message.clone().unwrap_or_default()),
            "see `longshore status`, and that longshore runs (systemctl status longshore)",
        ),
        None => Finding::warning(
            "node",
            format!("{name} has told no status yet"),
            "see that longshore runs (systemctl status longshore)",
        ),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::doctor::Level;

    #[test]
    fn certificates_are_judged_by_their_time() {
        let certificate =
            NodeCertificate { node_name: "n".to_owned(), not_before: 1000, not_after: 2000 };
        let level = |now, bootstrap| {
            plan_certificate(Path::new("/c"), Some(&certificate), now, bootstrap).level
        };
        assert_eq!(level(1500, false), Level::Ok);
        assert_eq!(level(1960, false), Level::Warning);
        assert_eq!(level(2000, false), Level::Error);
        assert_eq!(level(2000, true), Level::Warning);
        assert_eq!(level(999, false), Level::Error);
        assert_eq!(plan_certificate(Path::new("/c"), None, 0, false).level, Level::Error);
    }

    #[test]
    fn an_errors_remedy_is_its_last_part() {
        let found = of_error(&JoinError::Unreachable {
            server: "https://h:1".to_owned(),
            cause: "refused".to_owned(),
        });
        assert!(found.message.ends_with("refused"), "{found:?}");
        assert!(found.remedy.unwrap().starts_with("check the address"));
        let skew = JoinError::ClockSkew { server: "s".to_owned(), seconds: 900 };
        assert_eq!(of_error(&skew).check, "time");
    }
}
