//! What wakes those who follow logs: the kernel, when a log is written to; the pod table, when a
//! container has ended.
//!
//! One inotify instance watches the folders of followed logs, one watch a folder however many follow,
//! and one task looks at the pod table when it changes. A follower that has nothing to read costs its
//! open file and a few hundred bytes.

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use futures::StreamExt;
use inotify::{Inotify, WatchDescriptor, WatchMask, Watches};
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
    folders: Mutex<Option<Folders>>,
    endings: Mutex<HashMap<Instance, watch::Sender<bool>>>,
}

struct Folders {
    watches: Watches,
    by_watch: HashMap<WatchDescriptor, watch::Sender<()>>,
}

/// Wakes one follower.
pub(super) struct Wake {
    written: watch::Receiver<()>,
    ended: watch::Receiver<bool>,
    _folder: FolderWatch,
}

/// One follower's share in the watch of a folder.
struct FolderWatch {
    followers: Weak<Followers>,
    watch: WatchDescriptor,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Followers {
    pub(in crate::node_api) fn new(table: PodTable) -> Arc<Self> {
        Arc::new(Self { table, folders: Mutex::new(None), endings: Mutex::default() })
    }

    /// Follows the log at `path` of `instance`. Look at both once after this: what happened before is
    /// not told.
    pub(super) fn follow(self: &Arc<Self>, path: &Path, instance: Instance) -> io::Result<Wake> {
        let folder = path.parent().unwrap_or(Path::new("/"));
        let (watch, written) = self.watch(folder)?;
        Ok(Wake {
            written,
            ended: self.ending(instance),
            _folder: FolderWatch { followers: Arc::downgrade(self), watch },
        })
    }

    fn watch(
        self: &Arc<Self>,
        folder: &Path,
    ) -> io::Result<(WatchDescriptor, watch::Receiver<()>)> {
        let mut folders = lock(&self.folders);
        let folders = match &mut *folders {
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
        let watch = folders.watches.add(folder, mask)?;
        let sender =
            folders.by_watch.entry(watch.clone()).or_insert_with(|| watch::Sender::new(()));
        Ok((watch, sender.subscribe()))
    }

    fn ending(self: &Arc<Self>, instance: Instance) -> watch::Receiver<bool> {
        let mut endings = lock(&self.endings);
        if endings.is_empty() {
            tokio::spawn(tell_endings(Arc::downgrade(self), self.table.changes()));
        }
        let over = !self.table.runs(&instance.uid, &instance.name, &instance.id);
        let sender = endings.entry(instance).or_insert_with(|| watch::Sender::new(over));
        if over {
            sender.send_replace(true);
        }
        sender.subscribe()
    }

    /// Tells those whose container has ended; whether anybody follows still.
    fn look_at_endings(&self) -> bool {
        let mut endings = lock(&self.endings);
        endings.retain(|instance, sender| {
            if sender.receiver_count() == 0 {
                return false;
            }
            let runs = self.table.runs(&instance.uid, &instance.name, &instance.id);
            if !runs {
                sender.send_replace(true);
            }
            runs
        });
        !endings.is_empty()
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
        let mut folders = lock(&followers.folders);
        let Some(folders) = &mut *folders else { return };
        match event {
            Ok(event) if event.mask.contains(inotify::EventMask::Q_OVERFLOW) => {
                folders.by_watch.values().for_each(|sender| {
                    sender.send_replace(());
                });
            }
            Ok(event) => {
                if let Some(sender) = folders.by_watch.get(&event.wd) {
                    sender.send_replace(());
                }
            }
            Err(error) => tracing::warn!(%error, "cannot read what happens to followed logs"),
        }
    }
}

impl Drop for FolderWatch {
    fn drop(&mut self) {
        let Some(followers) = self.followers.upgrade() else { return };
        let mut folders = lock(&followers.folders);
        let Some(folders) = &mut *folders else { return };
        let last = folders
            .by_watch
            .get(&self.watch)
            // The receiver beside us is dropped before us.
            .is_some_and(|sender| sender.receiver_count() == 0);
        if last {
            folders.by_watch.remove(&self.watch);
            let _ = folders.watches.remove(self.watch.clone());
        }
    }
}

impl Wake {
    /// Whether the container has ended.
    pub(super) fn has_ended(&self) -> bool {
        *self.ended.borrow()
    }

    /// Returns when there may be something to read, or the container has ended.
    pub(super) async fn wait(&mut self) {
        let Self { written, ended, .. } = self;
        let written = async {
            if written.changed().await.is_err() {
                // The watch is gone; the end of the container is left.
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            () = written => {}
            _ = ended.wait_for(|ended| *ended) => {}
        }
    }
}
