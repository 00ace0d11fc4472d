//! Where an experiment keeps its files.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::Context;
use heca_types::limits::PAGE_BYTES;

/// A directory on tmpfs that is removed when dropped.
pub(super) struct Scratch(pub(super) PathBuf);

impl Scratch {
    pub(super) fn new() -> anyhow::Result<Self> {
        let dir = Path::new("/dev/shm").join(format!("heca-bench-{}", std::process::id()));
        std::fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
        Ok(Self(dir))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A new file for the memory of a target, in the place of the one before.
pub(super) fn new_ram(dir: &Path, pages: usize) -> anyhow::Result<PathBuf> {
    let path = dir.join("ram");
    let _ = std::fs::remove_file(&path);
    File::create_new(&path)?.set_len((pages * PAGE_BYTES) as u64)?;
    Ok(path)
}
