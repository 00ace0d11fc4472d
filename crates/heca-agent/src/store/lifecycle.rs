//! How regions come, change their extents, and go.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use heca_core::sponsor::{OpenRequest, Refusal, Region, ReleaseRequest, Released};
use heca_types::{Epoch, ExtentIndex, OwnerId, RegionId, Status};

use super::format::{FORMAT, RegionFile, SLOT_META_BYTES, decode_region_file};
use super::region::{Slots, StoredRegion};
use super::{Store, lock, replace_file, store_failed};

/// Metadata that a region may have however small its quota is, in bytes.
const META_BYTES_FREE: u64 = 1 << 20;

/// Metadata is not counted in a quota, but it must not be the larger part.
fn check_metadata(extents: usize, quota_bytes: u64) -> Result<(), Refusal> {
    if extents as u64 * SLOT_META_BYTES <= quota_bytes.max(META_BYTES_FREE) {
        return Ok(());
    }
    let text = format!(
        "a quota of {quota_bytes} bytes is too small for {extents} extents: each needs {} KiB; \
         ask for a larger quota or hold fewer extents here",
        SLOT_META_BYTES >> 10
    );
    Err(Refusal { status: Status::OverQuota, text })
}

impl Store {
    pub(super) fn restore(&self) -> anyhow::Result<()> {
        for entry in fs::read_dir(&self.dir)? {
            let path = entry?.path();
            let name = path.file_stem().and_then(|s| s.to_str()).unwrap_or_default();
            if path.extension().is_none_or(|e| e != "json") || name == "store" {
                continue;
            }
            match self.restore_region(&path, name) {
                Ok(pages) => tracing::info!(region = name, pages, "took back a region"),
                Err(error) => tracing::warn!(
                    region = name,
                    "left a broken region out; remove {name}.json and {name}.pages in {} to free \
                     its memory: {error:#}",
                    self.dir.display()
                ),
            }
        }
        Ok(())
    }

    fn restore_region(&self, path: &Path, name: &str) -> anyhow::Result<u64> {
        let description = decode_region_file(&fs::read(path)?)?;
        let id = RegionId(name.parse()?);
        let file = self.pages_file(id, false)?;
        let restored = Slots::restore(&file, &description.slots)?;
        if let Some(error) = &restored.first_error {
            let pages = restored.broken_pages;
            tracing::warn!(region = name, pages, "left out pages with broken metadata: {error}");
        }
        let region = Region {
            owner: description.owner,
            epoch: description.epoch,
            quota_bytes: description.quota_bytes,
            lease_ms: description.lease_ms,
            expires_ms: 0,
            extents: restored.slots.held.keys().copied().collect(),
            stored_pages: restored.stored_pages,
        };
        lock(&self.sponsor).restore(self.now_ms(), id, region);
        let stored = StoredRegion {
            id,
            file,
            slots: RwLock::new(restored.slots),
            gate: RwLock::new(Some(description.epoch)),
            opener: AtomicU64::new(0),
        };
        self.regions_mut().insert(id, Arc::new(stored));
        Ok(restored.stored_pages)
    }

    /// A file without a description may be there from a region that was left out: what it holds
    /// must not come back as the content of a new region.
    fn pages_file(&self, id: RegionId, fresh: bool) -> io::Result<File> {
        let path = self.dir.join(format!("{id}.pages"));
        File::options().read(true).write(true).create(true).truncate(fresh).mode(0o600).open(path)
    }

    /// Opens a region; see [`Sponsor::open`](heca_core::sponsor::Sponsor::open). Returns lease and
    /// pages stored. `connection` is the number of the connection that asks: later ones have
    /// higher numbers.
    ///
    /// # Errors
    /// As there, those of the store's files, and a request that waited in a connection that its
    /// owner gave up for a newer one.
    pub fn open_region(
        &self,
        request: &OpenRequest,
        connection: u64,
    ) -> Result<(u64, u64), Refusal> {
        let id = request.region;
        let _serial = lock(&self.lifecycle);
        let known = self.region(id);
        // Wait until no request of the former epoch is under way.
        let mut gate =
            known.as_ref().map(|r| r.gate.write().unwrap_or_else(PoisonError::into_inner));
        if let Some(known) = &known {
            known.refuse_late(self.region_epoch(id), request.epoch, connection)?;
        }
        let region = {
            let mut sponsor = lock(&self.sponsor);
            let held = sponsor.region(id).map_or(&[][..], |region| &region.extents);
            let added = request.extents.iter().filter(|e| held.binary_search(e).is_err()).count();
            if added > 0 {
                check_metadata(held.len() + added, request.quota_bytes)?;
            }
            sponsor.open(self.now_ms(), request)?.clone()
        };
        let described = match &known {
            Some(stored) => Ok(stored.clone()),
            None => self.pages_file(id, true).map(|file| {
                let (slots, gate) = (RwLock::default(), RwLock::new(Some(request.epoch)));
                let opener = AtomicU64::new(connection);
                Arc::new(StoredRegion { id, file, slots, gate, opener })
            }),
        }
        .and_then(|stored| self.describe(&stored, &region).map(|()| stored));
        let stored = match described {
            Ok(stored) => stored,
            Err(error) => {
                if known.is_none() {
                    let _ = lock(&self.sponsor).close(id, request.epoch, request.owner);
                    self.delete_files(id);
                }
                return Err(store_failed("write a region's files", &error));
            }
        };
        if let Some(gate) = gate.as_deref_mut() {
            *gate = Some(region.epoch);
        }
        stored.opener.store(connection, Ordering::Relaxed);
        self.regions_mut().insert(id, stored);
        Ok((region.lease_ms, region.stored_pages))
    }

    fn region_epoch(&self, id: RegionId) -> Option<Epoch> {
        lock(&self.sponsor).region(id).map(|region| region.epoch)
    }

    /// Makes slots for the region's extents and writes its description.
    fn describe(&self, stored: &StoredRegion, region: &Region) -> io::Result<()> {
        let mut slots = stored.slots.write().unwrap_or_else(PoisonError::into_inner);
        for &extent in &region.extents {
            slots.add(extent);
        }
        stored.file.set_len(slots.file_bytes())?;
        let description = RegionFile {
            format: FORMAT,
            owner: region.owner,
            epoch: region.epoch,
            quota_bytes: region.quota_bytes,
            lease_ms: region.lease_ms,
            slots: slots.order(),
        };
        replace_file(&self.dir.join(format!("{}.json", stored.id)), &description)
    }

    /// Gives back extents of a region and frees their memory; see
    /// [`Sponsor::release`](heca_core::sponsor::Sponsor::release).
    ///
    /// # Errors
    /// As there, a quota too small for what is left, those of the store's files, and a request that
    /// waited in a connection that its owner gave up for a newer one: what it released may have
    /// been asked for again since.
    pub fn release_extents(
        &self,
        request: &ReleaseRequest,
        connection: u64,
    ) -> Result<(), Refusal> {
        let id = request.region;
        let serial = lock(&self.lifecycle);
        self.check(id, request.epoch)?;
        let Some(stored) = self.region(id) else { return Err(not_held(id)) };
        let mut gate = stored.gate.write().unwrap_or_else(PoisonError::into_inner);
        stored.refuse_late(Some(request.epoch), request.epoch, connection)?;
        let kept = {
            let mut sponsor = lock(&self.sponsor);
            let region = sponsor.check(id, request.epoch)?;
            let gone: HashSet<ExtentIndex> = request.extents.iter().copied().collect();
            let left = region.extents.iter().filter(|extent| !gone.contains(extent)).count();
            check_metadata(left, request.quota_bytes.min(region.quota_bytes))?;
            match sponsor.release(self.now_ms(), request)? {
                Released::Kept(region) => Some(region.clone()),
                Released::Closed => None,
            }
        };
        let Some(region) = kept else {
            *gate = None;
            self.forget(id);
            return Ok(());
        };
        let freed = {
            let mut slots = stored.slots.write().unwrap_or_else(PoisonError::into_inner);
            slots.remove(&request.extents)
        };
        lock(&self.sponsor).release_pages(id, freed.stored_pages);
        // The description first: after a crash from here on, the slots are known to be free, and
        // are scrubbed at the next start. Nobody else uses them meanwhile: they are neither held
        // nor free. So other requests need not wait for the scrubbing, which takes a while.
        let described = self.describe(&stored, &region);
        drop((gate, serial));
        stored.scrub(&freed.numbers).map_err(|error| store_failed("free an extent", &error))?;
        described.map_err(|error| store_failed("write a region's files", &error))
    }

    /// Gives up a region and frees its memory.
    ///
    /// # Errors
    /// See [`Sponsor::close`](heca_core::sponsor::Sponsor::close).
    pub fn close_region(&self, id: RegionId, epoch: Epoch, owner: OwnerId) -> Result<(), Refusal> {
        let _serial = lock(&self.lifecycle);
        lock(&self.sponsor).close(id, epoch, owner)?;
        self.end(id);
        Ok(())
    }

    /// Frees the regions whose lease ran out; returns their ids.
    pub fn expire(&self) -> Vec<RegionId> {
        let _serial = lock(&self.lifecycle);
        let expired = lock(&self.sponsor).expire(self.now_ms());
        for id in &expired {
            self.end(*id);
        }
        expired
    }

    /// Waits for the region's requests under way, and forgets it.
    fn end(&self, id: RegionId) {
        if let Some(stored) = self.region(id) {
            *stored.gate.write().unwrap_or_else(PoisonError::into_inner) = None;
        }
        self.forget(id);
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
    /// See [`Sponsor::check`](heca_core::sponsor::Sponsor::check), and those of `work`.
    pub fn with_region<T>(
        &self,
        id: RegionId,
        epoch: Epoch,
        work: impl FnOnce(&StoredRegion) -> Result<T, Refusal>,
    ) -> Result<T, Refusal> {
        self.check(id, epoch)?;
        let Some(region) = self.region(id) else { return Err(not_held(id)) };
        let gate = region.gate.read().unwrap_or_else(PoisonError::into_inner);
        match *gate {
            Some(current) if current == epoch => work(&region),
            Some(current) => {
                let text = format!("region {id} was taken over under epoch {}", current.0);
                Err(Refusal { status: Status::StaleEpoch, text })
            }
            None => Err(not_held(id)),
        }
    }
}

fn not_held(id: RegionId) -> Refusal {
    let text = format!("region {id} is not held here");
    Refusal { status: Status::UnknownRegion, text }
}
