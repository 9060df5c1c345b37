//! What others may ask of the sync loop.

use std::fmt;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use crate::ids::{NamespacedName, PodUid};
use crate::pod::explain::Explanation;
use crate::pod::table::PodTable;

/// Read access to the sync loop: pods, their statuses, whether it is alive.
#[derive(Clone, Debug)]
pub struct SyncHandle {
    pub(super) table: PodTable,
    pub(super) questions: mpsc::Sender<Question>,
}

/// What the loop is asked from outside.
#[derive(Debug)]
pub(super) enum Question {
    /// Whether it goes round.
    Ping(oneshot::Sender<()>),
    /// Why a pod is as it is.
    Explain(PodQuery, oneshot::Sender<Explanation>),
}

/// Which pod is asked about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodQuery {
    /// By namespace and name.
    pub key: NamespacedName,
    /// Or by UID.
    pub uid: Option<PodUid>,
}

/// Why there is no explanation.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExplainError {
    /// No source names such a pod.
    #[error(
        "the node has no pod {0}; `longshore status` lists those it has, `kubectl get pod -o wide` \
         says which node a pod is bound to"
    )]
    Unknown(String),
    /// Not every source has been heard, so the pod may come yet.
    #[error(
        "the node does not know of a pod {pod} yet: not everything has been read since the start{}; \
         ask again, `longshore status` says what it waits for",
        .runtime.as_ref().map(|e| format!(" (container runtime: {e})")).unwrap_or_default()
    )]
    TooEarly {
        /// The pod.
        pod: String,
        /// What the runtime last said, if it did not answer.
        runtime: Option<String>,
    },
    /// Its worker does not answer.
    #[error(
        "the worker of pod {pod} has not answered for {seconds} s: it waits for the container \
         runtime; see `longshore status` and `journalctl -u longshore`"
    )]
    Silent {
        /// The pod.
        pod: String,
        /// For so long.
        seconds: u64,
    },
}

impl fmt::Display for PodQuery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.uid {
            Some(uid) => uid.fmt(f),
            None => self.key.fmt(f),
        }
    }
}

impl SyncHandle {
    /// Of a loop that goes round and has no pods.
    #[cfg(test)]
    pub(crate) fn idle() -> Self {
        let (questions, mut asked) = mpsc::channel(8);
        tokio::spawn(async move {
            while let Some(question) = asked.recv().await {
                if let Question::Ping(reply) = question {
                    let _ = reply.send(());
                }
            }
        });
        Self { table: PodTable::default(), questions }
    }

    /// The pods of this node.
    pub fn table(&self) -> &PodTable {
        &self.table
    }

    /// Whether the loop goes round: it answers within `limit`.
    pub async fn alive(&self, limit: Duration) -> bool {
        let (reply, answer) = oneshot::channel();
        let asked = async {
            self.questions.send(Question::Ping(reply)).await.ok()?;
            answer.await.ok()
        };
        matches!(tokio::time::timeout(limit, asked).await, Ok(Some(())))
    }

    /// Why a pod is as it is, from its worker, which has `limit` to answer.
    ///
    /// # Errors
    /// There is no such pod, or its worker does not answer.
    pub async fn explain(
        &self,
        query: PodQuery,
        limit: Duration,
    ) -> Result<Explanation, ExplainError> {
        let pod = query.to_string();
        let (reply, answer) = oneshot::channel();
        let asked = async {
            self.questions.send(Question::Explain(query, reply)).await.ok()?;
            answer.await.ok()
        };
        match tokio::time::timeout(limit, asked).await {
            Ok(Some(explanation)) => Ok(explanation),
            // The loop lets go of a question about a pod that it does not know.
            Ok(None) => {
                let health = self.table.health();
                if health.synced {
                    Err(ExplainError::Unknown(pod))
                } else {
                    Err(ExplainError::TooEarly { pod, runtime: health.runtime_error })
                }
            }
            Err(_) => Err(ExplainError::Silent { pod, seconds: limit.as_secs() }),
        }
    }
}
