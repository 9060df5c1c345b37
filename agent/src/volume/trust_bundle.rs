//! `clusterTrustBundle` in projected volumes: the certificates of one bundle, or of all of a signer that
//! a label selector picks, each once. Pure.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::certificates::v1beta1::ClusterTrustBundle;
use k8s_openapi::api::core::v1::ClusterTrustBundleProjection;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use x509_parser::pem::Pem;

/// `label` of certificates in PEM.
pub(super) const CERTIFICATE: &str = "CERTIFICATE";

/// What the file of `source` holds, of all bundles of the cluster.
pub(super) fn anchors<'a>(
    source: &ClusterTrustBundleProjection,
    all: impl Iterator<Item = &'a ClusterTrustBundle>,
) -> Result<Vec<u8>, String> {
    let optional = source.optional.unwrap_or(false);
    if let Some(name) = &source.name {
        let found: Vec<_> = all.filter(|b| b.metadata.name.as_ref() == Some(name)).collect();
        if found.is_empty() && !optional {
            return Err(format!(
                "while getting ClusterTrustBundle: clustertrustbundle.certificates.k8s.io {name:?} \
                 not found"
            ));
        }
        return Ok(normalized(found.into_iter()));
    }
    let Some(signer) = &source.signer_name else {
        return Err(
            "ClusterTrustBundle projection requires either name or signerName to be set".to_owned()
        );
    };
    let mut found = Vec::new();
    for bundle in all.filter(|b| b.spec.signer_name.as_ref() == Some(signer)) {
        let none = BTreeMap::new();
        let labels = bundle.metadata.labels.as_ref().unwrap_or(&none);
        if selects(source.label_selector.as_ref(), labels)? {
            found.push(bundle);
        }
    }
    if found.is_empty() && !optional {
        return Err(format!(
            "combination of signerName {signer:?} and labelSelector matched zero \
             ClusterTrustBundles"
        ));
    }
    Ok(normalized(found.into_iter()))
}

/// Their certificates, without what stands between them and without headers. Sorted, so that the file
/// stays the same while the certificates do.
fn normalized<'a>(bundles: impl Iterator<Item = &'a ClusterTrustBundle>) -> Vec<u8> {
    let mut found = BTreeSet::new();
    for bundle in bundles {
        found.extend(blocks(bundle.spec.trust_bundle.as_bytes()));
    }
    found.iter().map(|der| pem(CERTIFICATE, der)).collect::<String>().into_bytes()
}

/// What the blocks of `text` hold; what is no block is passed over.
pub(super) fn blocks(text: &[u8]) -> impl Iterator<Item = Vec<u8>> {
    Pem::iter_from_buffer(text).filter_map(Result::ok).map(|block| block.contents)
}

/// One block.
pub(super) fn pem(label: &str, der: &[u8]) -> String {
    use base64::Engine as _;
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    let mut out = format!("-----BEGIN {label}-----\n");
    let mut rest = text.as_str();
    while !rest.is_empty() {
        let (line, tail) = rest.split_at(rest.len().min(64));
        out.push_str(line);
        out.push('\n');
        rest = tail;
    }
    out.push_str(&format!("-----END {label}-----\n"));
    out
}

/// Whether the selector picks what has `labels`: none picks nothing, an empty one everything.
fn selects(
    selector: Option<&LabelSelector>,
    labels: &BTreeMap<String, String>,
) -> Result<bool, String> {
    let Some(selector) = selector else { return Ok(false) };
    let mut all = true;
    for (key, value) in selector.match_labels.iter().flatten() {
        all &= labels.get(key) == Some(value);
    }
    for expression in selector.match_expressions.iter().flatten() {
        let found = labels.get(&expression.key);
        let values = expression.values.as_deref().unwrap_or_default();
        let among = found.is_some_and(|value| values.contains(value));
        all &= match expression.operator.as_str() {
            "In" => among,
            "NotIn" => !among,
            "Exists" => found.is_some(),
            "DoesNotExist" => found.is_none(),
            other => return Err(format!("while parsing label selector: {other:?} is unknown")),
        };
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn bundle(name: &str, signer: Option<&str>, env: &str, text: &str) -> ClusterTrustBundle {
        serde_json::from_value(json!({"metadata": {"name": name, "labels": {"env": env}},
            "spec": {"signerName": signer, "trustBundle": text}}))
        .unwrap()
    }

    fn of(source: Value, all: &[ClusterTrustBundle]) -> Result<String, String> {
        let source = serde_json::from_value(source).unwrap();
        anchors(&source, all.iter()).map(|bytes| String::from_utf8(bytes).unwrap())
    }

    #[test]
    fn certificates_are_picked_and_each_is_there_once() {
        let (a, b) = (pem(CERTIFICATE, b"aaa"), pem(CERTIFICATE, &[7; 60]));
        assert_eq!(a, "-----BEGIN CERTIFICATE-----\nYWFh\n-----END CERTIFICATE-----\n");
        assert_eq!(b.lines().nth(1).map(str::len), Some(64));
        let all = [
            bundle("s:one", Some("s/x"), "prod", &format!("words\n{b}between\n{a}{b}")),
            bundle("s:two", Some("s/x"), "test", &a),
            bundle("other", None, "prod", &b),
        ];
        let both = format!("{b}{a}");
        for (source, expected) in [
            (json!({"path": "p", "name": "s:one"}), Ok(both.clone())),
            (json!({"path": "p", "name": "other"}), Ok(b.clone())),
            (json!({"path": "p", "name": "none", "optional": true}), Ok(String::new())),
            (json!({"path": "p", "name": "none"}), Err("\"none\" not found")),
            (json!({"path": "p", "signerName": "s/x", "labelSelector": {}}), Ok(both.clone())),
            (
                json!({"path": "p", "signerName": "s/x",
                    "labelSelector": {"matchLabels": {"env": "test"}}}),
                Ok(a.clone()),
            ),
            (
                json!({"path": "p", "signerName": "s/x", "labelSelector": {"matchExpressions":
                    [{"key": "env", "operator": "NotIn", "values": ["test"]}]}}),
                Ok(both),
            ),
            (json!({"path": "p", "signerName": "s/x"}), Err("matched zero")),
            (json!({"path": "p", "signerName": "s/x", "optional": true}), Ok(String::new())),
            (json!({"path": "p"}), Err("either name or signerName")),
        ] {
            match (of(source.clone(), &all), expected) {
                (Ok(found), Ok(expected)) => assert_eq!(found, expected, "{source}"),
                (Err(found), Err(words)) => assert!(found.contains(words), "{found}"),
                (found, expected) => panic!("{source}: {found:?}, not {expected:?}"),
            }
        }
    }

    #[test]
    fn a_selector_needs_all_it_says() {
        let labels = BTreeMap::from([("a".to_owned(), "1".to_owned())]);
        let of = |expressions: Value| {
            let selector: LabelSelector =
                serde_json::from_value(json!({"matchExpressions": expressions})).unwrap();
            selects(Some(&selector), &labels)
        };
        let one = |key: &str, operator: &str, values: &[&str]| json!({"key": key, "operator": operator, "values": values});
        assert_eq!(
            of(json!([one("a", "In", &["1", "2"]), one("b", "DoesNotExist", &[])])),
            Ok(true)
        );
        assert_eq!(of(json!([one("a", "Exists", &[]), one("b", "Exists", &[])])), Ok(false));
        assert_eq!(of(json!([one("b", "NotIn", &["1"])])), Ok(true));
        assert!(of(json!([one("b", "Near", &["1"])])).is_err());
    }
}
