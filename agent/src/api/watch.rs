//! List and watch that never ends and never has a gap.
//!
//! `kube::runtime::watcher` is not used: it starts a new watch at once, in a hot loop, when a server
//! ends each watch cleanly; it keeps an expired resource version when the server refuses it by HTTP
//! status rather than by event; and it skips an event that is cut off in the middle of a line. Here
//! every way a watch can end leads either to a new watch from the last version that was seen whole,
//! or to a new list, and never without a wait where nothing was learnt.

use std::fmt::Debug;
use std::time::Duration;

use http_body_util::BodyExt;
use hyper::body::Bytes;
use kube::api::{ListParams, WatchParams};
use kube::client::Body;
use kube::core::{Request, Status, WatchEvent};
use kube::{Api, Client, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use tokio::time::Instant;

use super::backoff::Backoff;
use super::{chain, explain, status_code};

/// Objects per page of a list.
const PAGE: u32 = 500;
/// A list page that is not there after this time is asked anew.
const LIST_TIMEOUT: Duration = Duration::from_secs(60);
/// The answer to a watch must begin within this time.
const WATCH_START_TIMEOUT: Duration = Duration::from_secs(30);
/// Server-side limit of one watch, less up to a third by chance; it is then resumed where it was.
const WATCH_SECONDS: u32 = 290;
/// A watch that ended sooner than this and told nothing counts as failed.
const SHORT_WATCH: Duration = Duration::from_secs(5);
/// Longest wait between tries while the server says that we may not: a grant is noticed soon.
const FORBIDDEN_RETRY: Duration = Duration::from_secs(10);
/// Longest event: etcd's limit of an object (1.5 MiB) with much to spare.
const MAX_EVENT: usize = 16 << 20;
/// A watch that cannot be started or understood this often in a row gives way to a new list.
const FAILURES_TO_LIST: u32 = 3;

/// What the consumer of a watch sees.
#[derive(Debug)]
pub enum Seen<K> {
    /// A list begins; its objects follow as `Listed`.
    Restarted,
    /// An object of the list.
    Listed(K),
    /// The list is complete: what it did not name is gone.
    Complete,
    /// New or changed.
    Applied(K),
    /// Gone.
    Deleted(K),
    /// Something failed; it is retried after a wait.
    Failed(Failure),
}

/// Why a watch does not move.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Whether the server refuses (403): somebody must grant it.
    pub forbidden: bool,
    /// One line.
    pub message: String,
}

/// Where a watch is.
enum State<K> {
    /// Nothing is held; a list is next.
    Start,
    /// Some pages are there; `objects` (reversed) are still to be told.
    Listing { objects: Vec<K>, next_page: Option<String>, version: String },
    /// All up to `version` is told; a watch is next.
    Listed { version: String, failures: u32 },
    /// Events flow.
    Watching { stream: Stream, version: String, failures: u32 },
}

struct Stream {
    body: Body,
    buffer: Vec<u8>,
    scanned: usize,
    until: Instant,
    started: Instant,
    told: bool,
}

/// A watch, as an endless source of [`Seen`].
pub struct Watch<K> {
    api: Api<K>,
    client: Client,
    fields: Option<String>,
    labels: Option<String>,
    state: State<K>,
    backoff: Backoff,
    wait_until: Option<Instant>,
}

impl<K> Watch<K>
where
    K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
{
    /// Watches what `api` and `fields` (a field selector, empty for all) select.
    pub fn new(api: Api<K>, fields: &str) -> Self {
        Self::with_backoff(api, fields, Backoff::for_watch())
    }

    /// As `new`, with another backoff.
    pub fn with_backoff(api: Api<K>, fields: &str, backoff: Backoff) -> Self {
        Self {
            client: api.clone().into_client(),
            api,
            fields: (!fields.is_empty()).then(|| fields.to_owned()),
            labels: None,
            state: State::Start,
            backoff,
            wait_until: None,
        }
    }

    /// With a label selector as well.
    pub fn labels(mut self, selector: &str) -> Self {
        self.labels = Some(selector.to_owned());
        self
    }

    /// The next thing seen. Waits as long as the backoff says after a failure. Cancelling it loses
    /// nothing but a list page or a watch request under way, which are then asked again.
    pub async fn next(&mut self) -> Seen<K> {
        loop {
            if let Some(until) = self.wait_until {
                tokio::time::sleep_until(until).await;
                self.wait_until = None;
            }
            if let Some(seen) = self.step().await {
                return seen;
            }
        }
    }

    async fn step(&mut self) -> Option<Seen<K>> {
        match &mut self.state {
            State::Start => {
                self.state = State::Listing {
                    objects: Vec::new(),
                    next_page: Some(String::new()),
                    version: String::new(),
                };
                Some(Seen::Restarted)
            }
            State::Listing { objects, next_page, version } => {
                if let Some(object) = objects.pop() {
                    return Some(Seen::Listed(object));
                }
                if let Some(page) = next_page {
                    let page = page.clone();
                    return self.list_page(page).await;
                }
                self.state = State::Listed { version: std::mem::take(version), failures: 0 };
                Some(Seen::Complete)
            }
            State::Listed { version, failures } => {
                let (version, failures) = (version.clone(), *failures);
                self.start_watch(version, failures).await
            }
            State::Watching { .. } => self.read_event().await,
        }
    }

    async fn list_page(&mut self, page: String) -> Option<Seen<K>> {
        let params = ListParams {
            field_selector: self.fields.clone(),
            label_selector: self.labels.clone(),
            limit: Some(PAGE),
            continue_token: (!page.is_empty()).then_some(page),
            ..ListParams::default()
        };
        let failure = match tokio::time::timeout(LIST_TIMEOUT, self.api.list(&params)).await {
            Ok(Ok(mut list)) => {
                let new = list.metadata.resource_version.take().unwrap_or_default();
                let next = list.metadata.continue_.take().filter(|c| !c.is_empty());
                if new.is_empty() {
                    Failure::of("the list has no resourceVersion")
                } else {
                    list.items.reverse();
                    self.state =
                        State::Listing { objects: list.items, next_page: next, version: new };
                    return None;
                }
            }
            Ok(Err(error)) => Failure::from(&error),
            Err(_) => Failure::of(format!("no answer within {} s", LIST_TIMEOUT.as_secs())),
        };
        self.state = State::Start;
        Some(self.failed(failure))
    }

    async fn start_watch(&mut self, version: String, failures: u32) -> Option<Seen<K>> {
        let seconds = WATCH_SECONDS - fastrand::u32(0..WATCH_SECONDS / 3);
        let params = WatchParams {
            field_selector: self.fields.clone(),
            label_selector: self.labels.clone(),
            timeout: Some(seconds),
            bookmarks: true,
            ..WatchParams::default()
        };
        let request = match Request::new(self.api.resource_url()).watch(&params, &version) {
            Ok(request) => request.map(Body::from),
            Err(error) => return Some(self.failed(Failure::of(chain(&error)))),
        };
        let answer = match tokio::time::timeout(WATCH_START_TIMEOUT, self.client.send(request))
            .await
        {
            Err(_) => Err((None, format!("no answer within {} s", WATCH_START_TIMEOUT.as_secs()))),
            Ok(Err(error)) => Err((status_code(&error), explain(&error))),
            Ok(Ok(answer)) if answer.status().is_success() => Ok(answer),
            Ok(Ok(answer)) => Err(refusal(answer).await),
        };
        match answer {
            Ok(answer) => {
                let now = Instant::now();
                let stream = Stream {
                    body: answer.into_body(),
                    buffer: Vec::new(),
                    scanned: 0,
                    until: now + Duration::from_secs(u64::from(seconds) + 10),
                    started: now,
                    told: false,
                };
                self.state = State::Watching { stream, version, failures };
                None
            }
            Err((code, message)) => {
                let failures = failures + 1;
                self.state =
                    if code == Some(410) || (code.is_some() && failures >= FAILURES_TO_LIST) {
                        State::Start
                    } else {
                        State::Listed { version, failures }
                    };
                Some(self.failed(Failure { forbidden: code == Some(403), message }))
            }
        }
    }

    async fn read_event(&mut self) -> Option<Seen<K>> {
        let State::Watching { stream, version, failures } = &mut self.state else { return None };
        let line = match stream.line().await {
            Ok(Some(line)) => line,
            Ok(None) => {
                let quiet = !stream.told && stream.started.elapsed() < SHORT_WATCH;
                let (version, failures) = (std::mem::take(version), *failures);
                self.state = State::Listed { version, failures };
                return quiet
                    .then(|| self.failed(Failure::of("the server ends each watch at once")));
            }
            Err(message) => {
                let (version, failures) = (std::mem::take(version), *failures);
                self.state = State::Listed { version, failures };
                return Some(self.failed(Failure::of(message)));
            }
        };
        match serde_json::from_slice::<WatchEvent<K>>(&line) {
            Ok(WatchEvent::Bookmark(bookmark)) => {
                version.clone_from(&bookmark.metadata.resource_version);
                stream.told = true;
                None
            }
            Ok(WatchEvent::Added(object) | WatchEvent::Modified(object)) => {
                advance(version, &object);
                (stream.told, *failures) = (true, 0);
                self.backoff.reset();
                Some(Seen::Applied(object))
            }
            Ok(WatchEvent::Deleted(object)) => {
                advance(version, &object);
                (stream.told, *failures) = (true, 0);
                self.backoff.reset();
                Some(Seen::Deleted(object))
            }
            // The ordinary end of a watch that was away for long: not worth a word.
            Ok(WatchEvent::Error(status)) if status.code == 410 => {
                self.state = State::Start;
                self.wait_until = Some(Instant::now() + self.backoff.next_delay());
                None
            }
            // A server that cannot go on with this watch.
            Ok(WatchEvent::Error(status)) => {
                self.state = State::Start;
                let message = format!("{} ({} {})", status.message, status.code, status.reason);
                Some(self.failed(Failure { forbidden: status.code == 403, message }))
            }
            Err(error) => {
                let (version, failures) = (std::mem::take(version), *failures + 1);
                self.state = if failures >= FAILURES_TO_LIST {
                    State::Start
                } else {
                    State::Listed { version, failures }
                };
                Some(self.failed(Failure::of(format!("an event cannot be read: {error}"))))
            }
        }
    }

    fn failed(&mut self, failure: Failure) -> Seen<K> {
        let wait = self.backoff.next_delay();
        let wait = if failure.forbidden { wait.min(FORBIDDEN_RETRY) } else { wait };
        self.wait_until = Some(Instant::now() + wait);
        Seen::Failed(failure)
    }
}

fn advance<K: Resource>(version: &mut String, object: &K) {
    if let Some(new) = object.resource_version() {
        *version = new;
    }
}

/// Status and message of an answer that is no success.
async fn refusal(answer: hyper::Response<Body>) -> (Option<u16>, String) {
    let code = answer.status().as_u16();
    let body = http_body_util::Limited::new(answer.into_body(), 64 << 10);
    let text = match tokio::time::timeout(WATCH_START_TIMEOUT, body.collect()).await {
        Ok(Ok(body)) => body.to_bytes(),
        _ => Bytes::new(),
    };
    let message = match serde_json::from_slice::<Status>(&text) {
        Ok(status) => format!("{} ({code} {})", status.message, status.reason),
        Err(_) => format!("the server answered {code}"),
    };
    (Some(code), message)
}

impl Stream {
    /// The next line, `None` at the end of the stream (what is left of a line that was cut off is
    /// thrown away; it comes again). Cancel safe.
    async fn line(&mut self) -> Result<Option<Vec<u8>>, String> {
        loop {
            let unseen = self.buffer.get(self.scanned..).unwrap_or_default();
            if let Some(at) = unseen.iter().position(|b| *b == b'\n') {
                let rest = self.buffer.split_off(self.scanned + at + 1);
                let line = std::mem::replace(&mut self.buffer, rest);
                self.scanned = 0;
                if line.iter().all(u8::is_ascii_whitespace) {
                    continue;
                }
                return Ok(Some(line));
            }
            self.scanned = self.buffer.len();
            if self.scanned > MAX_EVENT {
                return Err(format!("an event is longer than {MAX_EVENT} bytes"));
            }
            if self.buffer.is_empty() {
                // A burst leaves a large buffer behind; an idle watch needs none.
                self.buffer = Vec::new();
            }
            match tokio::time::timeout_at(self.until, self.body.frame()).await {
                Err(_) => return Err("the watch did not end at its time limit".to_owned()),
                Ok(None) => return Ok(None),
                Ok(Some(Err(error))) => return Err(chain(&error)),
                Ok(Some(Ok(frame))) => {
                    if let Ok(data) = frame.into_data() {
                        self.buffer.extend_from_slice(&data);
                    }
                }
            }
        }
    }
}

impl Failure {
    fn of(message: impl Into<String>) -> Self {
        Self { forbidden: false, message: message.into() }
    }
}

impl From<&kube::Error> for Failure {
    fn from(error: &kube::Error) -> Self {
        Self { forbidden: status_code(error) == Some(403), message: explain(error) }
    }
}

#[cfg(test)]
mod tests;
