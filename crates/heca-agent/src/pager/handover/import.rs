//! The target: takes in what the source's pager sends, and becomes the VM's pager at the switch.
//!
//! Until then QEMU waits for its state, no fault is answered, and pages go into the RAM file as they
//! come. The threads of a pager start when the source has told of every page; what QEMU touched before,
//! while it loaded its state, is answered then. Sponsors are asked under the former owner's epoch
//! until the guest may run here: see [`Importer::commit`].

use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use heca_api::ApiError;
use heca_core::handover::{PageRecord, PageRecords, encode_records};
use heca_core::pager::{Event, Pager};
use heca_types::limits::{CONNECT_TIMEOUT_MS, PAGE_BYTES};
use heca_types::{ExtentIndex, OwnerId, PageIndex, PageVersion};
use heca_wire::{Body, DecodeError, HelloAck, Kind, Role, VERSION_MAX, VERSION_MIN};

use super::behind::Behind;
use super::bitmap::{AtomicBitmap, Bitmap};
use super::transfer::punch;
use super::{BULK_LINKS, Begin, Switch, Tag, encode_message, parse, read_message};
use crate::link::{Link, LinkError, Security};
use crate::pager::engine::Message;
use crate::pager::remote::{chain, lock};
use crate::pager::start::{BEHIND, DROPPED, Prepared, STORED, SWITCHED};
use crate::pager::{PagerConfig, PagerHandle, io_error};

/// Longest time that the sponsors may take to learn of their region's new owner before the guest
/// runs without those that did not.
const TAKE_OVER_PATIENCE: Duration = Duration::from_millis(150);
/// How often the target looks whether all is there.
const LOOK: Duration = Duration::from_millis(10);
/// Longest silence of a source that is sending.
const SILENCE: Duration = Duration::from_secs(20);

/// Pages in the order in which they came: first and number.
pub(in super::super) type Arrivals = Vec<(u64, u64)>;

/// What the engine of a VM that came from another host begins with.
pub(in super::super) struct Incoming {
    pub(in super::super) behind: Arc<Behind>,
    /// Pages that are here and not mapped yet.
    pub(in super::super) unmapped: Bitmap,
    /// Where to look for them, the last ones that came at the end.
    pub(in super::super) order: Arrivals,
}

/// The connections of one attempt of the source to reach this pager.
#[derive(Default)]
struct Session {
    streams: Vec<TcpStream>,
    receivers: Vec<JoinHandle<()>>,
    demand: Option<Link>,
}

/// How far it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    Receiving,
    /// The source told of every page.
    Switched,
    Failed,
}

/// A pager of a VM that comes from another host.
pub(in super::super) struct Importer {
    config: PagerConfig,
    ticket: OwnerId,
    security: Security,
    pub(super) prepared: Mutex<Option<Prepared>>,
    pub(super) behind: OnceLock<Arc<Behind>>,
    /// Before the switch: pages whose file has content, and pages whose content came.
    pub(super) filled: Mutex<Option<AtomicBitmap>>,
    pub(super) known: AtomicBitmap,
    pub(super) arrivals: Mutex<Arrivals>,
    pub(super) stage: (Mutex<Stage>, Condvar),
    pub(super) barriers: (Mutex<usize>, Condvar),
    session: Mutex<Session>,
    pub(super) handle: OnceLock<PagerHandle>,
    committed: AtomicBool,
    done: AtomicBool,
    address: Mutex<Option<SocketAddr>>,
    pub(super) pages: u64,
}

pub(super) fn protocol(what: &'static str) -> LinkError {
    DecodeError::Field { kind: Kind::Blob, what }.into()
}

impl Importer {
    /// Takes over a QEMU that waits for its state, and listens for the source's pager.
    ///
    /// # Errors
    /// As those of starting any pager; an address that cannot be listened on.
    pub(in super::super) fn start(
        config: &PagerConfig,
    ) -> Result<(Arc<Self>, SocketAddr), ApiError> {
        let import = config.import.as_ref().expect("called for a VM that comes");
        let listener = TcpListener::bind(&import.listen)
            .map_err(|e| io_error(&format!("listen on {}", import.listen), &e))?;
        let address = listener.local_addr().map_err(|e| io_error("listen", &e))?;
        let security = Security::load(config.identity.as_deref())?;
        let prepared = Prepared::new(config, security.clone())?;
        let importer = Self::new(config, security, prepared.pages());
        *lock(&importer.filled) = Some(AtomicBitmap::new(importer.pages));
        *lock(&importer.prepared) = Some(prepared);
        let importer = Arc::new(importer);
        importer.accept(listener)?;
        Ok((importer, address))
    }

    /// Goes on where a former pager ended after the switch: some pages are still behind.
    pub(in super::super) fn again(
        config: &PagerConfig,
        behind: Arc<Behind>,
        pager: PagerHandle,
    ) -> Result<Arc<Self>, ApiError> {
        let import = config.import.as_ref().expect("called for a VM that came");
        let listener = TcpListener::bind(&import.listen)
            .map_err(|e| io_error(&format!("listen on {}", import.listen), &e))?;
        let security = Security::load(config.identity.as_deref())?;
        let importer = Self::new(config, security, 0);
        *lock(&importer.stage.0) = Stage::Switched;
        importer.committed.store(true, Ordering::SeqCst);
        let _ = importer.behind.set(behind);
        let _ = importer.handle.set(pager);
        let importer = Arc::new(importer);
        importer.accept(listener)?;
        Ok(importer)
    }

    fn new(config: &PagerConfig, security: Security, pages: u64) -> Self {
        let ticket = config.import.as_ref().expect("looked at before").ticket;
        Self {
            config: config.clone(),
            ticket,
            security,
            prepared: Mutex::default(),
            behind: OnceLock::new(),
            filled: Mutex::default(),
            known: AtomicBitmap::new(pages),
            arrivals: Mutex::default(),
            stage: (Mutex::new(Stage::Receiving), Condvar::new()),
            barriers: Default::default(),
            session: Mutex::default(),
            handle: OnceLock::new(),
            committed: AtomicBool::new(false),
            done: AtomicBool::new(false),
            address: Mutex::default(),
            pages,
        }
    }

    /// The pager, once the switch made it one.
    pub(in super::super) fn handle(&self) -> Option<&PagerHandle> {
        self.handle.get()
    }

    /// Gives the pager out of a server that ends.
    pub(in super::super) fn into_handle(self) -> Option<PagerHandle> {
        self.handle.into_inner()
    }

    /// Pages that are still behind; none before the switch.
    pub(in super::super) fn behind(&self) -> Option<u64> {
        self.behind.get().map(|behind| behind.left())
    }

    /// Whether the source is needed no longer, and knows that.
    pub(in super::super) fn is_done(&self) -> bool {
        self.done.load(Ordering::SeqCst)
    }

    /// Pages that came after the switch, those that came twice counted twice.
    pub(in super::super) fn received(&self) -> u64 {
        self.behind.get().map_or(0, |behind| behind.came())
    }

    /// Whether the switch failed.
    pub(in super::super) fn has_failed(&self) -> bool {
        *lock(&self.stage.0) == Stage::Failed
    }

    /// The guest may run here: the region has this owner from now on. Can be repeated.
    ///
    /// # Errors
    /// Called before the switch.
    pub(in super::super) fn commit(&self) -> Result<(), ApiError> {
        let Some(handle) = self.handle.get() else {
            return Err(ApiError::new("not-switched", "the VM's memory is not here yet"));
        };
        if !self.committed.swap(true, Ordering::SeqCst) {
            handle.remote.take_over(TAKE_OVER_PATIENCE);
            handle.mailbox().send(Message::Event(Event::Freeze { on: false }));
        }
        Ok(())
    }

    fn accept(self: &Arc<Self>, listener: TcpListener) -> Result<(), ApiError> {
        *lock(&self.address) = listener.local_addr().ok();
        let importer = Arc::downgrade(self);
        let accept = move || {
            for stream in listener.incoming() {
                let Some(importer) = importer.upgrade() else { return };
                if importer.is_done() {
                    return;
                }
                let Ok(stream) = stream else {
                    std::thread::sleep(Duration::from_millis(20));
                    continue;
                };
                // In a thread of its own: others must not wait for one that says nothing.
                let greet = move || {
                    if let Err(error) = importer.greet(stream) {
                        tracing::warn!("a connection is not taken: {}", chain(&error));
                    }
                };
                let _ = std::thread::Builder::new().name("import-greet".into()).spawn(greet);
            }
        };
        std::thread::Builder::new()
            .name("import-accept".into())
            .spawn(accept)
            .map(drop)
            .map_err(|error| io_error("start a thread", &error))
    }

    fn greet(self: &Arc<Self>, stream: TcpStream) -> Result<(), LinkError> {
        let duplicate = stream.try_clone()?;
        let mut link = Link::accept(stream, &self.security)?;
        link.set_timeout(Some(Duration::from_millis(CONNECT_TIMEOUT_MS)))?;
        while !link.has_frame()? {
            link.receive_blocking()?;
        }
        let Some((header, Body::Hello(hello))) = link.next_frame()? else {
            return Err(protocol("the first frame of a connection must be a hello"));
        };
        if hello.owner != self.ticket {
            header.encode_error(
                heca_types::Status::OwnerMismatch,
                "this is not the pager that was expected",
                link.output(),
            );
            let _ = link.flush_blocking();
            return Err(protocol("a connection with another ticket"));
        }
        if hello.version_min > VERSION_MAX || hello.version_max < VERSION_MIN {
            return Err(DecodeError::Version { version: hello.version_min }.into());
        }
        if hello.role == Role::Handover {
            self.end_session();
        }
        lock(&self.session).streams.push(duplicate);
        let store = heca_types::StoreId::from_bytes([0; 16]);
        HelloAck { version: VERSION_MAX, store, free_bytes: 0 }.encode(&header, link.output());
        link.flush_blocking()?;
        link.set_timeout(Some(SILENCE))?;
        let importer = self.clone();
        let name = "import-conn".to_owned();
        let work: Box<dyn FnOnce() + Send> = match hello.role {
            Role::Handover => Box::new(move || importer.lead(link)),
            Role::HandoverBulk => {
                link.set_timeout(None)?;
                Box::new(move || importer.receive(link))
            }
            Role::HandoverDemand => {
                link.set_timeout(None)?;
                self.take_demand(link);
                return Ok(());
            }
            _ => return Err(protocol("a connection of a kind that has no place here")),
        };
        let thread = std::thread::Builder::new().name(name).spawn(work)?;
        if hello.role == Role::HandoverBulk {
            lock(&self.session).receivers.push(thread);
        }
        Ok(())
    }

    /// Nobody is to connect any more: the thread that waits for it sees that.
    fn stop_listening(&self) {
        let address = lock(&self.address).and_then(|address| {
            TcpStream::connect_timeout(&address, Duration::from_millis(200)).ok()
        });
        drop(address);
    }

    fn take_demand(&self, link: Link) {
        match self.handle.get() {
            Some(handle) => handle.mailbox().send(Message::Source(Some(Box::new(link)))),
            None => lock(&self.session).demand = Some(link),
        }
    }

    /// Ends what is left of the source's last attempt, and waits until none of its pages is on its
    /// way into memory.
    pub(in super::super) fn end_session(&self) {
        let session = std::mem::take(&mut *lock(&self.session));
        for stream in &session.streams {
            let _ = stream.shutdown(Shutdown::Both);
        }
        for receiver in session.receivers {
            let _ = receiver.join();
        }
        if let Some(handle) = self.handle.get() {
            handle.mailbox().send(Message::Source(None));
        }
    }

    /// The handover connection.
    fn lead(&self, mut link: Link) {
        match self.follow(&mut link) {
            Ok(()) => tracing::info!(vm = self.config.name, "everything is here"),
            Err(error) => {
                tracing::warn!(vm = self.config.name, "the source is away: {}", chain(&error));
                if self.handle.get().is_none() {
                    self.enter(Stage::Failed);
                }
            }
        }
        link.shut_down();
    }

    fn enter(&self, stage: Stage) {
        *lock(&self.stage.0) = stage;
        self.stage.1.notify_all();
    }

    fn follow(&self, link: &mut Link) -> Result<(), LinkError> {
        let region = self.config.region;
        let (tag, bytes) = read_message(link)?;
        let begin: Begin = match tag {
            Tag::Begin => parse(&bytes)?,
            _ => return Err(protocol("a source begins with `begin`")),
        };
        if begin.switched {
            let Some(behind) = self.behind.get() else {
                return Err(protocol("the source says that the switch is over; it is not"));
            };
            let pages =
                self.handle().map_or(self.pages, |handle| handle.target.len / PAGE_BYTES as u64);
            let missing = |page| match behind.is_missing(page) {
                true => PageRecord::Behind(PageVersion::NEVER),
                false => PageRecord::Sent(PageVersion::NEVER),
            };
            let mut pending = Vec::new();
            encode_records((0..pages).map(missing), &mut pending);
            encode_message(region, Tag::Pending, &pending, link.output());
        } else {
            // For as long as the source copies, nothing comes here.
            link.set_timeout(None)?;
            let (tag, bytes) = read_message(link)?;
            if tag != Tag::Switch {
                return Err(protocol("a source that copies goes on with `switch`"));
            }
            self.wait_for_barriers()?;
            self.switch(&bytes).map_err(|error| {
                tracing::error!(vm = self.config.name, "cannot take the VM over: {error}");
                std::io::Error::other(error)
            })?;
            encode_message(region, Tag::Applied, &[], link.output());
        }
        link.flush_blocking()?;
        link.set_timeout(Some(LOOK))?;
        loop {
            if self.committed.load(Ordering::SeqCst) && self.behind() == Some(0) {
                encode_message(region, Tag::Done, &[], link.output());
                link.flush_blocking()?;
                self.done.store(true, Ordering::SeqCst);
                self.stop_listening();
                return Ok(());
            }
            match link.receive_blocking() {
                Err(LinkError::Io(error)) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Ok(()) => return Err(protocol("a message that was not asked for")),
                Err(error) => return Err(error),
            }
        }
    }

    fn wait_for_barriers(&self) -> Result<(), LinkError> {
        let (count, came) = &self.barriers;
        let wait = came.wait_timeout_while(lock(count), SILENCE, |count| *count < BULK_LINKS);
        let (count, _) = wait.unwrap_or_else(PoisonError::into_inner);
        if *count < BULK_LINKS {
            return Err(std::io::Error::from(std::io::ErrorKind::TimedOut).into());
        }
        Ok(())
    }

    /// Takes in what the source tells of every page, and starts to serve faults.
    fn switch(&self, bytes: &[u8]) -> Result<(), ApiError> {
        let begun = Instant::now();
        let broken = |what: String| ApiError::new("bad-switch", what);
        let (head, rest) = bytes
            .split_first_chunk::<8>()
            .ok_or_else(|| broken("the message of the switch is cut off".to_owned()))?;
        let json = usize::try_from(u64::from_le_bytes(*head)).unwrap_or(usize::MAX);
        let (json, records) = rest
            .split_at_checked(json)
            .ok_or_else(|| broken("the message of the switch is cut off".to_owned()))?;
        let switch: Switch = serde_json::from_slice(json).map_err(|e| broken(e.to_string()))?;
        let mut prepared = lock(&self.prepared)
            .take()
            .ok_or_else(|| broken("the switch came twice".to_owned()))?;
        if (switch.pages, switch.record_bytes) != (prepared.pages(), records.len()) {
            return Err(broken(format!(
                "the source tells of {} pages in {} bytes; there are {} pages here",
                switch.pages,
                records.len(),
                prepared.pages()
            )));
        }
        let filled = lock(&self.filled).take().expect("made with `prepared`");
        let (ram, journal) = (prepared.ram.clone(), prepared.journal.clone());
        let core = &mut prepared.core;
        adopt_extents(core, &switch, &journal)?;
        journal.set_number(STORED, switch.stored);
        let mut behind_runs = Vec::new();
        let mut unmapped = Bitmap::new(switch.pages);
        for run in PageRecords::new(records, switch.pages) {
            let (pages, record) = run.map_err(|error| broken(error.to_string()))?;
            let word = record.version().0;
            if word >= BEHIND {
                return Err(broken(format!("version {word} of page {}", pages.start)));
            }
            let word = match record {
                PageRecord::Zero(_) | PageRecord::Sent(_) => word,
                PageRecord::Behind(_) => word | BEHIND,
                PageRecord::Remote(_) => word | DROPPED,
            };
            if word != 0 {
                pages.clone().for_each(|page| journal.set_version(page, word));
            }
            match record {
                PageRecord::Zero(version) | PageRecord::Remote(version) => {
                    free(&ram, &filled, pages.clone()).map_err(|e| io_error("free a page", &e))?;
                    if word != 0 {
                        let dropped = matches!(record, PageRecord::Remote(_));
                        let each = pages.map(PageIndex);
                        each.for_each(|page| core.adopt_absent(page, version, dropped));
                    }
                }
                PageRecord::Behind(version) => {
                    pages.clone().for_each(|page| core.adopt_behind(PageIndex(page), version));
                    behind_runs.push(pages);
                }
                PageRecord::Sent(version) => {
                    if !self.known.all(pages.clone()) {
                        let first = pages.start;
                        let text = format!("pages from {first} count as sent and never came");
                        return Err(broken(text));
                    }
                    pages.clone().for_each(|page| core.adopt_resident(PageIndex(page), version));
                    unmapped.set_range(pages);
                }
            }
        }
        // Not before the guest may run here.
        core.step(Event::Freeze { on: true }, &mut Vec::new());
        // The successor of a pager that dies from here on has all that it must know.
        journal.set_number(SWITCHED, 1);
        let behind = Behind::new(filled, ram, journal, prepared.uffd.clone(), prepared.target());
        behind_runs.into_iter().for_each(|pages| behind.expect(pages));
        let behind = Arc::new(behind);
        let order = std::mem::take(&mut *lock(&self.arrivals));
        let incoming = Incoming { behind: behind.clone(), unmapped, order };
        let handle = prepared.run(incoming)?;
        if let Some(link) = lock(&self.session).demand.take() {
            handle.mailbox().send(Message::Source(Some(Box::new(link))));
        }
        let left = behind.left();
        let _ = self.behind.set(behind);
        let _ = self.handle.set(handle);
        self.enter(Stage::Switched);
        tracing::info!(
            vm = self.config.name,
            behind_pages = left,
            us = begun.elapsed().as_micros() as u64,
            "the source told of every page"
        );
        Ok(())
    }
}

fn adopt_extents(
    core: &mut Pager,
    switch: &Switch,
    journal: &heca_sys::journal::Journal,
) -> Result<(), ApiError> {
    let broken = |what: String| ApiError::new("bad-switch", what);
    if switch.extents.len() != core.layout().len() as usize {
        return Err(broken(format!("the source tells of {} extents", switch.extents.len())));
    }
    for (number, &word) in switch.extents.iter().enumerate() {
        let extent = ExtentIndex(number as u32);
        core.adopt_extent(extent, word).map_err(|error| broken(error.to_string()))?;
        journal.set_extent(extent.0, word);
    }
    Ok(())
}

/// Frees what came of pages that went to sponsors since.
fn free(
    ram: &std::fs::File,
    filled: &AtomicBitmap,
    pages: std::ops::Range<u64>,
) -> std::io::Result<()> {
    if !filled.any(pages.clone()) {
        return Ok(());
    }
    let mut at = pages.start;
    while at < pages.end {
        if !filled.get(at) {
            at += 1;
            continue;
        }
        let first = at;
        while at < pages.end && filled.clear(at) {
            at += 1;
        }
        punch(ram, first, at - first)?;
    }
    Ok(())
}
