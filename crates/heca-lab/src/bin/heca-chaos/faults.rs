//! The faults.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use heca_lab::{Cluster, heca_binary};
use heca_types::ByteSize;
use heca_types::limits::{EXTENT_BYTES, PAGE_BYTES};
use rustix::fs::{FallocateFlags, SeekFrom, fallocate, fstatvfs, seek};
use rustix::process::Signal;

/// What a fault does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// A sponsor is killed and comes back after about a second with its store.
    SponsorKill,
    /// A sponsor is killed and comes back empty, before or after others took its place.
    SponsorLost,
    /// The pager is killed.
    PagerKill,
    /// The agent of the VM's host is killed and started again.
    AgentKill,
    /// Both of them.
    PagerAndAgentKill,
    /// The cable of a sponsor is out for a while.
    LinkDown,
    /// A sponsor and the VM's host: one hears the other, but not the other way round.
    Partition,
    /// A sponsor sends with 20 Mbit/s.
    SlowLink,
    /// A sponsor stands still and goes on.
    SponsorFrozen,
    /// A sponsor's tmpfs is full.
    StoreFull,
    /// Bits of stored pages are flipped.
    CorruptStore,
    /// A sponsor is emptied by its operator.
    Drain,
    /// Agent and pager become another build.
    Upgrade,
    /// A sponsor's agent becomes another build.
    SponsorUpgrade,
    /// The local budget is halved and restored.
    Resize,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Self; 15] = [
        Self::SponsorKill,
        Self::SponsorLost,
        Self::PagerKill,
        Self::AgentKill,
        Self::PagerAndAgentKill,
        Self::LinkDown,
        Self::Partition,
        Self::SlowLink,
        Self::SponsorFrozen,
        Self::StoreFull,
        Self::CorruptStore,
        Self::Drain,
        Self::Upgrade,
        Self::SponsorUpgrade,
        Self::Resize,
    ];

    /// As on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::SponsorKill => "sponsor-kill",
            Self::SponsorLost => "sponsor-lost",
            Self::PagerKill => "pager-kill",
            Self::AgentKill => "agent-kill",
            Self::PagerAndAgentKill => "pager-and-agent-kill",
            Self::LinkDown => "link-down",
            Self::Partition => "partition",
            Self::SlowLink => "slow-link",
            Self::SponsorFrozen => "sponsor-frozen",
            Self::StoreFull => "store-full",
            Self::CorruptStore => "corrupt-store",
            Self::Drain => "drain",
            Self::Upgrade => "upgrade",
            Self::SponsorUpgrade => "sponsor-upgrade",
            Self::Resize => "resize",
        }
    }

    /// Whether replicas are copied after it.
    pub fn rebuilds(self) -> bool {
        matches!(self, Self::SponsorKill | Self::SponsorLost | Self::Drain)
    }

    /// Whether a new pager takes over.
    pub fn replaces_pager(self) -> bool {
        matches!(self, Self::PagerKill | Self::PagerAndAgentKill | Self::Upgrade)
    }
}

impl FromStr for Kind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL.into_iter().find(|kind| kind.name() == text).ok_or_else(|| {
            let names: Vec<&str> = Self::ALL.iter().map(|kind| kind.name()).collect();
            format!("`{text}` is no kind of fault: choose {}", names.join(", "))
        })
    }
}

/// What was done.
#[derive(Debug, Default)]
pub struct Done {
    /// To whom.
    pub target: String,
    /// What is worth to be known of it.
    pub note: String,
}

/// Makes faults; what is random in them follows from a seed.
#[derive(Debug)]
pub struct Faults {
    random: u64,
    /// Two copies of the program, to change from one to the other.
    programs: [PathBuf; 2],
    upgrades: usize,
}

/// Memory of the pages that were changed in a store, to be put right again.
struct Flipped {
    offset: u64,
    good: Vec<u8>,
    bad: Vec<u8>,
}

const SLOT_META_BYTES: u64 = EXTENT_BYTES / PAGE_BYTES as u64 * 32;
const SLOT_BYTES: u64 = SLOT_META_BYTES + EXTENT_BYTES;
/// Pages that are changed at a time.
const FLIPS: usize = 400;

impl Faults {
    pub fn new(seed: u64, cluster: &Cluster) -> anyhow::Result<Self> {
        let program = heca_binary()?;
        let copies = ["heca-a", "heca-b"].map(|name| cluster.lab.dir().join(name));
        for copy in &copies {
            let stripped = Command::new("strip").arg("-o").arg(copy).arg(&program).status();
            if !stripped.is_ok_and(|status| status.success()) {
                fs::copy(&program, copy)?;
            }
        }
        Ok(Self { random: seed ^ 0x5851_F42D_4C95_7F2D, programs: copies, upgrades: 0 })
    }

    fn next(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut x = self.random;
        x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^ (x >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }

    fn between_ms(&mut self, from: u64, to: u64) -> Duration {
        Duration::from_millis(from + self.below(to - from))
    }

    /// The kinds in random order.
    pub fn shuffle(&mut self, kinds: &[Kind]) -> Vec<Kind> {
        let mut kinds = kinds.to_vec();
        for last in (1..kinds.len()).rev() {
            let other = self.below(last as u64 + 1) as usize;
            kinds.swap(last, other);
        }
        kinds
    }

    /// A sponsor that holds something.
    fn victim(&mut self, cluster: &mut Cluster) -> anyhow::Result<usize> {
        let look = cluster.look()?.context("the VM is not served")?;
        let sponsors = look.pager.sponsors.iter().zip(cluster.sponsors());
        let holders: Vec<usize> =
            sponsors.filter(|(s, _)| s.extents > 0).map(|(_, number)| number).collect();
        ensure!(!holders.is_empty(), "no sponsor holds anything");
        Ok(holders[self.below(holders.len() as u64) as usize])
    }

    /// Injects a fault and takes it back.
    pub fn inject(&mut self, cluster: &mut Cluster, kind: Kind) -> anyhow::Result<Done> {
        let number = self.victim(cluster)?;
        let done = |target: String, note: String| Ok(Done { target, note });
        let target = format!("h{number}");
        match kind {
            Kind::SponsorKill => {
                let away = self.between_ms(800, 1200);
                cluster.lab.host(number).kill_agent();
                cluster.pass(away)?;
                cluster.lab.host(number).restart_agent()?;
                done(target, format!("away {} ms", away.as_millis()))
            }
            Kind::SponsorLost => {
                let away = if self.below(2) == 0 { 300 } else { 2500 };
                cluster.lab.host(number).kill_agent();
                fs::remove_dir_all(cluster.lab.host(number).memory_dir().join("store"))?;
                cluster.pass(Duration::from_millis(away))?;
                cluster.lab.host(number).restart_agent()?;
                done(target, format!("away {away} ms"))
            }
            Kind::PagerKill => {
                let before = cluster.pager_pid()?;
                cluster.kill_pager()?;
                wait_for_new_pager(cluster, before)?;
                done("pager".into(), String::new())
            }
            Kind::AgentKill => {
                cluster.demander().kill_agent();
                let away = self.between_ms(100, 600);
                cluster.pass(away)?;
                cluster.demander().restart_agent()?;
                done("agent".into(), String::new())
            }
            Kind::PagerAndAgentKill => {
                let before = cluster.pager_pid()?;
                // In both orders: an agent that lives sees the end of its pager.
                if self.below(2) == 0 {
                    cluster.kill_pager()?;
                    cluster.demander().kill_agent();
                } else {
                    let pid = before;
                    cluster.demander().kill_agent();
                    kill(pid)?;
                }
                let away = self.between_ms(100, 400);
                cluster.pass(away)?;
                cluster.demander().restart_agent()?;
                wait_for_new_pager(cluster, before)?;
                done("pager, agent".into(), String::new())
            }
            Kind::LinkDown => {
                let away = self.between_ms(500, 2000);
                cluster.lab.set_link(number, false)?;
                let passed = cluster.pass(away);
                cluster.lab.set_link(number, true)?;
                passed?;
                done(target, format!("{} ms", away.as_millis()))
            }
            Kind::Partition => {
                let away = self.between_ms(500, 2000);
                let (from, to) = if self.below(2) == 0 { (1, number) } else { (number, 1) };
                cluster.lab.set_mute(from, to, true)?;
                let passed = cluster.pass(away);
                cluster.lab.set_mute(from, to, false)?;
                passed?;
                done(format!("h{from} to h{to}"), format!("{} ms", away.as_millis()))
            }
            Kind::SlowLink => {
                cluster.lab.set_rate(number, Some(20))?;
                let passed = cluster.pass(Duration::from_secs(2));
                cluster.lab.set_rate(number, None)?;
                passed?;
                done(target, "20 Mbit/s".into())
            }
            Kind::SponsorFrozen => {
                let away = self.between_ms(1000, 2000);
                cluster.lab.host(number).signal_agent(Signal::STOP)?;
                let passed = cluster.pass(away);
                cluster.lab.host(number).signal_agent(Signal::CONT)?;
                passed?;
                done(target, format!("{} ms", away.as_millis()))
            }
            Kind::StoreFull => {
                let filled = self.fill_store(cluster, number)?;
                done(target, format!("{} MiB filled", filled >> 20))
            }
            Kind::CorruptStore => {
                let note = self.corrupt_store(cluster, number)?;
                done(target, note)
            }
            Kind::Drain => {
                let note = drain(cluster, number)?;
                done(target, note)
            }
            Kind::Upgrade => {
                let before = cluster.pager_pid()?;
                self.upgrade(cluster, 1)?;
                wait_for_new_pager(cluster, before)?;
                done("h1".into(), String::new())
            }
            Kind::SponsorUpgrade => {
                self.upgrade(cluster, number)?;
                done(target, String::new())
            }
            Kind::Resize => {
                let local = cluster.options().local;
                cluster.resize(ByteSize(local.0 / 2))?;
                let half = local.0 / 2 / PAGE_BYTES as u64;
                let begun = Instant::now();
                cluster.wait("smaller footprint", Duration::from_secs(30), |look| {
                    look.pager.gauges.local_pages <= half
                })?;
                let shrunk = begun.elapsed();
                cluster.resize(local)?;
                done("VM".into(), format!("shrunk after {} ms", shrunk.as_millis()))
            }
        }
    }

    fn upgrade(&mut self, cluster: &mut Cluster, number: usize) -> anyhow::Result<()> {
        self.upgrades += 1;
        let program = self.programs[self.upgrades % 2].to_string_lossy().into_owned();
        let host = cluster.lab.host(number);
        host.heca_ok(&["upgrade", "--program", &program])?;
        let pid = host.agent_pid().context("no agent")?;
        let exe = fs::read_link(format!("/proc/{pid}/exe"))?;
        ensure!(exe == Path::new(&program), "the agent runs {} after the upgrade", exe.display());
        Ok(())
    }

    fn fill_store(&mut self, cluster: &mut Cluster, number: usize) -> anyhow::Result<u64> {
        let time = self.between_ms(1000, 1500);
        let path = cluster.lab.host(number).memory_dir().join("filler");
        let file = File::create(&path)?;
        let room = fstatvfs(&file)?;
        let bytes = room.f_bavail * room.f_frsize;
        // To the last page but a few: more may be taken while it is filled.
        let filled = fallocate(&file, FallocateFlags::empty(), 0, bytes.max(1));
        let passed = filled.map_err(anyhow::Error::from).and_then(|()| cluster.pass(time));
        fs::remove_file(&path)?;
        match passed {
            // The pager was quicker: the store is as good as full for a moment.
            Err(error) if error.to_string().contains("No space") => cluster.pass(time)?,
            other => other?,
        }
        Ok(bytes)
    }

    /// Flips bits in pages of a store, and puts right later what was not written anew since: the
    /// redundancy must be back before another sponsor is taken away.
    fn corrupt_store(&mut self, cluster: &mut Cluster, number: usize) -> anyhow::Result<String> {
        let store = cluster.lab.host(number).memory_dir().join("store");
        let path = fs::read_dir(&store)?
            .flatten()
            .map(|entry| entry.path())
            .find(|path| path.extension().is_some_and(|e| e == "pages"))
            .context("the store has no pages")?;
        let file = File::options().read(true).write(true).open(path)?;
        let before = counted(cluster)?;
        cluster.lab.host(number).signal_agent(Signal::STOP)?;
        let flipped = self.flip(&file);
        cluster.lab.host(number).signal_agent(Signal::CONT)?;
        let flipped = flipped?;
        let passed = cluster.pass(Duration::from_millis(1500));
        cluster.lab.host(number).signal_agent(Signal::STOP)?;
        let restored = restore(&file, &flipped);
        cluster.lab.host(number).signal_agent(Signal::CONT)?;
        passed?;
        let (left, detected) = (restored?, counted(cluster)?.saturating_sub(before));
        Ok(format!("{} pages, {detected} noticed, {left} left", flipped.len()))
    }

    fn flip(&mut self, file: &File) -> anyhow::Result<Vec<Flipped>> {
        let len = file.metadata()?.len();
        let mut flipped: Vec<Flipped> = Vec::new();
        for _ in 0..FLIPS * 4 {
            let start = self.below(len);
            let Ok(data) = seek(file, SeekFrom::Data(start)) else { continue };
            let offset = data.max(start) / PAGE_BYTES as u64 * PAGE_BYTES as u64;
            let known = flipped.iter().any(|f| f.offset == offset);
            if offset % SLOT_BYTES < SLOT_META_BYTES || known || flipped.len() == FLIPS {
                continue;
            }
            let mut good = vec![0; PAGE_BYTES];
            file.read_exact_at(&mut good, offset)?;
            let mut bad = good.clone();
            bad[self.below(PAGE_BYTES as u64) as usize] ^= 1 << self.below(8);
            file.write_all_at(&bad, offset)?;
            flipped.push(Flipped { offset, good, bad });
        }
        Ok(flipped)
    }
}

/// Returns how many pages were still as they were changed.
fn restore(file: &File, flipped: &[Flipped]) -> anyhow::Result<usize> {
    let mut left = 0;
    for page in flipped {
        let mut now = vec![0; PAGE_BYTES];
        if file.read_exact_at(&mut now, page.offset).is_ok() && now == page.bad {
            file.write_all_at(&page.good, page.offset)?;
            left += 1;
        }
    }
    Ok(left)
}

fn counted(cluster: &mut Cluster) -> anyhow::Result<u64> {
    let look = cluster.wait("figures", Duration::from_secs(10), |_| true)?;
    Ok(look.pager.counters.corrupt_replies)
}

fn kill(pid: i32) -> anyhow::Result<()> {
    let pid = rustix::process::Pid::from_raw(pid).context("no process")?;
    Ok(rustix::process::kill_process(pid, Signal::KILL)?)
}

fn wait_for_new_pager(cluster: &mut Cluster, before: i32) -> anyhow::Result<()> {
    cluster
        .wait("new pager", Duration::from_secs(30), |look| look.vm.pager_pid != Some(before))
        .map(|_| ())
}

fn drain(cluster: &mut Cluster, number: usize) -> anyhow::Result<String> {
    let begun = Instant::now();
    cluster.lab.host(number).heca_ok(&["host", "drain"])?;
    let deadline = begun + Duration::from_secs(60);
    let emptied = loop {
        cluster.look()?;
        let regions = cluster.lab.host(number).agent_info()?.regions;
        if regions == 0 || Instant::now() > deadline {
            break regions == 0;
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    let time = begun.elapsed();
    cluster.lab.host(number).heca_ok(&["host", "drain", "--off"])?;
    ensure!(emptied, "h{number} is not empty after {} s of draining", time.as_secs());
    Ok(format!("empty after {} ms", time.as_millis()))
}
