//! Tokens of service accounts: when they are the same, when they are renewed, how they are asked for.

use std::time::Duration;

use k8s_openapi::api::authentication::v1::{TokenRequest, TokenRequestSpec, TokenRequestStatus};
use k8s_openapi::api::core::v1::ServiceAccount;
use kube::Client;
use kube::api::PostParams;

use crate::api::backoff::Backoff;
use crate::api::{self, ApiError, REQUEST_TIMEOUT};
use crate::ids::NamespacedName;

/// A token is asked anew when this share of its life is left.
const TOKEN_RENEW_SHARE: f64 = 0.2;

/// A refused token request is tried again this often before the refusal counts.
const TOKEN_REFUSALS: u32 = 5;

/// What makes two requests the same; ends in the UID of the bound pod.
pub(super) fn token_key(account: &NamespacedName, spec: &TokenRequestSpec) -> String {
    let bound = spec.bound_object_ref.as_ref().and_then(|b| b.uid.as_deref()).unwrap_or_default();
    let life = spec.expiration_seconds.unwrap_or_default();
    // Audiences are free text: keep the key free of quotes.
    let audiences: String = spec
        .audiences
        .as_deref()
        .unwrap_or_default()
        .join(",")
        .chars()
        .map(|c| if c == '"' || c == '\\' || c.is_control() { '_' } else { c })
        .collect();
    format!("{account}/{life}/{audiences}/{bound}")
}

/// Seconds since the epoch; 0 if it is not told.
pub(super) fn expiry(token: &TokenRequestStatus) -> i64 {
    token.expiration_timestamp.as_ref().map_or(0, |t| t.0.as_second())
}

pub(super) fn must_renew(expires: i64, life: i64, now: i64) -> bool {
    ((expires - now) as f64) < life as f64 * TOKEN_RENEW_SHARE
}

pub(super) async fn request_token(
    client: Client,
    account: &NamespacedName,
    spec: TokenRequestSpec,
) -> Result<TokenRequestStatus, ApiError> {
    let accounts: kube::Api<ServiceAccount> = kube::Api::namespaced(client, &account.namespace);
    let request = TokenRequest { spec: Some(spec), ..TokenRequest::default() };
    let (params, what) =
        (PostParams::default(), format!("request a token of service account {account}"));
    let mut backoff = Backoff::new(Duration::from_millis(20), Duration::from_millis(500));
    let mut refusals = 0;
    loop {
        let answer = accounts.create_token_request(&account.name, &params, &request);
        match api::timed(&what, REQUEST_TIMEOUT, answer).await {
            Ok(answer) => return Ok(answer.status.unwrap_or_default()),
            // The Node authorizer learns of a new pod a moment after we do.
            Err(error) if error.code() == Some(403) && refusals < TOKEN_REFUSALS => {
                refusals += 1;
                tokio::time::sleep(backoff.next_delay()).await;
            }
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_renewed_in_the_last_fifth_of_their_life() {
        assert!(!must_renew(3600, 3600, 0));
        assert!(!must_renew(3600, 3600, 2879));
        assert!(must_renew(3600, 3600, 2881));
        assert!(must_renew(3600, 3600, 9999));
    }

    #[test]
    fn token_keys_tell_pods_apart() {
        let account = NamespacedName::new("n", "sa");
        let spec = |uid: &str| TokenRequestSpec {
            audiences: Some(vec!["a\"b".to_owned()]),
            expiration_seconds: Some(3607),
            bound_object_ref: Some(k8s_openapi::api::authentication::v1::BoundObjectReference {
                uid: Some(uid.to_owned()),
                ..Default::default()
            }),
        };
        assert_eq!(token_key(&account, &spec("u1")), "n/sa/3607/a_b/u1");
        assert_ne!(token_key(&account, &spec("u1")), token_key(&account, &spec("u2")));
    }
}
