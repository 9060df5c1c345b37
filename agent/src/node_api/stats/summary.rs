//! `/stats/summary` in the shape of `stats/v1alpha1`. Pure.

use jiff::Timestamp;
use serde_json::{Map, Value, json};

use super::gather::{ContainerStats, Depth, Interface, PodStats, Sample, Snapshot};
use crate::node::machine::FileSystem;
use crate::volume::VolumeUsage;

/// Kubernetes writes whole seconds.
fn time(at: Timestamp) -> Value {
    Timestamp::from_second(at.as_second()).unwrap_or(at).to_string().into()
}

fn cpu(sample: &Sample) -> Value {
    let mut cpu = json!({"time": time(sample.at), "usageCoreNanoSeconds": sample.usage.cpu});
    if let Some(rate) = sample.nano_cores {
        cpu["usageNanoCores"] = rate.into();
    }
    cpu
}

fn memory(sample: &Sample, available: Option<u64>) -> Value {
    let usage = &sample.usage;
    let mut memory = json!({
        "time": time(sample.at),
        "usageBytes": usage.memory,
        "workingSetBytes": usage.working_set(),
        "rssBytes": usage.anon,
        "pageFaults": usage.page_faults,
        "majorPageFaults": usage.major_faults,
    });
    let limit = usage.memory_limit.map(|limit| limit.saturating_sub(usage.working_set()));
    if let Some(available) = available.or(limit) {
        memory["availableBytes"] = available.into();
    }
    memory
}

fn swap(sample: &Sample, available: Option<u64>) -> Value {
    let usage = &sample.usage;
    let left = available.or(usage.swap_limit.map(|limit| limit.saturating_sub(usage.swap)));
    let mut swap = json!({"time": time(sample.at), "swapUsageBytes": usage.swap});
    if let Some(left) = left {
        swap["swapAvailableBytes"] = left.into();
    }
    swap
}

fn network(at: Timestamp, interfaces: &[Interface]) -> Value {
    let one = |i: &Interface| {
        json!({
            "name": i.name,
            "rxBytes": i.received[0],
            "rxErrors": i.received[2],
            "txBytes": i.sent[0],
            "txErrors": i.sent[2],
        })
    };
    let mut network = match interfaces.iter().find(|i| i.name == "eth0").or(interfaces.first()) {
        Some(first) => one(first),
        None => json!({"name": ""}),
    };
    network["time"] = time(at);
    network["interfaces"] = interfaces.iter().map(one).collect();
    network
}

fn file_system(at: Timestamp, fs: Option<FileSystem>, used: Option<(u64, u64)>) -> Value {
    let mut shown = json!({"time": time(at)});
    if let Some(fs) = fs {
        shown["availableBytes"] = fs.available.into();
        shown["capacityBytes"] = fs.capacity.into();
        shown["inodesFree"] = fs.inodes_free.into();
        shown["inodes"] = fs.inodes.into();
    }
    let all = fs.map(|fs| {
        (fs.capacity.saturating_sub(fs.available), fs.inodes.saturating_sub(fs.inodes_free))
    });
    if let Some((bytes, inodes)) = used.or(all) {
        shown["usedBytes"] = bytes.into();
        shown["inodesUsed"] = inodes.into();
    }
    shown
}

fn volume(usage: &VolumeUsage) -> Value {
    let mut shown = json!({
        "name": usage.name,
        "time": time(usage.at),
        "availableBytes": usage.bytes.available,
        "capacityBytes": usage.bytes.capacity,
        "usedBytes": usage.bytes.used,
        "inodesFree": usage.inodes.available,
        "inodes": usage.inodes.capacity,
        "inodesUsed": usage.inodes.used,
    });
    if let Some(claim) = &usage.claim {
        shown["pvcRef"] = json!({"name": *claim.name, "namespace": *claim.namespace});
    }
    shown
}

fn container(container: &ContainerStats, snapshot: &Snapshot, depth: Depth) -> Value {
    let mut shown = json!({"name": container.name});
    if let Some(started) = container.started {
        shown["startTime"] = time(started);
    }
    let at = snapshot.node.sample.at;
    if let Some((_, sample)) = &container.cgroup {
        shown["cpu"] = cpu(sample);
        shown["memory"] = memory(sample, None);
        shown["swap"] = swap(sample, None);
    }
    if depth == Depth::All {
        shown["rootfs"] = file_system(at, snapshot.node.imagefs, container.layer);
        shown["logs"] = file_system(at, snapshot.node.rootfs, Some(container.logs));
    }
    shown
}

fn pod(pod: &PodStats, snapshot: &Snapshot, depth: Depth) -> Value {
    let at = snapshot.node.sample.at;
    let containers: Vec<Value> =
        pod.containers.iter().map(|c| container(c, snapshot, depth)).collect();
    let mut shown = json!({
        "podRef": {"name": pod.key.1, "namespace": pod.key.0, "uid": pod.uid},
        "startTime": pod.started.map(time),
        "containers": containers,
    });
    if let Some((_, sample)) = &pod.cgroup {
        shown["cpu"] = cpu(sample);
        shown["memory"] = memory(sample, None);
        shown["swap"] = swap(sample, None);
        shown["process_stats"] = json!({"process_count": sample.usage.processes});
    }
    if depth == Depth::All {
        shown["network"] = network(at, &pod.network);
        if !pod.volumes.is_empty() {
            shown["volume"] = pod.volumes.iter().map(volume).collect();
        }
        let used = pod.containers.iter().fold((0, 0), |(bytes, inodes), c| {
            let layer = c.layer.unwrap_or_default();
            (bytes + layer.0 + c.logs.0, inodes + layer.1 + c.logs.1)
        });
        shown["ephemeral-storage"] = file_system(at, snapshot.node.rootfs, Some(used));
    }
    shown
}

/// The whole summary.
pub(super) fn render(node_name: &str, snapshot: &Snapshot, depth: Depth) -> Value {
    let stats = &snapshot.node;
    let sample = &stats.sample;
    let system: Vec<Value> = stats
        .system
        .iter()
        .map(|(name, _, sample)| {
            json!({
                "name": name,
                "startTime": time(stats.started),
                "cpu": cpu(sample),
                "memory": memory(sample, None),
            })
        })
        .collect();
    let mut node: Map<String, Value> = Map::new();
    node.insert("nodeName".into(), node_name.into());
    node.insert("systemContainers".into(), system.into());
    node.insert("startTime".into(), time(stats.started));
    node.insert("cpu".into(), cpu(sample));
    node.insert("memory".into(), memory(sample, Some(stats.memory_available)));
    let swap_left = stats.swap_total.saturating_sub(sample.usage.swap);
    node.insert("swap".into(), swap(sample, Some(swap_left)));
    if depth == Depth::All {
        let at = sample.at;
        node.insert("network".into(), network(at, &stats.network));
        node.insert("fs".into(), file_system(at, stats.rootfs, None));
        let images = (stats.image_bytes, stats.image_inodes);
        let written = snapshot.pods.iter().flat_map(|pod| &pod.containers).fold(
            (0, 0),
            |(bytes, inodes), c| {
                let layer = c.layer.unwrap_or_default();
                (bytes + layer.0, inodes + layer.1)
            },
        );
        node.insert(
            "runtime".into(),
            json!({
                "imageFs": file_system(at, stats.imagefs, Some(images)),
                "containerFs": file_system(at, stats.imagefs, Some(written)),
            }),
        );
        node.insert(
            "rlimit".into(),
            json!({"time": time(at), "maxpid": stats.pids_max, "curproc": stats.pids}),
        );
    }
    let pods: Vec<Value> = snapshot.pods.iter().map(|p| pod(p, snapshot, depth)).collect();
    json!({"node": node, "pods": pods})
}
