//! A batch of changes to one table, as plain data.

use crate::object::{Chain, Element, Rule, Set, Table};

/// One change.
#[derive(Clone, Debug, PartialEq)]
pub enum Op {
    /// Make the table if it is not there; the comment is only written when it is made.
    AddTable(Option<String>),
    /// Delete the table with everything in it; it must be there.
    DeleteTable,
    /// Make the chain if it is not there.
    AddChain(Chain),
    /// Delete all rules of a chain.
    FlushChain(String),
    /// Delete a chain that nothing refers to.
    DeleteChain(String),
    /// Append a rule.
    AddRule(Rule),
    /// Delete a rule by the handle that a dump told.
    DeleteRule {
        /// Its chain.
        chain: String,
        /// Its handle.
        handle: u64,
    },
    /// Make the set if it is not there.
    AddSet(Set),
    /// Delete all elements.
    FlushSet(String),
    /// Delete a set that no rule refers to.
    DeleteSet(String),
    /// Add elements; one that is there with the same data is fine.
    AddElements {
        /// The set or map.
        set: String,
        /// The elements.
        elements: Vec<Element>,
    },
    /// Delete elements, which must be there.
    DeleteElements {
        /// The set or map.
        set: String,
        /// The elements; only their keys count.
        elements: Vec<Element>,
    },
}

impl Op {
    /// The object by name, for errors.
    pub(crate) fn object(&self) -> String {
        match self {
            Op::AddTable(_) | Op::DeleteTable => "table".into(),
            Op::AddChain(chain) => format!("chain {}", chain.name),
            Op::FlushChain(name) | Op::DeleteChain(name) => format!("chain {name}"),
            Op::AddRule(rule) => match &rule.comment {
                Some(comment) => format!("rule {comment:?} of chain {}", rule.chain),
                None => format!("rule of chain {}", rule.chain),
            },
            Op::DeleteRule { chain, handle } => format!("rule {handle} of chain {chain}"),
            Op::AddSet(set) => format!("set {}", set.name),
            Op::FlushSet(name) | Op::DeleteSet(name) => format!("set {name}"),
            Op::AddElements { set, .. } => format!("new element of set {set}"),
            Op::DeleteElements { set, .. } => format!("element of set {set}"),
        }
    }
}

/// Changes to one table that the kernel takes together or not at all.
#[derive(Clone, Debug, PartialEq)]
pub struct Transaction {
    /// The table.
    pub table: Table,
    /// The changes, in order.
    pub ops: Vec<Op>,
}

impl Transaction {
    /// An empty transaction on `table`.
    pub fn new(table: Table) -> Self {
        Transaction { table, ops: Vec::new() }
    }

    /// Whether nothing would change.
    pub fn is_empty(&self) -> bool {
        self.ops.is_empty()
    }

    /// Appends a change.
    pub fn push(&mut self, op: Op) -> &mut Self {
        self.ops.push(op);
        self
    }

    /// Makes the table.
    pub fn add_table(&mut self) -> &mut Self {
        self.push(Op::AddTable(None))
    }

    /// Makes sure that the table is not there: made if need be, then deleted.
    pub fn ensure_no_table(&mut self) -> &mut Self {
        self.push(Op::AddTable(None)).push(Op::DeleteTable)
    }

    /// Makes a chain.
    pub fn add_chain(&mut self, name: &str, base: Option<crate::BaseChain>) -> &mut Self {
        self.push(Op::AddChain(Chain { name: name.to_owned(), base }))
    }

    /// Appends a rule without comment.
    pub fn add_rule(&mut self, chain: &str, exprs: Vec<crate::Expr>) -> &mut Self {
        self.push(Op::AddRule(Rule { chain: chain.to_owned(), exprs, comment: None }))
    }

    /// Makes a set.
    pub fn add_set(&mut self, set: Set) -> &mut Self {
        self.push(Op::AddSet(set))
    }

    /// Adds an element; joined to the previous change if that adds to the same set.
    pub fn add_element(&mut self, set: &str, element: Element) -> &mut Self {
        match self.ops.last_mut() {
            Some(Op::AddElements { set: last, elements }) if last == set => elements.push(element),
            _ => {
                self.ops.push(Op::AddElements { set: set.to_owned(), elements: vec![element] });
            }
        }
        self
    }

    /// Deletes an element; joined to the previous change if that deletes from the same set.
    pub fn delete_element(&mut self, set: &str, element: Element) -> &mut Self {
        match self.ops.last_mut() {
            Some(Op::DeleteElements { set: last, elements }) if last == set => {
                elements.push(element);
            }
            _ => {
                self.ops.push(Op::DeleteElements { set: set.to_owned(), elements: vec![element] });
            }
        }
        self
    }
}
