//! How frames are put together.

use heca_types::limits::{ADDRESS_BYTES_MAX, ERROR_TEXT_MAX, FRAME_PAGES_MAX, FRAME_PAYLOAD_MAX};
use heca_types::{Epoch, ExtentIndex, RegionId, Status};
use zerocopy::IntoBytes;
use zerocopy::byteorder::little_endian::{U16, U32, U64};

use crate::body::{Hello, HelloAck, Open, OpenAck, Pong};
use crate::body::{RawHello, RawHelloAck, RawOpen, RawOpenAck, RawPong};
use crate::entry::PageEntry;
use crate::header::{HEADER_BYTES, Header, Kind};

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

impl Pong {
    /// Appends the frame to `out`.
    pub fn encode(&self, request: &Header, out: &mut Vec<u8>) {
        let raw = RawPong {
            flags: U32::new(self.flags.0),
            reserved: U32::ZERO,
            free_bytes: U64::new(self.free_bytes),
            store: self.store.to_bytes(),
        };
        append(out, request.reply(Kind::Pong, Status::Ok), &[raw.as_bytes()]);
    }
}

/// Appends an `Open` frame for a region of `extent_count` extents of which the sponsor is to hold
/// `extents`.
///
/// # Panics
/// If an extent is not below `extent_count`.
pub fn encode_open(
    header: Header,
    open: &Open,
    extent_count: u32,
    extents: &[ExtentIndex],
    out: &mut Vec<u8>,
) {
    encode_extents(Header { kind: Kind::Open, ..header }, open, extent_count, extents, out);
}

/// Appends a `Release` frame for a region of `extent_count` extents of which the sponsor is to
/// hold `extents` no longer.
///
/// # Panics
/// If an extent is not below `extent_count`.
pub fn encode_release(
    header: Header,
    release: &Open,
    extent_count: u32,
    extents: &[ExtentIndex],
    out: &mut Vec<u8>,
) {
    encode_extents(Header { kind: Kind::Release, ..header }, release, extent_count, extents, out);
}

fn encode_extents(
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

/// Appends a `Pull` frame: the sponsor is to get these pages, in the versions that the entries
/// name, from the sponsor at the address `source`.
///
/// # Panics
/// If there are more entries than a frame may hold, or the address is empty or too long.
pub fn encode_pull(header: Header, entries: &[PageEntry], source: &str, out: &mut Vec<u8>) {
    assert!((1..=ADDRESS_BYTES_MAX).contains(&source.len()), "address of {} bytes", source.len());
    encode_pages_parts(Header { kind: Kind::Pull, ..header }, entries, source.len(), out);
    out.extend_from_slice(source.as_bytes());
}

/// Appends a frame of bytes whose meaning only its two ends know.
///
/// # Panics
/// If there are more bytes than a frame may hold.
pub fn encode_blob(header: Header, bytes: &[u8], out: &mut Vec<u8>) {
    assert!(bytes.len() <= FRAME_PAYLOAD_MAX, "a blob of {} bytes", bytes.len());
    append(out, Header { kind: Kind::Blob, count: 0, ..header }, &[bytes]);
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
