//! The network, and everything that goes wrong.

use heca_core::pager::{Event, FetchError};
use heca_types::PageVersion;
use heca_types::limits::LEASE_MS_MIN;

use crate::history::What;
use crate::network::{EPOCH, EPOCH_OLD, LANES, Note, Request, open_request, region, region_id};
use crate::oracle::Check;
use crate::params::{BUDGET_MAX, BUDGET_MIN};
use crate::report::Mark;
use crate::world::World;

const FRAMES_PER_STEP: usize = 6;
/// Regions of other owners that compete for the sponsors' offers.
const OTHER_REGIONS: usize = 4;

impl World {
    /// Some frames of one connection move on, in one direction.
    pub(crate) fn network_step(&mut self) {
        let from = self.rng.below(self.nodes.len());
        let mut order = (0..self.nodes.len()).map(|i| (from + i) % self.nodes.len());
        let Some(sponsor) = order.find(|&s| self.nodes[s].can_move(self.tick)) else {
            return;
        };
        let first = self.rng.below(LANES);
        let frames = self.rng.range(1, FRAMES_PER_STEP);
        let back = self.rng.one_in(2);
        for lane in (0..LANES).map(|i| (first + i) % LANES) {
            let queues = &self.nodes[sponsor].lanes[lane];
            let waiting = if back { queues.replies.len() } else { queues.requests.len() };
            if waiting == 0 {
                continue;
            }
            for _ in 0..frames.min(waiting) {
                let queues = &mut self.nodes[sponsor].lanes[lane];
                if back {
                    self.inbox.extend(queues.replies.pop_front());
                } else if let Some(request) = queues.requests.pop_front() {
                    let reply = self.serve(sponsor, request);
                    self.nodes[sponsor].lanes[lane].replies.push_back(reply);
                }
            }
            return;
        }
    }

    fn serve(&mut self, sponsor: usize, request: Request) -> Note {
        let name = sponsor as u8;
        match request {
            Request::Fetch { slot, version } => {
                let page = self.page(slot);
                self.note(page, What::SponsorServed { sponsor: name, version: version.0 });
                let answer = self.nodes[sponsor].read(page, slot, version);
                match self.spoil(sponsor, slot, version).map_or(answer, Err) {
                    Ok(reply) => Note { event: Event::Fetched { page }, reply },
                    Err(error) => {
                        self.oracle.failed[slot] |= 1 << name;
                        Event::FetchFailed { page, sponsor: name, error }.into()
                    }
                }
            }
            Request::Store { slot, version, value } => {
                let page = self.page(slot);
                let rate = self.rates().store_refused;
                if self.rng.one_in(rate) {
                    self.stats.mark(Mark::StoreRefused);
                    self.note(page, What::SponsorRefused { sponsor: name, version: version.0 });
                    return Event::StoreFailed { page, version, sponsor: name }.into();
                }
                if self.store(sponsor, slot, version, value) {
                    Event::Stored { page, version, sponsor: name }.into()
                } else {
                    Event::StoreFailed { page, version, sponsor: name }.into()
                }
            }
        }
    }

    fn store(&mut self, sponsor: usize, slot: usize, version: PageVersion, value: u64) -> bool {
        let page = self.page(slot);
        let result = self.nodes[sponsor].write(EPOCH, page, slot, (version, value));
        let (sponsor, number) = (sponsor as u8, version.0);
        self.note(
            page,
            match result {
                Ok(()) => What::SponsorStored { sponsor, version: number, value },
                Err(_) => What::SponsorRefused { sponsor, version: number },
            },
        );
        result.is_ok()
    }

    /// Perhaps an error in place of a good reply. Only if another sponsor can help, and once for
    /// each time that a page is brought in, so that the page must not be given up.
    fn spoil(&mut self, sponsor: usize, slot: usize, version: PageVersion) -> Option<FetchError> {
        let rate = self.rates().corrupt;
        if !self.rng.one_in(rate) || self.oracle.spoilt[slot] {
            return None;
        }
        if !self.helped_by_another(sponsor, slot, version) {
            return None;
        }
        self.oracle.spoilt[slot] = true;
        self.stats.mark(Mark::FetchSpoilt);
        Some(self.rng.pick(&[FetchError::Corrupt, FetchError::Absent, FetchError::Refused]))
    }

    fn helped_by_another(&self, sponsor: usize, slot: usize, version: PageVersion) -> bool {
        let set = self.layout.replicas(self.page(slot).extent());
        set.sponsors()
            .iter()
            .map(|&s| usize::from(s))
            .filter(|&s| s != sponsor && self.oracle.failed[slot] >> s & 1 == 0)
            .any(|s| self.nodes[s].can_serve(slot, version))
    }

    /// Perhaps some trouble.
    pub(crate) fn chaos_step(&mut self) -> Check {
        if self.memory_full && self.rng.one_in(4) {
            self.fill_memory();
        }
        let rates = self.params.rates.clone();
        let slot = self.rng.below(self.params.slots.len());
        let sponsor = self.rng.below(self.nodes.len());
        match self.rng.below(12) {
            0 if self.rng.one_in(rates.unmap) => self.kernel_unmaps(slot),
            1 if self.rng.one_in(rates.discard) => self.owner_discards(slot),
            2 if self.rng.one_in(rates.crash) => self.crash(sponsor),
            3 if self.rng.one_in(rates.restart) => self.restart(sponsor),
            4 if self.rng.one_in(rates.late_frame) => self.late_frame(sponsor),
            5 if self.rng.one_in(rates.rot) => self.rot(sponsor, slot),
            6 if self.rng.one_in(rates.lose) => self.lose(slot),
            7 if self.rng.one_in(rates.budget) => return self.change_budget(),
            8 => return self.old_owner(sponsor, slot),
            9 => return self.other_region(sponsor),
            11 if self.rng.one_in(rates.freeze) => self.freeze(sponsor),
            10 if self.rng.one_in(rates.memory_full) => self.fill_memory(),
            _ => {}
        }
        Ok(())
    }

    fn kernel_unmaps(&mut self, slot: usize) {
        if self.kernel.frame(slot).mapped {
            self.stats.mark(Mark::KernelUnmap);
            self.kernel.zap(slot);
            self.note(self.page(slot), What::KernelUnmapped);
        }
    }

    fn owner_discards(&mut self, slot: usize) {
        if self.kernel.frame(slot).content.is_none() || self.guest.is_waited_on(slot) {
            return;
        }
        self.stats.mark(Mark::Discard);
        self.kernel.punch(slot);
        let expected = &mut self.oracle.expected[slot];
        if expected.value != 0 {
            expected.before_discard = Some(expected.value);
            expected.value = 0;
        }
        self.note(self.page(slot), What::OwnerDiscarded);
    }

    fn crash(&mut self, sponsor: usize) {
        let name = sponsor as u8;
        if !self.nodes[sponsor].up {
            return;
        }
        self.stats.mark(Mark::Crash);
        self.note(None, What::Crashed { sponsor: name });
        self.nodes[sponsor].up = false;
        self.nodes[sponsor].was_down = true;
        self.inbox.push_back(Event::SponsorDown { sponsor: name }.into());
        let keep_frames = self.rng.one_in(2);
        for lane in std::mem::take(&mut self.nodes[sponsor].lanes) {
            for note in lane.replies {
                self.inbox.push_back(lost(note.event, name).into());
            }
            for request in lane.requests {
                self.lose_request(name, request);
                if keep_frames && matches!(request, Request::Store { .. }) {
                    self.nodes[sponsor].late.push(request);
                }
            }
        }
    }

    fn lose_request(&mut self, sponsor: u8, request: Request) {
        let event = match request {
            Request::Fetch { slot, .. } => {
                let page = self.page(slot);
                Event::FetchFailed { page, sponsor, error: FetchError::Lost }
            }
            Request::Store { slot, version, .. } => {
                Event::StoreFailed { page: self.page(slot), version, sponsor }
            }
        };
        self.inbox.push_back(event.into());
    }

    fn restart(&mut self, sponsor: usize) {
        if self.nodes[sponsor].up {
            return;
        }
        self.nodes[sponsor].restart(self.tick);
        self.note(None, What::Restarted { sponsor: sponsor as u8 });
        if self.chaos && self.rng.one_in(8) {
            self.empty(sponsor);
        }
        self.inbox.push_back(Event::SponsorUp { sponsor: sponsor as u8 }.into());
        while !self.nodes[sponsor].late.is_empty() && self.rng.one_in(2) {
            self.late_frame(sponsor);
        }
    }

    /// A sponsor comes back without what it held. Pages of which it had the only copy are lost.
    fn empty(&mut self, sponsor: usize) {
        self.stats.mark(Mark::Emptied);
        for slot in 0..self.nodes[sponsor].store.len() {
            let Some(stored) = self.nodes[sponsor].store[slot].take() else { continue };
            self.nodes[sponsor].machine.release_pages(region(), 1);
            let another = self.nodes.iter().any(|node| {
                node.store[slot].is_some_and(|s| s.version >= stored.version && !s.rotten)
            });
            if !another {
                self.oracle.lost[slot] = true;
            }
        }
        self.inbox.push_back(Event::SponsorEmptied { sponsor: sponsor as u8 }.into());
    }

    pub(crate) fn restart_all(&mut self) {
        for sponsor in 0..self.nodes.len() {
            self.nodes[sponsor].frozen_until = 0;
            self.restart(sponsor);
        }
    }

    /// A write frame of a lost connection is read at last.
    fn late_frame(&mut self, sponsor: usize) {
        if !self.nodes[sponsor].up || self.nodes[sponsor].late.is_empty() {
            return;
        }
        if let Request::Store { slot, version, value } = self.nodes[sponsor].late.remove(0) {
            let stored = self.store(sponsor, slot, version, value);
            self.stats.mark(if stored { Mark::LateFrame } else { Mark::LateRefused });
        }
    }

    /// One copy goes bad for good, if another sponsor has a good one.
    fn rot(&mut self, sponsor: usize, slot: usize) {
        let Some(stored) = self.nodes[sponsor].store[slot] else {
            return;
        };
        let busy = self.oracle.spoilt[slot] || self.oracle.fetching[slot].is_some();
        if busy || stored.rotten || !self.helped_by_another(sponsor, slot, stored.version) {
            return;
        }
        self.nodes[sponsor].store[slot] = Some(crate::network::Stored { rotten: true, ..stored });
        self.stats.mark(Mark::Rotted);
        self.note(self.page(slot), What::CopyRotted { sponsor: sponsor as u8 });
    }

    /// All copies go bad: the page may be given up from here on.
    fn lose(&mut self, slot: usize) {
        self.oracle.lost[slot] = true;
        self.stats.mark(Mark::Lost);
        for sponsor in 0..self.nodes.len() {
            if let Some(stored) = &mut self.nodes[sponsor].store[slot] {
                stored.rotten = true;
                self.note(self.page(slot), What::CopyRotted { sponsor: sponsor as u8 });
            }
        }
    }

    /// A sponsor hangs for a while: it answers nothing, but nobody calls it dead.
    fn freeze(&mut self, sponsor: usize) {
        self.stats.mark(Mark::Frozen);
        self.nodes[sponsor].frozen_until = self.tick + self.rng.range(50, 1500) as u64;
    }

    /// Others take all memory of the machine, or give it back.
    fn fill_memory(&mut self) {
        self.memory_full = !self.memory_full;
        self.note(None, What::MemoryFull { full: self.memory_full });
        self.stats.mark(Mark::MemoryFull);
    }

    fn change_budget(&mut self) -> Check {
        let now = self.pager.gauges().budget_pages;
        let pages = self.rng.range(BUDGET_MIN, BUDGET_MAX) as u64;
        self.stats.mark(if pages < now { Mark::BudgetLowered } else { Mark::BudgetRaised });
        self.deliver(Event::SetBudget { pages }.into())
    }

    /// The owner before the last takeover is not dead, and does not know that it lost the region.
    fn old_owner(&mut self, sponsor: usize, slot: usize) -> Check {
        if !self.nodes[sponsor].up {
            return Ok(());
        }
        let page = self.page(slot);
        self.note(page, What::Zombie { sponsor: sponsor as u8 });
        let new = (PageVersion(u32::MAX / 2), 0xdead_0000 + self.tick);
        let quota = self.nodes[sponsor].store.len() as u64;
        let node = &mut self.nodes[sponsor];
        let wrote = node.write(EPOCH_OLD, page, slot, new).is_ok();
        let opened = node.machine.open(self.tick, &open_request(1, EPOCH_OLD, quota)).is_ok();
        let renewed = node.machine.renew(self.tick, region_id(1), EPOCH_OLD).is_ok();
        self.check_refused(page, "a write", !wrote)?;
        self.check_refused(page, "an open", !opened)?;
        self.check_refused(page, "a renewal", !renewed)?;
        self.stats.mark(Mark::ZombieRefused);
        Ok(())
    }

    /// Other owners open and close regions, and forget them.
    fn other_region(&mut self, sponsor: usize) -> Check {
        if !self.nodes[sponsor].up {
            return Ok(());
        }
        let now_ms = self.tick;
        let number = 2 + self.rng.below(OTHER_REGIONS) as u8;
        let machine = &mut self.nodes[sponsor].machine;
        if self.rng.one_in(4) {
            // A region that is not there is refused, which is as good.
            let _ = machine.close(region_id(number), EPOCH);
        } else {
            let mut request = open_request(number, EPOCH, self.rng.below(400) as u64);
            request.lease_ms = LEASE_MS_MIN;
            let opened = machine.open(now_ms, &request).is_ok();
            self.stats.mark(if opened { Mark::RegionOpened } else { Mark::RegionRefused });
        }
        self.nodes[sponsor].machine.expire(now_ms);
        self.check_offer(sponsor)
    }
}

/// What becomes of an answer that was under way when the connection was lost.
fn lost(answer: Event, sponsor: u8) -> Event {
    match answer {
        Event::Fetched { page } | Event::FetchFailed { page, .. } => {
            Event::FetchFailed { page, sponsor, error: FetchError::Lost }
        }
        Event::Stored { page, version, .. } => Event::StoreFailed { page, version, sponsor },
        other => other,
    }
}
