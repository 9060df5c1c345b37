//! Service-account tokens in projected volumes: asked for once, renewed before they end.
//!
//! The token file itself is the memory of what was issued: after a restart a token that is still
//! good is used on, without a request.

use base64::Engine as _;
use jiff::Timestamp;

/// When a token was issued and when it ends, in seconds since the epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Lifetime {
    issued: i64,
    expires: i64,
}

impl Lifetime {
    /// From the token's own claims. Nothing is verified: it is the API server's to judge.
    pub(super) fn of(token: &[u8]) -> Option<Self> {
        let token = std::str::from_utf8(token).ok()?;
        let claims = token.split('.').nth(1)?;
        let claims = base64::engine::general_purpose::URL_SAFE_NO_PAD
            .decode(claims.trim_end_matches('='))
            .ok()?;
        let claims: serde_json::Value = serde_json::from_slice(&claims).ok()?;
        let seconds = |name: &str| claims.get(name)?.as_f64().map(|seconds| seconds as i64);
        let expires = seconds("exp")?;
        Some(Self { issued: seconds("iat").unwrap_or(expires - 3600), expires })
    }

    /// Issued now, ending then.
    pub(super) fn new(issued: Timestamp, expires: Timestamp) -> Self {
        Self { issued: issued.as_second(), expires: expires.as_second() }
    }

    /// From when on it should be renewed: at 80 % of its life, and after a day at the latest.
    pub(super) fn renew_at(self) -> i64 {
        let life = (self.expires - self.issued).max(0);
        self.issued + (life / 5 * 4).min(24 * 3600)
    }

    /// Whether it is still accepted at `now`.
    pub(super) fn is_valid(self, now: i64) -> bool {
        now < self.expires
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(claims: &str) -> Vec<u8> {
        let encode = |text: &str| base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(text);
        format!("{}.{}.sig", encode("{}"), encode(claims)).into_bytes()
    }

    #[test]
    fn a_token_is_renewed_at_four_fifths_of_its_life() {
        let life = Lifetime::of(&token(r#"{"iat":1000,"exp":4600}"#)).unwrap();
        assert_eq!(life.renew_at(), 1000 + 2880);
        assert!(life.is_valid(4599) && !life.is_valid(4600));
        let year = Lifetime::of(&token(r#"{"iat":0,"exp":31536000}"#)).unwrap();
        assert_eq!(year.renew_at(), 86_400);
        for odd in [&b"nonsense"[..], b"a.b.c", b"", b"\xff.\xff"] {
            assert_eq!(Lifetime::of(odd), None);
        }
    }
}
