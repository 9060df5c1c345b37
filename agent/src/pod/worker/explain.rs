//! What the worker knows, for whoever asks why its pod is as it is.

use super::{State, Worker};
use crate::pod::explain::{ExplainInput, Explanation, Probing, Stage, explain};
use crate::pod::plan::{Plan, deadline, plan, plan_end};

impl Worker {
    pub(super) fn explanation(&self) -> Explanation {
        let now = self.deps.clock.now();
        let stage = match self.state {
            State::Running => Stage::Running,
            State::Terminating => Stage::Terminating {
                kill_at: self.kill_at,
                next: plan_end(&self.pod, &self.observed, &self.facts),
            },
            State::TearingDown { .. } | State::Gone => Stage::TearingDown(&self.teardown),
            State::Finished => Stage::Finished,
        };
        let planned = match self.state {
            State::Running => {
                let max_backoff = self.deps.node.max_restart_backoff.as_secs();
                plan(&self.pod, &self.observed, &self.facts, now, max_backoff)
            }
            _ => Plan::default(),
        };
        let probes: Vec<Probing> = self
            .probes
            .iter()
            .map(|((id, kind), probing)| Probing {
                id: id.clone(),
                kind: *kind,
                last: probing.last.get(),
            })
            .collect();
        // A look in vain is repeated; until then what is known of the runtime is old.
        let silent = self.stale.retry_at.is_some().then(|| {
            let health = self.deps.table.health();
            health.runtime_error.unwrap_or_else(|| "the last question failed".into())
        });
        explain(ExplainInput {
            pod: &self.pod,
            source: self.source,
            status: self.previous.as_ref(),
            observed: &self.observed,
            facts: &self.facts,
            plan: &planned,
            stage: &stage,
            verdict: self.verdict.as_ref(),
            network_ready: *self.deps.network.borrow(),
            runtime_error: silent.as_deref(),
            probes: &probes,
            deadline: deadline(&self.pod, Some(self.start_time)),
            now,
        })
    }
}
