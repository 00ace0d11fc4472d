//! A region changes its owner: what the former owner tells of each page, and how the next one gets
//! what is behind.
//!
//! The former owner freezes its machine once the guest stands still. From then on no page is taken
//! from the guest and none is stored, so that what [`Pager::holding`] says stays true: a page that
//! was on its way to the sponsors still is in the RAM file, and the version under which it may have
//! been stored is not used again, as the next owner's first attempt has a higher one. Which sponsors
//! hold which extents does not change either, as far as the next owner would notice.

use heca_types::{PageIndex, PageVersion};

use super::machine::{DIRTY, Pager, State, WANTED, ZERO};
use super::{Action, Mutation, Unmapped};

/// Where a page's content is, for the region's next owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Holding {
    /// All zeros, or never written.
    Zero,
    /// In local memory; sponsors may have an older content, or none.
    Local,
    /// On sponsors, in this version. Local memory may have it, too.
    Remote,
}

impl Pager {
    /// Where a page's content is, and the version of the newest attempt to store it.
    #[must_use]
    pub fn holding(&self, page: PageIndex) -> (Holding, PageVersion) {
        let p = self.pages[page.0 as usize];
        let holding = match p.state {
            State::Untouched => Holding::Zero,
            State::Resident | State::Unmapping | State::Storing | State::Behind => Holding::Local,
            State::Standby | State::Punching if p.has(ZERO) => Holding::Zero,
            // A page that is being fetched is where it is fetched from. One that is lost is lost
            // to the next owner, too: its sponsors say so.
            State::Standby
            | State::Punching
            | State::Remote
            | State::Fetching
            | State::Poisoned => Holding::Remote,
        };
        (holding, PageVersion(p.version))
    }

    /// Whether a page is in local memory and not on its way out: only its content there is
    /// current, or nobody knows.
    #[must_use]
    pub fn is_local(&self, page: PageIndex) -> bool {
        let state = self.pages[page.0 as usize].state;
        matches!(state, State::Resident | State::Unmapping | State::Storing)
    }

    /// Nothing else happens in this step, so that what is flushed still is: faults that waited for
    /// room are served in the next one.
    pub(super) fn freeze(&mut self) {
        self.frozen = true;
    }

    /// Pages that [`super::Event::Flush`] has not stored yet. If there are none, and `Freeze` is the
    /// next event, then all pages are zero or remote.
    #[must_use]
    pub fn unflushed(&self) -> u64 {
        self.active.len() + self.unmapping + self.storing
    }

    /// Whether the region is being handed over; see [`super::Event::Freeze`].
    #[must_use]
    pub fn is_frozen(&self) -> bool {
        self.frozen
    }

    /// A page whose content is with the former owner, and the version of that one's newest attempt
    /// to store it. To be called before the first event.
    pub fn adopt_behind(&mut self, page: PageIndex, version: PageVersion) {
        let p = &mut self.pages[page.0 as usize];
        if p.state == State::Untouched {
            p.state = State::Behind;
            p.version = version.0;
            self.untouched -= 1;
            self.frames += 1;
            self.behind += 1;
        }
    }

    /// Whether an outcome of an unmapping shows that the page was written since its mark of write
    /// protection was set last.
    #[must_use]
    pub fn shows_write(outcome: Unmapped) -> bool {
        matches!(outcome, Unmapped::Sent(_) | Unmapped::Zero(_))
    }

    pub(super) fn want_behind(&mut self, page: PageIndex, out: &mut Vec<Action>) {
        let p = self.page(page);
        if !p.has(WANTED) {
            p.flags |= WANTED;
            self.counters.behind_demands += 1;
            out.push(Action::Demand { page });
        }
    }

    /// The caller takes each page once, whoever brings it.
    pub(super) fn arrived(&mut self, page: PageIndex, out: &mut Vec<Action>) {
        let p = *self.page(page);
        if p.state != State::Behind {
            self.counters.late_results += 1;
            return;
        }
        self.behind -= 1;
        self.counters.behind_arrived += 1;
        self.make_resident(page, DIRTY);
        if p.has(WANTED) {
            out.push(Action::Continue { page, protect: false });
        }
    }

    pub(super) fn demand_again(&mut self, out: &mut Vec<Action>) {
        if self.behind == 0 {
            return;
        }
        for number in 0..self.config.pages {
            let p = self.pages[number as usize];
            if p.state == State::Behind && p.has(WANTED) {
                out.push(Action::Demand { page: PageIndex(number) });
            }
        }
    }

    /// Whoever tracks writes has taken the kernel's marks that these pages were written since they
    /// were stored: they are kept here, so that eviction does not take the pages for clean.
    pub fn written(&mut self, pages: std::ops::Range<u64>) {
        if self.config.mutation == Some(Mutation::WrittenForgets) {
            return;
        }
        for p in &mut self.pages[pages.start as usize..pages.end as usize] {
            if matches!(p.state, State::Resident | State::Unmapping) {
                p.flags |= DIRTY;
            }
        }
    }
}
