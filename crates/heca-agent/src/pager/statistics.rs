//! What the engine measures.

use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use heca_api::{Latency, Quantiles, Rates};
use heca_core::pager::Counters;

/// Longest duration that is told apart, in nanoseconds.
const MAX_NS: u64 = 60_000_000_000;
const RATE_PERIOD: Duration = Duration::from_secs(1);

#[derive(Debug)]
struct Timer(Histogram<u64>);

impl Timer {
    fn new() -> Self {
        Self(Histogram::new_with_bounds(1, MAX_NS, 3).expect("constant bounds are valid"))
    }

    fn record(&mut self, duration: Duration) {
        self.0.saturating_record((duration.as_nanos() as u64).max(1));
    }

    fn quantiles(&self) -> Quantiles {
        let us = |ns: u64| ns as f64 / 1000.0;
        Quantiles {
            p50: us(self.0.value_at_quantile(0.5)),
            p99: us(self.0.value_at_quantile(0.99)),
            max: us(self.0.max()),
        }
    }
}

#[derive(Debug, Clone, Copy)]
struct Sample {
    at: Instant,
    faults: u64,
    fetches: u64,
    evictions: u64,
    received: u64,
    sent: u64,
}

/// Latency histograms of remote faults, and rates.
#[derive(Debug)]
pub(super) struct Statistics {
    fault: Timer,
    queue: Timer,
    network: Timer,
    install: Timer,
    /// Time in which a thread waited, without that since `waits`.
    stall: Duration,
    waits: Option<Instant>,
    last: Sample,
    rates: Rates,
}

impl Statistics {
    pub(super) fn new() -> Self {
        let last = Sample {
            at: Instant::now(),
            faults: 0,
            fetches: 0,
            evictions: 0,
            received: 0,
            sent: 0,
        };
        Self {
            fault: Timer::new(),
            queue: Timer::new(),
            network: Timer::new(),
            install: Timer::new(),
            stall: Duration::ZERO,
            waits: None,
            last,
            rates: Rates::default(),
        }
    }

    /// A remote fault ended now.
    pub(super) fn remote_fault(&mut self, seen: Instant, sent: Instant, arrived: Instant) {
        let now = Instant::now();
        self.fault.record(now - seen);
        // A fault that joined a prefetch under way waited in no queue.
        self.queue.record(sent.saturating_duration_since(seen));
        self.network.record(arrived.saturating_duration_since(sent.max(seen)));
        self.install.record(now - arrived);
    }

    /// Whether a thread waits for a page now; told after each round.
    pub(super) fn waited_for(&mut self, now_waits: bool, now: Instant) {
        match (self.waits, now_waits) {
            (Some(since), false) => {
                self.stall += now - since;
                self.waits = None;
            }
            (None, true) => self.waits = Some(now),
            _ => {}
        }
    }

    /// Time in which a thread waited for a page.
    pub(super) fn stall(&self) -> Duration {
        self.stall + self.waits.map_or(Duration::ZERO, |since| since.elapsed())
    }

    pub(super) fn latency(&self) -> Latency {
        Latency {
            count: self.fault.0.len(),
            fault_us: self.fault.quantiles(),
            queue_us: self.queue.quantiles(),
            network_us: self.network.quantiles(),
            install_us: self.install.quantiles(),
        }
    }

    /// Takes a sample if the last one is a period old.
    pub(super) fn sample(&mut self, counters: &Counters, received: u64, sent: u64) {
        let now = Instant::now();
        let seconds = (now - self.last.at).as_secs_f64();
        if seconds < RATE_PERIOD.as_secs_f64() {
            return;
        }
        let next = Sample {
            at: now,
            faults: counters.faults,
            fetches: counters.demand_fetches,
            evictions: counters.punched_pages,
            received,
            sent,
        };
        let rate = |new: u64, old: u64| new.saturating_sub(old) as f64 / seconds;
        self.rates = Rates {
            faults: rate(next.faults, self.last.faults),
            remote_faults: rate(next.fetches, self.last.fetches),
            evictions: rate(next.evictions, self.last.evictions),
            bytes_received: rate(next.received, self.last.received),
            bytes_sent: rate(next.sent, self.last.sent),
        };
        self.last = next;
    }

    pub(super) fn rates(&self) -> Rates {
        self.rates
    }
}
