//! Providers over programs that the test answers for, in paused time.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use k8s_openapi::api::authentication::v1::{TokenRequestSpec, TokenRequestStatus};
use k8s_openapi::api::core::v1::{ConfigMap, Node, Pod, Secret, Service, ServiceAccount};
use serde_json::{Value, json};
use tokio::sync::broadcast;

use super::config::{CacheType, TokenAttributes};
use super::protocol::Version;
use super::*;
use crate::ids::PodUid;
use crate::objects::{ObjectError, ObjectRef};

/// A program that takes a second, and what it was asked.
#[derive(Default)]
struct Told {
    answer: Mutex<Value>,
    asked: Mutex<Vec<Value>>,
}

impl Told {
    fn answers(&self, fields: Value) {
        let mut answer = json!({"kind": "CredentialProviderResponse",
            "apiVersion": Version::V1.as_str(), "cacheKeyType": "Image"});
        for (name, value) in fields.as_object().unwrap() {
            answer[name] = value.clone();
        }
        *self.answer.lock().unwrap() = answer;
    }

    fn asked(&self) -> Vec<Value> {
        self.asked.lock().unwrap().clone()
    }
}

#[async_trait]
impl Exec for Told {
    async fn run(&self, run: Run) -> Result<Vec<u8>, ExecError> {
        self.asked.lock().unwrap().push(serde_json::from_slice(&run.input).unwrap());
        tokio::time::sleep(Duration::from_secs(1)).await;
        if run.program.ends_with("fails") {
            let program = run.program.display().to_string();
            return Err(ExecError::Start { program, cause: "told to".into() });
        }
        Ok(self.answer.lock().unwrap().to_string().into_bytes())
    }
}

/// Service accounts with a new token at each request.
#[derive(Default)]
struct Accounts {
    annotations: BTreeMap<String, String>,
    specs: Mutex<Vec<TokenRequestSpec>>,
    same: bool,
    tokens: AtomicU32,
}

#[async_trait]
impl Objects for Accounts {
    async fn config_map(&self, _: &NamespacedName) -> Result<Option<Arc<ConfigMap>>, ObjectError> {
        Ok(None)
    }
    async fn secret(&self, _: &NamespacedName) -> Result<Option<Arc<Secret>>, ObjectError> {
        Ok(None)
    }
    async fn service_account(
        &self,
        key: &NamespacedName,
    ) -> Result<Option<Arc<ServiceAccount>>, ObjectError> {
        let mut account = ServiceAccount::default();
        account.metadata.uid = Some(format!("uid-{}", key.name));
        account.metadata.annotations = Some(self.annotations.clone());
        Ok((&*key.name != "gone").then(|| Arc::new(account)))
    }
    async fn service_account_token(
        &self,
        _: &NamespacedName,
        spec: TokenRequestSpec,
    ) -> Result<TokenRequestStatus, ObjectError> {
        self.specs.lock().unwrap().push(spec);
        let number = if self.same { 0 } else { self.tokens.fetch_add(1, Ordering::Relaxed) };
        Ok(TokenRequestStatus { token: Some(format!("token-{number}")), ..Default::default() })
    }
    fn services(&self, _: &str) -> Vec<Arc<Service>> {
        Vec::new()
    }
    fn node(&self) -> Option<Arc<Node>> {
        None
    }
    fn retain(&self, _: &Pod) {}
    fn release(&self, _: &PodUid) {}
    fn changes(&self) -> broadcast::Receiver<ObjectRef> {
        broadcast::channel(1).1
    }
}

fn provider(name: &str) -> Provider {
    Provider {
        name: name.into(),
        match_images: vec!["*.r.io".into()],
        default_cache: Duration::from_secs(60),
        version: Version::V1,
        args: vec![],
        env: vec![],
        token: None,
    }
}

fn with_token(cache_type: CacheType, require_account: bool) -> Provider {
    let token = TokenAttributes {
        audience: "registry".into(),
        cache_type,
        require_account,
        required: vec![],
        optional: vec!["role".into()],
    };
    Provider { token: Some(token), ..provider("p") }
}

fn pod(account: Option<&str>) -> Pod {
    serde_json::from_value(json!({
        "metadata": {"name": "p", "namespace": "ns", "uid": "u"},
        "spec": {"containers": [], "serviceAccountName": account}}))
    .unwrap()
}

fn over(told: &Arc<Told>, providers: Vec<Provider>) -> Providers {
    let exec: Arc<dyn Exec> = told.clone();
    Providers::new(providers, Path::new("/bin-dir"), &exec)
}

/// User names that were found, and whose.
async fn users(
    providers: &Providers,
    image: &str,
    pod: &Pod,
    of: &Accounts,
) -> Vec<(String, Source)> {
    let found = providers.lookup(image, pod, of).await;
    found
        .into_iter()
        .flat_map(|(logins, source)| {
            logins.values().map(|l| (l.username.clone(), source.clone())).collect::<Vec<_>>()
        })
        .collect()
}

fn login(user: &str, password: &str) -> Value {
    json!({"eu.r.io": {"username": user, "password": password}})
}

#[tokio::test(start_paused = true)]
async fn programs_are_asked_once_for_all_and_again_when_the_answer_is_old() {
    let told = Arc::new(Told::default());
    told.answers(json!({"cacheKeyType": "Registry", "auth": login("u", "p")}));
    let providers = over(&told, vec![provider("p")]);
    let (pod, accounts) = (pod(None), Accounts::default());
    let ask = async |image: &str| users(&providers, image, &pod, &accounts).await;
    assert!(ask("other.io/a").await.is_empty());
    assert!(told.asked().is_empty(), "no image of its own");
    let all = futures::future::join_all((0..10).map(|_| ask("eu.r.io/a"))).await;
    assert!(all.iter().all(|users| *users == [("u".to_owned(), Source::Node)]));
    assert_eq!(told.asked().len(), 1, "those at the same time are one");
    assert_eq!(told.asked()[0]["image"], "eu.r.io/a");
    assert!(told.asked()[0].get("serviceAccountToken").is_none());
    assert_eq!(ask("eu.r.io/b").await.len(), 1);
    assert_eq!(told.asked().len(), 1, "the answer is for the whole registry");
    tokio::time::advance(Duration::from_secs(61)).await;
    ask("eu.r.io/b").await;
    assert_eq!(told.asked().len(), 2, "the default time is over");
    told.answers(json!({"cacheDuration": "0s", "auth": login("u", "p")}));
    tokio::time::advance(Duration::from_secs(61)).await;
    ask("eu.r.io/b").await;
    ask("eu.r.io/b").await;
    assert_eq!(told.asked().len(), 4, "it said not to keep it");
}

#[tokio::test(start_paused = true)]
async fn one_that_gave_up_waiting_leaves_the_others_their_answer() {
    let told = Arc::new(Told::default());
    told.answers(json!({"auth": login("u", "p")}));
    let providers = over(&told, vec![provider("p")]);
    let (pod, accounts) = (pod(None), Accounts::default());
    let first = users(&providers, "eu.r.io/a", &pod, &accounts);
    let second = users(&providers, "eu.r.io/a", &pod, &accounts);
    let gives_up = tokio::time::timeout(Duration::from_millis(500), first);
    let (gone, found) = tokio::join!(gives_up, second);
    assert!(gone.is_err());
    assert_eq!((found.len(), told.asked().len()), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn one_that_fails_is_no_harm_and_the_order_is_the_configurations() {
    let told = Arc::new(Told::default());
    told.answers(json!({"auth": login("u", "p")}));
    let providers = over(&told, vec![provider("fails"), provider("first"), provider("second")]);
    let found = users(&providers, "eu.r.io/a", &pod(None), &Accounts::default()).await;
    assert_eq!(found.len(), 2);
    told.answers(json!({"cacheKeyType": "Whatever", "auth": login("u", "p")}));
    let found = users(&providers, "us.r.io/a", &pod(None), &Accounts::default()).await;
    assert!(found.is_empty(), "bad answers are none");
}

#[tokio::test(start_paused = true)]
async fn accounts_and_their_tokens_are_told() {
    let told = Arc::new(Told::default());
    told.answers(json!({"auth": login("u", "p")}));
    let providers = over(&told, vec![with_token(CacheType::ServiceAccount, false)]);
    let accounts = Accounts {
        annotations: [("role".into(), "r".into()), ("other".into(), "o".into())].into(),
        ..Accounts::default()
    };
    let found = users(&providers, "eu.r.io/a", &pod(Some("sa")), &accounts).await;
    let of = Account { uid: "uid-sa".into(), namespace: "ns".into(), name: "sa".into() };
    assert_eq!(found, [("u".to_owned(), Source::ServiceAccount(of))]);
    assert_eq!(told.asked()[0]["serviceAccountToken"], "token-0");
    assert_eq!(told.asked()[0]["serviceAccountAnnotations"], json!({"role": "r"}));
    let spec = accounts.specs.lock().unwrap()[0].clone();
    assert_eq!(spec.audiences.unwrap(), ["registry"]);
    assert_eq!(spec.bound_object_ref.unwrap().uid.as_deref(), Some("u"));
    users(&providers, "eu.r.io/a", &pod(Some("sa")), &accounts).await;
    assert_eq!(told.asked().len(), 1, "kept for the account, whatever the token");
    users(&providers, "eu.r.io/a", &pod(Some("sb")), &accounts).await;
    assert_eq!(told.asked().len(), 2, "not for another");
    // A static pod has none.
    let found = users(&providers, "eu.r.io/a", &pod(None), &accounts).await;
    assert_eq!(found, [("u".to_owned(), Source::Node)]);
    assert!(told.asked()[2].get("serviceAccountToken").is_none());
    assert!(users(&providers, "eu.r.io/a", &pod(Some("gone")), &accounts).await.is_empty());
    assert_eq!(told.asked().len(), 3);
}

#[tokio::test(start_paused = true)]
async fn without_the_account_or_annotation_required_the_program_is_not_asked() {
    let told = Arc::new(Told::default());
    told.answers(json!({"auth": login("u", "p")}));
    let mut strict = with_token(CacheType::ServiceAccount, true);
    strict.token.as_mut().unwrap().required = vec!["need".into()];
    let providers = over(&told, vec![strict]);
    let accounts = Accounts::default();
    assert!(users(&providers, "eu.r.io/a", &pod(None), &accounts).await.is_empty());
    assert!(users(&providers, "eu.r.io/a", &pod(Some("sa")), &accounts).await.is_empty());
    assert!(told.asked().is_empty() && accounts.specs.lock().unwrap().is_empty());
    let accounts =
        Accounts { annotations: [("need".into(), "x".into())].into(), ..Accounts::default() };
    assert_eq!(users(&providers, "eu.r.io/a", &pod(Some("sa")), &accounts).await.len(), 1);
    assert_eq!(told.asked()[0]["serviceAccountAnnotations"], json!({"need": "x"}));
}

#[tokio::test(start_paused = true)]
async fn a_token_that_comes_back_as_password_must_be_kept_for_itself_only() {
    let told = Arc::new(Told::default());
    told.answers(json!({"auth": login("u", "token-0")}));
    let accounts = Accounts { same: true, ..Accounts::default() };
    let shared = over(&told, vec![with_token(CacheType::ServiceAccount, true)]);
    assert!(users(&shared, "eu.r.io/a", &pod(Some("sa")), &accounts).await.is_empty());
    let own = over(&told, vec![with_token(CacheType::Token, true)]);
    assert_eq!(users(&own, "eu.r.io/a", &pod(Some("sa")), &accounts).await.len(), 1);
    users(&own, "eu.r.io/a", &pod(Some("sa")), &accounts).await;
    assert_eq!(told.asked().len(), 2, "kept for the same token");
    let changing = Accounts { tokens: AtomicU32::new(7), ..Accounts::default() };
    users(&own, "eu.r.io/a", &pod(Some("sa")), &changing).await;
    assert_eq!(told.asked().len(), 3, "not for another");
}
