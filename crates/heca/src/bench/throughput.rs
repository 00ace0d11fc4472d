//! `heca bench throughput`: how fast memory comes in that is used in order.
//!
//! - raw stream: one TCP connection over loopback, one thread that sends pages and one that receives
//!   them, as fast as they can;
//! - read-in: a target reads a word of each page of a region of which most is remote, in order;
//!   eviction of clean pages makes room;
//! - dirty: the same with a store to each page, so that in the steady state each page crosses the
//!   wire once in, and once out for each replica.
//!
//! Figures are bytes of memory used, whole pages, per second. Sponsor, pager and target share this
//! machine's processors, and the raw stream has them all for itself: `cpu_s` says who used them.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context;
use heca_agent::latency;
use heca_agent::pager::{self, PagerConfig, PagerHandle};
use heca_api::SponsorAddress;
use heca_types::limits::PAGE_BYTES;
use serde::Serialize;
use serde_json::{Value, json};

use super::scratch::{Scratch, new_ram};
use super::sponsor::BenchSponsor;
use super::target::{Order, Target};
use super::worker::process_cpu_s;
use super::{Outcome, machine, median};
use crate::cli::ThroughputArguments;

/// Bytes of one send of the raw stream: as many pages as a frame of the protocol has at the most.
const CHUNK: usize = heca_types::limits::FRAME_PAGES_MAX * PAGE_BYTES;
/// Longest time for dirty pages to get to the sponsors before a measurement.
const SETTLE: Duration = Duration::from_secs(30);

/// One pass over the memory.
#[derive(Debug, Clone, Serialize)]
struct Pass {
    gib_per_s: f64,
    seconds: f64,
    cpu_s: Value,
    faults: u64,
    prefetched_pages: u64,
    prefetches_wasted: u64,
    mapped_ahead: u64,
    written_back_pages: u64,
}

fn gib(bytes: u64) -> f64 {
    bytes as f64 / (1u64 << 30) as f64
}

pub(super) fn run(arguments: &ThroughputArguments) -> anyhow::Result<()> {
    let say = |text: &str| eprintln!("bench throughput: {text}");
    anyhow::ensure!(
        arguments.memory.0 >= arguments.local.0 * 4,
        "most of the memory has to be remote: give at least four times as much as is local"
    );
    let scratch = Scratch::new()?;
    let _awake = latency::hold();
    let (mut streams, mut read_in, mut dirty) = (vec![], vec![], vec![]);
    for run in 1..=arguments.runs {
        say(&format!("run {run} of {}: raw TCP stream", arguments.runs));
        streams.push(raw_stream(arguments.memory.0)?);
        say(&format!("run {run} of {}: remote memory", arguments.runs));
        let (first, second) = remote(&scratch.0, arguments)?;
        read_in.push(first);
        dirty.push(second);
    }
    let stream = median(streams.iter().copied());
    let of = |passes: &[Pass]| median(passes.iter().map(|pass| pass.gib_per_s));
    let outcome = Outcome {
        experiment: "throughput",
        machine: machine(),
        runs: arguments.runs,
        results: json!({
            "raw_stream_gib_per_s": { "median": stream, "of_runs": streams },
            "read_in_gib_per_s": { "median": of(&read_in), "of_runs": read_in },
            "dirty_gib_per_s": { "median": of(&dirty), "of_runs": dirty },
            "memory_bytes": arguments.memory.0,
            "local_bytes": arguments.local.0,
            "replicas": arguments.replicas,
            "spin_us": arguments.spin_us,
        }),
        ratios: json!({
            "read_in_over_stream": of(&read_in) / stream,
            "dirty_over_stream": of(&dirty) / stream,
        }),
    };
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&outcome)?);
        return Ok(());
    }
    println!("{:<34} {:>9}", "GiB/s, median of runs", "");
    println!("{:<34} {stream:>9.2}", "raw TCP stream");
    println!("{:<34} {:>9.2}", "read-in, in order", of(&read_in));
    println!("{:<34} {:>9.2}", "every page dirty, in order", of(&dirty));
    println!("ratios: {}", outcome.ratios);
    Ok(())
}

/// GiB/s of a TCP connection over loopback.
fn raw_stream(bytes: u64) -> anyhow::Result<f64> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let mut client = TcpStream::connect(listener.local_addr()?)?;
    let (mut server, _) = listener.accept()?;
    let chunks = bytes.div_ceil(CHUNK as u64);
    let begun = Instant::now();
    let sending = std::thread::spawn(move || -> std::io::Result<()> {
        let chunk = vec![7u8; CHUNK];
        (0..chunks).try_for_each(|_| server.write_all(&chunk))
    });
    let mut chunk = vec![0u8; CHUNK];
    for _ in 0..chunks {
        client.read_exact(&mut chunk)?;
    }
    let seconds = begun.elapsed().as_secs_f64();
    sending.join().map_err(|_| anyhow::anyhow!("the sender failed"))??;
    Ok(gib(chunks * CHUNK as u64) / seconds)
}

struct Rig {
    sponsors: Vec<BenchSponsor>,
    target: Target,
    handle: PagerHandle,
    pages: usize,
}

fn remote(dir: &Path, arguments: &ThroughputArguments) -> anyhow::Result<(Pass, Pass)> {
    let pages = arguments.memory.pages() as usize;
    let ram = new_ram(dir, pages)?;
    let offer = arguments.memory.0 + heca_types::limits::EXTENT_BYTES;
    let sponsors: anyhow::Result<Vec<BenchSponsor>> = (0..arguments.replicas)
        .map(|i| BenchSponsor::start(&dir.join(format!("s{i}")), offer, arguments.spin_us, None))
        .collect();
    let sponsors = sponsors?;
    let target = Target::start(&ram)?;
    let addresses = sponsors.iter().map(|s| s.address.clone());
    let addresses = addresses.map(|address| SponsorAddress { address, weight: 1 }).collect();
    let handle = pager::start(&PagerConfig {
        replicas: arguments.replicas,
        spin_us: arguments.spin_us,
        ..PagerConfig::new(target.pid(), ram, arguments.local, addresses)
    })?;
    let mut rig = Rig { sponsors, target, handle, pages };
    rig.target.order(&Order::Write { first: 0, end: pages })?;
    rig.settle()?;
    let read_in = rig.pass(false)?;
    // The first time round there is nothing dirty to make room for.
    rig.pass(true)?;
    let dirty = rig.pass(true)?;
    let Rig { sponsors, target, handle, .. } = rig;
    drop(target);
    handle.finish();
    drop(sponsors);
    Ok((read_in, dirty))
}

impl Rig {
    /// Waits until eviction has nothing to do.
    fn settle(&self) -> anyhow::Result<()> {
        let deadline = Instant::now() + SETTLE;
        let mut before = None;
        loop {
            let stats = self.handle.stats().context("the pager runs")?;
            let now = (stats.counters.evicted_dirty_pages, stats.counters.punched_pages);
            if before == Some(now) {
                return Ok(());
            }
            anyhow::ensure!(Instant::now() < deadline, "eviction does not come to an end");
            before = Some(now);
            std::thread::sleep(Duration::from_millis(300));
        }
    }

    /// Seconds of processor that target, pager and sponsors used so far.
    fn cpu(&self) -> anyhow::Result<[f64; 3]> {
        let pager = self.handle.stats().context("the pager runs")?.cpu_s;
        let sponsors = self.sponsors.iter().map(BenchSponsor::cpu_s).sum();
        Ok([process_cpu_s(self.target.pid() as u32), pager, sponsors])
    }

    fn pass(&mut self, dirty: bool) -> anyhow::Result<Pass> {
        let before = (self.handle.stats().context("the pager runs")?.counters, self.cpu()?);
        let order = Order::Scan { first: 0, end: self.pages, dirty };
        let measured = self.target.order(&order)?;
        let after = (self.handle.stats().context("the pager runs")?.counters, self.cpu()?);
        anyhow::ensure!(measured.wrong == 0, "{} pages came back with wrong bytes", measured.wrong);
        let used = |i: usize| after.1[i] - before.1[i];
        let (before, after) = (before.0, after.0);
        let brought = after.demand_fetches + after.prefetches;
        let brought = brought - before.demand_fetches - before.prefetches;
        anyhow::ensure!(
            brought as f64 > self.pages as f64 * 0.8,
            "only {brought} of {} pages were remote",
            self.pages
        );
        Ok(Pass {
            gib_per_s: gib((self.pages * PAGE_BYTES) as u64) / measured.seconds,
            seconds: measured.seconds,
            cpu_s: json!({ "target": used(0), "pager": used(1), "sponsors": used(2) }),
            faults: after.faults - before.faults,
            prefetched_pages: after.prefetches - before.prefetches,
            prefetches_wasted: after.prefetches_wasted - before.prefetches_wasted,
            mapped_ahead: after.mapped_ahead - before.mapped_ahead,
            written_back_pages: after.evicted_dirty_pages - before.evicted_dirty_pages,
        })
    }
}
