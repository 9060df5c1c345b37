//! What fine-tunes the policies: `cpuManagerPolicyOptions` and `topologyManagerPolicyOptions`. Pure.

use std::collections::BTreeMap;

use super::topology::{Level, Topology};

/// NUMA nodes up to which alignment is worked out, unless told otherwise: each doubles the work.
const MAX_NODES: usize = 8;

/// Options of the static CPU policy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuOptions {
    /// `full-pcpus-only`: only whole cores.
    pub full_cores: bool,
    /// `distribute-cpus-across-numa`: as many of each node where one is not enough.
    pub across_nodes: bool,
    /// `align-by-socket`: a socket is as good as a NUMA node.
    pub by_socket: bool,
    /// `distribute-cpus-across-cores`: of as many cores as can be.
    pub across_cores: bool,
    /// `strict-cpu-reservation`: reserved CPUs are not for pods at all.
    pub strict: bool,
    /// `prefer-align-cpus-by-uncorecache`: of as few last-level caches as can be.
    pub by_cache: bool,
}

/// Which options may be used at all (feature gates `CPUManagerPolicy{Alpha,Beta}Options`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Maturity {
    /// Those of level Alpha.
    pub alpha: bool,
    /// Those of level Beta.
    pub beta: bool,
}

/// As Go reads truth.
fn truth(name: &str, text: &str) -> Result<bool, String> {
    match text {
        "1" | "t" | "T" | "TRUE" | "true" | "True" => Ok(true),
        "0" | "f" | "F" | "FALSE" | "false" | "False" => Ok(false),
        _ => Err(format!("bad value for option {name:?}: {text:?} is neither true nor false")),
    }
}

impl CpuOptions {
    /// What is asked for.
    ///
    /// # Errors
    /// An option is unknown or not to be used, or two do not go together.
    pub fn read(asked: &BTreeMap<String, String>, allowed: Maturity) -> Result<Self, String> {
        let mut options = Self::default();
        for (name, text) in asked {
            let (place, level) = match name.as_str() {
                "full-pcpus-only" => (&mut options.full_cores, ""),
                "strict-cpu-reservation" => (&mut options.strict, ""),
                "prefer-align-cpus-by-uncorecache" => (&mut options.by_cache, ""),
                "distribute-cpus-across-numa" => (&mut options.across_nodes, "Beta"),
                "align-by-socket" => (&mut options.by_socket, "Alpha"),
                "distribute-cpus-across-cores" => (&mut options.across_cores, "Alpha"),
                _ => return Err(format!("unknown CPU Manager Policy option: {name:?}")),
            };
            if (level == "Alpha" && !allowed.alpha) || (level == "Beta" && !allowed.beta) {
                return Err(format!(
                    "CPU Manager Policy {level}-level Options not enabled, but option {name:?} \
                     provided; set featureGates: {{CPUManagerPolicy{level}Options: true}}"
                ));
            }
            *place = truth(name, text)?;
        }
        let Self { full_cores, across_nodes, across_cores, by_cache, .. } = options;
        let (cores, nodes) = ("distribute-cpus-across-cores", "distribute-cpus-across-numa");
        for (both, one, other) in [
            (full_cores && across_cores, "full-pcpus-only", cores),
            (across_nodes && across_cores, nodes, cores),
            (by_cache && across_cores, "prefer-align-cpus-by-uncorecache", cores),
            (by_cache && across_nodes, "prefer-align-cpus-by-uncorecache", nodes),
        ] {
            if both {
                return Err(format!(
                    "static policy options {one} and {other} can not be used at the same time"
                ));
            }
        }
        Ok(options)
    }

    /// Whether they can be met on this machine.
    ///
    /// # Errors
    /// They cannot.
    pub fn check(&self, topology: &Topology, alignment: Alignment) -> Result<(), String> {
        if self.by_socket && alignment == Alignment::SingleNode {
            return Err(
                "topology manager policy single-numa-node is incompatible with CPU manager \
                        policy option align-by-socket"
                    .into(),
            );
        }
        if self.by_socket && topology.count(Level::Socket) > topology.count(Level::Node) {
            return Err("align-by-socket is not compatible with hardware where the number of \
                        sockets is more than the number of NUMA nodes"
                .into());
        }
        Ok(())
    }
}

/// `topologyManagerPolicy`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Alignment {
    /// `none`.
    #[default]
    None,
    /// `best-effort`.
    BestEffort,
    /// `restricted`.
    Restricted,
    /// `single-numa-node`.
    SingleNode,
}

/// Options of the topology manager.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AlignmentOptions {
    /// `prefer-closest-numa-nodes`: of as many nodes those that are near to each other.
    pub closest: bool,
    /// `max-allowable-numa-nodes`.
    pub max_nodes: usize,
}

impl Default for AlignmentOptions {
    fn default() -> Self {
        Self { closest: false, max_nodes: MAX_NODES }
    }
}

impl AlignmentOptions {
    /// What is asked for.
    ///
    /// # Errors
    /// An option is unknown, or has a value that it cannot have.
    pub fn read(asked: &BTreeMap<String, String>) -> Result<Self, String> {
        let mut options = Self::default();
        for (name, text) in asked {
            match name.as_str() {
                "prefer-closest-numa-nodes" => options.closest = truth(name, text)?,
                "max-allowable-numa-nodes" => {
                    options.max_nodes = text.parse().map_err(|_| {
                        format!("unable to convert policy option to integer {name:?}: {text:?}")
                    })?;
                    if options.max_nodes < MAX_NODES {
                        return Err(format!(
                            "the minimum value of {name:?} should not be less than {MAX_NODES}"
                        ));
                    }
                }
                _ => return Err(format!("unknown Topology Manager Policy option: {name:?}")),
            }
        }
        Ok(options)
    }
}

#[cfg(test)]
mod tests {
    use super::super::topology::tests::machine;
    use super::*;

    fn pairs(text: &str) -> BTreeMap<String, String> {
        let pair = |pair: &str| {
            let (name, value) = pair.split_once('=').unwrap();
            (name.to_owned(), value.to_owned())
        };
        text.split_whitespace().map(pair).collect()
    }

    #[test]
    fn cpu_options_are_read_by_maturity() {
        let default = Maturity { alpha: false, beta: true };
        let read = |text: &str, allowed| CpuOptions::read(&pairs(text), allowed);
        let options = read("full-pcpus-only=true distribute-cpus-across-numa=1", default).unwrap();
        assert!(options.full_cores && options.across_nodes && !options.strict);
        let all = Maturity { alpha: true, beta: true };
        assert!(read("align-by-socket=t strict-cpu-reservation=T", all).unwrap().by_socket);
        for (text, allowed, said) in [
            ("align-by-socket=true", default, "Alpha-level Options not enabled"),
            (
                "distribute-cpus-across-numa=false",
                Maturity { alpha: true, beta: false },
                "CPUManagerPolicyBetaOptions: true",
            ),
            ("full-pcpu-only=true", all, "unknown CPU Manager Policy option"),
            ("full-pcpus-only=yes", all, "bad value for option \"full-pcpus-only\""),
            ("full-pcpus-only=true distribute-cpus-across-cores=true", all, "same time"),
            (
                "prefer-align-cpus-by-uncorecache=true distribute-cpus-across-numa=true",
                all,
                "can not be used",
            ),
        ] {
            let error = read(text, allowed).unwrap_err();
            assert!(error.contains(said), "{error}");
        }
    }

    #[test]
    fn sockets_are_aligned_by_where_there_are_nodes() {
        let by_socket = CpuOptions { by_socket: true, ..CpuOptions::default() };
        let two = machine([2, 2, 2, 1], 1);
        assert_eq!(by_socket.check(&two, Alignment::Restricted), Ok(()));
        assert!(by_socket.check(&two, Alignment::SingleNode).is_err());
        let mut one = two;
        one.cpus.values_mut().for_each(|place| place.node = 0);
        assert!(by_socket.check(&one, Alignment::None).unwrap_err().contains("more than"));
    }

    #[test]
    fn alignment_options_are_read() {
        let read = |text: &str| AlignmentOptions::read(&pairs(text));
        let options = read("prefer-closest-numa-nodes=true max-allowable-numa-nodes=12").unwrap();
        assert_eq!(options, AlignmentOptions { closest: true, max_nodes: 12 });
        for text in ["max-allowable-numa-nodes=7", "max-allowable-numa-nodes=x", "near=true"] {
            assert!(read(text).is_err(), "{text}");
        }
    }
}
