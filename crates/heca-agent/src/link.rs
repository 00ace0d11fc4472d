//! A connection that carries frames of the page protocol, from the pager's side or the sponsor's.

use std::io::{self, IoSlice};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use heca_api::ApiError;
use heca_pki::{Channel, HostIdentity, TlsContext};
use heca_types::limits::{CONNECT_TIMEOUT_MS, FRAME_PAYLOAD_MAX, SILENCE_TIMEOUT_MS};
use heca_types::{OwnerId, Status};
use heca_wire::{
    Body, DecodeError, HEADER_BYTES, Header, Hello, HelloAck, Kind, Role, VERSION_MAX, VERSION_MIN,
    decode_body,
};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::sockopt;
use rustix::time::Timespec;

/// Room for a whole frame and the beginning of the next.
const BUFFER_BYTES: usize = HEADER_BYTES + FRAME_PAYLOAD_MAX + 64 * 1024;

/// Whether connections carry TLS.
#[derive(Debug, Clone, Default)]
pub enum Security {
    /// Nobody is authenticated and nothing is encrypted: for tests on one machine.
    #[default]
    Plaintext,
    /// TLS 1.3, both sides authenticated by a certificate of the pool.
    Tls(TlsContext),
}

impl Security {
    /// That of a host with its identity in `dir`; plaintext without one.
    ///
    /// # Errors
    /// An identity that cannot be used.
    pub fn load(dir: Option<&Path>) -> Result<Self, ApiError> {
        let Some(dir) = dir else { return Ok(Self::Plaintext) };
        let tls = HostIdentity::load(dir).and_then(|identity| TlsContext::new(&identity));
        tls.map(Self::Tls).map_err(|error| {
            ApiError::new("bad-identity", format!("cannot use the identity in {}", dir.display()))
                .detail(error.to_string())
                .hint("join the pool with `heca host join TOKEN`")
        })
    }

    /// Reads the identity again: it was renewed, or others were revoked.
    pub fn reload(&self) {
        if let Self::Tls(tls) = self
            && let Err(error) = tls.reload()
        {
            tracing::error!("identity not read again: {error}");
        }
    }
}

/// Why a connection is of no more use.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LinkError {
    /// The peer cannot be reached, or went away.
    #[error("connection failed")]
    Io(#[from] io::Error),
    /// The peer closed the connection.
    #[error("the peer closed the connection")]
    Closed,
    /// The peer sent bytes that are not a frame.
    #[error("broken frame")]
    Decode(#[from] DecodeError),
    /// The peer refused a request.
    #[error("refused: {text} ({status})")]
    Refused {
        /// Code.
        status: Status,
        /// The peer's words.
        text: String,
    },
    /// The peer answered something that was not asked.
    #[error("unexpected {found:?} frame")]
    Unexpected {
        /// What came.
        found: Kind,
    },
    /// The peer is a sponsor that is in use already, under another address.
    #[error("it is the same sponsor as {other}")]
    SameSponsor {
        /// The other address.
        other: String,
    },
    /// The name does not resolve.
    #[error("`{address}` names no address; write HOST:PORT")]
    Address {
        /// What was given.
        address: String,
    },
}

impl LinkError {
    /// Whether the peer is gone from the other end of the connection, so that a new one may reach
    /// it: unlike one that takes its time.
    #[must_use]
    pub fn is_lost_connection(&self) -> bool {
        match self {
            Self::Closed => true,
            Self::Io(error) => error.kind() != io::ErrorKind::TimedOut,
            _ => false,
        }
    }
}

/// A frame connection with buffers of its own.
#[derive(Debug)]
pub struct Link {
    channel: Channel,
    input: Vec<u8>,
    start: usize,
    end: usize,
    output: Vec<u8>,
    sent: usize,
    /// Bytes received and sent since the connection was made.
    pub bytes_received: u64,
    /// Bytes sent since the connection was made.
    pub bytes_sent: u64,
}

impl Link {
    /// Wraps a stream that a peer connected, after a handshake if TLS is wanted.
    ///
    /// # Errors
    /// Those of setting socket options and of the handshake.
    pub fn accept(stream: TcpStream, security: &Security) -> io::Result<Self> {
        let timeout = Duration::from_millis(CONNECT_TIMEOUT_MS);
        let channel = match security {
            Security::Plaintext => Channel::plain(stream),
            Security::Tls(tls) => Channel::accept(stream, tls, timeout)?,
        };
        Self::new(channel)
    }

    fn new(channel: Channel) -> io::Result<Self> {
        let stream = channel.stream();
        stream.set_nodelay(true)?;
        // A peer host that vanishes is noticed by its missing acknowledgements.
        sockopt::set_tcp_user_timeout(stream, SILENCE_TIMEOUT_MS as u32)?;
        sockopt::set_socket_keepalive(stream, true)?;
        sockopt::set_tcp_keepidle(stream, Duration::from_secs(2))?;
        sockopt::set_tcp_keepintvl(stream, Duration::from_secs(1))?;
        Ok(Self {
            channel,
            input: vec![0; BUFFER_BYTES],
            start: 0,
            end: 0,
            output: Vec::with_capacity(64 * 1024),
            sent: 0,
            bytes_received: 0,
            bytes_sent: 0,
        })
    }

    /// Connects to a sponsor and agrees on a version.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub fn connect(
        address: &str,
        role: Role,
        owner: OwnerId,
        security: &Security,
    ) -> Result<(Self, HelloAck), LinkError> {
        let timeout = Duration::from_millis(CONNECT_TIMEOUT_MS);
        let unknown = || LinkError::Address { address: address.to_owned() };
        let addresses: Vec<SocketAddr> =
            address.to_socket_addrs().map_err(|_| unknown())?.collect();
        let mut last = unknown();
        for address in addresses {
            match TcpStream::connect_timeout(&address, timeout) {
                Ok(stream) => {
                    let channel = match security {
                        Security::Plaintext => Channel::plain(stream),
                        Security::Tls(tls) => Channel::connect(stream, tls, timeout)?,
                    };
                    let mut link = Self::new(channel)?;
                    let hello =
                        Hello { version_min: VERSION_MIN, version_max: VERSION_MAX, role, owner };
                    hello.encode(link.output());
                    let ack = link.request(timeout, |_, body| match body {
                        Body::HelloAck(ack) => Some(*ack),
                        _ => None,
                    })?;
                    if !(VERSION_MIN..=VERSION_MAX).contains(&ack.version) {
                        return Err(DecodeError::Version { version: ack.version }.into());
                    }
                    return Ok((link, ack));
                }
                Err(error) => last = error.into(),
            }
        }
        Err(last)
    }

    /// Buffer to append frames to; [`Self::flush`] sends them.
    pub fn output(&mut self) -> &mut Vec<u8> {
        &mut self.output
    }

    /// Whether frames wait to be sent.
    #[must_use]
    pub fn has_output(&self) -> bool {
        self.sent < self.output.len() || self.channel.has_buffered_output()
    }

    /// Sends what the socket takes without blocking. Returns whether everything is sent.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub fn flush(&mut self) -> Result<bool, LinkError> {
        while self.sent < self.output.len() {
            match self.channel.send(&self.output[self.sent..]) {
                Ok(n) => {
                    self.sent += n;
                    self.bytes_sent += n as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.output.clear();
        self.sent = 0;
        Ok(self.channel.flush()?)
    }

    /// Sends everything, waiting for the socket as long as the peer takes something now and then.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub fn flush_blocking(&mut self) -> Result<(), LinkError> {
        while !self.flush()? {
            let timeout = Timespec {
                tv_sec: (SILENCE_TIMEOUT_MS / 1000) as i64,
                tv_nsec: (SILENCE_TIMEOUT_MS % 1000 * 1_000_000) as i64,
            };
            let mut fds = [PollFd::from_borrowed_fd(self.channel.as_fd(), PollFlags::OUT)];
            if poll(&mut fds, Some(&timeout)).map_err(io::Error::from)? == 0 {
                return Err(io::Error::from(io::ErrorKind::TimedOut).into());
            }
        }
        Ok(())
    }

    /// Queues the bytes of `parts` behind the buffered frames and sends what the socket takes. The
    /// parts are copied only as far as the socket is full.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub fn send_parts(&mut self, parts: &mut [IoSlice<'_>]) -> Result<(), LinkError> {
        let mut parts = parts;
        if self.flush()? {
            while !parts.is_empty() {
                match self.channel.send_vectored(parts) {
                    Ok(n) => {
                        self.bytes_sent += n as u64;
                        IoSlice::advance_slices(&mut parts, n);
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(error.into()),
                }
            }
        }
        for part in parts {
            self.output.extend_from_slice(part);
        }
        Ok(())
    }

    /// Limits how long a blocking send or receive may wait.
    ///
    /// # Errors
    /// Those of setting socket options.
    pub fn set_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.channel.stream().set_read_timeout(timeout)?;
        self.channel.stream().set_write_timeout(timeout)
    }

    fn compact(&mut self) {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.input.len() - self.end < self.input.len() / 4 {
            self.input.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
    }

    /// Takes in what has arrived, without blocking. Returns whether there was anything.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub fn receive(&mut self) -> Result<bool, LinkError> {
        self.compact();
        let mut any = false;
        while self.end < self.input.len() {
            match self.channel.recv(&mut self.input[self.end..]) {
                // What came before is looked at first; the next call says it again.
                Ok(0) if any => break,
                Ok(0) => return Err(LinkError::Closed),
                Ok(n) => {
                    self.end += n;
                    self.bytes_received += n as u64;
                    any = true;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => break,
                Err(_) if any => break,
                Err(error) => return Err(error.into()),
            }
            // What TLS holds back is not seen by a poll of the socket.
            if !self.channel.has_buffered_input() {
                break;
            }
        }
        Ok(any)
    }

    /// Takes in bytes, waiting for some.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub fn receive_blocking(&mut self) -> Result<(), LinkError> {
        self.compact();
        let n = loop {
            match self.channel.recv_blocking(&mut self.input[self.end..]) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => break other?,
            }
        };
        if n == 0 {
            return Err(LinkError::Closed);
        }
        self.end += n;
        self.bytes_received += n as u64;
        Ok(())
    }

    /// Whether a complete frame is among the bytes taken in.
    ///
    /// # Errors
    /// A broken header.
    pub fn has_frame(&self) -> Result<bool, LinkError> {
        let available = &self.input[self.start..self.end];
        let Some((head, rest)) = available.split_first_chunk::<HEADER_BYTES>() else {
            return Ok(false);
        };
        Ok(rest.len() >= Header::decode(head)?.payload_bytes as usize)
    }

    /// The next complete frame among the bytes taken in, if there is one.
    ///
    /// # Errors
    /// A broken frame.
    pub fn next_frame(&mut self) -> Result<Option<(Header, Body<'_>)>, LinkError> {
        let available = &self.input[self.start..self.end];
        let Some((head, rest)) = available.split_first_chunk::<HEADER_BYTES>() else {
            return Ok(None);
        };
        let header = Header::decode(head)?;
        let bytes = header.payload_bytes as usize;
        if rest.len() < bytes {
            return Ok(None);
        }
        let payload_start = self.start + HEADER_BYTES;
        self.start = payload_start + bytes;
        let body = decode_body(&header, &self.input[payload_start..self.start])?;
        Ok(Some((header, body)))
    }

    /// Sends what is buffered and waits for the answer. `pick` takes the value out of the
    /// expected kind of body; an error frame becomes [`LinkError::Refused`].
    ///
    /// # Errors
    /// See [`LinkError`].
    pub fn request<T>(
        &mut self,
        timeout: Duration,
        pick: impl Fn(&Header, &Body<'_>) -> Option<T>,
    ) -> Result<T, LinkError> {
        let deadline = Instant::now() + timeout;
        self.set_timeout(Some(timeout))?;
        self.flush_blocking()?;
        loop {
            // For the whole answer: a peer that sends a byte at a time gets no more.
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::Error::from(io::ErrorKind::TimedOut).into());
            }
            self.channel.stream().set_read_timeout(Some(left))?;
            if let Some((header, body)) = self.next_frame()? {
                if let Body::Error(text) = body {
                    let text = text.to_owned();
                    return Err(LinkError::Refused { status: header.status, text });
                }
                let picked = pick(&header, &body);
                self.set_timeout(None)?;
                return picked.ok_or(LinkError::Unexpected { found: header.kind });
            }
            match self.receive_blocking() {
                // What the socket says when its timeout has passed.
                Err(LinkError::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Err(io::Error::from(io::ErrorKind::TimedOut).into());
                }
                other => other?,
            }
        }
    }

    /// Polls for input for at most `spin`, then blocks.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub fn receive_spinning(&mut self, spin: Duration) -> Result<(), LinkError> {
        if !spin.is_zero() {
            let deadline = Instant::now() + spin;
            loop {
                if self.receive()? {
                    return Ok(());
                }
                if Instant::now() >= deadline {
                    break;
                }
                std::thread::yield_now();
            }
        }
        self.receive_blocking()
    }

    /// Whether the peer would still be let in.
    ///
    /// # Errors
    /// A certificate that expired, or was revoked.
    pub fn recheck(&self, security: &Security) -> io::Result<()> {
        match security {
            Security::Plaintext => Ok(()),
            Security::Tls(tls) => self.channel.recheck(tls),
        }
    }

    /// Ends the connection; whoever waits on it wakes up.
    pub fn shut_down(&self) {
        let _ = self.channel.stream().shutdown(std::net::Shutdown::Both);
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }
}
