//! The client against a fake QEMU that plays a script.

use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixListener;
use std::thread::JoinHandle;

use tempfile::TempDir;

use super::*;

const GREETING: &str =
    r#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}}, "capabilities": []}}"#;
const LONG: Duration = Duration::from_secs(10);
const SHORT: Duration = Duration::from_millis(100);

struct Peer {
    lines: BufReader<UnixStream>,
    stream: UnixStream,
}

impl Peer {
    fn say(&mut self, text: &str) {
        // The client may have hung up already; some tests are about that.
        let _ = writeln!(self.stream, "{text}");
    }

    /// Reads a command and returns its name and id.
    fn hear(&mut self) -> Option<(String, u64)> {
        let mut line = String::new();
        self.lines.read_line(&mut line).ok().filter(|&bytes| bytes > 0)?;
        let value: Value = serde_json::from_str(&line).unwrap();
        Some((value["execute"].as_str().unwrap().to_owned(), value["id"].as_u64().unwrap()))
    }

    fn answer(&mut self, id: u64, value: Value) {
        self.say(&json!({ "return": value, "id": id }).to_string());
    }

    fn greet(&mut self) {
        self.say(GREETING);
        let (command, id) = self.hear().unwrap();
        assert_eq!(command, "qmp_capabilities");
        self.answer(id, json!({}));
    }
}

struct Fake {
    directory: TempDir,
    thread: Option<JoinHandle<()>>,
}

impl Fake {
    fn start(script: impl FnOnce(&mut Peer) + Send + 'static) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("qmp")).unwrap();
        let thread = thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let lines = BufReader::new(stream.try_clone().unwrap());
            script(&mut Peer { lines, stream });
        });
        Self { directory, thread: Some(thread) }
    }

    fn connect(&self, timeout: Duration) -> Result<Qmp, QmpError> {
        Qmp::connect(&self.directory.path().join("qmp"), timeout)
    }

    fn finish(mut self) {
        self.thread.take().unwrap().join().unwrap();
    }
}

#[test]
fn answers_are_found_among_events_and_events_are_kept() {
    let fake = Fake::start(|peer| {
        peer.greet();
        let (command, id) = peer.hear().unwrap();
        assert_eq!(command, "query-status");
        peer.say(r#"{"event": "STOP", "timestamp": {"seconds": 1, "microseconds": 2}}"#);
        peer.say("");
        peer.say(r#"{"event": "MIGRATION", "data": {"status": "setup"}}"#);
        peer.answer(id, json!({ "status": "paused", "running": false }));
        peer.say(r#"{"event": "MIGRATION", "data": {"status": "active"}}"#);
        let (command, id) = peer.hear().unwrap();
        assert_eq!(command, "query-version");
        peer.answer(id, json!({ "qemu": { "major": 10, "minor": 0, "micro": 13 } }));
        peer.say(r#"{"event": "RESUME"}"#);
        peer.hear();
    });
    let mut qmp = fake.connect(LONG).unwrap();
    assert_eq!(qmp.query_status().unwrap(), "paused");
    assert_eq!(qmp.wait_event("MIGRATION", LONG).unwrap().data["status"], "setup");
    assert_eq!(qmp.query_version().unwrap().to_string(), "10.0.13");
    assert_eq!(qmp.wait_event("RESUME", LONG).unwrap().name, "RESUME");
    let names: Vec<_> = qmp.take_events().into_iter().map(|event| event.name).collect();
    assert_eq!(names, ["STOP", "MIGRATION"]);
    assert_eq!(qmp.dropped_events(), 0);
    drop(qmp);
    fake.finish();
}

#[test]
fn a_refused_command_keeps_the_connection() {
    let fake = Fake::start(|peer| {
        peer.greet();
        let (_, id) = peer.hear().unwrap();
        let error = json!({ "class": "GenericError", "desc": "no such thing" });
        peer.say(&json!({ "error": error, "id": id }).to_string());
        peer.hear().unwrap();
        peer.say(r#"{"error": {"class": "GenericError", "desc": "cannot parse"}}"#);
        let (_, id) = peer.hear().unwrap();
        peer.answer(id, json!({}));
    });
    let mut qmp = fake.connect(LONG).unwrap();
    let error = qmp.execute("frobnicate", json!({ "a": 1 })).unwrap_err();
    assert_eq!(error.to_string(), "qemu refused frobnicate: no such thing (GenericError)");
    assert!(matches!(qmp.stop(), Err(QmpError::Command { desc, .. }) if desc == "cannot parse"));
    qmp.cont().unwrap();
    fake.finish();
}

#[test]
fn a_late_answer_is_not_taken_for_the_next_one() {
    let (timed_out, wait) = std::sync::mpsc::channel();
    let fake = Fake::start(move |peer| {
        peer.greet();
        let (_, late) = peer.hear().unwrap();
        wait.recv().unwrap();
        peer.answer(late, json!({ "status": "wrong" }));
        peer.say(r#"{"return": {"status": "foreign"}, "id": "other"}"#);
        let (_, id) = peer.hear().unwrap();
        peer.answer(id, json!({ "status": "right" }));
    });
    let mut qmp = fake.connect(LONG).unwrap();
    qmp.set_timeout(SHORT);
    assert!(
        matches!(qmp.query_status(), Err(QmpError::Timeout { what, .. }) if what == "query-status")
    );
    timed_out.send(()).unwrap();
    qmp.set_timeout(LONG);
    assert_eq!(qmp.query_status().unwrap(), "right");
    fake.finish();
}

#[test]
fn garbage_ends_the_connection() {
    let fake = Fake::start(|peer| {
        peer.greet();
        peer.hear().unwrap();
        peer.say("\u{1b}[0m login:");
    });
    let mut qmp = fake.connect(LONG).unwrap();
    let error = qmp.query_status().unwrap_err();
    assert!(matches!(&error, QmpError::Malformed { text, .. } if text == "\u{fffd}[0m login:"));
    assert!(matches!(qmp.query_status(), Err(QmpError::Closed { .. })));
    fake.finish();
}

#[test]
fn a_console_or_a_silent_socket_is_not_taken_for_qmp() {
    for text in ["Debian GNU/Linux 12 ttyS0", r#"{"return": {}, "id": 1}"#] {
        let fake = Fake::start(move |peer| peer.say(text));
        let error = fake.connect(LONG).unwrap_err();
        assert!(matches!(error, QmpError::Greeting { .. }), "{error}");
        fake.finish();
    }
    let fake = Fake::start(|peer| drop(peer.hear()));
    let error = fake.connect(SHORT).unwrap_err();
    assert!(error.to_string().contains("another client"), "{error}");
    fake.finish();
}

#[test]
fn a_premature_close_is_said_and_quit_accepts_it() {
    let fake = Fake::start(|_| ());
    assert!(matches!(fake.connect(LONG), Err(QmpError::Closed { .. })));
    fake.finish();
    let fake = Fake::start(|peer| {
        peer.greet();
        peer.hear();
    });
    let mut qmp = fake.connect(LONG).unwrap();
    qmp.quit().unwrap();
    qmp.quit().unwrap();
    assert!(matches!(qmp.wait_event("SHUTDOWN", LONG), Err(QmpError::Closed { .. })));
    fake.finish();
}

#[test]
fn a_line_without_end_is_bounded() {
    let fake = Fake::start(|peer| {
        peer.greet();
        peer.hear().unwrap();
        let chunk = vec![b'['; 1 << 20];
        while peer.stream.write_all(&chunk).is_ok() {}
    });
    let mut qmp = fake.connect(LONG).unwrap();
    let error = qmp.query_status().unwrap_err();
    assert!(error.to_string().contains("longer than"), "{error}");
    assert!(qmp.inbox.unread() < LINE_BYTES_MAX + (64 << 10));
    drop(qmp);
    fake.finish();
}

#[test]
fn connecting_waits_for_the_socket_and_gives_up() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("late");
    let error = Qmp::connect(&path, SHORT).unwrap_err();
    assert!(error.to_string().contains("-qmp unix:"), "{error}");
    let late = path.clone();
    let thread = thread::spawn(move || {
        thread::sleep(SHORT);
        let (stream, _) = UnixListener::bind(&late).unwrap().accept().unwrap();
        let lines = BufReader::new(stream.try_clone().unwrap());
        Peer { lines, stream }.greet();
    });
    Qmp::connect(&path, LONG).unwrap();
    thread.join().unwrap();
    let long = directory.path().join("x".repeat(200));
    assert!(matches!(Qmp::connect(&long, LONG), Err(QmpError::Connect { .. })));
}

#[test]
fn a_socket_with_a_full_queue_does_not_hang() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("busy");
    // As QEMU does: a queue of one, and nobody accepts while another client is served.
    let listener = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None);
    let listener = listener.unwrap();
    rustix::net::bind(&listener, &SocketAddrUnix::new(&path).unwrap()).unwrap();
    rustix::net::listen(&listener, 1).unwrap();
    let mut waiting = Vec::new();
    let error = loop {
        match connect_once(&path) {
            Ok(stream) => waiting.push(stream),
            Err(error) => break error,
        }
    };
    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    assert!(matches!(Qmp::connect(&path, SHORT), Err(QmpError::Connect { .. })));
}
