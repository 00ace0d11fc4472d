//! Checks of what the sponsors hold: which replica is good, and whether there are enough.

use heca_core::invariants::{PL_1, RB_1, RB_2};
use heca_core::pager::Event;
use heca_types::limits::REPLICAS_MAX;
use heca_types::{ExtentIndex, PageVersion};

use crate::history::What;
use crate::oracle::{Check, fail};
use crate::report::Mark;
use crate::world::World;

/// Ticks in which redundancy must be back.
const REBUILD_TICKS: u64 = 200_000;

impl World {
    /// Whether nobody needs a sponsor for the page.
    pub(crate) fn is_local(&self, slot: usize) -> bool {
        // What is torn goes as soon as somebody looks.
        let torn = self.journal.filling == Some(slot);
        self.kernel.frame(slot).content.is_some() && !torn || !self.journal.dropped[slot]
    }

    fn slots_of(&self, extent: ExtentIndex) -> std::ops::Range<usize> {
        let position = |number: u32| {
            self.params
                .slots
                .partition_point(|&page| heca_types::PageIndex(page).extent().0 < number)
        };
        position(extent.0)..position(extent.0 + 1)
    }

    /// Nothing can be said of the page: its owner gave it away, or it is lost.
    fn is_moot(&self, slot: usize) -> bool {
        self.oracle.expected[slot].discarded || self.kernel.frame(slot).poisoned
    }

    /// The pager wrote down another replica set or other gaps.
    pub(crate) fn extent_changed(&mut self, extent: ExtentIndex) -> Check {
        let number = extent.0 as usize;
        self.journal.extents[number] = self.pager.extent_record(extent);
        let (set, stale) = (self.pager.layout().replicas(extent), self.pager.stale(extent));
        let (set_before, stale_before) = std::mem::replace(&mut self.known[number], (set, stale));
        self.note(None, What::Extent { extent: extent.0, set, stale });
        self.check_set(extent)?;
        let members = set.sponsors().iter().fold(0u16, |mask, &s| mask | 1 << s);
        for slot in self.slots_of(extent) {
            self.oracle.fetching[slot] &= members;
        }
        for (sponsor, node) in self.nodes.iter_mut().enumerate() {
            node.missed[number] |= members >> sponsor & 1 == 0;
        }
        for (position, &sponsor) in set.sponsors().iter().enumerate() {
            let node = &mut self.nodes[usize::from(sponsor)];
            // Writes may pass it by once it was caught with a bad page.
            if stale >> position & 1 == 1 && std::mem::take(&mut node.accused[number]) {
                node.missed[number] = true;
            }
            let before = set_before.position(sponsor);
            let was = before.is_some_and(|p| stale_before >> p & 1 == 0);
            if stale >> position & 1 == 0 && !was {
                self.check_complete(extent, sponsor)?;
            }
        }
        if set.count() < set_before.count()
            || set_before.sponsors().iter().any(|&s| members >> s & 1 == 0)
        {
            for slot in self.slots_of(extent) {
                self.check_not_thrown_away(slot, set_before.sponsors())?;
            }
        }
        Ok(())
    }

    /// RB-1: a replica that counts as complete has every page that is nowhere else.
    fn check_complete(&mut self, extent: ExtentIndex, sponsor: u8) -> Check {
        self.stats.checked(RB_1);
        let down =
            |event: Event| matches!(event, Event::SponsorDown { sponsor: s } if s == sponsor);
        let node = &self.nodes[usize::from(sponsor)];
        let unheard = node.emptied_untold || self.inbox.iter().any(|note| down(note.event));
        if !node.up || unheard {
            return Ok(());
        }
        for slot in self.slots_of(extent) {
            if self.is_local(slot) || self.is_moot(slot) {
                continue;
            }
            let value = self.oracle.expected[slot].value;
            if !node.holds(slot, value) && !node.rotten(slot) {
                let detail = format!(
                    "sponsor {sponsor} counts as complete, but has {:?} for {value:#x}",
                    node.store[slot]
                );
                return fail(RB_1, self.page(slot), detail);
            }
        }
        // Before the pager knows that it is up, what is on its way to the others may end without it.
        let up = |event: Event| matches!(event, Event::SponsorUp { sponsor: s } if s == sponsor);
        if !self.inbox.iter().any(|note| up(note.event)) {
            self.nodes[usize::from(sponsor)].missed[extent.0 as usize] = false;
        }
        Ok(())
    }

    /// RB-1 for all replicas of an extent that count as complete.
    pub(crate) fn check_complete_replicas(&mut self, extent: ExtentIndex) -> Check {
        let (set, stale) = self.known[extent.0 as usize];
        for (position, &sponsor) in set.sponsors().iter().enumerate() {
            if stale >> position & 1 == 0 {
                self.check_complete(extent, sponsor)?;
            }
        }
        Ok(())
    }

    /// RB-1: a replica is not given up while it has the only good copy.
    fn check_not_thrown_away(&mut self, slot: usize, before: &[u8]) -> Check {
        let version = self.journal.versions[slot];
        let gone = self.is_local(slot) || self.is_moot(slot) || self.oracle.lost[slot];
        if gone || version == PageVersion::NEVER {
            return Ok(());
        }
        self.stats.checked(RB_1);
        let set = self.pager.layout().replicas(self.page(slot).extent());
        let node = |s: &u8| &self.nodes[usize::from(*s)];
        if set.sponsors().iter().any(|s| node(s).has_good(slot, version)) {
            return Ok(());
        }
        let excuse =
            |s: &u8| node(s).rotten(slot) || node(s).was_emptied(slot) && node(s).emptied_untold;
        if set.sponsors().iter().any(excuse) {
            self.oracle.lost[slot] = true;
            return Ok(());
        }
        if before.iter().any(|s| node(s).has_good(slot, version)) {
            let detail = format!(
                "{:?} are left of {before:?}, and none has version {}",
                set.sponsors(),
                version.0
            );
            return fail(RB_1, self.page(slot), detail);
        }
        Ok(())
    }

    /// Notes that a page is lost if trouble took its last good copy.
    pub(crate) fn recount_lost(&mut self, slot: usize) {
        let version = self.journal.versions[slot];
        if self.is_local(slot) || version == PageVersion::NEVER {
            return;
        }
        let set = self.pager.layout().replicas(self.page(slot).extent());
        let node = |s: &u8| &self.nodes[usize::from(*s)];
        let good = set.sponsors().iter().any(|s| node(s).has_good(slot, version));
        let spoilt =
            set.sponsors().iter().any(|s| node(s).rotten(slot) || node(s).was_emptied(slot));
        self.oracle.lost[slot] |= !good && spoilt;
    }

    /// PL-1.
    pub(crate) fn check_set(&mut self, extent: ExtentIndex) -> Check {
        self.stats.checked(PL_1);
        let set = self.pager.layout().replicas(extent);
        let sponsors = set.sponsors();
        let twice = (1..sponsors.len()).any(|i| sponsors[..i].contains(&sponsors[i]));
        let most = (self.params.replicas + 1).min(REPLICAS_MAX);
        if twice || !(self.params.replicas..=most).contains(&sponsors.len()) {
            return fail(PL_1, None, format!("extent {} sits on {sponsors:?}", extent.0));
        }
        Ok(())
    }

    /// Whether nothing but the pager keeps the extent from its redundancy.
    fn is_rebuildable(&self, extent: ExtentIndex) -> bool {
        let staying = self.nodes.iter().filter(|node| node.up && !node.leaving).count();
        let version = |slot: usize| self.journal.versions[slot];
        let (set, stale) = (self.pager.layout().replicas(extent), self.pager.stale(extent));
        // Without a complete replica it takes two that have gaps.
        let up = |i: &usize| self.nodes[usize::from(set.sponsors()[*i])].up;
        let count = (0..set.sponsors().len()).filter(up).count();
        let complete = (0..set.sponsors().len()).filter(up).any(|i| stale >> i & 1 == 0);
        let node = |s: &u8| &self.nodes[usize::from(*s)];
        staying >= self.params.replicas
            && (complete || count > 1 && stale == set.all())
            && self.slots_of(extent).all(|slot| {
                let has = |s: &u8| node(s).up && node(s).has_good(slot, version(slot));
                let good = version(slot) == PageVersion::NEVER
                    || self.is_local(slot)
                    || set.sponsors().iter().any(has);
                good && !self.is_moot(slot) && !self.oracle.lost[slot]
            })
    }

    fn lacks_redundancy(&self, extent: ExtentIndex) -> bool {
        let (set, stale) = (self.pager.layout().replicas(extent), self.pager.stale(extent));
        let complete = set.sponsors().iter().enumerate().filter(|&(i, &s)| {
            let node = &self.nodes[usize::from(s)];
            stale >> i & 1 == 0 && node.up && !node.leaving
        });
        complete.count() < self.params.replicas
    }

    /// RB-2 and RB-1, for a world without trouble.
    pub(crate) fn wait_for_redundancy(&mut self) -> Check {
        let end = self.tick + REBUILD_TICKS;
        for number in 0..self.known.len() {
            let extent = ExtentIndex(number as u32);
            self.stats.checked(RB_2);
            while self.lacks_redundancy(extent) {
                if !self.is_rebuildable(extent) {
                    self.stats.mark(Mark::NotRebuildable);
                    break;
                }
                if self.tick >= end {
                    let (set, stale) = self.known[number];
                    let detail = format!(
                        "extent {number} sits on {:?}, stale {stale:#b}, {} wanted; up {:?}, \
                         leaving {:?}; rebuilding: {}",
                        set.sponsors(),
                        self.params.replicas,
                        self.nodes.iter().map(|n| u8::from(n.up)).collect::<Vec<_>>(),
                        self.nodes.iter().map(|n| u8::from(n.leaving)).collect::<Vec<_>>(),
                        self.pager.is_rebuilding()
                    );
                    return fail(RB_2, None, detail);
                }
                self.turn()?;
            }
            self.check_complete_replicas(extent)?;
        }
        Ok(())
    }
}
