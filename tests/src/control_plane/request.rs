//! What a request asks for, read from its method, path and query.

use std::collections::HashMap;

use super::error::ApiError;
use super::selector::Selector;

/// A request for a resource (or for a path that is none: `group` and `plural` are empty then).
#[derive(Clone, Debug, Default)]
pub struct RequestInfo {
    /// get, list, watch, create, update, patch, delete, deletecollection; for other paths the
    /// method in lower case.
    pub verb: &'static str,
    /// API group.
    pub group: String,
    /// API version.
    pub version: String,
    /// Namespace; empty for all, or for cluster-wide resources.
    pub namespace: String,
    /// Resource.
    pub plural: String,
    /// Object name, empty for collections.
    pub name: String,
    /// Subresource, empty for the object itself.
    pub subresource: String,
    /// The path as it came.
    pub path: String,
    /// Query parameters.
    pub query: HashMap<String, String>,
}

impl RequestInfo {
    /// Reads a request line.
    pub fn parse(method: &str, path: &str, query: &str) -> Self {
        let query: HashMap<String, String> = query
            .split('&')
            .filter(|p| !p.is_empty())
            .map(|pair| {
                let (k, v) = pair.split_once('=').unwrap_or((pair, ""));
                (decode(k), decode(v))
            })
            .collect();
        let mut info = Self { path: path.to_owned(), query, ..Self::default() };
        let parts: Vec<String> = path.split('/').filter(|p| !p.is_empty()).map(decode).collect();
        let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
        let rest = match parts.as_slice() {
            ["api", version, rest @ ..] if !rest.is_empty() => {
                info.version = (*version).into();
                rest
            }
            ["apis", group, version, rest @ ..] if !rest.is_empty() => {
                info.group = (*group).into();
                info.version = (*version).into();
                rest
            }
            _ => {
                info.verb = plain_verb(method);
                return info;
            }
        };
        let rest = match rest {
            ["watch", rest @ ..] if !rest.is_empty() => {
                info.query.insert("watch".into(), "true".into());
                rest
            }
            rest => rest,
        };
        let rest = match rest {
            ["namespaces", namespace, plural, rest @ ..]
                if !matches!(*plural, "status" | "finalize") =>
            {
                info.namespace = (*namespace).into();
                info.plural = (*plural).into();
                rest
            }
            [plural, rest @ ..] => {
                info.plural = (*plural).into();
                rest
            }
            [] => rest,
        };
        info.name = rest.first().copied().unwrap_or_default().into();
        info.subresource = rest.get(1..).unwrap_or_default().join("/");
        info.verb = match (method, info.name.is_empty()) {
            ("GET" | "HEAD", _) if info.flag("watch") => "watch",
            ("GET" | "HEAD", true) => "list",
            ("DELETE", true) => "deletecollection",
            ("GET" | "HEAD", false) => "get",
            ("POST", _) => "create",
            ("PUT", _) => "update",
            ("PATCH", _) => "patch",
            ("DELETE", false) => "delete",
            _ => plain_verb(method),
        };
        info
    }

    /// Whether it names a resource.
    pub fn is_resource(&self) -> bool {
        !self.plural.is_empty()
    }

    /// `plural` or `plural/subresource`, as RBAC rules write it.
    pub fn rbac_resource(&self) -> String {
        if self.subresource.is_empty() {
            self.plural.clone()
        } else {
            format!("{}/{}", self.plural, self.subresource)
        }
    }

    /// A query parameter, empty where absent.
    pub fn param(&self, name: &str) -> &str {
        self.query.get(name).map(String::as_str).unwrap_or_default()
    }

    /// A boolean query parameter.
    pub fn flag(&self, name: &str) -> bool {
        matches!(self.param(name), "true" | "1")
    }

    /// The selectors.
    ///
    /// # Errors
    /// 400 when one is malformed.
    pub fn selector(&self) -> Result<Selector, ApiError> {
        let mut fields = self.param("fieldSelector").to_owned();
        if !self.name.is_empty() {
            fields.push_str(&format!(",metadata.name={}", self.name));
        }
        Selector::parse(self.param("labelSelector"), &fields).map_err(ApiError::bad_request)
    }
}

fn plain_verb(method: &str) -> &'static str {
    match method {
        "GET" => "get",
        "HEAD" => "head",
        "POST" => "post",
        "PUT" => "put",
        "PATCH" => "patch",
        "DELETE" => "delete",
        _ => "other",
    }
}

fn decode(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        let byte = match byte {
            b'+' => b' ',
            b'%' => {
                let pair: String = rest.by_ref().take(2).map(char::from).collect();
                u8::from_str_radix(&pair, 16).unwrap_or(b'?')
            }
            other => other,
        };
        bytes.push(byte);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_is_asked_for() {
        for (method, path, query, expected) in [
            (
                "GET",
                "/api/v1/pods",
                "watch=1&fieldSelector=spec.nodeName%3Da",
                ("watch", "", "", "pods", "", ""),
            ),
            ("GET", "/api/v1/namespaces/d/pods/p", "", ("get", "", "d", "pods", "p", "")),
            (
                "PATCH",
                "/api/v1/namespaces/d/pods/p/status",
                "",
                ("patch", "", "d", "pods", "p", "status"),
            ),
            ("GET", "/api/v1/namespaces/d", "", ("get", "", "", "namespaces", "d", "")),
            (
                "PUT",
                "/api/v1/namespaces/d/finalize",
                "",
                ("update", "", "", "namespaces", "d", "finalize"),
            ),
            (
                "DELETE",
                "/apis/coordination.k8s.io/v1/namespaces/d/leases",
                "",
                ("deletecollection", "coordination.k8s.io", "d", "leases", "", ""),
            ),
            ("GET", "/apis/coordination.k8s.io/v1", "", ("get", "", "", "", "", "")),
            ("GET", "/healthz", "", ("get", "", "", "", "", "")),
        ] {
            let i = RequestInfo::parse(method, path, query);
            assert_eq!(
                (i.verb, &*i.group, &*i.namespace, &*i.plural, &*i.name, &*i.subresource),
                expected,
                "{path}"
            );
        }
        let info = RequestInfo::parse("GET", "/api/v1/pods", "fieldSelector=spec.nodeName%3Da%2Bb");
        assert_eq!(info.param("fieldSelector"), "spec.nodeName=a+b");
    }
}
