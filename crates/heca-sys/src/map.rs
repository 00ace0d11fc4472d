//! A shared mapping whose memory may change at any time under our hands.
//!
//! Used by programs that play the role of a guest: tests and benchmarks. The pager itself never
//! maps guest memory. Every access is one atomic load or store.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU64, Ordering};

/// A readable and writable mapping, of a file as a rule.
#[derive(Debug)]
pub struct SharedMap {
    start: *mut u64,
    words: usize,
}

// SAFETY: the mapping is plain memory that lives until drop; accesses are atomic loads and stores
// of aligned words, so threads may share it.
unsafe impl Send for SharedMap {}
// SAFETY: as above.
unsafe impl Sync for SharedMap {}

impl SharedMap {
    /// Maps the first `len` bytes of a file.
    ///
    /// # Errors
    /// Those of `mmap`.
    pub fn new(file: &File, len: usize) -> io::Result<Self> {
        Self::map(len, libc::MAP_SHARED, file.as_raw_fd())
    }

    /// Maps memory that belongs to this process alone, as a program's heap does.
    ///
    /// # Errors
    /// Those of `mmap`.
    pub fn anonymous(len: usize) -> io::Result<Self> {
        Self::map(len, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1)
    }

    fn map(len: usize, flags: i32, fd: i32) -> io::Result<Self> {
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no other memory.
        let start = unsafe {
            libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, fd, 0)
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { start: start.cast(), words: len / 8 })
    }

    /// Address of the mapping in this process.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.start as u64
    }

    /// Length, in 8-byte words.
    #[must_use]
    pub fn words(&self) -> usize {
        self.words
    }

    /// All of its words.
    #[must_use]
    pub fn as_words(&self) -> &[AtomicU64] {
        // SAFETY: in bounds, aligned (the mapping is page-aligned), alive as long as `self`; an
        // atomic may be changed by others at any time.
        unsafe { std::slice::from_raw_parts(self.start.cast(), self.words) }
    }

    fn word(&self, index: usize) -> &AtomicU64 {
        &self.as_words()[index]
    }

    /// Loads a word.
    #[must_use]
    pub fn load(&self, index: usize) -> u64 {
        self.word(index).load(Ordering::Relaxed)
    }

    /// Stores a word.
    pub fn store(&self, index: usize, value: u64) {
        self.word(index).store(value, Ordering::Relaxed);
    }

    /// Lifts a memory lock from the mapping, which `mlockall` puts on every new one.
    ///
    /// # Errors
    /// Those of `munlock`.
    pub fn unlock(&self) -> io::Result<()> {
        // SAFETY: the range is our own mapping; locking has no effect on its content.
        let result = unsafe { libc::munlock(self.start.cast(), self.words * 8) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Makes two mappings of it for the kernel, with the border at `offset` bytes.
    ///
    /// # Errors
    /// Those of `madvise`.
    pub fn split(&self, offset: usize) -> io::Result<()> {
        assert!(offset < self.words * 8);
        // SAFETY: the range lies in this mapping; the advice concerns core dumps only.
        let result = unsafe {
            let at = self.start.cast::<u8>().add(offset).cast();
            libc::madvise(at, self.words * 8 - offset, libc::MADV_DONTDUMP)
        };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Unmaps the pages of `len` bytes at `offset` without freeing them (`MADV_DONTNEED`).
    ///
    /// # Errors
    /// Those of `madvise`.
    pub fn unmap_pages(&self, offset: usize, len: usize) -> io::Result<()> {
        assert!(offset + len <= self.words * 8);
        // SAFETY: the range lies in this mapping, and for a shared file mapping the advice drops
        // page table entries only; the data stays in the file.
        let result = unsafe {
            libc::madvise(self.start.cast::<u8>().add(offset).cast(), len, libc::MADV_DONTNEED)
        };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

impl Drop for SharedMap {
    fn drop(&mut self) {
        // SAFETY: the range is ours and nothing borrows from it any more.
        unsafe { libc::munmap(self.start.cast(), self.words * 8) };
    }
}
