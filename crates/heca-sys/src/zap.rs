//! Unmaps pages of another process without freeing them.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use heca_types::limits::PAGE_BYTES;

use crate::map::SharedMap;
use crate::pagemap::Pagemap;

/// Ranges in one call.
const RANGES_MAX: usize = 64;

/// Unmaps ranges (address, length in bytes) of the process behind `pidfd` by
/// `process_madvise(MADV_PAGEOUT)`. Without swap the pages stay in the page cache. The kernel may
/// skip pages: look at the page map afterwards.
///
/// # Errors
/// `ESRCH` if the process is gone, `EINVAL` on kernels that do not allow the advice.
pub fn page_out(pidfd: BorrowedFd<'_>, ranges: &[(u64, u64)]) -> io::Result<()> {
    for chunk in ranges.chunks(RANGES_MAX) {
        let mut vectors = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; RANGES_MAX];
        for (vector, &(start, len)) in vectors.iter_mut().zip(chunk) {
            vector.iov_base = start as *mut libc::c_void;
            vector.iov_len = len as usize;
        }
        // SAFETY: the vector array is valid for the call; the addresses in it are of the other
        // process and only the kernel interprets them.
        let result = unsafe {
            libc::syscall(
                libc::SYS_process_madvise,
                pidfd.as_raw_fd(),
                vectors.as_ptr(),
                chunk.len(),
                libc::MADV_PAGEOUT,
                0,
            )
        };
        if result < 0 {
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }
    Ok(())
}

/// Whether [`page_out`] really unmaps shared memory here, tried on a mapping of this process.
///
/// # Errors
/// Those of setting up the trial.
pub fn page_out_works() -> io::Result<bool> {
    const PAGES: usize = 64;
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let file = std::fs::File::from(rustix::fs::memfd_create("heca-probe", flags)?);
    file.set_len((PAGES * PAGE_BYTES) as u64)?;
    let map = SharedMap::new(&file, PAGES * PAGE_BYTES)?;
    // A pager locks its memory, and the kernel skips locked pages.
    map.unlock()?;
    for page in 0..PAGES {
        map.store(page * PAGE_BYTES / 8, 1);
    }
    let pid = std::process::id() as i32;
    let pidfd = crate::process::open_pidfd(pid)?;
    // Pages that were just touched may sit in a per-CPU list that the kernel skips: try again.
    for _ in 0..5 {
        if page_out(pidfd.as_fd(), &[(map.address(), (PAGES * PAGE_BYTES) as u64)]).is_err() {
            return Ok(false);
        }
        let mut info = Vec::new();
        Pagemap::open(pid)?.read(map.address(), PAGES, &mut info)?;
        if info.iter().filter(|page| page.is_mapped()).count() < PAGES / 2 {
            return Ok(true);
        }
    }
    Ok(false)
}
