//! Image references as people write them, normalised as Docker and containerd do.
//!
//! Grammar: <https://github.com/distribution/reference>. Short names get `docker.io` and
//! `library/`; a reference without tag or digest means `:latest`.

use std::fmt;

use super::error::ImageError;

/// A normalised reference: registry, repository, and a tag, a digest or both.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ImageReference {
    registry: String,
    repository: String,
    tag: Option<String>,
    digest: Option<String>,
}

impl ImageReference {
    /// Parses and normalises `text`.
    ///
    /// # Errors
    /// [`ImageError::InvalidReference`] with the rule that is broken.
    pub fn parse(text: &str) -> Result<Self, ImageError> {
        let fail = |reason: &str| ImageError::InvalidReference {
            reference: text.to_owned(),
            reason: reason.to_owned(),
        };
        if text.is_empty() {
            return Err(fail("it is empty"));
        }
        if is_sha256_hex(text) {
            return Err(fail("it is an image's id and names no repository"));
        }
        if text.len() > 1024 {
            return Err(fail("it is longer than 1024 characters"));
        }
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => (rest, Some(digest)),
            None => (text, None),
        };
        if let Some(digest) = digest {
            check_digest(digest).map_err(fail)?;
        }
        // A colon after the last slash is a tag; an earlier one is the registry's port.
        let (name, tag) = match rest.rfind(':') {
            Some(at) if !rest[at..].contains('/') => (&rest[..at], Some(&rest[at + 1..])),
            _ => (rest, None),
        };
        if let Some(tag) = tag {
            check_tag(tag).map_err(fail)?;
        }
        let (registry, path) = match name.split_once('/') {
            Some((first, path)) if is_registry(first) => (first, path),
            _ => ("docker.io", name),
        };
        let registry = if registry == "index.docker.io" { "docker.io" } else { registry };
        check_registry(registry).map_err(fail)?;
        let repository = if registry == "docker.io" && !path.contains('/') {
            format!("library/{path}")
        } else {
            path.to_owned()
        };
        check_repository(&repository).map_err(fail)?;
        let tag = match (tag, digest) {
            (None, None) => Some("latest".to_owned()),
            (tag, _) => tag.map(str::to_owned),
        };
        Ok(Self {
            registry: registry.to_owned(),
            repository,
            tag,
            digest: digest.map(str::to_owned),
        })
    }

    /// The registry's host and port, such as `docker.io`.
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// The repository in the registry, such as `library/busybox`.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The tag, if one was given or implied.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest of manifest or index, with its algorithm.
    pub fn digest(&self) -> Option<&str> {
        self.digest.as_deref()
    }

    /// Registry and repository, without tag and digest.
    pub fn name(&self) -> String {
        format!("{}/{}", self.registry, self.repository)
    }

    /// `name:tag`, as listed in an image's `repo_tags`; none for a reference by digest.
    pub fn repo_tag(&self) -> Option<String> {
        match (&self.tag, &self.digest) {
            (Some(tag), None) => Some(format!("{}:{tag}", self.name())),
            _ => None,
        }
    }

    /// `name@digest`, as listed in an image's `repo_digests`.
    pub fn repo_digest(&self, digest: &str) -> String {
        format!("{}@{digest}", self.name())
    }
}

impl fmt::Display for ImageReference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

/// The first component is a registry if it looks like a host: a dot, a port, upper case, or `localhost`.
fn is_registry(first: &str) -> bool {
    first == "localhost"
        || first.contains(['.', ':'])
        || first.chars().any(|c| c.is_ascii_uppercase())
}

fn check_registry(registry: &str) -> Result<(), &'static str> {
    let (host, port) = match registry.rfind(':') {
        Some(at) if !registry.ends_with(']') => (&registry[..at], Some(&registry[at + 1..])),
        _ => (registry, None),
    };
    if port.is_some_and(|port| port.parse::<u16>().is_err()) {
        return Err("the registry's port is not a number between 0 and 65535");
    }
    if let Some(v6) = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')) {
        return v6
            .parse::<std::net::Ipv6Addr>()
            .map(|_| ())
            .map_err(|_| "the registry's IPv6 address is malformed");
    }
    let label = |label: &str| {
        !label.is_empty()
            && label.chars().all(|c| c.is_ascii_alphanumeric() || c == '-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    if host.split('.').all(label) { Ok(()) } else { Err("the registry is not a host name") }
}

fn check_repository(repository: &str) -> Result<(), &'static str> {
    if repository.len() > 255 {
        return Err("the repository is longer than 255 characters");
    }
    if repository.chars().any(|c| c.is_ascii_uppercase()) {
        return Err("the repository must be lowercase");
    }
    let component = |part: &str| {
        let alnum = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
        // Separators stand between alphanumerics: one dot, one or two underscores, any number of dashes.
        part.starts_with(alnum)
            && part.ends_with(alnum)
            && part.chars().all(|c| alnum(c) || matches!(c, '.' | '_' | '-'))
            && part
                .split(alnum)
                .all(|s| matches!(s, "" | "." | "_" | "__") || s.chars().all(|c| c == '-'))
    };
    if repository.split('/').all(component) {
        Ok(())
    } else {
        Err("the repository has characters other than a-z, 0-9 and single separators")
    }
}

fn check_tag(tag: &str) -> Result<(), &'static str> {
    let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    if tag.is_empty() || tag.len() > 128 {
        return Err("the tag must have 1 to 128 characters");
    }
    if tag.starts_with(word) && tag.chars().all(|c| word(c) || matches!(c, '.' | '-')) {
        Ok(())
    } else {
        Err("the tag has characters other than letters, digits, '_', '.' and '-'")
    }
}

/// Checks `sha256:<64 lowercase hex>`; other algorithms are refused, as nothing here could verify them.
pub(crate) fn check_digest(digest: &str) -> Result<(), &'static str> {
    let Some(hex) = digest.strip_prefix("sha256:") else {
        return Err("the digest's algorithm is not sha256");
    };
    if is_sha256_hex(hex) { Ok(()) } else { Err("the digest is not 64 lowercase hex digits") }
}

fn is_sha256_hex(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_normalised() {
        for (text, want) in [
            ("busybox", "docker.io/library/busybox:latest"),
            ("busybox:1.36", "docker.io/library/busybox:1.36"),
            ("user/app", "docker.io/user/app:latest"),
            ("docker.io/busybox", "docker.io/library/busybox:latest"),
            ("index.docker.io/busybox", "docker.io/library/busybox:latest"),
            ("localhost/app", "localhost/app:latest"),
            ("localhost:5000/app:v1", "localhost:5000/app:v1"),
            ("127.0.0.1:5000/a/b/c", "127.0.0.1:5000/a/b/c:latest"),
            ("[::1]:5000/app", "[::1]:5000/app:latest"),
            ("registry.k8s.io/pause:3.10", "registry.k8s.io/pause:3.10"),
            ("quay.io/a/b_c__d-e.f:T_1.2-3", "quay.io/a/b_c__d-e.f:T_1.2-3"),
        ] {
            assert_eq!(ImageReference::parse(text).unwrap().to_string(), want);
        }
        let digest = format!("sha256:{}", "a1".repeat(32));
        let by_digest = ImageReference::parse(&format!("busybox@{digest}")).unwrap();
        assert_eq!(by_digest.repo_tag(), None);
        assert_eq!(by_digest.digest(), Some(digest.as_str()));
        let both = ImageReference::parse(&format!("busybox:1@{digest}")).unwrap();
        assert_eq!((both.tag(), both.repo_tag()), (Some("1"), None));
    }

    #[test]
    fn malformed_references_are_refused_with_a_reason() {
        for (text, reason) in [
            ("", "empty"),
            ("Busybox", "lowercase"),
            ("busy box", "characters other"),
            ("busybox:", "tag"),
            ("busybox:a b", "tag"),
            ("busybox@sha256:12", "64 lowercase hex"),
            ("busybox@md5:12", "not sha256"),
            ("host:99999/app", "port"),
            ("-host.x/app", "host name"),
            ("a//b", "characters other"),
            ("../../etc", "host name"),
            ("example.com/", "characters other"),
            (&"a".repeat(300), "255"),
            (&"a".repeat(64), "image's id"),
        ] {
            let error = ImageReference::parse(text).unwrap_err().to_string();
            assert!(error.contains(reason), "{text:?}: {error}");
        }
    }
}
