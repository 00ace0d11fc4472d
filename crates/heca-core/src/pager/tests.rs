//! Scenarios, and random histories against a reference model.
//!
//! The world here is synchronous: every action is carried out at once, so after each step nothing
//! is in flight. Interleavings are the simulation's business.

use std::collections::{BTreeMap, VecDeque};

use heca_types::{PageIndex, PageVersion};
use proptest::prelude::*;

use super::{
    Action, Config, Event, FaultKind, FetchError, Install, InstallResult, Pager, Protection,
    Unmapped,
};
use crate::placement::Layout;

const PAGES: u64 = 3000;

#[derive(Debug, Clone, Copy, Default)]
struct Local {
    content: Option<u64>,
    mapped: bool,
    protected: bool,
}

/// A kernel, an evictor and sponsors that answer at once.
struct World {
    pager: Pager,
    protection: Protection,
    local: Vec<Local>,
    stores: Vec<BTreeMap<u64, (u32, u64)>>,
    up: Vec<bool>,
    corrupt: Option<u8>,
    poisoned: Vec<u64>,
    queue: VecDeque<Event>,
}

impl World {
    fn new(protection: Protection, budget: u64, sponsors: usize, replicas: usize) -> Self {
        let layout = Layout::spread(1, &vec![1; sponsors], replicas).expect("possible");
        let config = Config {
            pages: PAGES,
            budget_pages: budget,
            protection,
            layout,
            sponsors: sponsors as u8,
            prefetch: true,
            mutation: None,
        };
        Self {
            pager: Pager::new(config),
            protection,
            local: vec![Local::default(); PAGES as usize],
            stores: vec![BTreeMap::new(); sponsors],
            up: vec![true; sponsors],
            corrupt: None,
            poisoned: Vec::new(),
            queue: VecDeque::new(),
        }
    }

    fn run(&mut self, event: Event) {
        self.queue.push_back(event);
        while let Some(event) = self.queue.pop_front() {
            let mut actions = Vec::new();
            let mut answers = VecDeque::from([event]);
            while let Some(event) = answers.pop_front() {
                actions.clear();
                self.pager.step(event, &mut actions);
                for action in actions.clone() {
                    if let Some((page, what, result)) = self.install(action, event) {
                        answers.push_back(Event::Installed { page, what, result });
                    } else {
                        self.carry_out(action);
                    }
                }
            }
            let gauges = self.pager.gauges();
            assert_eq!(
                gauges.local_pages
                    + gauges.remote_pages
                    + gauges.untouched_pages
                    + gauges.poisoned_pages,
                PAGES
            );
        }
    }

    fn install(
        &mut self,
        action: Action,
        cause: Event,
    ) -> Option<(PageIndex, Install, InstallResult)> {
        let reply = |world: &Self, page: PageIndex| match cause {
            Event::Fetched { page: fetched } => {
                assert_eq!(fetched, page);
                let newest = world.stores.iter().filter_map(|s| s.get(&page.0)).max();
                newest.map_or(0, |&(_, content)| content)
            }
            other => panic!("no reply at hand in {other:?}"),
        };
        let (page, what) = match action {
            Action::Copy { page } => (page, Install::Copy),
            Action::Fill { page } => (page, Install::Fill),
            Action::Zero { page } => (page, Install::Zero),
            Action::Continue { page, .. } => (page, Install::Continue),
            Action::Unprotect { page } => (page, Install::Unprotect),
            _ => return None,
        };
        let old = self.local[page.0 as usize];
        let present = old.content.is_some();
        let new = match action {
            Action::Copy { .. } if !present => {
                Local { content: Some(reply(self, page)), mapped: true, protected: true }
            }
            Action::Fill { .. } => {
                assert!(!present, "a page in use is not overwritten");
                Local { content: Some(reply(self, page)), ..Local::default() }
            }
            Action::Zero { .. } if !present => {
                Local { content: Some(0), mapped: true, protected: false }
            }
            Action::Continue { .. } if !present => return Some((page, what, InstallResult::Hole)),
            Action::Continue { protect, .. } if !old.mapped => {
                Local { mapped: true, protected: protect, ..old }
            }
            Action::Unprotect { .. } => Local { protected: false, ..old },
            _ => return Some((page, what, InstallResult::Exists)),
        };
        self.local[page.0 as usize] = new;
        Some((page, what, InstallResult::Ok))
    }

    fn carry_out(&mut self, action: Action) {
        match action {
            Action::Fetch { page, version, sponsor, .. } => {
                let held = self.stores[usize::from(sponsor)].get(&page.0);
                let error = if self.corrupt == Some(sponsor) {
                    Some(FetchError::Corrupt)
                } else if held.is_none_or(|&(stored, _)| stored != version.0) {
                    Some(FetchError::Absent)
                } else {
                    None
                };
                self.queue.push_back(match error {
                    Some(error) => Event::FetchFailed { page, sponsor, error },
                    None => Event::Fetched { page },
                });
            }
            Action::Unmap { page, version, dirty, replicas } => {
                self.unmap(page, version, dirty, replicas);
            }
            Action::Punch { page } => {
                self.local[page.0 as usize] = Local::default();
                self.queue.push_back(Event::Punched { page, ok: true });
            }
            Action::Poison { page } => self.poisoned.push(page.0),
            _ => {}
        }
    }

    fn unmap(&mut self, page: PageIndex, version: PageVersion, dirty: bool, replicas: u8) {
        let local = &mut self.local[page.0 as usize];
        let clean = match self.protection {
            Protection::Zap => {
                local.mapped = false;
                local.protected && !dirty
            }
            Protection::WriteProtect => {
                local.protected = true;
                !dirty
            }
        };
        let content = local.content.unwrap_or(0);
        let outcome = match content {
            _ if clean => Unmapped::Clean,
            0 if version == PageVersion(1) => Unmapped::Zero(0),
            0 => Unmapped::Zero(replicas),
            _ => Unmapped::Sent(replicas),
        };
        self.queue.push_back(Event::Unmapped { page, version, outcome });
        if !matches!(outcome, Unmapped::Sent(_)) && outcome != Unmapped::Zero(replicas) {
            return;
        }
        let set = self.pager.config.layout.replicas(page.extent());
        for (replica, &sponsor) in set.sponsors().iter().enumerate() {
            if replicas >> replica & 1 == 0 {
                continue;
            }
            let stored = self.up[usize::from(sponsor)];
            if stored {
                self.stores[usize::from(sponsor)].insert(page.0, (version.0, content));
            }
            self.queue.push_back(match stored {
                true => Event::Stored { page, version, sponsor },
                false => Event::StoreFailed { page, version, sponsor },
            });
        }
    }

    /// An access by the guest; `None` if the page does not come.
    fn access(&mut self, page: u64, write: Option<u64>) -> Option<u64> {
        let index = PageIndex(page);
        for _ in 0..4 {
            let local = self.local[page as usize];
            let kind = match local {
                Local { content: None, .. } => FaultKind::Missing,
                Local { mapped: false, .. } => FaultKind::Minor,
                Local { protected: true, .. } if write.is_some() => match self.protection {
                    Protection::WriteProtect => FaultKind::WriteProtect,
                    Protection::Zap => {
                        self.local[page as usize].protected = false;
                        continue;
                    }
                },
                Local { content, .. } => {
                    if let Some(value) = write {
                        self.local[page as usize].content = Some(value);
                    }
                    return content;
                }
            };
            self.run(Event::Fault { page: index, kind });
        }
        None
    }
}

#[test]
fn first_touch_needs_no_network() {
    let mut world = World::new(Protection::Zap, 1000, 2, 2);
    assert_eq!(world.access(5, None), Some(0));
    assert_eq!(world.pager.counters().demand_fetches, 0);
    assert_eq!(world.pager.counters().zero_installs, 1);
}

#[test]
fn pages_beyond_the_budget_come_back_as_written() {
    for protection in [Protection::Zap, Protection::WriteProtect] {
        let mut world = World::new(protection, 600, 2, 2);
        for page in 0..2000 {
            world.access(page, Some(page + 1));
        }
        assert!(world.pager.gauges().remote_pages >= 1400);
        assert!((0..2000).all(|page| world.access(page, None) == Some(page + 1)));
    }
}

#[test]
fn clean_pages_are_dropped_unsent() {
    let mut world = World::new(Protection::Zap, 600, 1, 1);
    for page in 0..2000 {
        world.access(page, Some(1));
    }
    let stored = world.pager.counters().evicted_dirty_pages;
    for page in 0..2000 {
        world.access(page, None);
    }
    let counters = world.pager.counters();
    assert!(counters.evicted_clean_pages > 500, "{counters:?}");
    // Those that were still local and dirty when the second round began.
    assert!(counters.evicted_dirty_pages <= stored + 600, "{counters:?}");
}

#[test]
fn pages_that_were_only_read_are_never_sent() {
    let mut world = World::new(Protection::Zap, 600, 2, 2);
    for page in 0..2000 {
        assert_eq!(world.access(page, None), Some(0));
    }
    assert!(world.pager.counters().evicted_zero_pages > 1000);
    assert!(world.stores.iter().all(BTreeMap::is_empty));
    assert_eq!(world.pager.gauges().remote_pages, 0);
}

#[test]
fn a_second_replica_serves_when_the_first_is_corrupt() {
    let mut world = World::new(Protection::Zap, 600, 2, 2);
    for page in 0..2000 {
        world.access(page, Some(page + 1));
    }
    world.corrupt = Some(0);
    assert!((0..2000).all(|page| world.access(page, None) == Some(page + 1)));
    assert!(world.pager.counters().corrupt_replies > 0);
}

#[test]
fn a_page_without_any_good_replica_is_poisoned_not_guessed() {
    let mut world = World::new(Protection::Zap, 600, 1, 1);
    for page in 0..2000 {
        world.access(page, Some(page + 1));
    }
    world.corrupt = Some(0);
    assert_eq!(world.access(0, None), None);
    assert!(!world.poisoned.is_empty() && world.poisoned.iter().all(|&page| page == 0));
    assert_eq!(world.pager.gauges().poisoned_pages, 1);
}

#[test]
fn faults_wait_for_a_sponsor_that_is_down() {
    let mut world = World::new(Protection::Zap, 600, 1, 1);
    for page in 0..2000 {
        world.access(page, Some(page + 1));
    }
    world.up[0] = false;
    world.run(Event::SponsorDown { sponsor: 0 });
    assert_eq!(world.access(0, None), None);
    assert_eq!(world.pager.gauges().blocked_faults, 1);
    assert!(world.poisoned.is_empty());
    world.up[0] = true;
    world.run(Event::SponsorUp { sponsor: 0 });
    assert_eq!(world.pager.gauges().blocked_faults, 0);
    assert_eq!(world.access(0, None), Some(1));
}

#[test]
fn a_lower_budget_is_reached_and_a_higher_one_used() {
    let mut world = World::new(Protection::Zap, 2500, 2, 2);
    for page in 0..2000 {
        world.access(page, Some(page + 1));
    }
    world.run(Event::SetBudget { pages: 700 });
    for _ in 0..100 {
        world.run(Event::Tick);
    }
    assert!(world.pager.gauges().local_pages <= 700);
    world.run(Event::SetBudget { pages: 2500 });
    assert!((0..2000).all(|page| world.access(page, None) == Some(page + 1)));
    assert!(world.pager.gauges().local_pages > 1900);
}

#[test]
fn restore_brings_everything_back() {
    let mut world = World::new(Protection::Zap, 600, 2, 2);
    for page in 0..2000 {
        world.access(page, Some(page + 1));
    }
    world.run(Event::Restore);
    for _ in 0..2000 {
        world.run(Event::Tick);
    }
    assert!(world.pager.is_restored(), "{:?}", world.pager.gauges());
    assert!((0..2000).all(|page| world.local[page].content == Some(page as u64 + 1)));
}

#[test]
fn a_page_that_the_owner_discarded_is_zeros() {
    let mut world = World::new(Protection::Zap, 1000, 1, 1);
    world.access(3, Some(9));
    world.local[3] = Local::default();
    assert_eq!(world.access(3, None), Some(0));
    // The event says missing, the machine says resident: it maps, finds a hole, and fills it.
    assert_eq!(world.pager.counters().owner_discards, 1);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// The guest reads what it wrote, whatever the order, the budget and the protection, while
    /// one of two sponsors comes and goes.
    #[test]
    fn the_guest_reads_what_it_wrote(
        zap in any::<bool>(),
        budget in 400u64..1200,
        steps in proptest::collection::vec((0u64..PAGES, 0u8..16, 0u64..3), 1..4000),
    ) {
        let protection = if zap { Protection::Zap } else { Protection::WriteProtect };
        let mut world = World::new(protection, budget, 2, 2);
        let mut model: BTreeMap<u64, u64> = BTreeMap::new();
        for (step, (page, kind, value)) in steps.into_iter().enumerate() {
            match kind {
                0 if step % 50 == 0 => {
                    let up = !world.up[1];
                    world.up[1] = up;
                    world.run(if up {
                        Event::SponsorUp { sponsor: 1 }
                    } else {
                        Event::SponsorDown { sponsor: 1 }
                    });
                }
                0..8 => {
                    let value = if value == 0 { 0 } else { step as u64 + 1 };
                    prop_assert!(world.access(page, Some(value)).is_some());
                    model.insert(page, value);
                }
                _ => {
                    let expected = model.get(&page).copied().unwrap_or(0);
                    prop_assert_eq!(world.access(page, None), Some(expected));
                }
            }
            prop_assert!(world.pager.gauges().local_pages <= budget);
        }
        prop_assert!(world.poisoned.is_empty());
    }
}
