//! Payloads and how they are decoded.

use heca_types::limits::{
    ADDRESS_BYTES_MAX, ERROR_TEXT_MAX, LEASE_MS_MAX, PAGE_BYTES, REGION_BYTES_MAX,
};
use heca_types::{ExtentIndex, OwnerId, StoreId};
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::entry::PageEntry;
use crate::header::{DecodeError, Header, Kind};

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
    /// Copies of pages from sponsor to sponsor, and the orders to make them.
    Rebuild = 4,
    /// Between the pagers of a VM that moves: lists, and what is behind.
    Handover = 5,
    /// Between the pagers of a VM that moves: pages that the guest waits for.
    HandoverDemand = 6,
    /// Between the pagers of a VM that moves: all other pages.
    HandoverBulk = 7,
    /// Between the agents of a VM that moves: what is asked and agreed.
    Migration = 8,
    /// Between the agents of a VM that moves: QEMU's stream.
    DeviceState = 9,
}

impl Role {
    fn from_code(code: u16) -> Option<Self> {
        Self::ALL.get(usize::from(code)).copied()
    }

    const ALL: [Self; 10] = [
        Self::Control,
        Self::Demand,
        Self::Prefetch,
        Self::WriteBack,
        Self::Rebuild,
        Self::Handover,
        Self::HandoverDemand,
        Self::HandoverBulk,
        Self::Migration,
        Self::DeviceState,
    ];

    /// Whether a sponsor has anything to do with such a connection. The others are between hosts
    /// that a VM moves between.
    #[must_use]
    pub const fn is_for_sponsors(self) -> bool {
        (self as u16) < Self::Handover as u16
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
/// Also that of a `Release`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Open {
    /// Who will own it.
    pub owner: OwnerId,
    /// Bytes to reserve; in a `Release`, after it.
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

/// Flags of a [`Pong`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PongFlags(pub u32);

impl PongFlags {
    /// The sponsor is being emptied: move away what it holds.
    pub const DRAINING: Self = Self(1);
    /// The sponsor's host is short of memory.
    pub const PRESSED: Self = Self(2);

    const ALL: Self = Self(Self::DRAINING.0 | Self::PRESSED.0);

    /// Whether all bits of `other` are set.
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

/// The sponsor's answer to `Ping`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pong {
    /// State of the sponsor.
    pub flags: PongFlags,
    /// Bytes on offer that no region has reserved.
    pub free_bytes: u64,
    /// Identity of the sponsor's store.
    pub store: StoreId,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
pub(crate) struct RawHello {
    pub(crate) version_min: U16,
    pub(crate) version_max: U16,
    pub(crate) role: U16,
    pub(crate) reserved: U16,
    pub(crate) owner: [u8; 16],
    pub(crate) features: U64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
pub(crate) struct RawHelloAck {
    pub(crate) version: U16,
    pub(crate) reserved: [U16; 3],
    pub(crate) store: [u8; 16],
    pub(crate) free_bytes: U64,
    pub(crate) features: U64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
pub(crate) struct RawOpen {
    pub(crate) owner: [u8; 16],
    pub(crate) quota_bytes: U64,
    pub(crate) lease_ms: U64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
pub(crate) struct RawOpenAck {
    pub(crate) lease_ms: U64,
    pub(crate) stored_pages: U64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
pub(crate) struct RawPong {
    pub(crate) flags: U32,
    pub(crate) reserved: U32,
    pub(crate) free_bytes: U64,
    pub(crate) store: [u8; 16],
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

/// A decoded `Open` or `Release`: its fixed part and which extents the sponsor is to hold from now
/// on, or no longer.
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

/// A decoded `Pull`: which pages the sponsor is to get from which other sponsor.
#[derive(Debug, Clone, Copy)]
pub struct PullRequest<'a> {
    /// The pages, each with the version that is wanted.
    pub entries: &'a [PageEntry],
    /// Address of the sponsor that has them, `HOST:PORT`.
    pub source: &'a str,
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
    /// `Release`
    Release(OpenRequest<'a>),
    /// `Pong`
    Pong(Pong),
    /// `Pull`
    Pull(PullRequest<'a>),
    /// Every other kind that carries page entries.
    Pages(PageList<'a>),
    /// `Error`
    Error(&'a str),
    /// `Blob`
    Blob(&'a [u8]),
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
        Kind::Release => decode_open(header, payload).map(Body::Release),
        Kind::Pong => decode_pong(header, payload).map(Body::Pong),
        Kind::Pull => decode_pull(header, payload).map(Body::Pull),
        Kind::Renew
        | Kind::RenewAck
        | Kind::Close
        | Kind::CloseAck
        | Kind::Ping
        | Kind::ReleaseAck => {
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
        Kind::Blob => Ok(Body::Blob(payload)),
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

fn decode_pong(header: &Header, payload: &[u8]) -> Result<Pong, DecodeError> {
    let raw: RawPong = fixed(header, payload)?;
    let flags = PongFlags(raw.flags.get());
    if !PongFlags::ALL.contains(flags) || raw.reserved.get() != 0 {
        return Err(DecodeError::Reserved { kind: header.kind });
    }
    let store = StoreId::from_bytes(raw.store);
    Ok(Pong { flags, free_bytes: raw.free_bytes.get(), store })
}

/// The entries at the beginning of a payload, checked, and what follows them.
fn split_entries<'a>(
    header: &Header,
    payload: &'a [u8],
) -> Result<(&'a [PageEntry], &'a [u8]), DecodeError> {
    let (kind, count) = (header.kind, header.count as usize);
    let Ok((entries, rest)) = <[PageEntry]>::ref_from_prefix_with_elems(payload, count) else {
        let (found, expected) = (payload.len(), count * size_of::<PageEntry>());
        return Err(DecodeError::PayloadSize { kind, count: header.count, found, expected });
    };
    for entry in entries {
        entry.check(kind)?;
    }
    Ok((entries, rest))
}

fn decode_pull<'a>(header: &Header, payload: &'a [u8]) -> Result<PullRequest<'a>, DecodeError> {
    let kind = header.kind;
    let (entries, address) = split_entries(header, payload)?;
    if address.is_empty() || address.len() > ADDRESS_BYTES_MAX {
        return Err(DecodeError::Field { kind, what: "source address is empty or too long" });
    }
    let source = std::str::from_utf8(address)
        .map_err(|_| DecodeError::Field { kind, what: "source address is not UTF-8" })?;
    Ok(PullRequest { entries, source })
}

fn decode_pages<'a>(header: &Header, payload: &'a [u8]) -> Result<PageList<'a>, DecodeError> {
    let (entries, data) = split_entries(header, payload)?;
    let carries_data = matches!(header.kind, Kind::Write | Kind::ReadReply);
    let with_data = entries.iter().filter(|entry| entry.flags().has_data()).count();
    let data_bytes = if carries_data { with_data * PAGE_BYTES } else { 0 };
    size_is(header, payload, size_of_val(entries) + data_bytes)?;
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
