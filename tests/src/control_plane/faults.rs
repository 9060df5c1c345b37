//! Misbehaviour on demand. Faults concern the requests of everybody but administrators, so that a
//! test keeps its own view while the node is lied to.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::request::RequestInfo;

/// How a request goes wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Answered with this HTTP code and a `Status`.
    Code(u16),
    /// 200, and bytes that are no JSON.
    Garbage,
    /// 200, JSON cut off in the middle.
    Truncated,
    /// Answered correctly, this much later.
    Slow(Duration),
    /// Answered correctly, by a clock that is ahead by so many seconds.
    Clock(i64),
    /// Accepted, never answered.
    Silent,
    /// The connection breaks without an answer.
    Reset,
}

/// A rule: which requests meet which fault.
#[derive(Clone, Debug)]
pub struct Rule {
    verb: Option<&'static str>,
    plural: Option<&'static str>,
    fault: Fault,
    left: Option<u32>,
}

impl Rule {
    /// Every request meets `fault`.
    pub fn all(fault: Fault) -> Self {
        Self { verb: None, plural: None, fault, left: None }
    }

    /// Only requests with this verb.
    #[must_use]
    pub fn verb(mut self, verb: &'static str) -> Self {
        self.verb = Some(verb);
        self
    }

    /// Only requests for this resource.
    #[must_use]
    pub fn resource(mut self, plural: &'static str) -> Self {
        self.plural = Some(plural);
        self
    }

    /// Only the next `n` requests that match.
    #[must_use]
    pub fn times(mut self, n: u32) -> Self {
        self.left = Some(n);
        self
    }
}

/// The rules in force.
#[derive(Default)]
pub struct Faults {
    rules: Mutex<Vec<Rule>>,
}

impl Faults {
    /// Adds a rule; the first that matches decides.
    pub fn add(&self, rule: Rule) {
        self.rules.lock().unwrap_or_else(PoisonError::into_inner).push(rule);
    }

    /// Ends all misbehaviour.
    pub fn clear(&self) {
        self.rules.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// The fault that this request meets.
    pub fn hit(&self, info: &RequestInfo) -> Option<Fault> {
        let mut rules = self.rules.lock().unwrap_or_else(PoisonError::into_inner);
        let rule = rules.iter_mut().find(|rule| {
            rule.left != Some(0)
                && rule.verb.is_none_or(|v| v == info.verb)
                && rule.plural.is_none_or(|p| p == info.plural)
        })?;
        if let Some(left) = &mut rule.left {
            *left -= 1;
        }
        Some(rule.fault.clone())
    }
}
