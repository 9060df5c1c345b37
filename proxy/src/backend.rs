//! What a backend is to the loop: it is told changed plans, or all plans, and makes the kernel so.

use std::sync::Arc;
use std::time::Duration;

use crate::config::{LocalTraffic, Mode};
use crate::model::PlanChange;
use crate::object::{Cidr, NamespacedName};
use crate::plan::ServicePlan;
use crate::question::Describe;

/// Why a backend cannot work at all; single bad Services are told by [`Outcome`].
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// nf_tables.
    #[error(transparent)]
    Nftables(#[from] nft::Error),
    /// iptables.
    #[error(transparent)]
    Iptables(#[from] crate::iptables::Error),
}

/// What a call came to.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Services that the kernel refused, with its words; the others are programmed.
    pub refused: Vec<(NamespacedName, String)>,
    /// What else did not work (a family that the kernel lacks).
    pub errors: Vec<String>,
    /// The kernel is not as it was thought to be: [`Backend::repair`] is due.
    pub repair: bool,
    /// Elements or rules that were written.
    pub written: usize,
    /// How long the kernel had each batch.
    pub batches: Vec<Duration>,
    /// Chains and sets that nobody needs and that could not be deleted, by family (0 is IPv4).
    pub cleanup_failures: [u64; 2],
    /// iptables rules there are and that were written, by family (0 is IPv4) and table.
    pub rules: Vec<(usize, &'static str, usize, usize)>,
}

/// What the fixed rules depend on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Environment {
    /// The mark's bit, as a mask.
    pub masquerade_bit: u32,
    /// Masquerade everything to cluster IPs.
    pub masquerade_all: bool,
    /// How pods' traffic is told.
    pub local: LocalTraffic,
    /// CIDRs of cluster IPs.
    pub service_cidrs: Vec<Cidr>,
    /// Where NodePorts are served; `None` is everywhere.
    pub node_ports: Option<Vec<Cidr>>,
    /// NodePorts at 127.0.0.1 too.
    pub localhost: bool,
    /// Drop forwarded packets that connection tracking takes for invalid (iptables): sent on as they
    /// are, their answers would reset the connection.
    pub drop_invalid: bool,
    /// The kernel counts packets by name, for rules of iptables.
    pub counters: bool,
}

/// Whether somebody's change concerns a backend's rules.
pub type Concerns = fn(&nft::ForeignChange) -> bool;

/// Programs the kernel. Calls block.
pub trait Backend: Send {
    /// Which one it is.
    fn mode(&self) -> Mode;

    /// The client whose changes are own ones, and which of others' changes concern the rules.
    /// `None` if the kernel tells nobody of changes.
    fn monitored(&self) -> Option<(Option<&nft::Client>, Concerns)>;

    /// Looks at what an earlier process left; tells whether there is something.
    ///
    /// # Errors
    /// If the kernel cannot be read.
    fn take_over(&mut self) -> Result<bool, BackendError>;

    /// Whether nobody else changed anything since the last [`Backend::repair`] began, as far as
    /// that can be told: notifications are not listened to meanwhile.
    fn undisturbed(&mut self) -> bool {
        true
    }

    /// Sets what the fixed rules depend on.
    ///
    /// # Errors
    /// If the kernel cannot be changed.
    fn configure(&mut self, environment: &Environment) -> Result<Outcome, BackendError>;

    /// Programs changed plans.
    ///
    /// # Errors
    /// If the kernel cannot be changed.
    fn change(&mut self, changes: &[PlanChange]) -> Result<Outcome, BackendError>;

    /// Tells rules as text; changes nothing.
    ///
    /// # Errors
    /// If the kernel cannot be read.
    fn describe(&mut self, what: &Describe) -> Result<String, BackendError>;

    /// Compares everything with the kernel and programs the difference.
    ///
    /// # Errors
    /// If the kernel cannot be read or changed.
    fn repair(
        &mut self,
        plans: &[(NamespacedName, Arc<ServicePlan>)],
    ) -> Result<Outcome, BackendError>;
}
