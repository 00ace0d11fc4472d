//! `/proc/PID/pagemap`: whether pages are mapped and write-protected.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use heca_types::limits::PAGE_BYTES;

const PRESENT: u64 = 1 << 63;
const UFFD_WP: u64 = 1 << 57;

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
}
