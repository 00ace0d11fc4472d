//! A VM that moves: what the engine does for its memory, on the source and on the target.

use std::io;
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use heca_core::pager::{Action, Event, Pager};
use heca_types::{Epoch, PageIndex, PageVersion};
use heca_wire::{Body, Header, Kind, PageEntry, encode_pages};

use super::super::handover::behind::Behind;
use super::super::handover::bitmap::Bitmap;
use super::super::handover::import::Incoming;
use super::super::handover::tracker::{Final, Tracker};
use super::super::handover::transfer::{Content, PageBuffer, content, page_buffer};
use super::super::remote::chain;
use super::super::start::STORED;
use super::Engine;
use crate::link::{Link, LinkError};

/// Pages around one that was touched first which are mapped along with it: 256 KiB before and after.
const AROUND: u64 = 64;
/// Time for the guest to get going before the pages are mapped that it did not touch yet.
const HEAD_START: Duration = Duration::from_millis(40);
/// Pages that are mapped in a row while nothing else is to be done.
const MAP_PAGES: u64 = 256;

/// What the engine keeps for a VM that moves.
#[derive(Default)]
pub(super) struct Moving {
    /// The VM goes to another host.
    pub(super) tracker: Option<Box<Tracker>>,
    /// The VM came from another host.
    arrival: Option<Arrival>,
}

struct Arrival {
    behind: std::sync::Arc<Behind>,
    /// Answers what the guest waits for.
    source: Option<Link>,
    asks: Vec<PageEntry>,
    room: PageBuffer,
    /// Pages that are here and were not mapped since, one bit each. A page that is to be unmapped
    /// leaves: mapping it behind the evictor's back would undo that.
    unmapped: Bitmap,
    /// Where to look for them, the last ones first.
    order: Vec<(u64, u64)>,
    /// Since when the guest may run.
    thawed: Option<Instant>,
}

impl Arrival {
    fn new(incoming: Incoming) -> Self {
        let Incoming { behind, unmapped, order } = incoming;
        Self {
            behind,
            source: None,
            asks: Vec::new(),
            room: page_buffer(),
            unmapped,
            order,
            thawed: None,
        }
    }

    fn take(&mut self, page: u64) -> bool {
        self.unmapped.clear(page)
    }

    /// Maps the pages of a range that are here and not mapped.
    fn map(&mut self, range: std::ops::Range<u64>) {
        let mut at = range.start;
        while at < range.end {
            if !self.take(at) {
                at += 1;
                continue;
            }
            let first = at;
            at += 1;
            while at < range.end && self.take(at) {
                at += 1;
            }
            let _ = self.behind.map(first..at);
        }
    }

    /// Maps some more, those that came last first. Returns whether there was anything.
    fn map_more(&mut self) -> bool {
        let Some((first, count)) = self.order.pop() else { return false };
        let now = count.min(MAP_PAGES);
        if count > now {
            self.order.push((first, count - now));
        }
        self.map(first + count - now..first + count);
        true
    }

    fn flush(&mut self) -> Result<(), LinkError> {
        let Some(link) = &mut self.source else { return Ok(()) };
        for asks in self.asks.chunks(heca_types::limits::FRAME_PAGES_MAX) {
            let region = heca_types::RegionId::from_bytes([0; 16]);
            let header = Header::new(Kind::Read, region, Epoch(0), 0);
            encode_pages(header, asks, &[], link.output());
        }
        self.asks.clear();
        link.flush().map(|_| ())
    }
}

impl Moving {
    pub(super) fn new(incoming: Option<Incoming>) -> Self {
        Self { tracker: None, arrival: incoming.map(Arrival::new) }
    }

    /// The connection to poll for pages that the guest waits for.
    pub(super) fn source(&self) -> Option<&Link> {
        self.arrival.as_ref()?.source.as_ref()
    }

    /// Whether the target was told of every page: it may own the region by now.
    pub(super) fn is_handed_over(&self) -> bool {
        self.tracker.as_ref().is_some_and(|tracker| tracker.switched)
    }

    /// Ask the source for a page.
    pub(super) fn demand(&mut self, page: PageIndex) {
        if let Some(arrival) = &mut self.arrival {
            arrival.asks.push(PageEntry::new(page, PageVersion::NEVER));
        }
    }

    /// The page is to be unmapped.
    pub(super) fn unmaps(&mut self, page: PageIndex) {
        if let Some(arrival) = &mut self.arrival {
            arrival.take(page.0);
        }
    }

    /// A page that was there and not mapped is mapped now: so are its neighbours.
    pub(super) fn mapped(&mut self, page: PageIndex, action: Action) {
        if !matches!(action, Action::Continue { protect: true, .. }) {
            // It can be written from here on, and nothing shows it that was not there before.
            self.changed(page);
        }
        if let Some(arrival) = &mut self.arrival
            && arrival.take(page.0)
        {
            arrival.map(page.0.saturating_sub(AROUND)..page.0 + AROUND);
        }
    }

    /// The page has other content than before, which is in local memory.
    pub(super) fn changed(&mut self, page: PageIndex) {
        if let Some(tracker) = &mut self.tracker {
            tracker.changed(page);
        }
    }

    /// The page leaves local memory.
    pub(super) fn left(&mut self, page: PageIndex) {
        if let Some(tracker) = &mut self.tracker {
            tracker.left(page);
        }
    }

    /// Looks at an event before the machine does.
    pub(super) fn hear(&mut self, event: &Event) {
        if let Event::Unmapped { page, outcome, .. } = event
            && Pager::shows_write(*outcome)
        {
            self.changed(*page);
        }
    }
}

impl Engine {
    pub(super) fn set_source(&mut self, link: Option<Box<Link>>) {
        let Some(arrival) = &mut self.moving.arrival else { return };
        arrival.asks.clear();
        arrival.source = link.map(|link| *link);
        if arrival.source.is_some() {
            self.dispatch(Event::SourceBack, None);
        }
    }

    pub(super) fn begin_look(&mut self, send: bool, done: Sender<u64>) {
        if let Some(tracker) = &mut self.moving.tracker {
            tracker.begin_look(send, done);
        }
    }

    /// Freezes the machine and tells all that the next owner must know.
    pub(super) fn switch(&mut self) -> io::Result<Final> {
        self.dispatch(Event::Freeze { on: true }, None);
        let stored = self.context.journal.number(STORED);
        let Some(tracker) = &mut self.moving.tracker else {
            return Err(io::Error::other("the memory of this VM goes nowhere"));
        };
        tracker.finish(&self.core, stored)
    }

    /// Goes on with what the move of a VM calls for. Returns whether there was anything.
    pub(super) fn move_on(&mut self, idle: bool) -> bool {
        let mut busy = false;
        if let Some(tracker) = &mut self.moving.tracker
            && tracker.has_work()
        {
            busy = true;
            if let Err(error) = tracker.work(&mut self.core) {
                // The look that waits for an answer gets none.
                tracing::error!(%error, "cannot look for written pages");
                self.moving.tracker = None;
            }
        }
        if self.moving.arrival.is_some() {
            busy |= self.take_from_source();
        }
        if idle
            && !busy
            && !self.core.is_frozen()
            && let Some(arrival) = &mut self.moving.arrival
        {
            // Until the guest may run, and while it takes its first steps, others need the processor
            // more: its timers, above all.
            let since = *arrival.thawed.get_or_insert_with(Instant::now);
            if since.elapsed() > HEAD_START {
                busy |= arrival.map_more();
            }
        }
        busy
    }

    /// Takes in pages that the guest waits for, and asks for others.
    fn take_from_source(&mut self) -> bool {
        let Some(arrival) = &mut self.moving.arrival else { return false };
        let mut arrived = Vec::new();
        // Those that were taken are told of whatever became of the others.
        let outcome = receive(arrival, &mut arrived).and_then(|()| arrival.flush());
        if let Err(error) = outcome {
            tracing::debug!("the source does not answer: {}", chain(&error));
            arrival.asks.clear();
            if let Some(link) = arrival.source.take() {
                link.shut_down();
            }
        }
        for &page in &arrived {
            self.dispatch(Event::Arrived { page }, None);
        }
        !arrived.is_empty()
    }
}

fn receive(arrival: &mut Arrival, arrived: &mut Vec<PageIndex>) -> Result<(), LinkError> {
    let Some(link) = &mut arrival.source else { return Ok(()) };
    if !link.receive()? {
        return Ok(());
    }
    while let Some((header, body)) = link.next_frame()? {
        let list = match body {
            Body::Pages(list) if header.kind == Kind::Write => list,
            _ => return Err(LinkError::Unexpected { found: header.kind }),
        };
        for (entry, data) in list.iter() {
            let content = content(entry, data, &mut arrival.room);
            let content = content.ok_or_else(|| io::Error::other("a page came damaged"))?;
            let bytes = match content {
                Content::Zeros => None,
                Content::Bytes(bytes) => Some(bytes),
                Content::Room => Some(&arrival.room[..]),
            };
            if arrival.behind.bring(entry.page(), bytes)? {
                arrived.push(entry.page());
            }
        }
    }
    Ok(())
}
