//! What the node API is told: where it listens, with which certificate, whom it believes and what
//! they may do. Upstream's defaults: no anonymous requests, TokenReview and SubjectAccessReview.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use super::ConfigError;
use super::kubelet::KubeletConfiguration;

/// The oldest TLS that is spoken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlsVersion {
    /// TLS 1.2, and 1.3 for who speaks it.
    V12,
    /// TLS 1.3 only.
    V13,
}

/// The server's side of TLS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerTls {
    /// `tlsCertFile` and `tlsPrivateKeyFile`.
    pub files: Option<(PathBuf, PathBuf)>,
    /// `serverTLSBootstrap`: the certificate comes from the cluster, by request.
    pub bootstrap: bool,
    /// `tlsMinVersion`.
    pub min_version: TlsVersion,
    /// `tlsCipherSuites`, IANA names; empty is all that are safe.
    pub cipher_suites: Vec<String>,
    /// `tlsCurvePreferences`: numbers of key exchanges (IANA "TLS Supported Groups"); empty is all.
    pub curves: Vec<u16>,
}

/// Numbers that can be sent, each once.
fn curves(asked: &[i32]) -> Result<Vec<u16>, ConfigError> {
    let mut curves: Vec<u16> = Vec::new();
    for id in asked {
        match u16::try_from(*id) {
            Ok(curve @ 1..) if !curves.contains(&curve) => curves.push(curve),
            Ok(1..) => {
                let field = "KubeletConfiguration.tlsCurvePreferences";
                return Err(ConfigError::invalid(field, format!("{id} stands twice")));
            }
            _ => {
                let field = "KubeletConfiguration.tlsCurvePreferences";
                return Err(ConfigError::invalid(
                    field,
                    format!("{id} is not between 1 and 65535"),
                ));
            }
        }
    }
    Ok(curves)
}

/// Whom the node API believes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Authentication {
    /// `authentication.x509.clientCAFile`.
    pub client_ca: Option<PathBuf>,
    /// `authentication.webhook.enabled`: bearer tokens by TokenReview.
    pub webhook: bool,
    /// `authentication.webhook.cacheTTL`.
    pub cache_ttl: Duration,
    /// `authentication.anonymous.enabled`.
    pub anonymous: bool,
}

/// What they may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Authorization {
    /// Everything.
    AlwaysAllow,
    /// What SubjectAccessReview says.
    Webhook {
        /// `authorization.webhook.cacheAuthorizedTTL`.
        allowed_ttl: Duration,
        /// `authorization.webhook.cacheUnauthorizedTTL`.
        denied_ttl: Duration,
    },
}

/// The whole of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeApiConfig {
    /// `enableServer`.
    pub enabled: bool,
    /// `address` and `port`.
    pub address: SocketAddr,
    /// `readOnlyPort`, only if asked for.
    pub read_only: Option<SocketAddr>,
    /// The certificate and what is spoken.
    pub tls: ServerTls,
    /// Who is who.
    pub authentication: Authentication,
    /// Who may do what.
    pub authorization: Authorization,
    /// `enableDebuggingHandlers`: logs, exec, attach and the like.
    pub debugging_handlers: bool,
    /// `enableSystemLogHandler`: `/logs/`.
    pub system_log_handler: bool,
    /// `enableSystemLogQuery`: `/logs/?query=`.
    pub system_log_query: bool,
    /// `enableProfilingHandler`: `/debug/pprof/`.
    pub profiling_handler: bool,
    /// `enableDebugFlagsHandler`: `/debug/flags/v`.
    pub debug_flags_handler: bool,
    /// The configuration in effect as `/configz` shows it: `KubeletConfiguration`, v1beta1.
    pub configz: serde_json::Value,
}

fn ttl(given: Option<kube::core::Duration>, default: u64) -> Duration {
    given
        .filter(|given| !given.is_negative())
        .map(Duration::from)
        .filter(|given| !given.is_zero())
        .unwrap_or(Duration::from_secs(default))
}

/// Resolves it; `address` comes from flags and file already.
pub(super) fn resolve(
    kubelet: &KubeletConfiguration,
    address: SocketAddr,
    configz: serde_json::Value,
) -> Result<NodeApiConfig, ConfigError> {
    let invalid = |field: &str, reason: String| {
        ConfigError::invalid(format!("KubeletConfiguration.{field}"), reason)
    };
    let path =
        |text: &Option<String>| text.as_deref().filter(|text| !text.is_empty()).map(PathBuf::from);
    let bootstrap = kubelet.server_tls_bootstrap.unwrap_or(false);
    let files = match (path(&kubelet.tls_cert_file), path(&kubelet.tls_private_key_file)) {
        (Some(_), Some(_)) if bootstrap => {
            return Err(invalid("serverTLSBootstrap", "excludes tlsCertFile".into()));
        }
        (Some(certificate), Some(key)) => Some((certificate, key)),
        (None, None) => None,
        _ => return Err(invalid("tlsCertFile", "goes together with tlsPrivateKeyFile".into())),
    };
    let min_version = match kubelet.tls_min_version.as_deref().unwrap_or_default() {
        "" | "VersionTLS12" => TlsVersion::V12,
        "VersionTLS13" => TlsVersion::V13,
        other => {
            return Err(invalid(
                "tlsMinVersion",
                format!("{other:?} is not spoken; use VersionTLS12 or VersionTLS13"),
            ));
        }
    };
    let authentication = kubelet.authentication.clone().unwrap_or_default();
    let webhook = authentication.webhook.unwrap_or_default();
    let authorization = kubelet.authorization.clone().unwrap_or_default();
    let ttls = authorization.webhook.unwrap_or_default();
    let authorization = match authorization.mode.as_deref().unwrap_or_default() {
        "AlwaysAllow" => Authorization::AlwaysAllow,
        "" | "Webhook" => Authorization::Webhook {
            allowed_ttl: ttl(ttls.cache_authorized_ttl, 300),
            denied_ttl: ttl(ttls.cache_unauthorized_ttl, 30),
        },
        other => {
            return Err(invalid(
                "authorization.mode",
                format!("{other:?} is unknown; use Webhook or AlwaysAllow"),
            ));
        }
    };
    let read_only = kubelet.read_only_port.filter(|port| *port != 0);
    if read_only == Some(address.port()) {
        return Err(invalid("readOnlyPort", "must differ from port".into()));
    }
    Ok(NodeApiConfig {
        enabled: kubelet.enable_server.unwrap_or(true),
        address,
        read_only: read_only.map(|port| SocketAddr::new(address.ip(), port)),
        tls: ServerTls {
            files,
            bootstrap,
            min_version,
            cipher_suites: kubelet.tls_cipher_suites.clone().unwrap_or_default(),
            curves: curves(kubelet.tls_curve_preferences.as_deref().unwrap_or_default())?,
        },
        authentication: Authentication {
            client_ca: path(&authentication.x509.unwrap_or_default().client_ca_file),
            webhook: webhook.enabled.unwrap_or(true),
            cache_ttl: ttl(webhook.cache_ttl, 120),
            anonymous: authentication.anonymous.unwrap_or_default().enabled.unwrap_or(false),
        },
        authorization,
        debugging_handlers: kubelet.enable_debugging_handlers.unwrap_or(true),
        system_log_handler: kubelet.enable_system_log_handler.unwrap_or(true),
        system_log_query: kubelet.enable_system_log_query.unwrap_or(false),
        profiling_handler: kubelet.enable_profiling_handler.unwrap_or(true),
        debug_flags_handler: kubelet.enable_debug_flags_handler.unwrap_or(true),
        configz,
    })
}
