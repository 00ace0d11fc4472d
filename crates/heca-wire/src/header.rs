//! The fixed header.

use crc_fast::CrcAlgorithm;
use heca_types::limits::{FRAME_PAGES_MAX, FRAME_PAYLOAD_MAX, REGION_EXTENTS_MAX};
use heca_types::{Epoch, RegionId, Status};
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// First four bytes of every frame: `HECA`.
pub const MAGIC: [u8; 4] = *b"HECA";
/// Size of the header, in bytes.
pub const HEADER_BYTES: usize = 64;
/// Oldest protocol version that this build speaks.
pub const VERSION_MIN: u16 = 2;
/// Newest protocol version that this build speaks.
pub const VERSION_MAX: u16 = 2;

/// What a frame is. The numbers are part of the wire format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u16)]
#[allow(missing_docs, reason = "the table in the crate's documentation describes each kind")]
pub enum Kind {
    Hello = 1,
    HelloAck = 2,
    Open = 3,
    OpenAck = 4,
    Renew = 5,
    RenewAck = 6,
    Close = 7,
    CloseAck = 8,
    Ping = 9,
    Pong = 10,
    Release = 11,
    ReleaseAck = 12,
    Read = 16,
    ReadReply = 17,
    Write = 18,
    WriteAck = 19,
    Discard = 20,
    DiscardAck = 21,
    Stat = 22,
    StatReply = 23,
    Pull = 24,
    PullAck = 25,
    Error = 32,
    Blob = 33,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Self; 24] = [
        Self::Hello,
        Self::HelloAck,
        Self::Open,
        Self::OpenAck,
        Self::Renew,
        Self::RenewAck,
        Self::Close,
        Self::CloseAck,
        Self::Ping,
        Self::Pong,
        Self::Release,
        Self::ReleaseAck,
        Self::Read,
        Self::ReadReply,
        Self::Write,
        Self::WriteAck,
        Self::Discard,
        Self::DiscardAck,
        Self::Stat,
        Self::StatReply,
        Self::Pull,
        Self::PullAck,
        Self::Error,
        Self::Blob,
    ];

    fn from_code(code: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u16 == code)
    }

    /// Whether the header's count is a number of page entries.
    #[must_use]
    pub fn has_pages(self) -> bool {
        (Self::Read as u16..=Self::PullAck as u16).contains(&(self as u16))
    }
}

/// Why bytes are not a frame. A peer that sends such bytes is answered with an error frame where
/// that is possible, and disconnected: after a broken frame nobody knows where the next begins.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// The first bytes are not those of this protocol.
    #[error("not a Hecatonchire frame: starts with {found:02x?}, expected {MAGIC:02x?}")]
    Magic {
        /// The bytes found.
        found: [u8; 4],
    },
    /// A version that this build does not speak.
    #[error("protocol version {version}: this build speaks {VERSION_MIN} to {VERSION_MAX}")]
    Version {
        /// The version found.
        version: u16,
    },
    /// The header's own checksum is wrong.
    #[error("header checksum {found:#010x}, computed {computed:#010x}")]
    HeaderChecksum {
        /// In the frame.
        found: u32,
        /// Over the frame.
        computed: u32,
    },
    /// A kind that this build does not know.
    #[error("unknown frame kind {code}")]
    Kind {
        /// The number found.
        code: u16,
    },
    /// An outcome code that this build does not know.
    #[error("unknown status {code}")]
    Status {
        /// The number found.
        code: u16,
    },
    /// The payload is larger than any frame may be.
    #[error("payload of {bytes} bytes; {FRAME_PAYLOAD_MAX} are allowed")]
    PayloadTooLarge {
        /// Announced size.
        bytes: u32,
    },
    /// More entries than a frame may hold.
    #[error("{count} entries in a {kind:?} frame; {max} are allowed")]
    TooManyEntries {
        /// The frame's kind.
        kind: Kind,
        /// Announced number.
        count: u32,
        /// The limit.
        max: u32,
    },
    /// Reserved bits are set: the peer uses something this build does not know.
    #[error("reserved bits are set in a {kind:?} frame")]
    Reserved {
        /// The frame's kind.
        kind: Kind,
    },
    /// The payload does not have the size that its kind and count call for.
    #[error("{kind:?} frame of {count} entries: payload has {found} bytes, expected {expected}")]
    PayloadSize {
        /// The frame's kind.
        kind: Kind,
        /// Its number of entries.
        count: u32,
        /// Bytes found.
        found: usize,
        /// Bytes expected.
        expected: usize,
    },
    /// A field of a payload has a value that is not allowed.
    #[error("{kind:?} frame: {what}")]
    Field {
        /// The frame's kind.
        kind: Kind,
        /// What is wrong.
        what: &'static str,
    },
}

/// A decoded header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// What the frame is.
    pub kind: Kind,
    /// Outcome; `Ok` in requests.
    pub status: Status,
    /// Number of page entries, or of extents in an `Open` or `Release`.
    pub count: u32,
    /// Bytes after the header.
    pub payload_bytes: u32,
    /// Chosen by the requester, repeated in the reply.
    pub request: u64,
    /// Fencing token of the region.
    pub epoch: Epoch,
    /// The region; nil in `Hello`, and in a `Ping` that asks for no region.
    pub region: RegionId,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 4],
    version: U16,
    kind: U16,
    status: U16,
    flags: U16,
    count: U32,
    payload_bytes: U32,
    checksum: U32,
    request: U64,
    epoch: U64,
    region: [u8; 16],
    reserved: U64,
}

const _: () = assert!(size_of::<RawHeader>() == HEADER_BYTES);

impl RawHeader {
    fn computed_checksum(mut self) -> u32 {
        self.checksum = U32::ZERO;
        crc_fast::checksum(CrcAlgorithm::Crc32Iscsi, self.as_bytes()) as u32
    }
}

/// Puts the right checksum into a header, so that a fuzzer gets past it.
pub(crate) fn repair(bytes: &mut [u8; HEADER_BYTES]) {
    let mut raw: RawHeader = zerocopy::transmute!(*bytes);
    raw.checksum = U32::new(raw.computed_checksum());
    *bytes = zerocopy::transmute!(raw);
}

impl Header {
    /// A header without payload and with status `Ok`.
    #[must_use]
    pub fn new(kind: Kind, region: RegionId, epoch: Epoch, request: u64) -> Self {
        Self { kind, status: Status::Ok, count: 0, payload_bytes: 0, request, epoch, region }
    }

    /// The reply's header: same request, region and epoch.
    #[must_use]
    pub fn reply(&self, kind: Kind, status: Status) -> Self {
        Self { kind, status, count: 0, payload_bytes: 0, ..*self }
    }

    /// The header's bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut raw = RawHeader {
            magic: MAGIC,
            version: U16::new(VERSION_MAX),
            kind: U16::new(self.kind as u16),
            status: U16::new(self.status.code()),
            flags: U16::ZERO,
            count: U32::new(self.count),
            payload_bytes: U32::new(self.payload_bytes),
            checksum: U32::ZERO,
            request: U64::new(self.request),
            epoch: U64::new(self.epoch.0),
            region: self.region.to_bytes(),
            reserved: U64::ZERO,
        };
        raw.checksum = U32::new(raw.computed_checksum());
        zerocopy::transmute!(raw)
    }

    /// Reads a header and checks everything that can be checked without the payload.
    ///
    /// # Errors
    /// See [`DecodeError`]. Magic, version and checksum are looked at in this order, so that a
    /// foreign or newer peer is named as such.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, DecodeError> {
        let raw: RawHeader = zerocopy::transmute!(*bytes);
        if raw.magic != MAGIC {
            return Err(DecodeError::Magic { found: raw.magic });
        }
        let version = raw.version.get();
        if !(VERSION_MIN..=VERSION_MAX).contains(&version) {
            return Err(DecodeError::Version { version });
        }
        let computed = raw.computed_checksum();
        if raw.checksum.get() != computed {
            return Err(DecodeError::HeaderChecksum { found: raw.checksum.get(), computed });
        }
        let kind =
            Kind::from_code(raw.kind.get()).ok_or(DecodeError::Kind { code: raw.kind.get() })?;
        let status = Status::from_code(raw.status.get())
            .ok_or(DecodeError::Status { code: raw.status.get() })?;
        if raw.flags.get() != 0 || raw.reserved.get() != 0 {
            return Err(DecodeError::Reserved { kind });
        }
        if raw.payload_bytes.get() as usize > FRAME_PAYLOAD_MAX {
            return Err(DecodeError::PayloadTooLarge { bytes: raw.payload_bytes.get() });
        }
        let max = match kind {
            Kind::Open | Kind::Release => REGION_EXTENTS_MAX,
            kind if kind.has_pages() => FRAME_PAGES_MAX as u32,
            _ => 0,
        };
        if raw.count.get() > max {
            return Err(DecodeError::TooManyEntries { kind, count: raw.count.get(), max });
        }
        Ok(Self {
            kind,
            status,
            count: raw.count.get(),
            payload_bytes: raw.payload_bytes.get(),
            request: raw.request.get(),
            epoch: Epoch(raw.epoch.get()),
            region: RegionId::from_bytes(raw.region),
        })
    }
}
