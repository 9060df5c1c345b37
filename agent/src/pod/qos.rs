//! Quality-of-service class, and the cgroup and OOM settings that follow from requests and limits.

use k8s_openapi::api::core::v1::{Container, Pod, ResourceRequirements};

use super::quantity::{ResourceList, amount, cpu_milli};
use super::spec::{init_containers, spec_of};

/// The pod's QoS class: what the API server decided, else what its resources say.
pub fn qos_class(pod: &Pod) -> &'static str {
    let decided = pod.status.as_ref().and_then(|s| s.qos_class.as_deref());
    match decided {
        Some("Guaranteed") => "Guaranteed",
        Some("Burstable") => "Burstable",
        Some("BestEffort") => "BestEffort",
        _ => computed_class(pod),
    }
}

fn set(list: Option<&ResourceList>, resource: &str) -> Option<i64> {
    let value = if resource == "cpu" { cpu_milli(list) } else { amount(list, resource) };
    value.filter(|v| *v > 0)
}

fn class_of<'a>(all: impl Iterator<Item = &'a ResourceRequirements>, empty: bool) -> &'static str {
    let (mut any, mut guaranteed) = (false, !empty);
    for r in all {
        for resource in ["cpu", "memory"] {
            let limit = set(r.limits.as_ref(), resource);
            let request = set(r.requests.as_ref(), resource).or(limit);
            any |= limit.is_some() || request.is_some();
            guaranteed &= limit.is_some() && limit == request;
        }
    }
    match (any, guaranteed) {
        (false, _) => "BestEffort",
        (true, true) => "Guaranteed",
        (true, false) => "Burstable",
    }
}

fn computed_class(pod: &Pod) -> &'static str {
    let spec = spec_of(pod);
    static NONE: std::sync::LazyLock<ResourceRequirements> =
        std::sync::LazyLock::new(ResourceRequirements::default);
    // Pod-level resources, where given, decide alone (KEP-2837).
    if let Some(own) = &spec.resources
        && (own.limits.is_some() || own.requests.is_some())
    {
        return class_of(std::iter::once(own), false);
    }
    let all: Vec<&Container> = spec.containers.iter().chain(init_containers(spec)).collect();
    class_of(all.iter().map(|c| c.resources.as_ref().unwrap_or(&NONE)), all.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::testing::pod;

    #[test]
    fn classes_follow_from_resources() {
        for (class, containers) in [
            ("BestEffort", r#"[{"name":"a"}]"#),
            ("Burstable", r#"[{"name":"a","resources":{"requests":{"cpu":"1"}}}]"#),
            ("Guaranteed", r#"[{"name":"a","resources":{"limits":{"cpu":"1","memory":"1Gi"}}}]"#),
            (
                "Guaranteed",
                r#"[{"name":"a","resources":{"limits":{"cpu":"1","memory":"1Gi"},"requests":{"cpu":"1000m","memory":"1024Mi"}}}]"#,
            ),
            (
                "Burstable",
                r#"[{"name":"a","resources":{"limits":{"cpu":"1","memory":"1Gi"}}},{"name":"b"}]"#,
            ),
            (
                "Burstable",
                r#"[{"name":"a","resources":{"limits":{"cpu":"1","memory":"1Gi"},"requests":{"cpu":"1"}}},{"name":"b"}]"#,
            ),
        ] {
            assert_eq!(qos_class(&pod(&format!(r#"{{"containers":{containers}}}"#))), class);
        }
    }
}
