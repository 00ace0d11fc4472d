//! Streams of accesses, for prefetch.
//!
//! Each access that belongs to no stream is remembered as the possible start of one. A stream's trend
//! is the difference between accesses that follow each other, found by majority vote (Boyer and Moore;
//! as Leap does, ATC'20, but for each stream by itself, so that threads do not spoil each other's). A
//! neighbour, on either side, is a trend at once. An access that continues the trend doubles the
//! window, up to a cap that all streams share; waste shrinks the cap.

use heca_types::limits::PREFETCH_WINDOW_MAX;

const STREAMS: usize = 16;
const WINDOW_FIRST: u32 = 4;
/// Pages between two accesses that may belong to one stream.
const NEAR: u64 = 64;
/// Largest window of a stream that does not run from page to page: each page is a guess of its own.
const STRIDED_WINDOW_MAX: u32 = 64;

/// Pages to fetch ahead: `count` of them from `first` on, `stride` pages apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Ahead {
    first: u64,
    /// 0 if the access follows no trend.
    pub(super) stride: i64,
    pub(super) count: u32,
}

impl Ahead {
    const NONE: Self = Self { first: 0, stride: 0, count: 0 };

    /// The pages below `end`, in the order of the stream.
    pub(super) fn pages(self, end: u64) -> impl Iterator<Item = u64> {
        let at = move |i: u32| self.first.checked_add_signed(self.stride.checked_mul(i.into())?);
        (0..self.count).map_while(at).filter(move |&page| page < end)
    }
}

#[derive(Debug, Clone, Copy, Default)]
struct Stream {
    last: u64,
    /// Difference between accesses, as far as the vote went, and by how much it leads.
    trend: i64,
    votes: u32,
    /// Pages asked for ahead, beyond the last access.
    asked: u32,
    /// 0 while there is no trend.
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

impl Stream {
    /// How many steps of its trend lead from the last access to this one, if it continues the stream:
    /// it is one of the pages that were asked for, or the next one.
    fn steps(&self, page: u64) -> Option<u32> {
        if self.window == 0 {
            return None;
        }
        let distance = page as i64 - self.last as i64;
        let steps = u32::try_from(distance / self.trend).ok()?;
        (distance % self.trend == 0 && (1..=self.asked + 1).contains(&steps)).then_some(steps)
    }

    fn advance(&mut self, page: u64, steps: u32, cap: u32) -> Ahead {
        self.last = page;
        self.asked = self.asked.saturating_sub(steps);
        let cap = if self.trend.abs() == 1 { cap } else { cap.min(STRIDED_WINDOW_MAX) };
        self.window = (self.window * 2).clamp(WINDOW_FIRST, cap);
        let ahead = Ahead { first: 0, stride: self.trend, count: 0 };
        // Asked for in chunks of half a window: fewer, larger requests.
        if self.asked > self.window / 2 {
            return ahead;
        }
        let next = self.trend * (i64::from(self.asked) + 1);
        let Some(first) = page.checked_add_signed(next) else { return ahead };
        let count = self.window - self.asked;
        self.asked = self.window;
        Ahead { first, count, ..ahead }
    }

    /// An access near the last one that does not continue the trend, if there is one.
    fn vote(&mut self, page: u64, cap: u32) -> Ahead {
        let difference = page as i64 - self.last as i64;
        self.last = page;
        match (difference == self.trend, self.votes) {
            (true, _) => self.votes = (self.votes + 1).min(4),
            (false, 0 | 1) => (self.trend, self.votes, self.window) = (difference, 1, 0),
            (false, _) => self.votes -= 1,
        }
        self.asked = 0;
        if difference != self.trend || (self.votes < 2 && difference.abs() != 1) {
            return Ahead::NONE;
        }
        self.advance(page, 0, cap)
    }
}

impl Streams {
    pub(super) fn new() -> Self {
        Self {
            streams: [Stream { last: u64::MAX / 2, ..Stream::default() }; STREAMS],
            clock: 0,
            window_cap: PREFETCH_WINDOW_MAX,
        }
    }

    /// Notes an access and says which pages to fetch ahead.
    pub(super) fn access(&mut self, page: u64) -> Ahead {
        self.clock += 1;
        let (clock, cap) = (self.clock, self.window_cap);
        for stream in &mut self.streams {
            if let Some(steps) = stream.steps(page) {
                stream.used = clock;
                return stream.advance(page, steps, cap);
            }
        }
        let near = self.streams.iter_mut().min_by_key(|stream| stream.last.abs_diff(page));
        let near = near.expect("there are streams");
        match near.last.abs_diff(page) {
            // Once more, after it left.
            0 => return Ahead::NONE,
            1..=NEAR => {
                near.used = clock;
                return near.vote(page, cap);
            }
            _ => {}
        }
        let oldest = self.streams.iter_mut().min_by_key(|s| s.used).expect("there are streams");
        *oldest = Stream { last: page, used: clock, ..Stream::default() };
        Ahead::NONE
    }

    /// Of what an access to this page said to fetch, only so many pages could be.
    pub(super) fn cut(&mut self, page: u64, ahead: Ahead, fetched: u32) {
        let is = |stream: &&mut Stream| stream.last == page && stream.trend == ahead.stride;
        if let Some(stream) = self.streams.iter_mut().find(is) {
            stream.asked = stream.asked.saturating_sub(ahead.count - fetched);
        }
    }

    /// So many pages were mapped along with the one that was accessed: of their use nobody hears.
    pub(super) fn mapped(&mut self, page: u64, stride: i64, pages: u32) {
        let is = |stream: &&mut Stream| stream.last == page && stream.trend == stride;
        if let Some(stream) = self.streams.iter_mut().find(is) {
            stream.asked = stream.asked.max(pages);
        }
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

    fn pages(ahead: Ahead) -> Vec<u64> {
        ahead.pages(1 << 20).collect()
    }

    #[test]
    fn a_stream_is_recognised_at_its_second_page_and_grows() {
        let mut streams = Streams::new();
        assert!(pages(streams.access(100)).is_empty());
        assert_eq!(pages(streams.access(101)), [102, 103, 104, 105]);
        assert_eq!(pages(streams.access(102)), [106, 107, 108, 109, 110]);
        // What was mapped along with it is not seen.
        assert_eq!(pages(streams.access(110)), (111..127).collect::<Vec<_>>());
    }

    #[test]
    fn what_there_was_no_room_for_is_asked_for_again() {
        let mut streams = Streams::new();
        streams.access(100);
        let ahead = streams.access(101);
        streams.cut(101, ahead, 1);
        assert_eq!(pages(streams.access(102)), (103..111).collect::<Vec<_>>());
    }

    #[test]
    fn a_stream_goes_on_behind_pages_that_were_there() {
        let mut streams = Streams::new();
        streams.access(100);
        let ahead = streams.access(101);
        streams.mapped(101, ahead.stride, 64);
        assert_eq!(streams.access(166).stride, 1);
    }

    #[test]
    fn a_stream_may_run_down_and_ends_at_the_first_page() {
        let mut streams = Streams::new();
        streams.access(10);
        assert_eq!(pages(streams.access(9)), [8, 7, 6, 5]);
        assert_eq!(pages(streams.access(8)), [4, 3, 2, 1, 0]);
    }

    #[test]
    fn a_stride_is_believed_at_the_second_time_and_forgotten_when_it_fails() {
        let mut streams = Streams::new();
        assert!(pages(streams.access(1000)).is_empty());
        assert!(pages(streams.access(1007)).is_empty());
        assert_eq!(pages(streams.access(1014)), [1021, 1028, 1035, 1042]);
        assert_eq!(streams.access(1021).stride, 7);
        for page in [1024, 1030, 1033, 1041] {
            assert_eq!(streams.access(page), Ahead::NONE, "{page}");
        }
    }

    #[test]
    fn streams_of_several_threads_do_not_spoil_each_other() {
        let mut streams = Streams::new();
        let mut asked = 0;
        for i in 0..50 {
            for base in [0, 5000, 10_000, 70_000] {
                let up = base != 70_000;
                let page = if up { base + i } else { base - i };
                asked += pages(streams.access(page)).len();
            }
        }
        assert!(asked >= 4 * 50, "{asked}");
    }

    #[test]
    fn scattered_misses_ask_for_nothing() {
        let mut streams = Streams::new();
        assert!((0..100).all(|i| pages(streams.access(i * 1717 % 100_003)).is_empty()));
    }

    #[test]
    fn waste_shrinks_the_window() {
        let mut streams = Streams::new();
        (0..1000).for_each(|_| streams.wasted());
        (0..50).for_each(|page| {
            let ahead = pages(streams.access(page));
            assert!(ahead.iter().all(|&next| next - page <= 4), "{page}: {ahead:?}");
        });
    }
}
