//! Everything that goes wrong.

use heca_core::pager::{Event, FetchError};
use heca_types::limits::LEASE_MS_MIN;
use heca_types::{Epoch, PageVersion};

use crate::history::What;
use crate::network::{
    CONTROL, EPOCH_FIRST, Node, PULLS, PullStart, Request, Stored, WRITEBACK, open_request, owner,
    region, region_id,
};
use crate::oracle::Check;
use crate::params::{BUDGET_MAX, BUDGET_MIN, SPONSORS_DRAWN_MAX};
use crate::report::Mark;
use crate::world::World;

/// Regions of other owners that compete for the sponsors' offers.
const OTHER_REGIONS: usize = 4;
/// Ticks after which a sponsor that is down may be given up.
const AWAY_TICKS: u64 = 200;

impl World {
    /// Perhaps some trouble.
    pub(crate) fn chaos_step(&mut self) -> Check {
        if self.memory_full && self.rng.one_in(4) {
            self.fill_memory();
        }
        let rates = self.params.rates.clone();
        if self.rng.one_in(rates.migrate) {
            return self.begin_migration();
        }
        let slot = self.rng.below(self.params.slots.len());
        let sponsor = self.rng.below(self.nodes.len());
        match self.rng.below(23) {
            0 if self.rng.one_in(rates.unmap) => self.kernel_unmaps(slot),
            1 if self.rng.one_in(rates.discard) => self.owner_discards(slot),
            2 if self.rng.one_in(rates.crash) => self.crash(sponsor),
            3 | 22 if self.rng.one_in(rates.restart) => self.restart(sponsor),
            4 | 21 if self.rng.one_in(rates.late_frame) => return self.late_frame(sponsor),
            5 if self.rng.one_in(rates.rot) => self.rot(sponsor, slot),
            6 if self.rng.one_in(rates.lose) => self.lose(slot),
            7 if self.rng.one_in(rates.budget) => return self.change_budget(),
            8 if self.rng.one_in(rates.old_owner) => return self.old_owner(sponsor, slot),
            9 => return self.other_region(sponsor),
            10 if self.rng.one_in(rates.memory_full) => self.fill_memory(),
            11 if self.rng.one_in(rates.freeze) => self.freeze(sponsor),
            12 if self.rng.one_in(rates.cut) => self.cut(sponsor),
            13 if self.rng.one_in(rates.lane_freeze) => self.freeze_lane(sponsor),
            14 if self.rng.one_in(rates.suspect) => self.suspect(sponsor),
            15 if self.rng.one_in(rates.latency) => self.latency(sponsor),
            16 | 17 if self.rng.one_in(rates.overdue) => self.overdue(sponsor),
            18 if self.rng.one_in(rates.sponsor_lost) => self.give_up(sponsor),
            19 => match self.rng.below(3) {
                0 if self.rng.one_in(rates.leaving) => self.leaving(sponsor),
                1 if self.rng.one_in(rates.full) => {
                    self.nodes[sponsor].full = !self.nodes[sponsor].full;
                }
                2 if self.rng.one_in(rates.add_sponsor) => self.add_sponsor(),
                _ => {}
            },
            20 if self.rng.one_in(rates.pager_crash) => self.let_pager_crash(),
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
        expected.discarded = true;
        if expected.value != 0 {
            expected.before_discard = Some(expected.value);
            expected.value = 0;
        }
        self.note(self.page(slot), What::OwnerDiscarded);
    }

    fn crash(&mut self, sponsor: usize) {
        if !self.nodes[sponsor].alive {
            return;
        }
        self.stats.mark(Mark::Crash);
        self.note(None, What::Crashed { sponsor: sponsor as u8 });
        if self.nodes[sponsor].up {
            self.disconnect(sponsor);
        }
        if let Some(migration) = &mut self.migration {
            migration.broken |= u16::from(migration.source.is_some()) << sponsor;
        }
        self.nodes[sponsor].alive = false;
    }

    /// The connections to a sponsor are lost, which lives on.
    fn cut(&mut self, sponsor: usize) {
        if self.nodes[sponsor].up {
            self.stats.mark(Mark::Cut);
            self.note(None, What::Cut { sponsor: sponsor as u8 });
            self.disconnect(sponsor);
        }
    }

    pub(crate) fn disconnect(&mut self, sponsor: usize) {
        let name = sponsor as u8;
        let node = &mut self.nodes[sponsor];
        node.up = false;
        node.down_since = self.tick;
        node.missed.fill(true);
        self.inbox.push_back(Event::SponsorDown { sponsor: name }.into());
        let pulling = std::mem::take(&mut node.pulling);
        for pull in &pulling {
            let (page, attempt, ok) = (self.page(pull.slot), pull.attempt, false);
            self.inbox.push_back(Event::Pulled { page, attempt, ok }.into());
        }
        for (_, note) in std::mem::take(&mut self.nodes[sponsor].held_up) {
            self.inbox.push_back(lost(note.event, name).into());
        }
        let keep_frames = self.rng.one_in(2);
        for lane in std::mem::take(&mut self.nodes[sponsor].lanes) {
            for note in lane.replies {
                self.inbox.push_back(lost(note.event, name).into());
            }
            for request in lane.requests {
                self.lose_request(name, request);
                if keep_frames {
                    self.nodes[sponsor].late.push((self.epoch, request));
                }
            }
        }
        if keep_frames {
            self.keep_pulls(sponsor, pulling);
        }
    }

    pub(crate) fn lose_request(&mut self, sponsor: u8, request: Request) {
        let event = match request {
            Request::Fetch { slot, .. } => {
                let page = self.page(slot);
                Event::FetchFailed { page, sponsor, error: FetchError::Lost }
            }
            Request::Store { slot, version, .. } => {
                Event::StoreFailed { page: self.page(slot), version, sponsor }
            }
            Request::Hold { extent } => Event::Held { extent, sponsor, ok: false },
            Request::Pull { slot, attempt, .. } => {
                Event::Pulled { page: self.page(slot), attempt, ok: false }
            }
            Request::Release { .. } => return,
        };
        self.inbox.push_back(event.into());
    }

    /// The process of a sponsor starts again if it died, and the pager connects to it.
    pub(crate) fn restart(&mut self, sponsor: usize) {
        if self.nodes[sponsor].up {
            return;
        }
        if !self.nodes[sponsor].alive {
            self.nodes[sponsor].restart(self.tick);
            self.note(None, What::Restarted { sponsor: sponsor as u8 });
            let rate = self.rates().empty;
            if self.rng.one_in(rate) {
                self.empty(sponsor);
            }
        }
        if !self.pager_is_dead() && self.connect(sponsor) {
            self.inbox.push_back(Event::SponsorUp { sponsor: sponsor as u8 }.into());
        }
    }

    /// What the owner does on each new connection. Control frames of older connections are
    /// not carried out from here on.
    pub(crate) fn connect(&mut self, sponsor: usize) -> bool {
        if self.is_loading() {
            // Not the owner yet: it reads, where the owner's epoch is known.
            let node = &mut self.nodes[sponsor];
            node.up = node.epoch == self.epoch;
            return node.up;
        }
        let extents: Vec<_> = self.pager.layout().extents_of(sponsor as u8).collect();
        let node = &mut self.nodes[sponsor];
        let former =
            node.epoch != Epoch(0) && node.extents().iter().any(|extent| !extents.contains(extent));
        if node.open(self.tick, self.epoch, &extents, &self.params.slots).is_err() {
            return false;
        }
        if former {
            self.stats.mark(Mark::ReturnedAfterReplaced);
        }
        node.up = true;
        let epoch = self.epoch;
        let control = |r: &Request| matches!(r, Request::Hold { .. } | Request::Release { .. });
        node.late.retain(|(of, request)| *of < epoch || !control(request));
        self.note(None, What::Connected { sponsor: sponsor as u8, epoch: epoch.0 });
        true
    }

    /// A sponsor comes back without what it held. Pages of which it had the only copy are lost.
    fn empty(&mut self, sponsor: usize) {
        self.stats.mark(Mark::Emptied);
        self.nodes[sponsor].emptied_untold = true;
        if let Some(migration) = &mut self.migration {
            let (there, bit) = (migration.source.is_some(), 1 << sponsor);
            if there { migration.emptied |= bit } else { migration.emptied_before |= bit }
        }
        self.note(None, What::Emptied { sponsor: sponsor as u8 });
        for slot in 0..self.nodes[sponsor].store.len() {
            if let Some(stored) = self.nodes[sponsor].store[slot].take() {
                self.nodes[sponsor].emptied[slot] = stored.version;
                self.nodes[sponsor].machine.release_pages(region(), 1);
                self.recount_lost(slot);
            }
        }
        self.inbox.push_back(Event::SponsorEmptied { sponsor: sponsor as u8 }.into());
    }

    /// Ends what ails the sponsors, but for one that may stay away.
    pub(crate) fn restart_all(&mut self) {
        let gone = self.choose_gone();
        for sponsor in 0..self.nodes.len() {
            let node = &mut self.nodes[sponsor];
            node.frozen_until = 0;
            node.full = false;
            for lane in &mut node.lanes {
                lane.frozen_until = 0;
            }
            for number in 0..OTHER_REGIONS as u8 {
                // A region that is not there is refused, which is as good.
                let _ = node.machine.close(region_id(2 + number), EPOCH_FIRST, owner(2 + number));
            }
        }
        for sponsor in 0..self.nodes.len() {
            let name = sponsor as u8;
            if gone == Some(sponsor) {
                self.stats.mark(Mark::LostAtRest);
                self.crash(sponsor);
                self.inbox.push_back(Event::SponsorLost { sponsor: name }.into());
                continue;
            }
            self.restart(sponsor);
            let suspect = false;
            self.inbox.push_back(Event::SponsorSuspect { sponsor: name, suspect }.into());
        }
        for sponsor in 0..self.nodes.len() {
            if !self.nodes[sponsor].leaving {
                continue;
            }
            let staying = self.nodes.iter().filter(|node| node.up && !node.leaving).count();
            if staying >= self.params.replicas && self.nodes[sponsor].up && self.rng.one_in(2) {
                self.stats.mark(Mark::LeavingAtRest);
            } else {
                self.leaving(sponsor);
            }
        }
    }

    /// A sponsor that others can stand in for.
    fn choose_gone(&mut self) -> Option<usize> {
        let sponsor = self.rng.below(self.nodes.len());
        if self.params.rates.sponsor_lost == 0 || self.rng.one_in(2) {
            return None;
        }
        let others = |s: &usize| *s != sponsor && self.nodes[*s].up;
        let enough = (0..self.nodes.len()).filter(others).count() >= self.params.replicas;
        let told = self.nodes.iter().all(|node| !node.emptied_untold);
        // A target that just became complete may be the only one, too.
        if !(enough && told) || self.pager.is_rebuilding() {
            return None;
        }
        let layout = self.pager.layout();
        let safe = layout.extents_of(sponsor as u8).all(|extent| {
            let stale = self.pager.stale(extent);
            let set = layout.replicas(extent);
            let mut members = set.sponsors().iter().enumerate();
            members.any(|(i, &s)| others(&usize::from(s)) && stale >> i & 1 == 0)
        });
        let good = |slot: &usize| {
            let set = layout.replicas(self.page(*slot).extent());
            let version = self.journal.versions[*slot];
            let mut members = set.sponsors().iter().map(|&s| usize::from(s)).filter(others);
            version == PageVersion::NEVER || members.any(|s| self.nodes[s].has_good(*slot, version))
        };
        let pages = self.params.slots.len();
        (safe && (0..pages).all(|slot| self.is_local(slot) || good(&slot))).then_some(sponsor)
    }

    /// One copy goes bad for good, if another sponsor has a good one.
    fn rot(&mut self, sponsor: usize, slot: usize) {
        let Some(stored) = self.nodes[sponsor].store[slot] else {
            return;
        };
        let busy = self.oracle.spoilt[slot] || self.oracle.fetching[slot] != 0;
        if busy || stored.rotten || !self.helped_by_another(sponsor, slot, stored.version) {
            return;
        }
        self.nodes[sponsor].store[slot] = Some(Stored { rotten: true, ..stored });
        self.recount_lost(slot);
        self.stats.mark(Mark::Rotted);
        self.note(self.page(slot), What::CopyRotted { sponsor: sponsor as u8 });
    }

    /// All copies go bad: the page may be given up from here on.
    fn lose(&mut self, slot: usize) {
        if self.is_local(slot) {
            return;
        }
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

    /// One connection hangs while the others go on.
    fn freeze_lane(&mut self, sponsor: usize) {
        self.stats.mark(Mark::LaneFrozen);
        let lane = self.rng.pick(&[0, 0, 1, WRITEBACK, CONTROL, PULLS, PULLS]);
        let until = self.tick + self.rng.range(50, 3000) as u64;
        self.nodes[sponsor].lanes[lane].frozen_until = until;
    }

    /// Answers that were held up come at the worst time: when the page is fetched anew.
    pub(crate) fn thaw(&mut self) {
        for sponsor in 0..self.nodes.len() {
            let mut held = std::mem::take(&mut self.nodes[sponsor].held_up);
            held.retain(|&(due, note)| {
                let old = match note.event {
                    Event::Fetched { page, version, .. } => {
                        let slot = self.slot(page);
                        version < self.journal.versions[slot] && self.oracle.fetching[slot] != 0
                    }
                    _ => false,
                };
                let come = old || due <= self.tick || !self.chaos;
                if come {
                    self.inbox.push_back(note);
                }
                !come
            });
            self.nodes[sponsor].held_up = held;
        }
    }

    fn suspect(&mut self, sponsor: usize) {
        self.stats.mark(Mark::Suspect);
        let (sponsor, suspect) = (sponsor as u8, self.rng.one_in(2));
        self.inbox.push_back(Event::SponsorSuspect { sponsor, suspect }.into());
    }

    fn latency(&mut self, sponsor: usize) {
        let us = self.rng.range(10, 1000) as u32;
        self.inbox.push_back(Event::Latency { sponsor: sponsor as u8, us }.into());
    }

    /// An answer that a vCPU waits for takes too long.
    pub(crate) fn overdue(&mut self, sponsor: usize) {
        let lanes = &self.nodes[sponsor].lanes[..2];
        let asked = lanes.iter().flat_map(|lane| &lane.requests).filter_map(|r| match *r {
            Request::Fetch { slot, .. } => Some(slot),
            _ => None,
        });
        let held_up = self.nodes[sponsor].held_up.iter().map(|(_, note)| note);
        let replies = lanes.iter().flat_map(|lane| &lane.replies).chain(held_up);
        let answered = replies.filter_map(|note| {
            let (Event::Fetched { page, .. } | Event::FetchFailed { page, .. }) = note.event else {
                return None;
            };
            Some(self.slot(page))
        });
        let waited = |slot: &usize| self.guest.is_waited_on(*slot);
        let late: Vec<usize> = asked.chain(answered).filter(waited).collect();
        for slot in late.into_iter().take(4) {
            let (page, sponsor) = (self.page(slot), sponsor as u8);
            self.inbox.push_back(Event::Late { page, sponsor }.into());
        }
    }

    /// A sponsor that is down for a while is given up, if only for now.
    fn give_up(&mut self, sponsor: usize) {
        let node = &self.nodes[sponsor];
        if !node.up && self.tick >= node.down_since + AWAY_TICKS {
            self.stats.mark(Mark::SponsorLost);
            self.inbox.push_back(Event::SponsorLost { sponsor: sponsor as u8 }.into());
        }
    }

    fn leaving(&mut self, sponsor: usize) {
        let leaving = !self.nodes[sponsor].leaving;
        self.nodes[sponsor].leaving = leaving;
        self.stats.mark(Mark::Leaving);
        self.inbox.push_back(Event::SponsorLeaving { sponsor: sponsor as u8, leaving }.into());
    }

    fn add_sponsor(&mut self) {
        let moving = self.guest.stopped;
        if self.nodes.len() >= SPONSORS_DRAWN_MAX || self.pager_is_dead() || moving {
            return;
        }
        self.stats.mark(Mark::SponsorAdded);
        let weight = self.rng.range(1, 3) as u32;
        self.added.push(weight);
        self.pager.add_sponsor(weight);
        let spare = self.rng.below(500) as u64;
        let mut node = Node::new(self.params.slots.len(), spare, self.known.len());
        node.machine.broken_fencing = self.nodes[0].machine.broken_fencing;
        node.down_since = self.tick;
        self.nodes.push(node);
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
        self.config.budget_pages = pages;
        self.deliver(Event::SetBudget { pages }.into())
    }

    /// The owner before the last takeover is not dead, and does not know that it lost the region.
    fn old_owner(&mut self, sponsor: usize, slot: usize) -> Check {
        let node = &mut self.nodes[sponsor];
        if !node.alive || node.epoch == Epoch(0) {
            return Ok(());
        }
        let page = heca_types::PageIndex(self.params.slots[slot]);
        let old = Epoch(node.epoch.0 - 1);
        let version = node.store[slot].map_or(PageVersion(1), |stored| stored.version);
        let new = (PageVersion(u32::MAX / 2), 0xdead_0000 + self.tick);
        let quota = node.store.len() as u64;
        let mut done = [
            ("a read", node.read(old, page, slot, version) != Err(FetchError::Refused)),
            ("a copy", node.start_pull(old, page, slot, new.0) != PullStart::Refused),
            ("a write", node.write(old, page, slot, new).is_ok()),
            ("an open", node.machine.open(self.tick, &open_request(1, old, quota)).is_ok()),
            ("a renewal", node.machine.renew(self.tick, region_id(1), old).is_ok()),
            ("a release", false),
            ("a close", false),
        ];
        done[5].1 = node.release(self.tick, old, page.extent(), &self.params.slots).is_ok();
        done[6].1 = node.machine.close(region_id(1), old, owner(1)).is_ok();
        let takeover = node.epoch > EPOCH_FIRST;
        self.note(page, What::Zombie { sponsor: sponsor as u8 });
        for (what, done) in done {
            self.check_refused(page, what, !done)?;
        }
        self.stats.mark(Mark::ZombieRefused);
        if takeover {
            self.stats.mark(Mark::Takeover);
        }
        Ok(())
    }

    /// Other owners open and close regions, and forget them.
    fn other_region(&mut self, sponsor: usize) -> Check {
        if !self.nodes[sponsor].alive {
            return Ok(());
        }
        let now_ms = self.tick;
        let number = 2 + self.rng.below(OTHER_REGIONS) as u8;
        let machine = &mut self.nodes[sponsor].machine;
        if self.rng.one_in(4) {
            // A region that is not there is refused, which is as good.
            let _ = machine.close(region_id(number), EPOCH_FIRST, owner(number));
        } else {
            let mut request = open_request(number, EPOCH_FIRST, self.rng.below(400) as u64);
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
        Event::Fetched { page, .. } | Event::FetchFailed { page, .. } => {
            Event::FetchFailed { page, sponsor, error: FetchError::Lost }
        }
        Event::Stored { page, version, .. } => Event::StoreFailed { page, version, sponsor },
        Event::Held { extent, .. } => Event::Held { extent, sponsor, ok: false },
        Event::Pulled { page, attempt, .. } => Event::Pulled { page, attempt, ok: false },
        other => other,
    }
}
