//! Sponsors and the connections to them.

use std::collections::VecDeque;

use heca_core::pager::{Event, FetchError};
use heca_core::sponsor::{OpenRequest, Refusal, Sponsor, check_version};
use heca_types::limits::{LEASE_MS_MAX, PAGE_BYTES};
use heca_types::{Epoch, ExtentIndex, OwnerId, PageIndex, PageVersion, RegionId};

/// Epoch of the owner in charge; the old owner has the one before.
pub(crate) const EPOCH: Epoch = Epoch(7);
pub(crate) const EPOCH_OLD: Epoch = Epoch(6);

/// Connections of one sponsor: demand, prefetch, write-back.
pub(crate) const LANES: usize = 3;
pub(crate) const WRITEBACK: usize = 2;

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
}

/// One connection: requests under way there, answers under way back.
#[derive(Debug, Default)]
pub(crate) struct Lane {
    pub(crate) requests: VecDeque<Request>,
    pub(crate) replies: VecDeque<Note>,
}

/// A stored page.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stored {
    pub(crate) version: PageVersion,
    pub(crate) value: u64,
    /// The bytes went bad since: reading them fails.
    pub(crate) rotten: bool,
}

#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) machine: Sponsor,
    pub(crate) store: Vec<Option<Stored>>,
    pub(crate) up: bool,
    /// Whether it was ever down: if not, it cannot have missed a write.
    pub(crate) was_down: bool,
    /// Nothing moves on its connections before this tick.
    pub(crate) frozen_until: u64,
    pub(crate) lanes: [Lane; LANES],
    /// Write frames of a lost connection that the sponsor may still read.
    pub(crate) late: Vec<Request>,
    extents: Vec<ExtentIndex>,
}

pub(crate) fn region_id(number: u8) -> RegionId {
    RegionId::from_bytes([number; 16])
}

/// The region that is simulated.
pub(crate) fn region() -> RegionId {
    region_id(1)
}

pub(crate) fn open_request(number: u8, epoch: Epoch, quota_pages: u64) -> OpenRequest {
    OpenRequest {
        region: region_id(number),
        epoch,
        owner: OwnerId::from_bytes([number; 16]),
        quota_bytes: quota_pages * PAGE_BYTES as u64,
        lease_ms: LEASE_MS_MAX,
        extents: Vec::new(),
    }
}

impl Node {
    /// A sponsor that holds the region, with some room for others.
    pub(crate) fn new(slots: usize, spare_pages: u64, extents: Vec<ExtentIndex>) -> Self {
        let offer_pages = slots as u64 + spare_pages;
        let mut node = Self {
            machine: Sponsor::new(offer_pages * PAGE_BYTES as u64),
            store: vec![None; slots],
            up: true,
            was_down: false,
            frozen_until: 0,
            lanes: Default::default(),
            late: Vec::new(),
            extents,
        };
        node.connect(0);
        node
    }

    /// What the owner does on each new connection.
    pub(crate) fn connect(&mut self, now_ms: u64) {
        let mut request = open_request(1, EPOCH, self.store.len() as u64);
        request.extents.clone_from(&self.extents);
        self.machine.open(now_ms, &request).expect("the offer has room for the region");
    }

    /// The process starts anew with the store it had.
    pub(crate) fn restart(&mut self, now_ms: u64) {
        let mut fresh = Sponsor::new(self.machine.offer_bytes());
        fresh.broken_fencing = self.machine.broken_fencing;
        for (id, held) in self.machine.regions() {
            fresh.restore(now_ms, *id, held.clone());
        }
        self.machine = fresh;
        self.connect(now_ms);
        self.up = true;
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
        Ok(())
    }

    /// A read request.
    pub(crate) fn read(
        &self,
        page: PageIndex,
        slot: usize,
        version: PageVersion,
    ) -> Result<u64, FetchError> {
        let held = self.machine.check(region(), EPOCH).and_then(|region| region.slot(page));
        held.map_err(|_| FetchError::Refused)?;
        match self.store[slot] {
            Some(stored) if stored.rotten => Err(FetchError::Corrupt),
            Some(stored) if stored.version == version => Ok(stored.value),
            _ => Err(FetchError::Absent),
        }
    }

    /// Whether this is the newest content that the sponsor has for a page. A page that it never
    /// had is all zeros.
    pub(crate) fn holds(&self, slot: usize, value: u64) -> bool {
        self.store[slot].map_or(0, |s| s.value) == value
    }

    /// Whether a fetch of this version would succeed.
    pub(crate) fn can_serve(&self, slot: usize, version: PageVersion) -> bool {
        self.up && self.store[slot].is_some_and(|s| s.version == version && !s.rotten)
    }

    pub(crate) fn can_move(&self, tick: u64) -> bool {
        tick >= self.frozen_until && !self.is_idle()
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.lanes.iter().all(|lane| lane.requests.is_empty() && lane.replies.is_empty())
    }
}
