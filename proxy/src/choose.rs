//! Which backend: the one that is asked for, or the first that this kernel has.

use crate::Error;
use crate::backend::{Backend, Environment};
use crate::config::Mode;
use crate::iptables::Iptables;
use crate::nftables::backend::Nftables;
use crate::nftables::names::{TABLE, UPSTREAM_TABLE};

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

/// Removes what the other backend left, and upstream's proxy in either mode, once this one serves;
/// tells what could not be removed.
pub fn sweep_other(mode: Mode) -> Option<String> {
    let (tables, spare): (&[&str], bool) = match mode {
        Mode::Iptables => (&[TABLE, UPSTREAM_TABLE], true),
        Mode::Auto | Mode::Nftables => (&[UPSTREAM_TABLE], false),
    };
    let mut errors: Vec<String> =
        Iptables::cleanup(spare).err().iter().map(ToString::to_string).collect();
    // A kernel without nf_tables has no rules there either.
    if let Err(error @ nft::Error::Refused { .. }) = Nftables::cleanup(tables) {
        errors.push(error.to_string());
    }
    (!errors.is_empty()).then(|| errors.join("; "))
}
