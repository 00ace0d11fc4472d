//! `heca bench migrate`: how long a guest stands still when it is moved, how its performance goes
//! around that, and what is sent; beside QEMU's own ways to move it.
//!
//! Two hosts that run guests and two that sponsor them are network namespaces of this machine,
//! joined by links of a set rate. The guest runs `appmembench`; what counts is the time between two
//! beats of its heartbeat as seen from outside, not what agents or QEMU say of themselves. The
//! floor is an idle guest, moved in the same run.

mod curve;
mod outcome;
mod rig;
mod svg;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::Args;
use heca_api::MigrationMode;
use heca_types::ByteSize;

use outcome::{Performance, Results};
use rig::{Rig, Seen};

#[derive(Debug, Args)]
pub struct MigrateArguments {
    /// Print one JSON object and nothing else on standard output.
    #[arg(long)]
    pub json: bool,
    /// Fewer runs on a small guest: less than 8 minutes.
    #[arg(long)]
    pub quick: bool,
    /// Runs of each cell that decides a ratio: hybrid, and the idle guest. Medians are reported;
    /// 7 by default, 5 if quick. Others run less often.
    #[arg(long)]
    pub runs: Option<usize>,
    /// Memory of the guest; 2G by default, 1G if quick.
    #[arg(long, value_name = "SIZE")]
    pub memory: Option<ByteSize>,
    /// Memory that it writes; half of its memory by default.
    #[arg(long, value_name = "SIZE")]
    pub working_set: Option<ByteSize>,
    /// Bytes of pages that it writes each second, one guest for each.
    #[arg(long, value_delimiter = ',', default_value = "10M,100M,1G", value_name = "SIZE,...")]
    pub rates: Vec<String>,
    /// Ways to move it: all that can do without a bound on the writes, and QEMU's own.
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "MODE,...",
        default_value = "qemu-precopy,qemu-postcopy,qemu-postcopy-preempt,postcopy,hybrid"
    )]
    pub modes: Vec<MigrationMode>,
    /// QEMU program; the QEMU 10 that `make deps` unpacks by default.
    #[arg(long, value_name = "FILE")]
    pub qemu: Option<PathBuf>,
    /// Downtime that QEMU's own modes are allowed, its default by default: with less, its pre-copy
    /// stands still for less and ends at lower rates only.
    #[arg(long, default_value = "300ms", value_name = "TIME")]
    pub qemu_downtime: String,
    /// Rate of each host's link, in Mbit/s.
    #[arg(long, default_value_t = 5000, value_name = "MBIT")]
    pub link_mbit: u32,
}

/// What is measured, and how often.
#[derive(Debug, Clone)]
struct Plan {
    memory: ByteSize,
    working_set: ByteSize,
    rates: Vec<String>,
    modes: Vec<MigrationMode>,
    /// Runs of hybrid; of post-copy; of each of QEMU's modes.
    runs: usize,
    postcopy_runs: usize,
    qemu_runs: usize,
    /// Runs of the idle guest, before each rate.
    idle_runs: usize,
    /// Runs with pages on sponsors.
    sponsored_runs: usize,
    /// Time for the guest to go on undisturbed before each run.
    settle: Duration,
    /// Longest time of a migration.
    bound: Duration,
    /// When cells that decide nothing are left out.
    late: Option<Duration>,
}

impl Plan {
    fn new(arguments: &MigrateArguments) -> anyhow::Result<Self> {
        let quick = arguments.quick;
        let runs = arguments.runs.unwrap_or(if quick { 5 } else { 7 }).max(1);
        let memory = arguments.memory.unwrap_or(ByteSize(if quick { 1 << 30 } else { 2 << 30 }));
        let working_set = arguments.working_set.unwrap_or(ByteSize(memory.0 / 2));
        ensure!(
            working_set.0 + (128 << 20) <= memory.0,
            "--working-set must leave 128 MiB of --memory to the guest's system"
        );
        for rate in &arguments.rates {
            rate.parse::<ByteSize>()?;
        }
        Ok(Self {
            memory,
            working_set,
            rates: arguments.rates.clone(),
            modes: arguments.modes.clone(),
            runs,
            postcopy_runs: if quick { runs.min(3) } else { runs },
            qemu_runs: if quick { 1 } else { runs.min(3) },
            idle_runs: runs.max(5).div_ceil(arguments.rates.len().max(1)),
            sponsored_runs: if quick { 2 } else { 3 },
            settle: Duration::from_millis(if quick { 1200 } else { 3000 }),
            bound: Duration::from_secs(if quick { 60 } else { 180 }),
            late: quick.then_some(Duration::from_secs(400)),
        })
    }

    fn runs_of(&self, mode: MigrationMode) -> usize {
        match mode {
            MigrationMode::Hybrid => self.runs,
            mode if mode.is_qemu() => self.qemu_runs,
            _ => self.postcopy_runs,
        }
    }
}

/// The modes in the order in which they run: all in turn, so that what else the machine does hits
/// all alike; those with fewer runs are spread over the rounds.
fn schedule(counts: &[(MigrationMode, usize)]) -> Vec<MigrationMode> {
    let rounds = counts.iter().map(|&(_, count)| count).max().unwrap_or(0);
    let mut order = Vec::new();
    for round in 0..rounds {
        for &(mode, count) in counts {
            if (round + 1) * count / rounds > round * count / rounds {
                order.push(mode);
            }
        }
    }
    order
}

/// Name of a mode in results.
fn label(mode: MigrationMode) -> String {
    if mode.is_qemu() { mode.name().to_owned() } else { format!("heca-{}", mode.name()) }
}

fn say(text: &str) {
    eprintln!("bench migrate: {text}");
}

/// The first number of QEMU's version.
fn qemu_version(qemu: &Path) -> anyhow::Result<(u32, String)> {
    let output = Command::new(qemu)
        .arg("--version")
        .output()
        .with_context(|| format!("start {}", qemu.display()))?;
    let text = String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or("").to_owned();
    let after = text.split("version ").nth(1).unwrap_or_default();
    let major = after.split('.').next().unwrap_or_default().parse();
    Ok((major.with_context(|| format!("{} tells no version", qemu.display()))?, text))
}

pub(super) fn run(arguments: &MigrateArguments) -> anyhow::Result<()> {
    let plan = Plan::new(arguments)?;
    let qemu = arguments.qemu.clone().map_or_else(heca_lab::find_qemu10, Ok)?;
    let qemu = std::path::absolute(qemu)?;
    let (major, version) = qemu_version(&qemu)?;
    if major < 8 && plan.modes.contains(&MigrationMode::QemuPrecopy) {
        say(&format!(
            "warning: {version}: below 8, QEMU's own pre-copy loses pages under TCG; expect wrong \
             bytes and dead guests, and leave it out with --modes"
        ));
    }
    let interrupted = Arc::new(AtomicBool::new(false));
    heca_lab::catch_signals(&interrupted)?;
    let begun = Instant::now();
    let machine = super::machine();
    let mut rig = Rig::new(plan.memory, qemu, arguments, interrupted)?;
    let mut results = Results::new(&plan, arguments.link_mbit, machine, version);
    let measured = measure(&plan, &mut rig, &mut results, begun);
    rig.stop_guest();
    results.wrong_bytes = rig.wrong_bytes();
    results.verified_bytes = rig.verified_bytes();
    results.seconds = begun.elapsed().as_secs_f64();
    drop(rig);
    // What was measured before something went wrong is worth a look.
    let written = results.write(arguments.json);
    measured?;
    written?;
    ensure!(results.verified_bytes > 0, "the guests verified nothing");
    ensure!(results.wrong_bytes == 0, "the guest read {} wrong bytes", results.wrong_bytes);
    Ok(())
}

fn measure(
    plan: &Plan,
    rig: &mut Rig,
    results: &mut Results,
    begun: Instant,
) -> anyhow::Result<()> {
    for rate in &plan.rates {
        say(&format!("an idle guest, then {rate} bytes a second"));
        rig.start_guest(plan.memory)?;
        // Its boot leaves the machine busy for a moment.
        rig.pass(plan.settle)?;
        for _ in 0..plan.idle_runs {
            let seen = migrate(plan, rig, MigrationMode::Hybrid, false, "idle")?;
            results.cell("idle", MigrationMode::Hybrid).add(&seen, None);
        }
        measure_rate(plan, rig, results, rate, begun)?;
    }
    say("half of the memory on sponsors");
    let half = ByteSize(plan.memory.0 / 2);
    rig.start_guest(half)?;
    let written = plan.memory.0 / 4 * 3;
    let load = format!("--working-set {}K --rate 10M --scrub 4M", written >> 10);
    rig.load(&load)?;
    rig.pass(plan.settle)?;
    sponsored(plan, rig, results, "half-remote", false)?;
    say("all of the memory on sponsors");
    rig.start_guest(plan.memory)?;
    rig.load(&format!("--working-set {}K --rate 0 --scrub 4M", plan.working_set.0 >> 10))?;
    rig.shrink(ByteSize(16 << 20))?;
    sponsored(plan, rig, results, "all-remote", true)
}

/// Moves a guest some of whose pages are on sponsors.
fn sponsored(
    plan: &Plan,
    rig: &mut Rig,
    results: &mut Results,
    name: &str,
    safe: bool,
) -> anyhow::Result<()> {
    let mode = MigrationMode::Hybrid;
    let mut done = Vec::new();
    for _ in 0..plan.sponsored_runs {
        done.push((mode, migrate(plan, rig, mode, safe, name)?));
    }
    collect(rig, results, name, &mut done)
}

/// All modes at one rate.
fn measure_rate(
    plan: &Plan,
    rig: &mut Rig,
    results: &mut Results,
    rate: &str,
    begun: Instant,
) -> anyhow::Result<()> {
    let load = format!("--working-set {}K --rate {rate} --scrub 16M", plan.working_set.0 >> 10);
    rig.load(&load)?;
    rig.pass(plan.settle.max(Duration::from_millis(2500)))?;
    let reached = rig.lines().iter().map(|line| line.figures.reached).collect::<Vec<_>>();
    results.reached.push((rate.to_owned(), super::median(reached)));
    let counts: Vec<_> = plan.modes.iter().map(|&mode| (mode, plan.runs_of(mode))).collect();
    let mut done: Vec<(MigrationMode, Seen)> = Vec::new();
    for mode in schedule(&counts) {
        let is_late = plan.late.is_some_and(|late| begun.elapsed() > late);
        if is_late && mode != MigrationMode::Hybrid && done.iter().any(|(other, _)| *other == mode)
        {
            say(&format!("{} once more is left out: it is late", label(mode)));
            continue;
        }
        done.push((mode, migrate(plan, rig, mode, false, rate)?));
        if !rig.is_alive() {
            say("the guest is dead; another one takes its place");
            collect(rig, results, rate, &mut done)?;
            rig.start_guest(plan.memory)?;
            rig.load(&load)?;
        }
    }
    collect(rig, results, rate, &mut done)
}

/// Adds what was seen to the cells of its modes.
fn collect(
    rig: &Rig,
    results: &mut Results,
    load: &str,
    done: &mut Vec<(MigrationMode, Seen)>,
) -> anyhow::Result<()> {
    if rig.is_alive() {
        rig.wait_for_work()?;
    }
    let base = done.first().map_or_else(Instant::now, |(_, seen)| seen.begun);
    let stops: Vec<Instant> = done.iter().filter_map(|(_, seen)| Some(seen.switch?.0)).collect();
    let steps = curve::steps(&rig.lines(), &stops, base);
    for (mode, seen) in done.drain(..) {
        let performance = Performance::new(&steps, base, &seen);
        results.cell(load, mode).add(&seen, performance);
    }
    Ok(())
}

fn migrate(
    plan: &Plan,
    rig: &mut Rig,
    mode: MigrationMode,
    safe: bool,
    what: &str,
) -> anyhow::Result<Seen> {
    rig.pass(plan.settle)?;
    let seen = rig.migrate(mode, safe, plan.bound)?;
    let seconds = (seen.ended - seen.begun).as_secs_f64();
    match (&seen.problem, &seen.gap) {
        (None, Some(gap)) => {
            say(&format!("{what}, {}: gap {:.1} ms, {seconds:.1} s in all", label(mode), gap.ms()));
        }
        (problem, _) => {
            let problem = problem.as_deref().unwrap_or("no heartbeat");
            say(&format!("{what}, {}: {problem} ({seconds:.1} s)", label(mode)));
        }
    }
    Ok(seen)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_take_turns() {
        let (hybrid, post, pre) =
            (MigrationMode::Hybrid, MigrationMode::Postcopy, MigrationMode::QemuPrecopy);
        let order = schedule(&[(pre, 1), (post, 3), (hybrid, 5)]);
        let count = |mode| order.iter().filter(|&&other| other == mode).count();
        assert_eq!((count(hybrid), count(post), count(pre)), (5, 3, 1));
        assert_eq!(schedule(&[(post, 2), (hybrid, 2)]), [post, hybrid, post, hybrid]);
        assert!(schedule(&[]).is_empty());
    }
}
