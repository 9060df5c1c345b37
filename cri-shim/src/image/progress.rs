//! Pulls in flight, as they can be watched: what each layer has received, and what all pulls of
//! this process came to. Kept in memory only.

use std::{
    sync::{
        Arc, LazyLock, Mutex, PoisonError, Weak,
        atomic::{AtomicU8, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

/// A layer's way into the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LayerState {
    /// For a free slot, or for another pull that is at the same layer.
    Waiting,
    /// Being downloaded and unpacked.
    Pulling,
    /// In place, freshly or since an earlier pull.
    Done,
}

/// One layer of a [`PullProgress`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerProgress {
    /// The digest of its blob.
    pub digest: String,
    /// Bytes received.
    pub received: u64,
    /// Bytes of its blob.
    pub size: u64,
    /// Where it is.
    pub state: LayerState,
}

/// A pull in flight.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PullProgress {
    /// The image, normalised.
    pub reference: String,
    /// Its layers, bottom first; none before the manifest is there.
    pub layers: Vec<LayerProgress>,
    /// How long it has been going on, in seconds.
    pub seconds: f64,
}

/// What the pull itself counts in.
#[derive(Debug)]
pub(crate) struct Pull {
    reference: String,
    begun: Instant,
    layers: Mutex<Arc<[Layer]>>,
}

/// A layer's counters.
#[derive(Debug)]
pub(crate) struct Layer {
    digest: String,
    size: u64,
    received: AtomicU64,
    /// Bytes handed to the unpacker.
    unpacked: AtomicU64,
    state: AtomicU8,
}

impl Layer {
    pub(crate) fn new(digest: &str, size: u64) -> Self {
        Self {
            digest: digest.to_owned(),
            size,
            received: AtomicU64::new(0),
            unpacked: AtomicU64::new(0),
            state: AtomicU8::new(0),
        }
    }

    /// A layer that is begun anew counts anew.
    pub(crate) fn begin(&self) {
        self.received.store(0, Relaxed);
    }

    pub(crate) fn receive(&self, bytes: u64) {
        self.received.fetch_add(bytes, Relaxed);
        RECEIVED.fetch_add(bytes, Relaxed);
    }

    pub(crate) fn unpack(&self, bytes: u64) {
        self.unpacked.fetch_add(bytes, Relaxed);
    }

    pub(crate) fn set(&self, state: LayerState) {
        self.state.store(state as u8, Relaxed);
    }

    fn state(&self) -> LayerState {
        match self.state.load(Relaxed) {
            0 => LayerState::Waiting,
            1 => LayerState::Pulling,
            _ => LayerState::Done,
        }
    }
}

impl Pull {
    pub(crate) fn layers(&self) -> Arc<[Layer]> {
        Arc::clone(&self.layers.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn plan(&self, layers: Vec<Layer>) {
        *self.layers.lock().unwrap_or_else(PoisonError::into_inner) = layers.into();
    }

    fn progress(&self) -> PullProgress {
        let layers = self
            .layers()
            .iter()
            .map(|layer| LayerProgress {
                digest: layer.digest.clone(),
                received: layer.received.load(Relaxed),
                size: layer.size,
                state: layer.state(),
            })
            .collect();
        let seconds = self.begun.elapsed().as_secs_f64();
        PullProgress { reference: self.reference.clone(), layers, seconds }
    }

    /// A number that changes while the pull gets on. Layers that only wait are another pull's
    /// business, which has a timeout of its own; none if that is all there is.
    fn mark(&self) -> Option<u64> {
        let layers = self.layers();
        let pulling = |layer: &&Layer| layer.state() == LayerState::Pulling;
        let waiting = layers.iter().any(|layer| layer.state() == LayerState::Waiting);
        if waiting && !layers.iter().any(|layer| pulling(&layer)) {
            return None;
        }
        Some(
            layers
                .iter()
                .map(|l| {
                    l.received.load(Relaxed)
                        + l.unpacked.load(Relaxed)
                        + u64::from(l.state.load(Relaxed))
                })
                .sum(),
        )
    }

    /// Returns when nothing has moved for `patience`.
    pub(crate) async fn stalled(&self, patience: Duration) {
        let (mut last, mut since) = (None, tokio::time::Instant::now());
        loop {
            tokio::time::sleep(patience / 10).await;
            let mark = self.mark();
            if mark.is_none() || mark != last {
                (last, since) = (mark, tokio::time::Instant::now());
            } else if since.elapsed() >= patience {
                return;
            }
        }
    }
}

/// The pulls in flight.
#[derive(Debug, Default)]
pub(crate) struct Pulls(Mutex<Vec<Weak<Pull>>>);

impl Pulls {
    pub(crate) fn begin(&self, reference: String) -> Arc<Pull> {
        let layers = Mutex::new(Vec::new().into());
        let pull = Arc::new(Pull { reference, begun: Instant::now(), layers });
        let mut pulls = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        pulls.retain(|pull| pull.strong_count() > 0);
        pulls.push(Arc::downgrade(&pull));
        pull
    }

    pub(crate) fn list(&self) -> Vec<PullProgress> {
        let pulls = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        pulls.iter().filter_map(Weak::upgrade).map(|pull| pull.progress()).collect()
    }
}

/// What the pulls of this process came to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PullCounts {
    /// Pulls that ended well.
    pub succeeded: u64,
    /// Pulls that failed, or whose caller went away.
    pub failed: u64,
    /// Pulls under way.
    pub in_progress: u64,
    /// Bytes received from registries, also by pulls under way.
    pub received_bytes: u64,
}

static RECEIVED: AtomicU64 = AtomicU64::new(0);
static COUNTS: LazyLock<Mutex<PullCounts>> = LazyLock::new(Mutex::default);

fn count(change: impl FnOnce(&mut PullCounts)) {
    change(&mut COUNTS.lock().unwrap_or_else(PoisonError::into_inner));
}

/// The counts of this process.
pub fn pull_counts() -> PullCounts {
    let counts = *COUNTS.lock().unwrap_or_else(PoisonError::into_inner);
    PullCounts { received_bytes: RECEIVED.load(Relaxed), ..counts }
}

/// Counts one pull, also one that is cancelled.
pub(crate) struct Counted {
    done: bool,
}

impl Counted {
    pub(crate) fn new() -> Self {
        count(|counts| counts.in_progress += 1);
        Self { done: false }
    }

    pub(crate) fn succeeded(mut self) {
        self.done = true;
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        count(|counts| {
            counts.in_progress -= 1;
            counts.succeeded += u64::from(self.done);
            counts.failed += u64::from(!self.done);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn only_a_pull_that_does_nothing_is_stalled() {
        let pulls = Pulls::default();
        let pull = pulls.begin("x".to_owned());
        pull.plan(vec![Layer::new("a", 10), Layer::new("b", 10)]);
        let minute = Duration::from_secs(60);
        let stalls =
            async |within| tokio::time::timeout(within, pull.stalled(minute)).await.is_ok();
        // Others are at its layers.
        assert!(!stalls(minute * 10).await);
        pull.layers()[0].set(LayerState::Pulling);
        assert!(!stalls(minute - Duration::from_secs(1)).await);
        assert!(stalls(minute * 2).await);
        let moving = async {
            for _ in 0..100 {
                tokio::time::sleep(minute / 2).await;
                pull.layers()[0].receive(1);
            }
        };
        tokio::select! {
            () = pull.stalled(minute) => panic!("it moves"),
            () = moving => {}
        }
        let seen = &pulls.list()[0];
        assert_eq!((seen.layers[0].received, seen.layers[0].state), (100, LayerState::Pulling));
        drop(pull);
        assert!(pulls.list().is_empty());
    }

    #[test]
    fn pulls_are_counted_however_they_end() {
        let before = pull_counts();
        let counted = Counted::new();
        assert_eq!(pull_counts().in_progress, before.in_progress + 1);
        counted.succeeded();
        drop(Counted::new());
        Layer::new("a", 10).receive(5);
        let after = pull_counts();
        assert_eq!(after.in_progress, before.in_progress);
        assert_eq!((after.succeeded, after.failed), (before.succeeded + 1, before.failed + 1));
        assert_eq!(after.received_bytes, before.received_bytes + 5);
    }
}
