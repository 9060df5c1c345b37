//! Registry credentials as the CRI hands them over, and what registries ask for them: basic
//! authentication, or a token from a token service (distribution "token authentication").

use std::time::{Duration, Instant};

use base64::Engine;
use reqwest::header::{HeaderMap, HeaderValue, WWW_AUTHENTICATE};
use serde::Deserialize;

use crate::api::AuthConfig;

/// How long a token lives whose service does not say (distribution "token authentication").
const TOKEN_LIFE: Duration = Duration::from_secs(60);
/// A token is renewed so long before its end, for the request it is sent with to arrive.
const LEEWAY: Duration = Duration::from_secs(5);

/// What to log in with. Not `Debug`: it must not get into a log.
#[derive(Clone, PartialEq, Eq)]
pub(super) enum Credentials {
    Anonymous,
    Basic {
        user: String,
        password: String,
    },
    /// A token for the registry itself.
    Bearer(String),
    /// An OAuth2 refresh token, to be exchanged for an access token.
    Identity(String),
}

impl Credentials {
    /// The credentials for `host`, of those in `auth`. Ones made for another server are not sent.
    ///
    /// # Errors
    /// The reason, for a malformed `auth` field.
    pub(super) fn of(auth: Option<&AuthConfig>, host: &str) -> Result<Self, String> {
        let Some(auth) = auth else {
            return Ok(Self::Anonymous);
        };
        let server = &auth.server_address;
        if !server.is_empty() && server_name(server) != server_name(host) {
            return Ok(Self::Anonymous);
        }
        if !auth.registry_token.is_empty() {
            return Ok(Self::Bearer(auth.registry_token.clone()));
        }
        // A password is good for either kind of challenge, an identity token for one.
        let password = !auth.password.is_empty() || auth.identity_token.is_empty();
        if !auth.username.is_empty() && password {
            let (user, password) = (auth.username.clone(), auth.password.clone());
            return Ok(Self::Basic { user, password });
        }
        if !auth.identity_token.is_empty() {
            return Ok(Self::Identity(auth.identity_token.clone()));
        }
        if auth.auth.is_empty() {
            return Ok(Self::Anonymous);
        }
        let decoded = base64::engine::general_purpose::STANDARD
            .decode(auth.auth.trim())
            .ok()
            .and_then(|bytes| String::from_utf8(bytes).ok());
        match decoded.as_deref().and_then(|text| text.split_once(':')) {
            Some((user, password)) => Ok(Self::Basic {
                user: user.to_owned(),
                password: password.trim_matches('\0').to_owned(),
            }),
            None => Err("the credentials' auth field is not base64 of user:password".to_owned()),
        }
    }

    /// The `Authorization` header that needs no token service.
    pub(super) fn header(&self) -> Option<HeaderValue> {
        match self {
            Self::Basic { user, password } => {
                let text = format!("{user}:{password}");
                let text = base64::engine::general_purpose::STANDARD.encode(text);
                secret(&format!("Basic {text}"))
            }
            Self::Bearer(token) => secret(&format!("Bearer {token}")),
            Self::Anonymous | Self::Identity(_) => None,
        }
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

fn secret(text: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_str(text).ok()?;
    value.set_sensitive(true);
    Some(value)
}

/// What a registry wants with a request (RFC 9110 section 11.6.1).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Challenge {
    Basic,
    Bearer(TokenService),
}

/// Where tokens come from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct TokenService {
    pub(super) realm: String,
    service: Option<String>,
    scope: Option<String>,
}

/// The first challenge of `headers` that can be met; a token is preferred to sending a password
/// with every request.
pub(super) fn challenge(headers: &HeaderMap) -> Option<Challenge> {
    let all: Vec<Challenge> = headers
        .get_all(WWW_AUTHENTICATE)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(read_challenges)
        .collect();
    let bearer = all.iter().find(|challenge| matches!(challenge, Challenge::Bearer(_)));
    bearer.or(all.first()).cloned()
}

/// Reads `Bearer realm="…",service="…", Basic realm="…"`.
fn read_challenges(text: &str) -> Vec<Challenge> {
    let mut challenges = Vec::new();
    let mut rest = text.trim_start_matches([' ', ',']);
    while !rest.is_empty() {
        // A word is a scheme's name, or a parameter's if `=` follows.
        let word = rest.find([' ', '=', ',']).unwrap_or(rest.len());
        let (name, behind) = rest.split_at(word);
        if let Some(value) = behind.strip_prefix('=') {
            let (value, behind) = parameter(value);
            if let Some(Challenge::Bearer(service)) = challenges.last_mut() {
                match name.to_ascii_lowercase().as_str() {
                    "realm" => service.realm = value,
                    "service" => service.service = Some(value),
                    "scope" => service.scope = Some(value),
                    _ => {}
                }
            }
            rest = behind;
        } else {
            match name.to_ascii_lowercase().as_str() {
                "bearer" => challenges.push(Challenge::Bearer(TokenService::default())),
                "basic" => challenges.push(Challenge::Basic),
                _ => {}
            }
            rest = behind;
        }
        rest = rest.trim_start_matches([' ', ',']);
        if word == 0 && rest.len() == behind.len() {
            break;
        }
    }
    challenges.retain(|challenge| match challenge {
        Challenge::Bearer(service) => !service.realm.is_empty(),
        Challenge::Basic => true,
    });
    challenges
}

/// A quoted or bare value, and what follows it.
fn parameter(text: &str) -> (String, &str) {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find([',', ' ']).unwrap_or(text.len());
        return (text[..end].to_owned(), &text[end..]);
    };
    let mut value = String::new();
    let mut escaped = false;
    for (at, c) in quoted.char_indices() {
        match c {
            '\\' if !escaped => escaped = true,
            '"' if !escaped => return (value, &quoted[at + 1..]),
            c => {
                escaped = false;
                value.push(c);
            }
        }
    }
    (value, "")
}

/// A request to a token service.
pub(super) struct TokenRequest {
    pub(super) url: reqwest::Url,
    pub(super) authorization: Option<HeaderValue>,
    /// A form to be posted; else it is a plain GET.
    pub(super) form: Option<String>,
}

impl TokenService {
    /// What to ask the service, to pull from `repository`.
    ///
    /// # Errors
    /// The reason, for a realm that is no address.
    pub(super) fn request(
        &self,
        credentials: &Credentials,
        repository: &str,
    ) -> Result<TokenRequest, String> {
        let mut url = reqwest::Url::parse(&self.realm).map_err(|error| {
            format!("its token service {:?} is no address: {error}", self.realm)
        })?;
        if !matches!(url.scheme(), "http" | "https") {
            return Err(format!("its token service {:?} is no web address", self.realm));
        }
        let own = format!("repository:{repository}:pull");
        let scopes: Vec<&str> = match &self.scope {
            Some(scope) if !scope.trim().is_empty() => scope.split_whitespace().collect(),
            _ => vec![&own],
        };
        let service = self.service.as_deref().unwrap_or_default();
        if let Credentials::Identity(token) = credentials {
            let fields = [
                ("grant_type", "refresh_token"),
                ("client_id", "longshore"),
                ("service", service),
                ("scope", &scopes.join(" ")),
                ("refresh_token", token),
            ];
            let form: Vec<_> =
                fields.iter().map(|(key, value)| format!("{key}={}", escape(value))).collect();
            return Ok(TokenRequest { url, authorization: None, form: Some(form.join("&")) });
        }
        {
            let mut query = url.query_pairs_mut();
            if !service.is_empty() {
                query.append_pair("service", service);
            }
            for scope in scopes {
                query.append_pair("scope", scope);
            }
        }
        let authorization = match credentials {
            Credentials::Basic { .. } => credentials.header(),
            _ => None,
        };
        Ok(TokenRequest { url, authorization, form: None })
    }
}

/// A token as it is sent, and when it ends.
#[derive(Clone)]
pub(super) struct Token {
    pub(super) header: HeaderValue,
    expires: Instant,
}

#[derive(Deserialize)]
struct TokenAnswer {
    #[serde(default)]
    access_token: String,
    #[serde(default)]
    token: String,
    #[serde(default)]
    expires_in: Option<u64>,
}

impl Token {
    /// Reads a token service's answer.
    ///
    /// # Errors
    /// The reason, without the token.
    pub(super) fn read(answer: &[u8], now: Instant) -> Result<Self, String> {
        // serde_json's own errors quote what they did not expect.
        let answer: TokenAnswer = serde_json::from_slice(answer)
            .map_err(|_| "the token service's answer is not the JSON expected".to_owned())?;
        let token = if answer.token.is_empty() { answer.access_token } else { answer.token };
        let header = secret(&format!("Bearer {token}")).filter(|_| !token.is_empty());
        let header = header.ok_or("the token service gave no token")?;
        // A year is as good as for ever, and fits every clock.
        let life = answer.expires_in.map_or(TOKEN_LIFE, |s| Duration::from_secs(s.min(31_536_000)));
        Ok(Self { header, expires: now + life })
    }

    pub(super) fn is_good(&self, now: Instant) -> bool {
        now + LEEWAY < self.expires
    }
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

    fn given(auth: AuthConfig, host: &str) -> Result<String, String> {
        Credentials::of(Some(&auth), host).map(|found| match found {
            Credentials::Anonymous => String::new(),
            Credentials::Basic { user, password } => format!("{user} {password}"),
            Credentials::Bearer(token) => format!("bearer {token}"),
            Credentials::Identity(token) => format!("identity {token}"),
        })
    }

    #[test]
    fn every_form_of_credentials_is_understood() {
        let user = AuthConfig {
            username: "u".to_owned(),
            password: "p:q".to_owned(),
            ..Default::default()
        };
        assert_eq!(given(user.clone(), "quay.io").unwrap(), "u p:q");
        let encoded = AuthConfig { auth: "dTpwOnE=".to_owned(), ..Default::default() };
        assert_eq!(given(encoded, "quay.io").unwrap(), "u p:q");
        let broken = AuthConfig { auth: "???".to_owned(), ..Default::default() };
        assert!(given(broken, "quay.io").is_err());
        let token = AuthConfig { registry_token: "t".to_owned(), ..user.clone() };
        assert_eq!(given(token, "quay.io").unwrap(), "bearer t");
        let identity = AuthConfig { identity_token: "i".to_owned(), ..Default::default() };
        assert_eq!(given(identity, "x").unwrap(), "identity i");
        let both = AuthConfig { identity_token: "i".to_owned(), ..user.clone() };
        assert_eq!(given(both.clone(), "x").unwrap(), "u p:q");
        let named = AuthConfig { password: String::new(), ..both };
        assert_eq!(given(named, "x").unwrap(), "identity i");
        for (server, host, same) in [
            ("https://index.docker.io/v1/", "registry-1.docker.io", true),
            ("quay.io", "quay.io", true),
            ("https://quay.io", "mirror.lan:5000", false),
            ("mirror.lan:5000", "mirror.lan", false),
        ] {
            let auth = AuthConfig { server_address: server.to_owned(), ..user.clone() };
            assert_eq!(given(auth, host).unwrap() == "u p:q", same, "{server} {host}");
        }
    }

    #[test]
    fn challenges_are_read() {
        let mut headers = HeaderMap::new();
        let bearer = r#"bearer realm="https://a/t?x=1,2",service="s", scope="q w""#;
        let service = TokenService {
            realm: "https://a/t?x=1,2".to_owned(),
            service: Some("s".to_owned()),
            scope: Some("q w".to_owned()),
        };
        headers.append(WWW_AUTHENTICATE, HeaderValue::from_static("Basic realm=\"x\""));
        assert_eq!(challenge(&headers), Some(Challenge::Basic));
        headers.append(WWW_AUTHENTICATE, HeaderValue::from_static(bearer));
        assert_eq!(challenge(&headers), Some(Challenge::Bearer(service.clone())));
        let both = format!("Negotiate, {bearer}, Basic realm=\"a \\\"b\", charset=UTF-8");
        assert_eq!(read_challenges(&both), [Challenge::Bearer(service.clone()), Challenge::Basic]);
        for nothing in ["", "Digest realm=\"x\"", "Bearer", "=", "==,,", "Bearer realm=", "a=\"b"] {
            assert_eq!(read_challenges(nothing), [], "{nothing}");
        }
    }

    #[test]
    fn token_services_are_asked_for_what_is_pulled() {
        let service = TokenService {
            realm: "https://auth.lan/token?x=1".to_owned(),
            service: Some("reg one".to_owned()),
            scope: None,
        };
        let basic = Credentials::Basic { user: "u".to_owned(), password: "p".to_owned() };
        let request = service.request(&basic, "team/app").unwrap();
        assert_eq!(
            request.url.as_str(),
            "https://auth.lan/token?x=1&service=reg+one&scope=repository%3Ateam%2Fapp%3Apull"
        );
        assert_eq!(request.authorization.unwrap().to_str().unwrap(), "Basic dTpw");
        let identity = Credentials::Identity("a+b/=é".to_owned());
        let request = service.request(&identity, "team/app").unwrap();
        assert_eq!(request.url.as_str(), service.realm);
        assert!(request.authorization.is_none());
        let form = request.form.unwrap();
        assert!(form.starts_with("grant_type=refresh_token&"), "{form}");
        assert!(form.ends_with("&refresh_token=a%2Bb%2F%3D%C3%A9"), "{form}");
        for realm in ["", "ftp://x", "/token", "file:///etc/passwd"] {
            let service = TokenService { realm: realm.to_owned(), ..service.clone() };
            assert!(service.request(&basic, "x").is_err(), "{realm}");
        }
    }

    #[test]
    fn tokens_end() {
        let now = Instant::now();
        let short = Token::read(br#"{"token":"a","expires_in":30}"#, now).unwrap();
        assert!(short.is_good(now) && !short.is_good(now + Duration::from_secs(26)));
        let unsaid = Token::read(br#"{"access_token":"b"}"#, now).unwrap();
        assert!(unsaid.header.is_sensitive() && !unsaid.is_good(now + TOKEN_LIFE));
        for (answer, want) in [
            (&br#"{"token":""}"#[..], "no token"),
            (br#"{"token":"a\nb"}"#, "no token"),
            (br#"{"token":["sesame"]}"#, "not the JSON"),
        ] {
            let error = Token::read(answer, now).err().unwrap();
            assert!(error.contains(want) && !error.contains("sesame"), "{error}");
        }
    }

    proptest::proptest! {
        #[test]
        fn reading_challenges_ends(text in r#"(Bearer|Basic|realm|scope|[ =,"\\a]){0,12}"#) {
            for challenge in read_challenges(&text) {
                if let Challenge::Bearer(service) = challenge {
                    proptest::prop_assert!(!service.realm.is_empty());
                }
            }
        }
    }
}
