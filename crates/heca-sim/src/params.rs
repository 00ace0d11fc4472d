//! What one world is like, drawn from its seed. Each kind of trouble is left out of some worlds:
//! a trouble that is always there can hide the bugs that need its absence (swarm testing).

use std::collections::BTreeSet;

use heca_core::pager::Protection;
use heca_types::limits::EXTENT_PAGES;

use crate::rng::{Rng, mix};
use crate::scenario::Scenario;

pub(crate) const BUDGET_MIN: usize = 64;
pub(crate) const BUDGET_MAX: usize = 600;
/// Sponsors of the beginning and those added later.
pub(crate) const SPONSORS_DRAWN_MAX: usize = 6;

/// How often trouble comes: once in this many occasions, 0 for never.
#[derive(Debug, Clone, Default)]
pub(crate) struct Rates {
    pub(crate) again: usize,
    pub(crate) no_memory: usize,
    pub(crate) zap_fails: usize,
    pub(crate) read_fails: usize,
    pub(crate) punch_fails: usize,
    pub(crate) corrupt: usize,
    pub(crate) store_refused: usize,
    pub(crate) unmap: usize,
    pub(crate) discard: usize,
    pub(crate) crash: usize,
    pub(crate) restart: usize,
    pub(crate) freeze: usize,
    pub(crate) late_frame: usize,
    pub(crate) rot: usize,
    pub(crate) lose: usize,
    pub(crate) budget: usize,
    pub(crate) memory_full: usize,
    /// A connection is lost, the sponsor lives on.
    pub(crate) cut: usize,
    /// One connection of a sponsor stops for a while.
    pub(crate) lane_freeze: usize,
    /// An answer to a fetch is held up, with all behind it.
    pub(crate) slow_answer: usize,
    pub(crate) suspect: usize,
    pub(crate) latency: usize,
    /// The answer to a fetch is overdue.
    pub(crate) overdue: usize,
    /// A sponsor that is down is given up.
    pub(crate) sponsor_lost: usize,
    pub(crate) leaving: usize,
    /// A sponsor has no room for further extents, or has again.
    pub(crate) full: usize,
    pub(crate) add_sponsor: usize,
    pub(crate) pull_fails: usize,
    pub(crate) empty: usize,
    pub(crate) pager_crash: usize,
    /// The old owner goes on after a takeover.
    pub(crate) old_owner: usize,
    /// The guest moves to another host.
    pub(crate) migrate: usize,
    /// The connection to the host that it came from is lost.
    pub(crate) link_cut: usize,
}

/// How often each actor gets its turn, relative to the others.
#[derive(Debug, Clone)]
pub(crate) struct Weights {
    pub(crate) guest: usize,
    pub(crate) pager: usize,
    pub(crate) evictor: usize,
    pub(crate) network: usize,
    pub(crate) migration: usize,
    pub(crate) chaos: usize,
}

#[derive(Debug, Clone)]
pub(crate) struct Params {
    /// Pages of the region.
    pub(crate) pages: u64,
    /// The pages that are used, in rising order. A slot is a position in this list.
    pub(crate) slots: Vec<u64>,
    pub(crate) budget: usize,
    /// Pages in memory before the pager comes.
    pub(crate) adopted: usize,
    pub(crate) protection: Protection,
    pub(crate) prefetch: bool,
    pub(crate) replicas: usize,
    /// All sponsors of the beginning.
    pub(crate) sponsor_weights: Vec<u32>,
    /// How many of them hold extents from the beginning.
    pub(crate) sponsors_first: usize,
    /// Ticks between two times of rest.
    pub(crate) chaos_ticks: u64,
    pub(crate) vcpus: usize,
    /// Writes out of 10 accesses.
    pub(crate) writes: usize,
    /// Events that the pager handles in one turn.
    pub(crate) pager_burst: usize,
    pub(crate) weights: Weights,
    pub(crate) rates: Rates,
    /// Whether the world ends with every page brought home.
    pub(crate) restore: bool,
    /// Whether the guest goes on meanwhile: that helps along what restoring alone cannot bring.
    pub(crate) restore_accesses: bool,
}

impl Params {
    pub(crate) fn draw(rng: &mut Rng, scenario: Scenario) -> Self {
        let extents = rng.range(2, 3) as u64;
        let pages = (extents - 1) * EXTENT_PAGES + 500;
        let failover = scenario == Scenario::Failover;
        let count = if failover { rng.range(90, 250) } else { rng.range(200, 2000) };
        let slots = draw_slots(rng, pages, count);
        let divisor = if failover { 10 } else { rng.range(2, 6) };
        let budget = (slots.len() / divisor).clamp(BUDGET_MIN, BUDGET_MAX);
        let first = scenario.sponsors_first(rng);
        let sponsors = (first + rng.below(4)).min(SPONSORS_DRAWN_MAX);
        let zap = rng.one_in(2);
        // Apart, so that worlds in which no guest moves are not others for it.
        let mut apart = Rng::new(mix(!rng.clone().next()));
        let mut rates = draw_rates(rng);
        if scenario.moves_guests() && apart.one_in(3) {
            rates.migrate = apart.range(20, 200);
        }
        rates.link_cut = if apart.one_in(3) { 0 } else { apart.range(10, 100) };
        scenario.adjust(&mut rates, rng);
        let chaos = if failover { 4 } else { 2 };
        Self {
            pages,
            slots,
            budget,
            adopted: if rng.one_in(2) { rng.range(1, 2 * budget) } else { 0 },
            protection: if zap { Protection::Zap } else { Protection::WriteProtect },
            prefetch: !rng.one_in(4),
            replicas: scenario.replicas(rng, first),
            sponsor_weights: (0..sponsors).map(|_| rng.range(1, 3) as u32).collect(),
            sponsors_first: first,
            chaos_ticks: rng.range(2_000, 8_000) as u64,
            vcpus: if failover { rng.range(5, 10) } else { rng.range(2, 6) },
            writes: if failover { rng.range(4, 7) } else { rng.range(1, 7) },
            pager_burst: rng.range(1, 8),
            weights: Weights {
                guest: rng.range(4, 16),
                pager: rng.range(4, 16),
                evictor: rng.range(2, 10),
                network: rng.range(2, 16),
                migration: apart.range(3, 12),
                chaos: rng.range(chaos, chaos + 3),
            },
            rates,
            restore: rng.one_in(2),
            restore_accesses: rng.one_in(2),
        }
    }
}

fn draw_slots(rng: &mut Rng, pages: u64, count: usize) -> Vec<u64> {
    let mut slots = BTreeSet::new();
    while slots.len() < count {
        let start = rng.below(pages as usize) as u64;
        let run = if rng.one_in(2) { rng.range(8, 96) as u64 } else { 1 };
        slots.extend((start..(start + run).min(pages)).take(count - slots.len()));
    }
    slots.into_iter().collect()
}

fn draw_rates(rng: &mut Rng) -> Rates {
    let mut rate = |low, high| {
        if rng.one_in(4) { 0 } else { rng.range(low, high) }
    };
    Rates {
        again: rate(10, 200),
        no_memory: rate(50, 500),
        zap_fails: rate(20, 400),
        read_fails: rate(50, 500),
        punch_fails: rate(20, 400),
        corrupt: rate(2, 30),
        store_refused: rate(4, 100),
        unmap: rate(2, 8),
        discard: rate(1, 4),
        crash: rate(2, 12),
        freeze: rate(4, 32),
        restart: rng.range(1, 8),
        late_frame: rng.range(1, 4),
        rot: if rng.one_in(4) { 0 } else { rng.range(1, 3) },
        // Lost pages are poisoned, which would hide wrong poisoning elsewhere in the same world.
        lose: if rng.one_in(4) { rng.range(4, 16) } else { 0 },
        budget: if rng.one_in(4) { 0 } else { rng.range(1, 16) },
        memory_full: if rng.one_in(2) { 0 } else { rng.range(4, 16) },
        cut: if rng.one_in(3) { 0 } else { rng.range(4, 16) },
        lane_freeze: if rng.one_in(3) { 0 } else { rng.range(1, 8) },
        slow_answer: if rng.one_in(2) { 0 } else { rng.range(4, 60) },
        suspect: rng.range(1, 8),
        latency: rng.range(1, 4),
        overdue: if rng.one_in(4) { 0 } else { rng.range(1, 3) },
        sponsor_lost: if rng.one_in(3) { 0 } else { rng.range(1, 6) },
        leaving: if rng.one_in(3) { 0 } else { rng.range(2, 12) },
        full: if rng.one_in(2) { 0 } else { rng.range(2, 12) },
        add_sponsor: if rng.one_in(2) { 0 } else { rng.range(4, 24) },
        pull_fails: if rng.one_in(2) { 0 } else { rng.range(20, 400) },
        empty: if rng.one_in(2) { 0 } else { rng.range(4, 12) },
        pager_crash: if rng.one_in(2) { 0 } else { rng.range(6, 40) },
        old_owner: if rng.one_in(3) { 0 } else { rng.range(1, 8) },
        migrate: 0,
        link_cut: 0,
    }
}
