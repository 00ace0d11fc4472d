//! The pager on real userfaultfd: an unmodified process, real sponsors over TCP, every byte
//! verified by several writers at a time.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use heca_agent::link::{Link, Security};
use heca_agent::pager::{self, PagerConfig};
use heca_api::{EvictionChoice, PagerStats};
use heca_types::{ByteSize, PageIndex, PageVersion};
use heca_wire::{Header, Kind, PageEntry, Role, encode_pages};
use serde_json::json;

use common::{Bench, LOCAL, PAGES, Target, start};

fn error_of(config: &PagerConfig) -> heca_api::ApiError {
    match pager::start(config) {
        Err(error) => error,
        Ok(_) => panic!("the pager started"),
    }
}

fn hammer_under(eviction: EvictionChoice, name: &str) -> PagerStats {
    let bench = Bench::new(name, 2);
    let mut target = Target::start(&bench.ram());
    let handle = start(&bench.config(target.pid(), 2, eviction));
    let measured = target.hammer(3000, 1);
    assert_eq!(measured["wrong"], 0, "{measured}");
    let stats = handle.stats().unwrap();
    let counters = &stats.counters;
    assert_eq!(stats.eviction, name);
    assert!(stats.gauges.local_pages <= LOCAL.pages(), "{:?}", stats.gauges);
    assert!(counters.evicted_dirty_pages > 1000, "{counters:?}");
    assert!(counters.evicted_clean_pages > 0, "{counters:?}");
    assert!(counters.demand_fetches > 1000, "{counters:?}");
    drop(target);
    let last = handle.finish().unwrap();
    assert_eq!(bench.regions(), 0, "the end of the process frees the sponsors");
    last
}

#[test]
fn every_byte_survives_eviction_by_pageout() {
    hammer_under(EvictionChoice::Pageout, "pageout");
}

#[test]
fn every_byte_survives_eviction_by_io_uring() {
    hammer_under(EvictionChoice::Uring, "uring");
}

#[test]
fn every_byte_survives_eviction_by_write_protection() {
    hammer_under(EvictionChoice::WriteProtect, "write-protect");
}

#[test]
fn every_byte_survives_changes_of_the_budget() {
    let bench = Bench::new("resize", 2);
    let mut target = Target::start(&bench.ram());
    let handle = start(&bench.config(target.pid(), 1, EvictionChoice::Auto));
    target.ask(&json!({ "Hammer": { "threads": 3, "ms": 3000, "seed": 5 } }));
    for mib in [48, 16, 64, 20, 40, 16] {
        handle.resize(ByteSize(mib << 20)).unwrap();
        std::thread::sleep(Duration::from_millis(400));
    }
    let measured = target.answer();
    assert_eq!(measured["wrong"], 0, "{measured}");
    assert!(handle.stats().unwrap().gauges.local_pages <= 4096);
    assert!(handle.resize(ByteSize(1 << 20)).is_err(), "too small a budget is refused");
    drop(target);
    handle.finish();
}

#[test]
fn a_stream_runs_over_the_border_of_two_mappings() {
    let bench = Bench::new("border", 2);
    let mut target = Target::start(&bench.ram());
    let handle = start(&bench.config(target.pid(), 2, EvictionChoice::Auto));
    target.ask(&json!({ "Write": { "first": 0, "end": PAGES } }));
    target.answer();
    // Wherever runs begin, some lie over one of these.
    for page in (1000..PAGES).step_by(997) {
        target.ask(&json!({ "Split": { "page": page } }));
        assert_eq!(target.answer()["wrong"], 0);
    }
    for dirty in [false, true, false] {
        target.ask(&json!({ "Scan": { "first": 0, "end": PAGES, "dirty": dirty } }));
        assert_eq!(target.answer()["wrong"], 0);
    }
    let counters = handle.stats().expect("the pager goes on").counters;
    assert!(counters.mapped_ahead > 10_000, "{counters:?}");
}

#[test]
fn a_sponsor_that_ends_loses_nothing_that_is_mirrored() {
    let mut bench = Bench::new("sponsor-lost", 3);
    let mut target = Target::start(&bench.ram());
    let handle = start(&bench.config(target.pid(), 2, EvictionChoice::Auto));
    target.ask(&json!({ "Hammer": { "threads": 3, "ms": 3000, "seed": 9 } }));
    std::thread::sleep(Duration::from_millis(1200));
    bench.sponsors[0].take().unwrap().disconnect();
    let measured = target.answer();
    assert_eq!(measured["wrong"], 0, "{measured}");
    let stats = handle.stats().unwrap();
    assert!(!stats.sponsors[0].up, "{:?}", stats.sponsors[0]);
    assert_eq!(stats.gauges.poisoned_pages, 0);
    drop(target);
    handle.finish();
}

#[test]
fn detaching_brings_everything_back() {
    let bench = Bench::new("detach", 2);
    let mut target = Target::start(&bench.ram());
    let handle = start(&bench.config(target.pid(), 2, EvictionChoice::Auto));
    let measured = target.hammer(1500, 3);
    assert_eq!(measured["wrong"], 0, "{measured}");
    assert!(handle.stats().unwrap().gauges.remote_pages > 4000);
    // Writers go on while the memory comes back.
    target.ask(&json!({ "Hammer": { "threads": 3, "ms": 2000, "seed": 4 } }));
    let stats = handle.detach(|_| true).map_err(|returned| returned.1).unwrap();
    assert_eq!(stats.unwrap().gauges.remote_pages, 0);
    assert_eq!(target.answer()["wrong"], 0);
    assert_eq!(target.hammer(300, 8)["wrong"], 0, "the process goes on without a pager");
    assert_eq!(bench.regions(), 0);
    let fds = std::fs::read_dir(format!("/proc/{}/fd", target.pid())).unwrap();
    let names: Vec<_> = fds.flatten().filter_map(|fd| std::fs::read_link(fd.path()).ok()).collect();
    assert!(!names.iter().any(|n| n.to_string_lossy().contains("userfaultfd")), "{names:?}");
}

#[test]
fn memory_written_before_the_pager_came_is_kept() {
    let bench = Bench::new("late", 2);
    let mut target = Target::start(&bench.ram());
    assert_eq!(target.hammer(800, 2)["wrong"], 0);
    let handle = start(&bench.config(target.pid(), 2, EvictionChoice::Auto));
    let deadline = Instant::now() + Duration::from_secs(20);
    while handle.stats().unwrap().gauges.local_pages > LOCAL.pages() {
        assert!(Instant::now() < deadline, "{:?}", handle.stats());
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(target.hammer(800, 6)["wrong"], 0);
    drop(target);
    handle.finish();
}

#[test]
fn what_cannot_be_paged_is_refused_in_words() {
    let bench = Bench::new("refusals", 1);
    let target = Target::start(&bench.ram());
    let good = bench.config(target.pid(), 1, EvictionChoice::Auto);

    let small = PagerConfig { local: ByteSize(1 << 20), ..good.clone() };
    assert!(error_of(&small).hint.unwrap().contains("16 MiB"));

    let lonely = PagerConfig { replicas: 2, ..good.clone() };
    assert!(error_of(&lonely).message.contains("2 sponsors; 1 given"));

    let mut twice = lonely.clone();
    twice.sponsors.push(twice.sponsors[0].clone());
    assert_eq!(error_of(&twice).code, "same-sponsor");

    let mut nobody = good.clone();
    nobody.sponsors[0].address = "127.0.0.1:1".to_owned();
    let error = error_of(&nobody);
    assert!(error.message.contains("127.0.0.1:1"), "{error}");
    assert!(error.hint.unwrap().contains("--offer"));

    let other = bench.dir.join("other");
    std::fs::write(&other, [0; 8192]).unwrap();
    let unmapped = PagerConfig { ram_file: other, ..good.clone() };
    assert!(error_of(&unmapped).hint.unwrap().contains("share=on"));

    let second = Target::start(&bench.ram());
    let error = error_of(&good);
    assert_eq!(error.code, "second-mapper");
    assert!(error.message.contains(&second.pid().to_string()), "{error}");
    drop(second);

    assert_eq!(bench.regions(), 0, "nothing is left behind by what was refused");
    let handle = start(&good);
    assert_eq!(error_of(&good).code, "pager-before", "one pager at a time");
    drop(target);
    handle.finish();
}

/// A sponsor that forgets pages: a second client of the same owner discards them all.
fn discard_everything(config: &PagerConfig, address: &str) {
    let (mut link, _) =
        Link::connect(address, Role::WriteBack, config.owner, &Security::Plaintext).unwrap();
    for first in (0..PAGES as u64).step_by(64) {
        let entries: Vec<PageEntry> =
            (first..first + 64).map(|p| PageEntry::new(PageIndex(p), PageVersion(1))).collect();
        let header = Header::new(Kind::Discard, config.region, config.epoch, first);
        encode_pages(header, &entries, &[], link.output());
        link.request(Duration::from_secs(5), |header, _| {
            (header.kind == Kind::DiscardAck).then_some(())
        })
        .unwrap();
    }
}

#[test]
fn a_page_that_no_sponsor_has_is_a_memory_error_and_never_zeros() {
    let bench = Bench::new("poison", 2);
    let mut target = Target::start(&bench.ram());
    let config = bench.config(target.pid(), 2, EvictionChoice::Auto);
    let handle = start(&config);
    target.ask(&json!({ "Write": { "first": 0, "end": PAGES } }));
    target.answer();
    discard_everything(&config, &config.sponsors[0].address);
    // One copy of each page is left: nobody notices.
    let order = |seed: u64| {
        json!({ "Touch": { "first": 0, "end": PAGES / 2, "count": 500, "seed": seed,
                           "written": true } })
    };
    target.ask(&order(3));
    assert_eq!(target.answer()["wrong"], 0);
    discard_everything(&config, &config.sponsors[1].address);
    target.ask(&order(4));
    let status = target.child.wait().unwrap();
    assert_eq!(status.signal(), Some(7), "ended by SIGBUS, not by reading something: {status}");
    let stats = handle.finish().unwrap();
    assert!(stats.counters.poisoned_pages > 0);
}

#[test]
fn locked_memory_is_refused() {
    let bench = Bench::new("locked", 1);
    let script = format!(
        "import mmap,ctypes,sys\nf=open('{}','r+b')\nm=mmap.mmap(f.fileno(),0)\n\
         ctypes.CDLL(None).mlockall(1)\nprint('ready',flush=True)\nsys.stdin.read()\n",
        bench.ram().display()
    );
    let Ok(mut child) = Command::new("python3")
        .args(["-c", &script])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
    else {
        println!("skipped: no python3");
        return;
    };
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let error = error_of(&bench.config(child.id() as i32, 1, EvictionChoice::Auto));
    let _ = child.kill();
    let _ = child.wait();
    assert_eq!(error.code, "memory-locked");
}

#[test]
fn memory_that_is_not_on_tmpfs_is_refused() {
    let bench = Bench::new("disk", 1);
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let file = dir.path().join("ram");
    File::create_new(&file).unwrap().set_len(1 << 20).unwrap();
    let target = Target::start(&file);
    let config =
        PagerConfig { ram_file: file, ..bench.config(target.pid(), 1, EvictionChoice::Auto) };
    let error = error_of(&config);
    assert_eq!(error.code, "not-tmpfs");
    assert!(error.hint.unwrap().contains("/dev/shm"));
}

/// Swap on a file for the length of a test.
struct Swap(PathBuf);

impl Swap {
    fn on() -> Option<Self> {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("swapfile");
        let done = |program: &str, arguments: &[&str]| {
            let status = Command::new(program)
                .args(arguments)
                .arg(&path)
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status();
            status.is_ok_and(|status| status.success())
        };
        std::fs::write(&path, vec![0u8; 8 << 20]).unwrap();
        let swap = Self(path.clone());
        (done("chmod", &["600"]) && done("mkswap", &[]) && done("swapon", &[])).then_some(swap)
    }
}

impl Drop for Swap {
    fn drop(&mut self) {
        let _ = Command::new("swapoff").arg(&self.0).stderr(Stdio::null()).status();
        let _ = std::fs::remove_file(&self.0);
    }
}

#[test]
fn with_swap_on_pageout_is_refused_and_auto_takes_another_way() {
    let bench = Bench::new("swap", 2);
    let Some(swap) = Swap::on() else {
        println!("skipped: no swap can be turned on here");
        return;
    };
    let mut target = Target::start(&bench.ram());
    let error = error_of(&bench.config(target.pid(), 2, EvictionChoice::Pageout));
    assert_eq!(error.code, "eviction-unusable");
    assert!(error.hint.unwrap().contains("swapoff"));
    let handle = start(&bench.config(target.pid(), 2, EvictionChoice::Auto));
    assert_eq!(target.hammer(1000, 1)["wrong"], 0);
    assert_eq!(handle.stats().unwrap().eviction, "uring");
    drop(target);
    handle.finish();
    drop(swap);
}
