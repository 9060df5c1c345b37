//! The index: which images there are, by which names, of which layers. Plain data and the decisions
//! on it; `store` keeps it on disk.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::reference::ImageReference;

/// The format written; a newer one is refused rather than misread.
pub(crate) const VERSION: u32 = 1;

/// All images of a store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Index {
    pub(crate) version: u32,
    /// By image id, `sha256:<hex>` of the config.
    pub(crate) images: BTreeMap<String, Record>,
}

/// One image.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    #[serde(default)]
    pub(crate) repo_tags: Vec<String>,
    #[serde(default)]
    pub(crate) repo_digests: Vec<String>,
    /// Bottom first.
    pub(crate) layers: Vec<LayerRecord>,
    /// The boot in which the image was pulled, until its layers have reached the disk: after
    /// another boot they may not be whole.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) unsynced: Option<String>,
    /// Whether an administrator said to keep it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) pinned: bool,
}

/// One layer of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LayerRecord {
    /// Where the store has it (`layout`).
    #[serde(rename = "chain_id")]
    pub(crate) key: String,
    /// Bytes of the unpacked files.
    pub(crate) bytes: u64,
    /// Unpacked files, folders and links.
    pub(crate) inodes: u64,
}

/// The name an image is stored under.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Names {
    pub(crate) repo_tag: Option<String>,
    pub(crate) repo_digest: Option<String>,
}

impl Default for Index {
    fn default() -> Self {
        Self { version: VERSION, images: BTreeMap::new() }
    }
}

impl Index {
    /// Adds an image under `names`, or more names to one that is there. A tag belongs to one image:
    /// it leaves the one that had it.
    pub(crate) fn add(&mut self, id: &str, layers: Vec<LayerRecord>, names: &Names) {
        if let Some(tag) = &names.repo_tag {
            for record in self.images.values_mut() {
                record.repo_tags.retain(|have| have != tag);
            }
        }
        let record = self.images.entry(id.to_owned()).or_default();
        record.layers = layers;
        let mut insert = |list: fn(&mut Record) -> &mut Vec<String>, name: &Option<String>| {
            if let Some(name) = name {
                let list = list(record);
                if !list.contains(name) {
                    list.push(name.clone());
                }
            }
        };
        insert(|record| &mut record.repo_tags, &names.repo_tag);
        insert(|record| &mut record.repo_digests, &names.repo_digest);
    }

    /// The id of the image that `text` names: a reference, an id, or an unambiguous start of an id.
    pub(crate) fn resolve(&self, text: &str) -> Option<&str> {
        if let Some((id, _)) = self.images.get_key_value(text) {
            return Some(id);
        }
        if let Ok(reference) = ImageReference::parse(text) {
            let digest = reference.digest().map(|digest| reference.repo_digest(digest));
            let tag = reference.repo_tag();
            let named = self.images.iter().find(|(_, record)| {
                tag.as_ref().is_some_and(|tag| record.repo_tags.contains(tag))
                    || digest.as_ref().is_some_and(|digest| record.repo_digests.contains(digest))
            });
            if let Some((id, _)) = named {
                return Some(id);
            }
        }
        let hex = text.strip_prefix("sha256:").unwrap_or(text);
        let is_hex = (3..=64).contains(&hex.len())
            && hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        if !is_hex {
            return None;
        }
        let mut found = self
            .images
            .keys()
            .filter(|id| id.strip_prefix("sha256:").is_some_and(|id| id.starts_with(hex)));
        match (found.next(), found.next()) {
            (Some(id), None) => Some(id),
            _ => None,
        }
    }

    /// Forgets the images that were not on the disk when an earlier boot ended; returns their ids.
    pub(crate) fn drop_unsynced(&mut self, boot: &str) -> Vec<String> {
        let lost = |record: &Record| record.unsynced.as_deref().is_some_and(|was| was != boot);
        let ids: Vec<_> =
            self.images.iter().filter(|(_, r)| lost(r)).map(|(id, _)| id.clone()).collect();
        self.images.retain(|_, record| !lost(record));
        ids
    }

    /// The keys of the layers that some image needs.
    pub(crate) fn layers_in_use(&self) -> BTreeSet<&str> {
        self.images
            .values()
            .flat_map(|record| record.layers.iter().map(|layer| layer.key.as_str()))
            .collect()
    }

    /// The keys of the layers that only image `id` needs: what its removal frees.
    pub(crate) fn layers_freed_by(&self, id: &str) -> Vec<String> {
        let Some(record) = self.images.get(id) else {
            return Vec::new();
        };
        let others: BTreeSet<&str> = self
            .images
            .iter()
            .filter(|(other, _)| *other != id)
            .flat_map(|(_, record)| record.layers.iter().map(|layer| layer.key.as_str()))
            .collect();
        record
            .layers
            .iter()
            .filter(|layer| !others.contains(layer.key.as_str()))
            .map(|layer| layer.key.clone())
            .collect()
    }

    /// Bytes and inodes of all layers, each counted once.
    pub(crate) fn usage(&self) -> (u64, u64) {
        let layers: BTreeMap<&str, &LayerRecord> = self
            .images
            .values()
            .flat_map(|record| record.layers.iter().map(|l| (l.key.as_str(), l)))
            .collect();
        layers.values().fold((0, 0), |(bytes, inodes), l| (bytes + l.bytes, inodes + l.inodes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(chain: &str, bytes: u64) -> LayerRecord {
        LayerRecord { key: chain.to_owned(), bytes, inodes: 1 }
    }

    fn tag(tag: &str) -> Names {
        Names { repo_tag: Some(tag.to_owned()), repo_digest: None }
    }

    fn two() -> (Index, String, String) {
        let (a, b) =
            (format!("sha256:aa1{}", "0".repeat(61)), format!("sha256:aa2{}", "0".repeat(61)));
        let mut index = Index::default();
        index.add(&a, vec![layer("base", 100), layer("a", 10)], &tag("docker.io/library/a:latest"));
        let names = Names {
            repo_tag: Some("docker.io/library/b:1".to_owned()),
            repo_digest: Some(format!("docker.io/library/b@sha256:{}", "d".repeat(64))),
        };
        index.add(&b, vec![layer("base", 100), layer("b", 20)], &names);
        (index, a, b)
    }

    #[test]
    fn images_are_found_by_every_name() {
        let (index, a, b) = two();
        for (text, want) in [
            ("a", Some(&a)),
            ("docker.io/library/a:latest", Some(&a)),
            ("b", None),
            ("b:1", Some(&b)),
            (&format!("b@sha256:{}", "d".repeat(64)), Some(&b)),
            (&format!("b:1@sha256:{}", "d".repeat(64)), Some(&b)),
            (&format!("b@sha256:{}", "e".repeat(64)), None),
            (&a, Some(&a)),
            (a.strip_prefix("sha256:").unwrap(), Some(&a)),
            ("aa1", Some(&a)),
            ("sha256:aa2", Some(&b)),
            ("aa", None),
            ("", None),
        ] {
            assert_eq!(index.resolve(text), want.map(String::as_str), "{text}");
        }
        assert_eq!(index.resolve("aa0"), None);
    }

    #[test]
    fn images_not_on_disk_last_as_long_as_their_boot() {
        let (mut index, a, b) = two();
        for (id, boot) in [(&a, "one"), (&b, "two")] {
            index.images.get_mut(id).unwrap().unsynced = Some(boot.to_owned());
        }
        assert_eq!(index.drop_unsynced("two"), [a]);
        assert_eq!(index.images.keys().collect::<Vec<_>>(), [&b]);
    }

    #[test]
    fn a_tag_moves_and_layers_are_shared() {
        let (mut index, a, b) = two();
        assert_eq!(index.usage(), (130, 3));
        assert_eq!(index.layers_freed_by(&a), ["a"]);
        assert_eq!(index.layers_in_use().len(), 3);
        index.add(&b, index.images[&b].layers.clone(), &tag("docker.io/library/a:latest"));
        assert!(index.images[&a].repo_tags.is_empty());
        assert_eq!(index.images[&b].repo_tags.len(), 2);
        index.images.remove(&a);
        assert_eq!(index.layers_freed_by(&b), ["base", "b"]);
    }
}
