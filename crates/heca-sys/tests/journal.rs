//! The journal over the end of its process, and files that are no journal.
#![allow(clippy::unwrap_used)]

use std::fs::{self, File};
use std::hint::black_box;
use std::io::{self, BufRead, BufReader, ErrorKind};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::os::unix::process::ExitStatusExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use heca_sys::journal::{Journal, NUMBERS};
use proptest::prelude::*;

const PAGES: u64 = 3 * 16_384 - 5;
const EXTENTS: u32 = 3;
const ID: [u8; 16] = *b"one region's own";

struct Dir(tempfile::TempDir);

impl Dir {
    fn new() -> Self {
        Self(tempfile::tempdir_in("/dev/shm").unwrap())
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("journal")
    }

    fn create(&self) -> Journal {
        Journal::create(&self.path(), PAGES, EXTENTS, ID).unwrap()
    }

    fn open(&self) -> io::Result<Journal> {
        open(&self.path(), PAGES, EXTENTS, ID)
    }

    /// Opening must fail as invalid; returns the words.
    fn refusal(&self) -> String {
        let error = self.open().expect_err("refused");
        assert_eq!(error.kind(), ErrorKind::InvalidData, "{error}");
        error.to_string()
    }

    fn write(&self, offset: u64, bytes: &[u8]) {
        File::options().write(true).open(self.path()).unwrap().write_all_at(bytes, offset).unwrap();
    }
}

/// Opens a journal as a pager does that follows another one. A child that another test is starting
/// holds all locks of this process until it runs its program.
fn open(path: &Path, pages: u64, extents: u32, id: [u8; 16]) -> io::Result<Journal> {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        match Journal::open(path, pages, extents, id) {
            Err(error) if error.kind() == ErrorKind::WouldBlock && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(1));
            }
            outcome => return outcome,
        }
    }
}

fn id(byte: u8) -> [u8; 16] {
    std::array::from_fn(|at| byte.wrapping_mul(31).wrapping_add(at as u8))
}

#[test]
fn everything_survives_reopening() {
    let dir = Dir::new();
    let journal = dir.create();
    assert_eq!((journal.version(PAGES - 1), journal.extent(2), journal.filling()), (0, 0, None));
    assert_eq!((journal.epoch(), journal.store(15), journal.number(31)), (0, [0; 16], 0));
    (0..PAGES).for_each(|page| journal.set_version(page, page as u32 ^ 0xffff_0000));
    (0..EXTENTS).for_each(|extent| journal.set_extent(extent, !u64::from(extent)));
    (0..16).for_each(|sponsor| journal.set_store(sponsor, id(sponsor)));
    (0..NUMBERS).for_each(|slot| journal.set_number(slot, slot as u64 + 1));
    journal.set_epoch(u64::MAX);
    journal.set_filling(Some(0));
    assert_eq!(journal.filling(), Some(0));
    journal.set_filling(Some(PAGES - 1));
    drop(journal);

    let journal = dir.open().unwrap();
    assert!((0..PAGES).all(|page| journal.version(page) == page as u32 ^ 0xffff_0000));
    assert!((0..EXTENTS).all(|extent| journal.extent(extent) == !u64::from(extent)));
    assert!((0..16).all(|sponsor| journal.store(sponsor) == id(sponsor)));
    assert!((0..NUMBERS).all(|slot| journal.number(slot) == slot as u64 + 1));
    assert_eq!((journal.epoch(), journal.filling()), (u64::MAX, Some(PAGES - 1)));
    journal.set_filling(None);
    drop(journal);
    assert_eq!(dir.open().unwrap().filling(), None);
}

#[test]
fn the_file_is_private_allocated_and_never_replaced() {
    let dir = Dir::new();
    let journal = dir.create();
    journal.set_epoch(3);
    drop(journal);
    let metadata = fs::metadata(dir.path()).unwrap();
    assert_eq!(metadata.permissions().mode() & 0o777, 0o600);
    assert_eq!(metadata.blocks() * 512, metadata.len());
    let error = Journal::create(&dir.path(), PAGES, EXTENTS, ID).expect_err("there is one");
    assert_eq!(error.kind(), ErrorKind::AlreadyExists);
    assert_eq!(dir.open().unwrap().epoch(), 3);
    assert_eq!(fs::read_dir(dir.0.path()).unwrap().count(), 1, "nothing else is left");
}

#[test]
fn a_tmpfs_that_is_full_is_an_error_and_leaves_nothing() {
    let dir = Dir::new();
    let size = std::ffi::CString::new("size=64k").unwrap();
    let flags = rustix::mount::MountFlags::empty();
    rustix::mount::mount("tmpfs", dir.0.path(), "tmpfs", flags, size.as_c_str()).unwrap();
    let outcome = Journal::create(&dir.path(), PAGES, EXTENTS, ID);
    let left = fs::read_dir(dir.0.path()).unwrap().count();
    rustix::mount::unmount(dir.0.path(), rustix::mount::UnmountFlags::empty()).unwrap();
    assert_eq!(outcome.expect_err("no room").kind(), ErrorKind::StorageFull);
    assert_eq!(left, 0);
}

#[test]
fn one_process_at_a_time_has_a_journal() {
    let dir = Dir::new();
    let at_once = || Journal::open(&dir.path(), PAGES, EXTENTS, ID);
    let journal = dir.create();
    assert_eq!(at_once().expect_err("in use").kind(), ErrorKind::WouldBlock);
    drop(journal);
    let _first = dir.open().unwrap();
    assert_eq!(at_once().expect_err("in use").kind(), ErrorKind::WouldBlock);
}

#[test]
fn the_smallest_journal_works_and_too_large_ones_are_refused() {
    let dir = Dir::new();
    drop(Journal::create(&dir.path(), 0, 0, ID).unwrap());
    open(&dir.path(), 0, 0, ID).unwrap();
    for (pages, extents) in [(u64::MAX, 1), (1 << 33, 1), (1, u32::MAX)] {
        let error = open(&dir.path(), pages, extents, ID).expect_err("too large");
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
    }
}

#[test]
fn what_is_not_this_journal_is_refused_in_words() {
    let dir = Dir::new();
    drop(dir.create());
    let path = dir.path();
    let refused =
        |pages, extents, id| open(&path, pages, extents, id).expect_err("refused").to_string();
    assert_eq!(refused(PAGES, EXTENTS, [0; 16]), "the journal belongs to another region");
    // As long as the right one, and yet another.
    assert!(refused(PAGES + 2, EXTENTS - 1, ID).contains("is for 49147 pages in 3 extents"));
    assert!(refused(PAGES + 4096, EXTENTS, ID).contains("bytes, expected"));

    dir.write(48, &(PAGES + 1).to_le_bytes());
    assert!(dir.refusal().contains("tells of a page"));
    dir.write(8, &2u32.to_le_bytes());
    assert!(dir.refusal().contains("format 2, expected 1"));
    dir.write(0, b"HECAJRNL");
    assert_eq!(dir.refusal(), "the file is no journal");
    let len = fs::metadata(&path).unwrap().len();
    for len in [0, 1, 4096, len - 1, len + 1] {
        File::options().write(true).open(&path).unwrap().set_len(len).unwrap();
        assert!(dir.refusal().contains(&format!("has {len} bytes")));
    }
    fs::remove_file(&path).unwrap();
    assert_eq!(dir.open().expect_err("none").kind(), ErrorKind::NotFound);
}

#[test]
fn indexes_out_of_range_panic_with_words() {
    let dir = Dir::new();
    let journal = dir.create();
    let says = |work: &dyn Fn(&Journal), words: &str| {
        let panic = catch_unwind(AssertUnwindSafe(|| work(&journal))).expect_err("panics");
        let text = panic.downcast_ref::<String>().unwrap();
        assert!(text.contains(words), "{text}");
    };
    says(&|j| _ = j.version(PAGES), "page 49147 of 49147");
    says(&|j| j.set_version(u64::MAX, 1), "page 18446744073709551615 of");
    says(&|j| j.set_filling(Some(PAGES)), "page 49147 of 49147");
    says(&|j| j.set_extent(EXTENTS, 1), "extent 3 of 3");
    says(&|j| _ = j.store(16), "sponsor 16 of 16");
    says(&|j| j.set_number(NUMBERS, 1), "number 32 of 32");
    assert_eq!(journal.filling(), None);
}

#[test]
fn a_store_that_was_half_written_counts_as_unknown_until_it_is_set_again() {
    let dir = Dir::new();
    let journal = dir.create();
    journal.set_store(1, id(1));
    drop(journal);
    // As if the writer had been killed between its words: slot 1 follows 32 numbers and slot 0.
    dir.write(64 + 256 + 32, &3u64.to_le_bytes());
    let journal = dir.open().unwrap();
    assert_eq!(journal.store(1), [0; 16]);
    journal.set_store(1, id(2));
    assert_eq!(journal.store(1), id(2));
}

#[test]
fn readers_never_see_a_store_that_is_half_of_one_and_half_of_another() {
    let dir = Dir::new();
    let (journal, done) = (dir.create(), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            (0..200_000u32).for_each(|round| journal.set_store(0, [round as u8 | 1; 16]));
            done.store(true, Ordering::Relaxed);
        });
        while !done.load(Ordering::Relaxed) {
            let id = journal.store(0);
            assert!(id.iter().all(|&byte| byte == id[0]), "torn: {id:?}");
        }
    });
}

/// Not a test of its own: the process that the next one kills.
#[test]
fn child_that_writes() {
    let Some(path) = std::env::var_os("HECA_TEST_JOURNAL") else { return };
    let journal = open(Path::new(&path), PAGES, EXTENTS, ID).unwrap();
    for round in 1.. {
        for page in 0..PAGES {
            journal.set_filling(Some(page));
            journal.set_version(page, round);
            journal.set_filling(None);
        }
        journal.set_extent(1, u64::from(round));
        journal.set_store(2, [round as u8; 16]);
        println!("round {round}");
    }
}

#[test]
fn a_killed_process_leaves_what_it_wrote() {
    let dir = Dir::new();
    drop(dir.create());
    for wait_us in [0, 1000, 3700, 20_000] {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child_that_writes", "--nocapture"])
            .env("HECA_TEST_JOURNAL", dir.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        lines.find(|line| line.as_ref().unwrap().ends_with("round 2")).unwrap().unwrap();
        std::thread::sleep(Duration::from_micros(wait_us));
        child.kill().unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(9));

        let journal = dir.open().unwrap();
        let round = journal.extent(1) as u32;
        assert!(round >= 2);
        let versions: Vec<u32> = (0..PAGES).map(|page| journal.version(page)).collect();
        // The next round up to some page, this round from there on.
        let ahead = versions.iter().take_while(|&&version| version == round + 1).count();
        assert!(versions[ahead..].iter().all(|&version| version == round), "in round {round}");
        if let Some(page) = journal.filling() {
            assert!([ahead, ahead.saturating_sub(1)].contains(&(page as usize)), "{page} {ahead}");
        }
        let store = journal.store(2);
        assert!(store == [0; 16] || store == [round as u8; 16] || store == [round as u8 - 1; 16]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn no_content_of_a_file_crashes_opening(
        mut content in proptest::collection::vec(any::<u8>(), 0..3 * 4096),
        right_length: bool,
        right_start in 0usize..=64,
        (pages, extents) in (0u64..2048, 0u32..64),
    ) {
        let dir = Dir::new();
        drop(Journal::create(&dir.path(), pages, extents, ID).unwrap());
        let valid = fs::read(dir.path()).unwrap();
        if right_length {
            content.resize(valid.len(), 0xa5);
        }
        let start = right_start.min(content.len());
        content[..start].copy_from_slice(&valid[..start]);
        fs::write(dir.path(), &content).unwrap();
        if let Ok(journal) = open(&dir.path(), pages, extents, ID) {
            prop_assert_eq!(content.len(), valid.len());
            // Whatever is in it, looking at it is safe.
            (0..pages).for_each(|page| _ = black_box(journal.version(page)));
            (0..extents).for_each(|extent| _ = black_box(journal.extent(extent)));
            (0..16).for_each(|sponsor| _ = black_box(journal.store(sponsor)));
            prop_assert!(journal.filling().is_none_or(|page| page < pages));
        }
    }
}
