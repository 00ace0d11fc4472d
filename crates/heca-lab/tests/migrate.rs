//! Guests that move between hosts while they work on their memory.
#![allow(clippy::unwrap_used)]

use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use heca_api::{MigrationInfo, MigrationPhase, VmInfo, VmState};
use heca_lab::{
    Console, GuestImage, Lab, LabPool, find_kernel, find_qemu10, heca_binary, start_moving_hosts,
};
use heca_types::ByteSize;
use heca_vmm::qmp::Qmp;

static SERIAL: Mutex<()> = Mutex::new(());

/// Hosts 1 and 2 run VMs and take them in; 3 and 4 lend memory.
struct Rig {
    lab: Lab,
    kernel: String,
    initrd: String,
    qemu: Option<PathBuf>,
    pool: Option<LabPool>,
    _serial: MutexGuard<'static, ()>,
}

impl Rig {
    fn new(qemu: Option<PathBuf>) -> Self {
        Self::with(qemu, false)
    }

    fn with(qemu: Option<PathBuf>, secure: bool) -> Self {
        let serial = SERIAL.lock().unwrap_or_else(PoisonError::into_inner);
        let mut lab = Lab::new(4).unwrap();
        let pool = secure.then(|| LabPool::new(&mut lab, 4).unwrap());
        start_moving_hosts(&mut lab, 4, ByteSize(1 << 30), pool.as_ref()).unwrap();
        let initrd = lab.dir().join("initrd");
        let mut image = GuestImage::new().unwrap();
        image.stripped_program("heca", &heca_binary().unwrap(), lab.dir()).unwrap();
        let init = "echo guest: up\n/bin/heca hammer --size 96M --threads 2\n\
                    echo guest: hammer ended\nwhile :; do sleep 1; done\n";
        image.write(init, &initrd).unwrap();
        let kernel = find_kernel().unwrap().to_string_lossy().into_owned();
        let initrd = initrd.to_string_lossy().into_owned();
        Self { lab, kernel, initrd, qemu, pool, _serial: serial }
    }

    fn start(&mut self, local: &str) {
        self.start_with(local, &[]);
    }

    fn start_with(&mut self, local: &str, more: &[&str]) {
        let sponsors = [self.lab.host(3).sponsor(), self.lab.host(4).sponsor()];
        let qemu = self.qemu.as_ref().map(|qemu| qemu.to_string_lossy().into_owned());
        let mut arguments = vec!["vm", "run", "g", "--memory", "256M", "--local", local];
        arguments.extend(["--kernel", &self.kernel, "--initrd", &self.initrd]);
        arguments.extend(["--append", "console=ttyS0 quiet panic=-1"]);
        for sponsor in &sponsors {
            arguments.extend(["--sponsor", sponsor]);
        }
        if let Some(qemu) = &qemu {
            arguments.extend(["--qemu", qemu]);
        }
        if self.pool.is_some() {
            arguments.push("--encrypt");
        }
        arguments.extend(more);
        self.lab.host(1).heca_ok(&arguments).unwrap();
        self.wait_for_reports(1, 3);
    }

    /// Waits until the guest on a host has made some more reports of its work, and fails if
    /// anything in them is wrong.
    fn wait_for_reports(&mut self, host: usize, count: usize) {
        let log = self.vm(host).console_log;
        let mut console = Console::new(&log);
        console.poll();
        let before = console.samples().len();
        let deadline = Instant::now() + Duration::from_secs(60);
        while console.samples().len() < before + count {
            console.poll();
            assert!(console.complaints().is_empty(), "{:?}", console.complaints());
            let text = std::fs::read_to_string(&log).unwrap_or_default();
            assert!(Instant::now() < deadline, "the guest is silent: {text}");
            std::thread::sleep(Duration::from_millis(50));
        }
        assert_eq!(console.last().unwrap().wrong_bytes, 0);
    }

    fn vm(&mut self, host: usize) -> VmInfo {
        self.lab.host(host).vm("g").unwrap()
    }

    fn migrate(&mut self, from: usize, to: usize, arguments: &[&str]) -> MigrationInfo {
        let address = self.lab.host(to).address().to_owned();
        let all = [&["vm", "migrate", "g", "--to", &address, "--json"], arguments].concat();
        let output = self.lab.host(from).heca(&all).unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let errors = String::from_utf8_lossy(&output.stderr);
        let info: MigrationInfo =
            serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text} {errors}"));
        let log = |lab: &mut Lab, host| {
            std::fs::read_to_string(lab.host(host).agent_log()).unwrap_or_default()
        };
        assert_eq!(
            info.phase,
            MigrationPhase::Completed,
            "{info:#?}\nsource: {}\ntarget: {}",
            log(&mut self.lab, from),
            log(&mut self.lab, to)
        );
        info
    }

    /// Moves the guest, and sees that it runs there and nowhere else.
    fn moves(&mut self, from: usize, to: usize, arguments: &[&str]) -> MigrationInfo {
        let info = self.migrate(from, to, arguments);
        assert_eq!(self.vm(to).state, VmState::Running);
        assert!(self.lab.host(from).vm("g").is_err(), "the VM is left behind");
        self.wait_for_reports(to, 3);
        eprintln!("{} {arguments:?}: {:?}", info.mode.name(), info.report);
        info
    }
}

#[test]
fn a_guest_moves_in_every_mode_of_heca_and_reads_what_it_wrote() {
    let mut rig = Rig::new(None);
    rig.start("256M");
    let info = rig.moves(1, 2, &["--mode", "hybrid"]);
    assert!(info.report.rounds >= 2 && info.report.pages_sent > 10_000, "{info:?}");
    let info = rig.moves(2, 1, &["--mode", "postcopy"]);
    assert_eq!(info.report.pages_sent_after, info.report.pages_unique_after, "{info:?}");
    assert!(info.report.pages_unique_after > 10_000, "{info:?}");
    let info = rig.moves(1, 2, &["--mode", "precopy"]);
    assert!(info.report.rounds >= 2, "{info:?}");
}

#[test]
fn pages_that_are_on_sponsors_do_not_move() {
    let mut rig = Rig::new(None);
    rig.start("48M");
    for (from, to, mode) in [(1, 2, "hybrid"), (2, 1, "postcopy")] {
        let info = rig.moves(from, to, &["--mode", mode]);
        // 48 MiB may be local, some of it more than once in the rounds; the guest works on 96 MiB.
        assert!(info.resident_bytes <= 49 << 20, "{info:?}");
        let unique = info.report.pages_unique_after * 4096;
        assert!(unique <= info.resident_bytes, "{info:?}");
        let stats = rig.vm(to).pager.unwrap();
        assert!(stats.gauges.remote_pages > 4096, "{:?}", stats.gauges);
        assert!(stats.gauges.poisoned_pages == 0 && stats.fenced.is_none(), "{stats:?}");
    }
}

#[test]
fn a_safe_move_leaves_nothing_behind() {
    let mut rig = Rig::new(None);
    rig.start("64M");
    let info = rig.moves(1, 2, &["--safe"]);
    assert_eq!((info.report.pages_sent, info.report.pages_unique_after), (0, 0), "{info:?}");
    rig.moves(2, 1, &["--safe"]);
}

#[test]
fn a_guest_moves_in_every_mode_of_qemu() {
    let mut rig = Rig::new(None);
    rig.start("256M");
    // Not its pre-copy: under TCG QEMU 7.2 loses pages.
    rig.moves(1, 2, &["--mode", "qemu-postcopy"]);
    rig.moves(2, 1, &["--mode", "qemu-postcopy-preempt"]);
    rig.moves(1, 2, &["--mode", "hybrid"]);
}

impl Rig {
    fn begin(&mut self, from: usize, to: usize, arguments: &[&str]) {
        let address = self.lab.host(to).address().to_owned();
        let all = [&["vm", "migrate", "g", "--to", &address, "--background"], arguments].concat();
        self.lab.host(from).heca_ok(&all).unwrap();
    }

    fn migration(&mut self, from: usize) -> MigrationInfo {
        let text = self.lab.host(from).heca_ok(&["vm", "migration", "g", "--json"]).unwrap();
        serde_json::from_str(&text).unwrap()
    }

    fn wait_for(
        &mut self,
        from: usize,
        what: &str,
        done: impl Fn(&MigrationInfo) -> bool,
    ) -> MigrationInfo {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let info = self.migration(from);
            if done(&info) {
                return info;
            }
            if Instant::now() > deadline {
                let log = |lab: &mut Lab, host| {
                    std::fs::read_to_string(lab.host(host).agent_log()).unwrap_or_default()
                };
                let logs = [log(&mut self.lab, 1), log(&mut self.lab, 2)];
                panic!("no {what}: {info:#?}\n{}\n{}", logs[0], logs[1]);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn wait_for_copying(&mut self, from: usize) {
        self.wait_for(from, "copying", |info| {
            info.phase == MigrationPhase::Copying && info.report.pages_sent > 1000
        });
    }

    /// The guest goes on on its host as if nothing had happened, and nothing is left on the other.
    fn stays(&mut self, host: usize, other: usize) {
        self.wait_for(host, "failure", |info| {
            matches!(info.phase, MigrationPhase::Failed | MigrationPhase::Cancelled)
        });
        let deadline = Instant::now() + Duration::from_secs(30);
        while self.vm(host).state != VmState::Running {
            assert!(Instant::now() < deadline, "{:?}", self.vm(host));
            std::thread::sleep(Duration::from_millis(20));
        }
        self.wait_for_reports(host, 4);
        while self.lab.host(other).vm("g").is_ok() {
            assert!(Instant::now() < deadline, "{:?}", self.lab.host(other).vm("g"));
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn log(&mut self, host: usize, what: &str) -> String {
        let path = self.lab.host(host).run_dir().join("vms/g").join(what);
        std::fs::read_to_string(path).unwrap_or_default()
    }
}

fn kill(pid: Option<i32>) {
    let pid = rustix::process::Pid::from_raw(pid.unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}

const SLOW: [&str; 2] = ["--bandwidth", "60M"];

#[test]
fn before_the_switch_every_failure_leaves_the_guest_where_it_is() {
    let mut rig = Rig::new(None);
    rig.start("160M");
    rig.begin(1, 2, &SLOW);
    rig.wait_for_copying(1);
    assert_eq!(rig.vm(2).state, VmState::Arriving);
    let busy = rig.lab.host(1).heca(&["vm", "migrate", "g", "--to", "10.77.0.2"]).unwrap();
    assert!(String::from_utf8_lossy(&busy.stderr).contains("on its way already"));
    rig.lab.host(1).heca_ok(&["vm", "migrate-cancel", "g"]).unwrap();
    rig.stays(1, 2);
    assert_eq!(rig.migration(1).phase, MigrationPhase::Cancelled);

    for victim in ["qemu", "pager"] {
        rig.begin(1, 2, &SLOW);
        rig.wait_for_copying(1);
        let there = rig.vm(2);
        kill(if victim == "qemu" { there.qemu_pid } else { there.pager_pid });
        rig.stays(1, 2);
    }
    // The source's own pager: the guest waits for its successor, and stays.
    rig.begin(1, 2, &SLOW);
    rig.wait_for_copying(1);
    kill(rig.vm(1).pager_pid);
    rig.stays(1, 2);
    // The target's agent.
    rig.begin(1, 2, &SLOW);
    rig.wait_for_copying(1);
    rig.lab.host(2).kill_agent();
    rig.lab.host(2).restart_agent().unwrap();
    rig.stays(1, 2);
    // The source's agent: its successor finds the guest as it was.
    rig.begin(1, 2, &SLOW);
    rig.wait_for_copying(1);
    rig.lab.host(1).kill_agent();
    rig.lab.host(1).restart_agent().unwrap();
    rig.wait_for_reports(1, 4);
    let deadline = Instant::now() + Duration::from_secs(40);
    while rig.lab.host(2).vm("g").is_ok() {
        assert!(Instant::now() < deadline, "the target waits for ever");
        std::thread::sleep(Duration::from_millis(50));
    }
    rig.moves(1, 2, &[]);
}

#[test]
fn after_the_switch_every_failure_is_waited_out() {
    let mut rig = Rig::new(None);
    rig.start("256M");
    let (mut from, mut to) = (1, 2);
    for trouble in [
        "target-pager",
        "source-pager",
        "source-qemu",
        "link",
        "source-agent",
        "source-agent-and-qemu",
        "target-agent",
    ] {
        rig.begin(from, to, &["--mode", "postcopy", "--bandwidth", "20M"]);
        let following = |info: &MigrationInfo| {
            info.phase == MigrationPhase::Following && info.report.pages_sent_after > 500
        };
        rig.wait_for(from, "following", following);
        match trouble {
            "target-pager" => kill(rig.vm(to).pager_pid),
            "source-pager" => kill(rig.vm(from).pager_pid),
            "source-qemu" => kill(rig.vm(from).qemu_pid),
            "source-agent-and-qemu" => {
                let qemu = rig.vm(from).qemu_pid;
                rig.lab.host(from).kill_agent();
                kill(qemu);
                rig.lab.host(from).restart_agent().unwrap();
            }
            "link" => {
                rig.lab.set_link(from, false).unwrap();
                std::thread::sleep(Duration::from_secs(2));
                rig.lab.set_link(from, true).unwrap();
            }
            "source-agent" => {
                rig.lab.host(from).kill_agent();
                rig.lab.host(from).restart_agent().unwrap();
            }
            _ => {
                rig.lab.host(to).kill_agent();
                rig.lab.host(to).restart_agent().unwrap();
            }
        }
        rig.wait_for(from, &format!("end after {trouble}"), |info| {
            info.phase == MigrationPhase::Completed
        });
        rig.wait_for_reports(to, 4);
        let stats = rig.vm(to).pager.unwrap();
        assert_eq!(stats.gauges.behind_pages, 0, "{trouble}: {}", rig.log(to, "pager.log"));
        assert!(rig.lab.host(from).vm("g").is_err(), "{trouble}: the VM is left behind");
        (from, to) = (to, from);
    }
}

#[test]
fn a_guest_that_is_held_when_its_agent_ends_goes_on_under_the_next_one() {
    let mut rig = Rig::new(None);
    rig.start("128M");
    let socket = rig.lab.host(1).run_dir().join("vms/g/qmp.sock");
    let qemu = rig.vm(1).qemu_pid.unwrap();
    rig.lab.host(1).kill_agent();
    // As amid a move; and QEMU does not answer for longer than a first attempt lasts.
    Qmp::connect(&socket, Duration::from_secs(5)).unwrap().stop().unwrap();
    let pid = rustix::process::Pid::from_raw(qemu).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
    rig.lab.host(1).restart_agent().unwrap();
    std::thread::sleep(Duration::from_secs(12));
    assert!(rig.vm(1).problem.is_some_and(|problem| problem.contains("does not go on")));
    rustix::process::kill_process(pid, rustix::process::Signal::CONT).unwrap();
    rig.wait_for_reports(1, 3);
    assert_eq!(rig.vm(1).problem, None);
}

#[test]
fn a_guest_moves_under_qemu_10_in_every_mode_with_its_disk() {
    let mut rig = Rig::new(Some(find_qemu10().unwrap()));
    let disk = rig.lab.dir().join("disk.raw");
    std::fs::File::create(&disk).unwrap().set_len(8 << 20).unwrap();
    let disk = disk.to_string_lossy().into_owned();
    rig.start_with("256M", &["--disk", &disk]);
    let modes =
        ["hybrid", "postcopy", "precopy", "qemu-precopy", "qemu-postcopy", "qemu-postcopy-preempt"];
    let (mut from, mut to) = (1, 2);
    for mode in modes {
        let info = rig.moves(from, to, &["--mode", mode]);
        if !info.mode.is_qemu() {
            // QEMU sends its devices and ROMs; a memory that is no named file it would send, too.
            assert!(info.report.device_state_bytes < 8 << 20, "{info:?}");
        }
        (from, to) = (to, from);
    }
    rig.moves(from, to, &["--safe"]);
}

#[test]
fn a_sealed_guest_moves_over_tls() {
    let mut rig = Rig::with(None, true);
    rig.start("64M");
    let key = |rig: &mut Rig, host| {
        std::fs::read(rig.lab.host(host).run_dir().join("vms/g/page.key")).unwrap()
    };
    let before = key(&mut rig, 1);
    rig.moves(1, 2, &["--mode", "hybrid"]);
    assert_eq!(key(&mut rig, 2), before);
    rig.moves(2, 1, &["--mode", "postcopy"]);
    rig.moves(1, 2, &["--safe"]);
    for host in [1, 2] {
        let log = std::fs::read(rig.lab.host(host).agent_log()).unwrap();
        // As it is, or as numbers.
        let numbers = serde_json::to_string(&before).unwrap();
        let forms =
            [before.clone(), numbers.clone().into_bytes(), numbers.replace(',', ", ").into()];
        let leaked = |key: &Vec<u8>| log.windows(key.len()).any(|part| part == key);
        let leaked = forms.iter().any(leaked);
        assert!(!leaked, "the page key is in the log of host {host}");
    }
}

#[test]
fn what_cannot_move_is_refused_in_words_and_goes_on() {
    let mut rig = Rig::new(None);
    rig.start("128M");
    let mut refused = |arguments: &[&str], words: &str| {
        let all = [&["vm", "migrate", "g"], arguments].concat();
        let output = rig.lab.host(1).heca(&all).unwrap();
        assert!(!output.status.success(), "{arguments:?}");
        let text =
            String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        assert!(text.contains(words), "{arguments:?}: {text}");
    };
    refused(&["--to", "10.77.0.3"], "cannot be reached");
    refused(&["--to", "10.77.0.3:7900"], "serves pages");
    refused(&["--to", "10.77.0.2", "--mode", "teleport"], "choose one of hybrid");
    refused(&["--to", "10.77.0.2", "--mode", "precopy", "--safe"], "does not go with");
    refused(&["--to", "10.77.0.1"], "exists on this host already");
    let unknown = rig.lab.host(1).heca(&["vm", "migrate", "h", "--to", "10.77.0.2"]).unwrap();
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("no VM `h`"));
    let nothing = rig.lab.host(1).heca(&["vm", "migrate-resolve", "g", "--gone"]).unwrap();
    assert!(String::from_utf8_lossy(&nothing.stderr).contains("nothing to decide"));
    rig.wait_for_reports(1, 3);
    rig.moves(1, 2, &[]);
}

#[test]
fn two_guests_move_at_once_and_cross() {
    let mut rig = Rig::new(None);
    rig.start("64M");
    // The second one is on the other host, and on its way to the first.
    let sponsors = [rig.lab.host(3).sponsor(), rig.lab.host(4).sponsor()];
    let (kernel, initrd) = (rig.kernel.clone(), rig.initrd.clone());
    let mut words = vec!["vm", "run", "h", "--memory", "256M", "--local", "64M"];
    words.extend(["--kernel", &kernel, "--initrd", &initrd]);
    words.extend(["--append", "console=ttyS0 quiet panic=-1"]);
    for sponsor in &sponsors {
        words.extend(["--sponsor", sponsor]);
    }
    rig.lab.host(2).heca_ok(&words).unwrap();
    std::thread::sleep(Duration::from_secs(4));
    rig.begin(1, 2, &[]);
    rig.lab.host(2).heca_ok(&["vm", "migrate", "h", "--to", "10.77.0.1", "--background"]).unwrap();
    rig.wait_for(1, "end", |info| info.phase == MigrationPhase::Completed);
    let deadline = Instant::now() + Duration::from_secs(30);
    while rig.lab.host(1).vm("h").map(|vm| vm.state).ok() != Some(VmState::Running) {
        assert!(Instant::now() < deadline, "{:?}", rig.lab.host(2).vm("h"));
        std::thread::sleep(Duration::from_millis(50));
    }
    rig.wait_for_reports(2, 4);
    let mut console = Console::new(&rig.lab.host(1).vm("h").unwrap().console_log);
    std::thread::sleep(Duration::from_secs(1));
    console.poll();
    assert!(console.complaints().is_empty() && !console.samples().is_empty());
    assert_eq!(console.last().unwrap().wrong_bytes, 0);
}

#[test]
fn a_copy_that_takes_long_is_not_given_up() {
    let mut rig = Rig::new(None);
    rig.start("128M");
    rig.begin(1, 2, &["--bandwidth", "4M"]);
    // Longer than the time after which the target is asked whether it still waits.
    let info = rig.wait_for(1, "long copy", |info| info.elapsed_s > 12.0);
    assert_eq!(info.phase, MigrationPhase::Copying, "{info:?}");
    rig.lab.host(1).heca_ok(&["vm", "migrate-cancel", "g"]).unwrap();
    rig.stays(1, 2);
}

#[test]
fn a_sealed_guest_does_not_move_in_plaintext() {
    let mut rig = Rig::new(None);
    rig.start_with("128M", &["--encrypt"]);
    let output = rig.lab.host(1).heca(&["vm", "migrate", "g", "--to", "10.77.0.2"]).unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && text.contains("over TLS only"), "{text}");
    rig.wait_for_reports(1, 3);
}
