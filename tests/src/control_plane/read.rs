//! get, list and watch, with every meaning of `resourceVersion` (KEP-2340, KEP-3157).

use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use futures::Stream;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::error::ApiError;
use super::request::RequestInfo;
use super::resources::Resource;
use super::selector::Selector;
use super::store::{Change, Key, Store};

fn version_param(info: &RequestInfo) -> Result<Option<u64>, ApiError> {
    match info.param("resourceVersion") {
        "" => Ok(None),
        text => text.parse().map(Some).map_err(|_| {
            ApiError::bad_request(format!("Invalid value: \"{text}\": resourceVersion: strconv.ParseUint: parsing \"{text}\": invalid syntax"))
        }),
    }
}

/// Lists a collection.
///
/// # Errors
/// 400, 410 (compacted version or continue token), 504 (future version).
pub fn list(
    store: &Store,
    resource: &'static Resource,
    info: &RequestInfo,
) -> Result<Value, ApiError> {
    let selector = info.selector()?;
    let asked = version_param(info)?;
    let mode = info.param("resourceVersionMatch");
    let limit = info.param("limit").parse().unwrap_or(0);
    let token = info.param("continue");
    let invalid = |why: &str| Err(ApiError::invalid_options("resourceVersionMatch", why));
    let (at, after): (Option<u64>, Option<Key>) = if !token.is_empty() {
        if !mode.is_empty() {
            return invalid("resourceVersionMatch is forbidden when continue is provided");
        }
        let (version, key) = read_continue(token)?;
        (Some(version), Some(key))
    } else {
        match (mode, asked) {
            ("", version) => {
                check_reached(store, version)?;
                // With a limit, an unset match means exactly this version.
                (version.filter(|v| limit > 0 && *v > 0), None)
            }
            (_, None) => {
                return invalid(
                    "resourceVersionMatch is forbidden unless resourceVersion is provided",
                );
            }
            ("Exact", Some(0)) => {
                return invalid(
                    "resourceVersionMatch \"Exact\" is forbidden for resourceVersion \"0\"",
                );
            }
            ("Exact", version) => (version, None),
            ("NotOlderThan", version) => {
                check_reached(store, version)?;
                (None, None)
            }
            (other, _) => return invalid(&format!("Unsupported value: \"{other}\"")),
        }
    };
    let listed = store.list(resource, &info.namespace, &selector, at, after.as_ref(), limit)?;
    let mut meta = json!({"resourceVersion": listed.version.to_string()});
    if let Some(next) = listed.next {
        meta["continue"] = write_continue(listed.version, &next).into();
        meta["remainingItemCount"] = listed.remaining.into();
    }
    let items: Vec<Value> = listed.items.iter().map(|o| (**o).clone()).collect();
    Ok(json!({"kind": format!("{}List", resource.kind), "apiVersion": resource.api_version(),
        "metadata": meta, "items": items}))
}

fn check_reached(store: &Store, asked: Option<u64>) -> Result<(), ApiError> {
    let current = store.version();
    match asked {
        Some(version) if version > current => {
            Err(ApiError::too_large_resource_version(version, current))
        }
        _ => Ok(()),
    }
}

fn write_continue(version: u64, key: &Key) -> String {
    URL_SAFE_NO_PAD.encode(json!([version, key.0, key.1]).to_string())
}

fn read_continue(token: &str) -> Result<(u64, Key), ApiError> {
    URL_SAFE_NO_PAD
        .decode(token)
        .ok()
        .and_then(|bytes| serde_json::from_slice::<(u64, String, String)>(&bytes).ok())
        .map(|(version, namespace, name)| (version, (namespace, name)))
        .ok_or_else(|| ApiError::bad_request("continue key is not valid"))
}

/// A started watch.
pub struct Watch {
    store: Arc<Store>,
    resource: &'static Resource,
    namespace: String,
    selector: Selector,
    cursor: u64,
    bookmarks: Option<Duration>,
    pending: std::collections::VecDeque<Value>,
    ends: Instant,
    over: bool,
}

/// How often an idle watch that asked for bookmarks gets one.
pub const BOOKMARK_INTERVAL: Duration = Duration::from_secs(5);

/// Starts a watch.
///
/// # Errors
/// 400 and 422 for options that exclude each other. A compacted version is no error here: it is
/// an event in the stream, as the API server tells it.
pub fn watch(
    store: &Arc<Store>,
    resource: &'static Resource,
    info: &RequestInfo,
) -> Result<Watch, ApiError> {
    let selector = info.selector()?;
    let asked = version_param(info)?;
    let mode = info.param("resourceVersionMatch");
    let bookmarks = info.flag("allowWatchBookmarks");
    let streaming = info.query.get("sendInitialEvents").map(|v| v == "true");
    let invalid = ApiError::invalid_options;
    match (streaming, mode) {
        (None, "") | (Some(_), "NotOlderThan") => {}
        (None, _) => {
            return Err(invalid(
                "resourceVersionMatch",
                "resourceVersionMatch is forbidden for watch unless sendInitialEvents is provided",
            ));
        }
        (Some(_), _) => {
            return Err(invalid(
                "resourceVersionMatch",
                "sendInitialEvents requires setting resourceVersionMatch to NotOlderThan",
            ));
        }
    }
    if streaming == Some(true) && !bookmarks {
        return Err(invalid(
            "sendInitialEvents",
            "sendInitialEvents is forbidden for watch unless allowWatchBookmarks is true",
        ));
    }
    let seconds: u64 = info.param("timeoutSeconds").parse().unwrap_or(0);
    let seconds = if seconds == 0 { fastrand::u64(1800..3600) } else { seconds };
    let mut watch = Watch {
        store: store.clone(),
        resource,
        namespace: info.namespace.clone(),
        selector,
        cursor: asked.unwrap_or(0),
        bookmarks: bookmarks.then_some(BOOKMARK_INTERVAL),
        pending: std::collections::VecDeque::new(),
        ends: Instant::now() + Duration::from_secs(seconds),
        over: false,
    };
    let initial = match streaming {
        Some(wanted) => wanted,
        None => asked.unwrap_or(0) == 0,
    };
    if initial || watch.cursor == 0 {
        check_reached(store, asked)?;
        let listed = store.list(resource, &watch.namespace, &watch.selector, None, None, 0)?;
        if initial {
            for object in &listed.items {
                watch.pending.push_back(json!({"type": "ADDED", "object": **object}));
            }
        }
        watch.cursor = listed.version;
        if streaming == Some(true) {
            let mut mark = watch.bookmark();
            mark["object"]["metadata"]["annotations"] =
                json!({"k8s.io/initial-events-end": "true"});
            watch.pending.push_back(mark);
        }
    }
    Ok(watch)
}

impl Watch {
    fn bookmark(&self) -> Value {
        json!({"type": "BOOKMARK", "object": {"kind": self.resource.kind,
            "apiVersion": self.resource.api_version(),
            "metadata": {"resourceVersion": self.cursor.to_string(), "creationTimestamp": null}}})
    }

    /// Moves what happened since the cursor into `pending`.
    fn collect(&mut self) {
        let (entries, cursor) = match self.store.since(self.resource, self.cursor) {
            Ok(found) => found,
            Err(error) => {
                self.pending.push_back(json!({"type": "ERROR", "object": error.to_status()}));
                self.over = true;
                return;
            }
        };
        self.cursor = cursor;
        for entry in entries {
            let inside = self.namespace.is_empty()
                || entry.object["metadata"]["namespace"] == self.namespace.as_str();
            if !inside {
                continue;
            }
            let is = entry.change != Change::Deleted && self.selector.matches(&entry.object);
            let was = entry.previous.as_ref().is_some_and(|p| self.selector.matches(p));
            let event = match (was, is) {
                (false, true) => Change::Added,
                (true, true) => Change::Modified,
                (true, false) => Change::Deleted,
                (false, false) => continue,
            };
            let mut object = (*entry.object).clone();
            if event == Change::Deleted && entry.change != Change::Deleted {
                // It left the selection: its last selected state, at the version of the change.
                if let Some(previous) = &entry.previous {
                    object = (**previous).clone();
                    object["metadata"]["resourceVersion"] = entry.version.to_string().into();
                }
            }
            self.pending.push_back(json!({"type": event.as_str(), "object": object}));
        }
    }

    /// The stream of events; it ends after `timeoutSeconds` or an ERROR event.
    pub fn into_stream(self) -> impl Stream<Item = Value> + Send {
        let changed = self.store.subscribe();
        futures::stream::unfold((self, changed), |(mut watch, mut changed)| async move {
            loop {
                if let Some(event) = watch.pending.pop_front() {
                    return Some((event, (watch, changed)));
                }
                if watch.over {
                    return None;
                }
                changed.mark_unchanged();
                watch.collect();
                if !watch.pending.is_empty() || watch.over {
                    continue;
                }
                let idle = watch.bookmarks.unwrap_or(Duration::from_secs(24 * 3600));
                tokio::select! {
                    more = changed.changed() => if more.is_err() { return None },
                    () = tokio::time::sleep(idle) => {
                        let mark = watch.bookmark();
                        watch.pending.push_back(mark);
                    }
                    () = tokio::time::sleep_until(watch.ends) => watch.over = true,
                }
            }
        })
    }
}
