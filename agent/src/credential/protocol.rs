//! What is said to a credential provider's program and what it answers
//! (`credentialprovider.kubelet.k8s.io`). Pure. No error repeats anything of an answer's values, as
//! any of them may be a secret.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use serde_json::{Map, Value, json};

/// The protocol's version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// `credentialprovider.kubelet.k8s.io/v1`.
    V1,
    /// `.../v1beta1`.
    V1Beta1,
    /// `.../v1alpha1`.
    V1Alpha1,
}

impl Version {
    /// As in `apiVersion`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::V1 => "credentialprovider.kubelet.k8s.io/v1",
            Self::V1Beta1 => "credentialprovider.kubelet.k8s.io/v1beta1",
            Self::V1Alpha1 => "credentialprovider.kubelet.k8s.io/v1alpha1",
        }
    }

    /// The version that is so written.
    pub fn parse(text: &str) -> Option<Self> {
        [Self::V1, Self::V1Beta1, Self::V1Alpha1].into_iter().find(|v| v.as_str() == text)
    }
}

/// What of the pod's service account a program is told.
#[derive(Clone, Default)]
pub struct AccountFacts {
    /// A token bound to the pod, for the audience that was configured.
    pub token: String,
    /// The annotations that were asked for.
    pub annotations: BTreeMap<String, String>,
}

/// What an answer is good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheScope {
    /// This image, whatever its tag.
    Image,
    /// All images of its registry.
    Registry,
    /// All images.
    Global,
}

/// User and password.
#[derive(Clone, PartialEq, Eq)]
pub struct Login {
    /// `username`.
    pub username: String,
    /// `password`.
    pub password: String,
}

/// Logins by the images they are for.
pub type Logins = BTreeMap<String, Login>;

/// What a program answered.
#[derive(Clone, PartialEq, Eq)]
pub struct Response {
    /// For which images it may be used again.
    pub scope: CacheScope,
    /// For how long; `None` is what the configuration says.
    pub cache: Option<Duration>,
    /// The logins.
    pub logins: Logins,
}

impl fmt::Debug for Response {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Response({:?}, {:?}, {} logins)", self.scope, self.cache, self.logins.len())
    }
}

/// The request for `image`, a line of JSON.
pub fn encode_request(version: Version, image: &str, account: Option<&AccountFacts>) -> Vec<u8> {
    let mut request = json!({
        "kind": "CredentialProviderRequest",
        "apiVersion": version.as_str(),
        "image": image,
    });
    if let Some(account) = account {
        request["serviceAccountToken"] = account.token.clone().into();
        if !account.annotations.is_empty() {
            request["serviceAccountAnnotations"] = json!(account.annotations);
        }
    }
    let mut bytes = request.to_string().into_bytes();
    bytes.push(b'\n');
    bytes
}

/// Reads an answer.
///
/// # Errors
/// What of it is wrong, without any value of it.
pub fn decode_response(version: Version, bytes: &[u8]) -> Result<Response, String> {
    if bytes.iter().all(u8::is_ascii_whitespace) {
        return Err("nothing was answered".to_owned());
    }
    let value: Value = serde_json::from_slice(bytes).map_err(|error| {
        // Where, and not what.
        format!("no JSON (line {}, column {})", error.line(), error.column())
    })?;
    let Value::Object(fields) = value else { return Err("no JSON object".to_owned()) };
    let text = |name: &str| fields.get(name).and_then(Value::as_str).unwrap_or_default();
    let asked = version.as_str();
    if text("apiVersion") != asked {
        return Err(format!("apiVersion is not {asked}, in which it was asked"));
    }
    if text("kind") != "CredentialProviderResponse" {
        return Err("kind is not CredentialProviderResponse".to_owned());
    }
    known("", &fields, &["apiVersion", "kind", "cacheKeyType", "cacheDuration", "auth"])?;
    let scope = match text("cacheKeyType") {
        "Image" => CacheScope::Image,
        "Registry" => CacheScope::Registry,
        "Global" => CacheScope::Global,
        _ => return Err("cacheKeyType is none of Image, Registry, Global".to_owned()),
    };
    let cache = match fields.get("cacheDuration") {
        None | Some(Value::Null) => None,
        Some(value) => {
            let given: kube::core::Duration = serde_json::from_value(value.clone())
                .map_err(|_| "cacheDuration is no duration such as 10m".to_owned())?;
            Some(if given.is_negative() { Duration::ZERO } else { given.into() })
        }
    };
    let logins = match fields.get("auth") {
        None | Some(Value::Null) => Logins::new(),
        Some(Value::Object(auth)) => auth
            .iter()
            .map(|(image, login)| Ok((image.clone(), self::login(login)?)))
            .collect::<Result<_, String>>()?,
        Some(_) => return Err("auth is no object".to_owned()),
    };
    Ok(Response { scope, cache, logins })
}

fn login(value: &Value) -> Result<Login, String> {
    let Value::Object(fields) = value else {
        return Err("a value of auth is no object".to_owned());
    };
    known("auth.", fields, &["username", "password"])?;
    let text = |name: &str| match fields.get(name) {
        None | Some(Value::Null) => Ok(String::new()),
        Some(Value::String(text)) => Ok(text.clone()),
        Some(_) => Err(format!("auth: {name} is no string")),
    };
    Ok(Login { username: text("username")?, password: text("password")? })
}

/// Field names tell of no secret; they are cut short all the same.
fn known(place: &str, fields: &Map<String, Value>, names: &[&str]) -> Result<(), String> {
    match fields.keys().find(|name| !names.contains(&name.as_str())) {
        None => Ok(()),
        Some(name) => {
            let short: String = name.chars().take(40).collect();
            Err(format!("unknown field {:?}", format!("{place}{short}")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(fields: Value) -> Vec<u8> {
        let mut all = json!({"kind": "CredentialProviderResponse",
            "apiVersion": Version::V1.as_str(), "cacheKeyType": "Registry"});
        for (name, value) in fields.as_object().unwrap() {
            all[name] = value.clone();
        }
        all.to_string().into_bytes()
    }

    #[test]
    fn requests_are_as_programs_expect_them() {
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        assert_eq!(
            text(encode_request(Version::V1Beta1, "r.io/a", None)),
            "{\"apiVersion\":\"credentialprovider.kubelet.k8s.io/v1beta1\",\"image\":\"r.io/a\",\
             \"kind\":\"CredentialProviderRequest\"}\n"
        );
        let account =
            AccountFacts { token: "t".into(), annotations: [("a/b".into(), "c".into())].into() };
        let asked = text(encode_request(Version::V1, "r.io/a", Some(&account)));
        assert!(asked.contains("\"serviceAccountAnnotations\":{\"a/b\":\"c\"}"), "{asked}");
        assert!(asked.contains("\"serviceAccountToken\":\"t\""), "{asked}");
    }

    #[test]
    fn answers_are_read() {
        let read = decode_response(
            Version::V1,
            &answer(json!({"cacheDuration": "10m", "auth": {
                "*.r.io": {"username": "u", "password": "p"}}})),
        )
        .unwrap();
        assert_eq!(
            (read.scope, read.cache),
            (CacheScope::Registry, Some(Duration::from_secs(600)))
        );
        assert!(read.logins["*.r.io"].username == "u" && read.logins["*.r.io"].password == "p");
        let bare = decode_response(Version::V1, &answer(json!({"cacheDuration": null}))).unwrap();
        assert!(bare.cache.is_none() && bare.logins.is_empty());
        let never = decode_response(Version::V1, &answer(json!({"cacheDuration": "-1s"}))).unwrap();
        assert_eq!(never.cache, Some(Duration::ZERO));
        assert_eq!(format!("{read:?}"), "Response(Registry, Some(600s), 1 logins)");
    }

    #[test]
    fn bad_answers_are_told_without_their_values() {
        let secret = "hunter2";
        let unknown = json!({"auth": {"r.io": {"user": secret, "password": secret}}});
        for (bytes, said) in [
            (b"".to_vec(), "nothing was answered"),
            (format!("{{\"auth\": \"{secret}").into_bytes(), "no JSON (line 1"),
            (format!("[\"{secret}\"]").into_bytes(), "no JSON object"),
            (answer(json!({"apiVersion": "v2"})), "apiVersion is not credentialprovider"),
            (answer(json!({"kind": secret})), "kind is not"),
            (answer(json!({"cacheKeyType": secret})), "cacheKeyType is none of"),
            (answer(json!({"cacheDuration": secret})), "cacheDuration is no duration"),
            (answer(json!({"auth": secret})), "auth is no object"),
            (answer(json!({"auth": {"r.io": secret}})), "a value of auth"),
            (answer(json!({"auth": {"r.io": {"password": [secret]}}})), "password is no string"),
            (answer(unknown), "unknown field \"auth.user\""),
            (answer(json!({"cacheDuratoin": "1m"})), "unknown field \"cacheDuratoin\""),
        ] {
            let error = decode_response(Version::V1, &bytes).unwrap_err();
            assert!(error.contains(said) && !error.contains(secret), "{said}: {error}");
        }
        assert!(decode_response(Version::V1Beta1, &answer(json!({}))).is_err());
    }
}
