//! Kinds of worlds: which trouble is common there, and what must be seen to happen.

use std::fmt;
use std::str::FromStr;

use crate::params::Rates;
use crate::rng::Rng;

/// A set of rates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scenario {
    /// Everything.
    Mixed,
    /// Crashes, frozen connections, hedged reads, suspects.
    Failover,
    /// Sponsors lost and back again, full, leaving, added.
    Rebuild,
    /// The pager crashes.
    Recovery,
    /// Takeovers, late frames, an old owner that goes on.
    Fencing,
    /// Copies that rot, emptied stores, refused stores.
    Store,
    /// Budget, no memory, discards.
    Memory,
    /// The guest moves to another host, again and again.
    Migration,
}

impl Scenario {
    /// Every scenario.
    pub const ALL: [Self; 8] = [
        Self::Mixed,
        Self::Failover,
        Self::Rebuild,
        Self::Recovery,
        Self::Fencing,
        Self::Store,
        Self::Memory,
        Self::Migration,
    ];

    /// Its name on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Mixed => "mixed",
            Self::Failover => "failover",
            Self::Rebuild => "rebuild",
            Self::Recovery => "recovery",
            Self::Fencing => "fencing",
            Self::Store => "store",
            Self::Memory => "memory",
            Self::Migration => "migration",
        }
    }

    /// Whether guests move, and with them the right to run them.
    pub(crate) fn moves_guests(self) -> bool {
        matches!(self, Self::Mixed | Self::Migration)
    }

    /// Situations that a search must meet: a branch that is never taken is not tested.
    #[must_use]
    pub fn expected(self) -> &'static [&'static str] {
        match self {
            Self::Mixed => &["sim_heals", "sim_restores", "sim_pager_crashes", "rebuilt_extents"],
            Self::Failover => &[
                "hedged_fetches",
                "hedges_won",
                "faults_blocked",
                "sim_sponsor_crashes",
                "sim_sponsors_cut",
                "sim_lanes_frozen",
                "sim_suspects",
                "sim_late_answer_of_an_older_version",
                "sim_answer_of_an_earlier_fetch_used",
            ],
            Self::Rebuild => &[
                "rebuilt_extents",
                "moved_extents",
                "rebuild_failures",
                "sim_pulls_superseded",
                "sim_pulls_present",
                "sim_pulls_copied",
                "sim_pulls_failed",
                "sim_pull_sources_switched",
                "sim_rebuild_target_crashed",
                "sim_returned_after_being_replaced",
                "sim_holds_refused",
                "sim_extents_released",
                "sim_sponsors_added",
                "sim_leaving_at_rest",
                "sim_lost_at_rest",
            ],
            Self::Recovery => &[
                "sim_pager_crashes",
                "sim_crash_amid_actions",
                "sim_crash_while_unmapping",
                "sim_crash_while_storing",
                "sim_crash_with_standby",
                "sim_crash_while_punching",
                "sim_crash_while_fetching",
                "sim_crash_while_filling",
                "sim_crash_while_moving",
            ],
            Self::Fencing => &[
                "sim_takeovers",
                "sim_old_owner_refused",
                "sim_late_frames_of_old_epoch_refused",
                "sim_late_frames_of_old_epoch_executed",
                "sim_late_frames_stored",
                "sim_late_frames_refused",
            ],
            Self::Store => &[
                "corrupt_replies",
                "sim_stores_refused",
                "sim_fetches_spoilt",
                "sim_copies_rotted",
                "sim_pages_lost_on_all_sponsors",
                "sim_sponsors_emptied",
                "sim_poison_hits",
            ],
            Self::Memory => &[
                "install_no_memory",
                "owner_discards",
                "sim_budget_lowered",
                "sim_budget_raised",
                "sim_memory_full",
                "sim_owner_discards",
            ],
            Self::Migration => &[
                "behind_demands",
                "behind_arrived",
                "sim_migrations_done",
                "sim_migrations_committed",
                "sim_safe_migrations_committed",
                "sim_flushed_at_rest",
                "sim_migrations_ended_copying",
                "sim_migrations_ended_stopped",
                "sim_migrations_ended_loading",
                "sim_pages_told_current",
                "sim_pages_told_behind",
                "sim_drop_notices",
                "sim_demands_answered",
                "sim_demands_crossed",
                "sim_links_cut_with_pages",
                "sim_pages_arrived_twice",
                "sim_crash_amid_takeover",
                "sim_crash_with_pages_behind",
                "sim_crash_amid_arrival",
                "sim_crash_while_loading",
                "sim_crash_before_switch",
                "sim_grants",
                "sim_grants_lost",
                "sim_late_grants",
                "sim_rights_given_back",
                "sim_source_died_granting",
                "sim_target_died_amid_actions",
                "sim_target_ran_after_restart",
            ],
        }
    }

    /// Sponsors that hold extents from the beginning.
    pub(crate) fn sponsors_first(self, rng: &mut Rng) -> usize {
        match self {
            Self::Failover | Self::Rebuild => rng.range(2, 4),
            _ => rng.range(1, 4),
        }
    }

    pub(crate) fn replicas(self, rng: &mut Rng, sponsors: usize) -> usize {
        match self {
            Self::Failover | Self::Rebuild => rng.range(2, sponsors.min(3)),
            _ => rng.range(1, sponsors.min(3)),
        }
    }

    /// Makes the own trouble common and most other trouble absent.
    pub(crate) fn adjust(self, rates: &mut Rates, rng: &mut Rng) {
        if self == Self::Mixed {
            return;
        }
        let all = std::mem::take(rates);
        // What a kernel and a network always do.
        rates.again = all.again;
        rates.zap_fails = all.zap_fails;
        rates.unmap = all.unmap;
        rates.restart = all.restart;
        rates.late_frame = all.late_frame;
        rates.crash = if rng.one_in(2) { all.crash } else { 0 };
        rates.latency = all.latency;
        rates.overdue = all.overdue;
        match self {
            Self::Mixed => {}
            Self::Failover => {
                rates.crash = rng.range(4, 24);
                rates.cut = rng.range(4, 24);
                rates.freeze = all.freeze;
                rates.lane_freeze = rng.range(2, 12);
                rates.suspect = all.suspect;
                rates.slow_answer = rng.range(2, 20);
                rates.overdue = 1;
                rates.corrupt = all.corrupt;
            }
            Self::Rebuild => {
                rates.crash = rng.range(2, 8);
                rates.restart = rng.range(2, 10);
                rates.cut = all.cut;
                rates.sponsor_lost = rng.range(1, 4);
                rates.leaving = rng.range(2, 8);
                rates.full = all.full;
                rates.add_sponsor = all.add_sponsor;
                rates.pull_fails = all.pull_fails;
                rates.store_refused = all.store_refused;
                rates.lane_freeze = all.lane_freeze;
                rates.rot = all.rot;
            }
            Self::Recovery => {
                rates.pager_crash = rng.range(2, 12);
                rates.cut = all.cut;
                rates.leaving = all.leaving;
                rates.sponsor_lost = all.sponsor_lost;
                rates.punch_fails = all.punch_fails;
                rates.read_fails = all.read_fails;
                rates.no_memory = all.no_memory;
                rates.lane_freeze = all.lane_freeze;
                rates.budget = all.budget;
            }
            Self::Fencing => {
                rates.pager_crash = rng.range(4, 16);
                rates.crash = rng.range(3, 12);
                rates.cut = rng.range(2, 8);
                rates.old_owner = 1;
                rates.late_frame = 1;
                rates.leaving = all.leaving;
                rates.sponsor_lost = all.sponsor_lost;
            }
            Self::Store => {
                rates.rot = rng.range(1, 3);
                rates.lose = all.lose;
                rates.empty = rng.range(1, 6);
                rates.crash = rng.range(3, 12);
                rates.corrupt = all.corrupt;
                rates.store_refused = rng.range(4, 50);
                rates.sponsor_lost = all.sponsor_lost;
                rates.leaving = all.leaving;
                rates.read_fails = all.read_fails;
            }
            Self::Memory => {
                rates.memory_full = rng.range(4, 16);
                rates.no_memory = rng.range(50, 300);
                rates.budget = rng.range(1, 8);
                rates.discard = rng.range(1, 4);
                rates.punch_fails = all.punch_fails;
                rates.pager_crash = if rng.one_in(4) { all.pager_crash } else { 0 };
                rates.leaving = all.leaving;
            }
            Self::Migration => {
                rates.migrate = rng.range(1, 8);
                rates.link_cut = all.link_cut;
                rates.pager_crash = all.pager_crash;
                rates.cut = all.cut;
                rates.lane_freeze = all.lane_freeze;
                rates.leaving = all.leaving;
                rates.sponsor_lost = all.sponsor_lost;
                rates.add_sponsor = all.add_sponsor;
                rates.discard = if rng.one_in(4) { all.discard } else { 0 };
                rates.no_memory = all.no_memory;
                rates.memory_full = if rng.one_in(4) { all.memory_full } else { 0 };
                rates.budget = all.budget;
                rates.read_fails = all.read_fails;
                rates.punch_fails = all.punch_fails;
                rates.empty = if rng.one_in(4) { all.empty } else { 0 };
                rates.old_owner = all.old_owner;
            }
        }
    }
}

impl fmt::Display for Scenario {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Scenario {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|scenario| scenario.name() == text).ok_or_else(|| {
            let names: Vec<&str> = Self::ALL.iter().map(|scenario| scenario.name()).collect();
            format!("`{text}` is no scenario; there are {}", names.join(", "))
        })
    }
}
