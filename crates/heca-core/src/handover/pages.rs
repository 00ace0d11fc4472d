//! What the former owner tells of each page, as bytes: runs of pages that are alike.

use heca_types::PageVersion;

/// What the next owner is told of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageRecord {
    /// All zeros.
    Zero(PageVersion),
    /// The next owner was sent its content, and that is current.
    Sent(PageVersion),
    /// Its content is with the former owner.
    Behind(PageVersion),
    /// Its content is on sponsors, in this version.
    Remote(PageVersion),
}

impl PageRecord {
    /// Version of the newest attempt to store the page.
    #[must_use]
    pub const fn version(self) -> PageVersion {
        match self {
            Self::Zero(v) | Self::Sent(v) | Self::Behind(v) | Self::Remote(v) => v,
        }
    }

    const fn class(self) -> u64 {
        match self {
            Self::Zero(_) => 0,
            Self::Sent(_) => 1,
            Self::Behind(_) => 2,
            Self::Remote(_) => 3,
        }
    }

    const fn of(class: u64, version: PageVersion) -> Self {
        match class {
            0 => Self::Zero(version),
            1 => Self::Sent(version),
            2 => Self::Behind(version),
            _ => Self::Remote(version),
        }
    }
}

fn put(mut value: u64, out: &mut Vec<u8>) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Appends the records as runs: length and kind in one number, then the version; numbers in seven
/// bits a byte, low ones first.
pub fn encode_records(records: impl IntoIterator<Item = PageRecord>, out: &mut Vec<u8>) {
    let mut run: Option<(PageRecord, u64)> = None;
    let mut end = |run: Option<(PageRecord, u64)>| {
        if let Some((record, length)) = run {
            put(length << 2 | record.class(), out);
            put(u64::from(record.version().0), out);
        }
    };
    for record in records {
        match &mut run {
            Some((known, length)) if *known == record => *length += 1,
            _ => {
                end(run);
                run = Some((record, 1));
            }
        }
    }
    end(run);
}

/// Bytes that are not records of the pages of a region.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the records of the region's pages are damaged at byte {at}")]
pub struct BadRecords {
    /// Where.
    pub at: usize,
}

/// Reads [`encode_records`] of a region of a known number of pages: runs of page numbers with what
/// is told of them, each page once, in rising order. Ends after the first error.
#[derive(Debug, Clone)]
pub struct PageRecords<'a> {
    bytes: &'a [u8],
    at: usize,
    next: u64,
    pages: u64,
    failed: bool,
}

impl<'a> PageRecords<'a> {
    /// Records of `pages` pages.
    #[must_use]
    pub const fn new(bytes: &'a [u8], pages: u64) -> Self {
        Self { bytes, at: 0, next: 0, pages, failed: false }
    }

    fn number(&mut self) -> Option<u64> {
        let mut value = 0u64;
        for shift in (0..63).step_by(7) {
            let byte = *self.bytes.get(self.at)?;
            self.at += 1;
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Some(value);
            }
        }
        None
    }

    fn run(&mut self) -> Option<(std::ops::Range<u64>, PageRecord)> {
        let head = self.number()?;
        let version = PageVersion(u32::try_from(self.number()?).ok()?);
        let length = head >> 2;
        if length == 0 || length > self.pages - self.next {
            return None;
        }
        let first = self.next;
        self.next += length;
        Some((first..self.next, PageRecord::of(head & 3, version)))
    }
}

impl Iterator for PageRecords<'_> {
    type Item = Result<(std::ops::Range<u64>, PageRecord), BadRecords>;

    fn next(&mut self) -> Option<Self::Item> {
        let complete = self.next == self.pages && self.at == self.bytes.len();
        if self.failed || complete {
            return None;
        }
        let at = self.at;
        let run = self.run();
        self.failed = run.is_none();
        Some(run.ok_or(BadRecords { at }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn record() -> impl Strategy<Value = PageRecord> {
        (0..4u64, prop_oneof![Just(0), 1..4u32, any::<u32>()])
            .prop_map(|(class, version)| PageRecord::of(class, PageVersion(version)))
    }

    proptest! {
        #[test]
        fn records_survive_the_way(runs in proptest::collection::vec((record(), 1..200usize), 0..40)) {
            let records: Vec<_> =
                runs.iter().flat_map(|&(r, n)| std::iter::repeat_n(r, n)).collect();
            let mut bytes = Vec::new();
            encode_records(records.iter().copied(), &mut bytes);
            let mut found = Vec::new();
            for run in PageRecords::new(&bytes, records.len() as u64) {
                let (pages, record) = run.unwrap();
                prop_assert_eq!(pages.start, found.len() as u64);
                found.extend(pages.map(|_| record));
            }
            prop_assert_eq!(found, records);
        }

        #[test]
        fn any_bytes_are_records_or_an_error(
            bytes in proptest::collection::vec(any::<u8>(), 0..200),
            pages in 0..10_000u64,
        ) {
            let mut covered = 0;
            let mut failed = false;
            for run in PageRecords::new(&bytes, pages) {
                match run {
                    Ok((run, _)) => {
                        prop_assert_eq!(run.start, covered);
                        covered = run.end;
                    }
                    Err(_) => failed = true,
                }
            }
            prop_assert!(failed || covered == pages);
        }
    }
}
