//! `KubeletConfiguration.tracing`: upstream's TracingConfiguration.

use serde::Deserialize;

use super::ConfigError;

/// As written.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TracingConfiguration {
    /// `endpoint`: of the collector, gRPC.
    pub endpoint: Option<String>,
    /// `samplingRatePerMillion`.
    pub sampling_rate_per_million: Option<i64>,
}

/// Where traces go, and how many.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tracing {
    /// `host:port`, `dns:...` or `unix:///path`.
    pub endpoint: String,
    /// How many traces of a million are taken, beside those that a parent took.
    pub sampling_rate_per_million: u32,
}

/// Upstream's default.
const ENDPOINT: &str = "localhost:4317";
const MILLION: i64 = 1_000_000;

/// Resolves it by upstream's rules.
pub(super) fn resolve(given: &TracingConfiguration) -> Result<Tracing, ConfigError> {
    let invalid = |field: &str, reason: String| {
        ConfigError::invalid(format!("KubeletConfiguration.tracing.{field}"), reason)
    };
    let rate = given.sampling_rate_per_million.unwrap_or(0);
    if !(0..=MILLION).contains(&rate) {
        let reason = format!("{rate} is not between 0 and {MILLION}");
        return Err(invalid("samplingRatePerMillion", reason));
    }
    let endpoint = given.endpoint.clone().unwrap_or_else(|| ENDPOINT.into());
    let scheme = endpoint.split_once("//").map_or("", |(scheme, _)| scheme.trim_end_matches(':'));
    let known = ["", "dns", "unix"].contains(&scheme);
    let address = endpoint.strip_prefix("dns:").unwrap_or(&endpoint).trim_start_matches('/');
    let good = known && !address.is_empty() && !address.contains(char::is_whitespace);
    if !good {
        let reason = format!("{endpoint:?}: use host:port, dns:///host:port or unix:///path");
        return Err(invalid("endpoint", reason));
    }
    Ok(Tracing { endpoint, sampling_rate_per_million: rate as u32 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_given_is_upstreams_default_and_nonsense_is_named() {
        let given = |endpoint: Option<&str>, rate| {
            let endpoint = endpoint.map(str::to_owned);
            resolve(&TracingConfiguration { endpoint, sampling_rate_per_million: rate })
        };
        let default = given(None, None).unwrap();
        assert_eq!((default.endpoint.as_str(), default.sampling_rate_per_million), (ENDPOINT, 0));
        for good in ["otel:4317", "[::1]:4317", "dns:///otel:4317", "unix:///run/otel.sock"] {
            assert_eq!(given(Some(good), Some(MILLION)).unwrap().endpoint, good);
        }
        for (endpoint, rate, field) in [
            (Some("http://otel:4317"), None, "tracing.endpoint"),
            (Some(""), None, "tracing.endpoint"),
            (Some("a b"), None, "tracing.endpoint"),
            (None, Some(-1), "tracing.samplingRatePerMillion"),
            (None, Some(MILLION + 1), "tracing.samplingRatePerMillion"),
        ] {
            let error = given(endpoint, rate).unwrap_err().to_string();
            assert!(error.contains(field), "{endpoint:?} {rate:?}: {error}");
        }
    }
}
