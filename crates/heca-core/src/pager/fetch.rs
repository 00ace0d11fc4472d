//! Fetching: which replica to ask, what to do when it fails, what to fetch ahead.

use heca_types::limits::PREFETCH_PAGES_IN_FLIGHT_MAX;
use heca_types::{PageIndex, PageVersion};

use super::machine::{ASKED_TWICE, PREFETCHED, Pager, State, WANTED};
use super::{Action, FetchClass, FetchError, Mutation};

/// Pages that are asked for ahead at once, if a stream wants as many.
const PREFETCH_CHUNK: u32 = 32;

/// A replica must be this much faster than the preferred one to be asked instead, in microseconds
/// and beside a factor of 1.5: between equals the load is to be shared.
const FASTER_US: u64 = 50;

impl Pager {
    pub(super) fn start_fetch(
        &mut self,
        page: PageIndex,
        class: FetchClass,
        out: &mut Vec<Action>,
    ) {
        self.remote -= 1;
        self.frames += 1;
        let p = self.page(page);
        p.state = State::Fetching;
        p.fetch = 0;
        match class {
            FetchClass::Demand => self.counters.demand_fetches += 1,
            FetchClass::Prefetch => {
                self.page(page).flags |= PREFETCHED;
                self.prefetching += 1;
                self.counters.prefetches += 1;
            }
        }
        self.ask(page, class, out);
    }

    /// Asks the best replica that has not failed for this fetch: one that is up and missed no
    /// write, else one that is up (the version tells whether its copy is current). If there is
    /// none the fault waits for a sponsor; if all of them failed the page is lost.
    pub(super) fn ask(&mut self, page: PageIndex, class: FetchClass, out: &mut Vec<Action>) {
        let set = self.config.layout.replicas(page.extent());
        let p = *self.page(page);
        let failed = p.fetch >> 4;
        if let Some((replica, fresh)) = self.best_replica(page) {
            self.counters.fetched_from_stale += u64::from(!fresh);
            self.ask_replica(page, replica, class, out);
            return;
        }
        if p.fetch & 0xf != 0 {
            // Another one was asked and may still answer.
            return;
        }
        if failed == set.all() && !p.has(ASKED_TWICE) {
            // One more round before the page is given up: an answer may have been spoilt on its
            // way.
            let p = self.page(page);
            p.flags |= ASKED_TWICE;
            p.fetch = 0;
            self.ask(page, class, out);
            return;
        }
        self.give_up_fetch(page);
        if !p.has(WANTED) && (self.restore_next.is_none() || failed != set.all()) {
            return;
        }
        if failed == set.all() {
            self.remote -= 1;
            self.poisoned += 1;
            self.counters.poisoned_pages += 1;
            let p = self.page(page);
            p.state = State::Poisoned;
            p.flags = 0;
            out.push(Action::Poison { page });
            return;
        }
        self.counters.faults_blocked += 1;
        self.blocked.push(&mut self.links, page.0);
    }

    fn ask_replica(
        &mut self,
        page: PageIndex,
        replica: u8,
        class: FetchClass,
        out: &mut Vec<Action>,
    ) {
        let sponsor = self.config.layout.replicas(page.extent()).sponsors()[usize::from(replica)];
        let p = self.page(page);
        p.fetch |= 1 << replica;
        let version = PageVersion(p.version);
        out.push(Action::Fetch { page, version, sponsor, class });
    }

    /// The replica to ask for a page, and whether it missed no write: the first of the set, unless
    /// it is suspect or clearly slower than another.
    fn best_replica(&self, page: PageIndex) -> Option<(u8, bool)> {
        let p = self.pages[page.0 as usize];
        let set = self.config.layout.replicas(page.extent());
        let usable = self.up_mask(page) & !(p.fetch >> 4) & !(p.fetch & 0xf);
        let fresh = usable & !self.stale[page.extent().0 as usize];
        let candidates = if fresh == 0 { usable } else { fresh };
        let rank = |replica: u8| {
            let sponsor = set.sponsors()[usize::from(replica)];
            let us = self.latency_us[usize::from(sponsor)];
            (self.suspect >> sponsor & 1 == 1, us)
        };
        let mut among = (0..set.count()).filter(|&r| candidates >> r & 1 == 1);
        let mut best = among.next()?;
        for replica in among {
            let ((suspect, us), (best_suspect, best_us)) = (rank(replica), rank(best));
            let faster = u64::from(us) * 3 / 2 + FASTER_US < u64::from(best_us);
            if (best_suspect && !suspect) || (best_suspect == suspect && faster) {
                best = replica;
            }
        }
        Some((best, fresh != 0))
    }

    /// The answer of one replica is overdue: ask one other, if there is one as good.
    pub(super) fn hedge(&mut self, page: PageIndex, sponsor: u8, out: &mut Vec<Action>) {
        let p = *self.page(page);
        let position = self.config.layout.replicas(page.extent()).position(sponsor);
        let only = position.is_some_and(|r| p.fetch & 0xf == 1 << r);
        if p.state != State::Fetching || !p.has(WANTED) || !only {
            return;
        }
        if let Some((replica, true)) = self.best_replica(page) {
            self.counters.hedged_fetches += 1;
            self.page(page).store = position.unwrap_or_default();
            self.ask_replica(page, replica, FetchClass::Demand, out);
        }
    }

    /// Replicas of the page's extent that can be reached.
    pub(super) fn up_mask(&self, page: PageIndex) -> u8 {
        self.replica_mask(page, self.up)
    }

    /// The sponsors of these replicas.
    pub(super) fn sponsor_mask(&self, page: PageIndex, replicas: u8) -> u16 {
        let set = self.config.layout.replicas(page.extent());
        let bits = set.sponsors().iter().enumerate();
        bits.filter(|&(i, _)| replicas >> i & 1 == 1).fold(0, |mask, (_, &s)| mask | 1 << s)
    }

    /// The replicas on these sponsors.
    pub(super) fn replica_mask(&self, page: PageIndex, sponsors: u16) -> u8 {
        let set = self.config.layout.replicas(page.extent());
        let bits = set.sponsors().iter().enumerate();
        bits.filter(|&(_, &s)| sponsors >> s & 1 == 1).fold(0, |mask, (i, _)| mask | 1 << i)
    }

    /// Replicas that a write must reach: those up and without a gap, or about to have none. If there are none, all that
    /// are up: a copy on a replica with gaps is as good as any for the page itself, as every read
    /// names its version, and eviction must go on.
    pub(super) fn live_mask(&self, page: PageIndex) -> u8 {
        let up = self.up_mask(page);
        let extent = page.extent();
        match up & (!self.stale[extent.0 as usize] | self.filling_mask(extent)) {
            0 => up,
            without_gap => without_gap,
        }
    }

    /// Blocked faults with a replica that can be reached get another look: its error may have been
    /// a passing one, or it is a new one.
    pub(super) fn retry_blocked(&mut self) {
        for _ in 0..self.blocked.len() {
            let Some(page) = self.blocked.pop(&mut self.links) else { return };
            if self.up_mask(PageIndex(page)) == 0 {
                self.blocked.push(&mut self.links, page);
            } else {
                self.stalled.push(&mut self.links, page);
            }
        }
    }

    /// A fetch ended without a page: its frame is free, the page is remote.
    pub(super) fn give_up_fetch(&mut self, page: PageIndex) {
        let p = self.page(page);
        debug_assert_eq!(p.state, State::Fetching);
        p.state = State::Remote;
        let was_prefetch = p.has(PREFETCHED);
        p.flags &= !(PREFETCHED | ASKED_TWICE);
        self.prefetching -= u64::from(was_prefetch);
        self.frames -= 1;
        self.remote += 1;
    }

    pub(super) fn fetched(
        &mut self,
        page: PageIndex,
        version: PageVersion,
        sponsor: u8,
        out: &mut Vec<Action>,
    ) {
        let p = *self.page(page);
        let any = self.config.mutation == Some(Mutation::HedgeAnyVersion);
        // An answer to an earlier fetch is as good while the page did not change since.
        if p.state != State::Fetching || (p.version != version.0 && !any) {
            self.counters.late_results += 1;
            return;
        }
        if let Some(replica) = self.config.layout.replicas(page.extent()).position(sponsor) {
            let p = self.page(page);
            p.fetch &= !(1 << replica);
            let won = p.fetch & 0xf != 0 && p.store != replica;
            self.counters.hedges_won += u64::from(won);
        }
        if p.has(WANTED) || !p.has(PREFETCHED) {
            out.push(Action::Copy { page });
        } else {
            out.push(Action::Fill { page });
        }
    }

    pub(super) fn fetch_failed(
        &mut self,
        page: PageIndex,
        sponsor: u8,
        error: FetchError,
        out: &mut Vec<Action>,
    ) {
        let replica = self.config.layout.replicas(page.extent()).position(sponsor);
        let p = *self.page(page);
        let asked = replica.is_some_and(|r| p.fetch >> r & 1 == 1);
        let (State::Fetching, Some(replica), true) = (p.state, replica, asked) else {
            self.counters.late_results += 1;
            return;
        };
        if error == FetchError::Corrupt {
            self.counters.corrupt_replies += 1;
        }
        let p = self.page(page);
        p.fetch &= !(1 << replica);
        if error != FetchError::Lost {
            p.fetch |= 1 << (4 + replica);
        }
        if matches!(error, FetchError::Absent | FetchError::Corrupt) {
            self.distrust(page, replica);
        }
        let p = self.page(page);
        let p = *p;
        if p.has(PREFETCHED) && !p.has(WANTED) {
            if self.restore_next.is_some() {
                self.ask(page, FetchClass::Prefetch, out);
            } else {
                // Nobody waits: a later fault tries again with all replicas.
                self.give_up_fetch(page);
            }
            return;
        }
        self.counters.fetch_retries += 1;
        if p.has(PREFETCHED) {
            self.prefetching -= 1;
            self.page(page).flags &= !PREFETCHED;
        }
        self.ask(page, FetchClass::Demand, out);
    }

    /// A replica that counted as complete does not have a page, or has it damaged: it is to be gone
    /// over, page by page, if there is another one to do so from.
    fn distrust(&mut self, page: PageIndex, replica: u8) {
        let extent = page.extent();
        let stale = self.stale[extent.0 as usize];
        // One that is away counts: it is for the time when it is back.
        let all = self.config.layout.replicas(extent).all();
        let others = all & !stale & !(1 << replica);
        if stale >> replica & 1 == 0 && others != 0 {
            self.stale[extent.0 as usize] |= 1 << replica;
            self.changed.push(extent);
            self.look_for_rebuilds();
        }
    }

    /// The guest used a page: fetches what it may use next. Returns by how many pages its accesses
    /// go on, or 0 if they follow no trend.
    pub(super) fn fetch_ahead(&mut self, page: PageIndex, out: &mut Vec<Action>) -> i64 {
        if !self.config.prefetch {
            return 0;
        }
        let ahead = self.streams.access(page.0);
        // Some pages at a time, once there is room for them: a request costs as much as its pages.
        if self.prefetch_room() < ahead.count.min(PREFETCH_CHUNK).into() {
            self.streams.cut(page.0, ahead, 0);
            return ahead.stride;
        }
        for (number, next) in (0..).zip(ahead.pages(self.config.pages)) {
            if self.prefetch_room() <= 0 {
                self.streams.cut(page.0, ahead, number);
                break;
            }
            self.prefetch(PageIndex(next), out);
        }
        ahead.stride
    }

    /// Pages that may be asked for ahead now.
    fn prefetch_room(&self) -> i64 {
        if self.starved || self.frozen {
            return 0;
        }
        let frames = self.free_frames() - self.reserve_low() as i64;
        frames.min(PREFETCH_PAGES_IN_FLIGHT_MAX as i64 - self.prefetching as i64)
    }

    pub(super) fn prefetch_wasted(&mut self) {
        self.counters.prefetches_wasted += 1;
        self.streams.wasted();
    }

    pub(super) fn prefetch(&mut self, page: PageIndex, out: &mut Vec<Action>) {
        let p = *self.page(page);
        let wanted = p.state == State::Remote && !p.has(WANTED);
        if wanted && self.prefetch_room() > 0 && self.up_mask(page) != 0 {
            self.start_fetch(page, FetchClass::Prefetch, out);
        }
    }

    /// After `Restore`: fetch what is remote, a bounded number at a time.
    pub(super) fn restore_more(&mut self, out: &mut Vec<Action>) {
        let Some(mut next) = self.restore_next else { return };
        while next < self.config.pages {
            let page = PageIndex(next);
            let p = *self.page(page);
            match p.state {
                State::Remote if !p.has(WANTED) => {
                    let before = self.prefetching;
                    self.prefetch(page, out);
                    if self.prefetching == before {
                        break;
                    }
                }
                // Look again when its fate is known.
                State::Punching => break,
                _ => {}
            }
            next += 1;
        }
        // A fetch that failed left its page behind: look at all pages again.
        let all_seen = next == self.config.pages;
        if all_seen && self.remote > 0 && self.prefetching == 0 && self.blocked.len() == 0 {
            next = 0;
        }
        self.restore_next = Some(next);
    }
}
