//! Entry point of the fuzzer, and of the test that replays what it found.

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::qmp::inbox::{Inbox, Step};
use crate::qmp::{LINE_BYTES_MAX, Qmp, QmpError};

/// Longest line in the rounds that are about the limit: a real one would need far larger inputs.
const SHORT_LINE: usize = 100;
/// Most bytes that are certain to fit into a socket nobody reads from.
const SOCKET_BYTES: usize = 32 << 10;
/// How often a client asks, so that its commands fit into such a socket, too.
const ROUNDS: usize = 8;
/// Longer than any call may take when all the bytes are there.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Reads bytes as the QMP client reads what QEMU sends, first without a socket, then with one.
///
/// # Panics
/// When the messages depend on how the bytes were cut into pieces, a line over the limit is read,
/// an error has characters that would steer a terminal, or the client waits for what cannot come.
pub fn qmp(data: &[u8]) {
    for (limit, piece) in [(LINE_BYTES_MAX, 7), (SHORT_LINE, 1)] {
        let whole = read(data, data.len().max(1), limit);
        assert_eq!(read(data, piece, limit), whole, "in pieces of {piece}, limit {limit}");
        let sound = data.split(|&byte| byte == b'\n').take_while(|line| line.len() <= limit);
        assert!(whole.len() <= sound.count(), "a line over the limit of {limit} was read");
    }
    if data.len() <= SOCKET_BYTES {
        talk(data);
    }
}

/// What each line gives, up to the first error; read in pieces of this size.
fn read(data: &[u8], piece: usize, limit: usize) -> Vec<Step> {
    let mut inbox = Inbox::new(limit);
    let mut steps = Vec::new();
    for bytes in data.chunks(piece) {
        inbox.push(bytes);
        loop {
            match inbox.step() {
                Ok(Step::Starved) => break,
                Ok(step) => steps.push(step),
                Err(error) => {
                    check(&error);
                    return steps;
                }
            }
        }
    }
    steps
}

/// Lets the client talk to a peer that says this, whatever it is told, and then hangs up.
fn talk(data: &[u8]) {
    let (stream, mut peer) = UnixStream::pair().expect("a pair of sockets");
    peer.write_all(data).expect("it fits");
    peer.shutdown(Shutdown::Write).expect("a fresh socket");
    let deadline = Instant::now() + TIMEOUT;
    let Ok(mut qmp) = checked(Qmp::over(stream, Path::new("qmp"), TIMEOUT, deadline)) else {
        return;
    };
    for _ in 0..ROUNDS {
        let _ = checked(qmp.query_status());
        let _ = checked(qmp.query_version());
        let _ = checked(qmp.wait_event("MIGRATION", TIMEOUT));
        if let Err(QmpError::Closed { .. }) = checked(qmp.cont()) {
            assert!(matches!(qmp.stop(), Err(QmpError::Closed { .. })), "back from the dead");
            break;
        }
    }
    qmp.take_events();
    let _ = checked(qmp.quit());
}

fn checked<T>(result: Result<T, QmpError>) -> Result<T, QmpError> {
    if let Err(error) = &result {
        check(error);
    }
    result
}

fn check(error: &QmpError) {
    assert!(!matches!(error, QmpError::Timeout { .. }), "waited for bytes that cannot come");
    let text = error.to_string();
    assert!(!text.contains(char::is_control), "steers a terminal: {text:?}");
}
