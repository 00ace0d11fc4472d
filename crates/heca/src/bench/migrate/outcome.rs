//! What was measured, as JSON, plots and words.

use std::fs;
use std::time::Instant;

use anyhow::Context;
use heca_api::{MigrationMode, MigrationReport};
use heca_lab::Gap;
use serde::Serialize;
use serde_json::{Value, json};

use super::curve::{self, STEP_S, seconds};
use super::rig::Seen;
use super::svg::{self, Bar};
use super::{Plan, label};
use crate::bench::median;

/// Part of a curve before the switch, in seconds.
const BEFORE_S: f64 = 3.0;
/// Steps in a curve.
const CURVE_STEPS: usize = 90;
/// Time before a migration that its performance is measured against, in seconds.
const BASELINE_S: f64 = 1.0;
/// Published figures of the paper, for the plots. Its testbed was another: they are no bound.
const PAPER: [&str; 2] = [
    "Paper, Table 3 (RDMA, kernel module, KVM; ms at three rising rates): pre-copy 364 / 1256 / 2765,",
    "Yabusame 400 / 655 / 690, Hecatonchire hybrid 94 / 104 / 112.",
];

/// How the guest did around one migration.
#[derive(Debug, Clone)]
pub(super) struct Performance {
    /// Mean part of the asked writes that were done before it, 0 to 1.
    baseline: f64,
    /// Work that it cost until two seconds after its end, in seconds of undisturbed work.
    lost_s: f64,
    /// Part of the asked writes that were done, each tenth of a second from [`BEFORE_S`] before the
    /// switch on.
    curve: Vec<Option<f64>>,
}

impl Performance {
    /// None if it was not seen.
    pub(super) fn new(steps: &[curve::Step], base: Instant, seen: &Seen) -> Option<Self> {
        let begun = seconds(base, seen.begun);
        let before = (BASELINE_S / STEP_S).round() as usize;
        let baseline = curve::mean(curve::resample(steps, begun - BASELINE_S, before))?;
        let until = seconds(base, seen.ended) + heca_lab::AFTER_SWITCH.as_secs_f64();
        let during = curve::resample(steps, begun, ((until - begun) / STEP_S).round() as usize);
        let lost = during.iter().flatten().map(|part| 1.0 - (part / baseline).min(1.0));
        let switch = seconds(base, seen.switch?.1);
        let curve = curve::resample(steps, switch - BEFORE_S, CURVE_STEPS);
        Some(Self { baseline, lost_s: lost.sum::<f64>() * STEP_S, curve })
    }
}

/// One migration, as it is written down.
#[derive(Debug, Serialize)]
struct Row {
    gap_ms: Option<f64>,
    gap: Option<Gap>,
    seconds: f64,
    report: Option<MigrationReport>,
    resident_bytes: Option<u64>,
    problem: Option<String>,
    wrong_bytes: u64,
    baseline: Option<f64>,
    lost_s: Option<f64>,
}

/// All runs of one mode with one load.
#[derive(Debug)]
pub(super) struct Cell {
    load: String,
    mode: MigrationMode,
    rows: Vec<Row>,
    curves: Vec<Vec<Option<f64>>>,
}

/// Median, least and most.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
struct Spread {
    median: f64,
    min: f64,
    max: f64,
}

fn spread(values: impl IntoIterator<Item = f64>) -> Option<Spread> {
    let values: Vec<f64> = values.into_iter().collect();
    let min = values.iter().copied().min_by(f64::total_cmp)?;
    let max = values.iter().copied().max_by(f64::total_cmp)?;
    Some(Spread { median: median(values), min, max })
}

impl Cell {
    /// Adds a run, and how the guest did around it if that was seen.
    pub(super) fn add(&mut self, seen: &Seen, performance: Option<Performance>) {
        self.rows.push(Row {
            gap_ms: seen.gap.map(|gap| gap.ms()),
            gap: seen.gap,
            seconds: (seen.ended - seen.begun).as_secs_f64(),
            report: seen.info.as_ref().map(|info| info.report.clone()),
            resident_bytes: seen.info.as_ref().map(|info| info.resident_bytes),
            problem: seen.problem.clone(),
            wrong_bytes: seen.wrong_bytes,
            baseline: performance.as_ref().map(|performance| performance.baseline),
            lost_s: performance.as_ref().map(|performance| performance.lost_s),
        });
        if seen.problem.is_none() {
            self.curves.extend(performance.map(|performance| performance.curve));
        }
    }

    fn good(&self) -> impl Iterator<Item = &Row> {
        self.rows.iter().filter(|row| row.problem.is_none())
    }

    fn gap(&self) -> Option<Spread> {
        spread(self.good().filter_map(|row| row.gap_ms))
    }

    fn reports(&self) -> impl Iterator<Item = &MigrationReport> {
        self.good().filter_map(|row| row.report.as_ref())
    }

    fn of_reports(&self, of: impl Fn(&MigrationReport) -> Option<f64>) -> Option<Spread> {
        spread(self.reports().filter_map(of))
    }

    fn to_json(&self) -> Value {
        let curve = curve::middle(&self.curves);
        let curve: Vec<_> = curve.iter().map(|v| v.map(|v| (v * 1e3).round() / 1e3)).collect();
        json!({
            "load": self.load,
            "mode": label(self.mode),
            "runs": self.rows.len(),
            "failed": self.rows.len() - self.good().count(),
            "gap_ms": self.gap(),
            "across_ms": spread(self.good().filter_map(|row| row.gap?.across_ms)),
            "longest_ms": spread(self.good().filter_map(|row| Some(row.gap?.longest_ms))),
            "downtime_ms": self.of_reports(|report| report.downtime_ms),
            "qemu_downtime_ms": self.of_reports(|report| report.qemu_downtime_ms),
            "parts_ms": {
                "stop": self.of_reports(|report| Some(report.parts_ms.stop)),
                "final_scan": self.of_reports(|report| Some(report.parts_ms.final_scan)),
                "device_state": self.of_reports(|report| Some(report.parts_ms.device_state)),
                "takeover": self.of_reports(|report| Some(report.parts_ms.takeover)),
                "resume": self.of_reports(|report| Some(report.parts_ms.resume)),
            },
            "total_s": self.of_reports(|report| report.total_s),
            "command_s": spread(self.good().map(|row| row.seconds)),
            "memory_bytes": self.of_reports(|report| Some(report.memory_bytes as f64)),
            "device_state_bytes": self.of_reports(|report| Some(report.device_state_bytes as f64)),
            "lost_s": spread(self.good().filter_map(|row| row.lost_s)),
            "curve": { "from_s": -BEFORE_S, "step_s": STEP_S, "performance": curve },
            "all_runs": self.rows,
        })
    }
}

/// Everything.
#[derive(Debug)]
pub(super) struct Results {
    plan: Plan,
    link_mbit: u32,
    machine: Value,
    qemu: String,
    cells: Vec<Cell>,
    /// Bytes of pages that were written each second before the first migration, for each rate.
    pub(super) reached: Vec<(String, f64)>,
    /// Bytes that guests found wrong.
    pub(super) wrong_bytes: u64,
    /// Bytes that they verified.
    pub(super) verified_bytes: u64,
    /// How long all took.
    pub(super) seconds: f64,
}

impl Results {
    pub(super) fn new(plan: &Plan, link_mbit: u32, machine: Value, qemu: String) -> Self {
        let (cells, reached) = (Vec::new(), Vec::new());
        let plan = plan.clone();
        Self {
            plan,
            link_mbit,
            machine,
            qemu,
            cells,
            reached,
            wrong_bytes: 0,
            verified_bytes: 0,
            seconds: 0.0,
        }
    }

    /// The cell of a load and a mode, a new one if there is none.
    pub(super) fn cell(&mut self, load: &str, mode: MigrationMode) -> &mut Cell {
        let is = |cell: &Cell| cell.load == load && cell.mode == mode;
        let position = self.cells.iter().position(is).unwrap_or(self.cells.len());
        if position == self.cells.len() {
            let (rows, curves) = (Vec::new(), Vec::new());
            self.cells.push(Cell { load: load.to_owned(), mode, rows, curves });
        }
        &mut self.cells[position]
    }

    fn find(&self, load: &str, mode: MigrationMode) -> Option<&Cell> {
        self.cells.iter().find(|cell| cell.load == load && cell.mode == mode)
    }

    fn gap(&self, load: &str, mode: MigrationMode) -> Option<f64> {
        self.find(load, mode)?.gap().map(|gap| gap.median)
    }

    /// Pages sent after the switch over pages that were behind at it, all post-copies together.
    fn sent_over_unique(&self) -> Option<f64> {
        let cells = self.cells.iter().filter(|cell| cell.mode == MigrationMode::Postcopy);
        let counts = cells.flat_map(Cell::reports).fold((0, 0), |(sent, unique), report| {
            (sent + report.pages_sent_after, unique + report.pages_unique_after)
        });
        (counts.1 > 0).then(|| counts.0 as f64 / counts.1 as f64)
    }

    fn moved_over_device_state(&self) -> Option<f64> {
        let ratios = self.find("all-remote", MigrationMode::Hybrid)?.of_reports(|report| {
            let device = report.device_state_bytes as f64;
            (device > 0.0).then(|| (report.memory_bytes as f64 + device) / device)
        });
        ratios.map(|ratios| ratios.median)
    }

    fn to_json(&self) -> Value {
        let mut gaps = json!({});
        for &mode in &self.plan.modes {
            for rate in &self.plan.rates {
                gaps[label(mode)][rate] = json!(self.gap(rate, mode));
            }
        }
        let floor = self.gap("idle", MigrationMode::Hybrid);
        let mut over_floor = json!({});
        for rate in &self.plan.rates {
            let gap = self.gap(rate, MigrationMode::Hybrid);
            over_floor[rate] = json!(gap.zip(floor).map(|(gap, floor)| gap / floor));
        }
        let rows = || self.cells.iter().flat_map(|cell| &cell.rows);
        let beats =
            |of: fn(&Gap) -> u64| rows().filter_map(|row| row.gap.as_ref()).map(of).sum::<u64>();
        json!({
            "experiment": "migrate",
            "machine": self.machine,
            "qemu": self.qemu,
            "memory_bytes": self.plan.memory.0,
            "working_set_bytes": self.plan.working_set.0,
            "link_mbit": self.link_mbit,
            "runs": self.plan.runs,
            "seconds": self.seconds,
            "gap_ms": gaps,
            "idle_floor_ms": floor,
            "ratios": { "heca_hybrid_over_idle_floor": over_floor },
            "wrong_bytes": self.wrong_bytes,
            "verified_bytes": self.verified_bytes,
            "heartbeats_lost": beats(|gap| gap.lost),
            "heartbeats_doubled": beats(|gap| gap.doubled),
            "failed_runs": rows().filter(|row| row.problem.is_some()).count(),
            "pages_sent_over_unique": self.sent_over_unique(),
            "bytes_moved_over_device_state": self.moved_over_device_state(),
            "reached_rate": self.reached.iter().cloned().collect::<std::collections::BTreeMap<_, _>>(),
            "cells": self.cells.iter().map(Cell::to_json).collect::<Vec<_>>(),
        })
    }

    /// Writes `target/bench/migrate.json` and the plots, and prints JSON or a table.
    pub(super) fn write(&self, as_json: bool) -> anyhow::Result<()> {
        let dir = heca_lab::target_dir()?.join("bench");
        fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
        let text = serde_json::to_string_pretty(&self.to_json())?;
        fs::write(dir.join("migrate.json"), &text)?;
        fs::write(dir.join("migrate-gap.svg"), self.plot_gaps())?;
        fs::write(dir.join("migrate-degradation.svg"), self.plot_performance())?;
        if as_json {
            println!("{text}");
        } else {
            self.print_table();
        }
        Ok(())
    }

    fn notes(&self) -> Vec<String> {
        let own = [
            format!(
                "{} of memory, {} of it written; {} Mbit/s; {} processors ({}).",
                self.plan.memory,
                self.plan.working_set,
                self.link_mbit,
                self.machine["processors"],
                self.machine["cpu"].as_str().unwrap_or_default()
            ),
            format!("{}.", self.qemu),
        ];
        own.into_iter().chain(PAPER.map(str::to_owned)).collect()
    }

    fn plot_gaps(&self) -> String {
        let names: Vec<String> = self.plan.modes.iter().map(|&mode| label(mode)).collect();
        let groups = self.plan.rates.iter().map(|rate| {
            let bars = self.plan.modes.iter().map(|&mode| {
                let gap = self.find(rate, mode)?.gap()?;
                Some(Bar { value: gap.median, lowest: gap.min, highest: gap.max })
            });
            (format!("{rate} written each second"), bars.collect())
        });
        let groups: Vec<(String, Vec<Option<Bar>>)> = groups.collect();
        let mut notes = self.notes();
        if let Some(floor) = self.gap("idle", MigrationMode::Hybrid) {
            notes.push(format!("An idle guest, moved by heca-hybrid: {floor:.1} ms."));
        }
        svg::bars(
            "How long the guest stands still (median; lines: least to most)",
            &names,
            &groups,
            &notes,
        )
    }

    fn plot_performance(&self) -> String {
        let rate = self.plan.rates.last().map_or("", String::as_str);
        let named = self.plan.modes.iter().filter_map(|&mode| {
            let cell = self.find(rate, mode)?;
            let baseline = median(cell.good().filter_map(|row| row.baseline));
            let curve = curve::middle(&cell.curves).into_iter();
            Some((label(mode), curve.map(|part| part.map(|part| part / baseline)).collect()))
        });
        let named: Vec<(String, Vec<Option<f64>>)> = named.collect();
        let title = format!(
            "Performance relative to before, {rate} written each second; the guest switches at 0 s"
        );
        svg::curves(&title, -BEFORE_S, STEP_S, &named, &self.notes())
    }

    fn print_table(&self) {
        println!(
            "{:<14} {:<24} {:>9} {:>19} {:>9}",
            "load", "mode", "gap, ms", "min..max", "total, s"
        );
        for cell in &self.cells {
            let Some(gap) = cell.gap() else {
                println!("{:<14} {:<24} {:>9}", cell.load, label(cell.mode), "failed");
                continue;
            };
            let range = format!("{:.1}..{:.1}", gap.min, gap.max);
            let total = cell.of_reports(|report| report.total_s).map_or(f64::NAN, |s| s.median);
            println!(
                "{:<14} {:<24} {:>9.1} {range:>19} {total:>9.1}",
                cell.load,
                label(cell.mode),
                gap.median
            );
        }
        println!("wrong bytes: {}", self.wrong_bytes);
    }
}
