//! Who stands at the door: connections that have not shown yet that they are somebody.
//!
//! Anybody can open connections. Until the first request on one passes the guard it is a stranger,
//! and strangers are few (`STRANGERS`) and in a hurry (`Hurry`): ten thousand
//! half-open connections push one another out, the oldest first, and nobody who is known.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;

/// Strangers at once.
const STRANGERS: usize = 512;
/// Connections at once.
const CONNECTIONS: usize = 16_384;

/// How long strangers have.
#[derive(Clone, Copy, Debug)]
pub(super) struct Hurry {
    /// Longest TLS handshake.
    pub(super) handshake: Duration,
    /// How long after it a first request must have passed the guard.
    pub(super) first_request: Duration,
}

impl Default for Hurry {
    fn default() -> Self {
        Self { handshake: Duration::from_secs(10), first_request: Duration::from_secs(30) }
    }
}

#[derive(Default)]
struct Inner {
    next: u64,
    open: usize,
    strangers: BTreeMap<u64, oneshot::Sender<()>>,
}

/// The door; clones share it.
#[derive(Clone, Default)]
pub(super) struct Door(Arc<Mutex<Inner>>);

/// One connection inside.
pub(super) struct Visitor {
    door: Door,
    number: u64,
}

impl Door {
    fn inner(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets a connection in, the oldest stranger out where there are too many. The receiver says
    /// when this one must go. `None`: there is no room.
    pub(super) fn enter(&self) -> Option<(Visitor, oneshot::Receiver<()>)> {
        let mut inner = self.inner();
        if inner.open >= CONNECTIONS {
            return None;
        }
        if inner.strangers.len() >= STRANGERS
            && let Some((_, oldest)) = inner.strangers.pop_first()
        {
            let _ = oldest.send(());
        }
        let (out, told) = oneshot::channel();
        let number = inner.next;
        inner.next += 1;
        inner.open += 1;
        inner.strangers.insert(number, out);
        Some((Visitor { door: self.clone(), number }, told))
    }
}

impl Visitor {
    /// A request passed the guard: no stranger any more.
    pub(super) fn known(&self) {
        let sender = self.door.inner().strangers.remove(&self.number);
        drop(sender);
    }

    /// Whether no request has passed the guard yet.
    pub(super) fn is_stranger(&self) -> bool {
        self.door.inner().strangers.contains_key(&self.number)
    }
}

impl Drop for Visitor {
    fn drop(&mut self) {
        let mut inner = self.door.inner();
        inner.open -= 1;
        inner.strangers.remove(&self.number);
    }
}

/// Returns when `told` says to go; never when the connection became known.
pub(super) async fn sent_away(told: oneshot::Receiver<()>) {
    if told.await.is_err() {
        std::future::pending::<()>().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_oldest_stranger_goes_and_nobody_who_is_known() {
        let door = Door::default();
        let (known, known_told) = door.enter().unwrap();
        known.known();
        let mut strangers: Vec<_> = (0..STRANGERS + 2).map(|_| door.enter().unwrap()).collect();
        let told = |at: usize, all: &mut Vec<(Visitor, oneshot::Receiver<()>)>| {
            all[at].1.try_recv().is_ok()
        };
        assert!(told(0, &mut strangers) && told(1, &mut strangers));
        assert!(!told(2, &mut strangers));
        assert!(!known.is_stranger() && strangers[2].0.is_stranger());
        let away = tokio::time::timeout(Duration::from_millis(20), sent_away(known_told));
        assert!(away.await.is_err(), "who is known stays");
        drop(strangers);
        assert!(door.inner().strangers.is_empty());
        assert_eq!(door.inner().open, 1);
    }

    #[test]
    fn there_is_room_for_so_many_and_no_more() {
        let door = Door::default();
        let all: Vec<_> = (0..CONNECTIONS).map(|_| door.enter().unwrap()).collect();
        assert!(door.enter().is_none());
        drop(all);
        assert!(door.enter().is_some());
    }
}
