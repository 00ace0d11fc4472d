//! The checks. Each knows only what the fake world did, not what the machines believe.

use heca_core::invariants::{EP_1, Invariant, PG_1, PG_2, PG_3, PG_4, PG_5, PG_6, PL_2};
use heca_core::pager::Event;
use heca_types::{ExtentIndex, PageIndex};

use crate::guest::Vcpu;
use crate::world::World;

/// A broken invariant, before it is dressed up for people.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) invariant: Invariant,
    pub(crate) page: Option<PageIndex>,
    pub(crate) detail: String,
}

pub(crate) type Check = Result<(), Failure>;

pub(crate) fn fail(
    invariant: Invariant,
    page: impl Into<Option<PageIndex>>,
    detail: String,
) -> Check {
    Err(Failure { invariant, page: page.into(), detail })
}

/// What a guest may read from a page.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Expected {
    pub(crate) value: u64,
    /// Content before the owner discarded the page. Until the next write either may be read: the
    /// pager does not learn of discards, and an owner must not rely on what it gave away.
    pub(crate) before_discard: Option<u64>,
    /// The owner discarded it, and did not write to it since.
    pub(crate) discarded: bool,
}

impl Expected {
    pub(crate) fn allows(self, value: u64) -> bool {
        value == self.value || self.before_discard == Some(value)
    }
}

/// Memory of the checks.
#[derive(Debug)]
pub(crate) struct Oracle {
    pub(crate) expected: Vec<Expected>,
    /// Sponsors that were asked for each page since it was last brought in and did not answer.
    pub(crate) fetching: Vec<u16>,
    /// Fetches of this page were spoilt since it was last brought in.
    pub(crate) spoilt: Vec<bool>,
    /// Sponsors that answered a fetch of this page with an error since it was last brought in: the
    /// pager may count on them no longer.
    pub(crate) failed: Vec<u16>,
    /// All copies of this page were spoilt: poisoning it is right.
    pub(crate) lost: Vec<bool>,
    /// PG-6: local pages may not exceed this. It is the budget or, after that was lowered, what
    /// there was; and it only shrinks until it is the budget again.
    ceiling: u64,
    local: u64,
    /// The region is being handed over: the budget does not bind, and nothing may be evicted.
    pub(crate) frozen: bool,
}

impl Oracle {
    pub(crate) fn new(slots: usize, budget: u64) -> Self {
        Self {
            expected: vec![Expected::default(); slots],
            fetching: vec![0; slots],
            spoilt: vec![false; slots],
            failed: vec![0; slots],
            lost: vec![false; slots],
            ceiling: budget,
            local: 0,
            frozen: false,
        }
    }

    /// Exchanges what is known of a pager; what the guest wrote stays.
    pub(crate) fn swap_host(&mut self, other: &mut Self) {
        use std::mem::swap;
        swap(&mut self.fetching, &mut other.fetching);
        swap(&mut self.spoilt, &mut other.spoilt);
        swap(&mut self.failed, &mut other.failed);
        swap(&mut self.ceiling, &mut other.ceiling);
        swap(&mut self.local, &mut other.local);
        swap(&mut self.frozen, &mut other.frozen);
    }

    /// What was there before the pager may exceed the budget, too.
    pub(crate) fn adopted(&mut self, local: u64) {
        self.frozen = false;
        self.local = local;
        self.ceiling = self.ceiling.max(local);
    }
}

impl World {
    /// PG-1.
    pub(crate) fn check_read(&mut self, slot: usize, value: u64) -> Check {
        self.stats.reads_checked += 1;
        self.stats.checked(PG_1);
        let expected = self.oracle.expected[slot];
        if expected.allows(value) {
            return Ok(());
        }
        let detail = format!("the guest read {value:#x}, it had written {:#x}", expected.value);
        fail(PG_1, self.page(slot), detail)
    }

    /// PG-1: a page is given up only if every copy of it was spoilt.
    pub(crate) fn check_poison(&mut self, page: PageIndex) -> Check {
        self.stats.checked(PG_1);
        let slot = self.slot(page);
        if self.oracle.lost[slot] || self.oracle.expected[slot].discarded {
            return Ok(());
        }
        fail(PG_1, page, "poisoned although a good copy of it exists".into())
    }

    /// PG-2, just before the page goes.
    pub(crate) fn check_before_drop(&mut self, page: PageIndex) -> Check {
        self.stats.checked(PG_2);
        let slot = self.slot(page);
        // A hole: the owner discarded the page, nothing is lost.
        let Some(value) = self.kernel.frame(slot).content else {
            return Ok(());
        };
        let set = self.pager.layout().replicas(page.extent());
        let (mut holders, mut spoilt) = (0, false);
        for &sponsor in set.sponsors() {
            let node = &self.nodes[usize::from(sponsor)];
            if node.rotten(slot) || node.was_emptied(slot) {
                spoilt = true;
            } else if node.holds(slot, value) {
                holders += 1;
            } else if node.up && !node.missed[page.extent().0 as usize] {
                let detail = format!("{value:#x} is dropped, but sponsor {sponsor} lacks it");
                return fail(PG_2, page, detail);
            }
        }
        // A sponsor that just lost the only copy may not have told yet.
        if holders == 0 && !spoilt {
            return fail(PG_2, page, format!("{value:#x} is dropped, but no sponsor has it"));
        }
        self.oracle.lost[slot] = holders == 0;
        Ok(())
    }

    /// PG-3.
    pub(crate) fn check_fetch(&mut self, page: PageIndex, sponsor: u8) -> Check {
        self.stats.checked(PG_3);
        let slot = self.slot(page);
        // One that is in the set no longer does not count.
        let set = self.pager.layout().replicas(page.extent());
        let members = set.sponsors().iter().fold(0u16, |mask, &s| mask | 1 << s);
        let asked = self.oracle.fetching[slot] & members;
        self.oracle.fetching[slot] = asked | 1 << sponsor;
        if asked >> sponsor & 1 == 1 {
            return fail(PG_3, page, format!("sponsor {sponsor} is asked twice"));
        }
        if asked.count_ones() > 1 {
            let detail = format!("sponsor {sponsor} is asked, and {asked:#b} did not answer yet");
            return fail(PG_3, page, detail);
        }
        Ok(())
    }

    /// PG-6, after each step of the pager.
    pub(crate) fn check_budget(&mut self, event: Event) -> Check {
        self.stats.checked(PG_6);
        let gauges = self.pager.gauges();
        if let Event::Freeze { on } = event {
            self.oracle.frozen = on;
        }
        if matches!(event, Event::SetBudget { .. } | Event::Restore | Event::Freeze { .. }) {
            self.oracle.ceiling = self.oracle.local;
        }
        if self.oracle.frozen {
            self.oracle.ceiling = gauges.local_pages;
        }
        let ceiling = self.oracle.ceiling.max(gauges.budget_pages);
        let local = gauges.local_pages;
        if local > ceiling {
            let budget = gauges.budget_pages;
            let detail = format!("{local} local pages; budget {budget}, at most {ceiling} allowed");
            return fail(PG_6, None, detail);
        }
        self.oracle.local = local;
        self.oracle.ceiling = ceiling.min(local).max(gauges.budget_pages);
        let present = self.kernel.present();
        if present > local {
            let detail = format!("{present} pages are in memory, the pager counts {local}");
            return fail(PG_6, None, detail);
        }
        let sum = local + gauges.remote_pages + gauges.untouched_pages + gauges.poisoned_pages;
        if sum != gauges.pages {
            let detail = format!("{} pages, but their states add up to {sum}", gauges.pages);
            return fail(PG_6, None, detail);
        }
        Ok(())
    }

    /// PG-4 and PG-5, for a world that had its time to come to rest.
    pub(crate) fn check_no_waiters(&mut self) -> Check {
        self.stats.checked(PG_4);
        self.stats.checked(PG_5);
        let blocked = self.guest.vcpus.iter().find_map(Vcpu::blocked_on);
        let Some(slot) = blocked else { return Ok(()) };
        let gauges = self.pager.gauges();
        let known = gauges.stalled_faults + gauges.blocked_faults != 0;
        let page = self.page(slot);
        if self.is_idle() && !known {
            return fail(PG_4, page, "a vCPU waits, and nothing is under way for it".into());
        }
        fail(PG_5, page, format!("a vCPU still waits after the world healed: {gauges:?}"))
    }

    /// PG-1 for all pages, after they were brought home.
    pub(crate) fn check_all_home(&mut self) -> Check {
        for slot in 0..self.params.slots.len() {
            let frame = *self.kernel.frame(slot);
            if !frame.poisoned {
                self.check_read(slot, frame.content.unwrap_or(0))?;
            }
        }
        Ok(())
    }

    /// PL-1 at the beginning.
    pub(crate) fn check_layout(&mut self) -> Check {
        (0..self.known.len()).try_for_each(|number| self.check_set(ExtentIndex(number as u32)))
    }

    /// PL-2, after each request that may change what a sponsor promised.
    pub(crate) fn check_offer(&mut self, sponsor: usize) -> Check {
        self.stats.checked(PL_2);
        let machine = &self.nodes[sponsor].machine;
        let promised: u64 = machine.regions().map(|(_, region)| region.quota_bytes).sum();
        let (reserved, offer) = (machine.reserved_bytes(), machine.offer_bytes());
        if reserved > offer || promised != reserved {
            let detail = format!(
                "sponsor {sponsor} offers {offer} bytes, counts {reserved}, promised {promised}"
            );
            return fail(PL_2, None, detail);
        }
        Ok(())
    }

    /// EP-1, with the sponsor's answer to an old owner.
    pub(crate) fn check_refused(
        &mut self,
        page: impl Into<Option<PageIndex>>,
        what: &str,
        refused: bool,
    ) -> Check {
        self.stats.checked(EP_1);
        if refused {
            return Ok(());
        }
        fail(EP_1, page, format!("a sponsor carried out {what} of an old owner"))
    }
}
