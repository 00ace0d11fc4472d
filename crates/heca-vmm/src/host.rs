//! What this host can run: which QEMU, and whether with the processor's help.

use std::env;
use std::ffi::OsStr;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde::{Deserialize, Serialize};

use crate::QemuVersion;
use crate::command_line::Accel;

#[cfg(target_arch = "aarch64")]
const PROGRAM: &str = "qemu-system-aarch64";
#[cfg(target_arch = "aarch64")]
const PACKAGE: &str = "qemu-system-arm";
#[cfg(not(target_arch = "aarch64"))]
const PROGRAM: &str = "qemu-system-x86_64";
#[cfg(not(target_arch = "aarch64"))]
const PACKAGE: &str = "qemu-system-x86";

/// Which accelerator the user asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AccelChoice {
    /// KVM where it works, else TCG.
    #[default]
    Auto,
    /// KVM or an error.
    Kvm,
    /// TCG.
    Tcg,
}

/// What this host lacks.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// No QEMU in the search path.
    #[error(
        "{PROGRAM} is not in PATH: install it (Debian: apt-get install {PACKAGE}) or give its path"
    )]
    QemuNotFound,
    /// The QEMU that was named cannot be run.
    #[error(
        "{path} is not an executable file: give the path of {PROGRAM}, or leave it out to search \
         PATH (Debian: apt-get install {PACKAGE})",
        path = .path.display()
    )]
    NotExecutable {
        /// What was named.
        path: PathBuf,
    },
    /// Running QEMU failed.
    #[error("cannot run {path} --version: {source}; check the installation", path = .path.display())]
    Run {
        /// The program.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The program does not print a QEMU version.
    #[error("{path} --version printed no qemu version but `{output}`: is it {PROGRAM}?",
        path = .path.display())]
    Version {
        /// The program.
        path: PathBuf,
        /// The start of what it printed.
        output: String,
    },
    /// KVM was asked for and does not work.
    #[error("kvm was asked for but {reason}; or choose tcg, which is much slower")]
    Kvm {
        /// Why it does not work, and how to change that.
        reason: String,
    },
}

/// Finds QEMU for this machine's architecture: the one named, or the first one in `PATH`.
pub fn find_qemu(explicit: Option<&Path>) -> Result<PathBuf, HostError> {
    match explicit {
        Some(path) if is_executable(path) => Ok(path.to_owned()),
        Some(path) => Err(HostError::NotExecutable { path: path.to_owned() }),
        None => search(&env::var_os("PATH").unwrap_or_default()).ok_or(HostError::QemuNotFound),
    }
}

fn search(path: &OsStr) -> Option<PathBuf> {
    env::split_paths(path)
        .filter(|directory| directory.is_absolute())
        .map(|directory| directory.join(PROGRAM))
        .find(|file| is_executable(file))
}

fn is_executable(path: &Path) -> bool {
    let metadata = path.metadata();
    metadata.is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
}

/// Asks a QEMU program for its version.
pub fn qemu_version(path: &Path) -> Result<QemuVersion, HostError> {
    let output = Command::new(path)
        .arg("--version")
        .stdin(Stdio::null())
        .output()
        .map_err(|source| HostError::Run { path: path.to_owned(), source })?;
    let text = String::from_utf8_lossy(&output.stdout);
    QemuVersion::from_banner(&text).ok_or_else(|| HostError::Version {
        path: path.to_owned(),
        output: text.chars().take(160).collect(),
    })
}

/// Whether `/dev/kvm` is there and this process may use it; if not, why.
pub fn kvm_usable() -> Result<(), String> {
    device_usable(Path::new("/dev/kvm"))
}

fn device_usable(path: &Path) -> Result<(), String> {
    let shown = path.display();
    match OpenOptions::new().read(true).write(true).open(path) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(format!(
            "{shown} does not exist: load the kvm module and switch on virtualisation in the \
             firmware, or nested virtualisation if this is itself a virtual machine"
        )),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            Err(format!("{shown} may not be opened by this user: add the user to group kvm"))
        }
        Err(error) => Err(format!("{shown} cannot be opened: {error}")),
    }
}

/// Decides what executes guest instructions.
///
/// Some machines offer a `/dev/kvm` that cannot run Linux guests. So `Auto` takes KVM only if the
/// processor also reports virtualisation; an explicit `Kvm` trusts the user and the device.
pub fn choose_accel(requested: AccelChoice) -> Result<Accel, HostError> {
    let cpuinfo = || fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    decide(requested, kvm_usable, || cpu_virtualises(&cpuinfo()))
}

fn decide(
    requested: AccelChoice,
    usable: impl FnOnce() -> Result<(), String>,
    cpu_virtualises: impl FnOnce() -> bool,
) -> Result<Accel, HostError> {
    match requested {
        AccelChoice::Tcg => Ok(Accel::Tcg),
        AccelChoice::Kvm => match usable() {
            Ok(()) => Ok(Accel::Kvm),
            Err(reason) => Err(HostError::Kvm { reason }),
        },
        AccelChoice::Auto => match usable() {
            Ok(()) if cpu_virtualises() => Ok(Accel::Kvm),
            Ok(()) => {
                tracing::info!("the processor reports no virtualisation, using tcg, not /dev/kvm");
                Ok(Accel::Tcg)
            }
            Err(reason) => {
                tracing::info!(reason, "kvm is not usable, using tcg");
                Ok(Accel::Tcg)
            }
        },
    }
}

/// Whether `/proc/cpuinfo` lists the flag of Intel's or AMD's virtualisation. Other architectures
/// have no such flag; there the device alone decides.
fn cpu_virtualises(cpuinfo: &str) -> bool {
    if !cfg!(target_arch = "x86_64") {
        return true;
    }
    let flags = cpuinfo.lines().filter(|line| line.starts_with("flags"));
    flags.flat_map(str::split_whitespace).any(|flag| flag == "vmx" || flag == "svm")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(directory: &Path, text: &str) -> PathBuf {
        let path = directory.join(PROGRAM);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    #[test]
    fn qemu_is_found_where_it_is_executable() {
        let (empty, full) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::write(empty.path().join(PROGRAM), "not executable").unwrap();
        let found = program(full.path(), "#!/bin/sh\n");
        let path = env::join_paths([Path::new("."), empty.path(), full.path()]).unwrap();
        assert_eq!(search(&path), Some(found.clone()));
        assert_eq!(search(OsStr::new("")), None);
        assert_eq!(find_qemu(Some(&found)).unwrap(), found);
        let error = find_qemu(Some(empty.path())).unwrap_err().to_string();
        assert!(error.contains("apt-get install qemu-system-"), "{error}");
        assert!(HostError::QemuNotFound.to_string().contains("apt-get install qemu-system-"));
    }

    #[test]
    fn versions_are_asked_from_the_program() {
        let directory = tempfile::tempdir().unwrap();
        let missing = directory.path().join("missing");
        assert!(matches!(qemu_version(&missing), Err(HostError::Run { .. })));
        let error = qemu_version(Path::new("/bin/true")).unwrap_err();
        assert!(matches!(error, HostError::Version { .. }), "{error}");
    }

    #[test]
    fn the_accelerator_follows_the_request_and_the_host() {
        let yes = || Ok(());
        let no = || Err("there is none".to_owned());
        let decide = |choice, usable: &dyn Fn() -> Result<(), String>, cpu| {
            decide(choice, usable, || cpu).map_err(|error| error.to_string())
        };
        assert_eq!(decide(AccelChoice::Auto, &yes, true), Ok(Accel::Kvm));
        assert_eq!(decide(AccelChoice::Auto, &yes, false), Ok(Accel::Tcg));
        assert_eq!(decide(AccelChoice::Auto, &no, true), Ok(Accel::Tcg));
        assert_eq!(decide(AccelChoice::Kvm, &yes, false), Ok(Accel::Kvm));
        assert_eq!(decide(AccelChoice::Tcg, &no, false), Ok(Accel::Tcg));
        let error = decide(AccelChoice::Kvm, &no, true).unwrap_err();
        assert!(error.contains("there is none"), "{error}");
    }

    #[test]
    fn a_missing_device_is_explained() {
        let error = device_usable(Path::new("/nonexistent/kvm")).unwrap_err();
        assert!(error.contains("does not exist"), "{error}");
        assert_eq!(device_usable(Path::new("/dev/null")), Ok(()));
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn processor_flags_are_whole_words() {
        assert!(cpu_virtualises("processor: 0\nflags\t\t: fpu vmx sse\n"));
        assert!(cpu_virtualises("flags : svm"));
        assert!(!cpu_virtualises("flags : svm_lock avx\nvmx flags : vnmi\nbugs : svm"));
    }
}
