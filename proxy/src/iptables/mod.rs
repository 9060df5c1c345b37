//! The iptables backend, for kernels without nf_tables: own chains in the tables `nat` and
//! `filter`, written by one restore of what changed; the `iptables` crate sets the jumps to them.
//!
//! The chains have the names that upstream's proxy gives them, so each takes over what the other
//! left. `iptables` may be of two kinds (`legacy`, `nf_tables`) that do not see each other's rules:
//! the one that the system has chosen is used, and cleaned are both.

mod rules;
mod script;

use std::collections::{BTreeMap, HashMap};
use std::io::Write;
use std::process::{Command, Stdio};
use std::sync::Arc;

use crate::backend::{Backend, BackendError, Concerns, Environment, Outcome};
use crate::config::Mode;
use crate::model::PlanChange;
use crate::object::NamespacedName;
use crate::plan::ServicePlan;
use crate::question::Describe;
use rules::{ANCHORS, ChainKey, Rules, Table, fixed, of_service};
use script::{Script, parse_save, repair};

/// Makes the counters that rules refer to; whether the kernel has such, and `iptables` the match.
pub fn ensure_counters() -> bool {
    let matches = Command::new("iptables").args(["-m", "nfacct", "--help"]).output();
    if !matches.is_ok_and(|out| out.status.success()) {
        return false;
    }
    let made = || -> Result<(), nft::Error> {
        let mut client = nft::Client::new()?;
        client.ensure_counter(rules::INVALID_COUNTER)?;
        client.ensure_counter(rules::LOCALHOST_COUNTER)
    };
    if let Err(error) = made() {
        tracing::info!(%error, "packets are not counted for metrics in iptables mode");
        return false;
    }
    true
}

/// What they have counted: packets dropped as invalid, connections to NodePorts at loopback.
pub fn counts() -> [Option<u64>; 2] {
    let read = || -> Result<[Option<u64>; 2], nft::Error> {
        let mut client = nft::Client::new()?;
        Ok([client.counted(rules::INVALID_COUNTER)?, client.counted(rules::LOCALHOST_COUNTER)?])
    };
    read().unwrap_or_default()
}

/// Services that are refused are looked for at most so often per repair.
const ATTEMPTS: usize = 8;

/// Why iptables could not be changed or read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A program could not be run.
    #[error("run {program}: {source}; install iptables, or use --proxy-mode nftables")]
    Run {
        /// Which.
        program: &'static str,
        /// The cause.
        source: std::io::Error,
    },
    /// A program refused what it was to do.
    #[error("{program}: {message}")]
    Refused {
        /// Which.
        program: &'static str,
        /// Line of its input, if it told.
        line: Option<usize>,
        /// Its words.
        message: String,
    },
    /// A jump to an own chain could not be set or removed.
    #[error("rule {rule:?} of chain {chain}: {message}")]
    Anchor {
        /// Chain.
        chain: &'static str,
        /// Rule.
        rule: &'static str,
        /// The cause.
        message: String,
    },
}

/// One family.
#[derive(Debug)]
struct Family {
    ipv4: bool,
    services: HashMap<NamespacedName, Arc<ServicePlan>>,
}

/// The backend.
#[derive(Debug)]
pub struct Iptables {
    environment: Environment,
    families: Vec<Family>,
    programmed: bool,
    kind: Kind,
}

/// Whether somebody's change to the nf_tables that stand for iptables' concerns own chains, or took
/// away what leads to them.
fn concerns(change: &nft::ForeignChange) -> bool {
    if !Table::ALL.iter().any(|table| table.name() == change.table) {
        return false;
    }
    match &change.chain {
        Some(chain) if rules::is_own(chain) => true,
        _ => change.deleted,
    }
}

fn run(program: &'static str, args: &[&str], input: Option<&str>) -> Result<String, Error> {
    let failed = |source| Error::Run { program, source };
    let mut child = Command::new(program)
        .args(args)
        .stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    if let (Some(input), Some(mut stdin)) = (input, child.stdin.take()) {
        // A program that ends early has said why on its standard error.
        let _ = stdin.write_all(input.as_bytes());
    }
    let out = child.wait_with_output().map_err(failed)?;
    if out.status.success() {
        return Ok(String::from_utf8_lossy(&out.stdout).into_owned());
    }
    let message = String::from_utf8_lossy(&out.stderr).trim().to_owned();
    let line = message.match_indices("line ").find_map(|(at, word)| {
        let rest = &message[at + word.len()..];
        let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
        digits.parse().ok()
    });
    Err(Error::Refused { program, line, message })
}

impl Family {
    fn restore(&self, script: &Script) -> Result<(), (Error, Option<u32>)> {
        if script.is_empty() {
            return Ok(());
        }
        let program = if self.ipv4 { "iptables-restore" } else { "ip6tables-restore" };
        let (text, owners) = script.render();
        match run(program, &["-w", "10", "--noflush"], Some(&text)) {
            Ok(_) => Ok(()),
            Err(error) => {
                let owner = match &error {
                    Error::Refused { line: Some(line), .. } => owners.get(*line).copied(),
                    _ => None,
                };
                Err((error, owner.filter(|owner| *owner != script::NOBODY)))
            }
        }
    }

    fn save(&self) -> Result<BTreeMap<ChainKey, Vec<String>>, Error> {
        let program = if self.ipv4 { "iptables-save" } else { "ip6tables-save" };
        let mut chains = BTreeMap::new();
        for table in Table::ALL {
            let text = run(program, &["-t", table.name()], None)?;
            chains.extend(parse_save(table, &text));
        }
        Ok(chains)
    }

    /// Sets the jumps to own chains that are not there.
    fn anchors(&self) -> Result<(), Error> {
        for (table, chain, rule) in ANCHORS {
            let failed = |error: Box<dyn std::error::Error>| Error::Anchor {
                chain,
                rule,
                message: error.to_string(),
            };
            let tables = iptables::new(!self.ipv4).map_err(failed)?;
            if !tables.exists(table.name(), chain, rule).unwrap_or(false) {
                tables.insert(table.name(), chain, rule, 1).map_err(failed)?;
            }
        }
        Ok(())
    }

    fn rules(
        &self,
        service: &NamespacedName,
        plan: Option<&Arc<ServicePlan>>,
        environment: &Environment,
    ) -> Rules {
        plan.map(|plan| of_service(service, plan, environment, self.ipv4)).unwrap_or_default()
    }

    /// Compares everything with what is there; Services that are refused are left out.
    fn repair(&mut self, environment: &Environment, outcome: &mut Outcome) -> Result<(), Error> {
        for attempt in 0..ATTEMPTS {
            let found = self.save()?;
            let names: Vec<NamespacedName> = self.services.keys().cloned().collect();
            let all: Vec<Rules> = names
                .iter()
                .map(|name| self.rules(name, self.services.get(name), environment))
                .collect();
            let script = repair(&found, &fixed(environment, self.ipv4), &all);
            match self.restore(&script) {
                Ok(()) => {
                    outcome.written += script.lines();
                    return self.anchors();
                }
                Err((error, Some(owner))) if attempt + 1 < ATTEMPTS => {
                    if let Some(name) = names.get(owner as usize) {
                        self.services.remove(name);
                        outcome.refused.push((name.clone(), error.to_string()));
                    }
                }
                Err((error, None)) if attempt == 0 && names.len() > 1 => {
                    // Nobody was named: the fixed part alone, then the Services one by one halves.
                    self.alone(environment, outcome).map_err(|_| error)?;
                    return self.anchors();
                }
                Err((error, _)) => return Err(error),
            }
        }
        Ok(())
    }

    /// Programs the fixed part, then Services in halves until the refused ones are alone.
    fn alone(&mut self, environment: &Environment, outcome: &mut Outcome) -> Result<(), Error> {
        let found = self.save()?;
        let script = repair(&found, &fixed(environment, self.ipv4), &[]);
        self.restore(&script).map_err(|(error, _)| error)?;
        let wanted: Vec<_> = std::mem::take(&mut self.services).into_iter().collect();
        self.add_split(&wanted, environment, outcome);
        Ok(())
    }

    fn add_split(
        &mut self,
        wanted: &[(NamespacedName, Arc<ServicePlan>)],
        environment: &Environment,
        outcome: &mut Outcome,
    ) {
        let mut script = Script::default();
        for (index, (name, plan)) in wanted.iter().enumerate() {
            let new = self.rules(name, Some(plan), environment);
            script.change(&Rules::default(), &new, index as u32);
        }
        match (self.restore(&script), wanted) {
            (Ok(()), _) => self.services.extend(wanted.iter().cloned()),
            (Err((error, _)), [(name, _)]) => {
                outcome.refused.push((name.clone(), error.to_string()));
            }
            (Err(_), _) => {
                let (one, other) = wanted.split_at(wanted.len() / 2);
                self.add_split(one, environment, outcome);
                self.add_split(other, environment, outcome);
            }
        }
    }
}

/// The kind of iptables that the system's `iptables` is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Legacy,
    Nft,
}

impl Kind {
    fn of_system() -> Result<Kind, Error> {
        let version = run("iptables", &["--version"], None)?;
        Ok(if version.contains("nf_tables") { Kind::Nft } else { Kind::Legacy })
    }

    /// The programs of this kind, whatever the system has chosen: save and restore by family.
    fn programs(self) -> [(&'static str, &'static str); 2] {
        match self {
            Kind::Legacy => [
                ("iptables-legacy-save", "iptables-legacy-restore"),
                ("ip6tables-legacy-save", "ip6tables-legacy-restore"),
            ],
            Kind::Nft => [
                ("iptables-nft-save", "iptables-nft-restore"),
                ("ip6tables-nft-save", "ip6tables-nft-restore"),
            ],
        }
    }
}

impl Iptables {
    /// Checks that the programs work.
    ///
    /// # Errors
    /// If they are not there, or the kernel has no iptables.
    pub fn new(environment: &Environment) -> Result<Self, Error> {
        run("iptables-save", &["-t", "nat"], None)?;
        let kind = Kind::of_system()?;
        let family = |ipv4| Family { ipv4, services: HashMap::new() };
        Ok(Iptables {
            environment: environment.clone(),
            families: vec![family(true), family(false)],
            programmed: false,
            kind,
        })
    }

    /// Removes all own chains and the jumps to them, of both kinds of iptables; `spare` leaves those
    /// of the kind that is in use.
    ///
    /// # Errors
    /// What could not be removed; without the programs there is nothing to remove.
    pub fn cleanup(spare: bool) -> Result<(), Error> {
        const SYSTEM: [(&str, &str); 2] =
            [("iptables-save", "iptables-restore"), ("ip6tables-save", "ip6tables-restore")];
        let mut programs: Vec<(&str, &str)> = Vec::new();
        for kind in [Kind::Legacy, Kind::Nft] {
            if !spare || Kind::of_system().is_ok_and(|used| used != kind) {
                programs.extend(kind.programs());
            }
        }
        if !spare {
            programs.extend(SYSTEM);
        }
        let mut result = Ok(());
        for (save, restore) in programs {
            // All tables: naming one would make it.
            let cleaned = run(save, &[], None).and_then(|saved| match script::cleanup(&saved) {
                script if script.is_empty() => Ok(()),
                script => run(restore, &["-w", "10", "--noflush"], Some(&script)).map(drop),
            });
            match cleaned {
                Ok(()) | Err(Error::Run { .. }) => {}
                Err(error) => result = result.and(Err(error)),
            }
        }
        result
    }
}

impl Backend for Iptables {
    fn mode(&self) -> Mode {
        Mode::Iptables
    }

    fn monitored(&self) -> Option<(Option<&nft::Client>, Concerns)> {
        (self.kind == Kind::Nft).then_some((None, concerns))
    }

    fn take_over(&mut self) -> Result<bool, BackendError> {
        let mut any = false;
        for family in &self.families {
            match family.save() {
                Ok(found) => any |= !found.is_empty(),
                Err(error) if family.ipv4 => return Err(error.into()),
                Err(_) => {}
            }
        }
        Ok(any)
    }

    fn configure(&mut self, environment: &Environment) -> Result<Outcome, BackendError> {
        // The environment is part of Services' rules too.
        let repair = self.environment != *environment;
        self.environment = environment.clone();
        Ok(Outcome { repair, ..Outcome::default() })
    }

    fn change(&mut self, changes: &[PlanChange]) -> Result<Outcome, BackendError> {
        let mut outcome = Outcome { repair: !self.programmed, ..Outcome::default() };
        if outcome.repair {
            return Ok(outcome);
        }
        for family in &mut self.families {
            let mut script = Script::default();
            for (index, change) in changes.iter().enumerate() {
                let name = &change.service;
                let old = family.rules(name, family.services.get(name), &self.environment);
                let new = family.rules(name, change.new.as_ref(), &self.environment);
                script.change(&old, &new, index as u32);
            }
            if family.restore(&script).is_err() {
                outcome.repair = true;
                continue;
            }
            outcome.written += script.lines();
            for change in changes {
                match &change.new {
                    Some(plan) => {
                        family.services.insert(change.service.clone(), plan.clone());
                    }
                    None => {
                        family.services.remove(&change.service);
                    }
                }
            }
        }
        Ok(outcome)
    }

    fn describe(&mut self, what: &Describe) -> Result<String, BackendError> {
        let mut text = String::new();
        for family in &self.families {
            let environment = &self.environment;
            let script = match what {
                Describe::Changes(changes) => {
                    let mut script = Script::default();
                    for change in changes {
                        let name = &change.service;
                        let old = family.rules(name, family.services.get(name), environment);
                        let new = family.rules(name, change.new.as_ref(), environment);
                        script.change(&old, &new, script::NOBODY);
                    }
                    script
                }
                Describe::Desired | Describe::Difference => {
                    let found = match what {
                        Describe::Difference => family.save()?,
                        _ => BTreeMap::new(),
                    };
                    let services = &family.services;
                    let all: Vec<Rules> = services
                        .iter()
                        .map(|(n, p)| family.rules(n, Some(p), environment))
                        .collect();
                    repair(&found, &fixed(environment, family.ipv4), &all)
                }
            };
            if !script.is_empty() {
                text.push_str(if family.ipv4 { "# IPv4\n" } else { "# IPv6\n" });
                text.push_str(&script.render().0);
            }
        }
        Ok(text)
    }

    fn repair(
        &mut self,
        plans: &[(NamespacedName, Arc<ServicePlan>)],
    ) -> Result<Outcome, BackendError> {
        let mut outcome = Outcome::default();
        for family in &mut self.families {
            family.services = plans.iter().cloned().collect();
            match family.repair(&self.environment, &mut outcome) {
                Ok(()) => {}
                Err(error) if family.ipv4 => return Err(error.into()),
                Err(error) => outcome.errors.push(format!("IPv6: {error}")),
            }
        }
        self.programmed = true;
        Ok(outcome)
    }
}
