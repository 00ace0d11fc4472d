//! `make migrate-soak`: a guest under load goes back and forth between two hosts, with a fault in
//! every fourth move.
//!
//! The guest verifies what it reads. Its heartbeat comes through a device of whichever QEMU runs it:
//! a beat of one QEMU after one of its successor would be two hosts that run the guest.
#![forbid(unsafe_code)]

mod faults;
mod rig;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::Parser;
use heca_types::ByteSize;
use serde::Serialize;

use faults::{Fault, Random};
use rig::{Ended, Rig};

/// Moves a guest back and forth while faults hit its hosts, and verifies its memory.
#[derive(Debug, Parser)]
#[command(max_term_width = 100)]
struct Arguments {
    /// Moves to make.
    #[arg(long, default_value_t = 200)]
    migrations: usize,
    /// One move in so many gets a fault.
    #[arg(long, default_value_t = 4, value_name = "N")]
    fault_every: usize,
    /// Longest time for all of it, in seconds.
    #[arg(long, default_value_t = 1500)]
    seconds_max: u64,
    /// Kinds, times and places of the faults follow from it; the clock's by default.
    #[arg(long)]
    seed: Option<u64>,
    /// Inject faults of this kind only.
    #[arg(long, value_name = "KIND")]
    only: Option<Fault>,
    /// Neither TLS nor sealed pages.
    #[arg(long)]
    plain: bool,
    /// QEMU program; the one on the path by default.
    #[arg(long, value_name = "FILE")]
    qemu: Option<PathBuf>,
    /// Guest RAM.
    #[arg(long, default_value = "256M")]
    memory: ByteSize,
    /// Part of it that may be local.
    #[arg(long, default_value = "128M")]
    local: ByteSize,
    /// Memory that the guest writes.
    #[arg(long, default_value = "128M")]
    working_set: ByteSize,
    /// Bytes of pages that it writes each second.
    #[arg(long, default_value = "60M")]
    rate: String,
}

/// What came of all of it; also `target/migrate-soak/summary.json`.
#[derive(Debug, Default, Serialize)]
struct Summary {
    seed: u64,
    qemu: String,
    tls: bool,
    migrations: usize,
    moved: usize,
    stayed: usize,
    modes: BTreeMap<String, usize>,
    faults_injected: usize,
    faults: BTreeMap<String, usize>,
    /// Of the faults, those that came before the move was over.
    faults_amid_move: usize,
    wrong_bytes: u64,
    guest_alive: bool,
    /// No beat of a QEMU came after one of its successor.
    at_most_one_running: bool,
    verified_bytes: u64,
    beats: usize,
    /// Longest pause of the guest in moves without a fault, and the middle one, in milliseconds.
    quiet_gap_max_ms: f64,
    quiet_gap_median_ms: f64,
    fault_gap_max_ms: f64,
    seconds: f64,
    problem: Option<String>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let outcome = run(&arguments);
    match outcome {
        Ok(summary) if summary.problem.is_none() => ExitCode::SUCCESS,
        Ok(summary) => {
            eprintln!("migrate-soak: FAILED: {}", summary.problem.unwrap_or_default());
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("migrate-soak: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> anyhow::Result<Summary> {
    let interrupted = Arc::new(AtomicBool::new(false));
    heca_lab::catch_signals(&interrupted)?;
    let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
    let seed = arguments.seed.unwrap_or(clock.as_millis() as u64);
    eprintln!("migrate-soak: seed {seed}");
    let mut random = Random::new(seed);
    let mut rig = Rig::start(arguments)?;
    let begun = Instant::now();
    let mut summary = Summary {
        seed,
        qemu: qemu_version(arguments)?,
        tls: !arguments.plain,
        ..Summary::default()
    };
    let mut gaps = Vec::new();
    for number in 0..arguments.migrations {
        if interrupted.load(Ordering::Relaxed) {
            summary.problem = Some("interrupted".to_owned());
            break;
        }
        if begun.elapsed() > Duration::from_secs(arguments.seconds_max) {
            summary.problem = Some(format!("{number} moves in {} s", arguments.seconds_max));
            break;
        }
        let with_fault = (number + 1).is_multiple_of(arguments.fault_every.max(1));
        let fault = with_fault.then(|| arguments.only.unwrap_or_else(|| random.fault()));
        let mode = random.mode();
        match one(&mut rig, &mut random, mode, fault, &mut summary) {
            Ok(gap) if fault.is_none() => gaps.push(gap),
            Ok(gap) => summary.fault_gap_max_ms = summary.fault_gap_max_ms.max(gap),
            Err(error) => {
                let what = fault.map_or("no fault".to_owned(), |fault| fault.to_string());
                let text = format!("move {number} ({}, {what}): {error:#}", mode.join(" "));
                summary.problem = Some(format!("{text}\n{}", rig.logs()));
                break;
            }
        }
    }
    if summary.problem.is_none()
        && let Err(error) = rig.wait_for_work()
    {
        summary.problem = Some(format!("after the last move: {error:#}"));
    }
    gaps.sort_by(f64::total_cmp);
    summary.quiet_gap_max_ms = gaps.last().copied().unwrap_or(0.0);
    summary.quiet_gap_median_ms = gaps.get(gaps.len() / 2).copied().unwrap_or(0.0);
    summary.wrong_bytes = rig.wrong_bytes();
    summary.verified_bytes = rig.verified_bytes();
    summary.at_most_one_running = rig.at_most_one_ran();
    summary.guest_alive = rig.is_alive();
    summary.beats = rig.beats();
    summary.seconds = begun.elapsed().as_secs_f64();
    if summary.problem.is_none() {
        summary.problem = verdict(&summary);
    }
    let dir = heca_lab::target_dir()?.join("migrate-soak");
    std::fs::create_dir_all(&dir)?;
    let text = serde_json::to_string_pretty(&summary)?;
    let path = dir.join("summary.json");
    std::fs::write(&path, &text).with_context(|| format!("write {}", path.display()))?;
    println!("{text}");
    Ok(summary)
}

fn verdict(summary: &Summary) -> Option<String> {
    let check = || -> anyhow::Result<()> {
        ensure!(summary.wrong_bytes == 0, "{} wrong bytes", summary.wrong_bytes);
        ensure!(summary.guest_alive, "the guest does not beat");
        ensure!(summary.at_most_one_running, "two hosts ran the guest at once");
        ensure!(summary.verified_bytes > 0, "the guest verified nothing");
        let missed = summary.faults_injected > 3 && summary.faults_amid_move == 0;
        ensure!(!missed, "every fault came after its move");
        Ok(())
    };
    check().err().map(|error| error.to_string())
}

/// What QEMU says of itself.
fn qemu_version(arguments: &Arguments) -> anyhow::Result<String> {
    let program = arguments
        .qemu
        .clone()
        .unwrap_or_else(|| PathBuf::from(format!("qemu-system-{}", std::env::consts::ARCH)));
    let output = std::process::Command::new(&program).arg("--version").output();
    let output = output.with_context(|| format!("start {}", program.display()))?;
    Ok(String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or_default().to_owned())
}

/// One move, with a fault or without. Returns the longest pause of the guest, in milliseconds.
fn one(
    rig: &mut Rig,
    random: &mut Random,
    mode: &[&str],
    fault: Option<Fault>,
    summary: &mut Summary,
) -> anyhow::Result<f64> {
    let begun = Instant::now();
    summary.migrations += 1;
    *summary.modes.entry(mode.join(" ")).or_default() += 1;
    // Some take longer, so that more faults come while pages are copied, or follow.
    let slow = fault.is_some() && random.below(2) == 0;
    rig.begin(mode, if slow { &["--bandwidth", "120M"] } else { &[] })?;
    let mut injected = fault;
    if let Some(fault) = fault {
        // At any time of the move, its end included.
        std::thread::sleep(Duration::from_millis(random.below(if slow { 900 } else { 450 })));
        summary.faults_amid_move += usize::from(rig.is_moving()?);
        // There is no QEMU that waits for the guest any more, or no pager: something else then.
        if !fault.inject(rig, random)? {
            injected = Some(Fault::Sponsor);
            Fault::Sponsor.inject(rig, random)?;
        }
        summary.faults_injected += 1;
        let name = injected.map(|fault| fault.to_string()).unwrap_or_default();
        *summary.faults.entry(name).or_default() += 1;
    }
    match rig.end(fault.is_some())? {
        Ended::Moved => summary.moved += 1,
        Ended::Stayed => summary.stayed += 1,
    }
    rig.heal()?;
    rig.wait_for_beats()?;
    if fault.is_some() {
        // What runs in the guest may be dead while its heartbeat is not.
        rig.wait_for_work()?;
    }
    rig.check()?;
    let gap = rig.longest_gap(begun);
    let done = summary.migrations;
    if fault.is_some() || done.is_multiple_of(10) || gap > 150.0 {
        let what = injected.map_or(String::new(), |fault| format!(", {fault}"));
        eprintln!(
            "migrate-soak: {done} moves ({}{what}): {} moved, {} stayed, pause {gap:.0} ms",
            mode.join(" "),
            summary.moved,
            summary.stayed
        );
    }
    Ok(gap)
}
