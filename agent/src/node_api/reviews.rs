//! The cluster's word on who a token is and what somebody may do: TokenReview and
//! SubjectAccessReview, with the answers kept for a while.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec};
use k8s_openapi::api::authorization::v1::{
    ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec,
};
use kube::api::PostParams;
use kube::{Api, Client};
use sha2::{Digest, Sha256};

use super::identity::Identity;
use crate::api::{self, ApiError};

/// Longest wait for one review.
const TIMEOUT: Duration = Duration::from_secs(10);
/// How often a review that failed for a passing reason is asked for.
const TRIES: u32 = 3;
/// Answers kept at most.
const KEPT: usize = 4096;
/// A token longer than this is none.
const MAX_TOKEN: usize = 64 << 10;

/// What somebody wants of the node.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Access {
    /// API verb.
    pub verb: &'static str,
    /// Subresource of the node.
    pub subresource: &'static str,
}

/// Asks the cluster.
#[async_trait]
pub trait Reviews: Send + Sync + 'static {
    /// Whose `token` is; `None` if it is not good.
    async fn token(&self, token: &str) -> Result<Option<Identity>, ApiError>;
    /// Whether `who` may do `access` to node `node`.
    async fn access(&self, node: &str, who: &Identity, access: &Access) -> Result<bool, ApiError>;
}

/// By the API server.
pub struct ClusterReviews(Client);

impl ClusterReviews {
    /// Asks with `client`, whose user may create reviews (`system:nodes` may).
    pub fn new(client: Client) -> Self {
        Self(client)
    }
}

/// Tries again where that can help.
async fn patiently<T, F: Future<Output = Result<T, ApiError>>>(
    ask: impl Fn() -> F,
) -> Result<T, ApiError> {
    let mut wait = Duration::from_millis(200);
    for _ in 1..TRIES {
        match ask().await {
            Err(error) if error.is_retryable() => tokio::time::sleep(wait).await,
            other => return other,
        }
        wait *= 2;
    }
    ask().await
}

#[async_trait]
impl Reviews for ClusterReviews {
    async fn token(&self, token: &str) -> Result<Option<Identity>, ApiError> {
        let reviews: Api<TokenReview> = Api::all(self.0.clone());
        let review = TokenReview {
            spec: TokenReviewSpec { token: token.into(), audiences: None },
            ..TokenReview::default()
        };
        let params = PostParams::default();
        let ask = || api::timed("create a TokenReview", TIMEOUT, reviews.create(&params, &review));
        let Some(status) = patiently(ask).await?.status else { return Ok(None) };
        let Some(user) = status.user.filter(|_| status.authenticated == Some(true)) else {
            return Ok(None);
        };
        Ok(Some(Identity {
            user: user.username.unwrap_or_default(),
            uid: user.uid.unwrap_or_default(),
            groups: user.groups.unwrap_or_default(),
            extra: user.extra.unwrap_or_default(),
        }))
    }

    async fn access(&self, node: &str, who: &Identity, access: &Access) -> Result<bool, ApiError> {
        let reviews: Api<SubjectAccessReview> = Api::all(self.0.clone());
        let review = SubjectAccessReview {
            spec: SubjectAccessReviewSpec {
                user: Some(who.user.clone()),
                uid: (!who.uid.is_empty()).then(|| who.uid.clone()),
                groups: Some(who.groups.clone()),
                extra: (!who.extra.is_empty()).then(|| who.extra.clone()),
                resource_attributes: Some(ResourceAttributes {
                    verb: Some(access.verb.into()),
                    version: Some("v1".into()),
                    resource: Some("nodes".into()),
                    subresource: Some(access.subresource.into()),
                    name: Some(node.into()),
                    ..ResourceAttributes::default()
                }),
                ..SubjectAccessReviewSpec::default()
            },
            ..SubjectAccessReview::default()
        };
        let params = PostParams::default();
        let what = "create a SubjectAccessReview";
        let ask = || api::timed(what, TIMEOUT, reviews.create(&params, &review));
        let status = patiently(ask).await?.status;
        Ok(status.is_some_and(|status| status.allowed && status.denied != Some(true)))
    }
}

/// Answers with the time until which they hold.
struct Kept<K, V>(Mutex<HashMap<K, (V, Instant)>>);

impl<K: Eq + Hash, V: Clone> Kept<K, V> {
    fn new() -> Self {
        Self(Mutex::new(HashMap::new()))
    }

    fn get(&self, key: &K, now: Instant) -> Option<V> {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.get(key).filter(|(_, until)| now < *until).map(|(value, _)| value.clone())
    }

    fn put(&self, key: K, value: V, now: Instant, ttl: Duration) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() >= KEPT {
            kept.retain(|_, (_, until)| now < *until);
            if kept.len() >= KEPT {
                // Strangers' tokens must not push up the memory; who counts is asked about again.
                kept.clear();
            }
        }
        kept.insert(key, (value, now + ttl));
    }
}

/// Reviews whose answers are kept; failures to ask are not.
pub(super) struct KeptReviews {
    reviews: Box<dyn Reviews>,
    tokens: Kept<[u8; 32], Option<Identity>>,
    accesses: Kept<(Identity, Access), bool>,
    token_ttl: Duration,
    allowed_ttl: Duration,
    denied_ttl: Duration,
}

impl KeptReviews {
    pub(super) fn new(
        reviews: Box<dyn Reviews>,
        token_ttl: Duration,
        (allowed_ttl, denied_ttl): (Duration, Duration),
    ) -> Self {
        Self {
            reviews,
            tokens: Kept::new(),
            accesses: Kept::new(),
            token_ttl,
            allowed_ttl,
            denied_ttl,
        }
    }

    pub(super) async fn token(&self, token: &str) -> Result<Option<Identity>, ApiError> {
        if token.is_empty() || token.len() > MAX_TOKEN {
            return Ok(None);
        }
        // The token itself is not kept.
        let key: [u8; 32] = Sha256::digest(token).into();
        if let Some(known) = self.tokens.get(&key, Instant::now()) {
            return Ok(known);
        }
        let answer = self.reviews.token(token).await?;
        self.tokens.put(key, answer.clone(), Instant::now(), self.token_ttl);
        Ok(answer)
    }

    pub(super) async fn access(
        &self,
        node: &str,
        who: &Identity,
        access: &Access,
    ) -> Result<bool, ApiError> {
        let key = (who.clone(), access.clone());
        if let Some(known) = self.accesses.get(&key, Instant::now()) {
            return Ok(known);
        }
        let allowed = self.reviews.access(node, who, access).await?;
        let ttl = if allowed { self.allowed_ttl } else { self.denied_ttl };
        self.accesses.put(key, allowed, Instant::now(), ttl);
        Ok(allowed)
    }
}
