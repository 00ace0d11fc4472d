//! `heca memtest`: writes a pattern over a piece of memory and verifies every byte of it.

use std::process::ExitCode;
use std::time::Instant;

use serde::Serialize;

use crate::cli::MemtestArguments;

/// Words between two lines of progress.
const STEP_WORDS: usize = 8 << 20;

#[derive(Debug, Serialize)]
struct Summary {
    size_bytes: u64,
    rounds: u64,
    verified_bytes: u64,
    wrong_bytes: u64,
    write_mib_s: f64,
    verify_mib_s: f64,
}

/// A value that depends on place and round, and does not compress (the finaliser of `SplitMix64`,
/// Steele, Lea and Flood 2014).
fn pattern(word: usize, round: u64) -> u64 {
    let mut x = (word as u64).wrapping_add(round.wrapping_mul(0x9E37_79B9_7F4A_7C15));
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

fn progress(step: &str, round: u64, done: usize, of: usize) {
    println!("memtest: round {round} {step} {} %", done * 100 / of);
}

pub fn run(arguments: &MemtestArguments) -> anyhow::Result<ExitCode> {
    let words = arguments.size.0 as usize / 8;
    anyhow::ensure!(words > 0, "--size must be at least 8 bytes");
    let mut memory: Vec<u64> = Vec::new();
    memory.try_reserve_exact(words)?;
    memory.resize(words, 0);
    let (mut wrong, mut write_s, mut verify_s) = (0u64, 0.0, 0.0);
    for round in 1..=arguments.rounds {
        let begun = Instant::now();
        for (step, chunk) in memory.chunks_mut(STEP_WORDS).enumerate() {
            let first = step * STEP_WORDS;
            for (i, word) in chunk.iter_mut().enumerate() {
                *word = pattern(first + i, round);
            }
            progress("wrote", round, first + chunk.len(), words);
        }
        write_s += begun.elapsed().as_secs_f64();
        let begun = Instant::now();
        for (step, chunk) in memory.chunks(STEP_WORDS).enumerate() {
            let first = step * STEP_WORDS;
            for (i, &word) in chunk.iter().enumerate() {
                let expected = pattern(first + i, round);
                if word != expected {
                    let bytes = (word ^ expected).to_le_bytes();
                    wrong += bytes.iter().filter(|&&b| b != 0).count() as u64;
                    if wrong < 200 {
                        println!("memtest: WRONG word {} is {word:#x}", first + i);
                    }
                }
            }
            progress("verified", round, first + chunk.len(), words);
        }
        verify_s += begun.elapsed().as_secs_f64();
    }
    let total_mib = (words * 8) as f64 * arguments.rounds as f64 / f64::from(1 << 20);
    let summary = Summary {
        size_bytes: words as u64 * 8,
        rounds: arguments.rounds,
        verified_bytes: words as u64 * 8 * arguments.rounds,
        wrong_bytes: wrong,
        write_mib_s: total_mib / write_s,
        verify_mib_s: total_mib / verify_s,
    };
    if arguments.json {
        println!("memtest-summary: {}", serde_json::to_string(&summary)?);
    } else {
        println!("verified {} bytes, {} wrong", summary.verified_bytes, summary.wrong_bytes);
    }
    Ok(if wrong == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
