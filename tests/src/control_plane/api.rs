//! From a request to its answer: authentication, authorization, then the verb.

use std::sync::{Arc, Mutex, PoisonError};

use futures::stream::BoxStream;
use futures::{FutureExt as _, StreamExt as _};
use serde_json::{Value, json};

use super::auth::{self, User};
use super::controllers::Controllers;
use super::error::ApiError;
use super::faults::Faults;
use super::pki::Pki;
use super::request::RequestInfo;
use super::resources::{self, Resource, known};
use super::store::Store;
use super::{discovery, read, subresource, write};

/// An answer.
pub enum Reply {
    /// One object.
    Object(u16, Value),
    /// Plain text.
    Text(&'static str),
    /// Watch events until the stream ends.
    Events(BoxStream<'static, Value>),
}

/// One request that was answered, for tests that count.
#[derive(Clone, Debug)]
pub struct Record {
    /// When.
    pub at: std::time::Instant,
    /// Who.
    pub user: String,
    /// Verb.
    pub verb: &'static str,
    /// Resource, with its subresource.
    pub resource: String,
    /// Object, if one was named.
    pub name: String,
    /// HTTP code; 0 where a fault swallowed it.
    pub code: u16,
}

/// Everything behind the listeners.
pub struct Api {
    /// The objects.
    pub store: Arc<Store>,
    /// The CA.
    pub pki: Arc<Pki>,
    /// Misbehaviour.
    pub faults: Faults,
    /// Controllers and their switches.
    pub controllers: Arc<Controllers>,
    records: Mutex<Vec<Record>>,
}

impl Api {
    /// An API with an empty store.
    pub fn new(store: Arc<Store>, pki: Arc<Pki>, controllers: Arc<Controllers>) -> Self {
        Self { store, pki, faults: Faults::default(), controllers, records: Mutex::default() }
    }

    /// What was asked so far.
    pub fn records(&self) -> Vec<Record> {
        self.records.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Notes a request.
    pub fn record(&self, user: &User, info: &RequestInfo, code: u16) {
        self.records.lock().unwrap_or_else(PoisonError::into_inner).push(Record {
            at: std::time::Instant::now(),
            user: user.name.clone(),
            verb: info.verb,
            resource: if info.is_resource() { info.rbac_resource() } else { info.path.clone() },
            name: info.name.clone(),
            code,
        });
    }

    /// The user that `authorization` (the header) or else `certificate` (of TLS) prove.
    ///
    /// # Errors
    /// 401.
    pub fn authenticate(
        &self,
        authorization: Option<&str>,
        certificate: Option<&User>,
    ) -> Result<User, ApiError> {
        if let Some(user) = certificate {
            return Ok(user.clone());
        }
        match authorization {
            None => Ok(auth::anonymous()),
            Some(header) => header
                .strip_prefix("Bearer ")
                .and_then(|token| auth::user_of_token(&self.store, &self.pki, token.trim()))
                .ok_or_else(ApiError::unauthorized),
        }
    }

    /// Answers `info` of `user`.
    ///
    /// # Errors
    /// Every refusal.
    pub fn answer(
        &self,
        user: &User,
        info: &RequestInfo,
        content_type: &str,
        body: &[u8],
    ) -> Result<Reply, ApiError> {
        auth::authorize(&self.store, user, info).map_err(|why| {
            if info.is_resource() {
                let name = if info.name.is_empty() {
                    String::new()
                } else {
                    format!(" \"{}\"", info.name)
                };
                let group =
                    if info.group.is_empty() { String::new() } else { format!(".{}", info.group) };
                let mut error = ApiError::forbidden_path(format!(
                    "{}{group}{name} is forbidden: {why}",
                    info.plural
                ));
                error.details =
                    json!({"name": info.name, "group": info.group, "kind": info.plural});
                error
            } else {
                ApiError::forbidden_path(format!("forbidden: {why}"))
            }
        })?;
        if !info.is_resource() {
            return self.plain(info);
        }
        if let Some(reply) = self.call(user, info, content_type, body)? {
            return Ok(reply);
        }
        let resource = resources::find(&info.group, &info.version, &info.plural)
            .ok_or_else(ApiError::no_such_path)?;
        if resource.namespaced
            && info.namespace.is_empty()
            && !matches!(info.verb, "list" | "watch")
        {
            return Err(ApiError::no_such_path());
        }
        let resize = info.plural == "pods" && info.subresource == "resize";
        if !resize && !matches!(info.subresource.as_str(), "" | "status") {
            return Err(ApiError::no_such_path());
        }
        self.verb(user, resource, info, content_type, body)
    }

    fn plain(&self, info: &RequestInfo) -> Result<Reply, ApiError> {
        if matches!(info.path.split('/').nth(1), Some("healthz" | "livez" | "readyz")) {
            return Ok(Reply::Text("ok"));
        }
        if info.path.starts_with("/openapi") {
            return Err(ApiError {
                message:
                    "the test control plane publishes no OpenAPI: use kubectl --validate=false"
                        .into(),
                ..ApiError::no_such_path()
            });
        }
        discovery::answer(&info.path)
            .map(|v| Reply::Object(200, v))
            .ok_or_else(ApiError::no_such_path)
    }

    /// Subresources and kinds that are calls.
    fn call(
        &self,
        user: &User,
        info: &RequestInfo,
        content_type: &str,
        body: &[u8],
    ) -> Result<Option<Reply>, ApiError> {
        let (store, pki) = (&*self.store, &*self.pki);
        let created = |value| Ok(Some(Reply::Object(201, value)));
        match (info.plural.as_str(), info.subresource.as_str(), info.verb) {
            ("serviceaccounts", "token", "create") => {
                created(subresource::token(store, pki, user, info, parse(content_type, body)?)?)
            }
            ("pods", "binding", "create") => {
                created(subresource::binding(store, user, info, &parse(content_type, body)?)?)
            }
            ("pods", "eviction", "create") => {
                let eviction = parse(content_type, body)?;
                write::delete(store, user, known("pods"), info, &eviction["deleteOptions"])?;
                created(subresource::success())
            }
            ("certificatesigningrequests", "approval", "update" | "patch") => {
                let body = parse(content_type, body)?;
                let patching = info.verb == "patch";
                let object = subresource::approval(store, user, info, &mut |old| {
                    if patching {
                        write::apply_patch(content_type, &body, old)
                    } else {
                        Ok(body.clone())
                    }
                })?;
                Ok(Some(Reply::Object(200, (*object).clone())))
            }
            ("tokenreviews", "", "create") => {
                created(subresource::token_review(store, pki, parse(content_type, body)?))
            }
            ("subjectaccessreviews", "", "create") => {
                created(subresource::access_review(store, user, parse(content_type, body)?, false))
            }
            ("selfsubjectaccessreviews", "", "create") => {
                created(subresource::access_review(store, user, parse(content_type, body)?, true))
            }
            _ => Ok(None),
        }
    }

    fn verb(
        &self,
        user: &User,
        resource: &'static Resource,
        info: &RequestInfo,
        content_type: &str,
        body: &[u8],
    ) -> Result<Reply, ApiError> {
        let store = &self.store;
        let object = |code, object: Arc<Value>| Ok(Reply::Object(code, typed(resource, &object)));
        match info.verb {
            "get" => match store.get(resource, &info.namespace, &info.name) {
                Some(found) => object(200, found),
                None => Err(ApiError::not_found(resource, &info.name)),
            },
            "list" => {
                let mut list = read::list(store, resource, info)?;
                for item in list["items"].as_array_mut().into_iter().flatten() {
                    // Items of a list carry no kind, as on the real wire.
                    if let Some(map) = item.as_object_mut() {
                        map.remove("kind");
                        map.remove("apiVersion");
                    }
                }
                Ok(Reply::Object(200, list))
            }
            "watch" => {
                let events = read::watch(store, resource, info)?.into_stream();
                Ok(Reply::Events(
                    events
                        .map(move |mut event| {
                            if event["type"] != "ERROR" {
                                event["object"] = typed(resource, &event["object"]);
                            }
                            event
                        })
                        .boxed(),
                ))
            }
            "create" if info.name.is_empty() => {
                object(201, write::create(store, user, resource, info, parse(content_type, body)?)?)
            }
            "update" => {
                let body = parse(content_type, body)?;
                object(200, write::update(store, user, resource, info, &mut |_| Ok(body.clone()))?)
            }
            "patch" => {
                let patch = parse(content_type, body)?;
                let apply = content_type == "application/apply-patch+yaml";
                if apply && store.get(resource, &info.namespace, &info.name).is_none() {
                    return object(201, write::create(store, user, resource, info, patch)?);
                }
                object(
                    200,
                    write::update(store, user, resource, info, &mut |old| {
                        write::apply_patch(content_type, &patch, old)
                    })?,
                )
            }
            "delete" => {
                let options =
                    if body.is_empty() { Value::Null } else { parse(content_type, body)? };
                match write::delete(store, user, resource, info, &options)? {
                    write::Deleted::Object(left) => {
                        self.empty_namespace(user, resource, info);
                        object(200, left)
                    }
                    write::Deleted::Done(gone) => {
                        self.empty_namespace(user, resource, info);
                        let mut status = subresource::success();
                        status["code"] = Value::Null;
                        if let Some(map) = status.as_object_mut() {
                            map.remove("code");
                        }
                        status["details"] = json!({"name": info.name, "group": resource.group,
                            "kind": resource.plural, "uid": gone["metadata"]["uid"]});
                        Ok(Reply::Object(200, status))
                    }
                }
            }
            "deletecollection" => {
                let options =
                    if body.is_empty() { Value::Null } else { parse(content_type, body)? };
                let listed =
                    store.list(resource, &info.namespace, &info.selector()?, None, None, 0)?;
                for item in &listed.items {
                    let (namespace, name) = super::store::key_of(item);
                    let one = RequestInfo { namespace, name, verb: "delete", ..info.clone() };
                    match write::delete(store, user, resource, &one, &options) {
                        Err(error) if error.code != 404 => return Err(error),
                        _ => {}
                    }
                }
                let items: Vec<Value> = listed.items.iter().map(|o| (**o).clone()).collect();
                Ok(Reply::Object(
                    200,
                    json!({"kind": format!("{}List", resource.kind),
                    "apiVersion": resource.api_version(), "items": items,
                    "metadata": {"resourceVersion": store.version().to_string()}}),
                ))
            }
            _ => Err(ApiError::method_not_allowed()),
        }
    }

    /// A deleted namespace takes its objects along.
    fn empty_namespace(&self, user: &User, resource: &'static Resource, info: &RequestInfo) {
        if resource.plural != "namespaces" {
            return;
        }
        for kind in resources::RESOURCES.iter().filter(|r| r.namespaced) {
            for item in self.store.all(kind, &info.name) {
                let (namespace, name) = super::store::key_of(&item);
                let one = RequestInfo { namespace, name, verb: "delete", ..RequestInfo::default() };
                // It may have gone meanwhile.
                let _ = write::delete(&self.store, user, kind, &one, &Value::Null);
            }
        }
    }

    /// The answer, with a panic of the code behind it as a 500.
    pub fn answer_or_error(
        &self,
        user: &User,
        info: &RequestInfo,
        content_type: &str,
        body: &[u8],
    ) -> Reply {
        let answer =
            std::panic::AssertUnwindSafe(async { self.answer(user, info, content_type, body) })
                .catch_unwind()
                .now_or_never();
        match answer {
            Some(Ok(Ok(reply))) => reply,
            Some(Ok(Err(error))) => Reply::Object(error.code, error.to_status()),
            _ => {
                let error = ApiError::internal("the test control plane panicked: see its log");
                Reply::Object(500, error.to_status())
            }
        }
    }
}

/// The object with its kind.
fn typed(resource: &Resource, object: &Value) -> Value {
    let mut object = object.clone();
    object["kind"] = resource.kind.into();
    object["apiVersion"] = resource.api_version().into();
    object
}

fn parse(content_type: &str, body: &[u8]) -> Result<Value, ApiError> {
    if content_type == "application/vnd.kubernetes.protobuf" {
        return Err(ApiError::unsupported_media_type(content_type));
    }
    if content_type == "application/yaml" || content_type == "application/apply-patch+yaml" {
        let text = String::from_utf8_lossy(body);
        return serde_saphyr::from_str(&text)
            .map_err(|e| ApiError::bad_request(format!("error decoding YAML: {e}")));
    }
    serde_json::from_slice(body)
        .map_err(|e| ApiError::bad_request(format!("the object provided is unrecognized: {e}")))
}
