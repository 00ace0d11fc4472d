//! A touch of a page that is in local memory.

use heca_types::PageIndex;
use heca_types::limits::MAP_AHEAD_PAGES;

use super::machine::{DIRTY, PREFETCHED, Pager, State};
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
            self.prefetch_used();
        }
        let begin = out.len();
        let stride = self.fetch_ahead(page, out);
        if kind != FaultKind::WriteProtect && stride.abs() == 1 {
            self.map_ahead(page, stride, begin, out);
        }
    }

    fn prefetch_used(&mut self) {
        self.counters.prefetches_used += 1;
        self.streams.useful();
    }

    /// A prefetched page is touched while it is still on its way: the stream is faster.
    pub(super) fn touch_prefetching(&mut self, page: PageIndex, out: &mut Vec<Action>) {
        self.prefetch_used();
        self.fetch_ahead(page, out);
    }

    /// A stream goes on from a page that was just mapped: maps those that are here and come next, so
    /// that a fault serves many. The actions go where `begin` says, before fetches, in rising order.
    fn map_ahead(&mut self, page: PageIndex, stride: i64, begin: usize, out: &mut Vec<Action>) {
        let mut run = Vec::new();
        let mut at = page.0;
        while run.len() < MAP_AHEAD_PAGES {
            let Some(next) = at.checked_add_signed(stride).filter(|&n| n < self.config.pages)
            else {
                break;
            };
            let p = *self.page(PageIndex(next));
            if p.state != State::Standby {
                break;
            }
            self.standby.remove(&mut self.links, next);
            if p.has(PREFETCHED) {
                self.prefetch_used();
            }
            self.make_resident(PageIndex(next), if p.version == 0 { DIRTY } else { 0 });
            run.push(Action::Continue { page: PageIndex(next), protect: true });
            at = next;
        }
        self.counters.mapped_ahead += run.len() as u64;
        self.streams.mapped(page.0, stride, run.len() as u32);
        if stride < 0 {
            run.reverse();
            // Behind them comes the page itself.
            out.splice(begin - 1..begin - 1, run);
        } else {
            out.splice(begin..begin, run);
        }
    }
}
