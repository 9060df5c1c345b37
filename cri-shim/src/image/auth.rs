//! Registry credentials as the CRI hands them over.

use base64::Engine;
use oci_client::{Reference, secrets::RegistryAuth};
use serde::Deserialize;

use super::{ImageError, ImageReference};
use crate::api::AuthConfig;

/// What to log in with.
#[derive(Clone)]
pub(crate) enum Credentials {
    Ready(RegistryAuth),
    /// An OAuth2 refresh token, to be exchanged for an access token.
    Identity(String),
}

/// Credentials for `host`, of those in `auth`. Ones made for another server are not sent.
///
/// # Errors
/// [`ImageError::Unauthorized`] for a malformed `auth` field.
pub(crate) fn credentials(
    auth: Option<&AuthConfig>,
    reference: &ImageReference,
    host: &str,
) -> Result<Credentials, ImageError> {
    let anonymous = Ok(Credentials::Ready(RegistryAuth::Anonymous));
    let Some(auth) = auth else {
        return anonymous;
    };
    if !auth.server_address.is_empty() && server_name(&auth.server_address) != server_name(host) {
        return anonymous;
    }
    if !auth.registry_token.is_empty() {
        return Ok(Credentials::Ready(RegistryAuth::Bearer(auth.registry_token.clone())));
    }
    if !auth.identity_token.is_empty() {
        return Ok(Credentials::Identity(auth.identity_token.clone()));
    }
    if !auth.username.is_empty() {
        let basic = RegistryAuth::Basic(auth.username.clone(), auth.password.clone());
        return Ok(Credentials::Ready(basic));
    }
    if auth.auth.is_empty() {
        return anonymous;
    }
    let decoded = base64::engine::general_purpose::STANDARD
        .decode(auth.auth.trim())
        .ok()
        .and_then(|bytes| String::from_utf8(bytes).ok());
    match decoded.as_deref().and_then(|text| text.split_once(':')) {
        Some((user, password)) => Ok(Credentials::Ready(RegistryAuth::Basic(
            user.to_owned(),
            password.trim_matches('\0').to_owned(),
        ))),
        None => Err(ImageError::Unauthorized {
            reference: reference.to_string(),
            reason: "the credentials' auth field is not base64 of user:password".to_owned(),
        }),
    }
}

/// The host of an address as `docker login` writes it; Docker Hub has several names.
fn server_name(address: &str) -> &str {
    let rest = address.split_once("://").map_or(address, |(_, rest)| rest);
    match rest.split('/').next().unwrap_or(rest) {
        "index.docker.io" | "registry-1.docker.io" => "docker.io",
        host => host,
    }
}

#[derive(Deserialize)]
struct TokenAnswer {
    #[serde(default)]
    access_token: String,
    #[serde(default)]
    token: String,
}

/// Exchanges a refresh token for an access token to pull `reference`
/// (distribution "oauth2 token authentication").
///
/// # Errors
/// The reason, without the token.
pub(crate) async fn exchange(
    http: &reqwest::Client,
    base: &str,
    reference: &Reference,
    identity: &str,
) -> Result<RegistryAuth, String> {
    let text = |error: reqwest::Error| error.without_url().to_string();
    let answer = http.get(format!("{base}/v2/")).send().await.map_err(text)?;
    let challenge = answer
        .headers()
        .get("www-authenticate")
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    let Some(realm) = parameter(challenge, "realm") else {
        return Err("the registry names no token service for the identity token".to_owned());
    };
    let scope = format!("repository:{}:pull", reference.repository());
    let service = parameter(challenge, "service").unwrap_or_default();
    let form: String = [
        ("grant_type", "refresh_token"),
        ("client_id", "longshore"),
        ("service", service),
        ("scope", &scope),
        ("refresh_token", identity),
    ]
    .iter()
    .map(|(key, value)| format!("{key}={}", escape(value)))
    .collect::<Vec<_>>()
    .join("&");
    let answer = http
        .post(realm)
        .header("content-type", "application/x-www-form-urlencoded")
        .body(form)
        .send()
        .await
        .map_err(text)?;
    if !answer.status().is_success() {
        return Err(format!("the token service answered {}", answer.status()));
    }
    let answer: TokenAnswer =
        serde_json::from_slice(&answer.bytes().await.map_err(text)?).map_err(|e| e.to_string())?;
    let token = if answer.access_token.is_empty() { answer.token } else { answer.access_token };
    if token.is_empty() {
        return Err("the token service gave no token".to_owned());
    }
    Ok(RegistryAuth::Bearer(token))
}

/// A quoted parameter of a `WWW-Authenticate: Bearer` header.
fn parameter<'a>(challenge: &'a str, name: &str) -> Option<&'a str> {
    let rest = challenge.strip_prefix("Bearer ")?;
    rest.split(',')
        .find_map(|part| part.trim().strip_prefix(name)?.strip_prefix("=\"")?.strip_suffix('"'))
}

fn escape(text: &str) -> String {
    text.bytes()
        .map(|b| match b {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                char::from(b).to_string()
            }
            b => format!("%{b:02X}"),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ready(auth: AuthConfig, host: &str) -> Result<RegistryAuth, ImageError> {
        let reference = ImageReference::parse("busybox").unwrap();
        credentials(Some(&auth), &reference, host).map(|found| match found {
            Credentials::Ready(auth) => auth,
            Credentials::Identity(token) => RegistryAuth::Bearer(format!("identity {token}")),
        })
    }

    #[test]
    fn every_form_of_credentials_is_understood() {
        let basic = RegistryAuth::Basic("u".to_owned(), "p:q".to_owned());
        let user = AuthConfig {
            username: "u".to_owned(),
            password: "p:q".to_owned(),
            ..Default::default()
        };
        assert_eq!(ready(user.clone(), "quay.io").unwrap(), basic);
        let encoded = AuthConfig { auth: "dTpwOnE=".to_owned(), ..Default::default() };
        assert_eq!(ready(encoded, "quay.io").unwrap(), basic);
        let broken = AuthConfig { auth: "???".to_owned(), ..Default::default() };
        assert!(ready(broken, "quay.io").is_err());
        let token = AuthConfig { registry_token: "t".to_owned(), ..user.clone() };
        assert_eq!(ready(token, "quay.io").unwrap(), RegistryAuth::Bearer("t".to_owned()));
        let identity = AuthConfig { identity_token: "i".to_owned(), ..Default::default() };
        assert_eq!(ready(identity, "x").unwrap(), RegistryAuth::Bearer("identity i".to_owned()));
        for (server, host, same) in [
            ("https://index.docker.io/v1/", "registry-1.docker.io", true),
            ("quay.io", "quay.io", true),
            ("https://quay.io", "mirror.lan:5000", false),
            ("mirror.lan:5000", "mirror.lan", false),
        ] {
            let auth = AuthConfig { server_address: server.to_owned(), ..user.clone() };
            let got = ready(auth, host).unwrap();
            assert_eq!(got == basic, same, "{server} {host}");
        }
    }

    #[test]
    fn challenges_are_read() {
        let challenge = r#"Bearer realm="https://a/t?x=1",service="s",scope="q""#;
        assert_eq!(parameter(challenge, "realm"), Some("https://a/t?x=1"));
        assert_eq!(parameter(challenge, "service"), Some("s"));
        assert_eq!(parameter("Basic realm=\"x\"", "realm"), None);
        assert_eq!(escape("a+b/=é"), "a%2Bb%2F%3D%C3%A9");
    }
}
