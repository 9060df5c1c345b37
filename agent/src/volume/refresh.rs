//! Keeps file volumes up to date: an object that changed wakes the pods that use it, and tokens
//! are renewed when they are due.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::watch;

use super::node::NodeVolumes;
use crate::ids::{NamespacedName, PodUid};
use crate::objects::ObjectRef;

/// What woke the loop.
enum Wake {
    /// This object changed; `None` is any.
    Changed(Option<ObjectRef>),
    /// A due time has come, or moved.
    Due,
    /// The node ends.
    Shutdown,
}

/// A failed refresh is tried again after this long, in seconds.
pub(super) const RETRY: i64 = 10;

/// Runs until `shutdown` turns true.
pub async fn run(volumes: Arc<NodeVolumes>, mut shutdown: watch::Receiver<bool>) {
    let mut changes = Some(volumes.objects().changes());
    loop {
        let now = Timestamp::now().as_second();
        let due = volumes.next_due();
        let wait = due.map(|due| Duration::from_secs(u64::try_from(due - now).unwrap_or(0)));
        let wake = tokio::select! {
            changed = next_change(&mut changes) => Wake::Changed(changed),
            () = sleep(wait) => Wake::Due,
            () = volumes.rescheduled.notified() => Wake::Due,
            () = crate::shutdown::requested(&mut shutdown) => {Wake::Shutdown
            }
        };
        let now = Timestamp::now().as_second();
        let pods = match wake {
            Wake::Shutdown => return,
            Wake::Changed(Some(object)) => volumes.mounted(|m| m.uses.contains(&object)),
            Wake::Changed(None) => volumes.mounted(|m| !m.uses.is_empty()),
            Wake::Due => volumes.mounted(|m| m.next().is_some_and(|due| due <= now)),
        };
        for pod in pods {
            let uid = PodUid::of(&pod);
            if let Err(error) = volumes.refresh(&uid).await {
                let pod = NamespacedName::of_pod(&pod);
                tracing::warn!(%pod, %error, "cannot refresh volumes");
                volumes.postpone(&uid, now + RETRY);
            }
        }
    }
}

async fn sleep(wait: Option<Duration>) {
    match wait {
        Some(wait) => tokio::time::sleep(wait).await,
        None => std::future::pending().await,
    }
}

/// The next change; `None` when some were missed. Waits for ever once the source has ended.
async fn next_change(
    changes: &mut Option<tokio::sync::broadcast::Receiver<ObjectRef>>,
) -> Option<ObjectRef> {
    if let Some(receiver) = changes {
        match receiver.recv().await {
            Ok(object) => return Some(object),
            Err(RecvError::Lagged(_)) => return None,
            Err(RecvError::Closed) => *changes = None,
        }
    }
    std::future::pending().await
}
