//! Which images a pattern such as `*.registry.io:8080/path` is for: the rule of kubelet's keyring, by
//! which both the entries of docker configuration and `matchImages` are read. Pure.

/// Whether `pattern` is for `repository` (host, port and path, without a tag): as many parts of the
/// host's name, each of which matches; the same port; a path that begins with the pattern's.
pub(crate) fn covers(pattern: &str, repository: &str) -> bool {
    let ((host, path), (of_host, of_path)) = (split(pattern), split(repository));
    let ((name, port), (of_name, of_port)) = (host_and_port(host), host_and_port(of_host));
    let same_host = port == of_port
        && name.split('.').count() == of_name.split('.').count()
        && name.split('.').zip(of_name.split('.')).all(|(part, text)| glob(part, text));
    same_host && of_path.starts_with(path)
}

/// Host, and the path with its slash.
fn split(text: &str) -> (&str, &str) {
    text.find('/').map_or((text, ""), |slash| text.split_at(slash))
}

fn host_and_port(host: &str) -> (&str, &str) {
    let (name, port) = match host.rsplit_once(':') {
        // Colons within brackets are an IPv6 address's.
        Some((name, port)) if !port.contains(']') => (name, port),
        _ => (host, ""),
    };
    let address = name.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    (address.filter(|inner| inner.contains(':')).unwrap_or(name), port)
}

/// Whether `pattern` could be one at all; if not, why.
pub(crate) fn check(pattern: &str) -> Result<(), String> {
    if let Some(bad) = pattern.chars().find(|c| c.is_whitespace() || c.is_control()) {
        return Err(format!("{bad:?} cannot be in a registry's name or path"));
    }
    if pattern.contains("://") {
        return Err("must not have a scheme such as https://".to_owned());
    }
    let (host, _) = split(pattern);
    let (name, port) = host_and_port(host);
    if !port.bytes().all(|b| b.is_ascii_digit()) {
        return Err(format!("port {port:?} is no number (a port cannot have wildcards)"));
    }
    if !name.split('.').all(is_glob) {
        return Err("has a [ without its ], or ends in a backslash".to_owned());
    }
    Ok(())
}

/// One element of a pattern.
enum Element<'a> {
    Any,
    One,
    Char(char),
    Class(&'a str),
}

/// The first element of `pattern` and what is left; `None` if it is none.
fn element(pattern: &str) -> Option<(Element<'_>, &str)> {
    let mut chars = pattern.chars();
    let first = chars.next()?;
    let rest = chars.as_str();
    Some(match first {
        '*' => (Element::Any, rest),
        '?' => (Element::One, rest),
        '[' => {
            // The class's first character may be a bracket.
            let end = rest.char_indices().skip(1).find(|(_, c)| *c == ']')?.0;
            (Element::Class(&rest[..end]), &rest[end + 1..])
        }
        '\\' => {
            let escaped = chars.next()?;
            (Element::Char(escaped), chars.as_str())
        }
        other => (Element::Char(other), rest),
    })
}

fn is_glob(mut pattern: &str) -> bool {
    while !pattern.is_empty() {
        let Some((_, rest)) = element(pattern) else { return false };
        pattern = rest;
    }
    true
}

/// Shell's wildcards in one part of a name. Goes back to the last `*` only, so its time is bounded by
/// the product of both lengths.
fn glob(pattern: &str, text: &str) -> bool {
    let (mut left, mut rest) = (pattern, text);
    let mut star: Option<(&str, &str)> = None;
    loop {
        let next = element(left);
        if let Some((Element::Any, after)) = next {
            star = Some((after, rest));
            left = after;
            continue;
        }
        let mut chars = rest.chars();
        let matched = match (next, chars.next()) {
            (None, None) => return left.is_empty(),
            (Some((Element::One, after)), Some(_)) => Some(after),
            (Some((Element::Char(wanted), after)), Some(found)) if wanted == found => Some(after),
            (Some((Element::Class(class), after)), Some(found)) if in_class(class, found) => {
                Some(after)
            }
            _ => None,
        };
        if let Some(after) = matched {
            (left, rest) = (after, chars.as_str());
            continue;
        }
        let Some((after, from)) = star else { return false };
        let mut shorter = from.chars();
        if shorter.next().is_none() {
            return false;
        }
        star = Some((after, shorter.as_str()));
        (left, rest) = (after, shorter.as_str());
    }
}

/// `a-z`, `abc`, `^0-9`.
fn in_class(class: &str, found: char) -> bool {
    let (negated, class) = class.strip_prefix('^').map_or((false, class), |rest| (true, rest));
    let chars: Vec<char> = class.chars().collect();
    let mut at = 0;
    let mut inside = false;
    while at < chars.len() {
        if at + 2 < chars.len() && chars[at + 1] == '-' {
            inside |= (chars[at]..=chars[at + 2]).contains(&found);
            at += 3;
        } else {
            inside |= chars[at] == found;
            at += 1;
        }
    }
    inside != negated
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn patterns_are_for_the_images_that_kubelet_says() {
        for (pattern, image, is_for) in [
            ("gcr.io", "gcr.io/a/b", true),
            ("gcr.io", "eu.gcr.io/a", false),
            ("*.azurecr.io", "me.azurecr.io/a", true),
            ("*.azurecr.io", "a.b.azurecr.io/a", false),
            ("*.*.registry.io", "a.b.registry.io/x", true),
            ("k8s.*", "k8s.io/x", true),
            ("k8s.*.io", "k8s.gcr.io/x", true),
            ("app*.k8s.io", "apple.k8s.io/x", true),
            ("*a*b.io", "xaxxb.io/x", true),
            ("*a*b.io", "xbxxa.io/x", false),
            ("r[0-9].io", "r7.io/x", true),
            ("r[^0-9].io", "r7.io/x", false),
            ("r?.io", "r.io/x", false),
            ("registry.io:8080/path", "registry.io:8080/path/img", true),
            ("registry.io:8080/path", "registry.io:8080/pathology", true),
            ("registry.io:8080/path", "registry.io/path/img", false),
            ("registry.io", "registry.io:8080/img", false),
            ("registry.io/", "registry.io/img", true),
            ("[::1]:5000", "[::1]:5000/img", true),
            ("[::1]", "[::1]:5000/img", false),
            ("*.dkr.ecr.*.amazonaws.com", "1.dkr.ecr.eu-west-1.amazonaws.com/x", true),
            ("docker.io/library", "docker.io/library/busybox", true),
        ] {
            assert_eq!(covers(pattern, image), is_for, "{pattern} {image}");
        }
    }

    #[test]
    fn what_is_no_pattern_is_told() {
        for (pattern, said) in [
            ("a b", "' '"),
            ("https://r.io", "scheme"),
            ("r.io:*", "\"*\" is no number"),
            ("[r.io/x", "without its ]"),
        ] {
            let error = check(pattern).unwrap_err();
            assert!(error.contains(said), "{pattern}: {error}");
        }
        for pattern in ["*.*.r.io:5000/a/b", "r.io", "[::1]:5000", "r[a-z].io"] {
            assert_eq!(check(pattern), Ok(()), "{pattern}");
        }
    }

    proptest! {
        #[test]
        fn a_name_is_a_pattern_for_itself_and_a_star_for_all(
            name in "[a-z0-9-]{1,8}", head in 0usize..8, tail in 0usize..8,
        ) {
            prop_assert!(glob(&name, &name));
            let (head, tail) = (head.min(name.len()), tail.min(name.len()));
            let kept = format!("{}*{}", &name[..head], &name[tail.max(head)..]);
            prop_assert!(glob(&kept, &name));
        }

        #[test]
        fn any_text_ends(pattern in ".{0,12}", text in ".{0,12}") {
            let _ = (glob(&pattern, &text), check(&pattern), covers(&pattern, &text));
        }
    }
}
