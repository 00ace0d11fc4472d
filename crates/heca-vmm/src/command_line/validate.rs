//! Checks a description of a machine before anything is started.

use std::path::{Path, PathBuf};

use heca_types::ByteSize;

use super::{Boot, VmPaths, VmSpec, qemu_arguments};
use crate::screen::{Severity, screen_qemu_arguments};

/// Least guest memory; less does not boot a current Linux.
pub const MEMORY_MIN: ByteSize = ByteSize(64 << 20);
/// Most guest memory.
pub const MEMORY_MAX: ByteSize = ByteSize(1 << 40);
/// Guest memory comes in multiples of this.
pub const MEMORY_STEP: ByteSize = ByteSize(1 << 20);
/// Most virtual CPUs.
pub const VCPUS_MAX: u32 = 256;
/// Longest name.
pub const NAME_BYTES_MAX: usize = 63;

/// What is wrong with a description of a machine.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// The name has a character or a length that files and tools cannot take.
    #[error(
        "`{name}` is not a machine name: use 1 to {NAME_BYTES_MAX} letters, digits, `_`, `.` or \
         `-`, and start with a letter or digit"
    )]
    Name {
        /// The name.
        name: String,
    },
    /// Too little or too much memory.
    #[error("{memory} is not a usable memory size: choose between {MEMORY_MIN} and {MEMORY_MAX}")]
    MemoryRange {
        /// The size.
        memory: ByteSize,
    },
    /// Not a whole number of megabytes.
    #[error("a memory of {bytes} bytes is not a multiple of {MEMORY_STEP}: round it, such as 512M")]
    MemoryStep {
        /// The size.
        bytes: u64,
    },
    /// No virtual CPU, or too many.
    #[error("{vcpus} virtual cpus cannot be had: choose between 1 and {VCPUS_MAX}")]
    Vcpus {
        /// The number.
        vcpus: u32,
    },
    /// A file that the machine needs is missing.
    #[error("the {role} {path} is not an existing file: check the path", path = .path.display())]
    NoFile {
        /// `kernel`, `initrd` or `disk`.
        role: &'static str,
        /// Its path.
        path: PathBuf,
    },
    /// A path that cannot be put on a QEMU command line as it is.
    #[error("the path of the {role} {path:?} is not UTF-8 text: rename the file")]
    PathNotText {
        /// `kernel`, `initrd` or `disk`.
        role: &'static str,
        /// Its path.
        path: PathBuf,
    },
    /// Neither a kernel nor a disk.
    #[error("there is nothing to boot: give a kernel or at least one disk")]
    NothingToBoot,
    /// A kernel command line without a kernel.
    #[error("a kernel command line needs a kernel: give one, or set it in the disk's boot loader")]
    AppendWithoutKernel,
    /// The extra arguments make the machine unfit for remote memory.
    #[error("the extra qemu arguments cannot be used with remote memory: {what}: {why}; {fix}")]
    ExtraArgument {
        /// The argument at fault.
        what: String,
        /// Why it does not work.
        why: String,
        /// What to do instead.
        fix: String,
    },
}

/// Checks that QEMU can start this machine and that its RAM can be paged. Looks at the file system
/// for the kernel and the disks, so that a missing one is said before anything is set up.
///
/// Warnings about extra arguments are not errors; see [`screen_qemu_arguments`] for them.
pub fn validate(spec: &VmSpec) -> Result<(), SpecError> {
    if !name_is_valid(&spec.name) {
        return Err(SpecError::Name { name: spec.name.clone() });
    }
    if spec.memory < MEMORY_MIN || spec.memory > MEMORY_MAX {
        return Err(SpecError::MemoryRange { memory: spec.memory });
    }
    if !spec.memory.0.is_multiple_of(MEMORY_STEP.0) {
        return Err(SpecError::MemoryStep { bytes: spec.memory.0 });
    }
    if !(1..=VCPUS_MAX).contains(&spec.vcpus) {
        return Err(SpecError::Vcpus { vcpus: spec.vcpus });
    }
    check_boot(spec)?;
    for disk in &spec.disks {
        check_file("disk", disk)?;
    }
    check_extra_arguments(spec)
}

fn name_is_valid(name: &str) -> bool {
    name.len() <= NAME_BYTES_MAX
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte))
}

fn check_boot(spec: &VmSpec) -> Result<(), SpecError> {
    match &spec.boot {
        Boot::Kernel { kernel, initrd } => {
            check_file("kernel", kernel)?;
            initrd.as_ref().map_or(Ok(()), |initrd| check_file("initrd", initrd))
        }
        Boot::Disk if spec.disks.is_empty() => Err(SpecError::NothingToBoot),
        Boot::Disk if !spec.append.is_empty() => Err(SpecError::AppendWithoutKernel),
        Boot::Disk => Ok(()),
    }
}

fn check_file(role: &'static str, path: &Path) -> Result<(), SpecError> {
    if path.to_str().is_none() {
        return Err(SpecError::PathNotText { role, path: path.to_owned() });
    }
    // Disks may be block devices, so anything but a directory will do.
    match path.metadata() {
        Ok(metadata) if !metadata.is_dir() => Ok(()),
        _ => Err(SpecError::NoFile { role, path: path.to_owned() }),
    }
}

/// Screens the whole line, since an extra `-machine` or `-object` changes what comes before it.
fn check_extra_arguments(spec: &VmSpec) -> Result<(), SpecError> {
    let placeholder = |name: &str| Path::new("/dev/shm").join(name);
    let paths = VmPaths {
        ram_file: placeholder("ram"),
        qmp_socket: placeholder("qmp"),
        console_socket: placeholder("console"),
        console_log: placeholder("log"),
    };
    let mut findings = screen_qemu_arguments(&qemu_arguments(spec, &paths)).into_iter();
    match findings.find(|finding| finding.severity == Severity::Refuse) {
        Some(finding) => {
            Err(SpecError::ExtraArgument { what: finding.what, why: finding.why, fix: finding.fix })
        }
        None => Ok(()),
    }
}
