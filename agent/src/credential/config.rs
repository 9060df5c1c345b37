//! `CredentialProviderConfig` (`kubelet.config.k8s.io`): which programs are asked for credentials, and
//! for which images. Pure: files are read by `load`.

use std::collections::BTreeSet;
use std::time::Duration;

use serde::Deserialize;
use serde_json::Value;

use super::glob;
use super::protocol::Version;
use crate::config::is_dns1123_subdomain;
use crate::standalone::yaml;

/// By what an answer to a token is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheType {
    /// For the service account.
    ServiceAccount,
    /// For that very token.
    Token,
}

/// What a program is told of the pod's service account.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenAttributes {
    /// Audience of the token.
    pub audience: String,
    /// By what answers are kept.
    pub cache_type: CacheType,
    /// Whether pods without an account are no business of the program.
    pub require_account: bool,
    /// Annotations without which the program is not asked.
    pub required: Vec<String>,
    /// Annotations that it is told if they are there.
    pub optional: Vec<String>,
}

/// A program that knows credentials.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Provider {
    /// Its name, and its file's in the folder of programs.
    pub name: String,
    /// Images that it is asked for.
    pub match_images: Vec<String>,
    /// How long an answer is kept that does not say.
    pub default_cache: Duration,
    /// The protocol it speaks.
    pub version: Version,
    /// Arguments.
    pub args: Vec<String>,
    /// Variables beside the node's own.
    pub env: Vec<(String, String)>,
    /// Whether it is told of service accounts.
    pub token: Option<TokenAttributes>,
}

/// As it is written, but for `tokenAttributes`, which only v1 has.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Written {
    #[serde(default)]
    name: String,
    #[serde(default)]
    match_images: Option<Vec<String>>,
    default_cache_duration: Option<kube::core::Duration>,
    #[serde(default)]
    api_version: String,
    args: Option<Vec<String>>,
    env: Option<Vec<WrittenVariable>>,
    token_attributes: Option<WrittenAttributes>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenVariable {
    #[serde(default)]
    name: String,
    #[serde(default)]
    value: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct WrittenAttributes {
    #[serde(default)]
    service_account_token_audience: String,
    #[serde(default)]
    cache_type: String,
    require_service_account: Option<bool>,
    required_service_account_annotation_keys: Option<Vec<String>>,
    optional_service_account_annotation_keys: Option<Vec<String>>,
}

/// The providers of one file's text.
///
/// # Errors
/// Everything that is wrong with them, by field.
pub fn decode(text: &[u8], tokens: bool) -> Result<Vec<Provider>, Vec<String>> {
    let mut documents = yaml::documents(text).into_iter();
    let one = |error: &str| vec![error.to_owned()];
    let (Some(document), None) = (documents.next(), documents.next()) else {
        return Err(one("must hold one document of kind CredentialProviderConfig"));
    };
    let value = document.value.map_err(|error| vec![error.to_string()])?;
    let text_of = |name: &str| value.get(name).and_then(Value::as_str).unwrap_or_default();
    if text_of("kind") != "CredentialProviderConfig" {
        let kind = text_of("kind");
        return Err(vec![format!("kind is {kind:?}; expected CredentialProviderConfig")]);
    }
    let newest = match text_of("apiVersion") {
        "kubelet.config.k8s.io/v1" => true,
        "kubelet.config.k8s.io/v1beta1" | "kubelet.config.k8s.io/v1alpha1" => false,
        other => {
            return Err(vec![format!(
                "apiVersion {other:?} is unknown; use kubelet.config.k8s.io/v1 (v1beta1 and v1alpha1 \
                 are taken too)"
            )]);
        }
    };
    let fields = value.as_object().into_iter().flat_map(|fields| fields.keys());
    let known = ["kind", "apiVersion", "providers"];
    let mut wrong: Vec<String> = fields
        .filter(|name| !known.contains(&name.as_str()))
        .map(|name| format!("unknown field {name:?}"))
        .collect();
    let providers = match value.get("providers") {
        Some(Value::Array(providers)) if !providers.is_empty() => providers.as_slice(),
        None | Some(Value::Null | Value::Array(_)) => {
            wrong.push("providers: at least one is required".to_owned());
            &[]
        }
        Some(_) => {
            wrong.push("providers: must be a list".to_owned());
            &[]
        }
    };
    let mut read = Vec::new();
    for (index, written) in providers.iter().enumerate() {
        let place = format!("providers[{index}]");
        // Fields are told by name; values may be secrets given to the program.
        let tracked = serde_path_to_error::deserialize::<_, Written>(written);
        match tracked {
            Ok(written) if written.token_attributes.is_some() && !newest => wrong.push(format!(
                "{place}: unknown field \"tokenAttributes\" (only kubelet.config.k8s.io/v1 has it)"
            )),
            Ok(written) => match provider(written, tokens) {
                Ok(provider) => read.push(provider),
                Err(errors) => {
                    wrong.extend(errors.into_iter().map(|error| format!("{place}.{error}")));
                }
            },
            Err(error) => {
                let (path, cause) = (error.path().to_string(), error.inner().to_string());
                let cause = match cause.split_once(", expected") {
                    Some((_, expected)) if cause.starts_with("invalid") => {
                        format!("expected{expected}")
                    }
                    _ => cause,
                };
                let path = if path == "." { String::new() } else { format!(".{path}") };
                wrong.push(format!("{place}{path}: {cause}"));
            }
        }
    }
    if wrong.is_empty() { Ok(read) } else { Err(wrong) }
}

fn provider(written: Written, tokens: bool) -> Result<Provider, Vec<String>> {
    let mut wrong = Vec::new();
    let name = written.name;
    if name.is_empty() {
        wrong.push("name: required: the program's file in the folder of providers".to_owned());
    } else if name.contains(['/', ' ', '\0']) || name == "." || name == ".." {
        wrong.push(format!("name: {name:?} must be a file's name without '/' and spaces"));
    }
    let version = Version::parse(&written.api_version);
    if version.is_none() {
        wrong.push(format!(
            "apiVersion: {:?} is not supported; use credentialprovider.kubelet.k8s.io/v1, v1beta1 or \
             v1alpha1, whichever the program speaks",
            written.api_version
        ));
    }
    let match_images = written.match_images.unwrap_or_default();
    if match_images.is_empty() {
        wrong.push("matchImages: at least one is required".to_owned());
    }
    for pattern in &match_images {
        if let Err(reason) = glob::check(pattern) {
            wrong.push(format!("matchImages: {pattern:?} {reason}"));
        }
    }
    let default_cache = match written.default_cache_duration {
        Some(given) if !given.is_negative() => given.into(),
        Some(_) => {
            wrong.push("defaultCacheDuration: must not be negative".to_owned());
            Duration::ZERO
        }
        None => {
            wrong.push("defaultCacheDuration: required, such as 12h".to_owned());
            Duration::ZERO
        }
    };
    let env: Vec<(String, String)> =
        written.env.unwrap_or_default().into_iter().map(|v| (v.name, v.value)).collect();
    if env
        .iter()
        .any(|(name, value)| name.is_empty() || name.contains(['=', '\0']) || value.contains('\0'))
    {
        wrong.push("env: a name is empty, or has a '=' in it".to_owned());
    }
    let args = written.args.unwrap_or_default();
    if args.iter().any(|arg| arg.contains('\0')) {
        wrong.push("args: must not hold a NUL".to_owned());
    }
    let token = match written.token_attributes {
        None => None,
        Some(_) if !tokens => {
            wrong.push(
                "tokenAttributes: the feature gate KubeletServiceAccountTokenForCredentialProviders is \
                 set to false"
                    .to_owned(),
            );
            None
        }
        Some(_) if version.is_some_and(|version| version != Version::V1) => {
            wrong.push(format!("tokenAttributes: needs apiVersion {}", Version::V1.as_str()));
            None
        }
        Some(written) => match attributes(written) {
            Ok(token) => Some(token),
            Err(errors) => {
                wrong.extend(errors.into_iter().map(|error| format!("tokenAttributes.{error}")));
                None
            }
        },
    };
    match (version, wrong.is_empty()) {
        (Some(version), true) => {
            Ok(Provider { name, match_images, default_cache, version, args, env, token })
        }
        _ => Err(wrong),
    }
}

fn attributes(written: WrittenAttributes) -> Result<TokenAttributes, Vec<String>> {
    let mut wrong = Vec::new();
    let audience = written.service_account_token_audience;
    if audience.is_empty() {
        wrong.push("serviceAccountTokenAudience: required".to_owned());
    }
    let cache_type = match written.cache_type.as_str() {
        "ServiceAccount" => CacheType::ServiceAccount,
        "Token" => CacheType::Token,
        other => {
            wrong.push(format!("cacheType: {other:?}; use ServiceAccount or Token"));
            CacheType::Token
        }
    };
    let require_account = written.require_service_account.unwrap_or_else(|| {
        wrong.push("requireServiceAccount: required".to_owned());
        false
    });
    let required = written.required_service_account_annotation_keys.unwrap_or_default();
    let optional = written.optional_service_account_annotation_keys.unwrap_or_default();
    if !require_account && !required.is_empty() {
        wrong.push(
            "requiredServiceAccountAnnotationKeys: needs requireServiceAccount: true".to_owned(),
        );
    }
    let mut seen = BTreeSet::new();
    for (field, keys) in [
        ("requiredServiceAccountAnnotationKeys", &required),
        ("optionalServiceAccountAnnotationKeys", &optional),
    ] {
        for key in keys {
            if !is_qualified(&key.to_lowercase()) {
                wrong.push(format!("{field}: {key:?} is no key of an annotation"));
            } else if !seen.insert(key) {
                wrong.push(format!("{field}: {key:?} is there twice"));
            }
        }
    }
    match wrong.is_empty() {
        true => Ok(TokenAttributes { audience, cache_type, require_account, required, optional }),
        false => Err(wrong),
    }
}

/// `[prefix/]name`, as labels and annotations are named.
fn is_qualified(key: &str) -> bool {
    let (prefix, name) = key.split_once('/').map_or((None, key), |(p, n)| (Some(p), n));
    let edge = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
    prefix.is_none_or(is_dns1123_subdomain)
        && name.len() <= 63
        && edge(name.chars().next())
        && edge(name.chars().last())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ECR: &str = r#"
apiVersion: kubelet.config.k8s.io/v1
kind: CredentialProviderConfig
providers:
  - name: ecr-credential-provider
    matchImages: ["*.dkr.ecr.*.amazonaws.com", "public.ecr.aws:443/x"]
    defaultCacheDuration: 12h
    apiVersion: credentialprovider.kubelet.k8s.io/v1
    args: [get-credentials]
    env: [{name: AWS_PROFILE, value: p}]
    tokenAttributes:
      serviceAccountTokenAudience: sts
      cacheType: ServiceAccount
      requireServiceAccount: true
      requiredServiceAccountAnnotationKeys: [eks.amazonaws.com/Role-arn]
"#;

    fn errors(text: &str) -> String {
        decode(text.as_bytes(), true).unwrap_err().join("; ")
    }

    #[test]
    fn a_configuration_is_read() {
        let read = decode(ECR.as_bytes(), true).unwrap().remove(0);
        assert_eq!(read.default_cache, Duration::from_secs(12 * 3600));
        assert_eq!(read.env, [("AWS_PROFILE".to_owned(), "p".to_owned())]);
        let token = read.token.unwrap();
        assert_eq!((token.cache_type, token.require_account), (CacheType::ServiceAccount, true));
        let older =
            ECR.split("    tokenAttributes").next().unwrap().replace("io/v1\n", "io/v1beta1\n");
        let read = decode(older.as_bytes(), true).unwrap().remove(0);
        assert_eq!((read.version, read.token), (Version::V1Beta1, None));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (from, to, said) in [
            ("matchImages:", "matchImage:", "providers[0].matchImage: unknown field `matchImage`"),
            ("kind: Cred", "kind: X", "kind is \"XentialProviderConfig\""),
            ("config.k8s.io/v1\n", "config.k8s.io/v2\n", "apiVersion \"kubelet.config.k8s.io/v2\""),
            ("    args: [get-credentials]", "    args: {a: secret}", "providers[0].args: expected"),
            ("    defaultCacheDuration: 12h\n", "", "providers[0].defaultCacheDuration: required"),
            ("12h", "-1s", "defaultCacheDuration: must not be negative"),
            ("name: ecr-", "name: ../ecr-", "providers[0].name: \"../ecr-"),
            ("provider.kubelet.k8s.io/v1", "provider.kubelet.k8s.io/v3", "providers[0].apiVersion"),
            (
                "provider.kubelet.k8s.io/v1",
                "provider.kubelet.k8s.io/v1beta1",
                "tokenAttributes: needs",
            ),
            ("*.dkr.ecr", "https://dkr.ecr", "must not have a scheme"),
            ("cacheType: ServiceAccount", "cacheType: Pod", "tokenAttributes.cacheType: \"Pod\""),
            ("      requireServiceAccount: true\n", "", "requireServiceAccount: required"),
            (
                "requireServiceAccount: true",
                "requireServiceAccount: false",
                "needs requireServiceAccount",
            ),
            ("Role-arn]", "Role-arn, a//b]", "\"a//b\" is no key"),
            ("Role-arn]", "Role-arn, eks.amazonaws.com/Role-arn]", "is there twice"),
            (
                "serviceAccountTokenAudience: sts",
                "serviceAccountTokenAudience: ''",
                "Audience: required",
            ),
            ("providers:", "extra: 1\nproviders:", "unknown field \"extra\""),
        ] {
            assert!(ECR.contains(from), "{from}");
            let said_is = errors(&ECR.replacen(from, to, 1));
            assert!(said_is.contains(said), "{from} -> {to}: {said_is}");
            assert!(!said_is.contains("secret"), "{said_is}");
        }
        let none = ECR.split("providers:").next().unwrap();
        assert!(errors(none).contains("providers: at least one"));
        let twice = format!("{none}providers: []\n---\n{ECR}");
        assert!(errors(&twice).contains("one document"), "{}", errors(&twice));
        let older = ECR.replacen("config.k8s.io/v1\n", "config.k8s.io/v1beta1\n", 1);
        assert!(errors(&older).contains("unknown field \"tokenAttributes\""), "{}", errors(&older));
        let gate = decode(ECR.as_bytes(), false).unwrap_err().join("; ");
        assert!(gate.contains("KubeletServiceAccountTokenForCredentialProviders"), "{gate}");
    }
}
