//! Importing archives: what `docker save`, `skopeo copy … docker-archive:` and `oci-archive:` write.
//!
//! The list of contents of a docker-archive may come last, so the archive must be seekable: a stream
//! or a compressed file is first written to the store's work folder.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, BufReader, Read},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use serde::Deserialize;

use super::{
    ImageError, ImageId, ImageReference, ImageStore, ImportSource,
    blob::{decode, digest_of, unpack_blob},
    index::Names,
    layers::{blocking, plan_layers, unpack_error},
    layout::hex,
    manifest::{self, Descriptor, Document, MAX_DOCUMENT},
    pull::{parse_config, vanished},
    tar_stream::{Kind, TarError, TarStream},
    work::Work,
};

/// The most members an archive may have.
const MAX_MEMBERS: usize = 100_000;
/// Annotations that name an image in an OCI layout, the fuller one first.
const NAMES: [&str; 2] = ["io.containerd.image.name", "org.opencontainers.image.ref.name"];

/// An archive that can be read at any place.
#[derive(Clone)]
struct Archive {
    /// For messages.
    name: Arc<str>,
    file: Arc<File>,
    /// Offset and size of each member; links have those of their target.
    members: Arc<HashMap<String, (u64, u64)>>,
}

/// An image found in an archive.
struct Found {
    config: Vec<u8>,
    /// Member and, if known, digest and size of each layer, bottom first.
    layers: Vec<(String, Option<(String, u64)>)>,
    names: Vec<Names>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerImage {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    #[serde(default)]
    layers: Option<Vec<String>>,
}

impl ImageStore {
    /// Imports all images of an archive for this machine, under the names the archive gives them.
    ///
    /// # Errors
    /// [`ImageError`]; images before the one that failed stay imported.
    pub async fn import(&self, source: ImportSource) -> Result<Vec<ImageId>, ImageError> {
        self.import_as(source, None).await
    }

    /// As [`ImageStore::import`]; an archive of one image is also given `name`.
    ///
    /// # Errors
    /// As [`ImageStore::import`], and [`ImageError::Unsupported`] for a name and several images.
    pub async fn import_as(
        &self,
        source: ImportSource,
        name: Option<&str>,
    ) -> Result<Vec<ImageId>, ImageError> {
        let name = name.map(ImageReference::parse).transpose()?;
        let work = self.start_work().await?;
        let spool = Arc::clone(&work);
        let archive = blocking(move || Archive::open(source, &spool)).await?;
        let reading = archive.clone();
        let mut found = blocking(move || reading.images()).await?;
        if let Some(name) = name {
            let [only] = found.as_mut_slice() else {
                return Err(ImageError::Unsupported {
                    reference: archive.name.to_string(),
                    reason: format!("it holds {} images and can't have one name", found.len()),
                });
            };
            only.names.push(Names { repo_tag: name.repo_tag(), repo_digest: None });
        }
        let mut ids = Vec::new();
        for image in found {
            ids.push(self.import_image(&archive, image).await?);
        }
        Ok(ids)
    }

    async fn import_image(&self, archive: &Archive, image: Found) -> Result<ImageId, ImageError> {
        let config = parse_config(&archive.name, &image.config)?;
        let diff_ids = config.rootfs().diff_ids();
        if diff_ids.len() != image.layers.len() {
            return Err(archive.corrupt(
                "config",
                format!("{} layers instead of {}", diff_ids.len(), image.layers.len()),
            ));
        }
        let plans = plan_layers(diff_ids, image.layers.iter().map(|(_, blob)| blob.clone()));
        for _ in 0..3 {
            let work = self.start_work().await?;
            let unpack = |at: usize, folder: PathBuf| {
                let (archive, member) = (archive.clone(), image.layers[at].0.clone());
                let (expected, limits) = (plans[at].expected.clone(), self.shared.limits());
                let work = Arc::clone(&work);
                blocking(move || {
                    let unpacked = archive.member(&member).and_then(|source| {
                        unpack_blob(source, &expected, &folder, limits).map_err(|error| {
                            unpack_error(&archive.name, &format!("layer {member}"), error)
                        })
                    });
                    drop(work);
                    unpacked
                })
            };
            let layers =
                self.ensure_layers(&archive.name, &work, &plans, unpack, |_, _| {}).await?;
            let names =
                if image.names.is_empty() { vec![Names::default()] } else { image.names.clone() };
            if let Some(id) = self.commit(image.config.clone(), layers, names, true).await? {
                return Ok(id);
            }
        }
        Err(vanished(&archive.name))
    }
}

impl Archive {
    /// Opens the source and lists its members. Blocking.
    fn open(source: ImportSource, work: &Work) -> Result<Self, ImageError> {
        let spool = |reader: &mut dyn Read| -> Result<File, ImageError> {
            let path = work.path().join("archive");
            let mut file = File::options()
                .create(true)
                .truncate(true)
                .read(true)
                .write(true)
                .open(&path)
                .map_err(ImageError::io("create", &path))?;
            io::copy(reader, &mut file).map_err(ImageError::io("write", &path))?;
            Ok(file)
        };
        let (name, file) = match source {
            ImportSource::Reader(reader) => {
                let mut plain = decode(BufReader::new(reader))
                    .map_err(ImageError::io("read archive", "standard input"))?;
                ("standard input".to_owned(), spool(&mut plain)?)
            }
            ImportSource::File(path) => {
                let file = File::open(&path).map_err(ImageError::io("open archive", &path))?;
                let mut magic = [0; 4];
                let read = file.read_at(&mut magic, 0);
                let read = read.map_err(ImageError::io("read archive", &path))?;
                let compressed = matches!(
                    magic,
                    [0x1f, 0x8b, ..] | [0x28, 0xb5, 0x2f, 0xfd] | [0x50..=0x5f, 0x2a, 0x4d, 0x18]
                ) && read == 4;
                let seekable = file.metadata().is_ok_and(|meta| meta.is_file());
                let file = if compressed || !seekable {
                    let mut plain = decode(BufReader::new(&file))
                        .map_err(ImageError::io("read archive", &path))?;
                    spool(&mut plain)?
                } else {
                    file
                };
                (path.display().to_string(), file)
            }
        };
        let mut archive = Self { name: name.into(), file: Arc::new(file), members: Arc::default() };
        archive.members = Arc::new(archive.list()?);
        Ok(archive)
    }

    fn list(&self) -> Result<HashMap<String, (u64, u64)>, ImageError> {
        let mut tar = TarStream::new(BufReader::with_capacity(256 * 1024, self.range(0, u64::MAX)));
        let (mut members, mut links) = (HashMap::new(), Vec::new());
        let read = |error: TarError| self.corrupt("archive", error.to_string());
        while let Some(member) = tar.next().map_err(read)? {
            if members.len() + links.len() >= MAX_MEMBERS {
                return Err(self.corrupt("archive", format!("more than {MAX_MEMBERS} members")));
            }
            let path = plain(&String::from_utf8_lossy(&member.path));
            let link = String::from_utf8_lossy(&member.link).into_owned();
            match member.kind {
                // Only some writer's files within layers have holes; here their place would be wrong.
                Kind::File if member.sparse.is_some() => {
                    return Err(self.corrupt("archive", format!("{path} has holes")));
                }
                Kind::File => {
                    members.insert(path, (tar.position(), member.size));
                }
                Kind::HardLink => links.push((path, plain(&link))),
                Kind::Symlink => {
                    let folder = Path::new(&path).parent().unwrap_or(Path::new(""));
                    let target = plain(&folder.join(&link).to_string_lossy());
                    links.push((path, target));
                }
                _ => {}
            }
        }
        for (path, target) in links {
            if let Some(place) = members.get(&target).copied() {
                members.entry(path).or_insert(place);
            }
        }
        Ok(members)
    }

    fn images(&self) -> Result<Vec<Found>, ImageError> {
        let images = if self.members.contains_key("index.json") {
            self.oci_images()?
        } else if self.members.contains_key("manifest.json") {
            self.docker_images()?
        } else {
            return Err(ImageError::Unsupported {
                reference: self.name.to_string(),
                reason: "it has neither manifest.json (docker-archive) nor index.json (OCI layout)"
                    .to_owned(),
            });
        };
        if images.is_empty() {
            let reason = "it holds no image for this machine".to_owned();
            return Err(ImageError::NotFound { reference: self.name.to_string(), reason });
        }
        Ok(images)
    }

    fn docker_images(&self) -> Result<Vec<Found>, ImageError> {
        let list: Vec<DockerImage> = self.json("manifest.json")?;
        list.into_iter()
            .map(|image| {
                let config = self.document(&image.config)?;
                let stem = image.config.rsplit('/').next().unwrap_or_default();
                let stem = stem.strip_suffix(".json").unwrap_or(stem);
                let digest = digest_of(&config);
                if stem.len() == 64 && stem != hex(&digest) {
                    return Err(self.corrupt(&image.config, format!("its digest is {digest}")));
                }
                let tags = image.repo_tags.unwrap_or_default();
                let names = tags.iter().map(|tag| names(tag, None)).collect::<Result<_, _>>()?;
                let layers = image.layers.unwrap_or_default();
                Ok(Found {
                    config,
                    layers: layers.into_iter().map(|layer| (plain(&layer), None)).collect(),
                    names,
                })
            })
            .collect()
    }

    fn oci_images(&self) -> Result<Vec<Found>, ImageError> {
        let Document::Index(entries) = manifest::parse(&self.name, &self.document("index.json")?)?
        else {
            return Err(self.corrupt("index.json", "it is no index".to_owned()));
        };
        let machine = manifest::this_machine();
        // Several entries may be one image's platforms, or images of their own.
        let usable = entries.iter().filter(|entry| {
            entry.platform.as_ref().is_none_or(|platform| manifest::fits(platform, &machine))
        });
        let mut images: Vec<Found> = Vec::new();
        for entry in usable {
            let mut document = manifest::parse(&self.name, &self.blob(entry)?)?;
            if let Document::Index(nested) = &document {
                let Some(chosen) = manifest::choose(nested, &machine) else { continue };
                document = manifest::parse(&self.name, &self.blob(chosen)?)?;
            }
            let Document::Image { config, layers } = document else {
                return Err(self.corrupt(&entry.digest, "an index nested too deeply".to_owned()));
            };
            let given = entry
                .annotations
                .as_ref()
                .and_then(|annotations| NAMES.iter().find_map(|name| annotations.get(*name)))
                // A bare tag names no repository.
                .filter(|name| name.contains(['/', ':']));
            let names = match given {
                Some(name) => vec![names(name, Some(&entry.digest))?],
                None => Vec::new(),
            };
            let config = self.blob(&config)?;
            if let Some(same) = images.iter_mut().find(|image| image.config == config) {
                same.names.extend(names);
                continue;
            }
            let layers = layers
                .into_iter()
                .map(|layer| (blob_path(&layer.digest), Some((layer.digest, layer.size))))
                .collect();
            images.push(Found { config, layers, names });
        }
        Ok(images)
    }

    /// A document of the layout, checked against its descriptor.
    fn blob(&self, what: &Descriptor) -> Result<Vec<u8>, ImageError> {
        let content = self.document(&blob_path(&what.digest))?;
        let actual = digest_of(&content);
        if actual == what.digest {
            Ok(content)
        } else {
            Err(self.corrupt(&what.digest, format!("its digest is {actual}")))
        }
    }

    fn json<T: serde::de::DeserializeOwned>(&self, path: &str) -> Result<T, ImageError> {
        serde_json::from_slice(&self.document(path)?)
            .map_err(|error| self.corrupt(path, error.to_string()))
    }

    fn document(&self, path: &str) -> Result<Vec<u8>, ImageError> {
        let source = self.member(path)?;
        if source.left > MAX_DOCUMENT {
            return Err(self.corrupt(path, format!("{} bytes", source.left)));
        }
        let mut content = Vec::new();
        let mut source = source;
        source
            .read_to_end(&mut content)
            .map_err(ImageError::io("read archive", self.name.as_ref()))?;
        Ok(content)
    }

    fn member(&self, path: &str) -> Result<Range, ImageError> {
        match self.members.get(&plain(path)) {
            Some((offset, size)) => Ok(self.range(*offset, *size)),
            None => Err(self.corrupt(path, "it is missing in the archive".to_owned())),
        }
    }

    fn range(&self, offset: u64, left: u64) -> Range {
        Range { file: Arc::clone(&self.file), offset, left }
    }

    fn corrupt(&self, object: &str, reason: String) -> ImageError {
        ImageError::Corrupt { reference: self.name.to_string(), object: object.to_owned(), reason }
    }
}

/// A part of the archive's file.
struct Range {
    file: Arc<File>,
    offset: u64,
    left: u64,
}

impl Read for Range {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = buffer.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let read = self.file.read_at(&mut buffer[..most], self.offset)?;
        self.offset += read as u64;
        self.left -= read as u64;
        Ok(read)
    }
}

fn names(name: &str, digest: Option<&String>) -> Result<Names, ImageError> {
    let reference = ImageReference::parse(name)?;
    Ok(Names {
        repo_tag: reference.repo_tag(),
        repo_digest: digest.map(|digest| reference.repo_digest(digest)),
    })
}

fn blob_path(digest: &str) -> String {
    format!("blobs/sha256/{}", hex(digest))
}

/// A member's path without `.`, `..` and doubled slashes: only used to look members up.
fn plain(path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    parts.join("/")
}
