//! `/proc/PID/pagemap`: whether pages are mapped and write-protected.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use heca_types::limits::PAGE_BYTES;

const PRESENT: u64 = 1 << 63;
const UFFD_WP: u64 = 1 << 57;

/// `PAGE_IS_WRITTEN | PAGE_IS_PRESENT` of `PAGEMAP_SCAN`.
const WRITTEN_AND_PRESENT: u64 = 1 << 1 | 1 << 3;
/// Regions that one scan may report.
const SCAN_REGIONS: usize = 512;

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
        let mut regions = [ScanRegion { start: 0, end: 0, categories: 0 }; SCAN_REGIONS];
        let (mut from, mut pages) = (start, 0);
        loop {
            let mut argument = ScanArg {
                size: size_of::<ScanArg>() as u64,
                flags: 0,
                start: from,
                end,
                walk_end: 0,
                vec: regions.as_mut_ptr() as u64,
                vec_len: SCAN_REGIONS as u64,
                max_pages: 0,
                category_inverted: 0,
                category_mask: WRITTEN_AND_PRESENT,
                category_anyof_mask: 0,
                return_mask: WRITTEN_AND_PRESENT,
            };
            // SAFETY: the argument has the layout of the kernel's header and points to an array of
            // the length that it states; both live through the call.
            let found =
                unsafe { libc::ioctl(self.file.as_raw_fd(), PAGEMAP_SCAN, &raw mut argument) };
            if found < 0 {
                return Err(io::Error::last_os_error());
            }
            let found = &regions[..found as usize];
            pages += found.iter().map(|r| (r.end - r.start) / PAGE_BYTES as u64).sum::<u64>();
            // The end of the walk that the kernel reports is not to be relied on with many regions.
            match found.last() {
                Some(last) if found.len() == SCAN_REGIONS => from = last.end,
                _ => return Ok(pages),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::map::SharedMap;

    #[test]
    fn every_touched_page_of_an_unprotected_mapping_counts_as_written() {
        const PAGES: usize = 2000;
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
}
