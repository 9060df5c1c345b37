//! Kinds: what packets to a Service meet, each with a number. The large maps lead to numbers and one
//! small map leads from these to chains, because the kernel validates a whole table, element by
//! element of every verdict map, when an element with a chain is added, and does not for a number.

use std::collections::{BTreeSet, HashMap};

use nft::{Data, Key, Verdict};

use super::entries::REJECT;
use super::names::{Behaviour, Choice, MapId};

/// What packets meet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// An ICMP error.
    Reject,
    /// Nothing.
    Drop,
    /// A chain.
    Chain(Behaviour),
}

/// A number for a text. FNV-1a.
pub fn hash(text: &str) -> u32 {
    text.bytes()
        .fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

/// The first number from `wanted` on that is not taken.
pub fn first_free(wanted: u32, taken: impl Fn(u32) -> bool) -> u32 {
    let mut number = wanted;
    while taken(number) {
        number = number.wrapping_add(1);
    }
    number
}

impl Kind {
    /// Those that every table has.
    pub const FIXED: [Kind; 2] = [Kind::Reject, Kind::Drop];

    /// The small maps that numbers are in.
    pub const MAPS: [MapId; 3] = [MapId::SlotKinds, MapId::Kinds, MapId::Refusals];

    /// The small map that its number is in.
    pub fn map(self) -> MapId {
        match self {
            Kind::Reject | Kind::Drop => MapId::Refusals,
            Kind::Chain(Behaviour::Slot { .. }) => MapId::SlotKinds,
            Kind::Chain(_) => MapId::Kinds,
        }
    }

    /// Where its number leads.
    pub fn verdict(self) -> Verdict {
        match self {
            Kind::Reject => Verdict::Goto(REJECT.to_owned()),
            Kind::Drop => Verdict::Drop,
            Kind::Chain(behaviour) => Verdict::Goto(behaviour.to_string()),
        }
    }

    /// The number it has unless another has it: one that tells, in hexadecimal, what it is, but for
    /// affinity, which has too much to tell.
    fn wanted(self) -> u32 {
        match self {
            Kind::Reject => 0x0f00_0001,
            Kind::Drop => 0x0f00_0002,
            Kind::Chain(Behaviour::Pick { pool, choice: Choice::Random { count }, masquerade }) => {
                let pool = (pool.origin as u32) << 1 | pool.policy as u32;
                (masquerade as u32) << 28 | pool << 24 | (count & 0x00ff_ffff)
            }
            Kind::Chain(behaviour) => 1 << 31 | hash(&behaviour.to_string()),
        }
    }
}

/// A number as the value of a large map. `nft` prints a key only from a register that it has seen
/// filled by something of known length, which a map is not: the number is the second part of the
/// value, and lies where a part of the address was before.
pub fn value(number: u32) -> Data {
    Data::Value(Key::new().number(0).number(number))
}

/// The number in such a value.
pub fn number_of(data: &Data) -> Option<u32> {
    let Data::Value(value) = data else { return None };
    let (_, number) = value.bytes().split_last_chunk::<4>()?;
    (value.bytes().len() == 8).then(|| u32::from_ne_bytes(*number))
}

/// The number that is the key of an element of the small map.
pub fn number_of_key(key: &Key) -> Option<u32> {
    Some(u32::from_ne_bytes(key.bytes().try_into().ok()?))
}

/// Where numbers lead in the kernel, by small map and number.
pub type Led = HashMap<(MapId, u32), Verdict>;

/// Kinds with their numbers, each with one of its own.
#[derive(Clone, Debug, Default)]
pub struct Kinds {
    numbers: HashMap<Kind, u32>,
    taken: HashMap<u32, Kind>,
    /// Those whose elements are in the kernel.
    there: BTreeSet<Kind>,
}

impl Kinds {
    fn insert(&mut self, kind: Kind, number: u32) {
        self.numbers.insert(kind, number);
        self.taken.insert(number, kind);
    }

    /// Gives every kind that is wanted a number, and forgets all others: the one it has, else the
    /// one that leads there in the kernel, else one that nobody has here or there.
    pub fn renew(&mut self, wanted: &BTreeSet<Kind>, led: &Led) {
        let known = std::mem::take(&mut self.numbers);
        self.taken.clear();
        self.there.clear();
        for kind in wanted {
            if let Some(number) = known.get(kind) {
                self.insert(*kind, *number);
            }
        }
        let by_verdict: HashMap<(MapId, &Verdict), u32> =
            led.iter().map(|((map, number), verdict)| ((*map, verdict), *number)).collect();
        let new = |kinds: &Kinds| -> Vec<Kind> {
            wanted.iter().filter(|kind| !kinds.numbers.contains_key(kind)).copied().collect()
        };
        for kind in new(self) {
            let verdict = kind.verdict();
            let found = by_verdict.get(&(kind.map(), &verdict));
            if let Some(number) = found.filter(|number| !self.taken.contains_key(number)) {
                self.insert(kind, *number);
            }
        }
        for kind in new(self) {
            let there = |number| Kind::MAPS.iter().any(|map| led.contains_key(&(*map, number)));
            let taken = |number| self.taken.contains_key(&number) || there(number);
            let number = first_free(kind.wanted(), taken);
            self.insert(kind, number);
        }
    }

    /// Takes note of numbers whose elements the kernel has now.
    pub fn commit(&mut self, kinds: Vec<(Kind, u32)>) {
        for (kind, number) in kinds {
            self.insert(kind, number);
            self.there.insert(kind);
        }
    }

    /// All with their numbers.
    pub fn all(&self) -> impl Iterator<Item = (Kind, u32)> + '_ {
        self.numbers.iter().map(|(kind, number)| (*kind, *number))
    }

    /// Whether a number of a small map is some kind's.
    pub fn has(&self, map: MapId, number: u32) -> bool {
        self.taken.get(&number).is_some_and(|kind| kind.map() == map)
    }

    /// Those whose elements are in the kernel.
    pub fn there(&self) -> impl Iterator<Item = (Kind, u32)> + '_ {
        self.all().filter(|(kind, _)| self.there.contains(kind))
    }
}

/// Numbers for a transaction: the ones that kinds have, and new ones.
#[derive(Debug)]
pub struct Numbers<'a> {
    kinds: &'a Kinds,
    new: Kinds,
}

impl<'a> Numbers<'a> {
    /// Nothing new yet.
    pub fn new(kinds: &'a Kinds) -> Self {
        Numbers { kinds, new: Kinds::default() }
    }

    /// A kind's number.
    pub fn of(&mut self, kind: Kind) -> u32 {
        let known = self.kinds.numbers.get(&kind).or_else(|| self.new.numbers.get(&kind));
        known.copied().unwrap_or_else(|| {
            let taken = |n| self.kinds.taken.contains_key(&n) || self.new.taken.contains_key(&n);
            let number = first_free(kind.wanted(), taken);
            self.new.insert(kind, number);
            number
        })
    }

    /// Whether the kernel has its element.
    pub fn is_there(&self, kind: Kind) -> bool {
        self.kinds.there.contains(&kind)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nftables::names::{Masquerade, Pool};

    fn pick(count: u32) -> Kind {
        Kind::Chain(Behaviour::Pick {
            pool: Pool::ALL[0],
            choice: Choice::Random { count },
            masquerade: Masquerade::Never,
        })
    }

    fn sticky(timeout: u32) -> Kind {
        Kind::Chain(Behaviour::Pick {
            pool: Pool::ALL[0],
            choice: Choice::Sticky { timeout, count: 2, slots: 2 },
            masquerade: Masquerade::Always,
        })
    }

    #[test]
    fn a_number_that_is_taken_is_not_given_again() {
        assert_eq!(first_free(7, |_| false), 7);
        assert_eq!(first_free(7, |id| [7, 8].contains(&id)), 9);
        assert_eq!(first_free(u32::MAX, |id| id == u32::MAX), 0);
    }

    #[test]
    fn numbers_tell_kinds_apart() {
        let mut all: BTreeSet<Kind> = (1..100).map(pick).collect();
        all.extend((1..100).map(sticky));
        all.extend(Kind::FIXED);
        let mut kinds = Kinds::default();
        kinds.renew(&all, &HashMap::new());
        let numbers: BTreeSet<u32> = kinds.all().map(|(_, number)| number).collect();
        assert_eq!(numbers.len(), all.len());
        assert_eq!(kinds.numbers[&pick(4)], 4);
    }

    #[test]
    fn what_the_kernel_has_keeps_its_number() {
        let led: Led = [
            ((MapId::Kinds, 9), pick(4).verdict()),
            // Another's number is where this one would like to be.
            ((MapId::Kinds, 5), Verdict::Goto("elsewhere".into())),
            ((MapId::Refusals, 6), Verdict::Goto("elsewhere".into())),
            // What refuses does not lead to endpoints.
            ((MapId::Refusals, 10), pick(5).verdict()),
        ]
        .into();
        let wanted: BTreeSet<Kind> = [pick(4), pick(5)].into();
        let mut kinds = Kinds::default();
        kinds.renew(&wanted, &led);
        assert_eq!((kinds.numbers[&pick(4)], kinds.numbers[&pick(5)]), (9, 7));
        // What is known here stays, whatever became of it there.
        kinds.renew(&wanted, &HashMap::new());
        assert_eq!((kinds.numbers[&pick(4)], kinds.numbers[&pick(5)]), (9, 7));
        // What nobody wants is forgotten.
        kinds.renew(&[pick(5)].into(), &HashMap::new());
        assert_eq!(kinds.all().collect::<Vec<_>>(), [(pick(5), 7)]);
    }

    #[test]
    fn a_transaction_gives_new_numbers_beside_those_in_use() {
        let mut kinds = Kinds::default();
        kinds.commit(vec![(pick(4), 5)]);
        let mut numbers = Numbers::new(&kinds);
        assert_eq!([pick(4), pick(5), pick(6)].map(|kind| numbers.of(kind)), [5, 6, 7]);
        assert_eq!(numbers.of(pick(5)), 6);
        assert!(numbers.is_there(pick(4)) && !numbers.is_there(pick(5)));
    }

    #[test]
    fn a_number_is_read_from_a_value_as_written() {
        assert_eq!(number_of(&value(0x1234_5678)), Some(0x1234_5678));
        assert_eq!(number_of(&Data::Verdict(Verdict::Drop)), None);
        assert_eq!(number_of(&Data::Value(Key::new().number(1))), None);
        assert_eq!(number_of_key(&Key::new().number(7)), Some(7));
    }
}
