//! The downward API: fields of the pod and of its containers' resources as text.

use k8s_openapi::api::core::v1::{Container, Pod, ResourceFieldSelector};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use super::ConfigError;
use crate::node_context::NodeContext;
use crate::pod::quantity::{milli_value, value};
use crate::pod::spec::{find_container, spec_of};

/// The pod's addresses and the node's, as far as they are known.
#[derive(Clone, Copy, Debug)]
pub struct Addresses<'a> {
    /// Addresses of the pod.
    pub pod: &'a [String],
    /// Addresses of the node.
    pub node: &'a [String],
}

/// The text at `path` of the pod (`metadata.labels['app']`, `status.podIP`, ...). Labels and
/// annotations as a whole, one `key="value"` a line, are for volumes.
pub fn field(pod: &Pod, path: &str, addresses: Addresses<'_>) -> Result<String, ConfigError> {
    if let Some((map, key)) = path.split_once("['") {
        let key = key.strip_suffix("']").ok_or_else(|| ConfigError::FieldPath(path.into()))?;
        let map = match map {
            "metadata.labels" => pod.metadata.labels.as_ref(),
            "metadata.annotations" => pod.metadata.annotations.as_ref(),
            _ => return Err(ConfigError::FieldPath(path.into())),
        };
        return Ok(map.and_then(|m| m.get(key)).cloned().unwrap_or_default());
    }
    let spec = spec_of(pod);
    let first = |list: &[String]| list.first().cloned().unwrap_or_default();
    let text = |value: &Option<String>| value.clone().unwrap_or_default();
    Ok(match path {
        "metadata.name" => text(&pod.metadata.name),
        "metadata.namespace" => text(&pod.metadata.namespace),
        "metadata.uid" => text(&pod.metadata.uid),
        "metadata.labels" => lines(pod.metadata.labels.as_ref()),
        "metadata.annotations" => lines(pod.metadata.annotations.as_ref()),
        "spec.nodeName" => text(&spec.node_name),
        "spec.serviceAccountName" => text(&spec.service_account_name),
        "status.hostIP" => first(addresses.node),
        "status.hostIPs" => addresses.node.join(","),
        "status.podIP" => first(addresses.pod),
        "status.podIPs" => addresses.pod.join(","),
        _ => return Err(ConfigError::FieldPath(path.into())),
    })
}

fn lines(map: Option<&std::collections::BTreeMap<String, String>>) -> String {
    let lines: Vec<String> =
        map.into_iter().flatten().map(|(k, v)| format!("{k}={}", quoted(v))).collect();
    lines.join("\n")
}

/// `text` in double quotes, with Go's escapes.
fn quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\t' => out.push_str("\\t"),
            '\r' => out.push_str("\\r"),
            c if u32::from(c) < 0x20 || c == '\x7f' => {
                out.push_str(&format!("\\x{:02x}", u32::from(c)));
            }
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

/// A resource of `own` container, or of the one that the selector names. A limit that is not set
/// is what the node could give.
pub fn resource_field(
    pod: &Pod,
    own: Option<&Container>,
    selector: &ResourceFieldSelector,
    node: &NodeContext,
) -> Result<String, ConfigError> {
    let named;
    let container = match selector.container_name.as_deref().filter(|n| !n.is_empty()) {
        Some(name) => {
            named = find_container(spec_of(pod), name)
                .ok_or_else(|| ConfigError::Invalid(format!("container {name} not found")))?
                .0;
            &named
        }
        None => own.ok_or_else(|| {
            ConfigError::Invalid("resourceFieldRef needs a containerName here".into())
        })?,
    };
    let unsupported = || ConfigError::Resource(selector.resource.clone());
    let (list, resource) = selector.resource.split_once('.').ok_or_else(unsupported)?;
    let resources = container.resources.as_ref();
    let limits = resources.and_then(|r| r.limits.as_ref());
    let requests = resources.and_then(|r| r.requests.as_ref());
    let known = matches!(resource, "cpu" | "memory" | "ephemeral-storage")
        || resource.starts_with("hugepages-");
    if !known {
        return Err(unsupported());
    }
    let found = match list {
        "limits" => limits.and_then(|l| l.get(resource)),
        "requests" => {
            requests.and_then(|r| r.get(resource)).or_else(|| limits.and_then(|l| l.get(resource)))
        }
        _ => return Err(unsupported()),
    };
    let bad = || ConfigError::Invalid(format!("{} is not a quantity", selector.resource));
    let divisor = selector.divisor.clone().filter(|d| !matches!(&*d.0, "" | "0"));
    let up =
        |amount: i64, unit: i64| (i128::from(amount) + i128::from(unit) - 1) / i128::from(unit);
    let result = if resource == "cpu" {
        let amount = match found {
            Some(q) => milli_value(q).ok_or_else(bad)?,
            None if list == "limits" => {
                i64::try_from(node.allocatable_milli_cpu).unwrap_or(i64::MAX)
            }
            None => 0,
        };
        let unit = divisor.as_ref().map_or(Some(1000), milli_value).filter(|u| *u > 0);
        up(amount, unit.ok_or_else(bad)?)
    } else {
        let amount = match (found, resource) {
            (Some(q), _) => value(q).ok_or_else(bad)?,
            (None, "memory") if list == "limits" => {
                i64::try_from(node.allocatable_memory).unwrap_or(i64::MAX)
            }
            (None, "ephemeral-storage") if list == "limits" => {
                i64::try_from(node.allocatable_ephemeral).unwrap_or(i64::MAX)
            }
            (None, _) => 0,
        };
        let one = Quantity("1".into());
        let unit = value(divisor.as_ref().unwrap_or(&one)).filter(|u| *u > 0);
        up(amount, unit.ok_or_else(bad)?)
    };
    Ok(result.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::testing::pod;

    #[test]
    fn fields_read_as_text() {
        let mut pod = pod(r#"{"nodeName":"n","serviceAccountName":"sa","containers":[]}"#);
        pod.metadata.labels =
            Some([("app".into(), "a\"b".into()), ("z".into(), "1".into())].into());
        let addresses = Addresses {
            pod: &["10.0.0.2".into(), "fd00::2".into()],
            node: &["192.168.0.1".into()],
        };
        for (path, text) in [
            ("metadata.name", "p"),
            ("metadata.uid", "u"),
            ("metadata.labels['app']", "a\"b"),
            ("metadata.labels['none']", ""),
            ("metadata.labels", "app=\"a\\\"b\"\nz=\"1\""),
            ("spec.nodeName", "n"),
            ("spec.serviceAccountName", "sa"),
            ("status.podIP", "10.0.0.2"),
            ("status.podIPs", "10.0.0.2,fd00::2"),
            ("status.hostIP", "192.168.0.1"),
        ] {
            assert_eq!(field(&pod, path, addresses).unwrap(), text, "{path}");
        }
        assert!(field(&pod, "status.phase", addresses).is_err());
        assert!(field(&pod, "metadata.labels['x", addresses).is_err());
    }

    #[test]
    fn resources_are_divided_and_default_to_the_node() {
        let pod = pod(
            r#"{"containers":[{"name":"a","resources":{"limits":{"cpu":"1500m"},"requests":{"memory":"100Mi"}}}]}"#,
        );
        let node = NodeContext { allocatable_memory: 8 << 30, ..NodeContext::new("n", vec![]) };
        for (resource, divisor, text) in [
            ("limits.cpu", "", "2"),
            ("limits.cpu", "1m", "1500"),
            ("requests.cpu", "1m", "1500"),
            ("requests.memory", "1Mi", "100"),
            ("limits.memory", "1Gi", "8"),
            ("requests.ephemeral-storage", "", "0"),
        ] {
            let selector = ResourceFieldSelector {
                container_name: Some("a".into()),
                resource: resource.into(),
                divisor: Some(Quantity(divisor.into())),
            };
            let found = resource_field(&pod, None, &selector, &node);
            assert_eq!(found.unwrap(), text, "{resource}/{divisor}");
        }
    }
}
