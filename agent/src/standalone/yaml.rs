//! YAML and JSON text to plain values, document by document, within bounds.
//!
//! Documents are cut apart before they are parsed, so that a broken one costs only itself. YAML is
//! read as Kubernetes reads it: `yes` and `on` are booleans, `0644` is octal, a repeated key is an
//! error. Alias bombs, deep nesting and huge files end at the budget.

use serde_json::Value;

/// A manifest file larger than this is refused unread, in bytes.
pub const MAX_FILE: u64 = 8 << 20;

/// Why a document is not a value.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum YamlError {
    /// The parser's words, with line and column counted in the file.
    #[error("{0}")]
    Syntax(String),
    /// A list or a scalar where an object must be.
    #[error("must be an object (kind: ...), not {0}")]
    NotAnObject(&'static str),
}

/// One document of a file.
#[derive(Debug)]
pub struct Document {
    /// Counted from 1, empty documents left out.
    pub number: usize,
    /// What it says.
    pub value: Result<Value, YamlError>,
}

/// The documents of `text`, which must be objects; empty ones (only blanks and comments) are left
/// out.
pub fn documents(text: &[u8]) -> Vec<Document> {
    let mut found = values(text);
    for document in &mut found {
        let refused = match &document.value {
            Ok(Value::Array(_)) => "a list",
            Ok(Value::Null) => "null",
            Ok(Value::Bool(_) | Value::Number(_) | Value::String(_)) => "a scalar",
            Ok(Value::Object(_)) | Err(_) => continue,
        };
        document.value = Err(YamlError::NotAnObject(refused));
    }
    found
}

/// The documents of `text`, whatever they are.
pub fn values(text: &[u8]) -> Vec<Document> {
    let text = text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text);
    let text = match std::str::from_utf8(text) {
        Ok(text) => text,
        Err(error) => {
            let line = 1 + text[..error.valid_up_to()].iter().filter(|b| **b == b'\n').count();
            let cause = YamlError::Syntax(format!("line {line}: not UTF-8"));
            return vec![Document { number: 1, value: Err(cause) }];
        }
    };
    let mut found = Vec::new();
    for (line, part) in split(text) {
        if is_blank(part) {
            continue;
        }
        found.push(Document { number: found.len() + 1, value: parse(part, line) });
    }
    found
}

/// Cuts `text` at lines that start with `---`; with each part the number of its first line, from 0.
fn split(text: &str) -> Vec<(usize, &str)> {
    let mut parts = Vec::new();
    let (mut start, mut start_line, mut offset) = (0, 0, 0);
    for (line, content) in text.split_inclusive('\n').enumerate() {
        let marker = content
            .strip_prefix("---")
            .is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t', '\r', '\n']));
        if marker {
            parts.push((start_line, &text[start..offset]));
            // What follows the marker on its line belongs to the document.
            (start, start_line) = (offset + 3, line);
        }
        offset += content.len();
    }
    parts.push((start_line, &text[start..]));
    parts
}

fn is_blank(part: &str) -> bool {
    part.lines().all(|line| {
        let line = line.trim();
        line.is_empty() || line.starts_with('#') || line.starts_with('%') || line == "..."
    })
}

fn parse(part: &str, first_line: usize) -> Result<Value, YamlError> {
    if part.trim_start().starts_with('{') {
        // JSON is YAML, but its own parser is quicker.
        if let Ok(value) = serde_json::from_str(part) {
            return Ok(value);
        }
    }
    yaml(part, first_line)
}

fn yaml(part: &str, first_line: usize) -> Result<Value, YamlError> {
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_depth: 100,
            max_nodes: 500_000,
            max_events: 1_000_000,
            max_aliases: 10_000,
            max_anchors: 10_000,
            max_total_scalar_bytes: MAX_FILE as usize,
        },
        legacy_octal_numbers: true,
        with_snippet: false,
    };
    serde_saphyr::from_str_with_options(part, options).map_err(|error| {
        let place = error.location().map(|at| {
            let line = first_line + usize::try_from(at.line()).unwrap_or(0);
            format!("line {line}, column {}: ", at.column())
        });
        let cause = error.to_string();
        let cause = cause.lines().next().unwrap_or_default();
        YamlError::Syntax(format!("{}{cause}", place.unwrap_or_default()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcomes(text: &str) -> Vec<(usize, Result<String, String>)> {
        let documents = documents(text.as_bytes());
        let outcome = |value: Result<Value, YamlError>| match value {
            Ok(value) => Ok(value.to_string()),
            Err(error) => Err(error.to_string()),
        };
        documents.into_iter().map(|d| (d.number, outcome(d.value))).collect()
    }

    #[test]
    fn documents_are_read_one_by_one() {
        let found = outcomes("# top\n---\na: 1\n---\n\n--- # two\nb: [\n--- \r\nc: yes\nd: 0644\n");
        assert_eq!(found.len(), 3, "{found:?}");
        assert_eq!(found[0], (1, Ok("{\"a\":1}".into())));
        assert!(found[1].1.as_ref().unwrap_err().starts_with("line "), "{found:?}");
        assert_eq!(found[2], (3, Ok("{\"c\":true,\"d\":420}".into())));
        assert_eq!(outcomes("{\"a\": \"b\"}"), [(1, Ok("{\"a\":\"b\"}".into()))]);
        assert_eq!(outcomes(""), []);
    }

    #[test]
    fn a_marker_inside_a_block_does_not_cut() {
        let found = outcomes("text: |\n  ---\n  more\n");
        assert_eq!(found, [(1, Ok("{\"text\":\"---\\nmore\\n\"}".into()))]);
    }

    #[test]
    fn hostile_text_ends_at_a_bound() {
        let mut bomb = String::from("a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n");
        for i in 1..12 {
            let refs = vec![format!("*a{}", i - 1); 10].join(",");
            bomb += &format!("a{i}: &a{i} [{refs}]\n");
        }
        let deep = format!("a: {}", "[".repeat(100_000));
        let blocks: String = (0..5000).map(|i| format!("{}a:\n", " ".repeat(i))).collect();
        for text in
            [bomb.as_str(), deep.as_str(), blocks.as_str(), "- 1\n", "just text\n", "a: 1\na: 2\n"]
        {
            let found = outcomes(text);
            assert!(found[0].1.is_err(), "{:.60}", text);
        }
        assert!(documents(b"a: \xff\n")[0].value.is_err());
    }
}
