//! A touch of a page that is in local memory.

use heca_types::PageIndex;

use super::machine::{DIRTY, PREFETCHED, Pager};
use super::{Action, FaultKind, Mutation, Protection};

impl Pager {
    pub(super) fn touch_resident(
        &mut self,
        page: PageIndex,
        kind: FaultKind,
        out: &mut Vec<Action>,
    ) {
        if kind == FaultKind::WriteProtect {
            self.page(page).flags |= DIRTY;
            out.push(Action::Unprotect { page });
            return;
        }
        // The mapping went away without our doing (the kernel reclaims mappings), or the event is
        // old. Whether the page was written before is unknown under `Zap`.
        let protect = match self.config.protection {
            Protection::Zap => false,
            Protection::WriteProtect => !self.page(page).has(DIRTY),
        };
        if !protect {
            self.page(page).flags |= DIRTY;
        }
        out.push(Action::Continue { page, protect });
    }

    /// A touch ends an eviction that was under way. A copy may be on its way to the sponsors, and
    /// the page may be written from here on: it counts as dirty.
    pub(super) fn cancel(&mut self, page: PageIndex, kind: FaultKind, out: &mut Vec<Action>) {
        let forget = self.config.mutation == Some(Mutation::ForgetDirty);
        self.make_resident(page, if forget { 0 } else { DIRTY });
        if kind == FaultKind::WriteProtect {
            out.push(Action::Unprotect { page });
        } else {
            out.push(Action::Continue { page, protect: forget });
        }
    }

    pub(super) fn touch_standby(
        &mut self,
        page: PageIndex,
        kind: FaultKind,
        out: &mut Vec<Action>,
    ) {
        self.counters.standby_hits += 1;
        self.standby.remove(&mut self.links, page.0);
        let p = *self.page(page);
        let prefetched = p.has(PREFETCHED);
        // A page of zeros that no sponsor was told of has no remote copy.
        let no_copy = if p.version == 0 { DIRTY } else { 0 };
        if kind == FaultKind::WriteProtect {
            self.make_resident(page, DIRTY);
            out.push(Action::Unprotect { page });
        } else {
            self.make_resident(page, no_copy);
            out.push(Action::Continue { page, protect: true });
        }
        if prefetched {
            self.counters.prefetches_used += 1;
            self.streams.useful();
            self.fetch_ahead(page, out);
        }
    }
}
