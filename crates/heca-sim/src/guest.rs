//! The vCPUs: what they touch, and what happens to them when they may not.

use std::collections::VecDeque;

use heca_core::pager::{FaultKind, Install};
use heca_types::PageIndex;

use crate::history::What;
use crate::kernel::Touch;
use crate::oracle::{Check, Expected};
use crate::params::Params;
use crate::report::Mark;
use crate::rng::Rng;
use crate::world::World;

const ACCESSES_PER_TURN: usize = 12;

#[derive(Debug, Clone, Copy)]
pub(crate) struct Access {
    slot: usize,
    write: bool,
}

#[derive(Debug, Clone, Copy)]
enum State {
    /// With the access that a fault interrupted, if there was one.
    Running(Option<Access>),
    Blocked(Access),
}

#[derive(Debug, Clone)]
pub(crate) struct Vcpu {
    state: State,
    /// Number of its last fault: tells stale events from current ones.
    fault: u64,
    position: usize,
    run_left: usize,
}

impl Vcpu {
    pub(crate) fn blocked_on(&self) -> Option<usize> {
        match self.state {
            State::Blocked(access) => Some(access.slot),
            State::Running(_) => None,
        }
    }

    fn at_rest(&self) -> bool {
        matches!(self.state, State::Running(None))
    }

    /// If it waits, it tries again.
    pub(crate) fn try_again(&mut self) {
        if let State::Blocked(access) = self.state {
            self.state = State::Running(Some(access));
        }
    }
}

/// A message in the userfaultfd.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FaultMessage {
    vcpu: usize,
    fault: u64,
    pub(crate) page: PageIndex,
    pub(crate) kind: FaultKind,
}

#[derive(Debug)]
pub(crate) struct Guest {
    /// The last one is no vCPU: it is QEMU's thread that loads the guest's state, and reads.
    pub(crate) vcpus: Vec<Vcpu>,
    hot: Vec<usize>,
    /// Raised by each write, so that every value is written once.
    next_value: u64,
    /// Messages that nobody read yet.
    pub(crate) messages: VecDeque<FaultMessage>,
    /// The vCPUs stand still.
    pub(crate) stopped: bool,
}

impl Guest {
    pub(crate) fn new(params: &Params, rng: &mut Rng) -> Self {
        let slots = params.slots.len();
        let vcpu = || Vcpu { state: State::Running(None), fault: 0, position: 0, run_left: 0 };
        Self {
            vcpus: (0..=params.vcpus).map(|_| vcpu()).collect(),
            hot: (0..rng.range(4, 40)).map(|_| rng.below(slots)).collect(),
            next_value: 0,
            messages: VecDeque::new(),
            stopped: false,
        }
    }

    /// Whether QEMU has read what it wanted of the guest's memory.
    pub(crate) fn is_loaded(&self) -> bool {
        self.vcpus.last().is_none_or(Vcpu::at_rest)
    }

    /// Whether some vCPU, or who loads the guest's state, has something to do.
    pub(crate) fn can_run(&self, accesses: bool, loading: bool) -> bool {
        let (loader, vcpus) = self.vcpus.split_last().expect("there is always the loader");
        let who = match (loading, self.stopped) {
            (true, _) => std::slice::from_ref(loader),
            (false, true) => &[],
            (false, false) => vcpus,
        };
        who.iter().any(|vcpu| match vcpu.state {
            State::Running(access) => accesses || access.is_some(),
            State::Blocked(_) => false,
        })
    }

    /// A value that nobody wrote before.
    pub(crate) fn new_value(&mut self) -> u64 {
        self.next_value += 1;
        self.next_value
    }

    /// Whether no vCPU has anything left to do.
    pub(crate) fn at_rest(&self) -> bool {
        self.vcpus.iter().all(Vcpu::at_rest)
    }

    pub(crate) fn is_waited_on(&self, slot: usize) -> bool {
        self.vcpus.iter().any(|vcpu| vcpu.blocked_on() == Some(slot))
    }

    /// Whether the thread that caused this message went on meanwhile.
    pub(crate) fn is_stale(&self, message: &FaultMessage) -> bool {
        let vcpu = &self.vcpus[message.vcpu];
        vcpu.fault != message.fault || vcpu.blocked_on().is_none()
    }

    /// Everybody who waits tries again.
    pub(crate) fn wake_all(&mut self) {
        self.vcpus.iter_mut().for_each(Vcpu::try_again);
    }

    /// Wakes whoever waits on a page: they try again.
    pub(crate) fn wake(&mut self, slot: usize) {
        for vcpu in &mut self.vcpus {
            if vcpu.blocked_on() == Some(slot) {
                vcpu.try_again();
            }
        }
    }
}

impl World {
    /// One turn of a random vCPU: some accesses, until it blocks.
    pub(crate) fn guest_turn(&mut self) -> Check {
        let loader = self.guest.vcpus.len() - 1;
        let loading = self.is_loading();
        if self.guest.stopped && !loading {
            return Ok(());
        }
        let (start, count) = if loading { (loader, 1) } else { (0, loader) };
        let first = self.rng.below(count);
        let running = |&v: &usize| self.guest.vcpus[v].blocked_on().is_none();
        let mut order = (0..count).map(|i| start + (first + i) % count);
        let Some(vcpu) = order.find(running) else {
            return Ok(());
        };
        for _ in 0..self.rng.range(1, ACCESSES_PER_TURN) {
            self.access(vcpu)?;
        }
        Ok(())
    }

    fn access(&mut self, vcpu: usize) -> Check {
        let access = match self.guest.vcpus[vcpu].state {
            State::Blocked(_) => return Ok(()),
            State::Running(Some(access)) => access,
            State::Running(None) if !self.accesses || self.has_loaded() => return Ok(()),
            State::Running(None) => self.choose_access(vcpu),
        };
        let Access { slot, write } = access;
        let zero = self.rng.one_in(8);
        let value = if zero { 0 } else { self.guest.new_value() };
        let was_wp = self.kernel.frame(slot).wp;
        let page = self.page(slot);
        match self.kernel.touch(slot, write.then_some(value)) {
            Touch::Fault(kind) => {
                self.block(vcpu, access, kind);
                return Ok(());
            }
            Touch::Poisoned => {
                self.stats.mark(Mark::PoisonHit);
                self.note(page, What::PoisonHit { vcpu });
            }
            Touch::Done(value) if write => {
                if was_wp {
                    self.stats.mark(Mark::AsyncCleared);
                }
                self.oracle.expected[slot] = Expected { value, ..Expected::default() };
                self.stats.writes += 1;
                self.note(page, What::Write { vcpu, value });
            }
            Touch::Done(value) => {
                self.note(page, What::Read { vcpu, value });
                self.check_read(slot, value)?;
            }
        }
        self.guest.vcpus[vcpu].state = State::Running(None);
        Ok(())
    }

    fn choose_access(&mut self, vcpu: usize) -> Access {
        let slots = self.params.slots.len();
        let reads = vcpu + 1 == self.guest.vcpus.len();
        let write = self.rng.below(10) < self.params.writes && !reads;
        let chance = self.rng.below(8);
        if let Some(slot) = self.in_hand()
            && self.rng.one_in(8)
        {
            // Where the races are.
            return Access { slot, write };
        }
        let v = &mut self.guest.vcpus[vcpu];
        if v.run_left > 0 {
            v.run_left -= 1;
            v.position = (v.position + 1) % slots;
            return Access { slot: v.position, write };
        }
        let slot = match chance {
            0..4 => self.rng.pick(&self.guest.hot),
            _ => self.rng.below(slots),
        };
        if chance == 7 {
            let v = &mut self.guest.vcpus[vcpu];
            v.position = slot;
            v.run_left = self.rng.range(4, 60);
        }
        Access { slot, write }
    }

    fn block(&mut self, vcpu: usize, access: Access, kind: FaultKind) {
        if self.guest.is_waited_on(access.slot) {
            self.stats.mark(Mark::SharedPage);
        }
        let page = self.page(access.slot);
        let v = &mut self.guest.vcpus[vcpu];
        v.fault += 1;
        v.state = State::Blocked(access);
        let message = FaultMessage { vcpu, fault: v.fault, page, kind };
        self.guest.messages.push_back(message);
        self.note(page, What::Blocked { vcpu, kind });
    }

    /// Threads that an install action wakes.
    pub(crate) fn wake_after(&mut self, slot: usize, what: Install) {
        if what != Install::Fill {
            self.guest.wake(slot);
        }
    }
}
