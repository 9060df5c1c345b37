//! Bootstrap tokens: `<id>.<secret>`, 6 and 16 characters of `[a-z0-9]`.

use std::fmt;

/// A bootstrap token. Only its id may be shown.
#[derive(Clone, PartialEq, Eq)]
pub struct BootstrapToken {
    id: String,
    secret: String,
}

/// Not a bootstrap token. The text itself is not repeated: it may be a secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the token is not of the form abcdef.0123456789abcdef (6 and 16 lower-case letters or digits); \
     `kubeadm token create --print-join-command` on the control plane prints a valid one"
)]
pub struct BadToken;

impl BootstrapToken {
    /// Reads `text`, leaving out white space around it.
    pub fn parse(text: &str) -> Result<Self, BadToken> {
        let (id, secret) = text.trim().split_once('.').ok_or(BadToken)?;
        let plain = |s: &str| s.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        if id.len() != 6 || secret.len() != 16 || !plain(id) || !plain(secret) {
            return Err(BadToken);
        }
        Ok(Self { id: id.to_owned(), secret: secret.to_owned() })
    }

    /// The public half.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The secret half, key of the signature.
    pub fn secret(&self) -> &str {
        &self.secret
    }

    /// The whole, as sent in an `Authorization` header.
    pub fn bearer(&self) -> String {
        format!("{}.{}", self.id, self.secret)
    }
}

impl fmt::Debug for BootstrapToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BootstrapToken({}.***)", self.id)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn only_the_exact_form_is_taken_and_the_secret_is_never_shown() {
        let token = BootstrapToken::parse(" abcdef.0123456789abcdef\n").unwrap();
        assert_eq!(token.bearer(), "abcdef.0123456789abcdef");
        assert_eq!(format!("{token:?}"), "BootstrapToken(abcdef.***)");
        for bad in
            ["", "abcdef", "abcdef.0123", "ABCDEF.0123456789abcdef", "abcdef.0123456789abcdeg!"]
        {
            assert_eq!(BootstrapToken::parse(bad), Err(BadToken), "{bad}");
        }
    }
}
