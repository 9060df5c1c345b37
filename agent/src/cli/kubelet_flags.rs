//! Kubelet's flags that stand for fields of its configuration.
//!
//! One table says which flag is which field. What is given goes over the KubeletConfiguration of
//! `--config` as if it stood there, field by field and a map as a whole as under kubelet, and is checked
//! and shown (`/configz`) with it.

use std::collections::BTreeMap;

use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};
use serde_json::{Map, Value, json};

/// How a flag's text becomes a field's value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shape {
    /// As it is; also durations and quantities.
    Text,
    /// `true` where nothing is said.
    Switch,
    Number,
    /// Parts between commas.
    List,
    /// `key=value,...`
    Pairs,
    /// `signal<value,...`
    Thresholds,
    /// `name:value,...`, a name as often as it has values.
    Headers,
    /// `node:resource=quantity,...;node:...`
    Memory,
    /// Nothing: accepted for the sake of those who give it.
    Nothing,
}

use Shape::{Headers, List, Memory, Nothing, Number, Pairs, Switch, Text, Thresholds};

/// Flag, field (from the top, with dots), shape. Those that `NodeFlags` has are not here.
const FLAGS: &[(&str, &str, Shape)] = &[
    ("allowed-unsafe-sysctls", "allowedUnsafeSysctls", List),
    ("anonymous-auth", "authentication.anonymous.enabled", Switch),
    ("authentication-token-webhook", "authentication.webhook.enabled", Switch),
    ("authentication-token-webhook-cache-ttl", "authentication.webhook.cacheTTL", Text),
    ("authorization-mode", "authorization.mode", Text),
    (
        "authorization-webhook-cache-authorized-ttl",
        "authorization.webhook.cacheAuthorizedTTL",
        Text,
    ),
    (
        "authorization-webhook-cache-unauthorized-ttl",
        "authorization.webhook.cacheUnauthorizedTTL",
        Text,
    ),
    ("cgroups-per-qos", "cgroupsPerQOS", Switch),
    ("client-ca-file", "authentication.x509.clientCAFile", Text),
    ("container-log-max-files", "containerLogMaxFiles", Number),
    ("container-log-max-size", "containerLogMaxSize", Text),
    ("contention-profiling", "enableContentionProfiling", Switch),
    ("cpu-cfs-quota", "cpuCFSQuota", Switch),
    ("cpu-cfs-quota-period", "cpuCFSQuotaPeriod", Text),
    ("cpu-manager-policy", "cpuManagerPolicy", Text),
    ("cpu-manager-policy-options", "cpuManagerPolicyOptions", Pairs),
    ("cpu-manager-reconcile-period", "cpuManagerReconcilePeriod", Text),
    ("enable-controller-attach-detach", "enableControllerAttachDetach", Switch),
    ("enable-debugging-handlers", "enableDebuggingHandlers", Switch),
    ("enable-server", "enableServer", Switch),
    ("enforce-node-allocatable", "enforceNodeAllocatable", List),
    ("event-burst", "eventBurst", Number),
    ("event-qps", "eventRecordQPS", Number),
    ("eviction-hard", "evictionHard", Thresholds),
    ("eviction-max-pod-grace-period", "evictionMaxPodGracePeriod", Number),
    ("eviction-minimum-reclaim", "evictionMinimumReclaim", Pairs),
    ("eviction-pressure-transition-period", "evictionPressureTransitionPeriod", Text),
    ("eviction-soft", "evictionSoft", Thresholds),
    ("eviction-soft-grace-period", "evictionSoftGracePeriod", Pairs),
    ("fail-cgroupv1", "failCgroupV1", Switch),
    ("fail-swap-on", "failSwapOn", Switch),
    ("file-check-frequency", "fileCheckFrequency", Text),
    ("hairpin-mode", "hairpinMode", Text),
    ("http-check-frequency", "httpCheckFrequency", Text),
    ("image-gc-high-threshold", "imageGCHighThresholdPercent", Number),
    ("image-gc-low-threshold", "imageGCLowThresholdPercent", Number),
    ("kernel-memcg-notification", "kernelMemcgNotification", Switch),
    ("kube-reserved", "kubeReserved", Pairs),
    ("kube-reserved-cgroup", "kubeReservedCgroup", Text),
    ("kubelet-cgroups", "kubeletCgroups", Text),
    ("local-storage-capacity-isolation", "localStorageCapacityIsolation", Switch),
    ("make-iptables-util-chains", "makeIPTablesUtilChains", Switch),
    ("manifest-url", "staticPodURL", Text),
    ("manifest-url-header", "staticPodURLHeader", Headers),
    ("max-open-files", "maxOpenFiles", Number),
    ("memory-manager-policy", "memoryManagerPolicy", Text),
    ("minimum-image-ttl-duration", "imageMinimumGCAge", Text),
    ("node-status-max-images", "nodeStatusMaxImages", Number),
    ("node-status-update-frequency", "nodeStatusUpdateFrequency", Text),
    ("pod-max-pids", "podPidsLimit", Number),
    ("pods-per-core", "podsPerCore", Number),
    ("protect-kernel-defaults", "protectKernelDefaults", Switch),
    ("qos-reserved", "qosReserved", Pairs),
    ("read-only-port", "readOnlyPort", Number),
    ("registry-burst", "registryBurst", Number),
    ("registry-qps", "registryPullQPS", Number),
    ("reserved-cpus", "reservedSystemCPUs", Text),
    ("reserved-memory", "reservedMemory", Memory),
    ("rotate-certificates", "rotateCertificates", Switch),
    ("rotate-server-certificates", "serverTLSBootstrap", Switch),
    ("runonce", "runOnce", Switch),
    ("runtime-request-timeout", "runtimeRequestTimeout", Text),
    ("seccomp-default", "seccompDefault", Switch),
    ("serialize-image-pulls", "serializeImagePulls", Switch),
    ("streaming-connection-idle-timeout", "streamingConnectionIdleTimeout", Text),
    ("sync-frequency", "syncFrequency", Text),
    ("system-cgroups", "systemCgroups", Text),
    ("system-reserved", "systemReserved", Pairs),
    ("system-reserved-cgroup", "systemReservedCgroup", Text),
    ("tls-cert-file", "tlsCertFile", Text),
    ("tls-cipher-suites", "tlsCipherSuites", List),
    ("tls-min-version", "tlsMinVersion", Text),
    ("tls-private-key-file", "tlsPrivateKeyFile", Text),
    ("topology-manager-policy", "topologyManagerPolicy", Text),
    ("topology-manager-policy-options", "topologyManagerPolicyOptions", Pairs),
    ("topology-manager-scope", "topologyManagerScope", Text),
    ("volume-plugin-dir", "volumePluginDir", Text),
    ("volume-stats-agg-period", "volumeStatsAggPeriod", Text),
    // Of cAdvisor, of klog, and of what this node has no need of.
    ("container-hints", "", Nothing),
    ("global-housekeeping-interval", "", Nothing),
    ("housekeeping-interval", "", Nothing),
    ("log-flush-frequency", "", Nothing),
    ("logtostderr", "", Nothing),
    ("pod-infra-container-image", "", Nothing),
    ("runtime-cgroups", "", Nothing),
    ("vmodule", "", Nothing),
];

/// What was given, by the path of its field.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KubeletFlags(BTreeMap<&'static str, Value>);

impl KubeletFlags {
    /// Puts what was given into the `fields` of a KubeletConfiguration.
    pub fn put_into(&self, fields: &mut Map<String, Value>) {
        self.0.iter().for_each(|(path, value)| put(fields, path, value.clone()));
    }

    /// These, and where they say nothing `other`.
    pub(super) fn or(self, other: Self) -> Self {
        let mut all = other.0;
        all.extend(self.0);
        Self(all)
    }

    /// The flag by which the field named `field` (`KubeletConfiguration.evictionHard...`) was given.
    pub(super) fn flag_of(&self, field: &str) -> Option<String> {
        let top = |path: &str| path.split(['.', '[']).next().unwrap_or_default().to_owned();
        let named = top(field.strip_prefix("KubeletConfiguration.")?);
        let given = |path: &str| top(path) == named && self.0.contains_key(path);
        FLAGS.iter().find(|(_, path, _)| given(path)).map(|(flag, ..)| format!("--{flag}"))
    }
}

impl Args for KubeletFlags {
    fn augment_args(command: Command) -> Command {
        FLAGS.iter().fold(command, |command, (flag, field, shape)| {
            let arg = Arg::new(*flag).long(*flag).help_heading("Of KubeletConfiguration");
            let arg = match shape {
                Switch => arg
                    .value_name("true|false")
                    .num_args(0..=1)
                    .require_equals(true)
                    .default_missing_value("true"),
                Number => arg.value_name("N").allow_negative_numbers(true),
                List => arg.value_name("A,B,..."),
                Pairs => arg.value_name("KEY=VALUE,..."),
                Thresholds => arg.value_name("SIGNAL<VALUE,..."),
                Headers => arg.value_name("NAME:VALUE,..."),
                Memory => arg.value_name("NODE:RESOURCE=QUANTITY,...;..."),
                Text => arg.value_name("VALUE"),
                Nothing => arg.num_args(0..=1).require_equals(false).hide(true),
            };
            let shape = *shape;
            let read = move |text: &str| value(shape, text);
            // Kubelet takes lists in several flags, too.
            let arg = arg.action(ArgAction::Append).value_parser(read);
            command.arg(if field.is_empty() { arg } else { arg.help(format!("Sets {field}")) })
        })
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for KubeletFlags {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let fields = FLAGS.iter().filter(|(_, field, _)| !field.is_empty());
        let given = fields.filter_map(|(flag, field, _)| {
            let all = matches.get_many::<Value>(flag).into_iter().flatten().cloned();
            Some((*field, all.reduce(joined)?))
        });
        Ok(Self(given.collect()))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

/// Two values of one flag: lists and pairs grow, of others the later counts.
fn joined(first: Value, then: Value) -> Value {
    match (first, then) {
        (Value::Array(mut first), Value::Array(then)) => {
            first.extend(then);
            first.into()
        }
        (Value::Object(mut first), Value::Object(then)) => {
            first.extend(then);
            first.into()
        }
        (_, then) => then,
    }
}

fn put(fields: &mut Map<String, Value>, path: &str, value: Value) {
    match path.split_once('.') {
        None => {
            fields.insert(path.into(), value);
        }
        Some((first, rest)) => {
            let inner = fields.entry(first).or_insert(Value::Null);
            if !inner.is_object() {
                *inner = json!({});
            }
            if let Value::Object(inner) = inner {
                put(inner, rest, value);
            }
        }
    }
}

/// `text` as the value of a field.
fn value(shape: Shape, text: &str) -> Result<Value, String> {
    let parts = || text.split(',').map(str::trim).filter(|part| !part.is_empty());
    let pairs = |sign: char, parts: &mut dyn Iterator<Item = &str>| {
        let pair = |part: &str| {
            let (key, value) =
                part.split_once(sign).ok_or_else(|| format!("{part:?} has no {sign:?}"))?;
            Ok((key.trim().to_owned(), json!(value.trim())))
        };
        parts.map(pair).collect::<Result<Map<_, _>, String>>()
    };
    Ok(match shape {
        Text => json!(text),
        Switch => json!(text.parse::<bool>().map_err(|error| error.to_string())?),
        Number => json!(text.parse::<i64>().map_err(|error| error.to_string())?),
        List => parts().collect(),
        Pairs => pairs('=', &mut parts())?.into(),
        Thresholds => pairs('<', &mut parts())?.into(),
        Headers => {
            let mut all = Map::new();
            for part in parts() {
                let (name, value) =
                    part.split_once(':').ok_or_else(|| format!("{part:?} has no ':'"))?;
                let values = all.entry(name.trim()).or_insert_with(|| json!([]));
                if let Value::Array(values) = values {
                    values.push(json!(value.trim()));
                }
            }
            all.into()
        }
        Memory => {
            let of_node = |text: &str| {
                let (node, limits) =
                    text.split_once(':').ok_or_else(|| format!("{text:?} names no NUMA node"))?;
                let node: u32 =
                    node.trim().parse().map_err(|error| format!("{node:?}: {error}"))?;
                let limits = pairs('=', &mut limits.split(','))?;
                Ok::<_, String>(json!({"numaNode": node, "limits": limits}))
            };
            let nodes = text.split(';').filter(|part| !part.trim().is_empty()).map(of_node);
            nodes.collect::<Result<_, _>>()?
        }
        Nothing => Value::Null,
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn given(line: &[&str]) -> Result<Value, String> {
        let command = KubeletFlags::augment_args(Command::new("run").no_binary_name(true));
        let matches = command.try_get_matches_from(line).map_err(|error| error.to_string())?;
        let mut fields = Map::new();
        KubeletFlags::from_arg_matches(&matches).unwrap().put_into(&mut fields);
        Ok(fields.into())
    }

    #[test]
    fn flags_become_the_fields_that_they_stand_for() {
        for (line, expected) in [
            (
                &["--eviction-hard=memory.available<100Mi,nodefs.available<10%"][..],
                json!({"evictionHard": {"memory.available": "100Mi", "nodefs.available": "10%"}}),
            ),
            (
                &["--kube-reserved", "cpu=100m,memory=1Gi", "--kube-reserved=pid=100"],
                json!({"kubeReserved": {"cpu": "100m", "memory": "1Gi", "pid": "100"}}),
            ),
            (
                &[
                    "--anonymous-auth=false",
                    "--client-ca-file",
                    "/ca",
                    "--authentication-token-webhook",
                ],
                json!({"authentication": {"anonymous": {"enabled": false}, "webhook": {"enabled": true},
                "x509": {"clientCAFile": "/ca"}}}),
            ),
            (
                &["--read-only-port=0", "--pod-max-pids", "-1"],
                json!({"readOnlyPort": 0, "podPidsLimit": -1}),
            ),
            (&["--read-only-port=1", "--read-only-port=2"], json!({"readOnlyPort": 2})),
            (&["--allowed-unsafe-sysctls=a.*,b"], json!({"allowedUnsafeSysctls": ["a.*", "b"]})),
            (&["--enforce-node-allocatable="], json!({"enforceNodeAllocatable": []})),
            (
                &["--manifest-url-header=a:1,b:2,a:3"],
                json!({"staticPodURLHeader": {"a": ["1", "3"], "b": ["2"]}}),
            ),
            (
                &["--reserved-memory=0:memory=1Gi,hugepages-2Mi=2Mi;1:memory=2Gi"],
                json!({"reservedMemory": [
                {"numaNode": 0, "limits": {"memory": "1Gi", "hugepages-2Mi": "2Mi"}},
                {"numaNode": 1, "limits": {"memory": "2Gi"}}]}),
            ),
            (&["--housekeeping-interval=10s", "--logtostderr"], json!({})),
        ] {
            assert_eq!(given(line).unwrap(), expected, "{line:?}");
        }
        for line in [
            "--read-only-port=x",
            "--kube-reserved=cpu",
            "--eviction-hard=memory.available=1",
            "--anonymous-auth=maybe",
            "--reserved-memory=memory=1Gi",
            "--no-such-flag",
        ] {
            assert!(given(&[line]).is_err(), "{line}");
        }
    }

    #[test]
    fn every_flag_is_of_a_field_that_kubelet_has() {
        for (flag, path, _) in FLAGS.iter().filter(|(_, path, _)| !path.is_empty()) {
            let mut fields = Map::new();
            put(&mut fields, path, Value::Null);
            let name = path.split('.').next().unwrap();
            assert!(crate::config::has_kubelet_field(name), "--{flag}: {path}");
        }
    }

    #[test]
    fn an_error_in_a_field_names_the_flag_that_gave_it() {
        let flags = KubeletFlags([("evictionHard", json!({}))].into());
        let of = |field| flags.flag_of(field);
        let flag = Some("--eviction-hard".to_owned());
        assert_eq!(of("KubeletConfiguration.evictionHard.memory.available"), flag);
        assert_eq!(of("KubeletConfiguration.evictionHard"), flag);
        assert_eq!(of("KubeletConfiguration.evictionSoft"), None);
        assert_eq!(of("--eviction-hard"), None);
    }
}
