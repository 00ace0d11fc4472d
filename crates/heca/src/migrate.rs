//! `heca vm migrate`.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::time::Duration;

use heca_api::{Client, MigrateRequest, MigrationInfo, MigrationPhase};
use heca_types::ByteSize;

use crate::cli::MigrateArguments;

/// Time between two looks.
const LOOK: Duration = Duration::from_millis(50);
/// Width of the bar, in characters.
const BAR: u64 = 30;

pub async fn run(client: &Client, arguments: MigrateArguments) -> anyhow::Result<ExitCode> {
    let name = &arguments.name;
    let request = MigrateRequest {
        to: arguments.to.clone(),
        mode: arguments.mode,
        max_downtime_ms: arguments.max_downtime,
        bandwidth: arguments.bandwidth,
        safe: arguments.safe,
    };
    let mut info: MigrationInfo = client.post(&format!("/v1/vms/{name}/migrate"), &request).await?;
    if arguments.background {
        println!("{name} is on its way; `heca vm migration {name}` tells how far it is");
        return Ok(ExitCode::SUCCESS);
    }
    let draw = !arguments.json && std::io::stderr().is_terminal();
    let path = format!("/v1/vms/{name}/migration");
    let mut told = false;
    while !info.phase.is_over() {
        tokio::select! {
            () = tokio::time::sleep(LOOK) => {}
            _ = tokio::signal::ctrl_c() => {
                eprintln!("\ninterrupted: keeping {name} here");
                let cancel = format!("{path}/cancel");
                let _: MigrationInfo = client.post(&cancel, &serde_json::json!({})).await?;
                return Ok(ExitCode::from(130));
            }
        }
        info = client.get(&path).await?;
        if draw {
            eprint!("\r\x1b[K{}", line(&info));
            let _ = std::io::stderr().flush();
        }
        if info.phase == MigrationPhase::Unconfirmed && !told {
            told = true;
            eprintln!("{name}: the target does not answer; `heca vm show {name}` tells more");
        }
    }
    if draw {
        eprint!("\r\x1b[K");
    }
    print(&info, arguments.json)?;
    let well = info.phase == MigrationPhase::Completed;
    Ok(if well { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn phase(phase: MigrationPhase) -> &'static str {
    match phase {
        MigrationPhase::Preparing => "the target gets ready",
        MigrationPhase::Copying => "copying",
        MigrationPhase::Switching => "switching",
        MigrationPhase::Following => "runs there, memory follows",
        MigrationPhase::Completed => "completed",
        MigrationPhase::Failed => "failed",
        MigrationPhase::Cancelled => "cancelled",
        MigrationPhase::Unconfirmed => "waits for the target's answer",
    }
}

fn line(info: &MigrationInfo) -> String {
    let all = info.resident_bytes.max(info.remaining_bytes).max(1);
    let done = (all - info.remaining_bytes) * BAR / all;
    let bar: String = (0..BAR).map(|i| if i < done { '#' } else { '.' }).collect();
    format!(
        "{} [{bar}] {} left, {:.1} s, {}",
        info.name,
        ByteSize(info.remaining_bytes),
        info.elapsed_s,
        phase(info.phase)
    )
}

/// Prints what a migration came to.
pub fn print(info: &MigrationInfo, json: bool) -> anyhow::Result<()> {
    if json {
        println!("{}", serde_json::to_string_pretty(info)?);
        return Ok(());
    }
    println!("{} to {} ({}): {}", info.name, info.to, info.mode.name(), phase(info.phase));
    if let Some(error) = &info.error {
        println!("  {error}");
        for more in error.detail.iter().chain(&error.hint) {
            println!("  {more}");
        }
    }
    let report = &info.report;
    if let Some(downtime) = report.downtime_ms {
        let parts = &report.parts_ms;
        println!("  downtime              {downtime:>10.1} ms");
        println!("    stop                {:>10.1} ms", parts.stop);
        println!("    device state        {:>10.1} ms", parts.device_state);
        println!("      last look, list   {:>10.1} ms", parts.final_scan);
        println!("    takeover            {:>10.1} ms", parts.takeover);
        println!("    resume              {:>10.1} ms", parts.resume);
    }
    if let Some(total) = report.total_s {
        println!("  in all                {total:>10.1} s");
    }
    println!("  memory moved          {:>13}", ByteSize(report.memory_bytes).to_string());
    println!("  device state          {:>13}", ByteSize(report.device_state_bytes).to_string());
    println!(
        "  pages sent            {:>10}, {} after the switch ({} different ones), {} waited for",
        report.pages_sent, report.pages_sent_after, report.pages_unique_after, report.demand_pages
    );
    Ok(())
}
