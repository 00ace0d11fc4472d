//! Sequential streams, for prefetch.
//!
//! Each miss is remembered as the possible start of a stream. A miss, or the first use of a
//! prefetched page, that continues one doubles the stream's window. Waste shrinks the cap that all
//! windows share.

use std::ops::Range;

use heca_types::limits::PREFETCH_WINDOW_MAX;

const STREAMS: usize = 16;
const WINDOW_FIRST: u32 = 4;

#[derive(Debug, Clone, Copy, Default)]
struct Stream {
    /// The page that would continue the stream.
    next: u64,
    /// First page that was not asked for ahead.
    ahead: u64,
    window: u32,
    used: u64,
}

/// The streams of one region.
#[derive(Debug, Clone)]
pub(super) struct Streams {
    streams: [Stream; STREAMS],
    clock: u64,
    window_cap: u32,
}

impl Streams {
    pub(super) fn new() -> Self {
        let streams = [Stream { next: u64::MAX, ..Stream::default() }; STREAMS];
        Self { streams, clock: 0, window_cap: PREFETCH_WINDOW_MAX }
    }

    /// Notes an access and says which pages to fetch ahead.
    pub(super) fn access(&mut self, page: u64) -> Range<u64> {
        self.clock += 1;
        let clock = self.clock;
        let cap = self.window_cap;
        let follows = |s: &&mut Stream| s.next <= page && page <= s.ahead.max(s.next);
        if let Some(stream) = self.streams.iter_mut().find(follows) {
            stream.used = clock;
            stream.next = page + 1;
            stream.window = (stream.window * 2).clamp(WINDOW_FIRST, cap);
            let start = stream.ahead.max(page + 1);
            let end = page + 1 + u64::from(stream.window);
            // Ask in chunks of half a window: fewer, larger requests.
            if end < start + u64::from(stream.window / 2) {
                return start..start;
            }
            stream.ahead = end;
            return start..end;
        }
        let oldest = self.streams.iter_mut().min_by_key(|s| s.used).expect("there are streams");
        *oldest = Stream { next: page + 1, ahead: page + 1, window: 0, used: clock };
        0..0
    }

    /// A prefetched page was used.
    pub(super) fn useful(&mut self) {
        self.window_cap = (self.window_cap + 1).min(PREFETCH_WINDOW_MAX);
    }

    /// A prefetched page was dropped unused.
    pub(super) fn wasted(&mut self) {
        self.window_cap = self.window_cap.saturating_sub(4).max(WINDOW_FIRST);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_is_recognised_at_its_second_page_and_grows() {
        let mut streams = Streams::new();
        assert!(streams.access(100).is_empty());
        assert_eq!(streams.access(101), 102..106);
        assert_eq!(streams.access(102), 106..111);
    }

    #[test]
    fn scattered_misses_ask_for_nothing() {
        let mut streams = Streams::new();
        assert!((0..100).all(|i| streams.access(i * 17 % 1009).is_empty()));
    }

    #[test]
    fn waste_shrinks_the_window() {
        let mut streams = Streams::new();
        (0..100).for_each(|_| streams.wasted());
        (0..50).for_each(|page| {
            let range = streams.access(page);
            assert!(range.is_empty() || range.end - page <= 5, "{page}: {range:?}");
        });
    }
}
