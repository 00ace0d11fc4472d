//! The simulation's own tests: the machines hold up, and broken ones are noticed.

use heca_core::pager::Mutation;
use heca_sim::{Options, Violation, rare_branches_missed, run};

fn options(seed: u64, ticks: u64) -> Options {
    Options { seed, ticks, mutation: None }
}

#[test]
fn invariants_hold_for_many_seeds() {
    for seed in 0..200 {
        if let Err(violation) = run(&options(seed, 5_000)) {
            panic!("{violation}");
        }
    }
}

/// The first violation within some seeds.
fn caught(mutation: Mutation) -> Box<Violation> {
    (0..16)
        .find_map(|seed| run(&Options { seed, ticks: 20_000, mutation: Some(mutation) }).err())
        .unwrap_or_else(|| panic!("{mutation:?} goes unnoticed"))
}

#[test]
fn every_mutation_breaks_its_invariant() {
    for mutation in Mutation::ALL {
        let fitting: &[&str] = match mutation {
            Mutation::ForgetDirty => &["PG-1", "PG-2"],
            Mutation::PunchEarly => &["PG-2"],
            Mutation::FetchTwice => &["PG-3"],
            Mutation::ForgetFault => &["PG-4", "PG-5"],
            Mutation::IgnoreBudget => &["PG-6"],
            Mutation::AcceptStaleEpoch => &["EP-1"],
        };
        let violation = caught(mutation);
        assert!(fitting.contains(&violation.invariant.id), "{mutation:?}: {violation}");
        assert!(!violation.history.is_empty(), "{violation}");
    }
}

#[test]
fn a_violation_can_be_shown_again_from_what_it_says() {
    let first = caught(Mutation::PunchEarly);
    assert!(first.command().ends_with("--break punch-early"), "{}", first.command());
    let (seed, ticks, mutation) = (first.seed, first.ticks, first.mutation);
    let again = run(&Options { seed, ticks, mutation }).expect_err("the same world");
    assert_eq!(again.to_string(), first.to_string());
}

#[test]
fn a_seed_says_everything() {
    let report = run(&options(7, 60_000)).expect("no violation");
    assert_eq!(report, run(&options(7, 60_000)).expect("no violation"));
    assert_ne!(report.counters, run(&options(8, 60_000)).expect("no violation").counters);
}

#[test]
fn a_long_run_takes_every_rare_branch() {
    let report = run(&options(1, 300_000)).unwrap_or_else(|violation| panic!("{violation}"));
    assert_eq!(rare_branches_missed(&report), Vec::<&str>::new(), "{report}");
    assert!(report.invariants.iter().all(|i| i.times > 0), "{report}");
}
