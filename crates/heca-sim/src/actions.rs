//! What the pager's shell does with actions: it is not under test, and as simple as its contract.

use heca_core::pager::{Action, Event, Install, InstallResult};
use heca_types::PageIndex;

use crate::evictor::Victim;
use crate::network::{CONTROL, LANES, PULLS, Request};
use crate::oracle::{Check, Failure, fail};
use crate::params::Rates;
use crate::report::{Mark, SIM_1};
use crate::world::World;

impl World {
    /// Carries out an action; says what the kernel answered if it was an install action.
    pub(crate) fn execute(
        &mut self,
        step: u64,
        action: Action,
        reply: u64,
    ) -> Result<Option<(Install, InstallResult)>, Failure> {
        self.check_frozen(action)?;
        match action {
            Action::Extent { extent } => {
                self.extent_changed(extent)?;
                return Ok(None);
            }
            Action::Hold { extent, sponsor } => {
                self.send(sponsor, CONTROL, Request::Hold { extent });
                return Ok(None);
            }
            Action::Release { extent, sponsor } => {
                self.send(sponsor, CONTROL, Request::Release { extent });
                return Ok(None);
            }
            _ => {}
        }
        let Some(page) = action_page(action) else { return Ok(None) };
        let slot = self.slot(page);
        let mut install = |what, protect| Some((what, self.install(slot, what, reply, protect)));
        Ok(match action {
            Action::Copy { .. } => install(Install::Copy, true),
            Action::Fill { .. } => install(Install::Fill, true),
            Action::Zero { .. } => install(Install::Zero, false),
            Action::Continue { protect, .. } => install(Install::Continue, protect),
            Action::Unprotect { .. } => install(Install::Unprotect, false),
            Action::Wake { .. } => {
                self.guest.wake(slot);
                None
            }
            Action::Poison { .. } => {
                self.check_poison(page)?;
                self.oracle.fetching[slot] = 0;
                self.kernel.poison(slot);
                self.guest.wake(slot);
                None
            }
            Action::Unmap { version, dirty, sponsors, .. } => {
                self.journal.versions[slot] = version;
                self.journal.dropped[slot] = false;
                let victim = Victim { page, version, dirty, sponsors, outcome: None, value: 0 };
                self.evictor.unmap(step, victim);
                None
            }
            Action::Punch { version, zero, .. } => {
                self.journal.versions[slot] = version;
                self.journal.dropped[slot] = !zero;
                self.evictor.punch(page);
                None
            }
            Action::Fetch { version, sponsor, class, .. } => {
                self.check_fetch(page, sponsor)?;
                self.send(sponsor, class as usize, Request::Fetch { slot, version });
                None
            }
            Action::Pull { version, from, to, attempt, .. } => {
                self.note_pull(slot, from, attempt);
                self.send(to, PULLS, Request::Pull { slot, version, from, attempt });
                None
            }
            Action::Demand { .. } => {
                self.demand(slot);
                None
            }
            Action::Extent { .. } | Action::Hold { .. } | Action::Release { .. } => None,
        })
    }

    /// Nothing that the next owner was told of changes, here or at the sponsors.
    fn check_frozen(&self, action: Action) -> Check {
        if !self.oracle.frozen {
            return Ok(());
        }
        let changes = match action {
            Action::Unmap { .. }
            | Action::Punch { .. }
            | Action::Pull { .. }
            | Action::Hold { .. } => true,
            Action::Release { extent, sponsor } => self.is_told(extent, sponsor),
            _ => false,
        };
        if changes {
            return fail(SIM_1, action_page(action), format!("{action:?} while being handed over"));
        }
        Ok(())
    }

    fn install(&mut self, slot: usize, what: Install, value: u64, protect: bool) -> InstallResult {
        if matches!(what, Install::Copy | Install::Fill) {
            // An answer is used: this attempt to fetch the page is over.
            self.oracle.fetching[slot] = 0;
        }
        let Rates { again, no_memory, .. } = *self.rates();
        // `Fill` is a plain write to the file, and lifting protection needs no memory.
        if what != Install::Fill && self.rng.one_in(again) {
            return InstallResult::Again;
        }
        let allocates = matches!(what, Install::Copy | Install::Fill | Install::Zero);
        let full = self.memory_full && allocates && self.kernel.frame(slot).content.is_none();
        if full || (what != Install::Unprotect && self.rng.one_in(no_memory)) {
            return InstallResult::NoMemory;
        }
        let result = self.kernel.install(slot, what, value, protect);
        if result == InstallResult::Ok {
            if matches!(what, Install::Copy | Install::Fill) {
                self.journal.dropped[slot] = false;
                self.oracle.lost[slot] = false;
                self.oracle.spoilt[slot] = false;
                self.oracle.failed[slot] = 0;
            }
            if matches!(what, Install::Copy | Install::Fill | Install::Zero) {
                self.track_install(slot);
            }
            self.wake_after(slot, what);
        }
        result
    }

    /// Sends a request, or says that it is lost if there is no connection.
    fn send(&mut self, sponsor: u8, lane: usize, request: Request) {
        let node = &mut self.nodes[usize::from(sponsor)];
        if node.up {
            debug_assert!(lane < LANES);
            node.lanes[lane].requests.push_back(request);
        } else {
            self.lose_request(sponsor, request);
        }
    }

    /// Notes when a page is asked for from another source after the first one had nothing.
    fn note_pull(&mut self, slot: usize, from: u8, attempt: u32) {
        let before = self.pulled_from[slot].replace((from, attempt));
        if before.is_some_and(|(other, of)| of == attempt && other != from) {
            self.stats.mark(Mark::SourceSwitched);
        }
    }
}

pub(crate) fn event_page(event: Event) -> Option<PageIndex> {
    match event {
        Event::Fault { page, .. }
        | Event::Fetched { page, .. }
        | Event::Late { page, .. }
        | Event::FetchFailed { page, .. }
        | Event::Installed { page, .. }
        | Event::Unmapped { page, .. }
        | Event::Stored { page, .. }
        | Event::StoreFailed { page, .. }
        | Event::Pulled { page, .. }
        | Event::Arrived { page }
        | Event::Punched { page, .. } => Some(page),
        Event::SponsorDown { .. }
        | Event::SponsorUp { .. }
        | Event::SponsorEmptied { .. }
        | Event::SponsorLost { .. }
        | Event::SponsorSuspect { .. }
        | Event::SponsorLeaving { .. }
        | Event::Latency { .. }
        | Event::Held { .. }
        | Event::SetBudget { .. }
        | Event::Restore
        | Event::SourceBack
        | Event::Flush { .. }
        | Event::Freeze { .. }
        | Event::Work
        | Event::Tick => None,
    }
}

pub(crate) fn action_page(action: Action) -> Option<PageIndex> {
    match action {
        Action::Fetch { page, .. }
        | Action::Copy { page }
        | Action::Fill { page }
        | Action::Zero { page }
        | Action::Continue { page, .. }
        | Action::Unprotect { page }
        | Action::Wake { page }
        | Action::Poison { page }
        | Action::Unmap { page, .. }
        | Action::Pull { page, .. }
        | Action::Demand { page }
        | Action::Punch { page, .. } => Some(page),
        Action::Extent { .. } | Action::Hold { .. } | Action::Release { .. } => None,
    }
}
