//! One lock per name, for as long as somebody holds or awaits it.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::OwnedMutexGuard;

type Locks = HashMap<String, Arc<tokio::sync::Mutex<()>>>;

#[derive(Debug, Default)]
pub(super) struct Keyed(Mutex<Locks>);

/// A held lock.
pub(super) struct Held {
    keyed: Arc<Keyed>,
    name: String,
    guard: Option<OwnedMutexGuard<()>>,
}

impl Keyed {
    pub(super) async fn lock(self: &Arc<Self>, name: &str) -> Held {
        let lock = Arc::clone(self.locks().entry(name.to_owned()).or_default());
        // Counted from here on, so that a wait that is given up forgets its entry, too.
        let mut held = Held { keyed: Arc::clone(self), name: name.to_owned(), guard: None };
        held.guard = Some(lock.lock_owned().await);
        held
    }

    fn locks(&self) -> MutexGuard<'_, Locks> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut locks = self.keyed.locks();
        self.guard = None;
        if locks.get(&self.name).is_some_and(|lock| Arc::strong_count(lock) == 1) {
            locks.remove(&self.name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn names_wait_for_themselves_only_and_are_forgotten() {
        let keyed = Arc::new(Keyed::default());
        let first = keyed.lock("a").await;
        let other = keyed.lock("b").await;
        let mut again = Box::pin(keyed.lock("a"));
        assert!(futures::poll!(&mut again).is_pending());
        drop(first);
        drop(again.await);
        let held = keyed.lock("a").await;
        let given_up = Box::pin(keyed.lock("a"));
        drop(given_up);
        drop((held, other));
        assert!(keyed.locks().is_empty());
    }
}
