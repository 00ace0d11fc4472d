//! Command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use heca_agent::agent::AgentConfig;
use heca_api::{AccelChoice, EvictionChoice, Network, SponsorAddress};
use heca_core::pager::Mutation;
use heca_types::ByteSize;
use heca_types::limits::{LEASE_MS_DEFAULT, LEASE_MS_MAX};

/// Default directory of the agent's socket.
pub const RUN_DIR: &str = "/run/heca";
const MEMORY_DIR: &str = "/dev/shm/heca";

/// Pools the memory of many machines and lets a VM use more than its host has.
///
/// One host lends memory with `heca agent --offer 16G`; another runs a VM whose memory is larger
/// than its local budget with `heca vm run`. Logs go to standard error; HECA_LOG=debug shows more.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the daemon of a host: it lends memory and owns the host's VMs.
    Agent(AgentArguments),
    /// Start, look at and stop VMs.
    Vm(VmArguments),
    /// Page a shared file mapping of a running process; Ctrl-C brings its memory back.
    Attach(AttachArguments),
    /// Check this machine, and print the command that fixes each finding.
    Doctor(DoctorArguments),
    /// Test the pager in a simulated world with faults.
    Sim(SimArguments),
    /// Measure.
    Bench(BenchArguments),
    /// Write a pattern to memory and verify it; made to be run inside a guest.
    Memtest(MemtestArguments),
    /// Serve the page faults of one process; started by the agent.
    #[command(hide = true)]
    Pager(PagerArguments),
    /// Play the guest of a benchmark; started by `heca bench`.
    #[command(hide = true)]
    BenchTarget(BenchTargetArguments),
}

#[derive(Debug, Args)]
pub struct AgentArguments {
    /// Memory to lend to others, such as 16G; 0 lends none.
    #[arg(long, default_value = "0", value_name = "SIZE")]
    offer: ByteSize,
    /// Where to serve the memory on offer. Traffic is not encrypted: keep it on a trusted network.
    #[arg(long, default_value = "127.0.0.1:7900", value_name = "ADDRESS:PORT")]
    listen: String,
    /// Directory of the agent's socket and of its VMs' logs.
    #[arg(long, default_value = RUN_DIR, env = "HECA_RUN_DIR", value_name = "DIR")]
    run_dir: PathBuf,
    /// Directory on tmpfs for guest RAM and sponsored pages.
    #[arg(long, default_value = MEMORY_DIR, value_name = "DIR")]
    memory_dir: PathBuf,
    /// Serve Prometheus metrics over HTTP here.
    #[arg(long, value_name = "ADDRESS:PORT")]
    metrics: Option<String>,
    /// How long data threads poll for work before they sleep, in microseconds.
    #[arg(long, default_value_t = default_spin_us(), value_name = "MICROSECONDS")]
    spin_us: u64,
    /// How long sponsors keep the memory of a VM of this host that vanished, in milliseconds.
    #[arg(long, default_value_t = LEASE_MS_DEFAULT, value_name = "MILLISECONDS",
          value_parser = clap::value_parser!(u64).range(30_000..=LEASE_MS_MAX))]
    lease_ms: u64,
}

/// Polling takes a processor: do it where there is one to spare.
pub fn default_spin_us() -> u64 {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    if processors >= 4 { 50 } else { 0 }
}

impl AgentArguments {
    pub fn into_config(self) -> anyhow::Result<AgentConfig> {
        Ok(AgentConfig {
            run_dir: std::path::absolute(self.run_dir)?,
            memory_dir: std::path::absolute(self.memory_dir)?,
            offer: self.offer,
            listen: self.listen,
            metrics: self.metrics,
            spin: Duration::from_micros(self.spin_us),
            lease_ms: self.lease_ms,
        })
    }
}

#[derive(Debug, Args)]
pub struct PagerArguments {
    #[arg(long)]
    pub config: PathBuf,
    #[arg(long)]
    pub socket: PathBuf,
    #[arg(long)]
    pub last: PathBuf,
}

#[derive(Debug, Args)]
pub struct VmArguments {
    /// Directory of the agent's socket.
    #[arg(long, global = true, default_value = RUN_DIR, env = "HECA_RUN_DIR", value_name = "DIR")]
    pub run_dir: PathBuf,
    #[command(subcommand)]
    pub command: VmCommand,
}

#[derive(Debug, Subcommand)]
pub enum VmCommand {
    /// Start a VM whose memory is larger than its local budget.
    Run(Box<RunArguments>),
    /// List the host's VMs.
    List {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Show a VM: where its memory is, faults, latency, sponsors.
    Show {
        name: String,
        /// Print JSON.
        #[arg(long)]
        json: bool,
        /// Go on every second; with --json, one line each.
        #[arg(long)]
        watch: bool,
    },
    /// Stop a VM and forget it.
    Stop {
        name: String,
        /// Time for the guest to shut down by itself, in seconds.
        #[arg(long, default_value_t = 10)]
        grace: u64,
        /// Do not wait for the guest.
        #[arg(long, conflicts_with = "grace")]
        now: bool,
    },
    /// Connect to a VM's serial console; Ctrl-] leaves it.
    Console { name: String },
    /// Change a VM's local budget while it runs.
    Resize {
        name: String,
        /// New local budget.
        #[arg(long, value_name = "SIZE")]
        local: ByteSize,
    },
}

#[derive(Debug, Args)]
pub struct PoolArguments {
    /// Part of the memory that may be on this host at a time.
    #[arg(long, value_name = "SIZE")]
    pub local: ByteSize,
    /// Sponsors that hold each part of the memory.
    #[arg(long, default_value_t = 2)]
    pub replicas: usize,
    /// A sponsor, with its share relative to the others (=2 gets twice as much as =1).
    #[arg(long = "sponsor", value_name = "HOST:PORT[=SHARE]", required = true)]
    pub sponsors: Vec<SponsorAddress>,
    /// How pages are taken from the guest: auto, pageout, uring or write-protect.
    #[arg(long, default_value = "auto")]
    pub eviction: EvictionChoice,
    /// Fetch nothing ahead of faults.
    #[arg(long)]
    pub no_prefetch: bool,
}

#[derive(Debug, Args)]
pub struct RunArguments {
    /// Name, unique on this host.
    pub name: String,
    /// Guest RAM.
    #[arg(long, value_name = "SIZE")]
    pub memory: ByteSize,
    #[command(flatten)]
    pub pool: PoolArguments,
    /// Guest processors.
    #[arg(long, default_value_t = 1)]
    pub vcpus: u32,
    /// What runs them: auto, kvm or tcg.
    #[arg(long, default_value = "auto")]
    pub accel: AccelChoice,
    /// Kernel to start without a boot loader.
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk for the kernel.
    #[arg(long, value_name = "FILE", requires = "kernel")]
    pub initrd: Option<PathBuf>,
    /// The kernel's command line.
    #[arg(long, default_value = "console=ttyS0", value_name = "TEXT")]
    pub append: String,
    /// Disk image (raw, or qcow2 by its ending); may be given more than once.
    #[arg(long = "disk", value_name = "FILE")]
    pub disks: Vec<PathBuf>,
    /// The guest's network: none or user.
    #[arg(long, default_value = "none")]
    pub network: Network,
    /// QEMU program.
    #[arg(long, value_name = "FILE")]
    pub qemu: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
    /// Further arguments for QEMU, after `--`.
    #[arg(last = true)]
    pub qemu_args: Vec<String>,
}

#[derive(Debug, Args)]
pub struct AttachArguments {
    /// Process whose memory is paged.
    #[arg(long)]
    pub pid: i32,
    /// File on tmpfs that the process maps shared.
    #[arg(long, value_name = "FILE")]
    pub file: PathBuf,
    #[command(flatten)]
    pub pool: PoolArguments,
    /// How long the pager polls for work before it sleeps, in microseconds.
    #[arg(long, default_value_t = default_spin_us(), value_name = "MICROSECONDS")]
    pub spin_us: u64,
    /// Print figures every second.
    #[arg(long)]
    pub watch: bool,
    /// Print JSON, one line for each set of figures.
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct DoctorArguments {
    /// Directory on tmpfs for guest RAM and sponsored pages.
    #[arg(long, default_value = MEMORY_DIR, value_name = "DIR")]
    pub memory_dir: PathBuf,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct SimArguments {
    /// Everything random in the world follows from it.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Steps to simulate.
    #[arg(long, default_value_t = 1_000_000)]
    pub ticks: u64,
    /// Kind of trouble, one world for each of the seeds: mixed, failover, rebuild, recovery,
    /// fencing, store, memory or all.
    #[arg(long, value_name = "NAME", value_parser = parse_scenarios, conflicts_with_all = ["seed", "ticks"])]
    pub scenario: Option<Scenarios>,
    /// Seeds from the first to the last, such as 1..2000; one world for each.
    #[arg(long, value_name = "A..B", value_parser = parse_seeds, conflicts_with_all = ["seed", "ticks"])]
    pub seeds: Option<Seeds>,
    /// Steps to simulate in each of these worlds.
    #[arg(long, default_value_t = 12_000, value_name = "TICKS")]
    pub ticks_per_seed: u64,
    /// Break an invariant on purpose, to see that it is noticed: forget-dirty, punch-early,
    /// fetch-twice, forget-fault, ignore-budget, accept-stale-epoch, hedge-any-version,
    /// rebuild-early or recover-as-zero.
    #[arg(long = "break", value_name = "MUTATION", value_parser = parse_mutation)]
    pub mutation: Option<Mutation>,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// Scenarios to run.
#[derive(Debug, Clone)]
pub struct Scenarios(pub Vec<heca_sim::Scenario>);

/// Seeds of worlds.
#[derive(Debug, Clone)]
pub struct Seeds(pub std::ops::RangeInclusive<u64>);

fn parse_scenarios(text: &str) -> Result<Scenarios, String> {
    if text == "all" {
        return Ok(Scenarios(heca_sim::Scenario::ALL.to_vec()));
    }
    text.parse().map(|scenario| Scenarios(vec![scenario]))
}

fn parse_seeds(text: &str) -> Result<Seeds, String> {
    let (first, last) = text.split_once("..").unwrap_or((text, text));
    let number = |text: &str| text.parse().map_err(|_| format!("`{text}` is no seed"));
    let (first, last): (u64, u64) = (number(first)?, number(last)?);
    if first > last {
        return Err(format!("{first}..{last} has no seeds"));
    }
    Ok(Seeds(first..=last))
}

fn parse_mutation(text: &str) -> Result<Mutation, String> {
    serde_json::from_value(serde_json::Value::String(text.to_owned()))
        .map_err(|_| format!("`{text}` is no mutation; see --help"))
}

#[derive(Debug, Args)]
pub struct MemtestArguments {
    /// Memory to write and verify.
    #[arg(long, value_name = "SIZE")]
    pub size: ByteSize,
    /// Times to do so, each with another pattern.
    #[arg(long, default_value_t = 1)]
    pub rounds: u64,
    /// Print JSON at the end.
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct BenchArguments {
    #[command(subcommand)]
    pub experiment: Experiment,
}

#[derive(Debug, Subcommand)]
pub enum Experiment {
    /// Latency of a remote fault beside the floors it stands on: a local fault handler and a TCP
    /// round trip.
    Fault(FaultArguments),
}

#[derive(Debug, Args)]
pub struct FaultArguments {
    /// Print one JSON object and nothing else on standard output.
    #[arg(long)]
    pub json: bool,
    /// Times to repeat; medians are reported.
    #[arg(long, default_value_t = 5)]
    pub runs: usize,
    /// Faults in each run.
    #[arg(long, default_value_t = 20_000)]
    pub faults: usize,
    /// Replicas of each page.
    #[arg(long, default_value_t = 1)]
    pub replicas: usize,
    /// How long pager and sponsor poll before they sleep, in microseconds.
    #[arg(long, default_value_t = default_spin_us(), value_name = "MICROSECONDS")]
    pub spin_us: u64,
    /// How pages are taken from the target: auto, pageout, uring or write-protect.
    #[arg(long, default_value = "auto")]
    pub eviction: EvictionChoice,
}

#[derive(Debug, Args)]
pub struct BenchTargetArguments {
    #[arg(long)]
    pub file: PathBuf,
}
