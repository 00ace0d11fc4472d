//! The source, after the switch: which pages are behind, and in what order they go.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use heca_types::limits::FRAME_PAGES_MAX;

use super::bitmap::AtomicBitmap;
use crate::pager::remote::lock;

/// Keeps several threads within one bound of bytes a second.
#[derive(Debug)]
pub(super) struct Pacer {
    bytes_per_s: Option<u64>,
    next: Mutex<Instant>,
}

impl Pacer {
    pub(super) fn new(bytes_per_s: Option<u64>) -> Self {
        Self { bytes_per_s, next: Mutex::new(Instant::now()) }
    }

    /// Waits until these bytes may be sent.
    pub(super) fn take(&self, bytes: u64) {
        let Some(rate) = self.bytes_per_s else { return };
        let due = {
            let mut next = lock(&self.next);
            let due = (*next).max(Instant::now());
            *next = due + Duration::from_secs_f64(bytes as f64 / rate.max(1) as f64);
            due
        };
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
    }
}

/// What is behind, and the order in which it goes.
#[derive(Debug)]
pub(super) struct Outgoing {
    pub(super) pages: u64,
    pub(super) pending: AtomicBitmap,
    order: Mutex<Arc<Vec<u64>>>,
    cursor: AtomicUsize,
    /// So many of the first pages of the order go at once, the others once the guest runs.
    hot: AtomicUsize,
    /// When the others may go.
    pub(super) released: Mutex<Option<Instant>>,
    pub(super) unique: AtomicU64,
}

impl Outgoing {
    pub(super) fn new(pages: u64) -> Self {
        Self {
            pages,
            pending: AtomicBitmap::new(pages),
            order: Mutex::default(),
            cursor: AtomicUsize::new(0),
            hot: AtomicUsize::new(0),
            released: Mutex::new(None),
            unique: AtomicU64::new(0),
        }
    }

    /// These pages are behind, in this order; the first `hot` go at once.
    pub(super) fn set(&self, behind: Vec<u64>, hot: usize) {
        self.pending.clear_range(0..self.pages);
        behind.iter().for_each(|&page| {
            self.pending.set(page);
        });
        self.cursor.store(0, Ordering::SeqCst);
        self.hot.store(hot, Ordering::SeqCst);
        *lock(&self.order) = Arc::new(behind);
    }

    fn may_go(&self, position: usize) -> bool {
        position < self.hot.load(Ordering::SeqCst)
            || lock(&self.released).is_some_and(|at| at <= Instant::now())
    }

    /// The next pages to send, for whoever asks; none if they are not to go yet.
    pub(super) fn next(&self) -> Next {
        let order = lock(&self.order).clone();
        let position = self.cursor.load(Ordering::SeqCst);
        if position >= order.len() {
            return Next::End;
        }
        if !self.may_go(position) {
            return Next::Later;
        }
        let position = self.cursor.fetch_add(FRAME_PAGES_MAX, Ordering::SeqCst);
        let end = (position + FRAME_PAGES_MAX).min(order.len());
        let Some(batch) = order.get(position..end) else { return Next::End };
        let mut batch: Vec<u64> =
            batch.iter().copied().filter(|&page| self.pending.clear(page)).collect();
        batch.sort_unstable();
        Next::Pages(batch)
    }
}

/// What a thread that sends is to do next.
pub(super) enum Next {
    Pages(Vec<u64>),
    Later,
    End,
}
