//! Which ConfigMaps and Secrets a pod refers to. Pure.

use std::collections::BTreeSet;

use k8s_openapi::api::core::v1::{Container, EnvFromSource, EnvVar, Pod, Volume};

use crate::ids::NamespacedName;
use crate::objects::ObjectRef;

/// ConfigMaps and Secrets in volumes, environment and pull secrets of `pod`, each once.
pub fn of_pod(pod: &Pod) -> Vec<ObjectRef> {
    let Some(spec) = pod.spec.as_ref() else { return Vec::new() };
    let mut found = Found {
        namespace: pod.metadata.namespace.as_deref().unwrap_or("default"),
        maps: BTreeSet::new(),
        secrets: BTreeSet::new(),
    };
    spec.volumes.iter().flatten().for_each(|v| found.volume(v));
    for secret in spec.image_pull_secrets.iter().flatten() {
        found.secret(&secret.name);
    }
    let containers = spec.init_containers.iter().flatten().chain(&spec.containers);
    containers.for_each(|c| found.container(c));
    for container in spec.ephemeral_containers.iter().flatten() {
        found.environment(container.env.as_deref(), container.env_from.as_deref());
    }
    let Found { maps, secrets, .. } = found;
    let maps = maps.into_iter().map(ObjectRef::ConfigMap);
    maps.chain(secrets.into_iter().map(ObjectRef::Secret)).collect()
}

struct Found<'a> {
    namespace: &'a str,
    maps: BTreeSet<NamespacedName>,
    secrets: BTreeSet<NamespacedName>,
}

impl Found<'_> {
    fn map(&mut self, name: &str) {
        if !name.is_empty() {
            self.maps.insert(NamespacedName::new(self.namespace, name));
        }
    }

    fn secret(&mut self, name: &str) {
        if !name.is_empty() {
            self.secrets.insert(NamespacedName::new(self.namespace, name));
        }
    }

    fn volume(&mut self, volume: &Volume) {
        if let Some(source) = &volume.config_map {
            self.map(&source.name);
        }
        if let Some(name) = volume.secret.as_ref().and_then(|s| s.secret_name.as_deref()) {
            self.secret(name);
        }
        for source in volume.projected.iter().flat_map(|p| p.sources.iter().flatten()) {
            if let Some(map) = &source.config_map {
                self.map(&map.name);
            }
            if let Some(secret) = &source.secret {
                self.secret(&secret.name);
            }
        }
    }

    fn container(&mut self, container: &Container) {
        self.environment(container.env.as_deref(), container.env_from.as_deref());
    }

    fn environment(&mut self, env: Option<&[EnvVar]>, from: Option<&[EnvFromSource]>) {
        for source in env.into_iter().flatten().filter_map(|e| e.value_from.as_ref()) {
            if let Some(key) = &source.config_map_key_ref {
                self.map(&key.name);
            }
            if let Some(key) = &source.secret_key_ref {
                self.secret(&key.name);
            }
        }
        for source in from.into_iter().flatten() {
            if let Some(map) = &source.config_map_ref {
                self.map(&map.name);
            }
            if let Some(secret) = &source.secret_ref {
                self.secret(&secret.name);
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn every_place_that_names_an_object_is_found_once() {
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {"name": "p", "namespace": "n"},
            "spec": {
                "imagePullSecrets": [{"name": "s1"}],
                "volumes": [
                    {"name": "a", "configMap": {"name": "m1"}},
                    {"name": "b", "secret": {"secretName": "s2"}},
                    {"name": "c", "projected": {"sources": [
                        {"configMap": {"name": "m2"}}, {"secret": {"name": "s3"}},
                        {"serviceAccountToken": {"path": "token"}}]}}],
                "initContainers": [{"name": "i", "env": [
                    {"name": "E", "valueFrom": {"configMapKeyRef": {"name": "m3", "key": "k"}}},
                    {"name": "F", "valueFrom": {"secretKeyRef": {"name": "s4", "key": "k"}}}]}],
                "containers": [{"name": "c", "envFrom": [
                    {"configMapRef": {"name": "m1"}}, {"secretRef": {"name": "s2"}}]}]}
        }))
        .unwrap();
        let names: Vec<String> = of_pod(&pod)
            .iter()
            .map(|r| match r {
                ObjectRef::ConfigMap(key) => format!("cm {key}"),
                ObjectRef::Secret(key) => format!("secret {key}"),
                other => format!("{other:?}"),
            })
            .collect();
        assert_eq!(
            names,
            [
                "cm n/m1",
                "cm n/m2",
                "cm n/m3",
                "secret n/s1",
                "secret n/s2",
                "secret n/s3",
                "secret n/s4"
            ]
        );
    }
}
