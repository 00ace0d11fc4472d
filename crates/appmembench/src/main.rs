//! `appmembench`: writes memory at a set rate and tells how well it gets on, after the benchmark of
//! that name in "Hecatonchire: Enabling Multi-Host Virtual Machines by Resource Aggregation and
//! Pooling" (Svärd, Hudzia, Tordsson, Elmroth).
//!
//! It runs inside of a guest that is migrated. Pages of a working set are written in random order,
//! and each is verified before it is written anew; beside it every byte is verified, slowly. Once a
//! second a line of JSON tells, for each step of 100 ms, what part of the writes that were asked for
//! was done. A heartbeat for whoever watches from outside comes from a thread with the highest
//! priority, so that the writes do not delay it.
#![forbid(unsafe_code)]

mod heartbeat;
mod memory;
mod pace;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use memory::{Memory, Order, PAGE_BYTES, Wrong};
use pace::{Pace, STEP_US};

const USAGE: &str = "\
Usage: appmembench [--working-set SIZE] [--rate SIZE|max] [--scrub SIZE] [--heartbeat auto|FILE]
       appmembench --idle [--heartbeat auto|FILE]

  --working-set SIZE   memory that is written (64M)
  --rate SIZE          bytes of pages that are written each second (10M); `max` measures the
                       highest rate first and asks for that one; 0 writes only once
  --scrub SIZE         bytes that are verified each second beside that (8M)
  --heartbeat FILE     send a byte every 2 ms; `auto` finds QEMU's pci-serial
  --idle               do nothing else";
/// Pages between two looks at the clock.
const BATCH: u64 = 64;
/// Sleep when nothing is due.
const NAP: Duration = Duration::from_millis(1);
/// How long the highest rate is measured.
const MEASURE: Duration = Duration::from_secs(3);
/// Steps in one line.
const STEPS_PER_LINE: usize = 10;
/// Wrong pages that are described in words.
const WORDS_MAX: u64 = 20;

/// What is written.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Rate {
    Max,
    BytesPerS(f64),
}

#[derive(Debug, PartialEq)]
struct Options {
    working_set: u64,
    rate: Rate,
    scrub: u64,
    heartbeat: Option<String>,
    idle: bool,
}

fn parse_size(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let shift = match text[digits.len()..].to_ascii_uppercase().as_str() {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

fn parse(arguments: impl Iterator<Item = String>) -> Option<Options> {
    let mut options = Options {
        working_set: 64 << 20,
        rate: Rate::BytesPerS((10 << 20) as f64),
        scrub: 8 << 20,
        heartbeat: None,
        idle: false,
    };
    let mut arguments = arguments;
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--idle" => options.idle = true,
            "--working-set" => options.working_set = parse_size(&arguments.next()?)?,
            "--scrub" => options.scrub = parse_size(&arguments.next()?)?,
            "--heartbeat" => options.heartbeat = Some(arguments.next()?),
            "--rate" => {
                let text = arguments.next()?;
                options.rate = match text.as_str() {
                    "max" => Rate::Max,
                    _ => Rate::BytesPerS(parse_size(&text)? as f64),
                };
            }
            _ => return None,
        }
    }
    Some(options)
}

fn main() -> ExitCode {
    let Some(options) = parse(std::env::args().skip(1)) else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    let beating = options.heartbeat.as_deref().map(|name| {
        let name = name.to_owned();
        std::thread::spawn(move || -> std::io::Result<()> {
            let path = if name == "auto" { heartbeat::find()? } else { PathBuf::from(name) };
            heartbeat::run(&path)
        })
    });
    if !options.idle {
        match Memory::filled((options.working_set as usize / PAGE_BYTES).max(1)) {
            Ok(memory) => Writer::new(memory, &options).run(),
            Err(error) => say(&format!("appmembench: WRONG size: {error}")),
        }
        return ExitCode::FAILURE;
    }
    match beating.map(std::thread::JoinHandle::join) {
        Some(Ok(Err(error))) => say(&format!("appmembench: no heartbeat: {error}")),
        Some(_) => {}
        None => loop {
            std::thread::park();
        },
    }
    ExitCode::FAILURE
}

/// One write, so that words of others do not come in between.
fn say(line: &str) {
    let _ = std::io::stdout().write_all(format!("{line}\n").as_bytes());
}

/// One line of figures.
#[derive(Debug)]
struct Report {
    /// End of the last step, in microseconds of the guest's clock.
    end_us: u64,
    /// Part of the asked writes that were done, for each step.
    steps: Vec<f64>,
    asked: f64,
    reached: f64,
    verified: u64,
    scrubbed: u64,
    wrong_bytes: u64,
}

impl Report {
    /// Rates are in bytes a second, `t` and `end` in seconds: `t` is when the line was written.
    fn to_json(&self, now_us: u64) -> String {
        let steps: Vec<String> = self.steps.iter().map(|part| format!("{part:.3}")).collect();
        format!(
            "{{\"t\":{:.6},\"end\":{:.1},\"asked\":{:.0},\"reached\":{:.0},\"steps\":[{}],\
             \"verified_pages\":{},\"scrubbed_pages\":{},\"wrong_bytes\":{}}}",
            now_us as f64 / 1e6,
            self.end_us as f64 / 1e6,
            self.asked,
            self.reached,
            steps.join(","),
            self.verified,
            self.scrubbed,
            self.wrong_bytes
        )
    }
}

/// Writes, verifies and counts.
struct Writer {
    memory: Memory,
    order: Order,
    rate: Rate,
    /// Pages to verify each second, and the next one.
    scrub_per_s: f64,
    scrub_next: usize,
    begun: Instant,
    verified: u64,
    scrubbed: u64,
    wrong_bytes: u64,
    wrong_pages: u64,
}

impl Writer {
    fn new(memory: Memory, options: &Options) -> Self {
        Self {
            order: Order::shuffled(memory.pages(), 0x00C0_FFEE),
            rate: options.rate,
            scrub_per_s: options.scrub as f64 / PAGE_BYTES as f64,
            scrub_next: 0,
            begun: Instant::now(),
            memory,
            verified: 0,
            scrubbed: 0,
            wrong_bytes: 0,
            wrong_pages: 0,
        }
    }

    fn now_us(&self) -> u64 {
        self.begun.elapsed().as_micros() as u64
    }

    fn note(&mut self, outcome: Result<(), Wrong>) {
        let Err(wrong) = outcome else { return };
        self.wrong_bytes += wrong.bytes;
        self.wrong_pages += 1;
        if self.wrong_pages <= WORDS_MAX {
            say(&format!(
                "appmembench: WRONG page {} of generation {}: {}, {} bytes",
                wrong.number, wrong.generation, wrong.what, wrong.bytes
            ));
        }
    }

    fn write(&mut self, pages: u64) {
        for _ in 0..pages {
            let number = self.order.next_page();
            let outcome = self.memory.write(number);
            self.note(outcome);
        }
        self.verified += pages;
    }

    /// Verifies a page if one is due; what was missed is not made good.
    fn scrub(&mut self, due_us: &mut f64, now_us: u64) {
        if self.scrub_per_s <= 0.0 || *due_us > now_us as f64 {
            return;
        }
        let outcome = self.memory.verify(self.scrub_next);
        self.note(outcome);
        self.scrub_next = (self.scrub_next + 1) % self.memory.pages();
        self.scrubbed += 1;
        let period = 1e6 / self.scrub_per_s;
        *due_us = (*due_us + period).max(now_us as f64 - 10.0 * period);
    }

    /// Pages that can be written in a second.
    fn measure(&mut self) -> f64 {
        let begun = Instant::now();
        let mut pages = 0;
        while begun.elapsed() < MEASURE {
            self.write(BATCH);
            pages += BATCH;
        }
        pages as f64 / begun.elapsed().as_secs_f64()
    }

    fn run(mut self) {
        let pages_per_s = match self.rate {
            Rate::Max => self.measure(),
            Rate::BytesPerS(bytes) => bytes / PAGE_BYTES as f64,
        };
        let asked = pages_per_s * PAGE_BYTES as f64;
        say(&format!("{{\"ready\":true,\"pages\":{},\"asked\":{asked:.0}}}", self.memory.pages()));
        let reports = start_reporter(self.begun);
        let mut pace = Pace::new(pages_per_s, self.now_us());
        let mut scrub_due = self.now_us() as f64;
        let (mut steps, mut pages) = (Vec::new(), 0u64);
        loop {
            let now = self.now_us();
            pace.advance(now, |part| steps.push(part));
            if steps.len() >= STEPS_PER_LINE {
                let seconds = (steps.len() as u64 * STEP_US) as f64 / 1e6;
                let _ = reports.send(Report {
                    end_us: pace.ended_us(),
                    steps: std::mem::take(&mut steps),
                    asked,
                    reached: pages as f64 * PAGE_BYTES as f64 / seconds,
                    verified: self.verified,
                    scrubbed: self.scrubbed,
                    wrong_bytes: self.wrong_bytes,
                });
                pages = 0;
            }
            let due = pace.due(now).min(BATCH);
            self.write(due);
            pace.wrote(due);
            pages += due;
            let before = self.scrubbed;
            self.scrub(&mut scrub_due, now);
            if due == 0 && self.scrubbed == before {
                std::thread::sleep(NAP);
            }
        }
    }
}

/// Prints reports in a thread of its own: a serial console is slow.
fn start_reporter(begun: Instant) -> mpsc::Sender<Report> {
    let (sender, receiver) = mpsc::channel::<Report>();
    std::thread::spawn(move || {
        for report in receiver {
            say(&report.to_json(begun.elapsed().as_micros() as u64));
        }
    });
    sender
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(text: &str) -> Option<Options> {
        parse(text.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn options_are_read() {
        let all =
            options("--working-set 512M --rate max --scrub 0 --heartbeat auto").expect("good");
        assert_eq!((all.working_set, all.rate, all.scrub), (512 << 20, Rate::Max, 0));
        assert_eq!(all.heartbeat.as_deref(), Some("auto"));
        assert!(options("--idle").expect("good").idle);
        let rate = options("--rate 1G").expect("good").rate;
        assert_eq!(rate, Rate::BytesPerS((1u64 << 30) as f64));
        for bad in ["--rate", "--rate x", "--working-set 5X", "--wrong", "--scrub -1"] {
            assert_eq!(options(bad), None, "{bad}");
        }
    }

    #[test]
    fn reports_are_json() {
        let report = Report {
            end_us: 1_000_000,
            steps: vec![1.0, 0.25],
            asked: 1e7,
            reached: 9e6,
            verified: 5,
            scrubbed: 6,
            wrong_bytes: 0,
        };
        assert_eq!(
            report.to_json(1_000_123),
            "{\"t\":1.000123,\"end\":1.0,\"asked\":10000000,\"reached\":9000000,\
             \"steps\":[1.000,0.250],\"verified_pages\":5,\"scrubbed_pages\":6,\"wrong_bytes\":0}"
        );
    }
}
