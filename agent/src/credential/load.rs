//! Reads the configuration of credential providers from its files and sees that their programs are
//! there. At start only, as kubelet does: a node that cannot pull says so at once.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::config::{self, Provider};

/// Where providers are configured, and where their programs are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Places {
    /// `--image-credential-provider-config`: a file, or a folder of `*.json`, `*.yaml`, `*.yml`.
    pub config: PathBuf,
    /// `--image-credential-provider-bin-dir`.
    pub programs: PathBuf,
    /// Feature gate `KubeletServiceAccountTokenForCredentialProviders`.
    pub tokens: bool,
}

/// The providers in order, and the digest of their files.
#[derive(Debug)]
pub struct Loaded {
    /// As configured; names differ.
    pub providers: Vec<Provider>,
    /// `sha256:...` over all files, as kubelet's metric shows it.
    pub hash: String,
}

/// Why the node must not run with these providers.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A file or folder cannot be read.
    #[error("read {path} (--image-credential-provider-config): {cause}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// The folder has no file that could be one.
    #[error(
        "{0} (--image-credential-provider-config) has no *.yaml, *.yml or *.json file in it; put a \
         CredentialProviderConfig there"
    )]
    Empty(PathBuf),
    /// A file is wrong.
    #[error("{path} (--image-credential-provider-config): {}", errors.join("; "))]
    Invalid {
        /// Which.
        path: PathBuf,
        /// By field.
        errors: Vec<String>,
    },
    /// Two providers of one name.
    #[error(
        "{path} (--image-credential-provider-config): a second provider named {name:?}; merge them"
    )]
    Repeated {
        /// The file with the second one.
        path: PathBuf,
        /// The name.
        name: String,
    },
    /// A program cannot be run.
    #[error(
        "credential provider {name:?}: {path} {reason}; install the program there, or point \
         --image-credential-provider-bin-dir to its folder"
    )]
    Program {
        /// The provider.
        name: String,
        /// Where its program should be.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
}

/// Reads and checks.
///
/// # Errors
/// As [`LoadError`] tells.
pub fn load(places: &Places) -> Result<Loaded, LoadError> {
    let mut providers: Vec<Provider> = Vec::new();
    let mut names = BTreeSet::new();
    let mut hash = Sha256::new();
    for path in files(&places.config)? {
        let text =
            fs::read(&path).map_err(|cause| LoadError::Read { path: path.clone(), cause })?;
        hash.update((text.len() as u64).to_be_bytes());
        hash.update(&text);
        let read = config::decode(&text, places.tokens)
            .map_err(|errors| LoadError::Invalid { path: path.clone(), errors })?;
        for provider in read {
            if !names.insert(provider.name.clone()) {
                return Err(LoadError::Repeated { path, name: provider.name });
            }
            providers.push(provider);
        }
    }
    for provider in &providers {
        let path = places.programs.join(&provider.name);
        let reason = match fs::metadata(&path) {
            Ok(found) if !found.is_file() => "is no file".to_owned(),
            Ok(found) if found.permissions().mode() & 0o111 == 0 => "is not executable".to_owned(),
            Ok(_) => continue,
            Err(error) => format!("cannot be run: {error}"),
        };
        return Err(LoadError::Program { name: provider.name.clone(), path, reason });
    }
    let digest = hash.finalize();
    let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(Loaded { providers, hash: format!("sha256:{hex}") })
}

/// The file itself, or those of a folder by name.
fn files(path: &Path) -> Result<Vec<PathBuf>, LoadError> {
    let error = |cause| LoadError::Read { path: path.to_owned(), cause };
    if !fs::metadata(path).map_err(error)?.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let mut found = Vec::new();
    for entry in fs::read_dir(path).map_err(error)? {
        let file = entry.map_err(error)?.path();
        let wanted = file.extension().and_then(|e| e.to_str());
        if matches!(wanted, Some("json" | "yaml" | "yml")) && !file.is_dir() {
            found.push(file);
        }
    }
    found.sort();
    if found.is_empty() { Err(LoadError::Empty(path.to_owned())) } else { Ok(found) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(name: &str) -> String {
        format!(
            "apiVersion: kubelet.config.k8s.io/v1\nkind: CredentialProviderConfig\nproviders:\n- {{name: \
             {name}, matchImages: [r.io], defaultCacheDuration: 1m, apiVersion: \
             credentialprovider.kubelet.k8s.io/v1}}\n"
        )
    }

    #[test]
    fn a_folder_of_files_is_read_in_order_and_programs_must_be_there() {
        let dir = tempfile::tempdir().unwrap();
        let (config, programs) = (dir.path().join("config"), dir.path().join("bin"));
        fs::create_dir_all(&config).unwrap();
        fs::create_dir_all(&programs).unwrap();
        let places = Places { config: config.clone(), programs: programs.clone(), tokens: true };
        assert!(matches!(load(&places), Err(LoadError::Empty(_))));
        fs::write(config.join("20.yaml"), text("second")).unwrap();
        fs::write(config.join("10.json"), text("first")).unwrap();
        fs::write(config.join("README"), "none").unwrap();
        let error = load(&places).unwrap_err().to_string();
        assert!(error.contains("\"first\"") && error.contains("No such file"), "{error}");
        for name in ["first", "second"] {
            fs::write(programs.join(name), "").unwrap();
        }
        let error = load(&places).unwrap_err().to_string();
        assert!(error.contains("is not executable"), "{error}");
        for name in ["first", "second"] {
            let mode = fs::Permissions::from_mode(0o755);
            fs::set_permissions(programs.join(name), mode).unwrap();
        }
        let loaded = load(&places).unwrap();
        let names: Vec<_> = loaded.providers.iter().map(|p| p.name.as_str()).collect();
        assert_eq!(names, ["first", "second"]);
        assert_eq!(loaded.hash.len(), 71);
        fs::write(config.join("30.yml"), text("first")).unwrap();
        let error = load(&places).unwrap_err().to_string();
        assert!(error.contains("30.yml") && error.contains("a second provider"), "{error}");
        fs::write(config.join("30.yml"), "kind: X\n").unwrap();
        let error = load(&places).unwrap_err().to_string();
        assert!(error.contains("30.yml") && error.contains("kind is \"X\""), "{error}");
        let gone = Places { config: dir.path().join("none"), ..places };
        assert!(matches!(load(&gone), Err(LoadError::Read { .. })));
    }
}
