//! Real guests under QEMU on hosts that are network namespaces: paging, life cycle, errors, and
//! that nothing is left behind.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use heca_api::{VmInfo, VmState};
use heca_lab::{AgentOptions, GuestImage, Lab, find_kernel, heca_binary};
use rustix::process::{Pid, Signal, kill_process};

static SERIAL: Mutex<()> = Mutex::new(());

/// A lab of three hosts: 1 runs VMs, 2 and 3 lend memory.
struct Rig {
    lab: Lab,
    kernel: String,
    initrd: String,
    _serial: MutexGuard<'static, ()>,
}

const INIT: &str = "
echo guest: up
/bin/heca memtest --size 150M --rounds 2 --json || echo guest: MEMTEST FAILED
echo guest: end
while :; do sleep 1; done
";

impl Rig {
    fn new(offer: &str) -> Self {
        Self::with_init(offer, INIT)
    }

    fn with_init(offer: &str, init: &str) -> Self {
        let serial = SERIAL.lock().unwrap_or_else(PoisonError::into_inner);
        let mut lab = Lab::new(3).unwrap();
        lab.host(1).start_agent(&AgentOptions::default()).unwrap();
        for number in [2, 3] {
            let options = AgentOptions { offer: offer.to_owned(), ..AgentOptions::default() };
            lab.host(number).start_agent(&options).unwrap();
        }
        let initrd = lab.dir().join("initrd");
        let mut image = GuestImage::new().unwrap();
        image.stripped_program("heca", &heca_binary().unwrap(), lab.dir()).unwrap();
        image.write(init, &initrd).unwrap();
        let kernel = find_kernel().unwrap().to_string_lossy().into_owned();
        Self { lab, kernel, initrd: initrd.to_string_lossy().into_owned(), _serial: serial }
    }

    fn run_arguments<'a>(&'a mut self, name: &'a str, sponsors: &'a [String]) -> Vec<&'a str> {
        let mut arguments = vec![
            "vm",
            "run",
            name,
            "--memory",
            "256M",
            "--local",
            "128M",
            "--kernel",
            &self.kernel,
            "--initrd",
            &self.initrd,
            "--append",
            "console=ttyS0 quiet panic=-1",
        ];
        for sponsor in sponsors {
            arguments.extend(["--sponsor", sponsor]);
        }
        arguments
    }

    fn sponsors(&mut self) -> Vec<String> {
        vec![self.lab.host(2).sponsor(), self.lab.host(3).sponsor()]
    }

    fn start(&mut self, name: &str) {
        let sponsors = self.sponsors();
        let arguments: Vec<String> =
            self.run_arguments(name, &sponsors).into_iter().map(str::to_owned).collect();
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        self.lab.host(1).heca_ok(&arguments).unwrap();
    }

    fn wait(&mut self, what: &str, seconds: u64, done: impl Fn(&VmInfo) -> bool) -> VmInfo {
        let deadline = Instant::now() + Duration::from_secs(seconds);
        loop {
            let info = self.lab.host(1).vm("g").unwrap();
            if done(&info) {
                return info;
            }
            assert!(Instant::now() < deadline, "no {what} in {seconds} s: {info:?}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn wait_for_regions(&mut self, regions: u64) {
        let deadline = Instant::now() + Duration::from_secs(15);
        for number in [2, 3] {
            while self.lab.host(number).agent_info().unwrap().regions != regions {
                assert!(Instant::now() < deadline, "host {number} does not hold {regions} regions");
                std::thread::sleep(Duration::from_millis(50));
            }
        }
    }

    /// Files of VMs on host 1.
    fn memory_files(&mut self) -> Vec<PathBuf> {
        let dir = self.lab.host(1).memory_dir().to_owned();
        std::fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path()).collect()
    }
}

fn console(info: &VmInfo) -> String {
    String::from_utf8_lossy(&std::fs::read(&info.console_log).unwrap_or_default()).into_owned()
}

fn is_alive(pid: i32) -> bool {
    // A zombie that nobody has waited for yet is not alive.
    std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !stat[stat.rfind(')').unwrap_or(0)..].starts_with(") Z"))
}

fn wait_until_gone(pids: &[i32]) {
    let deadline = Instant::now() + Duration::from_secs(15);
    while pids.iter().any(|&pid| is_alive(pid)) {
        assert!(Instant::now() < deadline, "processes {pids:?} are left behind");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_guest_verifies_more_memory_than_its_host_may_use() {
    let mut rig = Rig::new("512M");
    rig.start("g");
    let sponsors = rig.sponsors();
    let again: Vec<String> =
        rig.run_arguments("g", &sponsors).into_iter().map(str::to_owned).collect();
    let again: Vec<&str> = again.iter().map(String::as_str).collect();
    let error = String::from_utf8(rig.lab.host(1).heca(&again).unwrap().stderr).unwrap();
    assert!(error.contains("exists on this host already"), "{error}");
    let info = rig.wait("end of the memory test", 240, |info| {
        assert_eq!(info.state, VmState::Running, "{:?}", info.problem);
        console(info).contains("guest: end")
    });
    let text = console(&info);
    assert!(text.contains("\"wrong_bytes\":0"), "{text}");
    let stats = info.pager.unwrap();
    assert!(stats.remote_pages_peak > 10_000, "{}", stats.remote_pages_peak);
    assert!(stats.counters.demand_fetches > 1000, "{:?}", stats.counters);
    assert!(stats.gauges.local_pages <= stats.gauges.budget_pages);
    for sponsor in &stats.sponsors {
        assert!(sponsor.pages_stored > 1000 && (sponsor.share - 0.5).abs() < 0.01, "{sponsor:?}");
    }

    // The budget changes while the guest runs.
    rig.lab.host(1).heca_ok(&["vm", "resize", "g", "--local", "64M"]).unwrap();
    rig.wait("smaller footprint", 30, |info| {
        let stats = info.pager.as_ref().unwrap();
        stats.gauges.budget_pages == 16_384 && stats.gauges.local_pages <= 16_384
    });
    let error = rig.lab.host(1).heca(&["vm", "resize", "g", "--local", "1M"]).unwrap();
    assert!(String::from_utf8_lossy(&error.stderr).contains("16 MiB"));

    // Figures for people, programs and Prometheus.
    let host = rig.lab.host(1);
    let shown = host.heca_ok(&["vm", "show", "g"]).unwrap();
    assert!(shown.contains("remote fault latency") && shown.contains("sponsors"), "{shown}");
    let json = host.heca_ok(&["vm", "show", "g", "--json"]).unwrap();
    let value: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert!(value["pager"]["dirty_pages"].as_u64().unwrap() > 0);
    assert!(value["pager"]["latency"]["network_us"]["p50"].as_f64().unwrap() > 0.0);
    assert!(host.heca_ok(&["vm", "list"]).unwrap().contains("running"));

    rig.wait_for_regions(1);
    rig.lab.host(1).heca_ok(&["vm", "stop", "g", "--now"]).unwrap();
    rig.wait_for_regions(0);
    assert_eq!(rig.memory_files(), Vec::<PathBuf>::new());
    assert!(rig.lab.host(1).vm("g").is_err());
}

#[test]
fn an_automatic_budget_follows_the_guest() {
    let work = "echo guest: up\n/bin/heca hammer --size 96M --threads 2 --seconds 25\n\
                echo guest: end\nwhile :; do sleep 1; done\n";
    let mut rig = Rig::with_init("1G", work);
    let sponsors = rig.sponsors();
    let start = |rig: &mut Rig, local: &str| {
        let mut arguments: Vec<String> =
            rig.run_arguments("g", &sponsors).into_iter().map(str::to_owned).collect();
        *arguments.iter_mut().find(|argument| *argument == "128M").unwrap() = local.to_owned();
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        rig.lab.host(1).heca(&arguments).unwrap()
    };
    for (local, words) in [
        ("auto:1M..64M", "at least 16 MiB"),
        ("auto:64M..32M", "no range"),
        ("auto:32M..1G", "more than the VM's"),
        ("automatic", "not a size"),
    ] {
        let refused = start(&mut rig, local);
        let text = String::from_utf8_lossy(&refused.stderr);
        assert!(!refused.status.success() && text.contains(words), "{local}: {text}");
    }
    assert!(start(&mut rig, "auto:32M..200M").status.success());
    // What it works on is more than it begins with.
    let grown = rig.wait("larger budget", 60, |info| info.local.0 > 100 << 20);
    assert!(grown.local.0 <= 200 << 20 && grown.pager.unwrap().stall_s > 0.0);
    rig.wait("end of the work", 90, |info| console(info).contains("guest: end"));
    let text = console(&rig.lab.host(1).vm("g").unwrap());
    assert!(!text.contains("WRONG") && !text.contains("panic"), "{text}");
    let before = rig.lab.host(1).vm("g").unwrap().local.0;
    rig.wait("smaller budget", 60, |info| info.local.0 < before - before / 20);
    // A budget that is given stays.
    rig.lab.host(1).heca_ok(&["vm", "resize", "g", "--local", "64M"]).unwrap();
    std::thread::sleep(Duration::from_secs(3));
    let info = rig.lab.host(1).vm("g").unwrap();
    assert_eq!((info.local.0, info.auto_local), (64 << 20, None));
    rig.lab.host(1).heca_ok(&["vm", "resize", "g", "--local", "auto"]).unwrap();
    assert!(rig.lab.host(1).vm("g").unwrap().auto_local.is_some());
}

#[test]
fn killing_qemu_frees_the_sponsors_and_leaves_nothing() {
    let mut rig = Rig::new("512M");
    rig.start("g");
    let info = rig.wait("remote memory", 120, |info| {
        info.pager.as_ref().is_some_and(|stats| stats.gauges.remote_pages > 1000)
    });
    rig.wait_for_regions(1);
    let (qemu, pager) = (info.qemu_pid.unwrap(), info.pager_pid.unwrap());
    kill_process(Pid::from_raw(qemu).unwrap(), Signal::KILL).unwrap();
    rig.wait("end of the VM", 15, |info| info.state == VmState::Stopped);
    rig.wait_for_regions(0);
    wait_until_gone(&[qemu, pager]);
    assert_eq!(rig.memory_files(), Vec::<PathBuf>::new());
    let stats = rig.lab.host(1).vm("g").unwrap().pager.unwrap();
    assert!(stats.remote_pages_peak > 1000, "the last figures stay");
}

#[test]
fn a_pager_that_dies_is_replaced_and_the_guest_loses_nothing() {
    let mut rig = Rig::new("512M");
    rig.start("g");
    let info = rig.wait("remote memory", 120, |info| {
        info.pager.as_ref().is_some_and(|stats| stats.gauges.remote_pages > 1000)
    });
    let (qemu, first) = (info.qemu_pid.unwrap(), info.pager_pid.unwrap());
    kill_process(Pid::from_raw(first).unwrap(), Signal::KILL).unwrap();
    let info = rig.wait("the next pager", 15, |info| {
        info.state == VmState::Running && info.pager_restarts == 1 && info.pager.is_some()
    });
    assert!(info.pager_pid != Some(first) && info.pager_pause_ms.is_some(), "{info:?}");
    assert_eq!((info.qemu_pid, info.problem), (Some(qemu), None));
    // The agent and the pager at once: the next agent finds the VM without a pager.
    rig.lab.host(1).kill_agent();
    kill_process(Pid::from_raw(info.pager_pid.unwrap()).unwrap(), Signal::KILL).unwrap();
    rig.lab.host(1).start_agent(&AgentOptions::default()).unwrap();
    let info = rig.wait("the pager after that", 15, |info| {
        info.state == VmState::Running && info.pager.as_ref().is_some_and(|stats| stats.resumed)
    });
    assert_eq!(info.qemu_pid, Some(qemu));
    let info = rig.wait("end of the memory test", 240, |info| {
        assert_ne!(info.state, VmState::Stopped, "{:?}", info.problem);
        console(info).contains("guest: end")
    });
    let text = console(&info);
    assert!(text.contains("\"wrong_bytes\":0") && !text.contains("Kernel panic"), "{text}");
    assert_eq!(info.pager.unwrap().counters.poisoned_pages, 0);
    rig.lab.host(1).heca_ok(&["vm", "stop", "g", "--now"]).unwrap();
    wait_until_gone(&[qemu]);
    rig.wait_for_regions(0);
    assert_eq!(rig.memory_files(), Vec::<PathBuf>::new());
}

#[test]
fn an_interrupted_agent_takes_its_vms_down() {
    let mut rig = Rig::new("512M");
    rig.start("g");
    let info = rig.wait("the guest", 60, |info| info.state == VmState::Running);
    let pids = [info.qemu_pid.unwrap(), info.pager_pid.unwrap()];
    let agent = rig.lab.host(1).agent_pid().unwrap();
    kill_process(Pid::from_raw(agent).unwrap(), Signal::INT).unwrap();
    wait_until_gone(&pids);
    rig.wait_for_regions(0);
    let socket = rig.lab.host(1).run_dir().join("agent.sock");
    let deadline = Instant::now() + Duration::from_secs(10);
    while socket.exists() || !rig.memory_files().is_empty() {
        assert!(Instant::now() < deadline, "files are left behind");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_killed_agent_finds_its_vms_again() {
    let mut rig = Rig::new("512M");
    rig.start("g");
    let before = rig.wait("the guest", 60, |info| console(info).contains("guest: up"));
    rig.lab.host(1).kill_agent();
    rig.lab.host(1).start_agent(&AgentOptions::default()).unwrap();
    let after = rig.lab.host(1).vm("g").unwrap();
    assert_eq!((after.state, after.qemu_pid), (VmState::Running, before.qemu_pid));
    rig.wait("figures", 10, |info| info.pager.is_some());
    rig.lab.host(1).heca_ok(&["vm", "stop", "g", "--now"]).unwrap();
    rig.wait_for_regions(0);
    assert_eq!(rig.memory_files(), Vec::<PathBuf>::new());
}

#[test]
fn an_interrupted_start_leaves_nothing() {
    let mut rig = Rig::new("512M");
    let sponsors = rig.sponsors();
    for wait_ms in [1, 60, 200, 500] {
        let arguments: Vec<String> =
            rig.run_arguments("g", &sponsors).into_iter().map(str::to_owned).collect();
        let mut child = rig
            .lab
            .host(1)
            .command(&heca_binary().unwrap())
            .args(&arguments)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(wait_ms));
        let _ = kill_process(Pid::from_child(&child), Signal::INT);
        let status = child.wait().unwrap();
        if status.success() {
            rig.lab.host(1).heca_ok(&["vm", "stop", "g", "--now"]).unwrap();
        }
        rig.wait_for_regions(0);
        let deadline = Instant::now() + Duration::from_secs(10);
        while rig.lab.host(1).vm("g").is_ok() || !rig.memory_files().is_empty() {
            assert!(Instant::now() < deadline, "a VM is left after {wait_ms} ms");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

#[test]
fn what_cannot_work_is_refused_in_words_and_leaves_nothing() {
    let mut rig = Rig::new("128M");
    let sponsors = rig.sponsors();
    let refusal = |rig: &mut Rig, sponsors: &[String], more: &[&str]| -> String {
        let mut arguments: Vec<String> =
            rig.run_arguments("g", sponsors).into_iter().map(str::to_owned).collect();
        arguments.extend(more.iter().map(|&m| m.to_owned()));
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let output = rig.lab.host(1).heca(&arguments).unwrap();
        assert!(!output.status.success());
        let files = rig.memory_files();
        assert_eq!(files, Vec::<PathBuf>::new());
        String::from_utf8(output.stderr).unwrap()
    };
    let error = refusal(&mut rig, &sponsors, &[]);
    assert!(error.contains("256 MiB asked for") && error.contains("raise the offer"), "{error}");
    let error = refusal(&mut rig, &["10.77.0.9:7900".to_owned(), sponsors[0].clone()], &[]);
    assert!(error.contains("10.77.0.9:7900") && error.contains("--offer"), "{error}");
    let error = refusal(&mut rig, &sponsors[..1], &[]);
    assert!(error.contains("2 replicas need 2 sponsors"), "{error}");
    let error = refusal(&mut rig, &sponsors, &["--", "-device", "vfio-pci,host=00:01.0"]);
    assert!(error.contains("vfio"), "{error}");
    let error = refusal(&mut rig, &sponsors, &["--", "-nonsense"]);
    assert!(error.contains("QEMU ended at once") && error.contains("nonsense"), "{error}");
    rig.wait_for_regions(0);

    let nobody = Command::new(heca_binary().unwrap())
        .args(["vm", "list", "--run-dir", "/nonexistent"])
        .output()
        .unwrap();
    assert!(String::from_utf8_lossy(&nobody.stderr).contains("heca agent"));
}

#[test]
fn a_qemu_without_shared_memory_is_refused_with_the_line_to_change() {
    let mut rig = Rig::new("512M");
    let ram = rig.lab.memory_dir().join("private.ram");
    let mut qemu = Command::new("qemu-system-x86_64")
        .args(["-S", "-display", "none", "-nodefaults", "-m", "64", "-accel", "tcg", "-object"])
        .arg(format!("memory-backend-file,id=m,size=64M,mem-path={}", ram.display()))
        .args(["-machine", "q35,memory-backend=m"])
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    let mapped = |pid: u32| {
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
        maps.contains("private.ram")
    };
    while !mapped(qemu.id()) {
        assert!(Instant::now() < deadline, "QEMU does not map its memory");
        std::thread::sleep(Duration::from_millis(50));
    }
    let sponsors = rig.sponsors();
    let pid = qemu.id().to_string();
    let file = ram.to_string_lossy().into_owned();
    let output = rig
        .lab
        .host(1)
        .heca(&[
            "attach",
            "--plaintext",
            "--pid",
            &pid,
            "--file",
            &file,
            "--local",
            "32M",
            "--sponsor",
            &sponsors[0],
            "--sponsor",
            &sponsors[1],
        ])
        .unwrap();
    let _ = qemu.kill();
    let _ = qemu.wait();
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success());
    assert!(error.contains("privately") && error.contains("share=on"), "{error}");
    rig.wait_for_regions(0);
}

#[test]
fn labs_leave_no_namespaces_and_no_files() {
    let (dir, memory, names) = {
        let mut rig = Rig::new("64M");
        let names: Vec<String> = (1..=3).map(|n| rig.lab.host(n).namespace().to_owned()).collect();
        (rig.lab.dir().to_owned(), rig.lab.memory_dir().to_owned(), names)
    };
    assert!(!dir.exists() && !memory.exists());
    for name in names {
        assert!(!Path::new("/run/netns").join(name).exists());
    }
}

#[test]
fn ctrl_c_detaches_from_a_process_that_goes_on() {
    use std::io::{BufRead, BufReader, Write};
    let mut rig = Rig::new("512M");
    let ram = rig.lab.memory_dir().join("ram");
    std::fs::File::create_new(&ram).unwrap().set_len(64 << 20).unwrap();
    let mut target = Command::new(heca_binary().unwrap())
        .args(["bench-target", "--file"])
        .arg(&ram)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = target.stdin.take().unwrap();
    let mut output = BufReader::new(target.stdout.take().unwrap());
    let mut answer = || {
        let mut line = String::new();
        output.read_line(&mut line).unwrap();
        line
    };
    assert_eq!(answer(), "ready\n");
    let sponsors = rig.sponsors();
    let pid = target.id().to_string();
    let file = ram.to_string_lossy().into_owned();
    let mut attach = rig
        .lab
        .host(1)
        .command(&heca_binary().unwrap())
        .args([
            "attach",
            "--plaintext",
            "--pid",
            &pid,
            "--file",
            &file,
            "--local",
            "16M",
            "--watch",
            "--json",
        ])
        .args(["--sponsor", &sponsors[0], "--sponsor", &sponsors[1]])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    rig.wait_for_regions(1);
    writeln!(input, "{{\"Write\":{{\"first\":0,\"end\":16384}}}}").unwrap();
    answer();
    // The reader of its figures goes away: the process still needs its pager.
    drop(attach.stdout.take());
    std::thread::sleep(Duration::from_millis(2500));
    assert!(attach.try_wait().unwrap().is_none());
    kill_process(Pid::from_child(&attach), Signal::INT).unwrap();
    let deadline = Instant::now() + Duration::from_secs(30);
    while attach.try_wait().unwrap().is_none() {
        assert!(Instant::now() < deadline, "not detached");
        std::thread::sleep(Duration::from_millis(50));
    }
    let touch =
        "{\"Touch\":{\"first\":0,\"end\":16384,\"count\":16384,\"seed\":1,\"written\":true}}";
    writeln!(input, "{touch}").unwrap();
    let measured = answer();
    assert!(measured.contains("\"count\":16384,\"wrong\":0"), "{measured}");
    rig.wait_for_regions(0);
    drop(input);
    target.wait().unwrap();
}
