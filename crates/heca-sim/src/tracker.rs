//! Before the switch: the source follows the guest's writes, and sends pages while it runs.

use std::collections::VecDeque;

use heca_core::pager::{Event, Mutation, Pager, Protection};

use crate::history::What;
use crate::kernel::Kernel;
use crate::migration::Phase;
use crate::report::Mark;
use crate::rng::Rng;
use crate::world::World;

/// Steps that a fast sender does in one turn, and pages that arrive.
const STEPS_MAX: usize = 24;

/// What travels to the target, in order.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Parcel {
    Content {
        slot: usize,
        value: u64,
    },
    /// The source dropped the page.
    Drop {
        slot: usize,
    },
}

impl Parcel {
    pub(crate) fn arrive(self, kernel: &mut Kernel) {
        match self {
            Self::Content { slot, value } => kernel.write(slot, value),
            Self::Drop { slot } => kernel.punch(slot),
        }
    }
}

/// The page that the sender has in hand.
#[derive(Debug, Clone, Copy)]
enum Sending {
    Chosen { slot: usize },
    Read { slot: usize, value: u64 },
}

/// What the source knows of the target's copies.
#[derive(Debug)]
pub(crate) struct Tracker {
    /// The target has the page's content, or is about to get it, unless it was written since the
    /// last scan.
    fresh: Vec<bool>,
    /// The target was sent something.
    sent: Vec<bool>,
    queued: Vec<bool>,
    queue: VecDeque<usize>,
    sending: Option<Sending>,
    /// Steps that the sender does in one turn at most: its bandwidth.
    pace: usize,
    pub(crate) wire: VecDeque<Parcel>,
}

impl Tracker {
    pub(crate) fn new(slots: usize, rng: &mut Rng) -> Self {
        Self {
            fresh: vec![false; slots],
            sent: vec![false; slots],
            queued: vec![false; slots],
            queue: VecDeque::new(),
            sending: None,
            pace: if rng.one_in(2) { STEPS_MAX } else { rng.range(1, STEPS_MAX) },
            wire: VecDeque::new(),
        }
    }

    /// The target's copy is old: it is to be sent again.
    pub(crate) fn outdated(&mut self, slot: usize) {
        self.fresh[slot] = false;
        if !self.queued[slot] {
            self.queued[slot] = true;
            self.queue.push_back(slot);
        }
    }
}

impl World {
    fn tracker(&mut self) -> Option<&mut Tracker> {
        let migration = self.migration.as_mut()?;
        let tracks = !migration.safe && matches!(migration.phase, Phase::Copying | Phase::Stopped);
        tracks.then_some(&mut migration.tracker)
    }

    /// The page that the sender has in hand.
    pub(crate) fn in_hand(&self) -> Option<usize> {
        match self.migration.as_ref()?.tracker.sending? {
            Sending::Chosen { slot } | Sending::Read { slot, .. } => Some(slot),
        }
    }

    /// A page was brought in: the target does not have it.
    pub(crate) fn track_install(&mut self, slot: usize) {
        if let Some(tracker) = self.tracker() {
            tracker.outdated(slot);
        }
    }

    /// What an event says of the target's copies.
    pub(crate) fn track_event(&mut self, event: Event) {
        match event {
            Event::Unmapped { page, outcome, .. } => {
                let slot = self.slot(page);
                // The evictor's own protection covers up a write, whatever it found.
                let hides = self.params.protection == Protection::WriteProtect;
                if (hides || Pager::shows_write(outcome))
                    && let Some(tracker) = self.tracker()
                {
                    tracker.outdated(slot);
                }
            }
            Event::Punched { page, ok: true } => {
                let slot = self.slot(page);
                let Some(tracker) = self.tracker() else { return };
                tracker.fresh[slot] = false;
                if std::mem::take(&mut tracker.sent[slot]) {
                    tracker.wire.push_back(Parcel::Drop { slot });
                    self.stats.mark(Mark::DropNotice);
                }
            }
            _ => {}
        }
    }

    /// The pager's thread collects what was written since the last time, in a part of the region.
    pub(crate) fn scan(&mut self) {
        let slots = self.params.slots.len();
        let whole = self.rng.one_in(3);
        let from = if whole { 0 } else { self.rng.below(slots) };
        let to = if whole { slots } else { (from + self.rng.range(1, 400)).min(slots) };
        for slot in from..to {
            let frame = *self.kernel.frame(slot);
            if !frame.mapped || frame.wp {
                continue;
            }
            self.kernel.protect(slot);
            let page = self.page(slot);
            self.pager.written(page.0..page.0 + 1);
            self.note(page, What::Collected);
            self.stats.mark(Mark::WriteCollected);
            if let Some(tracker) = self.tracker() {
                tracker.outdated(slot);
            }
        }
    }

    /// One step of the sender.
    pub(crate) fn send_ahead(&mut self) {
        let late = self.config.mutation == Some(Mutation::MarkAfterRead);
        let Some(tracker) = self.tracker() else { return };
        match tracker.sending.take() {
            None => {
                let Some(slot) = tracker.queue.pop_front() else { return };
                tracker.queued[slot] = false;
                // First: a write that is seen from here on counts.
                tracker.fresh[slot] |= !late;
                tracker.sending = Some(Sending::Chosen { slot });
            }
            Some(Sending::Chosen { slot }) => {
                // A hole reads as zeros.
                let value = self.kernel.frame(slot).content.unwrap_or(0);
                self.note(self.page(slot), What::ReadToSend { value });
                if let Some(tracker) = self.tracker() {
                    tracker.sending = Some(Sending::Read { slot, value });
                }
            }
            Some(Sending::Read { slot, value }) => {
                tracker.fresh[slot] |= late;
                tracker.sent[slot] = true;
                tracker.wire.push_back(Parcel::Content { slot, value });
            }
        }
    }

    /// The sender sends what it has in hand, and nothing else: what comes next in the stream is the
    /// list.
    pub(crate) fn finish_sending(&mut self) {
        while self.tracker().is_some_and(|tracker| tracker.sending.is_some()) {
            self.send_ahead();
        }
    }

    /// Source and sender while pages are copied.
    pub(crate) fn copy_turn(&mut self) {
        match self.rng.below(8) {
            0 => self.scan(),
            1..5 => {
                let pace = self.migration.as_ref().map_or(1, |m| m.tracker.pace);
                for _ in 0..self.rng.range(1, pace) {
                    self.send_ahead();
                }
            }
            _ => {
                let count = self.rng.range(1, STEPS_MAX);
                let Some(migration) = &mut self.migration else { return };
                for _ in 0..count {
                    let Some(parcel) = migration.tracker.wire.pop_front() else { break };
                    parcel.arrive(&mut migration.prepared);
                }
            }
        }
    }

    /// What the last scan says of each page: whether the target's copy is current. Nothing is
    /// protected anew, so that a migration that comes to nothing takes no marks away.
    pub(crate) fn last_scan(&mut self) -> Vec<bool> {
        let trusts = self.config.mutation == Some(Mutation::FinalScanTrusts);
        let hides = self.params.protection == Protection::WriteProtect;
        let inbox = self.inbox.iter().filter_map(|note| match note.event {
            Event::Unmapped { page, .. } => Some(page),
            _ => None,
        });
        let mut unmapping = vec![false; self.params.slots.len()];
        for page in self.evictor.victims().map(|victim| victim.page).chain(inbox) {
            unmapping[self.slot(page)] = hides;
        }
        let kernel = &self.kernel;
        let clean = |slot: usize| {
            let frame = kernel.frame(slot);
            // What is not seen counts as written.
            frame.wp || (trusts && !frame.mapped)
        };
        let Some(migration) = &self.migration else { return Vec::new() };
        let fresh = migration.tracker.fresh.iter().enumerate();
        fresh.map(|(slot, &fresh)| fresh && clean(slot) && !unmapping[slot]).collect()
    }
}
