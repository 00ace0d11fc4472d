//! What `heca hammer` in a guest says on the serial console.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::Deserialize;

#[derive(Debug, Clone, Copy, Deserialize)]
struct Report {
    verified_bytes: u64,
    wrong: u64,
    longest_stall_ms_since_last: f64,
}

/// One report of the guest.
#[derive(Debug, Clone, Copy)]
pub struct Sample {
    /// When it was read here.
    pub at: Instant,
    /// Bytes that the guest verified so far.
    pub verified_bytes: u64,
    /// Bytes that were wrong so far.
    pub wrong_bytes: u64,
    /// Longest time between two accesses to memory since the last report, in milliseconds.
    pub stall_ms: f64,
}

/// Follows the log of a serial console.
#[derive(Debug)]
pub struct Console {
    path: PathBuf,
    offset: u64,
    partial: String,
    samples: Vec<Sample>,
    /// Words of the guest that tell of trouble.
    complaints: Vec<String>,
}

impl Console {
    /// Follows this file, from its beginning.
    #[must_use]
    pub fn new(path: &Path) -> Self {
        let (partial, samples, complaints) = (String::new(), Vec::new(), Vec::new());
        Self { path: path.to_owned(), offset: 0, partial, samples, complaints }
    }

    /// Reads what is new.
    pub fn poll(&mut self) {
        let mut bytes = Vec::new();
        let read = File::open(&self.path).and_then(|mut file| {
            file.seek(SeekFrom::Start(self.offset))?;
            file.read_to_end(&mut bytes)
        });
        if read.is_err() {
            return;
        }
        self.offset += bytes.len() as u64;
        self.partial.push_str(&String::from_utf8_lossy(&bytes));
        let Some(end) = self.partial.rfind('\n') else { return };
        let rest = self.partial.split_off(end + 1);
        let complete = std::mem::replace(&mut self.partial, rest);
        for line in complete.lines() {
            self.take_line(line.trim());
        }
    }

    fn take_line(&mut self, line: &str) {
        let report = line.strip_prefix("hammer: ").map(serde_json::from_str::<Report>);
        if let Some(Ok(report)) = report {
            self.samples.push(Sample {
                at: Instant::now(),
                verified_bytes: report.verified_bytes,
                wrong_bytes: report.wrong,
                stall_ms: report.longest_stall_ms_since_last,
            });
        } else if ["WRONG", "panic", "Oops", "BUG:", "SIGBUS", "Bus error", "hammer ended"]
            .iter()
            .any(|mark| line.contains(mark))
        {
            self.complaints.push(line.to_owned());
        }
    }

    /// All reports so far.
    #[must_use]
    pub fn samples(&self) -> &[Sample] {
        &self.samples
    }

    /// The newest report.
    #[must_use]
    pub fn last(&self) -> Option<&Sample> {
        self.samples.last()
    }

    /// Lines that tell of trouble in the guest.
    #[must_use]
    pub fn complaints(&self) -> &[String] {
        &self.complaints
    }

    /// Longest pause of the guest among the reports from this one on.
    #[must_use]
    pub fn longest_stall_ms(&self, from: usize) -> f64 {
        let stalls = self.samples.iter().skip(from).map(|sample| sample.stall_ms);
        stalls.fold(0.0, f64::max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_and_complaints_are_found() {
        let mut console = Console::new(Path::new("/nonexistent"));
        console.take_line(
            r#"hammer: {"t":1.0,"verified_bytes":4096,"wrong":0,"longest_stall_ms_since_last":7.5}"#,
        );
        console.take_line("hammer: 10 pages written, 2 threads begin");
        console.take_line("hammer: WRONG page 3: all zeros");
        assert_eq!(console.samples().len(), 1);
        assert!((console.longest_stall_ms(0) - 7.5).abs() < 1e-9);
        assert_eq!(console.complaints().len(), 1);
    }
}
