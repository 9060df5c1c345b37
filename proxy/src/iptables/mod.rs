//! The iptables backend, for kernels without nf_tables: own chains in the tables `nat` and
//! `filter`, written by one restore of what changed; the `iptables` crate sets the jumps to them.

mod rules;
mod script;

use std::collections::{BTreeMap, HashMap};
use std::io::Write;
use std::process::{Command, Stdio};
use std::sync::Arc;

use crate::backend::{Backend, BackendError, Environment, Outcome};
use crate::config::Mode;
use crate::model::PlanChange;
use crate::object::NamespacedName;
use crate::plan::ServicePlan;
use rules::{ANCHORS, ChainKey, Rules, SHARED, Table, fixed, of_service};
use script::{Script, parse_save, repair};

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

    fn anchors(&self, there: bool) -> Result<(), Error> {
        for (table, chain, rule) in ANCHORS {
            let failed = |error: Box<dyn std::error::Error>| Error::Anchor {
                chain,
                rule,
                message: error.to_string(),
            };
            let tables = iptables::new(!self.ipv4).map_err(failed)?;
            let exists = tables.exists(table.name(), chain, rule);
            match (there, exists) {
                (true, Ok(true)) | (false, Ok(false) | Err(_)) => {}
                // A chain that is not there yet cannot be jumped to: it is made before.
                (true, _) => tables.insert(table.name(), chain, rule, 1).map_err(failed)?,
                (false, Ok(true)) => {
                    tables.delete(table.name(), chain, rule).map_err(failed)?;
                }
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
                    return self.anchors(true);
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
                    return self.anchors(true);
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

    fn cleanup(&self) -> Result<(), Error> {
        let found = self.save()?;
        self.anchors(false)?;
        let mut script = Script::default();
        found.keys().for_each(|key| script.delete_chain(key));
        self.restore(&script).map_err(|(error, _)| error)
    }
}

impl Iptables {
    /// Checks that the programs work.
    ///
    /// # Errors
    /// If they are not there, or the kernel has no iptables.
    pub fn new(environment: &Environment) -> Result<Self, Error> {
        run("iptables-save", &["-t", "nat"], None)?;
        let family = |ipv4| Family { ipv4, services: HashMap::new() };
        Ok(Iptables {
            environment: environment.clone(),
            families: vec![family(true), family(false)],
            programmed: false,
        })
    }

    /// Removes all own chains and the jumps to them.
    ///
    /// # Errors
    /// Lists what could not be removed; without the programs there is nothing to remove.
    pub fn cleanup() -> Result<(), Error> {
        let mut result = Ok(());
        for ipv4 in [true, false] {
            let family = Family { ipv4, services: HashMap::new() };
            match family.save() {
                // Nothing of ours, and no tables made by looking for anchors.
                Ok(found) if found.is_empty() => {}
                Ok(_) => result = result.and(family.cleanup()),
                Err(Error::Run { .. }) => {}
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

    fn monitored(&self) -> Option<(&nft::Client, &'static str)> {
        None
    }

    fn take_over(&mut self) -> Result<bool, BackendError> {
        let mut any = false;
        for family in &self.families {
            match family.save() {
                Ok(found) => {
                    any |= found
                        .keys()
                        .any(|(table, chain)| SHARED.iter().any(|(t, c)| t == table && c == chain));
                }
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
