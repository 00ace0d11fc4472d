//! Deterministic simulation of Hecatonchire.
//!
//! The real [`heca_core::pager::Pager`] and [`heca_core::sponsor::Sponsor`] run in a fake world:
//! a kernel with userfaultfd, vCPUs, the evictor thread, connections and sponsors that crash, lose
//! and delay. Everything is on one thread and drawn from one seed, so that a run can be done again
//! exactly. The checks ([`heca_core::invariants`]) know what the guest wrote and what sponsors
//! hold, and do not ask the machines.
//!
//! A run is a row of worlds, each with its own seed, settings and kinds of trouble. In each world
//! trouble and rest take turns: at rest everything works, and every waiting vCPU must get on.
//!
//! Where guests move from host to host, the pages and the right to run are apart: [`right`] has its
//! own small world, in which nothing is known of pages.
#![forbid(unsafe_code)]

mod actions;
mod chaos;
mod evictor;
mod following;
mod guest;
mod history;
mod kernel;
mod links;
mod migration;
mod network;
mod oracle;
mod params;
mod recovery;
mod redundancy;
mod report;
mod right;
mod rng;
mod scenario;
mod takeover;
mod tracker;
mod world;

use std::ops::RangeInclusive;
use std::panic::{AssertUnwindSafe, catch_unwind};

use heca_core::pager::Mutation;

pub use report::{Branch, InvariantChecks, Report, SIM_1, Violation, rare_branches_missed};
pub use scenario::Scenario;

use history::History;
use oracle::Failure;
use report::Stats;
use world::World;

/// Ticks of one world: long enough to fill and empty its memory many times, short enough that a
/// long run sees many settings.
const WORLD_TICKS: u64 = 25_000;

/// What to run.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where all chance comes from.
    pub seed: u64,
    /// Steps to do.
    pub ticks: u64,
    /// Break an invariant on purpose.
    pub mutation: Option<Mutation>,
}

/// Runs mixed worlds one after the other until the ticks are used up.
///
/// # Errors
/// The first invariant that does not hold, with the history of what led to it.
pub fn run(options: &Options) -> Result<Report, Box<Violation>> {
    let mut stats = Stats::default();
    let (mut ticks, mut worlds) = (0, 0);
    // The first world has the seed of the run: so a world can be run alone.
    let mut seed = options.seed;
    while ticks < options.ticks || worlds == 0 {
        let world = WorldOptions {
            scenario: Scenario::Mixed,
            seed,
            ticks: (options.ticks - ticks).min(WORLD_TICKS),
            mutation: options.mutation,
        };
        ticks += run_one(&world, &mut stats)?;
        worlds += 1;
        seed = rng::mix(seed);
    }
    Ok(stats.report(options.seed, ticks, worlds))
}

/// Which worlds of a scenario to run.
#[derive(Debug, Clone)]
pub struct Search {
    /// The kind of world.
    pub scenario: Scenario,
    /// One world for each of these seeds.
    pub seeds: RangeInclusive<u64>,
    /// Steps to do in each.
    pub ticks_per_seed: u64,
    /// Break an invariant on purpose.
    pub mutation: Option<Mutation>,
}

/// Runs one world for each seed.
///
/// # Errors
/// The first invariant that does not hold, with the history of what led to it.
pub fn search(search: &Search) -> Result<Report, Box<Violation>> {
    let mut stats = Stats::default();
    let (mut ticks, mut worlds) = (0, 0);
    for seed in search.seeds.clone() {
        let Search { scenario, ticks_per_seed: ticks_wanted, mutation, .. } = *search;
        let world = WorldOptions { scenario, seed, ticks: ticks_wanted, mutation };
        ticks += run_one(&world, &mut stats)?;
        worlds += 1;
    }
    Ok(stats.report(*search.seeds.start(), ticks, worlds))
}

#[derive(Debug, Clone, Copy)]
struct WorldOptions {
    scenario: Scenario,
    seed: u64,
    ticks: u64,
    mutation: Option<Mutation>,
}

/// Runs one world and says how many ticks it took.
fn run_one(options: &WorldOptions, stats: &mut Stats) -> Result<u64, Box<Violation>> {
    let WorldOptions { scenario, seed, ticks, mutation } = *options;
    if scenario.moves_guests() && right::run(seed, mutation, stats, None).is_err() {
        return Err(Box::new(explain_right(options)));
    }
    let mut world = World::new(seed, scenario, mutation, std::mem::take(stats));
    if run_world(&mut world, ticks).is_err() {
        return Err(Box::new(explain(options)));
    }
    *stats = world.stats;
    Ok(world.tick)
}

/// Runs what is about the right to run once more, this time taking notes.
fn explain_right(options: &WorldOptions) -> Violation {
    let WorldOptions { scenario, seed, ticks, mutation } = *options;
    let mut history = Vec::new();
    let failure = right::run(seed, mutation, &mut Stats::default(), Some(&mut history))
        .expect_err("a world does the same each time");
    Violation {
        invariant: failure.invariant,
        scenario,
        seed,
        ticks,
        mutation,
        tick: 0,
        page: None,
        detail: failure.detail,
        history,
    }
}

/// Runs a world; a panic of a machine (a failed debug assertion) is a violation, too.
fn run_world(world: &mut World, ticks: u64) -> Result<(), Failure> {
    // What a panic leaves behind in the world is only read for the report.
    catch_unwind(AssertUnwindSafe(|| world.run(ticks))).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
        let detail = format!("panic: {}", text.unwrap_or("without a text"));
        Err(Failure { invariant: SIM_1, page: None, detail })
    })
}

/// Runs a world that failed once more, this time taking notes.
fn explain(options: &WorldOptions) -> Violation {
    let WorldOptions { scenario, seed, ticks, mutation } = *options;
    let mut world = World::new(seed, scenario, mutation, Stats::default());
    world.history = Some(History::default());
    let failure = run_world(&mut world, ticks).expect_err("a world does the same each time");
    let sponsors: Vec<u8> = (0..world.nodes.len() as u8).collect();
    let page = failure.page.map(|page| page.0);
    let history = world.history.unwrap_or_default().lines(page, &sponsors);
    Violation {
        invariant: failure.invariant,
        scenario,
        seed,
        ticks,
        mutation,
        tick: world.tick,
        page,
        detail: failure.detail,
        history,
    }
}
