//! The state machine: faults, fetches, installs.

use heca_types::{ExtentIndex, PageIndex};

use super::list::{Links, List};
use super::rebuild::Rebuild;
use super::stream::Streams;
use super::{
    Action, Config, Counters, Event, FaultKind, FetchClass, Gauges, Install, InstallResult,
    Mutation,
};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    Untouched,
    Resident,
    Unmapping,
    Storing,
    Standby,
    Punching,
    Remote,
    Fetching,
    Poisoned,
    /// With the region's former owner.
    Behind,
}

/// Ticks before the first look for extents to rebuild.
const PAUSE_AT_START: u64 = 2;

/// Ticks between two looks at faults that wait for a sponsor.
const BLOCKED_TICKS: u64 = 16;

/// The sponsors may not have the page's content: store it even if the kernel calls it clean.
pub(super) const DIRTY: u8 = 1;
/// A thread waits for the page.
pub(super) const WANTED: u8 = 2;
/// The content is all zeros: once dropped, the page is untouched again.
pub(super) const ZERO: u8 = 4;
/// Brought by prefetch and not used yet.
pub(super) const PREFETCHED: u8 = 8;

/// Every replica failed to bring the page once.
pub(super) const ASKED_TWICE: u8 = 16;

/// One page, in 8 bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Page {
    /// Version of the newest attempt to store the page; 0 if there was none.
    pub(super) version: u32,
    pub(super) state: State,
    pub(super) flags: u8,
    /// Storing: replicas that were sent the page (low half) and acknowledged it (high half).
    /// Fetching, after a hedge: the replica that was asked first.
    pub(super) store: u8,
    /// Fetching: replicas asked that did not answer yet (low half) and that failed (high half).
    pub(super) fetch: u8,
}

const _: () = assert!(size_of::<Page>() == 8);

fn set_bit(mask: &mut u16, sponsor: u8, on: bool) {
    *mask = *mask & !(1 << sponsor) | u16::from(on) << sponsor;
}

impl Page {
    pub(super) fn has(self, flag: u8) -> bool {
        self.flags & flag != 0
    }
}

/// Replicas of an extent that missed a write.
pub(super) type StaleMask = u8;

/// The pages of one region. See the module's documentation for states and contract.
#[derive(Debug, Clone)]
pub struct Pager {
    pub(super) config: Config,
    pub(super) pages: Vec<Page>,
    pub(super) links: Links,
    pub(super) active: List,
    pub(super) standby: List,
    /// Faults that wait for a frame.
    pub(super) stalled: List,
    /// Faults that wait for a sponsor.
    pub(super) blocked: List,
    pub(super) stale: Vec<StaleMask>,
    /// Sponsors that are down and whose extents may go elsewhere.
    pub(super) lost: u16,
    /// Sponsors that want to be rid of their extents.
    pub(super) leaving: u16,
    /// Sponsors that are slow to answer anything.
    pub(super) suspect: u16,
    /// Sponsors that refused an extent lately.
    pub(super) refused: u16,
    pub(super) latency_us: Vec<u32>,
    /// Extents that each sponsor holds.
    pub(super) held: Vec<u64>,
    pub(super) rebuild: Option<Rebuild>,
    /// No look for extents to rebuild before this tick.
    pub(super) rebuild_pause: u64,
    /// Extent where the next look begins.
    pub(super) rebuild_cursor: u32,
    /// Holds that were not answered yet.
    pub(super) holds: Vec<(ExtentIndex, u8)>,
    /// Extents whose last rebuild lacked a source for a page.
    pub(super) rebuild_failed: Vec<ExtentIndex>,
    pub(super) attempt: u32,
    pub(super) ticks: u64,
    /// Extents whose record is to be written down.
    pub(super) changed: Vec<ExtentIndex>,
    pub(super) up: u16,
    pub(super) frames: u64,
    pub(super) unmapping: u64,
    pub(super) storing: u64,
    pub(super) punching: u64,
    pub(super) prefetching: u64,
    pub(super) remote: u64,
    pub(super) untouched: u64,
    pub(super) poisoned: u64,
    pub(super) behind: u64,
    /// The region is being handed over.
    pub(super) frozen: bool,
    /// Everything is to be stored and kept.
    pub(super) flushing: bool,
    pub(super) streams: Streams,
    pub(super) restore_next: Option<u64>,
    pub(super) counters: Counters,
    owner_gone: bool,
    /// The kernel had no memory: nothing is brought until a page was dropped or time passed.
    pub(super) starved: bool,
}

impl Pager {
    /// A pager whose region is all untouched and whose sponsors are all up.
    ///
    /// # Panics
    /// If the layout does not cover the pages.
    #[must_use]
    pub fn new(config: Config) -> Self {
        let pages = config.pages;
        let extents = pages.div_ceil(heca_types::limits::EXTENT_PAGES);
        assert!(u64::from(config.layout.len()) >= extents, "layout too short for the region");
        let page = Page { version: 0, state: State::Untouched, flags: 0, store: 0, fetch: 0 };
        let mut pager = Self {
            pages: vec![page; pages as usize],
            links: Links::new(pages),
            active: List::new(),
            standby: List::new(),
            stalled: List::new(),
            blocked: List::new(),
            stale: vec![0; config.layout.len() as usize],
            up: ((1u32 << config.weights.len()) - 1) as u16,
            lost: 0,
            leaving: 0,
            suspect: 0,
            refused: 0,
            latency_us: vec![0; config.weights.len()],
            held: vec![0; config.weights.len()],
            rebuild: None,
            rebuild_pause: PAUSE_AT_START,
            rebuild_cursor: 0,
            holds: Vec::new(),
            rebuild_failed: Vec::new(),
            attempt: 0,
            ticks: 0,
            changed: Vec::new(),
            frames: 0,
            unmapping: 0,
            storing: 0,
            punching: 0,
            prefetching: 0,
            remote: 0,
            untouched: pages,
            poisoned: 0,
            behind: 0,
            frozen: false,
            flushing: false,
            streams: Streams::new(),
            restore_next: None,
            counters: Counters::default(),
            owner_gone: false,
            starved: false,
            config,
        };
        pager.count_holdings();
        pager
    }

    /// Counts since the start.
    #[must_use]
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Where the pages are now.
    #[must_use]
    pub fn gauges(&self) -> Gauges {
        let (degraded_extents, leaving_extents) = self.redundancy();
        Gauges {
            pages: self.config.pages,
            budget_pages: self.config.budget_pages,
            local_pages: self.frames,
            resident_pages: self.active.len() + self.unmapping + self.storing,
            standby_pages: self.standby.len() + self.punching,
            remote_pages: self.remote,
            untouched_pages: self.untouched,
            stalled_faults: self.stalled.len(),
            blocked_faults: self.blocked.len(),
            poisoned_pages: self.poisoned,
            behind_pages: self.behind,
            extents: u64::from(self.config.layout.len()),
            degraded_extents,
            leaving_extents,
        }
    }

    /// Whether the kernel reported that the owner of the memory is gone.
    #[must_use]
    pub fn owner_gone(&self) -> bool {
        self.owner_gone
    }

    /// After [`Event::Restore`]: whether every page is local and nothing is in flight.
    #[must_use]
    pub fn is_restored(&self) -> bool {
        self.restore_next == Some(self.config.pages)
            && self.remote == 0
            && self.prefetching == 0
            && self.punching + self.storing + self.unmapping == 0
            && self.stalled.len() + self.blocked.len() == 0
            && self.active.len() + self.standby.len() == self.frames
            && self.frames + self.untouched + self.poisoned == self.config.pages
    }

    /// Takes one event and appends what is to be done.
    pub fn step(&mut self, event: Event, out: &mut Vec<Action>) {
        let begin = out.len();
        match event {
            Event::Fault { page, kind } => self.fault(page, kind, out),
            Event::Fetched { page, version, sponsor } => self.fetched(page, version, sponsor, out),
            Event::Late { page, sponsor } => self.hedge(page, sponsor, out),
            Event::FetchFailed { page, sponsor, error } => {
                self.fetch_failed(page, sponsor, error, out);
            }
            Event::Installed { page, what, result } => self.installed(page, what, result, out),
            Event::Unmapped { page, version, outcome } => self.unmapped(page, version, outcome),
            Event::Stored { page, version, sponsor } => self.stored(page, version, sponsor, true),
            Event::StoreFailed { page, version, sponsor } => {
                self.stored(page, version, sponsor, false);
            }
            Event::Punched { page, ok } => self.punched(page, ok, out),
            Event::SponsorDown { sponsor } => {
                self.up &= !(1 << sponsor);
                self.rebuild_lost(sponsor, out);
                self.keep_local_copies(sponsor);
            }
            Event::SponsorUp { sponsor } => self.sponsor_up(sponsor, out),
            Event::SponsorEmptied { sponsor } => {
                self.sponsor_emptied(sponsor);
                self.rebuild_lost(sponsor, out);
            }
            Event::SponsorLost { sponsor } => {
                self.lost |= 1 << sponsor;
                self.look_for_rebuilds();
                self.rebuild_more(out);
            }
            Event::SponsorSuspect { sponsor, suspect } => {
                set_bit(&mut self.suspect, sponsor, suspect);
            }
            Event::SponsorLeaving { sponsor, leaving } => {
                set_bit(&mut self.leaving, sponsor, leaving);
                self.look_for_rebuilds();
                self.rebuild_more(out);
            }
            Event::Latency { sponsor, us } => self.latency_us[usize::from(sponsor)] = us,
            Event::Held { extent, sponsor, ok } => {
                self.held_answer(extent, sponsor, ok, out);
                self.rebuild_more(out);
            }
            Event::Pulled { page, attempt, ok } => {
                self.pulled(page, attempt, ok);
                self.rebuild_more(out);
            }
            Event::SetBudget { pages } => {
                if self.restore_next.is_none() {
                    self.config.budget_pages = pages;
                }
            }
            Event::Restore => {
                self.config.budget_pages = u64::MAX / 4;
                self.restore_next = Some(0);
            }
            Event::Arrived { page } => self.arrived(page, out),
            Event::SourceBack => self.demand_again(out),
            Event::Flush { on } => self.flushing = on,
            Event::Freeze { on: true } => return self.freeze(),
            Event::Freeze { on: false } => self.frozen = false,
            Event::Work => self.rebuild_more(out),
            Event::Tick => {
                self.starved = false;
                self.ticks += 1;
                if self.ticks.is_multiple_of(BLOCKED_TICKS) {
                    self.retry_blocked();
                }
                self.rebuild_more(out);
            }
        }
        if self.owner_gone {
            out.clear();
            return;
        }
        self.serve_stalled(out);
        self.balance(out);
        self.restore_more(out);
        // First: a crash amid the actions must not leave a record that promises what a later one
        // of them takes away.
        let changed = self.changed.drain(..).map(|extent| Action::Extent { extent });
        out.splice(begin..begin, changed);
    }

    pub(super) fn page(&mut self, page: PageIndex) -> &mut Page {
        &mut self.pages[page.0 as usize]
    }

    /// Free frames; negative after the budget was lowered.
    pub(super) fn free_frames(&self) -> i64 {
        self.config.budget_pages as i64 - self.frames as i64
    }

    fn may_take_frame(&self) -> bool {
        self.free_frames() > 0
            || self.frozen
            || self.config.mutation == Some(Mutation::IgnoreBudget)
    }

    fn fault(&mut self, page: PageIndex, kind: FaultKind, out: &mut Vec<Action>) {
        self.counters.faults += 1;
        match kind {
            FaultKind::Missing => self.counters.faults_missing += 1,
            FaultKind::Minor => self.counters.faults_minor += 1,
            FaultKind::WriteProtect => self.counters.faults_write_protect += 1,
        }
        let p = *self.page(page);
        match p.state {
            State::Untouched | State::Remote if p.has(WANTED) => {}
            State::Untouched | State::Remote => self.want(page, out),
            State::Resident => self.touch_resident(page, kind, out),
            State::Unmapping => {
                self.counters.cancelled_unmapping += 1;
                self.cancel(page, kind, out);
            }
            State::Storing => {
                self.counters.cancelled_storing += 1;
                self.storing -= 1;
                self.cancel(page, kind, out);
            }
            State::Standby => self.touch_standby(page, kind, out),
            State::Punching => {
                self.counters.faults_while_punching += 1;
                if self.config.mutation != Some(Mutation::ForgetFault) {
                    self.page(page).flags |= WANTED;
                }
            }
            State::Fetching => {
                self.counters.faults_while_fetching += 1;
                self.page(page).flags |= WANTED;
                if p.has(PREFETCHED) && !p.has(WANTED) {
                    self.touch_prefetching(page, out);
                }
                if self.config.mutation == Some(Mutation::FetchTwice) {
                    self.page(page).fetch = 0;
                    self.ask(page, FetchClass::Demand, out);
                }
            }
            State::Behind => self.want_behind(page, out),
            State::Poisoned => out.push(Action::Poison { page }),
        }
    }

    /// A fault on a page that is not local.
    fn want(&mut self, page: PageIndex, out: &mut Vec<Action>) {
        self.page(page).flags |= WANTED;
        if self.stalled.len() > 0 || self.starved || !self.may_take_frame() {
            self.counters.faults_stalled += 1;
            self.stalled.push(&mut self.links, page.0);
            return;
        }
        self.bring(page, out);
    }

    /// Starts to bring a wanted page for which there is a frame.
    fn bring(&mut self, page: PageIndex, out: &mut Vec<Action>) {
        let p = *self.page(page);
        debug_assert!(p.has(WANTED));
        if p.state == State::Untouched {
            self.frames += 1;
            self.untouched -= 1;
            self.counters.zero_installs += 1;
            self.page(page).state = State::Fetching;
            out.push(Action::Zero { page });
            return;
        }
        debug_assert_eq!(p.state, State::Remote);
        self.start_fetch(page, FetchClass::Demand, out);
        self.fetch_ahead(page, out);
    }

    /// The page is in use, as the youngest.
    pub(super) fn make_resident(&mut self, page: PageIndex, flags: u8) {
        let p = self.page(page);
        p.state = State::Resident;
        p.flags = flags;
        p.store = 0;
        self.active.push(&mut self.links, page.0);
    }

    fn installed(
        &mut self,
        page: PageIndex,
        what: Install,
        result: InstallResult,
        out: &mut Vec<Action>,
    ) {
        match result {
            InstallResult::Gone => {
                self.owner_gone = true;
                return;
            }
            InstallResult::Exists => self.counters.install_exists += 1,
            InstallResult::Again => self.counters.install_again += 1,
            InstallResult::NoMemory => self.counters.install_no_memory += 1,
            InstallResult::Ok | InstallResult::Hole => {}
        }
        if result == InstallResult::Again && self.page(page).state == State::Unmapping {
            // The step that ordered this also chose the page as a victim. To try again now would
            // undo the unmapping behind the evictor's back: let the attempt be void.
            self.counters.cancelled_unmapping += 1;
            self.make_resident(page, DIRTY);
        }
        match what {
            Install::Copy | Install::Fill | Install::Zero => self.filled(page, what, result, out),
            Install::Continue => match result {
                InstallResult::Exists => out.push(Action::Wake { page }),
                // They fault again: other events, which may free memory, come first.
                InstallResult::NoMemory => out.push(Action::Wake { page }),
                InstallResult::Again => {
                    let protect = false;
                    self.page(page).flags |= DIRTY;
                    out.push(Action::Continue { page, protect });
                }
                InstallResult::Hole => {
                    // Nobody but the owner frees pages in this state: it discarded the page
                    // (a balloon does), and expects zeros.
                    self.counters.owner_discards += 1;
                    if self.page(page).state == State::Resident {
                        self.active.remove(&mut self.links, page.0);
                    }
                    let p = self.page(page);
                    p.state = State::Fetching;
                    p.flags = WANTED;
                    out.push(Action::Zero { page });
                }
                InstallResult::Ok | InstallResult::Gone => {}
            },
            Install::Unprotect => {
                if result == InstallResult::Again {
                    out.push(Action::Unprotect { page });
                }
            }
        }
    }

    /// The kernel answered `Copy`, `Fill` or `Zero`.
    fn filled(
        &mut self,
        page: PageIndex,
        what: Install,
        result: InstallResult,
        out: &mut Vec<Action>,
    ) {
        let p = *self.page(page);
        match result {
            InstallResult::Again if what == Install::Zero => out.push(Action::Zero { page }),
            InstallResult::Again => {
                self.ask(page, FetchClass::Demand, out);
            }
            InstallResult::NoMemory | InstallResult::Hole => self.no_memory(page, what),
            InstallResult::Ok | InstallResult::Exists | InstallResult::Gone => {
                self.prefetching -= u64::from(p.has(PREFETCHED));
                if result == InstallResult::Exists {
                    // Somebody put a page there: what is there counts.
                    self.make_resident(page, DIRTY);
                    out.push(Action::Continue { page, protect: false });
                } else if what == Install::Fill {
                    let p = self.page(page);
                    p.state = State::Standby;
                    p.flags = PREFETCHED;
                    self.standby.push(&mut self.links, page.0);
                } else {
                    let zero = what == Install::Zero;
                    self.make_resident(page, if zero { DIRTY } else { 0 });
                }
            }
        }
    }

    /// The kernel had no memory for a page: wait for eviction to make room.
    fn no_memory(&mut self, page: PageIndex, what: Install) {
        self.starved = true;
        let wanted = self.page(page).has(WANTED);
        if what == Install::Zero {
            self.page(page).state = State::Untouched;
            self.frames -= 1;
            self.untouched += 1;
        } else {
            self.give_up_fetch(page);
        }
        if wanted {
            self.counters.faults_stalled += 1;
            self.stalled.push(&mut self.links, page.0);
        }
    }

    fn serve_stalled(&mut self, out: &mut Vec<Action>) {
        while self.stalled.len() > 0 && !self.starved && self.may_take_frame() {
            let Some(page) = self.stalled.pop(&mut self.links) else { return };
            let before = self.stalled.len();
            self.bring(PageIndex(page), out);
            if self.stalled.len() > before {
                return;
            }
        }
    }

    fn sponsor_up(&mut self, sponsor: u8, out: &mut Vec<Action>) {
        self.up |= 1 << sponsor;
        set_bit(&mut self.lost, sponsor, false);
        set_bit(&mut self.suspect, sponsor, false);
        self.look_for_rebuilds();
        self.keep_local_copies(sponsor);
        // Each blocked fault gets one look; those that still find no sponsor queue up again.
        for _ in 0..self.blocked.len() {
            let Some(page) = self.blocked.pop(&mut self.links) else { return };
            self.stalled.push(&mut self.links, page);
        }
        self.serve_stalled(out);
    }

    /// A page's local memory is free.
    pub(super) fn drop_to_remote(&mut self, page: PageIndex, zero: bool) {
        let p = self.page(page);
        p.flags &= WANTED;
        p.state = if zero { State::Untouched } else { State::Remote };
        self.untouched += u64::from(zero);
        self.remote += u64::from(!zero);
    }

    /// A dropped page that somebody wants.
    pub(super) fn want_again(&mut self, page: PageIndex, out: &mut Vec<Action>) {
        self.page(page).flags &= !WANTED;
        self.want(page, out);
    }
}
