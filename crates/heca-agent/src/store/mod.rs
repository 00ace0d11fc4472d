//! Page store of a sponsor: regions in sparse tmpfs files that survive a restart of the agent.
//!
//! Each region has two files. `ID.json` names owner, epoch, lease, quota and extents, and is
//! replaced atomically. `ID.pages` is a sequence of slots, one for each extent held: 32 bytes of
//! metadata for each page (version, checksum, flags, tag), then 64 MiB for the pages themselves.
//! Both parts are sparse, so only pages that are stored take memory. The metadata is also held in
//! memory; the file copy is read back at start. [`format`] has the bytes.
//!
//! Order of locks: `lifecycle`, a region's gate, its slots, a slot's metadata, `sponsor`.

pub mod format;
mod lifecycle;
mod region;

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Instant;

use heca_core::sponsor::{Refusal, Region, Sponsor};
use heca_types::limits::PAGE_BYTES;
use heca_types::{ByteSize, Epoch, RegionId, Status, StoreId};
use serde::Serialize;

use format::{FORMAT, StoreFile, decode_store_file};

pub use format::PageMeta;
pub use region::StoredRegion;

/// The page store.
#[derive(Debug)]
pub struct Store {
    dir: PathBuf,
    id: StoreId,
    started: Instant,
    sponsor: Mutex<Sponsor>,
    regions: RwLock<HashMap<RegionId, Arc<StoredRegion>>>,
    /// Held while a region comes, changes its extents or goes, and while the store's own file is
    /// replaced. Requests for pages never take it.
    lifecycle: Mutex<()>,
    draining: AtomicBool,
    pressed: AtomicBool,
}

/// Sizes of a store, in bytes unless named otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoreUsage {
    /// On offer.
    pub offer: u64,
    /// Reserved by regions.
    pub reserved: u64,
    /// Stored.
    pub stored: u64,
    /// Number of regions.
    pub regions: u64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A thread that panicked while it held the lock left no half-done change: each critical
    // section changes its data in one assignment at its end.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn store_failed(what: &str, error: &io::Error) -> Refusal {
    tracing::error!(%error, "page store: {what}");
    let full = error.raw_os_error() == Some(28);
    let advice = if full { ": the tmpfs of the store is full" } else { "" };
    Refusal { status: Status::StoreFailed, text: format!("{what}: {error}{advice}") }
}

fn replace_file(path: &Path, content: &impl Serialize) -> io::Result<()> {
    let temporary = path.with_extension("new");
    fs::write(&temporary, serde_json::to_vec(content)?)?;
    fs::rename(&temporary, path)
}

fn read_identity(dir: &Path) -> anyhow::Result<StoreFile> {
    use anyhow::Context;
    let path = dir.join("store.json");
    match fs::read(&path) {
        Ok(bytes) => decode_store_file(&bytes).with_context(|| format!("read {}", path.display())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let identity = StoreFile { format: FORMAT, id: StoreId::random(), draining: false };
            replace_file(&path, &identity)?;
            Ok(identity)
        }
        Err(error) => Err(error).with_context(|| format!("read {}", path.display())),
    }
}

impl Store {
    /// Opens or creates the store in `dir`, which must be on tmpfs, and takes back the regions of
    /// a former life.
    ///
    /// # Errors
    /// A directory that is not on tmpfs or cannot be written; a store of another format.
    pub fn open(dir: &Path, offer: ByteSize) -> anyhow::Result<Self> {
        use anyhow::Context;
        fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
        // Names of regions are as good as keys to them.
        fs::set_permissions(dir, fs::Permissions::from_mode(0o700))?;
        anyhow::ensure!(
            is_tmpfs(dir)?,
            "{} is not on tmpfs: sponsored memory would go to a disk. \
             Choose a directory under /dev/shm, or mount a tmpfs there",
            dir.display()
        );
        let identity = read_identity(dir)?;
        let store = Self {
            dir: dir.to_owned(),
            id: identity.id,
            started: Instant::now(),
            sponsor: Mutex::new(Sponsor::new(offer.0)),
            regions: RwLock::default(),
            lifecycle: Mutex::default(),
            draining: AtomicBool::new(identity.draining),
            pressed: AtomicBool::new(false),
        };
        store.restore()?;
        store.update_accepting();
        Ok(store)
    }

    fn regions_mut(&self) -> std::sync::RwLockWriteGuard<'_, HashMap<RegionId, Arc<StoredRegion>>> {
        self.regions.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Milliseconds since this store was opened.
    #[must_use]
    pub fn now_ms(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }

    /// Identity of the store's content.
    #[must_use]
    pub fn id(&self) -> StoreId {
        self.id
    }

    /// Sizes.
    #[must_use]
    pub fn usage(&self) -> StoreUsage {
        let sponsor = lock(&self.sponsor);
        let pages: u64 = sponsor.regions().map(|(_, r)| r.stored_pages).sum();
        StoreUsage {
            offer: sponsor.offer_bytes(),
            reserved: sponsor.reserved_bytes(),
            stored: pages * PAGE_BYTES as u64,
            regions: sponsor.regions().count() as u64,
        }
    }

    /// A copy of all regions' records.
    #[must_use]
    pub fn regions(&self) -> Vec<(RegionId, Region)> {
        lock(&self.sponsor).regions().map(|(id, region)| (*id, region.clone())).collect()
    }

    /// Directory of the store.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Whether the store is being emptied: it takes no new extents.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// Begins or ends emptying the store. It is remembered over a restart.
    ///
    /// # Errors
    /// Those of writing the store's file; nothing changes then.
    pub fn set_draining(&self, draining: bool) -> io::Result<()> {
        let _serial = lock(&self.lifecycle);
        let identity = StoreFile { format: FORMAT, id: self.id, draining };
        replace_file(&self.dir.join("store.json"), &identity)?;
        self.draining.store(draining, Ordering::Relaxed);
        self.update_accepting();
        Ok(())
    }

    /// Whether the host is short of memory: the store takes no new extents.
    #[must_use]
    pub fn is_pressed(&self) -> bool {
        self.pressed.load(Ordering::Relaxed)
    }

    /// Notes whether the host is short of memory.
    pub fn set_pressed(&self, pressed: bool) {
        self.pressed.store(pressed, Ordering::Relaxed);
        self.update_accepting();
    }

    fn update_accepting(&self) {
        // Read under the lock: of two threads that set a flag each, the second to come sees both.
        let mut sponsor = lock(&self.sponsor);
        sponsor.accepting = !self.is_draining() && !self.is_pressed();
    }

    fn region(&self, id: RegionId) -> Option<Arc<StoredRegion>> {
        self.regions.read().unwrap_or_else(PoisonError::into_inner).get(&id).cloned()
    }

    /// Whether a request under this epoch may touch the region.
    ///
    /// # Errors
    /// See [`Sponsor::check`].
    pub fn check(&self, id: RegionId, epoch: Epoch) -> Result<(), Refusal> {
        lock(&self.sponsor).check(id, epoch).map(|_| ())
    }

    /// Starts a region's lease anew; returns its length in milliseconds.
    ///
    /// # Errors
    /// See [`Sponsor::check`].
    pub fn renew(&self, id: RegionId, epoch: Epoch) -> Result<u64, Refusal> {
        lock(&self.sponsor).renew(self.now_ms(), id, epoch)
    }
}

/// Whether a path lies on tmpfs.
///
/// # Errors
/// Those of `statfs`.
pub fn is_tmpfs(path: &Path) -> io::Result<bool> {
    const TMPFS_MAGIC: i64 = 0x0102_1994;
    Ok(rustix::fs::statfs(path)?.f_type as i64 == TMPFS_MAGIC)
}
