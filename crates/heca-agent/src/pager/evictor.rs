//! The evictor thread: takes pages from the guest, stores what is dirty, frees what is stored.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, TryRecvError};
use heca_core::pager::{Event, Protection, Unmapped};
use heca_sys::pagemap::{PageInfo, Pagemap};
use heca_sys::ring::RemoteRing;
use heca_sys::uffd::{ResolveError, Userfaultfd};
use heca_sys::zap;
use heca_types::limits::{
    EVICT_BATCH_PAGES, EVICT_GROUP_PAGES, FRAME_PAGES_MAX, PAGE_BYTES, SILENCE_TIMEOUT_MS,
};
use heca_types::{PageIndex, PageVersion, RegionId, Status};
use heca_wire::{
    Body, EntryFlags, Header, Kind, PageEntry, encode_pages_parts, is_zero_page, page_checksum,
};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{FallocateFlags, fallocate};
use rustix::time::Timespec;

use super::engine::Message;
use super::lane::{Seal, is_final};
use super::preflight::Target;
use super::remote::{Peer, Remote, chain};
use super::waker::Waker;
use crate::link::{Link, LinkError};

/// Scattered runs of pages that are worked on before other threads get the processor.
const YIELD_RUNS: usize = 8;
/// Victims that are unmapped by one call.
const SPAN_PAGES: usize = 16;

const TICK: Duration = Duration::from_millis(100);

/// How pages are taken from the guest without losing a write.
#[derive(Debug)]
pub(crate) enum Unmapper {
    /// `process_madvise(MADV_PAGEOUT)`, while there is no swap.
    PageOut(OwnedFd),
    /// `MADV_DONTNEED` by an io_uring inside the owner.
    Ring(Box<RemoteRing>),
    /// Synchronous write protection; the page stays mapped.
    WriteProtect,
}

impl Unmapper {
    pub(super) fn protection(&self) -> Protection {
        match self {
            Self::PageOut(_) | Self::Ring(_) => Protection::Zap,
            Self::WriteProtect => Protection::WriteProtect,
        }
    }
}

/// A victim.
#[derive(Debug, Clone, Copy)]
pub(super) struct UnmapJob {
    pub(super) page: PageIndex,
    pub(super) version: PageVersion,
    pub(super) dirty: bool,
    /// Sponsors to store it on, one bit each.
    pub(super) sponsors: u16,
}

#[derive(Debug)]
pub(super) enum Job {
    Unmap(Vec<UnmapJob>),
    Punch(Vec<PageIndex>),
    LinkUp { sponsor: u8, link: Box<Link> },
    LinkDown { sponsor: u8 },
    Stop,
}

pub(super) struct Context {
    pub(super) uffd: Arc<Userfaultfd>,
    pub(super) ram: Arc<File>,
    pub(super) target: Target,
    pub(super) region: RegionId,
    pub(super) remote: Remote,
    pub(super) seal: Seal,
}

/// Pages sent under a request number.
type Frame = (u64, Vec<(PageIndex, PageVersion)>);

struct WriteLane {
    link: Link,
    /// Frames without an acknowledgement, oldest first.
    in_flight: VecDeque<Frame>,
    next_request: u64,
    /// When the peer last did something while frames were in flight.
    progress: Instant,
}

pub(super) struct Evictor {
    context: Context,
    unmapper: Unmapper,
    pagemap: Pagemap,
    lanes: Vec<Option<WriteLane>>,
    jobs: Receiver<Job>,
    waker: Arc<Waker>,
    engine: Sender<Message>,
    engine_waker: Arc<Waker>,
    buffer: Vec<u8>,
    infos: Vec<PageInfo>,
    span: Vec<PageInfo>,
}

/// A dirty page of a batch: its entry, its place in the buffer, and whom it goes to.
struct Outgoing {
    entry: PageEntry,
    slot: usize,
    sponsors: u16,
}

/// Neighbouring pages as (address or offset, length) in bytes; `pages` is sorted.
fn runs(pages: impl Iterator<Item = u64>) -> Vec<(u64, u64)> {
    let mut runs: Vec<(u64, u64)> = Vec::with_capacity(EVICT_BATCH_PAGES);
    for offset in pages {
        match runs.last_mut() {
            Some((start, len)) if *start + *len == offset => *len += PAGE_BYTES as u64,
            _ => runs.push((offset, PAGE_BYTES as u64)),
        }
    }
    runs
}

/// The parts of a sorted batch that are unmapped at once, as (address, length) and the number of
/// victims in it: some pages of one group with all that lies between them. What is mapped there and is
/// no victim comes back by a minor fault, which may happen to any page at any time; there is next to
/// nothing, as the machine takes all pages in use between two victims.
fn spans(batch: &[UnmapJob], base: u64) -> Vec<(u64, u64, usize)> {
    let mut spans: Vec<(u64, u64, usize)> = Vec::with_capacity(YIELD_RUNS);
    let mut group = None;
    for job in batch {
        let start = base + job.page.offset();
        let now = Some(job.page.0 / EVICT_GROUP_PAGES);
        match spans.last_mut() {
            Some((first, len, pages)) if group == now && *pages < SPAN_PAGES => {
                *len = start + PAGE_BYTES as u64 - *first;
                *pages += 1;
            }
            _ => spans.push((start, PAGE_BYTES as u64, 1)),
        }
        group = now;
    }
    spans
}

impl WriteLane {
    fn new(link: Link) -> Self {
        Self { link, in_flight: VecDeque::new(), next_request: 1, progress: Instant::now() }
    }
}

impl Evictor {
    pub(super) fn new(
        context: Context,
        unmapper: Unmapper,
        lanes: Vec<Option<Link>>,
        (jobs, waker): (Receiver<Job>, Arc<Waker>),
        (engine, engine_waker): (Sender<Message>, Arc<Waker>),
    ) -> io::Result<Self> {
        Ok(Self {
            pagemap: Pagemap::open(context.target.pid)?,
            context,
            unmapper,
            lanes: lanes.into_iter().map(|link| link.map(WriteLane::new)).collect(),
            jobs,
            waker,
            engine,
            engine_waker,
            buffer: vec![0; EVICT_BATCH_PAGES * PAGE_BYTES],
            infos: Vec::with_capacity(EVICT_BATCH_PAGES),
            span: Vec::with_capacity(EVICT_GROUP_PAGES as usize),
        })
    }

    pub(super) fn run(mut self) {
        loop {
            let mut busy = false;
            loop {
                let job = match self.jobs.try_recv() {
                    Ok(job) => job,
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => return,
                };
                busy = true;
                match job {
                    Job::Unmap(batch) => {
                        for batch in batch.chunks(EVICT_BATCH_PAGES) {
                            self.unmap(batch.to_vec());
                        }
                    }
                    Job::Punch(pages) => self.punch(pages),
                    Job::LinkUp { sponsor, link } => {
                        let position = usize::from(sponsor);
                        if position >= self.lanes.len() {
                            self.lanes.resize_with(position + 1, || None);
                        }
                        self.drop_lane(sponsor);
                        self.lanes[position] = Some(WriteLane::new(*link));
                    }
                    Job::LinkDown { sponsor } => self.drop_lane(sponsor),
                    Job::Stop => return,
                }
                self.take_acks();
            }
            busy |= self.take_acks();
            if !busy {
                self.sleep();
            }
        }
    }

    fn report(&self, events: Vec<Event>) {
        if !events.is_empty() && self.engine.send(Message::Events(events)).is_ok() {
            self.engine_waker.wake();
        }
    }

    fn address(&self, page: PageIndex) -> u64 {
        self.context.target.address(page)
    }

    /// Unmaps a sorted batch. In small steps, between which those go first that serve faults.
    fn take_from_guest(&mut self, batch: &[UnmapJob]) -> io::Result<()> {
        let spans = spans(batch, self.context.target.base);
        match &mut self.unmapper {
            Unmapper::PageOut(pidfd) => {
                let mut pages = 0;
                let steps = spans.chunk_by(|a, _| {
                    pages += a.2;
                    let same = pages < SPAN_PAGES;
                    pages = if same { pages } else { 0 };
                    same
                });
                for step in steps {
                    let ranges: Vec<_> = step.iter().map(|&(start, len, _)| (start, len)).collect();
                    zap::page_out(pidfd.as_fd(), &ranges)?;
                    std::thread::yield_now();
                }
                Ok(())
            }
            Unmapper::Ring(ring) => {
                let ranges: Vec<_> = spans.iter().map(|&(start, len, _)| (start, len)).collect();
                ring.unmap(&ranges)
            }
            Unmapper::WriteProtect => {
                for (start, len) in runs(batch.iter().map(|job| self.address(job.page))) {
                    let protected = self.context.uffd.write_protect(start, len, true);
                    protected.map_err(|error| match error {
                        ResolveError::Os(error) => error,
                        error => io::Error::other(error),
                    })?;
                }
                Ok(())
            }
        }
    }

    /// Takes a batch from the guest, sees what is dirty, and sends that.
    fn unmap(&mut self, mut batch: Vec<UnmapJob>) {
        batch.sort_unstable_by_key(|job| job.page);
        let taken = self.take_from_guest(&batch).and_then(|()| self.look(&batch));
        if let Err(error) = taken {
            tracing::debug!(%error, "eviction step failed");
            let failed = |job: &UnmapJob| Event::Unmapped {
                page: job.page,
                version: job.version,
                outcome: Unmapped::Failed,
            };
            self.report(batch.iter().map(failed).collect());
            // The process is ending, as a rule: do not spin on it.
            std::thread::sleep(Duration::from_millis(1));
            return;
        }
        let mut events = Vec::with_capacity(batch.len());
        let mut outgoing = Vec::with_capacity(batch.len());
        for (slot, job) in batch.iter().enumerate() {
            let outcome = self.judge(slot, job, &mut outgoing);
            events.push(Event::Unmapped { page: job.page, version: job.version, outcome });
        }
        // The machine must know that these pages are under way before it hears of them.
        self.report(events);
        self.send(&outgoing);
    }

    /// Reads the page map of the batch into `infos`.
    fn look(&mut self, batch: &[UnmapJob]) -> io::Result<()> {
        self.infos.clear();
        if self.unmapper.protection() == Protection::WriteProtect {
            return Ok(());
        }
        let mut jobs = batch.iter();
        for (start, len, pages) in spans(batch, self.context.target.base) {
            self.span.clear();
            self.pagemap.read(start, len as usize / PAGE_BYTES, &mut self.span)?;
            for job in jobs.by_ref().take(pages) {
                let position = (self.address(job.page) - start) as usize / PAGE_BYTES;
                self.infos.push(self.span[position]);
            }
        }
        Ok(())
    }

    fn judge(&mut self, slot: usize, job: &UnmapJob, outgoing: &mut Vec<Outgoing>) -> Unmapped {
        let clean = match self.infos.get(slot) {
            Some(info) if info.is_mapped() => return Unmapped::Mapped,
            Some(info) => info.is_write_protected() && !job.dirty,
            None => !job.dirty,
        };
        if clean {
            return Unmapped::Clean;
        }
        let bytes = &mut self.buffer[slot * PAGE_BYTES..(slot + 1) * PAGE_BYTES];
        if let Err(error) = self.context.ram.read_exact_at(bytes, job.page.offset()) {
            tracing::error!(%error, page = job.page.0, "cannot read guest memory");
            return Unmapped::Failed;
        }
        let (page, version, sponsors) = (job.page, job.version, job.sponsors);
        let mut entry = PageEntry::new(page, version);
        let zero = is_zero_page(bytes);
        if zero && version == PageVersion(1) {
            return Unmapped::Zero(0);
        }
        let mut flags = if zero { EntryFlags::ZERO } else { EntryFlags::default() };
        // The checksum covers what the sponsor stores, so that it can check that itself.
        match &self.context.seal {
            None => {}
            Some(seal) if zero => {
                flags = flags.union(EntryFlags::SEALED);
                entry = entry.with_tag(seal.seal_zero(page, version));
            }
            Some(seal) => {
                flags = EntryFlags::SEALED;
                entry = entry.with_tag(seal.seal(page, version, bytes));
            }
        }
        let entry = entry.with_flags(flags).with_checksum(page_checksum(page, version, bytes));
        outgoing.push(Outgoing { entry, slot, sponsors });
        if zero { Unmapped::Zero(sponsors) } else { Unmapped::Sent(sponsors) }
    }

    /// Sends each page to its replicas: one frame for each sponsor.
    fn send(&mut self, outgoing: &[Outgoing]) {
        for sponsor in 0..self.lanes.len() as u8 {
            let mut entries = Vec::with_capacity(FRAME_PAGES_MAX);
            let mut slots = Vec::with_capacity(FRAME_PAGES_MAX);
            for page in outgoing {
                if page.sponsors >> sponsor & 1 == 1 {
                    entries.push(page.entry);
                    if page.entry.flags().has_data() {
                        slots.push(page.slot as u64 * PAGE_BYTES as u64);
                    }
                }
            }
            if entries.is_empty() {
                continue;
            }
            let pages: Vec<_> = entries.iter().map(|e| (e.page(), e.version())).collect();
            let Some(lane) = &mut self.lanes[usize::from(sponsor)] else {
                self.report(store_failures(sponsor, &pages));
                continue;
            };
            let request = lane.next_request;
            lane.next_request += 1;
            if lane.in_flight.is_empty() {
                lane.progress = Instant::now();
            }
            lane.in_flight.push_back((request, pages));
            let (region, epoch) = (self.context.region, self.context.remote.peer(sponsor).epoch());
            let header = Header::new(Kind::Write, region, epoch, request);
            let data_bytes = slots.len() * PAGE_BYTES;
            encode_pages_parts(header, &entries, data_bytes, lane.link.output());
            let mut parts: Vec<IoSlice<'_>> = runs(slots.into_iter())
                .into_iter()
                .map(|(start, len)| {
                    IoSlice::new(&self.buffer[start as usize..(start + len) as usize])
                })
                .collect();
            if let Err(error) = lane.link.send_parts(&mut parts) {
                self.lose(sponsor, &error);
            }
        }
    }

    fn punch(&mut self, mut pages: Vec<PageIndex>) {
        pages.sort_unstable();
        let mut events = Vec::with_capacity(pages.len());
        for (number, (start, len)) in
            runs(pages.iter().map(|page| page.offset())).into_iter().enumerate()
        {
            // Scattered pages take a while: whoever serves a fault goes first.
            if number % YIELD_RUNS == YIELD_RUNS - 1 {
                std::thread::yield_now();
            }
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            let ok = match fallocate(&*self.context.ram, flags, start, len) {
                Ok(()) => true,
                Err(error) => {
                    tracing::warn!(%error, "pages not freed");
                    false
                }
            };
            let first = start / PAGE_BYTES as u64;
            for page in first..first + len / PAGE_BYTES as u64 {
                events.push(Event::Punched { page: PageIndex(page), ok });
            }
        }
        self.report(events);
    }

    /// Takes in acknowledgements. Returns whether there were any.
    fn take_acks(&mut self) -> bool {
        let mut busy = false;
        for sponsor in 0..self.lanes.len() as u8 {
            let Some(lane) = &mut self.lanes[usize::from(sponsor)] else { continue };
            let mut events = Vec::new();
            let peer = self.context.remote.peer(sponsor);
            let outcome = lane.take_acks(sponsor, &peer, &mut events);
            let stored = events.iter().filter(|e| matches!(e, Event::Stored { .. })).count();
            let traffic = self.context.remote.traffic(sponsor);
            traffic.pages_stored.fetch_add(stored as u64, Ordering::Relaxed);
            traffic
                .bytes_sent
                .fetch_add(std::mem::take(&mut lane.link.bytes_sent), Ordering::Relaxed);
            traffic
                .bytes_received
                .fetch_add(std::mem::take(&mut lane.link.bytes_received), Ordering::Relaxed);
            let flushed =
                if lane.link.has_output() { lane.link.flush().map(|_| ()) } else { Ok(()) };
            if stored > 0 {
                self.context.remote.note_stored(sponsor);
            }
            busy |= !events.is_empty();
            self.report(events);
            if let Err(error) = outcome.and(flushed) {
                self.lose(sponsor, &error);
            }
        }
        busy
    }

    /// A sponsor failed: the engine hears that first, then what was lost.
    fn lose(&mut self, sponsor: u8, error: &LinkError) {
        let reason = chain(error);
        if self.engine.send(Message::LinkLost { sponsor, reason }).is_ok() {
            self.engine_waker.wake();
        }
        self.drop_lane(sponsor);
    }

    fn drop_lane(&mut self, sponsor: u8) {
        let Some(lane) = self.lanes[usize::from(sponsor)].take() else { return };
        lane.link.shut_down();
        for (_, pages) in &lane.in_flight {
            self.report(store_failures(sponsor, pages));
        }
    }

    fn sleep(&mut self) {
        self.waker.prepare_sleep();
        let mut woken = false;
        if self.jobs.is_empty() {
            let mut fds = Vec::with_capacity(1 + self.lanes.len());
            fds.push(PollFd::from_borrowed_fd(self.waker.as_fd(), PollFlags::IN));
            for lane in self.lanes.iter().flatten() {
                let mut flags = PollFlags::IN;
                flags.set(PollFlags::OUT, lane.link.has_output());
                fds.push(PollFd::from_borrowed_fd(lane.link.as_fd(), flags));
            }
            let timeout = Timespec { tv_sec: 0, tv_nsec: TICK.as_nanos() as i64 };
            let polled = poll(&mut fds, Some(&timeout));
            woken = polled.is_ok() && !fds[0].revents().is_empty();
        }
        self.waker.woke(woken);
    }
}

fn store_failures(sponsor: u8, pages: &[(PageIndex, PageVersion)]) -> Vec<Event> {
    pages.iter().map(|&(page, version)| Event::StoreFailed { page, version, sponsor }).collect()
}

/// Whether a refusal is of writes that were under way when the sponsor was told to give up the last
/// extents that it held: it knows nothing of the region any more, and need not.
fn is_of_released(front: Option<&Frame>, peer: &Peer, header: &Header) -> bool {
    let front = front.filter(|(request, _)| *request == header.request);
    header.status == Status::UnknownRegion
        && front.is_some_and(|(_, pages)| pages.iter().all(|(p, _)| peer.gave_up(p.extent())))
}

impl WriteLane {
    fn take_acks(
        &mut self,
        sponsor: u8,
        peer: &Peer,
        events: &mut Vec<Event>,
    ) -> Result<(), LinkError> {
        if !self.link.receive()? {
            let limit = Duration::from_millis(SILENCE_TIMEOUT_MS);
            if !self.in_flight.is_empty() && self.progress.elapsed() > limit {
                return Err(io::Error::from(io::ErrorKind::TimedOut).into());
            }
            return Ok(());
        }
        self.progress = Instant::now();
        while let Some((header, body)) = self.link.next_frame()? {
            let list = match body {
                Body::Pages(list) if header.kind == Kind::WriteAck => list,
                // It gave up the last extents that it held, as it was told, while this was under way.
                Body::Error(_) if is_of_released(self.in_flight.front(), peer, &header) => {
                    let (_, pages) = self.in_flight.pop_front().expect("looked at above");
                    events.extend(store_failures(sponsor, &pages));
                    continue;
                }
                Body::Error(text) => {
                    let text = text.to_owned();
                    return Err(LinkError::Refused { status: header.status, text });
                }
                _ => return Err(LinkError::Unexpected { found: header.kind }),
            };
            // What does not match stays in flight, to be failed with the connection.
            let expected = self.in_flight.front().is_some_and(|(request, pages)| {
                *request == header.request && pages.len() == list.entries().len()
            });
            if !expected {
                return Err(LinkError::Unexpected { found: header.kind });
            }
            let (_, pages) = self.in_flight.pop_front().expect("looked at above");
            let mut refused = None;
            for (&(page, version), entry) in pages.iter().zip(list.entries()) {
                let same = entry.page() == page && entry.version() == version;
                if same && entry.status() == Status::Ok {
                    events.push(Event::Stored { page, version, sponsor });
                    continue;
                }
                events.push(Event::StoreFailed { page, version, sponsor });
                let released = entry.status() == Status::OutOfRange && peer.gave_up(page.extent());
                if is_final(entry.status()) && !released {
                    refused = Some(entry.status());
                }
            }
            if let Some(status) = refused {
                // It would refuse again and again: go on without it.
                let text = "it does not store pages".to_owned();
                return Err(LinkError::Refused { status, text });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn victims_of_one_group_are_unmapped_at_once_a_few_at_a_time() {
        let job = |page| UnmapJob {
            page: PageIndex(page),
            version: PageVersion(1),
            dirty: false,
            sponsors: 1,
        };
        let batch: Vec<_> = [0, 3, 511, 512, 515].map(job).into();
        let at = |page: u64| 0x10_0000 + page * 4096;
        assert_eq!(spans(&batch, 0x10_0000), [(at(0), 512 * 4096, 3), (at(512), 4 * 4096, 2)]);
        let batch: Vec<_> = (0..40).map(|i| job(i * 2)).collect();
        let pages: Vec<_> = spans(&batch, 0x10_0000).into_iter().map(|span| span.2).collect();
        assert_eq!(pages, [16, 16, 8]);
    }

    #[test]
    fn neighbours_become_one_run() {
        let pages = [0u64, 4096, 8192, 20480, 28672, 32768];
        assert_eq!(runs(pages.into_iter()), [(0, 12288), (20480, 4096), (28672, 8192)]);
        assert!(runs(std::iter::empty()).is_empty());
    }
}
