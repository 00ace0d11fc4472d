//! `heca bench quicksort`: a native program that sorts numbers, with part of its memory elsewhere.
//!
//! The series of the mirroring study of the paper's group (ISCC'13): a quicksort of memory of which
//! 75, 50, 33, 25 and 20 % are local, remote and mirrored, as overhead over all memory local. In the
//! same run, on the same numbers:
//!
//! - all local: memory of the program's own, as its heap would be;
//! - remote, mirrored: the pager, with one and with two sponsors on this machine;
//! - swap file: the same program in a control group that limits its memory, and a swap file on a disk;
//! - zram: the same, swapping to compressed memory. What zram stores counts as local memory, too:
//!   the program gets less, so that both together are what the others have. Where that cannot be,
//!   because the numbers do not compress well enough, there is no figure, and the report says so.
//!
//! Program, pager and sponsors share this machine's processors. `cpu_s` says who used how much, and
//! `overhead_percent_without_sponsors` is what is left when the sponsors' part, which other hosts would
//! do, is taken off the time, spread over the processors.

pub mod sort;
mod swap;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::str::FromStr;
use std::time::Duration;

use anyhow::Context;
use heca_agent::pager::{self, PagerConfig, PagerHandle};
use heca_api::SponsorAddress;
use heca_types::ByteSize;
use heca_types::limits::{BUDGET_PAGES_MIN, EXTENT_BYTES, PAGE_BYTES};
use serde::Serialize;
use serde_json::{Value, json};

use self::sort::Answer;
use self::swap::{MemoryLimit, Swap};
use super::scratch::{Scratch, new_ram};
use super::sponsor::BenchSponsor;
use super::worker::{Worker, process_cpu_s};
use super::{Outcome, machine, median};
use crate::cli::QuicksortArguments;

/// Local memory of a program that swaps to zram below which it is not worth a try, in percent.
const ZRAM_LOCAL_MIN: f64 = 5.0;

/// What is sorted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Values {
    /// Numbers of 64 random bits.
    Random,
    /// Numbers of 16 random bits.
    Small,
}

impl Values {
    fn name(self) -> &'static str {
        match self {
            Self::Random => "random",
            Self::Small => "small",
        }
    }
}

impl FromStr for Values {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        [Self::Random, Self::Small]
            .into_iter()
            .find(|values| values.name() == text)
            .ok_or_else(|| format!("`{text}` is neither `random` nor `small`"))
    }
}

/// Where memory that is not local is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Peer {
    /// On one sponsor.
    Remote,
    /// On two sponsors.
    Mirrored,
    /// In compressed memory.
    Zram,
    /// In a file on a disk.
    Swapfile,
}

impl Peer {
    const ALL: [Self; 4] = [Self::Remote, Self::Mirrored, Self::Zram, Self::Swapfile];

    fn name(self) -> &'static str {
        match self {
            Self::Remote => "remote",
            Self::Mirrored => "mirrored",
            Self::Zram => "zram",
            Self::Swapfile => "swapfile",
        }
    }
}

impl FromStr for Peer {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = Self::ALL.into_iter().find(|peer| peer.name() == text);
        known.ok_or_else(|| format!("`{text}` is none of remote, mirrored, zram, swapfile"))
    }
}

/// One sort.
#[derive(Debug, Clone, Serialize)]
struct Sorted {
    seconds: f64,
    /// Processor time of program, pager and sponsors while it was sorted, in seconds.
    cpu_s: [f64; 3],
    detail: Value,
}

/// The program, from the benchmark's side.
struct Program(Worker);

impl Program {
    fn start(arguments: &QuicksortArguments, file: Option<&Path>) -> anyhow::Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["bench-sort", "--bytes", &arguments.memory.0.to_string()]);
        command.args(["--threads", &arguments.threads.to_string()]);
        command.args(["--values", arguments.values.name()]);
        if let Some(file) = file {
            command.arg("--file").arg(file);
        }
        Worker::start(command).map(Self)
    }

    fn tell(&mut self, command: &str) -> anyhow::Result<Answer> {
        let text = "the program that sorts (was it killed, as memory ran out?)";
        let answer: Answer = self.0.ask(command).context(text)?;
        anyhow::ensure!(answer.wrong == 0, "{} numbers are wrong", answer.wrong);
        Ok(answer)
    }

    /// Sorts; what came of it is still to be checked.
    fn sort(&mut self) -> anyhow::Result<Sorted> {
        let before = process_cpu_s(self.0.pid());
        let answer = self.tell("sort")?;
        let cpu_s = [process_cpu_s(self.0.pid()) - before, 0.0, 0.0];
        Ok(Sorted { seconds: answer.seconds, cpu_s, detail: Value::Null })
    }

    fn check(&mut self) -> anyhow::Result<()> {
        self.tell("check").map(drop)
    }
}

struct Bench<'a> {
    arguments: &'a QuicksortArguments,
    scratch: Scratch,
    /// Bytes of numbers for a byte that zram takes for them.
    zram_ratio: Option<f64>,
}

pub(super) fn run(arguments: &QuicksortArguments) -> anyhow::Result<()> {
    anyhow::ensure!(
        !swap::is_on(),
        "swap is in use: turn it off for this experiment (`swapoff -a`), which sets up its own"
    );
    let smallest = arguments.local.iter().min().context("give at least one part for --local")?;
    let local = arguments.memory.0 * smallest / 100;
    let least = ByteSize(BUDGET_PAGES_MIN * PAGE_BYTES as u64);
    anyhow::ensure!(
        local >= least.0,
        "{smallest} % of {} are less than the smallest local budget, {least}: sort more memory",
        arguments.memory
    );
    anyhow::ensure!(
        arguments.threads > 0 && arguments.runs > 0,
        "give at least one thread and run"
    );
    let mut bench = Bench { arguments, scratch: Scratch::new()?, zram_ratio: None };
    let mut all_local = Vec::new();
    let mut cells: BTreeMap<(Peer, u64), Vec<Sorted>> = BTreeMap::new();
    let mut missing: BTreeMap<String, String> = BTreeMap::new();
    for run in 1..=arguments.runs {
        let say =
            |what: &str| eprintln!("bench quicksort: run {run} of {}: {what}", arguments.runs);
        say("all local");
        let mut program = Program::start(arguments, None)?;
        program.tell("fill")?;
        all_local.push(program.sort()?);
        program.check()?;
        drop(program);
        for &local in &arguments.local {
            for &peer in &arguments.peers {
                say(&format!("{}, {local} % local", peer.name()));
                match bench.measure(peer, local) {
                    Ok(sorted) => cells.entry((peer, local)).or_default().push(sorted),
                    Err(error) => {
                        eprintln!("bench quicksort: no figure: {error:#}");
                        missing.insert(format!("{}.{local}", peer.name()), format!("{error:#}"));
                    }
                }
            }
        }
    }
    let local_s = median(all_local.iter().map(|sorted| sorted.seconds));
    let processors = std::thread::available_parallelism().map_or(1, usize::from) as f64;
    let (mut overhead, mut without) = (json!({}), json!({}));
    let mut results = json!({});
    for &peer in &arguments.peers {
        for &local in &arguments.local {
            let runs = cells.get(&(peer, local)).map_or(&[][..], Vec::as_slice);
            let percent = |seconds: f64| (seconds / local_s - 1.0) * 100.0;
            let value = |of: fn(&Sorted, f64) -> f64| match runs {
                [] => Value::Null,
                runs => json!(percent(median(runs.iter().map(|s| of(s, processors))))),
            };
            let (peer, local) = (peer.name(), local.to_string());
            overhead[peer][&local] = value(|sorted, _| sorted.seconds);
            without[peer][&local] =
                value(|sorted, processors| sorted.seconds - sorted.cpu_s[2] / processors);
            results[peer][&local] = json!(runs);
        }
    }
    let outcome = Outcome {
        experiment: "quicksort",
        machine: machine(),
        runs: arguments.runs,
        results: json!({
            "all_local": all_local,
            "all_local_s": local_s,
            "peers": results,
            "no_figure_because": missing,
            "memory_bytes": arguments.memory.0,
            "threads": arguments.threads,
            "values": arguments.values,
            "zram_ratio": bench.zram_ratio,
            "overhead_percent": overhead,
            "overhead_percent_without_sponsors": without,
            "paper_overhead_percent": {
                "remote": { "75": 2.1, "50": 2.6, "33": 3.3, "25": 4.2, "20": 4.7 },
                "mirrored": { "75": 5.2, "50": 6.1, "33": 9.2, "25": 8.7, "20": 9.3 },
            },
        }),
        ratios: json!({ "overhead_percent": overhead }),
    };
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&outcome)?);
        return Ok(());
    }
    println!("all local: {local_s:.2} s; overhead in percent, median of runs:");
    print!("{:<12}", "% local");
    arguments.local.iter().for_each(|local| print!("{local:>9}"));
    println!();
    for peer in arguments.peers.iter().map(|peer| peer.name()) {
        print!("{peer:<12}");
        for local in &arguments.local {
            match overhead[peer][local.to_string()].as_f64() {
                Some(percent) => print!("{percent:>9.1}"),
                None => print!("{:>9}", "-"),
            }
        }
        println!();
    }
    for (cell, why) in &missing {
        println!("{cell}: {why}");
    }
    Ok(())
}

impl Bench<'_> {
    fn measure(&mut self, peer: Peer, local: u64) -> anyhow::Result<Sorted> {
        match peer {
            Peer::Remote => self.paged(local, 1),
            Peer::Mirrored => self.paged(local, 2),
            Peer::Zram => self.zram(local),
            Peer::Swapfile => {
                let swap = Swap::file(&self.arguments.swap_dir, self.swap_bytes())?;
                // The kernel may give up on reclaim, and kill the program.
                let attempt = || self.limited(local as f64, &swap);
                attempt().or_else(|_| attempt())
            }
        }
    }

    fn swap_bytes(&self) -> u64 {
        self.arguments.memory.0 + (64 << 20)
    }

    fn paged(&self, local: u64, replicas: usize) -> anyhow::Result<Sorted> {
        let arguments = self.arguments;
        let dir = &self.scratch.0;
        let ram = new_ram(dir, arguments.memory.pages() as usize)?;
        let offer = arguments.memory.0 + EXTENT_BYTES;
        let spin_us = crate::cli::default_spin_us();
        let sponsors: anyhow::Result<Vec<BenchSponsor>> = (0..replicas)
            .map(|i| BenchSponsor::start(&dir.join(format!("s{i}")), offer, spin_us, None))
            .collect();
        let sponsors = sponsors?;
        let mut program = Program::start(arguments, Some(&ram))?;
        let addresses = sponsors.iter().map(|sponsor| sponsor.address.clone());
        let handle = pager::start(&PagerConfig {
            replicas,
            spin_us,
            ..PagerConfig::new(
                program.0.pid() as i32,
                ram,
                ByteSize(arguments.memory.0 * local / 100),
                addresses.map(|address| SponsorAddress { address, weight: 1 }).collect(),
            )
        })?;
        program.tell("fill")?;
        let cpu = |handle: &PagerHandle| -> anyhow::Result<[f64; 2]> {
            let pager = handle.stats().context("the pager runs")?.cpu_s;
            Ok([pager, sponsors.iter().map(BenchSponsor::cpu_s).sum()])
        };
        // What is left of filling is not part of sorting.
        std::thread::sleep(Duration::from_millis(500));
        let before = (handle.stats().context("the pager runs")?.counters, cpu(&handle)?);
        let mut sorted = program.sort()?;
        let after = (handle.stats().context("the pager runs")?.counters, cpu(&handle)?);
        sorted.cpu_s[1] = after.1[0] - before.1[0];
        sorted.cpu_s[2] = after.1[1] - before.1[1];
        let (before, after) = (before.0, after.0);
        sorted.detail = json!({
            "faults": after.faults - before.faults,
            "demand_fetches": after.demand_fetches - before.demand_fetches,
            "prefetches": after.prefetches - before.prefetches,
            "prefetches_wasted": after.prefetches_wasted - before.prefetches_wasted,
            "standby_hits": after.standby_hits - before.standby_hits,
            "evicted_dirty_pages": after.evicted_dirty_pages - before.evicted_dirty_pages,
            "evicted_clean_pages": after.evicted_clean_pages - before.evicted_clean_pages,
        });
        program.check()?;
        drop(program);
        handle.finish();
        Ok(sorted)
    }

    /// Sorts with so much of the memory local, in percent, and the rest swapped out.
    fn limited(&self, local: f64, swap: &Swap) -> anyhow::Result<Sorted> {
        let group = MemoryLimit::new()?;
        let mut program = Program::start(self.arguments, None)?;
        group.take(program.0.pid())?;
        group.allow((self.arguments.memory.0 as f64 * local / 100.0) as u64)?;
        program.tell("fill")?;
        let mut sorted = program.sort()?;
        sorted.detail = json!({ "program_local_percent": local, "zram": swap.zram_use() });
        program.check()?;
        Ok(sorted)
    }

    fn zram(&mut self, local: u64) -> anyhow::Result<Sorted> {
        let ratio = match self.zram_ratio {
            Some(ratio) => ratio,
            None => {
                let ratio = self.find_zram_ratio()?;
                *self.zram_ratio.insert(ratio)
            }
        };
        // Local memory of the program, and what zram takes for the rest, are as much as others have.
        let taken = 1.0 / ratio;
        let own = 100.0 * (local as f64 / 100.0 - taken) / (1.0 - taken);
        anyhow::ensure!(
            ratio > 1.0 && own >= ZRAM_LOCAL_MIN,
            "zram takes a byte for {ratio:.2} of these numbers: what it stores leaves the program no \
             local memory"
        );
        let swap = Swap::zram(self.swap_bytes())?;
        self.limited(own, &swap)
    }

    fn find_zram_ratio(&self) -> anyhow::Result<f64> {
        let swap = Swap::zram(self.swap_bytes())?;
        let group = MemoryLimit::new()?;
        let mut program = Program::start(self.arguments, None)?;
        group.take(program.0.pid())?;
        group.allow(self.arguments.memory.0 / 2)?;
        program.tell("fill")?;
        let (held, taken) = swap.zram_use().context("zram tells what it uses")?;
        anyhow::ensure!(held > self.arguments.memory.0 / 4, "zram took only {held} bytes");
        Ok(held as f64 / taken.max(1) as f64)
    }
}
