//! Pages out of a RAM file into frames, and back.

use std::fs::File;
use std::io::IoSlice;
use std::os::unix::fs::FileExt;

use heca_types::limits::{FRAME_PAGES_MAX, PAGE_BYTES};
use heca_types::{Epoch, PageIndex, PageVersion, RegionId};
use heca_wire::{
    EntryFlags, Header, Kind, PageEntry, encode_pages_parts, is_zero_page, page_checksum,
};
use rustix::fs::{FallocateFlags, fallocate};

use crate::link::{Link, LinkError};

/// Sends pages as they are in a RAM file now.
pub(super) struct Sender {
    region: RegionId,
    buffer: Vec<u8>,
    entries: Vec<PageEntry>,
}

/// Pages of one frame.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Sent {
    pub(super) pages: u64,
    pub(super) zeros: u64,
}

impl Sender {
    pub(super) fn new(region: RegionId) -> Self {
        let buffer = vec![0; FRAME_PAGES_MAX * PAGE_BYTES];
        Self { region, buffer, entries: Vec::with_capacity(FRAME_PAGES_MAX) }
    }

    /// Sends at most [`FRAME_PAGES_MAX`] pages in one frame; pages of zeros are only named. Blocks
    /// until the socket took it.
    pub(super) fn send(
        &mut self,
        ram: &File,
        pages: &[u64],
        link: &mut Link,
    ) -> Result<Sent, LinkError> {
        self.read(ram, pages)?;
        self.entries.clear();
        let mut parts: Vec<IoSlice<'_>> = Vec::with_capacity(pages.len());
        for (&number, bytes) in pages.iter().zip(self.buffer.chunks_exact(PAGE_BYTES)) {
            let (page, version) = (PageIndex(number), PageVersion::NEVER);
            let mut entry = PageEntry::new(page, version);
            if is_zero_page(bytes) {
                entry = entry.with_flags(EntryFlags::ZERO);
            } else {
                parts.push(IoSlice::new(bytes));
            }
            self.entries.push(entry.with_checksum(page_checksum(page, version, bytes)));
        }
        let sent = Sent { pages: pages.len() as u64, zeros: (pages.len() - parts.len()) as u64 };
        let header = Header::new(Kind::Write, self.region, Epoch(0), 0);
        encode_pages_parts(header, &self.entries, parts.len() * PAGE_BYTES, link.output());
        link.send_parts(&mut parts)?;
        link.flush_blocking()?;
        Ok(sent)
    }

    /// Tells that pages went elsewhere since they were sent.
    pub(super) fn send_drop(&mut self, pages: &[u64], link: &mut Link) -> Result<(), LinkError> {
        self.entries.clear();
        let entry = |&page: &u64| PageEntry::new(PageIndex(page), PageVersion::NEVER);
        self.entries.extend(pages.iter().map(entry));
        let header = Header::new(Kind::Discard, self.region, Epoch(0), 0);
        encode_pages_parts(header, &self.entries, 0, link.output());
        link.flush_blocking()
    }

    /// Fills the buffer, neighbours by one call.
    fn read(&mut self, ram: &File, pages: &[u64]) -> Result<(), LinkError> {
        let mut at = 0;
        while at < pages.len() {
            let mut end = at + 1;
            while end < pages.len() && pages[end] == pages[end - 1] + 1 {
                end += 1;
            }
            let bytes = &mut self.buffer[at * PAGE_BYTES..end * PAGE_BYTES];
            ram.read_exact_at(bytes, PageIndex(pages[at]).offset())?;
            at = end;
        }
        Ok(())
    }
}

/// Frees neighbouring pages of a RAM file.
pub(super) fn punch(ram: &File, first: u64, pages: u64) -> std::io::Result<()> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let len = pages * PAGE_BYTES as u64;
    fallocate(ram, flags, PageIndex(first).offset(), len).map_err(Into::into)
}

/// The content of a page in a frame, if it is what was sent.
pub(super) fn checked<'a>(entry: &PageEntry, data: Option<&'a [u8]>) -> Option<&'a [u8]> {
    static ZEROS: [u8; PAGE_BYTES] = [0; PAGE_BYTES];
    let bytes = data.unwrap_or(&ZEROS);
    let sound = page_checksum(entry.page(), entry.version(), bytes) == entry.checksum();
    sound.then_some(bytes)
}
