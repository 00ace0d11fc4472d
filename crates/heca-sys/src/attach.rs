//! Takes over the page faults of a running, unmodified process.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use crate::inject::Tracee;
use crate::process::{open_pidfd, take_fd};
use crate::ring::{ENTRIES, Params, RemoteRing, SETUP_SQPOLL};
use crate::uffd::{USERFAULTFD_IOC_NEW, Userfaultfd, open_device};

/// Milliseconds that the ring's kernel thread polls for work before it sleeps: the shortest that
/// the kernel can express, as polling takes a processor from the guest.
const RING_IDLE_MS: u32 = 1;
const SCRATCH_BYTES: u64 = 4096;

/// A userfaultfd of another process.
#[derive(Debug)]
pub struct Attached {
    /// Our duplicate.
    pub uffd: Userfaultfd,
    /// Its number in the other process, where it stays open on purpose: should every descriptor
    /// of ours go away, the last close would let blocked faults fall through to pages of zeros.
    /// As long as the owner holds one, they stay blocked.
    pub remote_fd: i32,
    /// How long the process's main thread was stopped.
    pub stopped: Duration,
}

/// Makes a userfaultfd in a process and takes a duplicate. Works for processes without any
/// privilege, and without a sysctl: the device is opened here and handed over.
///
/// # Errors
/// Those of ptrace (`EPERM`: not root, or a debugger is attached) and of the calls run inside.
pub fn userfaultfd(pid: i32) -> io::Result<Attached> {
    let pidfd = open_pidfd(pid)?;
    let begun = Instant::now();
    let mut tracee = Tracee::stop(pid)?;
    let flags = (libc::O_CLOEXEC | libc::O_NONBLOCK) as u64;
    let direct = tracee.syscall(libc::SYS_userfaultfd, [flags, 0, 0, 0, 0, 0]);
    let remote_fd = match direct {
        Ok(fd) => fd as i32,
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
            through_device(&mut tracee, &pidfd)?
        }
        Err(error) => return Err(error),
    };
    drop(tracee);
    let stopped = begun.elapsed();
    let uffd = Userfaultfd::from(take_fd(pidfd.as_fd(), remote_fd)?);
    Ok(Attached { uffd, remote_fd, stopped })
}

/// Takes a duplicate of the userfaultfd that [`userfaultfd`] left in a process, for a pager that goes
/// on where another ended. The process is not stopped.
///
/// # Errors
/// `EBADF` if the process has no such descriptor; `InvalidData` if it is something else.
pub fn userfaultfd_again(pid: i32, remote_fd: i32) -> io::Result<Userfaultfd> {
    let pidfd = open_pidfd(pid)?;
    if !is_userfaultfd(pid, remote_fd) {
        let text = format!("descriptor {remote_fd} of process {pid} is not a userfaultfd");
        return Err(io::Error::new(io::ErrorKind::InvalidData, text));
    }
    Ok(Userfaultfd::from(take_fd(pidfd.as_fd(), remote_fd)?))
}

/// Whether this descriptor of a process is a userfaultfd.
#[must_use]
pub fn is_userfaultfd(pid: i32, fd: i32) -> bool {
    std::fs::read_link(format!("/proc/{pid}/fd/{fd}"))
        .is_ok_and(|name| name.as_os_str() == "anon_inode:[userfaultfd]")
}

/// For a process that may not call `userfaultfd`: hands it an open `/dev/userfaultfd` over a
/// socket pair of its own and has it ask that for a userfaultfd.
fn through_device(tracee: &mut Tracee, pidfd: &OwnedFd) -> io::Result<i32> {
    let device = open_device()?;
    let protection = (libc::PROT_READ | libc::PROT_WRITE) as u64;
    let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
    let scratch =
        tracee.syscall(libc::SYS_mmap, [0, SCRATCH_BYTES, protection, flags, u64::MAX, 0])?;
    let mut opened = Vec::new();
    let made = device_fd(tracee, pidfd, &device, scratch, &mut opened);
    for fd in opened {
        let _ = tracee.syscall(libc::SYS_close, [fd, 0, 0, 0, 0, 0]);
    }
    let _ = tracee.syscall(libc::SYS_munmap, [scratch, SCRATCH_BYTES, 0, 0, 0, 0]);
    made
}

fn device_fd(
    tracee: &mut Tracee,
    pidfd: &OwnedFd,
    device: &std::fs::File,
    scratch: u64,
    opened: &mut Vec<u64>,
) -> io::Result<i32> {
    let kind = (libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC) as u64;
    tracee.syscall(libc::SYS_socketpair, [libc::AF_UNIX as u64, kind, 0, scratch, 0, 0])?;
    let mut pair = [0u8; 8];
    tracee.read(scratch, &mut pair)?;
    let number = |at: usize| i32::from_ne_bytes(pair[at..at + 4].try_into().expect("four bytes"));
    let (theirs, ours) = (number(0), number(4));
    opened.extend([theirs as u64, ours as u64]);
    let socket = take_fd(pidfd.as_fd(), ours)?;

    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [device.as_fd()];
    control.push(SendAncillaryMessage::ScmRights(&fds));
    sendmsg(&socket, &[io::IoSlice::new(b"u")], &mut control, SendFlags::NOSIGNAL)?;

    // In the scratch page: 0 data byte, 64 iovec, 128 msghdr, 256 control buffer.
    let word = |value: u64| value.to_ne_bytes();
    let iovec = [word(scratch), word(1)].concat();
    let header = [
        word(0),             // msg_name
        word(0),             // msg_namelen
        word(scratch + 64),  // msg_iov
        word(1),             // msg_iovlen
        word(scratch + 256), // msg_control
        word(64),            // msg_controllen
        word(0),             // msg_flags
    ]
    .concat();
    tracee.write(scratch + 64, &iovec)?;
    tracee.write(scratch + 128, &header)?;
    let cloexec = libc::MSG_CMSG_CLOEXEC as u64;
    tracee.syscall(libc::SYS_recvmsg, [theirs as u64, scratch + 128, cloexec, 0, 0, 0])?;
    let mut received = [0u8; 20];
    tracee.read(scratch + 256, &mut received)?;
    // A cmsghdr is 16 bytes; the descriptor follows.
    let device_fd = u32::from_ne_bytes(received[16..20].try_into().expect("four bytes"));
    opened.push(u64::from(device_fd));
    let flags = (libc::O_CLOEXEC | libc::O_NONBLOCK) as u64;
    let arguments = [u64::from(device_fd), USERFAULTFD_IOC_NEW, flags, 0, 0, 0];
    Ok(tracee.syscall(libc::SYS_ioctl, arguments)? as i32)
}

/// Makes an io_uring in a process through which its pages can be unmapped from outside.
///
/// # Errors
/// As [`userfaultfd`]; `EPERM` or `ENOSYS` where io_uring is forbidden.
pub fn remote_ring(pid: i32) -> io::Result<RemoteRing> {
    let pidfd = open_pidfd(pid)?;
    let mut tracee = Tracee::stop(pid)?;
    let protection = (libc::PROT_READ | libc::PROT_WRITE) as u64;
    let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
    let scratch =
        tracee.syscall(libc::SYS_mmap, [0, SCRATCH_BYTES, protection, flags, u64::MAX, 0])?;
    let mut params =
        Params { flags: SETUP_SQPOLL, sq_thread_idle: RING_IDLE_MS, ..Params::default() };
    tracee.write(scratch, params.as_bytes_mut())?;
    let arguments = [u64::from(ENTRIES), scratch, 0, 0, 0, 0];
    let made = tracee.syscall(libc::SYS_io_uring_setup, arguments);
    let read = tracee.read(scratch, params.as_bytes_mut());
    let taken = made.and_then(|fd| {
        let ours = take_fd(pidfd.as_fd(), fd as i32);
        let _ = tracee.syscall(libc::SYS_close, [fd, 0, 0, 0, 0, 0]);
        ours
    });
    let _ = tracee.syscall(libc::SYS_munmap, [scratch, SCRATCH_BYTES, 0, 0, 0, 0]);
    drop(tracee);
    read?;
    RemoteRing::new(taken?, params)
}

/// Closes a descriptor inside a process.
///
/// # Errors
/// As [`userfaultfd`].
pub fn close_remote(pid: i32, fd: i32) -> io::Result<()> {
    let mut tracee = Tracee::stop(pid)?;
    tracee.syscall(libc::SYS_close, [fd as u64, 0, 0, 0, 0, 0]).map(|_| ())
}

/// Whether `/dev/userfaultfd` can be opened, which a process without privileges needs.
#[must_use]
pub fn device_is_usable() -> bool {
    open_device().is_ok()
}
