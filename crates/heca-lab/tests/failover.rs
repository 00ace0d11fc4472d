//! One guest under load, TLS and sealed pages on, and what is taken from it: a sponsor, the pager,
//! pager and agent, the programs themselves. It must not notice but for pauses, which are printed.
#![allow(clippy::unwrap_used)]

use std::time::{Duration, Instant};

use heca_lab::{Cluster, ClusterOptions, Look, heca_binary};
use heca_types::ByteSize;

const BOUND: Duration = Duration::from_secs(60);

/// Runs one step and waits until everything is as it should be and the guest went on.
fn step(cluster: &mut Cluster, name: &str, fault: impl FnOnce(&mut Cluster)) -> Look {
    cluster.check_guest().unwrap();
    let from = cluster.console().samples().len();
    let begun = Instant::now();
    fault(cluster);
    let look = cluster.wait_healthy(BOUND).unwrap();
    let healthy = begun.elapsed();
    cluster.wait_for_progress(BOUND).unwrap();
    println!(
        "{name}: longest stall {:.0} ms, healthy after {} ms",
        cluster.console().longest_stall_ms(from),
        healthy.as_millis()
    );
    assert_eq!(look.pager.gauges.poisoned_pages, 0);
    look
}

fn new_pager(cluster: &mut Cluster, before: i32) {
    let look = cluster.wait("new pager", BOUND, |look| look.vm.pager_pid != Some(before)).unwrap();
    assert!(look.pager.resumed);
}

#[test]
fn a_guest_outlives_sponsors_pagers_agents_and_upgrades() {
    let options = ClusterOptions {
        sponsors: 3,
        memory: ByteSize(256 << 20),
        local: ByteSize(96 << 20),
        working_set: ByteSize(120 << 20),
        ..ClusterOptions::default()
    };
    let mut cluster = Cluster::start(&options).unwrap();
    cluster.wait_healthy(BOUND).unwrap();
    assert!(cluster.lab.host(1).vm("guest").unwrap().encrypted);
    assert_eq!(cluster.lab.host(2).agent_info().unwrap().host.as_deref(), Some("h2"));

    // A sponsor goes, and what it held goes to the others.
    let look = cluster.look().unwrap().unwrap();
    assert!(look.pager.sponsors[0].extents > 0);
    cluster.lab.host(2).kill_agent();
    let bound = Duration::from_secs(40);
    let rebuilt = cluster.wait("rebuild onto the others", bound, |look| {
        let stats = &look.pager;
        stats.gauges.degraded_extents == 0 && stats.sponsors[0].extents == 0
    });
    let rebuilt = rebuilt.unwrap();
    assert!(!rebuilt.pager.sponsors[0].up && rebuilt.pager.counters.moved_extents > 0);
    step(&mut cluster, "sponsor killed", |cluster| cluster.lab.host(2).restart_agent().unwrap());

    step(&mut cluster, "pager killed", |cluster| {
        let before = cluster.pager_pid().unwrap();
        cluster.kill_pager().unwrap();
        new_pager(cluster, before);
        assert!(cluster.demander().vm("guest").unwrap().pager_restarts > 0);
    });

    step(&mut cluster, "pager and agent killed", |cluster| {
        let before = cluster.pager_pid().unwrap();
        cluster.demander().kill_agent();
        let pid = rustix::process::Pid::from_raw(before).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        std::thread::sleep(Duration::from_millis(300));
        cluster.demander().restart_agent().unwrap();
        new_pager(cluster, before);
    });

    step(&mut cluster, "upgraded", |cluster| {
        let copy = cluster.lab.dir().join("heca-new");
        std::fs::copy(heca_binary().unwrap(), &copy).unwrap();
        let before = cluster.pager_pid().unwrap();
        let program = copy.to_string_lossy().into_owned();
        let said = cluster.demander().heca_ok(&["upgrade", "--program", &program]).unwrap();
        assert!(said.contains("heca-new"), "{said}");
        new_pager(cluster, before);
        let pager = cluster.pager_pid().unwrap();
        assert_eq!(std::fs::read_link(format!("/proc/{pager}/exe")).unwrap(), copy);
    });

    // Emptied, wherever extents are now.
    let look = cluster.look().unwrap().unwrap();
    let holder = look.pager.sponsors.iter().position(|s| s.extents > 0).unwrap() + 2;
    step(&mut cluster, "drained", |cluster| {
        let host = cluster.lab.host(holder);
        host.heca_ok(&["host", "drain", "--wait", "--timeout", "60"]).unwrap();
        assert_eq!(host.agent_info().unwrap().regions, 0);
        host.heca_ok(&["host", "drain", "--off"]).unwrap();
    });

    assert!(cluster.qemu_lives());
    let last = cluster.console().last().unwrap();
    println!("verified {} bytes", last.verified_bytes);
    assert_eq!(last.wrong_bytes, 0);
    cluster.stop().unwrap();
    for number in cluster.sponsors() {
        let deadline = Instant::now() + Duration::from_secs(20);
        while cluster.lab.host(number).agent_info().unwrap().regions > 0 {
            assert!(Instant::now() < deadline, "host {number} holds a region of a VM that ended");
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}
