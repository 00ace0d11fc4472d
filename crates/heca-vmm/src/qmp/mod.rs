//! A small client of QMP, QEMU's control protocol, over a unix socket.
//!
//! One command at a time, each with an id, so that a late answer to a command that timed out is
//! never taken for the answer to the next. Events that come in between are kept, up to a limit.

mod error;
mod events;
pub(crate) mod inbox;
mod message;
#[cfg(test)]
mod tests;

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use serde_json::{Value, json};

use crate::QemuVersion;
pub use error::QmpError;
pub use events::{EVENT_BYTES_MAX, EVENTS_MAX};
use inbox::{Inbox, Step};
pub use message::Event;
use message::{Message, excerpt, version_of};

/// Longest line accepted from QEMU; `query-qmp-schema`, the longest real answer, is about 200 KiB.
pub const LINE_BYTES_MAX: usize = 4 << 20;
/// Pause between two attempts to connect to a socket that is not there yet.
const CONNECT_RETRY: Duration = Duration::from_millis(10);

/// A connection to QEMU's control socket, ready for commands.
#[derive(Debug)]
pub struct Qmp {
    stream: UnixStream,
    path: PathBuf,
    timeout: Duration,
    inbox: Inbox,
    next_id: u64,
    /// Set once the byte stream can no longer be trusted; every later call then fails.
    closed: bool,
}

impl Qmp {
    /// Connects to the control socket at `path`, waiting up to `timeout` for QEMU to create it and
    /// to greet. The same timeout then holds for each command; see [`Qmp::set_timeout`].
    pub fn connect(path: &Path, timeout: Duration) -> Result<Self, QmpError> {
        let deadline = deadline_after(timeout);
        let stream = connect_until(path, deadline)?;
        Self::over(stream, path, timeout, deadline)
    }

    /// Waits for the greeting on a fresh connection, and makes it ready for commands.
    pub(crate) fn over(
        stream: UnixStream,
        path: &Path,
        timeout: Duration,
        deadline: Instant,
    ) -> Result<Self, QmpError> {
        let mut qmp = Self {
            stream,
            path: path.to_owned(),
            timeout,
            inbox: Inbox::new(LINE_BYTES_MAX),
            next_id: 1,
            closed: false,
        };
        qmp.read_greeting(deadline)?;
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Changes how long each later command may take.
    pub fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    /// Runs a command and returns its answer. `arguments` is an object, or null for none.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        let deadline = deadline_after(self.timeout);
        let id = self.next_id;
        self.next_id += 1;
        let mut request = json!({ "execute": command, "id": id });
        if !arguments.is_null() {
            request["arguments"] = arguments;
        }
        self.send(&request, command)?;
        loop {
            match self.read_message(deadline, command)? {
                Message::Return { id: answered, value } if answered == id => return Ok(value),
                Message::Error { id: answered, class, desc }
                    if answered.is_none_or(|a| a == id) =>
                {
                    return Err(QmpError::Command { command: command.to_owned(), class, desc });
                }
                other => tracing::debug!(?other, command, "ignored an answer to another command"),
            }
        }
    }

    /// Returns the oldest event of this name, waiting for one if none has come yet. Other events
    /// stay for later. With a zero timeout only events already collected are looked at.
    pub fn wait_event(&mut self, name: &str, timeout: Duration) -> Result<Event, QmpError> {
        let deadline = deadline_after(timeout);
        let what = format!("event {name}");
        loop {
            if let Some(event) = self.inbox.events.take(name) {
                return Ok(event);
            }
            self.read_line_into_events(deadline, &what)?;
        }
    }

    /// Returns the events collected so far, oldest first, and forgets them.
    pub fn take_events(&mut self) -> Vec<Event> {
        self.inbox.events.take_all()
    }

    /// How many events were dropped because nobody took them in time.
    #[must_use]
    pub fn dropped_events(&self) -> u64 {
        self.inbox.events.dropped()
    }

    /// The run state of the machine, such as `prelaunch`, `running` or `postmigrate`.
    pub fn query_status(&mut self) -> Result<String, QmpError> {
        let value = self.execute("query-status", Value::Null)?;
        let status = value["status"].as_str().map(str::to_owned);
        status.ok_or_else(|| unexpected("an answer to query-status without a status", &value))
    }

    /// The version of the QEMU at the other end.
    pub fn query_version(&mut self) -> Result<QemuVersion, QmpError> {
        let value = self.execute("query-version", Value::Null)?;
        version_of(&value)
            .ok_or_else(|| unexpected("an answer to query-version without a version", &value))
    }

    /// Lets the virtual CPUs run.
    pub fn cont(&mut self) -> Result<(), QmpError> {
        self.execute("cont", Value::Null).map(drop)
    }

    /// Pauses the virtual CPUs.
    pub fn stop(&mut self) -> Result<(), QmpError> {
        self.execute("stop", Value::Null).map(drop)
    }

    /// Presses the guest's power button.
    pub fn system_powerdown(&mut self) -> Result<(), QmpError> {
        self.execute("system_powerdown", Value::Null).map(drop)
    }

    /// Ends QEMU at once. A connection that closes instead of an answer counts as success, and so
    /// does a QEMU that was already gone.
    pub fn quit(&mut self) -> Result<(), QmpError> {
        match self.execute("quit", Value::Null) {
            Ok(_) | Err(QmpError::Closed { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn read_greeting(&mut self, deadline: Instant) -> Result<(), QmpError> {
        let what = "the greeting (is another client connected to this socket?)";
        match self.read_message(deadline, what) {
            Ok(Message::Greeting(_)) => Ok(()),
            Ok(other) => Err(QmpError::Greeting {
                path: self.path.clone(),
                text: excerpt(format!("{other:?}").as_bytes()),
            }),
            Err(QmpError::Malformed { text, .. }) => {
                Err(QmpError::Greeting { path: self.path.clone(), text })
            }
            Err(error) => Err(error),
        }
    }

    fn send(&mut self, request: &Value, command: &str) -> Result<(), QmpError> {
        self.check_open(command)?;
        let mut line = request.to_string();
        line.push('\n');
        let wait = self.timeout.max(Duration::from_millis(1));
        let sent = self
            .stream
            .set_write_timeout(Some(wait))
            .and_then(|()| self.stream.write_all(line.as_bytes()));
        // After a failure part of the line may be out: nothing sent later could be understood.
        sent.map_err(|error| {
            self.closed = true;
            self.explain(error, command)
        })
    }

    /// Reads until a message comes that is not an event.
    fn read_message(&mut self, deadline: Instant, what: &str) -> Result<Message, QmpError> {
        loop {
            if let Some(message) = self.read_line_into_events(deadline, what)? {
                return Ok(message);
            }
        }
    }

    /// Reads one line. An event is put in the queue, anything else is returned.
    fn read_line_into_events(
        &mut self,
        deadline: Instant,
        what: &str,
    ) -> Result<Option<Message>, QmpError> {
        self.check_open(what)?;
        loop {
            match self.inbox.step() {
                Ok(Step::Starved) => self.fill(deadline, what)?,
                Ok(Step::Kept) => return Ok(None),
                Ok(Step::Message(message)) => return Ok(Some(message)),
                Err(error) => {
                    self.closed = true;
                    return Err(error);
                }
            }
        }
    }

    fn fill(&mut self, deadline: Instant, what: &str) -> Result<(), QmpError> {
        let mut chunk = [0; 16 << 10];
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(self.explain(io::ErrorKind::TimedOut.into(), what));
        }
        let wait = left.max(Duration::from_millis(1));
        let read =
            self.stream.set_read_timeout(Some(wait)).and_then(|()| self.stream.read(&mut chunk));
        match read {
            Ok(0) => {
                self.closed = true;
                self.check_open(what)
            }
            Ok(bytes) => {
                self.inbox.push(&chunk[..bytes]);
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
            Err(error) => Err(self.explain(error, what)),
        }
    }

    fn check_open(&self, what: &str) -> Result<(), QmpError> {
        if self.closed {
            return Err(QmpError::Closed { path: self.path.clone(), what: what.to_owned() });
        }
        Ok(())
    }

    fn explain(&mut self, source: io::Error, what: &str) -> QmpError {
        let (path, what) = (self.path.clone(), what.to_owned());
        match source.kind() {
            io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => QmpError::Timeout { path, what },
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
                self.closed = true;
                QmpError::Closed { path, what }
            }
            _ => {
                self.closed = true;
                QmpError::Io { path, what, source }
            }
        }
    }
}

fn unexpected(what: &str, value: &Value) -> QmpError {
    QmpError::Malformed { what: what.to_owned(), text: excerpt(value.to_string().as_bytes()) }
}

/// A point in time that far away; a day if the sum does not exist.
fn deadline_after(timeout: Duration) -> Instant {
    let now = Instant::now();
    now.checked_add(timeout).unwrap_or_else(|| now + Duration::from_secs(86_400))
}

/// Tries until someone listens. A socket whose queue is full counts as not there yet: a blocking
/// connect would hang on it for as long as another client keeps QEMU's only slot.
fn connect_until(path: &Path, deadline: Instant) -> Result<UnixStream, QmpError> {
    let failed = |source: io::Error| QmpError::Connect { path: path.to_owned(), source };
    loop {
        let error = match connect_once(path) {
            Ok(stream) => return Ok(stream),
            Err(error) => error,
        };
        let may_come = matches!(
            error.kind(),
            io::ErrorKind::NotFound
                | io::ErrorKind::ConnectionRefused
                | io::ErrorKind::WouldBlock
                | io::ErrorKind::Interrupted
        );
        let left = deadline.saturating_duration_since(Instant::now());
        if !may_come || left.is_zero() {
            return Err(failed(error));
        }
        thread::sleep(CONNECT_RETRY.min(left));
    }
}

fn connect_once(path: &Path) -> io::Result<UnixStream> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false)?;
    Ok(stream)
}
