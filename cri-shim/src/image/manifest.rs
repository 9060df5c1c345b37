//! Manifests and indexes, Docker schema 2 and OCI alike: which layers an image has, and which image
//! of several fits this machine. Pure.

use serde::Deserialize;

use super::{ImageError, reference::check_digest};

/// The media types asked for, the ones with several platforms first.
pub(crate) const ACCEPTED: &[&str] = &[
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
];
/// The most a manifest or config may have.
pub(crate) const MAX_DOCUMENT: u64 = 8 << 20;
/// The most layers: overlayfs stacks 500.
const MAX_LAYERS: usize = 500;

/// A reference to content.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Descriptor {
    #[serde(default)]
    pub(crate) media_type: String,
    pub(crate) digest: String,
    #[serde(default)]
    pub(crate) size: u64,
    #[serde(default)]
    pub(crate) platform: Option<Platform>,
    #[serde(default)]
    pub(crate) annotations: Option<std::collections::BTreeMap<String, String>>,
}

/// What an image runs on, in Go's names.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct Platform {
    #[serde(default)]
    pub(crate) architecture: String,
    #[serde(default)]
    pub(crate) os: String,
    #[serde(default)]
    pub(crate) variant: Option<String>,
}

/// What a document turned out to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Document {
    Image { config: Descriptor, layers: Vec<Descriptor> },
    Index(Vec<Descriptor>),
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Raw {
    #[serde(default)]
    schema_version: u32,
    #[serde(default)]
    config: Option<Descriptor>,
    #[serde(default)]
    layers: Option<Vec<Descriptor>>,
    #[serde(default)]
    manifests: Option<Vec<Descriptor>>,
}

/// Reads a manifest or an index and checks that it can be used.
pub(crate) fn parse(reference: &str, text: &[u8]) -> Result<Document, ImageError> {
    let corrupt = |reason: String| ImageError::Corrupt {
        reference: reference.to_owned(),
        object: "manifest".to_owned(),
        reason,
    };
    let unsupported =
        |reason: String| ImageError::Unsupported { reference: reference.to_owned(), reason };
    let raw: Raw = serde_json::from_slice(text).map_err(|error| corrupt(error.to_string()))?;
    if raw.schema_version != 2 {
        return Err(unsupported(format!(
            "its manifest has schema version {}; push it again with a current tool",
            raw.schema_version
        )));
    }
    let check = |what: &Descriptor| {
        check_digest(&what.digest).map_err(|reason| corrupt(format!("{}: {reason}", what.digest)))
    };
    if let Some(manifests) = raw.manifests {
        manifests.iter().try_for_each(check)?;
        return Ok(Document::Index(manifests));
    }
    let (Some(config), Some(layers)) = (raw.config, raw.layers) else {
        return Err(corrupt("it names neither layers nor manifests".to_owned()));
    };
    check(&config)?;
    if layers.len() > MAX_LAYERS {
        return Err(unsupported(format!("it has {} layers; {MAX_LAYERS} at most", layers.len())));
    }
    for layer in &layers {
        check(layer)?;
        let kind = layer.media_type.as_str();
        if kind.contains("nondistributable") || kind.contains("foreign") {
            return Err(unsupported(format!(
                "layer {} is foreign ({kind}) and not in the registry",
                layer.digest
            )));
        }
        let is_layer = kind.starts_with("application/vnd.oci.image.layer.v1.tar")
            || kind.starts_with("application/vnd.docker.image.rootfs.diff.tar");
        if !is_layer {
            return Err(unsupported(format!("{} is {kind:?}, not a layer", layer.digest)));
        }
    }
    Ok(Document::Image { config, layers })
}

/// The manifest of an index that fits this machine, best first match: same architecture and
/// variant, then same architecture.
pub(crate) fn choose<'a>(
    manifests: &'a [Descriptor],
    machine: &Platform,
) -> Option<&'a Descriptor> {
    let fits = |what: &&Descriptor| match &what.platform {
        None => manifests.len() == 1,
        Some(platform) => {
            platform.os == machine.os && platform.architecture == machine.architecture
        }
    };
    // Images for a newer variant than the machine's would not run: none, or its own, or an older.
    let variant = |what: &Descriptor| {
        what.platform.as_ref().and_then(|platform| platform.variant.clone()).unwrap_or_default()
    };
    let own = machine.variant.clone().unwrap_or_default();
    let mut fitting: Vec<_> = manifests
        .iter()
        .filter(fits)
        .filter(|what| variant(what).is_empty() || own.is_empty() || variant(what) <= own)
        .collect();
    fitting.sort_by_key(|what| {
        let variant = variant(what);
        if variant == own {
            0
        } else if variant.is_empty() {
            1
        } else {
            2
        }
    });
    fitting.first().copied()
}

/// This machine, in Go's names.
pub(crate) fn this_machine() -> Platform {
    let (architecture, variant) = match std::env::consts::ARCH {
        "x86_64" => ("amd64", None),
        "x86" => ("386", None),
        "aarch64" => ("arm64", Some("v8")),
        "arm" => ("arm", Some("v7")),
        "powerpc64" => ("ppc64le", None),
        other => (other, None),
    };
    Platform {
        architecture: architecture.to_owned(),
        os: "linux".to_owned(),
        variant: variant.map(str::to_owned),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(digit: char, platform: Option<(&str, &str, Option<&str>)>) -> Descriptor {
        Descriptor {
            media_type: String::new(),
            digest: format!("sha256:{}", digit.to_string().repeat(64)),
            size: 1,
            platform: platform.map(|(os, architecture, variant)| Platform {
                os: os.to_owned(),
                architecture: architecture.to_owned(),
                variant: variant.map(str::to_owned),
            }),
            annotations: None,
        }
    }

    #[test]
    fn the_machines_platform_is_chosen() {
        let list = [
            entry('0', Some(("unknown", "unknown", None))),
            entry('1', Some(("windows", "amd64", None))),
            entry('2', Some(("linux", "amd64", Some("v3")))),
            entry('3', Some(("linux", "amd64", None))),
            entry('4', Some(("linux", "arm", Some("v6")))),
            entry('5', Some(("linux", "arm", Some("v7")))),
            entry('6', Some(("linux", "arm64", None))),
        ];
        let machine = |architecture: &str, variant: Option<&str>| Platform {
            architecture: architecture.to_owned(),
            os: "linux".to_owned(),
            variant: variant.map(str::to_owned),
        };
        for (machine, want) in [
            (machine("amd64", None), Some(&list[3])),
            (machine("arm", Some("v7")), Some(&list[5])),
            (machine("arm", Some("v6")), Some(&list[4])),
            (machine("arm64", Some("v8")), Some(&list[6])),
            (machine("s390x", None), None),
        ] {
            assert_eq!(choose(&list, &machine), want, "{machine:?}");
        }
        assert!(choose(&[entry('0', None)], &this_machine()).is_some());
    }

    #[test]
    fn unusable_manifests_are_refused_with_a_reason() {
        let sha = format!("sha256:{}", "a".repeat(64));
        let layer = |kind: &str| {
            format!(
                r#"{{"schemaVersion":2,"config":{{"digest":"{sha}","size":1}},
                "layers":[{{"mediaType":"{kind}","digest":"{sha}","size":1}}]}}"#
            )
        };
        for (text, want) in [
            ("{", "EOF"),
            (r#"{"schemaVersion":1}"#, "schema version 1"),
            (r#"{"schemaVersion":2}"#, "neither"),
            (r#"{"schemaVersion":2,"config":{"digest":"sha256:1"},"layers":[]}"#, "hex"),
            (&layer("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"), "foreign"),
            (&layer("application/vnd.oci.image.layer.nondistributable.v1.tar"), "foreign"),
            (&layer("application/wasm"), "not a layer"),
        ] {
            let error = parse("x", text.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(want), "{text}: {error}");
        }
        assert!(
            parse("x", layer("application/vnd.oci.image.layer.v1.tar+zstd").as_bytes()).is_ok()
        );
    }
}
