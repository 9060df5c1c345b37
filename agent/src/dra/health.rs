//! What drivers say of their devices' health, and for how long it counts. Pure.
//!
//! It is on disk in kubelet's file and format: a restart does not make devices unknown whose driver has
//! yet to come back.

use std::collections::{BTreeMap, BTreeSet};

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

use super::wire::health::{DeviceHealth, HealthStatus};

/// Kubelet's name for it, in its root directory.
pub const FILE: &str = "dra_health_state";
/// How long a word counts where the driver does not say.
const COUNTS: SignedDuration = SignedDuration::from_secs(30);
/// Longest message that the API takes.
const MAX_MESSAGE: usize = 1024;

/// What was said of one device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Told {
    /// `Healthy`, `Unhealthy` or `Unknown`.
    pub health: &'static str,
    /// Why; may be empty.
    pub message: String,
    at: Timestamp,
    counts: SignedDuration,
}

/// Pool and name of a device.
pub type DeviceKey = (String, String);

/// What was said, by driver.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Health(BTreeMap<String, BTreeMap<DeviceKey, Told>>);

fn word(health: &str) -> &'static str {
    ["Healthy", "Unhealthy"].into_iter().find(|known| *known == health).unwrap_or("Unknown")
}

fn shortened(message: String) -> String {
    if message.len() <= MAX_MESSAGE {
        return message;
    }
    let mut end = MAX_MESSAGE - 3;
    while !message.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}...", &message[..end])
}

impl Told {
    fn of(told: &DeviceHealth, now: Timestamp) -> Self {
        let health = match told.health() {
            HealthStatus::Healthy => "Healthy",
            HealthStatus::Unhealthy => "Unhealthy",
            HealthStatus::Unknown => "Unknown",
        };
        let counts = match told.health_check_timeout_seconds {
            seconds if seconds > 0 => SignedDuration::from_secs(seconds),
            _ => COUNTS,
        };
        Self { health, message: shortened(told.message.clone()), at: now, counts }
    }

    fn counts(&self, now: Timestamp) -> bool {
        now.duration_since(self.at) <= self.counts
    }

    fn says_the_same(&self, other: &Self) -> bool {
        (self.health, &self.message, self.counts) == (other.health, &other.message, other.counts)
    }
}

impl Health {
    /// The driver told of these; the devices of which it is news.
    pub fn told(
        &mut self,
        driver: &str,
        devices: &[DeviceHealth],
        now: Timestamp,
    ) -> BTreeSet<DeviceKey> {
        let known = self.0.entry(driver.to_owned()).or_default();
        let mut news = BTreeSet::new();
        for told in devices {
            let of = told.device.clone().unwrap_or_default();
            let key = (of.pool_name, of.device_name);
            let told = Told::of(told, now);
            if known.get(&key).is_none_or(|before| !before.says_the_same(&told)) {
                news.insert(key.clone());
            }
            known.insert(key, told);
        }
        news.extend(self.lapse(driver, now));
        news
    }

    /// What no longer counts becomes unknown; the devices of which that is news.
    pub fn lapse(&mut self, driver: &str, now: Timestamp) -> BTreeSet<DeviceKey> {
        let mut news = BTreeSet::new();
        for (key, told) in self.0.get_mut(driver).into_iter().flatten() {
            if told.health != "Unknown" && !told.counts(now) {
                (told.health, told.message, told.at) = ("Unknown", String::new(), now);
                news.insert(key.clone());
            }
        }
        news
    }

    /// When the next word of the driver no longer counts.
    pub fn next_lapse(&self, driver: &str) -> Option<Timestamp> {
        let known = self.0.get(driver).into_iter().flat_map(BTreeMap::values);
        let known = known.filter(|told| told.health != "Unknown");
        known.filter_map(|told| told.at.checked_add(told.counts).ok()).min()
    }

    /// The driver tells nothing any more; the devices of which it had.
    pub fn clear(&mut self, driver: &str) -> BTreeSet<DeviceKey> {
        self.0.remove(driver).into_iter().flatten().map(|(key, _)| key).collect()
    }

    /// Of one device: its health, and why.
    pub fn of(&self, driver: &str, pool: &str, device: &str, now: Timestamp) -> (&str, &str) {
        let key = (pool.to_owned(), device.to_owned());
        let told = self.0.get(driver).and_then(|known| known.get(&key));
        told.filter(|told| told.counts(now)).map_or(("Unknown", ""), |t| (t.health, &t.message))
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct OfDriver {
    #[serde(rename = "Devices", default)]
    devices: Option<BTreeMap<String, Entry>>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Entry {
    pool_name: String,
    device_name: String,
    health: String,
    last_updated: Timestamp,
    /// Nanoseconds.
    health_check_timeout: i64,
    message: String,
}

impl Default for Entry {
    fn default() -> Self {
        Self {
            pool_name: String::new(),
            device_name: String::new(),
            health: String::new(),
            last_updated: Timestamp::UNIX_EPOCH,
            health_check_timeout: 0,
            message: String::new(),
        }
    }
}

/// The text of the file.
pub fn encode(health: &Health) -> Vec<u8> {
    let entry = |((pool, device), told): (&DeviceKey, &Told)| {
        let entry = Entry {
            pool_name: pool.clone(),
            device_name: device.clone(),
            health: told.health.into(),
            last_updated: told.at,
            health_check_timeout: i64::try_from(told.counts.as_nanos()).unwrap_or(i64::MAX),
            message: told.message.clone(),
        };
        (format!("{pool}/{device}"), entry)
    };
    let all: BTreeMap<_, _> = health
        .0
        .iter()
        .map(|(driver, known)| {
            (driver, OfDriver { devices: Some(known.iter().map(entry).collect()) })
        })
        .collect();
    // Maps with texts as keys always have a JSON form.
    serde_json::to_vec(&all).unwrap_or_default()
}

/// What the text says.
pub fn decode(text: &[u8]) -> serde_json::Result<Health> {
    let all: BTreeMap<String, OfDriver> = serde_json::from_slice(text)?;
    let told = |(_, entry): (String, Entry)| {
        let counts = match entry.health_check_timeout {
            nanos if nanos > 0 => SignedDuration::from_nanos(nanos),
            _ => COUNTS,
        };
        let health = word(&entry.health);
        let told = Told { health, message: entry.message, at: entry.last_updated, counts };
        ((entry.pool_name, entry.device_name), told)
    };
    let of = |(driver, own): (String, OfDriver)| {
        (driver, own.devices.into_iter().flatten().map(told).collect())
    };
    Ok(Health(all.into_iter().map(of).collect()))
}

#[cfg(test)]
mod tests {
    use super::super::wire::health::DeviceIdentifier;
    use super::*;

    fn says(device: &str, health: HealthStatus, seconds: i64, message: &str) -> DeviceHealth {
        DeviceHealth {
            device: Some(DeviceIdentifier { pool_name: "p".into(), device_name: device.into() }),
            health: health.into(),
            health_check_timeout_seconds: seconds,
            message: message.into(),
            ..DeviceHealth::default()
        }
    }

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(seconds).unwrap()
    }

    fn keys(devices: &[&str]) -> BTreeSet<DeviceKey> {
        devices.iter().map(|d| ("p".to_owned(), (*d).to_owned())).collect()
    }

    #[test]
    fn a_word_is_news_once_and_counts_for_its_time() {
        let mut health = Health::default();
        let both = [
            says("a", HealthStatus::Healthy, 0, ""),
            says("b", HealthStatus::Unhealthy, 100, "hot"),
        ];
        assert_eq!(health.told("d", &both, at(0)), keys(&["a", "b"]));
        assert_eq!(health.told("d", &both, at(5)), keys(&[]));
        assert_eq!(health.of("d", "p", "a", at(35)), ("Healthy", ""));
        assert_eq!(health.of("d", "p", "a", at(36)), ("Unknown", ""));
        assert_eq!(health.of("d", "p", "b", at(36)), ("Unhealthy", "hot"));
        assert_eq!(health.of("d", "p", "x", at(5)), ("Unknown", ""));
        assert_eq!(health.next_lapse("d"), Some(at(35)));
        let again = [says("b", HealthStatus::Unhealthy, 100, "hotter")];
        assert_eq!(health.told("d", &again, at(40)), keys(&["a", "b"]));
        assert_eq!(health.next_lapse("d"), Some(at(140)));
        assert_eq!(health.clear("d"), keys(&["a", "b"]));
        assert_eq!(health.of("d", "p", "b", at(41)), ("Unknown", ""));
    }

    #[test]
    fn it_is_on_disk_as_kubelet_has_it() {
        let mut health = Health::default();
        health.told("d", &[says("b", HealthStatus::Unhealthy, 2, "hot")], at(1_000_000_000));
        let text = encode(&health);
        assert_eq!(
            String::from_utf8_lossy(&text),
            "{\"d\":{\"Devices\":{\"p/b\":{\"PoolName\":\"p\",\"DeviceName\":\"b\",\
             \"Health\":\"Unhealthy\",\"LastUpdated\":\"2001-09-09T01:46:40Z\",\
             \"HealthCheckTimeout\":2000000000,\"Message\":\"hot\"}}}}"
        );
        assert_eq!(decode(&text).unwrap(), health);
        let go = String::from_utf8_lossy(&text).replace("01:46:40Z", "03:46:40.5+02:00");
        assert!(decode(go.as_bytes()).is_ok());
        assert_eq!(
            decode(b"{\"d\":{\"Devices\":null}}").unwrap().of("d", "p", "b", at(0)).0,
            "Unknown"
        );
    }

    #[test]
    fn long_messages_are_cut_as_kubelet_cuts_them() {
        assert_eq!(shortened("x".repeat(1024)).len(), 1024);
        let cut = shortened("x".repeat(1025));
        assert!(cut.len() == 1024 && cut.ends_with("x..."));
        assert!(shortened("é".repeat(600)).len() <= 1024);
    }
}
