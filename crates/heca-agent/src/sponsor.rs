//! Serves the page protocol: one thread for each connection.

use std::collections::HashMap;
use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use heca_core::sponsor::{OpenRequest, Refusal, ReleaseRequest};
use heca_types::limits::{CONNECT_TIMEOUT_MS, CONNECTIONS_MAX};
use heca_types::{OwnerId, RegionId, Status};
use heca_wire::{
    Body, DecodeError, Header, HelloAck, Kind, OpenAck, PageEntry, PageList, Pong, PongFlags, Role,
    VERSION_MAX, VERSION_MIN, encode_pages,
};

use crate::latency::LatencyHint;
use crate::link::{Link, LinkError, Security};
use crate::store::Store;

mod pages;
mod pull;

use pull::Sources;

/// The region of frames that concern no region.
const NIL: RegionId = RegionId::from_bytes([0; 16]);

/// How often the peer of a connection is looked up among the revoked.
const RECHECK: Duration = Duration::from_secs(5);

/// A connection that was used this recently is polled before it is slept on.
const HOT: Duration = Duration::from_micros(500);

/// Counts of a sponsor since its start.
#[derive(Debug, Default)]
#[allow(missing_docs, reason = "each name says what is counted")]
pub struct SponsorCounters {
    pub connections: AtomicUsize,
    pub pages_read: AtomicU64,
    pub pages_written: AtomicU64,
    pub pages_pulled: AtomicU64,
    pub pages_refused: AtomicU64,
    pub frames_refused: AtomicU64,
    pub bytes_received: AtomicU64,
    pub bytes_sent: AtomicU64,
}

/// A running sponsor.
#[derive(Debug)]
pub struct SponsorServer {
    store: Arc<Store>,
    address: SocketAddr,
    counters: Arc<SponsorCounters>,
    stop: Arc<AtomicBool>,
    streams: Streams,
}

/// A duplicate of each connection's socket, to end it from outside.
type Streams = Arc<Mutex<HashMap<u64, TcpStream>>>;

impl SponsorServer {
    /// Listens on `address` and serves `store`. A connection that was used within the last half
    /// millisecond is polled for `spin` before its thread sleeps.
    ///
    /// # Errors
    /// Those of listening and of starting threads.
    pub fn start(
        store: Store,
        address: &str,
        spin: Duration,
        security: Security,
    ) -> io::Result<Self> {
        let listener = TcpListener::bind(address)?;
        let server = Self {
            store: Arc::new(store),
            address: listener.local_addr()?,
            counters: Arc::default(),
            stop: Arc::default(),
            streams: Arc::default(),
        };
        let hint = LatencyHint::start()?;
        let acceptor = Acceptor {
            store: server.store.clone(),
            counters: server.counters.clone(),
            stop: server.stop.clone(),
            streams: server.streams.clone(),
            hint,
            spin,
            security,
        };
        std::thread::Builder::new()
            .name("sponsor-accept".into())
            .spawn(move || acceptor.run(&listener))?;
        let (store, stop) = (server.store.clone(), server.stop.clone());
        std::thread::Builder::new().name("sponsor-leases".into()).spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(250));
                for region in store.expire() {
                    tracing::warn!(%region, "lease ran out; freed what the region held");
                }
            }
        })?;
        Ok(server)
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its store.
    #[must_use]
    pub fn store(&self) -> &Arc<Store> {
        &self.store
    }

    /// Its counts.
    #[must_use]
    pub fn counters(&self) -> &SponsorCounters {
        &self.counters
    }
}

impl SponsorServer {
    /// Ends all connections and serves no more.
    pub fn disconnect(self) {
        drop(self);
    }
}

impl Drop for SponsorServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // Wake the accepting thread.
        let _ = TcpStream::connect_timeout(&self.address, Duration::from_millis(200));
        for stream in self.streams.lock().unwrap_or_else(PoisonError::into_inner).values() {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

#[derive(Clone)]
struct Acceptor {
    store: Arc<Store>,
    counters: Arc<SponsorCounters>,
    stop: Arc<AtomicBool>,
    streams: Streams,
    hint: LatencyHint,
    spin: Duration,
    security: Security,
}

impl Acceptor {
    fn run(&self, listener: &TcpListener) {
        for (id, stream) in listener.incoming().enumerate() {
            if self.stop.load(Ordering::Relaxed) {
                return;
            }
            let stream = match stream {
                Ok(stream) => stream,
                Err(error) => {
                    // Out of descriptors, as a rule: do not spin on it.
                    tracing::warn!(%error, "accept failed");
                    std::thread::sleep(Duration::from_millis(50));
                    continue;
                }
            };
            if self.counters.connections.load(Ordering::Relaxed) >= CONNECTIONS_MAX {
                tracing::warn!("{CONNECTIONS_MAX} connections: refused one more");
                continue;
            }
            if let Err(error) = self.start(id as u64, stream) {
                tracing::warn!(%error, "connection not served");
            }
        }
    }

    fn start(&self, id: u64, stream: TcpStream) -> io::Result<()> {
        let streams = || self.streams.lock().unwrap_or_else(PoisonError::into_inner);
        streams().insert(id, stream.try_clone()?);
        self.counters.connections.fetch_add(1, Ordering::Relaxed);
        let worker = self.clone();
        let started = std::thread::Builder::new()
            .name("sponsor-conn".into())
            .spawn(move || worker.serve(id, stream));
        if started.is_err() {
            self.forget(id);
        }
        started.map(|_| ())
    }

    fn serve(&self, id: u64, stream: TcpStream) {
        let peer = stream.peer_addr();
        match serve(id, stream, &self.store, &self.counters, &self.hint, self.spin, &self.security)
        {
            Ok(()) => {}
            Err(error @ (LinkError::Closed | LinkError::Io(_))) => {
                tracing::debug!(?peer, "connection ended: {error}");
            }
            Err(error) => tracing::warn!(?peer, "connection dropped: {error}"),
        }
        self.forget(id);
    }

    fn forget(&self, id: u64) {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
        self.counters.connections.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Answers a broken frame in words before the connection ends.
fn refuse_and_close(link: &mut Link, error: &DecodeError) {
    let status = match error {
        DecodeError::Version { .. } => Status::VersionUnsupported,
        DecodeError::PayloadTooLarge { .. } | DecodeError::TooManyEntries { .. } => {
            Status::TooLarge
        }
        _ => Status::Malformed,
    };
    Header::new(Kind::Error, NIL, heca_types::Epoch(0), 0).encode_error(
        status,
        &error.to_string(),
        link.output(),
    );
    let _ = link.flush_blocking();
}

fn wait_for_request(link: &mut Link, spin: Duration, last: &mut Instant) -> Result<(), LinkError> {
    // A broken header is an error of the frame that is taken next.
    while !link.has_frame().unwrap_or(true) {
        let hot = last.elapsed() < HOT;
        link.receive_spinning(if hot { spin } else { Duration::ZERO })?;
        *last = Instant::now();
    }
    Ok(())
}

fn next_request<'a>(
    link: &'a mut Link,
    spin: Duration,
    last: &mut Instant,
) -> Result<(Header, Body<'a>), LinkError> {
    wait_for_request(link, spin, last)?;
    link.next_frame()?.ok_or(LinkError::Closed)
}

struct Connection<'a> {
    id: u64,
    store: &'a Store,
    counters: &'a SponsorCounters,
    owner: OwnerId,
    role: Role,
    data: Vec<u8>,
    entries: Vec<PageEntry>,
    reply: Vec<u8>,
    sources: Sources,
}

fn serve(
    id: u64,
    stream: TcpStream,
    store: &Store,
    counters: &SponsorCounters,
    hint: &LatencyHint,
    spin: Duration,
    security: &Security,
) -> Result<(), LinkError> {
    let mut link = Link::accept(stream, security)?;
    link.set_timeout(Some(Duration::from_millis(CONNECT_TIMEOUT_MS)))?;
    let mut last = Instant::now();
    let (owner, role) = match greet(&mut link, store, &mut last) {
        Err(LinkError::Decode(error)) => {
            refuse_and_close(&mut link, &error);
            return Err(error.into());
        }
        other => other?,
    };
    link.set_timeout(None)?;
    let mut connection = Connection {
        id,
        store,
        counters,
        owner,
        role,
        data: Vec::with_capacity(heca_types::limits::FRAME_PAYLOAD_MAX),
        entries: Vec::with_capacity(heca_types::limits::FRAME_PAGES_MAX),
        reply: Vec::with_capacity(heca_types::limits::FRAME_PAYLOAD_MAX),
        sources: Sources::new(owner, security.clone()),
    };
    let (mut received, mut sent) = (0, 0);
    let mut checked = Instant::now();
    loop {
        wait_for_request(&mut link, spin, &mut last)?;
        // The peer may have been revoked since.
        if checked.elapsed() >= RECHECK {
            link.recheck(security)?;
            checked = Instant::now();
        }
        let outcome = match link.next_frame() {
            Ok(Some((header, body))) => connection.answer(&header, &body),
            Ok(None) => Err(LinkError::Closed),
            Err(error) => Err(error),
        };
        if let Err(LinkError::Decode(error)) = &outcome {
            counters.frames_refused.fetch_add(1, Ordering::Relaxed);
            refuse_and_close(&mut link, error);
        }
        outcome?;
        std::mem::swap(link.output(), &mut connection.reply);
        connection.reply.clear();
        link.flush_blocking()?;
        hint.note(1);
        counters.bytes_received.fetch_add(link.bytes_received - received, Ordering::Relaxed);
        counters.bytes_sent.fetch_add(link.bytes_sent - sent, Ordering::Relaxed);
        (received, sent) = (link.bytes_received, link.bytes_sent);
    }
}

/// The first frame must be a `Hello` with a version that both speak.
fn greet(link: &mut Link, store: &Store, last: &mut Instant) -> Result<(OwnerId, Role), LinkError> {
    let (header, body) = next_request(link, Duration::ZERO, last)?;
    let Body::Hello(hello) = body else {
        let what = "the first frame of a connection must be a hello";
        return Err(DecodeError::Field { kind: header.kind, what }.into());
    };
    if hello.version_min > VERSION_MAX || hello.version_max < VERSION_MIN {
        return Err(DecodeError::Version { version: hello.version_min }.into());
    }
    if !hello.role.is_for_sponsors() {
        let what = "this port serves pages; VMs move by the agent's --migration-listen";
        return Err(DecodeError::Field { kind: header.kind, what }.into());
    }
    let usage = store.usage();
    let ack = HelloAck {
        version: hello.version_max.min(VERSION_MAX),
        store: store.id(),
        free_bytes: usage.offer.saturating_sub(usage.reserved),
    };
    ack.encode(&header, link.output());
    link.flush_blocking()?;
    Ok((hello.owner, hello.role))
}

impl Connection<'_> {
    /// Carries out one request and puts the answer into `reply`.
    fn answer(&mut self, header: &Header, body: &Body<'_>) -> Result<(), LinkError> {
        let outcome = match (header.kind, body) {
            (Kind::Open, Body::Open(request)) if self.role == Role::Control => {
                self.open(header, request)
            }
            (Kind::Renew, _) => self.store.renew(header.region, header.epoch).map(|_| {
                header.reply(Kind::RenewAck, Status::Ok).encode_empty(&mut self.reply);
            }),
            (Kind::Close, _) if self.role == Role::Control => {
                self.store.close_region(header.region, header.epoch, self.owner).map(|()| {
                    header.reply(Kind::CloseAck, Status::Ok).encode_empty(&mut self.reply);
                })
            }
            (Kind::Release, Body::Release(request)) if self.role == Role::Control => {
                self.release(header, request)
            }
            (Kind::Ping, _) => self.ping(header),
            (Kind::Pull, Body::Pull(request))
                if matches!(self.role, Role::Control | Role::Rebuild) =>
            {
                self.pull(header, request)
            }
            (Kind::Read, Body::Pages(list)) => self.pages(header, list, Kind::ReadReply),
            (Kind::Write, Body::Pages(list)) => self.pages(header, list, Kind::WriteAck),
            (Kind::Discard, Body::Pages(list)) => self.pages(header, list, Kind::DiscardAck),
            (Kind::Stat, Body::Pages(list)) => self.pages(header, list, Kind::StatReply),
            _ => {
                let what = "a frame of this kind is not allowed here";
                return Err(DecodeError::Field { kind: header.kind, what }.into());
            }
        };
        if let Err(refusal) = outcome {
            self.counters.frames_refused.fetch_add(1, Ordering::Relaxed);
            self.reply.clear();
            header.encode_error(refusal.status, &refusal.text, &mut self.reply);
        }
        Ok(())
    }

    fn open(
        &mut self,
        header: &Header,
        request: &heca_wire::OpenRequest<'_>,
    ) -> Result<(), Refusal> {
        self.check_owner(request.open.owner)?;
        let request = OpenRequest {
            region: header.region,
            epoch: header.epoch,
            owner: request.open.owner,
            quota_bytes: request.open.quota_bytes,
            lease_ms: request.open.lease_ms,
            extents: request.extents().collect(),
        };
        let (lease_ms, stored_pages) = self.store.open_region(&request, self.id)?;
        OpenAck { lease_ms, stored_pages }.encode(header, &mut self.reply);
        Ok(())
    }

    fn check_owner(&self, owner: OwnerId) -> Result<(), Refusal> {
        if owner == self.owner {
            return Ok(());
        }
        let text = "the connection's hello named another owner".to_owned();
        Err(Refusal { status: Status::OwnerMismatch, text })
    }

    fn release(
        &mut self,
        header: &Header,
        request: &heca_wire::OpenRequest<'_>,
    ) -> Result<(), Refusal> {
        self.check_owner(request.open.owner)?;
        let release = ReleaseRequest {
            region: header.region,
            epoch: header.epoch,
            owner: request.open.owner,
            quota_bytes: request.open.quota_bytes,
            lease_ms: request.open.lease_ms,
            extents: request.extents().collect(),
        };
        self.store.release_extents(&release, self.id)?;
        header.reply(Kind::ReleaseAck, Status::Ok).encode_empty(&mut self.reply);
        Ok(())
    }

    /// An owner that names its region learns here that it was fenced off, even if it has nothing
    /// to read or to write.
    fn ping(&mut self, header: &Header) -> Result<(), Refusal> {
        if header.region != NIL {
            self.store.check(header.region, header.epoch)?;
        }
        let mut flags = PongFlags::default();
        if self.store.is_draining() {
            flags.0 |= PongFlags::DRAINING.0;
        }
        if self.store.is_pressed() {
            flags.0 |= PongFlags::PRESSED.0;
        }
        let usage = self.store.usage();
        let free_bytes = usage.offer.saturating_sub(usage.reserved);
        Pong { flags, free_bytes, store: self.store.id() }.encode(header, &mut self.reply);
        Ok(())
    }

    fn pull(
        &mut self,
        header: &Header,
        request: &heca_wire::PullRequest<'_>,
    ) -> Result<(), Refusal> {
        self.entries.clear();
        let answers = self.sources.pull(self.store, header, request)?;
        let refused = answers.iter().filter(|answer| answer.is_err()).count() as u64;
        for (entry, answer) in request.entries.iter().zip(answers) {
            self.entries.push(answer.map_or_else(
                |refusal| pages::refused(entry, &refusal),
                |()| pages::acknowledged(entry),
            ));
        }
        let count = self.entries.len() as u64;
        self.counters.pages_pulled.fetch_add(count - refused, Ordering::Relaxed);
        self.counters.pages_refused.fetch_add(refused, Ordering::Relaxed);
        let header = header.reply(Kind::PullAck, Status::Ok);
        encode_pages(header, &self.entries, &[], &mut self.reply);
        Ok(())
    }

    fn pages(&mut self, header: &Header, list: &PageList<'_>, reply: Kind) -> Result<(), Refusal> {
        self.entries.clear();
        self.data.clear();
        let (store, entries, data) = (self.store, &mut self.entries, &mut self.data);
        store.with_region(header.region, header.epoch, |region| {
            for (entry, bytes) in list.iter() {
                let answer = match header.kind {
                    Kind::Read => pages::read(region, entry, data),
                    Kind::Write => pages::write(store, region, header, entry, bytes),
                    Kind::Discard => store.discard(region, entry.page()).map(|()| *entry),
                    _ => pages::stat(region, entry),
                };
                entries.push(answer.unwrap_or_else(|refusal| pages::refused(entry, &refusal)));
            }
            Ok(())
        })?;
        let refused = self.entries.iter().filter(|e| e.status() != Status::Ok).count() as u64;
        let count = self.entries.len() as u64;
        match header.kind {
            Kind::Read => &self.counters.pages_read,
            _ => &self.counters.pages_written,
        }
        .fetch_add(count - refused, Ordering::Relaxed);
        self.counters.pages_refused.fetch_add(refused, Ordering::Relaxed);
        let header = header.reply(reply, Status::Ok);
        encode_pages(header, &self.entries, &self.data, &mut self.reply);
        Ok(())
    }
}
