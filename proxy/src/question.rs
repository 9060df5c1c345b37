//! Questions that people ask a running proxy: what it does with a Service, what it has programmed,
//! what a change would come to. Answers are text or JSON; nothing is changed by them.

use tokio::sync::{mpsc, oneshot};

use crate::explain::{Explanation, Question as Explain};
use crate::model::PlanChange;
use crate::object::{Change, NamespacedName, Service};

/// What is asked of the rules.
#[derive(Debug)]
pub enum Rules {
    /// All that should be there.
    Desired,
    /// What would have to be changed in the kernel.
    Difference,
    /// What these changes would change.
    Changes(Vec<Change>),
}

/// A question.
#[derive(Debug)]
pub enum Question {
    /// What happens to a Service's packets.
    Explain(NamespacedName, Explain, oneshot::Sender<Option<Explanation>>),
    /// Rules as text, or why not.
    Rules(Rules, oneshot::Sender<Result<String, String>>),
    /// How the endpoints of Services are, at most so many Services.
    Services(usize, oneshot::Sender<Vec<ServiceHealth>>),
}

/// A Service and how many of its endpoints are ready. An endpoint of both families counts once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceHealth {
    /// The Service as the proxy serves it.
    pub service: Service,
    /// Endpoints that are ready, on any node.
    pub ready: usize,
    /// All endpoints.
    pub endpoints: usize,
}

/// Asks a proxy.
#[derive(Clone, Debug)]
pub struct Asker(pub(crate) mpsc::Sender<Question>);

impl Asker {
    /// What happens to a Service's packets; `None` if the proxy does not know it.
    ///
    /// # Errors
    /// If the proxy does not run any more.
    pub async fn explain(
        &self,
        service: NamespacedName,
        question: Explain,
    ) -> Result<Option<Explanation>, String> {
        let (answer, told) = oneshot::channel();
        self.ask(Question::Explain(service, question, answer), told).await
    }

    /// Rules in `nft`'s syntax, or as input of `iptables-restore`.
    ///
    /// # Errors
    /// If they cannot be told, in words.
    pub async fn rules(&self, rules: Rules) -> Result<String, String> {
        let (answer, told) = oneshot::channel();
        self.ask(Question::Rules(rules, answer), told).await?
    }

    /// How the endpoints of Services are: those without a ready one first, then those that lack
    /// some, then by name; at most `limit`. Costs a walk over all Services.
    ///
    /// # Errors
    /// If the proxy does not run any more.
    pub async fn services(&self, limit: usize) -> Result<Vec<ServiceHealth>, String> {
        let (answer, told) = oneshot::channel();
        self.ask(Question::Services(limit, answer), told).await
    }

    async fn ask<T>(&self, question: Question, told: oneshot::Receiver<T>) -> Result<T, String> {
        const GONE: &str = "the proxy does not run";
        self.0.send(question).await.map_err(|_| GONE.to_owned())?;
        told.await.map_err(|_| GONE.to_owned())
    }
}

/// What a backend is to tell.
pub enum Describe {
    /// All that should be there.
    Desired,
    /// What would have to be changed in the kernel.
    Difference,
    /// What changed plans would change.
    Changes(Vec<PlanChange>),
}
