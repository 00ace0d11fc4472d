//! A TCP connection that may or may not carry TLS.

use std::fmt;
use std::io::{self, IoSlice, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags};
use rustls::{ClientConnection, Connection, HandshakeKind, ServerConnection};

use crate::tls::{ALPN_PAGES, Configs, server_name};
use crate::util::facts;
use crate::{HOST_ROLE, TlsContext, TlsError};

/// Bytes taken from the socket at once.
const RAW_BYTES: usize = 64 * 1024;
/// Plaintext that may wait, encrypted, for the socket: with the overhead of its records less than
/// 64 KiB.
const OUTPUT_BYTES: usize = 63 * 1024;
/// First byte of a TLS connection.
const TLS_HANDSHAKE: u8 = 22;
/// First byte of a TLS peer that gives up at once.
const TLS_ALERT: u8 = 21;

/// A connection to a peer, plain or TLS, for polled sockets. The socket stays in blocking mode;
/// calls that never block say so to the kernel each time.
///
/// Poll for reading only after [`Self::has_buffered_input`] is false, and for writing while
/// [`Self::has_buffered_output`] is true.
pub struct Channel {
    stream: TcpStream,
    tls: Option<Box<Tls>>,
}

struct Tls {
    connection: Connection,
    /// Bytes from the socket that rustls has not seen: `raw[start..end]`.
    raw: Box<[u8]>,
    start: usize,
    end: usize,
    /// Decrypted bytes that wait inside rustls.
    plain: usize,
    /// The peer sends no more.
    closed: bool,
    /// Decryption failed; told once everything before was read.
    failed: Option<rustls::Error>,
    peer: Option<String>,
}

impl fmt::Debug for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Channel")
            .field("stream", &self.stream)
            .field("tls", &self.tls.is_some())
            .field("peer", &self.peer_name())
            .finish()
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

impl Channel {
    /// A connection without TLS.
    #[must_use]
    pub fn plain(stream: TcpStream) -> Self {
        Self { stream, tls: None }
    }

    /// Makes a connection TLS, as its client. Returns after the peer has accepted this host's
    /// certificate, or refused it.
    ///
    /// # Errors
    /// A [`TlsError`] inside; those of the socket. `timeout` is for the whole handshake.
    pub fn connect(stream: TcpStream, tls: &TlsContext, timeout: Duration) -> io::Result<Self> {
        let configs = tls.configs();
        let connection = ClientConnection::new(configs.client.clone(), server_name(HOST_ROLE))
            .map_err(|error| TlsError::from(&error))?;
        Self::handshake(stream, connection.into(), ALPN_PAGES, timeout)
    }

    /// Makes a connection TLS, as its server.
    ///
    /// # Errors
    /// Like [`Self::connect`].
    pub fn accept(stream: TcpStream, tls: &TlsContext, timeout: Duration) -> io::Result<Self> {
        let configs = tls.configs();
        let connection = ServerConnection::new(configs.server.clone())
            .map_err(|error| TlsError::from(&error))?;
        let channel = Self::handshake(stream, connection.into(), ALPN_PAGES, timeout)?;
        // Only a foreign client resumes. rustls would take its certificate as verified.
        if channel.connection().and_then(|c| c.handshake_kind()) == Some(HandshakeKind::Resumed) {
            channel.verify(&configs)?;
        }
        Ok(channel)
    }

    pub(crate) fn handshake(
        stream: TcpStream,
        mut connection: Connection,
        alpn: &[u8],
        timeout: Duration,
    ) -> io::Result<Self> {
        let deadline = Instant::now() + timeout;
        stream.set_nonblocking(false)?;
        stream.set_nodelay(true)?;
        connection.set_buffer_limit(Some(OUTPUT_BYTES));
        let raw = vec![0; RAW_BYTES].into_boxed_slice();
        let (start, end, plain, closed, failed, peer) = Default::default();
        let tls = Tls { connection, raw, start, end, plain, closed, failed, peer };
        let mut channel = Self { stream, tls: Some(Box::new(tls)) };
        let mut first = true;
        loop {
            // A peer that takes nothing more may have told why: read on.
            let sent = channel.flush().unwrap_or(true);
            let Some(tls) = channel.tls.as_mut() else { unreachable!("made above") };
            if let Some(error) = &tls.failed {
                return Err(TlsError::from(error).into());
            }
            if tls.closed {
                return Err(TlsError::Closed.into());
            }
            // A TLS 1.3 client is done before its certificate was looked at. The session ticket
            // tells that it was accepted.
            let accepted = match &tls.connection {
                Connection::Client(client) => client.tls13_tickets_received() > 0,
                Connection::Server(_) => true,
            };
            if accepted && sent && !tls.connection.is_handshaking() {
                break;
            }
            match tls.receive(&channel.stream, RecvFlags::DONTWAIT) {
                Ok(()) => {
                    let plaintext = first && ![TLS_HANDSHAKE, TLS_ALERT].contains(&tls.raw[0]);
                    if plaintext && !tls.closed {
                        return Err(TlsError::Plaintext.into());
                    }
                    first = false;
                    tls.feed();
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if !channel.wait(true, !sent, Some(deadline))? {
                        return Err(TlsError::Timeout.into());
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                    return Err(TlsError::Closed.into());
                }
                Err(error) => return Err(error),
            }
        }
        let Some(tls) = channel.tls.as_mut() else { unreachable!("made above") };
        if tls.connection.alpn_protocol() != Some(alpn) {
            return Err(TlsError::Protocol.into());
        }
        let leaf = tls.connection.peer_certificates().and_then(|chain| chain.first());
        tls.peer = leaf.and_then(|cert| facts(cert)).map(|facts| facts.name);
        Ok(channel)
    }

    /// Whether the peer's certificate would still be accepted: after [`TlsContext::reload`] it
    /// may turn out to be revoked, and time passes. Plain connections have none to check.
    ///
    /// # Errors
    /// A [`TlsError`] inside.
    pub fn recheck(&self, tls: &TlsContext) -> io::Result<()> {
        if self.tls.is_some() { self.verify(&tls.configs()) } else { Ok(()) }
    }

    fn verify(&self, configs: &Configs) -> io::Result<()> {
        let Some(connection) = self.connection() else { return Ok(()) };
        let peer_is_server = matches!(connection, Connection::Client(_));
        let chain = connection.peer_certificates().unwrap_or_default();
        configs.verify(peer_is_server, chain).map_err(|error| TlsError::from(&error).into())
    }

    fn connection(&self) -> Option<&Connection> {
        self.tls.as_ref().map(|tls| &tls.connection)
    }

    /// Name of the host at the other end, from its verified certificate.
    #[must_use]
    pub fn peer_name(&self) -> Option<&str> {
        self.tls.as_ref()?.peer.as_deref()
    }

    /// Whether the connection carries TLS.
    #[must_use]
    pub fn is_tls(&self) -> bool {
        self.tls.is_some()
    }

    /// The socket.
    #[must_use]
    pub fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// Takes what has arrived, without blocking. `Ok(0)` means that the peer closed the
    /// connection (or that `buf` is empty).
    ///
    /// # Errors
    /// `WouldBlock` if nothing has arrived; `InvalidData` if the peer sent broken TLS; those of
    /// the socket.
    pub fn recv(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.take(buf, RecvFlags::DONTWAIT)
    }

    /// Like [`Self::recv`], but waits for bytes, at most for the socket's read timeout.
    ///
    /// # Errors
    /// `WouldBlock` when the timeout has passed; else those of [`Self::recv`].
    pub fn recv_blocking(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let timeout = if self.has_buffered_output() { self.stream.read_timeout()? } else { None };
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        // The peer may wait for what is buffered here before it sends anything.
        while !self.flush()? {
            match self.recv(buf) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if !self.wait(true, true, deadline)? {
                        return Err(error);
                    }
                }
                other => return other,
            }
        }
        self.take(buf, RecvFlags::empty())
    }

    fn take(&mut self, buf: &mut [u8], flags: RecvFlags) -> io::Result<usize> {
        let Some(tls) = self.tls.as_mut() else { return receive(&self.stream, buf, flags) };
        let mut done = 0;
        loop {
            while tls.plain > 0 && done < buf.len() {
                let n = tls.connection.reader().read(&mut buf[done..])?;
                tls.plain -= n;
                done += n;
            }
            if done == buf.len() {
                return Ok(done);
            }
            if tls.start < tls.end && tls.failed.is_none() {
                tls.feed();
                continue;
            }
            if done > 0 {
                return Ok(done);
            }
            // An answer to a key update, perhaps, or an alert. A peer that takes nothing more may
            // still have sent something.
            let _ = tls.flush(&self.stream);
            if let Some(error) = &tls.failed {
                // Records before the broken one count, and rustls does not say how many.
                let chunk = tls.connection.reader().into_first_chunk();
                tls.plain = chunk.map_or(0, <[u8]>::len);
                if tls.plain > 0 {
                    continue;
                }
                return Err(TlsError::from(error).into());
            }
            if tls.closed {
                return Ok(0);
            }
            tls.receive(&self.stream, flags)?;
        }
    }

    /// Sends without blocking; returns how many bytes were accepted. With TLS some of them may
    /// wait in a buffer of less than 64 KiB, for [`Self::flush`] or the next call.
    ///
    /// # Errors
    /// `WouldBlock` if the socket and the buffer are full; those of the socket.
    pub fn send(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.send_vectored(&[IoSlice::new(buf)])
    }

    /// Like [`Self::send`], for several parts in a row. With TLS they share records.
    ///
    /// # Errors
    /// Those of [`Self::send`].
    pub fn send_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        let Some(tls) = self.tls.as_mut() else { return transmit(&self.stream, parts) };
        if parts.iter().all(|part| part.is_empty()) {
            return Ok(0);
        }
        tls.flush(&self.stream)?;
        let mut accepted = tls.connection.writer().write_vectored(parts)?;
        if accepted == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let total = parts.iter().map(|part| part.len()).sum();
        if tls.flush(&self.stream)? && accepted < total {
            let mut rest = parts.to_vec();
            let mut rest = rest.as_mut_slice();
            IoSlice::advance_slices(&mut rest, accepted);
            while accepted < total {
                let n = tls.connection.writer().write_vectored(rest)?;
                accepted += n;
                IoSlice::advance_slices(&mut rest, n);
                if n == 0 || !tls.flush(&self.stream)? {
                    break;
                }
            }
        }
        Ok(accepted)
    }

    /// Sends everything, waiting for the socket until `deadline`.
    ///
    /// # Errors
    /// `TimedOut`; those of the socket. Part of the bytes may have been sent.
    pub fn send_all(&mut self, mut buf: &[u8], deadline: Instant) -> io::Result<()> {
        loop {
            let sent = if buf.is_empty() { self.flush().map(|_| 0) } else { self.send(buf) };
            match sent {
                Ok(n) => buf = &buf[n..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
            let blocked = self.has_buffered_output();
            if buf.is_empty() && !blocked {
                return Ok(());
            }
            if !self.wait(false, true, Some(deadline))? {
                return Err(io::ErrorKind::TimedOut.into());
            }
        }
    }

    /// Fills `buf`, waiting until `deadline`.
    ///
    /// # Errors
    /// `TimedOut`, `UnexpectedEof`; those of [`Self::recv`].
    pub fn recv_all(&mut self, buf: &mut [u8], deadline: Instant) -> io::Result<()> {
        let mut done = 0;
        while done < buf.len() {
            match self.recv(&mut buf[done..]) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => done += n,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if !self.wait(true, self.has_buffered_output(), Some(deadline))? {
                        return Err(io::ErrorKind::TimedOut.into());
                    }
                    self.flush()?;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Sends buffered records without blocking. Returns whether nothing is left.
    ///
    /// # Errors
    /// Those of the socket.
    pub fn flush(&mut self) -> io::Result<bool> {
        self.tls.as_mut().map_or(Ok(true), |tls| tls.flush(&self.stream))
    }

    /// Whether encrypted records wait for the socket.
    #[must_use]
    pub fn has_buffered_output(&self) -> bool {
        self.connection().is_some_and(|connection| connection.wants_write())
    }

    /// Whether bytes were taken from the socket that [`Self::recv`] has not returned; poll would
    /// not tell. They may turn out to be less than a record, so that `recv` finds nothing.
    #[must_use]
    pub fn has_buffered_input(&self) -> bool {
        self.tls.as_ref().is_some_and(|tls| tls.plain > 0 || tls.start < tls.end)
    }

    /// Tells the peer that nothing more will be sent, as far as that is possible without
    /// blocking.
    pub fn close(&mut self) {
        if let Some(tls) = self.tls.as_mut() {
            tls.connection.send_close_notify();
            let _ = tls.flush(&self.stream);
        }
        let _ = self.stream.shutdown(std::net::Shutdown::Write);
    }

    /// Polls the socket; false when the deadline has passed.
    fn wait(&self, read: bool, write: bool, deadline: Option<Instant>) -> io::Result<bool> {
        let mut events = PollFlags::empty();
        events.set(PollFlags::IN, read);
        events.set(PollFlags::OUT, write);
        loop {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                return Ok(false);
            }
            let left = left.and_then(|left| Timespec::try_from(left).ok());
            let mut fds = [PollFd::new(&self.stream, events)];
            match rustix::event::poll(&mut fds, left.as_ref()) {
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) => return Ok(true),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl Tls {
    /// Refills the empty `raw`.
    fn receive(&mut self, stream: &TcpStream, flags: RecvFlags) -> io::Result<()> {
        (self.start, self.end) = (0, 0);
        self.end = receive(stream, &mut self.raw, flags)?;
        self.closed |= self.end == 0;
        Ok(())
    }

    /// Shows rustls what is in `raw`, until there is plaintext or nothing is left.
    fn feed(&mut self) {
        while self.start < self.end && self.plain == 0 {
            let mut rest = &self.raw[self.start..self.end];
            let shown = self.connection.read_tls(&mut rest);
            let state = shown.map_err(|error| rustls::Error::General(error.to_string()));
            match state.and_then(|n| Ok((n, self.connection.process_new_packets()?))) {
                Ok((n, state)) => {
                    self.start += n;
                    self.plain = state.plaintext_bytes_to_read();
                    if state.peer_has_closed() {
                        self.closed = true;
                        self.start = self.end;
                    }
                }
                Err(error) => {
                    self.failed = Some(error);
                    self.start = self.end;
                }
            }
        }
    }

    fn flush(&mut self, stream: &TcpStream) -> io::Result<bool> {
        while self.connection.wants_write() {
            match self.connection.write_tls(&mut Socket(stream)) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }
}

fn receive(stream: &TcpStream, buf: &mut [u8], flags: RecvFlags) -> io::Result<usize> {
    loop {
        match rustix::net::recv(stream, &mut *buf, flags) {
            Ok((n, _)) => return Ok(n),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn transmit(stream: &TcpStream, parts: &[IoSlice<'_>]) -> io::Result<usize> {
    let parts = &parts[..parts.len().min(1024)]; // more than the kernel takes
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    loop {
        match rustix::net::sendmsg(stream, parts, &mut SendAncillaryBuffer::default(), flags) {
            Err(Errno::INTR) => {}
            other => return Ok(other?),
        }
    }
}

/// What rustls writes to.
struct Socket<'a>(&'a TcpStream);

impl Write for Socket<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        transmit(self.0, &[IoSlice::new(buf)])
    }

    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        transmit(self.0, parts)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
