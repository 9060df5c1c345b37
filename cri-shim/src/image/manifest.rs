//! Manifests and indexes, Docker schema 2 and OCI alike: which layers an image has, and which image
//! of several fits this machine. Pure.

use serde::Deserialize;

use super::{ImageError, reference::check_digest};

/// The media types asked for, the ones with several platforms first.
pub(crate) const ACCEPTED: &str = "application/vnd.oci.image.index.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, \
    application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.v2+json";
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
    #[serde(default)]
    artifact_type: Option<String>,
}

/// Media types of an image's config, Docker's and OCI's.
const CONFIGS: [&str; 2] =
    ["application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json"];
/// The most manifests of an index.
const MAX_MANIFESTS: usize = 1000;

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
        if manifests.len() > MAX_MANIFESTS {
            let count = manifests.len();
            return Err(unsupported(format!(
                "it lists {count} manifests; {MAX_MANIFESTS} at most"
            )));
        }
        manifests.iter().try_for_each(check)?;
        return Ok(Document::Index(manifests));
    }
    let (Some(config), Some(layers)) = (raw.config, raw.layers) else {
        return Err(corrupt("it names neither layers nor manifests".to_owned()));
    };
    check(&config)?;
    // A descriptor without a type is an old writer's; one with another is no image.
    if !config.media_type.is_empty() && !CONFIGS.contains(&config.media_type.as_str()) {
        let kind = raw.artifact_type.unwrap_or(config.media_type);
        return Err(unsupported(format!("it is an artifact ({kind}), not a container image")));
    }
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
        if !kind.is_empty() && !is_layer(kind) {
            return Err(unsupported(format!(
                "{} is {kind:?}, not a layer that can be unpacked",
                layer.digest
            )));
        }
    }
    Ok(Document::Image { config, layers })
}

/// Whether a layer of this type can be unpacked: not, for example, an encrypted one. Which
/// compression it has is read from its content.
fn is_layer(kind: &str) -> bool {
    ["application/vnd.oci.image.layer.v1.tar", "application/vnd.docker.image.rootfs.diff.tar"]
        .iter()
        .filter_map(|tar| kind.strip_prefix(tar))
        .any(|how| matches!(how, "" | "+gzip" | "+zstd" | ".gzip" | ".zstd"))
}

/// The manifest of an index that fits this machine best: its own architecture and variant, then
/// older variants that it runs too, then another architecture's that it runs. The order is that of
/// containerd's `platforms.Only`.
pub(crate) fn choose<'a>(
    manifests: &'a [Descriptor],
    machine: &Platform,
) -> Option<&'a Descriptor> {
    let wanted = runs(machine);
    let rank = |what: &Descriptor| match &what.platform {
        // A lone entry need not say.
        None => (manifests.len() == 1).then_some(0),
        Some(platform) => {
            let platform = normalised(platform);
            wanted.iter().position(|one| *one == platform)
        }
    };
    // Of equals, the first.
    manifests
        .iter()
        .filter_map(|what| Some((rank(what)?, what)))
        .min_by_key(|(rank, _)| *rank)
        .map(|(_, what)| what)
}

/// Whether a machine runs what is made for `platform`.
pub(crate) fn fits(platform: &Platform, machine: &Platform) -> bool {
    runs(machine).contains(&normalised(platform))
}

/// What a machine runs, best first: OS, architecture, variant.
fn runs(machine: &Platform) -> Vec<(String, String, String)> {
    let (os, architecture, variant) = normalised(machine);
    let one = |architecture: &str, variant: &str| {
        (os.clone(), architecture.to_owned(), variant.to_owned())
    };
    let arm = |from: u32| (5..=from).rev().map(move |n| ("arm", format!("v{n}")));
    let number = variant.strip_prefix('v').and_then(|n| n.parse().ok());
    match architecture.as_str() {
        "amd64" => {
            let older = (2..=number.unwrap_or(1)).rev().map(|n| one("amd64", &format!("v{n}")));
            older.chain([one("amd64", ""), one("386", "")]).collect()
        }
        // Every 64-bit machine is taken to run 32-bit programs, as containerd does.
        "arm64" => [one("arm64", "")]
            .into_iter()
            .chain(arm(8).map(|(architecture, variant)| one(architecture, &variant)))
            .collect(),
        "arm" => arm(number.unwrap_or(7))
            .map(|(architecture, variant)| one(architecture, &variant))
            .collect(),
        _ => vec![one(&architecture, &variant)],
    }
}

/// A platform by its one name of several, as containerd's `platforms.Normalize` gives it.
fn normalised(platform: &Platform) -> (String, String, String) {
    let os = platform.os.to_ascii_lowercase();
    let os = if os.is_empty() { "linux".to_owned() } else { os };
    let variant = platform.variant.as_deref().unwrap_or_default().to_ascii_lowercase();
    let architecture = platform.architecture.to_ascii_lowercase();
    let (architecture, variant) = match (architecture.as_str(), variant.as_str()) {
        ("i386", _) => ("386", ""),
        ("x86_64" | "x86-64" | "amd64", "v1") => ("amd64", ""),
        ("x86_64" | "x86-64" | "amd64", variant) => ("amd64", variant),
        ("aarch64" | "arm64", "8" | "v8" | "v8.0") => ("arm64", ""),
        ("aarch64" | "arm64", variant) => ("arm64", variant),
        ("armhf", _) | ("arm", "" | "7") => ("arm", "v7"),
        ("armel", _) | ("arm", "6") => ("arm", "v6"),
        ("arm", "5") => ("arm", "v5"),
        ("arm", "8") => ("arm", "v8"),
        other => other,
    };
    (os, architecture.to_owned(), variant.to_owned())
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
            entry('3', Some(("linux", "x86_64", None))),
            entry('4', Some(("linux", "arm", Some("v6")))),
            entry('5', Some(("linux", "arm", None))),
            entry('6', Some(("linux", "arm64", Some("v8")))),
            entry('7', Some(("linux", "386", None))),
            entry('8', Some(("linux", "amd64", Some("v1")))),
        ];
        let machine = |architecture: &str, variant: Option<&str>| Platform {
            architecture: architecture.to_owned(),
            os: "linux".to_owned(),
            variant: variant.map(str::to_owned),
        };
        for (machine, from, want) in [
            (machine("amd64", None), 0.., Some(3)),
            (machine("amd64", None), 4.., Some(8)),
            (machine("amd64", Some("v4")), 0.., Some(2)),
            (machine("arm", Some("v7")), 0.., Some(5)),
            (machine("arm", Some("v6")), 0.., Some(4)),
            (machine("arm", Some("v5")), 0.., None),
            (machine("arm64", Some("v8")), 0.., Some(6)),
            (machine("arm64", None), 7.., None),
            (machine("s390x", None), 0.., None),
        ] {
            let want = want.map(|at: usize| &list[at]);
            assert_eq!(choose(&list[from.clone()], &machine), want, "{machine:?} {from:?}");
        }
        // What else the machine runs, when there is nothing better.
        let list = [&list[2], &list[4], &list[7]].map(Clone::clone);
        assert_eq!(choose(&list, &machine("amd64", None)), Some(&list[2]));
        assert_eq!(choose(&list, &machine("arm64", Some("v8"))), Some(&list[1]));
        assert!(choose(&[entry('0', None)], &this_machine()).is_some());
        assert!(choose(&[entry('0', None), entry('1', None)], &this_machine()).is_none());
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
        let artifact = format!(
            r#"{{"schemaVersion":2,"config":{{"mediaType":"application/vnd.cncf.helm.config.v1+json",
            "digest":"{sha}","size":1}},"layers":[]}}"#
        );
        let many = format!(r#"{{"digest":"{sha}"}},"#).repeat(1001);
        let many = format!(r#"{{"schemaVersion":2,"manifests":[{}]}}"#, many.trim_end_matches(','));
        for (text, want) in [
            ("{", "EOF"),
            (r#"{"schemaVersion":1}"#, "schema version 1"),
            (r#"{"schemaVersion":2}"#, "neither"),
            (r#"{"schemaVersion":2,"config":{"digest":"sha256:1"},"layers":[]}"#, "hex"),
            (&layer("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"), "foreign"),
            (&layer("application/vnd.oci.image.layer.nondistributable.v1.tar"), "foreign"),
            (&layer("application/wasm"), "not a layer"),
            (&layer("application/vnd.oci.image.layer.v1.tar+gzip+encrypted"), "not a layer"),
            (&artifact, "artifact (application/vnd.cncf.helm"),
            (&many, "1001 manifests"),
        ] {
            let error = parse("x", text.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(want), "{text}: {error}");
        }
        for kind in [
            "application/vnd.oci.image.layer.v1.tar+zstd",
            "application/vnd.docker.image.rootfs.diff.tar",
            "application/vnd.docker.image.rootfs.diff.tar.gzip",
            "",
        ] {
            assert!(parse("x", layer(kind).as_bytes()).is_ok(), "{kind}");
        }
    }
}
