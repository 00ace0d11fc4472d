//! userfaultfd: registration, events, and the ioctls that resolve faults.
//!
//! A layer of our own because the signed result field of `UFFDIO_COPY` and its kin matters: with
//! `EAGAIN` the kernel puts a negative errno there, which must not be read as a length.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use heca_types::limits::PAGE_BYTES;

const API: u64 = 0xAA;
const EVENT_PAGEFAULT: u8 = 0x12;
const FLAG_WP: u64 = 1 << 1;
const FLAG_MINOR: u64 = 1 << 2;

const fn ioc(direction: u64, number: u64, size: usize) -> libc::Ioctl {
    ((direction << 30) | ((size as u64) << 16) | (0xAA << 8) | number) as libc::Ioctl
}
const IOR: u64 = 2;
const IOWR: u64 = 3;

/// `ioctl` on `/dev/userfaultfd` that makes a userfaultfd of the calling process.
pub(crate) const USERFAULTFD_IOC_NEW: u64 = 0xAA << 8;

macro_rules! bitflag_consts {
    ($(#[$doc:meta])* $name:ident($int:ty) { $($(#[$fdoc:meta])* $flag:ident = $value:expr;)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
        pub struct $name(pub $int);

        impl $name {
            $($(#[$fdoc])* pub const $flag: Self = Self($value);)*

            /// Whether all bits of `other` are set.
            #[must_use]
            pub const fn contains(self, other: Self) -> bool {
                self.0 & other.0 == other.0
            }

            /// Bits of both.
            #[must_use]
            pub const fn union(self, other: Self) -> Self {
                Self(self.0 | other.0)
            }

            /// Bits that both have.
            #[must_use]
            pub const fn intersection(self, other: Self) -> Self {
                Self(self.0 & other.0)
            }
        }
    };
}
bitflag_consts! {
    /// Features of userfaultfd (`UFFD_FEATURE_*`).
    Features(u64) {
        /// Write-protect faults are told apart.
        PAGEFAULT_FLAG_WP = 1 << 0;
        /// Missing faults on shared memory.
        MISSING_SHMEM = 1 << 5;
        /// Minor faults on shared memory.
        MINOR_SHMEM = 1 << 10;
        /// Write protection of shared memory.
        WP_HUGETLBFS_SHMEM = 1 << 12;
        /// Write protection of pages that are not there.
        WP_UNPOPULATED = 1 << 13;
        /// `UFFDIO_POISON`.
        POISON = 1 << 14;
        /// The kernel lifts write protection by itself and remembers that it did.
        WP_ASYNC = 1 << 15;
    }
}

bitflag_consts! {
    /// Kinds of faults to register for (`UFFDIO_REGISTER_MODE_*`).
    Modes(u64) {
        /// No page there.
        MISSING = 1 << 0;
        /// Writes to write-protected pages.
        WP = 1 << 1;
        /// Page there but not mapped.
        MINOR = 1 << 2;
    }
}

#[repr(C)]
struct ApiArg {
    api: u64,
    features: u64,
    ioctls: u64,
}
#[repr(C)]
struct RangeArg {
    start: u64,
    len: u64,
}
#[repr(C)]
struct RegisterArg {
    range: RangeArg,
    mode: u64,
    ioctls: u64,
}
#[repr(C)]
struct CopyArg {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copied: i64,
}
/// Arguments of `UFFDIO_ZEROPAGE`, `UFFDIO_CONTINUE` and `UFFDIO_POISON`.
#[repr(C)]
struct RangeModeArg {
    range: RangeArg,
    mode: u64,
    done: i64,
}
#[repr(C)]
struct WriteProtectArg {
    range: RangeArg,
    mode: u64,
}
#[repr(C)]
#[derive(Clone, Copy)]
struct Message {
    event: u8,
    reserved: [u8; 7],
    flags: u64,
    address: u64,
    thread: u64,
}
const _: () = {
    assert!(size_of::<Message>() == 32);
    assert!(size_of::<CopyArg>() == 40 && size_of::<RangeModeArg>() == 32);
    assert!(size_of::<WriteProtectArg>() == 24 && size_of::<ApiArg>() == 24);
};

/// Kind of a fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultKind {
    /// No page there.
    Missing,
    /// Page there but not mapped.
    Minor,
    /// Write to a write-protected page.
    WriteProtect,
}

/// A thread waits on a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// Address in the owner, rounded down to a page.
    pub address: u64,
    /// Why.
    pub kind: FaultKind,
}

/// Why the kernel did not resolve a fault.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ResolveError {
    /// `EEXIST`: the page is there already.
    #[error("the page is there already")]
    Exists,
    /// `EAGAIN`: the address space is changing.
    #[error("the address space is changing")]
    Again,
    /// `EFAULT` of `UFFDIO_CONTINUE`: there is no page to map.
    #[error("there is no page to map")]
    Hole,
    /// `ENOMEM`, `ENOSPC`: no memory for the page.
    #[error("no memory for the page")]
    NoMemory,
    /// `ESRCH`: the owner is gone.
    #[error("the owner of the memory is gone")]
    Gone,
    /// Anything else.
    #[error("userfaultfd refused")]
    Os(#[source] io::Error),
}

fn classify(error: io::Error) -> ResolveError {
    match error.raw_os_error() {
        Some(libc::EEXIST) => ResolveError::Exists,
        Some(libc::EAGAIN) => ResolveError::Again,
        Some(libc::EFAULT) => ResolveError::Hole,
        Some(libc::ENOMEM | libc::ENOSPC) => ResolveError::NoMemory,
        // ENOENT: the range is registered no longer, as its mapping went away.
        Some(libc::ESRCH | libc::ENOENT) => ResolveError::Gone,
        _ => ResolveError::Os(error),
    }
}

/// A userfaultfd. All its ioctls act on the address space of the process that created it, which
/// need not be the one that holds the descriptor.
#[derive(Debug)]
pub struct Userfaultfd {
    fd: OwnedFd,
}

impl From<OwnedFd> for Userfaultfd {
    fn from(fd: OwnedFd) -> Self {
        Self { fd }
    }
}

impl AsFd for Userfaultfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Userfaultfd {
    /// A userfaultfd of this process, non-blocking, also for faults inside system calls.
    ///
    /// # Errors
    /// `EPERM` without `CAP_SYS_PTRACE`, `ENOSYS` on a kernel without it.
    pub fn of_this_process() -> io::Result<Self> {
        // SAFETY: the system call takes only flags; a non-negative result is a new descriptor.
        let fd =
            unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel just made this descriptor and nobody else owns it.
        Ok(Self { fd: unsafe { OwnedFd::from_raw_fd(fd as i32) } })
    }

    /// A duplicate of the descriptor.
    ///
    /// # Errors
    /// Those of `dup`.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { fd: self.fd.try_clone()? })
    }

    /// The features that this kernel has, asked on a descriptor of its own.
    ///
    /// # Errors
    /// As [`Self::of_this_process`].
    pub fn available_features() -> io::Result<Features> {
        Self::of_this_process()?.enable(Features(0))
    }

    fn ioctl<T>(&self, request: libc::Ioctl, argument: &mut T) -> io::Result<()> {
        // SAFETY: every request of this module is paired with the `repr(C)` argument that the
        // kernel's header defines for it (the size is part of the request number), and the
        // reference keeps it valid and exclusive for the call.
        let result = unsafe { libc::ioctl(self.fd.as_raw_fd(), request, argument as *mut T) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// First call on a new descriptor: agrees on the API and turns features on. Returns the
    /// features that the kernel has.
    ///
    /// # Errors
    /// `EINVAL` for a feature that the kernel lacks, or when called twice.
    pub fn enable(&self, features: Features) -> io::Result<Features> {
        let mut argument = ApiArg { api: API, features: features.0, ioctls: 0 };
        self.ioctl(ioc(IOWR, 0x3f, size_of::<ApiArg>()), &mut argument)?;
        Ok(Features(argument.features))
    }

    /// Watches a range of the owner's addresses.
    ///
    /// # Errors
    /// `EINVAL` for memory that userfaultfd cannot watch (not tmpfs), `EBUSY` for memory that
    /// another userfaultfd watches.
    pub fn register(&self, start: u64, len: u64, modes: Modes) -> io::Result<()> {
        let mut argument = RegisterArg { range: RangeArg { start, len }, mode: modes.0, ioctls: 0 };
        self.ioctl(ioc(IOWR, 0x00, size_of::<RegisterArg>()), &mut argument)
    }

    /// Stops to watch a range, and wakes all who wait in it.
    ///
    /// # Errors
    /// Those of the kernel.
    pub fn unregister(&self, start: u64, len: u64) -> io::Result<()> {
        self.ioctl(ioc(IOR, 0x01, size_of::<RangeArg>()), &mut RangeArg { start, len })
    }

    /// Wakes all who wait in a range; they fault again unless the page is there.
    ///
    /// # Errors
    /// Those of the kernel.
    pub fn wake(&self, start: u64, len: u64) -> Result<(), ResolveError> {
        self.ioctl(ioc(IOR, 0x02, size_of::<RangeArg>()), &mut RangeArg { start, len })
            .map_err(classify)
    }

    /// Installs one page atomically, maps it (write-protected if asked) and wakes.
    ///
    /// # Errors
    /// See [`ResolveError`].
    ///
    /// # Panics
    /// If `page` is not one page long.
    pub fn copy(&self, address: u64, page: &[u8], protect: bool) -> Result<(), ResolveError> {
        assert_eq!(page.len(), PAGE_BYTES);
        let mut argument = CopyArg {
            dst: address,
            src: page.as_ptr() as u64,
            len: PAGE_BYTES as u64,
            mode: u64::from(protect) << 1,
            copied: 0,
        };
        // The kernel reads `page` through its address; the borrow outlives the call.
        self.ioctl(ioc(IOWR, 0x03, size_of::<CopyArg>()), &mut argument).map_err(classify)?;
        // For one page success is all or nothing.
        debug_assert_eq!(argument.copied, PAGE_BYTES as i64);
        Ok(())
    }

    fn range_mode(&self, number: u64, start: u64, len: u64, mode: u64) -> Result<(), ResolveError> {
        let mut argument = RangeModeArg { range: RangeArg { start, len }, mode, done: 0 };
        self.ioctl(ioc(IOWR, number, size_of::<RangeModeArg>()), &mut argument).map_err(classify)
    }

    /// Installs one writable page of zeros and wakes.
    ///
    /// # Errors
    /// See [`ResolveError`].
    pub fn zero(&self, address: u64) -> Result<(), ResolveError> {
        self.range_mode(0x04, address, PAGE_BYTES as u64, 0)
    }

    /// Maps one page that is in the page cache (write-protected if asked) and wakes.
    ///
    /// # Errors
    /// See [`ResolveError`].
    pub fn map_present(&self, address: u64, protect: bool) -> Result<(), ResolveError> {
        self.range_mode(0x07, address, PAGE_BYTES as u64, u64::from(protect) << 1)
    }

    /// Maps neighbouring pages that are in the page cache (write-protected if asked), and wakes.
    /// Stops at the first one that it cannot map, and returns how many bytes before it are mapped
    /// now, and why it stopped.
    pub fn map_run(
        &self,
        address: u64,
        len: u64,
        protect: bool,
    ) -> (u64, Result<(), ResolveError>) {
        let range = RangeArg { start: address, len };
        let mut argument = RangeModeArg { range, mode: u64::from(protect) << 1, done: 0 };
        let outcome = self.ioctl(ioc(IOWR, 0x07, size_of::<RangeModeArg>()), &mut argument);
        // With an error for the first page the kernel puts that there, as a negative number.
        (argument.done.max(0) as u64, outcome.map_err(classify))
    }

    /// Gives every access to one page a memory error.
    ///
    /// # Errors
    /// See [`ResolveError`].
    pub fn poison(&self, address: u64) -> Result<(), ResolveError> {
        self.range_mode(0x08, address, PAGE_BYTES as u64, 0)
    }

    /// Turns write protection of a range on, or off (which wakes).
    ///
    /// # Errors
    /// See [`ResolveError`].
    pub fn write_protect(&self, start: u64, len: u64, on: bool) -> Result<(), ResolveError> {
        let mut argument = WriteProtectArg { range: RangeArg { start, len }, mode: u64::from(on) };
        self.ioctl(ioc(IOWR, 0x06, size_of::<WriteProtectArg>()), &mut argument).map_err(classify)
    }

    /// Appends the faults that are waiting, as many as one read brings (64 at the most). Returns
    /// whether there were any; never blocks.
    ///
    /// # Errors
    /// Those of `read`, without `EAGAIN`.
    pub fn read_faults(&self, faults: &mut Vec<Fault>) -> io::Result<bool> {
        let mut messages = [Message { event: 0, reserved: [0; 7], flags: 0, address: 0, thread: 0 };
            heca_types::limits::FAULT_BATCH];
        // SAFETY: the buffer is valid for its size, and `Message` has no invalid bit patterns.
        let bytes = unsafe {
            libc::read(self.fd.as_raw_fd(), messages.as_mut_ptr().cast(), size_of_val(&messages))
        };
        if bytes < 0 {
            let error = io::Error::last_os_error();
            return match error.raw_os_error() {
                Some(libc::EAGAIN | libc::EINTR) => Ok(false),
                _ => Err(error),
            };
        }
        for message in &messages[..bytes as usize / size_of::<Message>()] {
            if message.event != EVENT_PAGEFAULT {
                continue;
            }
            let kind = match message.flags {
                flags if flags & FLAG_WP != 0 => FaultKind::WriteProtect,
                flags if flags & FLAG_MINOR != 0 => FaultKind::Minor,
                _ => FaultKind::Missing,
            };
            faults.push(Fault { address: message.address & !(PAGE_BYTES as u64 - 1), kind });
        }
        Ok(bytes > 0)
    }
}

/// Opens the device that hands out userfaultfds to processes which may not call `userfaultfd`.
///
/// # Errors
/// Those of `open`.
pub(crate) fn open_device() -> io::Result<File> {
    File::options().read(true).write(true).open("/dev/userfaultfd")
}
