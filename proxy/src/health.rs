//! `/healthz` and `/livez` as upstream's proxy answers them: whether queued changes reach the kernel
//! in time, and whether the node should still get traffic. Pure; time is an argument.

use jiff::Timestamp;
use serde::Serialize;

/// What health is computed from.
#[derive(Clone, Debug)]
pub struct Health {
    /// A change may wait so long before the proxy is unhealthy.
    pub timeout: jiff::SignedDuration,
    /// When the kernel was last as it should be.
    pub last_updated: Option<Timestamp>,
    /// Since when a change has been waiting.
    pub pending_since: Option<Timestamp>,
    /// The last turn of the loop.
    pub last_turn: Option<Timestamp>,
    /// The node's object has been read, or awaited for long enough: with the control plane away a
    /// node that serves must not lose its traffic.
    pub node_known: bool,
    /// The node is being deleted.
    pub being_deleted: bool,
}

#[derive(Debug, Serialize)]
struct FamilyBody {
    #[serde(rename = "lastUpdated")]
    last_updated: String,
    healthy: bool,
}

#[derive(Debug, Serialize)]
struct Families {
    #[serde(rename = "IPv4")]
    ipv4: FamilyBody,
    #[serde(rename = "IPv6")]
    ipv6: FamilyBody,
}

/// The answer's body.
#[derive(Debug, Serialize)]
pub struct Body {
    #[serde(rename = "lastUpdated")]
    last_updated: String,
    #[serde(rename = "currentTime")]
    current_time: String,
    #[serde(rename = "nodeEligible", skip_serializing_if = "Option::is_none")]
    node_eligible: Option<bool>,
    healthy: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<Families>,
}

impl Default for Health {
    fn default() -> Self {
        Health {
            timeout: jiff::SignedDuration::from_secs(60),
            last_updated: None,
            pending_since: None,
            last_turn: None,
            node_known: false,
            being_deleted: false,
        }
    }
}

impl Health {
    /// Whether changes reach the kernel and the loop turns.
    pub fn is_healthy(&self, now: Timestamp) -> bool {
        let late =
            |since: Option<Timestamp>| since.is_some_and(|t| now.duration_since(t) >= self.timeout);
        !late(self.pending_since) && !late(self.last_turn)
    }

    /// Status code and body; `/healthz` also tells whether the node is eligible.
    pub fn answer(&self, now: Timestamp, healthz: bool) -> (u16, Body) {
        let healthy = self.is_healthy(now);
        let eligible = self.node_known && !self.being_deleted;
        let good = healthy && (eligible || !healthz);
        let zero = || "0001-01-01T00:00:00Z".to_owned();
        let updated = self.last_updated.map_or_else(zero, |t| t.to_string());
        let family = || FamilyBody { last_updated: updated.clone(), healthy };
        let body = Body {
            // Of a healthy proxy it is always recent, as load balancers have come to expect.
            last_updated: if good { now.to_string() } else { updated.clone() },
            current_time: now.to_string(),
            node_eligible: healthz.then_some(eligible),
            healthy,
            status: self.last_updated.map(|_| Families { ipv4: family(), ipv6: family() }),
        };
        (if good { 200 } else { 503 }, body)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(1_700_000_000 + seconds).unwrap()
    }

    #[test]
    fn a_change_that_waits_too_long_is_unhealthy() {
        let mut health =
            Health { last_updated: Some(at(0)), node_known: true, ..Health::default() };
        assert_eq!(health.answer(at(1000), true).0, 200);
        health.pending_since = Some(at(1000));
        assert_eq!(health.answer(at(1059), true).0, 200);
        assert_eq!(health.answer(at(1060), true).0, 503);
        assert_eq!(health.answer(at(1060), false).0, 503);
        let body = serde_json::to_value(health.answer(at(1060), true).1).unwrap();
        assert_eq!(body["lastUpdated"], at(0).to_string());
        assert_eq!(body["healthy"], false);
    }

    #[test]
    fn a_node_that_is_not_known_gets_no_traffic_yet() {
        let mut health = Health { last_updated: Some(at(0)), ..Health::default() };
        assert_eq!([true, false].map(|healthz| health.answer(at(5), healthz).0), [503, 200]);
        health.node_known = true;
        assert_eq!(health.answer(at(5), true).0, 200);
    }

    #[test]
    fn a_node_that_goes_away_is_alive_but_gets_no_traffic() {
        let mut health =
            Health { last_updated: Some(at(0)), being_deleted: true, ..Health::default() };
        assert_eq!(health.answer(at(5), true).0, 503);
        health.node_known = true;
        let (code, body) = health.answer(at(5), true);
        assert_eq!(
            (code, serde_json::to_value(&body).unwrap()["nodeEligible"].clone()),
            (503, false.into())
        );
        let (code, body) = health.answer(at(5), false);
        let body = serde_json::to_value(&body).unwrap();
        assert_eq!((code, body.get("nodeEligible")), (200, None));
        assert_eq!(body["lastUpdated"], at(5).to_string());
    }
}
