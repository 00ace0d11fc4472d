//! What a pager must not forget when it is killed: the versions of its pages, the places of its
//! extents, and which page it was filling. A table in a file on tmpfs that is mapped: every store
//! is in the file at once, as far as processes of this machine are concerned. `kill -9` loses
//! nothing; a crash of the machine loses everything, as it loses the guest.
//!
//! Because no store ever has to outlive the kernel, plain atomic stores are enough: what a thread
//! stored before it was killed is in the page cache, in the order in which the thread made the
//! stores. Only the compiler could swap them; it does not move them over system calls, and where
//! an order without one matters, it is enforced.
//!
//! The file is allocated in full before it gets its name, so that a full tmpfs is an error of
//! [`Journal::create`] and not a `SIGBUS` later. Somebody else who shortens the file while it is
//! in use can still cause one; only root and the owner may.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, compiler_fence, fence};

use heca_types::limits::{PAGE_BYTES, REGION_BYTES_MAX, REGION_EXTENTS_MAX, SPONSORS_MAX};
use rustix::fs::{AtFlags, CWD, FallocateFlags, FlockOperation, Mode, OFlags};

use crate::map::SharedMap;

/// Words that are left to the caller.
pub const NUMBERS: usize = 32;

const MAGIC: u64 = u64::from_le_bytes(*b"hecajrnl");
/// Format of the file; a change of the layout raises it.
const FORMAT: u32 = 1;
const PAGES_MAX: u64 = REGION_BYTES_MAX / PAGE_BYTES as u64;

// Offsets in the header, in bytes.
const AT_MAGIC: u64 = 0;
const AT_FORMAT: u64 = 8;
const AT_EXTENTS: u64 = 12;
const AT_PAGES: u64 = 16;
const AT_IDENTITY: u64 = 24;
const AT_EPOCH: u64 = 40;
const AT_FILLING: u64 = 48;
const AT_NUMBERS: u64 = 64;
const AT_STORES: u64 = AT_NUMBERS + NUMBERS as u64 * 8;
/// A store slot: sequence, two words of the id, one unused.
const STORE_BYTES: u64 = 32;
const HEADER_BYTES: u64 = 4096;
const _: () = assert!(AT_STORES + SPONSORS_MAX as u64 * STORE_BYTES <= HEADER_BYTES);

/// A crash-safe table for one region. Threads may share it; each value on its own is never torn.
#[derive(Debug)]
pub struct Journal {
    map: SharedMap,
    pages: u64,
    extents: u32,
    /// Holds the lock that keeps a second pager from the same journal.
    _file: File,
}

fn invalid(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}

fn check_sizes(pages: u64, extents: u32) -> io::Result<u64> {
    if pages > PAGES_MAX || extents > REGION_EXTENTS_MAX {
        let text = format!("a journal of {pages} pages in {extents} extents: too many");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    let bytes = HEADER_BYTES + u64::from(extents) * 8 + pages * 4;
    Ok(bytes.next_multiple_of(PAGE_BYTES as u64))
}

/// Two pagers that write one journal would use versions twice. The kernel drops the lock with the
/// process, however it ends. A child shares it until it runs another program.
fn lock(file: &File) -> io::Result<()> {
    rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive).map_err(|error| {
        if error != rustix::io::Errno::WOULDBLOCK {
            return error.into();
        }
        io::Error::new(io::ErrorKind::WouldBlock, "another process uses the journal")
    })
}

impl Journal {
    /// Makes a journal of zeros that only its owner may use. Either it is there in full
    /// afterwards, or not at all.
    ///
    /// # Errors
    /// `AlreadyExists`; `StorageFull`; `InvalidInput` for a region that is too large; those of
    /// files and of `mmap`.
    pub fn create(path: &Path, pages: u64, extents: u32, identity: [u8; 16]) -> io::Result<Self> {
        let bytes = check_sizes(pages, extents)?;
        let dir = match path.parent() {
            Some(dir) if dir != OsStr::new("") => dir,
            _ => Path::new("."),
        };
        // A file without a name goes away by itself if this process is killed before it is done.
        let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
        let file = File::from(rustix::fs::open(dir, flags, Mode::RUSR | Mode::WUSR)?);
        rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, bytes)?;
        lock(&file)?;
        let unnamed = format!("/proc/self/fd/{}", file.as_raw_fd());
        let journal =
            Self { map: SharedMap::new(&file, bytes as usize)?, pages, extents, _file: file };
        journal.word(AT_PAGES).store(pages, Ordering::Relaxed);
        journal.half(AT_EXTENTS).store(extents, Ordering::Relaxed);
        journal.half(AT_FORMAT).store(FORMAT, Ordering::Relaxed);
        journal.set_id(AT_IDENTITY, identity);
        journal.word(AT_MAGIC).store(MAGIC, Ordering::Release);
        // Unlike a renaming, this never replaces a journal that is there.
        rustix::fs::linkat(CWD, unnamed, CWD, path, AtFlags::SYMLINK_FOLLOW)?;
        Ok(journal)
    }

    /// Opens a journal that another process left behind.
    ///
    /// # Errors
    /// `InvalidData`, in words, if the file is no journal, or not the one of this region;
    /// `WouldBlock` while another process has it open, or one that was killed is not gone yet: try
    /// again for a while; `InvalidInput` for a region that is too large; those of files and of
    /// `mmap`.
    pub fn open(path: &Path, pages: u64, extents: u32, identity: [u8; 16]) -> io::Result<Self> {
        let bytes = check_sizes(pages, extents)?;
        let file = File::options().read(true).write(true).open(path)?;
        lock(&file)?;
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(invalid("a journal is a regular file".to_owned()));
        }
        // A shorter file would be a SIGBUS at the first look beyond its end.
        if metadata.len() != bytes {
            let len = metadata.len();
            return Err(invalid(format!("the journal has {len} bytes, expected {bytes}")));
        }
        // For a file that lost pages to somebody's tool; does nothing to pages that are there.
        rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, bytes)?;
        let journal =
            Self { map: SharedMap::new(&file, bytes as usize)?, pages, extents, _file: file };
        journal.check(identity)?;
        Ok(journal)
    }

    fn check(&self, identity: [u8; 16]) -> io::Result<()> {
        if self.word(AT_MAGIC).load(Ordering::Acquire) != MAGIC {
            return Err(invalid("the file is no journal".to_owned()));
        }
        let format = self.half(AT_FORMAT).load(Ordering::Relaxed);
        if format != FORMAT {
            return Err(invalid(format!("the journal has format {format}, expected {FORMAT}")));
        }
        let pages = self.word(AT_PAGES).load(Ordering::Relaxed);
        let extents = self.half(AT_EXTENTS).load(Ordering::Relaxed);
        if (pages, extents) != (self.pages, self.extents) {
            return Err(invalid(format!(
                "the journal is for {pages} pages in {extents} extents, expected {} in {}",
                self.pages, self.extents
            )));
        }
        if self.id(AT_IDENTITY) != identity {
            return Err(invalid("the journal belongs to another region".to_owned()));
        }
        let filling = self.word(AT_FILLING).load(Ordering::Relaxed);
        if filling > pages {
            return Err(invalid(format!("the journal tells of a page {filling} of {pages}")));
        }
        Ok(())
    }

    /// Version of a page; 0 if it was never set.
    ///
    /// # Panics
    /// If there is no such page.
    #[must_use]
    pub fn version(&self, page: u64) -> u32 {
        self.half(self.at_version(page)).load(Ordering::Relaxed)
    }

    /// Keeps the version of a page. To be called before the version is used for anything.
    ///
    /// # Panics
    /// If there is no such page.
    pub fn set_version(&self, page: u64, version: u32) {
        self.half(self.at_version(page)).store(version, Ordering::Relaxed);
    }

    /// The word of an extent; 0 if it was never set.
    ///
    /// # Panics
    /// If there is no such extent.
    #[must_use]
    pub fn extent(&self, extent: u32) -> u64 {
        self.word(self.at_extent(extent)).load(Ordering::Relaxed)
    }

    /// Keeps the word of an extent.
    ///
    /// # Panics
    /// If there is no such extent.
    pub fn set_extent(&self, extent: u32, word: u64) {
        self.word(self.at_extent(extent)).store(word, Ordering::Relaxed);
    }

    /// The page whose bytes were being written into guest memory.
    #[must_use]
    pub fn filling(&self) -> Option<u64> {
        self.word(AT_FILLING).load(Ordering::Acquire).checked_sub(1)
    }

    /// Says which page's bytes are about to be written into guest memory, or that this is done.
    ///
    /// # Panics
    /// If there is no such page.
    pub fn set_filling(&self, page: Option<u64>) {
        if let Some(page) = page {
            self.at_version(page);
        }
        // Neither may the writing begin before the mark is there, nor the mark go before it ended.
        compiler_fence(Ordering::SeqCst);
        self.word(AT_FILLING).store(page.map_or(0, |page| page + 1), Ordering::Release);
        compiler_fence(Ordering::SeqCst);
    }

    /// Fencing token of the region; 0 if it was never set.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.word(AT_EPOCH).load(Ordering::Relaxed)
    }

    /// Keeps the fencing token. To be called before the token is used for anything.
    pub fn set_epoch(&self, epoch: u64) {
        self.word(AT_EPOCH).store(epoch, Ordering::Relaxed);
    }

    /// Identity of a sponsor's store; sixteen zeros if it was never set, and while it is being
    /// set, also if that was cut short for ever.
    ///
    /// # Panics
    /// If there is no such sponsor.
    #[must_use]
    pub fn store(&self, sponsor: u8) -> [u8; 16] {
        let at = at_store(sponsor);
        let before = self.word(at).load(Ordering::Acquire);
        let id = self.id(at + 8);
        fence(Ordering::Acquire);
        let after = self.word(at).load(Ordering::Relaxed);
        if before.is_multiple_of(2) && before == after { id } else { [0; 16] }
    }

    /// Keeps the identity of a sponsor's store. One thread at a time may set that of one sponsor.
    ///
    /// # Panics
    /// If there is no such sponsor.
    pub fn set_store(&self, sponsor: u8, id: [u8; 16]) {
        let at = at_store(sponsor);
        // Odd while the two words do not belong together; odd already if a writer was killed here.
        let writing = self.word(at).load(Ordering::Relaxed) | 1;
        self.word(at).store(writing, Ordering::Relaxed);
        fence(Ordering::Release);
        self.set_id(at + 8, id);
        self.word(at).store(writing.wrapping_add(1), Ordering::Release);
    }

    /// A word of the caller's own; 0 if it was never set.
    ///
    /// # Panics
    /// If `slot` is not below [`NUMBERS`].
    #[must_use]
    pub fn number(&self, slot: usize) -> u64 {
        self.word(at_number(slot)).load(Ordering::Relaxed)
    }

    /// Keeps a word of the caller's own.
    ///
    /// # Panics
    /// If `slot` is not below [`NUMBERS`].
    pub fn set_number(&self, slot: usize, value: u64) {
        self.word(at_number(slot)).store(value, Ordering::Relaxed);
    }

    fn at_extent(&self, extent: u32) -> u64 {
        assert!(extent < self.extents, "extent {extent} of {} in the journal", self.extents);
        HEADER_BYTES + u64::from(extent) * 8
    }

    fn at_version(&self, page: u64) -> u64 {
        assert!(page < self.pages, "page {page} of {} in the journal", self.pages);
        HEADER_BYTES + u64::from(self.extents) * 8 + page * 4
    }

    fn id(&self, at: u64) -> [u8; 16] {
        let words = [at, at + 8].map(|at| self.word(at).load(Ordering::Relaxed).to_le_bytes());
        words.as_flattened().try_into().expect("two words of eight bytes")
    }

    fn set_id(&self, at: u64, id: [u8; 16]) {
        for (at, word) in [at, at + 8].into_iter().zip(id.as_chunks::<8>().0) {
            self.word(at).store(u64::from_le_bytes(*word), Ordering::Relaxed);
        }
    }

    /// Address of `len` bytes at an offset of the file.
    fn address(&self, at: u64, len: u64) -> usize {
        let bytes = self.map.words() as u64 * 8;
        assert!(
            at.is_multiple_of(len) && at + len <= bytes,
            "offset {at} of {bytes} in the journal"
        );
        (self.map.address() + at) as usize
    }

    fn word(&self, at: u64) -> &AtomicU64 {
        let address = std::ptr::with_exposed_provenance::<AtomicU64>(self.address(at, 8));
        // SAFETY: in bounds and aligned (the mapping starts at a page, the offset is a multiple),
        // alive as long as `self`; every access to it is atomic, and an atomic may be changed by
        // others at any time.
        unsafe { &*address }
    }

    fn half(&self, at: u64) -> &AtomicU32 {
        let address = std::ptr::with_exposed_provenance::<AtomicU32>(self.address(at, 4));
        // SAFETY: as above; no four bytes are accessed both as a half and as part of a word.
        unsafe { &*address }
    }
}

fn at_store(sponsor: u8) -> u64 {
    assert!(usize::from(sponsor) < SPONSORS_MAX, "sponsor {sponsor} of {SPONSORS_MAX}");
    AT_STORES + u64::from(sponsor) * STORE_BYTES
}

fn at_number(slot: usize) -> u64 {
    assert!(slot < NUMBERS, "number {slot} of {NUMBERS} in the journal");
    AT_NUMBERS + slot as u64 * 8
}

impl Journal {
    /// The caller's words of a journal that may be another's, without opening it: to see whose it
    /// is. `None` if there is none, or if it is something else.
    #[must_use]
    pub fn peek(path: &Path) -> Option<[u64; NUMBERS]> {
        use std::io::Read;
        let mut header = vec![0; HEADER_BYTES as usize];
        File::open(path).ok()?.read_exact(&mut header).ok()?;
        let word = |at: u64| {
            let bytes = header[at as usize..][..8].try_into().expect("eight bytes");
            u64::from_ne_bytes(bytes)
        };
        (word(AT_MAGIC) == MAGIC)
            .then(|| std::array::from_fn(|slot| word(AT_NUMBERS + slot as u64 * 8)))
    }
}
