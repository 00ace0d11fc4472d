//! Frames of the page protocol between a demander's pager and a memory sponsor.
//!
//! A frame is a 64-byte [`Header`] and a payload. Everything is little-endian. This crate encodes
//! and decodes; it does no I/O, allocates only where the caller hands it a `Vec`, and never trusts
//! a length that it has not compared with a limit. `docs/protocol.md` has the byte tables.
//!
//! | kind | from | payload |
//! |---|---|---|
//! | `Hello`, `HelloAck` | both | [`Hello`], [`HelloAck`] |
//! | `Open`, `OpenAck` | pager, sponsor | [`Open`] + extent bitmap, [`OpenAck`] |
//! | `Renew`, `Close` and their acks | pager, sponsor | none |
//! | `Ping`, `Pong` | pager, sponsor | none, [`Pong`] |
//! | `Release`, `ReleaseAck` | pager, sponsor | [`Open`] + extent bitmap, none |
//! | `Read`, `Stat`, `Discard`, `WriteAck`, `StatReply`, `DiscardAck`, `PullAck` | | page entries |
//! | `Pull` | pager | page entries + address |
//! | `Write`, `ReadReply` | | page entries + page data |
//! | `Error` | sponsor | text |
//! | `Blob` | hosts that a VM moves between | any bytes |
#![forbid(unsafe_code)]

mod body;
mod checksum;
mod encode;
mod entry;
pub mod fuzz;
mod header;

pub use body::{
    Body, Hello, HelloAck, Open, OpenAck, OpenRequest, PageList, Pong, PongFlags, PullRequest,
    Role, decode_body,
};
pub use checksum::{is_zero_page, page_checksum};
pub use encode::{
    encode_blob, encode_open, encode_pages, encode_pages_parts, encode_pull, encode_release,
};
pub use entry::{EntryFlags, PageEntry};
pub use header::{DecodeError, HEADER_BYTES, Header, Kind, MAGIC, VERSION_MAX, VERSION_MIN};
