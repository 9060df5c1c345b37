//! What others do to the rules: the kernel tells of each change, and all but the own ones are
//! repaired.

use super::{Loop, State};

impl Loop {
    /// Subscribes to others' changes.
    pub(super) fn watch_kernel(&mut self) {
        let Some(backend) = &self.backend else { return };
        let Some((client, concerns)) = backend.monitored() else { return };
        match nft::Monitor::new(client) {
            Ok(monitor) => self.monitor = Some((monitor, concerns)),
            Err(error) => {
                let message = format!("{error}; foreign changes are found by polling only");
                self.errors.insert("nf_tables notifications".to_owned(), message);
            }
        }
    }

    pub(super) fn foreign_change(&mut self, told: Result<nft::Notification, nft::Error>) {
        let ours = match (&told, &self.monitor) {
            (Ok(nft::Notification::Commit { by, changes }), Some((_, concerns))) => {
                !(self.busy.is_some() && self.own_program(by)) && changes.iter().any(concerns)
            }
            (Ok(nft::Notification::Overflow), _) => true,
            (Err(error), _) => {
                tracing::warn!(%error, "subscribing to nf_tables changes again");
                self.monitor = None;
                true
            }
            _ => false,
        };
        if ours && self.state == State::Serving {
            tracing::warn!("somebody else changed the proxy's rules; repairing them");
            self.state = State::Repairing;
        }
    }

    /// Whether a change by a program of that name may be the iptables backend's own.
    fn own_program(&self, by: &str) -> bool {
        const PROGRAMS: [&str; 4] = ["iptables-restor", "ip6tables-resto", "iptables", "ip6tables"];
        self.programs && PROGRAMS.iter().any(|own| by.starts_with(own))
    }

    /// What was told while a job ran: the changes of its own programs are no news.
    pub(super) fn told_meanwhile(&mut self) {
        let Some((monitor, concerns)) = &mut self.monitor else { return };
        let (told, concerns) = (monitor.told(), *concerns);
        let foreign = told.iter().any(|told| match told {
            nft::Notification::Commit { by, changes } => {
                !self.own_program(by) && changes.iter().any(concerns)
            }
            nft::Notification::Overflow => true,
        });
        if foreign && self.state == State::Serving {
            tracing::warn!("somebody else changed the proxy's rules; repairing them");
            self.state = State::Repairing;
        }
    }
}
