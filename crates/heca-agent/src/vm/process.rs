//! A process that belongs to a VM.

use std::os::fd::{AsFd, OwnedFd};
use std::process::Child;
use std::sync::Mutex;
use std::time::Duration;

use rustix::process::{Signal, pidfd_send_signal};

use super::{EXIT_TIMEOUT, lock};

/// What tells a process from a later one with its number.
pub(super) fn identity(process: &Process) -> (i32, u64) {
    (process.pid, heca_sys::process::start_time(process.pid).unwrap_or(0))
}

/// Waits until one of the processes ended, at most this long.
pub(super) fn wait_any(processes: &[&Process], timeout: Duration) {
    use rustix::event::{PollFd, PollFlags, poll};
    let timeout = rustix::time::Timespec {
        tv_sec: timeout.as_secs() as i64,
        tv_nsec: i64::from(timeout.subsec_nanos()),
    };
    let mut fds: Vec<_> = processes
        .iter()
        .filter_map(|process| process.pidfd.as_ref())
        .map(|pidfd| PollFd::from_borrowed_fd(pidfd.as_fd(), PollFlags::IN))
        .collect();
    let _ = poll(&mut fds, Some(&timeout));
}

/// A process that may not be our child: it may have been started by a former agent.
#[derive(Debug)]
pub(super) struct Process {
    pub(super) pid: i32,
    /// None of one that had ended when this agent began.
    pidfd: Option<OwnedFd>,
    child: Mutex<Option<Child>>,
}

impl Process {
    pub(super) fn own(mut child: Child) -> std::io::Result<Self> {
        let pid = child.id() as i32;
        let pidfd = heca_sys::process::open_pidfd(pid).inspect_err(|_| {
            // Nobody would know of it any more.
            let _ = child.kill();
            let _ = child.wait();
        })?;
        Ok(Self { pid, pidfd: Some(pidfd), child: Mutex::new(Some(child)) })
    }

    /// The process with this number and start time; `None` if it ended.
    pub(super) fn adopt(pid: i32, start_time: u64) -> std::io::Result<Option<Self>> {
        let pidfd = match heca_sys::process::open_pidfd(pid) {
            Err(error) if error.raw_os_error() == Some(3) => return Ok(None),
            other => other?,
        };
        match heca_sys::process::start_time(pid) {
            Some(time) if time == start_time => {
                Ok(Some(Self { pid, pidfd: Some(pidfd), child: Mutex::new(None) }))
            }
            Some(_) => Ok(None),
            None if !std::path::Path::new(&format!("/proc/{pid}")).exists() => Ok(None),
            None => {
                Err(std::io::Error::other(format!("the state of process {pid} cannot be read")))
            }
        }
    }

    /// One that has ended.
    pub(super) fn ended(pid: i32) -> Self {
        Self { pid, pidfd: None, child: Mutex::new(None) }
    }

    /// Waits for the end of the process, at most this long.
    pub(super) fn wait(&self, timeout: Duration) -> bool {
        let Some(pidfd) = &self.pidfd else { return true };
        let ended = crate::pager::pidfd_ends(pidfd, timeout);
        if ended {
            match lock(&self.child).take() {
                Some(mut child) => drop(child.wait()),
                // Perhaps a child of this very process before it became another program.
                None => {
                    let pid = rustix::process::Pid::from_raw(self.pid);
                    let _ = rustix::process::waitpid(pid, rustix::process::WaitOptions::NOHANG);
                }
            }
        }
        ended
    }

    pub(super) fn kill(&self) {
        let Some(pidfd) = &self.pidfd else { return };
        let _ = pidfd_send_signal(pidfd, Signal::KILL);
        self.wait(EXIT_TIMEOUT);
    }
}
