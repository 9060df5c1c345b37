//! Differences as input for `iptables-restore --noflush`, and the output of `iptables-save` as rules.

use std::collections::{BTreeMap, BTreeSet};

use super::rules::{ChainKey, Rules, SHARED, Table, is_own};

/// Input for a restore; each line may belong to someone.
#[derive(Debug, Default)]
pub struct Script {
    sections: BTreeMap<Table, Section>,
}

#[derive(Debug, Default)]
struct Section {
    declared: BTreeMap<String, u32>,
    deleted: Vec<(String, u32)>,
    added: Vec<(String, u32)>,
    gone: Vec<String>,
}

/// Owner of what belongs to no Service.
pub const NOBODY: u32 = u32::MAX;

impl Script {
    /// Whether nothing would change.
    pub fn is_empty(&self) -> bool {
        self.sections.is_empty()
    }

    /// Number of chains and rules that it writes or deletes.
    pub fn lines(&self) -> usize {
        let of = |s: &Section| s.declared.len() + s.deleted.len() + s.added.len() + s.gone.len();
        self.sections.values().map(of).sum()
    }

    fn section(&mut self, table: Table) -> &mut Section {
        self.sections.entry(table).or_default()
    }

    /// Makes a chain, or empties it, and fills it.
    pub fn write_chain(&mut self, key: &ChainKey, rules: &[String], owner: u32) {
        let section = self.section(key.0);
        section.declared.insert(key.1.clone(), owner);
        section.added.extend(rules.iter().map(|rule| (format!("{} {rule}", key.1), owner)));
    }

    /// Empties and deletes a chain.
    pub fn delete_chain(&mut self, key: &ChainKey) {
        let section = self.section(key.0);
        section.declared.insert(key.1.clone(), NOBODY);
        section.gone.push(key.1.clone());
    }

    /// Appends a rule to a shared chain.
    pub fn add(&mut self, table: Table, chain: &str, rule: &str, owner: u32) {
        self.section(table).added.push((format!("{chain} {rule}"), owner));
    }

    /// Deletes a rule from a shared chain.
    pub fn delete(&mut self, table: Table, chain: &str, rule: &str, owner: u32) {
        self.section(table).deleted.push((format!("{chain} {rule}"), owner));
    }

    /// What changes when a Service's rules change.
    pub fn change(&mut self, old: &Rules, new: &Rules, owner: u32) {
        for (key, rules) in &new.chains {
            if old.chains.get(key) != Some(rules) {
                self.write_chain(key, rules, owner);
            }
        }
        for key in old.chains.keys().filter(|key| !new.chains.contains_key(*key)) {
            self.delete_chain(key);
        }
        for (table, chain, rule) in old.shared.difference(&new.shared) {
            self.delete(*table, chain, rule, owner);
        }
        for (table, chain, rule) in new.shared.difference(&old.shared) {
            self.add(*table, chain, rule, owner);
        }
    }

    /// The text, and the owner of each line, by line number from 1.
    pub fn render(&self) -> (String, Vec<u32>) {
        let mut text = String::new();
        let mut owners = vec![NOBODY];
        let mut line = |owner: u32, content: std::fmt::Arguments<'_>| {
            text.push_str(&content.to_string());
            text.push('\n');
            owners.push(owner);
        };
        for (table, section) in &self.sections {
            line(NOBODY, format_args!("*{}", table.name()));
            for (chain, owner) in &section.declared {
                line(*owner, format_args!(":{chain} - [0:0]"));
            }
            for (rule, owner) in &section.deleted {
                line(*owner, format_args!("-D {rule}"));
            }
            for (rule, owner) in &section.added {
                line(*owner, format_args!("-A {rule}"));
            }
            for chain in &section.gone {
                line(NOBODY, format_args!("-X {chain}"));
            }
            line(NOBODY, format_args!("COMMIT"));
        }
        (text, owners)
    }
}

/// Own chains and their rules, out of `iptables-save` of one table.
pub fn parse_save(table: Table, text: &str) -> BTreeMap<ChainKey, Vec<String>> {
    let mut chains: BTreeMap<ChainKey, Vec<String>> = BTreeMap::new();
    for line in text.lines() {
        if let Some(chain) = line.strip_prefix(':').and_then(|l| l.split(' ').next()) {
            if is_own(chain) {
                chains.entry((table, chain.to_owned())).or_default();
            }
        } else if let Some((chain, rule)) = line.strip_prefix("-A ").and_then(|l| l.split_once(' '))
            && is_own(chain)
        {
            // Some versions print two spaces there.
            let rule = rule.replace("--nfacct-name  ", "--nfacct-name ");
            chains.entry((table, chain.to_owned())).or_default().push(rule);
        }
    }
    chains
}

/// What leads from what is there to what should be: fixed chains, and all Services' rules with
/// their owners.
pub fn repair(
    found: &BTreeMap<ChainKey, Vec<String>>,
    fixed: &BTreeMap<ChainKey, Vec<String>>,
    services: &[Rules],
) -> Script {
    let mut script = Script::default();
    let mut known: BTreeSet<&ChainKey> = BTreeSet::new();
    for (key, rules) in fixed {
        known.insert(key);
        if found.get(key) != Some(rules) {
            script.write_chain(key, rules, NOBODY);
        }
    }
    let mut wanted: BTreeMap<(Table, &str), BTreeMap<&str, u32>> = BTreeMap::new();
    for (owner, rules) in services.iter().enumerate() {
        let owner = owner as u32;
        for (key, rules) in &rules.chains {
            known.insert(key);
            if found.get(key) != Some(rules) {
                script.write_chain(key, rules, owner);
            }
        }
        for (table, chain, rule) in &rules.shared {
            wanted.entry((*table, chain)).or_default().insert(rule, owner);
        }
    }
    for (table, chain) in SHARED {
        let mut wanted = wanted.remove(&(table, chain)).unwrap_or_default();
        let Some(there) = found.get(&(table, chain.to_owned())) else {
            let key = (table, chain.to_owned());
            script.write_chain(&key, &[], NOBODY);
            wanted.iter().for_each(|(rule, owner)| script.add(table, chain, rule, *owner));
            continue;
        };
        for rule in there {
            if wanted.remove(rule.as_str()).is_none() {
                script.delete(table, chain, rule, NOBODY);
            }
        }
        wanted.iter().for_each(|(rule, owner)| script.add(table, chain, rule, *owner));
    }
    for key in found.keys() {
        let shared = SHARED.iter().any(|(table, chain)| *table == key.0 && *chain == key.1);
        if !shared && !known.contains(key) {
            script.delete_chain(key);
        }
    }
    script
}

/// Input for a restore that removes all own chains and the jumps to them, out of `iptables-save` of
/// all tables; empty if there is nothing.
pub fn cleanup(saved: &str) -> String {
    let mut text = String::new();
    let mut table = "";
    let (mut chains, mut jumps) = (Vec::new(), Vec::new());
    for line in saved.lines() {
        if let Some(name) = line.strip_prefix('*') {
            table = name;
        } else if let Some(chain) = line.strip_prefix(':').and_then(|l| l.split(' ').next()) {
            chains.extend(is_own(chain).then_some(chain));
        } else if let Some(rule) = line.strip_prefix("-A ") {
            let own = rule.split(' ').next().is_some_and(is_own);
            let target = [" -j ", " -g "].iter().find_map(|word| rule.split_once(word));
            let to = target.and_then(|(_, rest)| rest.split(' ').next());
            jumps.extend((!own && to.is_some_and(is_own)).then_some(rule));
        } else if line == "COMMIT" {
            if !chains.is_empty() {
                text.push_str(&format!("*{table}\n"));
                chains.iter().for_each(|chain| text.push_str(&format!(":{chain} - [0:0]\n")));
                jumps.iter().for_each(|rule| text.push_str(&format!("-D {rule}\n")));
                chains.iter().for_each(|chain| text.push_str(&format!("-X {chain}\n")));
                text.push_str("COMMIT\n");
            }
            chains.clear();
            jumps.clear();
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cleanup_takes_own_chains_with_the_jumps_to_them_and_nothing_else() {
        let saved = "# comment\n*nat\n:PREROUTING ACCEPT [1:2]\n:KUBE-SERVICES - [0:0]\n\
            :KUBE-SVC-ABC - [0:0]\n:KUBE-NWPLCY-XYZ - [0:0]\n\
            -A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n\
            -A PREROUTING -j DOCKER\n-A KUBE-SERVICES -d 10.0.0.1/32 -j KUBE-SVC-ABC\n\
            -A KUBE-NWPLCY-XYZ -j KUBE-MARK-MASQ\nCOMMIT\n\
            *filter\n:INPUT ACCEPT [0:0]\n:KUBE-KUBELET-CANARY - [0:0]\n-A INPUT -j DROP\nCOMMIT\n";
        assert_eq!(
            cleanup(saved),
            "*nat\n:KUBE-SERVICES - [0:0]\n:KUBE-SVC-ABC - [0:0]\n\
             -D PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n\
             -D KUBE-NWPLCY-XYZ -j KUBE-MARK-MASQ\n\
             -X KUBE-SERVICES\n-X KUBE-SVC-ABC\nCOMMIT\n"
        );
        assert_eq!(cleanup(&saved.replace("KUBE-S", "OTHER-")), "");
    }
}
