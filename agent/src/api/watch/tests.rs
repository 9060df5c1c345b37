//! The watch against a server that does what servers do on bad days.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Body as AnswerBody;
use axum::extract::{Request as HttpRequest, State as AxumState};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use futures::StreamExt;
use k8s_openapi::api::core::v1::ConfigMap;
use serde_json::json;

use super::*;
use crate::api::kubeconfig::{Endpoint, Identity};

/// What the server does with one request.
enum Answer {
    Status(u16, String),
    /// Sends these pieces, then ends the answer properly.
    Ends(Vec<String>),
    /// Sends these pieces, then breaks the connection.
    Breaks(Vec<String>),
    /// Sends these pieces and nothing more.
    Hangs(Vec<String>),
}

#[derive(Default)]
struct Script {
    answers: Mutex<VecDeque<Answer>>,
    asked: Mutex<Vec<String>>,
}

async fn answer(AxumState(script): AxumState<Arc<Script>>, request: HttpRequest) -> Response {
    let query = request.uri().query().unwrap_or_default().to_owned();
    script.asked.lock().unwrap().push(query);
    let next = script.answers.lock().unwrap().pop_front();
    let pieces = |p: Vec<String>| futures::stream::iter(p.into_iter().map(Ok::<_, std::io::Error>));
    let (code, body) = match next {
        None => (503, AnswerBody::from("{}")),
        Some(Answer::Status(code, text)) => (code, AnswerBody::from(text)),
        Some(Answer::Ends(p)) => (200, AnswerBody::from_stream(pieces(p))),
        Some(Answer::Breaks(p)) => {
            // The server drops what it has not flushed yet when the body fails.
            let broken = futures::stream::once(async {
                tokio::time::sleep(Duration::from_millis(100)).await;
                Err(std::io::Error::other("cut"))
            });
            (200, AnswerBody::from_stream(pieces(p).chain(broken)))
        }
        Some(Answer::Hangs(p)) => {
            (200, AnswerBody::from_stream(pieces(p).chain(futures::stream::pending())))
        }
    };
    (StatusCode::from_u16(code).unwrap(), body).into_response()
}

fn object(name: &str, version: u32) -> serde_json::Value {
    json!({"metadata": {"name": name, "namespace": "n", "resourceVersion": version.to_string()}})
}

fn list(names: &[(&str, u32)], version: u32, next: &str) -> Answer {
    let items: Vec<_> = names.iter().map(|(n, v)| object(n, *v)).collect();
    let text = json!({"apiVersion": "v1", "kind": "ConfigMapList", "items": items,
        "metadata": {"resourceVersion": version.to_string(), "continue": next}});
    Answer::Status(200, text.to_string())
}

fn event(kind: &str, name: &str, version: u32) -> String {
    let mut object = object(name, version);
    object["kind"] = json!("ConfigMap");
    object["apiVersion"] = json!("v1");
    json!({"type": kind, "object": object}).to_string() + "\n"
}

fn gone() -> serde_json::Value {
    json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 410,
        "reason": "Expired", "message": "too old resource version"})
}

/// What a watch sees until the script is used up, in short, and the queries it made.
async fn play(answers: Vec<Answer>, until: usize) -> (Vec<String>, Vec<String>) {
    let script = Arc::new(Script { answers: Mutex::new(answers.into()), ..Script::default() });
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let server = format!("http://{}", listener.local_addr().unwrap());
    let router = Router::new().fallback(answer).with_state(script.clone());
    tokio::spawn(async move { axum::serve(listener, router).await });
    let endpoint = Endpoint {
        server,
        ca: None,
        insecure: false,
        server_name: None,
        identity: Identity::Anonymous,
    };
    let maps: Api<ConfigMap> = Api::namespaced(crate::api::client(&endpoint).unwrap(), "n");
    let quick = Backoff::new(Duration::from_millis(5), Duration::from_millis(20));
    let mut watch = Watch::with_backoff(maps, "", quick);
    let mut seen = Vec::new();
    while seen.len() < until {
        let next = tokio::time::timeout(Duration::from_secs(20), watch.next()).await.unwrap();
        let name = |m: ConfigMap| m.metadata.name.unwrap_or_default();
        seen.push(match next {
            Seen::Restarted => "restarted".to_owned(),
            Seen::Listed(m) => format!("listed {}", name(m)),
            Seen::Complete => "complete".to_owned(),
            Seen::Applied(m) => format!("applied {}", name(m)),
            Seen::Deleted(m) => format!("deleted {}", name(m)),
            Seen::Failed(f) if f.forbidden => "forbidden".to_owned(),
            Seen::Failed(_) => "failed".to_owned(),
        });
    }
    let asked = script.asked.lock().unwrap().clone();
    (seen, asked)
}

fn version_asked(query: &str) -> &str {
    query.rsplit("resourceVersion=").next().unwrap_or_default()
}

#[tokio::test]
async fn pages_events_and_bookmarks_are_told_in_order() {
    let bookmark = "{\"type\":\"BOOKMARK\",\"object\":{\"kind\":\"ConfigMap\",\"apiVersion\":\"v1\",\
                    \"metadata\":{\"resourceVersion\":\"40\",\"creationTimestamp\":null}}}\n";
    let (seen, asked) = play(
        vec![
            list(&[("a", 1), ("b", 2)], 5, "more"),
            list(&[("c", 3)], 5, ""),
            Answer::Ends(vec![
                event("ADDED", "d", 6),
                event("DELETED", "a", 7),
                bookmark.to_owned(),
            ]),
            Answer::Hangs(vec![event("MODIFIED", "b", 41)]),
        ],
        8,
    )
    .await;
    let expected = "restarted,listed a,listed b,listed c,complete,applied d,deleted a,applied b";
    assert_eq!(seen.join(","), expected);
    assert!(asked[1].contains("continue=more"));
    assert!(asked[2].contains("watch=true") && version_asked(&asked[2]) == "5");
    assert_eq!(version_asked(&asked[3]), "40", "resumed from the bookmark");
}

#[tokio::test]
async fn an_expired_version_leads_to_a_new_list_in_every_form_it_is_told() {
    let as_event = json!({"type": "ERROR", "object": gone()}).to_string() + "\n";
    for expired in [Answer::Ends(vec![as_event]), Answer::Status(410, gone().to_string())] {
        let (seen, _) = play(
            vec![
                list(&[("a", 1)], 5, ""),
                expired,
                list(&[("b", 9)], 9, ""),
                Answer::Hangs(vec![event("ADDED", "c", 10)]),
            ],
            7,
        )
        .await;
        let seen: Vec<_> = seen.iter().filter(|s| *s != "failed").cloned().collect();
        assert_eq!(
            seen.get(..6).unwrap().join(","),
            "restarted,listed a,complete,restarted,listed b,complete"
        );
    }
}

#[tokio::test]
async fn what_is_cut_off_or_garbled_is_asked_again_from_the_last_whole_event() {
    let half = |text: String| text.get(..text.len() / 2).unwrap().to_owned();
    let (whole, cut) = (|| event("ADDED", "b", 6), || half(event("ADDED", "c", 7)));
    let skipped = || event("ADDED", "x", 8);
    // A proper end in the middle of an event is no failure.
    for (bad, until) in [
        (Answer::Breaks(vec![whole(), cut()]), 5),
        (Answer::Ends(vec![whole(), cut()]), 4),
        (Answer::Ends(vec![whole(), "<html>oops</html>\n".to_owned(), skipped()]), 5),
        (Answer::Ends(vec![whole(), cut() + "\n", skipped()]), 5),
    ] {
        let (seen, asked) =
            play(vec![list(&[], 5, ""), bad, Answer::Hangs(vec![event("ADDED", "c", 7)])], until)
                .await;
        let told: Vec<_> = seen.iter().filter(|s| *s != "failed").cloned().collect();
        let expected = "restarted,complete,applied b,applied c";
        assert_eq!(told.get(..4.min(told.len())).unwrap().join(","), expected);
        assert_eq!(version_asked(&asked[2]), "6");
    }
}

#[tokio::test]
async fn an_event_that_stays_garbled_leads_to_a_new_list() {
    let garbage = || Answer::Ends(vec!["nonsense\n".to_owned()]);
    let (seen, _) =
        play(vec![list(&[], 5, ""), garbage(), garbage(), garbage(), list(&[("a", 9)], 9, "")], 8)
            .await;
    let expected = "restarted,complete,failed,failed,failed,restarted,listed a,complete";
    assert_eq!(seen.join(","), expected);
}

#[tokio::test]
async fn a_server_that_ends_each_watch_at_once_is_not_asked_in_a_hot_loop() {
    let ends = || Answer::Ends(Vec::new());
    let (seen, asked) = play(vec![list(&[], 5, ""), ends(), ends(), ends(), ends()], 6).await;
    assert_eq!(seen.join(","), "restarted,complete,failed,failed,failed,failed");
    assert_eq!(asked.len(), 5, "one wait for each");
}

#[tokio::test]
async fn errors_and_refusals_are_told_and_tried_again() {
    let refusal = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 403,
        "reason": "Forbidden", "message": "no"});
    let (seen, _) = play(
        vec![
            Answer::Status(500, "{}".to_owned()),
            Answer::Status(200, "<html>".to_owned()),
            Answer::Status(403, refusal.to_string()),
            list(&[("a", 1)], 5, ""),
            Answer::Hangs(Vec::new()),
        ],
        9,
    )
    .await;
    let expected =
        "restarted,failed,restarted,failed,restarted,forbidden,restarted,listed a,complete";
    assert_eq!(seen.join(","), expected);
}
