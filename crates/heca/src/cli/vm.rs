//! `heca vm` and `heca attach`.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use heca_api::{AccelChoice, EvictionChoice, LocalChoice, MigrationMode, Network, SponsorAddress};
use heca_types::ByteSize;

use super::{RUN_DIR, SecurityArguments, default_spin_us};

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
    /// Give a VM one more sponsor: it gets extents when another one is lost or drained.
    AddSponsor {
        name: String,
        #[arg(value_name = "HOST:PORT[=SHARE]")]
        sponsor: SponsorAddress,
    },
    /// Move a running VM to another host.
    Migrate(MigrateArguments),
    /// Show how far a VM's move from this host is, or what it cost.
    Migration {
        name: String,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Keep a VM here that is about to move.
    MigrateCancel { name: String },
    /// Say where a VM goes on whose target will never answer. Only a person can know that.
    #[command(group = clap::ArgGroup::new("where").required(true))]
    MigrateResolve {
        name: String,
        /// It does not run on the target, for certain: it goes on here.
        #[arg(long, group = "where")]
        run_here: bool,
        /// It runs on the target: what is left of it here is removed.
        #[arg(long, group = "where")]
        gone: bool,
    },
    /// Change a VM's local budget while it runs.
    Resize {
        name: String,
        /// New local budget: a size, `auto`, or `auto:MIN..MAX`.
        #[arg(long, value_name = "SIZE")]
        local: LocalChoice,
    },
}

#[derive(Debug, Args)]
pub struct MigrateArguments {
    pub name: String,
    /// The target's agent: it takes in VMs with `--migration-listen`. The port is 7902 if not given.
    #[arg(long, value_name = "HOST[:PORT]")]
    pub to: String,
    /// How memory gets there: hybrid, postcopy, precopy, or QEMU's own qemu-precopy, qemu-postcopy,
    /// qemu-postcopy-preempt.
    #[arg(long, default_value = "hybrid")]
    pub mode: MigrationMode,
    /// Time that the guest should stand still at the most, such as 50ms: pages are copied until the
    /// rest fits into it.
    #[arg(long, default_value = "50ms", value_parser = parse_ms, value_name = "TIME")]
    pub max_downtime: u64,
    /// Bound of what is sent, for each second, such as 1G.
    #[arg(long, value_name = "SIZE")]
    pub bandwidth: Option<ByteSize>,
    /// Keep every page in two places until done: memory goes to the sponsors, not to the target, so
    /// that the source's host may die right after the switch.
    #[arg(long)]
    pub safe: bool,
    /// Return at once; `heca vm migration NAME` tells how far it is.
    #[arg(long, conflicts_with = "json")]
    pub background: bool,
    /// Print JSON at the end.
    #[arg(long)]
    pub json: bool,
}

/// A time with a unit, in milliseconds.
fn parse_ms(text: &str) -> Result<u64, String> {
    let bad = || format!("`{text}` is no time: write 50ms or 2s");
    let (number, factor) = match text.strip_suffix("ms") {
        Some(number) => (number, 1),
        None => (text.strip_suffix('s').ok_or_else(bad)?, 1000),
    };
    number.trim().parse::<u64>().ok().and_then(|n| n.checked_mul(factor)).ok_or_else(bad)
}

#[derive(Debug, Args)]
pub struct PoolArguments {
    /// Part of the memory that may be on this host at a time: a size; `auto` for as much as the VM
    /// needs to stall no more than 1 % of the time; or `auto:MIN..MAX`.
    #[arg(long, value_name = "SIZE")]
    pub local: LocalChoice,
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
    /// Seal pages before they leave this host: sponsors see no plaintext.
    #[arg(long)]
    pub encrypt: bool,
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
    #[command(flatten)]
    pub security: SecurityArguments,
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
