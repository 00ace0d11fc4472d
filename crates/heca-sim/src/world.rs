//! One world: a guest, its kernel, its pager, the evictor thread and the sponsors, all on one
//! thread. A tick is one turn of one of them.

use std::collections::VecDeque;

use heca_core::invariants::PG_5;
use heca_core::pager::{Action, Config, Event, FetchError, Mutation, Pager, Protection};
use heca_core::placement::{Layout, ReplicaSet};
use heca_types::limits::EXTENT_PAGES;
use heca_types::{Epoch, ExtentIndex, PageIndex, PageVersion};

use crate::actions::{action_page, event_page};
use crate::evictor::Evictor;
use crate::guest::{FaultMessage, Guest};
use crate::history::{History, What};
use crate::kernel::Kernel;
use crate::migration::{Migration, Phase};
use crate::network::{EPOCH_FIRST, Node, Note};
use crate::oracle::{Check, Oracle, fail};
use crate::params::{Params, Rates};
use crate::recovery::Journal;
use crate::report::{Mark, Stats};
use crate::rng::Rng;
use crate::scenario::Scenario;

/// Ticks in which a healed world must come to rest.
const HEAL_TICKS: u64 = 100_000;
/// Ticks in which every page must be home.
const RESTORE_TICKS: u64 = 100_000;
/// Ticks without anything under way after which nothing will come any more.
const IDLE_TICKS: u64 = 2_000;
/// Actions that one event may lead to: more is a loop without end.
const ACTIONS_MAX: usize = 10_000;
/// Times that the scheduler looks for an actor with something to do.
const DRAWS_MAX: usize = 4;

const NO_SLOT: u32 = u32::MAX;

/// Replica set of an extent, and its gaps.
pub(crate) type Known = (ReplicaSet, u8);

#[derive(Debug, Clone, Copy)]
enum Actor {
    Guest,
    Pager,
    Evictor,
    Network,
    Migration,
    Chaos,
}

#[derive(Debug)]
pub(crate) struct World {
    pub(crate) params: Params,
    pub(crate) rng: Rng,
    pub(crate) tick: u64,
    /// Whether trouble may come.
    pub(crate) chaos: bool,
    /// Whether vCPUs start new accesses.
    pub(crate) accesses: bool,
    /// Whether the machine has no memory for further pages.
    pub(crate) memory_full: bool,
    quiet: Rates,
    pub(crate) pager: Pager,
    /// Settings of each new pager.
    pub(crate) config: Config,
    /// Weights of the sponsors that were added later.
    pub(crate) added: Vec<u32>,
    pub(crate) epoch: Epoch,
    pub(crate) journal: Journal,
    /// Replica sets and gaps as they were last written down.
    pub(crate) known: Vec<Known>,
    /// The pager is dead, and another one comes at this tick.
    pub(crate) dead_until: Option<u64>,
    /// Actions until the pager dies.
    pub(crate) actions_left: Option<usize>,
    /// Source and attempt of the last copy of each page between sponsors.
    pub(crate) pulled_from: Vec<Option<(u8, u32)>>,
    /// A migration that is under way.
    pub(crate) migration: Option<Box<Migration>>,
    pub(crate) kernel: Kernel,
    pub(crate) guest: Guest,
    pub(crate) evictor: Evictor,
    pub(crate) nodes: Vec<Node>,
    /// Messages that the pager read but did not handle yet.
    pub(crate) taken: VecDeque<FaultMessage>,
    /// What the evictor and the connections have for the pager, in order.
    pub(crate) inbox: VecDeque<Note>,
    pub(crate) oracle: Oracle,
    pub(crate) stats: Stats,
    pub(crate) history: Option<History>,
    slot_of: Vec<u32>,
    actions: Vec<Action>,
    steps: u64,
    /// The page that the pager's step is about, in case that it panics.
    pub(crate) current: Option<PageIndex>,
}

impl World {
    pub(crate) fn new(
        seed: u64,
        scenario: Scenario,
        mutation: Option<Mutation>,
        stats: Stats,
    ) -> Self {
        let mut rng = Rng::new(seed);
        let params = Params::draw(&mut rng, scenario);
        let slots = params.slots.len();
        let extents = params.pages.div_ceil(EXTENT_PAGES) as u32;
        let first = &params.sponsor_weights[..params.sponsors_first];
        let layout = Layout::spread(extents, first, params.replicas)
            .expect("there are at least as many sponsors as replicas");
        let sponsors = params.sponsor_weights.len();
        let mut nodes: Vec<Node> = (0..sponsors)
            .map(|_| Node::new(slots, rng.below(500) as u64, extents as usize))
            .collect();
        for (sponsor, node) in nodes.iter_mut().enumerate() {
            node.machine.broken_fencing = mutation == Some(Mutation::AcceptStaleEpoch);
            for extent in layout.extents_of(sponsor as u8) {
                node.missed[extent.0 as usize] = false;
            }
        }
        let mut slot_of = vec![NO_SLOT; params.pages as usize];
        for (slot, &page) in params.slots.iter().enumerate() {
            slot_of[page as usize] = slot as u32;
        }
        let config = Config {
            pages: params.pages,
            budget_pages: params.budget as u64,
            protection: params.protection,
            replicas: params.replicas as u8,
            weights: params.sponsor_weights.clone(),
            layout,
            prefetch: params.prefetch,
            mutation,
        };
        let known = (0..extents).map(|e| (config.layout.replicas(ExtentIndex(e)), 0)).collect();
        Self {
            tick: 0,
            chaos: true,
            accesses: true,
            memory_full: false,
            quiet: Rates::default(),
            pager: Pager::new(config.clone()),
            config,
            added: Vec::new(),
            epoch: EPOCH_FIRST,
            journal: Journal::new(slots, extents as usize),
            known,
            dead_until: None,
            actions_left: None,
            pulled_from: vec![None; slots],
            migration: None,
            kernel: Kernel::new(slots, params.protection == Protection::Zap),
            guest: Guest::new(&params, &mut rng),
            evictor: Evictor::default(),
            nodes,
            taken: VecDeque::new(),
            inbox: VecDeque::new(),
            oracle: Oracle::new(slots, params.budget as u64),
            stats,
            history: None,
            slot_of,
            actions: Vec::new(),
            steps: 0,
            current: None,
            params,
            rng,
        }
    }

    pub(crate) fn page(&self, slot: usize) -> PageIndex {
        PageIndex(self.params.slots[slot])
    }

    /// The slot of a page that some vCPU touched.
    pub(crate) fn slot(&self, page: PageIndex) -> usize {
        let slot = self.slot_of[page.0 as usize];
        debug_assert_ne!(slot, NO_SLOT, "{page} was never touched");
        slot as usize
    }

    /// The slot of a page, if some vCPU may touch it.
    pub(crate) fn slot_if_used(&self, page: PageIndex) -> Option<usize> {
        let slot = self.slot_of[page.0 as usize];
        (slot != NO_SLOT).then_some(slot as usize)
    }

    pub(crate) fn rates(&self) -> &Rates {
        if self.chaos { &self.params.rates } else { &self.quiet }
    }

    pub(crate) fn note(&mut self, page: impl Into<Option<PageIndex>>, what: What) {
        if let Some(history) = &mut self.history {
            history.push(self.tick, page.into().map(|p| p.0), what);
        }
    }

    /// Runs the world for about this many ticks: trouble and rest in turns, rest at the end.
    pub(crate) fn run(&mut self, ticks: u64) -> Check {
        for sponsor in 0..self.nodes.len() {
            let connected = self.connect(sponsor);
            debug_assert!(connected, "the offer has room for the region");
        }
        self.check_layout()?;
        self.adopt();
        while self.tick < ticks {
            self.chaos = true;
            self.accesses = true;
            let end = ticks.min(self.tick + self.params.chaos_ticks);
            while self.tick < end {
                self.turn()?;
            }
            self.heal()?;
        }
        // A lost page that nobody touches stays remote for ever.
        if self.params.restore && !self.oracle.lost.contains(&true) {
            self.restore()?;
        }
        self.stats.add_counters(self.pager.counters());
        Ok(())
    }

    /// Pages that were in memory before the pager came, perhaps more than the budget allows.
    fn adopt(&mut self) {
        for _ in 0..self.params.adopted {
            let slot = self.rng.below(self.params.slots.len());
            if self.kernel.frame(slot).content.is_none() {
                let value = self.guest.new_value();
                self.kernel.adopt(slot, value);
                self.oracle.expected[slot].value = value;
                self.pager.adopt_resident(self.page(slot), PageVersion::NEVER);
                self.note(self.page(slot), What::Adopted { value });
            }
        }
        self.oracle.adopted(self.pager.gauges().local_pages);
    }

    /// One turn of an actor that has something to do, if one is found soon.
    pub(crate) fn turn(&mut self) -> Check {
        self.tick += 1;
        if self.dead_until.is_some_and(|tick| tick <= self.tick) {
            self.recover()?;
        }
        self.thaw();
        for _ in 0..DRAWS_MAX {
            match self.draw_actor() {
                Actor::Guest if self.guest.can_run(self.accesses, self.is_loading()) => {
                    return self.guest_turn();
                }
                Actor::Pager if self.pager_has_work() => return self.pager_turn(),
                Actor::Evictor if !self.evictor.is_idle() => return self.evictor_step(),
                Actor::Network if self.nodes.iter().any(|node| node.can_move(self.tick)) => {
                    return self.network_step();
                }
                Actor::Migration if self.migration.is_some() => return self.migration_turn(),
                Actor::Chaos if self.chaos => return self.chaos_step(),
                _ => {}
            }
        }
        // Time goes on even if nothing else does.
        self.deliver(Event::Tick.into())
    }

    fn draw_actor(&mut self) -> Actor {
        let w = &self.params.weights;
        let weights = [
            (Actor::Guest, w.guest),
            (Actor::Pager, w.pager),
            (Actor::Evictor, w.evictor),
            (Actor::Network, w.network),
            (Actor::Migration, if self.migration.is_some() { w.migration } else { 0 }),
            (Actor::Chaos, w.chaos),
        ];
        let mut draw = self.rng.below(weights.iter().map(|(_, weight)| weight).sum());
        for (actor, weight) in weights {
            if draw < weight {
                return actor;
            }
            draw -= weight;
        }
        Actor::Chaos
    }

    fn pager_has_work(&self) -> bool {
        let rebuild = self.pager.has_work() && self.pager.is_rebuilding();
        !self.pager_is_dead() && (rebuild || !self.has_no_events())
    }

    fn has_no_events(&self) -> bool {
        self.inbox.is_empty() && self.taken.is_empty() && self.guest.messages.is_empty()
    }

    /// Ends all trouble; then every vCPU must get what it waits for.
    fn heal(&mut self) -> Check {
        self.chaos = false;
        self.accesses = false;
        self.memory_full = false;
        self.actions_left = None;
        self.note(None, What::Heal);
        self.stats.mark(Mark::Heal);
        if self.pager_is_dead() {
            self.recover()?;
        }
        let flushes = self.is_flushing();
        if !flushes && self.phase().is_some_and(|phase| phase != Phase::Following) {
            self.abort_migration();
        }
        self.restart_all();
        if flushes {
            self.flush_at_rest()?;
            self.abort_migration();
        }
        let end = self.tick + HEAL_TICKS;
        let mut idle_ticks = 0;
        let at_rest = |world: &Self| world.guest.at_rest() && world.migration.is_none();
        while !at_rest(self) && self.tick < end && idle_ticks < IDLE_TICKS {
            self.turn()?;
            idle_ticks = if self.is_idle() { idle_ticks + 1 } else { 0 };
        }
        self.check_no_waiters()?;
        if self.migration.is_some() {
            let detail = format!("pages are behind for ever: {:?}", self.pager.gauges());
            return fail(PG_5, None, detail);
        }
        self.wait_for_redundancy()
    }

    fn restore(&mut self) -> Check {
        self.stats.mark(Mark::Restore);
        (0..self.nodes.len()).for_each(|sponsor| self.restart(sponsor));
        self.accesses = self.params.restore_accesses;
        self.deliver(Event::Restore.into())?;
        let end = self.tick + RESTORE_TICKS;
        while !self.pager.is_restored() {
            if self.tick == end {
                let detail = format!("not every page came home: {:?}", self.pager.gauges());
                return fail(PG_5, None, detail);
            }
            self.turn()?;
        }
        self.check_all_home()
    }

    /// Whether nothing is under way anywhere.
    pub(crate) fn is_idle(&self) -> bool {
        self.migration.is_none()
            && self.has_no_events()
            && self.evictor.is_idle()
            && self.nodes.iter().all(Node::is_idle)
    }

    /// The pager thread handles some events, from whichever source it looks at.
    fn pager_turn(&mut self) -> Check {
        for _ in 0..self.rng.range(1, self.params.pager_burst) {
            if self.pager_is_dead() {
                return Ok(());
            }
            if self.rates().overdue != 0 && self.rng.one_in(8) {
                let sponsor = self.rng.below(self.nodes.len());
                self.overdue(sponsor);
            }
            match self.rng.below(16) {
                0 => self.deliver(Event::Tick.into())?,
                15 if self.pager.has_work() => self.deliver(Event::Work.into())?,
                1..5 => self.read_messages(),
                5..10 => {
                    let Some(message) = self.taken.pop_front() else {
                        continue;
                    };
                    if self.guest.is_stale(&message) {
                        self.stats.mark(Mark::StaleEvent);
                    }
                    let FaultMessage { page, kind, .. } = message;
                    self.deliver(Event::Fault { page, kind }.into())?;
                }
                _ => {
                    let Some(note) = self.inbox.pop_front() else {
                        continue;
                    };
                    self.deliver(note)?;
                }
            }
        }
        Ok(())
    }

    fn read_messages(&mut self) {
        let count = self.rng.range(1, 8).min(self.guest.messages.len());
        self.taken.extend(self.guest.messages.drain(..count));
    }

    /// What an event says to the checks.
    fn hear(&mut self, event: Event) {
        self.track_event(event);
        match event {
            Event::FetchFailed { page, sponsor, .. } => {
                let slot = self.slot(page);
                self.oracle.fetching[slot] &= !(1 << sponsor);
            }
            Event::Fetched { page, version, sponsor } => {
                let slot = self.slot(page);
                let asked = self.oracle.fetching[slot];
                if asked != 0 && version < self.journal.versions[slot] {
                    self.stats.mark(Mark::LateOlderVersion);
                } else if asked != 0 && asked >> sponsor & 1 == 0 {
                    self.stats.mark(Mark::EarlierFetch);
                }
            }
            _ => {}
        }
    }

    /// Gives one event to the pager and carries out what it says.
    pub(crate) fn deliver(&mut self, note: Note) -> Check {
        if self.pager_is_dead() {
            return Ok(());
        }
        self.hear(note.event);
        if let Event::FetchFailed { page, sponsor, error } = note.event
            && matches!(error, FetchError::Absent | FetchError::Corrupt)
        {
            self.nodes[usize::from(sponsor)].accused[page.extent().0 as usize] = true;
        }
        let mut queue = VecDeque::new();
        self.step(note.event, &mut queue)?;
        let mut done = 0;
        while let Some((step, action)) = queue.pop_front() {
            done += 1;
            if done > ACTIONS_MAX {
                let detail = format!("one event leads to actions without end: {action:?}");
                return fail(PG_5, action_page(action), detail);
            }
            if self.dies_at(Some(action)) {
                return Ok(());
            }
            let Some((what, result)) = self.execute(step, action, note.reply)? else {
                continue;
            };
            // Other threads do not wait until the pager has seen the answer.
            if self.rng.one_in(8) {
                self.stats.mark(Mark::InstallRace);
                self.guest_turn()?;
            }
            if self.rng.one_in(16) {
                self.evictor_step()?;
            }
            if self.dies_at(None) {
                return Ok(());
            }
            if let Some(page) = action_page(action) {
                self.step(Event::Installed { page, what, result }, &mut queue)?;
            }
        }
        if let Event::SponsorEmptied { sponsor } = note.event {
            // Whoever tells the pager knows that it wrote that down.
            self.nodes[usize::from(sponsor)].emptied_untold = false;
        }
        Ok(())
    }

    fn step(&mut self, event: Event, queue: &mut VecDeque<(u64, Action)>) -> Check {
        self.steps += 1;
        self.current = event_page(event);
        let rebuilding = self.pager.is_rebuilding();
        if !matches!(event, Event::Tick | Event::Work) {
            self.note(self.current, What::ToPager(event));
        }
        self.pager.step(event, &mut self.actions);
        if matches!(event, Event::SponsorDown { .. }) && rebuilding && !self.pager.is_rebuilding() {
            self.stats.mark(Mark::TargetCrashed);
        }
        for action in std::mem::take(&mut self.actions) {
            self.note(action_page(action), What::FromPager(action));
            queue.push_back((self.steps, action));
        }
        self.check_budget(event)
    }
}
