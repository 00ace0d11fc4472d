//! Keeps idle processors from falling into deep sleep while requests come in quick succession.
//!
//! On virtual machines and on machines with deep idle states, waking a sleeping core takes longer
//! than everything else in a remote fault together. While the path is hot the kernel's latency
//! limit is held at its minimum; when it is idle the limit is given back.

use std::fs::File;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// Requests within one period that make the path hot.
const HOT_REQUESTS: u64 = 8;
const PERIOD: Duration = Duration::from_millis(20);
/// Quiet periods before the limit is given back.
const QUIET_PERIODS: u32 = 10;

/// Counts requests; a thread of its own holds and releases the limit.
#[derive(Debug, Clone)]
pub struct LatencyHint {
    requests: Arc<AtomicU64>,
    held: Arc<AtomicBool>,
}

impl LatencyHint {
    /// Starts the thread.
    ///
    /// # Errors
    /// Those of starting a thread.
    pub fn start() -> std::io::Result<Self> {
        let hint = Self { requests: Arc::default(), held: Arc::default() };
        let (requests, held) = (hint.requests.clone(), hint.held.clone());
        std::thread::Builder::new().name("latency".into()).spawn(move || {
            let mut limit: Option<File> = None;
            let (mut seen, mut quiet) = (0, 0);
            loop {
                std::thread::sleep(PERIOD);
                // The last handle is gone, apart from ours.
                if Arc::strong_count(&requests) == 1 {
                    return;
                }
                let now = requests.load(Ordering::Relaxed);
                let hot = now - seen >= HOT_REQUESTS;
                seen = now;
                quiet = if hot { 0 } else { quiet + 1 };
                if hot && limit.is_none() {
                    limit = hold();
                } else if quiet >= QUIET_PERIODS {
                    limit = None;
                }
                held.store(limit.is_some(), Ordering::Relaxed);
            }
        })?;
        Ok(hint)
    }

    /// Notes requests.
    pub fn note(&self, requests: u64) {
        self.requests.fetch_add(requests, Ordering::Relaxed);
    }

    /// Whether the limit is held now.
    #[must_use]
    pub fn is_held(&self) -> bool {
        self.held.load(Ordering::Relaxed)
    }
}

/// The limit holds as long as the file is open. Without the right to it faults are just slower.
#[must_use]
pub fn hold() -> Option<File> {
    let mut file = File::options().write(true).open("/dev/cpu_dma_latency").ok()?;
    file.write_all(&0i32.to_ne_bytes()).ok()?;
    Some(file)
}
