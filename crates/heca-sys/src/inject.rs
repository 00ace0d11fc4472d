//! Runs single system calls in another process (ptrace), without stopping its other threads.
//!
//! The main thread is seized and interrupted, its registers are pointed at a `syscall` instruction
//! of the vDSO, stepped over it, and put back. Nothing is written into its code, and its stack is
//! not touched. Other signals that arrive meanwhile are kept and sent again afterwards.

use std::io;
use std::os::unix::fs::FileExt;

use crate::process::maps;

/// A thread that is stopped under our control. Dropping it lets the thread go on where it was.
pub(crate) struct Tracee {
    pid: i32,
    syscall_address: u64,
    saved: libc::user_regs_struct,
    signals: Vec<i32>,
}

fn request(number: libc::c_uint, pid: i32, address: u64, data: u64) -> io::Result<()> {
    // SAFETY: only requests that pass plain numbers, or a pointer to a live `user_regs_struct`,
    // come through here; ptrace validates the target.
    let result = unsafe { libc::ptrace(number, pid, address, data) };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

impl Tracee {
    /// Stops the main thread of a process.
    ///
    /// # Errors
    /// `EPERM` without `CAP_SYS_PTRACE` or when a debugger is attached; `ESRCH` for a process that
    /// is gone.
    pub(crate) fn stop(pid: i32) -> io::Result<Self> {
        let syscall_address = find_syscall_instruction(pid)?;
        request(libc::PTRACE_SEIZE, pid, 0, 0)?;
        // SAFETY: all-zero registers are a valid value of this plain C struct.
        let saved = unsafe { std::mem::zeroed() };
        let mut tracee = Self { pid, syscall_address, saved, signals: Vec::new() };
        // From here on `Drop` detaches; without a stop yet there is nothing to put back.
        let stopped = tracee.interrupt();
        if let Err(error) = stopped {
            // Not stopped, so detach is refused; the kernel detaches when this thread ends. Only
            // a tracee that died meanwhile comes here.
            std::mem::forget(tracee);
            return Err(error);
        }
        Ok(tracee)
    }

    fn interrupt(&mut self) -> io::Result<()> {
        request(libc::PTRACE_INTERRUPT, self.pid, 0, 0)?;
        loop {
            let status = self.wait()?;
            if status >> 16 == libc::PTRACE_EVENT_STOP {
                break;
            }
            self.signals.push((status >> 8) & 0xff);
            request(libc::PTRACE_CONT, self.pid, 0, 0)?;
        }
        let pointer = &raw mut self.saved as u64;
        request(libc::PTRACE_GETREGS, self.pid, 0, pointer)
    }

    /// Waits for the next stop of the thread.
    fn wait(&self) -> io::Result<i32> {
        let mut status = 0;
        loop {
            // SAFETY: `status` is a valid place for the result.
            let pid = unsafe { libc::waitpid(self.pid, &raw mut status, libc::__WALL) };
            if pid == self.pid {
                break;
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
        if libc::WIFSTOPPED(status) {
            Ok(status)
        } else {
            Err(io::Error::from_raw_os_error(libc::ESRCH))
        }
    }

    /// Runs one system call in the process, which must not block. Returns its result.
    ///
    /// # Errors
    /// Those of ptrace, and the errno of the call itself.
    pub(crate) fn syscall(&mut self, number: i64, arguments: [u64; 6]) -> io::Result<u64> {
        let mut registers = self.saved;
        registers.rax = number as u64;
        // Not in a system call: the kernel must not restart an interrupted one here.
        registers.orig_rax = u64::MAX;
        registers.rip = self.syscall_address;
        let [rdi, rsi, rdx, r10, r8, r9] = arguments;
        (registers.rdi, registers.rsi, registers.rdx) = (rdi, rsi, rdx);
        (registers.r10, registers.r8, registers.r9) = (r10, r8, r9);
        request(libc::PTRACE_SETREGS, self.pid, 0, &raw const registers as u64)?;
        loop {
            request(libc::PTRACE_SINGLESTEP, self.pid, 0, 0)?;
            let status = self.wait()?;
            let signal = (status >> 8) & 0xff;
            if signal == libc::SIGTRAP && status >> 16 == 0 {
                break;
            }
            if status >> 16 == 0 {
                self.signals.push(signal);
            }
        }
        request(libc::PTRACE_GETREGS, self.pid, 0, &raw mut registers as u64)?;
        let result = registers.rax as i64;
        if (-4095..0).contains(&result) {
            return Err(io::Error::from_raw_os_error(-result as i32));
        }
        Ok(result as u64)
    }

    /// Writes into the process.
    ///
    /// # Errors
    /// Those of `/proc/PID/mem`.
    pub(crate) fn write(&self, address: u64, bytes: &[u8]) -> io::Result<()> {
        std::fs::File::options()
            .write(true)
            .open(format!("/proc/{}/mem", self.pid))?
            .write_all_at(bytes, address)
    }

    /// Reads from the process.
    ///
    /// # Errors
    /// Those of `/proc/PID/mem`.
    pub(crate) fn read(&self, address: u64, bytes: &mut [u8]) -> io::Result<()> {
        std::fs::File::open(format!("/proc/{}/mem", self.pid))?.read_exact_at(bytes, address)
    }
}

impl Drop for Tracee {
    fn drop(&mut self) {
        let restored = request(libc::PTRACE_SETREGS, self.pid, 0, &raw const self.saved as u64);
        let detached = request(libc::PTRACE_DETACH, self.pid, 0, 0);
        if let Err(error) = restored.and(detached) {
            tracing::debug!(pid = self.pid, %error, "traced process went away");
        }
        for &signal in &self.signals {
            // SAFETY: sends a signal that the thread was about to get anyway.
            unsafe { libc::syscall(libc::SYS_tgkill, self.pid, self.pid, signal) };
        }
    }
}

/// Address of a `syscall` instruction (0f 05) in the vDSO of a process.
fn find_syscall_instruction(pid: i32) -> io::Result<u64> {
    let vdso = maps(pid)?
        .into_iter()
        .find(|map| map.path == "[vdso]")
        .ok_or_else(|| io::Error::other("the process has no vDSO"))?;
    let mut code = vec![0u8; (vdso.end - vdso.start) as usize];
    std::fs::File::open(format!("/proc/{pid}/mem"))?.read_exact_at(&mut code, vdso.start)?;
    code.windows(2)
        .position(|bytes| bytes == [0x0f, 0x05])
        .map(|offset| vdso.start + offset as u64)
        .ok_or_else(|| io::Error::other("no syscall instruction in the vDSO"))
}
