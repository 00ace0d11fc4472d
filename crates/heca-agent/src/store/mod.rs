//! Page store of a sponsor: regions in sparse tmpfs files that survive a restart of the agent.
//!
//! Each region has two files. `ID.json` names owner, epoch, lease, quota and extents, and is
//! replaced atomically. `ID.pages` is a sequence of slots, one for each extent held: 16 bytes of
//! metadata for each page (version, checksum, flags), then 64 MiB for the pages themselves. Both
//! parts are sparse, so only pages that are stored take memory. The metadata is also held in
//! memory; the file copy is read back at start.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Instant;

use heca_core::sponsor::{OpenRequest, Refusal, Region, Sponsor, check_version};
use heca_types::limits::{EXTENT_BYTES, EXTENT_PAGES, PAGE_BYTES};
use heca_types::{ByteSize, Epoch, ExtentIndex, OwnerId, PageIndex, PageVersion};
use heca_types::{RegionId, Status, StoreId};
use rustix::fs::{FallocateFlags, fallocate};
use serde::{Deserialize, Serialize};

const META_BYTES: u64 = 16;
const SLOT_META_BYTES: u64 = EXTENT_PAGES * META_BYTES;
const SLOT_BYTES: u64 = SLOT_META_BYTES + EXTENT_BYTES;
/// Metadata that a region may have however small its quota is.
const META_BYTES_FREE: u64 = 1 << 20;
const PRESENT: u32 = 1;
const ZERO: u32 = 2;

/// Metadata of one page.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PageMeta {
    /// Version of the content.
    pub version: u32,
    /// Its checksum.
    pub checksum: u32,
    flags: u32,
}

impl PageMeta {
    /// Whether the store has content for the page.
    #[must_use]
    pub fn is_present(self) -> bool {
        self.flags & PRESENT != 0
    }

    /// Whether that content is all zeros, for which no bytes are kept.
    #[must_use]
    pub fn is_zero(self) -> bool {
        self.flags & ZERO != 0
    }

    fn has_bytes(self) -> bool {
        self.is_present() && !self.is_zero()
    }

    fn encode(self) -> [u8; META_BYTES as usize] {
        let mut bytes = [0; META_BYTES as usize];
        bytes[..4].copy_from_slice(&self.version.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.checksum.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.flags.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8]) -> Self {
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));
        Self { version: word(0), checksum: word(4), flags: word(8) }
    }
}

#[derive(Debug)]
struct Slot {
    offset: u64,
    /// Allocated at the first write.
    meta: Mutex<Option<Box<[PageMeta]>>>,
}

/// A region's data.
#[derive(Debug)]
pub struct StoredRegion {
    id: RegionId,
    file: File,
    slots: RwLock<BTreeMap<ExtentIndex, Arc<Slot>>>,
    /// Current epoch. Requests hold it for reading while they work, a takeover for writing: none
    /// of the old owner's requests is under way when the new owner's first begins.
    epoch: RwLock<Epoch>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RegionFile {
    format: u32,
    owner: OwnerId,
    epoch: Epoch,
    quota_bytes: u64,
    lease_ms: u64,
    /// Extent in each slot, in order of the slots.
    slots: Vec<ExtentIndex>,
}

#[derive(Debug, Serialize, Deserialize)]
struct StoreFile {
    format: u32,
    id: StoreId,
}

/// The page store.
#[derive(Debug)]
pub struct Store {
    dir: PathBuf,
    id: StoreId,
    started: Instant,
    sponsor: Mutex<Sponsor>,
    regions: RwLock<HashMap<RegionId, Arc<StoredRegion>>>,
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
        let identity = dir.join("store.json");
        let id = match fs::read(&identity) {
            Ok(bytes) => {
                let file: StoreFile = serde_json::from_slice(&bytes)
                    .with_context(|| format!("read {}", identity.display()))?;
                anyhow::ensure!(file.format == 1, "{} has format {}", dir.display(), file.format);
                file.id
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let id = StoreId::random();
                replace_file(&identity, &StoreFile { format: 1, id })?;
                id
            }
            Err(error) => return Err(error).context(format!("read {}", identity.display())),
        };
        let store = Self {
            dir: dir.to_owned(),
            id,
            started: Instant::now(),
            sponsor: Mutex::new(Sponsor::new(offer.0)),
            regions: RwLock::default(),
        };
        store.restore()?;
        Ok(store)
    }

    fn restore(&self) -> anyhow::Result<()> {
        for entry in fs::read_dir(&self.dir)? {
            let path = entry?.path();
            let name = path.file_stem().and_then(|s| s.to_str()).unwrap_or_default();
            if path.extension().is_none_or(|e| e != "json") || name == "store" {
                continue;
            }
            match self.restore_region(&path, name) {
                Ok(pages) => tracing::info!(region = name, pages, "took back a region"),
                Err(error) => tracing::warn!(region = name, "left a broken region out: {error:#}"),
            }
        }
        Ok(())
    }

    fn restore_region(&self, path: &Path, name: &str) -> anyhow::Result<u64> {
        let description: RegionFile = serde_json::from_slice(&fs::read(path)?)?;
        anyhow::ensure!(description.format == 1, "format {}", description.format);
        let id = RegionId(name.parse()?);
        let file = self.pages_file(id)?;
        let mut slots = BTreeMap::new();
        let mut stored_pages = 0;
        for (number, &extent) in description.slots.iter().enumerate() {
            let offset = number as u64 * SLOT_BYTES;
            let mut bytes = vec![0; SLOT_META_BYTES as usize];
            file.read_exact_at(&mut bytes, offset)?;
            let meta: Box<[PageMeta]> =
                bytes.chunks_exact(META_BYTES as usize).map(PageMeta::decode).collect();
            stored_pages += meta.iter().filter(|m| m.has_bytes()).count() as u64;
            let used = meta.iter().any(|m| m.is_present());
            let slot = Slot { offset, meta: Mutex::new(used.then_some(meta)) };
            slots.insert(extent, Arc::new(slot));
        }
        let region = Region {
            owner: description.owner,
            epoch: description.epoch,
            quota_bytes: description.quota_bytes,
            lease_ms: description.lease_ms,
            expires_ms: 0,
            extents: slots.keys().copied().collect(),
            stored_pages,
        };
        lock(&self.sponsor).restore(self.now_ms(), id, region);
        let stored = StoredRegion {
            id,
            file,
            slots: RwLock::new(slots),
            epoch: RwLock::new(description.epoch),
        };
        self.regions_mut().insert(id, Arc::new(stored));
        Ok(stored_pages)
    }

    fn regions_mut(&self) -> std::sync::RwLockWriteGuard<'_, HashMap<RegionId, Arc<StoredRegion>>> {
        self.regions.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn pages_file(&self, id: RegionId) -> io::Result<File> {
        let path = self.dir.join(format!("{id}.pages"));
        File::options().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)
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

    /// Opens a region; see [`Sponsor::open`]. Returns lease and pages stored.
    ///
    /// # Errors
    /// As there, and those of the store's files.
    pub fn open_region(&self, request: &OpenRequest) -> Result<(u64, u64), Refusal> {
        let meta_bytes = request.extents.len() as u64 * SLOT_META_BYTES;
        if meta_bytes > request.quota_bytes.max(META_BYTES_FREE) {
            let text = format!(
                "a quota of {} bytes is too small for {} extents",
                request.quota_bytes,
                request.extents.len()
            );
            return Err(Refusal { status: Status::OverQuota, text });
        }
        let known = self.region(request.region);
        // Wait until no request of the former epoch is under way.
        let mut gate =
            known.as_ref().map(|r| r.epoch.write().unwrap_or_else(PoisonError::into_inner));
        let mut sponsor = lock(&self.sponsor);
        let region = sponsor.open(self.now_ms(), request)?.clone();
        let stored = match &known {
            Some(stored) => stored.clone(),
            None => {
                let file = self
                    .pages_file(request.region)
                    .map_err(|error| store_failed("create a region file", &error))?;
                Arc::new(StoredRegion {
                    id: request.region,
                    file,
                    slots: RwLock::default(),
                    epoch: RwLock::new(request.epoch),
                })
            }
        };
        if let Err(error) = self.describe(&stored, &region) {
            if known.is_none() {
                let _ = sponsor.close(request.region, request.epoch);
                self.delete_files(request.region);
            }
            return Err(store_failed("write a region file", &error));
        }
        if let Some(gate) = gate.as_deref_mut() {
            *gate = region.epoch;
        }
        self.regions_mut().insert(request.region, stored);
        Ok((region.lease_ms, region.stored_pages))
    }

    /// Makes slots for the region's extents and writes its description.
    fn describe(&self, stored: &StoredRegion, region: &Region) -> io::Result<()> {
        let mut slots = stored.slots.write().unwrap_or_else(PoisonError::into_inner);
        for &extent in &region.extents {
            let offset = slots.len() as u64 * SLOT_BYTES;
            slots
                .entry(extent)
                .or_insert_with(|| Arc::new(Slot { offset, meta: Mutex::new(None) }));
        }
        stored.file.set_len(slots.len() as u64 * SLOT_BYTES)?;
        let mut order: Vec<_> = slots.iter().map(|(extent, slot)| (slot.offset, *extent)).collect();
        order.sort_unstable();
        let description = RegionFile {
            format: 1,
            owner: region.owner,
            epoch: region.epoch,
            quota_bytes: region.quota_bytes,
            lease_ms: region.lease_ms,
            slots: order.into_iter().map(|(_, extent)| extent).collect(),
        };
        replace_file(&self.dir.join(format!("{}.json", stored.id)), &description)
    }

    fn region(&self, id: RegionId) -> Option<Arc<StoredRegion>> {
        self.regions.read().unwrap_or_else(PoisonError::into_inner).get(&id).cloned()
    }

    /// Starts a region's lease anew; returns its length in milliseconds.
    ///
    /// # Errors
    /// See [`Sponsor::check`].
    pub fn renew(&self, id: RegionId, epoch: Epoch) -> Result<u64, Refusal> {
        lock(&self.sponsor).renew(self.now_ms(), id, epoch)
    }

    /// Gives up a region and frees its memory.
    ///
    /// # Errors
    /// See [`Sponsor::check`].
    pub fn close_region(&self, id: RegionId, epoch: Epoch) -> Result<(), Refusal> {
        lock(&self.sponsor).close(id, epoch)?;
        self.forget(id);
        Ok(())
    }

    /// Frees the regions whose lease ran out; returns their ids.
    pub fn expire(&self) -> Vec<RegionId> {
        let expired = lock(&self.sponsor).expire(self.now_ms());
        for id in &expired {
            self.forget(*id);
        }
        expired
    }

    fn forget(&self, id: RegionId) {
        self.regions_mut().remove(&id);
        self.delete_files(id);
    }

    fn delete_files(&self, id: RegionId) {
        for extension in ["json", "pages"] {
            let _ = fs::remove_file(self.dir.join(format!("{id}.{extension}")));
        }
    }

    /// Runs `work` on a region under an epoch, while no takeover can happen.
    ///
    /// # Errors
    /// See [`Sponsor::check`], and those of `work`.
    pub fn with_region<T>(
        &self,
        id: RegionId,
        epoch: Epoch,
        work: impl FnOnce(&StoredRegion) -> Result<T, Refusal>,
    ) -> Result<T, Refusal> {
        lock(&self.sponsor).check(id, epoch)?;
        let Some(region) = self.region(id) else {
            let text = format!("region {id} is not held here");
            return Err(Refusal { status: Status::UnknownRegion, text });
        };
        let gate = region.epoch.read().unwrap_or_else(PoisonError::into_inner);
        if *gate != epoch {
            let text = format!("region {id} was taken over under epoch {}", gate.0);
            return Err(Refusal { status: Status::StaleEpoch, text });
        }
        work(&region)
    }

    /// Stores one page; `bytes` is `None` for a page of zeros. The caller checked the checksum.
    ///
    /// # Errors
    /// A page not held here, an older version than the stored one, a full quota, a failed store.
    pub fn write(
        &self,
        region: &StoredRegion,
        epoch: Epoch,
        page: PageIndex,
        (version, checksum): (PageVersion, u32),
        content: Option<&[u8]>,
    ) -> Result<(), Refusal> {
        let slot = region.slot(page)?;
        let mut guard = lock(&slot.meta);
        let metas = guard.get_or_insert_with(|| {
            vec![PageMeta::default(); EXTENT_PAGES as usize].into_boxed_slice()
        });
        let old = metas[page.within_extent()];
        check_version(old.is_present().then_some(PageVersion(old.version)), version)?;
        let flags = if content.is_some() { PRESENT } else { PRESENT | ZERO };
        let new = PageMeta { version: version.0, checksum, flags };
        if new.has_bytes() && !old.has_bytes() {
            lock(&self.sponsor).claim_page(region.id, epoch)?;
        }
        let written = match content {
            Some(bytes) => region.file.write_all_at(bytes, slot.data_offset(page)),
            None if old.has_bytes() => region.punch(&slot, page),
            None => Ok(()),
        }
        .and_then(|()| region.file.write_all_at(&new.encode(), slot.meta_offset(page)));
        if let Err(error) = written {
            if new.has_bytes() && !old.has_bytes() {
                lock(&self.sponsor).release_pages(region.id, 1);
            }
            return Err(store_failed("store a page", &error));
        }
        if old.has_bytes() && !new.has_bytes() {
            lock(&self.sponsor).release_pages(region.id, 1);
        }
        metas[page.within_extent()] = new;
        Ok(())
    }

    /// Frees a page.
    ///
    /// # Errors
    /// A page not held here, a failed store.
    pub fn discard(&self, region: &StoredRegion, page: PageIndex) -> Result<(), Refusal> {
        let slot = region.slot(page)?;
        let mut guard = lock(&slot.meta);
        let Some(metas) = guard.as_mut() else { return Ok(()) };
        let old = std::mem::take(&mut metas[page.within_extent()]);
        if old.has_bytes() {
            lock(&self.sponsor).release_pages(region.id, 1);
            region.punch(&slot, page).map_err(|error| store_failed("free a page", &error))?;
        }
        let cleared = PageMeta::default().encode();
        region
            .file
            .write_all_at(&cleared, slot.meta_offset(page))
            .map_err(|error| store_failed("free a page", &error))
    }
}

impl Slot {
    fn meta_offset(&self, page: PageIndex) -> u64 {
        self.offset + page.within_extent() as u64 * META_BYTES
    }

    fn data_offset(&self, page: PageIndex) -> u64 {
        self.offset + SLOT_META_BYTES + (page.within_extent() * PAGE_BYTES) as u64
    }
}

impl StoredRegion {
    fn slot(&self, page: PageIndex) -> Result<Arc<Slot>, Refusal> {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        slots.get(&page.extent()).cloned().ok_or_else(|| Refusal {
            status: Status::OutOfRange,
            text: format!("{page} lies in extent {}, which is not held here", page.extent().0),
        })
    }

    fn punch(&self, slot: &Slot, page: PageIndex) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&self.file, flags, slot.data_offset(page), PAGE_BYTES as u64)?;
        Ok(())
    }

    /// Metadata of a page; the default for a page that was never stored.
    ///
    /// # Errors
    /// A page not held here.
    pub fn stat(&self, page: PageIndex) -> Result<PageMeta, Refusal> {
        let slot = self.slot(page)?;
        let guard = lock(&slot.meta);
        Ok(guard.as_ref().map_or_else(PageMeta::default, |metas| metas[page.within_extent()]))
    }

    /// Appends a page's bytes to `out` if the store has bytes for it, in the version asked for.
    ///
    /// # Errors
    /// A page not held here, a failed store.
    pub fn read(
        &self,
        page: PageIndex,
        version: PageVersion,
        out: &mut Vec<u8>,
    ) -> Result<PageMeta, Refusal> {
        let slot = self.slot(page)?;
        // Held while the bytes are read, so that a write cannot tear them.
        let guard = lock(&slot.meta);
        let meta =
            guard.as_ref().map_or_else(PageMeta::default, |metas| metas[page.within_extent()]);
        if meta.has_bytes() && meta.version == version.0 {
            let start = out.len();
            out.resize(start + PAGE_BYTES, 0);
            let read = self.file.read_exact_at(&mut out[start..], slot.data_offset(page));
            if let Err(error) = read {
                out.truncate(start);
                return Err(store_failed("read a page", &error));
            }
        }
        Ok(meta)
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
