//! What people and programs see.

use std::process::ExitCode;

use heca_agent::doctor::{Report, Severity};
use heca_api::{ApiError, ClientError, PagerStats, VmInfo};
use heca_types::ByteSize;
use heca_types::limits::PAGE_BYTES;

use crate::cli::SimArguments;

/// Prints an error with its causes and, if there is one, what to do.
pub fn print_error(error: &anyhow::Error) {
    eprintln!("error: {error}");
    for cause in error.chain().skip(1) {
        eprintln!("  caused by: {cause}");
    }
    let api =
        error.downcast_ref::<ApiError>().or_else(|| match error.downcast_ref::<ClientError>() {
            Some(ClientError::Refused(api)) => Some(api),
            _ => None,
        });
    if let Some(api) = api {
        if let Some(detail) = &api.detail {
            eprintln!("  detail: {detail}");
        }
        if let Some(hint) = &api.hint {
            eprintln!("  hint: {hint}");
        }
    }
    if let Some(ClientError::Unreachable { .. }) = error.downcast_ref::<ClientError>() {
        eprintln!("  hint: start one with `heca agent`, or name its directory with --run-dir");
    }
}

fn pages(count: u64) -> ByteSize {
    ByteSize(count * PAGE_BYTES as u64)
}

fn dirty(stats: &PagerStats) -> String {
    stats.dirty_pages.map_or_else(|| "?".to_owned(), |count| pages(count).to_string())
}

/// One line of figures.
pub fn line(stats: &PagerStats) -> String {
    let gauges = &stats.gauges;
    let latency = &stats.latency;
    format!(
        "local {} of {}, dirty {} | remote {} | untouched {} | faults {:.0}/s, remote {:.0}/s | \
         p50 {:.0} us p99 {:.0} us max {:.1} ms | evicted {:.0}/s | in {}/s out {}/s",
        pages(gauges.local_pages),
        pages(gauges.budget_pages),
        dirty(stats),
        pages(gauges.remote_pages),
        pages(gauges.untouched_pages),
        stats.rates.faults,
        stats.rates.remote_faults,
        latency.fault_us.p50,
        latency.fault_us.p99,
        latency.fault_us.max / 1000.0,
        stats.rates.evictions,
        ByteSize(stats.rates.bytes_received as u64),
        ByteSize(stats.rates.bytes_sent as u64),
    )
}

/// All figures of a pager.
pub fn print_pager(stats: &PagerStats) {
    let gauges = &stats.gauges;
    let counters = &stats.counters;
    let resident = pages(gauges.resident_pages);
    println!("memory      {}", pages(gauges.pages));
    println!(
        "  local     {} of {} ({resident} in use, of this {} dirty; {} standby)",
        pages(gauges.local_pages),
        pages(gauges.budget_pages),
        dirty(stats),
        pages(gauges.standby_pages)
    );
    println!(
        "  remote    {} (peak {}), untouched {}",
        pages(gauges.remote_pages),
        pages(stats.remote_pages_peak),
        pages(gauges.untouched_pages)
    );
    if gauges.poisoned_pages > 0 {
        println!("  LOST      {} pages: no good copy was left", gauges.poisoned_pages);
    }
    println!(
        "faults      {} ({} missing, {} minor, {} write-protect), {:.0}/s now",
        counters.faults,
        counters.faults_missing,
        counters.faults_minor,
        counters.faults_write_protect,
        stats.rates.faults
    );
    println!(
        "  waiting   {} for local memory, {} for a sponsor; some thread waited for {:.1} s of {:.0} s",
        gauges.stalled_faults, gauges.blocked_faults, stats.stall_s, stats.uptime_s
    );
    println!(
        "fetched     {} pages on demand, {} ahead ({} used, {} wasted)",
        counters.demand_fetches,
        counters.prefetches,
        counters.prefetches_used,
        counters.prefetches_wasted
    );
    println!(
        "evicted     {} dirty, {} clean, {} zero ({}), {:.0}/s now",
        counters.evicted_dirty_pages,
        counters.evicted_clean_pages,
        counters.evicted_zero_pages,
        stats.eviction,
        stats.rates.evictions
    );
    println!(
        "hedged      {} reads ({} answered first by the second replica)",
        counters.hedged_fetches, counters.hedges_won
    );
    println!(
        "redundancy  {} of {} extents lack a replica, {} are to move; {} pages copied, {} extents \
         rebuilt",
        gauges.degraded_extents,
        gauges.extents,
        gauges.leaving_extents,
        counters.rebuilt_pages,
        counters.rebuilt_extents
    );
    if counters.corrupt_replies > 0 {
        println!("ALTERED     {} pages came back altered", counters.corrupt_replies);
    }
    println!("remote fault latency, us          p50        p99        max");
    let latency = &stats.latency;
    for (part, quantiles) in [
        ("whole", latency.fault_us),
        ("queue", latency.queue_us),
        ("network", latency.network_us),
        ("install", latency.install_us),
    ] {
        let (p50, p99, max) = (quantiles.p50, quantiles.p99, quantiles.max);
        println!("  {part:<24} {p50:>10.1} {p99:>10.1} {max:>10.1}");
    }
    println!("sponsors                       share    fetched     stored         in        out");
    for sponsor in &stats.sponsors {
        println!(
            "  {:<26} {:>6.1} % {:>9} {:>10} {:>10} {:>10}{}",
            sponsor.address,
            sponsor.share * 100.0,
            sponsor.pages_fetched,
            sponsor.pages_stored,
            ByteSize(sponsor.bytes_received).to_string(),
            ByteSize(sponsor.bytes_sent).to_string(),
            match &sponsor.down_reason {
                Some(reason) => format!("  DOWN: {reason}"),
                None if sponsor.up && sponsor.leaving => "  leaving".to_owned(),
                None if sponsor.up => String::new(),
                None => "  DOWN".to_owned(),
            }
        );
    }
}

/// All about a VM.
pub fn print_vm(info: &VmInfo) {
    println!(
        "{}: {}, {} of memory, {} vCPUs ({}), {} replicas",
        info.name,
        state(info),
        info.memory,
        info.vcpus,
        info.accel,
        info.replicas
    );
    if let Some(problem) = &info.problem {
        println!("PROBLEM     {problem}");
    }
    println!("budget      {}", budget(info));
    if info.encrypted {
        println!("sealed      sponsors see no plaintext");
    }
    if let Some(pause) = info.pager_pause_ms {
        println!(
            "pager       started again {} times, the last time after {pause:.0} ms",
            info.pager_restarts
        );
    }
    println!("console     {}", info.console.display());
    if let Some(stats) = &info.pager {
        print_pager(stats);
    }
}

/// A VM's local budget, and what it may become.
pub fn budget(info: &VmInfo) -> String {
    match &info.auto_local {
        Some(bounds) => format!("{} (auto, {} to {})", info.local, bounds.min, bounds.max),
        None => info.local.to_string(),
    }
}

fn state(info: &VmInfo) -> &'static str {
    match info.state {
        heca_api::VmState::Starting => "starting",
        heca_api::VmState::Running => "running",
        heca_api::VmState::PagerLost => "waiting for a new pager",
        heca_api::VmState::Arriving => "arriving",
        heca_api::VmState::Leaving => "leaving",
        heca_api::VmState::Stopped => "stopped",
    }
}

/// A line for each VM.
pub fn print_vms(infos: &[VmInfo]) {
    if infos.is_empty() {
        println!("no VMs");
        return;
    }
    println!("{:<20} {:<10} {:>10} {:>10} {:>10}", "name", "state", "memory", "budget", "remote");
    for info in infos {
        let remote = info.pager.as_ref().map_or(0, |stats| stats.gauges.remote_pages);
        println!(
            "{:<20} {:<10} {:>10} {:>10} {:>10}",
            info.name,
            state(info),
            info.memory.to_string(),
            info.local.to_string(),
            pages(remote).to_string()
        );
    }
}

/// Prints what `heca doctor` found.
pub fn print_doctor(report: &Report, json: bool) -> anyhow::Result<()> {
    if json {
        println!("{}", serde_json::to_string_pretty(report)?);
        return Ok(());
    }
    for check in &report.checks {
        let mark = match check.severity {
            Severity::Ok => "ok  ",
            Severity::Warning => "WARN",
            Severity::Failure => "FAIL",
        };
        println!("{mark}  {:<20} {}", check.name, check.finding);
        if let Some(fix) = &check.fix {
            println!("      {:<20} fix: {fix}", "");
        }
    }
    Ok(())
}

/// Runs the simulation and prints its report.
pub fn run_sim(arguments: &SimArguments) -> anyhow::Result<ExitCode> {
    let options = heca_sim::Options {
        seed: arguments.seed,
        ticks: arguments.ticks,
        mutation: arguments.mutation,
    };
    match heca_sim::run(&options) {
        Ok(report) => {
            if arguments.json {
                println!("{}", serde_json::to_string_pretty(&report)?);
            } else {
                println!("{report}");
            }
            Ok(ExitCode::SUCCESS)
        }
        Err(violation) => {
            println!("{violation}");
            Ok(ExitCode::FAILURE)
        }
    }
}
