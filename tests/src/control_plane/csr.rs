//! Which CSRs are approved by themselves, and their signing: the rules of the csrapproving and
//! csrsigning controllers for the two kubelet signers.

use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;
use x509_parser::prelude::FromDer as _;

use super::pki::Pki;

/// Signer of a node's client certificate.
pub const CLIENT_SIGNER: &str = "kubernetes.io/kube-apiserver-client-kubelet";
/// Signer of a node's serving certificate.
pub const SERVING_SIGNER: &str = "kubernetes.io/kubelet-serving";

/// CN and O of the request.
fn subject(pem: &str) -> Result<(String, Vec<String>)> {
    let (_, pem) = x509_parser::pem::parse_x509_pem(pem.as_bytes()).context("read PEM")?;
    let (_, csr) =
        x509_parser::certification_request::X509CertificationRequest::from_der(&pem.contents)
            .context("read the request")?;
    let subject = &csr.certification_request_info.subject;
    let name = subject
        .iter_common_name()
        .next()
        .and_then(|n| n.as_str().ok())
        .context("no common name")?
        .to_owned();
    let groups =
        subject.iter_organization().filter_map(|o| o.as_str().ok().map(str::to_owned)).collect();
    Ok((name, groups))
}

fn pem_of(request: &Value) -> Result<String> {
    let text = request["spec"]["request"].as_str().context("spec.request is missing")?;
    Ok(String::from_utf8(STANDARD.decode(text)?)?)
}

/// Whether kubeadm's bindings have this request approved: a bootstrap token asks for a node's
/// client certificate, or a node for its own again.
pub fn auto_approved(request: &Value) -> bool {
    if request["spec"]["signerName"] != CLIENT_SIGNER {
        return false;
    }
    let Ok((name, groups)) = pem_of(request).and_then(|pem| subject(&pem)) else { return false };
    let user = request["spec"]["username"].as_str().unwrap_or_default();
    name.starts_with("system:node:")
        && groups == ["system:nodes"]
        && (user.starts_with("system:bootstrap:") || user == name)
}

/// Approved and not denied.
pub fn is_approved(request: &Value) -> bool {
    let has = |kind: &str| {
        request["status"]["conditions"].as_array().into_iter().flatten().any(|c| c["type"] == kind)
    };
    has("Approved") && !has("Denied") && !has("Failed")
}

/// The certificate of an approved request, PEM; good for `lifetime` where it asks for none.
///
/// # Errors
/// When the request is not what its signer signs.
pub fn sign(pki: &Pki, request: &Value, lifetime: Duration) -> Result<String> {
    let pem = pem_of(request)?;
    let (name, groups) = subject(&pem)?;
    let signer = request["spec"]["signerName"].as_str().unwrap_or_default();
    if ![CLIENT_SIGNER, SERVING_SIGNER].contains(&signer) {
        bail!("unknown signer {signer:?}");
    }
    if !name.starts_with("system:node:") || groups != ["system:nodes"] {
        bail!("subject {name:?} {groups:?} is no node");
    }
    let server = signer == SERVING_SIGNER;
    let usages: Vec<&str> = request["spec"]["usages"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    let wanted = if server { "server auth" } else { "client auth" };
    let allowed = ["digital signature", "key encipherment", wanted];
    if !usages.contains(&wanted) || usages.iter().any(|u| !allowed.contains(u)) {
        bail!("usages {usages:?} are not those of {signer}");
    }
    let asked = request["spec"]["expirationSeconds"].as_u64();
    let lifetime =
        asked.map_or(lifetime, |seconds| Duration::from_secs(seconds.clamp(600, 365 * 24 * 3600)));
    pki.sign(&pem, server, lifetime)
}
