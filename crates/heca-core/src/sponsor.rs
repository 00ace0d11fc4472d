//! Who may use which region of a sponsor: epochs, leases, quotas, page versions.
//!
//! The machine holds no page data; the page store asks it before it touches a byte. Time is a
//! number of milliseconds that the caller supplies and that never goes back.

use std::collections::BTreeMap;

use heca_types::limits::{LEASE_MS_MAX, LEASE_MS_MIN, PAGE_BYTES, REGIONS_MAX};
use heca_types::{Epoch, ExtentIndex, OwnerId, PageIndex, PageVersion, RegionId, Status};

/// A refusal: the code for the program and a sentence for the person.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct Refusal {
    /// Code that goes on the wire.
    pub status: Status,
    /// What was wrong and what to do.
    pub text: String,
}

fn refuse<T>(status: Status, text: String) -> Result<T, Refusal> {
    Err(Refusal { status, text })
}

/// A region that a sponsor holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Region {
    /// Who owns it.
    pub owner: OwnerId,
    /// Fencing token: requests under any other are refused.
    pub epoch: Epoch,
    /// Bytes reserved out of the offer.
    pub quota_bytes: u64,
    /// Life without renewal, in milliseconds.
    pub lease_ms: u64,
    /// When the lease runs out.
    pub expires_ms: u64,
    /// Extents held, in rising order.
    pub extents: Vec<ExtentIndex>,
    /// Pages stored.
    pub stored_pages: u64,
}

/// What an owner asks for when it opens a region.
#[derive(Debug, Clone)]
pub struct OpenRequest {
    /// The region.
    pub region: RegionId,
    /// Fencing token.
    pub epoch: Epoch,
    /// Who asks.
    pub owner: OwnerId,
    /// Bytes to reserve.
    pub quota_bytes: u64,
    /// Life without renewal, in milliseconds; cut to what the sponsor grants.
    pub lease_ms: u64,
    /// Extents to hold, in rising order.
    pub extents: Vec<ExtentIndex>,
}

/// What an owner asks for when it gives back extents of a region.
#[derive(Debug, Clone)]
pub struct ReleaseRequest {
    /// The region.
    pub region: RegionId,
    /// Fencing token.
    pub epoch: Epoch,
    /// Who asks.
    pub owner: OwnerId,
    /// Bytes to keep reserved. More than there are reserved now changes nothing.
    pub quota_bytes: u64,
    /// Life without renewal, in milliseconds; cut to what the sponsor grants.
    pub lease_ms: u64,
    /// Extents to hold no longer. Those that are not held are ignored.
    pub extents: Vec<ExtentIndex>,
}

/// What is left of a region after a release.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Released<'a> {
    /// It holds fewer extents, or as many as before if none of those named was held. The caller
    /// counts the pages that went with them by [`Sponsor::release_pages`].
    Kept(&'a Region),
    /// No extent was left, so that the region was closed.
    Closed,
}

/// The regions of one sponsor.
#[derive(Debug, Clone)]
pub struct Sponsor {
    offer_bytes: u64,
    reserved_bytes: u64,
    regions: BTreeMap<RegionId, Region>,
    /// Take new regions and new extents. False while the sponsor is being emptied or is short of
    /// memory; what is held can be opened again all the same, or the guest would lose it.
    pub accepting: bool,
    /// Accept stale epochs. Only the simulation sets this, to show that it would notice.
    pub broken_fencing: bool,
}

impl Sponsor {
    /// A sponsor that offers this many bytes.
    #[must_use]
    pub fn new(offer_bytes: u64) -> Self {
        Self {
            offer_bytes,
            reserved_bytes: 0,
            regions: BTreeMap::new(),
            accepting: true,
            broken_fencing: false,
        }
    }

    /// Bytes offered, in total.
    #[must_use]
    pub fn offer_bytes(&self) -> u64 {
        self.offer_bytes
    }

    /// Bytes that regions have reserved.
    #[must_use]
    pub fn reserved_bytes(&self) -> u64 {
        self.reserved_bytes
    }

    /// All regions, in order of their ids.
    pub fn regions(&self) -> impl Iterator<Item = (&RegionId, &Region)> {
        self.regions.iter()
    }

    /// A region, if it is held.
    #[must_use]
    pub fn region(&self, id: RegionId) -> Option<&Region> {
        self.regions.get(&id)
    }

    /// Takes back a region that the store kept over a restart. Its lease starts anew.
    pub fn restore(&mut self, now_ms: u64, id: RegionId, mut region: Region) {
        region.expires_ms = now_ms + region.lease_ms;
        self.reserved_bytes += region.quota_bytes;
        self.regions.insert(id, region);
    }

    /// Opens a region: creates it, opens it again, or takes it over under a higher epoch.
    /// Opening again with the same values changes nothing, so a lost answer can be asked for again.
    ///
    /// # Errors
    /// A stale epoch, another owner under the same epoch, new extents while the sponsor does not
    /// accept any, or no room on offer.
    pub fn open(&mut self, now_ms: u64, request: &OpenRequest) -> Result<&Region, Refusal> {
        let lease_ms = request.lease_ms.clamp(LEASE_MS_MIN, LEASE_MS_MAX);
        let known = self.regions.get(&request.region);
        if let Some(region) = known {
            if request.epoch < region.epoch {
                return refuse(Status::StaleEpoch, stale(request.region, request.epoch, region));
            }
            if request.epoch == region.epoch && request.owner != region.owner {
                return refuse(
                    Status::OwnerMismatch,
                    format!(
                        "region {} belongs to another owner under epoch {}; \
                         a takeover needs a higher epoch",
                        request.region, region.epoch.0
                    ),
                );
            }
        } else if self.regions.len() >= REGIONS_MAX {
            return refuse(
                Status::TooLarge,
                format!("this sponsor holds {REGIONS_MAX} regions, which is the limit"),
            );
        }
        let adds_extents = known
            .is_none_or(|r| request.extents.iter().any(|e| r.extents.binary_search(e).is_err()));
        if adds_extents && !self.accepting {
            return refuse(
                Status::Draining,
                "this sponsor is being emptied or short of memory and takes no new extents; \
                 use another sponsor"
                    .to_owned(),
            );
        }
        let held_bytes = known.map_or(0, |region| region.quota_bytes);
        let others_bytes = self.reserved_bytes - held_bytes;
        let free_bytes = self.offer_bytes.saturating_sub(others_bytes);
        if request.quota_bytes > free_bytes {
            return refuse(
                Status::OverOffer,
                format!(
                    "{} MiB asked for, {} of {} MiB on offer are free; \
                     raise the offer or add a sponsor",
                    request.quota_bytes >> 20,
                    free_bytes >> 20,
                    self.offer_bytes >> 20
                ),
            );
        }
        self.reserved_bytes = others_bytes + request.quota_bytes;
        let region = self.regions.entry(request.region).or_insert_with(|| Region {
            owner: request.owner,
            epoch: request.epoch,
            quota_bytes: 0,
            lease_ms,
            expires_ms: 0,
            extents: Vec::new(),
            stored_pages: 0,
        });
        region.owner = request.owner;
        region.epoch = request.epoch;
        region.quota_bytes = request.quota_bytes;
        region.lease_ms = lease_ms;
        region.expires_ms = now_ms + lease_ms;
        for extent in &request.extents {
            if let Err(position) = region.extents.binary_search(extent) {
                region.extents.insert(position, *extent);
            }
        }
        Ok(region)
    }

    /// Whether a request under this epoch may touch the region.
    ///
    /// # Errors
    /// An unknown region, or any epoch but the current one (EP-1).
    pub fn check(&self, id: RegionId, epoch: Epoch) -> Result<&Region, Refusal> {
        let Some(region) = self.regions.get(&id) else {
            return refuse(
                Status::UnknownRegion,
                format!("region {id} is not held here; its lease may have run out"),
            );
        };
        let stale_allowed = self.broken_fencing && epoch < region.epoch;
        if epoch != region.epoch && !stale_allowed {
            return refuse(Status::StaleEpoch, stale(id, epoch, region));
        }
        Ok(region)
    }

    /// Whether a new page may be stored, and counts it.
    ///
    /// # Errors
    /// As [`Self::check`]; a page outside of the extents held; a full quota.
    pub fn claim_page(&mut self, id: RegionId, epoch: Epoch) -> Result<(), Refusal> {
        self.check(id, epoch)?;
        let region = self.regions.get_mut(&id).expect("checked above");
        if (region.stored_pages + 1) * PAGE_BYTES as u64 > region.quota_bytes {
            return refuse(
                Status::OverQuota,
                format!("region {id} uses its quota of {} MiB", region.quota_bytes >> 20),
            );
        }
        region.stored_pages += 1;
        Ok(())
    }

    /// Counts pages that are stored no longer.
    pub fn release_pages(&mut self, id: RegionId, pages: u64) {
        if let Some(region) = self.regions.get_mut(&id) {
            region.stored_pages = region.stored_pages.saturating_sub(pages);
        }
    }

    /// Starts the region's lease anew.
    ///
    /// # Errors
    /// As [`Self::check`].
    pub fn renew(&mut self, now_ms: u64, id: RegionId, epoch: Epoch) -> Result<u64, Refusal> {
        self.check(id, epoch)?;
        let region = self.regions.get_mut(&id).expect("checked above");
        region.expires_ms = now_ms + region.lease_ms;
        Ok(region.lease_ms)
    }

    /// Gives back extents of a region and lowers its quota; the lease starts anew. Doing so again
    /// changes nothing, so a lost answer can be asked for again; it is refused as unknown if the
    /// first time closed the region.
    ///
    /// # Errors
    /// As [`Self::check`]; another owner.
    pub fn release(
        &mut self,
        now_ms: u64,
        request: &ReleaseRequest,
    ) -> Result<Released<'_>, Refusal> {
        let id = request.region;
        let held = self.check(id, request.epoch)?;
        if request.owner != held.owner {
            return refuse(
                Status::OwnerMismatch,
                format!("region {id} belongs to another owner; only that one can release extents"),
            );
        }
        // Sorted for the search: a region has up to 262 144 extents, and so may the request.
        let mut gone = request.extents.clone();
        gone.sort_unstable();
        let is_left = |extent: &&ExtentIndex| gone.binary_search(extent).is_err();
        let left: Vec<_> = held.extents.iter().filter(is_left).copied().collect();
        if left.is_empty() {
            self.remove(id);
            return Ok(Released::Closed);
        }
        let region = self.regions.get_mut(&id).expect("checked above");
        region.extents = left;
        let quota_bytes = request.quota_bytes.min(region.quota_bytes);
        self.reserved_bytes -= region.quota_bytes - quota_bytes;
        region.quota_bytes = quota_bytes;
        region.lease_ms = request.lease_ms.clamp(LEASE_MS_MIN, LEASE_MS_MAX);
        region.expires_ms = now_ms + region.lease_ms;
        Ok(Released::Kept(region))
    }

    /// Gives up a region. An owner that only visits it names its epoch, too: so the epoch alone is
    /// not enough.
    ///
    /// # Errors
    /// As [`Self::check`]; another owner.
    pub fn close(&mut self, id: RegionId, epoch: Epoch, owner: OwnerId) -> Result<(), Refusal> {
        if self.check(id, epoch)?.owner != owner {
            return refuse(
                Status::OwnerMismatch,
                format!("region {id} belongs to another owner; only that one can close it"),
            );
        }
        self.remove(id);
        Ok(())
    }

    /// Removes and names the regions whose lease ran out.
    pub fn expire(&mut self, now_ms: u64) -> Vec<RegionId> {
        let expired: Vec<RegionId> = self
            .regions
            .iter()
            .filter(|(_, region)| region.expires_ms <= now_ms)
            .map(|(id, _)| *id)
            .collect();
        for id in &expired {
            self.remove(*id);
        }
        expired
    }

    fn remove(&mut self, id: RegionId) {
        if let Some(region) = self.regions.remove(&id) {
            self.reserved_bytes -= region.quota_bytes;
        }
    }
}

impl Region {
    /// Position of a page's extent among those held here.
    ///
    /// # Errors
    /// A page outside of them.
    pub fn slot(&self, page: PageIndex) -> Result<usize, Refusal> {
        let extent = page.extent();
        self.extents.binary_search(&extent).map_err(|_| Refusal {
            status: Status::OutOfRange,
            text: format!("{page} lies in extent {}, which is not held here", extent.0),
        })
    }
}

/// Whether a write may replace what is stored. Versions only rise under one epoch, so a lower one
/// is a late frame of an attempt that its writer gave up.
///
/// # Errors
/// [`Status::Superseded`] for a lower version.
pub fn check_version(stored: Option<PageVersion>, new: PageVersion) -> Result<(), Refusal> {
    match stored {
        Some(stored) if new < stored => refuse(
            Status::Superseded,
            format!("version {} was stored, version {} came late", stored.0, new.0),
        ),
        _ => Ok(()),
    }
}

fn stale(id: RegionId, epoch: Epoch, region: &Region) -> String {
    format!("region {id} is at epoch {}, the request is of epoch {}", region.epoch.0, epoch.0)
}

#[cfg(test)]
mod tests;
