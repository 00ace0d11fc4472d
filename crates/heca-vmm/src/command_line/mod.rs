//! Builds the command line of a virtual machine whose RAM can be paged.

#[cfg(test)]
mod tests;
mod validate;

use std::path::{Path, PathBuf};

use heca_types::ByteSize;
use serde::{Deserialize, Serialize};

pub use validate::{
    MEMORY_MAX, MEMORY_MIN, MEMORY_STEP, NAME_BYTES_MAX, SpecError, VCPUS_MAX, validate,
};

#[cfg(target_arch = "aarch64")]
const MACHINE: &str = "virt";
#[cfg(not(target_arch = "aarch64"))]
const MACHINE: &str = "q35";

/// The name of guest RAM, for QEMU and in the migration stream; the same one libvirt uses.
pub const RAM_ID: &str = "pc.ram";

/// What executes guest instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accel {
    /// The processor, through /dev/kvm.
    Kvm,
    /// QEMU's translator: works everywhere, many times slower.
    Tcg,
}

/// What the machine starts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Boot {
    /// A Linux kernel from the host.
    Kernel {
        /// The kernel image.
        kernel: PathBuf,
        /// The initial RAM disk, if it needs one.
        initrd: Option<PathBuf>,
    },
    /// The first disk, by its boot loader.
    Disk,
}

/// How the machine reaches a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Network {
    /// Not at all.
    #[default]
    None,
    /// Outgoing connections through QEMU's own stack; needs no privilege.
    User,
}

/// A virtual machine, as its owner describes it. Check it with [`validate`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmSpec {
    /// Its name: a letter or digit, then letters, digits, `_`, `.` and `-`.
    pub name: String,
    /// Guest RAM, local and remote together.
    pub memory: ByteSize,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// What executes guest instructions.
    pub accel: Accel,
    /// What it starts.
    pub boot: Boot,
    /// The kernel's command line; empty unless it boots a kernel.
    #[serde(default)]
    pub append: String,
    /// Disk images, attached in this order: qcow2 if so named, raw otherwise.
    #[serde(default)]
    pub disks: Vec<PathBuf>,
    /// Its network.
    #[serde(default)]
    pub network: Network,
    /// Arguments passed to QEMU as they are, after all others.
    #[serde(default)]
    pub extra_args: Vec<String>,
}

/// Where the files of one running machine are. Chosen by the agent, so they must be UTF-8.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmPaths {
    /// Guest RAM; must be on tmpfs.
    pub ram_file: PathBuf,
    /// Where QEMU listens for control.
    pub qmp_socket: PathBuf,
    /// Where QEMU listens for someone at the serial console.
    pub console_socket: PathBuf,
    /// Where everything the console prints is appended.
    pub console_log: PathBuf,
}

/// The arguments for QEMU, without the program's name. The machine starts paused, so that no page
/// is touched before the pager is attached; [`Qmp::cont`](crate::qmp::Qmp::cont) lets it run.
///
/// Gives an argument list for any input, but only one that QEMU accepts if [`validate`] does.
#[must_use]
pub fn qemu_arguments(spec: &VmSpec, paths: &VmPaths) -> Vec<String> {
    let mut line = Line::default();
    line.option("-name", format!("guest=heca-{},debug-threads=on", escape(&spec.name)));
    line.flags(&["-S", "-nodefaults", "-no-user-config"]);
    line.option("-display", "none");
    line.option("-machine", format!("{MACHINE},memory-backend={RAM_ID},usb=off"));
    let (accel, cpu) = match spec.accel {
        Accel::Kvm => ("kvm", "host"),
        Accel::Tcg => ("tcg,thread=multi", "max"),
    };
    line.option("-accel", accel);
    line.option("-cpu", cpu);
    line.option("-m", format!("{}M", spec.memory.0 >> 20));
    // No discard-data: it would punch the file under a guest that has just migrated away.
    line.option(
        "-object",
        format!(
            "memory-backend-file,id={RAM_ID},size={},mem-path={},share=on,prealloc=off",
            spec.memory.0,
            escape_path(&paths.ram_file)
        ),
    );
    line.option("-smp", spec.vcpus.to_string());
    line.option("-qmp", format!("unix:{},server=on,wait=off", escape_path(&paths.qmp_socket)));
    line.option(
        "-chardev",
        format!(
            "socket,id=console,path={},server=on,wait=off,logfile={},logappend=on",
            escape_path(&paths.console_socket),
            escape_path(&paths.console_log)
        ),
    );
    line.option("-serial", "chardev:console");
    for disk in &spec.disks {
        line.option("-drive", drive(disk));
    }
    if spec.network == Network::User {
        line.option("-nic", "user,model=virtio-net-pci");
    }
    if let Boot::Kernel { kernel, initrd } = &spec.boot {
        // These two are plain paths, not option lists: a comma stays as it is.
        line.option("-kernel", kernel.to_string_lossy());
        if let Some(initrd) = initrd {
            line.option("-initrd", initrd.to_string_lossy());
        }
        if !spec.append.is_empty() {
            line.option("-append", spec.append.as_str());
        }
    }
    line.arguments.extend(spec.extra_args.iter().cloned());
    line.arguments
}

/// A disk goes through the host's page cache: a direct transfer that is in flight into a page while
/// it is evicted would be lost without a trace.
fn drive(disk: &Path) -> String {
    let qcow2 = disk.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("qcow2"));
    let format = if qcow2 { "qcow2" } else { "raw" };
    // QEMU reads `a:b` as protocol a, unless a slash comes first.
    let here = if disk.is_relative() { "./" } else { "" };
    let file = escape_path(disk);
    format!("file={here}{file},if=virtio,format={format},cache=writeback,aio=threads")
}

fn escape_path(path: &Path) -> String {
    escape(&path.to_string_lossy())
}

/// In a value of a QEMU option a comma is written twice.
fn escape(text: &str) -> String {
    text.replace(',', ",,")
}

#[derive(Default)]
struct Line {
    arguments: Vec<String>,
}

impl Line {
    fn flags(&mut self, names: &[&str]) {
        self.arguments.extend(names.iter().map(|&name| name.to_owned()));
    }

    fn option(&mut self, name: &str, value: impl Into<String>) {
        self.arguments.extend([name.to_owned(), value.into()]);
    }
}
