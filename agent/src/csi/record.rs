//! What was done for a volume, beside it on disk: kubelet's `vol_data.json`.
//!
//! A pod's record is written before the driver is first asked for the volume, and removed after the
//! driver has taken everything back. So whatever became of the agent or the pod meanwhile, the
//! record is there as long as anything may be mounted, and says whom to ask. It also says what is
//! done already, with the boot in which it was done, so that a restart of the agent repeats nothing
//! and a reboot everything.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::Path;

use super::CsiError;
use super::volume::Key;

/// Name of the file.
pub(super) const FILE: &str = "vol_data.json";
const DRIVER: &str = "driverName";
const HANDLE: &str = "volumeHandle";
/// Ours; others skip what they do not know.
const DONE_IN_BOOT: &str = "longshoreDoneInBoot";
/// A record is small; what is larger is none.
const MAX: u64 = 64 << 10;

/// The content of a `vol_data.json`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Record(BTreeMap<String, String>);

impl Record {
    /// The record of a staged volume.
    pub(super) fn of_stage(driver: &str, handle: &str) -> Self {
        let fields = [(DRIVER, driver), (HANDLE, handle)];
        Self(fields.into_iter().map(|(key, value)| (key.into(), value.into())).collect())
    }

    /// The record of a pod's volume.
    pub(super) fn of_pod(volume: &super::CsiVolume, node: &str) -> Self {
        let mut record = Self::of_stage(&volume.driver, &volume.handle);
        for (key, value) in [
            ("specVolID", volume.spec_name.clone()),
            ("nodeName", node.to_owned()),
            ("attachmentID", volume.attachment(node)),
            ("volumeLifecycleMode", super::request::lifecycle(volume).to_owned()),
        ] {
            record.0.insert(key.into(), value);
        }
        record
    }

    pub(super) fn driver(&self) -> &str {
        self.0.get(DRIVER).map_or("", String::as_str)
    }

    pub(super) fn handle(&self) -> &str {
        self.0.get(HANDLE).map_or("", String::as_str)
    }

    /// How its volume is found, which is given as the device of a PersistentVolume, or has files.
    pub(super) fn key(&self, device: Option<String>) -> Key {
        Key { driver: self.driver().into(), handle: self.handle().into(), device }
    }

    /// Whether both are about the same volume.
    pub(super) fn is_of(&self, driver: &str, handle: &str) -> bool {
        self.driver() == driver && self.handle() == handle
    }

    /// Whether the driver has done its work, in this `boot`.
    pub(super) fn is_done(&self, boot: &str) -> bool {
        self.0.get(DONE_IN_BOOT).is_some_and(|done| done == boot)
    }

    /// The same, with the driver's work done in `boot`.
    pub(super) fn done(mut self, boot: &str) -> Self {
        self.0.insert(DONE_IN_BOOT.into(), boot.into());
        self
    }

    /// The record in `folder`, if there is one.
    pub(super) fn read(folder: &Path) -> Result<Option<Self>, CsiError> {
        let path = folder.join(FILE);
        let text = match fs::symlink_metadata(&path) {
            Ok(found) if found.is_file() && found.len() <= MAX => fs::read(&path),
            Ok(_) => Err(io::Error::other("it is no file of at most 64 KiB")),
            Err(error) => Err(error),
        };
        let text = match text {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.map_err(CsiError::io("read", &path))?,
        };
        let fields: BTreeMap<String, String> = serde_json::from_slice(&text).map_err(|error| {
            CsiError::io("read", &path)(io::Error::other(format!(
                "{error}; it says which driver has the volume: write it anew, or unmount the \
                 volume and remove its folder"
            )))
        })?;
        let record = Self(fields);
        if record.driver().is_empty() || record.handle().is_empty() {
            let missing = io::Error::other("it names no driver or no volume");
            return Err(CsiError::io("read", &path)(missing));
        }
        Ok(Some(record))
    }

    /// Writes it into `folder`, whole or not at all.
    pub(super) fn write(&self, folder: &Path) -> Result<(), CsiError> {
        let (path, temporary) = (folder.join(FILE), folder.join(".vol_data.json.tmp"));
        let text = serde_json::to_vec(&self.0).unwrap_or_default();
        let write = || {
            let mut file = File::create(&temporary)?;
            file.write_all(&text)?;
            file.sync_all()?;
            fs::rename(&temporary, &path)?;
            File::open(folder)?.sync_all()
        };
        write().map_err(CsiError::io("write", &path))
    }

    /// Removes the record of `folder`, and then the folder, which must be empty by then.
    pub(super) fn remove(folder: &Path) -> Result<(), CsiError> {
        for name in [".vol_data.json.tmp", FILE] {
            let path = folder.join(name);
            absent(fs::remove_file(&path)).map_err(CsiError::io("remove", &path))?;
        }
        absent(fs::remove_dir(folder)).map_err(CsiError::io("remove", folder))
    }
}

/// What is gone already is as good as removed.
pub(super) fn absent(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_comes_back_and_is_done_only_in_its_boot() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("pv");
        fs::create_dir(&folder).unwrap();
        assert_eq!(Record::read(&folder).unwrap(), None);
        let record = Record::of_stage("d.example", "h");
        record.write(&folder).unwrap();
        let read = Record::read(&folder).unwrap().unwrap();
        assert_eq!(read, record);
        assert!(read.is_of("d.example", "h") && !read.is_of("d.example", "other"));
        assert!(!read.is_done("boot"));
        read.done("boot").write(&folder).unwrap();
        let read = Record::read(&folder).unwrap().unwrap();
        assert!(read.is_done("boot") && !read.is_done("next"));
        Record::remove(&folder).unwrap();
        assert!(!folder.exists());
        Record::remove(&folder).unwrap();
    }

    #[test]
    fn what_kubelet_wrote_is_read_and_what_is_broken_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let write = |text: &str| fs::write(folder.path().join(FILE), text).unwrap();
        write(
            r#"{"attachmentID":"csi-1","driverName":"d","nodeName":"n","specVolID":"pv","volumeHandle":"h","volumeLifecycleMode":"Persistent"}"#,
        );
        assert!(Record::read(folder.path()).unwrap().unwrap().is_of("d", "h"));
        for broken in ["", "{", "{}", r#"{"driverName":"d"}"#, "[]"] {
            write(broken);
            assert!(Record::read(folder.path()).is_err(), "{broken}");
        }
        // Its folder holds something else: nothing else is touched.
        fs::write(folder.path().join("other"), "x").unwrap();
        assert!(Record::remove(folder.path()).is_err());
        assert!(folder.path().join("other").exists());
    }
}
