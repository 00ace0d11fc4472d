//! `heca bench fault`: the latency of a remote fault, beside the two floors that it stands on.
//!
//! - userfaultfd floor: the same target, its faults resolved by one thread of this process from
//!   local memory (`UFFDIO_COPY`);
//! - TCP floor: 64 bytes over loopback, 4 KiB back, between two threads;
//! - Heca: the same target, its pages on a sponsor in another process. Every touch is a fault on a
//!   remote page, while eviction makes room.
//!
//! All three sleep for their events unless `--spin-us` says to poll first, in which case the floors
//! poll as well. The kernel's idle latency limit is held at zero throughout: a floor with
//! sleeping cores would be several times higher and flatter the ratio.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use hdrhistogram::Histogram;
use heca_agent::latency;
use heca_agent::pager::{self, PagerConfig};
use heca_agent::seal::SealKey;
use heca_api::SponsorAddress;
use heca_sys::attach;
use heca_sys::uffd::{Features, Modes, Userfaultfd};
use heca_types::ByteSize;
use heca_types::limits::PAGE_BYTES;
use serde_json::json;

use super::scratch::{Scratch, new_ram};
use super::sponsor::BenchSponsor;
use super::target::{Measured, Order, Target};
use super::{Outcome, machine, median};
use crate::cli::FaultArguments;

/// Pages of the region.
const PAGES: usize = 65_536;
/// Local budget: an eighth.
const LOCAL_PAGES: usize = PAGES / 8;

pub(super) fn run(arguments: &FaultArguments) -> anyhow::Result<()> {
    let say = |text: &str| eprintln!("bench fault: {text}");
    let scratch = Scratch::new()?;
    let _awake = latency::hold();
    let spin = Duration::from_micros(arguments.spin_us);
    let (mut floor, mut tcp, mut heca, mut parts) = (vec![], vec![], vec![], vec![]);
    // The same over TLS, with sealed pages, or with both.
    let legs: Vec<Leg> = Leg::ALL.into_iter().filter(|leg| leg.is_wanted(arguments)).collect();
    let mut secured: Vec<Vec<Measured>> = vec![vec![]; legs.len()];
    let identity = if arguments.tls { Some(make_identity(&scratch.0)?) } else { None };
    for run in 1..=arguments.runs {
        say(&format!("run {run} of {}: local fault handler", arguments.runs));
        floor.push(uffd_floor(&scratch.0, arguments.faults, spin)?);
        say(&format!("run {run} of {}: TCP round trip", arguments.runs));
        tcp.push(tcp_floor(arguments.faults, spin)?);
        say(&format!("run {run} of {}: remote fault", arguments.runs));
        let (measured, stats) = remote_faults(&scratch.0, arguments, Leg::PLAIN, None)?;
        heca.push(measured);
        parts.push(stats);
        for (leg, measured) in legs.iter().zip(&mut secured) {
            say(&format!("run {run} of {}: remote fault, {}", arguments.runs, leg.name));
            let identity = identity.as_deref().filter(|_| leg.tls);
            measured.push(remote_faults(&scratch.0, arguments, *leg, identity)?.0);
        }
    }
    let wrong: usize = heca.iter().chain(secured.iter().flatten()).map(|m| m.wrong).sum();
    anyhow::ensure!(wrong == 0, "{wrong} pages came back with wrong bytes");
    let summary = |runs: &[Measured]| {
        json!({
            "p50_us": median(runs.iter().map(|m| m.p50_us)),
            "p99_us": median(runs.iter().map(|m| m.p99_us)),
            "p50_us_of_runs": runs.iter().map(|m| m.p50_us).collect::<Vec<_>>(),
            "p99_us_of_runs": runs.iter().map(|m| m.p99_us).collect::<Vec<_>>(),
            "max_us": runs.iter().map(|m| m.max_us).fold(0.0, f64::max),
        })
    };
    let p50 = |runs: &[Measured]| median(runs.iter().map(|m| m.p50_us));
    let p99 = median(heca.iter().map(|m| m.p99_us));
    let mut ratios = json!({
        "heca_over_floor_p50": p50(&heca) / (p50(&floor) + p50(&tcp)),
        "p99_over_p50": p99 / p50(&heca),
    });
    let mut secured_results = json!({});
    for (leg, measured) in legs.iter().zip(&secured) {
        secured_results[leg.name] = summary(measured);
        ratios[format!("{}_over_plain_p50", leg.name)] = json!(p50(measured) / p50(&heca));
    }
    let outcome = Outcome {
        experiment: "fault",
        machine: machine(),
        runs: arguments.runs,
        results: json!({
            "uffd_floor": summary(&floor),
            "tcp_floor": summary(&tcp),
            "heca_remote_fault": summary(&heca),
            "secured": secured_results,
            "pager": parts,
            "faults_per_run": arguments.faults,
            "replicas": arguments.replicas,
            "spin_us": arguments.spin_us,
            "wrong_pages": wrong,
        }),
        ratios,
    };
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&outcome)?);
        return Ok(());
    }
    println!("{:<34} {:>9} {:>9}", "us, median of runs", "p50", "p99");
    let secured = legs.iter().map(|leg| leg.text).zip(&secured);
    let all =
        [("local fault handler", &floor), ("TCP round trip, 4 KiB", &tcp), ("remote fault", &heca)];
    for (name, runs) in all.into_iter().chain(secured) {
        let p99 = median(runs.iter().map(|m| m.p99_us));
        println!("{name:<34} {:>9.1} {p99:>9.1}", p50(runs));
    }
    println!("ratios: {}", outcome.ratios);
    Ok(())
}

/// A way to secure what leaves the host.
#[derive(Debug, Clone, Copy)]
struct Leg {
    name: &'static str,
    text: &'static str,
    tls: bool,
    encrypt: bool,
}

impl Leg {
    const PLAIN: Self = Self { name: "plain", text: "remote fault", tls: false, encrypt: false };
    const ALL: [Self; 3] = [
        Self { name: "tls", text: "remote fault over TLS", tls: true, encrypt: false },
        Self { name: "sealed", text: "remote fault, sealed page", tls: false, encrypt: true },
        Self { name: "tls_sealed", text: "remote fault, both", tls: true, encrypt: true },
    ];

    fn is_wanted(&self, arguments: &FaultArguments) -> bool {
        (arguments.tls || !self.tls) && (arguments.encrypt || !self.encrypt)
    }
}

/// A pool with one member, for sponsor and pager of this machine.
fn make_identity(dir: &Path) -> anyhow::Result<std::path::PathBuf> {
    let pool_dir = dir.join("pool");
    let pool = heca_pki::Pool::init(&pool_dir, "bench")?;
    let server = heca_pki::EnrolServer::start(&pool_dir, "127.0.0.1:0")?;
    let token =
        pool.token(&server.local_addr().to_string(), Duration::from_secs(60), Some("bench"))?;
    let identity = dir.join("identity");
    heca_pki::join(&token, "bench", &identity)?;
    Ok(identity)
}

/// Resolves the target's faults from local memory.
fn uffd_floor(dir: &Path, faults: usize, spin: Duration) -> anyhow::Result<Measured> {
    let ram = new_ram(dir, PAGES)?;
    let mut target = Target::start(&ram)?;
    let base = heca_sys::process::maps(target.pid())?
        .into_iter()
        .find(|map| map.path == ram.to_string_lossy())
        .context("the target maps the file")?
        .start;
    let uffd = attach::userfaultfd(target.pid())?.uffd;
    uffd.enable(Features::MISSING_SHMEM)?;
    uffd.register(base, (PAGES * PAGE_BYTES) as u64, Modes::MISSING)?;
    let stop = Arc::new(AtomicBool::new(false));
    let handler = {
        let stop = stop.clone();
        std::thread::spawn(move || handle_faults(&uffd, &stop, spin))
    };
    let order = Order::Touch { first: 0, end: PAGES, count: faults, seed: 7, written: false };
    let measured = target.order(&order);
    stop.store(true, Ordering::Relaxed);
    let _ = handler.join();
    measured
}

fn handle_faults(uffd: &Userfaultfd, stop: &AtomicBool, spin: Duration) {
    use rustix::event::{PollFd, PollFlags, poll};
    let page = [0u8; PAGE_BYTES];
    let mut faults = Vec::with_capacity(64);
    let mut active = Instant::now();
    let timeout = rustix::time::Timespec { tv_sec: 0, tv_nsec: 20_000_000 };
    while !stop.load(Ordering::Relaxed) {
        faults.clear();
        if uffd.read_faults(&mut faults).is_ok_and(|any| any) {
            for fault in &faults {
                let _ = uffd.copy(fault.address, &page, false);
            }
            active = Instant::now();
        } else if active.elapsed() >= spin {
            let mut fds = [PollFd::from_borrowed_fd(uffd.as_fd(), PollFlags::IN)];
            let _ = poll(&mut fds, Some(&timeout));
            active = Instant::now();
        }
    }
}

fn tcp_floor(requests: usize, spin: Duration) -> anyhow::Result<Measured> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let mut client = TcpStream::connect(listener.local_addr()?)?;
    let (mut server, _) = listener.accept()?;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    let answering = std::thread::spawn(move || -> std::io::Result<()> {
        let (mut request, reply) = ([0u8; 64], [1u8; PAGE_BYTES]);
        loop {
            read_exact(&mut server, &mut request, spin)?;
            server.write_all(&reply)?;
        }
    });
    let mut histogram = Histogram::<u64>::new_with_bounds(1, 60_000_000_000, 3)
        .map_err(|error| anyhow::anyhow!("histogram: {error:?}"))?;
    let mut reply = [0u8; PAGE_BYTES];
    let begun = Instant::now();
    for _ in 0..requests {
        let sent = Instant::now();
        client.write_all(&[2u8; 64])?;
        read_exact(&mut client, &mut reply, spin)?;
        histogram.saturating_record(sent.elapsed().as_nanos() as u64);
    }
    let seconds = begun.elapsed().as_secs_f64();
    drop(client);
    let _ = answering.join();
    let us = |ns: u64| ns as f64 / 1000.0;
    Ok(Measured {
        count: requests,
        wrong: 0,
        seconds,
        p50_us: us(histogram.value_at_quantile(0.5)),
        p99_us: us(histogram.value_at_quantile(0.99)),
        max_us: us(histogram.max()),
    })
}

/// Reads a whole message, polling for at most `spin` before each blocking read.
fn read_exact(stream: &mut TcpStream, buffer: &mut [u8], spin: Duration) -> std::io::Result<()> {
    use rustix::net::{RecvFlags, recv};
    let mut filled = 0;
    while filled < buffer.len() {
        let deadline = Instant::now() + spin;
        let mut polled = None;
        while !spin.is_zero() && polled.is_none() && Instant::now() < deadline {
            match recv(&*stream, &mut buffer[filled..], RecvFlags::DONTWAIT) {
                Ok((n, _)) => polled = Some(n),
                Err(rustix::io::Errno::AGAIN) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let n = match polled {
            Some(n) => n,
            None => stream.read(&mut buffer[filled..])?,
        };
        if n == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        filled += n;
    }
    Ok(())
}

/// Fills the target's memory, lets most of it go to the sponsors, and touches what is remote.
fn remote_faults(
    dir: &Path,
    arguments: &FaultArguments,
    leg: Leg,
    identity: Option<&Path>,
) -> anyhow::Result<(Measured, serde_json::Value)> {
    let ram = new_ram(dir, PAGES)?;
    let offer = (PAGES * PAGE_BYTES) as u64 + heca_types::limits::EXTENT_BYTES;
    let sponsors: anyhow::Result<Vec<BenchSponsor>> = (0..arguments.replicas)
        .map(|i| {
            BenchSponsor::start(&dir.join(format!("s{i}")), offer, arguments.spin_us, identity)
        })
        .collect();
    let sponsors = sponsors?;
    let mut target = Target::start(&ram)?;
    let seal_key = dir.join("page.key");
    let _ = std::fs::remove_file(&seal_key);
    if leg.encrypt {
        SealKey::generate()?.save(&seal_key)?;
    }
    let local = ByteSize((LOCAL_PAGES * PAGE_BYTES) as u64);
    let addresses = sponsors.iter().map(|s| s.address.clone());
    let addresses = addresses.map(|address| SponsorAddress { address, weight: 1 }).collect();
    let handle = pager::start(&PagerConfig {
        replicas: arguments.replicas,
        eviction: arguments.eviction,
        spin_us: arguments.spin_us,
        identity: identity.map(Path::to_owned),
        seal_key: leg.encrypt.then_some(seal_key),
        ..PagerConfig::new(target.pid(), ram, local, addresses)
    })?;
    target.order(&Order::Write { first: 0, end: PAGES })?;
    std::thread::sleep(Duration::from_millis(300));
    // Written in order, so the first pages are the ones that had to go.
    let end = PAGES - 2 * LOCAL_PAGES;
    let count = arguments.faults.min(end);
    let sponsor_cpu = || sponsors.iter().map(BenchSponsor::cpu_s).sum::<f64>();
    let before = (handle.stats().context("the pager runs")?, sponsor_cpu());
    let measured = target.order(&Order::Touch { first: 0, end, count, seed: 7, written: true })?;
    let after = (handle.stats().context("the pager runs")?, sponsor_cpu());
    let fetched = after.0.counters.demand_fetches - before.0.counters.demand_fetches;
    anyhow::ensure!(
        fetched as f64 > count as f64 * 0.9,
        "only {fetched} of {count} touches were remote faults"
    );
    let parts = json!({
        "eviction": after.0.eviction,
        "latency": after.0.latency,
        "touches": count,
        "remote_faults": fetched,
        "evicted_pages": after.0.counters.punched_pages - before.0.counters.punched_pages,
        "pager_cpu_s": after.0.cpu_s - before.0.cpu_s,
        "sponsor_cpu_s": after.1 - before.1,
        "seconds": measured.seconds,
    });
    drop(target);
    handle.finish();
    Ok((measured, parts))
}
