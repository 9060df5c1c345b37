//! JSON Patch (RFC 6902) over `serde_json`, whose own pointers (RFC 6901) find the places. Pure.

use serde::Deserialize;
use serde_json::Value;

/// One operation.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(tag = "op", rename_all = "lowercase")]
pub(super) enum Operation {
    /// Puts a value in: into a list before the index, or at its end (`-`).
    Add { path: String, value: Value },
    /// Takes one away, which must be there.
    Remove { path: String },
    /// Puts another in the place of one that must be there.
    Replace { path: String, value: Value },
    /// Takes one away and puts it in elsewhere.
    Move { from: String, path: String },
    /// Puts the same in elsewhere.
    Copy { from: String, path: String },
    /// Goes on only if this is what is there.
    Test { path: String, value: Value },
}

/// Applies all of them, or says which place does not fit; then `document` is not to be used.
pub(super) fn apply(document: &mut Value, operations: Vec<Operation>) -> Result<(), String> {
    for operation in operations {
        match operation {
            Operation::Add { path, value } => add(document, &path, value)?,
            Operation::Remove { path } => drop(remove(document, &path)?),
            Operation::Replace { path, value } => *place(document, &path)? = value,
            Operation::Move { from, path } => {
                if path.strip_prefix(&*from).is_some_and(|rest| rest.starts_with('/')) {
                    return Err(format!("{from} cannot be moved into itself"));
                }
                let value = remove(document, &from)?;
                add(document, &path, value)?;
            }
            Operation::Copy { from, path } => {
                let value = place(document, &from)?.clone();
                add(document, &path, value)?;
            }
            Operation::Test { path, value } => {
                let found = place(document, &path)?;
                if *found != value {
                    return Err(format!("{path} is {found}, not {value}"));
                }
            }
        }
    }
    Ok(())
}

fn place<'a>(document: &'a mut Value, path: &str) -> Result<&'a mut Value, String> {
    document.pointer_mut(path).ok_or_else(|| format!("there is no {path}"))
}

/// The value around `path`, and the last part of it.
fn around<'a>(document: &'a mut Value, path: &str) -> Result<(&'a mut Value, String), String> {
    let (parent, last) =
        path.rsplit_once('/').ok_or_else(|| format!("{path:?} is no path (/a/b)"))?;
    let last = last.replace("~1", "/").replace("~0", "~");
    Ok((place(document, parent)?, last))
}

/// A list's index; no leading zeros, no signs.
fn index(text: &str, path: &str) -> Result<usize, String> {
    let plain = text == "0" || (!text.starts_with(['0', '+']) && !text.is_empty());
    let number = plain.then(|| text.parse().ok()).flatten();
    number.ok_or_else(|| format!("{path}: {text:?} is no index of a list"))
}

fn add(document: &mut Value, path: &str, value: Value) -> Result<(), String> {
    if path.is_empty() {
        *document = value;
        return Ok(());
    }
    match around(document, path)? {
        (Value::Object(fields), last) => {
            fields.insert(last, value);
        }
        (Value::Array(list), last) if last == "-" => list.push(value),
        (Value::Array(list), last) => {
            let at = index(&last, path)?;
            if at > list.len() {
                return Err(format!("{path}: the list has only {} entries", list.len()));
            }
            list.insert(at, value);
        }
        _ => return Err(format!("{path}: there is neither an object nor a list around it")),
    }
    Ok(())
}

fn remove(document: &mut Value, path: &str) -> Result<Value, String> {
    let missing = || format!("there is no {path}");
    match around(document, path)? {
        (Value::Object(fields), last) => fields.remove(&last).ok_or_else(missing),
        (Value::Array(list), last) => {
            let at = index(&last, path)?;
            if at < list.len() { Ok(list.remove(at)) } else { Err(missing()) }
        }
        _ => Err(missing()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use serde_json::json;

    use super::*;

    fn patched(document: Value, operations: Value) -> Result<Value, String> {
        let operations: Vec<Operation> = serde_json::from_value(operations).unwrap();
        let mut document = document;
        apply(&mut document, operations).map(|()| document)
    }

    #[test]
    fn operations_do_as_the_rfc_says() {
        // Each operation, on objects and lists, and the escapes of paths.
        for (document, operations, result) in [
            (
                json!({"foo": "bar"}),
                json!([{"op": "add", "path": "/baz", "value": 1}]),
                json!({"foo": "bar", "baz": 1}),
            ),
            (
                json!({"foo": ["a", "c"]}),
                json!([{"op": "add", "path": "/foo/1", "value": "b"}]),
                json!({"foo": ["a", "b", "c"]}),
            ),
            (
                json!({"foo": ["a", "b", "c"]}),
                json!([{"op": "remove", "path": "/foo/1"}]),
                json!({"foo": ["a", "c"]}),
            ),
            (
                json!({"a": 1, "b": 2}),
                json!([{"op": "replace", "path": "/a", "value": 3}]),
                json!({"a": 3, "b": 2}),
            ),
            (
                json!({"a": {"x": 1}, "b": {}}),
                json!([{"op": "move", "from": "/a/x", "path": "/b/y"}]),
                json!({"a": {}, "b": {"y": 1}}),
            ),
            (
                json!({"l": [1, 2, 3]}),
                json!([{"op": "move", "from": "/l/0", "path": "/l/2"}]),
                json!({"l": [2, 3, 1]}),
            ),
            (
                json!({"a": 1}),
                json!([{"op": "copy", "from": "/a", "path": "/b"}]),
                json!({"a": 1, "b": 1}),
            ),
            (
                json!({"a": [1, 2]}),
                json!([{"op": "test", "path": "/a/1", "value": 2}]),
                json!({"a": [1, 2]}),
            ),
            (
                json!({"/": 9, "~1": 10}),
                json!([{"op": "test", "path": "/~01", "value": 10}, {"op": "remove", "path": "/~1"}]),
                json!({"~1": 10}),
            ),
            (
                json!({"a": [1]}),
                json!([{"op": "add", "path": "/a/-", "value": [2]}]),
                json!({"a": [1, [2]]}),
            ),
            (
                json!({"a": 1}),
                json!([{"op": "add", "path": "", "value": {"b": 2}}]),
                json!({"b": 2}),
            ),
            (
                json!({"a": null}),
                json!([{"op": "replace", "path": "/a", "value": 1, "more": 2}]),
                json!({"a": 1}),
            ),
        ] {
            assert_eq!(patched(document, operations.clone()), Ok(result), "{operations}");
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let document = json!({"a": {"b": 1}, "l": [1]});
        for operations in [
            json!([{"op": "add", "path": "/no/where", "value": 1}]),
            json!([{"op": "add", "path": "/l/2", "value": 1}]),
            json!([{"op": "add", "path": "/l/00", "value": 1}]),
            json!([{"op": "add", "path": "/l/x", "value": 1}]),
            json!([{"op": "add", "path": "a", "value": 1}]),
            json!([{"op": "remove", "path": "/c"}]),
            json!([{"op": "remove", "path": "/l/-"}]),
            json!([{"op": "remove", "path": "/l/1"}]),
            json!([{"op": "replace", "path": "/c", "value": 1}]),
            json!([{"op": "move", "from": "/a", "path": "/a/b"}]),
            json!([{"op": "copy", "from": "/c", "path": "/d"}]),
            json!([{"op": "test", "path": "/a/b", "value": "1"}]),
        ] {
            assert!(patched(document.clone(), operations.clone()).is_err(), "{operations}");
        }
    }
}
