//! Command line.

mod vm;

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use heca_agent::agent::{AgentConfig, Failover};
use heca_api::EvictionChoice;
use heca_core::pager::Mutation;
use heca_types::ByteSize;
use heca_types::limits::{
    DETECT_MS_DEFAULT, LEASE_MS_DEFAULT, LEASE_MS_MAX, REBUILD_AFTER_MS_DEFAULT,
    REBUILD_BYTES_PER_S_DEFAULT,
};

pub use vm::{AttachArguments, MigrateArguments, RunArguments, VmArguments, VmCommand};

/// Default directory of the agent's socket.
pub const RUN_DIR: &str = "/run/heca";
const MEMORY_DIR: &str = "/dev/shm/heca";
const IDENTITY_DIR: &str = "/etc/heca/host";
const POOL_DIR: &str = "/etc/heca/pool";

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
    /// Make a pool and manage its members' certificates.
    Pool(PoolManagement),
    /// Join a pool, look at this host, empty its sponsor.
    Host(HostArguments),
    /// Replace the running agent and its pagers by another build; VMs go on.
    Upgrade(UpgradeArguments),
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
    /// Write and verify memory without end, and tell of the longest pause; run inside a guest by
    /// `heca-chaos`.
    #[command(hide = true)]
    Hammer(HammerArguments),
    /// Serve the page faults of one process; started by the agent.
    #[command(hide = true)]
    Pager(PagerArguments),
    /// Play the guest of a benchmark; started by `heca bench`.
    #[command(hide = true)]
    BenchTarget(BenchTargetArguments),
    /// Sort; started by `heca bench`.
    #[command(hide = true)]
    BenchSort(BenchSortArguments),
}

#[derive(Debug, Args)]
pub struct AgentArguments {
    /// Memory to lend to others, such as 16G; 0 lends none.
    #[arg(long, default_value = "0", value_name = "SIZE")]
    offer: ByteSize,
    /// Where to serve the memory on offer.
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
    #[command(flatten)]
    security: SecurityArguments,
    /// Give extents back to other sponsors when the host has less memory than this available, and
    /// leave as much alone when local budgets grow (`--local auto`).
    #[arg(long, default_value = "0", value_name = "SIZE")]
    keep_free: ByteSize,
    #[command(flatten)]
    failover: FailoverArguments,
    /// Take in VMs of other hosts here (live migration); nowhere by default.
    #[arg(long, value_name = "ADDRESS:PORT")]
    migration_listen: Option<String>,
}

/// How connections between hosts are secured.
#[derive(Debug, Args)]
pub struct SecurityArguments {
    /// Directory of this host's identity in a pool (see `heca host join`).
    #[arg(long, default_value = IDENTITY_DIR, env = "HECA_IDENTITY", value_name = "DIR")]
    pub identity: PathBuf,
    /// Use neither TLS nor authentication: for tests on one machine only.
    #[arg(long)]
    pub plaintext: bool,
}

impl SecurityArguments {
    /// The identity to use, or none if plaintext was asked for.
    pub fn identity(&self) -> anyhow::Result<Option<PathBuf>> {
        if self.plaintext {
            tracing::warn!("connections are plaintext: anybody who reaches them can read memory");
            return Ok(None);
        }
        if !self.identity.join("host.json").exists() {
            anyhow::bail!(
                "this host is in no pool: {} holds no identity. Join one with \
                 `heca host join TOKEN` (`heca pool --help` tells where tokens come from), or \
                 give --plaintext for a test on one machine",
                self.identity.display()
            );
        }
        Ok(Some(std::path::absolute(&self.identity)?))
    }
}

#[derive(Debug, Args)]
pub struct FailoverArguments {
    /// Time without a sign of life after which pagers give a sponsor up, in milliseconds.
    #[arg(long, default_value_t = DETECT_MS_DEFAULT, value_name = "MILLISECONDS",
          value_parser = clap::value_parser!(u64).range(20..=60_000))]
    detect_ms: u64,
    /// Time that a sponsor may be away before what it held is copied to others, in milliseconds.
    #[arg(long, default_value_t = REBUILD_AFTER_MS_DEFAULT, value_name = "MILLISECONDS")]
    rebuild_after_ms: u64,
    /// Bound of the traffic of copying, for each VM and second.
    #[arg(long, default_value_t = ByteSize(REBUILD_BYTES_PER_S_DEFAULT), value_name = "SIZE")]
    rebuild_bandwidth: ByteSize,
}

impl FailoverArguments {
    pub fn failover(&self) -> Failover {
        Failover {
            detect_ms: self.detect_ms,
            rebuild_after_ms: self.rebuild_after_ms,
            rebuild_bytes_per_s: self.rebuild_bandwidth.0,
        }
    }
}

#[derive(Debug, Args)]
pub struct PoolManagement {
    /// Directory of the pool's CA: keep it on one well-guarded host.
    #[arg(long, global = true, default_value = POOL_DIR, env = "HECA_POOL", value_name = "DIR")]
    pub dir: PathBuf,
    #[command(subcommand)]
    pub command: PoolCommand,
}

#[derive(Debug, Subcommand)]
pub enum PoolCommand {
    /// Make a pool: a CA whose certificates its hosts trust.
    Init {
        /// Name of the pool.
        #[arg(default_value = "heca")]
        name: String,
    },
    /// Make a one-time token with which a host joins.
    Token {
        /// Where `heca pool serve` can be reached from that host.
        #[arg(long, value_name = "HOST:PORT")]
        address: String,
        /// The only name that the host may take; needed to join again under a name in use.
        #[arg(long)]
        name: Option<String>,
        /// How long the token can be used.
        #[arg(long, default_value_t = 60, value_name = "MINUTES")]
        ttl_minutes: u64,
    },
    /// Let hosts join, renew their certificates, and learn who was revoked.
    Serve {
        /// Where to listen.
        #[arg(long, default_value = "0.0.0.0:7901", value_name = "ADDRESS:PORT")]
        listen: String,
    },
    /// List the pool's hosts and their certificates.
    Hosts {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Revoke a host's certificates.
    Revoke { host: String },
    /// Sign with a new CA from now on.
    RotateCa,
    /// Remove CAs that no valid certificate needs any more.
    PruneCa,
}

#[derive(Debug, Args)]
pub struct HostArguments {
    /// Directory of the agent's socket.
    #[arg(long, global = true, default_value = RUN_DIR, env = "HECA_RUN_DIR", value_name = "DIR")]
    pub run_dir: PathBuf,
    /// Directory of this host's identity.
    #[arg(long, global = true, default_value = IDENTITY_DIR, env = "HECA_IDENTITY",
          value_name = "DIR")]
    pub identity: PathBuf,
    #[command(subcommand)]
    pub command: HostCommand,
}

#[derive(Debug, Subcommand)]
pub enum HostCommand {
    /// Join a pool with a one-time token.
    Join {
        token: String,
        /// Name in the pool; the host's own by default.
        #[arg(long)]
        name: Option<String>,
    },
    /// Renew the host's certificate now; the agent does so by itself in time.
    Renew,
    /// Show this host: its name, what it lends.
    Show {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Move everything that this host's sponsor holds to other sponsors, while VMs run.
    Drain {
        /// Take extents again.
        #[arg(long)]
        off: bool,
        /// Wait until nothing is left.
        #[arg(long, conflicts_with = "off")]
        wait: bool,
        /// Longest time to wait, in seconds.
        #[arg(long, default_value_t = 3600, requires = "wait")]
        timeout: u64,
    },
}

#[derive(Debug, Args)]
pub struct UpgradeArguments {
    /// Directory of the agent's socket.
    #[arg(long, default_value = RUN_DIR, env = "HECA_RUN_DIR", value_name = "DIR")]
    pub run_dir: PathBuf,
    /// The new program; this one by default.
    #[arg(long, value_name = "FILE")]
    pub program: Option<PathBuf>,
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
            identity: self.security.identity()?,
            keep_free: self.keep_free,
            failover: self.failover.failover(),
            migration_listen: self.migration_listen,
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
    /// fencing, store, memory, migration or all.
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
    /// rebuild-early, recover-as-zero, final-scan-trusts, mark-after-read, arrive-late,
    /// written-forgets, resume-on-silence or run-before-record.
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
pub struct HammerArguments {
    /// Memory to work on.
    #[arg(long, value_name = "SIZE")]
    pub size: ByteSize,
    /// Threads that share it.
    #[arg(long, default_value_t = 2)]
    pub threads: usize,
    /// Pause between two reports.
    #[arg(long, default_value_t = 200, value_name = "MILLISECONDS")]
    pub report_ms: u64,
    /// Everything random follows from it.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Time to work, in seconds; without end if not given.
    #[arg(long, value_name = "SECONDS")]
    pub seconds: Option<u64>,
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
    /// How fast memory comes in that is read in order, and how fast it is exchanged when every page
    /// is dirty, beside a raw TCP stream.
    Throughput(ThroughputArguments),
    /// A native program that sorts, with part of its memory remote, beside zram and a swap file with
    /// as much local memory.
    Quicksort(QuicksortArguments),
    /// How long a guest stands still when it is moved, beside QEMU's own ways to move it.
    Migrate(crate::bench::migrate::MigrateArguments),
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
    /// Measure the same over TLS, beside plaintext.
    #[arg(long)]
    pub tls: bool,
    /// Measure the same with sealed pages, beside plaintext.
    #[arg(long)]
    pub encrypt: bool,
}

#[derive(Debug, Args)]
pub struct ThroughputArguments {
    /// Print one JSON object and nothing else on standard output.
    #[arg(long)]
    pub json: bool,
    /// Times to repeat; medians are reported.
    #[arg(long, default_value_t = 5)]
    pub runs: usize,
    /// Memory of the target.
    #[arg(long, default_value_t = ByteSize(512 << 20), value_name = "SIZE")]
    pub memory: ByteSize,
    /// Part of it that may be local.
    #[arg(long, default_value_t = ByteSize(64 << 20), value_name = "SIZE")]
    pub local: ByteSize,
    /// Replicas of each page.
    #[arg(long, default_value_t = 1)]
    pub replicas: usize,
    /// How long pager and sponsor poll before they sleep, in microseconds.
    #[arg(long, default_value_t = default_spin_us(), value_name = "MICROSECONDS")]
    pub spin_us: u64,
}

#[derive(Debug, Args)]
pub struct QuicksortArguments {
    /// Print one JSON object and nothing else on standard output.
    #[arg(long)]
    pub json: bool,
    /// Times to repeat; medians are reported.
    #[arg(long, default_value_t = 3)]
    pub runs: usize,
    /// Memory to sort, as 8-byte numbers.
    #[arg(long, default_value_t = ByteSize(512 << 20), value_name = "SIZE")]
    pub memory: ByteSize,
    /// Threads that sort.
    #[arg(long, default_value_t = 4)]
    pub threads: usize,
    /// Parts of the memory that are local, in percent.
    #[arg(long, value_delimiter = ',', default_values_t = [75, 50, 33, 25, 20],
          value_parser = clap::value_parser!(u64).range(1..=99), value_name = "PERCENT")]
    pub local: Vec<u64>,
    /// What is sorted: `random` numbers, which do not compress, or `small` ones, which do.
    #[arg(long, default_value = "random")]
    pub values: crate::bench::quicksort::Values,
    /// What to run beside memory that is all local.
    #[arg(long, value_delimiter = ',', default_values = ["remote", "mirrored", "zram", "swapfile"],
          value_name = "PEER")]
    pub peers: Vec<crate::bench::quicksort::Peer>,
    /// Directory for the swap file, on a disk.
    #[arg(long, default_value = "/var/tmp", value_name = "DIR")]
    pub swap_dir: PathBuf,
}

#[derive(Debug, Args)]
pub struct BenchSortArguments {
    /// A file to map; memory of its own without one.
    #[arg(long)]
    pub file: Option<PathBuf>,
    #[arg(long)]
    pub bytes: u64,
    #[arg(long)]
    pub threads: usize,
    #[arg(long)]
    pub values: crate::bench::quicksort::Values,
}

#[derive(Debug, Args)]
pub struct BenchTargetArguments {
    #[arg(long)]
    pub file: PathBuf,
}
