//! A real guest that runs `appmembench` on QEMU 10: its figures, and its heartbeat as seen from
//! outside.
#![allow(clippy::unwrap_used)]

use std::time::{Duration, Instant};

use heca_lab::{AgentOptions, Appmembench, Heartbeat, Lab, MeasuredGuest, find_qemu10};
use heca_types::ByteSize;
use rustix::process::{Pid, Signal, kill_process};

#[test]
fn a_pause_of_the_guest_is_seen_and_its_memory_is_verified() {
    let mut lab = Lab::new(2).unwrap();
    lab.host(1).start_agent(&AgentOptions::default()).unwrap();
    let offer = AgentOptions { offer: "512M".to_owned(), ..AgentOptions::default() };
    lab.host(2).start_agent(&offer).unwrap();
    let heartbeat = Heartbeat::listen(&lab.dir().join("tick.sock")).unwrap();
    let guest = Appmembench::listen(&lab.dir().join("figures.sock")).unwrap();
    let initrd = lab.dir().join("initrd");
    Appmembench::write_image(&initrd, lab.dir()).unwrap();
    let qemu = find_qemu10().unwrap();
    let measured = MeasuredGuest {
        name: "guest",
        memory: ByteSize(256 << 20),
        local: ByteSize(256 << 20),
        sponsors: &[2],
        encrypt: false,
        qemu: Some(&qemu),
        initrd: &initrd,
    };
    measured.start(&mut lab, 1, &heartbeat, &guest).unwrap();
    guest.start("--working-set 64M --rate 10M --scrub 16M", Duration::from_secs(60)).unwrap();

    let begun = Instant::now();
    std::thread::sleep(Duration::from_millis(2500));
    let pid = lab.host(1).vm("guest").unwrap().qemu_pid.and_then(Pid::from_raw).unwrap();
    let stopped = Instant::now();
    kill_process(pid, Signal::STOP).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    kill_process(pid, Signal::CONT).unwrap();
    std::thread::sleep(Duration::from_millis(2500));
    let now = Instant::now();
    guest.check().unwrap();

    let before = heartbeat.ticks(begun, stopped);
    // Every 2 ms if nothing else runs here; a tenth of that will do.
    assert!(before.len() > 100, "{} ticks", before.len());
    let gap = heartbeat.gap(begun, now).unwrap();
    assert!(gap.ms() >= 300.0 && gap.across_ms.is_none(), "{gap:?}");
    assert_eq!((gap.lost, gap.doubled), (0, 0));
    let lines = guest.lines();
    assert!(lines.len() >= 3, "{lines:?}");
    let figures = &lines.last().unwrap().figures;
    assert!(figures.verified_pages > 1000 && figures.scrubbed_pages > 1000);
    assert!(lines.iter().flat_map(|l| &l.figures.steps).all(|part| (0.0..=1.0).contains(part)));

    // Another rate in the same guest.
    guest.start("--working-set 32M --rate max", Duration::from_secs(60)).unwrap();
    std::thread::sleep(Duration::from_millis(2500));
    guest.check().unwrap();
    guest.stop().unwrap();
    lab.host(1).heca_ok(&["vm", "stop", "guest", "--now"]).unwrap();
}
