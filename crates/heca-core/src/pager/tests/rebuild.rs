//! What the simulation found in rebuilds and in what follows a crash.

use heca_types::ExtentIndex;
use heca_types::limits::EXTENT_PAGES;

use super::super::machine::State;
use super::*;

const EXTENT: ExtentIndex = ExtentIndex(0);

fn step(world: &mut World, event: Event) -> Vec<Action> {
    let mut actions = Vec::new();
    world.pager.step(event, &mut actions);
    actions
}

fn sponsors(world: &World) -> Vec<u8> {
    world.pager.layout().replicas(EXTENT).sponsors().to_vec()
}

/// A record of an extent on these sponsors.
fn record(stale: u8, sponsors: &[u8]) -> u64 {
    let mut bytes = [0; 8];
    bytes[0] = sponsors.len() as u8;
    bytes[1] = stale;
    bytes[2..2 + sponsors.len()].copy_from_slice(sponsors);
    bytes[7] = 0xe7;
    u64::from_le_bytes(bytes)
}

/// Sponsor 0 wants to be rid of the only replica, and sponsor 1 was asked.
fn moving() -> World {
    let mut world = filled(2, 1);
    let actions = step(&mut world, Event::SponsorLeaving { sponsor: 0, leaving: true });
    assert!(actions.contains(&Action::Hold { extent: EXTENT, sponsor: 1 }), "{actions:?}");
    world
}

#[test]
fn a_target_that_has_the_only_copy_of_a_page_is_not_given_up() {
    let mut world = moving();
    step(&mut world, Event::Held { extent: EXTENT, sponsor: 1, ok: true });
    take_down(&mut world, 0);
    for page in 0..1500 {
        world.access(page, Some(page + 1));
    }
    assert_eq!(world.pager.stale(EXTENT), 0b11, "sponsor 0 missed what only 1 has");
    take_down(&mut world, 1);
    assert_eq!(sponsors(&world), [0, 1]);
}

#[test]
fn the_only_complete_replica_is_kept_although_it_went_down_before_its_target_began() {
    let mut world = moving();
    take_down(&mut world, 0);
    step(&mut world, Event::Held { extent: EXTENT, sponsor: 1, ok: true });
    assert_eq!(sponsors(&world), [0, 1]);
}

#[test]
fn only_the_answer_to_the_last_hold_counts() {
    let mut world = moving();
    step(&mut world, Event::SponsorDown { sponsor: 1 });
    step(&mut world, Event::SponsorUp { sponsor: 1 });
    let actions = step(&mut world, Event::Work);
    assert!(actions.contains(&Action::Hold { extent: EXTENT, sponsor: 1 }), "{actions:?}");
    step(&mut world, Event::Held { extent: EXTENT, sponsor: 1, ok: true });
    assert_eq!(sponsors(&world), [0], "a release may be on its way between the two");
    step(&mut world, Event::Held { extent: EXTENT, sponsor: 1, ok: true });
    assert_eq!(sponsors(&world), [0, 1]);
}

#[test]
fn a_record_is_written_before_what_relies_on_it() {
    let mut world = World::new(Protection::Zap, 1000, 2, 1);
    step(&mut world, Event::SponsorLeaving { sponsor: 0, leaving: true });
    step(&mut world, Event::Held { extent: EXTENT, sponsor: 1, ok: true });
    for _ in 0..EXTENT_PAGES {
        let actions = step(&mut world, Event::Work);
        if actions.contains(&Action::Release { extent: EXTENT, sponsor: 0 }) {
            assert_eq!(actions[0], Action::Extent { extent: EXTENT });
            return;
        }
    }
    panic!("the extent does not move");
}

#[test]
fn an_extent_that_lacks_a_source_does_not_keep_others_waiting() {
    let config = Config {
        replicas: 2,
        pages: 2 * EXTENT_PAGES,
        budget_pages: 1000,
        protection: Protection::Zap,
        layout: Layout::spread(2, &[1, 1], 2).expect("possible"),
        weights: vec![1, 1],
        prefetch: false,
        mutation: None,
    };
    let mut pager = Pager::new(config);
    for number in 0..2 {
        pager.adopt_extent(ExtentIndex(number), record(0b10, &[0, 1])).expect("a record");
    }
    pager.adopt_absent(PageIndex(5), PageVersion(1), true);
    let mut events = VecDeque::new();
    for _ in 0..200 {
        events.push_back(Event::Tick);
        while let Some(event) = events.pop_front() {
            let mut actions = Vec::new();
            pager.step(event, &mut actions);
            for action in actions {
                if let Action::Pull { page, attempt, .. } = action {
                    events.push_back(Event::Pulled { page, attempt, ok: false });
                }
            }
        }
    }
    assert_eq!(pager.stale(ExtentIndex(0)), 0b10);
    assert_eq!(pager.stale(ExtentIndex(1)), 0);
}

#[test]
fn leftovers_of_a_move_do_not_block_the_next_one() {
    let mut world = World::new(Protection::Zap, 1000, 4, 2);
    world.pager.adopt_extent(EXTENT, record(0b110, &[0, 1, 2])).expect("a record");
    take_down(&mut world, 2);
    world.run(Event::SponsorLost { sponsor: 2 });
    world.run(Event::SponsorLeaving { sponsor: 1, leaving: true });
    wait_for_rebuild(&mut world);
    assert_eq!(world.pager.gauges().degraded_extents, 0, "{:?}", sponsors(&world));
    assert_eq!(world.pager.gauges().leaving_extents, 0, "{:?}", sponsors(&world));
}

#[test]
fn a_standby_page_whose_copies_are_gone_is_stored_anew() {
    let mut world = filled(3, 2);
    for page in 0..2000 {
        if world.pager.pages[page as usize].state == State::Standby {
            world.stores[1].remove(&page);
        }
    }
    take_down(&mut world, 0);
    world.run(Event::SponsorLost { sponsor: 0 });
    wait_for_rebuild(&mut world);
    assert_eq!(world.pager.gauges().degraded_extents, 0);
    alone(&mut world, 2);
}

#[test]
fn a_fault_that_failed_by_a_passing_error_is_served_later() {
    let mut world = filled(2, 2);
    take_down(&mut world, 1);
    world.corrupt = Some(0);
    assert_eq!(world.access(3, None), None);
    world.corrupt = None;
    for _ in 0..32 {
        world.run(Event::Tick);
    }
    assert_eq!(world.access(3, None), Some(4));
}

#[test]
fn what_only_an_absent_replica_has_is_stored_again_before_it_is_dropped() {
    let mut world = filled(2, 2);
    // Sponsor 1 misses writes; pages come back clean from sponsor 0.
    take_down(&mut world, 1);
    for page in 0..1500 {
        world.access(page, Some(page + 1));
    }
    for page in 0..100 {
        world.access(page, None);
    }
    // The only complete one goes, the one with gaps is there.
    world.up[1] = true;
    world.run(Event::SponsorDown { sponsor: 0 });
    world.up[0] = false;
    world.run(Event::SponsorUp { sponsor: 1 });
    let local: Vec<u64> =
        (0..2000).filter(|&page| world.local[page as usize].content.is_some()).collect();
    assert!(!local.is_empty());
    for page in 2000..2900 {
        world.access(page, Some(1));
    }
    for page in local {
        assert_eq!(world.access(page, None), Some(page + 1), "page {page}");
    }
}
