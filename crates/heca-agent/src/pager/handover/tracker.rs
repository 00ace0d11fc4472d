//! The source: which pages the target has as they are now. Kept by the engine, beside its machine.
//!
//! A page's bit in `fresh` is set by whoever sends it, *before* it is read. It is cleared when the
//! page is found written, or when it leaves local memory. So a bit that is set means: the target
//! has the page, or will have it once all that was sent is there, unless it was written since the
//! last look. The last look comes when the guest stands still, and takes for written what it does
//! not see to be unwritten.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crossbeam_channel::Sender;
use heca_core::handover::{PageRecord, encode_records};
use heca_core::pager::{Holding, Pager};
use heca_sys::pagemap::{Pagemap, Unwritten};
use heca_types::limits::{EXTENT_BYTES, FRAME_PAGES_MAX, PAGE_BYTES};
use heca_types::{ExtentIndex, PageIndex};

use super::bitmap::{AtomicBitmap, Bitmap};
use super::{BULK_LINKS, Switch};
use crate::pager::preflight::Target;

/// Of the last four looks, those that must have found a page written for it to be hot.
const HOT_LOOKS: u32 = 3;
/// Pages that go over one bulk connection in a row, so that a page always takes the same one.
const STRIPE_PAGES: u64 = 512;

/// What a bulk thread is to do.
#[derive(Debug)]
pub(in super::super) enum Work {
    /// Send these pages.
    Pages(Vec<u64>),
    /// Tell that these pages went elsewhere.
    Drop(Vec<u64>),
    /// Nothing more comes before the switch.
    Barrier,
}

/// Shared by the engine and the threads that send.
#[derive(Debug)]
pub(in super::super) struct Shared {
    /// See the module.
    pub(super) fresh: AtomicBitmap,
    /// Pages that were sent at least once and not dropped since.
    pub(super) sent: AtomicBitmap,
    /// Pages that wait to be sent.
    pub(super) queued: AtomicU64,
    /// Pages waiting are not to be sent any more: the switch begins.
    pub(super) closing: AtomicBool,
    pub(super) work: Vec<Sender<Work>>,
}

impl Shared {
    pub(super) fn new(pages: u64, work: Vec<Sender<Work>>) -> Self {
        Self {
            fresh: AtomicBitmap::new(pages),
            sent: AtomicBitmap::new(pages),
            queued: AtomicU64::new(0),
            closing: AtomicBool::new(false),
            work,
        }
    }

    /// The connection that a page takes before the switch: order matters between its sendings.
    fn lane(&self, page: u64) -> &Sender<Work> {
        &self.work[(page / STRIPE_PAGES) as usize % BULK_LINKS]
    }
}

/// A look for written pages that is under way.
#[derive(Debug)]
struct Look {
    next: u64,
    send: bool,
    pages: u64,
    done: Sender<u64>,
}

/// What the engine keeps while its VM's memory goes to another host.
#[derive(Debug)]
pub(in super::super) struct Tracker {
    shared: Arc<Shared>,
    pagemap: Pagemap,
    target: Target,
    look: Option<Look>,
    /// One bit for each of the last looks that found the page written, the newest lowest.
    heat: Vec<u8>,
    dropped: Vec<u64>,
    /// The target was told of every page: nothing changes any more.
    pub(in super::super) switched: bool,
}

/// What the target is told, and what is left to be sent.
#[derive(Debug)]
pub(in super::super) struct Final {
    pub(super) switch: Switch,
    pub(super) records: Vec<u8>,
    /// Pages that are behind.
    behind: Vec<Range<u64>>,
    heat: Vec<u8>,
}

impl Final {
    /// Pages that are behind, the likeliest to be needed first, and how many of them were written all
    /// the time. Takes a while: the target is told first.
    pub(super) fn order(&self) -> (Vec<u64>, usize) {
        // Pages that nearly every look found written: what a guest writes without end it needs at
        // once. Then by how often the last looks found them.
        let mut buckets: [Vec<u64>; 5] = Default::default();
        for page in self.behind.iter().cloned().flatten() {
            let heat = self.heat[page as usize] & 0xf;
            buckets[heat.count_ones() as usize].push(page);
        }
        let hot = buckets[HOT_LOOKS as usize..].iter().map(Vec::len).sum();
        (buckets.into_iter().rev().flatten().collect(), hot)
    }
}

impl Tracker {
    pub(in super::super) fn new(shared: Arc<Shared>, target: Target) -> io::Result<Self> {
        let pages = target.len / PAGE_BYTES as u64;
        Ok(Self {
            shared,
            pagemap: Pagemap::open(target.pid)?,
            target,
            look: None,
            heat: vec![0; pages as usize],
            dropped: Vec::new(),
            switched: false,
        })
    }

    /// Begins to look for pages that were written since the last time, and protects them anew.
    /// With `send`, what the target does not have is queued. `done` is told how many were written.
    pub(in super::super) fn begin_look(&mut self, send: bool, done: Sender<u64>) {
        self.look = Some(Look { next: 0, send, pages: 0, done });
    }

    /// Whether a look is under way.
    pub(in super::super) fn has_work(&self) -> bool {
        self.look.is_some() || !self.dropped.is_empty()
    }

    /// Looks at the next extent.
    pub(in super::super) fn work(&mut self, core: &mut Pager) -> io::Result<()> {
        self.send_drops();
        let Some(mut look) = self.look.take() else { return Ok(()) };
        let first = look.next;
        let all = self.heat.len() as u64;
        let end = (first + EXTENT_BYTES / PAGE_BYTES as u64).min(all);
        self.heat[first as usize..end as usize].iter_mut().for_each(|heat| *heat <<= 1);
        let base = self.target.base;
        let number = |address: u64| (address - base) / PAGE_BYTES as u64;
        let address = |page: u64| base + page * PAGE_BYTES as u64;
        let (heat, shared) = (&mut self.heat, &self.shared);
        self.pagemap.take_written(address(first)..address(end), |run| {
            let run = number(run.start)..number(run.end);
            look.pages += run.end - run.start;
            core.written(run.clone());
            shared.fresh.clear_range(run.clone());
            heat[run.start as usize..run.end as usize].iter_mut().for_each(|heat| *heat |= 1);
        })?;
        if look.send {
            self.queue(core, first..end);
        }
        look.next = end;
        if end == all {
            let _ = look.done.send(look.pages);
        } else {
            self.look = Some(look);
        }
        Ok(())
    }

    fn queue(&self, core: &Pager, pages: Range<u64>) {
        let mut batch = Vec::with_capacity(FRAME_PAGES_MAX);
        let send = |batch: &mut Vec<u64>| {
            if let Some(&first) = batch.first() {
                self.shared.queued.fetch_add(batch.len() as u64, Ordering::SeqCst);
                let _ = self.shared.lane(first).send(Work::Pages(std::mem::take(batch)));
            }
        };
        for page in pages {
            if page % STRIPE_PAGES == 0 || batch.len() == FRAME_PAGES_MAX {
                send(&mut batch);
            }
            if !self.shared.fresh.get(page) && core.is_local(PageIndex(page)) {
                batch.push(page);
            }
        }
        send(&mut batch);
    }

    /// The page was written, as its unmapping showed, or has other content now.
    pub(in super::super) fn changed(&mut self, page: PageIndex) {
        self.shared.fresh.clear(page.0);
    }

    /// The page leaves local memory.
    pub(in super::super) fn left(&mut self, page: PageIndex) {
        self.shared.fresh.clear(page.0);
        if !self.switched && self.shared.sent.clear(page.0) {
            self.dropped.push(page.0);
        }
    }

    fn send_drops(&mut self) {
        let mut dropped = std::mem::take(&mut self.dropped);
        dropped.sort_unstable();
        for run in dropped.chunk_by(|a, b| a / STRIPE_PAGES == b / STRIPE_PAGES) {
            for batch in run.chunks(FRAME_PAGES_MAX) {
                let _ = self.shared.lane(batch[0]).send(Work::Drop(batch.to_vec()));
            }
        }
    }

    /// The last look, while the guest stands still and the machine is frozen. What waits to be sent
    /// is behind from here on.
    pub(in super::super) fn finish(&mut self, core: &Pager, stored: u64) -> io::Result<Final> {
        self.look = None;
        self.shared.closing.store(true, Ordering::SeqCst);
        self.send_drops();
        for lane in &self.shared.work {
            let _ = lane.send(Work::Barrier);
        }
        self.switched = true;
        let all = self.heat.len() as u64;
        let unwritten = self.unwritten(all)?;
        let mut behind: Vec<Range<u64>> = Vec::new();
        let record = |page: u64| {
            let (holding, version) = core.holding(PageIndex(page));
            match holding {
                Holding::Zero => PageRecord::Zero(version),
                Holding::Remote => PageRecord::Remote(version),
                Holding::Local if self.shared.fresh.get(page) && unwritten.get(page) => {
                    PageRecord::Sent(version)
                }
                Holding::Local => {
                    match behind.last_mut() {
                        Some(run) if run.end == page => run.end += 1,
                        _ => behind.push(page..page + 1),
                    }
                    PageRecord::Behind(version)
                }
            }
        };
        let mut records = Vec::new();
        encode_records((0..all).map(record), &mut records);
        let extents = (0..core.layout().len()).map(|e| core.extent_record(ExtentIndex(e)));
        let switch =
            Switch { pages: all, extents: extents.collect(), stored, record_bytes: records.len() };
        let heat = std::mem::take(&mut self.heat);
        Ok(Final { switch, records, behind, heat })
    }

    /// Pages that show no write since they were sent, among those that the target may have as they are:
    /// nothing else is of interest, and to look costs time that the guest stands still. A page whose
    /// mapping went away was given away by the guest, or is on its way out: it is sent anew.
    fn unwritten(&self, all: u64) -> io::Result<Bitmap> {
        let mut unwritten = Bitmap::new(all);
        let base = self.target.base;
        let number = |address: u64| (address - base) / PAGE_BYTES as u64;
        let address = |page: u64| base + page * PAGE_BYTES as u64;
        let fresh = |first: u64| self.shared.fresh.any(first..(first + STRIPE_PAGES).min(all));
        let mut first = 0;
        while first < all {
            let mut end = first;
            while end < all && fresh(end) {
                end += STRIPE_PAGES;
            }
            if end > first {
                self.pagemap.unwritten(address(first)..address(end.min(all)), |run, what| {
                    if what == Unwritten::Protected {
                        unwritten.set_range(number(run.start)..number(run.end));
                    }
                })?;
            }
            first = end + STRIPE_PAGES;
        }
        Ok(unwritten)
    }
}
