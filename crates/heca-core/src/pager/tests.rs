//! Scenarios, and random histories against a reference model.
//!
//! The world here is synchronous: every action is carried out at once, so after each step nothing
//! is in flight. Interleavings are the simulation's business.

mod evict;
mod handover;
mod rebuild;

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
    /// Takes no extents.
    full: Option<u8>,
    copied: u64,
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
            replicas: replicas as u8,
            weights: vec![1; sponsors],
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
            full: None,
            copied: 0,
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
            Event::Fetched { page: fetched, .. } => {
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
                    None => Event::Fetched { page, version, sponsor },
                });
            }
            Action::Unmap { page, version, dirty, sponsors } => {
                self.unmap(page, version, dirty, sponsors);
            }
            Action::Punch { page, .. } => {
                self.local[page.0 as usize] = Local::default();
                self.queue.push_back(Event::Punched { page, ok: true });
            }
            Action::Poison { page } => self.poisoned.push(page.0),
            Action::Hold { extent, sponsor } => {
                let ok = self.up[usize::from(sponsor)] && self.full != Some(sponsor);
                self.queue.push_back(Event::Held { extent, sponsor, ok });
            }
            Action::Release { sponsor, .. } => self.stores[usize::from(sponsor)].clear(),
            Action::Pull { page, version, from, to, attempt } => {
                let held = self.stores[usize::from(from)].get(&page.0).copied();
                let target = &mut self.stores[usize::from(to)];
                let newest = target.get(&page.0).map_or(0, |&(stored, _)| stored);
                let ok = newest >= version.0 || held.is_some_and(|(v, _)| v == version.0);
                if let (true, Some(held)) = (ok && newest < version.0, held) {
                    target.insert(page.0, held);
                    self.copied += 1;
                }
                self.queue.push_back(Event::Pulled { page, attempt, ok });
            }
            _ => {}
        }
    }

    fn unmap(&mut self, page: PageIndex, version: PageVersion, dirty: bool, sponsors: u16) {
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
            0 => Unmapped::Zero(sponsors),
            _ => Unmapped::Sent(sponsors),
        };
        self.queue.push_back(Event::Unmapped { page, version, outcome });
        if !matches!(outcome, Unmapped::Sent(_)) && outcome != Unmapped::Zero(sponsors) {
            return;
        }
        for sponsor in (0..self.up.len() as u8).filter(|s| sponsors >> s & 1 == 1) {
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

/// 2000 written pages, most of them on sponsors.
fn filled(sponsors: usize, replicas: usize) -> World {
    let mut world = World::new(Protection::Zap, 600, sponsors, replicas);
    for page in 0..2000 {
        world.access(page, Some(page + 1));
    }
    world
}

fn wait_for_rebuild(world: &mut World) {
    for _ in 0..200 {
        world.run(Event::Tick);
    }
    assert!(!world.pager.is_rebuilding());
}

fn take_down(world: &mut World, sponsor: u8) {
    world.up[usize::from(sponsor)] = false;
    world.run(Event::SponsorDown { sponsor });
}

/// Every page comes back although only this sponsor is left.
fn alone(world: &mut World, sponsor: u8) {
    for other in (0..world.up.len() as u8).filter(|&s| s != sponsor) {
        take_down(world, other);
    }
    assert!((0..2000).all(|page| world.access(page, None) == Some(page + 1)));
    assert!(world.poisoned.is_empty());
}

#[test]
fn a_sponsor_that_stays_away_is_replaced_and_its_replacement_has_everything() {
    let mut world = filled(3, 2);
    take_down(&mut world, 0);
    wait_for_rebuild(&mut world);
    assert_eq!(world.pager.gauges().degraded_extents, 1);
    world.run(Event::SponsorLost { sponsor: 0 });
    wait_for_rebuild(&mut world);
    assert_eq!(world.pager.gauges().degraded_extents, 0);
    assert_eq!(world.pager.counters().moved_extents, 1);
    alone(&mut world, 2);
}

#[test]
fn a_sponsor_that_comes_back_gets_only_what_it_missed() {
    let mut world = filled(2, 2);
    take_down(&mut world, 1);
    for page in 0..100 {
        world.access(page, Some(page + 1));
    }
    for page in 100..1500 {
        world.access(page, None);
    }
    assert!(world.pager.stale(heca_types::ExtentIndex(0)) != 0);
    world.up[1] = true;
    world.run(Event::SponsorUp { sponsor: 1 });
    wait_for_rebuild(&mut world);
    assert_eq!(world.pager.gauges().degraded_extents, 0);
    assert!(world.copied <= 1000, "{} pages copied", world.copied);
    alone(&mut world, 1);
}

#[test]
fn a_sponsor_that_wants_out_keeps_its_role_until_another_has_everything() {
    let mut world = filled(3, 2);
    world.run(Event::SponsorLeaving { sponsor: 1, leaving: true });
    wait_for_rebuild(&mut world);
    assert_eq!(world.pager.gauges().leaving_extents, 0);
    assert!(world.stores[1].is_empty(), "what it held was released");
    alone(&mut world, 2);
}

#[test]
fn an_extent_goes_to_a_sponsor_that_has_room() {
    let mut world = filled(4, 2);
    world.full = Some(2);
    take_down(&mut world, 0);
    world.run(Event::SponsorLost { sponsor: 0 });
    wait_for_rebuild(&mut world);
    assert_eq!(world.pager.gauges().degraded_extents, 0);
    alone(&mut world, 3);
}

#[test]
fn a_page_without_a_source_keeps_the_extent_degraded() {
    let mut world = filled(3, 2);
    world.stores[1].remove(&7);
    take_down(&mut world, 0);
    world.run(Event::SponsorLost { sponsor: 0 });
    for _ in 0..50 {
        world.run(Event::Tick);
    }
    assert_eq!(world.pager.gauges().degraded_extents, 1);
    assert!(world.pager.counters().rebuild_failures > 0);
    assert_eq!(world.access(8, None), Some(9));
}

fn fetches(actions: &[Action]) -> Vec<u8> {
    let sponsor = |action: &Action| match action {
        Action::Fetch { sponsor, .. } => Some(*sponsor),
        _ => None,
    };
    actions.iter().filter_map(sponsor).collect()
}

#[test]
fn an_overdue_answer_is_hedged_once_and_the_first_answer_counts() {
    let mut world = filled(3, 3);
    let page = PageIndex(3);
    let mut actions = Vec::new();
    world.pager.step(Event::Fault { page, kind: FaultKind::Missing }, &mut actions);
    let first = fetches(&actions)[0];
    let version = PageVersion(world.stores[0][&3].0);
    actions.clear();
    world.pager.step(Event::Late { page, sponsor: first }, &mut actions);
    let second = fetches(&actions)[0];
    assert_ne!(first, second);
    actions.clear();
    world.pager.step(Event::Late { page, sponsor: first }, &mut actions);
    assert!(fetches(&actions).is_empty(), "two are enough");
    // An old version does not count, the failure of one leaves the other.
    world.pager.step(
        Event::Fetched { page, version: PageVersion(version.0 + 7), sponsor: first },
        &mut actions,
    );
    let error = FetchError::Lost;
    world.pager.step(Event::FetchFailed { page, sponsor: second, error }, &mut actions);
    actions.retain(|a| matches!(a, Action::Copy { .. }));
    assert!(actions.is_empty(), "{actions:?}");
    world.pager.step(Event::Fetched { page, version, sponsor: first }, &mut actions);
    assert!(actions.contains(&Action::Copy { page }), "{actions:?}");
}

#[test]
fn reads_avoid_suspects_and_prefer_the_clearly_faster() {
    let ask = |events: &[Event]| {
        let mut world = filled(2, 2);
        let mut actions = Vec::new();
        for event in events {
            world.pager.step(*event, &mut actions);
        }
        actions.clear();
        let fault = Event::Fault { page: PageIndex(3), kind: FaultKind::Missing };
        world.pager.step(fault, &mut actions);
        fetches(&actions)[0]
    };
    let slow = |sponsor, us| Event::Latency { sponsor, us };
    assert_eq!(ask(&[]), 0);
    assert_eq!(ask(&[slow(0, 120), slow(1, 90)]), 0, "the load is shared between equals");
    assert_eq!(ask(&[slow(0, 400), slow(1, 90)]), 1);
    assert_eq!(ask(&[Event::SponsorSuspect { sponsor: 0, suspect: true }]), 1);
}

#[test]
fn a_new_pager_goes_on_where_the_old_one_ended() {
    let mut world = filled(3, 2);
    world.run(Event::SponsorLeaving { sponsor: 0, leaving: true });
    wait_for_rebuild(&mut world);
    let old = world.pager;
    // The layout of the beginning: the move is in the record.
    let layout = Layout::spread(1, &[1, 1, 1], 2).expect("possible");
    world.pager = Pager::new(Config { layout, ..old.config.clone() });
    let extent = heca_types::ExtentIndex(0);
    assert!(world.pager.adopt_extent(extent, 0x1234).is_err());
    world.pager.adopt_extent(extent, old.extent_record(extent)).expect("a record");
    assert_eq!(world.pager.layout(), old.layout());
    for page in 0..PAGES {
        let version = PageVersion(old.pages[page as usize].version);
        match world.local[page as usize].content {
            Some(_) => world.pager.adopt_resident(PageIndex(page), version),
            None => world.pager.adopt_absent(PageIndex(page), version, true),
        }
    }
    assert_eq!(world.pager.gauges().local_pages, old.gauges().local_pages);
    assert!((0..2000).all(|page| world.access(page, None) == Some(page + 1)));
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
