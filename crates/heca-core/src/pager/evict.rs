//! Eviction: unmap, store, park, drop.

use heca_types::limits::{
    EVICT_BATCH_PAGES, EVICT_GROUP_PAGES, EVICT_PAGES_IN_FLIGHT_MAX, EXTENT_PAGES,
};
use heca_types::{ExtentIndex, PageIndex, PageVersion};

use super::machine::{DIRTY, PREFETCHED, Page, Pager, State, WANTED, ZERO};
use super::{Action, Mutation, Unmapped};

/// Standby pages that one step looks at for some that may be dropped.
const STANDBY_LOOKS_MAX: u64 = 8192;

impl Pager {
    /// Free frames that are for faults alone; what there is beyond is for prefetch.
    pub(super) fn reserve_low(&self) -> u64 {
        self.reserve_high() / 4
    }

    /// Free frames up to which pages are dropped: room for a burst of faults, and for a window of
    /// prefetch.
    fn reserve_high(&self) -> u64 {
        (self.config.budget_pages / 64).clamp(512, 8192).min(self.config.budget_pages / 6)
    }

    /// Pages kept unmapped and stored, so that dropping them needs no network.
    fn standby_target(&self) -> u64 {
        (self.config.budget_pages / 16).clamp(256, 65_536)
    }

    /// Keeps free frames between the water marks: drops standby pages when free frames are few,
    /// and unmaps further pages when free and standby frames together are few.
    pub(super) fn balance(&mut self, out: &mut Vec<Action>) {
        if self.frozen {
            return;
        }
        let usable = if self.starved { 0 } else { self.free_frames() };
        let free = usable + self.punching as i64;
        let missing = self.reserve_high() as i64 - free;
        // Half-empty batches cost as much as full ones.
        if missing >= EVICT_BATCH_PAGES as i64 / 2 || free <= self.reserve_low() as i64 {
            let mut missing = missing.min(EVICT_BATCH_PAGES as i64);
            for _ in 0..self.standby.len().min(STANDBY_LOOKS_MAX) {
                if missing == 0 {
                    break;
                }
                let Some(page) = self.standby.pop(&mut self.links) else { break };
                let index = PageIndex(page);
                if self.up_mask(index) == 0 && !self.page(index).has(ZERO) {
                    // Nobody who has it can be reached: keep the copy that is here.
                    self.standby.push(&mut self.links, page);
                    continue;
                }
                self.punch(index, out);
                missing -= 1;
            }
        }
        let in_flight = self.unmapping + self.storing;
        let supply = self.free_frames() + (self.punching + in_flight + self.standby.len()) as i64;
        let target = (self.reserve_high() + self.standby_target()) as i64;
        let missing = if self.flushing { self.active.len() as i64 } else { target - supply };
        let in_flight_room = EVICT_PAGES_IN_FLIGHT_MAX as u64 - in_flight.min(512);
        let worth_it = missing >= EVICT_BATCH_PAGES as i64 / 2 || (self.flushing && missing > 0);
        if !worth_it || in_flight_room < EVICT_BATCH_PAGES as u64 {
            return;
        }
        let mut room = missing.min(EVICT_BATCH_PAGES as i64);
        while room > 0 {
            let Some(page) = self.active.pop(&mut self.links) else { break };
            room -= 1;
            if self.live_mask(PageIndex(page)) == 0 {
                // No sponsor could take it: let it be the youngest and look at others.
                self.active.push(&mut self.links, page);
                continue;
            }
            self.unmap(PageIndex(page), out);
            room -= self.unmap_around(page, room, out);
        }
    }

    /// Takes pages in use around a victim, too, nearest first behind it and then before it, as many
    /// as there is room for. To unmap a range costs little more than to unmap a page: what counts
    /// is the flush of the processors' translations. A neighbour in use comes back by a minor fault,
    /// as it would have when its own turn came. Returns how many were taken.
    fn unmap_around(&mut self, page: u64, room: i64, out: &mut Vec<Action>) -> i64 {
        let first = page - page % EVICT_GROUP_PAGES;
        let end = (first + EVICT_GROUP_PAGES).min(self.config.pages);
        let mut left = room;
        for neighbour in (page + 1..end).chain((first..page).rev()) {
            if left == 0 {
                break;
            }
            if self.pages[neighbour as usize].state == State::Resident {
                self.active.remove(&mut self.links, neighbour);
                self.unmap(PageIndex(neighbour), out);
                left -= 1;
            }
        }
        room - left
    }

    fn punch(&mut self, page: PageIndex, out: &mut Vec<Action>) {
        let p = self.page(page);
        debug_assert_eq!(p.state, State::Standby);
        p.state = State::Punching;
        if p.has(PREFETCHED) {
            p.flags &= !PREFETCHED;
            self.prefetch_wasted();
        }
        let p = *self.page(page);
        let (version, zero) = (PageVersion(p.version), p.has(ZERO));
        self.punching += 1;
        out.push(Action::Punch { page, version, zero });
    }

    fn unmap(&mut self, page: PageIndex, out: &mut Vec<Action>) {
        let sponsors = self.sponsor_mask(page, self.live_mask(page));
        let p = self.page(page);
        debug_assert_eq!(p.state, State::Resident);
        p.state = State::Unmapping;
        let version = PageVersion(p.version).next();
        p.version = version.0;
        p.store = 0;
        let dirty = p.has(DIRTY);
        self.unmapping += 1;
        out.push(Action::Unmap { page, version, dirty, sponsors });
    }

    fn park(&mut self, page: PageIndex, flags: u8) {
        let p = self.page(page);
        p.state = State::Standby;
        p.flags = flags;
        p.store = 0;
        self.standby.push(&mut self.links, page.0);
    }

    pub(super) fn unmapped(&mut self, page: PageIndex, version: PageVersion, outcome: Unmapped) {
        self.unmapping -= 1;
        let p: Page = *self.page(page);
        if p.state != State::Unmapping || p.version != version.0 {
            self.counters.late_results += 1;
            return;
        }
        match outcome {
            // `Clean` with `DIRTY`: the copy that it relied on was lost meanwhile.
            Unmapped::Clean if p.has(DIRTY) => {
                self.page(page).version -= 1;
                self.make_resident(page, p.flags);
            }
            Unmapped::Mapped | Unmapped::Failed => {
                self.counters.skipped_mapped += 1;
                // Nothing was sent: the version that the sponsors hold is the one before.
                self.page(page).version -= 1;
                self.make_resident(page, p.flags);
            }
            Unmapped::Clean => {
                debug_assert!(p.version > 1, "clean without a remote copy");
                self.page(page).version -= 1;
                self.counters.evicted_clean_pages += 1;
                self.park(page, 0);
            }
            Unmapped::Zero(0) if p.version == 1 => {
                self.page(page).version = 0;
                self.counters.evicted_zero_pages += 1;
                self.park(page, ZERO);
            }
            Unmapped::Sent(sponsors) | Unmapped::Zero(sponsors) => {
                let zero = matches!(outcome, Unmapped::Zero(_));
                let replicas = self.replica_mask(page, sponsors);
                let p = self.page(page);
                p.state = State::Storing;
                p.flags = if zero { ZERO } else { 0 };
                p.store = replicas;
                self.storing += 1;
                self.settle(page);
            }
        }
    }

    pub(super) fn stored(&mut self, page: PageIndex, version: PageVersion, sponsor: u8, ok: bool) {
        let Some(replica) = self.config.layout.replicas(page.extent()).position(sponsor) else {
            return;
        };
        if !ok {
            self.counters.store_failures += 1;
        }
        let p = self.page(page);
        if p.state != State::Storing || p.version != version.0 {
            self.counters.late_results += 1;
            return;
        }
        if ok {
            // Not for a replica that lost what it held since it was sent the page.
            p.store |= (p.store & 1 << replica) << 4;
        } else {
            p.store &= !(1 << replica);
        }
        self.settle(page);
    }

    /// A sponsor came or went: where only replicas with gaps can be reached, they may lack what is
    /// clean here. It is stored again before it is dropped.
    pub(super) fn keep_local_copies(&mut self, sponsor: u8) {
        for number in 0..self.stale.len() as u32 {
            let extent = ExtentIndex(number);
            let first = PageIndex(u64::from(number) * EXTENT_PAGES);
            let up = self.up_mask(first);
            let concerned = self.config.layout.replicas(extent).position(sponsor).is_some();
            if !concerned || up == 0 || up & !self.stale[number as usize] != 0 {
                continue;
            }
            for page in first.0..(first.0 + EXTENT_PAGES).min(self.config.pages) {
                let page = PageIndex(page);
                let p = self.page(page);
                match p.state {
                    State::Resident | State::Unmapping => p.flags |= DIRTY,
                    State::Standby if !p.has(ZERO) => {
                        self.standby.remove(&mut self.links, page.0);
                        self.make_resident(page, DIRTY);
                    }
                    _ => {}
                }
            }
        }
    }

    /// All that a sponsor held is gone: every one of its extents has a gap, and what is local is
    /// stored again before it is dropped. Reads still try the sponsor when nobody else is left,
    /// and learn from its answer that the page is lost.
    pub(super) fn sponsor_emptied(&mut self, sponsor: u8) {
        for number in 0..self.stale.len() as u32 {
            let extent = ExtentIndex(number);
            let Some(replica) = self.config.layout.replicas(extent).position(sponsor) else {
                continue;
            };
            self.stale[number as usize] |= 1 << replica;
            self.changed.push(extent);
            let first = u64::from(number) * EXTENT_PAGES;
            for number in first..(first + EXTENT_PAGES).min(self.config.pages) {
                self.copy_lost(PageIndex(number), replica);
            }
        }
    }

    fn copy_lost(&mut self, page: PageIndex, replica: u8) {
        let p = self.page(page);
        match p.state {
            State::Resident | State::Unmapping => p.flags |= DIRTY,
            State::Standby => {
                self.standby.remove(&mut self.links, page.0);
                self.make_resident(page, DIRTY);
            }
            State::Storing => {
                p.store &= !(0x11 << replica);
                self.settle(page);
            }
            State::Untouched
            | State::Punching
            | State::Remote
            | State::Fetching
            | State::Behind
            | State::Poisoned => {}
        }
    }

    /// Ends `Storing` once nothing is outstanding: in standby if every live replica has the page,
    /// else back in use to be stored again later.
    pub(super) fn settle(&mut self, page: PageIndex) {
        let live = self.live_mask(page);
        let p = *self.page(page);
        let (sent, acked) = (p.store & 0xf, p.store >> 4);
        let early = self.config.mutation == Some(Mutation::PunchEarly) && acked != 0;
        if sent & !acked != 0 && !early {
            return;
        }
        self.storing -= 1;
        if acked == 0 || (live & !acked != 0 && !early) {
            self.make_resident(page, DIRTY);
            return;
        }
        let extent = page.extent();
        let all = self.config.layout.replicas(extent).all();
        // Replicas that are down, or were when this was sent, now have a gap.
        let stale = self.stale[extent.0 as usize];
        if !early && stale | (all & !acked) != stale {
            self.stale[extent.0 as usize] |= all & !acked;
            self.changed.push(extent);
        }
        if p.has(ZERO) {
            self.counters.evicted_zero_pages += 1;
        } else {
            self.counters.evicted_dirty_pages += 1;
        }
        self.park(page, p.flags & ZERO);
    }

    pub(super) fn punched(&mut self, page: PageIndex, ok: bool, out: &mut Vec<Action>) {
        self.punching -= 1;
        let p = *self.page(page);
        debug_assert_eq!(p.state, State::Punching);
        if !ok {
            self.counters.punch_failures += 1;
            // Whether the copies still are where they were is not known any more.
            self.make_resident(page, DIRTY);
            if p.has(WANTED) {
                out.push(Action::Continue { page, protect: false });
            }
            return;
        }
        self.starved = false;
        self.counters.punched_pages += 1;
        self.frames -= 1;
        self.drop_to_remote(page, p.has(ZERO));
        if p.has(WANTED) {
            self.want_again(page, out);
        }
    }
}
