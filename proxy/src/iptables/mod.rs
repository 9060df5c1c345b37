//! The iptables backend, for kernels without nf_tables: own chains in the tables `nat` and
//! `filter`, one restore of the changed chains only.

use std::sync::Arc;

use crate::backend::{Backend, BackendError, Environment, Outcome};
use crate::config::Mode;
use crate::model::PlanChange;
use crate::object::NamespacedName;
use crate::plan::ServicePlan;

/// Why iptables could not be changed or read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A program could not be run, or refused its input.
    #[error("{0}")]
    Command(String),
}

/// The backend.
#[derive(Debug)]
pub struct Iptables {}

impl Iptables {
    /// Checks that the programs are there.
    ///
    /// # Errors
    /// If they are not.
    pub fn new(_environment: &Environment) -> Result<Self, Error> {
        Err(Error::Command("mode iptables is not implemented".to_owned()))
    }

    /// Removes all own chains and rules.
    ///
    /// # Errors
    /// Lists what could not be removed.
    pub fn cleanup() -> Result<(), Error> {
        Ok(())
    }
}

impl Backend for Iptables {
    fn mode(&self) -> Mode {
        Mode::Iptables
    }

    fn monitored(&self) -> Option<(&nft::Client, &'static str)> {
        None
    }

    fn take_over(&mut self) -> Result<bool, BackendError> {
        Ok(false)
    }

    fn configure(&mut self, _environment: &Environment) -> Result<Outcome, BackendError> {
        Ok(Outcome::default())
    }

    fn change(&mut self, _changes: &[PlanChange]) -> Result<Outcome, BackendError> {
        Ok(Outcome::default())
    }

    fn repair(
        &mut self,
        _plans: &[(NamespacedName, Arc<ServicePlan>)],
    ) -> Result<Outcome, BackendError> {
        Ok(Outcome::default())
    }
}
