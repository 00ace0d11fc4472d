//! The source: sends the VM's memory to the pager of its next host.
//!
//! Before the switch, two threads send what the engine's [`Tracker`] queues. Afterwards [`Outgoing`]
//! knows which pages are behind; a page is sent by whoever clears its bit first. When the connection
//! is lost then, the target is asked what it lacks, and that is sent: until everything is there, or
//! this host ends.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, bounded, unbounded};
use heca_api::{ApiError, ExportInfo, ExportStage};
use heca_core::handover::{PageRecord, PageRecords};
use heca_core::pager::Event;
use heca_types::limits::{FRAME_PAGES_MAX, PAGE_BYTES};
use heca_types::{Epoch, RegionId};
use heca_wire::{Body, Kind, Role};

use super::outgoing::{Next, Outgoing, Pacer};
use super::tracker::{Shared, Tracker, Work};
use super::transfer::Sender;
use super::{BULK_LINKS, Begin, Tag, be_nice, encode_message, read_message};
use crate::link::{Link, LinkError, Security};
use crate::pager::engine::Message;
use crate::pager::remote::{chain, lock};
use crate::pager::{Destination, PagerConfig, PagerHandle, io_error};

/// Pauses between two attempts to reach the target again: the first, and the longest.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));
/// Longest time for an answer of the engine.
const ENGINE_TIMEOUT: Duration = Duration::from_secs(30);
/// How often a thread that waits for its turn looks.
const LOOK: Duration = Duration::from_millis(2);
/// Time for the guest to get going on the target before the bulk of what is behind follows: its first
/// steps need the processors and the link more than anything.
const HEAD_START: Duration = Duration::from_millis(40);

/// Figures of an export, shared by its threads.
#[derive(Debug, Default)]
struct Counts {
    sent: AtomicU64,
    zeros: AtomicU64,
    sent_after: AtomicU64,
    demanded: AtomicU64,
    bytes: AtomicU64,
}

/// The connections of one attempt.
struct Links {
    lead: Link,
    demand: Link,
    bulk: Vec<Link>,
}

/// What an export needs of the pager that it belongs to, or that it goes on for.
#[derive(Debug, Clone)]
struct Context {
    region: RegionId,
    ram: Arc<File>,
    destination: Destination,
    security: Security,
}

impl Context {
    fn connect(&self, role: Role) -> Result<Link, LinkError> {
        let Destination { address, ticket } = &self.destination;
        Ok(Link::connect(address, role, *ticket, &self.security)?.0)
    }

    fn connect_data(&self) -> Result<(Link, Vec<Link>), LinkError> {
        let bulk = (0..BULK_LINKS).map(|_| self.connect(Role::HandoverBulk));
        let bulk = bulk.collect::<Result<_, _>>()?;
        Ok((self.connect(Role::HandoverDemand)?, bulk))
    }

    fn begin(&self, switched: bool) -> Result<Link, LinkError> {
        let mut lead = self.connect(Role::Handover)?;
        let begin = serde_json::to_vec(&Begin { switched }).expect("plain data");
        encode_message(self.region, Tag::Begin, &begin, lead.output());
        lead.flush_blocking()?;
        Ok(lead)
    }
}

/// State of an export that its threads share.
#[derive(Debug)]
struct State {
    context: Context,
    counts: Counts,
    pacer: Pacer,
    outgoing: Outgoing,
    stage: Mutex<(ExportStage, Option<String>)>,
    ended: AtomicBool,
    /// Of the connections in use.
    sockets: Mutex<Arc<Vec<OwnedFd>>>,
}

fn shut(sockets: &[OwnedFd]) {
    for socket in sockets {
        let _ = rustix::net::shutdown(socket, rustix::net::Shutdown::Both);
    }
}

/// A thread that sends pages; it gives its link back for the switch.
type Copier = JoinHandle<Result<Link, LinkError>>;

/// A VM's memory on its way to another host.
pub(in super::super) struct Export {
    state: Arc<State>,
    shared: Arc<Shared>,
    copying: Mutex<Option<(Link, Link, Vec<Copier>)>>,
}

fn link_error(what: &str, error: &LinkError) -> ApiError {
    ApiError::new("target-unreachable", format!("cannot {what}")).detail(chain(error))
}

impl Export {
    /// Connects to the target's pager and begins to track what the guest writes.
    ///
    /// # Errors
    /// A target that cannot be reached, an engine that does not answer.
    pub(in super::super) fn start(
        handle: &PagerHandle,
        destination: Destination,
        (epoch, bytes_per_s): (Epoch, Option<u64>),
    ) -> Result<Self, ApiError> {
        if handle.remote.epoch() != epoch {
            let text = "the VM's pager was replaced while its target got ready";
            return Err(ApiError::new("pager-replaced", text).hint("try again"));
        }
        let pages = handle.target.len / PAGE_BYTES as u64;
        let context = Context {
            region: handle.region,
            ram: handle.ram.clone(),
            destination,
            security: handle.remote.0.security.clone(),
        };
        let state = Arc::new(State {
            outgoing: Outgoing::new(pages),
            counts: Counts::default(),
            pacer: Pacer::new(bytes_per_s),
            stage: Mutex::new((ExportStage::Copying, None)),
            ended: AtomicBool::new(false),
            sockets: Mutex::default(),
            context,
        });
        let reach = |error: LinkError| link_error("reach the target's pager", &error);
        let lead = state.context.begin(false).map_err(reach)?;
        let (demand, bulk) = state.context.connect_data().map_err(reach)?;
        for link in [&lead, &demand].into_iter().chain(&bulk) {
            state.count_bytes(link, (0, 0));
        }
        let (work, inboxes): (Vec<_>, Vec<_>) = (0..BULK_LINKS).map(|_| unbounded()).unzip();
        let shared = Arc::new(Shared::new(pages, work));
        let tracker = Tracker::new(shared.clone(), handle.target)
            .map_err(|error| io_error("open the page map", &error))?;
        handle.send(Message::Track(Some(Box::new(tracker))));
        let mut threads = Vec::new();
        for (link, inbox) in bulk.into_iter().zip(inboxes) {
            let (state, shared) = (state.clone(), shared.clone());
            let copy = move || copy(&state, &shared, link, &inbox);
            let thread = std::thread::Builder::new().name("export-copy".into()).spawn(copy);
            threads.push(thread.map_err(|error| io_error("start a thread", &error))?);
        }
        Ok(Self { state, shared, copying: Mutex::new(Some((lead, demand, threads))) })
    }

    /// Looks for pages that were written since the last time; with `send`, queues all that the
    /// target lacks. Returns how many were written.
    ///
    /// # Errors
    /// An engine that does not answer.
    pub(in super::super) fn look(&self, handle: &PagerHandle, send: bool) -> Result<u64, ApiError> {
        let (done, answer) = bounded(1);
        handle.send(Message::Look { send, done });
        answer
            .recv_timeout(ENGINE_TIMEOUT)
            .map_err(|_| ApiError::new("pager-silent", "the pager does not look for written pages"))
    }

    /// The switch: freezes the machine, tells the target of every page, and serves what is behind.
    /// The guest stands still.
    ///
    /// # Errors
    /// Done before; a connection that broke; an engine that does not answer.
    pub(in super::super) fn switch(&self, handle: &PagerHandle) -> Result<(), ApiError> {
        let Some((mut lead, demand, threads)) = lock(&self.copying).take() else {
            return Err(ApiError::new("switched", "the memory was switched already"));
        };
        handle.handed_over.store(true, Ordering::SeqCst);
        let (done, answer) = bounded(1);
        handle.send(Message::Switch(done));
        let last = answer
            .recv_timeout(ENGINE_TIMEOUT)
            .map_err(|_| ApiError::new("pager-silent", "the pager does not end its work"))?
            .map_err(|error| io_error("look for written pages", &error))?;
        let json = serde_json::to_vec(&last.switch).expect("plain data");
        let mut message = Vec::with_capacity(8 + json.len() + last.records.len());
        message.extend_from_slice(&(json.len() as u64).to_le_bytes());
        message.extend_from_slice(&json);
        message.extend_from_slice(&last.records);
        encode_message(self.state.context.region, Tag::Switch, &message, lead.output());
        let broken = |error: LinkError| link_error("send the last list to the target", &error);
        let before = (lead.bytes_received, lead.bytes_sent);
        lead.flush_blocking().map_err(broken)?;
        self.state.count_bytes(&lead, before);
        let (behind, hot) = last.order();
        let outgoing = &self.state.outgoing;
        outgoing.unique.store(behind.len() as u64, Ordering::SeqCst);
        outgoing.set(behind, hot);
        let bulk = threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|_| Err(LinkError::Closed)).map_err(broken));
        let links = Links { lead, demand, bulk: bulk.collect::<Result<_, _>>()? };
        *lock(&self.state.stage) = (ExportStage::Switched, None);
        let state = self.state.clone();
        std::thread::Builder::new()
            .name("export-lead".into())
            .spawn(move || state.follow(Some(links)))
            .map_err(|error| io_error("start a thread", &error))?;
        Ok(())
    }

    /// The guest runs on the target: all that is behind may go.
    pub(in super::super) fn release(&self) {
        *lock(&self.state.outgoing.released) = Some(Instant::now() + HEAD_START);
    }

    /// All that is behind may go before the guest runs: it waits for that.
    pub(in super::super) fn release_now(&self) {
        *lock(&self.state.outgoing.released) = Some(Instant::now());
    }

    /// The VM stays: the engine goes on as before.
    pub(in super::super) fn abort(&self, handle: &PagerHandle) {
        self.state.end(ExportStage::Failed, Some("given up".to_owned()));
        handle.handed_over.store(false, Ordering::SeqCst);
        handle.send(Message::Track(None));
        handle.send(Message::Event(Event::Freeze { on: false }));
        if let Some((lead, demand, _)) = lock(&self.copying).take() {
            lead.shut_down();
            demand.shut_down();
        }
        self.shared.closing.store(true, Ordering::SeqCst);
        for lane in &self.shared.work {
            let _ = lane.send(Work::Barrier);
        }
    }

    /// Figures.
    pub(in super::super) fn info(&self) -> ExportInfo {
        let queued = self.shared.queued.load(Ordering::SeqCst);
        let copying = lock(&self.copying);
        let broken = copying.as_ref().is_some_and(|(_, _, threads)| {
            // They end before the switch only when their connection broke.
            threads.iter().any(JoinHandle::is_finished)
        });
        if broken {
            self.state.end(ExportStage::Failed, Some("the connection to the target broke".into()));
        }
        ExportInfo { queued_pages: queued, ..self.state.info() }
    }
}

/// Goes on with what is behind for a pager that was lost after the switch. Returns when all is there.
///
/// # Errors
/// A RAM file that cannot be opened.
pub(in super::super) fn follow(config: &PagerConfig) -> Result<Follower, ApiError> {
    let destination = config.follow.clone().expect("called for a VM that went");
    let ram = File::open(&config.ram_file)
        .map_err(|error| io_error(&format!("open {}", config.ram_file.display()), &error))?;
    let len = ram.metadata().map_err(|error| io_error("look at the RAM file", &error))?.len();
    let outgoing = Outgoing::new(len / PAGE_BYTES as u64);
    *lock(&outgoing.released) = Some(Instant::now());
    let state = Arc::new(State {
        context: Context {
            region: config.region,
            ram: Arc::new(ram),
            destination,
            security: Security::load(config.identity.as_deref())?,
        },
        counts: Counts::default(),
        pacer: Pacer::new(None),
        outgoing,
        stage: Mutex::new((ExportStage::Switched, None)),
        ended: AtomicBool::new(false),
        sockets: Mutex::default(),
    });
    let worker = state.clone();
    std::thread::Builder::new()
        .name("export-lead".into())
        .spawn(move || worker.follow(None))
        .map_err(|error| io_error("start a thread", &error))?;
    Ok(Follower { state })
}

/// What is left of a pager whose VM went to another host.
pub(in super::super) struct Follower {
    state: Arc<State>,
}

impl Follower {
    /// Figures.
    pub(in super::super) fn info(&self) -> ExportInfo {
        self.state.info()
    }
}

/// Sends what is queued, up to the barrier. Returns the connection for what comes after it.
fn copy(
    state: &State,
    shared: &Shared,
    mut link: Link,
    inbox: &Receiver<Work>,
) -> Result<Link, LinkError> {
    be_nice();
    let region = state.context.region;
    let mut sender = Sender::new(region);
    loop {
        let before = link.bytes_sent;
        match inbox.recv().map_err(|_| LinkError::Closed)? {
            Work::Pages(pages) => {
                let count = pages.len() as u64;
                if !shared.closing.load(Ordering::SeqCst) {
                    for &page in &pages {
                        // Before it is read: what is written from here on is seen by the next look.
                        shared.sent.set(page);
                        shared.fresh.set(page);
                    }
                    let sent = sender.send(&state.context.ram, &pages, &mut link)?;
                    state.count(sent.pages, sent.zeros);
                }
                shared.queued.fetch_sub(count, Ordering::SeqCst);
            }
            Work::Drop(pages) => {
                for &page in &pages {
                    // It may have been queued, sent and counted as fresh meanwhile.
                    shared.fresh.clear(page);
                    shared.sent.clear(page);
                }
                sender.send_drop(&pages, &mut link)?;
            }
            Work::Barrier => {
                encode_message(region, Tag::Barrier, &[], link.output());
                link.flush_blocking()?;
                state.counts.bytes.fetch_add(link.bytes_sent - before, Ordering::Relaxed);
                return Ok(link);
            }
        }
        let bytes = link.bytes_sent - before;
        state.counts.bytes.fetch_add(bytes, Ordering::Relaxed);
        if !shared.closing.load(Ordering::SeqCst) {
            state.pacer.take(bytes);
        }
    }
}

impl State {
    fn count(&self, pages: u64, zeros: u64) {
        self.counts.sent.fetch_add(pages, Ordering::Relaxed);
        self.counts.zeros.fetch_add(zeros, Ordering::Relaxed);
    }

    /// Counts what a connection carried since it had carried that many bytes in and out.
    fn count_bytes(&self, link: &Link, (received, sent): (u64, u64)) {
        let bytes = link.bytes_received - received + link.bytes_sent - sent;
        self.counts.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    fn end(&self, stage: ExportStage, reason: Option<String>) {
        let mut now = lock(&self.stage);
        if now.0 != ExportStage::Done && now.0 != ExportStage::Failed {
            *now = (stage, reason);
        }
        self.ended.store(true, Ordering::SeqCst);
        drop(now);
        shut(&lock(&self.sockets));
    }

    fn info(&self) -> ExportInfo {
        let (stage, reason) = lock(&self.stage).clone();
        let load = |count: &AtomicU64| count.load(Ordering::Relaxed);
        ExportInfo {
            stage,
            reason,
            queued_pages: 0,
            behind_pages: self.outgoing.pending.count(),
            pages_sent: load(&self.counts.sent),
            zero_pages: load(&self.counts.zeros),
            pages_sent_after: load(&self.counts.sent_after),
            pages_unique_after: load(&self.outgoing.unique),
            demand_pages: load(&self.counts.demanded),
            bytes: load(&self.counts.bytes),
        }
    }

    /// Serves what is behind until the target has all of it, over as many connections as it takes.
    fn follow(&self, links: Option<Links>) {
        let mut links = links;
        let mut pause = RETRY.0;
        while !self.ended.load(Ordering::SeqCst) {
            let outcome = match links.take() {
                Some(links) => self.serve(links),
                None => self.reconnect().and_then(|links| self.serve(links)),
            };
            match outcome {
                Ok(()) => {
                    tracing::info!("the target has everything");
                    self.end(ExportStage::Done, None);
                    return;
                }
                Err(error) => {
                    let mut stage = lock(&self.stage);
                    if stage.0 == ExportStage::Switched {
                        tracing::warn!("the target is away: {}", chain(&error));
                        stage.1 = Some(format!("the target is away: {}", chain(&error)));
                    }
                }
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(RETRY.1);
        }
    }

    fn reconnect(&self) -> Result<Links, LinkError> {
        let mut lead = self.context.begin(true)?;
        lead.set_timeout(Some(ENGINE_TIMEOUT))?;
        let (tag, bytes) = read_message(&mut lead)?;
        lead.set_timeout(None)?;
        if tag != Tag::Pending {
            return Err(LinkError::Unexpected { found: Kind::Blob });
        }
        let mut behind = Vec::new();
        for run in PageRecords::new(&bytes, self.outgoing.pages) {
            let (pages, record) = run.map_err(std::io::Error::other)?;
            if matches!(record, PageRecord::Behind(_)) {
                behind.extend(pages);
            }
        }
        if self.outgoing.unique.load(Ordering::SeqCst) == 0 {
            self.outgoing.unique.store(behind.len() as u64, Ordering::SeqCst);
        }
        self.outgoing.set(behind, 0);
        let (demand, bulk) = self.context.connect_data()?;
        for link in [&lead, &demand].into_iter().chain(&bulk) {
            self.count_bytes(link, (0, 0));
        }
        lock(&self.stage).1 = None;
        Ok(Links { lead, demand, bulk })
    }

    /// Serves over these connections until all is there, or one of them breaks.
    fn serve(&self, links: Links) -> Result<(), LinkError> {
        let Links { mut lead, demand, bulk } = links;
        let mut sockets = Vec::new();
        for link in [&lead, &demand].into_iter().chain(&bulk) {
            sockets.push(link.as_fd().try_clone_to_owned()?);
        }
        let sockets = Arc::new(sockets);
        *lock(&self.sockets) = sockets.clone();
        if self.ended.load(Ordering::SeqCst) {
            return Err(LinkError::Closed);
        }
        let before = (lead.bytes_received, lead.bytes_sent);
        let outcome = std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut demand = demand;
                if let Err(error) = self.answer_demands(&mut demand) {
                    tracing::debug!("demand connection: {}", chain(&error));
                    shut(&sockets);
                }
            });
            for link in bulk {
                let sockets = &sockets;
                scope.spawn(move || {
                    let mut link = link;
                    if let Err(error) = self.push(&mut link) {
                        tracing::debug!("bulk connection: {}", chain(&error));
                        shut(sockets);
                    }
                });
            }
            let outcome = self.lead(&mut lead);
            shut(&sockets);
            outcome
        });
        self.count_bytes(&lead, before);
        outcome
    }

    fn lead(&self, lead: &mut Link) -> Result<(), LinkError> {
        lead.set_timeout(None)?;
        loop {
            match read_message(lead)?.0 {
                Tag::Applied => {}
                Tag::Done => return Ok(()),
                _ => return Err(LinkError::Unexpected { found: Kind::Blob }),
            }
        }
    }

    /// Sends what is behind, in order.
    fn push(&self, link: &mut Link) -> Result<(), LinkError> {
        be_nice();
        let mut sender = Sender::new(self.context.region);
        loop {
            match self.outgoing.next() {
                Next::Pages(pages) if pages.is_empty() => {}
                Next::Pages(pages) => {
                    let before = link.bytes_sent;
                    let sent = sender.send(&self.context.ram, &pages, link)?;
                    let bytes = link.bytes_sent - before;
                    self.count(sent.pages, sent.zeros);
                    self.counts.sent_after.fetch_add(sent.pages, Ordering::Relaxed);
                    self.counts.bytes.fetch_add(bytes, Ordering::Relaxed);
                    self.pacer.take(bytes);
                }
                Next::Later if self.ended.load(Ordering::SeqCst) => return Err(LinkError::Closed),
                // A connection that broke is to be noticed meanwhile.
                Next::Later => {
                    link.set_timeout(Some(LOOK))?;
                    match link.receive_blocking() {
                        Err(LinkError::Io(e)) if e.kind() == std::io::ErrorKind::WouldBlock => {}
                        other => other?,
                    }
                    link.set_timeout(None)?;
                }
                // The target never says anything here: that it closes the connection before it has
                // everything means that some of what was sent did not get there.
                Next::End => loop {
                    link.receive_blocking()?;
                },
            }
        }
    }

    /// Sends the pages that the target's guest waits for, unless they are on their way.
    fn answer_demands(&self, link: &mut Link) -> Result<(), LinkError> {
        let mut sender = Sender::new(self.context.region);
        let mut pages = Vec::with_capacity(FRAME_PAGES_MAX);
        loop {
            let before = (link.bytes_received, link.bytes_sent);
            while !link.has_frame()? {
                link.receive_blocking()?;
            }
            pages.clear();
            while pages.len() < FRAME_PAGES_MAX / 2
                && let Some((header, body)) = link.next_frame()?
            {
                let Body::Pages(list) = body else {
                    return Err(LinkError::Unexpected { found: header.kind });
                };
                let asked = list.entries().iter().map(|entry| entry.page().0);
                let mine = asked.filter(|&page| {
                    page < self.outgoing.pages && self.outgoing.pending.clear(page)
                });
                pages.extend(mine);
            }
            for batch in pages.chunks(FRAME_PAGES_MAX) {
                let sent = sender.send(&self.context.ram, batch, link)?;
                self.count(sent.pages, sent.zeros);
                self.counts.sent_after.fetch_add(sent.pages, Ordering::Relaxed);
                self.counts.demanded.fetch_add(sent.pages, Ordering::Relaxed);
            }
            self.count_bytes(link, before);
        }
    }
}
