//! Local budgets that follow what VMs need.
//!
//! Each VM of a host whose budget is automatic is measured by its stall: the part of the time in which
//! at least one of its threads waited for a page, as Linux' pressure stall information has it for memory
//! (`some`). A VM that stalls more than [`TARGET`] gets more local memory, one that stalls less gives
//! some back, slowly, until it stalls (as Senpai does, with the formula of TMO, ASPLOS'22, section
//! 3.3). Where the host has no room for all that is wished for, what there is is shared in
//! proportion to the wishes, and VMs that stall far less than the others give up more: so stalls,
//! not sizes, become equal.

/// Part of the time that a VM may stall before it gets more memory.
pub const TARGET: f64 = 0.01;
/// Largest part of its budget that a VM gets on top in one step.
pub const GROW: f64 = 0.25;
/// Largest part of its budget that a VM gives back in one step while there is room for all.
pub const SHRINK: f64 = 0.01;
/// The same of a VM that stalls far less than the others, while there is not.
pub const YIELD: f64 = 0.05;
/// Part of its budget that a VM must use to get more.
const USED: f64 = 0.8;

/// A VM with an automatic budget. Sizes in pages.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Demand {
    /// Its budget now.
    pub budget: u64,
    /// Pages that are local now.
    pub local: u64,
    /// Smallest budget.
    pub min: u64,
    /// Largest budget.
    pub max: u64,
    /// Part of the time, from 0 to 1, in which a thread waited for a page.
    pub stall: f64,
}

impl Demand {
    /// Pages that it would get, or give, if it were alone.
    fn wish(&self) -> i64 {
        let budget = self.budget as f64;
        let change = if self.stall > TARGET {
            let used = self.local as f64 >= budget * USED;
            if used { budget * GROW * (1.0 - TARGET / self.stall) } else { 0.0 }
        } else {
            -budget * SHRINK * (1.0 - self.stall / TARGET)
        };
        self.bounded(change as i64)
    }

    /// A change as far as the bounds allow it.
    fn bounded(&self, change: i64) -> i64 {
        let budget = self.budget as i64;
        (budget + change).clamp(self.min as i64, self.max as i64) - budget
    }
}

/// New budgets, in the order of the VMs. `room` is how many pages more, or fewer if it is negative, the
/// host has for all of them together.
#[must_use]
pub fn plan(vms: &[Demand], room: i64) -> Vec<u64> {
    let mut changes: Vec<i64> = vms.iter().map(Demand::wish).collect();
    let wished = |changes: &[i64]| changes.iter().filter(|c| **c > 0).sum::<i64>();
    let given = |changes: &[i64]| -changes.iter().filter(|c| **c < 0).sum::<i64>();
    if wished(&changes) > room + given(&changes) || room < 0 {
        let mean = vms.iter().map(|vm| vm.stall).sum::<f64>() / vms.len().max(1) as f64;
        for (vm, change) in vms.iter().zip(&mut changes) {
            // At half of the mean there is nothing to give, at no stall at all the full part. A host
            // that is short of memory takes from all.
            let part = if room < 0 { 1.0 } else { 1.0 - 2.0 * vm.stall / mean.max(TARGET) };
            if part > 0.0 {
                *change = vm.bounded((*change).min(-(vm.budget as f64 * YIELD * part) as i64));
            }
        }
        let left = (room + given(&changes)).max(0);
        let wished = wished(&changes);
        for change in changes.iter_mut().filter(|change| **change > 0) {
            // In whole pages, rounded down: never more than there is.
            *change =
                (i128::from(*change) * i128::from(left.min(wished)) / i128::from(wished)) as i64;
        }
    }
    vms.iter().zip(changes).map(|(vm, change)| (vm.budget as i64 + change) as u64).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn vm(budget: u64, stall: f64) -> Demand {
        Demand { budget, local: budget, min: 4096, max: 1 << 20, stall }
    }

    #[test]
    fn a_vm_that_stalls_gets_more_and_one_that_does_not_gives_back() {
        let planned = plan(&[vm(100_000, 0.3), vm(100_000, 0.0), vm(100_000, TARGET)], 1 << 20);
        assert!(planned[0] > 120_000, "{planned:?}");
        assert_eq!(planned[1..], [99_000, 100_000]);
        // One that does not use what it has gets no more.
        let idle = Demand { local: 10_000, ..vm(100_000, 0.3) };
        assert_eq!(plan(&[idle], 1 << 20), [100_000]);
    }

    #[test]
    fn without_room_the_one_that_waits_gets_from_the_one_that_does_not() {
        let planned = plan(&[vm(100_000, 0.4), vm(100_000, 0.0)], 0);
        assert!(planned[0] > 104_000 && planned[1] == 95_000, "{planned:?}");
        // Equal ones keep what they have.
        assert_eq!(plan(&[vm(100_000, 0.4), vm(100_000, 0.4)], 0), [100_000, 100_000]);
    }

    #[test]
    fn a_host_that_is_short_takes_from_all() {
        let planned = plan(&[vm(100_000, 0.4), vm(50_000, 0.0)], -1000);
        assert!(planned[0] < 100_000 && planned[1] < 50_000, "{planned:?}");
    }

    /// A VM whose stall falls as its budget comes near to what it works on.
    fn settle(working: &[u64], host: u64) -> Vec<u64> {
        let mut budgets = vec![20_000; working.len()];
        for _ in 0..2000 {
            let vms: Vec<Demand> = budgets
                .iter()
                .zip(working)
                .map(|(&budget, &working)| {
                    let missing = working.saturating_sub(budget) as f64 / working as f64;
                    Demand { min: 4096, max: 400_000, ..vm(budget, missing) }
                })
                .collect();
            budgets = plan(&vms, host as i64 - budgets.iter().sum::<u64>() as i64);
        }
        budgets
    }

    #[test]
    fn budgets_come_to_rest_at_what_is_worked_on() {
        let budgets = settle(&[100_000, 30_000], 1 << 20);
        assert!((95_000..=101_000).contains(&budgets[0]), "{budgets:?}");
        assert!((28_000..=31_000).contains(&budgets[1]), "{budgets:?}");
    }

    #[test]
    fn where_there_is_too_little_stalls_become_alike() {
        let working = [200_000, 100_000, 100_000];
        let budgets = settle(&working, 200_000);
        let stalls: Vec<f64> =
            budgets.iter().zip(working).map(|(&b, w)| 1.0 - b as f64 / w as f64).collect();
        assert!(budgets.iter().sum::<u64>() <= 200_000, "{budgets:?}");
        let (least, most) = stalls.iter().fold((1.0f64, 0.0f64), |(a, b), &s| (a.min(s), b.max(s)));
        // Nobody stalls less than half of the mean.
        assert!(least > 0.2 && most < 0.75, "{stalls:?}");
    }

    proptest! {
        #[test]
        fn plans_keep_to_bounds_and_to_the_room(
            vms in proptest::collection::vec((4096u64..1 << 20, 0.0f64..1.0, any::<bool>()), 1..12),
            room in -100_000i64..100_000,
        ) {
            let vms: Vec<Demand> = vms
                .into_iter()
                .map(|(budget, stall, used)| {
                    let local = if used { budget } else { budget / 2 };
                    Demand { local, ..vm(budget, stall) }
                })
                .collect();
            let planned = plan(&vms, room);
            let before: u64 = vms.iter().map(|vm| vm.budget).sum();
            let after: u64 = planned.iter().sum();
            prop_assert!(after as i64 <= before as i64 + room.max(0), "{vms:?} {planned:?}");
            for (vm, budget) in vms.iter().zip(planned) {
                prop_assert!((vm.min..=vm.max).contains(&budget));
            }
        }
    }
}
