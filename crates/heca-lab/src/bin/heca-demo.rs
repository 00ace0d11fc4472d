//! `make demo`: three hosts, a guest with twice the memory that its host may use, a memory test.
#![forbid(unsafe_code)]

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use heca_api::{PagerStats, VmInfo, VmState};
use heca_lab::{AgentOptions, GuestImage, Lab, find_kernel, heca_binary};
use heca_types::ByteSize;
use heca_types::limits::PAGE_BYTES;
use serde_json::{Value, json};

const MEMORY: &str = "1G";
const LOCAL: &str = "512M";
const TEST: &str = "820M";
const TIMEOUT: Duration = Duration::from_secs(900);

const INIT: &str = "
echo demo: guest is up, $(uname -r)
free -m
/bin/heca memtest --size 820M --rounds 2 --json || echo demo: MEMTEST FAILED
echo demo: mbw
/bin/mbw -n 2 96
echo demo: end
poweroff -f
";

fn say(text: &str) {
    println!("==> {text}");
    let _ = std::io::stdout().flush();
}

fn main() -> ExitCode {
    let interrupted = Arc::new(AtomicBool::new(false));
    match heca_lab::catch_signals(&interrupted).and_then(|()| demo(&interrupted)) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("demo failed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn target_dir() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| PathBuf::from("target"), PathBuf::from)
}

fn demo(interrupted: &AtomicBool) -> anyhow::Result<bool> {
    let begun = Instant::now();
    let out = target_dir().join("demo");
    fs::create_dir_all(&out)?;
    let kernel = find_kernel()?;
    say("building the guest's initial RAM disk");
    let initrd = out.join("initrd.cpio");
    let mut image = GuestImage::new()?;
    image.stripped_program("heca", &heca_binary()?, &out)?;
    image.program("mbw", Path::new("/usr/bin/mbw")).context("run `make deps`")?;
    image.write(INIT, &initrd)?;

    say("three hosts as network namespaces, joined by a bridge; an agent in each");
    let mut lab = Lab::new(3)?;
    let offer = |size: &str| AgentOptions { offer: size.to_owned(), ..AgentOptions::default() };
    lab.host(1).start_agent(&AgentOptions::default())?;
    lab.host(2).start_agent(&offer("1G"))?;
    lab.host(3).start_agent(&offer("1G"))?;
    let (second, third) = (lab.host(2).sponsor(), lab.host(3).sponsor());

    say(&format!(
        "a guest with {MEMORY} of memory on host 1, at most {LOCAL} of it there, \
         two replicas on hosts 2 and 3"
    ));
    let host = lab.host(1);
    let text = |path: &Path| path.to_string_lossy().into_owned();
    let (kernel, initrd) = (text(&kernel), text(&initrd));
    print!(
        "{}",
        host.heca_ok(&[
            "vm",
            "run",
            "demo",
            "--memory",
            MEMORY,
            "--local",
            LOCAL,
            "--replicas",
            "2",
            "--sponsor",
            &second,
            "--sponsor",
            &third,
            "--kernel",
            &kernel,
            "--initrd",
            &initrd,
            "--append",
            "console=ttyS0 quiet panic=-1",
        ])?
    );
    let (info, console) = follow(host, interrupted)?;
    let guest = read_console(&console);
    fs::write(out.join("console.log"), &console)?;
    let stats = info.pager.context("the pager left no figures")?;
    host.heca_ok(&["vm", "stop", "demo", "--now"])?;
    let held: u64 = [2, 3]
        .into_iter()
        .map(|number| lab.host(number).agent_info().map(|info| info.regions))
        .sum::<anyhow::Result<u64>>()?;
    drop(lab);

    let summary = summary(&info.memory, &info.local, info.replicas, &stats, &guest, held, begun);
    fs::write(out.join("summary.json"), serde_json::to_string_pretty(&summary)?)?;
    print_table(&summary);
    let good = summary["wrong_bytes"] == 0 && guest.finished && held == 0;
    if !good {
        println!("DEMO FAILED; the guest's console is in {}", out.join("console.log").display());
    }
    Ok(good)
}

/// Shows figures and the guest's words until the guest ends.
fn follow(host: &heca_lab::Host, interrupted: &AtomicBool) -> anyhow::Result<(VmInfo, String)> {
    let deadline = Instant::now() + TIMEOUT;
    let mut shown = 0;
    loop {
        let info = host.vm("demo")?;
        let bytes = fs::read(&info.console_log).unwrap_or_default();
        let console = String::from_utf8_lossy(&bytes).into_owned();
        let complete = console.rfind('\n').map_or(0, |end| end + 1);
        for line in console.get(shown..complete).unwrap_or_default().lines() {
            if ["demo:", "memtest:", "AVG", "Mem:"].iter().any(|mark| line.contains(mark)) {
                println!("    guest | {}", line.trim());
            }
        }
        shown = complete;
        if let Some(stats) = info.pager.as_ref().filter(|_| info.state == VmState::Running) {
            print_line(stats);
        }
        let _ = std::io::stdout().flush();
        match info.state {
            VmState::Stopped => return Ok((info, console)),
            VmState::PagerLost => bail!("the pager is gone: {:?}", info.problem),
            VmState::Starting | VmState::Running | VmState::Arriving | VmState::Leaving => {}
        }
        anyhow::ensure!(!interrupted.load(Ordering::Relaxed), "interrupted");
        anyhow::ensure!(
            Instant::now() < deadline,
            "the guest does not finish; console:\n{console}"
        );
        std::thread::sleep(Duration::from_secs(1));
    }
}

fn bytes(pages: u64) -> ByteSize {
    ByteSize(pages * PAGE_BYTES as u64)
}

fn print_line(stats: &PagerStats) {
    println!(
        "    pager | local {} of {}, remote {}, {:.0} faults/s, p50 {:.0} us, p99 {:.0} us, \
         {:.0} evictions/s",
        bytes(stats.gauges.local_pages),
        bytes(stats.gauges.budget_pages),
        bytes(stats.gauges.remote_pages),
        stats.rates.faults,
        stats.latency.fault_us.p50,
        stats.latency.fault_us.p99,
        stats.rates.evictions
    );
}

#[derive(Debug, Default)]
struct Guest {
    finished: bool,
    verified_bytes: u64,
    /// `None` if the test did not say.
    wrong_bytes: Option<u64>,
    mbw: Vec<String>,
}

fn read_console(console: &str) -> Guest {
    let mut guest = Guest::default();
    for line in console.lines() {
        if let Some(json) = line.trim().strip_prefix("memtest-summary: ")
            && let Ok(summary) = serde_json::from_str::<Value>(json)
        {
            guest.verified_bytes = summary["verified_bytes"].as_u64().unwrap_or(0);
            guest.wrong_bytes = summary["wrong_bytes"].as_u64();
        }
        if line.starts_with("AVG") {
            guest.mbw.push(line.split_whitespace().collect::<Vec<_>>().join(" "));
        }
        guest.finished |= line.trim() == "demo: end";
    }
    guest
}

fn summary(
    memory: &ByteSize,
    local: &ByteSize,
    replicas: usize,
    stats: &PagerStats,
    guest: &Guest,
    regions_left: u64,
    begun: Instant,
) -> Value {
    let counters = &stats.counters;
    let fault = &stats.latency.fault_us;
    json!({
        "wrong_bytes": guest.wrong_bytes,
        "verified_bytes": guest.verified_bytes,
        "guest_finished": guest.finished,
        "guest_ram_bytes": memory.0,
        "local_budget_bytes": local.0,
        "remote_bytes_peak": bytes(stats.remote_pages_peak).0,
        "replicas": replicas,
        "pages_fetched": counters.demand_fetches + counters.prefetches,
        "pages_fetched_on_demand": counters.demand_fetches,
        "pages_prefetched": counters.prefetches,
        "pages_evicted": counters.punched_pages,
        "pages_stored": stats.sponsors.iter().map(|s| s.pages_stored).sum::<u64>(),
        "faults": counters.faults,
        "fault_us": { "p50": fault.p50, "p99": fault.p99, "max": fault.max },
        "latency": stats.latency,
        "eviction": stats.eviction,
        "attach_stopped_us": stats.attach_stopped_us,
        "sponsors": stats.sponsors,
        "regions_left_on_sponsors": regions_left,
        "mbw": guest.mbw,
        "tested_bytes": TEST,
        "seconds": begun.elapsed().as_secs_f64(),
    })
}

fn print_table(summary: &Value) {
    let size = |key: &str| ByteSize(summary[key].as_u64().unwrap_or(0)).to_string();
    let number = |key: &str| summary[key].to_string();
    let us = |key: &str| format!("{:.1} us", summary["fault_us"][key].as_f64().unwrap_or(0.0));
    println!();
    for (name, value) in [
        ("guest memory", size("guest_ram_bytes")),
        ("local budget", size("local_budget_bytes")),
        ("remote memory, peak", size("remote_bytes_peak")),
        ("replicas", number("replicas")),
        ("pages out (freed here)", number("pages_evicted")),
        ("pages stored on sponsors", number("pages_stored")),
        ("pages in, on demand", number("pages_fetched_on_demand")),
        ("pages in, ahead", number("pages_prefetched")),
        ("remote fault p50", us("p50")),
        ("remote fault p99", us("p99")),
        ("remote fault max", us("max")),
        ("verified", size("verified_bytes")),
        ("wrong bytes", number("wrong_bytes")),
        ("seconds", format!("{:.0}", summary["seconds"].as_f64().unwrap_or(0.0))),
    ] {
        println!("  {name:<26} {value:>14}");
    }
    for line in summary["mbw"].as_array().into_iter().flatten() {
        println!("  mbw in the guest: {}", line.as_str().unwrap_or_default());
    }
}
