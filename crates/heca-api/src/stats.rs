//! Figures of a pager.

use heca_core::pager::{Counters, Gauges};
use serde::{Deserialize, Serialize};

/// Distribution of a duration, in microseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Quantiles {
    /// Median.
    pub p50: f64,
    /// 99 of 100 are not longer.
    pub p99: f64,
    /// Longest.
    pub max: f64,
}

/// Remote faults from the moment the pager sees them until the thread may go on, and the parts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Latency {
    /// Number of remote faults measured.
    pub count: u64,
    /// Whole way.
    pub fault_us: Quantiles,
    /// From seeing the fault to sending the request: waiting for a free frame, above all.
    pub queue_us: Quantiles,
    /// From the request to the reply.
    pub network_us: Quantiles,
    /// Checking the reply and installing the page.
    pub install_us: Quantiles,
}

/// Counts per second, over the last second or so.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "each name says what is counted")]
pub struct Rates {
    pub faults: f64,
    pub remote_faults: f64,
    pub evictions: f64,
    pub bytes_received: f64,
    pub bytes_sent: f64,
}

/// One sponsor as the pager sees it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SponsorStats {
    /// `HOST:PORT`.
    pub address: String,
    /// Whether it can be reached.
    pub up: bool,
    /// Why it cannot, if it cannot.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub down_reason: Option<String>,
    /// Whether it wants to be rid of what it holds: it is drained, or short of memory.
    #[serde(default)]
    pub leaving: bool,
    /// Extents that it holds a replica of.
    pub extents: u32,
    /// Part of all extent replicas, 0 to 1.
    pub share: f64,
    /// Pages fetched from it.
    pub pages_fetched: u64,
    /// Pages that it acknowledged.
    pub pages_stored: u64,
    /// Bytes received from it, frames included.
    pub bytes_received: u64,
    /// Bytes sent to it, frames included.
    pub bytes_sent: u64,
}

/// Everything that a pager tells about itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PagerStats {
    /// Name of the VM, or of the attached process.
    pub name: String,
    /// Process whose memory is paged.
    pub pid: i32,
    /// Replicas of each extent.
    pub replicas: usize,
    /// How pages are taken from the guest: `pageout`, `uring` or `write-protect`.
    pub eviction: String,
    /// Seconds since the pager began.
    pub uptime_s: f64,
    /// How long the process's main thread was held while attaching, in microseconds.
    pub attach_stopped_us: f64,
    /// Where the pages are now.
    pub gauges: Gauges,
    /// Pages of the guest that were written since they were last stored, or were never stored;
    /// `None` where the kernel cannot tell.
    pub dirty_pages: Option<u64>,
    /// Whether this pager went on where a former one ended.
    #[serde(default)]
    pub resumed: bool,
    /// Why the region may not be used any more: it has a newer owner.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fenced: Option<String>,
    /// For each sponsor, after how many microseconds a read is asked of another one, too.
    #[serde(default)]
    pub hedge_us: Vec<u64>,
    /// Largest number of pages that were only on sponsors at a time.
    pub remote_pages_peak: u64,
    /// Counts since the start.
    pub counters: Counters,
    /// Latency of remote faults since the start.
    pub latency: Latency,
    /// Time in which at least one thread of the guest waited for a page, in seconds.
    #[serde(default)]
    pub stall_s: f64,
    /// Counts per second.
    pub rates: Rates,
    /// The sponsors, in the order of the command line.
    pub sponsors: Vec<SponsorStats>,
    /// Processor time that the pager used, in seconds.
    pub cpu_s: f64,
}
