//! Which backend: the one that is asked for, or the first that this kernel has.

use crate::Error;
use crate::backend::{Backend, Environment};
use crate::config::Mode;
use crate::iptables::Iptables;
use crate::nftables::backend::Nftables;

/// Chooses the backend.
pub fn choose(mode: Mode, environment: &Environment) -> Result<Box<dyn Backend>, Error> {
    let nftables = match mode {
        Mode::Iptables => false,
        Mode::Nftables => true,
        Mode::Auto => match Nftables::probe() {
            Ok(()) => true,
            Err(error) => {
                tracing::info!(%error, "no nf_tables here, taking iptables");
                false
            }
        },
    };
    if nftables {
        let backend = Nftables::new(environment);
        Ok(Box::new(backend.map_err(|error| Error::NoBackend(error.to_string()))?))
    } else {
        let backend = Iptables::new(environment);
        Ok(Box::new(backend.map_err(|error| Error::NoBackend(error.to_string()))?))
    }
}

/// Removes what the other backend left, once this one serves; tells what could not be removed.
pub fn sweep_other(mode: Mode) -> Option<String> {
    if mode == Mode::Nftables {
        Iptables::cleanup().err().map(|error| error.to_string())
    } else {
        // A kernel without nf_tables has no rules there either.
        Nftables::cleanup().err().and_then(|error| match error {
            nft::Error::Refused { .. } => Some(error.to_string()),
            _ => None,
        })
    }
}
