//! What each version of the protocol said, word for word. A change here that is not an addition is
//! a change that monitors of running pods do not know of.

use super::*;
use crate::monitor::frame::Inbox;

/// Version and frame, as a shim of that version sent it.
const REQUESTS: &[(u32, &str)] = &[
    (1, r#"{"op":"hello","version":1}"#),
    (1, r#"{"op":"subscribe"}"#),
    (
        1,
        r#"{"op":"start","id":"c1","bundle":"/run/longshore/c/c1","rootfs":{"lower":["/s/l2/d","/s/l1/d"],"upper":"/s/c1/upper","work":"/s/c1/work","target":"/run/longshore/mnt/rootfs"},"user":{"user":"app:app","gid":7,"supplemental":[8,9],"strict":true},"cgroup":"/kubepods/pod1/c1","log":"/var/log/pods/p/c/0.log","records":"/var/lib/longshore/containers/c1","stdin":true,"tty":false}"#,
    ),
    (1, r#"{"op":"kill","container":"c1","signal":15,"all":false}"#),
    (1, r#"{"op":"exec","container":"c1","arguments":["sh","-c","true"]}"#),
    (1, r#"{"op":"reopen_log","container":"c1"}"#),
    (1, r#"{"op":"exit"}"#),
    (2, r#"{"op":"hello","version":2}"#),
    (2, r#"{"op":"exec","container":"c1","arguments":["sh"],"tty":true}"#),
    (2, r#"{"op":"attach","container":"c1","stdout":true,"stderr":false}"#),
    (2, r#"{"op":"close_stdin","container":"c1"}"#),
    (
        2,
        r#"{"op":"start","id":"c1","bundle":"/run/longshore/c/c1","rootfs":{"lower":[],"upper":"/s/c1/upper","work":"/s/c1/work","target":"/run/longshore/mnt/rootfs"},"user":{"user":"","gid":null,"supplemental":[],"strict":false},"cgroup":"/kubepods/pod1/c1","log":null,"records":"/var/lib/longshore/containers/c1","stdin":false,"tty":true,"runtime":"/usr/bin/runc"}"#,
    ),
    (3, r#"{"op":"hello","version":3}"#),
    (3, r#"{"op":"exit","force":true}"#),
    (
        3,
        r#"{"op":"start","id":"c1","bundle":"/b","rootfs":{"lower":[],"upper":"/u","work":"/w","target":"/t"},"user":{"user":"","gid":null,"supplemental":[],"strict":false},"cgroup":"/c","log":"/l","records":"/r","stdin":false,"tty":false,"runtime":null,"rotation":{"max_size":10485760,"max_files":5}}"#,
    ),
    (
        3,
        r#"{"op":"start","id":"c1","bundle":"/b","rootfs":{"lower":[],"upper":"/u","work":"/w","target":"/t"},"user":{"user":"","gid":null,"supplemental":[],"strict":false},"cgroup":"/c","log":null,"records":"/r","stdin":false,"tty":false,"userns":{"path":"/run/longshore/userns/s1","map":{"uids":{"container":0,"host":65536,"length":65536},"gids":{"container":0,"host":131072,"length":65536}}}}"#,
    ),
    (4, r#"{"op":"hello","version":4}"#),
    (
        4,
        r#"{"op":"start","id":"c1","bundle":"/b","rootfs":{"lower":[],"upper":"/u","work":"/w","target":"/t"},"user":{"user":"","gid":null,"supplemental":[],"strict":false},"cgroup":"/c","log":null,"records":"/r","stdin":false,"tty":false,"image_volumes":[{"image":"sha256:0","layers":["/s/l1/d"],"sub_path":"data","target":"/t/data"}]}"#,
    ),
];

/// Version and frame, as a monitor of that version answered.
const REPLIES: &[(u32, &str)] = &[
    (1, r#"{"reply":"hello","version":1,"pid":42,"init":null}"#),
    (1, r#"{"reply":"done"}"#),
    (1, r#"{"reply":"failed","message":"the container is not running"}"#),
    (
        1,
        r#"{"reply":"started","pid":43,"at":1700000000000000000,"user":{"uid":1,"gid":2,"groups":[3],"home":"/"}}"#,
    ),
    (1, r#"{"reply":"exec_exited","code":3}"#),
    (
        1,
        r#"{"reply":"exited","container":"c1","exit":{"code":137,"signal":9,"at":1700000000000000000,"oom_killed":true,"reason":"","message":""}}"#,
    ),
    (2, r#"{"reply":"hello","version":2,"pid":42,"init":44}"#),
    (3, r#"{"reply":"hello","version":3,"pid":42,"init":44}"#),
    (4, r#"{"reply":"hello","version":4,"pid":42,"init":null}"#),
];

/// The name of a request on the wire. A new one is an error here until it is recorded above.
fn op(request: &Request) -> &'static str {
    match request {
        Request::Hello { .. } => "hello",
        Request::Subscribe => "subscribe",
        Request::Start(_) => "start",
        Request::Kill { .. } => "kill",
        Request::Exec { .. } => "exec",
        Request::Attach { .. } => "attach",
        Request::CloseStdin { .. } => "close_stdin",
        Request::ReopenLog { .. } => "reopen_log",
        Request::Exit { .. } => "exit",
    }
}

fn frame(text: &str) -> Vec<u8> {
    [(text.len() as u32).to_le_bytes().as_slice(), text.as_bytes()].concat()
}

fn take<T: serde::de::DeserializeOwned>(text: &str) -> std::io::Result<Option<T>> {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
    std::io::Write::write_all(&mut &ours, &frame(text))?;
    let mut inbox = Inbox::default();
    inbox.fill(&theirs)?;
    inbox.take_frame()
}

/// Whether `new` says all that `old` says.
fn holds(new: &serde_json::Value, old: &serde_json::Value) -> bool {
    match (new, old) {
        (serde_json::Value::Object(new), serde_json::Value::Object(old)) => {
            old.iter().all(|(key, value)| new.get(key).is_some_and(|new| holds(new, value)))
        }
        _ => new == old,
    }
}

#[test]
fn what_older_versions_said_is_understood_and_still_said() {
    for (version, text) in REQUESTS {
        let request: Request = take(text).unwrap().unwrap();
        assert!(request.needs() <= *version, "{text} needs {}", request.needs());
        let said = serde_json::to_value(&request).unwrap();
        assert_eq!(said["op"], op(&request));
        assert!(holds(&said, &serde_json::from_str(text).unwrap()), "{text} became {said}");
    }
    for (_, text) in REPLIES {
        let reply: Reply = take(text).unwrap().unwrap();
        let said = serde_json::to_value(&reply).unwrap();
        assert!(holds(&said, &serde_json::from_str(text).unwrap()), "{text} became {said}");
    }
    let recorded = REQUESTS.iter().map(|(version, _)| *version).max();
    assert_eq!(recorded, Some(VERSION), "what the new version says has to be recorded here");
}

#[test]
fn a_newer_side_may_say_more() {
    let more = |text: &str| text.replacen('{', r#"{"novelty":{"deep":[1]},"#, 1);
    for (_, text) in REQUESTS {
        let (plain, more) = (take::<Request>(text), take::<Request>(&more(text)));
        let value = |request| serde_json::to_value(request).unwrap();
        assert_eq!(value(plain.unwrap().unwrap()), value(more.unwrap().unwrap()));
    }
    for (_, text) in REPLIES {
        assert!(take::<Reply>(&more(text)).unwrap().is_some(), "{text}");
    }
}

#[test]
fn what_is_not_known_is_refused_and_says_so() {
    let unknown = take::<Request>(r#"{"op":"teleport","container":"c1"}"#).unwrap_err();
    assert!(unknown.to_string().contains("teleport"), "{unknown}");
    assert!(take::<Request>("{").is_err());
    assert!(take::<Request>(r#"{"op":"kill"}"#).is_err());
}

#[test]
fn only_what_older_monitors_know_is_asked_of_them() {
    let needs = |text: &str| take::<Request>(text).unwrap().unwrap().needs();
    assert_eq!(needs(r#"{"op":"exec","container":"c","arguments":[]}"#), 1);
    assert_eq!(needs(r#"{"op":"exec","container":"c","arguments":[],"tty":true}"#), 2);
    assert_eq!(needs(r#"{"op":"attach","container":"c","stdout":true,"stderr":true}"#), 2);
    // Without force an older one refuses, which its client sees.
    assert_eq!(needs(r#"{"op":"exit","force":true}"#), 1);
}

#[test]
fn what_a_container_must_not_be_without_is_never_left_out() {
    let needs = |what: &str| {
        let (_, text) = REQUESTS.iter().rfind(|(_, text)| text.contains(what)).unwrap();
        take::<Request>(text).unwrap().unwrap().needs()
    };
    assert_eq!(needs("userns"), 3);
    assert_eq!(needs("image_volumes"), 4);
}
