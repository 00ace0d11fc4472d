//! The target: pages that are behind, and how they get into the guest's memory.
//!
//! Two kinds of threads bring such pages: the engine, with the answers to its demands, and those that
//! receive what the source sends by itself. Whoever comes first takes the page by setting its bit
//! in `claims`, and is then the only one to write it. The order of what follows matters for a
//! pager that is killed in between: the content goes into the RAM file, *then* the journal says that
//! the page is here, and only then it is mapped. Were it mapped first, the next pager would fetch it
//! again over what the guest wrote.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use heca_sys::journal::Journal;
use heca_sys::uffd::{ResolveError, Userfaultfd};
use heca_types::PageIndex;
use heca_types::limits::PAGE_BYTES;

use super::bitmap::AtomicBitmap;
use super::transfer::punch;
use crate::pager::preflight::Target;
use crate::pager::start::BEHIND;

/// Shared by the engine and the threads that receive.
#[derive(Debug)]
pub(in super::super) struct Behind {
    /// Pages that are here, or on their last step.
    claims: AtomicBitmap,
    /// Pages whose file has content.
    filled: AtomicBitmap,
    left: AtomicU64,
    /// Pages that were brought, those that were here already included.
    came: AtomicU64,
    ram: Arc<File>,
    journal: Arc<Journal>,
    uffd: Arc<Userfaultfd>,
    target: Target,
}

impl Behind {
    /// Nothing is behind yet; `filled` tells which pages the RAM file has something for.
    pub(super) fn new(
        filled: AtomicBitmap,
        ram: Arc<File>,
        journal: Arc<Journal>,
        uffd: Arc<Userfaultfd>,
        target: Target,
    ) -> Self {
        let claims = AtomicBitmap::new(target.len / PAGE_BYTES as u64);
        claims.set_range(0..target.len / PAGE_BYTES as u64);
        let (left, came) = (AtomicU64::new(0), AtomicU64::new(0));
        Self { claims, filled, left, came, ram, journal, uffd, target }
    }

    /// As a former pager of the VM left it: these pages are behind.
    pub(in super::super) fn again(
        missing: Vec<u64>,
        ram: Arc<File>,
        journal: Arc<Journal>,
        uffd: Arc<Userfaultfd>,
        target: Target,
    ) -> Self {
        // What the file has for them is not known: as if it had something.
        let filled = AtomicBitmap::new(target.len / PAGE_BYTES as u64);
        filled.set_range(0..target.len / PAGE_BYTES as u64);
        let behind = Self::new(filled, ram, journal, uffd, target);
        missing.into_iter().for_each(|page| behind.expect(page..page + 1));
        behind
    }

    /// These pages are behind. Before anybody brings any.
    pub(super) fn expect(&self, pages: std::ops::Range<u64>) {
        self.left.fetch_add(pages.end - pages.start, Ordering::SeqCst);
        self.claims.clear_range(pages);
    }

    /// Pages that are still behind.
    pub(in super::super) fn left(&self) -> u64 {
        self.left.load(Ordering::SeqCst)
    }

    /// Pages that came so far, those that came twice counted twice.
    pub(in super::super) fn came(&self) -> u64 {
        self.came.load(Ordering::Relaxed)
    }

    /// Whether a page is behind and nobody is bringing it.
    pub(super) fn is_missing(&self, page: u64) -> bool {
        !self.claims.get(page)
    }

    /// Puts a page into the RAM file, unless it is there already or somebody else is at it. The
    /// caller then maps it, and tells the machine.
    ///
    /// # Errors
    /// Those of writing: the page stays behind.
    pub(in super::super) fn bring(
        &self,
        page: PageIndex,
        content: Option<&[u8]>,
    ) -> std::io::Result<bool> {
        if page.offset() >= self.target.len {
            let text = format!("{page} lies beyond the region");
            return Err(std::io::Error::new(std::io::ErrorKind::InvalidData, text));
        }
        self.came.fetch_add(1, Ordering::Relaxed);
        if self.claims.set(page.0) {
            return Ok(false);
        }
        if let Err(error) = self.write(page, content) {
            self.claims.clear(page.0);
            return Err(error);
        }
        let version = self.journal.version(page.0) & !BEHIND;
        self.journal.set_version(page.0, version);
        self.left.fetch_sub(1, Ordering::SeqCst);
        Ok(true)
    }

    /// No content is a page of zeros: a hole.
    fn write(&self, page: PageIndex, content: Option<&[u8]>) -> std::io::Result<()> {
        match content {
            Some(bytes) => {
                self.filled.set(page.0);
                self.ram.write_all_at(bytes, page.offset())
            }
            None if self.filled.clear(page.0) => punch(&self.ram, page.0, 1),
            None => Ok(()),
        }
    }

    /// Maps neighbouring pages that are here, and wakes who waits for them. Pages that cannot be
    /// mapped are left to the fault that looks for them.
    pub(in super::super) fn map(&self, pages: std::ops::Range<u64>) -> Result<(), ResolveError> {
        let mut at = pages.start;
        while at < pages.end {
            let len = (pages.end - at) * PAGE_BYTES as u64;
            let (done, outcome) = self.uffd.map_run(self.target.address(PageIndex(at)), len, false);
            at += done / PAGE_BYTES as u64;
            match outcome {
                Ok(()) => return Ok(()),
                Err(ResolveError::Gone) => return Err(ResolveError::Gone),
                // Part of it is done; the kernel tells why it stopped with the next attempt.
                Err(_) if done > 0 => {}
                // It is mapped, or a hole, or for later: the next one.
                Err(_) => at += 1,
            }
        }
        Ok(())
    }
}
