//! Reading the folders with CDI files.

use std::fs;
use std::path::{Path, PathBuf};

use super::document::{Document, DocumentError};
use super::{File, Registry};

/// The longest file that is read, in bytes.
const MAX_FILE: u64 = 4 << 20;

/// Reads all files of the folders, which may be missing. A file that cannot be read is remembered
/// with the reason.
pub fn load(directories: &[PathBuf]) -> Registry {
    let mut files = Vec::new();
    for (priority, directory) in directories.iter().enumerate() {
        let Ok(entries) = fs::read_dir(directory) else { continue };
        let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
        paths.sort();
        for path in paths {
            let ending = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
            if matches!(ending, "json" | "yaml") && path.is_file() {
                let document = read(&path).and_then(|text| Document::parse(&path, &text));
                if let Err(error) = &document {
                    tracing::warn!(path = %path.display(), %error, "unusable CDI file");
                }
                files.push(File { path, priority, document });
            }
        }
    }
    Registry::new(directories.to_vec(), files)
}

fn read(path: &Path) -> Result<String, DocumentError> {
    let failed = |e: std::io::Error| DocumentError::Syntax(e.to_string());
    let length = fs::metadata(path).map_err(failed)?.len();
    if length > MAX_FILE {
        return Err(DocumentError::Syntax(format!("{length} bytes are too many")));
    }
    fs::read_to_string(path).map_err(failed)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn files_of_all_folders_are_read_and_others_left_alone() {
        let root = tempfile::tempdir().unwrap();
        let folders = [root.path().join("a"), root.path().join("missing"), root.path().join("b")];
        fs::create_dir(&folders[0]).unwrap();
        fs::create_dir(&folders[2]).unwrap();
        let text = |value: &str| {
            format!(
                "cdiVersion: 0.3.0\nkind: v/c\ndevices:\n- name: d\n  containerEdits:\n    env: [V={value}]\n"
            )
        };
        fs::write(folders[0].join("v.yaml"), text("a")).unwrap();
        fs::write(folders[0].join("v.txt"), text("no")).unwrap();
        fs::write(folders[0].join("w.yaml"), "kind: [").unwrap();
        fs::create_dir(folders[0].join("x.yaml")).unwrap();
        fs::write(folders[2].join("v.yaml"), text("b")).unwrap();
        let registry = load(&folders);
        let edits = registry.resolve(&["v/c=d".parse().unwrap()]).unwrap();
        assert_eq!(edits.environment(), ["V=b"]);
    }
}
