//! How long pods have when the node shuts down (KEP-2000, KEP-2712), by kubelet's rules. Pure.

use std::time::Duration;

use super::{ConfigError, KubeletConfiguration};
use crate::node_context::ShutdownGrace;
use crate::pod::spec::SYSTEM_CRITICAL;

/// The groups that pods end in, the lowest priority first; none where pods are not waited for.
pub(super) fn resolve(kubelet: &KubeletConfiguration) -> Result<Vec<ShutdownGrace>, ConfigError> {
    let field = |name: &str| format!("KubeletConfiguration.{name}");
    let period = |name: &str, given: Option<kube::core::Duration>| {
        let refused = |given: kube::core::Duration| {
            let reason = format!("{given:?} must be zero or at least one second");
            Err(ConfigError::invalid(field(name), reason))
        };
        match given {
            None => Ok(Duration::ZERO),
            Some(given) if given.is_negative() => refused(given),
            Some(given) => match Duration::from(given) {
                length if length.is_zero() || length >= Duration::from_secs(1) => Ok(length),
                _ => refused(given),
            },
        }
    };
    let all = period("shutdownGracePeriod", kubelet.shutdown_grace_period)?;
    let critical =
        period("shutdownGracePeriodCriticalPods", kubelet.shutdown_grace_period_critical_pods)?;
    if critical > all {
        return Err(ConfigError::invalid(
            field("shutdownGracePeriodCriticalPods"),
            format!(
                "{critical:?} must be at most shutdownGracePeriod ({all:?}), which it is a part of"
            ),
        ));
    }
    let listed = kubelet.shutdown_grace_period_by_pod_priority.iter().flatten();
    let mut graces = Vec::new();
    for item in listed {
        let seconds = u32::try_from(item.shutdown_grace_period_seconds).map_err(|_| {
            ConfigError::invalid(
                field("shutdownGracePeriodByPodPriority"),
                format!(
                    "shutdownGracePeriodSeconds {} of priority {} must be between 0 and {}",
                    item.shutdown_grace_period_seconds,
                    item.priority,
                    u32::MAX
                ),
            )
        })?;
        graces.push(ShutdownGrace { priority: item.priority, seconds });
    }
    if graces.is_empty() {
        if all.is_zero() {
            return Ok(Vec::new());
        }
        let seconds = |length: Duration| u32::try_from(length.as_secs()).unwrap_or(u32::MAX);
        return Ok(vec![
            ShutdownGrace { priority: 0, seconds: seconds(all - critical) },
            ShutdownGrace { priority: SYSTEM_CRITICAL, seconds: seconds(critical) },
        ]);
    }
    if !all.is_zero() {
        return Err(ConfigError::invalid(
            field("shutdownGracePeriodByPodPriority"),
            "says all that shutdownGracePeriod says; give one of them",
        ));
    }
    graces.sort_by_key(|grace| grace.priority);
    Ok(graces)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Result<Vec<(i32, u32)>, String> {
        let kubelet: KubeletConfiguration = serde_json::from_str(text).unwrap();
        let graces = resolve(&kubelet).map_err(|error| error.to_string())?;
        Ok(graces.into_iter().map(|grace| (grace.priority, grace.seconds)).collect())
    }

    #[test]
    fn periods_become_groups() {
        for (text, expected) in [
            ("{}", vec![]),
            (r#"{"shutdownGracePeriod":"0s","shutdownGracePeriodCriticalPods":"0s"}"#, vec![]),
            (r#"{"shutdownGracePeriod":"30s"}"#, vec![(0, 30), (SYSTEM_CRITICAL, 0)]),
            (
                r#"{"shutdownGracePeriod":"1m","shutdownGracePeriodCriticalPods":"20500ms"}"#,
                vec![(0, 39), (SYSTEM_CRITICAL, 20)],
            ),
            (
                r#"{"shutdownGracePeriodByPodPriority":[
                    {"priority":100,"shutdownGracePeriodSeconds":10},
                    {"shutdownGracePeriodSeconds":60},
                    {"priority":-5,"shutdownGracePeriodSeconds":7}]}"#,
                vec![(-5, 7), (0, 60), (100, 10)],
            ),
        ] {
            assert_eq!(of(text), Ok(expected), "{text}");
        }
    }

    #[test]
    fn what_kubelet_refuses_is_refused_by_name() {
        for (text, said) in [
            (r#"{"shutdownGracePeriod":"500ms"}"#, "shutdownGracePeriod: "),
            (r#"{"shutdownGracePeriod":"-5s"}"#, "shutdownGracePeriod: "),
            (r#"{"shutdownGracePeriodCriticalPods":"5s"}"#, "at most shutdownGracePeriod"),
            (
                r#"{"shutdownGracePeriod":"9s","shutdownGracePeriodCriticalPods":"10ms"}"#,
                "shutdownGracePeriodCriticalPods: ",
            ),
            (
                r#"{"shutdownGracePeriod":"9s","shutdownGracePeriodByPodPriority":[{"priority":1,"shutdownGracePeriodSeconds":1}]}"#,
                "give one of them",
            ),
            (
                r#"{"shutdownGracePeriodByPodPriority":[{"priority":1,"shutdownGracePeriodSeconds":-1}]}"#,
                "must be between",
            ),
        ] {
            let error = of(text).unwrap_err();
            assert!(error.contains(said), "{text}: {error}");
        }
    }
}
