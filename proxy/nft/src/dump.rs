//! Reading back what a table holds: once at start, and when somebody else changed it.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::client::{Client, Error};
use crate::encode::{SUBSYSTEM, msg};
use crate::object::{
    BaseChain, ChainType, Data, DataType, Hook, Key, Set, SetData, Table, Verdict,
};
use crate::wire::{Attributes, Message};

/// A rule as the kernel tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuleEntry {
    /// Handle, for deleting it.
    pub handle: u64,
    /// Its comment.
    pub comment: Option<String>,
}

/// A set's shape as the kernel tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SetEntry {
    /// Number of the key's concatenated types.
    pub key_type: u32,
    /// Number of the data's type, 0 if it is no map.
    pub data_type: u32,
    /// `NFT_SET_*` bits.
    pub flags: u32,
}

impl SetEntry {
    /// The shape of `set`.
    pub(crate) fn of(set: &Set) -> SetEntry {
        let data_type = match &set.data {
            None => 0,
            Some(SetData::Verdict) => 0xffff_ff00,
            Some(SetData::Value(types)) => DataType::concat(types),
        };
        SetEntry { key_type: DataType::concat(&set.key), data_type, flags: set.flags() }
    }

    /// Whether it has the shape of `set`.
    pub fn is_of(&self, set: &Set) -> bool {
        *self == SetEntry::of(set)
    }
}

/// Chains, rules and sets of a table, without elements.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TableState {
    /// Chains by name with their hook and their rules in order.
    pub chains: BTreeMap<String, (Option<BaseChain>, Vec<RuleEntry>)>,
    /// Named sets by name.
    pub sets: BTreeMap<String, SetEntry>,
}

/// An element as the kernel tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ElementEntry {
    /// Key.
    pub key: Key,
    /// End of the range, in interval sets.
    pub key_end: Option<Key>,
    /// What it maps to.
    pub data: Option<Data>,
    /// How long it still lives, if it expires.
    pub expires: Option<Duration>,
}

impl Client {
    /// The generation of the rulesets of this network namespace: every batch that changes
    /// something, whoever sends it, adds one.
    ///
    /// # Errors
    /// If the kernel cannot be read.
    pub fn generation(&mut self) -> Result<u32, Error> {
        let mut found = None;
        self.ask(SUBSYSTEM << 8 | msg::GETGEN, |message| {
            if is(message, msg::NEWGEN) {
                found = message.attributes().u32(1);
            }
        })?;
        found.ok_or_else(|| Error::Unstable { what: "the generation".to_owned() })
    }

    /// All tables of the network namespace.
    ///
    /// # Errors
    /// If the kernel cannot be read.
    pub fn tables(&mut self) -> Result<Vec<Table>, Error> {
        let tables = std::cell::RefCell::new(Vec::new());
        self.dump(
            msg::GETTABLE,
            crate::Family::Inet,
            "tables",
            |_| {},
            || tables.borrow_mut().clear(),
            |message| {
                let name = message.attributes().string(1);
                if let (Some(family), Some(name)) = (family_of(message.family()), name) {
                    tables.borrow_mut().push(Table { family, name });
                }
            },
        )?;
        // A dump by family filters in the kernel; each family is asked for.
        for family in [crate::Family::Ip, crate::Family::Ip6, crate::Family::Bridge] {
            let more = std::cell::RefCell::new(Vec::new());
            self.dump(
                msg::GETTABLE,
                family,
                "tables",
                |_| {},
                || more.borrow_mut().clear(),
                |message| {
                    let name = message.attributes().string(1);
                    if let (Some(family), Some(name)) = (family_of(message.family()), name) {
                        more.borrow_mut().push(Table { family, name });
                    }
                },
            )?;
            tables.borrow_mut().append(&mut more.into_inner());
        }
        Ok(tables.into_inner())
    }

    /// Chains of whatever table that drop what is forwarded and no rule of theirs decided about:
    /// what one table accepts goes on to the others.
    ///
    /// # Errors
    /// If the kernel cannot be read.
    pub fn dropping_forwards(&mut self) -> Result<Vec<(Table, String)>, Error> {
        const FORWARD: u32 = 2;
        const DROP: u32 = 0;
        let mut found = Vec::new();
        for family in [crate::Family::Ip, crate::Family::Ip6, crate::Family::Inet] {
            let more = std::cell::RefCell::new(Vec::new());
            self.dump(
                msg::GETCHAIN,
                family,
                "chains",
                |_| {},
                || more.borrow_mut().clear(),
                |message| {
                    let attributes = message.attributes();
                    if is(message, msg::NEWCHAIN)
                        && attributes.nested(4).u32(1) == Some(FORWARD)
                        && attributes.u32(5) == Some(DROP)
                        && let (Some(table), Some(chain)) =
                            (attributes.string(1), attributes.string(3))
                    {
                        more.borrow_mut().push((Table { family, name: table }, chain));
                    }
                },
            )?;
            found.append(&mut more.into_inner());
        }
        Ok(found)
    }

    /// Chains, rules and sets of `table`; `None` if it is not there.
    ///
    /// # Errors
    /// If the kernel cannot be read.
    pub fn read_table(&mut self, table: &Table) -> Result<Option<TableState>, Error> {
        if !self.tables()?.contains(table) {
            return Ok(None);
        }
        let state = std::cell::RefCell::new(TableState::default());
        self.dump(
            msg::GETCHAIN,
            table.family,
            &format!("chains of table {table}"),
            |_| {},
            || state.borrow_mut().chains.clear(),
            |message| {
                let attributes = message.attributes();
                if is(message, msg::NEWCHAIN)
                    && attributes.string(1).as_deref() == Some(table.name.as_str())
                    && let Some(name) = attributes.string(3)
                {
                    state.borrow_mut().chains.insert(name, (base_of(attributes), Vec::new()));
                }
            },
        )?;
        self.dump(
            msg::GETSET,
            table.family,
            &format!("sets of table {table}"),
            |out| out.string(1, &table.name),
            || state.borrow_mut().sets.clear(),
            |message| {
                let attributes = message.attributes();
                if is(message, msg::NEWSET)
                    && attributes.string(1).as_deref() == Some(table.name.as_str())
                    && let Some(name) = attributes.string(2)
                {
                    let number = |kind| attributes.u32(kind).unwrap_or_default();
                    let set =
                        SetEntry { key_type: number(4), data_type: number(6), flags: number(3) };
                    state.borrow_mut().sets.insert(name, set);
                }
            },
        )?;
        self.dump(
            msg::GETRULE,
            table.family,
            &format!("rules of table {table}"),
            |out| out.string(1, &table.name),
            || state.borrow_mut().chains.values_mut().for_each(|(_, rules)| rules.clear()),
            |message| {
                let attributes = message.attributes();
                if !is(message, msg::NEWRULE)
                    || attributes.string(1).as_deref() != Some(table.name.as_str())
                {
                    return;
                }
                let mut state = state.borrow_mut();
                let chain = attributes.string(2).and_then(|name| state.chains.get_mut(&name));
                if let (Some((_, rules)), Some(handle)) = (chain, attributes.u64(3)) {
                    rules.push(RuleEntry { handle, comment: comment_of(attributes.get(7)) });
                }
            },
        )?;
        Ok(Some(state.into_inner()))
    }

    /// Elements of a set, sorted by key; none if it is not there.
    ///
    /// # Errors
    /// If the kernel cannot be read.
    pub fn elements(&mut self, table: &Table, set: &str) -> Result<Vec<ElementEntry>, Error> {
        let found = std::cell::RefCell::new(Vec::new());
        self.dump(
            msg::GETSETELEM,
            table.family,
            &format!("elements of set {set} of table {table}"),
            |out| {
                out.string(1, &table.name);
                out.string(2, set);
            },
            || found.borrow_mut().clear(),
            |message| {
                if !is(message, msg::NEWSETELEM) {
                    return;
                }
                let mut found = found.borrow_mut();
                for (_, element) in message.attributes().nested(3) {
                    let element = Attributes(element);
                    let Some(key) = element.nested(1).get(1) else { continue };
                    found.push(ElementEntry {
                        key: Key::from_bytes(key),
                        key_end: element.nested(10).get(1).map(Key::from_bytes),
                        data: data_of(element.nested(2)),
                        expires: element.u64(5).map(Duration::from_millis),
                    });
                }
            },
        )?;
        // A hash table that is being resized tells some elements twice.
        let mut found: Vec<ElementEntry> = found.into_inner();
        found.sort_by(|a, b| (&a.key, &a.key_end).cmp(&(&b.key, &b.key_end)));
        found.dedup_by(|a, b| a.key == b.key && a.key_end == b.key_end && a.data == b.data);
        Ok(found)
    }
}

fn is(message: &Message<'_>, kind: u16) -> bool {
    message.kind == SUBSYSTEM << 8 | kind
}

fn family_of(number: u8) -> Option<crate::Family> {
    [crate::Family::Inet, crate::Family::Ip, crate::Family::Bridge, crate::Family::Ip6]
        .into_iter()
        .find(|family| *family as u8 == number)
}

fn base_of(attributes: Attributes<'_>) -> Option<BaseChain> {
    let hook = attributes.nested(4);
    let number = hook.u32(1)?;
    let chain_type = attributes.string(7)?;
    Some(BaseChain {
        chain_type: [ChainType::Filter, ChainType::Nat, ChainType::Route]
            .into_iter()
            .find(|t| t.name() == chain_type)?,
        hook: [Hook::Prerouting, Hook::Input, Hook::Forward, Hook::Output, Hook::Postrouting]
            .into_iter()
            .find(|h| *h as u32 == number)?,
        priority: hook.u32(2)? as i32,
    })
}

fn comment_of(userdata: Option<&[u8]>) -> Option<String> {
    let mut rest = userdata?;
    loop {
        let (kind, len) = (*rest.first()?, usize::from(*rest.get(1)?));
        let value = rest.get(2..2 + len)?;
        if kind == 0 {
            let text = value.strip_suffix(&[0]).unwrap_or(value);
            return Some(String::from_utf8_lossy(text).into_owned());
        }
        rest = rest.get(2 + len..)?;
    }
}

fn data_of(data: Attributes<'_>) -> Option<Data> {
    if let Some(value) = data.get(1) {
        return Some(Data::Value(Key::from_bytes(value)));
    }
    let verdict = data.nested(2);
    let chain = verdict.string(2).unwrap_or_default();
    Some(Data::Verdict(match verdict.u32(1)? as i32 {
        0 => Verdict::Drop,
        1 => Verdict::Accept,
        -1 => Verdict::Continue,
        -3 => Verdict::Jump(chain),
        -4 => Verdict::Goto(chain),
        -5 => Verdict::Return,
        _ => return None,
    }))
}
