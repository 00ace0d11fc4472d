//! The pages of one region.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use heca_core::sponsor::{Refusal, check_version};
use heca_types::limits::{EXTENT_PAGES, PAGE_BYTES};
use heca_types::{Epoch, ExtentIndex, PageIndex, PageVersion, RegionId, Status};
use rustix::fs::{FallocateFlags, fallocate};

use super::format::{FormatError, META_BYTES, PageMeta, SLOT_BYTES, SLOT_META_BYTES, decode_metas};
use super::{Store, lock, store_failed};

#[derive(Debug)]
pub(super) struct Slot {
    number: u64,
    /// Allocated at the first write.
    meta: Mutex<Option<Box<[PageMeta]>>>,
}

/// The slots of a region's file. A slot is held by an extent, free, or neither: one that was
/// released is free only once its bytes are gone.
#[derive(Debug, Default)]
pub(super) struct Slots {
    pub(super) held: BTreeMap<ExtentIndex, Arc<Slot>>,
    free: BTreeSet<u64>,
    count: u64,
}

/// Slots that extents were taken out of.
pub(super) struct FreedSlots {
    pub(super) numbers: Vec<u64>,
    pub(super) stored_pages: u64,
}

/// Slots that were read back from a file.
pub(super) struct RestoredSlots {
    pub(super) slots: Slots,
    pub(super) stored_pages: u64,
    pub(super) broken_pages: usize,
    pub(super) first_error: Option<FormatError>,
}

impl Slots {
    pub(super) fn file_bytes(&self) -> u64 {
        self.count * SLOT_BYTES
    }

    /// The extent in each slot.
    pub(super) fn order(&self) -> Vec<Option<ExtentIndex>> {
        let mut order = vec![None; self.count as usize];
        for (extent, slot) in &self.held {
            order[slot.number as usize] = Some(*extent);
        }
        order
    }

    /// Gives an extent a slot if it has none.
    pub(super) fn add(&mut self, extent: ExtentIndex) {
        let (free, count) = (&mut self.free, &mut self.count);
        self.held.entry(extent).or_insert_with(|| {
            let number = free.pop_first().unwrap_or_else(|| {
                *count += 1;
                *count - 1
            });
            Arc::new(Slot { number, meta: Mutex::new(None) })
        });
    }

    /// Takes extents out of their slots. The slots are not free yet.
    pub(super) fn remove(&mut self, extents: &[ExtentIndex]) -> FreedSlots {
        let mut freed = FreedSlots { numbers: Vec::new(), stored_pages: 0 };
        for extent in extents {
            let Some(slot) = self.held.remove(extent) else { continue };
            freed.numbers.push(slot.number);
            let metas = lock(&slot.meta).take().unwrap_or_default();
            freed.stored_pages += metas.iter().filter(|m| m.has_bytes()).count() as u64;
        }
        freed
    }

    /// Reads the slots of a file back.
    pub(super) fn restore(
        file: &File,
        order: &[Option<ExtentIndex>],
    ) -> anyhow::Result<RestoredSlots> {
        let slots = Slots { count: order.len() as u64, ..Slots::default() };
        let mut restored =
            RestoredSlots { slots, stored_pages: 0, broken_pages: 0, first_error: None };
        let mut bytes = vec![0; SLOT_META_BYTES as usize];
        for (number, extent) in (0..).zip(order) {
            let Some(extent) = *extent else {
                // It may have been released and not scrubbed when the former life ended.
                punch_slot(file, number)?;
                restored.slots.free.insert(number);
                continue;
            };
            file.read_exact_at(&mut bytes, number * SLOT_BYTES)?;
            let metas = decode_metas(&bytes)?;
            let used = metas.pages.iter().any(|m| m.is_present());
            restored.stored_pages += metas.pages.iter().filter(|m| m.has_bytes()).count() as u64;
            restored.broken_pages += metas.broken.len();
            restored.first_error = restored.first_error.or(metas.first_error);
            let slot = Slot { number, meta: Mutex::new(used.then_some(metas.pages)) };
            for position in metas.broken {
                // Nobody will ask for these bytes, and the quota does not count them.
                let page = PageIndex(position as u64);
                punch(file, slot.data_offset(page), PAGE_BYTES as u64)?;
                file.write_all_at(&PageMeta::default().encode(), slot.meta_offset(page))?;
            }
            restored.slots.held.insert(extent, Arc::new(slot));
        }
        Ok(restored)
    }
}

fn punch(file: &File, offset: u64, bytes: u64) -> io::Result<()> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    Ok(fallocate(file, flags, offset, bytes)?)
}

fn punch_slot(file: &File, number: u64) -> io::Result<()> {
    punch(file, number * SLOT_BYTES, SLOT_BYTES)
}

/// A region's data.
#[derive(Debug)]
pub struct StoredRegion {
    pub(super) id: RegionId,
    pub(super) file: File,
    pub(super) slots: RwLock<Slots>,
    /// Current epoch, or none once the region is gone. Requests hold it for reading while they
    /// work, a takeover for writing: none of the old owner's requests is under way when the new
    /// owner's first begins.
    pub(super) gate: RwLock<Option<Epoch>>,
    /// Connection that opened the region last.
    pub(super) opener: AtomicU64,
}

impl Store {
    /// Stores one page; `content` is `None` for a page of zeros. The caller checked the checksum.
    ///
    /// # Errors
    /// A page not held here, an older version than the stored one, a full quota, a failed store.
    pub fn write(
        &self,
        region: &StoredRegion,
        epoch: Epoch,
        page: PageIndex,
        new: PageMeta,
        content: Option<&[u8]>,
    ) -> Result<(), Refusal> {
        debug_assert_eq!(new.has_bytes(), content.is_some());
        let slot = region.slot(page)?;
        let mut guard = lock(&slot.meta);
        let metas = guard.get_or_insert_with(|| {
            vec![PageMeta::default(); EXTENT_PAGES as usize].into_boxed_slice()
        });
        let old = metas[page.within_extent()];
        check_version(
            old.is_present().then_some(PageVersion(old.version)),
            PageVersion(new.version),
        )?;
        if new.has_bytes() && !old.has_bytes() {
            lock(&self.sponsor).claim_page(region.id, epoch)?;
        }
        // The bytes first, then the metadata. Killed in between, the store has the old metadata over
        // the new bytes (or over zeros, after a punch), and whoever reads the old version notices:
        // the old checksum covers the old bytes, the page's index and the old version. Two cases pass
        // that check, and both are right: new bytes that equal the old ones, and old metadata that
        // says "all zeros", for which no bytes are looked at. Metadata is never torn: 32 bytes that
        // do not cross a page are copied by one system call that a signal does not interrupt.
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
        self.number * SLOT_BYTES + page.within_extent() as u64 * META_BYTES as u64
    }

    fn data_offset(&self, page: PageIndex) -> u64 {
        self.number * SLOT_BYTES + SLOT_META_BYTES + (page.within_extent() * PAGE_BYTES) as u64
    }
}

impl StoredRegion {
    /// Refuses a request of an earlier connection than the one that opened the region last, under
    /// the same epoch.
    pub(super) fn refuse_late(
        &self,
        current: Option<Epoch>,
        epoch: Epoch,
        connection: u64,
    ) -> Result<(), Refusal> {
        if current != Some(epoch) || self.opener.load(Ordering::Relaxed) <= connection {
            return Ok(());
        }
        let text = format!("region {}: a newer connection of its owner is in use", self.id);
        Err(Refusal { status: Status::Superseded, text })
    }

    fn slot(&self, page: PageIndex) -> Result<Arc<Slot>, Refusal> {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        slots.held.get(&page.extent()).cloned().ok_or_else(|| Refusal {
            status: Status::OutOfRange,
            text: format!("{page} lies in extent {}, which is not held here", page.extent().0),
        })
    }

    fn punch(&self, slot: &Slot, page: PageIndex) -> io::Result<()> {
        punch(&self.file, slot.data_offset(page), PAGE_BYTES as u64)
    }

    /// Frees the memory of released slots, metadata and pages, and lets them be used again. A slot
    /// for which that fails is left unused: freed memory never shows what it held.
    pub(super) fn scrub(&self, numbers: &[u64]) -> io::Result<()> {
        let mut outcome = Ok(());
        for &number in numbers {
            match punch_slot(&self.file, number) {
                Ok(()) => {
                    let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
                    slots.free.insert(number);
                }
                Err(error) => outcome = Err(error),
            }
        }
        outcome
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
