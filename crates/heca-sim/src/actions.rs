//! What the pager's shell does with actions: it is not under test, and as simple as its contract.

use heca_core::pager::{Action, Event, FetchClass, FetchError, Install, InstallResult};
use heca_types::{PageIndex, PageVersion};

use crate::evictor::Victim;
use crate::network::{LANES, Request};
use crate::oracle::Failure;
use crate::params::Rates;
use crate::world::World;

impl World {
    /// Carries out an action; says what the kernel answered if it was an install action.
    pub(crate) fn execute(
        &mut self,
        step: u64,
        action: Action,
        reply: u64,
    ) -> Result<Option<(Install, InstallResult)>, Failure> {
        let page = action_page(action);
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
                self.kernel.poison(slot);
                self.guest.wake(slot);
                None
            }
            Action::Unmap { version, dirty, replicas, .. } => {
                let victim = Victim { page, version, dirty, replicas, outcome: None, value: 0 };
                self.evictor.unmap(step, victim);
                None
            }
            Action::Punch { .. } => {
                self.evictor.punch(page);
                None
            }
            Action::Fetch { version, sponsor, class, .. } => {
                self.check_fetch(page, sponsor)?;
                self.send_fetch(page, version, sponsor, class);
                None
            }
        })
    }

    fn install(&mut self, slot: usize, what: Install, value: u64, protect: bool) -> InstallResult {
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
                self.oracle.spoilt[slot] = false;
                self.oracle.failed[slot] = 0;
            }
            self.wake_after(slot, what);
        }
        result
    }

    fn send_fetch(
        &mut self,
        page: PageIndex,
        version: PageVersion,
        sponsor: u8,
        class: FetchClass,
    ) {
        let slot = self.slot(page);
        let node = &mut self.nodes[usize::from(sponsor)];
        if node.up {
            let lane = class as usize;
            debug_assert!(lane < LANES - 1);
            node.lanes[lane].requests.push_back(Request::Fetch { slot, version });
        } else {
            let error = FetchError::Lost;
            self.inbox.push_back(Event::FetchFailed { page, sponsor, error }.into());
        }
    }
}

pub(crate) fn event_page(event: Event) -> Option<PageIndex> {
    match event {
        Event::Fault { page, .. }
        | Event::Fetched { page }
        | Event::FetchFailed { page, .. }
        | Event::Installed { page, .. }
        | Event::Unmapped { page, .. }
        | Event::Stored { page, .. }
        | Event::StoreFailed { page, .. }
        | Event::Punched { page, .. } => Some(page),
        Event::SponsorDown { .. }
        | Event::SponsorUp { .. }
        | Event::SponsorEmptied { .. }
        | Event::SetBudget { .. }
        | Event::Restore
        | Event::Tick => None,
    }
}

pub(crate) fn action_page(action: Action) -> PageIndex {
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
        | Action::Punch { page } => page,
    }
}
