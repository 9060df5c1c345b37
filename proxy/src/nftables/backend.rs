//! The nftables backend at work: rulesets to batches, and what the kernel says to them.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use nft::{Client, Error, Family, Table, TableState, Transaction};

use super::base::Structure;
use super::names::{MapId, TABLE};
use super::ruleset::{BATCH, Observed, Planned, Ruleset};
use crate::backend::{Backend, BackendError, Concerns, Environment, Outcome};
use crate::config::Mode;
use crate::model::PlanChange;
use crate::object::NamespacedName;
use crate::plan::ServicePlan;
use crate::question::Describe;

/// Services that the kernel refuses are looked for at most so often per repair.
const ATTEMPTS: usize = 8;
/// Services that are tried together when they are programmed one after the other.
const CHUNK: usize = 256;
/// Batches that are planned while one is in the kernel.
const AHEAD: usize = 2;

/// The backend.
#[derive(Debug)]
pub struct Nftables {
    client: Client,
    families: Vec<Ruleset>,
    /// Whether the tables are known to be as `families` says.
    programmed: bool,
    /// Generation of the rulesets and own commits when the last repair began.
    repaired_at: Option<(u32, u32)>,
}

impl Nftables {
    /// Connects to nf_tables in the network namespace of the calling thread.
    ///
    /// # Errors
    /// If the kernel has no nf_tables.
    pub fn new(environment: &Environment) -> Result<Self, Error> {
        let mut client = Client::new()?;
        client.tables()?;
        let ruleset = |family| Ruleset::new(Structure { family, environment: environment.clone() });
        let families = vec![ruleset(Family::Ip), ruleset(Family::Ip6)];
        Ok(Nftables { client, families, programmed: false, repaired_at: None })
    }

    /// Whether the kernel has what the rules need: a table is made and deleted in one batch that
    /// asks for random numbers as part of a key.
    pub fn probe() -> Result<(), Error> {
        let mut client = Client::new()?;
        let table = Table::new(Family::Ip, format!("{TABLE}-probe"));
        let mut tx = Transaction::new(table);
        tx.add_table().add_chain("probe", None);
        let pool = super::names::Pool::ALL[0];
        tx.add_set(MapId::Endpoints(pool).set(Family::Ip));
        let pick = super::names::Behaviour::Pick {
            pool,
            choice: super::names::Choice::Random { count: 2 },
            masquerade: super::names::Masquerade::Never,
        };
        for rule in super::chains::rules(pick, Family::Ip, 0x4000) {
            tx.add_rule("probe", rule);
        }
        tx.push(nft::Op::DeleteTable);
        client.apply(&tx)
    }

    /// Deletes the tables of these names in both families.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn cleanup(names: &[&str]) -> Result<(), Error> {
        let mut client = Client::new()?;
        let there = client.tables()?;
        let ours = |table: &&Table| {
            [Family::Ip, Family::Ip6].contains(&table.family) && names.contains(&&*table.name)
        };
        for table in there.iter().filter(ours) {
            let mut tx = Transaction::new(table.clone());
            tx.ensure_no_table();
            client.apply(&tx)?;
        }
        Ok(())
    }

    /// The elements of all maps that are there, those of the version before too.
    fn observe(client: &mut Client, table: &Table, state: &TableState) -> Result<Observed, Error> {
        let there = |map: &MapId| state.sets.contains_key(&map.to_string());
        Self::read(client, table, MapId::all().into_iter().chain(MapId::before()).filter(there))
    }

    fn read(
        client: &mut Client,
        table: &Table,
        maps: impl IntoIterator<Item = MapId>,
    ) -> Result<Observed, Error> {
        let mut observed = Observed::new();
        for map in maps {
            let elements = client.elements(table, &map.to_string())?;
            let by_key: HashMap<_, _> =
                elements.into_iter().map(|e| (e.key, (e.key_end, e.data))).collect();
            observed.insert(map, by_key);
        }
        Ok(observed)
    }
}

/// Services whose elements were refused; empty if that cannot be told.
fn offenders(planned: &Planned, error: &Error) -> BTreeMap<NamespacedName, String> {
    let Error::Refused { failures, .. } = error else { return BTreeMap::new() };
    failures
        .iter()
        .filter_map(|failure| {
            let owner = planned.owner(failure.op?, failure.element)?;
            Some((owner.clone(), failure.to_string()))
        })
        .collect()
}

type Change<'a> = (&'a NamespacedName, Option<&'a Arc<ServicePlan>>);

/// Programs changes; those that are refused are left out, by name or by halving.
fn change_split(
    client: &mut Client,
    ruleset: &mut Ruleset,
    changes: &[Change<'_>],
    outcome: &mut Outcome,
) -> Result<(), Error> {
    if changes.is_empty() {
        return Ok(());
    }
    let planned = ruleset.plan_changes(changes.iter().copied());
    match client.apply(&planned.transaction) {
        Ok(()) => {
            outcome.written += planned.elements();
            ruleset.commit(planned);
            Ok(())
        }
        Err(error @ Error::Refused { .. }) => {
            if let [(name, _)] = changes {
                outcome.refused.push(((*name).clone(), error.to_string()));
                return Ok(());
            }
            let bad = offenders(&planned, &error);
            if bad.is_empty() {
                let (one, other) = changes.split_at(changes.len() / 2);
                change_split(client, ruleset, one, outcome)?;
                return change_split(client, ruleset, other, outcome);
            }
            let good: Vec<Change<'_>> =
                changes.iter().filter(|(name, _)| !bad.contains_key(name)).copied().collect();
            outcome.refused.extend(bad);
            change_split(client, ruleset, &good, outcome)
        }
        Err(error) => Err(error),
    }
}

fn repair_family(
    client: &mut Client,
    ruleset: &mut Ruleset,
    plans: &[(NamespacedName, Arc<ServicePlan>)],
    outcome: &mut Outcome,
) -> Result<(), Error> {
    let table = ruleset.table();
    let mut refused: BTreeSet<NamespacedName> = BTreeSet::new();
    let mut scratch = false;
    for attempt in 0..ATTEMPTS {
        let state = client.read_table(&table)?;
        let observed = match &state {
            Some(state) => Nftables::observe(client, &table, state)?,
            None => Observed::new(),
        };
        let last = attempt + 1 == ATTEMPTS;
        if last {
            plans.iter().for_each(|(name, _)| ruleset.forget(name));
        }
        let result = if state.is_none() {
            make(client, ruleset, outcome)
        } else {
            let planned = ruleset.plan_repair(state.as_ref(), &observed, scratch);
            drop(observed);
            apply_all(client, ruleset, planned, outcome)
        };
        match result {
            Ok(()) => {
                if let Some(state) = state {
                    // Old kernels learn late that a chain is not referred to any more; then it
                    // is swept the next time.
                    let family = usize::from(table.family != Family::Ip);
                    for tx in ruleset.plan_sweep(&state) {
                        if let Err(error) = client.apply(&tx) {
                            tracing::debug!(%table, %error, "an unused chain stays for now");
                            outcome.cleanup_failures[family] += 1;
                        }
                    }
                }
                if last {
                    let changes: Vec<Change<'_>> = plans
                        .iter()
                        .filter(|(name, _)| !refused.contains(name))
                        .map(|(name, plan)| (name, Some(plan)))
                        .collect();
                    for some in changes.chunks(CHUNK) {
                        change_split(client, ruleset, some, outcome)?;
                    }
                }
                return Ok(());
            }
            Err((error @ Error::Refused { .. }, planned)) if !last => {
                let bad = offenders(&planned, &error);
                if bad.is_empty() {
                    // What is there cannot be changed into what should be: another version made it.
                    tracing::warn!(%table, %error, "making the table anew");
                    scratch = true;
                }
                for (name, why) in bad {
                    ruleset.forget(&name);
                    if refused.insert(name.clone()) {
                        outcome.refused.push((name, why));
                    }
                }
            }
            Err((error, _)) => return Err(error),
        }
    }
    Ok(())
}

/// Makes a table that is not there: one batch is in the kernel while the next one is planned. Tells
/// the one that did not work.
fn make(
    client: &mut Client,
    ruleset: &mut Ruleset,
    outcome: &mut Outcome,
) -> Result<(), (Error, Box<Planned>)> {
    ruleset.begin_anew();
    let mut taken = Vec::new();
    let result = std::thread::scope(|scope| {
        let (tell, told) = std::sync::mpsc::sync_channel(AHEAD);
        let ruleset = &*ruleset;
        // Planning ends when nobody listens any more.
        scope.spawn(move || ruleset.plan_anew(false, |planned| tell.send(planned).is_ok()));
        for planned in told {
            if let Err(error) = client.apply(&planned.transaction) {
                return Err((error, Box::new(planned)));
            }
            outcome.written += planned.elements();
            taken.push(planned.without_elements());
        }
        Ok(())
    });
    taken.into_iter().for_each(|planned| ruleset.commit_repair(planned));
    result
}

/// Applies the batches of a repair; tells the one that did not work.
fn apply_all(
    client: &mut Client,
    ruleset: &mut Ruleset,
    batches: Vec<Planned>,
    outcome: &mut Outcome,
) -> Result<(), (Error, Box<Planned>)> {
    for planned in batches {
        match client.apply(&planned.transaction) {
            Ok(()) => {
                outcome.written += planned.elements();
                ruleset.commit_repair(planned);
            }
            Err(error) => return Err((error, Box::new(planned))),
        }
    }
    Ok(())
}

/// Cuts changes into batches of Services: those that go first, as another may get what they had.
fn cut(changes: &[PlanChange]) -> Vec<Vec<Change<'_>>> {
    let (gone, there): (Vec<&PlanChange>, Vec<&PlanChange>) =
        changes.iter().partition(|change| change.new.is_none());
    let mut all: Vec<Vec<Change<'_>>> = Vec::new();
    let mut weight = BATCH;
    for change in gone.into_iter().chain(there) {
        if weight >= BATCH {
            all.push(Vec::new());
            weight = 0;
        }
        let (old, new) = (change.old.as_ref(), change.new.as_ref());
        weight += Ruleset::weight(old).max(Ruleset::weight(new));
        if let Some(batch) = all.last_mut() {
            batch.push((&change.service, new));
        }
    }
    all
}

impl Backend for Nftables {
    fn mode(&self) -> Mode {
        Mode::Nftables
    }

    fn monitored(&self) -> Option<(Option<&Client>, Concerns)> {
        Some((Some(&self.client), |change| change.table == TABLE))
    }

    fn undisturbed(&mut self) -> bool {
        let Some((generation, commits)) = self.repaired_at else { return true };
        let own = self.client.commits().wrapping_sub(commits);
        self.client.generation().is_ok_and(|now| now == generation.wrapping_add(own))
    }

    fn take_over(&mut self) -> Result<bool, BackendError> {
        let there = self.client.tables()?;
        let mut any = false;
        for ruleset in &mut self.families {
            let table = ruleset.table();
            if there.contains(&table) {
                any = true;
                let observed = Self::read(&mut self.client, &table, MapId::with_slots())?;
                ruleset.take_hints(&observed);
            }
        }
        Ok(any)
    }

    fn configure(&mut self, environment: &Environment) -> Result<Outcome, BackendError> {
        let mut outcome = Outcome::default();
        for ruleset in &mut self.families {
            if *environment == ruleset.structure.environment {
                continue;
            }
            let family = ruleset.structure.family;
            let new = Structure { family, environment: environment.clone() };
            if !self.programmed {
                ruleset.structure = new;
                continue;
            }
            let tx = ruleset.plan_structure(new);
            if let Err(error) = self.client.apply(&tx) {
                outcome.errors.push(error.to_string());
                outcome.repair = true;
            }
        }
        Ok(outcome)
    }

    fn change(&mut self, changes: &[PlanChange]) -> Result<Outcome, BackendError> {
        let mut outcome = Outcome::default();
        if !self.programmed {
            outcome.repair = true;
            return Ok(outcome);
        }
        let batches = cut(changes);
        for ruleset in &mut self.families {
            for batch in &batches {
                let planned = ruleset.plan_changes(batch.iter().copied());
                match self.client.apply(&planned.transaction) {
                    Ok(()) => {
                        outcome.written += planned.elements();
                        ruleset.commit(planned);
                    }
                    Err(Error::Refused { .. }) => outcome.repair = true,
                    Err(error) => return Err(error.into()),
                }
            }
        }
        outcome.batches = self.client.take_batch_times();
        Ok(outcome)
    }

    fn describe(&mut self, what: &Describe) -> Result<String, BackendError> {
        let mut text = String::new();
        for ruleset in &mut self.families {
            let planned = match what {
                Describe::Desired => ruleset.plan_only(None, &Observed::new()),
                Describe::Difference => {
                    let table = ruleset.table();
                    let state = self.client.read_table(&table)?;
                    let observed = match &state {
                        Some(state) => Self::observe(&mut self.client, &table, state)?,
                        None => Observed::new(),
                    };
                    ruleset.plan_only(state.as_ref(), &observed)
                }
                Describe::Changes(changes) => {
                    let changes = changes.iter().map(|c| (&c.service, c.new.as_ref()));
                    vec![ruleset.plan_changes(changes)]
                }
            };
            let sets = ruleset.sets();
            for planned in planned {
                text.push_str(&nft::commands(&planned.transaction, &sets));
            }
        }
        Ok(text)
    }

    fn repair(
        &mut self,
        plans: &[(NamespacedName, Arc<ServicePlan>)],
    ) -> Result<Outcome, BackendError> {
        let mut outcome = Outcome::default();
        let mut worked = false;
        let mut last = None;
        self.repaired_at = self.client.generation().ok().map(|g| (g, self.client.commits()));
        for ruleset in &mut self.families {
            let known: HashSet<&NamespacedName> = plans.iter().map(|(name, _)| name).collect();
            ruleset.retain(&known);
            for (name, plan) in plans {
                ruleset.adopt(name, Some(plan));
            }
            match repair_family(&mut self.client, ruleset, plans, &mut outcome) {
                Ok(()) => worked = true,
                Err(error) => {
                    outcome
                        .errors
                        .push(format!("family {}: {error}", ruleset.structure.family.name()));
                    last = Some(error);
                }
            }
            ruleset.drop_hints();
        }
        self.programmed = worked;
        outcome.batches = self.client.take_batch_times();
        match last {
            Some(error) if !worked => Err(error.into()),
            _ => Ok(outcome),
        }
    }
}
