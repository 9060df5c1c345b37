//! The harness itself: namespaces that join, and that leave nothing behind.

use std::net::SocketAddr;
use std::path::Path;

use tests::harness::node::Runtime;
use tests::harness::{Lab, Node, NodeOptions, net};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_reaches_the_lan_and_goes_away_completely() {
    let (id, netns, work);
    {
        let lab = Lab::new("lab").unwrap();
        let node = Node::new(&lab, NodeOptions::default()).await.unwrap();
        (id, work) = (lab.id().to_owned(), lab.dir().to_owned());
        netns = node.netns().path();
        let listener = lab.lan_bind(8080)().unwrap();
        let to: SocketAddr = listener.local_addr().unwrap();
        let server = std::thread::spawn(move || {
            use std::io::{Read as _, Write as _};
            let (mut stream, peer) = listener.accept().unwrap();
            let _ = stream.read(&mut [0; 512]);
            stream.write_all(b"HTTP/1.0 200 OK\r\n\r\nhello").unwrap();
            peer.ip()
        });
        let answer = net::http_get(&node.netns().path(), to, "/").unwrap();
        assert_eq!((answer.code, answer.body.as_str()), (200, "hello"));
        assert_eq!(server.join().unwrap(), node.address());
        assert_eq!(node.run("hostname", &[]).unwrap().trim(), node.name());
        assert!(node.left_behind().is_empty(), "{:?}", node.left_behind());
        node.run("sh", &["-c", "sleep 1000 >/dev/null 2>&1 &"]).unwrap();
    }
    assert!(!netns.exists());
    assert!(!work.exists());
    for hierarchy in tests::harness::leaks::hierarchies() {
        for entry in std::fs::read_dir(hierarchy).unwrap().flatten() {
            assert!(!entry.file_name().to_string_lossy().starts_with(&id));
        }
    }
    assert!(Path::new("/etc/hostname").exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn containerd_takes_the_example_image() {
    let lab = Lab::new("lab-containerd").unwrap();
    let options = NodeOptions { runtime: Runtime::Containerd, ..NodeOptions::default() };
    let node = Node::new(&lab, options).await.unwrap();
    node.import_example_image().unwrap();
    let images = node.run("ctr", &["-n", "k8s.io", "images", "ls", "-q"]).unwrap();
    assert!(images.contains(tests::harness::image::IMAGE), "{images}");
}
