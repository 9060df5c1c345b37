//! Metrics under the names of upstream's proxy, so that its dashboards and alerts work.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

/// Label `ip_family`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct IpFamily {
    ip_family: &'static str,
}

/// Label `code`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Code {
    code: String,
}

/// Labels of the gauge of Services without local endpoints.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct NoLocal {
    traffic_policy: &'static str,
    ip_family: &'static str,
}

/// Labels of the gauges of iptables rules.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct TableLabels {
    table: &'static str,
    ip_family: &'static str,
}

type Histograms = Family<IpFamily, Histogram, fn() -> Histogram>;
type FloatGauge = Gauge<f64, AtomicU64>;

fn histogram() -> Histogram {
    Histogram::new(exponential_buckets(0.001, 2.0, 15))
}

/// Upstream's: a quarter of a second to 5 minutes, finer at the beginning.
fn programming_buckets() -> impl Iterator<Item = f64> {
    let fine = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5];
    let seconds = (1..60).map(f64::from);
    let slower = (60..=115).step_by(5).chain((120..=300).step_by(30)).map(f64::from);
    fine.into_iter().chain(seconds).chain(slower)
}

fn programming_histogram() -> Histogram {
    Histogram::new(programming_buckets())
}

/// Both families are programmed together.
const FAMILIES: [&str; 2] = ["IPv4", "IPv6"];

/// The proxy's metrics.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    sync: Histograms,
    full: Histograms,
    partial: Histograms,
    conntrack: Histograms,
    last_sync: Family<IpFamily, FloatGauge>,
    last_queued: Family<IpFamily, FloatGauge>,
    failures: Family<IpFamily, Counter>,
    cleanup_failures: Family<IpFamily, Counter>,
    restore_failures: Family<IpFamily, Counter>,
    partial_restore_failures: Family<IpFamily, Counter>,
    rules: Family<TableLabels, Gauge>,
    rules_last: Family<TableLabels, Gauge>,
    batches: Histogram,
    programming: Histograms,
    flows: Family<IpFamily, Counter>,
    invalid_dropped: Counter,
    localhost_node_ports: Counter,
    no_local: Family<NoLocal, Gauge>,
    healthz: Family<Code, Counter>,
    livez: Family<Code, Counter>,
    endpoint_changes: Counter,
    service_changes: Counter,
    endpoints_pending: Gauge,
    services_pending: Gauge,
}

impl Metrics {
    /// All at zero.
    pub fn new() -> Arc<Self> {
        let mut registry = Registry::with_prefix("kubeproxy");
        let new: fn() -> Histogram = histogram;
        let metrics = Metrics {
            sync: Family::new_with_constructor(new),
            full: Family::new_with_constructor(new),
            partial: Family::new_with_constructor(new),
            conntrack: Family::new_with_constructor(new),
            last_sync: Family::default(),
            last_queued: Family::default(),
            failures: Family::default(),
            cleanup_failures: Family::default(),
            restore_failures: Family::default(),
            partial_restore_failures: Family::default(),
            rules: Family::default(),
            rules_last: Family::default(),
            batches: Histogram::new(exponential_buckets(0.000_1, 2.0, 16)),
            programming: Family::new_with_constructor(programming_histogram),
            flows: Family::default(),
            invalid_dropped: Counter::default(),
            localhost_node_ports: Counter::default(),
            no_local: Family::default(),
            healthz: Family::default(),
            livez: Family::default(),
            endpoint_changes: Counter::default(),
            service_changes: Counter::default(),
            endpoints_pending: Gauge::default(),
            services_pending: Gauge::default(),
            registry: Registry::default(),
        };
        let m = &metrics;
        let r = &mut registry;
        r.register("sync_proxy_rules_duration_seconds", "Latency of one sync", m.sync.clone());
        r.register("sync_full_proxy_rules_duration_seconds", "Of full syncs", m.full.clone());
        r.register(
            "sync_partial_proxy_rules_duration_seconds",
            "Of syncs of changes only",
            m.partial.clone(),
        );
        r.register(
            "conntrack_reconciler_sync_duration_seconds",
            "Latency of deleting stale flows",
            m.conntrack.clone(),
        );
        r.register(
            "sync_proxy_rules_last_timestamp_seconds",
            "When rules were last synced",
            m.last_sync.clone(),
        );
        r.register(
            "sync_proxy_rules_last_queued_timestamp_seconds",
            "When a sync was last queued",
            m.last_queued.clone(),
        );
        r.register(
            "sync_proxy_rules_nftables_sync_failures",
            "Failed nftables syncs",
            m.failures.clone(),
        );
        r.register(
            "sync_proxy_rules_nftables_cleanup_failures",
            "Failed deletions of nftables chains that nobody needs any more",
            m.cleanup_failures.clone(),
        );
        r.register(
            "sync_proxy_rules_iptables_restore_failures",
            "Failed iptables restores",
            m.restore_failures.clone(),
        );
        r.register(
            "sync_proxy_rules_iptables_partial_restore_failures",
            "Failed iptables restores of changes only",
            m.partial_restore_failures.clone(),
        );
        r.register(
            "sync_proxy_rules_iptables_total",
            "Own iptables rules that are programmed",
            m.rules.clone(),
        );
        r.register(
            "sync_proxy_rules_iptables_last",
            "iptables rules written by the last sync",
            m.rules_last.clone(),
        );
        r.register(
            "sync_proxy_rules_kernel_batch_duration_seconds",
            "How long the kernel had one batch, holding the lock of the rules",
            m.batches.clone(),
        );
        r.register(
            "network_programming_duration_seconds",
            "From the change of a pod or Service to the kernel's rules",
            m.programming.clone(),
        );
        r.register("conntrack_reconciler_deleted_entries", "Stale flows deleted", m.flows.clone());
        r.register(
            "iptables_ct_state_invalid_dropped_packets",
            "Packets dropped by iptables to work around conntrack problems",
            m.invalid_dropped.clone(),
        );
        r.register(
            "iptables_localhost_nodeports_accepted_packets",
            "Connections to NodePorts at a loopback address (iptables)",
            m.localhost_node_ports.clone(),
        );
        r.register(
            "sync_proxy_rules_no_local_endpoints_total",
            "Services with policy Local and no local endpoints",
            m.no_local.clone(),
        );
        r.register("proxy_healthz", "Answers of healthz by code", m.healthz.clone());
        r.register("proxy_livez", "Answers of livez by code", m.livez.clone());
        r.register(
            "sync_proxy_rules_endpoint_changes",
            "Endpoint changes seen",
            m.endpoint_changes.clone(),
        );
        r.register(
            "sync_proxy_rules_service_changes",
            "Service changes seen",
            m.service_changes.clone(),
        );
        r.register(
            "sync_proxy_rules_endpoint_changes_pending",
            "Endpoint changes not synced yet",
            m.endpoints_pending.clone(),
        );
        r.register(
            "sync_proxy_rules_service_changes_pending",
            "Service changes not synced yet",
            m.services_pending.clone(),
        );
        // Counters that alerts are made of are there from the beginning.
        Self::each(|f| {
            for counter in [
                &m.failures,
                &m.cleanup_failures,
                &m.restore_failures,
                &m.partial_restore_failures,
                &m.flows,
            ] {
                drop(counter.get_or_create(f));
            }
        });
        Arc::new(Metrics { registry, ..metrics })
    }

    fn each(tell: impl Fn(&IpFamily)) {
        FAMILIES.iter().for_each(|ip_family| tell(&IpFamily { ip_family }));
    }

    /// A sync was queued at this time (seconds since the epoch).
    pub fn queued(&self, now: f64) {
        Self::each(|f| {
            self.last_queued.get_or_create(f).set(now);
        });
    }

    /// A sync ended well.
    pub fn synced(&self, now: f64, took: Duration, full: bool) {
        let part = if full { &self.full } else { &self.partial };
        Self::each(|f| {
            self.sync.get_or_create(f).observe(took.as_secs_f64());
            part.get_or_create(f).observe(took.as_secs_f64());
            self.last_sync.get_or_create(f).set(now);
        });
    }

    /// The kernel had batches for so long.
    pub fn batches(&self, times: &[Duration]) {
        times.iter().for_each(|time| self.batches.observe(time.as_secs_f64()));
    }

    /// An endpoint's change is in the kernel so long after it happened.
    pub fn programmed(&self, seconds: f64) {
        Self::each(|f| self.programming.get_or_create(f).observe(seconds));
    }

    /// Chains and sets that nobody needs could not be deleted, by family (0 is IPv4).
    pub fn cleanups_failed(&self, counts: [u64; 2]) {
        for (ip_family, count) in FAMILIES.into_iter().zip(counts) {
            self.cleanup_failures.get_or_create(&IpFamily { ip_family }).inc_by(count);
        }
    }

    /// Rules in the kernel and rules written last, by family (0 is IPv4) and table.
    pub fn iptables_rules(&self, counts: &[(usize, &'static str, usize, usize)]) {
        for (family, table, total, last) in counts {
            let labels = TableLabels { table, ip_family: FAMILIES[*family & 1] };
            self.rules.get_or_create(&labels).set(*total as i64);
            self.rules_last.get_or_create(&labels).set(*last as i64);
        }
    }

    /// A restore of changes only failed; everything is compared now.
    pub fn partial_restore_failed(&self) {
        Self::each(|f| {
            self.partial_restore_failures.get_or_create(f).inc();
        });
    }

    /// A sync failed.
    pub fn failed(&self, iptables: bool) {
        let family = if iptables { &self.restore_failures } else { &self.failures };
        Self::each(|f| {
            family.get_or_create(f).inc();
        });
    }

    /// Stale flows were deleted, by family (0 is IPv4).
    pub fn flows_deleted(&self, counts: [usize; 2], took: Duration) {
        Self::each(|f| self.conntrack.get_or_create(f).observe(took.as_secs_f64()));
        for (ip_family, count) in FAMILIES.into_iter().zip(counts) {
            self.flows.get_or_create(&IpFamily { ip_family }).inc_by(count as u64);
        }
    }

    /// Changes seen since the last call, and those that wait.
    pub fn changes(&self, services: u64, endpoints: u64, pending: usize) {
        self.service_changes.inc_by(services);
        self.endpoint_changes.inc_by(endpoints);
        self.services_pending.set(pending as i64);
        self.endpoints_pending.set(pending as i64);
    }

    /// Services with policy Local but no local endpoints: inside and outside, by family.
    pub fn no_local_endpoints(&self, ipv4: (i64, i64), ipv6: (i64, i64)) {
        for (ip_family, (internal, external)) in [("IPv4", ipv4), ("IPv6", ipv6)] {
            for (traffic_policy, value) in [("internal", internal), ("external", external)] {
                self.no_local.get_or_create(&NoLocal { traffic_policy, ip_family }).set(value);
            }
        }
    }

    /// `/healthz` or `/livez` answered.
    pub fn answered(&self, healthz: bool, code: u16) {
        let family = if healthz { &self.healthz } else { &self.livez };
        family.get_or_create(&Code { code: code.to_string() }).inc();
    }

    /// What the kernel has counted for rules of iptables: packets dropped as invalid, connections to
    /// NodePorts at loopback.
    pub fn iptables_packets(&self, [invalid, localhost]: [Option<u64>; 2]) {
        for (counter, value) in
            [(&self.invalid_dropped, invalid), (&self.localhost_node_ports, localhost)]
        {
            if let Some(value) = value {
                counter.inner().store(value, std::sync::atomic::Ordering::Relaxed);
            }
        }
    }

    /// The text for scrapers.
    pub fn encode(&self) -> String {
        let mut text = String::new();
        // Writing to a string cannot fail.
        let _ = prometheus_client::encoding::text::encode(&mut text, &self.registry);
        text
    }
}
