//! The names of metrics, held to docs/metrics.md: what it says is there is there, and nothing else.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::stats::example;
use super::tests::{admin, rig};
use crate::metrics::{ClientLabels, METRICS, PodResourcesCall, ProbeLabels, VolumeWork};

/// Names in a text, without those that are the node's own.
fn names(text: &str) -> BTreeSet<String> {
    let types = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next());
    types
        .filter(|name| !["longshore_", "containerd_"].iter().any(|own| name.starts_with(own)))
        .map(str::to_owned)
        .collect()
}

/// One value of each metric that has labels, which shows only then.
fn touch() {
    let second = Duration::from_secs(1);
    METRICS.runtime_operation("Version", second, true);
    METRICS.image_pulled(1, second);
    METRICS.client_request(
        &ClientLabels { code: "200".into(), host: "h".into(), method: "GET".into() },
        second,
    );
    METRICS.images.provider_ran("ecr", second, true);
    METRICS.images.providers_configured("sha256:0");
    METRICS.images.must_pull_checked("error");
    METRICS.images.image_requested("Always", None, Some(true));
    METRICS.worker_turned(second);
    METRICS.cgroup_operation("create", second);
    METRICS.relisted(second, Some(second));
    let plugins = ["kubernetes.io/empty-dir".to_owned()].into_iter();
    METRICS.volumes_done(VolumeWork::Mount, plugins, second, false);
    METRICS.csi_called("d.example", "/csi.v1.Node/NodeStageVolume".into(), "OK".into(), second);
    METRICS.sandbox_run("", second, true);
    METRICS.pod_restarted(true);
    METRICS.evicted("emptydirfs.limit");
    METRICS.eviction_stats_aged("memory.available", second);
    METRICS.images.image_collected("space");
    METRICS.pod_rejected("Evicted");
    METRICS.container_started("container", Some("RunContainerError"));
    METRICS.device_plugin_registered("a.example/b");
    METRICS.devices_allocated("a.example/b", second);
    METRICS.dra_operation("PrepareResources", second, true);
    METRICS.dra_called("d.example", "/DRAPlugin/NodePrepareResources".into(), "OK".into(), second);
    METRICS.dra_in_use((BTreeMap::new(), 0));
    METRICS.cpus_assigned(1, 1, &BTreeMap::from([(0, 1)]));
    METRICS.cpus_pinned(true, true);
    METRICS.cpus_pinned(false, true);
    for call in [PodResourcesCall::List, PodResourcesCall::Allocatable, PodResourcesCall::Get] {
        METRICS.pod_resources_asked(call, true);
    }
    let probe = ProbeLabels {
        probe_type: "Liveness".into(),
        result: "successful".into(),
        container: "c".into(),
        pod: "p".into(),
        namespace: "n".into(),
        pod_uid: "u".into(),
    };
    METRICS.probed(&probe, Some(second));
}

#[tokio::test]
async fn metrics_are_those_of_the_page_about_them() {
    touch();
    let rig = rig(|_| {}).await;
    let mut shown = BTreeMap::new();
    for endpoint in ["/metrics", "/metrics/probes", "/metrics/slis"] {
        // The first request is counted when it has ended.
        rig.ask("GET", endpoint, Some(admin(&rig)), None).await;
        let (status, text) = rig.ask("GET", endpoint, Some(admin(&rig)), None).await;
        assert_eq!(status, 200, "{endpoint}");
        shown.insert(endpoint.to_owned(), names(&text));
    }
    let machine = crate::node::machine::Machine::read();
    let [cadvisor, resource] = example(&machine);
    shown.insert("/metrics/cadvisor".into(), names(&cadvisor));
    shown.insert("/metrics/resource".into(), names(&resource));
    // What needs pods, or something that happened, shows with it.
    let later = |name: &str| {
        name == "volume_manager_total_volumes" || name.starts_with("kubelet_volume_stats_")
    };
    let page = include_str!("../../../docs/metrics.md");
    let mut listed = BTreeMap::<String, BTreeSet<String>>::new();
    for line in page.lines().filter(|line| line.starts_with("| `")) {
        let cells: Vec<_> = line.trim_matches(['|', ' ']).split(" | ").collect();
        let [name, endpoint, here] = cells[..] else { panic!("three cells: {line}") };
        let (name, endpoint) = (name.trim_matches('`'), endpoint.trim_matches('`'));
        let is_shown = shown[endpoint].contains(name) || later(name);
        assert_eq!(is_shown, here == "yes", "{name} of {endpoint}: {here}");
        listed.entry(endpoint.to_owned()).or_default().insert(name.to_owned());
    }
    for (endpoint, names) in &shown {
        let unlisted: Vec<_> = names.difference(&listed[endpoint]).collect();
        assert!(unlisted.is_empty(), "not on the page: {unlisted:?} of {endpoint}");
    }
}
