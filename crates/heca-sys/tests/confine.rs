//! Confinement, each time in a process of its own, as there is no way back. Run as root.
#![allow(clippy::unwrap_used)]

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream, ToSocketAddrs, UdpSocket};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, chown};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use heca_sys::confine::{self, Capabilities, FOREIGN, PAGER, Profile, ThreadPrivileges};
use heca_sys::journal::Journal;
use heca_sys::map::SharedMap;
use heca_sys::pagemap::Pagemap;
use heca_sys::uffd::Userfaultfd;
use heca_sys::{attach, process, zap};

/// Runs the test of this name in a child. `true` in the child, which is then to do the work.
fn in_child(test: &str) -> bool {
    if std::env::var("HECA_TEST_CHILD").is_ok_and(|name| name == test) {
        return true;
    }
    let output = run_child(test);
    let text = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
    false
}

fn run_child(test: &str) -> std::process::Output {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture", "--include-ignored"])
        .env("HECA_TEST_CHILD", test)
        .output()
        .unwrap()
}

fn own_privileges() -> ThreadPrivileges {
    let own = rustix::thread::gettid().as_raw_nonzero().get();
    confine::threads().unwrap().into_iter().find(|thread| thread.thread == own).unwrap()
}

fn call(number: i64, arguments: [u64; 6]) -> io::Result<i64> {
    let [a, b, c, d, e, f] = arguments;
    // SAFETY: callers pass zeros and small numbers only, with which none of the calls touches
    // memory of this process.
    let result = unsafe { libc::syscall(number, a, b, c, d, e, f) };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

#[track_caller]
fn assert_refused<T: std::fmt::Debug>(outcome: io::Result<T>) {
    assert_eq!(outcome.expect_err("refused").raw_os_error(), Some(libc::EPERM));
}

#[test]
fn what_a_pager_has_no_use_for_is_refused() {
    if !in_child("what_a_pager_has_no_use_for_is_refused") {
        return;
    }
    // With all capabilities: it is the filter that refuses. Without it each of these would fail in
    // another way, or do no harm, as its arguments are zeros.
    confine::seccomp(Profile::Serve).unwrap();
    let refused = [
        libc::SYS_execve,
        libc::SYS_execveat,
        libc::SYS_fork,
        libc::SYS_ptrace,
        libc::SYS_init_module,
        libc::SYS_finit_module,
        libc::SYS_delete_module,
        libc::SYS_mount,
        libc::SYS_umount2,
        libc::SYS_move_mount,
        libc::SYS_fsopen,
        libc::SYS_pivot_root,
        libc::SYS_chroot,
        libc::SYS_setns,
        libc::SYS_unshare,
        libc::SYS_bpf,
        libc::SYS_kexec_load,
        libc::SYS_kexec_file_load,
        libc::SYS_open_by_handle_at,
        libc::SYS_reboot,
        libc::SYS_swapon,
        libc::SYS_swapoff,
        libc::SYS_keyctl,
        libc::SYS_add_key,
        libc::SYS_request_key,
        libc::SYS_perf_event_open,
        libc::SYS_process_vm_readv,
        libc::SYS_process_vm_writev,
        libc::SYS_settimeofday,
        libc::SYS_clock_settime,
        libc::SYS_adjtimex,
        libc::SYS_userfaultfd,
        libc::SYS_io_uring_setup,
        libc::SYS_io_uring_register,
        libc::SYS_capset,
        libc::SYS_setuid,
        libc::SYS_setgid,
        libc::SYS_chown,
        libc::SYS_mknod,
        libc::SYS_acct,
        libc::SYS_iopl,
        libc::SYS_personality,
        libc::SYS_kcmp,
        libc::SYS_seccomp,
        libc::SYS_memfd_secret,
        4000,
    ];
    for number in refused {
        let outcome = call(number, [0; 6]);
        let errno = outcome.as_ref().err().and_then(io::Error::raw_os_error);
        assert_eq!(errno, Some(libc::EPERM), "call {number}: {outcome:?}");
    }
    assert_refused(Command::new("/bin/true").spawn());
    assert_refused(Err::<(), _>(Command::new("/bin/true").exec()));
    assert_refused(confine::seccomp(Profile::Serve));
    // Allowed calls, but not with such arguments.
    let (new_user, netlink_audit) = (libc::CLONE_NEWUSER as u64, 9);
    assert_refused(call(libc::SYS_clone, [libc::SIGCHLD as u64, 0, 0, 0, 0, 0]));
    assert_refused(call(libc::SYS_clone, [new_user | libc::SIGCHLD as u64, 0, 0, 0, 0, 0]));
    assert_refused(call(
        libc::SYS_socket,
        [libc::AF_PACKET as u64, libc::SOCK_RAW as u64, 0, 0, 0, 0],
    ));
    let raw = libc::SOCK_RAW as u64;
    assert_refused(call(libc::SYS_socket, [libc::AF_NETLINK as u64, raw, netlink_audit, 0, 0, 0]));
    assert_refused(call(libc::SYS_ioctl, [0, 0x5412, 0, 0, 0, 0]));
    assert_refused(call(libc::SYS_prctl, [libc::PR_SET_MM as u64, 0, 0, 0, 0, 0]));
    assert_refused(call(libc::SYS_prlimit64, [1, 0, 0, 0, 0, 0]));
    assert_refused(call(libc::SYS_tgkill, [1, 1, 0, 0, 0, 0]));
    let clone3 = call(libc::SYS_clone3, [0; 6]).expect_err("refused");
    assert_eq!(clone3.raw_os_error(), Some(libc::ENOSYS));
}

/// A file in use by a mapping of this process.
fn memory(path: &Path) -> SharedMap {
    let file = File::options().read(true).write(true).create(true).truncate(true).open(path);
    let file = file.unwrap();
    file.set_len(1 << 20).unwrap();
    SharedMap::new(&file, 1 << 20).unwrap()
}

fn echo(mut left: impl Read + Write, mut right: impl Read + Write) {
    left.write_all(b"hello").unwrap();
    let mut bytes = [0; 5];
    right.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"hello");
}

#[test]
fn what_a_pager_does_goes_on() {
    if !in_child("what_a_pager_does_goes_on") {
        return;
    }
    process::lock_memory().unwrap();
    confine::drop_capabilities(PAGER).unwrap();
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let pagemap = Pagemap::open(std::process::id() as i32).unwrap();
    let uffd_features = Userfaultfd::available_features().unwrap();
    confine::seccomp(Profile::Serve).unwrap();

    // Files, among them the journal.
    let path = dir.path().join("file");
    fs::write(&path, b"content").unwrap();
    let file = File::options().read(true).write(true).open(&path).unwrap();
    file.write_all_at(b"C", 0).unwrap();
    file.set_len(1 << 20).unwrap();
    let punch = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(&file, punch, 4096, 4096).unwrap();
    file.sync_all().unwrap();
    fs::rename(&path, dir.path().join("renamed")).unwrap();
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    fs::remove_file(dir.path().join("renamed")).unwrap();
    drop(Journal::create(&dir.path().join("journal"), 100, 1, [1; 16]).unwrap());
    Journal::open(&dir.path().join("journal"), 100, 1, [1; 16]).unwrap().set_epoch(1);

    // Sockets and names.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    client.set_nodelay(true).unwrap();
    echo(client, listener.accept().unwrap().0);
    let listener = UnixListener::bind(dir.path().join("socket")).unwrap();
    let client = UnixStream::connect(dir.path().join("socket")).unwrap();
    echo(client, listener.accept().unwrap().0);
    let (left, right) = UnixStream::pair().unwrap();
    left.set_nonblocking(true).unwrap();
    echo(left, right);
    UdpSocket::bind("127.0.0.1:0").unwrap();
    assert!("localhost:1".to_socket_addrs().unwrap().count() > 0);

    // Threads, times, waiting.
    let (sender, receiver) = channel();
    let thread = std::thread::Builder::new().name("later".into()).spawn(move || {
        std::thread::sleep(Duration::from_millis(1));
        sender.send(own_privileges()).unwrap();
    });
    thread.unwrap().join().unwrap();
    let later = receiver.recv_timeout(Duration::from_secs(5)).unwrap();
    assert_eq!((later.name.as_str(), later.effective), ("later", PAGER));
    assert!(later.filtered && later.no_new_privs);
    let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
    rustix::io::write(&event, &1u64.to_ne_bytes()).unwrap();
    let mut fds = [rustix::event::PollFd::new(&event, rustix::event::PollFlags::IN)];
    assert_eq!(rustix::event::poll(&mut fds, None).unwrap(), 1);
    let epoll = rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC).unwrap();
    drop(epoll);

    // Memory; larger than the limit of locked memory, which `mlockall` would hold against it.
    drop(vec![1u8; 64 << 20]);
    let pid = std::process::id() as i32;
    let pidfd = process::open_pidfd(pid).unwrap();
    drop(process::take_fd(pidfd.as_fd(), 0).unwrap());
    let map = memory(&dir.path().join("ram"));
    map.unlock().unwrap();
    (0..256).for_each(|page| map.store(page * 512, 1));
    zap::page_out(pidfd.as_fd(), &[(map.address(), 1 << 20)]).unwrap();
    pagemap.count_written(map.address(), map.address() + (1 << 20)).unwrap();
    drop(Pagemap::open(pid).unwrap());
    assert!(uffd_features.0 != 0);
    assert_refused(attach::userfaultfd(pid).map(drop));
}

#[test]
fn every_thread_is_filtered_and_later_ones_have_fewer_capabilities() {
    if !in_child("every_thread_is_filtered_and_later_ones_have_fewer_capabilities") {
        return;
    }
    let waiting = |name: &str| {
        let (end, ended) = channel::<()>();
        let (begin, begun) = channel();
        let body = move || {
            begin.send(()).unwrap();
            let _ = ended.recv();
        };
        std::thread::Builder::new().name(name.into()).spawn(body).unwrap();
        begun.recv().unwrap();
        end
    };
    let before = own_privileges();
    assert!(!before.filtered && !before.no_new_privs);
    assert!(before.effective.contains(Capabilities::SYS_ADMIN | PAGER), "run as root");
    let _early = waiting("early");
    confine::drop_capabilities(PAGER).unwrap();
    let _between = waiting("between");
    confine::seccomp(Profile::Serve).unwrap();
    let _late = waiting("late");

    let threads = confine::threads().unwrap();
    assert!(threads.len() >= 5, "the test's, its harness's and three: {threads:?}");
    assert!(threads.iter().all(|thread| thread.filtered && thread.no_new_privs), "{threads:?}");
    let named = |name: &str| threads.iter().find(|thread| thread.name == name).unwrap();
    for thread in [&own_privileges(), named("between"), named("late")] {
        assert_eq!((thread.effective, thread.permitted), (PAGER, PAGER), "{thread:?}");
        assert_eq!(thread.bounding, PAGER, "{thread:?}");
    }
    // Why the order matters.
    assert_eq!(named("early").effective, before.effective);
    let status = fs::read_to_string("/proc/thread-self/status").unwrap();
    for empty in ["CapInh:\t0000000000000000", "CapAmb:\t0000000000000000"] {
        assert!(status.contains(empty), "{status}");
    }
}

#[test]
fn capabilities_that_are_gone_do_not_come_back() {
    if !in_child("capabilities_that_are_gone_do_not_come_back") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    File::create_new(&path).unwrap();
    confine::drop_capabilities(Capabilities::SYS_NICE | Capabilities::SYS_PTRACE).unwrap();
    assert_refused(chown(&path, Some(1), None));
    assert_refused(rustix::system::sethostname(b"x").map_err(io::Error::from));
    // To keep what is gone already is no error, and does not bring it back.
    confine::drop_capabilities(Capabilities::all()).unwrap();
    assert_eq!(own_privileges().permitted, Capabilities::SYS_NICE | Capabilities::SYS_PTRACE);
    // Nor does a program that root starts get it.
    confine::no_new_privs().unwrap();
    let output = Command::new("grep").args(["CapEff", "/proc/self/status"]).output().unwrap();
    let bits = (Capabilities::SYS_NICE | Capabilities::SYS_PTRACE).bits();
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(u64::from_str_radix(text.trim_start_matches("CapEff:").trim(), 16), Ok(bits));
    confine::drop_capabilities(Capabilities::empty()).unwrap();
    assert!(own_privileges().permitted.is_empty());
    confine::seccomp(Profile::Serve).expect("needs no capability");
}

/// Why [`PAGER`] has `IPC_LOCK`.
#[test]
fn locked_memory_cannot_grow_without_the_capability() {
    if !in_child("locked_memory_cannot_grow_without_the_capability") {
        return;
    }
    use rustix::process::{Resource, Rlimit, setrlimit};
    process::lock_memory().unwrap();
    let limit = Some(64 << 10);
    setrlimit(Resource::Memlock, Rlimit { current: limit, maximum: limit }).unwrap();
    let grow = || Vec::<u8>::new().try_reserve_exact(64 << 20);
    confine::drop_capabilities(PAGER).unwrap();
    grow().expect("with the capability");
    confine::drop_capabilities(PAGER.difference(Capabilities::IPC_LOCK)).unwrap();
    let refused = grow().is_err();
    rustix::mm::munlockall().unwrap();
    assert!(refused);
}

/// Not a test of its own: a process whose memory others take. Ends with its input.
#[test]
#[ignore = "started by other tests"]
fn child_with_memory() {
    let Ok(path) = std::env::var("HECA_TEST_RAM") else { return };
    let map = memory(Path::new(&path));
    (0..256).for_each(|page| map.store(page * 512, 1));
    println!("\nmemory {}", map.address());
    let _ = io::stdin().read(&mut [0]);
}

struct Target {
    child: Child,
    address: u64,
}

impl Target {
    fn start(path: &Path, user: u32) -> Self {
        use std::io::BufRead;
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child_with_memory", "--nocapture", "--include-ignored"])
            .env("HECA_TEST_RAM", path)
            .uid(user)
            .gid(user)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = io::BufReader::new(child.stdout.take().unwrap()).lines();
        let mut words = lines.map(Result::unwrap);
        let line = words.find_map(|line| Some(line.strip_prefix("memory ")?.to_owned())).unwrap();
        Self { child, address: line.parse().unwrap() }
    }

    fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// Takes pages until all are gone or it is clear that they stay; returns how many are mapped.
    fn take_pages(&self, pagemap: &Pagemap) -> usize {
        let pidfd = process::open_pidfd(self.pid()).unwrap();
        let deadline = Instant::now() + Duration::from_secs(1);
        loop {
            zap::page_out(pidfd.as_fd(), &[(self.address, 1 << 20)]).unwrap();
            let mut infos = Vec::new();
            pagemap.read(self.address, 256, &mut infos).unwrap();
            let mapped = infos.iter().filter(|info| info.is_mapped()).count();
            if mapped == 0 || Instant::now() > deadline {
                return mapped;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The capabilities of [`PAGER`] are enough for the memory of a process of the same user, whatever
/// that may do; for one of another user it takes those of [`FOREIGN`], too.
#[test]
fn the_capabilities_suffice_to_attach_and_to_take_pages() {
    if !in_child("the_capabilities_suffice_to_attach_and_to_take_pages")
        || !zap::page_out_works().unwrap()
    {
        return;
    }
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
    let own = Target::start(&dir.path().join("own"), 0);
    let other = Target::start(&dir.path().join("other"), 1234);
    let again = Target::start(&dir.path().join("again"), 1234);

    confine::drop_capabilities(PAGER | FOREIGN).unwrap();
    let attached = attach::userfaultfd(other.pid()).unwrap();
    attach::close_remote(other.pid(), attached.remote_fd).unwrap();
    let foreign_map = Pagemap::open(again.pid()).unwrap();
    assert_eq!(other.take_pages(&Pagemap::open(other.pid()).unwrap()), 0);

    confine::drop_capabilities(PAGER).unwrap();
    let attached = attach::userfaultfd(own.pid()).unwrap();
    attach::close_remote(own.pid(), attached.remote_fd).unwrap();
    drop(attach::remote_ring(own.pid()).unwrap());
    assert_eq!(own.take_pages(&Pagemap::open(own.pid()).unwrap()), 0);
    assert_eq!(again.take_pages(&foreign_map), 256, "passed over in silence");
    let denied = Pagemap::open(again.pid()).expect_err("another user's");
    assert_eq!(denied.kind(), io::ErrorKind::PermissionDenied);
}

#[test]
fn who_may_detach_can_trace_still() {
    if !in_child("who_may_detach_can_trace_still") {
        return;
    }
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let target = Target::start(&dir.path().join("ram"), 0);
    confine::drop_capabilities(PAGER).unwrap();
    let attached = attach::userfaultfd(target.pid()).unwrap();
    confine::seccomp(Profile::ServeAndDetach).unwrap();
    attach::close_remote(target.pid(), attached.remote_fd).unwrap();
    assert_refused(Command::new("/bin/true").spawn());
    // The child is ended by the end of its input: it cannot be killed from here any more.
    let child = &mut { target }.child;
    drop(child.stdin.take());
    child.wait().unwrap();
}

/// Not a test of its own: aborts under the filter.
#[test]
#[ignore = "started by another test"]
fn child_that_aborts() {
    if std::env::var("HECA_TEST_CHILD").is_ok_and(|name| name == "child_that_aborts") {
        confine::seccomp(Profile::Serve).unwrap();
        std::process::abort();
    }
}

#[test]
fn a_panic_can_still_end_the_process() {
    assert_eq!(run_child("child_that_aborts").status.signal(), Some(libc::SIGABRT));
}

#[test]
#[ignore = "a measurement: add --ignored --nocapture"]
fn nanoseconds_for_a_call() {
    if std::env::var("HECA_TEST_CHILD").is_err() {
        print!("{}", String::from_utf8_lossy(&run_child("nanoseconds_for_a_call").stdout));
        return;
    }
    const ROUNDS: u32 = 2_000;
    let measure = |what: &str| {
        // A bad descriptor: the shortest way through the kernel. `close` is allowed whatever its
        // arguments, which the kernel remembers; the arguments of `ioctl` are looked at.
        for (name, number) in [("close", libc::SYS_close), ("ioctl", libc::SYS_ioctl)] {
            let round = || {
                let begun = Instant::now();
                for _ in 0..ROUNDS {
                    let _ = call(number, [9999, 0xc028_aa03, 0, 0, 0, 0]);
                }
                begun.elapsed().as_secs_f64() * 1e9 / f64::from(ROUNDS)
            };
            let best = (0..500).map(|_| round()).fold(f64::MAX, f64::min);
            println!("{what}: {name} {best:.0} ns");
        }
    };
    measure("without filter");
    confine::seccomp(Profile::Serve).unwrap();
    measure("with filter");
}
