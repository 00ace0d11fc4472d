//! A small Linux guest: Debian's cloud kernel and an initial RAM disk with busybox and test
//! programs.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail, ensure};

use crate::cpio::Archive;

/// A kernel for guests: `HECA_KERNEL`, or one below `target/lab`, or the host's cloud kernel.
///
/// # Errors
/// None of these is there.
pub fn find_kernel() -> anyhow::Result<PathBuf> {
    if let Some(path) = std::env::var_os("HECA_KERNEL") {
        return Ok(path.into());
    }
    // Without cargo's target directory, the host's kernel may still do.
    let fetched = crate::host::target_dir().map(|target| target.join("lab/kernel/boot"));
    for dir in fetched.into_iter().chain([PathBuf::from("/boot")]) {
        let mut found: Vec<PathBuf> = fs::read_dir(&dir)
            .into_iter()
            .flatten()
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| {
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                name.starts_with("vmlinuz-") && name.contains("cloud")
            })
            .collect();
        found.sort();
        if let Some(kernel) = found.pop() {
            return Ok(kernel);
        }
    }
    bail!("no guest kernel: run `make deps`, or name one in HECA_KERNEL")
}

/// A QEMU of version 10: `HECA_QEMU10`, or the one that `make deps` unpacks below `target/lab`.
///
/// # Errors
/// Neither is there.
pub fn find_qemu10() -> anyhow::Result<PathBuf> {
    if let Some(path) = std::env::var_os("HECA_QEMU10") {
        return Ok(path.into());
    }
    let path = crate::host::target_dir()?.join("lab/qemu10/qemu-system-x86_64");
    ensure!(path.is_file(), "no QEMU 10: run `make deps`, or name one in HECA_QEMU10");
    Ok(path)
}

/// The guest program `appmembench`: `HECA_APPMEMBENCH`, or the one that `make build` builds.
///
/// # Errors
/// Neither is there.
pub fn find_appmembench() -> anyhow::Result<PathBuf> {
    if let Some(path) = std::env::var_os("HECA_APPMEMBENCH") {
        return Ok(path.into());
    }
    let triple = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let path = crate::host::target_dir()?.join(triple).join("release/appmembench");
    ensure!(path.is_file(), "no appmembench: run `make build`, or name one in HECA_APPMEMBENCH");
    Ok(path)
}

/// An initial RAM disk under construction.
#[derive(Debug)]
pub struct GuestImage {
    archive: Archive,
    directories: BTreeSet<String>,
    libraries: BTreeSet<PathBuf>,
}

impl GuestImage {
    /// An image with busybox and the directories that a system needs.
    ///
    /// # Errors
    /// No static busybox on this machine.
    pub fn new() -> anyhow::Result<Self> {
        let mut image = Self {
            archive: Archive::default(),
            directories: BTreeSet::new(),
            libraries: BTreeSet::new(),
        };
        for directory in ["bin", "dev", "proc", "sys", "tmp"] {
            image.directory(directory);
        }
        let busybox = ["/bin/busybox", "/usr/bin/busybox"]
            .into_iter()
            .find(|path| Path::new(path).exists())
            .context("no busybox: run `make deps`")?;
        image.archive.program("bin/busybox", &fs::read(busybox)?);
        for applet in ["sh", "mount", "echo", "sleep", "poweroff", "free", "cat", "uname"] {
            image.archive.symlink(&format!("bin/{applet}"), "busybox");
        }
        Ok(image)
    }

    fn directory(&mut self, path: &str) {
        let mut prefix = String::new();
        for part in path.split('/').filter(|part| !part.is_empty()) {
            if !prefix.is_empty() {
                prefix.push('/');
            }
            prefix.push_str(part);
            if self.directories.insert(prefix.clone()) {
                self.archive.directory(&prefix);
            }
        }
    }

    /// Adds a program as `/bin/NAME`, and the shared libraries that it needs.
    ///
    /// # Errors
    /// A program that cannot be read.
    pub fn program(&mut self, name: &str, path: &Path) -> anyhow::Result<()> {
        let content = fs::read(path).with_context(|| format!("read {}", path.display()))?;
        self.archive.program(&format!("bin/{name}"), &content);
        let listed = Command::new("ldd").arg(path).output()?;
        for line in String::from_utf8_lossy(&listed.stdout).lines() {
            // `libc.so.6 => /lib/... (0x...)`, or `/lib64/ld-linux... (0x...)`.
            let after = line.split_once("=>").map_or(line, |(_, after)| after);
            let Some(library) = after.split_whitespace().next() else { continue };
            if library.starts_with('/') {
                self.library(Path::new(library))?;
            }
        }
        Ok(())
    }

    fn library(&mut self, path: &Path) -> anyhow::Result<()> {
        if self.libraries.insert(path.to_owned()) {
            let inside = path.to_string_lossy().trim_start_matches('/').to_owned();
            if let Some((directory, _)) = inside.rsplit_once('/') {
                self.directory(directory);
            }
            self.archive.program(&inside, &fs::read(path)?);
        }
        Ok(())
    }

    /// Adds a stripped copy of a program; symbols would fill the guest's memory.
    ///
    /// # Errors
    /// A program that cannot be read.
    pub fn stripped_program(
        &mut self,
        name: &str,
        path: &Path,
        scratch: &Path,
    ) -> anyhow::Result<()> {
        let copy = scratch.join(format!("{name}.stripped"));
        let stripped = Command::new("strip").arg("-o").arg(&copy).arg(path).status();
        match stripped {
            Ok(status) if status.success() => self.program(name, &copy),
            _ => self.program(name, path),
        }
    }

    /// Ends the image with this `/init` script (run by busybox) and writes it.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn write(mut self, init: &str, path: &Path) -> anyhow::Result<()> {
        let script = format!(
            "#!/bin/sh\nmount -t proc proc /proc\nmount -t sysfs sys /sys\n\
             mount -t devtmpfs dev /dev\nexec </dev/console >/dev/console 2>&1\n{init}\n"
        );
        self.archive.program("init", script.as_bytes());
        fs::write(path, self.archive.finish()).with_context(|| format!("write {}", path.display()))
    }
}
