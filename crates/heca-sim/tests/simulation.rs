//! The simulation's own tests: the machines hold up, and broken ones are noticed.

use heca_core::pager::Mutation;
use heca_sim::{Options, Scenario, Search, Violation, rare_branches_missed, run, search};

fn options(seed: u64, ticks: u64) -> Options {
    Options { seed, ticks, mutation: None }
}

fn seeds(scenario: Scenario, last: u64, mutation: Option<Mutation>) -> Search {
    Search { scenario, seeds: 1..=last, ticks_per_seed: 5_000, mutation }
}

#[test]
fn invariants_hold_in_every_scenario_and_its_rare_branches_are_taken() {
    for scenario in Scenario::ALL {
        let report =
            search(&seeds(scenario, 400, None)).unwrap_or_else(|violation| panic!("{violation}"));
        let never = |name: &&&str| report.branches.iter().any(|b| b.name == **name && b.count == 0);
        let missed: Vec<_> = scenario.expected().iter().filter(never).collect();
        assert!(missed.is_empty(), "{scenario}: {missed:?} in {report}");
    }
}

/// The first violation within some seeds.
fn caught(mutation: Mutation) -> Box<Violation> {
    let scenario = match mutation {
        Mutation::HedgeAnyVersion => Scenario::Failover,
        Mutation::RebuildEarly => Scenario::Rebuild,
        Mutation::AcceptStaleEpoch => Scenario::Fencing,
        Mutation::FinalScanTrusts
        | Mutation::MarkAfterRead
        | Mutation::ArriveLate
        | Mutation::WrittenForgets
        | Mutation::ResumeOnSilence
        | Mutation::RunBeforeRecord => Scenario::Migration,
        _ => Scenario::Mixed,
    };
    let last = if scenario == Scenario::Migration { 600 } else { 100 };
    match search(&seeds(scenario, last, Some(mutation))) {
        Ok(_) => panic!("{mutation:?} goes unnoticed"),
        Err(violation) => violation,
    }
}

#[test]
fn every_mutation_breaks_its_invariant() {
    for mutation in Mutation::ALL {
        let fitting: &[&str] = match mutation {
            Mutation::ForgetDirty => &["PG-1", "PG-2"],
            Mutation::PunchEarly => &["PG-2", "RB-1"],
            Mutation::FetchTwice => &["PG-3"],
            Mutation::ForgetFault => &["PG-4", "PG-5"],
            Mutation::IgnoreBudget => &["PG-6"],
            Mutation::AcceptStaleEpoch => &["EP-1"],
            Mutation::HedgeAnyVersion => &["PG-1"],
            // A rebuild that passes such a page by may be noticed first.
            Mutation::RecoverAsZero => &["PG-1", "RB-1"],
            Mutation::RebuildEarly => &["RB-1"],
            Mutation::FinalScanTrusts | Mutation::MarkAfterRead => &["PG-1"],
            Mutation::ArriveLate => &["MG-3", "PG-1"],
            Mutation::WrittenForgets => &["PG-1", "PG-2"],
            Mutation::ResumeOnSilence | Mutation::RunBeforeRecord => &["MG-1"],
        };
        let violation = caught(mutation);
        assert!(fitting.contains(&violation.invariant.id), "{mutation:?}: {violation}");
        assert!(!violation.history.is_empty(), "{violation}");
    }
}

#[test]
fn a_violation_of_a_scenario_can_be_shown_again_from_what_it_says() {
    let first = caught(Mutation::RebuildEarly);
    let Violation { scenario, seed, ticks, .. } = *first;
    let expected = format!(
        "heca sim --scenario rebuild --seeds {seed}..{seed} --ticks-per-seed {ticks} \
         --break rebuild-early"
    );
    assert_eq!(first.command(), expected);
    let mutation = first.mutation;
    let again = Search { scenario, seeds: seed..=seed, ticks_per_seed: ticks, mutation };
    assert_eq!(search(&again).expect_err("the same world").to_string(), first.to_string());
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
    let mut missed: Option<Vec<String>> = None;
    for seed in 1..=6 {
        let report =
            run(&options(seed, 4_000_000)).unwrap_or_else(|violation| panic!("{violation}"));
        assert!(report.invariants.iter().all(|i| i.times > 0), "{report}");
        let now = rare_branches_missed(&report);
        let still: Vec<String> = match &missed {
            Some(before) => before.iter().filter(|b| now.contains(&b.as_str())).cloned().collect(),
            None => now.into_iter().map(str::to_owned).collect(),
        };
        if still.is_empty() {
            return;
        }
        missed = Some(still);
    }
    panic!("never taken: {missed:?}");
}
