//! Least privilege for a pager that has attached: what an attacker who got hold of it could do.
//!
//! In this order, and each step for good:
//!
//! 1. [`drop_capabilities`], **before any thread is started**. Capabilities belong to threads, not
//!    to the process: only the calling thread gives them up, and those that it starts later.
//! 2. attach, start threads.
//! 3. [`seccomp`], which reaches all threads, present and future, and allows no further filter.
//!
//! [`threads`] tells whether all of this reached every thread.
//!
//! Left out: root without capabilities still owns root's files. What the process may open is a
//! matter of Landlock or of mount namespaces.

use std::collections::BTreeMap;
use std::io;

use rustix::thread::CapabilitySet;
pub use rustix::thread::CapabilitySet as Capabilities;
use seccompiler::SeccompCmpArgLen::Dword;
use seccompiler::SeccompCmpOp::{Eq, MaskedEq};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    apply_filter_all_threads,
};

/// What a pager needs while it serves a process of its own user:
///
/// - `SYS_PTRACE`: `pidfd_getfd`, the page map, `process_madvise`, attaching and detaching;
/// - `SYS_NICE`: `process_madvise` on another process;
/// - `IPC_LOCK`: after `mlockall(MCL_FUTURE)` each `mmap` beyond `RLIMIT_MEMLOCK` fails without
///   it, and so does every larger allocation.
pub const PAGER: Capabilities =
    Capabilities::SYS_PTRACE.union(Capabilities::SYS_NICE).union(Capabilities::IPC_LOCK);

/// What it needs besides, if the process or its RAM file belongs to another user:
///
/// - `FOWNER`: without it `MADV_PAGEOUT` passes over the pages of a file that is neither its own
///   nor writable to it, and reports no error;
/// - `KILL`: to stop a process that lost its memory to a newer owner;
/// - `DAC_OVERRIDE`: to open that file, `/proc/PID/pagemap` and `/proc/PID/mem`.
pub const FOREIGN: Capabilities =
    Capabilities::FOWNER.union(Capabilities::KILL).union(Capabilities::DAC_OVERRIDE);

/// Makes sure that no program that this process may start ever gets more privileges than it has.
///
/// # Errors
/// None in practice.
pub fn no_new_privs() -> io::Result<()> {
    rustix::thread::set_no_new_privs(true).map_err(Into::into)
}

/// Gives up all capabilities of the calling thread but `keep`, of those that it has: from the
/// permitted, effective and bounding set; the inheritable and ambient sets are emptied, as a pager
/// starts no programs. Other threads keep theirs, see the module.
///
/// A thread without `CAP_SETPCAP` cannot change its bounding set, which bounds only what programs
/// with file capabilities get; it keeps that.
///
/// # Errors
/// Those of `capset` and `prctl`; none in practice.
pub fn drop_capabilities(keep: Capabilities) -> io::Result<()> {
    let held = rustix::thread::capabilities(None)?;
    if held.effective.contains(CapabilitySet::SETPCAP) {
        let all = (0..u64::BITS).map(|number| CapabilitySet::from_bits_retain(1 << number));
        for capability in all.filter(|capability| !keep.contains(*capability)) {
            match rustix::thread::remove_capability_from_bounding_set(capability) {
                Ok(()) => {}
                // Beyond the last one that the kernel knows.
                Err(rustix::io::Errno::INVAL) => break,
                Err(error) => return Err(error.into()),
            }
        }
    }
    rustix::thread::clear_ambient_capability_set()?;
    let sets = rustix::thread::CapabilitySets {
        effective: held.effective & keep,
        permitted: held.permitted & keep,
        inheritable: CapabilitySet::empty(),
    };
    rustix::thread::set_capabilities(None, sets).map_err(Into::into)
}

/// What a process does after it is confined.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Profile {
    /// Serve faults to the end. It can neither attach nor detach any more.
    Serve,
    /// Serve faults, and detach: traces the process, and sends it the signals that came meanwhile.
    ServeAndDetach,
}

/// Allows all threads of this process only the system calls that a pager has a use for; any other
/// one fails with `EPERM`. Nothing kills the process, as the guest would stand still; only a call
/// by the interface for 32-bit programs does, which no part of a 64-bit program makes. Sets
/// `no_new_privs`. Threads can be started, processes and programs cannot.
///
/// It is the last step: a second filter is not allowed. Costs each system call about 30 ns, and an
/// `ioctl`, whose arguments are looked at, about 75 ns.
///
/// # Errors
/// `EINVAL` or `ENOSYS` from kernels without seccomp; a thread that has a filter of its own.
pub fn seccomp(profile: Profile) -> io::Result<()> {
    // Its flags lie in memory, where no filter can look. The C library takes this error as a
    // reason to call `clone`, whose flags can be looked at.
    let no_clone3 = program(
        BTreeMap::from([(libc::SYS_clone3, Vec::new())]),
        SeccompAction::Allow,
        SeccompAction::Errno(libc::ENOSYS as u32),
    )?;
    let allowed =
        program(rules(profile)?, SeccompAction::Errno(libc::EPERM as u32), SeccompAction::Allow)?;
    apply_filter_all_threads(&no_clone3).map_err(filter_error)?;
    apply_filter_all_threads(&allowed).map_err(filter_error)
}

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

fn program(
    rules: Rules,
    otherwise: SeccompAction,
    listed: SeccompAction,
) -> io::Result<BpfProgram> {
    let arch = std::env::consts::ARCH.try_into().map_err(io::Error::other)?;
    let filter = SeccompFilter::new(rules, otherwise, listed, arch).map_err(io::Error::other)?;
    filter.try_into().map_err(io::Error::other)
}

fn filter_error(error: seccompiler::Error) -> io::Error {
    match error {
        seccompiler::Error::Prctl(error) | seccompiler::Error::Seccomp(error) => error,
        other => io::Error::other(other),
    }
}

/// Conditions on arguments (position, comparison, value), all of which must hold.
fn rule(conditions: &[(u8, SeccompCmpOp, u64)]) -> io::Result<SeccompRule> {
    let conditions = conditions.iter().map(|(argument, comparison, value)| {
        SeccompCondition::new(*argument, Dword, comparison.clone(), *value)
    });
    let conditions = conditions.collect::<Result<_, _>>().map_err(io::Error::other)?;
    SeccompRule::new(conditions).map_err(io::Error::other)
}

/// Allowed if the argument at a position is one of these.
fn one_of(argument: u8, values: &[u64]) -> io::Result<Vec<SeccompRule>> {
    values.iter().map(|&value| rule(&[(argument, Eq, value)])).collect()
}

fn rules(profile: Profile) -> io::Result<Rules> {
    let groups = [MEMORY, FILES, WAITING, THREADS, SIGNALS, FACTS, PROCESSES, NETWORK];
    let mut rules: Rules = groups.concat().into_iter().map(|call| (call, Vec::new())).collect();

    // Threads of this process, never another process or a namespace.
    let thread = libc::CLONE_THREAD as u64;
    rules.insert(libc::SYS_clone, vec![rule(&[(0, MaskedEq(thread), thread)])?]);

    // Those of userfaultfd first, as they are in the path of a fault.
    let mut ioctls = vec![rule(&[(1, MaskedEq(0xff00), UFFD_IOCTLS)])?];
    ioctls.extend(one_of(1, IOCTLS)?);
    rules.insert(libc::SYS_ioctl, ioctls);

    let mut sockets = one_of(0, &[libc::AF_UNIX, libc::AF_INET, libc::AF_INET6].map(|f| f as u64))?;
    // The C library asks which addresses this host has before it looks up a name.
    sockets.push(rule(&[(0, Eq, libc::AF_NETLINK as u64), (2, Eq, libc::NETLINK_ROUTE as u64)])?);
    rules.insert(libc::SYS_socket, sockets);

    rules.insert(libc::SYS_prctl, one_of(0, PRCTLS)?);
    // Limits of this process only.
    rules.insert(libc::SYS_prlimit64, one_of(0, &[0])?);
    // A panic that aborts sends a signal to its own thread.
    let own = u64::from(std::process::id());
    rules.insert(libc::SYS_tgkill, one_of(0, &[own])?);

    if profile == Profile::ServeAndDetach {
        rules.insert(libc::SYS_ptrace, Vec::new());
        rules.insert(libc::SYS_tgkill, Vec::new());
    }
    Ok(rules)
}

/// Type of the `ioctl`s of userfaultfd, in its place in the number.
const UFFD_IOCTLS: u64 = 0xaa00;
/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: u64 = 3 << 30 | 96 << 16 | 0x66 << 8 | 16;
const IOCTLS: &[u64] =
    &[PAGEMAP_SCAN, libc::FIONBIO, libc::FIOCLEX, libc::FIONCLEX, libc::FIONREAD, libc::TCGETS];

/// Names of threads and of mappings, and questions.
const PRCTLS: &[u64] = &[
    libc::PR_SET_NAME as u64,
    libc::PR_GET_NAME as u64,
    libc::PR_SET_VMA as u64,
    PR_GET_AUXV,
    libc::PR_SET_NO_NEW_PRIVS as u64,
    libc::PR_GET_NO_NEW_PRIVS as u64,
    libc::PR_CAPBSET_READ as u64,
    libc::PR_SET_TIMERSLACK as u64,
];
const PR_GET_AUXV: u64 = 0x4155_5856;

type Calls = &'static [i64];

const MEMORY: Calls = &[
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_brk,
    libc::SYS_msync,
    libc::SYS_mincore,
    libc::SYS_mlock,
    libc::SYS_mlock2,
    libc::SYS_munlock,
    libc::SYS_mlockall,
    libc::SYS_munlockall,
    libc::SYS_membarrier,
    libc::SYS_memfd_create,
    libc::SYS_process_madvise,
];

const FILES: Calls = &[
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_lseek,
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_close,
    libc::SYS_close_range,
    libc::SYS_stat,
    libc::SYS_fstat,
    libc::SYS_lstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_statfs,
    libc::SYS_fstatfs,
    libc::SYS_access,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_readlink,
    libc::SYS_readlinkat,
    libc::SYS_getdents64,
    libc::SYS_getcwd,
    libc::SYS_fallocate,
    libc::SYS_ftruncate,
    libc::SYS_fadvise64,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_copy_file_range,
    libc::SYS_sendfile,
    libc::SYS_unlink,
    libc::SYS_unlinkat,
    libc::SYS_rmdir,
    libc::SYS_rename,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_link,
    libc::SYS_linkat,
    libc::SYS_mkdir,
    libc::SYS_mkdirat,
    libc::SYS_chmod,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_dup,
    libc::SYS_dup2,
    libc::SYS_dup3,
    libc::SYS_fcntl,
    libc::SYS_flock,
    libc::SYS_pipe2,
];

const WAITING: Calls = &[
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_select,
    libc::SYS_pselect6,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_eventfd2,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    libc::SYS_timerfd_gettime,
    libc::SYS_signalfd4,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    // What the kernel has a thread call after a stop or a signal in the middle of a sleep.
    libc::SYS_restart_syscall,
];

const THREADS: Calls = &[
    // Allowed here, so that the other filter's `ENOSYS` is what the caller sees.
    libc::SYS_clone3,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_futex_waitv,
    libc::SYS_rseq,
    libc::SYS_set_robust_list,
    libc::SYS_get_robust_list,
    libc::SYS_set_tid_address,
    libc::SYS_arch_prctl,
    libc::SYS_getcpu,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_setaffinity,
    libc::SYS_sched_getparam,
    libc::SYS_sched_getscheduler,
    libc::SYS_sched_setscheduler,
    libc::SYS_sched_get_priority_max,
    libc::SYS_sched_get_priority_min,
    libc::SYS_getpriority,
    libc::SYS_setpriority,
];

const SIGNALS: Calls = &[
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigpending,
    libc::SYS_rt_sigsuspend,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_sigaltstack,
];

/// Questions about this process and the machine.
const FACTS: Calls = &[
    libc::SYS_getpid,
    libc::SYS_getppid,
    libc::SYS_gettid,
    libc::SYS_getpgid,
    libc::SYS_getsid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getresuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_getresgid,
    libc::SYS_getgroups,
    libc::SYS_getrlimit,
    libc::SYS_getrusage,
    libc::SYS_times,
    libc::SYS_capget,
    libc::SYS_uname,
    libc::SYS_sysinfo,
    libc::SYS_getrandom,
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_gettimeofday,
    libc::SYS_time,
];

/// The process whose memory is paged: watched, its descriptors taken, its end waited for; its
/// pages unmapped through a ring that was made in it before.
const PROCESSES: Calls = &[
    libc::SYS_pidfd_open,
    libc::SYS_pidfd_getfd,
    libc::SYS_pidfd_send_signal,
    libc::SYS_wait4,
    libc::SYS_waitid,
    libc::SYS_io_uring_enter,
];

const NETWORK: Calls = &[
    libc::SYS_socketpair,
    libc::SYS_connect,
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_sendto,
    libc::SYS_recvfrom,
    libc::SYS_sendmsg,
    libc::SYS_recvmsg,
    libc::SYS_sendmmsg,
    libc::SYS_recvmmsg,
    libc::SYS_shutdown,
];

/// What one thread of this process may do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ThreadPrivileges {
    /// Its number.
    pub thread: i32,
    /// Its name.
    pub name: String,
    /// Capabilities in effect.
    pub effective: Capabilities,
    /// Capabilities that it could put in effect.
    pub permitted: Capabilities,
    /// Capabilities that a program could get from its file.
    pub bounding: Capabilities,
    /// Whether [`no_new_privs`] holds.
    pub no_new_privs: bool,
    /// Whether system calls are filtered.
    pub filtered: bool,
}

/// The privileges of all threads of this process that are there now.
///
/// # Errors
/// Those of reading `/proc/self/task`; `InvalidData` if the kernel's words are not understood.
pub fn threads() -> io::Result<Vec<ThreadPrivileges>> {
    let mut threads = Vec::new();
    for entry in std::fs::read_dir("/proc/self/task")? {
        // A thread may end meanwhile.
        let Ok(text) = std::fs::read_to_string(entry?.path().join("status")) else { continue };
        let invalid = || io::Error::new(io::ErrorKind::InvalidData, "/proc/self/task/ID/status");
        threads.push(parse_status(&text).ok_or_else(invalid)?);
    }
    Ok(threads)
}

fn parse_status(text: &str) -> Option<ThreadPrivileges> {
    let field = |name: &str| {
        text.lines().find_map(|line| Some(line.strip_prefix(name)?.strip_prefix(':')?.trim()))
    };
    let set = |name| {
        let bits = u64::from_str_radix(field(name)?, 16).ok()?;
        Some(Capabilities::from_bits_retain(bits))
    };
    Some(ThreadPrivileges {
        thread: field("Pid")?.parse().ok()?,
        name: field("Name")?.to_owned(),
        effective: set("CapEff")?,
        permitted: set("CapPrm")?,
        bounding: set("CapBnd")?,
        no_new_privs: field("NoNewPrivs")? == "1",
        filtered: field("Seccomp")? == "2",
    })
}
