//! Remote memory is as trustworthy as local memory: pagers that are killed, sponsors that leave or
//! lie, owners that lost their region.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::HashMap;
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use heca_agent::link::{Link, LinkError, Security};
use heca_agent::pager::PagerHandle;
use heca_agent::seal::SealKey;
use heca_api::{EvictionChoice, PagerStats, SponsorAddress};
use heca_types::limits::PAGE_BYTES;
use heca_types::{Epoch, OwnerId, PageIndex, PageVersion, Status, StoreId};
use heca_wire::{
    Body, EntryFlags, Header, HelloAck, Kind, OpenAck, PageEntry, Pong, PongFlags, Role,
    encode_open, encode_pages, page_checksum,
};
use serde_json::json;

use common::process::PagerProcess;
use common::{Bench, PAGES, Target, start};

fn kill_pagers_under(eviction: EvictionChoice, name: &str, sealed: bool) {
    let bench = Bench::new(name, 2);
    let mut target = Target::start(&bench.ram());
    let mut config = bench.config(target.pid(), 2, eviction);
    if sealed {
        let key = bench.dir.join("page.key");
        SealKey::generate().unwrap().save(&key).unwrap();
        config.seal_key = Some(key);
    }
    let mut pager = PagerProcess::start(config, &bench.dir);
    let (mut pauses, mut evicted) = (Vec::new(), 0);
    for round in 0..3 {
        target.ask(&json!({ "Hammer": { "threads": 3, "ms": 2500, "seed": round } }));
        for pause in [150, 420, 330] {
            std::thread::sleep(Duration::from_millis(pause));
            evicted += pager.stats().counters.evicted_dirty_pages;
            pauses.push(pager.replace());
        }
        let measured = target.answer();
        assert_eq!(measured["wrong"], 0, "{measured}");
    }
    let stats = pager.stats();
    assert!(stats.resumed && evicted > 1000, "{evicted} pages evicted before the kills");
    assert_eq!(stats.counters.poisoned_pages, 0);
    assert_eq!(stats.eviction, name);
    println!("{name}: pauses of killed pagers {pauses:?}");
}

#[test]
fn a_killed_pager_is_replaced_and_no_write_is_lost() {
    kill_pagers_under(EvictionChoice::Auto, "pageout", true);
}

#[test]
fn a_killed_pager_is_replaced_with_write_protection_too() {
    kill_pagers_under(EvictionChoice::WriteProtect, "write-protect", false);
}

#[test]
fn a_killed_pager_is_replaced_with_the_ring_too() {
    kill_pagers_under(EvictionChoice::Uring, "uring", false);
}

#[test]
fn a_sponsor_that_was_added_holds_nothing_for_the_next_pager_either() {
    let bench = Bench::new("added", 3);
    let mut target = Target::start(&bench.ram());
    let mut config = bench.config(target.pid(), 2, EvictionChoice::Auto);
    let spare = SponsorAddress { weight: 100, ..config.sponsors.pop().unwrap() };
    let mut pager = PagerProcess::start(config, &bench.dir);
    assert_eq!(target.hammer(800, 1)["wrong"], 0);
    let () = pager.post("/v1/sponsors", &spare);
    // A layout made anew would prefer the one that was added.
    pager.config.sponsors.push(spare);
    pager.replace();
    assert_eq!(target.hammer(800, 2)["wrong"], 0);
    let stats = pager.stats();
    let extents: Vec<u32> = stats.sponsors.iter().map(|s| s.extents).collect();
    assert_eq!((extents, stats.gauges.degraded_extents), (vec![1, 1, 0], 0));
}

/// Waits until the pager says so.
fn wait_for(handle: &PagerHandle, what: &str, done: impl Fn(&PagerStats) -> bool) -> PagerStats {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let stats = handle.stats().unwrap();
        if done(&stats) {
            return stats;
        }
        let (gauges, counters) = (stats.gauges, stats.counters);
        assert!(Instant::now() < deadline, "{what}: {gauges:?} {counters:?} {:?}", stats.sponsors);
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_sponsor_that_is_lost_for_good_is_replaced_by_another() {
    let mut bench = Bench::new("rebuild", 3);
    let mut target = Target::start(&bench.ram());
    let handle = start(&bench.config(target.pid(), 2, EvictionChoice::Auto));
    assert_eq!(target.hammer(1000, 1)["wrong"], 0);
    for lost in 0..2 {
        // Work goes on while it is lost and while it is replaced.
        target.ask(&json!({ "Hammer": { "threads": 3, "ms": 2500, "seed": lost } }));
        std::thread::sleep(Duration::from_millis(200));
        let degraded = |stats: &PagerStats| stats.gauges.degraded_extents > 0;
        bench.sponsors[lost] = None;
        if lost == 0 {
            let stats =
                wait_for(&handle, "rebuild", |s| !degraded(s) && s.sponsors.iter().any(|s| !s.up));
            assert!(stats.counters.moved_extents > 0, "{:?}", stats.counters);
        }
        assert_eq!(target.answer()["wrong"], 0);
    }
    // Only the one that took over is left.
    assert_eq!(target.hammer(1000, 9)["wrong"], 0);
    let stats = handle.stats().unwrap();
    assert_eq!(stats.counters.poisoned_pages, 0);
    assert_eq!(stats.sponsors.iter().filter(|s| s.up).count(), 1);
    drop(target);
    handle.finish();
}

#[test]
fn a_drained_sponsor_ends_up_empty_while_work_goes_on() {
    let bench = Bench::new("drain", 3);
    let mut target = Target::start(&bench.ram());
    let handle = start(&bench.config(target.pid(), 2, EvictionChoice::Auto));
    assert_eq!(target.hammer(800, 1)["wrong"], 0);
    let store = bench.sponsors[0].as_ref().unwrap().store().clone();
    assert!(store.usage().regions > 0);
    target.ask(&json!({ "Hammer": { "threads": 3, "ms": 2500, "seed": 2 } }));
    store.set_draining(true).unwrap();
    wait_for(&handle, "drain", |s| s.gauges.leaving_extents == 0 && s.sponsors[0].extents == 0);
    let deadline = Instant::now() + Duration::from_secs(10);
    while store.usage().regions > 0 {
        assert!(Instant::now() < deadline, "{:?}", store.usage());
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(target.answer()["wrong"], 0);
    assert_eq!(target.hammer(800, 3)["wrong"], 0);
    let stats = handle.stats().unwrap();
    assert_eq!((stats.gauges.degraded_extents, stats.counters.poisoned_pages), (0, 0));
    drop(target);
    handle.finish();
}

#[test]
fn a_sponsor_that_is_added_takes_the_place_of_one_that_leaves() {
    let bench = Bench::new("add", 3);
    let mut target = Target::start(&bench.ram());
    let mut config = bench.config(target.pid(), 2, EvictionChoice::Auto);
    let spare = config.sponsors.pop().unwrap();
    let handle = start(&config);
    assert_eq!(target.hammer(800, 1)["wrong"], 0);
    bench.sponsors[1].as_ref().unwrap().store().set_draining(true).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    assert!(handle.stats().unwrap().gauges.leaving_extents > 0, "there is nowhere to go yet");
    handle.add_sponsor(&spare).unwrap();
    assert_eq!(handle.add_sponsor(&spare).unwrap_err().code, "sponsor-known");
    wait_for(&handle, "move", |s| s.gauges.leaving_extents == 0 && s.sponsors[2].extents > 0);
    assert_eq!(target.hammer(800, 2)["wrong"], 0);
    drop(target);
    handle.finish();
}

#[test]
fn a_sponsor_under_another_name_is_refused_and_loses_nothing() {
    let bench = Bench::new("alias", 2);
    let mut target = Target::start(&bench.ram());
    let config = bench.config(target.pid(), 2, EvictionChoice::Auto);
    let handle = start(&config);
    assert_eq!(target.hammer(800, 1)["wrong"], 0);
    let port = config.sponsors[0].address.rsplit(':').next().unwrap().to_owned();
    let alias = SponsorAddress { address: format!("localhost:{port}"), weight: 1 };
    handle.add_sponsor(&alias).unwrap();
    let stats = wait_for(&handle, "refusal", |stats| {
        let reason = stats.sponsors[2].down_reason.as_deref().unwrap_or_default();
        reason.contains("the same sponsor as")
    });
    assert!(!stats.sponsors[2].up && stats.sponsors[..2].iter().all(|s| s.up));
    // The first name still has everything, alone.
    bench.sponsors[1].as_ref().unwrap().store().set_draining(true).unwrap();
    assert_eq!(target.hammer(800, 2)["wrong"], 0);
    let stats = handle.stats().unwrap();
    assert_eq!((stats.gauges.degraded_extents, stats.counters.poisoned_pages), (0, 0));
    assert_eq!(stats.sponsors[2].extents, 0, "two replicas on one host are one");
    drop(target);
    handle.finish();
}

/// State letter of a process.
fn process_state(pid: i32) -> char {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    stat.rsplit(')').next().unwrap().trim().chars().next().unwrap()
}

#[test]
fn an_owner_that_lost_its_region_can_neither_read_nor_write_while_both_live() {
    let bench = Bench::new("fence", 2);
    let mut target = Target::start(&bench.ram());
    let config = bench.config(target.pid(), 2, EvictionChoice::Auto);
    let handle = start(&config);
    assert_eq!(target.hammer(800, 1)["wrong"], 0);
    // The old owner goes on working while the new one takes over, sponsor by sponsor.
    target.ask(&json!({ "Hammer": { "threads": 3, "ms": 60_000, "seed": 2 } }));
    let owner = OwnerId::random();
    let epoch = Epoch(config.epoch.0 + 1);
    let extents: Vec<_> = (0..1).map(heca_types::ExtentIndex).collect();
    let versions = |address: &str| -> Vec<u32> {
        let (mut link, _) =
            Link::connect(address, Role::Control, owner, &Security::Plaintext).unwrap();
        let open = heca_wire::Open { owner, quota_bytes: 64 << 20, lease_ms: 60_000 };
        let header = Header::new(Kind::Open, config.region, epoch, 1);
        encode_open(header, &open, 1, &extents, link.output());
        let timeout = Duration::from_secs(5);
        link.request(timeout, |h, _| (h.kind == Kind::OpenAck).then_some(())).unwrap();
        let mut versions = Vec::new();
        for first in (0..PAGES as u64).step_by(64) {
            let pages = (first..first + 64).map(|p| PageEntry::new(PageIndex(p), PageVersion(0)));
            let entries: Vec<PageEntry> = pages.collect();
            let header = Header::new(Kind::Stat, config.region, epoch, first);
            encode_pages(header, &entries, &[], link.output());
            let stats = link.request(timeout, |_, body| match body {
                Body::Pages(list) => {
                    Some(list.entries().iter().map(|e| e.version().0).collect::<Vec<_>>())
                }
                _ => None,
            });
            versions.extend(stats.unwrap());
        }
        versions
    };
    let before: Vec<_> = config.sponsors.iter().map(|s| versions(&s.address)).collect();
    assert!(before[0].iter().any(|&v| v > 0), "the new owner sees the pages");
    let stats = wait_for(&handle, "fence", |stats| stats.fenced.is_some());
    assert!(stats.sponsors.iter().all(|s| !s.up));
    let deadline = Instant::now() + Duration::from_secs(5);
    while process_state(target.pid()) != 'T' {
        assert!(Instant::now() < deadline, "the old owner's process goes on");
        std::thread::sleep(Duration::from_millis(10));
    }
    // Both live; nothing of the old owner arrives any more, and it does not come back.
    std::thread::sleep(Duration::from_millis(1500));
    let after: Vec<_> = config.sponsors.iter().map(|s| versions(&s.address)).collect();
    assert_eq!(before, after);
    assert!(handle.stats().unwrap().sponsors.iter().all(|s| !s.up));
    drop(target);
    handle.finish();
}

/// What a dishonest sponsor does to what it answers.
#[derive(Debug, Clone, Copy, PartialEq)]
#[repr(u8)]
enum Lie {
    /// One bit of the content is flipped.
    Flip = 1,
    /// The same, with a checksum that fits.
    FlipAndFit = 2,
    /// The page as it was before its last write, under the version asked for.
    Replay = 3,
    /// Another page's content.
    Swap = 4,
    /// Zeros.
    Zeros = 5,
}

type Kept = HashMap<u64, Vec<(PageEntry, Option<Vec<u8>>)>>;

/// A sponsor that keeps every version of every page, and lies when it is told to.
#[derive(Clone)]
struct Liar {
    lie: Arc<AtomicU8>,
    lied: Arc<AtomicU64>,
    kept: Arc<Mutex<Kept>>,
    store: StoreId,
}

impl Liar {
    fn start() -> (Self, String) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let liar = Self {
            lie: Arc::default(),
            lied: Arc::default(),
            kept: Arc::default(),
            store: StoreId::random(),
        };
        let server = liar.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let server = server.clone();
                std::thread::spawn(move || server.serve(stream));
            }
        });
        (liar, address)
    }

    fn serve(&self, stream: TcpStream) -> Result<(), LinkError> {
        let mut link = Link::accept(stream, &Security::Plaintext)?;
        loop {
            while !link.has_frame()? {
                link.receive_blocking()?;
            }
            let mut reply = Vec::new();
            if let Some((header, body)) = link.next_frame()? {
                self.answer(&header, &body, &mut reply);
            }
            link.output().extend_from_slice(&reply);
            link.flush_blocking()?;
        }
    }

    fn answer(&self, header: &Header, body: &Body<'_>, reply: &mut Vec<u8>) {
        match (header.kind, body) {
            (Kind::Hello, _) => {
                HelloAck { version: 2, store: self.store, free_bytes: 1 << 40 }
                    .encode(header, reply);
            }
            (Kind::Open, _) => OpenAck { lease_ms: 60_000, stored_pages: 1 }.encode(header, reply),
            (Kind::Ping, _) => {
                Pong { flags: PongFlags(0), free_bytes: 1 << 40, store: self.store }
                    .encode(header, reply);
            }
            (Kind::Close, _) => header.reply(Kind::CloseAck, Status::Ok).encode_empty(reply),
            (Kind::Write, Body::Pages(list)) => {
                let mut kept = self.kept.lock().unwrap();
                for (entry, data) in list.iter() {
                    kept.entry(entry.page().0)
                        .or_default()
                        .push((*entry, data.map(<[u8]>::to_vec)));
                }
                let entries: Vec<_> =
                    list.entries().iter().map(|e| e.with_flags(EntryFlags::default())).collect();
                encode_pages(header.reply(Kind::WriteAck, Status::Ok), &entries, &[], reply);
            }
            (Kind::Read, Body::Pages(list)) => self.read(header, list.entries(), reply),
            _ => header.encode_error(Status::Malformed, "not here", reply),
        }
    }

    fn read(&self, header: &Header, asked: &[PageEntry], reply: &mut Vec<u8>) {
        let kept = self.kept.lock().unwrap();
        let (mut entries, mut data) = (Vec::new(), Vec::new());
        for ask in asked {
            let versions = kept.get(&ask.page().0).map_or(&[][..], Vec::as_slice);
            let found = versions.iter().rev().find(|(e, _)| e.version() == ask.version());
            let Some((entry, bytes)) = found else {
                entries.push(ask.with_flags(EntryFlags::ABSENT));
                continue;
            };
            let lie = self.lie.load(Ordering::Relaxed);
            let (mut entry, mut bytes) = (*entry, bytes.clone());
            let fit = |entry: PageEntry, bytes: &[u8]| {
                entry.with_checksum(page_checksum(ask.page(), ask.version(), bytes))
            };
            let told = match (lie, &mut bytes) {
                (1, Some(bytes)) => {
                    bytes[1000] ^= 4;
                    true
                }
                (2, Some(bytes)) => {
                    bytes[1000] ^= 4;
                    entry = fit(entry, bytes);
                    true
                }
                (3, Some(bytes)) => match versions
                    .iter()
                    .rev()
                    .filter_map(|(e, b)| {
                        Some((e, b.as_ref().filter(|_| e.version() < ask.version())?))
                    })
                    .next()
                {
                    Some((old, content)) => {
                        bytes.clone_from(content);
                        entry = fit(entry.with_tag(old.tag()), bytes);
                        true
                    }
                    None => false,
                },
                (4, Some(bytes)) => {
                    let other = kept.values().flatten().find(|(e, b)| {
                        e.page() != ask.page() && b.as_ref().is_some_and(|b| b != bytes)
                    });
                    if let Some((other, Some(content))) = other {
                        bytes.clone_from(content);
                        entry = fit(entry.with_tag(other.tag()), bytes);
                    }
                    true
                }
                (5, bytes) if bytes.is_some() => {
                    *bytes = None;
                    let sealed = entry.flags().contains(EntryFlags::SEALED);
                    let flags = if sealed {
                        EntryFlags::ZERO.union(EntryFlags::SEALED)
                    } else {
                        EntryFlags::ZERO
                    };
                    entry = fit(entry.with_flags(flags), &[0; PAGE_BYTES]);
                    true
                }
                _ => false,
            };
            self.lied.fetch_add(u64::from(told), Ordering::Relaxed);
            entries.push(entry);
            data.extend(bytes.unwrap_or_default());
        }
        encode_pages(header.reply(Kind::ReadReply, Status::Ok), &entries, &data, reply);
    }
}

fn read_from_a_liar(lie: Lie, sealed: bool) {
    let bench = Bench::new("liar", 1);
    let (liar, address) = Liar::start();
    let mut target = Target::start(&bench.ram());
    let mut config = bench.config(target.pid(), 2, EvictionChoice::Auto);
    // The liar is the one that reads prefer.
    config.sponsors.insert(0, SponsorAddress { address, weight: 1 });
    config.prefetch = false;
    if sealed {
        let key = bench.dir.join("page.key");
        SealKey::generate().unwrap().save(&key).unwrap();
        config.seal_key = Some(key);
    }
    let handle = start(&config);
    // Long enough for old versions to replay.
    assert_eq!(target.hammer(1000, 1)["wrong"], 0);
    assert_eq!(handle.stats().unwrap().counters.corrupt_replies, 0);
    liar.lie.store(lie as u8, Ordering::Relaxed);
    assert_eq!(target.hammer(700, 2)["wrong"], 0, "{lie:?} got through");
    let lied = liar.lied.load(Ordering::Relaxed);
    let counters = handle.stats().unwrap().counters;
    println!("{lie:?}, sealed {sealed}: {lied} lies, {} noticed", counters.corrupt_replies);
    assert!(lied > 0 && counters.corrupt_replies > 0, "{lie:?}: {lied} lies, {counters:?}");
    // What it says is not relied on any more.
    assert!(handle.stats().unwrap().gauges.degraded_extents > 0);
    assert_eq!(counters.poisoned_pages, 0);
    drop(target);
    handle.finish();
}

#[test]
fn no_lie_gets_through_to_sealed_memory() {
    for lie in [Lie::Flip, Lie::FlipAndFit, Lie::Replay, Lie::Swap, Lie::Zeros] {
        read_from_a_liar(lie, true);
    }
}

#[test]
fn a_checksum_alone_notices_what_is_not_on_purpose() {
    read_from_a_liar(Lie::Flip, false);
}

/// A tmpfs of its own; unmounted when dropped.
struct SmallTmpfs(std::path::PathBuf);

impl SmallTmpfs {
    fn mount(path: std::path::PathBuf, options: &str) -> Self {
        std::fs::create_dir_all(&path).unwrap();
        let status = Command::new("mount")
            .args(["-t", "tmpfs", "-o", options, "tmpfs"])
            .arg(&path)
            .status()
            .unwrap();
        assert!(status.success());
        Self(path)
    }
}

impl Drop for SmallTmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn a_host_that_runs_short_gives_its_extents_to_others_before_it_is_full() {
    let mut bench = Bench::new("pressure", 2);
    let small = SmallTmpfs::mount(bench.dir.join("small"), "size=160m");
    let store = heca_agent::store::Store::open(&small.0, heca_types::ByteSize(1 << 30)).unwrap();
    let security = Security::Plaintext;
    let server =
        heca_agent::sponsor::SponsorServer::start(store, "127.0.0.1:0", Duration::ZERO, security)
            .unwrap();
    let store = server.store().clone();
    bench.sponsors.insert(0, Some(server));
    let period = Duration::from_millis(50);
    let _watch = heca_agent::pressure::spawn(store.clone(), 48 << 20, period).unwrap();
    let mut target = Target::start(&bench.ram());
    let handle = start(&bench.config(target.pid(), 2, EvictionChoice::Auto));
    target.ask(&json!({ "Hammer": { "threads": 3, "ms": 4000, "seed": 2 } }));
    wait_for(&handle, "stored pages", |s| s.sponsors[0].pages_stored > 1000);
    assert!(!store.is_pressed());
    // Somebody else on that host takes memory.
    std::fs::write(small.0.join("filler"), vec![1u8; 80 << 20]).unwrap();
    wait_for(&handle, "pressure", |s| s.sponsors[0].extents == 0 && s.gauges.leaving_extents == 0);
    assert_eq!(target.answer()["wrong"], 0);
    let stats = handle.stats().unwrap();
    assert_eq!((stats.gauges.degraded_extents, stats.counters.store_failures), (0, 0));
    std::fs::remove_file(small.0.join("filler")).unwrap();
    drop(target);
    handle.finish();
    drop(bench.sponsors.remove(0));
}
