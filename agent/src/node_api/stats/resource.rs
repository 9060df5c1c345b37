//! `/metrics/resource`: what metrics-server scrapes, under upstream's names. Pure.

use super::gather::{Sample, Snapshot};
use super::text::Exposition;
use super::text::Kind::{Counter, Gauge};

fn seconds(nanos: u64) -> f64 {
    nanos as f64 / 1e9
}

pub(super) fn render(snapshot: &Snapshot) -> String {
    let mut out = Exposition::default();
    let node = &snapshot.node.sample;
    put(
        &mut out,
        [
            (
                "node_cpu_usage_seconds_total",
                "Cumulative cpu time consumed by the node in core-seconds",
            ),
            ("node_memory_working_set_bytes", "Current working set of the node in bytes"),
            (
                "node_swap_usage_bytes",
                "Current swap usage of the node in bytes. Reported only on non-windows systems",
            ),
        ],
        &[],
        node,
    );
    for pod in &snapshot.pods {
        let (namespace, name) = (pod.key.0.as_str(), pod.key.1.as_str());
        for container in &pod.containers {
            let Some((_, sample)) = &container.cgroup else { continue };
            let labels =
                [("container", container.name.as_str()), ("namespace", namespace), ("pod", name)];
            put(
                &mut out,
                [
                    (
                        "container_cpu_usage_seconds_total",
                        "Cumulative cpu time consumed by the container in core-seconds",
                    ),
                    (
                        "container_memory_working_set_bytes",
                        "Current working set of the container in bytes",
                    ),
                    (
                        "container_swap_usage_bytes",
                        "Current amount of the container swap usage in bytes. Reported only on non-windows systems",
                    ),
                ],
                &labels,
                sample,
            );
            if let Some(limit) = sample.usage.swap_limit {
                let metric = (
                    "container_swap_limit_bytes",
                    Gauge,
                    "Current amount of the container swap limit in bytes. Reported only on non-windows systems",
                );
                out.sample(metric, &labels, limit as f64, Some(sample.at.as_millisecond()));
            }
            if let Some(started) = container.started {
                let metric = (
                    "container_start_time_seconds",
                    Gauge,
                    "Start time of the container since unix epoch in seconds",
                );
                out.sample(metric, &labels, started.as_millisecond() as f64 / 1e3, None);
            }
        }
        if let Some((_, sample)) = &pod.cgroup {
            put(
                &mut out,
                [
                    (
                        "pod_cpu_usage_seconds_total",
                        "Cumulative cpu time consumed by the pod in core-seconds",
                    ),
                    ("pod_memory_working_set_bytes", "Current working set of the pod in bytes"),
                    (
                        "pod_swap_usage_bytes",
                        "Current amount of the pod swap usage in bytes. Reported only on non-windows systems",
                    ),
                ],
                &[("namespace", namespace), ("pod", name)],
                sample,
            );
        }
    }
    let failed = f64::from(u8::from(snapshot.error));
    let help = "1 if there was an error while getting container metrics, 0 otherwise";
    out.sample(("resource_scrape_error", Gauge, help), &[], failed, None);
    out.sample(("scrape_error", Gauge, help), &[], failed, None);
    out.render()
}

fn put(
    out: &mut Exposition,
    [cpu, memory, swap]: [(&'static str, &'static str); 3],
    labels: &[(&str, &str)],
    sample: &Sample,
) {
    let at = Some(sample.at.as_millisecond());
    out.sample((cpu.0, Counter, cpu.1), labels, seconds(sample.usage.cpu), at);
    out.sample((memory.0, Gauge, memory.1), labels, sample.usage.working_set() as f64, at);
    out.sample((swap.0, Gauge, swap.1), labels, sample.usage.swap as f64, at);
}
