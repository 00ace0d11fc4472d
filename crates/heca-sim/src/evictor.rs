//! The thread that unmaps, reads, sends and drops pages, as small steps between which everything
//! else goes on.

use std::collections::VecDeque;

use heca_core::pager::{Event, Protection, Unmapped};
use heca_types::{PageIndex, PageVersion};

use crate::history::What;
use crate::network::{Request, WRITEBACK};
use crate::oracle::Check;
use crate::report::Mark;
use crate::world::World;

const PAGES_PER_STEP: usize = 32;

/// One victim on its way.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Victim {
    pub(crate) page: PageIndex,
    pub(crate) version: PageVersion,
    pub(crate) dirty: bool,
    pub(crate) sponsors: u16,
    /// Set once it is known without reading the page.
    pub(crate) outcome: Option<Unmapped>,
    pub(crate) value: u64,
}

#[derive(Debug)]
enum Batch {
    Unmap { step: u64, victims: Vec<Victim>, phase: usize, done: usize },
    Punch { page: PageIndex },
}

/// Work of the thread, oldest first.
#[derive(Debug, Default)]
pub(crate) struct Evictor {
    batches: VecDeque<Batch>,
}

impl Evictor {
    /// Victims of one step of the machine form one batch, unless work on it has begun.
    pub(crate) fn unmap(&mut self, in_step: u64, victim: Victim) {
        match self.batches.back_mut() {
            Some(Batch::Unmap { step, victims, phase: 0, done: 0 }) if *step == in_step => {
                victims.push(victim);
            }
            _ => {
                let victims = vec![victim];
                let batch = Batch::Unmap { step: in_step, victims, phase: 0, done: 0 };
                self.batches.push_back(batch);
            }
        }
    }

    pub(crate) fn punch(&mut self, page: PageIndex) {
        self.batches.push_back(Batch::Punch { page });
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.batches.is_empty()
    }

    pub(crate) fn is_unmapping(&self) -> bool {
        self.batches.iter().any(|batch| matches!(batch, Batch::Unmap { .. }))
    }

    pub(crate) fn victims(&self) -> impl Iterator<Item = &Victim> {
        self.batches.iter().flat_map(|batch| match batch {
            Batch::Unmap { victims, .. } => &victims[..],
            Batch::Punch { .. } => &[],
        })
    }

    pub(crate) fn punching(&self) -> usize {
        self.batches.iter().filter(|batch| matches!(batch, Batch::Punch { .. })).count()
    }
}

impl World {
    /// One turn of the evictor: some pages of the oldest batch go through one phase.
    pub(crate) fn evictor_step(&mut self) -> Check {
        let pages = self.rng.range(1, PAGES_PER_STEP);
        match self.evictor.batches.pop_front() {
            None => Ok(()),
            Some(Batch::Punch { page }) => {
                self.punch(page)?;
                for _ in 1..pages {
                    let Some(&Batch::Punch { page }) = self.evictor.batches.front() else {
                        break;
                    };
                    self.evictor.batches.pop_front();
                    self.punch(page)?;
                }
                Ok(())
            }
            Some(Batch::Unmap { step, mut victims, mut phase, mut done }) => {
                let end = (done + pages).min(victims.len());
                for victim in &mut victims[done..end] {
                    self.evict_phase(phase, victim);
                }
                done = end;
                if done == victims.len() {
                    phase += 1;
                    done = 0;
                }
                if phase < 4 {
                    let batch = Batch::Unmap { step, victims, phase, done };
                    self.evictor.batches.push_front(batch);
                }
                Ok(())
            }
        }
    }

    fn evict_phase(&mut self, phase: usize, victim: &mut Victim) {
        match phase {
            0 => self.evict_unmap(victim.page),
            1 => victim.outcome = self.evict_check(victim),
            2 if victim.outcome.is_none() => self.evict_read(victim),
            2 => {}
            _ => self.evict_send(victim),
        }
    }

    fn evict_unmap(&mut self, page: PageIndex) {
        let slot = self.slot(page);
        if self.params.protection == Protection::WriteProtect {
            self.kernel.protect(slot);
            self.note(page, What::Protected);
            return;
        }
        let rate = self.rates().zap_fails;
        let took = !self.rng.one_in(rate);
        if took {
            self.kernel.zap(slot);
        } else {
            self.stats.mark(Mark::ZapFailed);
        }
        self.note(page, What::Zapped { took });
    }

    fn evict_check(&mut self, victim: &Victim) -> Option<Unmapped> {
        let frame = *self.kernel.frame(self.slot(victim.page));
        let zap = self.params.protection == Protection::Zap;
        if zap && frame.mapped {
            self.stats.mark(Mark::Remapped);
            return Some(Unmapped::Mapped);
        }
        if !victim.dirty && (!zap || frame.wp) {
            self.stats.mark(Mark::CleanVictim);
            return Some(Unmapped::Clean);
        }
        None
    }

    fn evict_read(&mut self, victim: &mut Victim) {
        let rate = self.rates().read_fails;
        if self.rng.one_in(rate) {
            self.stats.mark(Mark::ReadFailed);
            victim.outcome = Some(Unmapped::Failed);
            return;
        }
        // A hole in the RAM file reads as zeros.
        victim.value = self.kernel.frame(self.slot(victim.page)).content.unwrap_or(0);
        self.note(victim.page, What::ReadForStore { value: victim.value });
    }

    fn evict_send(&mut self, victim: &Victim) {
        let Victim { page, version, sponsors, value, .. } = *victim;
        let outcome = victim.outcome.unwrap_or_else(|| {
            if value != 0 {
                return Unmapped::Sent(sponsors);
            }
            let told = version.0 != 1;
            self.stats.mark(if told { Mark::ZeroTold } else { Mark::ZeroUntold });
            Unmapped::Zero(if told { sponsors } else { 0 })
        });
        self.inbox.push_back(Event::Unmapped { page, version, outcome }.into());
        let (Unmapped::Sent(mask) | Unmapped::Zero(mask)) = outcome else {
            return;
        };
        let slot = self.slot(page);
        for sponsor in (0..self.nodes.len() as u8).filter(|s| mask >> s & 1 == 1) {
            let node = &mut self.nodes[usize::from(sponsor)];
            if node.up {
                let request = Request::Store { slot, version, value };
                node.lanes[WRITEBACK].requests.push_back(request);
            } else {
                self.inbox.push_back(Event::StoreFailed { page, version, sponsor }.into());
            }
        }
    }

    fn punch(&mut self, page: PageIndex) -> Check {
        let rate = self.rates().punch_fails;
        let ok = !self.rng.one_in(rate);
        if ok {
            self.check_before_drop(page)?;
            let slot = self.slot(page);
            self.kernel.punch(slot);
            self.note(page, What::Dropped);
            self.recount_lost(slot);
        }
        self.inbox.push_back(Event::Punched { page, ok }.into());
        Ok(())
    }
}
