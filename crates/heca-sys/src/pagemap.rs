//! `/proc/PID/pagemap`: whether pages are mapped and write-protected.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use heca_types::limits::PAGE_BYTES;

const PRESENT: u64 = 1 << 63;
const UFFD_WP: u64 = 1 << 57;

const PAGE: u64 = PAGE_BYTES as u64;
/// `PAGE_IS_WRITTEN`, `PAGE_IS_PRESENT` and `PAGE_IS_SWAPPED` of `PAGEMAP_SCAN`.
const WRITTEN: u64 = 1 << 1;
const PAGE_PRESENT: u64 = 1 << 3;
const SWAPPED: u64 = 1 << 4;
/// `PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC`.
const PROTECT_AGAIN: u64 = 1 << 0 | 1 << 1;
/// Regions that one scan may report.
const SCAN_REGIONS: usize = 2048;

/// What one scan looks for: pages with all of these categories after some were inverted.
struct Scan {
    flags: u64,
    inverted: u64,
    all_of: u64,
    returned: u64,
}

impl Scan {
    const WRITTEN: Self = Self {
        flags: 0,
        inverted: 0,
        all_of: WRITTEN | PAGE_PRESENT,
        returned: WRITTEN | PAGE_PRESENT,
    };
    const TAKE_WRITTEN: Self = Self { flags: PROTECT_AGAIN, ..Self::WRITTEN };
    const UNWRITTEN: Self =
        Self { flags: 0, inverted: WRITTEN, all_of: WRITTEN, returned: PAGE_PRESENT | SWAPPED };
}

/// How a page looks that is not seen to be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unwritten {
    /// Mapped and write-protected: not written since.
    Protected,
    /// The mapping is gone, and the mark of its protection is left: the page was not written, but
    /// perhaps given away as a whole.
    Zapped,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct ScanRegion {
    start: u64,
    end: u64,
    categories: u64,
}

/// `struct pm_scan_arg`.
#[repr(C)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}
const _: () = assert!(size_of::<ScanArg>() == 96 && size_of::<ScanRegion>() == 24);

/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: libc::Ioctl = 3 << 30 | 96 << 16 | 0x66 << 8 | 16;

/// One entry of the page map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageInfo(u64);

impl PageInfo {
    /// The page is mapped.
    #[must_use]
    pub const fn is_mapped(self) -> bool {
        self.0 & PRESENT != 0
    }

    /// The page is write-protected by userfaultfd. The mark survives when the mapping is zapped.
    #[must_use]
    pub const fn is_write_protected(self) -> bool {
        self.0 & UFFD_WP != 0
    }
}

/// The page map of a process.
#[derive(Debug)]
pub struct Pagemap {
    file: File,
}

impl Pagemap {
    /// Opens the page map of a process.
    ///
    /// # Errors
    /// `EPERM` without ptrace rights.
    pub fn open(pid: i32) -> io::Result<Self> {
        Ok(Self { file: File::open(format!("/proc/{pid}/pagemap"))? })
    }

    /// Appends the entries of `count` pages from `address` on.
    ///
    /// # Errors
    /// Those of the read; an end of file means that the process is gone.
    pub fn read(&self, address: u64, count: usize, out: &mut Vec<PageInfo>) -> io::Result<()> {
        let mut buffer = [0u8; 512 * 8];
        let mut position = address / PAGE_BYTES as u64 * 8;
        let mut left = count;
        while left > 0 {
            let now = left.min(512);
            let bytes = &mut buffer[..now * 8];
            self.file.read_exact_at(bytes, position)?;
            out.extend(bytes.as_chunks::<8>().0.iter().map(|e| PageInfo(u64::from_ne_bytes(*e))));
            position += bytes.len() as u64;
            left -= now;
        }
        Ok(())
    }

    /// Number of mapped pages between two addresses that are not write-protected by userfaultfd:
    /// written since they were installed, or never protected. Takes about 0.5 ms for each GiB.
    ///
    /// # Errors
    /// Those of `PAGEMAP_SCAN` (Linux 6.7).
    pub fn count_written(&self, start: u64, end: u64) -> io::Result<u64> {
        let mut pages = 0;
        self.scan(Scan::WRITTEN, start..end, |run| pages += (run.end - run.start) / PAGE)?;
        Ok(pages)
    }

    /// Names the mapped pages between two addresses that were written since they were
    /// write-protected last, and protects them anew, each page in one atomic step: a write that
    /// comes later is found by the next call. Needs a userfaultfd with `WP_ASYNC` on the range.
    ///
    /// # Errors
    /// As [`Self::count_written`]; `EPERM` where the range has no such userfaultfd.
    pub fn take_written(&self, range: Range<u64>, found: impl FnMut(Range<u64>)) -> io::Result<()> {
        self.scan(Scan::TAKE_WRITTEN, range, found)
    }

    /// Names the pages between two addresses of which the page map shows that they were not written
    /// since they were write-protected last, and how. What is not named may have been written.
    ///
    /// # Errors
    /// As [`Self::count_written`].
    pub fn unwritten(
        &self,
        range: Range<u64>,
        mut found: impl FnMut(Range<u64>, Unwritten),
    ) -> io::Result<()> {
        self.scan_categories(Scan::UNWRITTEN, range, |run, categories| {
            // Kernels differ in whether an empty entry counts as written; it proves nothing.
            if categories & PAGE_PRESENT != 0 {
                found(run, Unwritten::Protected);
            } else if categories & SWAPPED != 0 {
                found(run, Unwritten::Zapped);
            }
        })
    }

    fn scan(
        &self,
        scan: Scan,
        range: Range<u64>,
        mut found: impl FnMut(Range<u64>),
    ) -> io::Result<()> {
        self.scan_categories(scan, range, |run, _| found(run))
    }

    fn scan_categories(
        &self,
        scan: Scan,
        range: Range<u64>,
        mut found: impl FnMut(Range<u64>, u64),
    ) -> io::Result<()> {
        let mut regions = vec![ScanRegion { start: 0, end: 0, categories: 0 }; SCAN_REGIONS];
        let mut from = range.start;
        while from < range.end {
            let mut argument = ScanArg {
                size: size_of::<ScanArg>() as u64,
                flags: scan.flags,
                start: from,
                end: range.end,
                walk_end: 0,
                vec: regions.as_mut_ptr() as u64,
                vec_len: SCAN_REGIONS as u64,
                max_pages: 0,
                category_inverted: scan.inverted,
                category_mask: scan.all_of,
                category_anyof_mask: 0,
                return_mask: scan.returned,
            };
            // SAFETY: the argument has the layout of the kernel's header and points to an array of
            // the length that it states; both live through the call.
            let count =
                unsafe { libc::ioctl(self.file.as_raw_fd(), PAGEMAP_SCAN, &raw mut argument) };
            if count < 0 {
                return Err(io::Error::last_os_error());
            }
            let some = &regions[..count as usize];
            some.iter().for_each(|region| found(region.start..region.end, region.categories));
            // The end of the walk that the kernel reports is not to be relied on with many regions.
            match some.last() {
                Some(last) if some.len() == SCAN_REGIONS => from = last.end,
                _ => return Ok(()),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::map::SharedMap;

    #[test]
    fn every_touched_page_of_an_unprotected_mapping_counts_as_written() {
        const PAGES: usize = 5000;
        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        let file = File::from(rustix::fs::memfd_create("test", flags).expect("memfd"));
        file.set_len((PAGES * PAGE_BYTES) as u64).expect("length");
        let map = SharedMap::new(&file, PAGES * PAGE_BYTES).expect("map");
        // Every second page: more regions than one scan reports.
        (0..PAGES).step_by(2).for_each(|page| map.store(page * PAGE_BYTES / 8, 1));
        let pagemap = Pagemap::open(std::process::id() as i32).expect("own page map");
        let end = map.address() + (PAGES * PAGE_BYTES) as u64;
        assert_eq!(pagemap.count_written(map.address(), end).expect("scan"), PAGES as u64 / 2);
    }

    #[test]
    fn writes_are_found_once_and_what_shows_no_mark_is_not_called_clean() {
        use crate::uffd::{Features, Modes, Userfaultfd};
        const PAGES: usize = 64;
        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        let file = File::from(rustix::fs::memfd_create("test", flags).expect("memfd"));
        file.set_len((PAGES * PAGE_BYTES) as u64).expect("length");
        let map = SharedMap::new(&file, PAGES * PAGE_BYTES).expect("map");
        let uffd = Userfaultfd::of_this_process().expect("userfaultfd");
        let features =
            Features::WP_HUGETLBFS_SHMEM.union(Features::WP_UNPOPULATED).union(Features::WP_ASYNC);
        uffd.enable(features).expect("features");
        let (start, end) = (map.address(), map.address() + (PAGES * PAGE_BYTES) as u64);
        uffd.register(start, end - start, Modes::WP).expect("register");
        let touch = |page: usize, value| map.store(page * PAGE_BYTES / 8, value);
        (0..8).for_each(|page| touch(page, 1));
        let pagemap = Pagemap::open(std::process::id() as i32).expect("own page map");
        let written = || {
            let mut pages = Vec::new();
            let number = |address: u64| (address - start) / PAGE;
            pagemap
                .take_written(start..end, |run| pages.extend(number(run.start)..number(run.end)))
                .expect("scan");
            pages
        };
        assert_eq!(written(), (0..8).collect::<Vec<_>>());
        touch(3, 2);
        assert_eq!(written(), [3]);
        assert_eq!(written(), []);
        touch(5, 2);
        // Zapped: 1 and 2 were not written since (the mark outlives the mapping), 6 is read again.
        map.unmap_pages(PAGE_BYTES, 2 * PAGE_BYTES).expect("unmap");
        let mut seen = [None; PAGES];
        let number = |address: u64| ((address - start) / PAGE) as usize;
        pagemap
            .unwritten(start..end, |run, what| {
                seen[number(run.start)..number(run.end)].fill(Some(what));
            })
            .expect("scan");
        for (page, what) in seen.into_iter().enumerate() {
            let expected = match page {
                1 | 2 => Some(Unwritten::Zapped),
                5 => None,
                0..8 => Some(Unwritten::Protected),
                _ => None,
            };
            assert_eq!(what, expected, "page {page}");
        }
    }
}
