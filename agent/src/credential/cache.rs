//! Answers of one provider that may be used again. Pure: the time is an argument.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use sha2::{Digest, Sha256};
use tokio::time::Instant;

use super::protocol::{CacheScope, Logins};

/// More answers than this are not kept: a node has a hundred pods.
const MAX: usize = 4096;

/// What of a service account makes answers differ.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct AccountKey {
    pub(super) namespace: String,
    pub(super) name: String,
    pub(super) uid: String,
    pub(super) annotations: BTreeMap<String, String>,
    /// Digest of the token, where an answer is good for that token only (`cacheType: Token`).
    pub(super) token: Option<[u8; 32]>,
}

/// The digest by which a token is told from others without being kept.
pub(super) fn digest(token: &str) -> [u8; 32] {
    Sha256::digest(token.as_bytes()).into()
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum For {
    Image(String),
    Registry(String),
    All,
}

struct Entry {
    logins: Arc<Logins>,
    until: Instant,
}

/// The answers.
#[derive(Default)]
pub(super) struct Cache(HashMap<(For, Option<AccountKey>), Entry>);

fn registry(image: &str) -> String {
    image.split('/').next().unwrap_or_default().to_owned()
}

impl Cache {
    /// What was answered for `image`, the most specific answer first.
    pub(super) fn get(
        &self,
        image: &str,
        account: Option<&AccountKey>,
        now: Instant,
    ) -> Option<Arc<Logins>> {
        let places = [For::Image(image.to_owned()), For::Registry(registry(image)), For::All];
        places.into_iter().find_map(|place| {
            let entry = self.0.get(&(place, account.cloned()))?;
            (now <= entry.until).then(|| entry.logins.clone())
        })
    }

    /// Keeps an answer for `image` until then; what is past goes.
    pub(super) fn put(
        &mut self,
        (image, scope): (&str, CacheScope),
        account: Option<AccountKey>,
        logins: Arc<Logins>,
        (now, until): (Instant, Instant),
    ) {
        self.0.retain(|_, entry| now <= entry.until);
        if self.0.len() >= MAX {
            return;
        }
        let place = match scope {
            CacheScope::Image => For::Image(image.to_owned()),
            CacheScope::Registry => For::Registry(registry(image)),
            CacheScope::Global => For::All,
        };
        self.0.insert((place, account), Entry { logins, until });
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::protocol::Login;
    use super::*;

    fn logins(user: &str) -> Arc<Logins> {
        let login = Login { username: user.into(), password: "p".into() };
        Arc::new(Logins::from([("r.io".to_owned(), login)]))
    }

    fn account(name: &str, token: Option<&str>) -> AccountKey {
        AccountKey {
            namespace: "n".into(),
            name: name.into(),
            uid: "u".into(),
            annotations: BTreeMap::new(),
            token: token.map(digest),
        }
    }

    #[test]
    fn answers_hold_for_their_scope_and_time() {
        let now = Instant::now();
        let later = |seconds| now + Duration::from_secs(seconds);
        let mut cache = Cache::default();
        let user = |cache: &Cache, image: &str, at| {
            cache.get(image, None, at).map(|found| found["r.io"].username.clone())
        };
        cache.put(("r.io/a", CacheScope::Registry), None, logins("registry"), (now, later(20)));
        cache.put(("r.io/a", CacheScope::Image), None, logins("image"), (now, later(10)));
        assert_eq!(user(&cache, "r.io/a", now).as_deref(), Some("image"));
        assert_eq!(user(&cache, "r.io/b", now).as_deref(), Some("registry"));
        assert_eq!(user(&cache, "other.io/b", now), None);
        assert_eq!(user(&cache, "r.io/a", later(15)).as_deref(), Some("registry"));
        assert_eq!(user(&cache, "r.io/a", later(21)), None);
        cache.put(("x.io/a", CacheScope::Global), None, logins("all"), (later(30), later(40)));
        assert_eq!(cache.0.len(), 1, "what is past is forgotten");
        assert_eq!(user(&cache, "any.io/b", later(30)).as_deref(), Some("all"));
    }

    #[test]
    fn accounts_and_tokens_are_told_apart() {
        let now = Instant::now();
        let until = now + Duration::from_secs(10);
        let mut cache = Cache::default();
        let (one, bound) = (account("one", None), account("one", Some("t1")));
        cache.put(("r.io/a", CacheScope::Image), Some(one.clone()), logins("one"), (now, until));
        cache.put(("r.io/a", CacheScope::Image), Some(bound.clone()), logins("t1"), (now, until));
        let found = |key: Option<&AccountKey>| cache.get("r.io/a", key, now).is_some();
        assert!(found(Some(&one)) && found(Some(&bound)));
        assert!(!found(None));
        assert!(!found(Some(&account("two", None))));
        assert!(!found(Some(&account("one", Some("t2")))));
    }
}
