//! `heca`: agent, pager and command line of Hecatonchire.
#![forbid(unsafe_code)]

mod attach;
mod bench;
mod cli;
mod hammer;
mod memtest;
mod migrate;
mod output;
mod pool;
mod vm;

use std::process::ExitCode;

use clap::Parser;
use cli::{Cli, Command};
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let cli = Cli::parse();
    // A pager must outlive whoever reads its words; the others need not.
    if !matches!(cli.command, Command::Agent(_) | Command::Pager(_) | Command::Attach(_)) {
        heca_sys::process::end_on_broken_pipe();
    }
    let default =
        if matches!(cli.command, Command::Agent(_) | Command::Pager(_)) { "info" } else { "warn" };
    let filter = EnvFilter::try_from_env("HECA_LOG").unwrap_or_else(|_| EnvFilter::new(default));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        // A full disk under the log must not panic the thread that logs.
        .log_internal_errors(false)
        .with_target(false)
        .with_ansi(rustix::termios::isatty(std::io::stderr()))
        .init();
    match run(cli) {
        Ok(code) => code,
        Err(error) => {
            output::print_error(&error);
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    match cli.command {
        Command::Agent(arguments) => {
            let config = arguments.into_config()?;
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                .build()?;
            runtime.block_on(heca_agent::agent::run(config))?;
        }
        Command::Pager(arguments) => {
            let config = serde_json::from_slice(&std::fs::read(&arguments.config)?)?;
            heca_agent::pager::serve(&config, &arguments.socket, &arguments.last)?;
        }
        Command::Vm(arguments) => {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            return runtime.block_on(vm::run(arguments));
        }
        Command::Pool(arguments) => return pool::run(&arguments),
        Command::Host(arguments) => {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            return runtime.block_on(pool::host(arguments));
        }
        Command::Upgrade(arguments) => {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            return runtime.block_on(pool::upgrade(arguments));
        }
        Command::Attach(arguments) => return attach::run(&arguments),
        Command::Doctor(arguments) => {
            let report = heca_agent::doctor::examine(&arguments.memory_dir);
            output::print_doctor(&report, arguments.json)?;
            if report.has_failures() {
                return Ok(ExitCode::FAILURE);
            }
        }
        Command::Sim(arguments) if arguments.scenario.is_some() || arguments.seeds.is_some() => {
            return search_scenarios(&arguments);
        }
        Command::Sim(arguments) => return output::run_sim(&arguments),
        Command::Bench(arguments) => bench::run(&arguments)?,
        Command::Memtest(arguments) => return memtest::run(&arguments),
        Command::Hammer(arguments) => return hammer::run(&arguments),
        Command::BenchTarget(arguments) => bench::target::run(&arguments)?,
        Command::BenchSort(arguments) => bench::quicksort::sort::run(&arguments)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Runs one simulated world for each seed of each scenario.
fn search_scenarios(arguments: &cli::SimArguments) -> anyhow::Result<ExitCode> {
    let mixed = || vec![heca_sim::Scenario::Mixed];
    let scenarios = arguments.scenario.as_ref().map_or_else(mixed, |s| s.0.clone());
    let seeds = arguments.seeds.as_ref().map_or(1..=100, |s| s.0.clone());
    for scenario in scenarios {
        let begin = std::time::Instant::now();
        let search = heca_sim::Search {
            scenario,
            seeds: seeds.clone(),
            ticks_per_seed: arguments.ticks_per_seed,
            mutation: arguments.mutation,
        };
        let report = match heca_sim::search(&search) {
            Ok(report) => report,
            Err(violation) => {
                println!("{violation}");
                return Ok(ExitCode::FAILURE);
            }
        };
        if arguments.json {
            println!("{}", serde_json::to_string_pretty(&report)?);
            continue;
        }
        let checks: u64 = report.invariants.iter().map(|i| i.times).sum();
        println!(
            "{:<9} {} worlds, {} ticks, {checks} checks, {:.1} s",
            scenario.name(),
            report.worlds,
            report.ticks,
            begin.elapsed().as_secs_f64()
        );
        for name in scenario.expected() {
            let branch = report.branches.iter().find(|b| b.name == *name);
            println!("  {name:<42}{:>12}", branch.map_or(0, |b| b.count));
        }
    }
    Ok(ExitCode::SUCCESS)
}
