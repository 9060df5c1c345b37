//! What the loop tells: the status, the metrics and the health that hang on plans and jobs.

use std::time::Instant;

use jiff::Timestamp;

use super::{Loop, NODE_AWAITED};
use crate::model::PlanChange;
use crate::plan::ServicePlan;
use crate::server::HealthCheck;
use crate::status::ProxyError;
use crate::sysctl;

impl Loop {
    /// Keeps what hangs on a plan besides rules.
    pub(super) fn note(&mut self, change: &PlanChange) {
        let plan = change.new.as_deref();
        let of_family = |p: &ServicePlan, ipv4| p.ports.iter().any(|port| port.is_ipv4() == ipv4);
        let wants = plan.map_or(HealthCheck::default(), |plan| HealthCheck {
            port: plan.health_check_node_port,
            families: [of_family(plan, true), of_family(plan, false)],
            local_ready: plan.local_ready,
        });
        self.health_ports.set(&change.service, wants);
        let mut counts = [0; 4];
        for port in plan.iter().flat_map(|p| &p.ports).filter(|p| p.has_endpoints) {
            let family = if port.is_ipv4() { 0 } else { 2 };
            let external = port.node_port != 0 || !port.external_ips.is_empty();
            counts[family] += i64::from(port.internal_local && !port.has_internal_endpoints());
            counts[family + 1] +=
                i64::from(external && port.external_local && !port.has_external_endpoints());
            if !port.is_ipv4() {
                self.ipv6 = true;
            }
        }
        if counts == [0; 4] {
            self.no_local.remove(&change.service);
        } else {
            self.no_local.insert(change.service.clone(), counts);
        }
        if self.ipv6 && self.config.set_sysctls {
            const NAME: &str = "sysctl net.ipv6.conf.all.forwarding";
            match sysctl::forward_ipv6() {
                Ok(()) => self.errors.remove(NAME),
                Err(error) => self.errors.insert(error.object, error.message),
            };
            self.ipv6 = false;
        }
    }

    /// Makes the status known.
    pub(super) fn publish(&mut self) {
        let mut ipv4 = (0, 0);
        let mut ipv6 = (0, 0);
        for [a, b, c, d] in self.no_local.values() {
            ipv4 = (ipv4.0 + a, ipv4.1 + b);
            ipv6 = (ipv6.0 + c, ipv6.1 + d);
        }
        self.metrics.no_local_endpoints(ipv4, ipv6);
        let mut errors: Vec<ProxyError> = Vec::new();
        let mut add = |object: String, message: String| errors.push(ProxyError { object, message });
        for (object, message) in self.errors.iter().chain(&self.shared.errors()) {
            add(object.clone(), message.clone());
        }
        for (service, messages) in self.model.errors() {
            for message in messages {
                add(format!("Service {service}"), message.clone());
            }
        }
        for (service, message) in &self.refused {
            add(format!("Service {service}"), message.clone());
        }
        let pending = usize::from(self.model.is_dirty() || self.busy.is_some());
        let now = Timestamp::now();
        let awaited = self.started.elapsed() >= NODE_AWAITED;
        self.shared.update_health(|health| {
            health.last_turn = Some(now);
            health.node_known |= awaited;
        });
        let mode = self.backend.as_ref().map(|backend| backend.mode());
        let model = &self.model;
        self.status.send_modify(|status| {
            if let Some(mode) = mode {
                status.mode = mode;
            }
            for error in errors.iter().filter(|e| !status.errors.contains(e)) {
                tracing::warn!(object = error.object, "{}", error.message);
            }
            status.services = model.services();
            status.endpoints = model.endpoints();
            status.synced = model.synced;
            status.pending = pending;
            status.source_error = model.source_error.clone();
            status.errors = errors;
            status.last_turn = Instant::now();
        });
    }
}
