//! A pod's status from what is observed, as kubelet would report it. Pure; the status before is an
//! argument, since transition times and what the runtime has forgotten are kept from it.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{
    Container, ContainerState, ContainerStatus, HostIP, Pod, PodIP, PodSpec, PodStatus,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::config::resources::pod_resources;
use super::facts::Facts;
use super::observed::Observed;
use super::plan::{BackingOff, restart_all_causes, usable_sandbox};
use super::qos::qos_class;
use super::spec::{
    ContainerKind, ephemeral_as_container, host_network, init_containers, init_kind, is_sidecar,
    is_static, restarts_after, spec_of,
};
use crate::device::Statuses;
use crate::node_context::NodeContext;

mod conditions;
mod containers;

use containers::{ContainerView, RESTARTING_ALL};
pub(crate) use containers::{PULL_ERROR_SHOWN_SECONDS, pod_label};

/// A decision about the whole pod that its containers do not show.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// `DeadlineExceeded`, `OutOfcpu`, `NodeAffinity`, `Evicted`, ...
    pub reason: String,
    /// For people.
    pub message: String,
    /// Whether the node ends the pod for its own sake: it has the condition `DisruptionTarget` then.
    pub disrupts: bool,
}

impl Verdict {
    /// Without a message.
    pub fn new(reason: &str) -> Self {
        Self { reason: reason.to_owned(), message: String::new(), disrupts: false }
    }
}

/// How far the pod's end has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Ending {
    /// It runs.
    #[default]
    Not,
    /// Its containers are being ended.
    Terminating,
    /// None of its containers runs, and none will.
    Terminated,
}

/// What a status is made from.
#[derive(Clone, Copy, Debug)]
pub struct StatusInput<'a> {
    /// The pod.
    pub pod: &'a Pod,
    /// What the runtime shows.
    pub observed: &'a Observed,
    /// What the worker knows beside it.
    pub facts: &'a Facts,
    /// Containers in CrashLoopBackOff.
    pub backing_off: &'a [BackingOff],
    /// The status before this one.
    pub previous: Option<&'a PodStatus>,
    /// How far the end has come.
    pub ending: Ending,
    /// Why the pod was failed as a whole.
    pub verdict: Option<&'a Verdict>,
    /// The health of its devices.
    pub devices: &'a Statuses,
    /// The node.
    pub node: &'a NodeContext,
    /// Name of the runtime, as in `containerID`.
    pub runtime_name: &'a str,
    /// When the pod was first seen by this node.
    pub start_time: Timestamp,
    /// Now.
    pub now: Timestamp,
}

/// A time as the API carries it: in whole seconds, so that what was read back equals what was told.
pub(crate) fn time(at: Timestamp) -> Time {
    Time(Timestamp::from_second(at.as_second()).unwrap_or(at))
}

/// Whether `phase` is final.
pub fn is_terminal(phase: Option<&str>) -> bool {
    matches!(phase, Some("Succeeded" | "Failed"))
}

/// The status of the pod.
pub fn pod_status(input: StatusInput<'_>) -> PodStatus {
    let StatusInput { pod, observed, previous, .. } = input;
    let spec = spec_of(pod);
    let inits = init_containers(spec);
    let old = |list: fn(&PodStatus) -> Option<&Vec<ContainerStatus>>, name: &str| {
        previous.and_then(list).into_iter().flatten().find(|s| s.name == name)
    };
    let view = ContainerView { input, has_init: !inits.is_empty() };
    let init_statuses: Vec<ContainerStatus> = inits
        .iter()
        .map(|c| view.status(c, init_kind(c), old(|s| s.init_container_statuses.as_ref(), &c.name)))
        .collect();
    let mut main_statuses: Vec<ContainerStatus> = spec
        .containers
        .iter()
        .map(|c| {
            view.status(c, ContainerKind::Main, old(|s| s.container_statuses.as_ref(), &c.name))
        })
        .collect();
    for status in &mut main_statuses {
        // What a pod had that is over stays told.
        let told = old(|s| s.container_statuses.as_ref(), &status.name);
        let told = told.and_then(|old| old.allocated_resources_status.clone());
        status.allocated_resources_status = input.devices.get(&status.name).cloned().or(told);
    }
    main_statuses.sort_by(|a, b| a.name.cmp(&b.name));
    let ephemeral_statuses: Vec<ContainerStatus> = spec
        .ephemeral_containers
        .iter()
        .flatten()
        .map(|e| {
            let before = old(|s| s.ephemeral_container_statuses.as_ref(), &e.name);
            view.status(&ephemeral_as_container(e), ContainerKind::Ephemeral, before)
        })
        .collect();

    let resources = pod_resources(pod);
    let mut status = PodStatus {
        observed_generation: pod.metadata.generation,
        qos_class: Some(qos_class(pod).to_owned()),
        start_time: Some(
            previous.and_then(|p| p.start_time.clone()).unwrap_or_else(|| time(input.start_time)),
        ),
        init_container_statuses: none_if_empty(init_statuses),
        container_statuses: none_if_empty(main_statuses),
        ephemeral_container_statuses: none_if_empty(ephemeral_statuses),
        allocated_resources: resources.requests.clone(),
        resources: Some(resources),
        // The scheduler's and other parties' fields pass through.
        nominated_node_name: previous.and_then(|p| p.nominated_node_name.clone()),
        resource_claim_statuses: previous.and_then(|p| p.resource_claim_statuses.clone()),
        extended_resource_claim_status: previous
            .and_then(|p| p.extended_resource_claim_status.clone()),
        ..Default::default()
    };
    addresses(&mut status, input);
    phase_and_reason(&mut status, input, spec);
    let refused = status.message.as_deref().is_some_and(|m| m.starts_with(REJECTED));
    if input.ending == Ending::Terminated && !refused {
        account_for_all(&mut status, inits);
    }
    if is_terminal(status.phase.as_deref()) || input.ending == Ending::Terminated {
        for s in status.container_statuses.iter_mut().flatten() {
            s.ready = false;
            s.started = Some(false);
        }
        for (s, c) in status.init_container_statuses.iter_mut().flatten().zip(inits) {
            s.started = Some(false);
            if is_sidecar(c) {
                s.ready = false;
            }
        }
    }
    let sandbox_up = usable_sandbox(pod, observed).is_some() && input.ending < Ending::Terminated;
    status.conditions = Some(conditions::conditions(input, &status, sandbox_up));
    status
}

/// What messages about pods that are not let in begin with.
pub(crate) const REJECTED: &str = "Pod was rejected: ";

/// A pod that is over has no container that waits: one that nobody knows an end of is taken for
/// failed. Those that were not to start yet, as initialization had not come so far, are left out.
fn account_for_all(status: &mut PodStatus, inits: &[Container]) {
    let terminated = |s: Option<&ContainerState>, code: Option<i32>| {
        let end = s.and_then(|s| s.terminated.as_ref());
        end.is_some_and(|end| code.is_none_or(|code| end.exit_code == code))
    };
    let begun = |s: &ContainerStatus| {
        let waits = s.state.as_ref().is_some_and(|s| s.waiting.is_some());
        !waits || terminated(s.last_state.as_ref(), None)
    };
    let lost = |s: &mut ContainerStatus| {
        if !terminated(s.state.as_ref(), None) {
            s.state = Some(containers::unknown_end(
                "The container could not be located when the pod was terminated",
            ));
        }
    };
    let of_init = status.init_container_statuses.as_deref().unwrap_or_default();
    let last_done = of_init.last().is_some_and(|s| {
        terminated(s.state.as_ref(), Some(0)) || terminated(s.last_state.as_ref(), Some(0))
    });
    let initialized =
        inits.is_empty() || last_done || status.container_statuses.iter().flatten().any(begun);
    if initialized {
        status.container_statuses.iter_mut().flatten().for_each(lost);
    }
    let list = status.init_container_statuses.as_deref_mut().unwrap_or_default();
    let reached = list.iter().rposition(begun).map_or(1, |at| at + 1);
    list.iter_mut().take(reached).for_each(lost);
}

fn none_if_empty<T>(list: Vec<T>) -> Option<Vec<T>> {
    if list.is_empty() { None } else { Some(list) }
}

fn addresses(status: &mut PodStatus, input: StatusInput<'_>) {
    let node_ips: Vec<String> = input.node.node_ips.iter().map(ToString::to_string).collect();
    status.host_ip = node_ips.first().cloned();
    status.host_ips =
        none_if_empty(node_ips.iter().map(|ip| HostIP { ip: ip.clone() }).collect::<Vec<_>>());
    let mut ips: Vec<String> = if host_network(spec_of(input.pod)) {
        node_ips.clone()
    } else {
        usable_sandbox(input.pod, input.observed).map(|s| s.ips.clone()).unwrap_or_default()
    };
    if ips.is_empty() {
        // Known until the next sandbox has another.
        ips = input
            .previous
            .and_then(|p| p.pod_ips.as_ref())
            .map(|list| list.iter().map(|ip| ip.ip.clone()).collect())
            .unwrap_or_default();
    }
    // The node's own family first.
    let v6_first = input.node.node_ips.first().is_some_and(std::net::IpAddr::is_ipv6);
    ips.sort_by_key(|ip| ip.contains(':') != v6_first);
    status.pod_ip = ips.first().cloned();
    status.pod_ips = none_if_empty(ips.into_iter().map(|ip| PodIP { ip }).collect());
}

fn phase_and_reason(status: &mut PodStatus, input: StatusInput<'_>, spec: &PodSpec) {
    if let Some(previous) = input.previous
        && is_terminal(previous.phase.as_deref())
    {
        // A final phase stays.
        status.phase.clone_from(&previous.phase);
        status.reason.clone_from(&previous.reason);
        status.message.clone_from(&previous.message);
        return;
    }
    // Failed is told once nothing runs: whoever makes another in its place counts on that.
    let runs = input.ending != Ending::Terminated
        && (input.observed.any_alive() || !input.facts.starting.is_empty());
    if let Some(verdict) = input.verdict.filter(|_| !runs) {
        status.phase = Some("Failed".to_owned());
        status.reason = Some(verdict.reason.clone());
        status.message = Some(verdict.message.clone());
        return;
    }
    let now = phase(input, spec, status);
    // What somebody said of this phase holds for as long as the phase does (the node's controller
    // writes NodeLost, say).
    let told = [input.previous, input.pod.status.as_ref()];
    let told = || told.into_iter().flatten().filter(|s| s.phase.as_deref() == Some(now));
    status.reason = told().find_map(|s| s.reason.clone());
    status.message = told().find_map(|s| s.message.clone());
    status.phase = Some(now.to_owned());
}

/// Counts of the pod's own containers.
#[derive(Default)]
struct Tally {
    running: u32,
    waiting: u32,
    stopped: u32,
    stopped_for_good: u32,
    succeeded: u32,
    pending_init: u32,
    pending_sidecar: u32,
    init_failed: bool,
}

/// The exit code that a container last ended with, if it is not running.
fn last_exit(status: &ContainerStatus) -> Option<i32> {
    let state = status.state.as_ref()?;
    if let Some(terminated) = &state.terminated {
        return Some(terminated.exit_code);
    }
    state.waiting.as_ref()?;
    Some(status.last_state.as_ref()?.terminated.as_ref()?.exit_code)
}

fn is_running(status: &ContainerStatus) -> bool {
    status.state.as_ref().is_some_and(|s| s.running.is_some())
}

/// Whether any of the pod's own containers runs or ran: then it is initialized.
fn initialized(status: &PodStatus) -> bool {
    status.container_statuses.iter().flatten().any(|s| is_running(s) || last_exit(s).is_some())
}

fn phase(input: StatusInput<'_>, spec: &PodSpec, status: &PodStatus) -> &'static str {
    let StatusInput { pod, observed, ending, .. } = input;
    let mut t = Tally::default();
    // Who is ended or removed to start the whole pod again has not ended for good.
    let all_again = !restart_all_causes(spec, observed).is_empty();
    let again = |s: &ContainerStatus| {
        let ends = [s.state.as_ref(), s.last_state.as_ref()];
        let mut ends = ends.into_iter().flatten().filter_map(|s| s.terminated.as_ref());
        all_again || ends.any(|t| t.reason.as_deref() == Some(RESTARTING_ALL))
    };
    let inits = init_containers(spec);
    for (c, s) in inits.iter().zip(status.init_container_statuses.iter().flatten()) {
        if is_sidecar(c) {
            if is_running(s) {
                t.running += 1;
                t.pending_sidecar += u32::from(s.started != Some(true));
            } else if last_exit(s).is_none() {
                t.pending_sidecar += 1;
                t.waiting += 1;
            }
            continue;
        }
        match last_exit(s) {
            Some(0) if s.state.as_ref().is_some_and(|s| s.terminated.is_some()) => {}
            // Waits to run once more (a new sandbox), or ended well before.
            Some(0) | None => t.pending_init += 1,
            Some(code) => {
                t.init_failed |= !again(s) && !restarts_after(spec, c, ContainerKind::Init, code);
            }
        }
    }
    for c in &spec.containers {
        let Some(s) = status.container_statuses.iter().flatten().find(|s| s.name == c.name) else {
            continue;
        };
        match last_exit(s) {
            _ if is_running(s) => t.running += 1,
            None => t.waiting += 1,
            Some(code) => {
                t.stopped += 1;
                t.succeeded += u32::from(code == 0);
                let more = again(s) || restarts_after(spec, c, ContainerKind::Main, code);
                t.stopped_for_good += u32::from(!more);
            }
        }
    }
    if t.init_failed {
        return "Failed";
    }
    if t.pending_init > 0 || (t.pending_sidecar > 0 && !initialized(status)) || t.waiting > 0 {
        if ending == Ending::Terminated {
            return "Failed";
        }
        return "Pending";
    }
    if t.running > 0 {
        return "Running";
    }
    if t.stopped == 0 {
        return "Pending";
    }
    let ended = ending == Ending::Terminated && !is_static(pod);
    if !ended && t.stopped != t.stopped_for_good {
        return "Running";
    }
    if t.stopped == t.succeeded { "Succeeded" } else { "Failed" }
}
