//! One bit for each page, shared by threads.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

/// A bitmap whose bits are set and cleared atomically.
#[derive(Debug)]
pub(crate) struct AtomicBitmap {
    words: Vec<AtomicU64>,
}

impl AtomicBitmap {
    /// A bitmap of zeros.
    pub(crate) fn new(bits: u64) -> Self {
        Self { words: (0..bits.div_ceil(64)).map(|_| AtomicU64::new(0)).collect() }
    }

    /// Sets a bit; returns whether it was set before.
    pub(crate) fn set(&self, bit: u64) -> bool {
        let mask = 1 << (bit % 64);
        self.words[(bit / 64) as usize].fetch_or(mask, Ordering::SeqCst) & mask != 0
    }

    /// Clears a bit; returns whether it was set before.
    pub(crate) fn clear(&self, bit: u64) -> bool {
        let mask = 1 << (bit % 64);
        self.words[(bit / 64) as usize].fetch_and(!mask, Ordering::SeqCst) & mask != 0
    }

    /// Sets all bits of a range.
    pub(crate) fn set_range(&self, range: Range<u64>) {
        each_word(range, |word, mask| {
            self.words[word].fetch_or(mask, Ordering::SeqCst);
        });
    }

    /// Clears all bits of a range.
    pub(crate) fn clear_range(&self, range: Range<u64>) {
        each_word(range, |word, mask| {
            self.words[word].fetch_and(!mask, Ordering::SeqCst);
        });
    }

    /// Whether a bit is set.
    pub(crate) fn get(&self, bit: u64) -> bool {
        self.words[(bit / 64) as usize].load(Ordering::SeqCst) >> (bit % 64) & 1 == 1
    }

    /// Whether all bits of a range are set.
    pub(crate) fn all(&self, range: Range<u64>) -> bool {
        let mut all = true;
        each_word(range, |word, mask| {
            all &= self.words[word].load(Ordering::SeqCst) & mask == mask;
        });
        all
    }

    /// Whether any bit of a range is set.
    pub(crate) fn any(&self, range: Range<u64>) -> bool {
        let mut any = false;
        each_word(range, |word, mask| {
            any |= self.words[word].load(Ordering::SeqCst) & mask != 0;
        });
        any
    }

    /// Bits that are set.
    pub(crate) fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.load(Ordering::Relaxed).count_ones())).sum()
    }
}

/// A bitmap of one thread.
#[derive(Debug, Clone, Default)]
pub(crate) struct Bitmap {
    words: Vec<u64>,
}

impl Bitmap {
    /// A bitmap of zeros. Bits beyond its end are zeros for ever.
    pub(crate) fn new(bits: u64) -> Self {
        Self { words: vec![0; bits.div_ceil(64) as usize] }
    }

    /// Sets all bits of a range, which must be within the bitmap.
    pub(crate) fn set_range(&mut self, range: Range<u64>) {
        each_word(range, |word, mask| self.words[word] |= mask);
    }

    /// Whether a bit is set.
    pub(crate) fn get(&self, bit: u64) -> bool {
        self.words.get((bit / 64) as usize).is_some_and(|word| word >> (bit % 64) & 1 == 1)
    }

    /// Clears a bit; returns whether it was set before.
    pub(crate) fn clear(&mut self, bit: u64) -> bool {
        let Some(word) = self.words.get_mut((bit / 64) as usize) else { return false };
        let mask = 1 << (bit % 64);
        let was = *word & mask != 0;
        *word &= !mask;
        was
    }
}

/// Splits a range of bits into words and masks.
fn each_word(range: Range<u64>, mut change: impl FnMut(usize, u64)) {
    let mut bit = range.start;
    while bit < range.end {
        let end = range.end.min((bit / 64 + 1) * 64);
        let ones = end - bit;
        let mask = if ones == 64 { u64::MAX } else { ((1 << ones) - 1) << (bit % 64) };
        change((bit / 64) as usize, mask);
        bit = end;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_and_single_bits_agree() {
        let map = AtomicBitmap::new(300);
        map.set_range(60..200);
        assert_eq!(map.count(), 140);
        assert!(!map.get(59) && map.get(60) && map.get(199) && !map.get(200));
        map.clear_range(64..128);
        assert!(map.get(63) && !map.get(64) && !map.get(127) && map.get(128));
        assert!(map.clear(63) && !map.clear(63));
        assert!(!map.set(63) && map.set(63));
        assert_eq!(map.count(), 76);
        assert!(map.all(128..200) && !map.all(127..200) && map.any(0..64) && !map.any(64..128));
    }

    #[test]
    fn a_bitmap_of_one_thread_gives_each_bit_once() {
        let mut map = Bitmap::new(130);
        map.set_range(63..129);
        assert!(map.clear(63) && !map.clear(63) && map.clear(128) && !map.clear(129));
        assert!(!map.clear(100_000));
    }
}
