//! The engine thread: owns the state machine, carries out its actions.

mod install;
mod links;
mod moving;

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender};
use heca_api::PagerStats;
use heca_core::hedge::HedgePolicy;
use heca_core::pager::{Action, Event, FaultKind, FetchClass, Install, Pager};
use heca_sys::journal::Journal;
use heca_sys::uffd::{self, Fault, ResolveError, Userfaultfd};
use heca_types::limits::{PAGE_BYTES, SILENCE_TIMEOUT_MS};
use heca_types::{PageIndex, PageVersion, RegionId};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::time::Timespec;

use super::evictor::{Job, UnmapJob};
use super::handover::import::Incoming;
use super::handover::tracker::{Final, Tracker};
use super::lane::{ReadLane, Seal};
use super::pidfd_ends;
use super::preflight::Target;
use super::rebuilder::PullJob;
use super::remote::{Command, Lanes, Remote, Traffic, chain};
use super::start::DROPPED;
use super::statistics::Statistics;
use super::waker::Waker;
use crate::latency::LatencyHint;
use crate::link::Link;
use install::run_of;
use moving::Moving;

/// Longest sleep: retries, time limits and rates are looked at this often.
const TICK: Duration = Duration::from_millis(100);
/// Longest sleep while a thread waits for a page.
const WAITED_FOR: Duration = Duration::from_millis(5);
/// How often pages that were asked for ahead are looked at.
const PREFETCH_LOOK: Duration = Duration::from_millis(2);
/// How often reads are looked at that are overdue and could not be hedged.
const OVERDUE_LOOK: Duration = Duration::from_millis(2);

/// Events of other threads that are looked at before faults are looked for again.
const EVENTS_AT_A_TIME: usize = 16;

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
    /// A sponsor to be used from now on; it comes up later.
    Sponsor {
        weight: u32,
    },
    /// The region has a newer owner.
    Fenced {
        reason: String,
    },
    /// The VM goes to another host, or stays after all.
    Track(Option<Box<Tracker>>),
    /// Look for written pages.
    Look {
        send: bool,
        done: Sender<u64>,
    },
    /// The guest stands still: tell of every page.
    Switch(Sender<std::io::Result<Final>>),
    /// The connection on which the VM's former host is asked for pages; none while it is away.
    Source(Option<Box<Link>>),
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
    pub(super) stopped: Duration,
    pub(super) spin: Duration,
    pub(super) remote: Remote,
    pub(super) journal: Arc<Journal>,
    pub(super) seal: Seal,
    pub(super) pulls: Sender<PullJob>,
    /// Whether a former pager of the process ended before this one began.
    pub(super) resumed: bool,
    /// Where the VM came from another host.
    pub(super) incoming: Option<Incoming>,
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
    traffic: Vec<Arc<Traffic>>,
    hedge: HedgePolicy,
    /// When anything came from each sponsor, and whether it is under suspicion.
    heard: Vec<(Instant, bool)>,
    fenced: Option<String>,
    inbox: Receiver<Message>,
    /// What is left of the last batch of events.
    told: std::vec::IntoIter<Event>,
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
    moving: Moving,
}

impl Engine {
    pub(super) fn new(
        core: Pager,
        mut context: Context,
        lanes: Vec<Option<(Link, Link)>>,
        (inbox, waker): (Receiver<Message>, Arc<Waker>),
        (jobs, evictor_waker): (Sender<Job>, Arc<Waker>),
    ) -> std::io::Result<Self> {
        let sponsors = lanes.len();
        let lanes = lanes.into_iter().zip(0..);
        let lanes = lanes.map(|(links, s)| Some(context.lanes(s, links?)));
        let lanes = lanes.collect();
        let moving = Moving::new(context.incoming.take());
        Ok(Self {
            core,
            moving,
            lanes,
            traffic: (0..sponsors as u8).map(|s| context.remote.traffic(s)).collect(),
            hedge: HedgePolicy::new(sponsors),
            heard: vec![(Instant::now(), false); sponsors],
            fenced: None,
            inbox,
            told: Vec::new().into_iter(),
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
        let (mut ticked, mut looked) = (Instant::now(), Instant::now());
        for sponsor in 0..self.lanes.len() {
            if self.lanes[sponsor].is_none() {
                self.dispatch(Event::SponsorDown { sponsor: sponsor as u8 }, None);
            }
        }
        if self.context.resumed {
            // Whoever waits was told of by messages that the former pager took with it: all look
            // again.
            let Target { base, len, .. } = self.context.target;
            if let Err(error) = self.context.uffd.wake(base, len) {
                tracing::error!("cannot wake waiting threads: {}", chain(&error));
            }
        }
        // The budget may be exceeded from the start.
        self.dispatch(Event::Tick, None);
        self.send_jobs();
        while self.running {
            let mut busy = self.take_faults(&mut faults);
            busy |= self.take_replies();
            busy |= self.take_messages();
            busy |= self.move_on(!busy);
            self.flush();
            let now = Instant::now();
            self.statistics.waited_for(!self.seen.is_empty(), now);
            self.look_for_overdue(now);
            if now - looked >= PREFETCH_LOOK {
                looked = now;
                self.look_for_late_prefetches(now);
            }
            if self.core.has_work() {
                self.dispatch(Event::Work, None);
                busy = true;
            }
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
            let mut rest = &actions[..];
            while let Some(action) = rest.first() {
                let (run, more) = rest.split_at(run_of(rest));
                match run.len() {
                    1 => self.execute(*action, reply),
                    _ => self.map_run(run),
                }
                rest = more;
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
                // Should this process die half way, the next one knows not to trust the page.
                self.context.journal.set_filling(Some(page.0));
                let written = self.context.ram.write_all_at(bytes, page.offset());
                self.context.journal.set_filling(None);
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
            Action::Demand { page } => {
                self.moving.demand(page);
                return;
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
            Action::Unmap { page, version, dirty, sponsors } => {
                self.context.journal.set_version(page.0, version.0);
                self.moving.unmaps(page);
                self.unmaps.push(UnmapJob { page, version, dirty, sponsors });
                return;
            }
            Action::Punch { page, version, zero } => {
                let dropped = if zero { 0 } else { DROPPED };
                self.context.journal.set_version(page.0, version.0 | dropped);
                self.moving.left(page);
                self.punches.push(page);
                return;
            }
            Action::Extent { extent } => {
                self.context.journal.set_extent(extent.0, self.core.extent_record(extent));
                let set = self.core.layout().replicas(extent);
                self.context.remote.forget_extent(extent, set.sponsors());
                return;
            }
            Action::Hold { extent, sponsor } => {
                self.context.remote.command(sponsor, Command::Hold(extent));
                return;
            }
            Action::Release { extent, sponsor } => {
                self.context.remote.command(sponsor, Command::Release(extent));
                return;
            }
            Action::Pull { page, version, from, to, attempt } => {
                let _ = self.context.pulls.send(PullJob { page, version, from, to, attempt });
                return;
            }
        };
        self.installed(action, page, what, result);
    }

    /// Takes in what the other threads tell, in order and some at a time: faults come first.
    fn take_messages(&mut self) -> bool {
        let mut busy = false;
        for _ in 0..EVENTS_AT_A_TIME {
            if let Some(event) = self.told.next() {
                busy = true;
                self.moving.hear(&event);
                self.dispatch(event, None);
                continue;
            }
            let Ok(message) = self.inbox.try_recv() else { break };
            busy = true;
            match message {
                Message::Event(event) => self.dispatch(event, None),
                Message::Events(events) => self.told = events.into_iter(),
                Message::LinkLost { sponsor, reason } => self.lose(sponsor, reason),
                Message::LinksUp { sponsor, lanes, emptied } => {
                    self.gain(sponsor, *lanes, emptied);
                }
                Message::Sponsor { weight } => {
                    let sponsor = self.core.add_sponsor(weight);
                    self.lanes.push(None);
                    self.traffic.push(self.context.remote.traffic(sponsor));
                    self.hedge.resize(self.lanes.len());
                    self.heard.push((Instant::now(), false));
                    self.dispatch(Event::SponsorDown { sponsor }, None);
                }
                Message::Fenced { reason } => self.fence(reason),
                Message::Track(tracker) => self.moving.tracker = tracker,
                Message::Look { send, done } => self.begin_look(send, done),
                Message::Switch(done) => {
                    let _ = done.send(self.switch());
                }
                Message::Source(link) => self.set_source(link),
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
        for sponsor in 0..self.lanes.len() as u8 {
            let us = self.hedge.tick(sponsor);
            self.dispatch(Event::Latency { sponsor, us }, None);
        }
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
            resumed: self.context.resumed,
            fenced: self.fenced.clone(),
            hedge_us: (0..self.lanes.len() as u8).map(|s| self.hedge.delay_us(s)).collect(),
            remote_pages_peak: self.remote_peak,
            counters: *self.core.counters(),
            latency: self.statistics.latency(),
            stall_s: self.statistics.stall().as_secs_f64(),
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
            let mut flags = PollFlags::IN;
            flags.set(PollFlags::OUT, lane.link.has_output());
            fds.push(PollFd::from_borrowed_fd(lane.link.as_fd(), flags));
        }
        if let Some(source) = self.moving.source() {
            let mut flags = PollFlags::IN;
            flags.set(PollFlags::OUT, source.has_output());
            fds.push(PollFd::from_borrowed_fd(source.as_fd(), flags));
        }
        let due = self.next_due().map(|due| due.saturating_duration_since(Instant::now()));
        // What is overdue already waits for the budget of hedges.
        let due = due.map(|due| if due.is_zero() { OVERDUE_LOOK } else { due });
        let longest = if self.seen.is_empty() { TICK } else { WAITED_FOR };
        let timeout = due.map_or(longest, |due| due.min(longest));
        let timeout = Timespec { tv_sec: 0, tv_nsec: timeout.as_nanos() as i64 };
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
}
