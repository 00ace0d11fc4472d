//! The engine thread: owns the state machine, carries out its actions.

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender};
use heca_api::PagerStats;
use heca_core::pager::{
    Action, Event, FaultKind, FetchClass, FetchError, Install, InstallResult, Pager,
};
use heca_sys::uffd::{self, Fault, ResolveError, Userfaultfd};
use heca_types::limits::{PAGE_BYTES, SILENCE_TIMEOUT_MS};
use heca_types::{Epoch, PageIndex, PageVersion, RegionId};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::time::Timespec;

use super::evictor::{Job, UnmapJob};
use super::lane::{Answer, Asked, ReadLane};
use super::pidfd_ends;
use super::preflight::Target;
use super::remote::{Lanes, Remote, chain};
use super::statistics::Statistics;
use super::waker::Waker;
use crate::latency::LatencyHint;
use crate::link::{Link, LinkError};

/// Longest sleep: retries, time limits and rates are looked at this often.
const TICK: Duration = Duration::from_millis(100);

/// What the other threads tell the engine.
#[derive(Debug)]
pub(super) enum Message {
    Event(Event),
    /// In order; from the evictor.
    Events(Vec<Event>),
    LinkLost {
        sponsor: u8,
        reason: String,
    },
    LinksUp {
        sponsor: u8,
        lanes: Box<Lanes>,
        /// The sponsor lost what it held.
        emptied: bool,
    },
    Stats(Sender<PagerStats>),
    IsRestored(Sender<bool>),
    Stop,
}

pub(super) struct Context {
    pub(super) uffd: Arc<Userfaultfd>,
    pub(super) ram: Arc<File>,
    pub(super) target: Target,
    pub(super) pidfd: OwnedFd,
    pub(super) name: String,
    pub(super) method: &'static str,
    pub(super) replicas: usize,
    pub(super) region: RegionId,
    pub(super) epoch: Epoch,
    pub(super) stopped: Duration,
    pub(super) spin: Duration,
    pub(super) remote: Remote,
}

/// A page to ask for at the next flush.
#[derive(Debug, Clone, Copy)]
struct Ask {
    page: PageIndex,
    version: PageVersion,
    sponsor: u8,
    class: FetchClass,
}

struct SponsorLanes {
    demand: ReadLane,
    prefetch: ReadLane,
}

pub(super) struct Engine {
    context: Context,
    core: Pager,
    lanes: Vec<Option<SponsorLanes>>,
    inbox: Receiver<Message>,
    waker: Arc<Waker>,
    jobs: Sender<Job>,
    evictor_waker: Arc<Waker>,
    hint: LatencyHint,
    queue: VecDeque<Event>,
    actions: Vec<Action>,
    asks: Vec<Ask>,
    unmaps: Vec<UnmapJob>,
    punches: Vec<PageIndex>,
    /// When the pager saw the fault of each page that a thread waits for.
    seen: HashMap<PageIndex, Instant>,
    statistics: Statistics,
    remote_peak: u64,
    begun: Instant,
    running: bool,
}

impl Engine {
    pub(super) fn new(
        core: Pager,
        context: Context,
        lanes: Vec<(Link, Link)>,
        (inbox, waker): (Receiver<Message>, Arc<Waker>),
        (jobs, evictor_waker): (Sender<Job>, Arc<Waker>),
    ) -> std::io::Result<Self> {
        let (region, epoch) = (context.region, context.epoch);
        let lanes = lanes.into_iter().map(|(demand, prefetch)| {
            Some(SponsorLanes {
                demand: ReadLane::new(demand, region, epoch, false),
                prefetch: ReadLane::new(prefetch, region, epoch, true),
            })
        });
        Ok(Self {
            core,
            lanes: lanes.collect(),
            inbox,
            waker,
            jobs,
            evictor_waker,
            hint: LatencyHint::start()?,
            queue: VecDeque::new(),
            actions: Vec::with_capacity(256),
            asks: Vec::with_capacity(256),
            unmaps: Vec::new(),
            punches: Vec::new(),
            seen: HashMap::new(),
            statistics: Statistics::new(),
            remote_peak: 0,
            begun: Instant::now(),
            running: true,
            context,
        })
    }

    /// Runs until the process ends or the pager is detached.
    pub(super) fn run(mut self) {
        let mut faults: Vec<Fault> = Vec::with_capacity(64);
        let mut active = Instant::now();
        let mut ticked = Instant::now();
        // The budget may be exceeded from the start.
        self.dispatch(Event::Tick, None);
        self.send_jobs();
        while self.running {
            let mut busy = self.take_faults(&mut faults);
            busy |= self.take_replies();
            busy |= self.take_messages();
            self.flush();
            let now = Instant::now();
            if now - ticked >= TICK {
                ticked = now;
                self.tick();
            }
            // What was decided after the requests went out is not left for after the sleep.
            busy |= !self.asks.is_empty() || !self.unmaps.is_empty() || !self.punches.is_empty();
            if busy {
                active = now;
            } else if now - active >= self.context.spin {
                self.sleep();
                active = Instant::now();
            } else {
                std::thread::yield_now();
            }
        }
        let stats = self.stats();
        self.context.remote.keep_stats(stats);
        let _ = self.jobs.send(Job::Stop);
        self.evictor_waker.wake();
    }

    fn take_faults(&mut self, faults: &mut Vec<Fault>) -> bool {
        faults.clear();
        if let Err(error) = self.context.uffd.read_faults(faults) {
            tracing::error!(%error, "cannot read page faults");
            self.running = false;
            return false;
        }
        let now = Instant::now();
        for fault in faults.iter() {
            let page = PageIndex((fault.address - self.context.target.base) / PAGE_BYTES as u64);
            let kind = match fault.kind {
                uffd::FaultKind::Missing => FaultKind::Missing,
                uffd::FaultKind::Minor => FaultKind::Minor,
                uffd::FaultKind::WriteProtect => FaultKind::WriteProtect,
            };
            self.seen.entry(page).or_insert(now);
            self.dispatch(Event::Fault { page, kind }, None);
        }
        if !faults.is_empty() {
            self.hint.note(faults.len() as u64);
        }
        !faults.is_empty()
    }

    /// Puts an event through the state machine and carries out what it says, down to the answers
    /// of the kernel. `reply` is the page that the event brought.
    fn dispatch(&mut self, event: Event, reply: Option<&[u8]>) {
        debug_assert!(self.queue.is_empty());
        self.queue.push_back(event);
        while let Some(event) = self.queue.pop_front() {
            let mut actions = std::mem::take(&mut self.actions);
            actions.clear();
            self.core.step(event, &mut actions);
            for action in &actions {
                self.execute(*action, reply);
            }
            self.actions = actions;
        }
        if self.core.owner_gone() {
            self.running = false;
        }
    }

    fn execute(&mut self, action: Action, reply: Option<&[u8]>) {
        let uffd = &self.context.uffd;
        let target = self.context.target;
        let (page, what, result) = match action {
            Action::Fetch { page, version, sponsor, class } => {
                self.asks.push(Ask { page, version, sponsor, class });
                return;
            }
            Action::Copy { page } => {
                let bytes = reply.expect("the machine copies only while a reply is at hand");
                (page, Install::Copy, uffd.copy(target.address(page), bytes, true))
            }
            Action::Fill { page } => {
                let bytes = reply.expect("the machine fills only while a reply is at hand");
                let written = self.context.ram.write_all_at(bytes, page.offset());
                (page, Install::Fill, written.map_err(|_| ResolveError::NoMemory))
            }
            Action::Zero { page } => (page, Install::Zero, uffd.zero(target.address(page))),
            Action::Continue { page, protect } => {
                (page, Install::Continue, uffd.map_present(target.address(page), protect))
            }
            Action::Unprotect { page } => {
                let lifted = uffd.write_protect(target.address(page), PAGE_BYTES as u64, false);
                (page, Install::Unprotect, lifted)
            }
            Action::Wake { page } => {
                let _ = uffd.wake(target.address(page), PAGE_BYTES as u64);
                self.seen.remove(&page);
                return;
            }
            Action::Poison { page } => {
                self.poison(page);
                return;
            }
            Action::Unmap { page, version, dirty, replicas } => {
                self.unmaps.push(UnmapJob { page, version, dirty, replicas });
                return;
            }
            Action::Punch { page } => {
                self.punches.push(page);
                return;
            }
        };
        if what != Install::Fill && result.is_ok() {
            self.seen.remove(&page);
        }
        let result = self.outcome(page, result);
        self.queue.push_back(Event::Installed { page, what, result });
    }

    fn outcome(&self, page: PageIndex, result: Result<(), ResolveError>) -> InstallResult {
        match result {
            Ok(()) => InstallResult::Ok,
            Err(ResolveError::Exists) => InstallResult::Exists,
            Err(ResolveError::Again) => InstallResult::Again,
            Err(ResolveError::Hole) => InstallResult::Hole,
            Err(ResolveError::NoMemory) => InstallResult::NoMemory,
            Err(ResolveError::Gone) => InstallResult::Gone,
            Err(error) => {
                if pidfd_ends(&self.context.pidfd, Duration::ZERO) {
                    return InstallResult::Gone;
                }
                tracing::error!(%page, "page not installed: {}", chain(&error));
                InstallResult::NoMemory
            }
        }
    }

    fn poison(&mut self, page: PageIndex) {
        let name = &self.context.name;
        tracing::error!(vm = name, %page, "no good copy of the page is left: poisoned");
        self.seen.remove(&page);
        let address = self.context.target.address(page);
        let uffd = &self.context.uffd;
        let mut poisoned = uffd.poison(address);
        if matches!(poisoned, Err(ResolveError::Exists)) {
            // A mark of write protection that outlived the page is in the way, or the page is
            // poisoned already.
            let _ = uffd.write_protect(address, PAGE_BYTES as u64, false);
            poisoned = uffd.poison(address);
        }
        match poisoned {
            Ok(()) => {}
            Err(ResolveError::Exists) => {
                let _ = uffd.wake(address, PAGE_BYTES as u64);
            }
            // The thread stays blocked: better than to read wrong bytes.
            Err(error) => tracing::error!(vm = name, %page, "cannot poison: {}", chain(&error)),
        }
    }

    fn take_replies(&mut self) -> bool {
        let mut busy = false;
        for sponsor in 0..self.lanes.len() {
            let Some(mut lanes) = self.lanes[sponsor].take() else { continue };
            let id = sponsor as u8;
            let mut outcome = Ok(());
            for lane in [&mut lanes.demand, &mut lanes.prefetch] {
                if lane.is_waiting() && outcome.is_ok() {
                    match lane.receive(|asked, answer| self.take_page(id, asked, answer)) {
                        Ok(any) => busy |= any,
                        Err(error) => outcome = Err(error),
                    }
                }
            }
            self.lanes[sponsor] = Some(lanes);
            if let Err(error) = outcome {
                self.lose(id, chain(&error));
            }
        }
        busy
    }

    fn take_page(&mut self, sponsor: u8, asked: Asked, answer: Answer<'_>) {
        let page = asked.page;
        match answer {
            Ok(bytes) => {
                let arrived = Instant::now();
                let seen = self.seen.get(&page).copied();
                self.dispatch(Event::Fetched { page }, Some(bytes));
                let traffic = self.context.remote.traffic(sponsor);
                traffic.pages_fetched.fetch_add(1, Ordering::Relaxed);
                if let Some(seen) = seen {
                    self.statistics.remote_fault(seen, asked.sent, arrived);
                }
            }
            Err(error) => {
                if error == FetchError::Corrupt {
                    let sponsor = self.context.remote.address(sponsor);
                    tracing::error!(%page, sponsor, "page arrived with a wrong checksum");
                }
                self.dispatch(Event::FetchFailed { page, sponsor, error }, None);
            }
        }
    }

    fn take_messages(&mut self) -> bool {
        let mut busy = false;
        while let Ok(message) = self.inbox.try_recv() {
            busy = true;
            match message {
                Message::Event(event) => self.dispatch(event, None),
                Message::Events(events) => {
                    for event in events {
                        self.dispatch(event, None);
                    }
                }
                Message::LinkLost { sponsor, reason } => self.lose(sponsor, reason),
                Message::LinksUp { sponsor, lanes, emptied } => {
                    self.gain(sponsor, *lanes, emptied);
                }
                Message::Stats(reply) => {
                    let _ = reply.try_send(self.stats());
                }
                Message::IsRestored(reply) => {
                    let _ = reply.try_send(self.core.is_restored());
                }
                Message::Stop => self.running = false,
            }
        }
        busy
    }

    /// A sponsor cannot be used any more: the machine hears that first, then what was lost.
    fn lose(&mut self, sponsor: u8, reason: String) {
        let Some(lanes) = self.lanes[usize::from(sponsor)].take() else { return };
        tracing::warn!(sponsor = self.context.remote.address(sponsor), "sponsor lost: {reason}");
        self.count_traffic(sponsor, &lanes);
        self.dispatch(Event::SponsorDown { sponsor }, None);
        let _ = self.jobs.send(Job::LinkDown { sponsor });
        self.evictor_waker.wake();
        for page in lanes.demand.abandon().chain(lanes.prefetch.abandon()) {
            let error = FetchError::Lost;
            self.dispatch(Event::FetchFailed { page, sponsor, error }, None);
        }
        self.context.remote.mark_down(sponsor, reason);
    }

    fn gain(&mut self, sponsor: u8, lanes: Lanes, emptied: bool) {
        let (region, epoch) = (self.context.region, self.context.epoch);
        let _ = self.jobs.send(Job::LinkUp { sponsor, link: Box::new(lanes.write_back) });
        self.lanes[usize::from(sponsor)] = Some(SponsorLanes {
            demand: ReadLane::new(lanes.demand, region, epoch, false),
            prefetch: ReadLane::new(lanes.prefetch, region, epoch, true),
        });
        if emptied {
            self.dispatch(Event::SponsorEmptied { sponsor }, None);
        }
        self.dispatch(Event::SponsorUp { sponsor }, None);
    }

    fn count_traffic(&self, sponsor: u8, lanes: &SponsorLanes) {
        let traffic = self.context.remote.traffic(sponsor);
        for lane in [&lanes.demand, &lanes.prefetch] {
            traffic.bytes_received.fetch_add(lane.link.bytes_received, Ordering::Relaxed);
            traffic.bytes_sent.fetch_add(lane.link.bytes_sent, Ordering::Relaxed);
        }
    }

    /// Sends requests and hands batches to the evictor.
    fn flush(&mut self) {
        self.asks.reverse();
        while let Some(ask) = self.asks.pop() {
            let Ask { page, version, sponsor, class } = ask;
            match (&mut self.lanes[usize::from(sponsor)], class) {
                (Some(lanes), FetchClass::Demand) => lanes.demand.ask(page, version),
                (Some(lanes), FetchClass::Prefetch) => lanes.prefetch.ask(page, version),
                // It was lost since; the machine knows and asks another one.
                (None, _) => {
                    let error = FetchError::Lost;
                    self.dispatch(Event::FetchFailed { page, sponsor, error }, None);
                }
            }
        }
        for sponsor in 0..self.lanes.len() {
            let Some(lanes) = &mut self.lanes[sponsor] else { continue };
            let sent = lanes.demand.flush().and_then(|()| lanes.prefetch.flush());
            if let Err(error) = sent {
                self.lose(sponsor as u8, chain(&error));
            }
        }
        self.send_jobs();
    }

    fn send_jobs(&mut self) {
        if self.unmaps.is_empty() && self.punches.is_empty() {
            return;
        }
        if !self.punches.is_empty() {
            let _ = self.jobs.send(Job::Punch(std::mem::take(&mut self.punches)));
        }
        if !self.unmaps.is_empty() {
            let _ = self.jobs.send(Job::Unmap(std::mem::take(&mut self.unmaps)));
        }
        self.evictor_waker.wake();
    }

    fn tick(&mut self) {
        self.dispatch(Event::Tick, None);
        let limit = Duration::from_millis(SILENCE_TIMEOUT_MS);
        let now = Instant::now();
        for sponsor in 0..self.lanes.len() {
            let Some(lanes) = &self.lanes[sponsor] else { continue };
            let oldest = lanes.demand.oldest().into_iter().chain(lanes.prefetch.oldest()).min();
            if oldest.is_some_and(|sent| now - sent > limit) {
                self.lose(sponsor as u8, format!("no answer for {} s", limit.as_secs()));
            }
        }
        let remote = self.core.gauges().remote_pages;
        self.remote_peak = self.remote_peak.max(remote);
        let stats = self.context.remote.sponsor_stats();
        let received = stats.iter().map(|s| s.bytes_received).sum::<u64>() + self.live_bytes().0;
        let sent = stats.iter().map(|s| s.bytes_sent).sum::<u64>() + self.live_bytes().1;
        self.statistics.sample(self.core.counters(), received, sent);
        if pidfd_ends(&self.context.pidfd, Duration::ZERO) {
            self.running = false;
        }
    }

    /// Bytes received and sent on the read connections that are open now.
    fn live_bytes(&self) -> (u64, u64) {
        self.lanes.iter().flatten().fold((0, 0), |(received, sent), lanes| {
            let links = [&lanes.demand.link, &lanes.prefetch.link];
            links.iter().fold((received, sent), |(r, s), link| {
                (r + link.bytes_received, s + link.bytes_sent)
            })
        })
    }

    fn stats(&mut self) -> PagerStats {
        let gauges = self.core.gauges();
        self.remote_peak = self.remote_peak.max(gauges.remote_pages);
        let mut sponsors = self.context.remote.sponsor_stats();
        for (stats, lanes) in sponsors.iter_mut().zip(&self.lanes) {
            for link in lanes.iter().flat_map(|l| [&l.demand.link, &l.prefetch.link]) {
                stats.bytes_received += link.bytes_received;
                stats.bytes_sent += link.bytes_sent;
            }
        }
        let cpu = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
        PagerStats {
            name: self.context.name.clone(),
            pid: self.context.target.pid,
            replicas: self.context.replicas,
            eviction: self.context.method.to_owned(),
            uptime_s: self.begun.elapsed().as_secs_f64(),
            attach_stopped_us: self.context.stopped.as_secs_f64() * 1e6,
            gauges,
            // Counted by whoever asks, not by the thread that faults wait for.
            dirty_pages: None,
            remote_pages_peak: self.remote_peak,
            counters: *self.core.counters(),
            latency: self.statistics.latency(),
            rates: self.statistics.rates(),
            sponsors,
            cpu_s: cpu.tv_sec as f64 + cpu.tv_nsec as f64 / 1e9,
        }
    }

    /// Sleeps until something happens.
    fn sleep(&mut self) {
        self.waker.prepare_sleep();
        if !self.inbox.is_empty() {
            self.waker.woke(false);
            return;
        }
        let mut fds = Vec::with_capacity(3 + 2 * self.lanes.len());
        fds.push(PollFd::from_borrowed_fd(self.context.uffd.as_fd(), PollFlags::IN));
        fds.push(PollFd::from_borrowed_fd(self.waker.as_fd(), PollFlags::IN));
        fds.push(PollFd::from_borrowed_fd(self.context.pidfd.as_fd(), PollFlags::IN));
        for lane in self.lanes.iter().flatten().flat_map(|l| [&l.demand, &l.prefetch]) {
            fds.push(PollFd::from_borrowed_fd(lane.link.as_fd(), PollFlags::IN));
        }
        let timeout = Timespec { tv_sec: 0, tv_nsec: TICK.as_nanos() as i64 };
        let polled = poll(&mut fds, Some(&timeout));
        let woken = polled.is_ok() && !fds[1].revents().is_empty();
        let ended = polled.is_ok() && !fds[2].revents().is_empty();
        // A sponsor that closes a connection is noticed even if nothing is asked of it.
        let idle_input = fds[3..].iter().any(|fd| !fd.revents().is_empty());
        self.waker.woke(woken);
        if ended {
            self.running = false;
        }
        if idle_input {
            self.look_at_idle_lanes();
        }
    }

    fn look_at_idle_lanes(&mut self) {
        for sponsor in 0..self.lanes.len() {
            let Some(lanes) = &mut self.lanes[sponsor] else { continue };
            let mut outcome: Result<(), LinkError> = Ok(());
            for lane in [&mut lanes.demand, &mut lanes.prefetch] {
                if !lane.is_waiting() {
                    let received = lane.receive(|_, _| {});
                    outcome = outcome.and(received.map(|_| ()));
                }
            }
            if let Err(error) = outcome {
                self.lose(sponsor as u8, chain(&error));
            }
        }
    }
}
