//! The memory of a process goes to the pager of another one, with pagers that are real processes: what
//! QEMU does with a guest's device state plays no part here.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use heca_agent::pager::{ImportConfig, PagerConfig};
use heca_api::{EvictionChoice, ExportInfo, ExportRequest, ExportStage, ImportInfo};
use heca_api::{Flush, Look, PagerStats, Release, Written};
use heca_types::limits::PAGE_BYTES;
use heca_types::{ByteSize, Epoch, OwnerId};
use serde_json::json;

use common::process::PagerProcess;
use common::{Bench, PAGES, Target};

/// A process with its pager, and one that is to have its memory.
struct Rig {
    source: Target,
    source_pager: PagerProcess,
    target: Target,
    target_pager: PagerProcess,
    target_ram: PathBuf,
    ticket: OwnerId,
    bench: Bench,
}

impl Rig {
    fn new(name: &str, eviction: EvictionChoice, local: ByteSize) -> Self {
        let bench = Bench::new(name, 2);
        let source = Target::start(&bench.ram());
        let mut config = bench.config(source.pid(), 2, eviction);
        config.local = local;
        let source_pager = PagerProcess::start(config.clone(), &bench.dir.join("source"));
        let target_ram = bench.dir.join("ram2");
        File::create_new(&target_ram).unwrap().set_len((PAGES * PAGE_BYTES) as u64).unwrap();
        let target = Target::start(&target_ram);
        let ticket = OwnerId::random();
        let import =
            ImportConfig { listen: "127.0.0.1:0".to_owned(), ticket, stores: vec![[0; 16]; 2] };
        let config = PagerConfig {
            pid: target.pid(),
            ram_file: target_ram.clone(),
            owner: OwnerId::random(),
            epoch: Epoch(1),
            import: Some(import),
            ..config
        };
        let mut target_pager = PagerProcess::start(config, &bench.dir.join("target"));
        let listens = target_pager.listens.clone().unwrap();
        target_pager.config.import.as_mut().unwrap().listen = listens;
        Self { source, source_pager, target, target_pager, target_ram, ticket, bench }
    }

    /// The source writes pages that it had not written; waits for that.
    fn write(&mut self, first: usize, end: usize) {
        self.source.ask(&json!({ "Write": { "first": first, "end": end } }));
        self.source.answer();
    }

    fn begin(&self) {
        let address = self.target_pager.listens.clone().unwrap();
        let request =
            ExportRequest { address, ticket: self.ticket, epoch: Epoch(1), bytes_per_s: None };
        let () = self.source_pager.post("/v1/export", &request);
    }

    fn look(&self) -> u64 {
        let written: Written = self.source_pager.post("/v1/export/look", &Look { send: true });
        written.pages
    }

    fn drain(&self) {
        let deadline = Instant::now() + Duration::from_secs(30);
        while self.export().queued_pages > 0 {
            assert!(Instant::now() < deadline, "{:?}", self.export());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn export(&self) -> ExportInfo {
        self.source_pager.get("/v1/export")
    }

    fn switch(&self) -> ExportInfo {
        self.source_pager.post("/v1/export/switch", &json!({}))
    }

    fn await_switch(&self) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while self.target_pager.get::<ImportInfo>("/v1/import").behind_pages.is_none() {
            assert!(Instant::now() < deadline, "the target does not hear of the switch");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn commit(&self) {
        self.await_switch();
        let () = self.target_pager.post("/v1/import/commit", &json!({}));
    }

    fn release(&self) {
        let () = self.source_pager.post("/v1/export/release", &Release { at_once: true });
    }

    fn finish(&self) {
        let deadline = Instant::now() + Duration::from_secs(30);
        while self.export().stage != ExportStage::Done {
            assert!(Instant::now() < deadline, "{:?}", self.export());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Begins to look at pages of the target, in random order.
    fn touch(&mut self, first: usize, end: usize, written: bool) {
        let count = end - first;
        self.target.ask(&json!({
            "Touch": { "first": first, "end": end, "count": count, "seed": 5, "written": written }
        }));
    }

    fn verify(&mut self, first: usize, end: usize, written: bool) {
        self.touch(first, end, written);
        let measured = self.target.answer();
        assert_eq!(measured["wrong"], 0, "{first}..{end}: {measured}");
    }
}

const ALL: ByteSize = ByteSize((PAGES * PAGE_BYTES) as u64);

#[test]
fn what_is_written_while_it_is_copied_gets_there() {
    for (name, local) in [("copied", ALL), ("copied-remote", ByteSize(16 << 20))] {
        let mut rig = Rig::new(name, EvictionChoice::Auto, local);
        rig.write(0, PAGES / 4);
        rig.begin();
        assert!(rig.look() > 0);
        // While the first ones are on their way; the last ones as zeros, if at all.
        rig.write(PAGES / 4, PAGES / 2);
        rig.look();
        rig.write(PAGES / 2, PAGES * 3 / 4);
        rig.drain();
        rig.look();
        // What the target looks at before it was told of every page waits for that.
        rig.touch(0, PAGES, false);
        std::thread::sleep(Duration::from_millis(100));
        let export = rig.switch();
        rig.commit();
        rig.release();
        let measured = rig.target.answer();
        assert_eq!(measured["wrong"], PAGES * 3 / 4, "pages that are not zeros: {measured}");
        rig.finish();
        rig.verify(0, PAGES * 3 / 4, true);
        rig.verify(PAGES * 3 / 4, PAGES, false);
        assert!(export.pages_sent > 0, "{export:?}");
        let stats: PagerStats = rig.target_pager.get("/v1/stats");
        assert_eq!((stats.gauges.behind_pages, stats.gauges.poisoned_pages), (0, 0), "{name}");
    }
}

#[test]
fn the_target_takes_each_page_that_is_behind_once_also_after_a_crash() {
    let mut rig = Rig::new("behind", EvictionChoice::Auto, ALL);
    rig.write(0, PAGES);
    rig.begin();
    let export = rig.switch();
    // All but those that wait, stored and unmapped, to be dropped.
    assert!(export.pages_unique_after > PAGES as u64 * 3 / 4, "{export:?}");
    rig.commit();
    // On demand only: the rest is not let go yet.
    rig.verify(0, 4000, true);
    assert!(rig.export().demand_pages >= 1000, "{:?}", rig.export());
    assert_eq!(rig.export().demand_pages, rig.export().pages_sent_after);
    // A write to a page that came must outlive the pager that brought it.
    for round in 0..3 {
        rig.target_pager.replace();
        rig.verify(4000 * (round + 1), 4000 * (round + 2), true);
    }
    rig.release();
    rig.finish();
    rig.verify(0, PAGES, true);
    let hammered = rig.target.hammer(10, 1);
    assert!(hammered["count"].as_u64().unwrap() > 0);
}

#[test]
fn pages_that_the_source_gave_away_are_zeros_there() {
    let mut rig = Rig::new("holes", EvictionChoice::Auto, ALL);
    rig.write(0, 4096);
    rig.begin();
    rig.look();
    rig.drain();
    // As a balloon does: the pages were sent, and are gone.
    let ram = File::options().write(true).open(rig.bench.ram()).unwrap();
    let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(&ram, flags, 0, 1024 * PAGE_BYTES as u64).unwrap();
    rig.switch();
    rig.commit();
    rig.release();
    rig.finish();
    // Pages that were never written, or given away, take no memory on the target either.
    let blocks = std::fs::metadata(&rig.target_ram).unwrap().blocks();
    assert!(blocks * 512 <= 4096 * PAGE_BYTES as u64, "{blocks} blocks");
    rig.verify(0, 1024, false);
    rig.verify(1024, 4096, true);
    rig.verify(4096, PAGES, false);
}

#[test]
fn what_is_flushed_needs_no_source() {
    let mut rig = Rig::new("flushed", EvictionChoice::Auto, ALL);
    rig.write(0, PAGES);
    rig.begin();
    let () = rig.source_pager.post("/v1/flush", &Flush { on: true });
    let deadline = Instant::now() + Duration::from_secs(30);
    while rig.source_pager.get::<PagerStats>("/v1/stats").gauges.resident_pages > 0 {
        assert!(Instant::now() < deadline, "not all of it gets to the sponsors");
        std::thread::sleep(Duration::from_millis(10));
    }
    let export = rig.switch();
    assert_eq!((export.pages_unique_after, export.pages_sent), (0, 0), "{export:?}");
    rig.commit();
    // The source's host dies.
    rig.source_pager.kill();
    rig.verify(0, PAGES, true);
}

#[test]
fn a_sponsor_that_lost_the_region_is_seen_by_the_next_owner() {
    let mut rig = Rig::new("lost", EvictionChoice::Auto, ByteSize(16 << 20));
    rig.write(0, PAGES);
    rig.begin();
    rig.switch();
    rig.await_switch();
    let region = rig.source_pager.config.region;
    let sponsor = rig.bench.sponsors[0].as_ref().unwrap();
    sponsor.store().close_region(region, Epoch(1), rig.source_pager.config.owner).unwrap();
    rig.commit();
    rig.release();
    rig.finish();
    // It gets them again, from the other one, which may die then.
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let stats: PagerStats = rig.target_pager.get("/v1/stats");
        if stats.counters.rebuilt_pages > 0 && stats.gauges.degraded_extents == 0 {
            break;
        }
        assert!(Instant::now() < deadline, "{stats:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
    rig.bench.sponsors[1] = None;
    rig.verify(0, PAGES, true);
    let stats: PagerStats = rig.target_pager.get("/v1/stats");
    assert_eq!(stats.gauges.poisoned_pages, 0, "{stats:?}");
}

#[test]
fn an_aborted_handover_leaves_the_source_as_it_was() {
    for (switched, pager_first) in [(false, true), (true, true), (false, false), (true, false)] {
        let mut rig = Rig::new("aborted", EvictionChoice::Auto, ByteSize(16 << 20));
        assert_eq!(rig.source.hammer(700, 1)["wrong"], 0);
        rig.begin();
        rig.look();
        if switched {
            rig.drain();
            rig.switch();
            rig.await_switch();
        }
        let regions = rig.bench.regions();
        if pager_first {
            rig.target_pager.kill();
        } else {
            // Its pager gives back what is its own, and the region is not.
            rig.target.child.kill().unwrap();
            rig.target_pager.wait();
        }
        assert_eq!((regions, rig.bench.regions()), (2, 2));
        let () = rig.source_pager.post("/v1/export/abort", &json!({}));
        assert_eq!(rig.source.hammer(1500, 2)["wrong"], 0);
        let stats: PagerStats = rig.source_pager.get("/v1/stats");
        assert!(stats.counters.evicted_dirty_pages > 1000 && stats.fenced.is_none(), "{stats:?}");
    }
}

#[test]
fn without_a_way_to_tell_of_writes_all_pages_follow() {
    let mut rig = Rig::new("sync", EvictionChoice::WriteProtect, ByteSize(16 << 20));
    rig.write(0, PAGES);
    rig.begin();
    let export = rig.switch();
    assert!(export.pages_unique_after > 0, "{export:?}");
    rig.commit();
    rig.release();
    rig.finish();
    rig.verify(0, PAGES, true);
    // As the target counts them: each page that was behind came once.
    let import: ImportInfo = rig.target_pager.get("/v1/import");
    assert_eq!(import.received_pages, export.pages_unique_after, "{export:?}");
}
