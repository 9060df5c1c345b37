//! Attached clients: they are given copies of a container's output until they or it end.

use std::io;
use std::os::fd::AsRawFd;

use super::{Pod, reply, reply_with};
use crate::monitor::protocol::Reply;

impl Pod {
    pub(super) fn attach(&mut self, at: usize, container: &str, stdout: bool, stderr: bool) {
        let pipes = std::mem::take(&mut self.connections[at].inbox.fds);
        let connection = self.connections[at].id;
        let attached = match self.containers.iter_mut().find(|c| c.id == container) {
            None => Err(io::Error::other("the container is not running")),
            Some(found) => found.attach(connection, stdout, stderr, pipes).map(|()| found.input()),
        };
        match attached {
            Ok(input) => {
                let fds: Vec<_> = input.iter().map(|fd| fd.as_raw_fd()).collect();
                reply_with(&mut self.connections[at], &Reply::Done, &fds);
            }
            Err(error) => {
                let message = format!("attaching to the container: {error}");
                reply(&mut self.connections[at], &Reply::Failed { message });
            }
        }
    }

    /// Gives a client of a container what it has not taken yet.
    pub(super) fn catch_up(&mut self, container: usize, at: usize) {
        let Some(container) = self.containers.get_mut(container) else { return };
        if let Some(follower) = container.followers.get_mut(at)
            && !follower.catch_up()
        {
            container.followers.swap_remove(at);
        }
    }

    /// Gives a client of a container that has ended the last words.
    pub(super) fn last_words(&mut self, at: usize) {
        if let Some(follower) = self.followers.get_mut(at)
            && !follower.catch_up()
        {
            self.followers.swap_remove(at);
        }
    }
}
