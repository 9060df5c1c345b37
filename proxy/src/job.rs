//! What the loop hands to a thread that may block, and what comes back.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinHandle;

use crate::Error;
use crate::backend::{Backend, BackendError, Concerns, Environment, Outcome};
use crate::model::PlanChange;
use crate::object::NamespacedName;
use crate::plan::ServicePlan;

/// What goes to the kernel together.
pub enum Job {
    /// Everything, compared with what is there.
    Repair(Vec<(NamespacedName, Arc<ServicePlan>)>),
    /// The plans that changed.
    Change,
}

/// What a job came to.
pub enum Done {
    /// A backend was chosen; whether it found rules of an earlier process.
    Chosen(Result<(Box<dyn Backend>, bool), Error>),
    /// A backend did its job.
    Worked(Worked),
    /// A backend has answered a question.
    Described(Box<dyn Backend>),
    /// Memory was given back.
    Trimmed,
}

/// A backend's work on a job.
pub struct Worked {
    /// The backend back.
    pub backend: Box<dyn Backend>,
    /// What it told.
    pub result: Result<Outcome, BackendError>,
    /// The changes that it was given.
    pub changes: Vec<PlanChange>,
    /// Whether everything was compared.
    pub full: bool,
    /// How long it took.
    pub took: Duration,
}

/// Blocks on the backend: the fixed rules if they changed, then the job.
pub fn work(
    backend: &mut dyn Backend,
    configure: Option<&Environment>,
    job: &Job,
    changes: &[PlanChange],
) -> Result<Outcome, BackendError> {
    let mut first = match configure {
        Some(environment) => backend.configure(environment)?,
        None => Outcome::default(),
    };
    let second = match job {
        Job::Repair(plans) => {
            first = Outcome { batches: first.batches, ..Outcome::default() };
            backend.repair(plans)?
        }
        Job::Change if first.repair => return Ok(first),
        Job::Change => backend.change(changes)?,
    };
    first.errors.extend(second.errors);
    first.batches.extend(second.batches);
    Ok(Outcome { errors: first.errors, batches: first.batches, ..second })
}

/// Waits for a job; for ever if there is none.
pub async fn join<T>(job: &mut Option<JoinHandle<T>>) -> Result<T, tokio::task::JoinError> {
    match job {
        Some(handle) => handle.await,
        None => std::future::pending().await,
    }
}

/// Waits for somebody else's change; for ever without a subscription.
pub async fn foreign(
    monitor: &mut Option<(nft::Monitor, Concerns)>,
) -> Result<nft::Notification, nft::Error> {
    match monitor {
        Some((monitor, _)) => monitor.changed().await,
        None => std::future::pending().await,
    }
}

/// Runs something that blocks.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Error> {
    tokio::task::spawn_blocking(work).await.map_err(|error| Error::Backend(error.to_string()))
}
