//! Pages get into the process: what the kernel is told, and what follows from its answers.

use std::time::Duration;

use heca_core::pager::{Action, Event, Install, InstallResult};
use heca_sys::uffd::ResolveError;
use heca_types::PageIndex;
use heca_types::limits::PAGE_BYTES;

use super::super::pidfd_ends;
use super::super::remote::chain;
use super::super::start::DROPPED;
use super::Engine;

/// How many of the actions, from the first one on, map neighbouring pages in the same way; at least
/// one.
pub(super) fn run_of(actions: &[Action]) -> usize {
    let continues = |pair: &[Action]| match pair {
        [
            Action::Continue { page: first, protect: a },
            Action::Continue { page: second, protect: b },
        ] => first.0 + 1 == second.0 && a == b,
        _ => false,
    };
    1 + actions.windows(2).take_while(|pair| continues(pair)).count()
}

impl Engine {
    /// Maps neighbouring pages that are in the RAM file, by as few calls as it takes.
    pub(super) fn map_run(&mut self, run: &[Action]) {
        let mut rest = run;
        while let Some(&action) = rest.first() {
            let Action::Continue { page, protect } = action else { return };
            let len = (rest.len() * PAGE_BYTES) as u64;
            let address = self.context.target.address(page);
            let (mut done, mut outcome) = self.context.uffd.map_run(address, len, protect);
            // So says the kernel of a run over two mappings, too.
            if matches!((done, &outcome), (0, Err(ResolveError::Gone))) && rest.len() > 1 {
                (done, outcome) = self.context.uffd.map_run(address, PAGE_BYTES as u64, protect);
            }
            let (mapped, more) = rest.split_at(done as usize / PAGE_BYTES);
            for (&action, number) in mapped.iter().zip(page.0..) {
                self.installed(action, PageIndex(number), Install::Continue, Ok(()));
            }
            rest = more;
            // Where some were mapped, the kernel says why it stopped at the next attempt.
            if let (true, Some((&action, more))) = (mapped.is_empty(), rest.split_first()) {
                self.installed(action, page, Install::Continue, outcome);
                rest = more;
            }
        }
    }

    /// What follows from an install action that was carried out.
    pub(super) fn installed(
        &mut self,
        action: Action,
        page: PageIndex,
        what: Install,
        result: Result<(), ResolveError>,
    ) {
        if result.is_ok() && matches!(what, Install::Copy | Install::Fill) {
            // Only now: should this process die before, the page counts by being there.
            let journal = &self.context.journal;
            journal.set_version(page.0, journal.version(page.0) & !DROPPED);
        }
        if what != Install::Fill && result.is_ok() {
            self.seen.remove(&page);
        }
        match what {
            // Whoever sends it may have read the hole that was there before.
            Install::Copy | Install::Fill | Install::Zero if result.is_ok() => {
                self.moving.changed(page);
            }
            Install::Continue => self.moving.mapped(page, action),
            _ => {}
        }
        let result = self.outcome(page, result);
        self.queue.push_back(Event::Installed { page, what, result });
    }

    fn outcome(&self, page: PageIndex, result: Result<(), ResolveError>) -> InstallResult {
        match result {
            Ok(()) => InstallResult::Ok,
            Err(ResolveError::Exists) => InstallResult::Exists,
            Err(ResolveError::Again) => InstallResult::Again,
            Err(ResolveError::Hole) => InstallResult::Hole,
            Err(ResolveError::NoMemory) => InstallResult::NoMemory,
            Err(ResolveError::Gone) => InstallResult::Gone,
            Err(error) => {
                if pidfd_ends(&self.context.pidfd, Duration::ZERO) {
                    return InstallResult::Gone;
                }
                tracing::error!(%page, "page not installed: {}", chain(&error));
                InstallResult::NoMemory
            }
        }
    }

    pub(super) fn poison(&mut self, page: PageIndex) {
        let name = &self.context.name;
        tracing::error!(vm = name, %page, "no good copy of the page is left: poisoned");
        self.seen.remove(&page);
        let address = self.context.target.address(page);
        let uffd = &self.context.uffd;
        let mut poisoned = uffd.poison(address);
        if matches!(poisoned, Err(ResolveError::Exists)) {
            // A mark of write protection that outlived the page is in the way, or the page is
            // poisoned already.
            let _ = uffd.write_protect(address, PAGE_BYTES as u64, false);
            poisoned = uffd.poison(address);
        }
        match poisoned {
            Ok(()) => {}
            Err(ResolveError::Exists) => {
                let _ = uffd.wake(address, PAGE_BYTES as u64);
            }
            // The thread stays blocked: better than to read wrong bytes.
            Err(error) => tracing::error!(vm = name, %page, "cannot poison: {}", chain(&error)),
        }
    }
}
