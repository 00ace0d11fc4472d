//! Memory whose every page tells which page it is and how often it was written.

/// Bytes of a page.
pub const PAGE_BYTES: usize = 4096;
const PAGE_WORDS: usize = PAGE_BYTES / 8;
/// Distance, in words, of those that each write changes; the words between them follow from the
/// page's number alone. Few are enough: a page is sent as a whole, and is dirty by one byte.
const LIVE_STEP: usize = 64;

/// The finaliser of `SplitMix64` (Steele, Lea and Flood 2014).
pub fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

fn word(seed: u64, position: usize) -> u64 {
    seed.wrapping_add((position as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15)).rotate_left(29) ^ seed
}

/// The words of a page, computed as they should be.
#[derive(Debug, Clone, Copy)]
struct Expected {
    number: u64,
    generation: u64,
    live: u64,
    still: u64,
}

impl Expected {
    fn new(number: u64, generation: u64) -> Self {
        let live = mix(number ^ generation.rotate_left(32));
        Self { number, generation, live, still: mix(!number) }
    }

    /// Number, generation and a word that follows from both come first.
    fn at(&self, position: usize) -> u64 {
        match position {
            0 => self.number,
            1 => self.generation,
            2 => self.live,
            _ if position.is_multiple_of(LIVE_STEP) => word(self.live, position),
            _ => word(self.still, position),
        }
    }

    /// Positions that a write changes.
    fn live_positions() -> impl Iterator<Item = usize> {
        (0..3).chain((LIVE_STEP..PAGE_WORDS).step_by(LIVE_STEP))
    }

    fn wrong_bytes(&self, page: &[u64], positions: impl Iterator<Item = usize>) -> u64 {
        positions
            .map(|position| {
                let difference = page[position] ^ self.at(position);
                if difference == 0 {
                    return 0;
                }
                difference.to_le_bytes().iter().filter(|&&byte| byte != 0).count() as u64
            })
            .sum()
    }

    /// What is wrong with a page, as far as it tells itself.
    fn describe(&self, page: &[u64]) -> &'static str {
        let fits = |as_it_says: Self| as_it_says.wrong_bytes(page, 0..PAGE_WORDS) == 0;
        if page.iter().all(|&word| word == 0) {
            "all zeros"
        } else if page[0] != self.number && fits(Self::new(page[0], page[1])) {
            "the content of another page"
        } else if page[1] < self.generation && fits(Self::new(self.number, page[1])) {
            "an old generation"
        } else {
            "wrong bytes"
        }
    }
}

/// A page that was not as it should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wrong {
    /// Its number.
    pub number: u64,
    /// How often it was written.
    pub generation: u64,
    /// Bytes that differ, of those that were looked at.
    pub bytes: u64,
    /// What it is instead.
    pub what: &'static str,
}

/// The working set.
#[derive(Debug)]
pub struct Memory {
    words: Vec<u64>,
    offset: usize,
    generations: Vec<u32>,
}

impl Memory {
    /// So many pages, each written.
    ///
    /// # Errors
    /// Not enough memory.
    pub fn filled(pages: usize) -> Result<Self, std::collections::TryReserveError> {
        let mut words: Vec<u64> = Vec::new();
        words.try_reserve_exact((pages + 1) * PAGE_WORDS)?;
        words.resize((pages + 1) * PAGE_WORDS, 0);
        // Pages of this program are pages of the machine.
        let offset = words.as_ptr().align_offset(PAGE_BYTES).min(PAGE_WORDS);
        let mut memory = Self { words, offset, generations: vec![0; pages] };
        for number in 0..pages {
            memory.rewrite(number);
        }
        Ok(memory)
    }

    /// Number of pages.
    pub fn pages(&self) -> usize {
        self.generations.len()
    }

    fn page(&mut self, number: usize) -> &mut [u64] {
        &mut self.words[self.offset + number * PAGE_WORDS..][..PAGE_WORDS]
    }

    fn expected(&self, number: usize) -> Expected {
        Expected::new(number as u64, u64::from(self.generations[number]))
    }

    fn rewrite(&mut self, number: usize) {
        self.generations[number] = self.generations[number].wrapping_add(1);
        let expected = self.expected(number);
        for (position, word) in self.page(number).iter_mut().enumerate() {
            *word = expected.at(position);
        }
    }

    /// Verifies the words that the last write left, then writes the page.
    ///
    /// # Errors
    /// What is wrong with it. It is whole afterwards.
    pub fn write(&mut self, number: usize) -> Result<(), Wrong> {
        let expected = self.expected(number);
        if expected.wrong_bytes(self.page(number), Expected::live_positions()) > 0 {
            return self.verify(number);
        }
        self.generations[number] = self.generations[number].wrapping_add(1);
        let expected = self.expected(number);
        let page = self.page(number);
        for position in Expected::live_positions() {
            page[position] = expected.at(position);
        }
        Ok(())
    }

    /// Verifies every byte of a page.
    ///
    /// # Errors
    /// What is wrong with it. It is whole afterwards, so that nothing is counted twice.
    pub fn verify(&mut self, number: usize) -> Result<(), Wrong> {
        let expected = self.expected(number);
        let page = self.page(number);
        let bytes = expected.wrong_bytes(page, 0..PAGE_WORDS);
        if bytes == 0 {
            return Ok(());
        }
        let what = expected.describe(page);
        self.rewrite(number);
        Err(Wrong { number: expected.number, generation: expected.generation, bytes, what })
    }
}

/// Every page once, in an order without order, again and again.
#[derive(Debug)]
pub struct Order {
    numbers: Vec<u32>,
    next: usize,
}

impl Order {
    /// An order of so many pages, by Fisher and Yates.
    pub fn shuffled(pages: usize, seed: u64) -> Self {
        let mut numbers: Vec<u32> = (0..pages as u32).collect();
        for last in (1..pages).rev() {
            let other = mix(seed ^ (last as u64) << 20) % (last as u64 + 1);
            numbers.swap(last, other as usize);
        }
        Self { numbers, next: 0 }
    }

    /// The next page.
    pub fn next_page(&mut self) -> usize {
        let number = self.numbers[self.next];
        self.next = (self.next + 1) % self.numbers.len();
        number as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_wrong_byte_is_seen_once() {
        let mut memory = Memory::filled(16).expect("64 KiB");
        for number in 0..16 {
            assert_eq!(memory.write(number), Ok(()));
            assert_eq!(memory.verify(number), Ok(()));
        }
        memory.page(3)[100] ^= 0xFF00;
        assert_eq!(memory.write(3), Ok(()), "a word between: only a verification sees it");
        let wrong = memory.verify(3).expect_err("a wrong byte");
        assert_eq!((wrong.number, wrong.bytes, wrong.what), (3, 1, "wrong bytes"));
        assert_eq!(memory.verify(3), Ok(()));
        memory.page(3)[1] ^= 1;
        assert_eq!(memory.write(3).expect_err("a wrong generation").bytes, 1);
    }

    #[test]
    fn what_is_wrong_is_told() {
        let mut memory = Memory::filled(4).expect("16 KiB");
        let old = memory.page(1).to_vec();
        assert_eq!(memory.write(1), Ok(()));
        memory.page(1).copy_from_slice(&old);
        assert_eq!(memory.write(1).expect_err("old").what, "an old generation");
        let other = memory.page(2).to_vec();
        memory.page(1).copy_from_slice(&other);
        assert_eq!(memory.write(1).expect_err("other").what, "the content of another page");
        memory.page(1).fill(0);
        assert_eq!(memory.write(1).expect_err("zeros").what, "all zeros");
        assert_eq!(memory.write(1), Ok(()));
    }

    #[test]
    fn the_order_has_every_page_once() {
        let mut order = Order::shuffled(1000, 7);
        let mut seen: Vec<usize> = (0..1000).map(|_| order.next_page()).collect();
        assert!(seen.windows(2).filter(|pair| pair[0] < pair[1]).count() < 600);
        seen.sort_unstable();
        assert!(seen.into_iter().eq(0..1000));
    }
}
