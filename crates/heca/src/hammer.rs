//! `heca hammer`: works on memory without end, verifies every byte of it, and measures pauses.
//!
//! Each page begins with its number and its generation; the rest follows from both. So a wrong
//! byte, an old generation and the content of another page are told from each other. The newest
//! generation of each page is kept apart. Some generations are all zeros: such pages take no memory
//! on a sponsor, and the next generation takes it anew.

use std::io::Write;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::cli::HammerArguments;

const PAGE_WORDS: usize = 512;
/// Pages touched in random order between two sweeps.
const RANDOM_STEPS: usize = 6000;
/// Part of a thread's pages that one sweep covers.
const SWEEP_PART: usize = 8;
/// One in so many verified pages is written anew.
const WRITE_ONE_IN: u64 = 3;
/// One in so many generations is all zeros.
const ZERO_ONE_IN: u64 = 8;
/// Wrong pages that are described in words.
const WORDS_MAX: u64 = 20;

/// The finaliser of `SplitMix64` (Steele, Lea and Flood 2014).
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

fn word(seed: u64, position: usize) -> u64 {
    seed.wrapping_add((position as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15)).rotate_left(29) ^ seed
}

fn seed_of(number: u64, generation: u64) -> u64 {
    mix(number ^ generation.rotate_left(32))
}

fn is_zero(number: u64, generation: u64) -> bool {
    seed_of(number, generation).is_multiple_of(ZERO_ONE_IN)
}

fn fill(page: &mut [u64], number: u64, generation: u64) {
    if is_zero(number, generation) {
        page.fill(0);
        return;
    }
    page[0] = number;
    page[1] = generation;
    let seed = seed_of(number, generation);
    for (i, w) in page.iter_mut().enumerate().skip(2) {
        *w = word(seed, i);
    }
}

fn differing(found: u64, expected: u64) -> u64 {
    if found == expected {
        return 0;
    }
    (found ^ expected).to_le_bytes().iter().filter(|&&byte| byte != 0).count() as u64
}

/// Bytes of the page that are not as they should be.
fn wrong_bytes(page: &[u64], number: u64, generation: u64) -> u64 {
    if is_zero(number, generation) {
        return page.iter().map(|&w| differing(w, 0)).sum();
    }
    let seed = seed_of(number, generation);
    let rest = page.iter().enumerate().skip(2);
    let rest: u64 = rest.map(|(i, &w)| differing(w, word(seed, i))).sum();
    differing(page[0], number) + differing(page[1], generation) + rest
}

/// What is wrong with a page, as far as it tells itself.
fn describe(page: &[u64], number: u64, generation: u64) -> &'static str {
    if page.iter().all(|&w| w == 0) {
        "all zeros"
    } else if page[0] != number && wrong_bytes(page, page[0], page[1]) == 0 {
        "the content of another page"
    } else if page[0] == number && page[1] < generation && wrong_bytes(page, number, page[1]) == 0 {
        "an old generation"
    } else {
        "wrong bytes"
    }
}

/// What one thread tells the one that reports.
#[derive(Debug, Default)]
struct Progress {
    verified_bytes: AtomicU64,
    wrong: AtomicU64,
    /// Of the last access, in microseconds since the start.
    last_us: AtomicU64,
    /// Longest time between two accesses since the last report.
    longest_us: AtomicU64,
}

impl Progress {
    fn access(&self, begun: Instant) {
        let now = begun.elapsed().as_micros() as u64;
        let before = self.last_us.swap(now, Ordering::Relaxed);
        self.longest_us.fetch_max(now.saturating_sub(before), Ordering::Relaxed);
    }

    /// Longest pause since the last report, one that goes on included.
    fn take_longest(&self, begun: Instant) -> u64 {
        let now = begun.elapsed().as_micros() as u64;
        let open = now.saturating_sub(self.last_us.load(Ordering::Relaxed));
        self.longest_us.swap(0, Ordering::Relaxed).max(open)
    }
}

#[derive(Debug, Serialize)]
struct Report {
    t: f64,
    verified_bytes: u64,
    wrong: u64,
    longest_stall_ms_since_last: f64,
}

struct Worker<'a> {
    /// Its pages, and the number of the first.
    memory: &'a mut [u64],
    first: u64,
    generations: Vec<u32>,
    random: u64,
    progress: &'a Progress,
    begun: Instant,
}

impl Worker<'_> {
    fn next_random(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9E37_79B9_7F4A_7C15);
        mix(self.random)
    }

    fn visit(&mut self, position: usize) {
        let write = self.next_random().is_multiple_of(WRITE_ONE_IN);
        let number = self.first + position as u64;
        let generation = u64::from(self.generations[position]);
        let page = &mut self.memory[position * PAGE_WORDS..][..PAGE_WORDS];
        let wrong = wrong_bytes(page, number, generation);
        if wrong > 0 {
            let before = self.progress.wrong.fetch_add(wrong, Ordering::Relaxed);
            if before < WORDS_MAX * 4096 {
                let what = describe(page, number, generation);
                println!(
                    "hammer: WRONG page {number}: {what}, {wrong} bytes; generation {} of {generation}, says page {}",
                    page[1], page[0]
                );
            }
        }
        self.progress.verified_bytes.fetch_add((PAGE_WORDS * 8) as u64, Ordering::Relaxed);
        if write || wrong > 0 {
            self.generations[position] += 1;
            fill(page, number, generation + 1);
        }
        self.progress.access(self.begun);
    }

    fn run(mut self, stop: &AtomicBool) {
        let pages = self.memory.len() / PAGE_WORDS;
        let mut sweep_from = 0;
        while !stop.load(Ordering::Relaxed) {
            for _ in 0..RANDOM_STEPS {
                let position = (self.next_random() % pages as u64) as usize;
                self.visit(position);
            }
            for position in sweep_from..sweep_from + pages.div_ceil(SWEEP_PART) {
                self.visit(position % pages);
            }
            sweep_from = (sweep_from + pages.div_ceil(SWEEP_PART)) % pages;
        }
    }
}

pub fn run(arguments: &HammerArguments) -> anyhow::Result<ExitCode> {
    let threads = arguments.threads.max(1);
    let pages = (arguments.size.0 as usize / (PAGE_WORDS * 8)).max(threads);
    let mut memory: Vec<u64> = Vec::new();
    memory.try_reserve_exact((pages + 1) * PAGE_WORDS)?;
    memory.resize((pages + 1) * PAGE_WORDS, 0);
    let offset = memory.as_ptr().align_offset(PAGE_WORDS * 8).min(PAGE_WORDS);
    let memory = &mut memory[offset..][..pages * PAGE_WORDS];
    for (number, page) in memory.chunks_mut(PAGE_WORDS).enumerate() {
        fill(page, number as u64, 1);
    }
    println!("hammer: {pages} pages written, {threads} threads begin");
    let share = pages.div_ceil(threads);
    let progress: Vec<Progress> = (0..threads).map(|_| Progress::default()).collect();
    let stop = AtomicBool::new(false);
    let begun = Instant::now();
    std::thread::scope(|scope| {
        for ((thread, part), progress) in
            memory.chunks_mut(share * PAGE_WORDS).enumerate().zip(&progress)
        {
            let worker = Worker {
                first: (thread * share) as u64,
                generations: vec![1; part.len() / PAGE_WORDS],
                memory: part,
                random: mix(arguments.seed ^ (thread as u64) << 32),
                progress,
                begun,
            };
            let stop = &stop;
            scope.spawn(move || worker.run(stop));
        }
        while arguments.seconds.is_none_or(|s| begun.elapsed() < Duration::from_secs(s)) {
            std::thread::sleep(Duration::from_millis(arguments.report_ms));
            report(&progress, begun);
        }
        stop.store(true, Ordering::Relaxed);
    });
    report(&progress, begun);
    let wrong = progress.iter().any(|p| p.wrong.load(Ordering::Relaxed) > 0);
    Ok(if wrong { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn report(progress: &[Progress], begun: Instant) {
    let sum = |of: fn(&Progress) -> &AtomicU64| {
        progress.iter().map(|p| of(p).load(Ordering::Relaxed)).sum::<u64>()
    };
    let longest = progress.iter().map(|p| p.take_longest(begun)).max().unwrap_or(0);
    let report = Report {
        t: (begun.elapsed().as_secs_f64() * 1e3).round() / 1e3,
        verified_bytes: sum(|p| &p.verified_bytes),
        wrong: sum(|p| &p.wrong),
        longest_stall_ms_since_last: longest as f64 / 1e3,
    };
    // One write, so that words of other threads do not come in between.
    if let Ok(json) = serde_json::to_string(&report) {
        let _ = std::io::stdout().write_all(format!("hammer: {json}\n").as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_with_a_page_is_told() {
        let mut page = vec![0; PAGE_WORDS];
        let mut with_content = (1..).filter(|&generation| !is_zero(7, generation));
        let (old, new) = (with_content.next().unwrap_or(0), with_content.next().unwrap_or(0));
        assert_eq!(describe(&page, 7, old), "all zeros");
        fill(&mut page, 7, old);
        assert_eq!(wrong_bytes(&page, 7, old), 0);
        assert!(wrong_bytes(&page, 7, new) > 0);
        assert_eq!(describe(&page, 7, new), "an old generation");
        assert_eq!(describe(&page, 8, old), "the content of another page");
        page[100] ^= 1 << 20;
        assert_eq!(wrong_bytes(&page, 7, old), 1);
        assert_eq!(describe(&page, 7, old), "wrong bytes");
        let empty = (1..).find(|&generation| is_zero(7, generation)).unwrap_or(0);
        assert!(wrong_bytes(&page, 7, empty) > 4000);
        fill(&mut page, 7, empty);
        assert_eq!(wrong_bytes(&page, 7, empty), 0);
    }
}
