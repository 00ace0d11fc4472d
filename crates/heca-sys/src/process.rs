//! Facts about processes, and small calls on this one.

use std::fs;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

/// One line of `/proc/PID/maps`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mapping {
    /// First address.
    pub start: u64,
    /// Address after the last.
    pub end: u64,
    /// Whether writes go to the file (`s`), not to a private copy (`p`).
    pub shared: bool,
    /// Whether the process may write.
    pub writable: bool,
    /// Offset in the file, in bytes.
    pub offset: u64,
    /// Device of the file, as `major:minor` in hexadecimal.
    pub device: String,
    /// Inode of the file; 0 if there is none.
    pub inode: u64,
    /// Path, or a name in brackets, or nothing.
    pub path: String,
}

/// The mappings of a process, in order of address.
///
/// # Errors
/// Those of reading `/proc/PID/maps`.
pub fn maps(pid: i32) -> io::Result<Vec<Mapping>> {
    let text = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    Ok(text.lines().filter_map(parse_mapping).collect())
}

fn parse_mapping(line: &str) -> Option<Mapping> {
    let mut fields = line.splitn(6, ' ');
    let (start, end) = fields.next()?.split_once('-')?;
    let permissions = fields.next()?.as_bytes();
    let offset = u64::from_str_radix(fields.next()?, 16).ok()?;
    let device = fields.next()?.to_owned();
    let inode = fields.next()?.parse().ok()?;
    Some(Mapping {
        start: u64::from_str_radix(start, 16).ok()?,
        end: u64::from_str_radix(end, 16).ok()?,
        shared: permissions.get(3) == Some(&b's'),
        writable: permissions.get(1) == Some(&b'w'),
        offset,
        device,
        inode,
        path: fields.next().unwrap_or("").trim_start().to_owned(),
    })
}

/// The ids of all processes.
///
/// # Errors
/// Those of reading `/proc`.
pub fn all_pids() -> io::Result<Vec<i32>> {
    let entries = fs::read_dir("/proc")?;
    Ok(entries.filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok()).collect())
}

/// Command name of a process (`comm`), or `?`.
#[must_use]
pub fn command_name(pid: i32) -> String {
    fs::read_to_string(format!("/proc/{pid}/comm"))
        .map_or_else(|_| "?".to_owned(), |name| name.trim_end().to_owned())
}

/// Command line of a process; empty if it is gone or a kernel thread.
#[must_use]
pub fn command_line(pid: i32) -> Vec<String> {
    let bytes = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    bytes
        .split(|&b| b == 0)
        .filter(|part| !part.is_empty())
        .map(|part| String::from_utf8_lossy(part).into_owned())
        .collect()
}

/// When a process was started, in clock ticks since boot: with its pid it names one process for
/// ever.
#[must_use]
pub fn start_time(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command name may hold spaces and parentheses; fields are counted after the last `)`.
    let rest = &stat[stat.rfind(')')? + 1..];
    rest.split_whitespace().nth(19)?.parse().ok()
}

/// A handle on a process that is not fooled by reuse of its number, and becomes readable when the
/// process ends.
///
/// # Errors
/// `ESRCH` if there is no such process.
pub fn open_pidfd(pid: i32) -> io::Result<OwnedFd> {
    let pid = Pid::from_raw(pid).ok_or_else(|| io::Error::from_raw_os_error(libc::ESRCH))?;
    Ok(pidfd_open(pid, PidfdFlags::empty())?)
}

/// A duplicate of another process's descriptor.
///
/// # Errors
/// `EPERM` without ptrace rights, `EBADF` if there is no such descriptor.
pub fn take_fd(pidfd: BorrowedFd<'_>, fd: i32) -> io::Result<OwnedFd> {
    Ok(pidfd_getfd(pidfd, fd, PidfdGetfdFlags::empty())?)
}

/// Keeps all memory of this process out of swap, now and later, each page from its first use on: what
/// serves a fault was used before. (To have every page there in advance would make the start of a
/// thread, whose stack is megabytes, cost a millisecond.)
///
/// # Errors
/// `ENOMEM` or `EPERM` where the memory-lock limit forbids it.
pub fn lock_memory() -> io::Result<()> {
    use rustix::mm::MlockAllFlags;
    let flags = MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT;
    rustix::mm::mlockall(flags).map_err(Into::into)
}

/// Ignores every signal that a terminal, a log-out or an operator may send to end a process, for
/// one whose end would leave another process standing still.
pub fn ignore_endings() {
    for signal in
        [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTERM, libc::SIGUSR1, libc::SIGUSR2]
    {
        // SAFETY: to ignore a signal runs no code of ours.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
}

/// Lets this process end quietly when the reader of its output went away (`heca sim | head`).
pub fn end_on_broken_pipe() {
    // SAFETY: restores the system's own handling of the signal; no code of ours runs.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
}

/// Has the kernel send this process a signal when its parent ends.
///
/// # Errors
/// None in practice.
pub fn die_with_parent() -> io::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::TERM))
        .map_err(Into::into)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_lines_parse() {
        let line = "7f1c00000000-7f1c40000000 rw-s 00001000 00:18 77 /dev/shm/a b (deleted)";
        let map = parse_mapping(line).expect("valid");
        assert_eq!((map.start, map.end), (0x7f1c_0000_0000, 0x7f1c_4000_0000));
        assert!(map.shared && map.writable);
        assert_eq!((map.offset, map.inode), (4096, 77));
        assert_eq!((map.device.as_str(), map.path.as_str()), ("00:18", "/dev/shm/a b (deleted)"));
    }

    #[test]
    fn own_process_has_a_start_time_and_maps() {
        let pid = std::process::id() as i32;
        assert!(start_time(pid).expect("alive") > 0);
        assert!(maps(pid).expect("readable").iter().any(|m| m.path == "[vdso]"));
    }
}
