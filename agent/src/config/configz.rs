//! The configuration as `/configz` shows it: upstream's defaults, what the file says over them, what
//! flags say over both.

use std::net::SocketAddr;

use serde_json::{Map, Value, json};

use super::CgroupDriver;

/// Defaults of `KubeletConfiguration` v1beta1 in 1.36.
const DEFAULTS: &str = r#"{
"enableServer": true,
"syncFrequency": "1m0s",
"fileCheckFrequency": "20s",
"httpCheckFrequency": "20s",
"rotateCertificates": false,
"serverTLSBootstrap": false,
"authentication": {
    "x509": {},
    "webhook": {"enabled": true, "cacheTTL": "2m0s"},
    "anonymous": {"enabled": false}
},
"authorization": {
    "mode": "Webhook",
    "webhook": {"cacheAuthorizedTTL": "5m0s", "cacheUnauthorizedTTL": "30s"}
},
"registryPullQPS": 5,
"registryBurst": 10,
"imagePullCredentialsVerificationPolicy": "NeverVerifyPreloadedImages",
"eventRecordQPS": 50,
"eventBurst": 100,
"enableDebuggingHandlers": true,
"healthzPort": 10248,
"healthzBindAddress": "127.0.0.1",
"oomScoreAdj": -999,
"clusterDomain": "cluster.local",
"streamingConnectionIdleTimeout": "4h0m0s",
"nodeStatusUpdateFrequency": "10s",
"nodeStatusReportFrequency": "5m0s",
"nodeLeaseDurationSeconds": 40,
"imageMinimumGCAge": "2m0s",
"imageMaximumGCAge": "0s",
"imageGCHighThresholdPercent": 85,
"imageGCLowThresholdPercent": 80,
"volumeStatsAggPeriod": "1m0s",
"cgroupsPerQOS": true,
"cpuManagerPolicy": "none",
"cpuManagerReconcilePeriod": "10s",
"memoryManagerPolicy": "None",
"topologyManagerPolicy": "none",
"topologyManagerScope": "container",
"runtimeRequestTimeout": "2m0s",
"hairpinMode": "promiscuous-bridge",
"maxPods": 110,
"podPidsLimit": -1,
"resolvConf": "/etc/resolv.conf",
"cpuCFSQuota": true,
"cpuCFSQuotaPeriod": "100ms",
"nodeStatusMaxImages": 50,
"maxOpenFiles": 1000000,
"contentType": "application/vnd.kubernetes.protobuf",
"kubeAPIQPS": 50,
"kubeAPIBurst": 100,
"serializeImagePulls": true,
"evictionHard": {
    "imagefs.available": "15%",
    "imagefs.inodesFree": "5%",
    "memory.available": "100Mi",
    "nodefs.available": "10%",
    "nodefs.inodesFree": "5%"
},
"evictionPressureTransitionPeriod": "5m0s",
"mergeDefaultEvictionSettings": false,
"enableControllerAttachDetach": true,
"makeIPTablesUtilChains": true,
"iptablesMasqueradeBit": 14,
"iptablesDropBit": 15,
"failSwapOn": true,
"memorySwap": {},
"containerLogMaxSize": "10Mi",
"containerLogMaxFiles": 5,
"containerLogMaxWorkers": 1,
"containerLogMonitorInterval": "10s",
"configMapAndSecretChangeDetectionStrategy": "Watch",
"enforceNodeAllocatable": ["pods"],
"podLogsDir": "/var/log/pods",
"volumePluginDir": "/usr/libexec/kubernetes/kubelet-plugins/volume/exec/",
"logging": {
    "format": "text",
    "flushFrequency": "5s",
    "verbosity": 0,
    "options": {"text": {"infoBufferSize": "0"}, "json": {"infoBufferSize": "0"}}
},
"enableSystemLogHandler": true,
"enableSystemLogQuery": false,
"shutdownGracePeriod": "0s",
"shutdownGracePeriodCriticalPods": "0s",
"crashLoopBackOff": {"maxContainerRestartPeriod": "5m0s"},
"enableProfilingHandler": true,
"enableDebugFlagsHandler": true,
"seccompDefault": false,
"memoryThrottlingFactor": 0.9,
"memoryReservationPolicy": "None",
"registerNode": true,
"localStorageCapacityIsolation": true,
"containerRuntimeEndpoint": "unix:///run/longshore/cri.sock",
"failCgroupV1": false
}"#;

/// Numbers of which zero is "as usual", as it is of every duration.
const ZERO_IS_UNSET: [&str; 7] = [
    "eventBurst",
    "flushFrequency",
    "kubeAPIBurst",
    "maxOpenFiles",
    "maxPods",
    "nodeLeaseDurationSeconds",
    "registryBurst",
];

/// Whether `value` of field `name` says nothing where there is a default.
fn says_nothing(name: &str, value: &Value) -> bool {
    match value {
        Value::Null => true,
        // Pods inherit nothing of the node's resolver then.
        Value::String(text) if name == "resolvConf" && text.is_empty() => false,
        Value::String(text) => matches!(text.as_str(), "" | "0s"),
        Value::Number(number) => ZERO_IS_UNSET.contains(&name) && number.as_i64() == Some(0),
        _ => false,
    }
}

/// Whether field `name` is written down, and not just for "as usual".
fn given(written: &Map<String, Value>, name: &str) -> bool {
    written.get(name).is_some_and(|value| !says_nothing(name, value))
}

/// Defaults that follow from other fields.
fn follow(shown: &mut Value, written: &Map<String, Value>) {
    let Value::Object(fields) = shown else { return };
    if given(written, "nodeStatusUpdateFrequency") && !given(written, "nodeStatusReportFrequency") {
        let update = fields.get("nodeStatusUpdateFrequency").cloned().unwrap_or_default();
        fields.insert("nodeStatusReportFrequency".into(), update);
    }
    let parallel = written.get("maxParallelImagePulls").and_then(Value::as_i64);
    if !given(written, "serializeImagePulls") && parallel.is_some_and(|pulls| pulls >= 2) {
        fields.insert("serializeImagePulls".into(), false.into());
    }
    if fields.get("podPidsLimit").and_then(Value::as_i64).is_some_and(|limit| limit < 0) {
        fields.insert("podPidsLimit".into(), (-1).into());
    }
}

/// Lays what is written over the defaults; thresholds `join` theirs, or take their place as a whole.
pub(super) fn lay_over(under: &mut Value, over: Value, join: bool) {
    match (under, over) {
        (Value::Object(under), Value::Object(over)) => {
            for (name, value) in over {
                match under.get_mut(&name) {
                    Some(_) if says_nothing(&name, &value) => {}
                    Some(before) if join || name != "evictionHard" => {
                        lay_over(before, value, join);
                    }
                    _ => {
                        under.insert(name, value);
                    }
                }
            }
        }
        (under, over) => *under = over,
    }
}

/// What `/configz` shows under `kubeletconfig`.
pub(super) fn shown(
    written: Map<String, Value>,
    address: SocketAddr,
    cgroup_driver: CgroupDriver,
) -> Value {
    let mut shown: Value = serde_json::from_str(DEFAULTS).unwrap_or_default();
    let join = written.get("mergeDefaultEvictionSettings") == Some(&Value::Bool(true));
    lay_over(&mut shown, Value::Object(written.clone()), join);
    follow(&mut shown, &written);
    if let Value::Object(fields) = &mut shown {
        fields.insert("kind".into(), "KubeletConfiguration".into());
        fields.insert("apiVersion".into(), "kubelet.config.k8s.io/v1beta1".into());
        fields.insert("address".into(), address.ip().to_string().into());
        fields.insert("port".into(), address.port().into());
        let driver = match cgroup_driver {
            CgroupDriver::Cgroupfs => "cgroupfs",
            CgroupDriver::Systemd => "systemd",
        };
        fields.insert("cgroupDriver".into(), driver.into());
        // Headers of a manifest URL may hold credentials.
        if fields.contains_key("staticPodURLHeader") {
            fields.insert("staticPodURLHeader".into(), json!({"<masked>": ["<masked>"]}));
        }
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(written: Value) -> Value {
        let Value::Object(written) = written else { unreachable!() };
        shown(written, "0.0.0.0:10250".parse().unwrap(), CgroupDriver::Systemd)
    }

    #[test]
    fn zero_is_the_default_where_upstream_has_it_so() {
        let shown = of(json!({
            "logging": {"flushFrequency": 0, "verbosity": 0, "options": {"json": {"infoBufferSize": "0"}}},
            "eventBurst": 0, "kubeAPIBurst": 0, "maxOpenFiles": 0, "maxPods": 0,
            "nodeLeaseDurationSeconds": 0, "registryBurst": 0,
            "registryPullQPS": 0, "healthzPort": 0, "nodeStatusMaxImages": 0, "resolvConf": "",
        }));
        assert_eq!(shown["logging"]["flushFrequency"], "5s");
        assert_eq!(shown["logging"]["verbosity"], 0);
        for (field, value) in [
            ("eventBurst", 100),
            ("kubeAPIBurst", 100),
            ("maxOpenFiles", 1_000_000),
            ("maxPods", 110),
            ("nodeLeaseDurationSeconds", 40),
            ("registryBurst", 10),
            // Here zero means none.
            ("registryPullQPS", 0),
            ("healthzPort", 0),
            ("nodeStatusMaxImages", 0),
        ] {
            assert_eq!(shown[field], value, "{field}");
        }
        assert_eq!(shown["resolvConf"], "");
        assert_eq!(
            of(json!({"logging": {"flushFrequency": "1s"}}))["logging"]["flushFrequency"],
            "1s"
        );
    }

    #[test]
    fn some_defaults_follow_from_other_fields() {
        let usual = of(json!({}));
        assert_eq!(usual["nodeStatusReportFrequency"], "5m0s");
        assert_eq!(
            (&usual["serializeImagePulls"], &usual["podPidsLimit"]),
            (&json!(true), &json!(-1))
        );
        assert_eq!(usual["podLogsDir"], "/var/log/pods");
        let shown = of(json!({
            "nodeStatusUpdateFrequency": "20s", "nodeStatusReportFrequency": "0s",
            "maxParallelImagePulls": 5, "podPidsLimit": -3,
            "mergeDefaultEvictionSettings": true, "evictionHard": {"memory.available": "1Gi"},
        }));
        assert_eq!(shown["nodeStatusReportFrequency"], "20s");
        assert_eq!(shown["serializeImagePulls"], false);
        assert_eq!(shown["podPidsLimit"], -1);
        assert_eq!(shown["evictionHard"]["memory.available"], "1Gi");
        assert_eq!(shown["evictionHard"]["nodefs.available"], "10%");
        let both =
            of(json!({"nodeStatusUpdateFrequency": "20s", "nodeStatusReportFrequency": "1m"}));
        assert_eq!(both["nodeStatusReportFrequency"], "1m");
    }

    #[test]
    fn the_file_lies_over_the_defaults_and_zero_says_nothing() {
        let written = json!({
            "maxPods": 30,
            "syncFrequency": "0s",
            "authentication": {"x509": {"clientCAFile": "/ca.crt"}, "webhook": {"cacheTTL": "0s"}},
            "evictionHard": {"memory.available": "1Gi"},
            "staticPodURLHeader": {"Authorization": ["secret"]},
        });
        let Value::Object(written) = written else { unreachable!() };
        let address = "[::]:11250".parse().unwrap();
        let shown = shown(written, address, CgroupDriver::Systemd);
        assert_eq!(shown["maxPods"], 30);
        assert_eq!(shown["syncFrequency"], "1m0s");
        assert_eq!(shown["authentication"]["x509"]["clientCAFile"], "/ca.crt");
        assert_eq!(shown["authentication"]["webhook"]["cacheTTL"], "2m0s");
        assert_eq!(shown["evictionHard"], json!({"memory.available": "1Gi"}));
        assert_eq!((&shown["port"], &shown["address"]), (&json!(11250), &json!("::")));
        assert_eq!(shown["cgroupDriver"], "systemd");
        assert!(!shown.to_string().contains("secret"));
    }
}
