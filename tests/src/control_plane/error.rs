//! Refusals as the API server words them: a `Status` object and its HTTP code.

use serde_json::{Value, json};

use super::resources::Resource;

/// A refused request.
#[derive(Clone, Debug)]
pub struct ApiError {
    /// HTTP code.
    pub code: u16,
    /// Machine-readable reason (`NotFound`, `Conflict`, ...).
    pub reason: &'static str,
    /// For people.
    pub message: String,
    /// `status.details`.
    pub details: Value,
}

impl ApiError {
    fn new(code: u16, reason: &'static str, message: impl Into<String>) -> Self {
        Self { code, reason, message: message.into(), details: Value::Null }
    }

    fn about(mut self, resource: &Resource, name: &str) -> Self {
        self.details = json!({"name": name, "group": resource.group, "kind": resource.plural});
        self
    }

    /// 400.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(400, "BadRequest", message)
    }

    /// 401.
    pub fn unauthorized() -> Self {
        Self::new(401, "Unauthorized", "Unauthorized")
    }

    /// 403.
    pub fn forbidden(resource: &Resource, name: &str, why: impl AsRef<str>) -> Self {
        let message = format!("{} \"{name}\" is forbidden: {}", resource.qualified(), why.as_ref());
        Self::new(403, "Forbidden", message).about(resource, name)
    }

    /// 403 about a whole collection or a path that is no resource.
    pub fn forbidden_path(message: impl Into<String>) -> Self {
        Self::new(403, "Forbidden", message)
    }

    /// 404 for an object.
    pub fn not_found(resource: &Resource, name: &str) -> Self {
        Self::new(404, "NotFound", format!("{} \"{name}\" not found", resource.qualified()))
            .about(resource, name)
    }

    /// 404 for a path.
    pub fn no_such_path() -> Self {
        Self::new(404, "NotFound", "the server could not find the requested resource")
    }

    /// 405.
    pub fn method_not_allowed() -> Self {
        Self::new(
            405,
            "MethodNotAllowed",
            "the server does not allow this method on the requested resource",
        )
    }

    /// 406.
    pub fn not_acceptable() -> Self {
        Self::new(
            406,
            "NotAcceptable",
            "only the following media types are accepted: application/json",
        )
    }

    /// 409 for a name that is taken.
    pub fn already_exists(resource: &Resource, name: &str) -> Self {
        Self::new(
            409,
            "AlreadyExists",
            format!("{} \"{name}\" already exists", resource.qualified()),
        )
        .about(resource, name)
    }

    /// 409 for a stale write.
    pub fn conflict(resource: &Resource, name: &str, why: impl AsRef<str>) -> Self {
        let message = format!(
            "Operation cannot be fulfilled on {} \"{name}\": {}",
            resource.qualified(),
            why.as_ref()
        );
        Self::new(409, "Conflict", message).about(resource, name)
    }

    /// 409, an update that is based on an older state.
    pub fn stale(resource: &Resource, name: &str) -> Self {
        Self::conflict(
            resource,
            name,
            "the object has been modified; please apply your changes to the latest version and try again",
        )
    }

    /// 410, history that is compacted away.
    pub fn expired(message: impl Into<String>) -> Self {
        Self::new(410, "Expired", message)
    }

    /// 415.
    pub fn unsupported_media_type(got: &str) -> Self {
        Self::new(
            415,
            "UnsupportedMediaType",
            format!("the body of the request was in an unknown format - got {got}"),
        )
    }

    /// 422, one field is wrong.
    pub fn invalid(resource: &Resource, name: &str, field: &str, why: impl AsRef<str>) -> Self {
        let message = format!("{} \"{name}\" is invalid: {field}: {}", resource.kind, why.as_ref());
        let mut error = Self::new(422, "Invalid", message).about(resource, name);
        error.details["kind"] = resource.kind.into();
        error.details["causes"] = json!([{"field": field, "message": why.as_ref()}]);
        error
    }

    /// 422 for list and watch options that exclude each other.
    pub fn invalid_options(field: &str, why: &str) -> Self {
        let mut error = Self::new(
            422,
            "Invalid",
            format!("ListOptions.meta.k8s.io \"\" is invalid: {field}: Forbidden: {why}"),
        );
        error.details = json!({"group": "meta.k8s.io", "kind": "ListOptions"});
        error
    }

    /// 500.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(500, "InternalError", message)
    }

    /// 504, a resourceVersion that this server has not reached.
    pub fn too_large_resource_version(asked: u64, current: u64) -> Self {
        let mut error = Self::new(
            504,
            "Timeout",
            format!("Timeout: Too large resource version: {asked}, current: {current}"),
        );
        error.details = json!({"retryAfterSeconds": 1, "causes": [
            {"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}]});
        error
    }

    /// The `Status` object.
    pub fn to_status(&self) -> Value {
        let mut status = json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "message": self.message, "code": self.code,
        });
        if !self.reason.is_empty() {
            status["reason"] = self.reason.into();
        }
        if !self.details.is_null() {
            status["details"] = self.details.clone();
        }
        status
    }
}
