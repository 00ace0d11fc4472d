//! An io_uring that lives in another process and is fed from this one.
//!
//! The ring is created by injection with `IORING_SETUP_SQPOLL`: a kernel thread that belongs to the
//! other process takes requests from the shared ring, so `IORING_OP_MADVISE` acts on the other
//! process's memory without stopping it. Works with swap on, unlike `MADV_PAGEOUT`.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

pub(crate) const ENTRIES: u32 = 64;
pub(crate) const SETUP_SQPOLL: u32 = 2;
const OP_MADVISE: u8 = 25;
const SQ_NEED_WAKEUP: u32 = 1;
const ENTER_SQ_WAKEUP: u32 = 2;
const OFFSET_SQ_RING: i64 = 0;
const OFFSET_CQ_RING: i64 = 0x0800_0000;
const OFFSET_SQES: i64 = 0x1000_0000;
/// Longest wait for one batch. A batch takes microseconds; only a dead owner takes this long.
const BATCH_TIMEOUT: Duration = Duration::from_secs(2);

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct SqOffsets {
    head: u32,
    tail: u32,
    ring_mask: u32,
    ring_entries: u32,
    flags: u32,
    dropped: u32,
    array: u32,
    reserved: u32,
    user_addr: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct CqOffsets {
    head: u32,
    tail: u32,
    ring_mask: u32,
    ring_entries: u32,
    overflow: u32,
    cqes: u32,
    flags: u32,
    reserved: u32,
    user_addr: u64,
}

/// `struct io_uring_params`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct Params {
    pub(crate) sq_entries: u32,
    pub(crate) cq_entries: u32,
    pub(crate) flags: u32,
    pub(crate) sq_thread_cpu: u32,
    /// Milliseconds that the kernel thread polls before it sleeps.
    pub(crate) sq_thread_idle: u32,
    pub(crate) features: u32,
    pub(crate) wq_fd: u32,
    pub(crate) reserved: [u32; 3],
    pub(crate) sq: SqOffsets,
    pub(crate) cq: CqOffsets,
}
const _: () = assert!(size_of::<Params>() == 120);

impl Params {
    pub(crate) fn as_bytes_mut(&mut self) -> &mut [u8; size_of::<Self>()] {
        // SAFETY: the struct is plain integers without padding (its size is the sum of its
        // fields'), so every byte is initialised and any bytes are a valid value.
        unsafe { &mut *(&raw mut *self).cast() }
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Submission {
    opcode: u8,
    flags: u8,
    ioprio: u16,
    fd: i32,
    offset: u64,
    address: u64,
    len: u32,
    advice: u32,
    user_data: u64,
    rest: [u64; 3],
}
const _: () = assert!(size_of::<Submission>() == 64);

#[repr(C)]
#[derive(Clone, Copy)]
struct Completion {
    user_data: u64,
    result: i32,
    flags: u32,
}

#[derive(Debug)]
struct RingMemory {
    start: *mut u8,
    len: usize,
}

impl RingMemory {
    fn map(fd: &OwnedFd, len: usize, offset: i64) -> io::Result<Self> {
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no other memory.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_POPULATE,
                fd.as_raw_fd(),
                offset,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { start: start.cast(), len })
    }

    /// A place in the mapping that holds a `T`.
    fn at<T>(&self, offset: usize) -> *mut T {
        assert!(offset + size_of::<T>() <= self.len && offset.is_multiple_of(align_of::<T>()));
        // SAFETY: in bounds by the assertion.
        unsafe { self.start.add(offset).cast() }
    }

    fn word(&self, offset: u32) -> &AtomicU32 {
        // SAFETY: `at` checks bounds and alignment; the kernel shares the word, and atomics may
        // be changed by others.
        unsafe { &*self.at::<AtomicU32>(offset as usize) }
    }
}

impl Drop for RingMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and nothing borrows from it any more.
        unsafe { libc::munmap(self.start.cast(), self.len) };
    }
}

/// See the module's documentation.
#[derive(Debug)]
pub struct RemoteRing {
    fd: OwnedFd,
    params: Params,
    sq: RingMemory,
    cq: RingMemory,
    sqes: RingMemory,
    /// Requests without a completion. None may be left when a batch begins: their completions
    /// would be taken for those of the batch.
    outstanding: usize,
}

impl std::fmt::Debug for Params {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Params {{ sq_entries: {} }}", self.sq_entries)
    }
}

// SAFETY: the ring is used through `&mut self` only, and its memory is not tied to a thread.
unsafe impl Send for RemoteRing {}

impl RemoteRing {
    pub(crate) fn new(fd: OwnedFd, params: Params) -> io::Result<Self> {
        let sq_bytes = params.sq.array as usize + params.sq_entries as usize * 4;
        let cq_bytes =
            params.cq.cqes as usize + params.cq_entries as usize * size_of::<Completion>();
        let sqe_bytes = params.sq_entries as usize * size_of::<Submission>();
        Ok(Self {
            sq: RingMemory::map(&fd, sq_bytes, OFFSET_SQ_RING)?,
            cq: RingMemory::map(&fd, cq_bytes, OFFSET_CQ_RING)?,
            sqes: RingMemory::map(&fd, sqe_bytes, OFFSET_SQES)?,
            fd,
            params,
            outstanding: 0,
        })
    }

    /// Unmaps ranges (address, length in bytes) of the owner's memory without freeing them.
    ///
    /// # Errors
    /// `ETIMEDOUT` when the kernel thread does not answer, as it is gone with its process; the
    /// first error of a request.
    pub fn unmap(&mut self, ranges: &[(u64, u64)]) -> io::Result<()> {
        // After a timeout, completions of that batch may still come.
        if self.outstanding > 0 {
            self.submit()?;
            self.collect()?;
        }
        for chunk in ranges.chunks(ENTRIES as usize) {
            for &(start, len) in chunk {
                self.push(start, len);
            }
            self.outstanding = chunk.len();
            self.submit()?;
            self.collect()?;
        }
        Ok(())
    }

    fn push(&self, start: u64, len: u64) {
        let tail_word = self.sq.word(self.params.sq.tail);
        let tail = tail_word.load(Ordering::Relaxed);
        let mask = self.sq.word(self.params.sq.ring_mask).load(Ordering::Relaxed);
        let slot = tail & mask;
        let submission = Submission {
            opcode: OP_MADVISE,
            flags: 0,
            ioprio: 0,
            fd: -1,
            offset: 0,
            address: start,
            len: u32::try_from(len).expect("batches are far below 4 GiB"),
            advice: libc::MADV_DONTNEED as u32,
            user_data: 0,
            rest: [0; 3],
        };
        // SAFETY: `at` checks bounds and alignment; the slot is free, as at most as many requests
        // are outstanding as there are entries, and the kernel reads it only after the tail moves.
        unsafe {
            self.sqes.at::<Submission>(slot as usize * size_of::<Submission>()).write(submission);
        }
        self.sq.word(self.params.sq.array + slot * 4).store(slot, Ordering::Relaxed);
        tail_word.store(tail.wrapping_add(1), Ordering::Release);
    }

    fn submit(&self) -> io::Result<()> {
        // The kernel thread sets the flag and then looks at the tail again; we moved the tail and
        // now look at the flag. The fence keeps one of the two from missing the other.
        std::sync::atomic::fence(Ordering::SeqCst);
        if self.sq.word(self.params.sq.flags).load(Ordering::Relaxed) & SQ_NEED_WAKEUP == 0 {
            return Ok(());
        }
        // SAFETY: wakes the kernel thread; no memory is passed.
        let result = unsafe {
            libc::syscall(
                libc::SYS_io_uring_enter,
                self.fd.as_raw_fd(),
                0,
                0,
                ENTER_SQ_WAKEUP,
                std::ptr::null::<u8>(),
                0,
            )
        };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Takes the completions of all outstanding requests.
    fn collect(&mut self) -> io::Result<()> {
        let deadline = Instant::now() + BATCH_TIMEOUT;
        let mask = self.cq.word(self.params.cq.ring_mask).load(Ordering::Relaxed);
        let mut outcome = Ok(());
        let mut spins = 0u32;
        while self.outstanding > 0 {
            let head_word = self.cq.word(self.params.cq.head);
            let head = head_word.load(Ordering::Relaxed);
            while self.cq.word(self.params.cq.tail).load(Ordering::Acquire) == head {
                spins += 1;
                if spins.is_multiple_of(64) {
                    std::thread::yield_now();
                    if Instant::now() > deadline {
                        return Err(io::Error::from_raw_os_error(libc::ETIMEDOUT));
                    }
                }
                std::hint::spin_loop();
            }
            let slot = (head & mask) as usize;
            let offset = self.params.cq.cqes as usize + slot * size_of::<Completion>();
            // SAFETY: `at` checks bounds and alignment; the kernel published the entry by moving
            // the tail, which was read with acquire ordering.
            let completion = unsafe { self.cq.at::<Completion>(offset).read() };
            if completion.result < 0 && outcome.is_ok() {
                outcome = Err(io::Error::from_raw_os_error(-completion.result));
            }
            head_word.store(head.wrapping_add(1), Ordering::Release);
            self.outstanding -= 1;
        }
        outcome
    }
}
