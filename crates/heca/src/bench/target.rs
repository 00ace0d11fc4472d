//! The program that plays the guest: maps a file, touches pages on command, measures each touch.

use std::fs::File;
use std::io::{BufRead, Write};
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use hdrhistogram::Histogram;
use heca_sys::map::SharedMap;
use heca_types::limits::PAGE_BYTES;
use serde::{Deserialize, Serialize};

use super::worker::Worker;
use crate::cli::BenchTargetArguments;

const PAGE_WORDS: usize = PAGE_BYTES / 8;

/// A command to the target, one line of JSON each.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) enum Order {
    /// Write the value that belongs to each page of `first..end`, over the whole page.
    Write { first: usize, end: usize },
    /// Split the mapping in two at a page, as advice for a part of it does.
    Split { page: usize },
    /// Load a word of each page of `first..end`, in order, and compare it with what was written;
    /// with `dirty`, store it again, so that every page has to go back.
    Scan { first: usize, end: usize, dirty: bool },
    /// Load a word of `count` different pages of `first..end`, in random order, and compare it
    /// with what was written (or with zero, if nothing was).
    Touch { first: usize, end: usize, count: usize, seed: u64, written: bool },
    /// `threads` threads at a time read, compare and write their words of random pages for
    /// `ms` milliseconds; at the end every word of every page is compared. Words start as zeros,
    /// and a second hammering continues where the first ended.
    Hammer { threads: usize, ms: u64, seed: u64 },
}

/// Answer to an order.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub(super) struct Measured {
    pub(super) count: usize,
    pub(super) wrong: usize,
    pub(super) seconds: f64,
    pub(super) p50_us: f64,
    pub(super) p99_us: f64,
    pub(super) max_us: f64,
}

fn value(page: usize, word: usize) -> u64 {
    ((page * PAGE_WORDS + word) as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15)
}

/// Pages of a range in random order (Fisher-Yates, xorshift64).
fn shuffled(first: usize, end: usize, seed: u64) -> Vec<usize> {
    let mut pages: Vec<usize> = (first..end).collect();
    let mut state = seed | 1;
    for i in (1..pages.len()).rev() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        pages.swap(i, (state % (i as u64 + 1)) as usize);
    }
    pages
}

/// What one hammering thread knows: how often it wrote each page.
type Writes = Vec<u32>;

/// The value that thread `lane` left in a word at its `count`-th write of the page.
fn hammered(page: usize, word: usize, count: u32) -> u64 {
    if count == 0 {
        0
    } else {
        value(page, word) ^ u64::from(count).wrapping_mul(0xD6E8_FEB8_6659_FD93)
    }
}

/// One thread's part: the words of each page whose number is `lane` modulo `lanes`.
fn hammer(
    map: &SharedMap,
    (lane, lanes): (usize, usize),
    writes: &mut Writes,
    ms: u64,
    seed: u64,
) -> (usize, usize) {
    let pages = map.words() / PAGE_WORDS;
    let mine = |word: &usize| word % lanes == lane;
    let check = |page: usize, count: u32| {
        let words = (0..PAGE_WORDS).filter(mine);
        words.filter(|&w| map.load(page * PAGE_WORDS + w) != hammered(page, w, count)).count()
    };
    let begun = Instant::now();
    let mut state = seed.wrapping_mul(2 * lane as u64 + 3) | 1;
    let (mut done, mut wrong) = (0, 0);
    while begun.elapsed().as_millis() < u128::from(ms) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let page = (state % pages as u64) as usize;
        wrong += check(page, writes[page]);
        // Every fourth visit only reads, so that clean pages are evicted, too.
        if state >> 40 & 3 != 0 {
            writes[page] += 1;
            for word in (0..PAGE_WORDS).filter(mine) {
                map.store(page * PAGE_WORDS + word, hammered(page, word, writes[page]));
            }
        }
        done += 1;
    }
    wrong += (0..pages).map(|page| check(page, writes[page])).sum::<usize>();
    (done, wrong)
}

fn carry_out(map: &SharedMap, order: &Order, writes: &mut Vec<Writes>) -> Measured {
    let begun = Instant::now();
    match *order {
        Order::Hammer { threads, ms, seed } => {
            let pages = map.words() / PAGE_WORDS;
            writes.resize(threads, vec![0; pages]);
            let outcomes: Vec<(usize, usize)> = std::thread::scope(|scope| {
                let hammering: Vec<_> = writes
                    .iter_mut()
                    .enumerate()
                    .map(|(lane, writes)| {
                        scope.spawn(move || hammer(map, (lane, threads), writes, ms, seed))
                    })
                    .collect();
                hammering.into_iter().map(|h| h.join().unwrap_or((0, usize::MAX / 64))).collect()
            });
            Measured {
                count: outcomes.iter().map(|o| o.0).sum(),
                wrong: outcomes.iter().map(|o| o.1).sum(),
                seconds: begun.elapsed().as_secs_f64(),
                ..Measured::default()
            }
        }
        Order::Write { first, end } => {
            for page in first..end {
                for word in 0..PAGE_WORDS {
                    map.store(page * PAGE_WORDS + word, value(page, word));
                }
            }
            let seconds = begun.elapsed().as_secs_f64();
            Measured { count: end - first, seconds, ..Measured::default() }
        }
        Order::Split { page } => {
            let wrong = usize::from(map.split(page * PAGE_BYTES).is_err());
            Measured { wrong, ..Measured::default() }
        }
        Order::Scan { first, end, dirty } => {
            let mut wrong = 0;
            for page in first..end {
                let word = page % PAGE_WORDS;
                let (at, expected) = (page * PAGE_WORDS + word, value(page, word));
                wrong += usize::from(map.load(at) != expected);
                if dirty {
                    map.store(at, expected);
                }
            }
            let seconds = begun.elapsed().as_secs_f64();
            Measured { count: end - first, wrong, seconds, ..Measured::default() }
        }
        Order::Touch { first, end, count, seed, written } => {
            let mut histogram = Histogram::<u64>::new_with_bounds(1, 60_000_000_000, 3)
                .expect("constant bounds are valid");
            let pages = shuffled(first, end, seed);
            let mut wrong = 0;
            for &page in pages.iter().take(count) {
                let touched = Instant::now();
                let word = page % PAGE_WORDS;
                let found = map.load(page * PAGE_WORDS + word);
                histogram.saturating_record(touched.elapsed().as_nanos() as u64);
                let expected = if written { value(page, word) } else { 0 };
                wrong += usize::from(found != expected);
            }
            let us = |ns: u64| ns as f64 / 1000.0;
            Measured {
                count: count.min(pages.len()),
                wrong,
                seconds: begun.elapsed().as_secs_f64(),
                p50_us: us(histogram.value_at_quantile(0.5)),
                p99_us: us(histogram.value_at_quantile(0.99)),
                max_us: us(histogram.max()),
            }
        }
    }
}

/// The target process: takes orders on standard input until it ends.
pub fn run(arguments: &BenchTargetArguments) -> anyhow::Result<()> {
    heca_sys::process::die_with_parent()?;
    // The scheduler would move it at each wake-up, now beside and now onto the thread that serves
    // its faults; runs would differ by half. Floors and Heca get the same.
    let mut first = rustix::thread::CpuSet::new();
    first.set(0);
    rustix::thread::sched_setaffinity(None, &first)?;
    let file = File::options().read(true).write(true).open(&arguments.file)?;
    let map = SharedMap::new(&file, file.metadata()?.len() as usize)?;
    let mut out = std::io::stdout().lock();
    writeln!(out, "ready")?;
    out.flush()?;
    let mut writes = Vec::new();
    for line in std::io::stdin().lock().lines() {
        let measured = carry_out(&map, &serde_json::from_str(&line?)?, &mut writes);
        writeln!(out, "{}", serde_json::to_string(&measured)?)?;
        out.flush()?;
    }
    Ok(())
}

/// A target process, from the benchmark's side.
pub(super) struct Target(Worker);

impl Target {
    pub(super) fn start(file: &Path) -> anyhow::Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("bench-target").arg("--file").arg(file);
        Worker::start(command).map(Self)
    }

    pub(super) fn pid(&self) -> i32 {
        self.0.pid() as i32
    }

    pub(super) fn order(&mut self, order: &Order) -> anyhow::Result<Measured> {
        self.0.ask(&serde_json::to_string(order)?)
    }
}
