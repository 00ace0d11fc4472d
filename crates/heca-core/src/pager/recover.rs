//! Going on where a former pager of the region ended: by its own choice or by a crash.
//!
//! What must survive a pager is small: the version of each page, and which sponsors hold which
//! extents. The rest follows from the RAM file, which has every page that is local. The caller
//! keeps both where a crash of the pager does not reach, writes a version down when it carries out
//! `Unmap` and `Punch`, that a page is gone when it carries out `Punch` (until it brought the page
//! back), and an extent when it carries out `Extent`.
//!
//! Why that is enough: a page is freed only by a `Punch`, and by then its written version is the
//! one that the sponsors acknowledged. A page that is still local counts as dirty, so that it does
//! not matter how far its eviction came; and its next attempt has a version above every one that
//! may have been sent, so that no version ever names two contents.

use heca_types::limits::{REPLICAS_MAX, SPONSORS_MAX};
use heca_types::{ExtentIndex, PageIndex, PageVersion};

use super::Mutation;
use super::machine::{DIRTY, Pager, State};
use crate::placement::ReplicaSet;

/// Marks a record as written: a record of zeros is one that never was.
const WRITTEN: u8 = 0xe7;

/// A record of an extent that cannot be one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{word:#018x} is not a record of an extent's replicas")]
pub struct BadRecord {
    /// What was found.
    pub word: u64,
}

impl Pager {
    /// A page that is in local memory before the pager begins, and the version of the newest
    /// attempt to store it, if a former pager made one. To be called before the first event.
    pub fn adopt_resident(&mut self, page: PageIndex, version: PageVersion) {
        let p = &mut self.pages[page.0 as usize];
        if p.state == State::Untouched {
            p.state = State::Resident;
            p.flags = DIRTY;
            p.version = version.0;
            self.untouched -= 1;
            self.frames += 1;
            self.active.push(&mut self.links, page.0);
        }
    }

    /// A page that is not in local memory. `dropped` says whether a former pager dropped it, and so
    /// stored it under this version; if not, it was never there, or its owner discarded it, and it
    /// is all zeros. To be called before the first event, after the resident pages were named.
    pub fn adopt_absent(&mut self, page: PageIndex, version: PageVersion, dropped: bool) {
        let forget = self.config.mutation == Some(Mutation::RecoverAsZero);
        let p = &mut self.pages[page.0 as usize];
        if p.state != State::Untouched {
            return;
        }
        p.version = version.0;
        if dropped && version != PageVersion::NEVER && !forget {
            p.state = State::Remote;
            self.untouched -= 1;
            self.remote += 1;
        }
    }

    /// What a later pager must know of an extent; see [`Self::adopt_extent`].
    #[must_use]
    pub fn extent_record(&self, extent: ExtentIndex) -> u64 {
        let set = self.config.layout.replicas(extent);
        let mut bytes = [0; 8];
        bytes[0] = set.count();
        bytes[1] = self.stale[extent.0 as usize];
        bytes[2..2 + set.sponsors().len()].copy_from_slice(set.sponsors());
        bytes[7] = WRITTEN;
        u64::from_le_bytes(bytes)
    }

    /// Takes over a former pager's [`Self::extent_record`]; a record that was never written (zero)
    /// leaves the extent as the layout has it. To be called before the first event.
    ///
    /// # Errors
    /// A word that no pager wrote.
    pub fn adopt_extent(&mut self, extent: ExtentIndex, word: u64) -> Result<(), BadRecord> {
        if word == 0 {
            return Ok(());
        }
        let bad = BadRecord { word };
        let bytes = word.to_le_bytes();
        let count = usize::from(bytes[0]);
        if bytes[7] != WRITTEN || !(1..=REPLICAS_MAX).contains(&count) || bytes[1] >> count != 0 {
            return Err(bad);
        }
        let sponsors = &bytes[2..2 + count];
        let known = usize::from(self.sponsors()).min(SPONSORS_MAX);
        let twice = (1..count).any(|i| sponsors[..i].contains(&sponsors[i]));
        if twice || sponsors.iter().any(|&s| usize::from(s) >= known) {
            return Err(bad);
        }
        for &sponsor in self.config.layout.replicas(extent).sponsors() {
            self.held[usize::from(sponsor)] -= 1;
        }
        for &sponsor in sponsors {
            self.held[usize::from(sponsor)] += 1;
        }
        self.config.layout.set(extent, ReplicaSet::new(sponsors));
        self.stale[extent.0 as usize] = bytes[1];
        Ok(())
    }
}
