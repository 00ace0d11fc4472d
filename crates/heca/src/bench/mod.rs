//! `heca bench`: each experiment measures Heca and what it is compared with in one run.

mod fault;
pub mod migrate;
pub mod quicksort;
mod scratch;
mod sponsor;
pub mod target;
mod throughput;
mod worker;

use std::fs;

use serde::Serialize;
use serde_json::{Value, json};

use crate::cli::{BenchArguments, Experiment};

pub fn run(arguments: &BenchArguments) -> anyhow::Result<()> {
    match &arguments.experiment {
        Experiment::Fault(arguments) => fault::run(arguments),
        Experiment::Throughput(arguments) => throughput::run(arguments),
        Experiment::Quicksort(arguments) => quicksort::run(arguments),
        Experiment::Migrate(arguments) => migrate::run(arguments),
    }
}

/// What every experiment prints.
#[derive(Debug, Serialize)]
struct Outcome {
    experiment: &'static str,
    machine: Value,
    runs: usize,
    results: Value,
    ratios: Value,
}

/// What figures of this machine depend on.
fn machine() -> Value {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    let cpuinfo = read("/proc/cpuinfo");
    let model = cpuinfo
        .lines()
        .find_map(|line| {
            line.strip_prefix("model name").map(|rest| rest.trim_start_matches([' ', '\t', ':']))
        })
        .unwrap_or("unknown");
    json!({
        "cpu": model,
        "processors": std::thread::available_parallelism().map_or(1, usize::from),
        "kernel": read("/proc/sys/kernel/osrelease"),
        "virtual": cpuinfo.contains(" hypervisor"),
        "load_before": read("/proc/loadavg").split(' ').next().unwrap_or_default(),
    })
}

/// The middle value, or the mean of the two in the middle.
fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    match (values.get(values.len().wrapping_sub(1) / 2), values.get(values.len() / 2)) {
        (Some(low), Some(high)) => f64::midpoint(*low, *high),
        _ => f64::NAN,
    }
}
