//! Image references: is it one, which registry does it name, which tag is meant. Pure.

/// Docker Hub, by the name that credentials and references know it.
pub const DEFAULT_REGISTRY: &str = "docker.io";

/// A reference that cannot be one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "Failed to apply default image tag \"{0}\": couldn't parse image name \"{0}\": invalid reference format"
)]
pub struct InvalidImageName(pub String);

/// A reference taken apart; `repository` is with its registry, as written in full.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageName {
    /// `registry/path`, such as `docker.io/library/busybox`.
    pub repository: String,
    /// Host and port of the registry.
    pub registry: String,
    /// The reference as given, with `:latest` added where it names neither tag nor digest.
    pub full: String,
    /// Whether the tag is `latest`, by name or by default.
    pub latest: bool,
}

fn is_component(text: &str) -> bool {
    // Lower-case words, joined by one of `.`, `_`, `__` or dashes.
    !text.is_empty()
        && text.bytes().all(|b| {
            b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'_' | b'-')
        })
        && text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text.ends_with(|c: char| c.is_ascii_alphanumeric())
        && !text.contains("..")
        && !text.contains("___")
}

fn is_host(text: &str) -> bool {
    let bytes = |t: &str| t.bytes().all(|b| b.is_ascii_alphanumeric() || b"-.".contains(&b));
    if let Some(rest) = text.strip_prefix('[') {
        return rest.split_once(']').is_some_and(|(ip, port)| {
            ip.parse::<std::net::Ipv6Addr>().is_ok()
                && (port.is_empty()
                    || port.strip_prefix(':').is_some_and(|p| p.parse::<u16>().is_ok()))
        });
    }
    let (host, port) = text.split_once(':').unwrap_or((text, "80"));
    !host.is_empty() && bytes(host) && port.parse::<u16>().is_ok()
}

fn is_tag(text: &str) -> bool {
    (1..=128).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b))
        && !text.starts_with(['.', '-'])
}

fn is_digest(text: &str) -> bool {
    text.split_once(':').is_some_and(|(kind, hex)| {
        !kind.is_empty() && hex.len() >= 32 && hex.bytes().all(|b| b.is_ascii_hexdigit())
    })
}

/// Takes a reference apart.
pub fn parse_image(text: &str) -> Result<ImageName, InvalidImageName> {
    let invalid = || InvalidImageName(text.to_owned());
    let (rest, digest) = match text.split_once('@') {
        Some((rest, digest)) if is_digest(digest) => (rest, Some(digest)),
        Some(_) => return Err(invalid()),
        None => (text, None),
    };
    let last = rest.rfind('/').map_or(0, |i| i + 1);
    let (name, tag) = match rest[last..].split_once(':') {
        Some((_, tag)) if is_tag(tag) => (&rest[..rest.len() - tag.len() - 1], Some(tag)),
        Some(_) => return Err(invalid()),
        None => (rest, None),
    };
    let (registry, path) = match name.split_once('/') {
        Some((first, path))
            if first.contains(['.', ':', '['])
                || first == "localhost"
                || first.chars().any(|c| c.is_ascii_uppercase()) =>
        {
            (first, path.to_owned())
        }
        Some(_) => (DEFAULT_REGISTRY, name.to_owned()),
        None => (DEFAULT_REGISTRY, format!("library/{name}")),
    };
    let registry = if registry == "index.docker.io" { DEFAULT_REGISTRY } else { registry };
    if !is_host(registry) || path.len() > 255 || !path.split('/').all(is_component) {
        return Err(invalid());
    }
    let untagged = tag.is_none() && digest.is_none();
    Ok(ImageName {
        repository: format!("{registry}/{path}"),
        registry: registry.to_owned(),
        full: if untagged { format!("{text}:latest") } else { text.to_owned() },
        latest: digest.is_none() && tag.is_none_or(|t| t == "latest"),
    })
}

/// A reference as it is given, but for its tag and digest.
///
/// # Errors
/// It is none.
pub fn without_tag(text: &str) -> Result<&str, InvalidImageName> {
    parse_image(text)?;
    let rest = text.split_once('@').map_or(text, |(rest, _)| rest);
    let last = rest.rfind('/').map_or(0, |slash| slash + 1);
    Ok(rest[last..].find(':').map_or(rest, |colon| &rest[..last + colon]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_come_apart() {
        for (text, repository, full, latest) in [
            ("busybox", "docker.io/library/busybox", "busybox:latest", true),
            ("busybox:1.36", "docker.io/library/busybox", "busybox:1.36", false),
            ("user/app", "docker.io/user/app", "user/app:latest", true),
            ("localhost:5000/a/b:x", "localhost:5000/a/b", "localhost:5000/a/b:x", false),
            ("ghcr.io/o/r", "ghcr.io/o/r", "ghcr.io/o/r:latest", true),
            ("[::1]:5000/a", "[::1]:5000/a", "[::1]:5000/a:latest", true),
        ] {
            let name = parse_image(text).unwrap();
            assert_eq!((&*name.repository, &*name.full, name.latest), (repository, full, latest));
        }
        let digest = format!("r.io/a@sha256:{}", "0".repeat(64));
        assert_eq!(parse_image(&digest).unwrap().full, digest);
    }

    #[test]
    fn tags_and_digests_come_off_and_nothing_else_changes() {
        let digest = format!("sha256:{}", "0".repeat(64));
        for (text, name) in [
            ("busybox", "busybox"),
            ("busybox:1", "busybox"),
            ("localhost:5000/a/b:x", "localhost:5000/a/b"),
            ("localhost:5000/a", "localhost:5000/a"),
            (&format!("r.io/a:1@{digest}"), "r.io/a"),
            (&format!("r.io/a@{digest}"), "r.io/a"),
        ] {
            assert_eq!(without_tag(text).unwrap(), name, "{text}");
        }
        assert!(without_tag("a b").is_err());
    }

    #[test]
    fn what_is_none_is_refused() {
        for text in [
            "",
            "UPPER",
            "a//b",
            "a:",
            "a@sha256:zz",
            "-a",
            "a b",
            "a:b:c",
            "/a",
            "a/",
            "h:99999/a",
        ] {
            assert!(parse_image(text).is_err(), "{text}");
        }
    }
}
