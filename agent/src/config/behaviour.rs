//! Fields that choose between behaviours of the agent, or ask for one that nobody has any more.

use super::fields::period;
use super::{ConfigError, KubeletConfiguration, Note, resources};
use crate::cluster::Look;
use crate::node::housing::Housing;

/// Refuses what upstream refuses, and notes what is without effect.
pub(super) fn check(
    kubelet: &KubeletConfiguration,
    notes: &mut Vec<Note>,
) -> Result<(), ConfigError> {
    if kubelet.run_once == Some(true) {
        return Err(ConfigError::invalid(
            "KubeletConfiguration.runOnce",
            "there is no such mode any more, in kubelet either; leave it out",
        ));
    }
    let reserved = kubelet.qos_reserved.as_ref().filter(|reserved| !reserved.is_empty());
    if let Some(reserved) = reserved
        && !resources::gate(kubelet, resources::QOS_RESERVED)
    {
        notes.push(Note::NoEffect {
            field: "KubeletConfiguration.qosReserved".to_owned(),
            value: format!("{reserved:?}"),
            reason: "it counts with featureGates: {QOSReserved: true}",
        });
    }
    Ok(())
}

/// `kubeletCgroups` and `systemCgroups`; pods are to have a `root` of their own beside the latter.
pub(super) fn housing(
    kubelet: &KubeletConfiguration,
    root: Option<&str>,
) -> Result<Housing, ConfigError> {
    let given = |field: &Option<String>| field.clone().filter(|cgroup| !cgroup.is_empty());
    let housing =
        Housing { own: given(&kubelet.kubelet_cgroups), system: given(&kubelet.system_cgroups) };
    let invalid =
        |reason: &str| Err(ConfigError::invalid("KubeletConfiguration.systemCgroups", reason));
    match &housing.system {
        Some(system) if system.trim_matches('/').is_empty() => {
            invalid("cannot be the root, which it is to empty")
        }
        Some(_) if root.is_none_or(str::is_empty) => invalid("needs cgroupRoot"),
        _ => Ok(housing),
    }
}

/// `configMapAndSecretChangeDetectionStrategy`.
pub(super) fn object_look(kubelet: &KubeletConfiguration) -> Result<Look, ConfigError> {
    const FIELD: &str = "configMapAndSecretChangeDetectionStrategy";
    let strategy = kubelet.config_map_and_secret_change_detection_strategy.as_deref();
    match strategy.unwrap_or_default() {
        "" | "Watch" => Ok(Look::Watch),
        "Cache" => Ok(Look::Cache),
        "Get" => Ok(Look::Get(period(kubelet.sync_frequency, 60))),
        other => Err(ConfigError::invalid(
            format!("KubeletConfiguration.{FIELD}"),
            format!("{other:?} is unknown; use Watch, Cache or Get"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn of(text: &str) -> Result<(Look, Vec<String>), String> {
        let kubelet = serde_json::from_str(text).unwrap();
        let mut notes = Vec::new();
        check(&kubelet, &mut notes).map_err(|error| error.to_string())?;
        let look = object_look(&kubelet).map_err(|error| error.to_string())?;
        Ok((look, notes.iter().map(|note| note.field().to_owned()).collect()))
    }

    #[test]
    fn strategies_are_upstreams() {
        for (text, look) in [
            ("{}", Look::Watch),
            (
                r#"{"configMapAndSecretChangeDetectionStrategy":"Watch","runOnce":false}"#,
                Look::Watch,
            ),
            (r#"{"configMapAndSecretChangeDetectionStrategy":"Cache"}"#, Look::Cache),
            (
                r#"{"configMapAndSecretChangeDetectionStrategy":"Get","syncFrequency":"30s"}"#,
                Look::Get(Duration::from_secs(30)),
            ),
        ] {
            assert_eq!(of(text), Ok((look, vec![])), "{text}");
        }
    }

    #[test]
    fn processes_are_moved_out_of_the_root_only() {
        let of = |text: &str, root| {
            housing(&serde_json::from_str(text).unwrap(), root).map_err(|error| error.to_string())
        };
        let text = r#"{"systemCgroups":"/system","kubeletCgroups":"/kubelet"}"#;
        let both = Housing { own: Some("/kubelet".into()), system: Some("/system".into()) };
        assert_eq!(of(text, Some("/")), Ok(both));
        assert_eq!(of(r#"{"systemCgroups":""}"#, None), Ok(Housing::default()));
        assert!(of(text, None).unwrap_err().contains("needs cgroupRoot"));
        let root = of(r#"{"systemCgroups":"/"}"#, Some("/")).unwrap_err();
        assert!(root.contains("cannot be the root"), "{root}");
    }

    #[test]
    fn what_nobody_does_is_refused_and_what_its_gate_holds_back_noted() {
        for (text, said) in [
            (r#"{"runOnce":true}"#, "runOnce: there is no such mode"),
            (r#"{"configMapAndSecretChangeDetectionStrategy":"Poll"}"#, "use Watch, Cache or Get"),
        ] {
            let error = of(text).unwrap_err();
            assert!(error.contains(said), "{error}");
        }
        let (_, notes) = of(r#"{"qosReserved":{"memory":"50%"}}"#).unwrap();
        assert_eq!(notes, ["KubeletConfiguration.qosReserved"]);
        let gated = r#"{"qosReserved":{"memory":"50%"},"featureGates":{"QOSReserved":true}}"#;
        assert_eq!(of(gated).unwrap().1, [""; 0]);
    }
}
