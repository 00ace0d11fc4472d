//! Which pages leave together.

use std::collections::BTreeSet;

use heca_types::limits::EVICT_GROUP_PAGES;

use super::*;

fn victims(actions: &[Action]) -> BTreeSet<u64> {
    let pages = actions.iter().filter_map(|action| match action {
        Action::Unmap { page, .. } => Some(page.0),
        _ => None,
    });
    pages.collect()
}

#[test]
fn neighbours_of_a_victim_leave_with_it_and_nothing_between_them_stays() {
    let mut world = World::new(Protection::Zap, 1024, 2, 2);
    let (mut batches, mut largest) = (0, 0);
    // Scattered over the region, so that no two of one group follow each other.
    for page in (0..2000).map(|i| i * 769 % PAGES) {
        let mut actions = Vec::new();
        let fault = Event::Fault { page: PageIndex(page), kind: FaultKind::Missing };
        world.pager.step(fault, &mut actions);
        let batch = victims(&actions);
        batches += u32::from(!batch.is_empty());
        largest = largest.max(batch.len());
        let groups: BTreeSet<u64> = batch.iter().map(|page| page / EVICT_GROUP_PAGES).collect();
        assert!(groups.len() <= 2, "{batch:?}");
        for group in groups {
            let first = group * EVICT_GROUP_PAGES;
            let of_group = || batch.range(first..first + EVICT_GROUP_PAGES);
            let (low, high) = (*of_group().next().unwrap(), *of_group().next_back().unwrap());
            let stays =
                (low..=high).find(|p| world.local[*p as usize].mapped && !batch.contains(p));
            assert_eq!(stays, None, "{batch:?}");
        }
        for action in actions {
            if let Some((page, what, result)) = world.install(action, fault) {
                world.run(Event::Installed { page, what, result });
            } else {
                world.carry_out(action);
            }
        }
        while let Some(event) = world.queue.pop_front() {
            world.run(event);
        }
    }
    assert!(batches > 10 && largest >= 32, "{batches}, {largest} pages at the most");
}
