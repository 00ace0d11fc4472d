//! After the switch: pages come from the source, as the guest asks for them or unasked.

use std::collections::VecDeque;

use heca_core::invariants::MG_3;
use heca_core::pager::{Event, Install, InstallResult, Mutation};
use heca_types::PageIndex;

use crate::history::What;
use crate::migration::Phase;
use crate::oracle::{Check, fail};
use crate::report::Mark;
use crate::world::World;

const PAGES_PER_TURN: usize = 12;
const RECEIVING_MAX: usize = 6;

/// How far a page came that was received.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Claim,
    Write,
    Record,
    Map,
    Tell,
}

#[derive(Debug, Clone, Copy)]
struct Received {
    slot: usize,
    value: u64,
    step: Step,
}

/// The pages that are behind, and the connection that brings them.
#[derive(Debug)]
pub(crate) struct Following {
    /// Whether source and target are connected.
    link: bool,
    /// Pages that the source has not sent yet.
    unsent: Vec<bool>,
    demands: VecDeque<usize>,
    wire: VecDeque<(usize, u64)>,
    received: Vec<Received>,
    /// Pages that a receiver of the target's pager took upon itself.
    claimed: Vec<bool>,
    /// For the checks: pages that were sent since the connection was made, and those that the guest
    /// could see.
    taken: Vec<bool>,
    seen: Vec<bool>,
}

impl Following {
    pub(crate) fn new(slots: usize) -> Self {
        Self {
            link: false,
            unsent: vec![false; slots],
            demands: VecDeque::new(),
            wire: VecDeque::new(),
            received: Vec::new(),
            claimed: vec![false; slots],
            taken: vec![false; slots],
            seen: vec![false; slots],
        }
    }

    pub(crate) fn begin(&mut self, behind: &[bool]) {
        self.link = true;
        self.unsent.copy_from_slice(behind);
        self.claim_rest(behind);
    }

    fn claim_rest(&mut self, behind: &[bool]) {
        for (claimed, behind) in self.claimed.iter_mut().zip(behind) {
            *claimed = !behind;
        }
    }

    fn lose_link(&mut self) {
        self.link = false;
        self.demands.clear();
        self.wire.clear();
        self.taken.fill(false);
    }
}

impl World {
    /// The pager asks the source for a page.
    pub(crate) fn demand(&mut self, slot: usize) {
        let Some(migration) = &mut self.migration else { return };
        if migration.following.link {
            migration.following.demands.push_back(slot);
        } else {
            self.stats.mark(Mark::DemandLost);
        }
    }

    /// The target's pager died, and its receivers with it.
    pub(crate) fn receivers_die(&mut self) {
        let Some(migration) = &mut self.migration else { return };
        let following = &mut migration.following;
        if self.journal.behind.contains(&true) {
            self.stats.mark(Mark::CrashWithPagesBehind);
        }
        if following.received.iter().any(|r| !matches!(r.step, Step::Claim | Step::Write)) {
            self.stats.mark(Mark::CrashAmidArrival);
        }
        following.lose_link();
        following.received.clear();
    }

    /// The next pager: what is not behind is not to be received.
    pub(crate) fn receivers_start(&mut self) {
        if let Some(migration) = &mut self.migration {
            migration.following.claim_rest(&self.journal.behind);
        }
    }

    /// One turn of the source's sender, the connection, and the target's receivers.
    pub(crate) fn following_turn(&mut self) -> Check {
        let rate = self.rates().link_cut;
        let cut = self.rng.one_in(rate);
        let count = self.rng.range(1, PAGES_PER_TURN);
        let Some(migration) = &mut self.migration else { return Ok(()) };
        let following = &mut migration.following;
        if cut && following.link {
            self.stats.mark(Mark::LinkCut);
            if !following.wire.is_empty() {
                self.stats.mark(Mark::LinkCutWithPages);
            }
            following.lose_link();
            self.note(None, What::LinkCut);
            return Ok(());
        }
        match self.rng.below(8) {
            0 => self.connect_link(),
            1 => {
                for _ in 0..count {
                    self.answer_demand()?;
                }
            }
            2 if self.phase() == Some(Phase::Following) => {
                for _ in 0..count {
                    self.push_page()?;
                }
            }
            3 | 4 => (0..count).for_each(|_| self.receive()),
            _ => {
                for _ in 0..2 * count {
                    self.receiver_step()?;
                }
            }
        }
        self.end_following();
        Ok(())
    }

    /// The target tells what is still behind.
    fn connect_link(&mut self) {
        if self.pager_is_dead() {
            return;
        }
        let Some(migration) = &mut self.migration else { return };
        let following = &mut migration.following;
        if !following.link {
            following.link = true;
            following.unsent.copy_from_slice(&self.journal.behind);
            self.inbox.push_back(Event::SourceBack.into());
        }
    }

    fn answer_demand(&mut self) -> Check {
        let Some(migration) = &mut self.migration else { return Ok(()) };
        let Some(slot) = migration.following.demands.pop_front() else { return Ok(()) };
        if migration.following.unsent[slot] {
            self.stats.mark(Mark::DemandAnswered);
            return self.send_behind(slot);
        }
        self.stats.mark(Mark::DemandCrossed);
        Ok(())
    }

    fn push_page(&mut self) -> Check {
        let slots = self.params.slots.len();
        let first = self.rng.below(slots);
        let Some(migration) = &self.migration else { return Ok(()) };
        let following = &migration.following;
        let mut order = (0..slots).map(|i| (first + i) % slots);
        match order.find(|&slot| following.link && following.unsent[slot]) {
            Some(slot) => self.send_behind(slot),
            None => Ok(()),
        }
    }

    /// MG-3, at the source.
    fn send_behind(&mut self, slot: usize) -> Check {
        self.stats.checked(MG_3);
        let page = self.page(slot);
        let Some(migration) = &mut self.migration else { return Ok(()) };
        let Some(source) = &migration.source else { return Ok(()) };
        let value = source.kernel.frame(slot).content.unwrap_or(0);
        let following = &mut migration.following;
        following.unsent[slot] = false;
        if std::mem::replace(&mut following.taken[slot], true) {
            return fail(MG_3, page, "sent twice over one connection".into());
        }
        following.wire.push_back((slot, value));
        self.note(page, What::SentBehind { value });
        Ok(())
    }

    /// A page is there in full. Pages come over more than one connection: not all in order.
    fn receive(&mut self) {
        if self.pager_is_dead() {
            return;
        }
        let chosen = self.rng.below(3);
        let Some(migration) = &mut self.migration else { return };
        let following = &mut migration.following;
        if following.received.len() >= RECEIVING_MAX || following.wire.is_empty() {
            return;
        }
        let chosen = chosen.min(following.wire.len() - 1);
        if let Some((slot, value)) = following.wire.remove(chosen) {
            following.received.push(Received { slot, value, step: Step::Claim });
        }
    }

    fn receiver_step(&mut self) -> Check {
        let late = self.config.mutation == Some(Mutation::ArriveLate);
        let dead = self.pager_is_dead();
        let Some(migration) = &mut self.migration else { return Ok(()) };
        let following = &mut migration.following;
        if following.received.is_empty() || dead {
            return Ok(());
        }
        let chosen = self.rng.below(following.received.len());
        let Received { slot, value, step } = following.received[chosen];
        let page = PageIndex(self.params.slots[slot]);
        let mut next = None;
        match step {
            Step::Claim => {
                if std::mem::replace(&mut following.claimed[slot], true) {
                    self.stats.mark(Mark::ArrivedTwice);
                } else {
                    next = Some(Step::Write);
                }
            }
            Step::Write if self.memory_full => next = Some(Step::Write),
            Step::Write => {
                self.stats.checked(MG_3);
                if following.seen[slot] {
                    let detail = "brought again, after the guest could see it".into();
                    return fail(MG_3, page, detail);
                }
                self.kernel.write(slot, value);
                self.note(page, What::BroughtBehind { value });
                next = Some(if late { Step::Map } else { Step::Record });
            }
            Step::Record => {
                self.journal.behind[slot] = false;
                next = Some(if late { Step::Tell } else { Step::Map });
            }
            Step::Map => {
                following.seen[slot] = true;
                self.map_arrived(slot);
                next = Some(if late { Step::Record } else { Step::Tell });
            }
            Step::Tell => self.inbox.push_back(Event::Arrived { page }.into()),
        }
        let Some(migration) = &mut self.migration else { return Ok(()) };
        let received = &mut migration.following.received;
        match next {
            Some(step) => received[chosen].step = step,
            None => {
                received.swap_remove(chosen);
            }
        }
        Ok(())
    }

    /// If it cannot be mapped right now, the machine will see to it when somebody wants it.
    fn map_arrived(&mut self, slot: usize) {
        let rate = self.rates().again;
        if self.rng.one_in(rate) {
            return;
        }
        let result = self.kernel.install(slot, Install::Continue, 0, false);
        if result == InstallResult::Ok {
            self.guest.wake(slot);
        }
    }

    /// Nothing is behind any more: the source is needed no longer.
    fn end_following(&mut self) {
        if self.phase() != Some(Phase::Following) || self.pager_is_dead() {
            return;
        }
        let Some(migration) = &self.migration else { return };
        let following = &migration.following;
        if following.received.is_empty() && self.pager.gauges().behind_pages == 0 {
            self.migration = None;
            self.stats.mark(Mark::MigrationDone);
            self.note(None, What::MigrationEnds { moved: true });
        }
    }
}
