//! When unused images and dead containers go.

use std::time::Duration;

use super::fields::period;
use super::{ConfigError, KubeletConfiguration};
use crate::cli::NodeFlags;
use crate::node_context::GcLimits;

pub(super) fn resolve(
    flags: &NodeFlags,
    kubelet: &KubeletConfiguration,
) -> Result<GcLimits, ConfigError> {
    let invalid = |field: &str, reason: String| {
        Err(ConfigError::invalid(format!("KubeletConfiguration.{field}"), reason))
    };
    let high = kubelet.image_gc_high_threshold_percent.unwrap_or(85);
    let low = kubelet.image_gc_low_threshold_percent.unwrap_or(80);
    if high > 100 || low >= high {
        return invalid(
            "imageGCHighThresholdPercent",
            format!("{high} must be at most 100 and above imageGCLowThresholdPercent ({low})"),
        );
    }
    for (field, age) in [
        ("imageMinimumGCAge", kubelet.image_minimum_gc_age),
        ("imageMaximumGCAge", kubelet.image_maximum_gc_age),
    ] {
        if age.is_some_and(|age| age.is_negative()) {
            return invalid(field, "must not be negative".to_owned());
        }
    }
    let min = period(kubelet.image_minimum_gc_age, 120);
    let max = kubelet.image_maximum_gc_age.map(Duration::from).filter(|age| !age.is_zero());
    if let Some(max) = max.filter(|max| *max <= min) {
        return invalid(
            "imageMaximumGCAge",
            format!("{max:?} must be above imageMinimumGCAge ({min:?})"),
        );
    }
    let ttl = flags.minimum_container_ttl_duration;
    if ttl.is_some_and(|ttl| ttl.is_negative()) {
        return Err(ConfigError::invalid(
            "--minimum-container-ttl-duration",
            "must not be negative",
        ));
    }
    // A negative number is no limit.
    let limit = |given: Option<i32>| usize::try_from(given.unwrap_or(-1)).ok();
    Ok(GcLimits {
        image_high_percent: high,
        image_low_percent: low,
        image_min_age: min,
        image_max_age: max,
        dead_per_container: match flags.maximum_dead_containers_per_container {
            None => GcLimits::default().dead_per_container,
            given => limit(given).unwrap_or(usize::MAX),
        },
        dead_in_all: limit(flags.maximum_dead_containers),
        dead_min_age: ttl.map(Duration::from).unwrap_or_default(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(line: &[&str], text: &str) -> Result<GcLimits, String> {
        let line: Vec<String> = line.iter().map(|part| (*part).to_owned()).collect();
        let flags = NodeFlags::parse(&line)?;
        resolve(&flags, &serde_json::from_str(text).unwrap()).map_err(|error| error.to_string())
    }

    #[test]
    fn what_is_kept_is_as_written_or_as_under_kubelet() {
        assert_eq!(of(&[], "{}"), Ok(GcLimits::default()));
        let flags = [
            "--maximum-dead-containers-per-container=2",
            "--maximum-dead-containers=240",
            "--minimum-container-ttl-duration=1m30s",
        ];
        let expected = GcLimits {
            dead_per_container: 2,
            dead_in_all: Some(240),
            dead_min_age: Duration::from_secs(90),
            image_max_age: Some(Duration::from_secs(3600)),
            ..GcLimits::default()
        };
        assert_eq!(of(&flags, r#"{"imageMaximumGCAge":"1h"}"#), Ok(expected));
        let unlimited =
            ["--maximum-dead-containers-per-container=-1", "--maximum-dead-containers=-1"];
        let limits = of(&unlimited, "{}").unwrap();
        assert_eq!((limits.dead_per_container, limits.dead_in_all), (usize::MAX, None));
    }

    #[test]
    fn what_upstream_refuses_is_refused() {
        for (text, said) in [
            (r#"{"imageGCHighThresholdPercent":80}"#, "above imageGCLowThresholdPercent (80)"),
            (r#"{"imageMinimumGCAge":"-1s"}"#, "imageMinimumGCAge: must not be negative"),
            (r#"{"imageMaximumGCAge":"2m"}"#, "must be above imageMinimumGCAge"),
        ] {
            let error = of(&[], text).unwrap_err();
            assert!(error.contains(said), "{error}");
        }
        let error = of(&["--minimum-container-ttl-duration=-1s"], "{}").unwrap_err();
        assert!(error.contains("must not be negative"), "{error}");
    }
}
