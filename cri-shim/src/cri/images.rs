//! The ImageService: the CRI's words for the image store.

use std::collections::HashMap;

use tonic::Status;

use super::{Shim, blocking};
use crate::api;
use crate::image::{Image, ImageError, ImageReference};
use crate::monitor::record;

impl Shim {
    pub(super) fn list_images(
        &self,
        filter: Option<api::ImageFilter>,
    ) -> Result<Vec<api::Image>, Status> {
        let name = filter.and_then(|f| f.image).map(|i| i.image).unwrap_or_default();
        if !name.is_empty() {
            let found = self.images.status(&name)?;
            return Ok(found.iter().map(|i| described(i)).collect());
        }
        let all = self.images.list()?;
        Ok(all.iter().map(|i| described(i)).collect())
    }

    pub(super) fn image_status(
        &self,
        request: &api::ImageStatusRequest,
    ) -> Result<api::ImageStatusResponse, Status> {
        let name = request.image.as_ref().map(|i| i.image.as_str()).unwrap_or_default();
        // A name that cannot be one is an image that is not here.
        let found = match self.images.status(name) {
            Ok(found) => found,
            Err(ImageError::InvalidReference { .. }) => None,
            Err(error) => return Err(error.into()),
        };
        let info =
            if request.verbose { self.verbose(name, found.as_deref()) } else { HashMap::new() };
        Ok(api::ImageStatusResponse { image: found.as_ref().map(|i| described(i)), info })
    }

    /// What is there to say beside the status: `info` as crictl and containerd have it, and `pull`
    /// while the image is being pulled, which is how `longshore image pull` sees the progress.
    fn verbose(&self, name: &str, image: Option<&Image>) -> HashMap<String, String> {
        let mut info = HashMap::new();
        if let Some(image) = image {
            let about = serde_json::json!({
                "chainID": image.chain_id(),
                "imageSpec": image.config,
            });
            info.insert("info".to_owned(), about.to_string());
        }
        let wanted = ImageReference::parse(name).map(|reference| reference.to_string());
        let pulls = self.images.pulls();
        if let Some(pull) =
            pulls.iter().find(|pull| wanted.as_ref().is_ok_and(|w| *w == pull.reference))
            && let Ok(text) = serde_json::to_string(pull)
        {
            info.insert("pull".to_owned(), text);
        }
        info
    }

    pub(super) async fn pull_image(
        &self,
        request: api::PullImageRequest,
    ) -> Result<api::PullImageResponse, Status> {
        let name = request.image.unwrap_or_default().image;
        let id = self.images.pull(&name, request.auth).await?;
        Ok(api::PullImageResponse { image_ref: id.to_string() })
    }

    pub(super) async fn remove_image(
        &self,
        request: api::RemoveImageRequest,
    ) -> Result<api::RemoveImageResponse, Status> {
        let name = request.image.unwrap_or_default().image;
        let images = self.images.clone();
        blocking(move || match images.status(&name) {
            Ok(Some(_)) => images.remove(&name),
            // Gone is what is wanted.
            Ok(None) => Ok(()),
            Err(error) => Err(error),
        })
        .await??;
        Ok(api::RemoveImageResponse {})
    }

    pub(super) async fn image_fs_info(&self) -> Result<api::ImageFsInfoResponse, Status> {
        let images = self.images.clone();
        let info = blocking(move || images.fs_info()).await??;
        let images = api::FilesystemUsage {
            timestamp: record::now(),
            fs_id: Some(api::FilesystemIdentifier {
                mountpoint: info.mountpoint.display().to_string(),
            }),
            used_bytes: Some(api::UInt64Value { value: info.used_bytes }),
            inodes_used: Some(api::UInt64Value { value: info.inodes_used }),
        };
        // Containers write to the same file system: their layers are beside the images.
        Ok(api::ImageFsInfoResponse {
            container_filesystems: vec![images.clone()],
            image_filesystems: vec![images],
        })
    }
}

fn described(image: &Image) -> api::Image {
    let user = image.config.config().as_ref().and_then(|c| c.user().clone()).unwrap_or_default();
    let name = user.split(':').next().unwrap_or_default();
    let uid = name.parse().ok().map(|value| api::Int64Value { value });
    api::Image {
        id: image.id.to_string(),
        repo_tags: image.repo_tags.clone(),
        repo_digests: image.repo_digests.clone(),
        size: image.size,
        username: if uid.is_none() { name.to_owned() } else { String::new() },
        uid,
        spec: None,
        pinned: image.pinned,
    }
}
