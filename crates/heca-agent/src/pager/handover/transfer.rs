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
            } else if let Some(tag) = repeated(bytes) {
                entry = entry.with_flags(EntryFlags::SAME).with_tag(tag);
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

/// The tag of a page that is one word over and over.
fn repeated(bytes: &[u8]) -> Option<[u8; 16]> {
    let (words, _) = bytes.as_chunks::<8>();
    let first = words.first()?;
    let same = words.iter().all(|word| word == first);
    same.then(|| std::array::from_fn(|i| if i < 8 { first[i] } else { 0 }))
}

/// Room for the content of one page.
pub(in super::super) type PageBuffer = Box<[u8; PAGE_BYTES]>;

/// Room for the content of one page.
pub(in super::super) fn page_buffer() -> PageBuffer {
    Box::new([0; PAGE_BYTES])
}

/// The content of a page in a frame, put together in `room` where it must be.
#[derive(Debug, Clone, Copy)]
pub(in super::super) enum Content<'a> {
    Zeros,
    Bytes(&'a [u8]),
    /// In the caller's buffer.
    Room,
}

/// The content of a page in a frame; none if it is not what was sent.
pub(in super::super) fn content<'a>(
    entry: &PageEntry,
    data: Option<&'a [u8]>,
    room: &mut PageBuffer,
) -> Option<Content<'a>> {
    static ZEROS: [u8; PAGE_BYTES] = [0; PAGE_BYTES];
    let flags = entry.flags();
    let (content, bytes) = if flags.contains(EntryFlags::SAME) {
        let tag = entry.tag();
        room.as_chunks_mut::<8>().0.iter_mut().for_each(|word| word.copy_from_slice(&tag[..8]));
        (Content::Room, &room[..])
    } else if flags.contains(EntryFlags::ZERO) {
        (Content::Zeros, &ZEROS[..])
    } else {
        let bytes = data?;
        (Content::Bytes(bytes), bytes)
    };
    let sound = page_checksum(entry.page(), entry.version(), bytes) == entry.checksum();
    sound.then_some(content)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repeated_words_are_told_from_others_and_put_together_again() {
        let word = *b"\x01\x02\x03\x04\x05\x06\x07\x08";
        let mut page: Vec<u8> = word.repeat(PAGE_BYTES / 8);
        let tag = repeated(&page).expect("one word");
        let index = PageIndex(3);
        let entry = PageEntry::new(index, PageVersion::NEVER)
            .with_flags(EntryFlags::SAME)
            .with_tag(tag)
            .with_checksum(page_checksum(index, PageVersion::NEVER, &page));
        let mut room = page_buffer();
        assert!(matches!(content(&entry, None, &mut room), Some(Content::Room)));
        assert_eq!(room[..], page[..]);
        let other = entry.with_checksum(7);
        assert!(content(&other, None, &mut room).is_none());
        page[PAGE_BYTES - 1] = 0;
        assert!(repeated(&page).is_none());
        // Data that is said to follow and does not is no page of zeros.
        let bare = PageEntry::new(index, PageVersion::NEVER);
        assert!(content(&bare, None, &mut room).is_none());
    }
}
