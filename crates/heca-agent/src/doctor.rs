//! Checks of the machine: what remote memory needs, what is there, and how to mend the rest.

use std::fs;
use std::path::{Path, PathBuf};

use heca_sys::uffd::{Features, Userfaultfd};
use heca_sys::{attach, zap};
use heca_types::ByteSize;
use heca_vmm::host;
use serde::Serialize;

use crate::pager::swap_is_on;

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    /// As it should be.
    Ok,
    /// Works, but not as well as it could.
    Warning,
    /// Remote memory cannot work.
    Failure,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What was looked at.
    pub name: &'static str,
    /// How bad it is.
    pub severity: Severity,
    /// What was found.
    pub finding: String,
    /// The command that mends it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fix: Option<String>,
}

/// Everything that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// In a fixed order.
    pub checks: Vec<Check>,
}

impl Report {
    /// Whether remote memory cannot work on this machine.
    #[must_use]
    pub fn has_failures(&self) -> bool {
        self.checks.iter().any(|check| check.severity == Severity::Failure)
    }
}

fn ok(name: &'static str, finding: impl Into<String>) -> Check {
    Check { name, severity: Severity::Ok, finding: finding.into(), fix: None }
}

fn bad(
    name: &'static str,
    severity: Severity,
    finding: impl Into<String>,
    fix: impl Into<String>,
) -> Check {
    Check { name, severity, finding: finding.into(), fix: Some(fix.into()) }
}

/// Looks at this machine. Changes nothing.
#[must_use]
pub fn examine(memory_dir: &Path) -> Report {
    let mut checks = vec![kernel(), capabilities()];
    checks.extend(userfaultfd());
    checks.extend([
        device(),
        eviction(),
        io_uring(),
        memory(memory_dir),
        huge_pages(),
        locked_memory(),
        idle_latency(),
    ]);
    checks.extend(qemu());
    checks.push(kvm());
    Report { checks }
}

/// Major and minor number of a kernel release.
fn release_numbers(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

fn kernel() -> Check {
    const NAME: &str = "kernel";
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let release = release.trim();
    match release_numbers(release) {
        Some(numbers) if numbers >= (6, 7) => ok(NAME, format!("Linux {release}")),
        _ => bad(
            NAME,
            Severity::Failure,
            format!("Linux {release}; 6.7 or newer is needed"),
            "apt-get install -t bookworm-backports linux-image-amd64 && reboot",
        ),
    }
}

fn capabilities() -> Check {
    const NAME: &str = "capabilities";
    /// Number and name of each capability that the agent uses.
    const NEEDED: [(u32, &str); 3] = [(19, "SYS_PTRACE"), (21, "SYS_ADMIN"), (14, "IPC_LOCK")];
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .unwrap_or(0);
    let missing: Vec<&str> = NEEDED
        .iter()
        .filter(|(number, _)| effective >> number & 1 == 0)
        .map(|(_, name)| *name)
        .collect();
    if missing.is_empty() {
        return ok(NAME, "SYS_PTRACE, SYS_ADMIN, IPC_LOCK");
    }
    bad(NAME, Severity::Failure, format!("missing: {}", missing.join(", ")), "sudo heca doctor")
}

fn userfaultfd() -> Vec<Check> {
    const NAME: &str = "userfaultfd";
    let available = match Userfaultfd::available_features() {
        Ok(features) => features,
        Err(error) => {
            return vec![bad(
                NAME,
                Severity::Failure,
                format!("cannot be used: {error}"),
                "run as root, on a kernel with CONFIG_USERFAULTFD=y",
            )];
        }
    };
    let features = [
        ("missing faults", Features::MISSING_SHMEM, true),
        ("minor faults", Features::MINOR_SHMEM, true),
        ("write protection", Features::WP_HUGETLBFS_SHMEM, true),
        ("asynchronous write protection", Features::WP_ASYNC, false),
        ("poisoning", Features::POISON, false),
    ];
    let lacks = |needed: bool| {
        let missing = features
            .iter()
            .filter(|(_, feature, need)| *need == needed && !available.contains(*feature));
        missing.map(|(name, ..)| *name).collect::<Vec<_>>()
    };
    let newer = "install Linux 6.7 or newer";
    let (hard, soft) = (lacks(true), lacks(false));
    vec![if !hard.is_empty() {
        bad(NAME, Severity::Failure, format!("lacks {}", hard.join(", ")), newer)
    } else if soft.is_empty() {
        ok(NAME, format!("all features ({:#x})", available.0))
    } else {
        bad(NAME, Severity::Warning, format!("lacks {}", soft.join(", ")), newer)
    }]
}

fn device() -> Check {
    const NAME: &str = "/dev/userfaultfd";
    if attach::device_is_usable() {
        return ok(NAME, "can be opened: unprivileged QEMU can be attached");
    }
    bad(
        NAME,
        Severity::Warning,
        "cannot be opened: a QEMU without privileges (as libvirt starts it) cannot be attached",
        "modprobe userfaultfd; ls -l /dev/userfaultfd",
    )
}

fn eviction() -> Check {
    const NAME: &str = "swap and eviction";
    let works = zap::page_out_works().unwrap_or(false);
    if swap_is_on() {
        return bad(
            NAME,
            Severity::Warning,
            "swap is on: eviction uses an io_uring in QEMU instead of MADV_PAGEOUT",
            "swapoff -a",
        );
    }
    if works {
        return ok(NAME, "swap is off, MADV_PAGEOUT unmaps shared memory");
    }
    bad(
        NAME,
        Severity::Warning,
        "MADV_PAGEOUT does not unmap shared memory here: eviction uses an io_uring in QEMU",
        "use Linux 6.7 or newer without restrictions on process_madvise",
    )
}

fn io_uring() -> Check {
    const NAME: &str = "io_uring";
    match fs::read_to_string("/proc/sys/kernel/io_uring_disabled") {
        Ok(value) if value.trim() != "0" => bad(
            NAME,
            Severity::Warning,
            "restricted: with swap on, eviction falls back to write protection",
            "sysctl kernel.io_uring_disabled=0",
        ),
        _ => ok(NAME, "allowed"),
    }
}

fn memory(dir: &Path) -> Check {
    const NAME: &str = "memory directory";
    let shown = dir.display();
    // The directory may not be there yet: look at the part of its path that is.
    let existing: PathBuf = dir.ancestors().find(|d| d.exists()).unwrap_or(dir).to_owned();
    if !crate::store::is_tmpfs(&existing).unwrap_or(false) {
        return bad(
            NAME,
            Severity::Failure,
            format!("{shown} is not on tmpfs"),
            format!("mkdir -p {shown} && mount -t tmpfs -o size=80%,mode=0700 heca {shown}"),
        );
    }
    let Ok(stat) = rustix::fs::statvfs(&existing) else {
        return bad(NAME, Severity::Warning, format!("cannot look at {shown}"), "df -h /dev/shm");
    };
    let (size, free) = (stat.f_blocks * stat.f_frsize, stat.f_bavail * stat.f_frsize);
    let finding = format!("tmpfs of {}, {} free", ByteSize(size), ByteSize(free));
    if free < 256 << 20 {
        let mount = "mount -o remount,size=80% /dev/shm";
        return bad(NAME, Severity::Warning, finding, mount);
    }
    ok(NAME, finding)
}

fn huge_pages() -> Check {
    const NAME: &str = "tmpfs huge pages";
    let mounts = fs::read_to_string("/proc/mounts").unwrap_or_default();
    let huge = mounts.lines().find(|line| {
        line.contains(" /dev/shm tmpfs ") && line.contains("huge=") && !line.contains("huge=never")
    });
    if huge.is_some() {
        return bad(
            NAME,
            Severity::Failure,
            "/dev/shm is mounted with huge pages",
            "mount -o remount,huge=never /dev/shm",
        );
    }
    ok(NAME, "/dev/shm uses small pages")
}

fn locked_memory() -> Check {
    const NAME: &str = "locked memory";
    let limit = rustix::process::getrlimit(rustix::process::Resource::Memlock).current;
    let root = rustix::process::geteuid().is_root();
    match limit {
        Some(bytes) if !root && bytes < 256 << 20 => bad(
            NAME,
            Severity::Warning,
            format!("limit of {}", ByteSize(bytes)),
            "ulimit -l unlimited (systemd: LimitMEMLOCK=infinity)",
        ),
        _ => ok(NAME, "the pager can lock its memory"),
    }
}

fn idle_latency() -> Check {
    const NAME: &str = "wake-up latency";
    if crate::latency::hold().is_some() {
        return ok(NAME, "/dev/cpu_dma_latency can be held while faults are frequent");
    }
    bad(
        NAME,
        Severity::Warning,
        "/dev/cpu_dma_latency cannot be written: each remote fault may wait for sleeping cores",
        "run as root, with CONFIG_CPU_IDLE",
    )
}

fn qemu() -> Vec<Check> {
    const NAME: &str = "QEMU";
    let install = "apt-get install --no-install-recommends qemu-system-x86";
    let path = match host::find_qemu(None) {
        Ok(path) => path,
        Err(error) => return vec![bad(NAME, Severity::Warning, error.to_string(), install)],
    };
    match host::qemu_version(&path) {
        Ok(version) if version.major > 7 || (version.major == 7 && version.minor >= 2) => {
            vec![ok(NAME, format!("{version} at {}", path.display()))]
        }
        Ok(version) => {
            vec![bad(NAME, Severity::Warning, format!("{version}; tested are 7.2 and 10"), install)]
        }
        Err(error) => vec![bad(NAME, Severity::Warning, error.to_string(), install)],
    }
}

fn kvm() -> Check {
    const NAME: &str = "KVM";
    match host::choose_accel(host::AccelChoice::Auto) {
        Ok(heca_vmm::command_line::Accel::Kvm) => ok(NAME, "usable"),
        _ => bad(
            NAME,
            Severity::Warning,
            format!(
                "guests run under TCG, which is many times slower{}",
                host::kvm_usable().err().map(|why| format!(": {why}")).unwrap_or_default()
            ),
            "switch hardware virtualisation on in the firmware, then: modprobe kvm_intel || modprobe kvm_amd",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_releases_compare_by_number() {
        assert_eq!(release_numbers("6.18.44-fc"), Some((6, 18)));
        assert_eq!(release_numbers("6.7.0"), Some((6, 7)));
        assert!(release_numbers("5.19.0-1").is_some_and(|n| n < (6, 7)));
        assert_eq!(release_numbers("garbage"), None);
    }

    #[test]
    fn every_bad_finding_names_a_fix() {
        let report = examine(Path::new("/proc"));
        assert!(report.has_failures(), "/proc is not on tmpfs");
        for check in report.checks {
            assert_eq!(check.fix.is_some(), check.severity != Severity::Ok, "{check:?}");
        }
    }
}
