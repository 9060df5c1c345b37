//! A kernel that is none: it refuses what nf_tables would refuse, applies atomically, and dumps
//! sorted text.

use std::collections::BTreeMap;
use std::fmt::Write;

use crate::dump::{RuleEntry, SetEntry, TableState};
use crate::expr::Expr;
use crate::object::{
    BaseChain, ChainType, Data, DataType, Element, Hook, Key, Rule, Set, SetData, Table, Verdict,
};
use crate::text;
use crate::transaction::{Op, Transaction};

/// Why the fake refused a transaction; nothing of it was applied.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{object} of table {table}: {reason}")]
pub struct FakeError {
    /// Index of the change.
    pub op: usize,
    /// Index of the element, for element changes.
    pub element: Option<usize>,
    /// The table.
    pub table: String,
    /// The object.
    pub object: String,
    /// What is wrong.
    pub reason: String,
}

/// Chains by name: hook, and rules by handle in order.
type Chains = BTreeMap<String, (Option<BaseChain>, Vec<(u64, Rule)>)>;

#[derive(Clone, Debug, Default)]
struct TableContent {
    chains: Chains,
    sets: BTreeMap<String, (Set, BTreeMap<Key, Element>)>,
}

/// The fake kernel.
#[derive(Clone, Debug, Default)]
pub struct Fake {
    tables: BTreeMap<Table, TableContent>,
    handle: u64,
    /// Number of transactions applied.
    pub transactions: usize,
    /// Number of elements added and deleted by the last transaction.
    pub last_elements: usize,
}

impl Fake {
    /// An empty kernel.
    pub fn new() -> Self {
        Fake::default()
    }

    /// Applies a transaction whole, or not at all.
    ///
    /// # Errors
    /// Names the first change that would be refused.
    pub fn apply(&mut self, transaction: &Transaction) -> Result<(), FakeError> {
        let old = self.tables.get(&transaction.table).cloned();
        let mut content = old;
        let mut handle = self.handle;
        let mut elements = 0;
        for (index, op) in transaction.ops.iter().enumerate() {
            if let Op::AddElements { elements: e, .. } | Op::DeleteElements { elements: e, .. } = op
            {
                elements += e.len();
            }
            step(&mut content, &mut handle, op).map_err(|(element, reason)| FakeError {
                op: index,
                element,
                table: transaction.table.to_string(),
                object: op.object(),
                reason,
            })?;
        }
        if let Some(content) = &content {
            validate(content).map_err(|(chain, reason)| FakeError {
                op: transaction.ops.len().saturating_sub(1),
                element: None,
                table: transaction.table.to_string(),
                object: format!("chain {chain}"),
                reason,
            })?;
        }
        match content {
            Some(content) => self.tables.insert(transaction.table.clone(), content),
            None => self.tables.remove(&transaction.table),
        };
        self.handle = handle;
        self.transactions += 1;
        self.last_elements = elements;
        Ok(())
    }

    /// Elements of a set.
    pub fn elements(&self, table: &Table, set: &str) -> Vec<Element> {
        let sets = self.tables.get(table).map(|content| &content.sets);
        sets.and_then(|sets| sets.get(set))
            .map(|(_, elements)| elements.values().cloned().collect())
            .unwrap_or_default()
    }

    /// Chains, rules and sets of a table, as [`crate::Client::read_table`] tells them.
    pub fn read_table(&self, table: &Table) -> Option<TableState> {
        let content = self.tables.get(table)?;
        let entry = |(handle, rule): &(u64, Rule)| RuleEntry {
            handle: *handle,
            comment: rule.comment.clone(),
        };
        let chains = content.chains.iter().map(|(name, (base, rules))| {
            (name.clone(), (*base, rules.iter().map(entry).collect()))
        });
        let sets =
            content.sets.iter().map(|(name, (set, _))| (name.clone(), SetEntry::of(set))).collect();
        Some(TableState { chains: chains.collect(), sets })
    }

    /// Everything as sorted text.
    pub fn dump(&self) -> String {
        let mut out = String::new();
        for (table, content) in &self.tables {
            let _ = writeln!(out, "table {table}");
            for (name, (base, rules)) in &content.chains {
                let _ = write!(out, "  chain {name}");
                if let Some(base) = base {
                    let _ = write!(
                        out,
                        " type {} hook {} priority {}",
                        base.chain_type.name(),
                        base.hook.name(),
                        base.priority
                    );
                }
                out.push('\n');
                for (_, rule) in rules {
                    let exprs: Vec<String> = rule.exprs.iter().map(text::expr).collect();
                    let _ = writeln!(out, "    {}", exprs.join(" "));
                }
            }
            for (set, elements) in content.sets.values() {
                let _ = writeln!(out, "  {}", text::set(set));
                for element in elements.values() {
                    let _ = writeln!(out, "    {}", text::element(set, element));
                }
            }
        }
        out
    }
}

type Refusal = (Option<usize>, String);

fn step(content: &mut Option<TableContent>, handle: &mut u64, op: &Op) -> Result<(), Refusal> {
    let missing = |what: String| -> Refusal { (None, format!("{what} does not exist")) };
    if let Op::AddTable(_) = op {
        content.get_or_insert_default();
        return Ok(());
    }
    if let Op::DeleteTable = op {
        return content.take().map(|_| ()).ok_or_else(|| missing("the table".into()));
    }
    let table = content.as_mut().ok_or_else(|| missing("the table".into()))?;
    match op {
        Op::AddTable(_) | Op::DeleteTable => {}
        Op::AddChain(chain) => {
            check_name(&chain.name)?;
            match table.chains.get(&chain.name) {
                Some((base, _)) if chain.base.is_some() && *base != chain.base => {
                    return Err((None, "it exists with another hook".into()));
                }
                Some(_) => {}
                None => {
                    table.chains.insert(chain.name.clone(), (chain.base, Vec::new()));
                }
            }
        }
        Op::FlushChain(name) => {
            let chain = table.chains.get_mut(name);
            chain.ok_or_else(|| missing(format!("chain {name}")))?.1.clear();
        }
        Op::DeleteChain(name) => {
            if !table.chains.contains_key(name) {
                return Err(missing(format!("chain {name}")));
            }
            if refers_to_chain(table, name) {
                return Err((None, "it is in use".into()));
            }
            table.chains.remove(name);
        }
        Op::AddRule(rule) => {
            check_rule(table, rule)?;
            *handle += 1;
            let chain = table.chains.get_mut(&rule.chain);
            chain
                .ok_or_else(|| missing(format!("chain {}", rule.chain)))?
                .1
                .push((*handle, rule.clone()));
        }
        Op::DeleteRule { chain, handle } => {
            let rules = &mut table
                .chains
                .get_mut(chain)
                .ok_or_else(|| missing(format!("chain {chain}")))?
                .1;
            let before = rules.len();
            rules.retain(|(h, _)| h != handle);
            if rules.len() == before {
                return Err(missing(format!("rule {handle}")));
            }
        }
        Op::AddSet(set) => {
            check_name(&set.name)?;
            match table.sets.get(&set.name) {
                Some((old, _)) if old != set => {
                    return Err((None, "it exists with another type".into()));
                }
                Some(_) => {}
                None => {
                    table.sets.insert(set.name.clone(), (set.clone(), BTreeMap::new()));
                }
            }
        }
        Op::FlushSet(name) => {
            let set = table.sets.get_mut(name);
            set.ok_or_else(|| missing(format!("set {name}")))?.1.clear();
        }
        Op::DeleteSet(name) => {
            if !table.sets.contains_key(name) {
                return Err(missing(format!("set {name}")));
            }
            let used = table
                .chains
                .values()
                .flat_map(|(_, rules)| rules)
                .any(|(_, rule)| rule.exprs.iter().any(|e| set_of(e) == Some(name.as_str())));
            if used {
                return Err((None, "it is in use".into()));
            }
            table.sets.remove(name);
        }
        Op::AddElements { set: name, elements } => {
            for (index, element) in elements.iter().enumerate() {
                let (set, there) =
                    table.sets.get(name).ok_or_else(|| missing(format!("set {name}")))?;
                check_element(set, element, &table.chains).map_err(|e| (Some(index), e))?;
                if there.get(&element.key).is_some_and(|old| old.data != element.data) {
                    let key = text::fields(&set.key, element.key.bytes());
                    return Err((Some(index), format!("{key} exists with other data")));
                }
                if let Some((_, there)) = table.sets.get_mut(name) {
                    there.insert(element.key.clone(), element.clone());
                }
            }
        }
        Op::DeleteElements { set: name, elements } => {
            let (set, there) =
                table.sets.get_mut(name).ok_or_else(|| missing(format!("set {name}")))?;
            for (index, element) in elements.iter().enumerate() {
                if there.remove(&element.key).is_none() {
                    let key = text::fields(&set.key, element.key.bytes());
                    return Err((Some(index), format!("{key} does not exist")));
                }
            }
        }
    }
    Ok(())
}

fn check_name(name: &str) -> Result<(), Refusal> {
    // NFT_NAME_MAXLEN is 256 with the zero.
    if name.is_empty() || name.len() > 255 {
        return Err((None, "its name is empty or longer than 255 bytes".into()));
    }
    Ok(())
}

fn set_of(expr: &Expr) -> Option<&str> {
    match expr {
        Expr::Lookup { set, .. }
        | Expr::LookupMap { set, .. }
        | Expr::LookupVerdict { set, .. }
        | Expr::Dynset { set, .. } => Some(set),
        _ => None,
    }
}

fn target_of(verdict: &Verdict) -> Option<&str> {
    match verdict {
        Verdict::Jump(chain) | Verdict::Goto(chain) => Some(chain),
        _ => None,
    }
}

fn refers_to_chain(table: &TableContent, name: &str) -> bool {
    let rules = table.chains.values().flat_map(|(_, rules)| rules).any(|(_, rule)| {
        rule.exprs.iter().any(|e| matches!(e, Expr::Verdict(v) if target_of(v) == Some(name)))
    });
    let elements = table.sets.values().flat_map(|(_, elements)| elements.values()).any(
        |element| matches!(&element.data, Some(Data::Verdict(v)) if target_of(v) == Some(name)),
    );
    rules || elements
}

fn check_rule(table: &TableContent, rule: &Rule) -> Result<(), Refusal> {
    let wrong = |reason: String| -> Result<(), Refusal> { Err((None, reason)) };
    let base = table.chains.get(&rule.chain).and_then(|(base, _)| *base);
    // Which 32-bit registers hold something: the kernel refuses to read others.
    let mut loaded = [false; 24];
    for expr in &rule.exprs {
        if let Some(set) = set_of(expr) {
            let Some((set, _)) = table.sets.get(set) else {
                return wrong(format!("set {set} does not exist"));
            };
            let fits = match expr {
                Expr::LookupVerdict { .. } => set.data == Some(SetData::Verdict),
                Expr::LookupMap { .. } => matches!(set.data, Some(SetData::Value(_))),
                Expr::Lookup { .. } => set.data.is_none(),
                Expr::Dynset { data, .. } => {
                    set.dynamic && data.is_none_or(|_| matches!(set.data, Some(SetData::Value(_))))
                }
                _ => true,
            };
            if !fits {
                return wrong(format!("set {} is of another kind", set.name));
            }
            if let Expr::Lookup { sreg, .. }
            | Expr::LookupMap { sreg, .. }
            | Expr::LookupVerdict { sreg, .. }
            | Expr::Dynset { key: sreg, .. } = expr
            {
                let len = DataType::concat_len(&set.key).div_ceil(4);
                let first = *sreg as usize;
                if !(first..first + len).all(|r| loaded.get(r).copied().unwrap_or(false)) {
                    return wrong(format!(
                        "a key of set {} is read from an empty register",
                        set.name
                    ));
                }
            }
            if let (Expr::LookupMap { dreg, .. }, Some(SetData::Value(types))) = (expr, &set.data) {
                let len = DataType::concat_len(types).div_ceil(4);
                load(&mut loaded, *dreg, len)?;
            }
        }
        match expr {
            Expr::Payload { dreg, len, .. } => load(&mut loaded, *dreg, len.div_ceil(4) as usize)?,
            Expr::Meta { dreg, .. }
            | Expr::Ct { dreg, .. }
            | Expr::NumgenRandom { dreg, .. }
            | Expr::Fib { dreg, .. } => load(&mut loaded, *dreg, 4)?,
            Expr::Bitwise { dreg, op, .. } => load(&mut loaded, *dreg, op.mask.len().div_ceil(4))?,
            Expr::Immediate { dreg, data } => load(&mut loaded, *dreg, data.len().div_ceil(4))?,
            Expr::Verdict(verdict) => {
                if let Some(target) = target_of(verdict)
                    && table.chains.get(target).is_none_or(|(base, _)| base.is_some())
                {
                    return wrong(format!("chain {target} cannot be jumped to"));
                }
            }
            other => {
                if let Some(reason) = base.and_then(|base| misplaced(other, base)) {
                    return wrong(reason.to_owned());
                }
            }
        }
    }
    Ok(())
}

/// Why an expression cannot be met by packets that a hook sends.
fn misplaced(expr: &Expr, base: BaseChain) -> Option<&'static str> {
    match expr {
        Expr::Masquerade { .. } if base.hook != Hook::Postrouting => {
            Some("masquerade works in postrouting only")
        }
        Expr::Nat { .. } if base.chain_type != ChainType::Nat => {
            Some("nat works in nat chains only")
        }
        Expr::Reject(_) if base.hook == Hook::Postrouting => {
            Some("reject works before routing only")
        }
        _ => None,
    }
}

/// Whether all that packets from any hook may meet is allowed there: rules, and the chains of every
/// element of a verdict map that a rule looks into. Tells the chain that is wrong, and why.
fn validate(table: &TableContent) -> Result<(), (String, String)> {
    let mut targets: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (name, (_, elements)) in &table.sets {
        let mut chains: Vec<&str> = elements
            .values()
            .filter_map(|element| match &element.data {
                Some(Data::Verdict(verdict)) => target_of(verdict),
                _ => None,
            })
            .collect();
        chains.sort_unstable();
        chains.dedup();
        targets.insert(name, chains);
    }
    for (start, base) in table.chains.iter().filter_map(|(name, (base, _))| Some((name, (*base)?)))
    {
        let mut met: Vec<&str> = vec![start];
        let mut next = 0;
        while let Some(name) = met.get(next).copied() {
            next += 1;
            let Some((_, rules)) = table.chains.get(name) else { continue };
            for expr in rules.iter().flat_map(|(_, rule)| &rule.exprs) {
                if let Some(reason) = misplaced(expr, base) {
                    return Err((name.to_owned(), format!("{reason}, and {start} leads here")));
                }
                let more: &[&str] = match expr {
                    Expr::Verdict(verdict) => &target_of(verdict).into_iter().collect::<Vec<_>>(),
                    Expr::LookupVerdict { set, .. } => {
                        targets.get(set.as_str()).map(Vec::as_slice).unwrap_or_default()
                    }
                    _ => &[],
                };
                let new: Vec<&str> =
                    more.iter().filter(|name| !met.contains(name)).copied().collect();
                met.extend(new);
            }
        }
    }
    Ok(())
}

fn load(loaded: &mut [bool; 24], first: u32, len: usize) -> Result<(), Refusal> {
    for register in first as usize..first as usize + len {
        match loaded.get_mut(register) {
            Some(slot) => *slot = true,
            None if len == 4 && register > first as usize => {}
            None => return Err((None, format!("register {register} does not exist"))),
        }
    }
    Ok(())
}

fn check_element(set: &Set, element: &Element, chains: &Chains) -> Result<(), String> {
    let key_len = DataType::concat_len(&set.key);
    if element.key.bytes().len() != key_len {
        return Err(format!("a key has {} bytes, not {key_len}", element.key.bytes().len()));
    }
    if element.key_end.is_some() && !set.interval {
        return Err("a range in a set without ranges".into());
    }
    if element.timeout.is_some() && !set.timeout {
        return Err("a timeout in a set without timeouts".into());
    }
    match (&set.data, &element.data) {
        (None, None) => Ok(()),
        (Some(SetData::Verdict), Some(Data::Verdict(verdict))) => match target_of(verdict) {
            Some(chain) if chains.get(chain).is_none_or(|(base, _)| base.is_some()) => {
                Err(format!("chain {chain} cannot be jumped to"))
            }
            _ => Ok(()),
        },
        (Some(SetData::Value(types)), Some(Data::Value(value))) => {
            let len = DataType::concat_len(types);
            if value.bytes().len() != len {
                return Err(format!("a value has {} bytes, not {len}", value.bytes().len()));
            }
            Ok(())
        }
        _ => Err("the data is not of the set's kind".into()),
    }
}
