//! Events of a folder whose entries come and go (inotify(7)).
//!
//! They only say that it is time to look: what is there is read whole by whoever watches, so that a
//! lost or doubled event changes nothing.

use std::io;
use std::path::Path;

use futures::StreamExt as _;
use inotify::{EventMask, EventStream, Inotify, WatchMask};

/// Events of a folder, and of those that are added to its watches.
pub(crate) type Events = EventStream<[u8; 4096]>;

/// What tells that entries come and go, and that the folder itself does.
pub(crate) fn entries() -> WatchMask {
    WatchMask::CREATE
        | WatchMask::DELETE
        | WatchMask::MOVED_TO
        | WatchMask::MOVED_FROM
        | WatchMask::DELETE_SELF
        | WatchMask::MOVE_SELF
        | WatchMask::ONLYDIR
}

/// Watches `folder` for [`entries`] and whatever else `mask` holds.
///
/// # Errors
/// If there is no such folder, or the user may watch no more.
pub(crate) fn watch(folder: &Path, mask: WatchMask) -> io::Result<Events> {
    let inotify = Inotify::init()?;
    inotify.watches().add(folder, entries() | mask)?;
    inotify.into_event_stream([0; 4096])
}

/// Waits for an event, for ever without a watch; false if what is watched is not any more.
pub(crate) async fn next(events: &mut Option<Events>) -> bool {
    let Some(stream) = events else { return std::future::pending().await };
    match stream.next().await {
        Some(Ok(event)) => {
            let lost = EventMask::DELETE_SELF
                | EventMask::MOVE_SELF
                | EventMask::UNMOUNT
                | EventMask::IGNORED;
            !event.mask.intersects(lost)
        }
        Some(Err(_)) | None => false,
    }
}
