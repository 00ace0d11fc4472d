//! A region that is handed over: what its former owner must not do any more, and what the next one
//! does with pages that are behind.

use heca_types::{ExtentIndex, PageIndex, PageVersion};

use super::super::{Action, Config, Event, FaultKind, Holding, Install, InstallResult, Pager};
use super::super::{Protection, Unmapped};
use crate::placement::Layout;

fn pager(budget: u64, sponsors: usize) -> Pager {
    Pager::new(Config {
        pages: 100,
        budget_pages: budget,
        protection: Protection::Zap,
        layout: Layout::spread(1, &vec![1; sponsors], 1).expect("possible"),
        replicas: 1,
        weights: vec![1; sponsors],
        prefetch: false,
        mutation: None,
    })
}

fn step(pager: &mut Pager, event: Event) -> Vec<Action> {
    let mut actions = Vec::new();
    pager.step(event, &mut actions);
    actions
}

fn fault(page: u64) -> Event {
    Event::Fault { page: PageIndex(page), kind: FaultKind::Missing }
}

#[test]
fn freezing_brings_nothing_in_by_itself() {
    let mut pager = pager(0, 1);
    let page = PageIndex(7);
    assert_eq!(step(&mut pager, fault(7)), []);
    assert_eq!(step(&mut pager, Event::Flush { on: true }), []);
    assert_eq!(pager.unflushed(), 0);
    assert_eq!(step(&mut pager, Event::Freeze { on: true }), []);
    assert_eq!(pager.holding(page).0, Holding::Zero);
    // It is not forgotten.
    assert_eq!(step(&mut pager, Event::Tick), [Action::Zero { page }]);
}

/// A pager that asked a sponsor to hold the extent in place of one that wants to leave.
fn moving() -> (Pager, ExtentIndex, u8) {
    let mut pager = pager(1000, 3);
    let extent = ExtentIndex(0);
    let old = pager.layout().replicas(extent).sponsors()[0];
    let leaving = Event::SponsorLeaving { sponsor: old, leaving: true };
    (0..10).for_each(|_| drop(step(&mut pager, Event::Tick)));
    let [Action::Hold { sponsor, .. }] = step(&mut pager, leaving)[..] else {
        panic!("nobody is asked");
    };
    (pager, extent, sponsor)
}

#[test]
fn no_extent_moves_while_frozen() {
    for ok in [true, false] {
        let (mut pager, extent, sponsor) = moving();
        let before = pager.extent_record(extent);
        step(&mut pager, Event::Freeze { on: true });
        let actions = step(&mut pager, Event::Held { extent, sponsor, ok });
        let let_go = [Action::Release { extent, sponsor }];
        assert_eq!(actions, &let_go[..usize::from(ok)]);
        assert_eq!(pager.extent_record(extent), before);
        // Afterwards it does.
        step(&mut pager, Event::Freeze { on: false });
        let held = |a: &Action| matches!(a, Action::Hold { .. });
        assert!((0..100).any(|_| step(&mut pager, Event::Tick).iter().any(held)));
    }
}

#[test]
fn pages_behind_come_once_and_are_stored_before_they_are_dropped() {
    let mut pager = pager(1000, 1);
    let page = PageIndex(3);
    pager.adopt_behind(page, PageVersion(5));
    assert_eq!(pager.gauges().behind_pages, 1);
    assert_eq!(step(&mut pager, fault(3)), [Action::Demand { page }]);
    assert_eq!(step(&mut pager, fault(3)), []);
    assert_eq!(step(&mut pager, Event::SourceBack), [Action::Demand { page }]);
    let arrived = step(&mut pager, Event::Arrived { page });
    assert_eq!(arrived, [Action::Continue { page, protect: false }]);
    let (what, result) = (Install::Continue, InstallResult::Exists);
    step(&mut pager, Event::Installed { page, what, result });
    assert_eq!(step(&mut pager, Event::Arrived { page }), []);
    let actions = step(&mut pager, Event::Flush { on: true });
    let unmap = Action::Unmap { page, version: PageVersion(6), dirty: true, sponsors: 1 };
    assert_eq!(actions, [unmap]);
}

#[test]
fn a_mark_that_was_taken_from_the_kernel_makes_a_clean_victim_stay() {
    let mut pager = pager(1000, 1);
    let page = PageIndex(3);
    pager.adopt_absent(page, PageVersion(1), true);
    assert!(matches!(step(&mut pager, fault(3))[..], [Action::Fetch { .. }]));
    step(&mut pager, Event::Fetched { page, version: PageVersion(1), sponsor: 0 });
    let (what, result) = (Install::Copy, InstallResult::Ok);
    step(&mut pager, Event::Installed { page, what, result });
    let actions = step(&mut pager, Event::Flush { on: true });
    let [Action::Unmap { version, dirty: false, .. }] = actions[..] else {
        panic!("{actions:?}");
    };
    // The scan came between the order and the look at the kernel's mark.
    pager.written(0..100);
    let outcome = Unmapped::Clean;
    let again = step(&mut pager, Event::Unmapped { page, version, outcome });
    assert!(matches!(again[..], [Action::Unmap { dirty: true, .. }]), "{again:?}");
}
