//! Exec, Attach and PortForward with real containers, by clients of both protocols.

#[path = "streaming/client.rs"]
mod client;
mod node;

use std::time::{Duration, Instant};

use anyhow::ensure;
use client::{Dialect, Session, request, upgrade};
use cri_shim::api::*;
use node::Node;
use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

const SPDY: Dialect = Dialect::Spdy("v4.channel.k8s.io");
const WEB: Dialect = Dialect::WebSocket("v5.channel.k8s.io");
const FORWARD: Dialect = Dialect::Spdy("portforward.k8s.io");

/// A node with one container that sleeps.
async fn sleeping() -> anyhow::Result<(Node, String, String)> {
    let mut node = Node::start().await?;
    let pod = node.sandbox(NamespaceMode::Container).await?;
    let id = node.run(&pod, "a", "sleep 1000").await?;
    Ok((node, pod.0, id))
}

fn exec(id: &str, command: &[&str]) -> ExecRequest {
    ExecRequest {
        container_id: id.into(),
        cmd: command.iter().map(|s| (*s).to_owned()).collect(),
        stdin: true,
        stdout: true,
        stderr: true,
        tty: false,
    }
}

async fn exec_url(node: &Node, request: ExecRequest) -> anyhow::Result<String> {
    Ok(node.runtime.clone().exec(request).await?.into_inner().url)
}

/// Runs a command with all its streams.
async fn start(
    node: &Node,
    dialect: Dialect,
    id: &str,
    command: &[&str],
) -> anyhow::Result<Session> {
    let url = exec_url(node, exec(id, command)).await?;
    let mut session = Session::open(&url, dialect).await?;
    session.command_streams(&["error", "stdin", "stdout", "stderr"]).await?;
    Ok(session)
}

/// How many processes whose command line holds `word` the container has.
async fn processes(node: &mut Node, id: &str, word: &str) -> anyhow::Result<usize> {
    let listed = node.exec(id, &["ps"], 0).await?;
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    Ok(listed.lines().filter(|line| line.contains(word)).count())
}

async fn until_gone(node: &mut Node, id: &str, word: &str) -> anyhow::Result<()> {
    let deadline = Instant::now() + Duration::from_secs(30);
    while processes(node, id, word).await? > 0 {
        ensure!(Instant::now() < deadline, "{word} lives on");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}

#[tokio::test]
async fn a_command_has_its_streams_and_exit_code_in_every_dialect() -> anyhow::Result<()> {
    let (node, _, id) = sleeping().await?;
    let script = "echo out; echo err >&2; read line; echo got $line; exit 7";
    let dialects = [
        SPDY,
        Dialect::Spdy("v3.channel.k8s.io"),
        Dialect::Spdy("v2.channel.k8s.io"),
        Dialect::Spdy("channel.k8s.io"),
        WEB,
        Dialect::WebSocket("v4.channel.k8s.io"),
        Dialect::WebSocket("v4.base64.channel.k8s.io"),
        Dialect::WebSocket("base64.channel.k8s.io"),
        Dialect::WebSocket(""),
    ];
    for dialect in dialects {
        let mut session = start(&node, dialect, &id, &["sh", "-c", script]).await?;
        session.send("stdin", b"line\n").await?;
        session.finish().await?;
        assert_eq!(session.text("stdout"), "out\ngot line\n", "{dialect:?}");
        assert_eq!(session.text("stderr"), "err\n", "{dialect:?}");
        let (Dialect::Spdy(protocol) | Dialect::WebSocket(protocol)) = dialect else { continue };
        if protocol.starts_with("v4") || protocol.starts_with("v5") {
            assert_eq!(session.exit_code()?, 7, "{dialect:?}");
        } else {
            assert!(session.text("error").ends_with("exit code 7"), "{dialect:?}");
        }
    }
    Ok(())
}

#[tokio::test]
async fn the_end_of_input_reaches_the_command_and_large_data_is_whole() -> anyhow::Result<()> {
    let (node, _, id) = sleeping().await?;
    let data: Vec<u8> = (0..3_000_000u32).map(|n| ((n * 31) >> 3) as u8).collect();
    let sum: String = Sha256::digest(&data).iter().map(|b| format!("{b:02x}")).collect();
    for dialect in [SPDY, WEB] {
        let mut session = start(&node, dialect, &id, &["sha256sum"]).await?;
        session.send("stdin", &data).await?;
        session.end("stdin").await?;
        session.finish().await?;
        assert_eq!(session.text("stdout"), format!("{sum}  -\n"));
        assert_eq!(session.exit_code()?, 0);
        let command = ["sh", "-c", "dd if=/dev/zero bs=100k count=100 2>/dev/null"];
        let mut session = start(&node, dialect, &id, &command).await?;
        session.finish().await?;
        assert_eq!(session.received["stdout"], vec![0u8; 100 * 100 * 1024]);
        assert_eq!(session.exit_code()?, 0);
    }
    // Who has ended all streams still waits for what they bring.
    let mut session = start(&node, SPDY, &id, &["sh", "-c", "sleep 1; echo late"]).await?;
    for stream in ["stdin", "stdout", "stderr", "error"] {
        session.end(stream).await?;
    }
    session.finish().await?;
    assert_eq!((session.text("stdout").as_str(), session.exit_code()?), ("late\n", 0));
    Ok(())
}

#[tokio::test]
async fn a_terminal_has_a_size_and_an_owner() -> anyhow::Result<()> {
    let (node, _, id) = sleeping().await?;
    for dialect in [SPDY, WEB] {
        let command = ["sh", "-c", "tty; read go; stty size; echo $TERM; exit 3"];
        let asked = ExecRequest { tty: true, stderr: false, ..exec(&id, &command) };
        let mut session = Session::open(&exec_url(&node, asked).await?, dialect).await?;
        session.command_streams(&["error", "stdin", "stdout", "resize"]).await?;
        session.expect("stdout", "/dev/pts/").await?;
        session.send("resize", br#"{"Width":123,"Height":45}"#).await?;
        session.send("stdin", b"go\n").await?;
        session.finish().await?;
        let shown = session.text("stdout");
        assert!(shown.contains("45 123\r\n") && shown.ends_with("xterm\r\n"), "{shown:?}");
        assert_eq!(session.exit_code()?, 3);
    }
    Ok(())
}

#[tokio::test]
async fn nothing_is_left_of_a_client_that_vanishes() -> anyhow::Result<()> {
    let (mut node, _, id) = sleeping().await?;
    for dialect in [SPDY, WEB] {
        let command = ["sh", "-c", "echo up; sleep 7777 & sleep 7777"];
        let mut session = start(&node, dialect, &id, &command).await?;
        session.expect("stdout", "up").await?;
        drop(session);
        until_gone(&mut node, &id, "sleep 7777").await?;
        // One whose input is not taken, so that its end stands behind its data.
        let mut session = start(&node, dialect, &id, &["sleep", "8888"]).await?;
        while processes(&mut node, &id, "sleep 8888").await? == 0 {}
        let flood = async {
            loop {
                if session.send("stdin", &[0; 100_000]).await.is_err() {
                    break;
                }
            }
        };
        let _ = tokio::time::timeout(Duration::from_secs(1), flood).await;
        drop(session);
        until_gone(&mut node, &id, "sleep 8888").await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_token_is_spent_by_its_first_use_and_only_there() -> anyhow::Result<()> {
    let (node, _, id) = sleeping().await?;
    let url = exec_url(&node, exec(&id, &["true"])).await?;
    let status =
        async |url: &str, headers: String| Ok::<_, anyhow::Error>(request(url, &headers).await?.0);
    // What cannot be agreed on does not spend it.
    assert_eq!(status(&url, String::new()).await?, 400);
    assert_eq!(status(&url, upgrade(Dialect::Spdy("v9.channel.k8s.io"))).await?, 403);
    assert_eq!(status(&url, upgrade(Dialect::WebSocket("v9.channel.k8s.io"))).await?, 403);
    assert_eq!(status(&url.replace("/exec/", "/other/"), upgrade(SPDY)).await?, 404);
    assert_eq!(status(&url, upgrade(SPDY)).await?, 101);
    assert_eq!(status(&url, upgrade(SPDY)).await?, 404);
    let url = exec_url(&node, exec(&id, &["true"])).await?;
    assert_eq!(status(&url.replace("/exec/", "/attach/"), upgrade(SPDY)).await?, 404);
    let guess = format!("{}/exec/{}", &url[..url.rfind("/exec/").unwrap()], "0".repeat(32));
    assert_eq!(status(&guess, upgrade(SPDY)).await?, 404);
    let nothing =
        ExecRequest { stdin: false, stdout: false, stderr: false, ..exec(&id, &["true"]) };
    assert!(exec_url(&node, nothing).await.is_err());
    let both = ExecRequest { tty: true, ..exec(&id, &["true"]) };
    assert!(exec_url(&node, both).await.is_err());
    Ok(())
}

async fn attach(node: &Node, id: &str, dialect: Dialect) -> anyhow::Result<Session> {
    let asked = AttachRequest {
        container_id: id.into(),
        stdin: true,
        stdout: true,
        stderr: true,
        tty: false,
    };
    let url = node.runtime.clone().attach(asked).await?.into_inner().url;
    let mut session = Session::open(&url, dialect).await?;
    session.command_streams(&["error", "stdin", "stdout", "stderr"]).await?;
    Ok(session)
}

#[tokio::test]
async fn several_clients_attach_and_the_first_to_end_input_ends_it_once() -> anyhow::Result<()> {
    let mut node = Node::start().await?;
    let pod = node.sandbox(NamespaceMode::Container).await?;
    let script = "while read l; do echo got $l; echo err $l >&2; done; echo end; exit 9";
    let once = |config: &mut ContainerConfig| (config.stdin, config.stdin_once) = (true, true);
    let id = node.create_with(&pod, "once", script, once).await?;
    node.runtime.start_container(StartContainerRequest { container_id: id.clone() }).await?;
    let (mut first, mut second) = (attach(&node, &id, SPDY).await?, attach(&node, &id, WEB).await?);
    // Attached is who sees what comes.
    while !second.text("stdout").contains("got probe") {
        first.send("stdin", b"probe\n").await?;
        let _ = tokio::time::timeout(Duration::from_millis(200), second.read()).await;
    }
    first.send("stdin", b"one\n").await?;
    second.expect("stdout", "got one\n").await?;
    second.send("stdin", b"two\n").await?;
    for session in [&mut first, &mut second] {
        session.expect("stdout", "got two\n").await?;
        session.expect("stderr", "err two\n").await?;
    }
    first.end("stdin").await?;
    for session in [&mut first, &mut second] {
        session.finish().await?;
        assert!(session.text("stdout").ends_with("got two\nend\n"));
        assert_eq!(session.exit_code()?, 0);
    }
    assert_eq!(node.exited(&id).await?.exit_code, 9);
    assert!(node.log("once").contains(" stdout F got two\n"));
    // Without "once" the input stays open for others.
    let open = |config: &mut ContainerConfig| config.stdin = true;
    let id = node.create_with(&pod, "open", script, open).await?;
    node.runtime.start_container(StartContainerRequest { container_id: id.clone() }).await?;
    for line in ["one", "two"] {
        let mut session = attach(&node, &id, SPDY).await?;
        session.send("stdin", format!("{line}\n").as_bytes()).await?;
        session.expect("stdout", line).await?;
        session.end("stdin").await?;
        session.finish().await?;
        assert_eq!(session.exit_code()?, 0);
    }
    assert_eq!(node.status(&id).await?.state(), ContainerState::ContainerRunning);
    Ok(())
}

#[tokio::test]
async fn a_client_that_takes_nothing_does_not_stop_a_container() -> anyhow::Result<()> {
    let mut node = Node::start().await?;
    let pod = node.sandbox(NamespaceMode::Container).await?;
    let script = "read go; dd if=/dev/zero bs=1M count=40 2>/dev/null | tr '\\0' x; exit 0";
    let once = |config: &mut ContainerConfig| config.stdin = true;
    let id = node.create_with(&pod, "a", script, once).await?;
    node.runtime.start_container(StartContainerRequest { container_id: id.clone() }).await?;
    let mut session = attach(&node, &id, SPDY).await?;
    session.send("stdin", b"go\n").await?;
    assert_eq!(node.exited(&id).await?.exit_code, 0);
    let log = node.log("a");
    let logged = log.lines().map(|line| line.rsplit(' ').next().unwrap_or("").len());
    assert_eq!(logged.sum::<usize>(), 40 << 20);
    drop(session);
    Ok(())
}

/// A server that answers what it is sent, after the client has ended, in capitals.
async fn shouting(address: &str) -> anyhow::Result<u16> {
    let listener = TcpListener::bind(address).await?;
    let port = listener.local_addr()?.port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut heard = Vec::new();
                let _ = stream.read_to_end(&mut heard).await;
                let _ = stream.write_all(&heard.to_ascii_uppercase()).await;
            });
        }
    });
    Ok(port)
}

async fn forward_url(node: &Node, pod: &str, ports: &[u16]) -> anyhow::Result<String> {
    let port = ports.iter().map(|port| i32::from(*port)).collect();
    let asked = PortForwardRequest { pod_sandbox_id: pod.into(), port };
    Ok(node.runtime.clone().port_forward(asked).await?.into_inner().url)
}

async fn open_pair(session: &mut Session, id: &str, port: u16) -> anyhow::Result<()> {
    for kind in ["error", "data"] {
        let port = port.to_string();
        let headers = [("streamtype", kind), ("port", &port), ("requestid", id)];
        session.open_stream(&format!("{kind}{id}"), &headers).await?;
    }
    Ok(())
}

#[tokio::test]
async fn ports_are_forwarded_in_both_families_with_half_closes() -> anyhow::Result<()> {
    let (node, pod, _) = sleeping().await?;
    let (four, six) = (shouting("127.0.0.1:0").await?, shouting("[::1]:0").await?);
    for dialect in [FORWARD, Dialect::Tunnel] {
        let mut session = Session::open(&forward_url(&node, &pod, &[]).await?, dialect).await?;
        open_pair(&mut session, "0", four).await?;
        open_pair(&mut session, "1", six).await?;
        for (stream, text) in [("data0", "four"), ("data1", "six")] {
            session.send(stream, text.as_bytes()).await?;
            session.end(stream).await?;
            session.expect(stream, &text.to_ascii_uppercase()).await?;
            while !session.ended.iter().any(|ended| ended == stream) {
                session.read().await?;
            }
        }
        assert_eq!(
            (session.text("error0"), session.text("error1")),
            (String::new(), String::new())
        );
        // One that nobody serves, and one that cannot be.
        let free = TcpListener::bind("127.0.0.1:0").await?.local_addr()?.port();
        open_pair(&mut session, "2", free).await?;
        session.expect("error2", "refused").await?;
        open_pair(&mut session, "3", 0).await?;
        while !session.ended.iter().any(|ended| ended == "reset data3 3") {
            ensure!(session.read().await?);
        }
    }
    // Channels: data and error of each port, beginning with the port.
    let echo = TcpListener::bind("127.0.0.1:0").await?;
    let port = echo.local_addr()?.port();
    let url = forward_url(&node, &pod, &[port]).await?;
    let mut session = Session::open(&url, Dialect::WebSocket("v4.channel.k8s.io")).await?;
    session.send("stdin", b"ping").await?;
    let (mut stream, _) = echo.accept().await?;
    let mut heard = [0; 4];
    stream.read_exact(&mut heard).await?;
    stream.write_all(&heard).await?;
    drop(stream);
    session.finish().await?;
    assert_eq!(session.received["stdin"], [&port.to_le_bytes()[..], b"ping"].concat());
    assert_eq!(session.received["stdout"], port.to_le_bytes());
    Ok(())
}

#[tokio::test]
async fn hundreds_of_sessions_at_once_are_whole() -> anyhow::Result<()> {
    let (mut node, pod, id) = sleeping().await?;
    let port = shouting("127.0.0.1:0").await?;
    let data: Vec<u8> = (0..50_000u32).map(|n| b'a' + (n % 26) as u8).collect();
    let node_ref = &node;
    let commands = (0..200).map(|n| {
        let (id, data) = (&id, &data);
        async move {
            let dialect = if n % 2 == 0 { SPDY } else { WEB };
            let mut session = start(node_ref, dialect, id, &["cat"]).await?;
            session.send("stdin", data).await?;
            session.end("stdin").await?;
            session.finish().await?;
            ensure!(session.received.get("stdout") == Some(data) && session.exit_code()? == 0);
            Ok::<_, anyhow::Error>(())
        }
    });
    let forwards = (0..200).map(|n| {
        let (pod, data) = (&pod, &data);
        async move {
            let dialect = if n % 2 == 0 { FORWARD } else { Dialect::Tunnel };
            let url = forward_url(node_ref, pod, &[port]).await?;
            let mut session = Session::open(&url, dialect).await?;
            open_pair(&mut session, "0", port).await?;
            session.send("data0", data).await?;
            session.end("data0").await?;
            while !session.ended.iter().any(|ended| ended == "data0") {
                ensure!(session.read().await?, "{}", session.text("error0"));
            }
            ensure!(session.received["data0"] == data.to_ascii_uppercase());
            Ok::<_, anyhow::Error>(())
        }
    });
    let (commands, forwards) = tokio::join!(
        futures::future::try_join_all(commands),
        futures::future::try_join_all(forwards)
    );
    commands?;
    forwards?;
    until_gone(&mut node, &id, " cat").await?;
    // One connection with many streams.
    let url = forward_url(&node, &pod, &[port]).await?;
    let mut session = Session::open(&url, FORWARD).await?;
    for n in 0..200 {
        open_pair(&mut session, &n.to_string(), port).await?;
    }
    for n in 0..200 {
        session.send(&format!("data{n}"), b"x").await?;
        session.end(&format!("data{n}")).await?;
    }
    for n in 0..200 {
        session.expect(&format!("data{n}"), "X").await?;
    }
    Ok(())
}

#[tokio::test]
async fn hostile_bytes_end_their_own_connection_only() -> anyhow::Result<()> {
    // Thousands of connections, in the server as here.
    let limit = nix::sys::resource::Resource::RLIMIT_NOFILE;
    let (_, most) = nix::sys::resource::getrlimit(limit)?;
    nix::sys::resource::setrlimit(limit, most, most)?;
    let (mut node, _, id) = sleeping().await?;
    let zeros = miniz_oxide::deflate::compress_to_vec_zlib(&vec![0u8; 8 << 20], 9);
    let bomb = [
        &[0x80, 3, 0, 1, 0][..],
        &((zeros.len() as u32 + 10).to_be_bytes()[1..]),
        &[0, 0, 0, 1, 0, 0, 0, 0, 0, 0],
        &zeros,
    ];
    let spdy = [bomb.concat(), vec![0x80, 3, 0, 1, 0, 255, 255, 255], vec![0xff; 64], vec![0; 64]];
    for bytes in &spdy {
        let mut session = Session::open(&exec_url(&node, exec(&id, &["cat"])).await?, SPDY).await?;
        session.write_raw(bytes).await?;
        session.finish().await?;
    }
    let web = [vec![0x82, 1, 0], vec![0xf2, 0x80, 0, 0, 0, 0], vec![0x83, 0x80, 0, 0, 0, 0]];
    for bytes in &web {
        let mut session = Session::open(&exec_url(&node, exec(&id, &["cat"])).await?, WEB).await?;
        session.write_raw(bytes).await?;
        session.finish().await?;
        assert!(session.ended.contains(&"close 1002".to_owned()), "{:?}", session.ended);
    }
    let url = exec_url(&node, exec(&id, &["true"])).await?;
    let address = url.trim_start_matches("http://").split('/').next().unwrap().to_owned();
    // Headers that never end, in number or in length, and connections that say nothing.
    let mut long = TcpStream::connect(&address).await?;
    let _ = long.write_all(&[b"GET / HTTP/1.1\r\nA: ".as_slice(), &[b'a'; 40_000]].concat()).await;
    let mut answer = Vec::new();
    let _ = tokio::time::timeout(Duration::from_secs(20), long.read_to_end(&mut answer)).await?;
    assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 4"));
    // A request within another: the chunks count, and nothing after them is read.
    let hidden = format!("GET /exec/x HTTP/1.1\r\nHost: {address}\r\n\r\n");
    for lengths in [
        format!("Content-Length: {}\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", hidden.len()),
        "Content-Length: 0\r\nContent-Length: 7\r\n\r\n".to_owned(),
        "Transfer-Encoding: xchunked\r\n\r\n".to_owned(),
    ] {
        let mut stream = TcpStream::connect(&address).await?;
        let text = format!("POST /x HTTP/1.1\r\nHost: {address}\r\n{lengths}{hidden}");
        stream.write_all(text.as_bytes()).await?;
        let mut answer = Vec::new();
        let _ =
            tokio::time::timeout(Duration::from_secs(60), stream.read_to_end(&mut answer)).await?;
        let answer = String::from_utf8_lossy(&answer);
        assert_eq!(answer.matches("HTTP/1.1 4").count(), 1, "{lengths:?}: {answer}");
    }
    // One that says a little now and then.
    let (mut from, mut to) = TcpStream::connect(&address).await?.into_split();
    let dribble = async {
        while to.write_all(b"GET / HTTP/1.1\r\nA: b\r\n").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        std::future::pending::<()>().await;
    };
    let mut answer = Vec::new();
    tokio::select! {
        () = dribble => {}
        ended = tokio::time::timeout(Duration::from_secs(60), from.read_to_end(&mut answer)) => {
            let _ = ended?;
        }
    }
    // More that say nothing than may wait: the oldest are let go, and who speaks is served.
    let mut silent = Vec::new();
    for _ in 0..5000 {
        silent.push(TcpStream::connect(&address).await?);
    }
    for stream in &mut silent[..2900] {
        let closed =
            tokio::time::timeout(Duration::from_secs(60), stream.read(&mut [0; 1])).await?;
        assert!(!matches!(closed, Ok(1..)));
    }
    let mut session = start(&node, SPDY, &id, &["sh", "-c", "exit 5"]).await?;
    session.finish().await?;
    assert_eq!(session.exit_code()?, 5);
    until_gone(&mut node, &id, " cat").await
}
