//! Sponsors and the connections to them.

use std::collections::VecDeque;

use heca_core::pager::{Event, FetchError};
use heca_core::sponsor::{OpenRequest, Refusal, Sponsor, check_version};
use heca_types::limits::{LEASE_MS_MAX, PAGE_BYTES};
use heca_types::{Epoch, ExtentIndex, OwnerId, PageIndex, PageVersion, RegionId};

/// Epoch of the first owner; each new pager raises it by one.
pub(crate) const EPOCH_FIRST: Epoch = Epoch(7);

/// Connections of one sponsor: demand, prefetch, write-back, control, copies between sponsors.
pub(crate) const LANES: usize = 5;
pub(crate) const WRITEBACK: usize = 2;
pub(crate) const CONTROL: usize = 3;
pub(crate) const PULLS: usize = 4;

/// Something for the pager. Replies carry the page's content.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Note {
    pub(crate) event: Event,
    pub(crate) reply: u64,
}

impl From<Event> for Note {
    fn from(event: Event) -> Self {
        Self { event, reply: 0 }
    }
}

#[derive(Debug, Clone, Copy)]
pub(crate) enum Request {
    Fetch { slot: usize, version: PageVersion },
    Store { slot: usize, version: PageVersion, value: u64 },
    Hold { extent: ExtentIndex },
    Release { extent: ExtentIndex },
    Pull { slot: usize, version: PageVersion, from: u8, attempt: u32 },
}

/// One connection: requests under way there, answers under way back.
#[derive(Debug, Default)]
pub(crate) struct Lane {
    pub(crate) requests: VecDeque<Request>,
    pub(crate) replies: VecDeque<Note>,
    /// Nothing moves on it before this tick.
    pub(crate) frozen_until: u64,
}

/// A stored page.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stored {
    pub(crate) version: PageVersion,
    pub(crate) value: u64,
    /// The bytes went bad since: reading them fails.
    pub(crate) rotten: bool,
}

/// A page on its way from one sponsor to another: read there, not yet written here.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pulling {
    pub(crate) slot: usize,
    pub(crate) version: PageVersion,
    pub(crate) attempt: u32,
    pub(crate) epoch: Epoch,
    /// What the source had.
    pub(crate) value: Option<u64>,
}

/// What came of the first half of a pull.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PullStart {
    Present,
    Refused,
    Read,
}

#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) machine: Sponsor,
    pub(crate) store: Vec<Option<Stored>>,
    /// Whether the process runs.
    pub(crate) alive: bool,
    /// Whether the pager is connected to it.
    pub(crate) up: bool,
    /// When it went down.
    pub(crate) down_since: u64,
    /// Nothing moves on its connections before this tick.
    pub(crate) frozen_until: u64,
    pub(crate) lanes: [Lane; LANES],
    pub(crate) pulling: VecDeque<Pulling>,
    /// Answers to fetches that were held up, with the tick when they come at the latest.
    pub(crate) held_up: Vec<(u64, Note)>,
    /// Frames of lost connections that the sponsor may still read.
    pub(crate) late: Vec<(Epoch, Request)>,
    /// The epoch that it was told of last: older ones must be refused.
    pub(crate) epoch: Epoch,
    /// Extents of which it may have missed a write, as the world knows.
    pub(crate) missed: Vec<bool>,
    /// Extents of which it answered that it lacks a page, or sent one damaged.
    pub(crate) accused: Vec<bool>,
    /// Version of each copy that trouble took.
    pub(crate) emptied: Vec<PageVersion>,
    /// The pager was not told yet that it was emptied.
    pub(crate) emptied_untold: bool,
    /// Whether it refuses further extents.
    pub(crate) full: bool,
    pub(crate) leaving: bool,
}

pub(crate) fn region_id(number: u8) -> RegionId {
    RegionId::from_bytes([number; 16])
}

/// The region that is simulated.
pub(crate) fn region() -> RegionId {
    region_id(1)
}

pub(crate) fn owner(number: u8) -> OwnerId {
    OwnerId::from_bytes([number; 16])
}

pub(crate) fn open_request(number: u8, epoch: Epoch, quota_pages: u64) -> OpenRequest {
    OpenRequest {
        region: region_id(number),
        epoch,
        owner: owner(number),
        quota_bytes: quota_pages * PAGE_BYTES as u64,
        lease_ms: LEASE_MS_MAX,
        extents: Vec::new(),
    }
}

impl Node {
    /// A sponsor with room for the whole region and some others.
    pub(crate) fn new(slots: usize, spare_pages: u64, extents: usize) -> Self {
        let offer_pages = slots as u64 + spare_pages;
        Self {
            machine: Sponsor::new(offer_pages * PAGE_BYTES as u64),
            store: vec![None; slots],
            alive: true,
            up: false,
            down_since: 0,
            frozen_until: 0,
            lanes: Default::default(),
            pulling: VecDeque::new(),
            held_up: Vec::new(),
            late: Vec::new(),
            epoch: Epoch(0),
            missed: vec![true; extents],
            accused: vec![false; extents],
            emptied: vec![PageVersion::NEVER; slots],
            emptied_untold: false,
            full: false,
            leaving: false,
        }
    }

    /// Opens the region under this epoch with these extents beside those that it holds already.
    /// `slots` are the pages in use.
    pub(crate) fn open(
        &mut self,
        now_ms: u64,
        epoch: Epoch,
        extents: &[ExtentIndex],
        slots: &[u64],
    ) -> Result<(), Refusal> {
        let mut all: Vec<ExtentIndex> = self.extents().to_vec();
        all.extend(extents);
        let held = |page: &&u64| all.contains(&PageIndex(**page).extent());
        let mut request = open_request(1, epoch, slots.iter().filter(held).count() as u64);
        request.extents = extents.to_vec();
        request.extents.sort_by_key(|extent| extent.0);
        self.machine.open(now_ms, &request)?;
        self.epoch = self.epoch.max(epoch);
        Ok(())
    }

    /// Extents of the region that it holds.
    pub(crate) fn extents(&self) -> &[ExtentIndex] {
        let found = self.machine.regions().find(|(id, _)| **id == region());
        found.map_or(&[], |(_, held)| &held.extents)
    }

    /// The process starts anew with the store it had.
    pub(crate) fn restart(&mut self, now_ms: u64) {
        let mut fresh = Sponsor::new(self.machine.offer_bytes());
        fresh.broken_fencing = self.machine.broken_fencing;
        for (id, held) in self.machine.regions() {
            fresh.restore(now_ms, *id, held.clone());
        }
        self.machine = fresh;
        self.pulling.clear();
        self.alive = true;
    }

    /// Forgets an extent and what it stored of it.
    pub(crate) fn release(
        &mut self,
        now_ms: u64,
        epoch: Epoch,
        extent: ExtentIndex,
        slots: &[u64],
    ) -> Result<(), Refusal> {
        self.machine.check(region(), epoch)?;
        let rest: Vec<_> = self.extents().iter().copied().filter(|&e| e != extent).collect();
        self.machine.close(region(), epoch, owner(1))?;
        self.open(now_ms, epoch, &rest, slots)?;
        for (slot, &page) in slots.iter().enumerate() {
            if PageIndex(page).extent() == extent {
                self.store[slot] = None;
                self.emptied[slot] = PageVersion::NEVER;
            } else if self.store[slot].is_some() {
                self.machine.claim_page(region(), epoch)?;
            }
        }
        Ok(())
    }

    /// A write request, by whoever has this epoch.
    pub(crate) fn write(
        &mut self,
        epoch: Epoch,
        page: PageIndex,
        slot: usize,
        new: (PageVersion, u64),
    ) -> Result<(), Refusal> {
        self.machine.check(region(), epoch)?.slot(page)?;
        check_version(self.store[slot].map(|s| s.version), new.0)?;
        if self.store[slot].is_none() {
            self.machine.claim_page(region(), epoch)?;
        }
        self.store[slot] = Some(Stored { version: new.0, value: new.1, rotten: false });
        if new.0 >= self.emptied[slot] {
            self.emptied[slot] = PageVersion::NEVER;
        }
        Ok(())
    }

    /// A read request.
    pub(crate) fn read(
        &self,
        epoch: Epoch,
        page: PageIndex,
        slot: usize,
        version: PageVersion,
    ) -> Result<u64, FetchError> {
        let held = self.machine.check(region(), epoch).and_then(|region| region.slot(page));
        held.map_err(|_| FetchError::Refused)?;
        match self.store[slot] {
            Some(stored) if stored.version == version && stored.rotten => Err(FetchError::Corrupt),
            Some(stored) if stored.version == version => Ok(stored.value),
            _ => Err(FetchError::Absent),
        }
    }

    /// What a request to copy a page here comes to before the source is asked.
    pub(crate) fn start_pull(
        &self,
        epoch: Epoch,
        page: PageIndex,
        slot: usize,
        version: PageVersion,
    ) -> PullStart {
        let held = self.machine.check(region(), epoch).and_then(|region| region.slot(page));
        match self.store[slot] {
            _ if held.is_err() => PullStart::Refused,
            // What is there in this version is looked at before it counts.
            Some(stored) if stored.version == version && stored.rotten => PullStart::Read,
            Some(stored) if stored.version >= version => PullStart::Present,
            _ => PullStart::Read,
        }
    }

    /// Whether this is the newest content that the sponsor has for a page. A page that it never
    /// had is all zeros.
    pub(crate) fn holds(&self, slot: usize, value: u64) -> bool {
        self.store[slot].map_or(0, |s| s.value) == value
    }

    /// Whether it has a good copy of this version.
    pub(crate) fn has_good(&self, slot: usize, version: PageVersion) -> bool {
        self.store[slot].is_some_and(|s| s.version == version && !s.rotten)
    }

    /// Whether trouble took the copy, and no other came in its place.
    pub(crate) fn was_emptied(&self, slot: usize) -> bool {
        self.emptied[slot] != PageVersion::NEVER
    }

    /// Whether trouble spoilt the copy here: that it is not good is nobody's fault.
    pub(crate) fn rotten(&self, slot: usize) -> bool {
        self.store[slot].is_some_and(|s| s.rotten)
    }

    /// Whether a fetch of this version would succeed.
    pub(crate) fn can_serve(&self, slot: usize, version: PageVersion) -> bool {
        self.up && self.has_good(slot, version)
    }

    pub(crate) fn can_move(&self, tick: u64) -> bool {
        let lane = |lane: &Lane| {
            tick >= lane.frozen_until && !(lane.requests.is_empty() && lane.replies.is_empty())
        };
        tick >= self.frozen_until && (self.lanes.iter().any(lane) || !self.pulling.is_empty())
    }

    pub(crate) fn is_idle(&self) -> bool {
        let lane = |lane: &Lane| lane.requests.is_empty() && lane.replies.is_empty();
        self.lanes.iter().all(lane) && self.pulling.is_empty() && self.held_up.is_empty()
    }
}
