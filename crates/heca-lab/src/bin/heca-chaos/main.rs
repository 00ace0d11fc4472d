//! `make chaos`: a guest under load on pooled memory, and faults of every kind, one after another.
//!
//! The guest verifies every byte that it reads. A fault ends when the cluster is healthy again, so
//! that never more redundancy is taken away than two replicas stand.
#![forbid(unsafe_code)]

mod faults;
mod report;

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap::Parser;
use heca_lab::{Cluster, ClusterOptions};
use heca_types::ByteSize;

use faults::{Faults, Kind};
use report::{Outcome, Report};

/// Faults below which a run without `--faults` and `--only` counts as failed.
const FAULTS_REQUIRED: usize = 100;
/// Time without a fault before each one, to see what the guest does by itself.
const QUIET: Duration = Duration::from_millis(450);
/// Longest time until the cluster must be healthy after a fault.
const HEALTH_BOUND: Duration = Duration::from_secs(60);
/// Longest time until the guest must have gone on.
const PROGRESS_BOUND: Duration = Duration::from_secs(20);
/// Times that a kind is injected at least before slow kinds give way to the deadline.
const EACH_AT_LEAST: usize = 3;

/// Injects faults into hosts, processes, links and stores under a guest that verifies its memory.
#[derive(Debug, Parser)]
#[command(max_term_width = 100)]
struct Arguments {
    /// Faults to inject.
    #[arg(long, value_name = "N")]
    faults: Option<usize>,
    /// Longest time for all of it, in seconds.
    #[arg(long, default_value_t = 540)]
    seconds_max: u64,
    /// The order of the faults and their details follow from it; the clock's by default.
    #[arg(long)]
    seed: Option<u64>,
    /// Inject faults of this kind only; may be given more than once.
    #[arg(long, value_name = "KIND")]
    only: Vec<Kind>,
    /// Neither TLS nor sealed pages.
    #[arg(long)]
    plain: bool,
    /// Guest RAM.
    #[arg(long, default_value = "256M")]
    memory: ByteSize,
    /// Part of it that may be local.
    #[arg(long, default_value = "96M")]
    local: ByteSize,
    /// Memory that the guest works on.
    #[arg(long, default_value = "150M")]
    working_set: ByteSize,
    /// Guest processors.
    #[arg(long, default_value_t = 2)]
    vcpus: u32,
    /// Leave the logs of the hosts in target/chaos.
    #[arg(long)]
    keep_logs: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let interrupted = Arc::new(AtomicBool::new(false));
    match heca_lab::catch_signals(&interrupted).and_then(|()| chaos(&arguments, &interrupted)) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("chaos failed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn chaos(arguments: &Arguments, interrupted: &AtomicBool) -> anyhow::Result<bool> {
    let begun = Instant::now();
    let deadline = begun + Duration::from_secs(arguments.seconds_max);
    let seed = match arguments.seed {
        Some(seed) => seed,
        None => std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs(),
    };
    let wanted = arguments.faults.unwrap_or(110);
    let options = ClusterOptions {
        secure: !arguments.plain,
        memory: arguments.memory,
        local: arguments.local,
        working_set: arguments.working_set,
        vcpus: arguments.vcpus,
        ..ClusterOptions::default()
    };
    println!(
        "==> 1 + {} hosts as network namespaces, a guest with {} of memory, {} of it local; \
         {wanted} faults, seed {seed}",
        options.sponsors, options.memory, options.local
    );
    let mut cluster = Cluster::start(&options)?;
    let mut report = Report::new(seed, arguments.plain);
    println!("==> the guest works, after {:.1} s", begun.elapsed().as_secs_f64());
    let kinds = if arguments.only.is_empty() { Kind::ALL.to_vec() } else { arguments.only.clone() };
    let mut faults = Faults::new(seed, &cluster)?;
    let ended = run(&mut cluster, &mut faults, &mut report, &kinds, wanted, deadline, interrupted);
    report.finish(&mut cluster, begun);
    if let Err(error) = &ended {
        println!("CHAOS FAILED: {error:#}");
        report.problem = Some(format!("{error:#}"));
    }
    let out = report::out_dir();
    std::fs::create_dir_all(&out)?;
    if arguments.keep_logs || ended.is_err() {
        report::keep_logs(&cluster, &out);
    }
    if ended.is_ok() {
        cluster.stop()?;
    }
    drop(cluster);
    report.print();
    report.write(&out.join("summary.json"))?;
    let enough = report.count() >= FAULTS_REQUIRED
        || !arguments.only.is_empty()
        || arguments.faults.is_some_and(|n| report.count() >= n);
    if !enough {
        println!("CHAOS FAILED: {} faults, {FAULTS_REQUIRED} are required", report.count());
    }
    Ok(ended.is_ok() && enough && report.is_good())
}

fn run(
    cluster: &mut Cluster,
    faults: &mut Faults,
    report: &mut Report,
    kinds: &[Kind],
    wanted: usize,
    deadline: Instant,
    interrupted: &AtomicBool,
) -> anyhow::Result<()> {
    let mut round: Vec<Kind> = Vec::new();
    while report.count() < wanted && Instant::now() < deadline {
        anyhow::ensure!(!interrupted.load(Ordering::Relaxed), "interrupted");
        cluster.wait_healthy(HEALTH_BOUND)?;
        // What is still to be reported of the last fault is not of the quiet time.
        let from = cluster.wait_for_progress(PROGRESS_BOUND)? + 2;
        cluster.pass(QUIET)?;
        report.quiet(cluster, from);

        if round.is_empty() {
            round = faults.shuffle(kinds);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        let pace = left.as_secs_f64() / (wanted - report.count()) as f64;
        let Some(kind) = round.pop() else { continue };
        let slow = report.mean_seconds(kind).is_some_and(|mean| mean > pace * 1.5);
        if slow && report.count_of(kind) >= EACH_AT_LEAST && kinds.len() > 1 {
            report.skipped += 1;
            continue;
        }
        let outcome = one(cluster, faults, kind)?;
        println!("{:>4}  {}", report.count() + 1, outcome.line());
        report.add(outcome);
    }
    Ok(())
}

/// One fault, from its injection until the cluster is healthy and the guest has gone on.
fn one(cluster: &mut Cluster, faults: &mut Faults, kind: Kind) -> anyhow::Result<Outcome> {
    use anyhow::Context;
    cluster.check_guest()?;
    let from = cluster.console().samples().len();
    let begun = Instant::now();
    let done = faults.inject(cluster, kind).with_context(|| kind.name())?;
    let healed = Instant::now();
    let context = || format!("{} of {}", kind.name(), done.target);
    let look = cluster.wait_healthy(HEALTH_BOUND).with_context(context)?;
    let recovery = healed.elapsed();
    let whole = begun.elapsed();
    cluster.wait_for_progress(PROGRESS_BOUND).with_context(context)?;
    // The report that covers the end of a pause comes when it is over.
    cluster.pass(Duration::from_millis(250))?;
    Ok(Outcome {
        kind,
        target: done.target,
        note: done.note,
        stall_ms: cluster.console().longest_stall_ms(from),
        recovery_ms: recovery.as_secs_f64() * 1e3,
        rebuild_ms: kind.rebuilds().then_some(whole.as_secs_f64() * 1e3),
        pager_pause_ms: if kind.replaces_pager() { look.vm.pager_pause_ms } else { None },
        seconds: begun.elapsed().as_secs_f64() + QUIET.as_secs_f64() + 0.4,
    })
}
