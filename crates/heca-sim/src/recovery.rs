//! The pager dies at any point, and another one goes on where it ended.

use std::collections::VecDeque;

use heca_core::pager::{Action, Event, Install, Pager};
use heca_types::{Epoch, ExtentIndex, PageVersion};

use crate::evictor::Evictor;
use crate::history::What;
use crate::network::{Pulling, Request};
use crate::oracle::{Check, fail};
use crate::report::{Mark, SIM_1};
use crate::world::World;

/// Ticks that a pager may be dead for.
const DEAD_TICKS_MAX: usize = 400;
/// What a torn page looks like.
const TORN: u64 = 0xbad0_bad0;

/// What outlives a pager, beside the RAM file.
#[derive(Debug)]
pub(crate) struct Journal {
    /// Newest version of each page that was written down.
    pub(crate) versions: Vec<PageVersion>,
    /// Pages that were dropped, and not brought back since.
    pub(crate) dropped: Vec<bool>,
    /// Record of each extent.
    pub(crate) extents: Vec<u64>,
    /// Pages that are with the region's former owner.
    pub(crate) behind: Vec<bool>,
    /// The page that is being written into the RAM file.
    pub(crate) filling: Option<usize>,
}

impl Journal {
    pub(crate) fn new(slots: usize, extents: usize) -> Self {
        let versions = vec![PageVersion::NEVER; slots];
        Self {
            versions,
            dropped: vec![false; slots],
            extents: vec![0; extents],
            behind: vec![false; slots],
            filling: None,
        }
    }
}

impl World {
    pub(crate) fn pager_is_dead(&self) -> bool {
        self.dead_until.is_some()
    }

    /// The pager dies now, or amid the actions of one of its next steps.
    pub(crate) fn let_pager_crash(&mut self) {
        if self.pager_is_dead() {
            return;
        }
        if self.rng.one_in(3) {
            self.pager_crashes();
        } else {
            self.actions_left = Some(self.rng.below(30));
        }
    }

    /// Counts down to the crash. `next` is the action that is about to be carried out.
    pub(crate) fn dies_at(&mut self, next: Option<Action>) -> bool {
        if self.actions_left.is_none() {
            return false;
        }
        // Points of which there are few.
        let rare = matches!(next, Some(Action::Fill { .. } | Action::Extent { .. }));
        if rare && self.rng.one_in(2) {
            self.actions_left = Some(0);
        }
        match &mut self.actions_left {
            None | Some(0) => {}
            Some(left) => {
                *left -= 1;
                return false;
            }
        }
        self.stats.mark(Mark::CrashAmidActions);
        if let Some(Action::Fill { page }) = next {
            let slot = self.slot(page);
            if self.kernel.frame(slot).content.is_none() {
                self.kernel.install(slot, Install::Fill, TORN, true);
                self.journal.filling = Some(slot);
            }
        }
        self.pager_crashes();
        true
    }

    pub(crate) fn pager_crashes(&mut self) {
        self.actions_left = None;
        if self.migration_loses_pager() {
            return;
        }
        self.mark_crash();
        self.note(None, What::PagerCrashed);
        self.stats.add_counters(self.pager.counters());
        self.evictor = Evictor::default();
        self.taken.clear();
        self.inbox.clear();
        self.oracle.fetching.fill(0);
        self.oracle.spoilt.fill(false);
        self.oracle.failed.fill(0);
        for sponsor in 0..self.nodes.len() {
            let node = &mut self.nodes[sponsor];
            node.up = false;
            node.down_since = self.tick;
            node.held_up.clear();
            let pulling = std::mem::take(&mut node.pulling);
            let lanes = std::mem::take(&mut node.lanes);
            let requests = lanes.into_iter().flat_map(|lane| lane.requests);
            node.late.extend(requests.map(|request| (self.epoch, request)));
            self.keep_pulls(sponsor, pulling);
        }
        self.dead_until = Some(self.tick + self.rng.below(DEAD_TICKS_MAX) as u64);
    }

    /// What was read at a source may still be written, for whoever asked for it.
    pub(crate) fn keep_pulls(&mut self, sponsor: usize, pulling: VecDeque<Pulling>) {
        let writes = pulling.into_iter().filter_map(|pull| {
            let Pulling { slot, version, epoch, value, .. } = pull;
            value.map(|value| (epoch, Request::Store { slot, version, value }))
        });
        self.nodes[sponsor].late.extend(writes);
    }

    fn mark_crash(&mut self) {
        self.stats.mark(Mark::PagerCrash);
        let punching = self.evictor.punching();
        let stores = |r: &Request| matches!(r, Request::Store { .. });
        let mut requests =
            self.nodes.iter().flat_map(|node| &node.lanes).flat_map(|lane| &lane.requests);
        let seen = [
            (Mark::CrashWhileUnmapping, self.evictor.is_unmapping()),
            (Mark::CrashWhileStoring, requests.any(stores)),
            (Mark::CrashWithStandby, self.pager.gauges().standby_pages > punching as u64),
            (Mark::CrashWhilePunching, punching > 0),
            (Mark::CrashWhileFetching, self.oracle.fetching.iter().any(|&mask| mask != 0)),
            (Mark::CrashWhileFilling, self.journal.filling.is_some()),
            (Mark::CrashWhileMoving, self.pager.is_rebuilding()),
        ];
        for (mark, _) in seen.into_iter().filter(|&(_, seen)| seen) {
            self.stats.mark(mark);
        }
    }

    /// A new pager takes over.
    pub(crate) fn recover(&mut self) -> Check {
        self.dead_until = None;
        self.epoch = Epoch(self.epoch.0 + 1);
        self.note(None, What::Recovered { epoch: self.epoch.0 });
        // What the sponsors told the dead pager was not heard.
        self.inbox.clear();
        if let Some(slot) = self.journal.filling.take() {
            self.kernel.punch(slot);
        }
        self.pager = Pager::new(self.config.clone());
        for &weight in &self.added {
            self.pager.add_sponsor(weight);
        }
        for number in 0..self.journal.extents.len() {
            let extent = ExtentIndex(number as u32);
            if let Err(error) = self.pager.adopt_extent(extent, self.journal.extents[number]) {
                return fail(SIM_1, None, error.to_string());
            }
            let adopted = (self.pager.layout().replicas(extent), self.pager.stale(extent));
            if adopted != self.known[number] {
                let detail = format!("{adopted:?} adopted, {:?} written", self.known[number]);
                return fail(SIM_1, None, detail);
            }
        }
        for slot in 0..self.params.slots.len() {
            let (page, version) = (self.page(slot), self.journal.versions[slot]);
            if self.journal.behind[slot] {
                self.pager.adopt_behind(page, version);
            } else if self.kernel.frame(slot).content.is_some() {
                self.journal.dropped[slot] = false;
                self.pager.adopt_resident(page, version);
            } else {
                self.pager.adopt_absent(page, version, self.journal.dropped[slot]);
            }
        }
        self.oracle.adopted(self.pager.gauges().local_pages);
        self.receivers_start();
        self.guest.wake_all();
        self.meet_sponsors()?;
        for number in 0..self.known.len() {
            self.check_complete_replicas(ExtentIndex(number as u32))?;
        }
        Ok(())
    }

    pub(crate) fn meet_sponsors(&mut self) -> Check {
        let first = self.params.sponsor_weights.len();
        for sponsor in 0..self.nodes.len() {
            let name = sponsor as u8;
            let untold = self.nodes[sponsor].emptied_untold;
            let reached = self.nodes[sponsor].alive && !self.rng.one_in(6) && !untold;
            if reached && self.connect(sponsor) {
                if sponsor >= first {
                    self.inbox.push_back(Event::SponsorUp { sponsor: name }.into());
                }
            } else {
                self.nodes[sponsor].missed.fill(true);
                self.deliver(Event::SponsorDown { sponsor: name }.into())?;
                if untold {
                    self.deliver(Event::SponsorEmptied { sponsor: name }.into())?;
                }
            }
            if self.nodes[sponsor].leaving {
                let event = Event::SponsorLeaving { sponsor: name, leaving: true };
                self.inbox.push_back(event.into());
            }
        }
        Ok(())
    }
}
