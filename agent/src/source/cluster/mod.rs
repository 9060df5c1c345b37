//! Pods, Services, EndpointSlices and the node from the API server, as changes.
//!
//! Every loop tells what it knew at the last run (from its store) when the API server does not
//! answer soon, and the difference to the truth once it does.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use tokio::sync::watch;

pub use self::node::run_node;
pub use self::pods::PodLoop;
pub use self::services::{ServiceLoops, Synced, run_service_cidrs};
use crate::ids::{NamespacedName, PodUid};

mod list;
mod node;
mod pods;
mod services;

/// A control plane that has not answered for this long is taken for away: the last known objects
/// are told.
const AWAY_AFTER: Duration = Duration::from_secs(5);
/// Marks the API's picture of a static pod.
pub const MIRROR: &str = "kubernetes.io/config.mirror";

/// Last errors, by what they concern.
#[derive(Clone)]
pub struct Errors(watch::Sender<BTreeMap<&'static str, String>>);

impl Errors {
    /// None yet.
    pub fn new() -> (Self, watch::Receiver<BTreeMap<&'static str, String>>) {
        let (tx, rx) = watch::channel(BTreeMap::new());
        (Self(tx), rx)
    }

    /// `what` failed.
    pub fn set(&self, what: &'static str, message: String) {
        self.0.send_if_modified(|errors| {
            if errors.get(what) == Some(&message) {
                return false;
            }
            tracing::warn!(what, error = %message, "the API server does not do as asked; trying again");
            errors.insert(what, message);
            true
        });
    }

    /// `what` works.
    pub fn clear(&self, what: &'static str) {
        self.0.send_if_modified(|errors| {
            let failed = errors.remove(what).is_some();
            if failed {
                tracing::info!(what, "works again");
            }
            failed
        });
    }
}

/// A pod of the API that is a static pod's picture appeared, changed or went.
#[derive(Clone, Debug)]
pub enum MirrorSeen {
    /// It is there.
    Set(Arc<Pod>),
    /// It is gone.
    Gone(NamespacedName),
    /// All there are have been told.
    Synced,
}

/// Which of the API's pods are being deleted, for whoever confirms their end.
#[derive(Default)]
pub struct Deleting(Mutex<HashMap<PodUid, bool>>);

impl Deleting {
    fn set(&self, uid: PodUid, deleting: bool) {
        self.0.lock().unwrap_or_else(|e| e.into_inner()).insert(uid, deleting);
    }

    fn forget(&self, uid: &PodUid) {
        self.0.lock().unwrap_or_else(|e| e.into_inner()).remove(uid);
    }

    /// Whether the API has a `deletionTimestamp` for `uid`; `None` if it has no such pod.
    pub fn is_deleting(&self, uid: &PodUid) -> Option<bool> {
        self.0.lock().unwrap_or_else(|e| e.into_inner()).get(uid).copied()
    }
}
