//! Pods and QoS classes as systemd's slices, for the cgroup driver `systemd`.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use cri_shim::systemd::{self, Limits, Systemd};

use super::fs::Spared;
use super::{CgroupError, Group, GroupLimits, cpu_weight, pod_path, slice_name};
use crate::ids::PodUid;
use crate::pod::config::resources::PodLimits;

/// The node's slices.
pub(super) struct Slices {
    systemd: Systemd,
    root: String,
    period_us: u64,
    pids: Option<i64>,
    /// The classes and what is above them, with the weight they were last given.
    parents: Mutex<HashMap<String, Option<u64>>>,
}

impl Slices {
    pub(super) fn new(root: &str, period_us: u64, pids: Option<i64>) -> Self {
        let (systemd, parents) = (Systemd::default(), Mutex::default());
        Self { systemd, root: root.to_owned(), period_us, pids, parents }
    }

    /// Makes a pod's slice and those it is in, or gives them their limits.
    pub(super) async fn ensure(
        &self,
        uid: &PodUid,
        qos: &str,
        class_shares: Option<i64>,
        limits: PodLimits,
    ) -> Result<(), CgroupError> {
        let path = pod_path(qos, uid);
        for depth in 1..path.len() {
            let weight = class_shares.filter(|_| depth > 1).map(weight);
            self.ensure_parent(&path[..depth], weight).await?;
        }
        let limits = Limits {
            cpu_weight: Some(weight(limits.cpu_shares)),
            // A limit that was there and is no more is taken away.
            cpu_quota: Some(limits.cpu_quota.unwrap_or(-1)),
            cpu_period: self.period_us,
            memory: Some(limits.memory.unwrap_or(-1)),
            pids: self.pids,
            memory_min: limits.memory_min,
            memory_low: limits.memory_low,
            ..Limits::default()
        };
        let slice = slice_name(&self.root, &path);
        let properties = systemd::slice(format!("Kubernetes pod {uid}"), &limits);
        self.systemd.start(&slice, &properties).await.map_err(|e| error("make", slice, e))
    }

    /// Stops a pod's slice and takes it out of its class, which has `class_shares` without it.
    pub(super) async fn remove(
        &self,
        uid: &PodUid,
        qos: &str,
        class_shares: Option<i64>,
    ) -> Result<(), CgroupError> {
        let path = pod_path(qos, uid);
        let slice = slice_name(&self.root, &path);
        self.systemd.stop(&slice).await.map_err(|e| error("stop", slice, e))?;
        match class_shares {
            Some(shares) => self.ensure_parent(&path[..path.len() - 1], Some(weight(shares))).await,
            None => Ok(()),
        }
    }

    /// Sets what a group may use, so that systemd does not undo it; `unit` is its name there.
    pub(super) async fn bound(
        &self,
        group: &Group,
        unit: &str,
        limits: GroupLimits,
    ) -> Result<(), CgroupError> {
        let limits = Limits {
            cpu_weight: limits.cpu_shares.map(weight),
            memory: limits.memory,
            pids: limits.pids,
            ..Limits::default()
        };
        if *group == Group::Pods {
            self.ensure_parent(&["kubepods".to_owned()], None).await?;
        }
        let done = self.systemd.set(unit, &limits.properties()).await;
        done.map_err(|e| error("set limits of", unit.to_owned(), e))
    }

    /// Spares memory of all pods and of the burstable ones.
    pub(super) async fn spare_classes(
        &self,
        pods: Spared,
        burstable: Spared,
    ) -> Result<(), CgroupError> {
        let all = Limits { memory_min: Some(pods.min), ..Limits::default() };
        let some = Limits { memory_low: Some(burstable.low), ..Limits::default() };
        for (path, limits) in [(&["kubepods"][..], all), (&["kubepods", "burstable"], some)] {
            let path: Vec<String> = path.iter().map(|part| (*part).to_owned()).collect();
            let slice = slice_name(&self.root, &path);
            // A class that has no pod yet is spared nothing, and is no unit.
            if !self.parents().contains_key(&slice) {
                continue;
            }
            let set = self.systemd.set(&slice, &limits.properties()).await;
            set.map_err(|e| error("spare memory of", slice.clone(), e))?;
        }
        Ok(())
    }

    /// Bounds the memory of a class that has pods.
    pub(super) async fn bound_class(&self, path: &[String], bytes: i64) -> Result<(), CgroupError> {
        let slice = slice_name(&self.root, path);
        if !self.parents().contains_key(&slice) {
            return Ok(());
        }
        let limits = Limits { memory: Some(bytes), ..Limits::default() };
        let set = self.systemd.set(&slice, &limits.properties()).await;
        set.map_err(|e| error("set limits of", slice, e))
    }

    async fn ensure_parent(&self, path: &[String], weight: Option<u64>) -> Result<(), CgroupError> {
        let slice = slice_name(&self.root, path);
        let given = self.parents().get(&slice).copied();
        if given == Some(weight) {
            return Ok(());
        }
        let limits = Limits { cpu_weight: weight, ..Limits::default() };
        let made = if given.is_none() {
            let words = format!("Kubernetes pods ({})", path.join(" "));
            self.systemd.start(&slice, &systemd::slice(words, &limits)).await
        } else {
            self.systemd.set(&slice, &limits.properties()).await
        };
        made.map_err(|e| error("make", slice.clone(), e))?;
        self.parents().insert(slice, weight);
        Ok(())
    }

    fn parents(&self) -> std::sync::MutexGuard<'_, HashMap<String, Option<u64>>> {
        self.parents.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn weight(shares: i64) -> u64 {
    cpu_weight(shares).unsigned_abs()
}

fn error(operation: &'static str, path: String, cause: systemd::SystemdError) -> CgroupError {
    CgroupError { operation, path, cause: cause.to_string() }
}
