//! Why a pod cannot have its CPUs and memory, in kubelet's words.

use super::accumulate::TakeError;

/// Why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NumaError {
    /// Its resources are on no nodes that are good enough.
    #[error("Resources cannot be allocated with Topology locality")]
    Affinity,
    /// It does not ask for whole cores.
    #[error(
        "SMT Alignment Error: requested {requested} cpus not multiple cpus per core = {per_core}"
    )]
    OddCpus {
        /// CPUs.
        requested: usize,
        /// Of each core.
        per_core: usize,
    },
    /// There are not as many whole cores.
    #[error(
        "SMT Alignment Error: not enough free physical CPUs: available physical CPUs = {available}, \
         requested CPUs = {requested}, CPUs per core = {per_core}"
    )]
    ShortOfCores {
        /// CPUs of whole cores.
        available: usize,
        /// CPUs.
        requested: usize,
        /// Of each core.
        per_core: usize,
    },
    /// There are no such CPUs.
    #[error(transparent)]
    Cpus(#[from] TakeError),
    /// No nodes have as much memory.
    #[error(
        "[memorymanager] failed to get the default NUMA affinity, no NUMA nodes with enough memory is available"
    )]
    NoMemory,
    /// Memory is not where the other resources are.
    #[error("[memorymanager] failed to find the {0} preferred hint")]
    NotPreferred(&'static str),
    /// Nor near to there.
    #[error("[memorymanager] failed to find NUMA nodes to extend the current topology hint")]
    NotExtended,
    /// Nodes serve alone or together with the same others.
    #[error("[memorymanager] preferred hint violates NUMA node allocation")]
    Violates,
    /// What was given is not on disk.
    #[error("{0}")]
    NotSaved(String),
}

/// Why a pod is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// In one word.
    pub reason: &'static str,
    /// For people.
    pub message: String,
}

impl Refusal {
    /// For what nobody expects.
    pub fn unexpected(error: impl std::fmt::Display) -> Self {
        let message = format!("Allocate failed due to {error}, which is unexpected");
        Self { reason: "UnexpectedAdmissionError", message }
    }
}

impl From<NumaError> for Refusal {
    fn from(error: NumaError) -> Self {
        let reason = match &error {
            NumaError::Affinity => "TopologyAffinityError",
            NumaError::OddCpus { .. } | NumaError::ShortOfCores { .. } => "SMTAlignmentError",
            _ => return Self::unexpected(error),
        };
        Self { reason, message: error.to_string() }
    }
}
