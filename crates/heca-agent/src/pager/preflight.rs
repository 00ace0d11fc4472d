//! Everything that is checked before a process is touched.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use heca_api::{ApiError, EvictionChoice};
use heca_sys::process::{self, Mapping};
use heca_sys::uffd::{Features, Userfaultfd};
use heca_sys::{attach, zap};
use heca_types::limits::PAGE_BYTES;

use super::evictor::Unmapper;

/// The memory that is paged: a file, mapped as one piece by one process.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Target {
    pub(crate) pid: i32,
    /// Address of the file's first byte in the process.
    pub(crate) base: u64,
    /// Length, in bytes.
    pub(crate) len: u64,
    device: u64,
    inode: u64,
}

impl Target {
    pub(crate) fn address(&self, page: heca_types::PageIndex) -> u64 {
        self.base + page.offset()
    }

    fn is_of(&self, mapping: &Mapping) -> bool {
        mapping.inode == self.inode && mapping.device == device_name(self.device)
    }
}

fn device_name(device: u64) -> String {
    format!("{:02x}:{:02x}", rustix::fs::major(device), rustix::fs::minor(device))
}

const SHARED_HINT: &str = "start QEMU with \
    -object memory-backend-file,id=pc.ram,size=SIZE,mem-path=/dev/shm/NAME,share=on \
    -machine q35,memory-backend=pc.ram (libvirt: <memoryBacking><source type='file'/>\
    <access mode='shared'/></memoryBacking>)";

/// Finds the mapping of `path` in a process and checks that it can be paged.
pub(super) fn find_target(pid: i32, path: &Path) -> Result<Target, ApiError> {
    let shown = path.display();
    let metadata = fs::metadata(path).map_err(|error| {
        ApiError::new("no-ram-file", format!("cannot look at {shown}")).detail(error.to_string())
    })?;
    let all = process::maps(pid).map_err(|error| {
        ApiError::new("no-process", format!("cannot read the mappings of process {pid}"))
            .detail(error.to_string())
            .hint("check the process id, and run as root")
    })?;
    let mut target = Target { pid, base: 0, len: 0, device: metadata.dev(), inode: metadata.ino() };
    let own: Vec<&Mapping> = all.iter().filter(|map| target.is_of(map)).collect();
    let name = process::command_name(pid);
    let Some(first) = own.first() else {
        return Err(ApiError::new(
            "not-mapped",
            format!("process {pid} ({name}) does not map {shown}"),
        )
        .hint(SHARED_HINT));
    };
    if own.iter().any(|map| !map.shared) {
        return Err(ApiError::new(
            "not-shared",
            format!(
                "process {pid} ({name}) maps {shown} privately; its writes never reach the file"
            ),
        )
        .hint(SHARED_HINT));
    }
    check_tmpfs(path)?;
    let contiguous = own.windows(2).all(|pair| {
        pair[0].end == pair[1].start
            && pair[1].offset == pair[0].offset + (pair[0].end - pair[0].start)
    });
    let (start, end) = (first.start, own.last().map_or(first.end, |map| map.end));
    target.base = start.wrapping_sub(first.offset);
    target.len = metadata.len() / PAGE_BYTES as u64 * PAGE_BYTES as u64;
    if !contiguous || first.offset != 0 || end - start < target.len || target.len == 0 {
        return Err(ApiError::new(
            "not-contiguous",
            format!("process {pid} ({name}) does not map all of {shown} in one piece"),
        )
        .hint("give each memory backend a file of its own"));
    }
    refuse_locked(&target, &name)?;
    refuse_second_mapper(&target)?;
    screen_qemu(pid)?;
    Ok(target)
}

/// The kernel does not unmap pages that their owner locked.
fn refuse_locked(target: &Target, name: &str) -> Result<(), ApiError> {
    let smaps = fs::read_to_string(format!("/proc/{}/smaps", target.pid)).unwrap_or_default();
    let start = format!("{:x}-", target.base);
    let mut flags = smaps
        .lines()
        .skip_while(|line| !line.trim_start_matches('0').starts_with(&start))
        .filter_map(|line| line.strip_prefix("VmFlags:"));
    if flags.next().is_some_and(|flags| flags.split_whitespace().any(|flag| flag == "lo")) {
        let pid = target.pid;
        return Err(ApiError::new(
            "memory-locked",
            format!("process {pid} ({name}) locks its memory: pages cannot be taken from it"),
        )
        .hint("start it without mlock (QEMU: without -overcommit mem-lock=on)"));
    }
    Ok(())
}

/// A process that maps the file without being watched would read dropped pages as zeros.
pub(super) fn refuse_second_mapper(target: &Target) -> Result<(), ApiError> {
    for pid in process::all_pids().unwrap_or_default() {
        if pid == target.pid {
            continue;
        }
        let maps = process::maps(pid).unwrap_or_default();
        if maps.iter().any(|map| target.is_of(map)) {
            let name = process::command_name(pid);
            return Err(ApiError::new(
                "second-mapper",
                format!(
                    "process {pid} ({name}) maps the same memory: it would read pages that \
                         are on sponsors as zeros"
                ),
            )
            .hint(format!(
                "end process {pid}; vhost-user devices and virtiofs cannot be used with \
                           remote memory"
            )));
        }
    }
    Ok(())
}

fn screen_qemu(pid: i32) -> Result<(), ApiError> {
    let command = process::command_line(pid);
    if !command.first().is_some_and(|program| program.contains("qemu")) {
        return Ok(());
    }
    let findings = heca_vmm::screen::screen_qemu_arguments(&command);
    let mut refusals = Vec::new();
    for finding in findings {
        if finding.severity == heca_vmm::screen::Severity::Refuse {
            refusals.push(finding);
        } else {
            tracing::warn!("{}: {}; {}", finding.what, finding.why, finding.fix);
        }
    }
    let Some(first) = refusals.first() else { return Ok(()) };
    Err(ApiError::new("qemu-not-fit", format!("{}: {}", first.what, first.why))
        .hint(first.fix.clone()))
}

fn check_tmpfs(path: &Path) -> Result<(), ApiError> {
    let shown = path.display();
    if !crate::store::is_tmpfs(path).unwrap_or(false) {
        return Err(ApiError::new("not-tmpfs", format!("{shown} is not on tmpfs")).hint(
            "userfaultfd can watch shared memory only on tmpfs: put the file under /dev/shm \
             (libvirt: memory_backing_dir in qemu.conf)",
        ));
    }
    if let Some(value) = huge_option(path) {
        return Err(ApiError::new(
            "huge-tmpfs",
            format!(
                "the tmpfs of {shown} is mounted with huge={value}: dropping one page would \
                     split huge pages and read as zeros around it"
            ),
        )
        .hint("use a tmpfs mounted with huge=never (the default), such as /dev/shm"));
    }
    Ok(())
}

/// The `huge=` option of the mount that a path lies on, unless it is `never`.
fn huge_option(path: &Path) -> Option<String> {
    let path = path.canonicalize().ok()?;
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    let line = mounts
        .lines()
        .filter(|line| {
            line.split(' ').nth(4).is_some_and(|mount_point| path.starts_with(mount_point))
        })
        .max_by_key(|line| line.split(' ').nth(4).map_or(0, str::len))?;
    let options = line.rsplit(' ').next()?;
    let value = options.split(',').find_map(|option| option.strip_prefix("huge="))?;
    (value != "never").then(|| value.to_owned())
}

/// The kernel's features, if they suffice.
pub(super) fn check_kernel() -> Result<Features, ApiError> {
    let available = Userfaultfd::available_features().map_err(|error| {
        ApiError::new("no-userfaultfd", "userfaultfd cannot be used")
            .detail(error.to_string())
            .hint("run as root on Linux 6.7 or newer; `heca doctor` checks the machine")
    })?;
    let needed =
        Features::MISSING_SHMEM.union(Features::MINOR_SHMEM).union(Features::WP_HUGETLBFS_SHMEM);
    if !available.contains(needed) {
        return Err(ApiError::new("kernel-too-old", "this kernel's userfaultfd lacks features")
            .detail(format!("has {:#x}, needs {:#x}", available.0, needed.0))
            .hint("install Linux 6.7 or newer (Debian 12: the kernel of bookworm-backports)"));
    }
    Ok(available)
}

/// Whether any swap is active.
pub(crate) fn swap_is_on() -> bool {
    fs::read_to_string("/proc/swaps").is_ok_and(|text| text.lines().count() > 1)
}

/// How a pager that goes on where another ended may take pages: the way in which writes are tracked
/// cannot be changed any more.
pub(super) fn same_protection(choice: EvictionChoice, write_protect: bool) -> EvictionChoice {
    match (write_protect, choice) {
        (true, _) => EvictionChoice::WriteProtect,
        (false, EvictionChoice::WriteProtect) => EvictionChoice::Auto,
        (false, choice) => choice,
    }
}

/// Chooses how pages are taken from the guest: the best way that works here, or the way asked
/// for.
pub(super) fn choose_unmapper(
    choice: EvictionChoice,
    pid: i32,
    features: Features,
) -> Result<(Unmapper, &'static str), ApiError> {
    let zap_possible = features.contains(Features::WP_ASYNC);
    let unusable = |what: &str, hint: &str| {
        Err(ApiError::new("eviction-unusable", what.to_owned()).hint(hint.to_owned()))
    };
    let page_out = || {
        process::open_pidfd(pid).map(Unmapper::PageOut).map_err(|error| {
            ApiError::new("no-process", "the process ended").detail(error.to_string())
        })
    };
    let page_out_works = || zap::page_out_works().unwrap_or(false);
    match choice {
        EvictionChoice::WriteProtect => Ok((Unmapper::WriteProtect, "write-protect")),
        _ if !zap_possible && choice == EvictionChoice::Auto => {
            Ok((Unmapper::WriteProtect, "write-protect"))
        }
        _ if !zap_possible => unusable(
            "this kernel has no asynchronous write protection (WP_ASYNC)",
            "use --eviction write-protect, or Linux 6.7 or newer",
        ),
        EvictionChoice::Pageout if swap_is_on() => unusable(
            "swap is on: --eviction pageout would write guest memory to swap",
            "run `swapoff -a`, or use --eviction uring (or auto)",
        ),
        EvictionChoice::Pageout if !page_out_works() => unusable(
            "process_madvise(MADV_PAGEOUT) does not unmap shared memory here",
            "use --eviction uring (or auto)",
        ),
        EvictionChoice::Pageout => Ok((page_out()?, "pageout")),
        EvictionChoice::Auto if !swap_is_on() && page_out_works() => Ok((page_out()?, "pageout")),
        EvictionChoice::Auto | EvictionChoice::Uring => match attach::remote_ring(pid) {
            Ok(ring) => Ok((Unmapper::Ring(Box::new(ring)), "uring")),
            Err(error) if choice == EvictionChoice::Auto => {
                tracing::info!(%error, "no io_uring in the process; using write protection");
                Ok((Unmapper::WriteProtect, "write-protect"))
            }
            Err(error) => unusable(
                &format!("an io_uring cannot be made in the process: {error}"),
                "set kernel.io_uring_disabled=0, or use --eviction write-protect",
            ),
        },
    }
}

/// Opens the RAM file and makes sure that it is the one that the process maps.
pub(super) fn open_ram(path: &Path, target: &Target) -> Result<File, ApiError> {
    let open = || -> std::io::Result<File> {
        let file = File::options().read(true).write(true).open(path)?;
        let metadata = file.metadata()?;
        if (metadata.dev(), metadata.ino()) != (target.device, target.inode) {
            return Err(std::io::Error::other("the file was replaced meanwhile"));
        }
        Ok(file)
    };
    open().map_err(|error| {
        ApiError::new("no-ram-file", format!("cannot open {}", path.display()))
            .detail(error.to_string())
    })
}
