//! Fetching: which replica to ask, what to do when it fails, what to fetch ahead.

use heca_types::limits::PREFETCH_PAGES_IN_FLIGHT_MAX;
use heca_types::{PageIndex, PageVersion};

use super::machine::{ASKED_TWICE, PREFETCHED, Pager, State, WANTED};
use super::{Action, FetchClass, FetchError};

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
        let stale = self.stale[page.extent().0 as usize];
        let p = *self.page(page);
        let failed = p.fetch >> 4;
        let up = self.up_mask(page);
        let fresh = up & !failed & !stale;
        let usable = if fresh == 0 { up & !failed } else { fresh };
        if usable != 0 {
            let replica = usable.trailing_zeros() as u8;
            if fresh == 0 {
                self.counters.fetched_from_stale += 1;
            }
            let p = self.page(page);
            p.fetch = (p.fetch & 0xf0) | replica;
            let version = PageVersion(p.version);
            let sponsor = set.sponsors()[usize::from(replica)];
            out.push(Action::Fetch { page, version, sponsor, class });
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

    /// Replicas of the page's extent that can be reached.
    pub(super) fn up_mask(&self, page: PageIndex) -> u8 {
        let set = self.config.layout.replicas(page.extent());
        let bits = set.sponsors().iter().enumerate();
        bits.filter(|&(_, &s)| self.up >> s & 1 == 1).fold(0, |mask, (i, _)| mask | 1 << i)
    }

    /// Replicas that a write must reach: those up and without a gap. If there are none, all that
    /// are up: a copy on a replica with gaps is as good as any for the page itself, as every read
    /// names its version, and eviction must go on.
    pub(super) fn live_mask(&self, page: PageIndex) -> u8 {
        let up = self.up_mask(page);
        match up & !self.stale[page.extent().0 as usize] {
            0 => up,
            without_gap => without_gap,
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

    pub(super) fn fetched(&mut self, page: PageIndex, out: &mut Vec<Action>) {
        let p = *self.page(page);
        if p.state != State::Fetching {
            self.counters.late_results += 1;
            return;
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
        let set = self.config.layout.replicas(page.extent());
        let p = *self.page(page);
        let replica = p.fetch & 0xf;
        if p.state != State::Fetching || set.position(sponsor) != Some(replica) {
            self.counters.late_results += 1;
            return;
        }
        if error == FetchError::Corrupt {
            self.counters.corrupt_replies += 1;
        }
        if error != FetchError::Lost {
            self.page(page).fetch |= 1 << (4 + replica);
        }
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

    pub(super) fn fetch_ahead(&mut self, page: PageIndex, out: &mut Vec<Action>) {
        if !self.config.prefetch {
            return;
        }
        let range = self.streams.access(page.0);
        for next in range.start..range.end.min(self.config.pages) {
            self.prefetch(PageIndex(next), out);
        }
    }

    pub(super) fn prefetch_wasted(&mut self) {
        self.counters.prefetches_wasted += 1;
        self.streams.wasted();
    }

    pub(super) fn prefetch(&mut self, page: PageIndex, out: &mut Vec<Action>) {
        let p = *self.page(page);
        let room = !self.starved
            && self.free_frames() > self.reserve_low() as i64
            && self.prefetching < PREFETCH_PAGES_IN_FLIGHT_MAX as u64;
        if p.state == State::Remote && !p.has(WANTED) && room && self.up_mask(page) != 0 {
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
