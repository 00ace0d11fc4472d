//! Devices of a guest that end here: a socket that QEMU connects to, and the times at which bytes
//! came.
//!
//! The QEMU that a guest leaves and the one that it goes to are both connected; what the guest
//! writes comes from the one that runs it.

use std::collections::BTreeMap;
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use anyhow::Context;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Takes bytes: the number of the connection, when they came, what came.
pub(crate) type Sink = Box<dyn FnMut(u64, Instant, &[u8]) + Send>;

/// How often the thread looks whether it is to end, in nanoseconds.
const LOOK_NS: i64 = 50_000_000;

/// A listening socket, and a thread that reads all of its connections.
pub(crate) struct Tap {
    path: PathBuf,
    connections: Arc<Mutex<Connections>>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Connections {
    stop: bool,
    /// The one that bytes came from last.
    active: Option<u64>,
    streams: BTreeMap<u64, UnixStream>,
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Tap {
    /// Listens on a path that is not in use. The thread gets the highest priority it may have: what
    /// it measures is the guest, not this process.
    pub(crate) fn new(path: &Path, name: &str, sink: Sink) -> anyhow::Result<Self> {
        let listener =
            UnixListener::bind(path).with_context(|| format!("listen on {}", path.display()))?;
        listener.set_nonblocking(true)?;
        let connections = Arc::<Mutex<Connections>>::default();
        let shared = connections.clone();
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            // Linux: of this thread alone. Without privileges it stays as it is.
            let _ = rustix::process::setpriority_process(None, -20);
            run(&listener, &shared, sink);
        })?;
        Ok(Self { path: path.to_owned(), connections, thread: Some(thread) })
    }

    /// Where QEMU connects to.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Sends to the guest, through the QEMU that it was heard from last; through the newest one, if
    /// that one is gone.
    pub(crate) fn send(&self, bytes: &[u8]) -> anyhow::Result<()> {
        let connections = lock(&self.connections);
        let active = connections.active.and_then(|active| connections.streams.get(&active));
        let newest = || connections.streams.values().next_back();
        let stream = active.or_else(newest).context("no QEMU is connected")?;
        // Not `write`: a QEMU that is gone must not end this process by a signal.
        let sent = rustix::net::send(stream, bytes, rustix::net::SendFlags::NOSIGNAL)?;
        anyhow::ensure!(sent == bytes.len(), "QEMU takes nothing in");
        Ok(())
    }
}

impl std::fmt::Debug for Tap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tap").field("path", &self.path).finish_non_exhaustive()
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        lock(&self.connections).stop = true;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        let _ = std::fs::remove_file(&self.path);
    }
}

fn run(listener: &UnixListener, shared: &Mutex<Connections>, mut sink: Sink) {
    let mut readers: Vec<(u64, UnixStream)> = Vec::new();
    let mut accepted = 0;
    let mut buffer = [0u8; 4096];
    let timeout = Timespec { tv_sec: 0, tv_nsec: LOOK_NS };
    while !lock(shared).stop {
        let mut fds: Vec<_> = std::iter::once(listener.as_fd())
            .chain(readers.iter().map(|(_, stream)| stream.as_fd()))
            .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN))
            .collect();
        let _ = poll(&mut fds, Some(&timeout));
        let now = Instant::now();
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        drop(fds);
        let mut position = 0;
        readers.retain_mut(|(number, stream)| {
            position += 1;
            if !ready[position] {
                return true;
            }
            match stream.read(&mut buffer) {
                Ok(0) => {}
                Ok(count) => {
                    lock(shared).active = Some(*number);
                    sink(*number, now, &buffer[..count]);
                    return true;
                }
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => return true,
                Err(_) => {}
            }
            lock(shared).streams.remove(number);
            false
        });
        if ready[0]
            && let Ok((stream, _)) = listener.accept()
            && let Ok(writer) = stream.try_clone()
        {
            accepted += 1;
            lock(shared).streams.insert(accepted, writer);
            readers.push((accepted, stream));
        }
    }
}
