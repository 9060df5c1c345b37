//! Syncing records to the disk behind the verbs' backs.
//!
//! A record has to survive the death of the shim, for which the rename is enough, and should
//! survive a power loss, after which no container runs and only exit codes and restart counts are
//! still of interest. So verbs do not wait for the disk: one thread syncs what was written, many
//! records in one go.

use std::fs::File;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};

/// Hands directories to the syncing thread.
#[derive(Clone, Debug)]
pub struct Durability(Sender<PathBuf>);

impl Durability {
    /// Starts the thread; it ends with the last handle.
    pub fn start() -> std::io::Result<Self> {
        let (sender, receiver) = channel();
        std::thread::Builder::new().name("durability".to_owned()).spawn(|| run(receiver))?;
        Ok(Durability(sender))
    }

    /// Syncs the files of `directory` and itself, soon.
    pub fn sync(&self, directory: PathBuf) {
        let _ = self.0.send(directory);
    }
}

fn run(receiver: Receiver<PathBuf>) {
    while let Ok(first) = receiver.recv() {
        let mut batch = vec![first];
        batch.extend(receiver.try_iter());
        batch.sort();
        batch.dedup();
        for directory in batch {
            // A directory that is gone by now needs no syncing.
            let Ok(entries) = std::fs::read_dir(&directory) else { continue };
            for entry in entries.flatten() {
                if entry.path().extension().is_some_and(|e| e == "json")
                    && let Ok(file) = File::open(entry.path())
                {
                    let _ = file.sync_data();
                }
            }
            if let Ok(handle) = File::open(&directory) {
                let _ = handle.sync_data();
            }
        }
    }
}
