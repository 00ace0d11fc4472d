//! What a run covered, and what a broken invariant looks like to a person.

use std::collections::BTreeMap;
use std::fmt;

use heca_core::invariants::{self, Invariant};
use heca_core::pager::{Counters, Mutation};
use serde::Serialize;

use crate::scenario::Scenario;

/// The machines' own debug assertions hold; the simulation reports a panic under this id.
pub const SIM_1: Invariant =
    Invariant { id: "SIM-1", text: "the machines' own assertions hold in every run" };

macro_rules! marks {
    ($($mark:ident => $name:literal,)*) => {
        /// Situations of the fake world that every long run should meet.
        #[derive(Debug, Clone, Copy)]
        pub(crate) enum Mark { $($mark,)* }

        const MARK_NAMES: &[&str] = &[$($name,)*];
    };
}

marks! {
    StaleEvent => "sim_stale_fault_events",
    SharedPage => "sim_several_vcpus_on_one_page",
    InstallRace => "sim_vcpu_between_install_and_answer",
    Remapped => "sim_mapped_again_before_check",
    ZapFailed => "sim_zap_did_not_take",
    ReadFailed => "sim_victim_unreadable",
    CleanVictim => "sim_victim_clean",
    ZeroUntold => "sim_zero_page_never_sent",
    ZeroTold => "sim_zero_page_sent",
    AsyncCleared => "sim_write_cleared_wp_unasked",
    KernelUnmap => "sim_kernel_unmapped_unasked",
    Discard => "sim_owner_discards",
    Crash => "sim_sponsor_crashes",
    Frozen => "sim_sponsors_frozen",
    LateFrame => "sim_late_frames_stored",
    LateRefused => "sim_late_frames_refused",
    StoreRefused => "sim_stores_refused",
    FetchSpoilt => "sim_fetches_spoilt",
    Rotted => "sim_copies_rotted",
    Lost => "sim_pages_lost_on_all_sponsors",
    Emptied => "sim_sponsors_emptied",
    PoisonHit => "sim_poison_hits",
    ZombieRefused => "sim_old_owner_refused",
    RegionRefused => "sim_regions_refused_over_offer",
    RegionOpened => "sim_other_regions_opened",
    BudgetLowered => "sim_budget_lowered",
    BudgetRaised => "sim_budget_raised",
    MemoryFull => "sim_memory_full",
    Heal => "sim_heals",
    Restore => "sim_restores",
    Cut => "sim_sponsors_cut",
    LaneFrozen => "sim_lanes_frozen",
    Suspect => "sim_suspects",
    AnswerHeldUp => "sim_answers_held_up",
    SponsorLost => "sim_sponsors_given_up",
    Leaving => "sim_sponsors_leaving",
    SponsorAdded => "sim_sponsors_added",
    LateOlderVersion => "sim_late_answer_of_an_older_version",
    EarlierFetch => "sim_answer_of_an_earlier_fetch_used",
    HoldRefused => "sim_holds_refused",
    Released => "sim_extents_released",
    PullPresent => "sim_pulls_present",
    PullCopied => "sim_pulls_copied",
    PullSuperseded => "sim_pulls_superseded",
    PullFailed => "sim_pulls_failed",
    SourceSwitched => "sim_pull_sources_switched",
    TargetCrashed => "sim_rebuild_target_crashed",
    ReturnedAfterReplaced => "sim_returned_after_being_replaced",
    LeavingAtRest => "sim_leaving_at_rest",
    LostAtRest => "sim_lost_at_rest",
    NotRebuildable => "sim_not_rebuildable_at_rest",
    PagerCrash => "sim_pager_crashes",
    CrashAmidActions => "sim_crash_amid_actions",
    CrashWhileUnmapping => "sim_crash_while_unmapping",
    CrashWhileStoring => "sim_crash_while_storing",
    CrashWithStandby => "sim_crash_with_standby",
    CrashWhilePunching => "sim_crash_while_punching",
    CrashWhileFetching => "sim_crash_while_fetching",
    CrashWhileFilling => "sim_crash_while_filling",
    CrashWhileMoving => "sim_crash_while_moving",
    Takeover => "sim_takeovers",
    LateOldEpochRefused => "sim_late_frames_of_old_epoch_refused",
    LateOldEpochExecuted => "sim_late_frames_of_old_epoch_executed",
    Migration => "sim_migrations",
    Committed => "sim_migrations_committed",
    CommittedSafe => "sim_safe_migrations_committed",
    MigrationDone => "sim_migrations_done",
    FlushedAtRest => "sim_flushed_at_rest",
    AbortedCopying => "sim_migrations_ended_copying",
    AbortedStopped => "sim_migrations_ended_stopped",
    AbortedLoading => "sim_migrations_ended_loading",
    WriteCollected => "sim_writes_collected",
    DropNotice => "sim_drop_notices",
    ToldSent => "sim_pages_told_current",
    ToldBehind => "sim_pages_told_behind",
    DemandAnswered => "sim_demands_answered",
    DemandCrossed => "sim_demands_crossed",
    DemandLost => "sim_demands_lost",
    LinkCut => "sim_links_cut",
    LinkCutWithPages => "sim_links_cut_with_pages",
    ArrivedTwice => "sim_pages_arrived_twice",
    CrashBeforeSwitch => "sim_crash_before_switch",
    CrashWhileLoading => "sim_crash_while_loading",
    CrashAmidTakeover => "sim_crash_amid_takeover",
    CrashWithPagesBehind => "sim_crash_with_pages_behind",
    CrashAmidArrival => "sim_crash_amid_arrival",
    Grant => "sim_grants",
    GrantLost => "sim_grants_lost",
    LateGrant => "sim_late_grants",
    RepeatedGrant => "sim_repeated_grants",
    RightGivenBack => "sim_rights_given_back",
    AttemptUnknown => "sim_attempts_unknown",
    SourceDiedGranting => "sim_source_died_granting",
    TargetDiedAmidActions => "sim_target_died_amid_actions",
    RanAfterRestart => "sim_target_ran_after_restart",
}

/// Counters of the pager that mark a branch which must not stay untried.
const RARE_COUNTERS: &[&str] = &[
    "prefetches_used",
    "prefetches_wasted",
    "standby_hits",
    "mapped_ahead",
    "faults_stalled",
    "faults_blocked",
    "evicted_clean_pages",
    "evicted_zero_pages",
    "cancelled_unmapping",
    "cancelled_storing",
    "skipped_mapped",
    "store_failures",
    "late_results",
    "fetch_retries",
    "corrupt_replies",
    "fetched_from_stale",
    "install_exists",
    "install_again",
    "install_no_memory",
    "owner_discards",
    "faults_while_fetching",
    "faults_while_punching",
    "punch_failures",
    "faults_write_protect",
    "poisoned_pages",
    "hedged_fetches",
    "hedges_won",
    "rebuilt_pages",
    "rebuilt_extents",
    "moved_extents",
    "rebuild_failures",
    "behind_demands",
    "behind_arrived",
];

/// Counts of one run, over all its worlds.
#[derive(Debug, Clone)]
pub(crate) struct Stats {
    pub(crate) reads_checked: u64,
    pub(crate) writes: u64,
    /// Times that each invariant was checked, in the order of [`invariants::ALL`].
    checks: [u64; invariants::ALL.len()],
    marks: [u64; MARK_NAMES.len()],
    counters: BTreeMap<String, u64>,
}

impl Default for Stats {
    fn default() -> Self {
        Self {
            reads_checked: 0,
            writes: 0,
            checks: [0; invariants::ALL.len()],
            marks: [0; MARK_NAMES.len()],
            counters: BTreeMap::new(),
        }
    }
}

impl Stats {
    pub(crate) fn mark(&mut self, mark: Mark) {
        self.marks[mark as usize] += 1;
    }

    pub(crate) fn checked(&mut self, invariant: Invariant) {
        let index = invariants::ALL.iter().position(|i| i.id == invariant.id);
        self.checks[index.expect("every invariant is in the list")] += 1;
    }

    /// Adds the counters of a pager, by name, so that new ones need no change here.
    pub(crate) fn add_counters(&mut self, counters: &Counters) {
        let value = serde_json::to_value(counters).expect("counters are plain numbers");
        let fields = value.as_object().expect("counters are a struct");
        for (name, count) in fields {
            *self.counters.entry(name.clone()).or_default() += count.as_u64().unwrap_or(0);
        }
    }

    pub(crate) fn report(mut self, seed: u64, ticks: u64, worlds: u64) -> Report {
        self.add_counters(&Counters::default());
        let invariants = invariants::ALL
            .iter()
            .zip(self.checks)
            .map(|(i, times)| InvariantChecks { id: i.id, text: i.text, times })
            .collect();
        let rare = RARE_COUNTERS.iter().map(|&name| (name, self.counters[name]));
        let marks = MARK_NAMES.iter().copied().zip(self.marks);
        let branches = rare.chain(marks).map(|(name, count)| Branch { name, count }).collect();
        Report {
            seed,
            ticks,
            worlds,
            reads_checked: self.reads_checked,
            writes: self.writes,
            invariants,
            branches,
            counters: self.counters,
        }
    }
}

/// How often one invariant was checked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct InvariantChecks {
    /// Its id.
    pub id: &'static str,
    /// What must hold.
    pub text: &'static str,
    /// Number of checks.
    pub times: u64,
}

/// How often a rare situation was met.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Branch {
    /// Name of the pager's counter or, with `sim_` in front, of the simulation's.
    pub name: &'static str,
    /// How often.
    pub count: u64,
}

/// Result of a run in which every invariant held.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Seed of the run.
    pub seed: u64,
    /// Steps done; somewhat more than asked for, as the last world is brought to rest.
    pub ticks: u64,
    /// Worlds that were run one after the other.
    pub worlds: u64,
    /// Guest reads compared with the last write.
    pub reads_checked: u64,
    /// Guest writes.
    pub writes: u64,
    /// Checks of each invariant.
    pub invariants: Vec<InvariantChecks>,
    /// Rare situations.
    pub branches: Vec<Branch>,
    /// All counters of the pager, added up.
    pub counters: BTreeMap<String, u64>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "seed {}: {} ticks in {} worlds", self.seed, self.ticks, self.worlds)?;
        writeln!(f, "{} reads checked, {} writes", self.reads_checked, self.writes)?;
        writeln!(f)?;
        for i in &self.invariants {
            writeln!(f, "{:<6}{:>12}  {}", i.id, i.times, i.text)?;
        }
        writeln!(f)?;
        for branch in &self.branches {
            writeln!(f, "{:<38}{:>12}", branch.name, branch.count)?;
        }
        Ok(())
    }
}

/// Rare branches that a run never took. After a long run this should be empty: a branch that is
/// never taken is not tested.
#[must_use]
pub fn rare_branches_missed(report: &Report) -> Vec<&str> {
    report.branches.iter().filter(|b| b.count == 0).map(|b| b.name).collect()
}

/// A broken invariant.
#[derive(Debug, Clone)]
pub struct Violation {
    /// Which one.
    pub invariant: Invariant,
    /// Seed of the world that broke it: run alone, with [`Self::ticks`], it does so again.
    pub seed: u64,
    /// The kind of world.
    pub scenario: Scenario,
    /// Ticks to run that world with.
    pub ticks: u64,
    /// What was broken on purpose, if anything.
    pub mutation: Option<Mutation>,
    /// Tick of the violation within its world.
    pub tick: u64,
    /// The page, if there is one.
    pub page: Option<u64>,
    /// What was seen.
    pub detail: String,
    /// What happened to the page and its sponsors before, oldest first.
    pub history: Vec<String>,
}

impl Violation {
    /// The command that shows the same violation again.
    #[must_use]
    pub fn command(&self) -> String {
        let Self { scenario, seed, ticks, .. } = self;
        let mut command = match scenario {
            Scenario::Mixed => format!("heca sim --seed {seed} --ticks {ticks}"),
            _ => format!(
                "heca sim --scenario {scenario} --seeds {seed}..{seed} --ticks-per-seed {ticks}"
            ),
        };
        if let Some(mutation) = self.mutation {
            let name = serde_json::to_value(mutation).expect("a mutation is a plain name");
            command.push_str(" --break ");
            command.push_str(name.as_str().expect("a mutation is a plain name"));
        }
        command
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} is broken: {}", self.invariant.id, self.invariant.text)?;
        write!(f, "{}, seed {}, tick {}", self.scenario, self.seed, self.tick)?;
        if let Some(page) = self.page {
            write!(f, ", page {page:#x}")?;
        }
        writeln!(f, ": {}", self.detail)?;
        writeln!(f, "run again: {}", self.command())?;
        writeln!(f, "history, by tick:")?;
        self.history.iter().try_for_each(|line| writeln!(f, "{line}"))
    }
}

impl std::error::Error for Violation {}
