//! The volumes of this node's pods, on the real file system.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use cri_shim::api;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container, Pod, Volume};
use tokio::sync::{Notify, watch};

use super::apply::{OnDisk, apply_all};
use super::claim::{Backing, claim_of};
use super::disks::Disks;
use super::gather::{Certificates, Gather, Wanted, fs_group, group};
use super::layout::{Layout, Plugin, is_file_name};
use super::refresh::RETRY;
use super::usage::{AskingAll, Measure, Measured};
use super::{VolumeError, Volumes, device, nfs, teardown};
use crate::csi::Csi;
use crate::ids::{NamespacedName, PodUid};
use crate::node_context::NodeContext;
use crate::objects::{ObjectRef, Objects};
use crate::pod::allocation::Allocation;

mod drivers;
mod mounts;

/// A pod whose volumes are in place.
pub(super) struct Mounted {
    pub(super) pod: Arc<Pod>,
    /// Objects that its volumes were made from.
    pub(super) uses: Vec<ObjectRef>,
    /// When its volumes must be gathered again, in seconds since the epoch.
    pub(super) due: Option<i64>,
    /// When drivers' volumes must be looked at again: some want to be published again, some grow.
    revisit: Option<i64>,
    /// Volumes that lie elsewhere than their name says, by that name.
    places: HashMap<String, Place>,
}

impl Mounted {
    /// When something is to be done for it.
    pub(super) fn next(&self) -> Option<i64> {
        [self.due, self.revisit].into_iter().flatten().min()
    }
}

/// Where a volume is that is behind a claim, or a driver's.
#[derive(Clone)]
pub(super) struct Place {
    pub(super) path: PathBuf,
    /// The pod's link to it, where it is given as a device.
    pub(super) device: Option<PathBuf>,
    pub(super) read_only: bool,
    /// Its files get the pod's SELinux label.
    pub(super) relabel: bool,
    pub(super) claim: Option<NamespacedName>,
    pub(super) measure: Measure,
}

impl Place {
    fn is_drivers(&self) -> bool {
        matches!(self.measure, Measure::Driver(..))
    }
}

/// A due time that has come.
const AT_ONCE: i64 = 0;
/// A driver that wants to be asked again is after so many seconds, and up to half as many more.
const REPUBLISH: i64 = 60;
/// Whether a volume shall grow is looked up after so many seconds, and up to half as many more.
const LOOK_AT_SIZE: i64 = 90;

/// One pod's volumes; its lock keeps mount, refresh and unmount of one pod apart.
struct Slot {
    busy: tokio::sync::Mutex<()>,
    mounted: Mutex<Option<Mounted>>,
    measured: Mutex<Option<Measured>>,
    /// Turns true once nobody waits for the pod's volumes any more.
    ending: watch::Sender<bool>,
}

impl Default for Slot {
    fn default() -> Self {
        let ending = watch::Sender::new(false);
        Self {
            busy: Default::default(),
            mounted: Default::default(),
            measured: Default::default(),
            ending,
        }
    }
}

/// Volumes under the agent's root.
pub struct NodeVolumes {
    layout: Layout,
    node: Arc<NodeContext>,
    objects: Arc<dyn Objects>,
    /// Where there is a control plane.
    csi: Option<Arc<Csi>>,
    slots: Mutex<HashMap<PodUid, Arc<Slot>>>,
    certificates: Certificates,
    disks: Arc<Disks>,
    asking: AskingAll,
    /// Wakes the refresh loop when a due time may have come nearer.
    pub(super) rescheduled: Notify,
}

impl NodeVolumes {
    /// Volumes for the pods of `node`.
    pub fn new(
        node: Arc<NodeContext>,
        objects: Arc<dyn Objects>,
        csi: Option<Arc<Csi>>,
    ) -> Arc<Self> {
        let layout = Layout::new(&node.root_dir);
        Arc::new(Self {
            disks: Arc::new(Disks::new(&layout)),
            asking: AskingAll::default(),
            layout,
            node,
            objects,
            csi,
            slots: Mutex::default(),
            certificates: Certificates::default(),
            rescheduled: Notify::new(),
        })
    }

    pub(super) fn objects(&self) -> &Arc<dyn Objects> {
        &self.objects
    }

    pub(super) fn asking(&self) -> &AskingAll {
        &self.asking
    }

    pub(super) fn csi(&self) -> Option<&Arc<Csi>> {
        self.csi.as_ref()
    }

    /// Volumes of mounted pods that lie elsewhere than their names say.
    pub(super) fn places(&self) -> Vec<(PodUid, HashMap<String, Place>)> {
        let slots = lock(&self.slots);
        let places = |slot: &Slot| lock(&slot.mounted).as_ref().map(|m| m.places.clone());
        slots
            .iter()
            .filter_map(|(uid, slot)| Some((uid.clone(), places(slot)?)))
            .filter(|(_, places)| !places.is_empty())
            .collect()
    }

    pub(super) fn measured(&self, uid: &PodUid) -> Option<Measured> {
        let slot = lock(&self.slots).get(uid).cloned()?;
        lock(&slot.measured).clone()
    }

    pub(super) fn keep_measured(&self, uid: &PodUid, measured: Measured) {
        // A pod that went meanwhile needs none.
        if let Some(slot) = lock(&self.slots).get(uid).cloned() {
            *lock(&slot.measured) = Some(measured);
        }
    }

    fn slot(&self, uid: &PodUid) -> Arc<Slot> {
        lock(&self.slots).entry(uid.clone()).or_default().clone()
    }

    /// Mounted pods that `chosen` picks.
    pub(super) fn mounted(&self, chosen: impl Fn(&Mounted) -> bool) -> Vec<Arc<Pod>> {
        let slots: Vec<_> = lock(&self.slots).values().cloned().collect();
        let pick = |slot: &Arc<Slot>| {
            lock(&slot.mounted).as_ref().filter(|m| chosen(m)).map(|m| m.pod.clone())
        };
        slots.iter().filter_map(pick).collect()
    }

    /// The nearest time at which a mounted pod is due.
    pub(super) fn next_due(&self) -> Option<i64> {
        let slots: Vec<_> = lock(&self.slots).values().cloned().collect();
        slots.iter().filter_map(|slot| lock(&slot.mounted).as_ref().and_then(Mounted::next)).min()
    }

    /// Tries a failed refresh again then.
    pub(super) fn postpone(&self, uid: &PodUid, due: i64) {
        if let Some(mounted) = lock(&self.slot(uid).mounted).as_mut() {
            mounted.due = Some(due);
        }
    }

    /// Brings the file volumes of a mounted pod up to date.
    pub(super) async fn refresh(&self, uid: &PodUid) -> Result<(), VolumeError> {
        let slot = self.slot(uid);
        let _busy = slot.busy.lock().await;
        let Some(pod) = lock(&slot.mounted).as_ref().map(|mounted| mounted.pod.clone()) else {
            return Ok(());
        };
        self.bring_about(&slot, &pod, true).await
    }

    /// Gathers and applies all volumes, or only those made of files and, when it is time, those of
    /// drivers again. In a mounted pod one volume that
    /// cannot be renewed does not hold the others back; it keeps what it has, and its error is told.
    async fn bring_about(
        &self,
        slot: &Slot,
        pod: &Arc<Pod>,
        files_only: bool,
    ) -> Result<(), VolumeError> {
        let uid = PodUid::of(pod);
        let gather = Gather {
            pod,
            objects: &self.objects,
            node: &self.node,
            certificates: &self.certificates,
            now: Timestamp::now(),
        };
        let mut wanted = Vec::new();
        let (mut all_uses, mut earliest) = (Vec::new(), None);
        let mut failure = None;
        let (mut revisit, mut places) = match lock(&slot.mounted).as_ref() {
            Some(before) if files_only => (before.revisit, before.places.clone()),
            _ => (None, HashMap::new()),
        };
        let now = gather.now.as_second();
        let again = files_only && revisit.is_some_and(|at| at <= now);
        for volume in volumes_of(pod) {
            let is_files = plugin_of(volume).is_some_and(|plugin| plugin != Plugin::EmptyDir);
            let is_drivers =
                again && places.get(&volume.name).is_some_and(|place| place.is_drivers());
            if files_only && !is_files && !is_drivers {
                continue;
            }
            let path = self.layout.volume(&uid, Plugin::Projected, &volume.name);
            let want = match gather.volume(volume, &OnDisk(path)).await {
                Ok(want) => want,
                Err(error) if files_only => {
                    failure.get_or_insert(error);
                    continue;
                }
                Err(error) => return Err(error),
            };
            if let Wanted::Files { uses, due, .. } = &want {
                all_uses.extend(uses.iter().cloned());
                earliest = [earliest, *due].into_iter().flatten().min();
            }
            wanted.push((volume.name.clone(), want));
        }
        let (mut drivers, mut growing) = (Vec::new(), HashMap::new());
        let mut others = Vec::new();
        for (name, want) in wanted {
            match want {
                Wanted::Claimed(Backing::Csi(volume)) => drivers.push((name, volume)),
                Wanted::Growing(volume, grows) => {
                    growing.insert(name.clone(), grows);
                    drivers.push((name, volume));
                }
                other => others.push((name, other)),
            }
        }
        let wanted = others;
        places.extend(wanted.iter().filter_map(|(name, want)| {
            let place = self.place(&uid, want, claim_named(pod, name))?;
            Some((name.clone(), place))
        }));
        let (layout, fs_group, group) = (self.layout.clone(), fs_group(pod), group(pod));
        let target = uid.clone();
        let disks = self.disks.clone();
        blocking(move || apply_all(&layout, &disks, &target, &wanted, fs_group, group)).await?;
        if again || !files_only {
            revisit = None;
        }
        let mut look_again = |seconds: i64, spread: i64| {
            let at = now + seconds + fastrand::i64(0..=spread);
            revisit = Some(revisit.map_or(at, |other: i64| other.min(at)));
        };
        for (name, volume) in drivers {
            match self.set_up(slot, pod, &name, &volume, group, again).await {
                Ok((place, wants_again)) => {
                    if wants_again {
                        look_again(REPUBLISH, REPUBLISH / 2);
                    }
                    if self.may_grow(&volume, again).await {
                        look_again(LOOK_AT_SIZE, LOOK_AT_SIZE / 2);
                    }
                    if let Some(growing) = growing.remove(&name) {
                        self.grow(&volume, &place.path, &growing).await;
                    }
                    places.insert(name, place);
                }
                Err(error) if files_only => {
                    look_again(RETRY, 0);
                    failure.get_or_insert(error);
                }
                Err(error) => return Err(error),
            }
        }
        let mut mounted = lock(&slot.mounted);
        if let (Some(_), Some(before)) = (&failure, mounted.as_ref()) {
            // The volume that failed goes on waiting for its objects.
            all_uses.extend(before.uses.iter().cloned());
        }
        let mut pod = pod.clone();
        if let Some(now) = mounted.as_ref().map(|m| &m.pod).filter(|now| !Arc::ptr_eq(now, &pod))
            && files_only
        {
            // It changed meanwhile, and what was gathered is of before.
            (pod, earliest) = (now.clone(), Some(AT_ONCE));
        }
        *mounted = Some(Mounted { pod, uses: all_uses, due: earliest, revisit, places });
        drop(mounted);
        if earliest.or(revisit).is_some() {
            self.rescheduled.notify_one();
        }
        failure.map_or(Ok(()), Err)
    }

    /// Where a volume is that is behind a claim and no driver's.
    fn place(&self, uid: &PodUid, want: &Wanted, claim: Option<NamespacedName>) -> Option<Place> {
        match want {
            Wanted::Claimed(Backing::Local(volume)) => Some(Place {
                path: self.layout.volume(uid, Plugin::Local, &volume.name),
                device: None,
                read_only: volume.read_only,
                relabel: !volume.read_only,
                claim,
                measure: Measure::FileSystem,
            }),
            Wanted::Claimed(Backing::Nfs(volume)) => Some(Place {
                path: self.layout.volume(uid, Plugin::Nfs, &volume.name),
                device: None,
                read_only: volume.read_only,
                // What is the server's own keeps its labels.
                relabel: false,
                claim,
                measure: Measure::FileSystem,
            }),
            Wanted::Claimed(Backing::Device { name, path, read_only }) => Some(Place {
                path: PathBuf::from(path),
                device: Some(self.layout.device(uid, Plugin::Local, name)),
                read_only: *read_only,
                relabel: false,
                claim,
                measure: Measure::Nobody,
            }),
            Wanted::Claimed(Backing::HostPath(source, read_only)) => Some(Place {
                path: PathBuf::from(&source.path),
                device: None,
                read_only: *read_only,
                // What is the node's own keeps its labels.
                relabel: false,
                claim,
                measure: Measure::Nobody,
            }),
            _ => None,
        }
    }
}

#[async_trait]
impl Volumes for NodeVolumes {
    async fn mount(&self, pod: &Arc<Pod>) -> Result<(), VolumeError> {
        let uid = PodUid::of(pod);
        check_uid(&uid)?;
        let slot = self.slot(&uid);
        let _busy = slot.busy.lock().await;
        self.bring_about(&slot, pod, false).await
    }

    fn pod_changed(&self, pod: &Arc<Pod>) {
        let Some(slot) = lock(&self.slots).get(&PodUid::of(pod)).cloned() else { return };
        let mut mounted = lock(&slot.mounted);
        let Some(mounted) = mounted.as_mut().filter(|m| !Arc::ptr_eq(&m.pod, pod)) else { return };
        if shows_change(&mounted.pod, pod) {
            mounted.due = Some(AT_ONCE);
            self.rescheduled.notify_one();
        }
        mounted.pod = pod.clone();
    }

    async fn container_mounts(
        &self,
        pod: &Pod,
        container: &Container,
        _attempt: u32,
    ) -> Result<Vec<api::Mount>, VolumeError> {
        self.mounts_of(pod, container).await
    }

    fn container_devices(
        &self,
        pod: &Pod,
        container: &Container,
    ) -> Result<Vec<api::Device>, VolumeError> {
        if container.volume_devices.as_ref().is_none_or(Vec::is_empty) {
            return Ok(Vec::new());
        }
        let slot = self.slot(&PodUid::of(pod));
        let mounted = lock(&slot.mounted);
        match mounted.as_ref() {
            Some(mounted) => device::plan_devices(container, &mounted.places),
            None => device::plan_devices(container, &HashMap::new()),
        }
    }

    fn pod_ends(&self, uid: &PodUid) {
        self.slot(uid).ending.send_replace(true);
    }

    async fn unmount(&self, uid: &PodUid) -> Result<(), VolumeError> {
        check_uid(uid)?;
        let slot = self.slot(uid);
        slot.ending.send_replace(true);
        let _busy = slot.busy.lock().await;
        *lock(&slot.mounted) = None;
        // What is bound to parts of a driver's or a server's volume would keep it from going.
        let (bound, remote) = (self.layout.sub_paths(uid), self.layout.of_kind(uid, Plugin::Nfs));
        blocking(move || {
            teardown::unmount_below(&bound)?;
            if remote.is_dir() { nfs::tear_down(&remote) } else { Ok(()) }
        })
        .await?;
        if let Some(csi) = &self.csi {
            csi.tear_down(uid).await.map_err(|source| VolumeError::Csi {
                volume: uid.to_string(),
                spec_name: uid.to_string(),
                block: false,
                source: Box::new(source),
            })?;
        }
        let directory = self.layout.pod(uid);
        let disks = self.disks.clone();
        blocking(move || {
            teardown::remove_tree(&directory)?;
            disks.release()
        })
        .await?;
        lock(&self.slots).remove(uid);
        self.certificates.forget(uid);
        Ok(())
    }

    async fn on_disk(&self) -> Result<Vec<PodUid>, VolumeError> {
        let pods = self.layout.pods();
        blocking(move || {
            let entries = match fs::read_dir(&pods) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
                other => other.map_err(VolumeError::io("read", &pods))?,
            };
            let names = entries.filter_map(Result::ok).map(|entry| entry.file_name());
            Ok(names.filter_map(|name| name.to_str().map(PodUid::from)).collect())
        })
        .await
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn check_uid(uid: &PodUid) -> Result<(), VolumeError> {
    if is_file_name(uid.as_str()) {
        return Ok(());
    }
    let reason = format!("pod UID {:?} cannot name a directory", uid.as_str());
    Err(VolumeError::Invalid { volume: String::new(), reason })
}

fn volumes_of(pod: &Pod) -> impl Iterator<Item = &Volume> {
    pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten())
}

/// The claim that the pod's volume `name` names.
fn claim_named(pod: &Pod, name: &str) -> Option<NamespacedName> {
    let volume = volumes_of(pod).find(|volume| volume.name == name)?;
    let (claim, _) = claim_of(pod, volume)?;
    Some(NamespacedName::new(&NamespacedName::of_pod(pod).namespace, &claim))
}

/// Whether a downwardAPI volume of the pod may show what differs between two states of its object:
/// labels, annotations, and the containers' resources, which an in-place resize changes.
fn shows_change(before: &Pod, now: &Pod) -> bool {
    let shows = volumes_of(now).any(|volume| {
        let sources = volume.projected.iter().flat_map(|p| p.sources.iter().flatten());
        volume.downward_api.is_some() || sources.into_iter().any(|s| s.downward_api.is_some())
    });
    let (was, is) = (&before.metadata, &now.metadata);
    shows
        && (was.labels != is.labels
            || was.annotations != is.annotations
            || !Allocation::asked(before).is_asked_by(now))
}

/// Which directory the volume lies in; `None` for a hostPath, an image and for what is not provided.
fn plugin_of(volume: &Volume) -> Option<Plugin> {
    if volume.config_map.is_some() {
        Some(Plugin::ConfigMap)
    } else if volume.secret.is_some() {
        Some(Plugin::Secret)
    } else if volume.downward_api.is_some() {
        Some(Plugin::DownwardApi)
    } else if volume.projected.is_some() {
        Some(Plugin::Projected)
    } else if volume.empty_dir.is_some()
        || *volume == (Volume { name: volume.name.clone(), ..Default::default() })
    {
        Some(Plugin::EmptyDir)
    } else {
        None
    }
}

/// File system work off the runtime's threads.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, VolumeError> + Send + 'static,
) -> Result<T, VolumeError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(cause) => Err(VolumeError::Io {
            operation: "run work on",
            path: PathBuf::new(),
            source: io::Error::other(cause),
        }),
    }
}
