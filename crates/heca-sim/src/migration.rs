//! The guest moves to another host: its pages are copied while it runs, it stops, the next owner is
//! told where each page is, takes over, and lets it run. Up to the takeover everything may come to
//! nothing.

use heca_core::handover::{PageRecord, encode_records};
use heca_core::invariants::{PG_2, PG_5};
use heca_core::pager::{Event, Holding, Pager};
use heca_types::{ExtentIndex, PageIndex};

use crate::following::Following;
use crate::history::What;
use crate::kernel::Kernel;
use crate::network::Note;
use crate::oracle::{Check, fail};
use crate::report::Mark;
use crate::takeover::Host;
use crate::tracker::Tracker;
use crate::world::World;

/// Ticks in which everything must be stored, for a guest that stands still.
const FLUSH_TICKS: u64 = 3_000;
/// As before, in a world without trouble.
const REST_TICKS: u64 = 50_000;
/// Ticks in which the target must have loaded the guest's state.
const LOAD_TICKS: u64 = 3_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// The guest runs at the source; what is local is copied to the target, or to the sponsors.
    Copying,
    /// The guest stands still until everything is stored.
    Flushing,
    /// The guest stands still, and the list of the pages is on its way.
    Stopped,
    /// The target's pager is there; its QEMU loads the guest's state.
    Loading,
    /// The guest runs on the target, and pages follow.
    Following,
}

#[derive(Debug)]
pub(crate) struct Migration {
    /// Whether everything is stored on sponsors before the guest moves.
    pub(crate) safe: bool,
    pub(crate) phase: Phase,
    /// When the phase ends at the earliest.
    pub(crate) until: u64,
    pub(crate) tracker: Tracker,
    /// The target's RAM file before it has a pager.
    pub(crate) prepared: Kernel,
    /// What the target is told of the pages.
    pub(crate) list: Vec<u8>,
    pub(crate) extents: Vec<u64>,
    /// The source, once the target has a pager.
    pub(crate) source: Option<Box<Host>>,
    /// Sponsors that came back empty while the guest stood still at the source.
    pub(crate) emptied_before: u16,
    /// Sponsors that crashed, and that came back empty, since the target has a pager.
    pub(crate) broken: u16,
    pub(crate) emptied: u16,
    pub(crate) following: Following,
}

impl World {
    pub(crate) fn phase(&self) -> Option<Phase> {
        self.migration.as_ref().map(|migration| migration.phase)
    }

    fn enter(&mut self, phase: Phase, least: usize, most: usize) {
        let ticks = self.rng.range(least, most) as u64;
        if let Some(migration) = &mut self.migration {
            migration.phase = phase;
            migration.until = self.tick + ticks;
        }
        self.note(None, What::Migration(phase));
    }

    pub(crate) fn begin_migration(&mut self) -> Check {
        // The pager may not have heard of the end of the last one.
        let thaws = |note: &Note| note.event == Event::Freeze { on: false };
        if self.migration.is_some() || self.pager_is_dead() || self.inbox.iter().any(thaws) {
            return Ok(());
        }
        self.stats.mark(Mark::Migration);
        let slots = self.params.slots.len();
        let safe = self.rng.one_in(4);
        self.migration = Some(Box::new(Migration {
            safe,
            phase: Phase::Copying,
            until: 0,
            tracker: Tracker::new(slots, &mut self.rng),
            prepared: Kernel::new(slots, self.kernel.wp_async()),
            list: Vec::new(),
            extents: Vec::new(),
            source: None,
            emptied_before: 0,
            broken: 0,
            emptied: 0,
            following: Following::new(slots),
        }));
        let most = self.rng.pick(&[100, 700, 700, 3000]);
        self.enter(Phase::Copying, 10, most);
        if safe {
            return self.deliver(Event::Flush { on: true }.into());
        }
        let first = self.rng.below(slots);
        for slot in (0..slots).map(|i| (first + i) % slots) {
            if self.pager.is_local(self.page(slot)) {
                self.track_install(slot);
            }
        }
        Ok(())
    }

    /// One turn of those who move the guest.
    pub(crate) fn migration_turn(&mut self) -> Check {
        let Some(migration) = &self.migration else { return Ok(()) };
        let (phase, safe) = (migration.phase, migration.safe);
        let (over, late) =
            (self.tick >= migration.until, self.tick.saturating_sub(migration.until));
        let at_once = over && matches!(phase, Phase::Copying | Phase::Stopped);
        let rate = if at_once { 12 } else { 400 };
        if phase != Phase::Following && self.chaos && self.rng.one_in(rate) {
            self.stats.mark(match phase {
                Phase::Copying => Mark::AbortedCopying,
                Phase::Loading => Mark::AbortedLoading,
                _ => Mark::AbortedStopped,
            });
            self.abort_migration();
            return Ok(());
        }
        match phase {
            Phase::Copying if over => {
                self.guest.stopped = true;
                if safe { self.enter(Phase::Flushing, 0, 0) } else { self.hand_list_over()? }
            }
            Phase::Copying if safe => {}
            Phase::Copying => self.copy_turn(),
            Phase::Flushing if self.pager.unflushed() == 0 => self.hand_list_over()?,
            Phase::Flushing if late > FLUSH_TICKS => self.abort_migration(),
            Phase::Flushing => {}
            Phase::Stopped if over => return self.load(),
            Phase::Stopped => {}
            Phase::Loading if over && self.guest.is_loaded() => return self.commit(),
            Phase::Loading if late > LOAD_TICKS => self.abort_migration(),
            Phase::Loading | Phase::Following => return self.following_turn(),
        }
        Ok(())
    }

    /// Whether pages are being stored for a migration that keeps them in two places.
    pub(crate) fn is_flushing(&self) -> bool {
        let flushes = |m: &Migration| m.safe && matches!(m.phase, Phase::Copying | Phase::Flushing);
        self.migration.as_ref().is_some_and(|migration| flushes(migration))
    }

    /// PG-5 for a guest that stands still in a world without trouble: all of it can be stored.
    pub(crate) fn flush_at_rest(&mut self) -> Check {
        self.stats.checked(PG_5);
        self.stats.mark(Mark::FlushedAtRest);
        self.guest.stopped = true;
        self.enter(Phase::Copying, 0, 0);
        let end = self.tick + REST_TICKS;
        if let Some(migration) = &mut self.migration {
            migration.until = u64::MAX;
        }
        while self.pager.unflushed() > 0 {
            if self.tick == end {
                let detail = format!("{} pages are not flushed", self.pager.unflushed());
                return fail(PG_5, None, detail);
            }
            self.turn()?;
        }
        Ok(())
    }

    /// The last scan, and what the target is told.
    fn hand_list_over(&mut self) -> Check {
        self.deliver(Event::Freeze { on: true }.into())?;
        if self.migration.is_none() {
            // The pager died of it.
            return Ok(());
        }
        if self.rng.one_in(2) {
            self.finish_sending();
        }
        let current = self.last_scan();
        let safe = self.migration.as_ref().is_some_and(|migration| migration.safe);
        let mut records = Vec::with_capacity(self.params.pages as usize);
        for number in 0..self.params.pages {
            let page = PageIndex(number);
            let (holding, version) = self.pager.holding(page);
            let record = match holding {
                Holding::Zero => PageRecord::Zero(version),
                Holding::Remote => PageRecord::Remote(version),
                Holding::Local if safe => {
                    let detail = "everything is flushed, but it is only here".into();
                    return fail(PG_2, page, detail);
                }
                Holding::Local if current[self.slot(page)] => PageRecord::Sent(version),
                Holding::Local => PageRecord::Behind(version),
            };
            match record {
                PageRecord::Sent(_) => self.stats.mark(Mark::ToldSent),
                PageRecord::Behind(_) => self.stats.mark(Mark::ToldBehind),
                _ => {}
            }
            if holding != Holding::Zero {
                self.note(page, What::Told(record));
            }
            records.push(record);
        }
        self.finish_sending();
        let pager: &Pager = &self.pager;
        let extents = (0..self.known.len() as u32).map(|e| pager.extent_record(ExtentIndex(e)));
        let extents = extents.collect();
        if let Some(migration) = &mut self.migration {
            migration.extents = extents;
            encode_records(records, &mut migration.list);
        }
        self.enter(Phase::Stopped, 0, 150);
        Ok(())
    }

    /// Whether the next owner was told that a sponsor holds an extent.
    pub(crate) fn is_told(&self, extent: ExtentIndex, sponsor: u8) -> bool {
        let Some(migration) = &self.migration else { return false };
        let Some(record) = migration.extents.get(extent.0 as usize) else { return false };
        let bytes = record.to_le_bytes();
        bytes[2..2 + usize::from(bytes[0])].contains(&sponsor)
    }

    /// Everything is as it was before, or becomes so.
    pub(crate) fn abort_migration(&mut self) {
        let Some(mut migration) = self.migration.take() else { return };
        debug_assert_ne!(migration.phase, Phase::Following);
        self.note(None, What::MigrationEnds { moved: false });
        if let Some(source) = migration.source.take() {
            self.back_to_source(*source, migration.broken, migration.emptied);
        }
        self.guest.stopped = false;
        if !self.pager_is_dead() {
            self.inbox.push_back(Event::Flush { on: false }.into());
            self.inbox.push_back(Event::Freeze { on: false }.into());
        }
    }

    /// The pager dies. Says whether it is one that the guest can do without.
    pub(crate) fn migration_loses_pager(&mut self) -> bool {
        match self.phase() {
            None => false,
            Some(Phase::Following) => {
                self.receivers_die();
                false
            }
            Some(Phase::Loading) => {
                self.stats.mark(Mark::CrashWhileLoading);
                self.abort_migration();
                self.rng.one_in(2)
            }
            Some(_) => {
                self.stats.mark(Mark::CrashBeforeSwitch);
                self.abort_migration();
                false
            }
        }
    }
}
