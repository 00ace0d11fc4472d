//! Watches whether the sponsor's host is short of memory.
//!
//! Sponsored pages are memory of the host: when that runs short the kernel kills, and kills the
//! sponsor or its neighbours. So a pressed sponsor takes no new extents and says so to its owners,
//! who move extents away.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::store::Store;

/// `/proc/meminfo`, as far as it matters here. In bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemInfo {
    /// Usable memory of the host.
    pub total: u64,
    /// What new work can have without swapping, by the kernel's estimate.
    pub available: u64,
}

/// Reads `/proc/meminfo`; `None` if it lacks `MemTotal` or `MemAvailable` in kB.
#[must_use]
pub fn parse_meminfo(text: &str) -> Option<MemInfo> {
    let field = |name: &str| {
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        let kib: u64 = value.trim().strip_suffix("kB")?.trim().parse().ok()?;
        kib.checked_mul(1024)
    };
    Some(MemInfo { total: field("MemTotal")?, available: field("MemAvailable")? })
}

/// The control groups of a process that may limit its memory: paths below the hierarchy's mount.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MemoryCgroups {
    /// In the unified hierarchy (v2).
    pub unified: Option<String>,
    /// In the hierarchy of the v1 memory controller.
    pub memory_v1: Option<String>,
}

/// Reads `/proc/PID/cgroup`. Lines that make no sense are left out.
#[must_use]
pub fn parse_cgroups(text: &str) -> MemoryCgroups {
    let mut groups = MemoryCgroups::default();
    for line in text.lines() {
        let mut fields = line.splitn(3, ':');
        let (Some(number), Some(controllers), Some(path)) =
            (fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        // A process that was moved out of sight of its namespace has `/..` in front.
        if !path.starts_with('/') || path.split('/').any(|part| part == "..") {
            continue;
        }
        if number == "0" && controllers.is_empty() {
            groups.unified = Some(path.to_owned());
        } else if controllers.split(',').any(|name| name == "memory") {
            groups.memory_v1 = Some(path.to_owned());
        }
    }
    groups
}

/// Reads a limit of a control group, in bytes; `None` if there is none. v2 says `max`, v1 the
/// largest multiple of a page below 2^63.
#[must_use]
pub fn parse_limit(text: &str) -> Option<u64> {
    text.trim().parse().ok().filter(|&bytes| bytes < 1 << 62)
}

/// A field of `memory.stat`, in bytes; 0 if it is not there.
#[must_use]
pub fn parse_stat(text: &str, field: &str) -> u64 {
    let value = |line: &str| line.strip_prefix(field)?.strip_prefix(' ')?.trim().parse().ok();
    text.lines().find_map(value).unwrap_or(0)
}

/// Names of the files of a control group.
struct CgroupFiles {
    limit: &'static str,
    usage: &'static str,
    inactive: &'static str,
}

const V2: CgroupFiles =
    CgroupFiles { limit: "memory.max", usage: "memory.current", inactive: "inactive_file" };
const V1: CgroupFiles = CgroupFiles {
    limit: "memory.limit_in_bytes",
    usage: "memory.usage_in_bytes",
    inactive: "total_inactive_file",
};

/// What a control group and those above it let the process still have, in bytes; `None` if none
/// of them has a limit. Groups that cannot be seen (those outside of a container) are left out.
fn cgroup_available(mount: &Path, group: &str, files: &CgroupFiles) -> Option<u64> {
    let leaf = mount.join(group.trim_start_matches('/'));
    let room = |dir: &Path| {
        let read = |name: &str| fs::read_to_string(dir.join(name)).ok();
        let limit = parse_limit(&read(files.limit)?)?;
        let usage = parse_limit(&read(files.usage)?)?;
        // Pages of files that nobody used lately are given back before anybody is killed. Those
        // of the store are none of them: tmpfs counts as anonymous memory.
        let inactive = parse_stat(&read("memory.stat").unwrap_or_default(), files.inactive);
        Some(limit.saturating_sub(usage.saturating_sub(inactive)))
    };
    leaf.ancestors().take_while(|dir| dir.starts_with(mount)).filter_map(room).min()
}

/// Free bytes of the file system of `dir`; `None` for a tmpfs without a limit, which counts no
/// blocks at all.
fn tmpfs_available(dir: &Path) -> io::Result<Option<u64>> {
    let stat = rustix::fs::statvfs(dir)?;
    Ok((stat.f_blocks != 0).then(|| stat.f_bavail.saturating_mul(stat.f_frsize)))
}

/// Where the kernel tells about memory.
#[derive(Debug, Clone)]
struct Kernel {
    proc: PathBuf,
    cgroup: PathBuf,
}

impl Default for Kernel {
    fn default() -> Self {
        Self { proc: "/proc".into(), cgroup: "/sys/fs/cgroup".into() }
    }
}

impl Kernel {
    fn available(&self, store_dir: &Path) -> io::Result<u64> {
        let path = self.proc.join("meminfo");
        let meminfo = parse_meminfo(&fs::read_to_string(&path)?).ok_or_else(|| {
            let text = format!("{} lacks MemTotal or MemAvailable in kB", path.display());
            io::Error::new(io::ErrorKind::InvalidData, text)
        })?;
        // A kernel without control groups has no such file.
        let groups = fs::read_to_string(self.proc.join("self/cgroup")).unwrap_or_default();
        let groups = parse_cgroups(&groups);
        let unified = groups.unified.and_then(|group| cgroup_available(&self.cgroup, &group, &V2));
        let memory_v1 = groups
            .memory_v1
            .and_then(|group| cgroup_available(&self.cgroup.join("memory"), &group, &V1));
        let tmpfs = tmpfs_available(store_dir)?;
        let bounds = [Some(meminfo.available), unified, memory_v1, tmpfs];
        Ok(bounds.into_iter().flatten().min().unwrap_or(meminfo.available))
    }
}

/// Memory that the store in `store_dir` can still have, in bytes: the least of what the host has
/// available, what the process's control groups leave it, and what is free on the store's tmpfs.
///
/// # Errors
/// Those of reading `/proc/meminfo` and of `statvfs`.
pub fn available(store_dir: &Path) -> io::Result<u64> {
    Kernel::default().available(store_dir)
}

/// When memory is short.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PressureWatch {
    /// Bytes that are to stay free.
    pub keep_free: u64,
}

impl PressureWatch {
    /// Whether the sponsor is pressed with `available_bytes` left. It is below `keep_free`, and
    /// stays so until there is a quarter more: else it would change its mind with every page.
    #[must_use]
    pub fn assess(&self, available_bytes: u64, currently_pressed: bool) -> bool {
        let quarter = if currently_pressed { self.keep_free / 4 } else { 0 };
        available_bytes < self.keep_free.saturating_add(quarter)
    }
}

/// A running watch. It ends when this is dropped.
#[derive(Debug)]
pub struct PressureThread {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for PressureThread {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Starts a thread that looks every `period` and tells `store` whether at least `keep_free` bytes
/// are left. Dropping what is returned ends it.
///
/// # Errors
/// Those of starting a thread.
pub fn spawn(store: Arc<Store>, keep_free: u64, period: Duration) -> io::Result<PressureThread> {
    let (stop, stopped) = channel();
    let watch = PressureWatch { keep_free };
    let thread = std::thread::Builder::new().name("sponsor-memory".into()).spawn(move || {
        let mut blind = false;
        loop {
            look(&store, watch, &mut blind);
            if stopped.recv_timeout(period) != Err(RecvTimeoutError::Timeout) {
                return;
            }
        }
    })?;
    Ok(PressureThread { stop: Some(stop), thread: Some(thread) })
}

fn look(store: &Store, watch: PressureWatch, blind: &mut bool) {
    let left = match available(store.dir()) {
        Ok(left) => left,
        Err(error) => {
            // Once, not every period. What was known last stays.
            if !std::mem::replace(blind, true) {
                tracing::warn!(%error, "cannot tell how much memory is left; not watching it");
            }
            return;
        }
    };
    *blind = false;
    let (before, now) = (store.is_pressed(), watch.assess(left, store.is_pressed()));
    if before != now {
        store.set_pressed(now);
        let (left_mib, keep_mib) = (left >> 20, watch.keep_free >> 20);
        if now {
            tracing::warn!(left_mib, keep_mib, "memory is short: no new extents are taken");
        } else {
            tracing::info!(left_mib, keep_mib, "memory is no longer short");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEMINFO: &str = "MemTotal:       16303428 kB\nMemFree:          501788 kB\n\
                           MemAvailable:   12345678 kB\nHugePages_Total:       0\n";

    #[test]
    fn meminfo_is_read_in_bytes() {
        let info = MemInfo { total: 16_303_428 << 10, available: 12_345_678 << 10 };
        assert_eq!(parse_meminfo(MEMINFO), Some(info));
        for text in ["", "MemTotal: 1 kB", "MemTotal: 1 kB\nMemAvailable: x kB", "\0MemTotal"] {
            assert_eq!(parse_meminfo(text), None, "{text:?}");
        }
        let overflow = format!("MemTotal: {0} kB\nMemAvailable: {0} kB", u64::MAX);
        assert_eq!(parse_meminfo(&overflow), None);
        assert!(parse_meminfo(&fs::read_to_string("/proc/meminfo").expect("Linux")).is_some());
    }

    #[test]
    fn both_kinds_of_control_groups_are_found() {
        let hybrid =
            "12:pids:/a\n5:cpu,memory:/user.slice\n1:name=systemd:/x\n0::/system.slice/heca";
        let expected = MemoryCgroups {
            unified: Some("/system.slice/heca".into()),
            memory_v1: Some("/user.slice".into()),
        };
        assert_eq!(parse_cgroups(hybrid), expected);
        let unified = parse_cgroups("0::/with:colon").unified;
        assert_eq!(unified.as_deref(), Some("/with:colon"));
        for text in ["", "0::", "0", "x", "0::relative", "0::/../outside", "3:memory_x:/a"] {
            assert_eq!(parse_cgroups(text), MemoryCgroups::default(), "{text:?}");
        }
    }

    #[test]
    fn limits_and_their_absence() {
        assert_eq!(parse_limit("1073741824\n"), Some(1 << 30));
        for text in ["max\n", "9223372036854771712\n", "", "-1", "99999999999999999999"] {
            assert_eq!(parse_limit(text), None, "{text:?}");
        }
        let stat = "inactive_file_x 7\nanon 5\ninactive_file 42\n";
        assert_eq!((parse_stat(stat, "inactive_file"), parse_stat(stat, "file")), (42, 0));
    }

    struct Fake(tempfile::TempDir);

    impl Fake {
        fn new() -> Self {
            let fake = Self(tempfile::tempdir_in("/dev/shm").expect("tmpfs"));
            fake.put("proc/meminfo", "MemTotal: 4096 kB\nMemAvailable: 2048 kB\n");
            fake
        }

        fn put(&self, path: &str, text: &str) {
            let path = self.0.path().join(path);
            fs::create_dir_all(path.parent().expect("has one")).expect("tmpfs");
            fs::write(path, text).expect("tmpfs");
        }

        fn available(&self) -> u64 {
            let (proc, cgroup) = (self.0.path().join("proc"), self.0.path().join("cgroup"));
            Kernel { proc, cgroup }.available(self.0.path()).expect("readable")
        }
    }

    #[test]
    fn the_least_bound_counts() {
        let fake = Fake::new();
        assert_eq!(fake.available(), 2048 << 10, "no control groups at all");
        fake.put("proc/self/cgroup", "4:memory:/old/leaf\n0::/new/leaf\n");
        assert_eq!(fake.available(), 2048 << 10, "groups that cannot be seen");
        fake.put("cgroup/new/leaf/memory.max", "max\n");
        fake.put("cgroup/new/leaf/memory.current", "100\n");
        fake.put("cgroup/new/memory.max", "1000000\n");
        fake.put("cgroup/new/memory.current", "900000\n");
        assert_eq!(fake.available(), 100_000, "the group above limits, too");
        fake.put("cgroup/new/memory.stat", "anon 1\ninactive_file 50000\n");
        assert_eq!(fake.available(), 150_000, "inactive file pages are as good as free");
        fake.put("cgroup/memory/old/memory.limit_in_bytes", "70000\n");
        fake.put("cgroup/memory/old/memory.usage_in_bytes", "60000\n");
        fake.put("cgroup/memory/old/memory.stat", "total_inactive_file 5\n");
        assert_eq!(fake.available(), 10_005);
        fake.put("cgroup/memory/old/memory.usage_in_bytes", "80000\n");
        fake.put("cgroup/memory/old/memory.stat", "total_inactive_file 0\n");
        assert_eq!(fake.available(), 0, "over the limit");
        fake.put("proc/meminfo", "nothing\n");
        let (proc, cgroup) = (fake.0.path().join("proc"), fake.0.path().join("cgroup"));
        let error = Kernel { proc, cgroup }.available(fake.0.path()).expect_err("no meminfo");
        assert!(error.to_string().contains("MemAvailable"), "{error}");
    }

    #[test]
    fn this_host_has_memory() {
        assert!(available(Path::new("/dev/shm")).expect("Linux") > 0);
        assert!(available(Path::new("/dev/shm/no-such-directory")).is_err());
    }

    #[test]
    fn pressure_ends_later_than_it_begins() {
        let watch = PressureWatch { keep_free: 1000 };
        let mut pressed = false;
        let walk = [
            (5000, false),
            (1000, false),
            (999, true),
            (1000, true),
            (1249, true),
            (1250, false),
            (1001, false),
            (0, true),
        ];
        for (available, expected) in walk {
            pressed = watch.assess(available, pressed);
            assert_eq!(pressed, expected, "{available}");
        }
        let all = PressureWatch { keep_free: u64::MAX };
        assert!(all.assess(u64::MAX - 1, true));
        assert!(!PressureWatch { keep_free: 0 }.assess(0, true), "0 turns the watch off");
    }

    #[test]
    fn the_thread_sets_and_clears_the_flag() {
        let dir = tempfile::tempdir_in("/dev/shm").expect("tmpfs");
        let offer = heca_types::ByteSize(1 << 30);
        let store = Arc::new(Store::open(dir.path(), offer).expect("a store"));
        let period = Duration::from_millis(5);
        let until = |keep_free, pressed| {
            let watch = spawn(store.clone(), keep_free, period).expect("a thread");
            let deadline = std::time::Instant::now() + Duration::from_secs(10);
            while store.is_pressed() != pressed {
                assert!(std::time::Instant::now() < deadline, "the flag does not change");
                std::thread::sleep(period);
            }
            drop(watch);
        };
        until(u64::MAX, true);
        until(0, false);
        assert_eq!(Arc::strong_count(&store), 1, "the threads ended");
    }
}
