//! The memory of a VM that moves to another host, from pager to pager.
//!
//! The source's pager connects to the target's, several times:
//!
//! | connection | carries |
//! |---|---|
//! | handover | from the source: that it begins, and at the switch what is told of every page; from the target: which pages are behind after a reconnect, and that none is any more |
//! | demand | from the target: pages that its guest waits for; from the source: those pages |
//! | bulk, two of them | from the source: all other pages; pages that went to sponsors since they were sent |
//!
//! Before the switch, pages go straight into the target's RAM file, unmapped. A page that is written
//! later is sent again. At the switch the source freezes, looks once more for pages that were
//! written, and tells of each page whether it is zeros, on sponsors, sent, or behind. After it a page
//! that is behind is sent once, by whichever connection is first.
//!
//! - [`tracker`]: what the target has, kept by the source's engine.
//! - [`export`]: the source's connections and threads.
//! - [`behind`]: pages that are behind, and how they get into the target's memory.
//! - [`import`]: the target's connections, and the switch there.

pub(super) mod behind;
pub(super) mod bitmap;
pub(super) mod export;
pub(super) mod import;
mod outgoing;
mod receive;
pub(super) mod tracker;
pub(super) mod transfer;

use heca_types::limits::FRAME_PAYLOAD_MAX;
use heca_types::{Epoch, RegionId};
use heca_wire::{Body, Header, Kind, encode_blob};
use serde::{Deserialize, Serialize};

use crate::link::{Link, LinkError};

/// Bulk connections of one handover.
pub(super) const BULK_LINKS: usize = 2;

/// What a message on the handover connection is; the header's request number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub(super) enum Tag {
    /// A part of a message; more follows.
    Part = 1,
    /// From the source: [`Begin`].
    Begin = 2,
    /// From the source: [`Switch`], and the records of all pages.
    Switch = 3,
    /// From the target: which pages are behind, after a reconnect.
    Pending = 4,
    /// From the target: the switch was taken in, every page is accounted for.
    Applied = 5,
    /// From the target: no page is behind any more.
    Done = 6,
    /// On a bulk connection: what comes from here on is sent after the switch.
    Barrier = 7,
}

impl Tag {
    const ALL: [Self; 7] = [
        Self::Part,
        Self::Begin,
        Self::Switch,
        Self::Pending,
        Self::Applied,
        Self::Done,
        Self::Barrier,
    ];

    fn of(number: u64) -> Option<Self> {
        Self::ALL.into_iter().find(|tag| *tag as u64 == number)
    }
}

/// First message of a source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Begin {
    /// Whether the switch is over: the target is to tell which pages are behind.
    pub(super) switched: bool,
}

/// What the source tells of the region at the switch, beside the records of its pages.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Switch {
    /// Pages in the region.
    pub(super) pages: u64,
    /// Record of each extent.
    pub(super) extents: Vec<u64>,
    /// Sponsors that ever stored a page, one bit each.
    pub(super) stored: u64,
    /// Bytes of the records that follow.
    pub(super) record_bytes: usize,
}

/// Largest message, in bytes.
const MESSAGE_BYTES_MAX: usize = 1 << 30;

/// Appends a message, in as many frames as it takes.
pub(super) fn encode_message(region: RegionId, tag: Tag, bytes: &[u8], out: &mut Vec<u8>) {
    let mut rest = bytes;
    while rest.len() > FRAME_PAYLOAD_MAX {
        let (part, more) = rest.split_at(FRAME_PAYLOAD_MAX);
        encode_blob(Header::new(Kind::Blob, region, Epoch(0), Tag::Part as u64), part, out);
        rest = more;
    }
    encode_blob(Header::new(Kind::Blob, region, Epoch(0), tag as u64), rest, out);
}

/// Waits for the next message, as long as the connection's timeout allows between its parts.
pub(super) fn read_message(link: &mut Link) -> Result<(Tag, Vec<u8>), LinkError> {
    let mut bytes = Vec::new();
    loop {
        while !link.has_frame()? {
            link.receive_blocking()?;
        }
        let Some((header, body)) = link.next_frame()? else { continue };
        let Body::Blob(part) = body else {
            return Err(LinkError::Unexpected { found: header.kind });
        };
        let tag = Tag::of(header.request);
        bytes.extend_from_slice(part);
        match tag {
            Some(Tag::Part) if bytes.len() <= MESSAGE_BYTES_MAX => {}
            Some(tag) if tag != Tag::Part => return Ok((tag, bytes)),
            _ => return Err(LinkError::Unexpected { found: header.kind }),
        }
    }
}

/// Reads the JSON of a message.
pub(super) fn parse<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, LinkError> {
    serde_json::from_slice(bytes).map_err(|error| std::io::Error::other(error).into())
}

/// Has the calling thread give way to others: guests and faults come first.
pub(super) fn be_nice() {
    const NICE: i32 = 10;
    if let Err(error) = rustix::process::nice(NICE) {
        tracing::debug!(%error, "bulk threads are as urgent as all others");
    }
}
