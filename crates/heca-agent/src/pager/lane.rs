//! One connection to one sponsor with the requests that are in flight on it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use heca_core::pager::FetchError;
use heca_types::limits::{DEMAND_PAGES_IN_FLIGHT_MAX, FRAME_PAGES_MAX, PAGE_BYTES};
use heca_types::{Epoch, PageIndex, PageVersion, RegionId, Status};
use heca_wire::{Body, EntryFlags, Header, Kind, PageEntry, encode_pages, page_checksum};

use super::remote::Peer;
use crate::link::{Link, LinkError};
use crate::seal::Sealer;

/// Pages in one prefetch request: a demand read that turns out to wait for it does not wait long.
const PREFETCH_FRAME_PAGES: usize = 32;

/// A page that was asked for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asked {
    pub(super) page: PageIndex,
    pub(super) version: PageVersion,
    request: u64,
    pub(super) sent: Instant,
}

/// What opens the pages that were sealed before they left.
pub(super) type Seal = Option<Arc<Sealer>>;

/// Reads for faults, or reads ahead of them.
#[derive(Debug)]
pub(super) struct ReadLane {
    pub(super) link: Link,
    /// The epoch under which the sponsor knew this owner when the connection was made.
    pub(super) opened_under: Epoch,
    peer: Arc<Peer>,
    region: RegionId,
    frame_pages: usize,
    pending: VecDeque<(PageIndex, PageVersion)>,
    in_flight: VecDeque<Asked>,
    /// So many of the oldest in flight are known to be overdue.
    late: usize,
    seal: Seal,
    opened: Box<[u8]>,
    next_request: u64,
    entries: Vec<PageEntry>,
}

/// Outcome of one page of a reply: its content.
pub(super) type Answer<'a> = Result<&'a [u8], FetchError>;

static ZERO_PAGE: [u8; PAGE_BYTES] = [0; PAGE_BYTES];

impl ReadLane {
    pub(super) fn new(
        link: Link,
        peer: Arc<Peer>,
        region: RegionId,
        prefetch: bool,
        seal: Seal,
    ) -> Self {
        Self {
            link,
            opened_under: peer.epoch(),
            peer,
            region,
            frame_pages: if prefetch { PREFETCH_FRAME_PAGES } else { FRAME_PAGES_MAX },
            pending: VecDeque::new(),
            in_flight: VecDeque::new(),
            late: 0,
            seal,
            opened: vec![0; PAGE_BYTES].into_boxed_slice(),
            next_request: 1,
            entries: Vec::with_capacity(FRAME_PAGES_MAX),
        }
    }

    pub(super) fn ask(&mut self, page: PageIndex, version: PageVersion) {
        self.pending.push_back((page, version));
    }

    pub(super) fn is_waiting(&self) -> bool {
        !self.in_flight.is_empty()
    }

    /// When the oldest request in flight was sent.
    pub(super) fn oldest(&self) -> Option<Instant> {
        self.in_flight.front().map(|asked| asked.sent)
    }

    /// When the oldest request that is not overdue yet was sent.
    pub(super) fn next_due(&self) -> Option<Instant> {
        self.in_flight.get(self.late).map(|asked| asked.sent)
    }

    /// The next page that was asked for before `since` and was not called overdue yet.
    pub(super) fn take_overdue(&mut self, since: Instant) -> Option<PageIndex> {
        let asked = self.in_flight.get(self.late).filter(|asked| asked.sent < since)?;
        self.late += 1;
        Some(asked.page)
    }

    /// Pages in flight that were asked for before `since`.
    pub(super) fn pages_before(&self, since: Instant) -> impl Iterator<Item = PageIndex> {
        self.in_flight.iter().take_while(move |asked| asked.sent < since).map(|asked| asked.page)
    }

    /// Sends what was asked for, as far as the pipeline's bound allows.
    pub(super) fn flush(&mut self) -> Result<(), LinkError> {
        while !self.pending.is_empty() && self.in_flight.len() < DEMAND_PAGES_IN_FLIGHT_MAX {
            let sent = Instant::now();
            let request = self.next_request;
            self.next_request += 1;
            self.entries.clear();
            while self.entries.len() < self.frame_pages {
                let Some((page, version)) = self.pending.pop_front() else { break };
                self.entries.push(PageEntry::new(page, version));
                self.in_flight.push_back(Asked { page, version, request, sent });
            }
            let header = Header::new(Kind::Read, self.region, self.peer.epoch(), request);
            encode_pages(header, &self.entries, &[], self.link.output());
        }
        if self.link.has_output() { self.link.flush().map(|_| ()) } else { Ok(()) }
    }

    /// Takes in replies and hands each page to `take`, in the order of the requests. Returns
    /// whether anything arrived.
    pub(super) fn receive(
        &mut self,
        mut take: impl FnMut(Asked, Answer<'_>),
    ) -> Result<bool, LinkError> {
        if !self.link.receive()? {
            return Ok(false);
        }
        while let Some((header, body)) = self.link.next_frame()? {
            match body {
                Body::Pages(list) if header.kind == Kind::ReadReply => {
                    for (entry, data) in list.iter() {
                        // What does not match stays in flight, to be lost with the connection.
                        let Some(asked) = self.in_flight.front().copied().filter(|asked| {
                            asked.request == header.request && asked.page == entry.page()
                        }) else {
                            return Err(LinkError::Unexpected { found: header.kind });
                        };
                        self.in_flight.pop_front();
                        self.late = self.late.saturating_sub(1);
                        let answer = judge(&asked, entry, data);
                        let answer = match (&self.seal, answer) {
                            (Some(seal), Ok(bytes)) => {
                                open_sealed(seal, &asked, entry, bytes, &mut self.opened)
                            }
                            (_, answer) => answer,
                        };
                        take(asked, answer);
                    }
                }
                Body::Error(_) if is_of_released(&self.in_flight, &self.peer, &header) => {
                    while let Some(asked) = self.in_flight.front().copied()
                        && asked.request == header.request
                    {
                        self.in_flight.pop_front();
                        self.late = self.late.saturating_sub(1);
                        take(asked, Err(FetchError::Refused));
                    }
                }
                Body::Error(text) => {
                    // What was asked counts as lost with the connection: another replica, or the
                    // same sponsor after it opened the region again, may have it.
                    let text = text.to_owned();
                    return Err(LinkError::Refused { status: header.status, text });
                }
                _ => return Err(LinkError::Unexpected { found: header.kind }),
            }
        }
        Ok(true)
    }

    /// Everything that will not be answered any more.
    pub(super) fn abandon(self) -> impl Iterator<Item = PageIndex> {
        self.link.shut_down();
        let asked = self.in_flight.into_iter().map(|asked| asked.page);
        asked.chain(self.pending.into_iter().map(|(page, _)| page))
    }
}

/// Whether a refusal is of reads that were under way when the sponsor was told to give up the last
/// extents that it held: it knows nothing of the region any more, and need not.
fn is_of_released(in_flight: &VecDeque<Asked>, peer: &Peer, header: &Header) -> bool {
    let mut asked = in_flight.iter().take_while(|a| a.request == header.request).peekable();
    header.status == Status::UnknownRegion
        && asked.peek().is_some()
        && asked.all(|asked| peer.gave_up(asked.page.extent()))
}

/// Whether a refusal will be repeated however often one asks.
pub(super) fn is_final(status: Status) -> bool {
    !matches!(status, Status::Ok | Status::ChecksumMismatch | Status::Superseded)
}

fn judge<'a>(asked: &Asked, entry: &PageEntry, data: Option<&'a [u8]>) -> Answer<'a> {
    if entry.status() != Status::Ok {
        return Err(FetchError::Refused);
    }
    if entry.flags().contains(EntryFlags::ABSENT) || entry.version() != asked.version {
        return Err(FetchError::Absent);
    }
    if entry.flags().contains(EntryFlags::SAME) {
        // No sponsor was given such a thing.
        return Err(FetchError::Corrupt);
    }
    let bytes = data.unwrap_or(&ZERO_PAGE);
    if page_checksum(asked.page, asked.version, bytes) != entry.checksum() {
        return Err(FetchError::Corrupt);
    }
    Ok(bytes)
}

/// Opens a page that was sealed under the version asked for: anything else than what this pager
/// stored under it does not open.
fn open_sealed<'a>(
    seal: &Sealer,
    asked: &Asked,
    entry: &PageEntry,
    bytes: &[u8],
    opened: &'a mut [u8],
) -> Answer<'a> {
    let (page, version) = (asked.page, asked.version);
    let outcome = if entry.flags().contains(EntryFlags::ZERO) {
        opened.fill(0);
        seal.open_zero(page, version, &entry.tag())
    } else {
        opened.copy_from_slice(bytes);
        seal.open(page, version, opened, &entry.tag())
    };
    match outcome {
        Ok(()) => Ok(opened),
        Err(error) => {
            tracing::error!("{error}");
            Err(FetchError::Corrupt)
        }
    }
}
