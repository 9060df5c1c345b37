//! Who a container's process runs as: ids from the pod, or names from the image looked up in the
//! container's own `/etc/passwd` and `/etc/group`.

use serde::{Deserialize, Serialize};

use crate::api;

/// What was asked for, before the container's files were read.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserRequest {
    /// `name|uid[:name|gid]`, from `runAsUser`, the CRI user name or the image.
    pub user: String,
    /// `runAsGroup`, over anything the files say.
    pub gid: Option<u32>,
    /// `supplementalGroups` and `fsGroup`.
    pub supplemental: Vec<u32>,
    /// `supplementalGroupsPolicy: Strict`: groups of the image's `/etc/group` do not count.
    pub strict: bool,
}

/// Whom the process runs as.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    pub uid: u32,
    pub gid: u32,
    pub groups: Vec<u32>,
    pub home: String,
}

/// Why a user cannot be resolved.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum UserError {
    #[error("no user {0:?} in the container's /etc/passwd; use a numeric id or runAsUser")]
    NoUser(String),
    #[error("no group {0:?} in the container's /etc/group; use a numeric id or runAsGroup")]
    NoGroup(String),
    #[error("id {0} is out of range")]
    Range(i64),
}

/// Reads the request out of the CRI config and the image's user.
pub fn request(
    security: Option<&api::LinuxContainerSecurityContext>,
    image_user: &str,
) -> Result<UserRequest, UserError> {
    let Some(security) = security else {
        return Ok(UserRequest { user: image_user.to_owned(), ..Default::default() });
    };
    let id = |value: i64| u32::try_from(value).map_err(|_| UserError::Range(value));
    let user = match &security.run_as_user {
        // As containerd: of the two the name counts.
        _ if !security.run_as_username.is_empty() => security.run_as_username.clone(),
        Some(uid) => id(uid.value)?.to_string(),
        None => image_user.to_owned(),
    };
    let gid = security.run_as_group.as_ref().map(|g| id(g.value)).transpose()?;
    let supplemental =
        security.supplemental_groups.iter().map(|g| id(*g)).collect::<Result<_, _>>()?;
    let strict = security.supplemental_groups_policy() == api::SupplementalGroupsPolicy::Strict;
    Ok(UserRequest { user, gid, supplemental, strict })
}

struct Passwd<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

fn passwd_entries(text: &str) -> impl Iterator<Item = Passwd<'_>> {
    text.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let uid = fields.nth(1)?.parse().ok()?;
        let gid = fields.next()?.parse().ok()?;
        let home = fields.nth(1).unwrap_or_default();
        Some(Passwd { name, uid, gid, home })
    })
}

/// Groups as (name, gid, members).
fn group_entries(text: &str) -> impl Iterator<Item = (&str, u32, &str)> {
    text.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let gid = fields.nth(1)?.parse().ok()?;
        Some((name, gid, fields.next().unwrap_or_default()))
    })
}

/// Resolves a request against the text of the container's passwd and group files (empty where a
/// file is missing). A number is an id and never looked up as a name: otherwise an image with a
/// user called `1000` would decide who `runAsUser: 1000` is.
pub fn resolve(request: &UserRequest, passwd: &str, group: &str) -> Result<Identity, UserError> {
    let (user, group_name) = match request.user.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (request.user.as_str(), None),
    };
    let user = if user.is_empty() { "0" } else { user };
    let number = user.parse::<u32>().ok();
    let entry = match number {
        Some(uid) => passwd_entries(passwd).find(|e| e.uid == uid),
        None => passwd_entries(passwd).find(|e| e.name == user),
    };
    let uid = match (&entry, number) {
        (_, Some(uid)) => uid,
        (Some(entry), None) => entry.uid,
        (None, None) => return Err(UserError::NoUser(user.to_owned())),
    };
    let named_group = match group_name.filter(|g| !g.is_empty()) {
        None => None,
        Some(name) => Some(
            name.parse()
                .ok()
                .or_else(|| group_entries(group).find(|(n, ..)| *n == name).map(|(_, gid, _)| gid))
                .ok_or_else(|| UserError::NoGroup(name.to_owned()))?,
        ),
    };
    let gid = request.gid.or(named_group).or(entry.as_ref().map(|e| e.gid)).unwrap_or(0);
    let mut groups = vec![gid];
    let mut add = |gid: u32| {
        if !groups.contains(&gid) {
            groups.push(gid);
        }
    };
    // `user:group` names the whole group list, so memberships count only without it.
    if !request.strict
        && named_group.is_none()
        && let Some(entry) = &entry
    {
        group_entries(group)
            .filter(|(_, _, members)| members.split(',').any(|m| m == entry.name))
            .for_each(|(_, gid, _)| add(gid));
    }
    request.supplemental.iter().for_each(|gid| add(*gid));
    let home = entry.map(|e| e.home).filter(|h| !h.is_empty()).unwrap_or("/").to_owned();
    Ok(Identity { uid, gid, groups, home })
}
