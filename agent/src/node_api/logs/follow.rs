//! What wakes those who follow logs: the kernel, when a log is written to; the pod table, when a
//! container has ended.
//!
//! One inotify instance watches the folders of followed logs, one watch a folder however many follow,
//! and one task looks at the pod table when it changes. A follower that has nothing to read costs its
//! open file and some three hundred bytes, so a thousand may wait: no task, no timer, no channel each.

use std::collections::HashMap;
use std::io;
use std::num::NonZeroU32;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, Waker};

use futures::StreamExt;
use inotify::{Inotify, WatchDescriptor, WatchMask, Watches};
use slab::Slab;
use tokio::sync::watch;

use crate::ids::PodUid;
use crate::pod::table::PodTable;

/// A container that is followed.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Instance {
    pub(super) uid: PodUid,
    pub(super) name: String,
    pub(super) id: String,
}

/// All who follow.
pub(in crate::node_api) struct Followers {
    table: PodTable,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    followed: HashMap<Instance, Weak<Followed>>,
    folders: Option<Folders>,
    /// A task looks out for endings.
    looks: bool,
}

struct Folders {
    watches: Watches,
    by_watch: HashMap<WatchDescriptor, Vec<Weak<Followed>>>,
}

/// A log that somebody follows.
struct Followed {
    followers: Weak<Followers>,
    instance: Instance,
    path: Arc<Path>,
    watch: WatchDescriptor,
    /// Grows with each thing that happens.
    news: AtomicU32,
    ended: AtomicBool,
    waiting: Mutex<Slab<Waker>>,
}

/// Wakes one follower.
pub(super) struct Wake {
    followed: Arc<Followed>,
    seen: u32,
    /// In `waiting`, counted from one: it is in memory a thousand times.
    place: Option<NonZeroU32>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Those that are followed still. They are held until after the lock: the last holder's drop takes it.
fn living<'a>(all: impl IntoIterator<Item = &'a Weak<Followed>>) -> Vec<Arc<Followed>> {
    all.into_iter().filter_map(Weak::upgrade).collect()
}

impl Followers {
    pub(in crate::node_api) fn new(table: PodTable) -> Arc<Self> {
        Arc::new(Self { table, inner: Mutex::default() })
    }

    /// Follows the log at `path` of `instance`. What happened before the first `look` is not told.
    pub(super) fn follow(self: &Arc<Self>, path: &Path, instance: Instance) -> io::Result<Wake> {
        let mut inner = lock(&self.inner);
        let followed = match inner.followed.get(&instance).and_then(Weak::upgrade) {
            Some(followed) => followed,
            None => self.begin(&mut inner, path, instance)?,
        };
        Ok(Wake { seen: followed.news.load(Ordering::Acquire), followed, place: None })
    }

    fn begin(
        self: &Arc<Self>,
        inner: &mut Inner,
        path: &Path,
        instance: Instance,
    ) -> io::Result<Arc<Followed>> {
        let folders = match &mut inner.folders {
            Some(folders) => folders,
            none => {
                let inotify = Inotify::init()?;
                let watches = inotify.watches();
                let events = inotify.into_event_stream(vec![0; 16 << 10])?;
                tokio::spawn(tell(Arc::downgrade(self), events));
                none.insert(Folders { watches, by_watch: HashMap::new() })
            }
        };
        let mask = WatchMask::MODIFY
            | WatchMask::CREATE
            | WatchMask::MOVED_TO
            | WatchMask::DELETE
            | WatchMask::DELETE_SELF;
        // The same folder gives the same watch.
        let watch = folders.watches.add(path.parent().unwrap_or(Path::new("/")), mask)?;
        if !std::mem::replace(&mut inner.looks, true) {
            tokio::spawn(tell_endings(Arc::downgrade(self), self.table.changes()));
        }
        let ended = !self.table.runs(&instance.uid, &instance.name, &instance.id);
        let followed = Arc::new(Followed {
            followers: Arc::downgrade(self),
            instance,
            path: path.into(),
            watch,
            news: AtomicU32::new(0),
            ended: AtomicBool::new(ended),
            waiting: Mutex::default(),
        });
        let weak = Arc::downgrade(&followed);
        folders.by_watch.entry(followed.watch.clone()).or_default().push(weak.clone());
        inner.followed.insert(followed.instance.clone(), weak);
        Ok(followed)
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        let inner = lock(&self.inner);
        let watches = inner.folders.as_ref().map_or(0, |folders| folders.by_watch.len());
        inner.followed.is_empty() && watches == 0
    }

    /// Tells those whose container has ended; whether there are others still.
    fn look_at_endings(&self) -> bool {
        let mut inner = lock(&self.inner);
        let mut all = living(inner.followed.values());
        all.retain(|followed| !followed.ended.load(Ordering::Acquire));
        let (running, ended): (Vec<_>, Vec<_>) = all.into_iter().partition(|followed| {
            let Instance { uid, name, id } = &followed.instance;
            self.table.runs(uid, name, id)
        });
        inner.looks = !running.is_empty();
        drop(inner);
        for followed in ended {
            followed.ended.store(true, Ordering::Release);
            followed.tell();
        }
        !running.is_empty()
    }

    /// Wakes those who follow a log in a folder, or all if it is not known which.
    fn written(&self, watch: Option<&WatchDescriptor>) {
        let inner = lock(&self.inner);
        let woken = match (&inner.folders, watch) {
            (Some(folders), Some(watch)) => {
                living(folders.by_watch.get(watch).into_iter().flatten())
            }
            _ => living(inner.followed.values()),
        };
        drop(inner);
        woken.iter().for_each(|followed| followed.tell());
    }
}

async fn tell_endings(followers: Weak<Followers>, mut changes: watch::Receiver<u64>) {
    while changes.changed().await.is_ok() {
        let Some(followers) = followers.upgrade() else { return };
        if !followers.look_at_endings() {
            return;
        }
    }
}

async fn tell(followers: Weak<Followers>, mut events: inotify::EventStream<Vec<u8>>) {
    while let Some(event) = events.next().await {
        let Some(followers) = followers.upgrade() else { return };
        match event {
            Ok(event) if event.mask.contains(inotify::EventMask::Q_OVERFLOW) => {
                followers.written(None);
            }
            Ok(event) => followers.written(Some(&event.wd)),
            Err(error) => tracing::warn!(%error, "cannot read what happens to followed logs"),
        }
    }
}

impl Followed {
    fn tell(&self) {
        self.news.fetch_add(1, Ordering::AcqRel);
        lock(&self.waiting).iter().for_each(|(_, waker)| waker.wake_by_ref());
    }
}

impl Drop for Followed {
    fn drop(&mut self) {
        let Some(followers) = self.followers.upgrade() else { return };
        let mut inner = lock(&followers.inner);
        // Somebody may have begun to follow it anew meanwhile.
        if inner.followed.get(&self.instance).is_some_and(|other| other.strong_count() == 0) {
            inner.followed.remove(&self.instance);
        }
        let Some(folders) = &mut inner.folders else { return };
        let Some(others) = folders.by_watch.get_mut(&self.watch) else { return };
        others.retain(|other| other.strong_count() > 0);
        if others.is_empty() {
            folders.by_watch.remove(&self.watch);
            let _ = folders.watches.remove(self.watch.clone());
        }
    }
}

impl Wake {
    /// The log, by a path that all who follow it share.
    pub(super) fn path(&self) -> Arc<Path> {
        self.followed.path.clone()
    }

    /// Takes note of all that has happened; whether the container has ended.
    pub(super) fn look(&mut self) -> bool {
        self.seen = self.followed.news.load(Ordering::Acquire);
        self.followed.ended.load(Ordering::Acquire)
    }

    /// Ready when something has happened since the last look.
    pub(super) fn poll_news(&mut self, cx: &Context<'_>) -> Poll<()> {
        let mut waiting = lock(&self.followed.waiting);
        match self.place.and_then(|place| waiting.get_mut(place.get() as usize - 1)) {
            Some(waker) => waker.clone_from(cx.waker()),
            None => {
                let place = waiting.insert(cx.waker().clone()) + 1;
                self.place = u32::try_from(place).ok().and_then(NonZeroU32::new);
            }
        }
        drop(waiting);
        // Looked at after the waker is in its place, so that nothing falls between.
        if self.followed.news.load(Ordering::Acquire) == self.seen {
            return Poll::Pending;
        }
        Poll::Ready(())
    }
}

impl Drop for Wake {
    fn drop(&mut self) {
        if let Some(place) = self.place {
            lock(&self.followed.waiting).try_remove(place.get() as usize - 1);
        }
    }
}
