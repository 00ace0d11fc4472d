//! Requests for single pages.

use heca_core::sponsor::Refusal;
use heca_types::limits::PAGE_BYTES;
use heca_types::{PageVersion, Status};
use heca_wire::{EntryFlags, Header, PageEntry, page_checksum};

use crate::store::{PageMeta, Store, StoredRegion};

pub(super) static ZERO_PAGE: [u8; PAGE_BYTES] = [0; PAGE_BYTES];

/// The entry that answers a page which was refused.
pub(super) fn refused(entry: &PageEntry, refusal: &Refusal) -> PageEntry {
    tracing::debug!(page = entry.page().0, "refused: {refusal}");
    entry.with_flags(EntryFlags::ABSENT).with_status(refusal.status)
}

/// The entry that answers a page which was stored: the request's without what tells of content.
pub(super) fn acknowledged(entry: &PageEntry) -> PageEntry {
    entry.with_flags(EntryFlags::default()).with_tag([0; 16])
}

fn content_flags(meta: PageMeta) -> EntryFlags {
    let zero = if meta.is_zero() { EntryFlags::ZERO } else { EntryFlags::default() };
    if meta.is_sealed() { zero.union(EntryFlags::SEALED) } else { zero }
}

pub(super) fn stat(region: &StoredRegion, entry: &PageEntry) -> Result<PageEntry, Refusal> {
    let meta = region.stat(entry.page())?;
    let flags = if meta.is_present() { content_flags(meta) } else { EntryFlags::ABSENT };
    Ok(PageEntry::new(entry.page(), PageVersion(meta.version))
        .with_checksum(meta.checksum)
        .with_flags(flags)
        .with_tag(meta.tag))
}

/// A read names the version it wants: an older or newer one does not help the reader.
pub(super) fn read(
    region: &StoredRegion,
    entry: &PageEntry,
    data: &mut Vec<u8>,
) -> Result<PageEntry, Refusal> {
    let meta = region.read(entry.page(), entry.version(), data)?;
    let version = PageVersion(meta.version);
    let answer = PageEntry::new(entry.page(), version).with_checksum(meta.checksum);
    Ok(if !meta.is_present() || version != entry.version() {
        answer.with_flags(EntryFlags::ABSENT)
    } else {
        answer.with_flags(content_flags(meta)).with_tag(meta.tag)
    })
}

pub(super) fn write(
    store: &Store,
    region: &StoredRegion,
    header: &Header,
    entry: &PageEntry,
    bytes: Option<&[u8]>,
) -> Result<PageEntry, Refusal> {
    store_entry(store, region, header, entry, bytes)?;
    Ok(acknowledged(entry))
}

/// Checks content that came with an entry, and stores it as it is.
pub(super) fn store_entry(
    store: &Store,
    region: &StoredRegion,
    header: &Header,
    entry: &PageEntry,
    bytes: Option<&[u8]>,
) -> Result<(), Refusal> {
    if entry.flags().contains(EntryFlags::SAME) {
        let text = format!("{}: sponsors take no repeated words", entry.page());
        return Err(Refusal { status: Status::Malformed, text });
    }
    let (page, version, flags) = (entry.page(), entry.version(), entry.flags());
    let malformed =
        |what: &str| Err(Refusal { status: Status::Malformed, text: format!("{page}: {what}") });
    let sealed = flags.contains(EntryFlags::SEALED);
    let content = match bytes {
        Some(bytes) => bytes,
        None if flags.contains(EntryFlags::ABSENT) => return malformed("a write needs content"),
        None => &ZERO_PAGE,
    };
    if version == PageVersion::NEVER {
        return malformed("version 0 means that the page was never written; begin with 1");
    }
    if !sealed && entry.tag() != [0; 16] {
        return malformed("only an encrypted page has a tag");
    }
    if page_checksum(page, version, content) != entry.checksum() {
        let text = format!("{page} arrived with bytes that do not match its checksum");
        return Err(Refusal { status: Status::ChecksumMismatch, text });
    }
    let seal = sealed.then_some(entry.tag());
    let meta = PageMeta::new(version, entry.checksum(), bytes.is_none(), seal);
    store.write(region, header.epoch, page, meta, bytes)
}
