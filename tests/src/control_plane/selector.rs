//! Label and field selectors, parsed and matched as the API server does.

use serde_json::Value;

#[derive(Clone, Debug, PartialEq, Eq)]
enum Requirement {
    In(String, Vec<String>),
    NotIn(String, Vec<String>),
    Exists(String),
    Absent(String),
}

/// Which objects a list or watch is about.
#[derive(Clone, Debug, Default)]
pub struct Selector {
    labels: Vec<Requirement>,
    fields: Vec<(String, String, bool)>,
}

impl Selector {
    /// Parses the two query parameters.
    ///
    /// # Errors
    /// The sentence for a 400.
    pub fn parse(labels: &str, fields: &str) -> Result<Self, String> {
        let labels = split_outside_brackets(labels)
            .into_iter()
            .map(parse_requirement)
            .collect::<Result<_, _>>()?;
        let mut parsed = Vec::new();
        for term in fields.split(',').filter(|t| !t.is_empty()) {
            let (key, value, equal) = if let Some((k, v)) = term.split_once("!=") {
                (k, v, false)
            } else if let Some((k, v)) = term.split_once("==").or_else(|| term.split_once('=')) {
                (k, v, true)
            } else {
                return Err(format!("invalid field selector: {term:?}; can't understand it"));
            };
            parsed.push((key.to_owned(), value.to_owned(), equal));
        }
        Ok(Self { labels, fields: parsed })
    }

    /// The value that field `path` is required to have, if it is.
    pub fn required_field(&self, path: &str) -> Option<&str> {
        self.fields.iter().find(|(k, _, equal)| *equal && k == path).map(|(_, v, _)| v.as_str())
    }

    /// Whether `object` is selected.
    pub fn matches(&self, object: &Value) -> bool {
        let labels = &object["metadata"]["labels"];
        self.labels.iter().all(|r| match r {
            Requirement::In(k, vs) => labels[k].as_str().is_some_and(|v| vs.iter().any(|w| w == v)),
            Requirement::NotIn(k, vs) => {
                !labels[k].as_str().is_some_and(|v| vs.iter().any(|w| w == v))
            }
            Requirement::Exists(k) => labels[k].is_string(),
            Requirement::Absent(k) => !labels[k].is_string(),
        }) && self.fields.iter().all(|(path, value, equal)| {
            let mut at = object;
            for step in path.split('.') {
                at = &at[step];
            }
            let actual = match at {
                Value::String(s) => s.clone(),
                Value::Null => String::new(),
                other => other.to_string(),
            };
            (actual == *value) == *equal
        })
    }
}

fn split_outside_brackets(text: &str) -> Vec<&str> {
    let (mut depth, mut start, mut parts) = (0, 0, Vec::new());
    for (i, c) in text.char_indices() {
        match c {
            '(' => depth += 1,
            ')' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(&text[start..i]);
                start = i + 1;
            }
            _ => {}
        }
    }
    parts.push(&text[start..]);
    parts.into_iter().map(str::trim).filter(|p| !p.is_empty()).collect()
}

fn parse_requirement(term: &str) -> Result<Requirement, String> {
    let set = |rest: &str| -> Option<Vec<String>> {
        let inner = rest.trim().strip_prefix('(')?.strip_suffix(')')?;
        Some(inner.split(',').map(|v| v.trim().to_owned()).collect())
    };
    let bad = || format!("unable to parse requirement: {term:?}");
    if let Some((key, rest)) = term.split_once(" notin ") {
        return Ok(Requirement::NotIn(key.trim().into(), set(rest).ok_or_else(bad)?));
    }
    if let Some((key, rest)) = term.split_once(" in ") {
        return Ok(Requirement::In(key.trim().into(), set(rest).ok_or_else(bad)?));
    }
    if let Some((key, value)) = term.split_once("!=") {
        return Ok(Requirement::NotIn(key.trim().into(), vec![value.trim().into()]));
    }
    if let Some((key, value)) = term.split_once("==").or_else(|| term.split_once('=')) {
        return Ok(Requirement::In(key.trim().into(), vec![value.trim().into()]));
    }
    if let Some(key) = term.strip_prefix('!') {
        return Ok(Requirement::Absent(key.trim().into()));
    }
    if term.contains(char::is_whitespace) {
        return Err(bad());
    }
    Ok(Requirement::Exists(term.into()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn selects_as_the_api_does() {
        let object = json!({"metadata": {"name": "a", "labels": {"app": "web", "tier": "1"}},
            "spec": {"nodeName": "n1", "unschedulable": true}});
        for (labels, fields, expected) in [
            ("", "", true),
            ("app=web", "", true),
            ("app==web,tier!=2", "", true),
            ("app in (db, web)", "", true),
            ("app notin (db, web)", "", false),
            ("!missing,app", "", true),
            ("missing", "", false),
            ("missing!=x", "", true),
            ("", "spec.nodeName=n1", true),
            ("", "spec.nodeName!=n1", false),
            ("", "spec.unschedulable=true,metadata.name=a", true),
            ("", "status.phase=", true),
        ] {
            let selector = Selector::parse(labels, fields).unwrap();
            assert_eq!(selector.matches(&object), expected, "{labels:?} {fields:?}");
        }
        assert!(Selector::parse("a b", "").is_err());
        assert!(Selector::parse("", "nonsense").is_err());
    }
}
