//! The program that sorts: fills memory with numbers and sorts them, on command.

use std::fs::File;
use std::io::{BufRead, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use heca_sys::map::SharedMap;
use serde::{Deserialize, Serialize};

use super::Values;
use crate::cli::BenchSortArguments;

/// Numbers that are sorted by insertion.
const LEAF: usize = 16;
/// Numbers that are not worth a thread.
const PARALLEL: usize = 1 << 17;

/// What the program answers to a command.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct Answer {
    pub(super) seconds: f64,
    /// Numbers that are not where they belong, and 1 if the numbers are not those of before.
    pub(super) wrong: usize,
}

/// Sum and exclusive or of all numbers: a permutation changes neither.
fn digest(words: &[AtomicU64]) -> (u64, u64) {
    words.iter().fold((0u64, 0), |(sum, xor), word| {
        let word = word.load(Ordering::Relaxed);
        (sum.wrapping_add(word), xor ^ word)
    })
}

fn fill(words: &[AtomicU64], values: Values) {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    for word in words {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let value = match values {
            Values::Random => state,
            Values::Small => state >> 48,
        };
        word.store(value, Ordering::Relaxed);
    }
}

fn swap(words: &[AtomicU64], a: usize, b: usize) {
    let (x, y) = (words[a].load(Ordering::Relaxed), words[b].load(Ordering::Relaxed));
    words[a].store(y, Ordering::Relaxed);
    words[b].store(x, Ordering::Relaxed);
}

/// Hoare's partition around the median of three. Returns where the second part begins.
fn partition(words: &[AtomicU64]) -> usize {
    let at = |i: usize| words[i].load(Ordering::Relaxed);
    let mut three = [at(0), at(words.len() / 2), at(words.len() - 1)];
    three.sort_unstable();
    let pivot = three[1];
    let (mut low, mut high) = (0, words.len() - 1);
    loop {
        while at(low) < pivot {
            low += 1;
        }
        while at(high) > pivot {
            high -= 1;
        }
        if low >= high {
            return low.max(1);
        }
        swap(words, low, high);
        low += 1;
        high -= 1;
    }
}

fn insertion_sort(words: &[AtomicU64]) {
    for end in 1..words.len() {
        let value = words[end].load(Ordering::Relaxed);
        let mut hole = end;
        while hole > 0 && words[hole - 1].load(Ordering::Relaxed) > value {
            words[hole].store(words[hole - 1].load(Ordering::Relaxed), Ordering::Relaxed);
            hole -= 1;
        }
        words[hole].store(value, Ordering::Relaxed);
    }
}

fn quicksort(mut words: &[AtomicU64], threads: usize) {
    while words.len() > LEAF {
        let (left, right) = words.split_at(partition(words));
        if threads > 1 && words.len() > PARALLEL {
            std::thread::scope(|scope| {
                scope.spawn(|| quicksort(left, threads / 2));
                quicksort(right, threads - threads / 2);
            });
            return;
        }
        // The longer part last, without a further frame on the stack.
        let (short, long) = if left.len() < right.len() { (left, right) } else { (right, left) };
        quicksort(short, 1);
        words = long;
    }
    insertion_sort(words);
}

pub fn run(arguments: &BenchSortArguments) -> anyhow::Result<()> {
    heca_sys::process::die_with_parent()?;
    let bytes = usize::try_from(arguments.bytes)?;
    let map = match &arguments.file {
        Some(path) => SharedMap::new(&File::options().read(true).write(true).open(path)?, bytes)?,
        None => SharedMap::anonymous(bytes)?,
    };
    let words = map.as_words();
    let mut out = std::io::stdout().lock();
    writeln!(out, "ready")?;
    out.flush()?;
    let mut before = (0, 0);
    for line in std::io::stdin().lock().lines() {
        let begun = Instant::now();
        let answer = match line?.as_str() {
            "fill" => {
                fill(words, arguments.values);
                let seconds = begun.elapsed().as_secs_f64();
                before = digest(words);
                Answer { seconds, wrong: 0 }
            }
            "sort" => {
                quicksort(words, arguments.threads);
                Answer { seconds: begun.elapsed().as_secs_f64(), wrong: 0 }
            }
            // By itself: what it costs is not part of sorting.
            _ => {
                let at = |i: usize| words[i].load(Ordering::Relaxed);
                let wrong = (1..words.len()).filter(|&i| at(i - 1) > at(i)).count();
                let wrong = wrong + usize::from(digest(words) != before);
                Answer { seconds: begun.elapsed().as_secs_f64(), wrong }
            }
        };
        writeln!(out, "{}", serde_json::to_string(&answer)?)?;
        out.flush()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_sorted_and_none_is_lost() {
        for (count, values) in
            [(1, Values::Random), (300_000, Values::Random), (300_000, Values::Small)]
        {
            let words: Vec<AtomicU64> = (0..count).map(|_| AtomicU64::new(0)).collect();
            fill(&words, values);
            let mut expected: Vec<u64> = words.iter().map(|w| w.load(Ordering::Relaxed)).collect();
            quicksort(&words, 4);
            expected.sort_unstable();
            let found: Vec<u64> = words.iter().map(|w| w.load(Ordering::Relaxed)).collect();
            assert!(found == expected, "{count} {values:?}");
        }
        // Equal, sorted and reversed ones.
        let orders: [fn(u64) -> u64; 3] = [|_| 7, |i| i, |i| 20_000 - i];
        for order in orders {
            let words: Vec<AtomicU64> = (0..20_000).map(|i| AtomicU64::new(order(i))).collect();
            quicksort(&words, 1);
            assert!(words.is_sorted_by_key(|w| w.load(Ordering::Relaxed)));
        }
    }
}
