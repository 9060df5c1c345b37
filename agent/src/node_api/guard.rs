//! The guard before every endpoint: who is it, and may they.

use std::path::PathBuf;
use std::sync::Arc;

use axum::http::{HeaderMap, StatusCode, header};
use rustls::RootCertStore;
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;

use super::identity::{Identity, subresources, verb};
use super::reload::Reloaded;
use super::reviews::{Access, KeptReviews, Reviews};
use crate::config::node_api::{Authentication, Authorization};

/// Why a request does not pass, as the client is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) status: StatusCode,
    pub(super) message: String,
}

/// Certificates that clients are believed by.
struct ClientCa(Reloaded<Arc<dyn ClientCertVerifier>>);

impl ClientCa {
    fn new(path: PathBuf) -> Self {
        Self(Reloaded::new(vec![path], verifier))
    }

    /// Whether `chain`, leaf first, is signed by the CA, holds now, and is for clients.
    fn believes(&self, chain: &[CertificateDer<'static>]) -> bool {
        let (Some(verifier), Some((leaf, rest))) = (self.0.get(), chain.split_first()) else {
            return false;
        };
        verifier
            .verify_client_cert(leaf, rest, UnixTime::now())
            .inspect_err(|error| tracing::info!(%error, "a client's certificate is not believed"))
            .is_ok()
    }
}

fn verifier(contents: &[Vec<u8>]) -> Result<Arc<dyn ClientCertVerifier>, String> {
    let mut roots = RootCertStore::empty();
    for certificate in contents.iter().flat_map(|pem| CertificateDer::pem_slice_iter(pem)) {
        let certificate = certificate.map_err(|error| error.to_string())?;
        roots.add(certificate).map_err(|error| error.to_string())?;
    }
    let provider = Arc::new(aws_lc_rs::default_provider());
    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
        .build()
        .map_err(|error| error.to_string())
}

/// Judges requests.
pub(super) struct Guard {
    node_name: String,
    client_ca: Option<ClientCa>,
    reviews: Option<KeptReviews>,
    webhook: bool,
    anonymous: bool,
    authorization: Authorization,
}

impl Guard {
    /// As configured. Without `reviews` (no cluster) tokens are not known, and what SubjectAccessReview
    /// would have to say is refused.
    pub(super) fn new(
        node_name: &str,
        authentication: &Authentication,
        authorization: Authorization,
        reviews: Option<Box<dyn Reviews>>,
    ) -> Self {
        let ttls = match authorization {
            Authorization::Webhook { allowed_ttl, denied_ttl } => (allowed_ttl, denied_ttl),
            Authorization::AlwaysAllow => Default::default(),
        };
        Self {
            node_name: node_name.to_owned(),
            client_ca: authentication.client_ca.clone().map(ClientCa::new),
            reviews: reviews.map(|r| KeptReviews::new(r, authentication.cache_ttl, ttls)),
            webhook: authentication.webhook,
            anonymous: authentication.anonymous,
            authorization,
        }
    }

    /// Whether clients are asked for certificates.
    pub(super) fn asks_for_certificates(&self) -> bool {
        self.client_ca.is_some()
    }

    /// Who asks: by certificate, else by token, else nobody in particular where that is allowed.
    /// Credentials that are not good are refused even then.
    pub(super) async fn authenticate(
        &self,
        certificates: &[CertificateDer<'static>],
        headers: &HeaderMap,
    ) -> Result<Identity, Refusal> {
        let refusal =
            || Refusal { status: StatusCode::UNAUTHORIZED, message: "Unauthorized".into() };
        let mut bad = false;
        if let (Some(ca), Some(leaf)) = (&self.client_ca, certificates.first()) {
            if ca.believes(certificates)
                && let Some(known) = Identity::of_certificate(leaf)
            {
                return Ok(known.authenticated());
            }
            bad = true;
        }
        if let (true, Some(token)) = (self.webhook, bearer(headers)) {
            bad = true;
            if let Some(reviews) = &self.reviews {
                match reviews.token(token).await {
                    Ok(Some(known)) => return Ok(known.authenticated()),
                    Ok(None) => {}
                    Err(error) => tracing::warn!(%error, "cannot ask whose a token is"),
                }
            }
        }
        if bad || !self.anonymous { Err(refusal()) } else { Ok(Identity::anonymous()) }
    }

    /// Whether `who` may ask for `path` (decoded) by `method`.
    pub(super) async fn authorize(
        &self,
        who: &Identity,
        method: &str,
        path: &str,
    ) -> Result<(), Refusal> {
        if self.authorization == Authorization::AlwaysAllow {
            return Ok(());
        }
        let (verb, names) = (verb(method), subresources(path));
        for subresource in names {
            let Some(reviews) = &self.reviews else { break };
            match reviews.access(&self.node_name, who, &Access { verb, subresource }).await {
                Ok(true) => return Ok(()),
                Ok(false) => {}
                Err(error) => {
                    tracing::warn!(%error, user = who.user, "cannot ask what somebody may do");
                    return Err(Refusal {
                        status: StatusCode::INTERNAL_SERVER_ERROR,
                        message: format!(
                            "Authorization error (user={}, verb={verb}, resource=nodes, \
                             subresource={subresource})",
                            who.user
                        ),
                    });
                }
            }
        }
        tracing::info!(user = who.user, verb, subresources = ?names, "forbidden");
        Err(Refusal {
            status: StatusCode::FORBIDDEN,
            message: format!(
                "Forbidden (user={}, verb={verb}, resource=nodes, subresource(s)=[{}])\n",
                who.user,
                names.join(" ")
            ),
        })
    }
}

/// The token of `Authorization: Bearer`.
fn bearer(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?.trim();
    let (scheme, token) = value.split_once(' ')?;
    let token = token.trim();
    (scheme.eq_ignore_ascii_case("bearer") && !token.is_empty()).then_some(token)
}
