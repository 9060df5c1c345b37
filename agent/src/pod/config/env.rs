//! A container's environment: `envFrom`, `env`, and the variables that tell of Services.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use k8s_openapi::api::core::v1::{ConfigMap, Container, EnvVarSource, Pod, Secret, Service};

use super::ConfigError;
use super::downward::{Addresses, field, resource_field};
use super::expand::expand;
use crate::ids::NamespacedName;
use crate::node_context::NodeContext;
use crate::pod::spec::spec_of;

/// ConfigMaps and Secrets that an environment refers to, by name; `None` is one that does not exist.
#[derive(Clone, Default)]
pub struct Sources {
    /// ConfigMaps of the pod's namespace.
    pub config_maps: BTreeMap<String, Option<Arc<ConfigMap>>>,
    /// Secrets of the pod's namespace.
    pub secrets: BTreeMap<String, Option<Arc<Secret>>>,
}

/// Names of the ConfigMaps and of the Secrets that the environment of `container` refers to.
pub fn references(container: &Container) -> (BTreeSet<String>, BTreeSet<String>) {
    let (mut maps, mut secrets) = (BTreeSet::new(), BTreeSet::new());
    for from in container.env_from.iter().flatten() {
        maps.extend(from.config_map_ref.as_ref().map(|r| r.name.clone()));
        secrets.extend(from.secret_ref.as_ref().map(|r| r.name.clone()));
    }
    for source in container.env.iter().flatten().filter_map(|e| e.value_from.as_ref()) {
        maps.extend(source.config_map_key_ref.as_ref().map(|r| r.name.clone()));
        secrets.extend(source.secret_key_ref.as_ref().map(|r| r.name.clone()));
    }
    (maps, secrets)
}

/// What an environment is made from.
#[derive(Clone, Copy)]
pub struct EnvInput<'a> {
    /// The pod.
    pub pod: &'a Pod,
    /// The container.
    pub container: &'a Container,
    /// Objects that it refers to.
    pub sources: &'a Sources,
    /// Services of the namespace and `default/kubernetes`.
    pub services: &'a [Arc<Service>],
    /// Known addresses.
    pub addresses: Addresses<'a>,
    /// The node.
    pub node: &'a NodeContext,
}

/// The environment in the order in which it was written; later entries win.
pub fn environment(input: EnvInput<'_>) -> Result<Vec<(String, String)>, ConfigError> {
    let mut env = Env::default();
    for from in input.container.env_from.iter().flatten() {
        let prefix = from.prefix.as_deref().unwrap_or_default();
        if let Some(r) = &from.config_map_ref {
            match config_map(input, &r.name, r.optional)? {
                Some(map) => {
                    for (key, value) in map.data.iter().flatten() {
                        env.set_if_named(format!("{prefix}{key}"), value.clone());
                    }
                }
                None => continue,
            }
        }
        if let Some(r) = &from.secret_ref {
            match secret(input, &r.name, r.optional)? {
                Some(secret) => {
                    for (key, value) in secret.data.iter().flatten() {
                        let value = String::from_utf8_lossy(&value.0).into_owned();
                        env.set_if_named(format!("{prefix}{key}"), value);
                    }
                }
                None => continue,
            }
        }
    }
    let services = service_variables(input);
    for var in input.container.env.iter().flatten() {
        let value = match (&var.value_from, &var.value) {
            (Some(source), _) => match sourced(input, source)? {
                Some(value) => value,
                None => continue,
            },
            (None, Some(text)) => expand(text, |name| {
                env.get(name).or_else(|| services.get(name).map(String::as_str))
            }),
            (None, None) => String::new(),
        };
        env.set(var.name.clone(), value);
    }
    for (name, value) in services {
        if env.get(&name).is_none() {
            env.set(name, value);
        }
    }
    Ok(env.into_list())
}

#[derive(Default)]
struct Env {
    order: Vec<String>,
    values: BTreeMap<String, String>,
}

impl Env {
    fn get(&self, name: &str) -> Option<&str> {
        self.values.get(name).map(String::as_str)
    }

    fn set(&mut self, name: String, value: String) {
        if self.values.insert(name.clone(), value).is_none() {
            self.order.push(name);
        }
    }

    /// Keys of whole objects that cannot be names are left out.
    fn set_if_named(&mut self, name: String, value: String) {
        let fine = !name.is_empty() && name.bytes().all(|b| (0x20..0x7f).contains(&b) && b != b'=');
        if fine {
            self.set(name, value);
        }
    }

    fn into_list(mut self) -> Vec<(String, String)> {
        self.order
            .into_iter()
            .filter_map(|name| self.values.remove(&name).map(|value| (name, value)))
            .collect()
    }
}

fn config_map<'a>(
    input: EnvInput<'a>,
    name: &str,
    optional: Option<bool>,
) -> Result<Option<&'a ConfigMap>, ConfigError> {
    match input.sources.config_maps.get(name).and_then(Option::as_deref) {
        None if !optional.unwrap_or(false) => {
            Err(ConfigError::Missing { kind: "configmap", name: name.to_owned() })
        }
        found => Ok(found),
    }
}

fn secret<'a>(
    input: EnvInput<'a>,
    name: &str,
    optional: Option<bool>,
) -> Result<Option<&'a Secret>, ConfigError> {
    match input.sources.secrets.get(name).and_then(Option::as_deref) {
        None if !optional.unwrap_or(false) => {
            Err(ConfigError::Missing { kind: "secret", name: name.to_owned() })
        }
        found => Ok(found),
    }
}

/// The value that a source gives; `None` where it is optional and absent.
fn sourced(input: EnvInput<'_>, source: &EnvVarSource) -> Result<Option<String>, ConfigError> {
    let missing = |kind, name: &str, key: &str| ConfigError::MissingKey {
        kind,
        namespace: NamespacedName::of_pod(input.pod).namespace.to_string(),
        name: name.to_owned(),
        key: key.to_owned(),
    };
    if let Some(r) = &source.field_ref {
        return field(input.pod, &r.field_path, input.addresses).map(Some);
    }
    if let Some(r) = &source.resource_field_ref {
        return resource_field(input.pod, Some(input.container), r, input.node).map(Some);
    }
    if let Some(r) = &source.config_map_key_ref {
        let Some(map) = config_map(input, &r.name, r.optional)? else { return Ok(None) };
        return match map.data.as_ref().and_then(|d| d.get(&r.key)) {
            Some(value) => Ok(Some(value.clone())),
            None if r.optional.unwrap_or(false) => Ok(None),
            None => Err(missing("ConfigMap", &r.name, &r.key)),
        };
    }
    if let Some(r) = &source.secret_key_ref {
        let Some(secret) = secret(input, &r.name, r.optional)? else { return Ok(None) };
        return match secret.data.as_ref().and_then(|d| d.get(&r.key)) {
            Some(value) => Ok(Some(String::from_utf8_lossy(&value.0).into_owned())),
            None if r.optional.unwrap_or(false) => Ok(None),
            None => Err(missing("Secret", &r.name, &r.key)),
        };
    }
    Err(ConfigError::Invalid("an environment variable names no source this node knows".into()))
}

/// Variables that tell a container of the Services that exist when it starts.
fn service_variables(input: EnvInput<'_>) -> BTreeMap<String, String> {
    let links = spec_of(input.pod).enable_service_links.unwrap_or(true);
    let own = NamespacedName::of_pod(input.pod).namespace;
    let mut vars = BTreeMap::new();
    for service in input.services {
        let namespace = service.metadata.namespace.as_deref().unwrap_or("default");
        let name = service.metadata.name.as_deref().unwrap_or_default();
        let api = namespace == "default" && name == "kubernetes";
        let linked = links && namespace == &*own;
        if !api && !linked {
            continue;
        }
        // A Service of the pod's own namespace hides the API server's of the same name.
        let hidden = api
            && &*own != "default"
            && links
            && input.services.iter().any(|s| {
                s.metadata.namespace.as_deref() == Some(&*own)
                    && s.metadata.name.as_deref() == Some("kubernetes")
            });
        if !hidden {
            one_service(service, name, &mut vars);
        }
    }
    vars
}

fn one_service(service: &Service, name: &str, vars: &mut BTreeMap<String, String>) {
    let Some(spec) = &service.spec else { return };
    let Some(ip) = spec.cluster_ip.as_deref().filter(|ip| !matches!(*ip, "" | "None")) else {
        return;
    };
    let Some(ports) = spec.ports.as_deref().filter(|p| !p.is_empty()) else { return };
    let upper = |text: &str| text.to_uppercase().replace('-', "_");
    let prefix = upper(name);
    vars.insert(format!("{prefix}_SERVICE_HOST"), ip.to_owned());
    vars.insert(format!("{prefix}_SERVICE_PORT"), ports[0].port.to_string());
    let host = if ip.contains(':') { format!("[{ip}]") } else { ip.to_owned() };
    for (n, port) in ports.iter().enumerate() {
        if let Some(port_name) = port.name.as_deref().filter(|n| !n.is_empty()) {
            vars.insert(
                format!("{prefix}_SERVICE_PORT_{}", upper(port_name)),
                port.port.to_string(),
            );
        }
        let protocol = port.protocol.as_deref().unwrap_or("TCP");
        let (number, lower) = (port.port, protocol.to_lowercase());
        let link = format!("{lower}://{host}:{number}");
        if n == 0 {
            vars.insert(format!("{prefix}_PORT"), link.clone());
        }
        let base = format!("{prefix}_PORT_{number}_{}", protocol.to_uppercase());
        vars.insert(format!("{base}_PROTO"), lower);
        vars.insert(format!("{base}_PORT"), number.to_string());
        vars.insert(format!("{base}_ADDR"), ip.to_owned());
        vars.insert(base, link);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::testing::pod;

    fn env_of(
        spec: &str,
        sources: Sources,
        services: &[&str],
    ) -> Result<Vec<(String, String)>, ConfigError> {
        let pod = pod(spec);
        let services: Vec<Arc<Service>> =
            services.iter().map(|s| Arc::new(serde_json::from_str(s).unwrap())).collect();
        environment(EnvInput {
            pod: &pod,
            container: &spec_of(&pod).containers[0],
            sources: &sources,
            services: &services,
            addresses: Addresses { pod: &["10.0.0.2".into()], node: &["1.2.3.4".into()] },
            node: &NodeContext::new("n", vec![]),
        })
    }

    fn sources() -> Sources {
        let map: ConfigMap =
            serde_json::from_str(r#"{"data":{"K":"v","with-dash":"d","bad=":"x"}}"#).unwrap();
        let secret: Secret = serde_json::from_str(r#"{"data":{"S":"c2VjcmV0"}}"#).unwrap();
        Sources {
            config_maps: [("m".into(), Some(Arc::new(map))), ("none".into(), None)].into(),
            secrets: [("s".into(), Some(Arc::new(secret)))].into(),
        }
    }

    #[test]
    fn everything_a_container_can_name() {
        let env = env_of(
            r#"{"enableServiceLinks":false,"containers":[{"name":"c",
                "envFrom":[{"prefix":"P_","configMapRef":{"name":"m"}},{"configMapRef":{"name":"none","optional":true}}],
                "env":[
                  {"name":"A","value":"1"},{"name":"B","value":"$(A)-$(P_K)-$(NO)-$$(A)"},
                  {"name":"A","value":"2"},{"name":"E"},
                  {"name":"IP","valueFrom":{"fieldRef":{"fieldPath":"status.podIP"}}},
                  {"name":"S","valueFrom":{"secretKeyRef":{"name":"s","key":"S"}}},
                  {"name":"O","valueFrom":{"configMapKeyRef":{"name":"m","key":"no","optional":true}}}]}]}"#,
            sources(),
            &[],
        )
        .unwrap();
        let expected = [
            ("P_K", "v"),
            ("P_with-dash", "d"),
            ("A", "2"),
            ("B", "1-v-$(NO)-$(A)"),
            ("E", ""),
            ("IP", "10.0.0.2"),
            ("S", "secret"),
        ];
        assert_eq!(env, expected.map(|(k, v)| (k.to_owned(), v.to_owned())));
    }

    #[test]
    fn what_is_missing_is_named() {
        for (env, message) in [
            (
                r#"{"name":"A","valueFrom":{"configMapKeyRef":{"name":"none","key":"k"}}}"#,
                "configmap \"none\" not found",
            ),
            (
                r#"{"name":"A","valueFrom":{"secretKeyRef":{"name":"s","key":"k"}}}"#,
                "couldn't find key k in Secret default/s",
            ),
        ] {
            let spec = format!(r#"{{"containers":[{{"name":"c","env":[{env}]}}]}}"#);
            assert_eq!(env_of(&spec, sources(), &[]).unwrap_err().to_string(), message);
        }
    }

    #[test]
    fn services_show_as_variables() {
        let web = r#"{"metadata":{"name":"my-web","namespace":"default"},"spec":{"clusterIP":"10.96.0.7","ports":[{"name":"http","port":80},{"port":53,"protocol":"UDP"}]}}"#;
        let headless = r#"{"metadata":{"name":"h","namespace":"default"},"spec":{"clusterIP":"None","ports":[{"port":80}]}}"#;
        let env = env_of(
            r#"{"containers":[{"name":"c","env":[{"name":"U","value":"$(MY_WEB_SERVICE_HOST)"}]}]}"#,
            Sources::default(),
            &[web, headless],
        )
        .unwrap();
        let env: BTreeMap<_, _> = env.into_iter().collect();
        for (name, value) in [
            ("U", "10.96.0.7"),
            ("MY_WEB_SERVICE_HOST", "10.96.0.7"),
            ("MY_WEB_SERVICE_PORT", "80"),
            ("MY_WEB_SERVICE_PORT_HTTP", "80"),
            ("MY_WEB_PORT", "tcp://10.96.0.7:80"),
            ("MY_WEB_PORT_80_TCP", "tcp://10.96.0.7:80"),
            ("MY_WEB_PORT_53_UDP", "udp://10.96.0.7:53"),
            ("MY_WEB_PORT_53_UDP_ADDR", "10.96.0.7"),
        ] {
            assert_eq!(env[name], value, "{name}");
        }
        assert!(!env.contains_key("H_SERVICE_HOST"));
        let none = env_of(
            r#"{"enableServiceLinks":false,"containers":[{"name":"c"}]}"#,
            Sources::default(),
            &[web],
        );
        assert_eq!(none.unwrap(), []);
    }
}
