//! What a host without remote memory has: a memory limit, and a place to swap to.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::Context;

/// A control group with a memory limit; removed when dropped.
#[derive(Debug)]
pub(super) struct MemoryLimit {
    dir: PathBuf,
    limit: &'static str,
    usage: &'static str,
}

impl MemoryLimit {
    /// A new group without a limit yet, of whichever version of control groups the host has.
    pub(super) fn new() -> anyhow::Result<Self> {
        let root = Path::new("/sys/fs/cgroup");
        let name = format!("heca-bench-{}", std::process::id());
        let unified = root.join("cgroup.controllers");
        let (dir, limit, usage) = if unified.exists() {
            // The root's children have the controllers that it hands on.
            let _ = fs::write(root.join("cgroup.subtree_control"), "+memory");
            (root.join(name), "memory.max", "memory.current")
        } else {
            let root = root.join("memory");
            (root.join(name), "memory.limit_in_bytes", "memory.usage_in_bytes")
        };
        fs::create_dir(&dir).with_context(|| format!("create {}", dir.display()))?;
        let group = Self { dir, limit, usage };
        anyhow::ensure!(
            group.dir.join(limit).exists(),
            "control groups cannot limit memory here: {} has no {limit}",
            group.dir.display()
        );
        Ok(group)
    }

    /// Moves a process into the group. What it allocates from now on counts.
    pub(super) fn take(&self, pid: u32) -> anyhow::Result<()> {
        let file = self.dir.join("cgroup.procs");
        fs::write(&file, pid.to_string()).with_context(|| format!("write {}", file.display()))
    }

    /// Lets the group use so many bytes more than it does now.
    pub(super) fn allow(&self, bytes: u64) -> anyhow::Result<()> {
        let usage: u64 = fs::read_to_string(self.dir.join(self.usage))?.trim().parse()?;
        let file = self.dir.join(self.limit);
        fs::write(&file, (usage + bytes).to_string())
            .with_context(|| format!("write {}", file.display()))
    }
}

impl Drop for MemoryLimit {
    fn drop(&mut self) {
        // Its process may take a moment to be gone.
        let deadline = Instant::now() + Duration::from_secs(5);
        while fs::remove_dir(&self.dir).is_err() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// A place to swap to, in use until it is dropped.
#[derive(Debug)]
pub(super) enum Swap {
    Zram { number: u32 },
    File { path: PathBuf },
}

fn run(program: &str, argument: &Path) -> anyhow::Result<()> {
    let output = Command::new(program)
        .arg(argument)
        .output()
        .with_context(|| format!("start {program} (of util-linux)"))?;
    anyhow::ensure!(
        output.status.success(),
        "{program} {}: {}",
        argument.display(),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}

impl Swap {
    /// A compressed block device in memory, with lz4 where the kernel has it.
    pub(super) fn zram(bytes: u64) -> anyhow::Result<Self> {
        let control = Path::new("/sys/class/zram-control/hot_add");
        let number = fs::read_to_string(control).context("this kernel has no zram")?;
        let swap = Self::Zram { number: number.trim().parse()? };
        let _ = fs::write(swap.attribute("comp_algorithm"), "lz4");
        fs::write(swap.attribute("disksize"), bytes.to_string()).context("set up zram")?;
        swap.turn_on()?;
        Ok(swap)
    }

    /// A file on a disk.
    pub(super) fn file(dir: &Path, bytes: u64) -> anyhow::Result<Self> {
        let path = dir.join(format!("heca-bench-swap-{}", std::process::id()));
        let file = fs::File::create(&path).with_context(|| format!("create {}", path.display()))?;
        let swap = Self::File { path };
        let flags = rustix::fs::FallocateFlags::empty();
        rustix::fs::fallocate(&file, flags, 0, bytes).context("make room for the swap file")?;
        let private = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        file.set_permissions(private)?;
        swap.turn_on()?;
        Ok(swap)
    }

    fn attribute(&self, name: &str) -> PathBuf {
        match self {
            Self::Zram { number } => PathBuf::from(format!("/sys/block/zram{number}/{name}")),
            Self::File { path } => path.with_file_name(name),
        }
    }

    fn path(&self) -> PathBuf {
        match self {
            Self::Zram { number } => PathBuf::from(format!("/dev/zram{number}")),
            Self::File { path } => path.clone(),
        }
    }

    fn turn_on(&self) -> anyhow::Result<()> {
        run("mkswap", &self.path())?;
        run("swapon", &self.path())
    }

    /// Bytes of data that zram holds, and bytes of memory that it takes for them.
    pub(super) fn zram_use(&self) -> Option<(u64, u64)> {
        let Self::Zram { .. } = self else { return None };
        let text = fs::read_to_string(self.attribute("mm_stat")).ok()?;
        let mut numbers = text.split_whitespace().map(|n| n.parse().unwrap_or(0));
        // The first and the third one: `orig_data_size` and `mem_used_total`.
        let held = numbers.next()?;
        Some((held, numbers.nth(1)?))
    }
}

impl Drop for Swap {
    fn drop(&mut self) {
        if let Err(error) = run("swapoff", &self.path()) {
            tracing::debug!("{error}");
        }
        match &*self {
            Self::Zram { number } => {
                let _ = fs::write(self.attribute("reset"), "1");
                let _ = fs::write("/sys/class/zram-control/hot_remove", number.to_string());
            }
            Self::File { path } => {
                let _ = fs::remove_file(path);
            }
        }
    }
}

/// Whether any swap is in use: it would be a peer's, and keeps the pager from its best way to evict.
pub(super) fn is_on() -> bool {
    fs::read_to_string("/proc/swaps").is_ok_and(|text| text.lines().count() > 1)
}
