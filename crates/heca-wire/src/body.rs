//! Payloads.

use heca_types::limits::{
    ERROR_TEXT_MAX, FRAME_PAGES_MAX, LEASE_MS_MAX, PAGE_BYTES, REGION_BYTES_MAX,
};
use heca_types::{Epoch, ExtentIndex, OwnerId, PageIndex, PageVersion, RegionId, Status, StoreId};
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::header::{DecodeError, HEADER_BYTES, Header, Kind};

/// What a connection is for. One pager opens one of each to a sponsor, so that a page fault never
/// waits behind bulk traffic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Role {
    /// Opens, renews and closes regions.
    Control = 0,
    /// Reads for page faults.
    Demand = 1,
    /// Reads ahead of faults.
    Prefetch = 2,
    /// Writes of evicted pages.
    WriteBack = 3,
}

impl Role {
    fn from_code(code: u16) -> Option<Self> {
        [Self::Control, Self::Demand, Self::Prefetch, Self::WriteBack]
            .get(usize::from(code))
            .copied()
    }
}

/// Flags of a page entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct EntryFlags(pub u32);

impl EntryFlags {
    /// The page's content is all zeros; no data follows for it.
    pub const ZERO: Self = Self(1);
    /// The sponsor holds no content for the page; no data follows for it.
    pub const ABSENT: Self = Self(2);

    /// Whether all bits of `other` are set.
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Whether 4096 bytes of data belong to the entry in a frame that carries data.
    #[must_use]
    pub const fn has_data(self) -> bool {
        self.0 == 0
    }
}

/// One page in a frame: 24 bytes.
#[derive(
    FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Debug, Clone, Copy, PartialEq, Eq,
)]
#[repr(C)]
pub struct PageEntry {
    page: U64,
    version: U32,
    checksum: U32,
    flags: U32,
    status: U16,
    reserved: U16,
}

const _: () = assert!(size_of::<PageEntry>() == 24);

impl PageEntry {
    /// An entry with flags and checksum zero and status `Ok`.
    #[must_use]
    pub fn new(page: PageIndex, version: PageVersion) -> Self {
        Self {
            page: U64::new(page.0),
            version: U32::new(version.0),
            checksum: U32::ZERO,
            flags: U32::ZERO,
            status: U16::ZERO,
            reserved: U16::ZERO,
        }
    }

    /// The same with a checksum.
    #[must_use]
    pub fn with_checksum(mut self, checksum: u32) -> Self {
        self.checksum = U32::new(checksum);
        self
    }

    /// The same with flags.
    #[must_use]
    pub fn with_flags(mut self, flags: EntryFlags) -> Self {
        self.flags = U32::new(flags.0);
        self
    }

    /// The same with an outcome.
    #[must_use]
    pub fn with_status(mut self, status: Status) -> Self {
        self.status = U16::new(status.code());
        self
    }

    /// The page.
    #[must_use]
    pub fn page(&self) -> PageIndex {
        PageIndex(self.page.get())
    }

    /// Version of the content.
    #[must_use]
    pub fn version(&self) -> PageVersion {
        PageVersion(self.version.get())
    }

    /// Checksum of the content; see [`crate::page_checksum`].
    #[must_use]
    pub fn checksum(&self) -> u32 {
        self.checksum.get()
    }

    /// Flags.
    #[must_use]
    pub fn flags(&self) -> EntryFlags {
        EntryFlags(self.flags.get())
    }

    /// Outcome for this page.
    #[must_use]
    pub fn status(&self) -> Status {
        Status::from_code(self.status.get()).unwrap_or(Status::Malformed)
    }
}

/// First frame of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hello {
    /// Oldest version the pager speaks.
    pub version_min: u16,
    /// Newest version the pager speaks.
    pub version_max: u16,
    /// What the connection is for.
    pub role: Role,
    /// Who connects.
    pub owner: OwnerId,
}

/// The sponsor's answer to [`Hello`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HelloAck {
    /// The version that both use from here on.
    pub version: u16,
    /// Identity of the sponsor's store. It changes when the store lost its content.
    pub store: StoreId,
    /// Bytes on offer that no region has reserved.
    pub free_bytes: u64,
}

/// Fixed part of an `Open`: create a region on this sponsor, or take it over under a higher epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Open {
    /// Who will own it.
    pub owner: OwnerId,
    /// Bytes to reserve.
    pub quota_bytes: u64,
    /// Life without renewal, in milliseconds.
    pub lease_ms: u64,
}

/// The sponsor's answer to `Open`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OpenAck {
    /// Lease granted, in milliseconds.
    pub lease_ms: u64,
    /// Pages stored for the region already.
    pub stored_pages: u64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawHello {
    version_min: U16,
    version_max: U16,
    role: U16,
    reserved: U16,
    owner: [u8; 16],
    features: U64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawHelloAck {
    version: U16,
    reserved: [U16; 3],
    store: [u8; 16],
    free_bytes: U64,
    features: U64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawOpen {
    owner: [u8; 16],
    quota_bytes: U64,
    lease_ms: U64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawOpenAck {
    lease_ms: U64,
    stored_pages: U64,
}

/// Page entries and the data that belongs to them, borrowed from a payload.
#[derive(Debug, Clone, Copy)]
pub struct PageList<'a> {
    entries: &'a [PageEntry],
    data: &'a [u8],
}

impl<'a> PageList<'a> {
    /// The entries.
    #[must_use]
    pub fn entries(&self) -> &'a [PageEntry] {
        self.entries
    }

    /// Each entry with its 4096 bytes, or `None` for an entry without data.
    pub fn iter(&self) -> impl Iterator<Item = (&'a PageEntry, Option<&'a [u8]>)> {
        let mut pages = self.data.chunks_exact(PAGE_BYTES);
        self.entries.iter().map(move |entry| {
            let data = if entry.flags().has_data() { pages.next() } else { None };
            (entry, data)
        })
    }
}

/// A decoded `Open`: its fixed part and which extents the sponsor is to hold.
#[derive(Debug, Clone, Copy)]
pub struct OpenRequest<'a> {
    /// Fixed part.
    pub open: Open,
    bitmap: &'a [u8],
    count: u32,
}

impl<'a> OpenRequest<'a> {
    /// The extents, in rising order.
    pub fn extents(&self) -> impl Iterator<Item = ExtentIndex> + use<'a> {
        let bitmap = self.bitmap;
        (0..self.count)
            .filter(move |&i| bitmap[i as usize / 8] >> (i % 8) & 1 == 1)
            .map(ExtentIndex)
    }
}

/// A decoded payload.
#[derive(Debug, Clone, Copy)]
pub enum Body<'a> {
    /// `Hello`
    Hello(Hello),
    /// `HelloAck`
    HelloAck(HelloAck),
    /// `Open`
    Open(OpenRequest<'a>),
    /// `OpenAck`
    OpenAck(OpenAck),
    /// Every kind that carries page entries.
    Pages(PageList<'a>),
    /// `Error`
    Error(&'a str),
    /// Kinds without payload.
    Empty,
}

/// Decodes a payload.
///
/// # Errors
/// A payload whose size does not follow from kind and count, or whose fields break a rule.
pub fn decode_body<'a>(header: &Header, payload: &'a [u8]) -> Result<Body<'a>, DecodeError> {
    let kind = header.kind;
    match kind {
        Kind::Hello => {
            let raw: RawHello = fixed(header, payload)?;
            let role = Role::from_code(raw.role.get())
                .ok_or(DecodeError::Field { kind, what: "unknown connection role" })?;
            let (version_min, version_max) = (raw.version_min.get(), raw.version_max.get());
            if version_min > version_max {
                return Err(DecodeError::Field { kind, what: "oldest version above newest" });
            }
            let owner = OwnerId::from_bytes(raw.owner);
            Ok(Body::Hello(Hello { version_min, version_max, role, owner }))
        }
        Kind::HelloAck => {
            let raw: RawHelloAck = fixed(header, payload)?;
            Ok(Body::HelloAck(HelloAck {
                version: raw.version.get(),
                store: StoreId::from_bytes(raw.store),
                free_bytes: raw.free_bytes.get(),
            }))
        }
        Kind::Open => decode_open(header, payload).map(Body::Open),
        Kind::OpenAck => {
            let raw: RawOpenAck = fixed(header, payload)?;
            let (lease_ms, stored_pages) = (raw.lease_ms.get(), raw.stored_pages.get());
            Ok(Body::OpenAck(OpenAck { lease_ms, stored_pages }))
        }
        Kind::Renew | Kind::RenewAck | Kind::Close | Kind::CloseAck => {
            size_is(header, payload, 0)?;
            Ok(Body::Empty)
        }
        Kind::Error => {
            if payload.len() > ERROR_TEXT_MAX {
                return Err(DecodeError::Field { kind, what: "error text too long" });
            }
            let text = std::str::from_utf8(payload)
                .map_err(|_| DecodeError::Field { kind, what: "error text is not UTF-8" })?;
            Ok(Body::Error(text))
        }
        _ => decode_pages(header, payload).map(Body::Pages),
    }
}

fn decode_open<'a>(header: &Header, payload: &'a [u8]) -> Result<OpenRequest<'a>, DecodeError> {
    let kind = header.kind;
    let bitmap_bytes = header.count.div_ceil(8) as usize;
    size_is(header, payload, size_of::<RawOpen>() + bitmap_bytes)?;
    let (fixed_part, bitmap) = payload.split_at(size_of::<RawOpen>());
    let raw: RawOpen = fixed(header, fixed_part)?;
    if raw.quota_bytes.get() > REGION_BYTES_MAX {
        return Err(DecodeError::Field { kind, what: "quota above the largest region" });
    }
    if raw.lease_ms.get() > LEASE_MS_MAX {
        return Err(DecodeError::Field { kind, what: "lease above the longest allowed" });
    }
    let tail_bits = header.count % 8;
    if tail_bits != 0 && bitmap.last().is_some_and(|last| last >> tail_bits != 0) {
        return Err(DecodeError::Field { kind, what: "bits set beyond the last extent" });
    }
    let open = Open {
        owner: OwnerId::from_bytes(raw.owner),
        quota_bytes: raw.quota_bytes.get(),
        lease_ms: raw.lease_ms.get(),
    };
    Ok(OpenRequest { open, bitmap, count: header.count })
}

fn decode_pages<'a>(header: &Header, payload: &'a [u8]) -> Result<PageList<'a>, DecodeError> {
    let kind = header.kind;
    let count = header.count as usize;
    let entries_bytes = count * size_of::<PageEntry>();
    let Ok((entries, data)) = <[PageEntry]>::ref_from_prefix_with_elems(payload, count) else {
        let (found, expected) = (payload.len(), entries_bytes);
        return Err(DecodeError::PayloadSize { kind, count: header.count, found, expected });
    };
    let known = EntryFlags::ZERO.0 | EntryFlags::ABSENT.0;
    for entry in entries {
        if entry.flags.get() & !known != 0 || entry.reserved.get() != 0 {
            return Err(DecodeError::Reserved { kind });
        }
        if Status::from_code(entry.status.get()).is_none() {
            return Err(DecodeError::Status { code: entry.status.get() });
        }
        if entry.page.get() >= REGION_BYTES_MAX / PAGE_BYTES as u64 {
            return Err(DecodeError::Field { kind, what: "page beyond the largest region" });
        }
    }
    let carries_data = matches!(kind, Kind::Write | Kind::ReadReply);
    let with_data = entries.iter().filter(|entry| entry.flags().has_data()).count();
    let data_bytes = if carries_data { with_data * PAGE_BYTES } else { 0 };
    size_is(header, payload, entries_bytes + data_bytes)?;
    Ok(PageList { entries, data })
}

fn size_is(header: &Header, payload: &[u8], expected: usize) -> Result<(), DecodeError> {
    if payload.len() == expected {
        return Ok(());
    }
    Err(DecodeError::PayloadSize {
        kind: header.kind,
        count: header.count,
        found: payload.len(),
        expected,
    })
}

fn fixed<T: FromBytes>(header: &Header, payload: &[u8]) -> Result<T, DecodeError> {
    T::read_from_bytes(payload).map_err(|_| DecodeError::PayloadSize {
        kind: header.kind,
        count: header.count,
        found: payload.len(),
        expected: size_of::<T>(),
    })
}

fn append(out: &mut Vec<u8>, mut header: Header, parts: &[&[u8]]) {
    let bytes: usize = parts.iter().map(|part| part.len()).sum();
    header.payload_bytes = u32::try_from(bytes).expect("payloads are bounded by the callers");
    out.reserve(HEADER_BYTES + bytes);
    out.extend_from_slice(&header.encode());
    for part in parts {
        out.extend_from_slice(part);
    }
}

impl Hello {
    /// Appends the frame to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let raw = RawHello {
            version_min: U16::new(self.version_min),
            version_max: U16::new(self.version_max),
            role: U16::new(self.role as u16),
            reserved: U16::ZERO,
            owner: self.owner.to_bytes(),
            features: U64::ZERO,
        };
        let nil = RegionId::from_bytes([0; 16]);
        append(out, Header::new(Kind::Hello, nil, Epoch(0), 0), &[raw.as_bytes()]);
    }
}

impl HelloAck {
    /// Appends the frame to `out`.
    pub fn encode(&self, request: &Header, out: &mut Vec<u8>) {
        let raw = RawHelloAck {
            version: U16::new(self.version),
            reserved: [U16::ZERO; 3],
            store: self.store.to_bytes(),
            free_bytes: U64::new(self.free_bytes),
            features: U64::ZERO,
        };
        append(out, request.reply(Kind::HelloAck, Status::Ok), &[raw.as_bytes()]);
    }
}

impl OpenAck {
    /// Appends the frame to `out`.
    pub fn encode(&self, request: &Header, out: &mut Vec<u8>) {
        let raw = RawOpenAck {
            lease_ms: U64::new(self.lease_ms),
            stored_pages: U64::new(self.stored_pages),
        };
        append(out, request.reply(Kind::OpenAck, Status::Ok), &[raw.as_bytes()]);
    }
}

/// Appends an `Open` frame for a region of `extent_count` extents of which the sponsor is to hold
/// `extents`.
///
/// # Panics
/// If an extent is not below `extent_count`.
pub fn encode_open(
    mut header: Header,
    open: &Open,
    extent_count: u32,
    extents: &[ExtentIndex],
    out: &mut Vec<u8>,
) {
    let raw = RawOpen {
        owner: open.owner.to_bytes(),
        quota_bytes: U64::new(open.quota_bytes),
        lease_ms: U64::new(open.lease_ms),
    };
    let mut bitmap = vec![0u8; extent_count.div_ceil(8) as usize];
    for extent in extents {
        assert!(extent.0 < extent_count, "extent beyond the end of the region");
        bitmap[extent.0 as usize / 8] |= 1 << (extent.0 % 8);
    }
    header.kind = Kind::Open;
    header.count = extent_count;
    append(out, header, &[raw.as_bytes(), &bitmap]);
}

/// Appends a frame of page entries followed by `data`, which must be the concatenated pages of
/// the entries that have data (and empty for kinds that carry none).
///
/// # Panics
/// If there are more entries than a frame may hold.
pub fn encode_pages(header: Header, entries: &[PageEntry], data: &[u8], out: &mut Vec<u8>) {
    encode_pages_parts(header, entries, data.len(), out);
    out.extend_from_slice(data);
}

/// Appends the header and the entries of a frame whose `data_bytes` bytes of page data the caller
/// sends after them.
///
/// # Panics
/// If there are more entries than a frame may hold.
pub fn encode_pages_parts(
    mut header: Header,
    entries: &[PageEntry],
    data_bytes: usize,
    out: &mut Vec<u8>,
) {
    assert!(entries.len() <= FRAME_PAGES_MAX, "{} entries in one frame", entries.len());
    header.count = entries.len() as u32;
    header.payload_bytes = (size_of_val(entries) + data_bytes) as u32;
    out.extend_from_slice(&header.encode());
    out.extend_from_slice(entries.as_bytes());
}

fn encode_error_text(header: Header, text: &str, out: &mut Vec<u8>) {
    let end = text.floor_char_boundary(ERROR_TEXT_MAX);
    append(out, header, &[&text.as_bytes()[..end]]);
}

impl Header {
    /// Appends the header as a frame without payload.
    pub fn encode_empty(self, out: &mut Vec<u8>) {
        append(out, Header { count: 0, ..self }, &[]);
    }

    /// Appends an `Error` frame in answer to this header: `status` says what went wrong to the
    /// program, `text` to the person. The text is cut at the limit.
    pub fn encode_error(&self, status: Status, text: &str, out: &mut Vec<u8>) {
        encode_error_text(self.reply(Kind::Error, status), text, out);
    }
}
