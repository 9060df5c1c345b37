//! One provider at work: whether it is asked for an image, with which token, once for all who ask the
//! same at the same time; and its answer kept for as long as it says.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use futures::FutureExt;
use futures::future::{BoxFuture, Shared, WeakShared};
use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequestSpec};
use k8s_openapi::api::core::v1::{Pod, ServiceAccount};
use tokio::time::Instant;

use super::cache::{AccountKey, Cache, digest};
use super::config::{CacheType, Provider, TokenAttributes};
use super::exec::{Exec, ExecError, Run};
use super::glob;
use super::protocol::{AccountFacts, Logins, Response, decode_response, encode_request};
use super::{Account, Source};
use crate::ids::{NamespacedName, PodUid};
use crate::metrics::METRICS;
use crate::objects::{ObjectError, Objects};

/// Why a provider gave nothing. Never with a credential in it.
#[derive(Clone, Debug, thiserror::Error)]
pub(super) enum ProvideError {
    #[error("service account: {0}")]
    Account(#[from] ObjectError),
    #[error("service account {0} does not exist")]
    NoAccount(NamespacedName),
    #[error(transparent)]
    Exec(#[from] ExecError),
    #[error("{program} gave a bad answer: {reason}")]
    Answer { program: String, reason: String },
    #[error(
        "{program} gave the service account's token back as the password, which needs \
         tokenAttributes.cacheType: Token"
    )]
    Echoed { program: String },
}

type Answered = Result<Arc<Response>, ProvideError>;
type Flight = Shared<BoxFuture<'static, Answered>>;
/// What two requests have in common that are one: image, token, annotations.
type FlightKey = (String, Option<[u8; 32]>, Vec<(String, String)>);

/// A provider with what it answered.
pub(super) struct Asked {
    provider: Provider,
    program: PathBuf,
    exec: Arc<dyn Exec>,
    cache: Mutex<Cache>,
    flights: Mutex<HashMap<FlightKey, WeakShared<BoxFuture<'static, Answered>>>>,
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(|e| e.into_inner())
}

/// What of the account is told and kept, by what was configured; `None` where the program is not to be
/// asked without a required annotation.
fn plan_annotations(
    wanted: &TokenAttributes,
    account: &ServiceAccount,
) -> Option<std::collections::BTreeMap<String, String>> {
    let has = account.metadata.annotations.as_ref();
    let value = |key: &String| has.and_then(|a| a.get(key)).cloned().map(|v| (key.clone(), v));
    let required: Option<Vec<_>> = wanted.required.iter().map(value).collect();
    Some(required?.into_iter().chain(wanted.optional.iter().filter_map(value)).collect())
}

impl Asked {
    pub(super) fn new(provider: Provider, programs: &Path, exec: Arc<dyn Exec>) -> Self {
        let program = programs.join(&provider.name);
        let (cache, flights) = (Mutex::default(), Mutex::default());
        Self { provider, program, exec, cache, flights }
    }

    pub(super) fn name(&self) -> &str {
        &self.provider.name
    }

    /// Logins for `image` (registry and path), and whose they are.
    pub(super) async fn provide(
        &self,
        image: &str,
        pod: &Pod,
        objects: &dyn Objects,
    ) -> Result<Option<(Arc<Logins>, Source)>, ProvideError> {
        if !self.provider.match_images.iter().any(|pattern| glob::covers(pattern, image)) {
            return Ok(None);
        }
        let (mut facts, mut key, mut source) = (None, None, Source::Node);
        if let Some(wanted) = &self.provider.token {
            let named = pod.spec.as_ref().and_then(|spec| spec.service_account_name.as_deref());
            match named.filter(|name| !name.is_empty()) {
                None if wanted.require_account => return Ok(None),
                None => {}
                Some(name) => {
                    let Some((told, of)) = account_of(wanted, name, pod, objects).await? else {
                        tracing::debug!(
                            provider = self.name(),
                            image,
                            account = name,
                            "the service account lacks an annotation that the provider requires"
                        );
                        return Ok(None);
                    };
                    source = Source::ServiceAccount(of.clone());
                    key = Some(AccountKey {
                        namespace: of.namespace,
                        name: of.name,
                        uid: of.uid,
                        annotations: told.annotations.clone(),
                        token: (wanted.cache_type == CacheType::Token).then(|| digest(&told.token)),
                    });
                    facts = Some(told);
                }
            }
        }
        if let Some(kept) = lock(&self.cache).get(image, key.as_ref(), Instant::now()) {
            return Ok(Some((kept, source)));
        }
        let response = self.ask(image, facts.clone()).await?;
        let echoes = |facts: &AccountFacts| {
            !facts.token.is_empty()
                && response.logins.values().any(|login| login.password == facts.token)
        };
        if key.as_ref().is_some_and(|key| key.token.is_none()) && facts.as_ref().is_some_and(echoes)
        {
            return Err(ProvideError::Echoed { program: self.shown() });
        }
        let logins = Arc::new(response.logins.clone());
        let lasts = response.cache.unwrap_or(self.provider.default_cache);
        let now = Instant::now();
        if let Some(until) = now.checked_add(lasts).filter(|_| !lasts.is_zero()) {
            let what = (image, response.scope);
            lock(&self.cache).put(what, key, logins.clone(), (now, until));
        }
        Ok(Some((logins, source)))
    }

    fn shown(&self) -> String {
        self.program.display().to_string()
    }

    /// Asks the program, or waits with whoever asks it the same just now.
    async fn ask(&self, image: &str, facts: Option<AccountFacts>) -> Answered {
        let token = facts.as_ref().map(|facts| digest(&facts.token));
        let annotations = facts.iter().flat_map(|facts| facts.annotations.clone()).collect();
        let key: FlightKey = (image.to_owned(), token, annotations);
        let flight = {
            let mut flights = lock(&self.flights);
            flights.retain(|_, flight| flight.upgrade().is_some());
            match flights.get(&key).and_then(WeakShared::upgrade) {
                Some(flight) => flight,
                None => {
                    let flight: Flight = self.run(image, facts).boxed().shared();
                    // It is not done: nobody has looked at it yet.
                    if let Some(weak) = flight.downgrade() {
                        flights.insert(key, weak);
                    }
                    flight
                }
            }
        };
        flight.await
    }

    fn run(
        &self,
        image: &str,
        facts: Option<AccountFacts>,
    ) -> impl Future<Output = Answered> + Send + 'static {
        let run = Run {
            program: self.program.clone(),
            args: self.provider.args.clone(),
            env: self.provider.env.clone(),
            input: encode_request(self.provider.version, image, facts.as_ref()),
            secret: facts.map(|facts| facts.token).unwrap_or_default(),
        };
        let (exec, version) = (self.exec.clone(), self.provider.version);
        let (name, program) = (self.provider.name.clone(), self.shown());
        async move {
            let begun = Instant::now();
            let ran = exec.run(run).await;
            METRICS.images.provider_ran(&name, begun.elapsed(), ran.is_err());
            decode_response(version, &ran?)
                .map(Arc::new)
                .map_err(|reason| ProvideError::Answer { program, reason })
        }
    }
}

/// What the program is told of the pod's account.
async fn account_of(
    wanted: &TokenAttributes,
    name: &str,
    pod: &Pod,
    objects: &dyn Objects,
) -> Result<Option<(AccountFacts, Account)>, ProvideError> {
    let namespace = NamespacedName::of_pod(pod).namespace;
    let key = NamespacedName::new(&namespace, name);
    let account = objects.service_account(&key).await?;
    let account = account.ok_or_else(|| ProvideError::NoAccount(key.clone()))?;
    let Some(annotations) = plan_annotations(wanted, &account) else { return Ok(None) };
    let spec = TokenRequestSpec {
        audiences: Some(vec![wanted.audience.clone()]),
        expiration_seconds: None,
        bound_object_ref: Some(BoundObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Pod".to_owned()),
            name: pod.metadata.name.clone(),
            uid: Some(PodUid::of(pod).as_str().to_owned()),
        }),
    };
    let token = objects.service_account_token(&key, spec).await?.token.unwrap_or_default();
    let of = Account {
        uid: account.metadata.uid.clone().unwrap_or_default(),
        namespace: namespace.to_string(),
        name: name.to_owned(),
    };
    Ok(Some((AccountFacts { token, annotations }, of)))
}
