//! What a job came to: what the kernel took, what it refused, and what is tried again when.

use std::time::{Duration, Instant};

use jiff::Timestamp;

use super::{Loop, RETRY_MAX, RETRY_MIN, State, seconds};
use crate::Error;
use crate::backend::{Backend, Outcome};
use crate::config::Mode;
use crate::conntrack::Stale;
use crate::job::{Done, Worked, blocking};
use crate::model::PlanChange;

/// Under this the status tells what the kernel does not take.
const KERNEL: &str = "kernel rules";

/// A job that has come to its end.
struct Finished {
    changes: Vec<PlanChange>,
    full: bool,
    took: Duration,
    iptables: bool,
}

impl Loop {
    fn chosen(&mut self, chosen: Result<(Box<dyn Backend>, bool), Error>) {
        const BACKEND: &str = "backend";
        match chosen {
            Ok((backend, found)) => {
                let mode = backend.mode();
                tracing::info!(%mode, took_over = found, "the proxy starts");
                self.errors.remove(BACKEND);
                self.shared.set_mode(mode);
                self.retry = RETRY_MIN;
                self.taken_over = found;
                self.programs = mode == Mode::Iptables;
                self.backend = Some(backend);
                // Nothing of an earlier process is touched before everything has been told.
                self.state =
                    if found && !self.model.synced { State::Holding } else { State::Repairing };
                self.watch_kernel();
            }
            Err(error) => {
                self.errors.insert(BACKEND.to_owned(), error.to_string());
                let waiting = Timestamp::now();
                self.shared.update_health(|health| {
                    health.pending_since.get_or_insert(waiting);
                });
                self.back_off();
            }
        }
    }

    /// Takes note of what a job came to.
    pub(super) async fn finish(&mut self, done: Result<Done, tokio::task::JoinError>) {
        self.busy = None;
        match done {
            Ok(Done::Chosen(chosen)) => self.chosen(chosen),
            Ok(Done::Worked(worked)) => self.worked(worked).await,
            Ok(Done::Described(backend)) => self.backend = Some(backend),
            Ok(Done::Trimmed) => {}
            Err(error) => {
                tracing::error!(%error, "a backend ended unexpectedly; starting it again");
                self.errors.insert("backend".to_owned(), error.to_string());
                self.monitor = None;
                self.state = State::Choosing;
                self.back_off();
            }
        }
    }

    async fn worked(&mut self, done: Worked) {
        let iptables = done.backend.mode() == Mode::Iptables;
        self.backend = Some(done.backend);
        let pause = self.config.min_sync_period;
        self.paced = (!pause.is_zero()).then(|| Instant::now() + pause);
        if iptables {
            self.told_meanwhile();
        }
        if self.monitor.is_none() {
            self.watch_kernel();
            if self.backend.as_mut().is_some_and(|backend| !backend.undisturbed()) {
                self.recheck_later();
            } else if self.refused.is_empty() {
                self.recheck_wait = RETRY_MIN;
            }
        }
        for change in &done.changes {
            let kept = self.unclean.entry(change.service.clone());
            kept.or_insert_with(|| change.clone()).new = change.new.clone();
        }
        let job = Finished { changes: done.changes, full: done.full, took: done.took, iptables };
        match done.result {
            Ok(outcome) => self.taken(&job, outcome).await,
            Err(error) => {
                tracing::error!(%error, "the kernel's rules could not be changed; trying again");
                self.metrics.failed(iptables);
                self.errors.insert(KERNEL.to_owned(), error.to_string());
                self.state = State::Repairing;
                self.back_off();
            }
        }
    }

    /// The kernel has taken a job, but for what it refused.
    async fn taken(&mut self, job: &Finished, outcome: Outcome) {
        let (again, written) = (outcome.repair, outcome.written);
        self.metrics.batches(&outcome.batches);
        self.metrics.iptables_rules(&outcome.rules);
        self.metrics.cleanups_failed(outcome.cleanup_failures);
        if job.iptables && again && !job.full {
            self.metrics.partial_restore_failed();
        }
        if job.full {
            self.refused.clear();
            self.last_repair = Instant::now();
        }
        for change in &job.changes {
            self.refused.remove(&change.service);
        }
        for (service, why) in outcome.refused {
            tracing::error!(%service, why, "the kernel refuses a Service");
            self.refused.insert(service, why);
        }
        // What others changed meanwhile by programs of the same names cannot be told from own
        // changes: rules that had to be written are looked at once more.
        let unsure = job.iptables && written > 0;
        if job.full && (unsure || !self.refused.is_empty()) {
            self.recheck_later();
        }
        if outcome.errors.is_empty() {
            self.errors.remove(KERNEL);
        } else {
            self.errors.insert(KERNEL.to_owned(), outcome.errors.join("; "));
        }
        if again {
            self.state = State::Repairing;
            if job.full {
                self.back_off();
            }
        } else {
            self.programmed(job, written);
        }
        self.sweep_when_programmed();
        if !again {
            self.clean_flows(job.full).await;
        }
    }

    /// The kernel is as desired.
    fn programmed(&mut self, job: &Finished, written: usize) {
        let now = Timestamp::now();
        let reached = now.as_millisecond();
        for triggered in self.triggers.drain(..) {
            self.metrics.programmed((reached - triggered).max(0) as f64 / 1000.0);
        }
        self.retry = RETRY_MIN;
        let pending = self.model.is_dirty();
        self.shared.update_health(|health| {
            health.last_updated = Some(now);
            health.pending_since = pending.then_some(now);
        });
        let took = job.took;
        self.metrics.synced(seconds(now), took, job.full);
        self.status.send_modify(|status| {
            status.last_sync = Some(now);
            status.last_sync_duration = took;
        });
        let (full, changes) = (job.full, job.changes.len());
        tracing::debug!(full, changes, written, ?took, "programmed");
    }

    fn recheck_later(&mut self) {
        self.recheck = Some(Instant::now() + self.recheck_wait);
        self.recheck_wait = (self.recheck_wait * 2).min(RETRY_MAX);
    }

    pub(super) fn back_off(&mut self) {
        self.not_before = Some(Instant::now() + self.retry);
        self.retry = (self.retry * 2).min(RETRY_MAX);
    }

    /// Deletes the flows that changes made stale. What a restart finds is left alone.
    async fn clean_flows(&mut self, full: bool) {
        let changes: Vec<PlanChange> = std::mem::take(&mut self.unclean).into_values().collect();
        if full && std::mem::take(&mut self.taken_over) {
            return;
        }
        let stale = Stale::of(&changes);
        if stale.is_empty() {
            return;
        }
        const FLOWS: &str = "stale UDP flows";
        let node = self.model.node().addresses.clone();
        let begin = Instant::now();
        let deleted = blocking(move || stale.delete(&node)).await;
        match deleted {
            Ok(Ok(count)) => {
                self.errors.remove(FLOWS);
                self.metrics.flows_deleted(count, begin.elapsed());
            }
            Ok(Err(error)) => drop(self.errors.insert(FLOWS.to_owned(), error.to_string())),
            Err(error) => drop(self.errors.insert(FLOWS.to_owned(), error.to_string())),
        }
    }
}
