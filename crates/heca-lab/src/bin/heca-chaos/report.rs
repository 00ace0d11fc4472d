//! What was seen: a table, and `summary.json`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use heca_lab::Cluster;
use serde_json::{Value, json};

use crate::faults::Kind;

/// One fault.
#[derive(Debug, Clone)]
pub struct Outcome {
    pub kind: Kind,
    pub target: String,
    pub note: String,
    /// Longest time that a thread of the guest waited for memory.
    pub stall_ms: f64,
    /// From the end of the fault until everything was healthy.
    pub recovery_ms: f64,
    /// From the beginning of the fault until every extent had its replicas again.
    pub rebuild_ms: Option<f64>,
    pub pager_pause_ms: Option<f64>,
    /// With what belongs to it.
    pub seconds: f64,
}

impl Outcome {
    pub fn line(&self) -> String {
        let pause = self.pager_pause_ms.map_or(String::new(), |ms| format!(", pause {ms:.0} ms"));
        format!(
            "{:<21} {:<13} stall {:>6.0} ms, healthy {:>6.0} ms after it{pause}  {}",
            self.kind.name(),
            self.target,
            self.stall_ms,
            self.recovery_ms,
            self.note
        )
    }
}

#[derive(Debug)]
pub struct Report {
    seed: u64,
    plain: bool,
    outcomes: Vec<Outcome>,
    quiet_ms: Vec<f64>,
    pub skipped: usize,
    pub problem: Option<String>,
    guest_alive: bool,
    wrong_bytes: u64,
    verified_bytes: u64,
    lost_pages: u64,
    pagers: usize,
    last_pager: Value,
    all_pagers: Value,
    guest: Value,
    seconds: f64,
}

fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

fn longest(values: &[f64]) -> f64 {
    values.iter().copied().fold(0.0, f64::max)
}

fn round(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

pub fn out_dir() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| PathBuf::from("target"), PathBuf::from)
        .join("chaos")
}

/// Copies the logs of agents, pager and console.
pub fn keep_logs(cluster: &Cluster, out: &Path) {
    let dir = cluster.lab.dir();
    let vm = dir.join("h1/vms/guest");
    let logs = fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let logs = logs.filter(|path| path.extension().is_some_and(|e| e == "log"));
    for path in logs.chain(["pager.log", "console.log", "qemu.log"].map(|name| vm.join(name))) {
        if let Some(name) = path.file_name() {
            let _ = fs::copy(&path, out.join(name));
        }
    }
    println!("logs of the hosts are in {}", out.display());
}

impl Report {
    pub fn new(seed: u64, plain: bool) -> Self {
        Self {
            seed,
            plain,
            outcomes: Vec::new(),
            quiet_ms: Vec::new(),
            skipped: 0,
            problem: None,
            guest_alive: false,
            wrong_bytes: 0,
            verified_bytes: 0,
            lost_pages: 0,
            pagers: 0,
            last_pager: Value::Null,
            all_pagers: Value::Null,
            guest: Value::Null,
            seconds: 0.0,
        }
    }

    pub fn count(&self) -> usize {
        self.outcomes.len()
    }

    pub fn count_of(&self, kind: Kind) -> usize {
        self.outcomes.iter().filter(|o| o.kind == kind).count()
    }

    /// Time that a fault of this kind takes.
    pub fn mean_seconds(&self, kind: Kind) -> Option<f64> {
        let times: Vec<f64> =
            self.outcomes.iter().filter(|o| o.kind == kind).map(|o| o.seconds).collect();
        (!times.is_empty()).then(|| times.iter().sum::<f64>() / times.len() as f64)
    }

    /// Notes the pauses of a guest whom nobody disturbed since this report.
    pub fn quiet(&mut self, cluster: &Cluster, from: usize) {
        let samples = cluster.console().samples();
        self.quiet_ms.extend(samples.iter().skip(from).map(|sample| sample.stall_ms));
    }

    pub fn add(&mut self, outcome: Outcome) {
        self.outcomes.push(outcome);
    }

    /// Takes in the last figures.
    pub fn finish(&mut self, cluster: &mut Cluster, begun: Instant) {
        let _ = cluster.look();
        self.guest_alive = cluster.goes_on(Duration::from_secs(20));
        if let Some(last) = cluster.console().last() {
            (self.verified_bytes, self.wrong_bytes) = (last.verified_bytes, last.wrong_bytes);
        }
        let mut sums: BTreeMap<String, u64> = BTreeMap::new();
        for stats in cluster.pagers() {
            self.pagers += 1;
            self.lost_pages = self.lost_pages.max(stats.gauges.poisoned_pages);
            self.last_pager = serde_json::to_value(stats.counters).unwrap_or_default();
            for (name, count) in self.last_pager.as_object().into_iter().flatten() {
                *sums.entry(name.clone()).or_default() += count.as_u64().unwrap_or(0);
            }
        }
        self.lost_pages = self.lost_pages.max(sums.get("poisoned_pages").copied().unwrap_or(0));
        self.all_pagers = json!(sums);
        let options = cluster.options();
        let remote = cluster.pagers().map(|stats| stats.remote_pages_peak).max().unwrap_or(0);
        self.guest = json!({
            "memory_bytes": options.memory.0,
            "local_bytes": options.local.0,
            "working_set_bytes": options.working_set.0,
            "remote_bytes_peak": remote * 4096,
            "vcpus": options.vcpus,
            "replicas": 2,
            "sponsors": options.sponsors,
        });
        self.seconds = begun.elapsed().as_secs_f64();
    }

    pub fn is_good(&self) -> bool {
        self.guest_alive && self.wrong_bytes == 0 && self.lost_pages == 0 && self.problem.is_none()
    }

    fn by_kind(&self) -> BTreeMap<&'static str, Vec<&Outcome>> {
        let mut kinds: BTreeMap<&'static str, Vec<&Outcome>> = BTreeMap::new();
        for outcome in &self.outcomes {
            kinds.entry(outcome.kind.name()).or_default().push(outcome);
        }
        kinds
    }

    pub fn print(&self) {
        println!();
        println!(
            "{:<21} {:>5} {:>14} {:>13} {:>13} {:>13} {:>13}",
            "fault",
            "count",
            "longest stall",
            "median stall",
            "recovery p50",
            "recovery max",
            "rebuild p50"
        );
        for (kind, outcomes) in self.by_kind() {
            let of = |value: fn(&Outcome) -> f64| -> Vec<f64> {
                outcomes.iter().map(|outcome| value(outcome)).collect()
            };
            let (stalls, recoveries) = (of(|o| o.stall_ms), of(|o| o.recovery_ms));
            let rebuilds: Vec<f64> = outcomes.iter().filter_map(|o| o.rebuild_ms).collect();
            let rebuild = if rebuilds.is_empty() {
                String::new()
            } else {
                format!("{:.0} ms", median(&rebuilds))
            };
            println!(
                "{kind:<21} {:>5} {:>11.0} ms {:>10.0} ms {:>10.0} ms {:>10.0} ms {rebuild:>13}",
                outcomes.len(),
                longest(&stalls),
                median(&stalls),
                median(&recoveries),
                longest(&recoveries),
            );
        }
        let pauses: Vec<f64> = self.outcomes.iter().filter_map(|o| o.pager_pause_ms).collect();
        println!();
        println!(
            "  faults {}, wrong bytes {}, guest alive {}, lost pages {}, verified {:.1} GiB, {:.0} s",
            self.count(),
            self.wrong_bytes,
            self.guest_alive,
            self.lost_pages,
            self.verified_bytes as f64 / f64::from(1 << 30),
            self.seconds
        );
        println!(
            "  without a fault the guest's longest pauses in 200 ms: median {:.0} ms, longest {:.0} ms",
            median(&self.quiet_ms),
            longest(&self.quiet_ms)
        );
        println!(
            "  {} pagers; from the loss of one until the next served: median {:.0} ms, longest {:.0} ms",
            self.pagers,
            median(&pauses),
            longest(&pauses)
        );
        println!(
            "  each fault began with all replicas in place; {} slow ones were left out for time; seed {}",
            self.skipped, self.seed
        );
    }

    pub fn write(&self, path: &Path) -> anyhow::Result<()> {
        let kinds = self.by_kind();
        let each = |value: &dyn Fn(&[&Outcome]) -> Value| -> Value {
            kinds.iter().map(|(kind, outcomes)| ((*kind).to_owned(), value(outcomes))).collect()
        };
        let stalls =
            |outcomes: &[&Outcome]| -> Vec<f64> { outcomes.iter().map(|o| o.stall_ms).collect() };
        let pauses: Vec<f64> = self.outcomes.iter().filter_map(|o| o.pager_pause_ms).collect();
        let summary = json!({
            "faults_injected": self.count(),
            "kinds": each(&|outcomes| json!(outcomes.len())),
            "wrong_bytes": self.wrong_bytes,
            "guest_alive": self.guest_alive,
            "longest_stall_ms": each(&|outcomes| json!(round(longest(&stalls(outcomes))))),
            "median_stall_ms": each(&|outcomes| json!(round(median(&stalls(outcomes))))),
            "baseline_stall_ms": round(longest(&self.quiet_ms)),
            "baseline_median_stall_ms": round(median(&self.quiet_ms)),
            "baseline_windows": self.quiet_ms.len(),
            "pager_pause_ms": { "median": round(median(&pauses)), "longest": round(longest(&pauses)), "count": pauses.len() },
            "recovery_ms": each(&|outcomes| {
                let times: Vec<f64> = outcomes.iter().map(|o| o.recovery_ms).collect();
                json!({ "median": round(median(&times)), "longest": round(longest(&times)) })
            }),
            "rebuild_ms": each(&|outcomes| {
                let times: Vec<f64> = outcomes.iter().filter_map(|o| o.rebuild_ms).collect();
                if times.is_empty() { return Value::Null }
                json!({ "median": round(median(&times)), "longest": round(longest(&times)) })
            }),
            "lost_pages": self.lost_pages,
            "verified_bytes": self.verified_bytes,
            "counters": self.last_pager,
            "counters_of_all_pagers": self.all_pagers,
            "pagers": self.pagers,
            "guest": self.guest,
            "tls_and_seal": !self.plain,
            "slow_kinds_left_out": self.skipped,
            "left_out": "clock-jump: the wall clock is the whole machine's, and a time namespace \
                         shifts no clock that the agents depend on after their start",
            "redundancy": "each fault began with degraded_extents == 0",
            "seconds": round(self.seconds),
            "problem": self.problem,
            "seed": self.seed,
        });
        Ok(fs::write(path, serde_json::to_string_pretty(&summary)?)?)
    }
}
