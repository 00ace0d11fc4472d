//! Wakes a thread that polls.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering, fence};

use rustix::event::{EventfdFlags, eventfd};

/// An eventfd that is only written while its owner sleeps, so that messages to a busy thread cost
/// no system call.
#[derive(Debug)]
pub(crate) struct Waker {
    fd: OwnedFd,
    asleep: AtomicBool,
}

impl Waker {
    pub(crate) fn new() -> std::io::Result<Self> {
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { fd, asleep: AtomicBool::new(false) })
    }

    /// To be called after the message was put into the channel.
    pub(crate) fn wake(&self) {
        // The sleeper sets the flag and then looks into the channel; we filled the channel and
        // now look at the flag. The fences keep one of the two from missing the other.
        fence(Ordering::SeqCst);
        if self.asleep.swap(false, Ordering::SeqCst) {
            let _ = rustix::io::write(&self.fd, &1u64.to_ne_bytes());
        }
    }

    /// To be called before the owner looks into its channel for the last time and polls.
    pub(crate) fn prepare_sleep(&self) {
        self.asleep.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    /// To be called after the poll, with whether it found this descriptor readable. A wake-up that
    /// is written later than that ends the next sleep at once, and is taken then.
    pub(crate) fn woke(&self, readable: bool) {
        self.asleep.store(false, Ordering::SeqCst);
        if readable {
            let _ = rustix::io::read(&self.fd, &mut [0u8; 8]);
        }
    }
}

impl AsFd for Waker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
