//! When a read that takes long is asked of a second replica.
//!
//! The delay follows the measured latency of each sponsor: about its 95th percentile, so that one
//! read in twenty is hedged. A budget bounds the extra traffic whatever the latencies do.

use heca_types::limits::{HEDGE_ONE_IN, HEDGE_US};

/// Hedges that may come in a row: after a sponsor fell silent, for what is in flight.
const BURST: f64 = 64.0;
/// Weight of a new sample in the smoothed latency.
const WEIGHT: f64 = 0.05;
/// A sponsor that is asked nothing is forgiven this part of its latency with each tick.
const FORGIVEN: f64 = 0.1;

#[derive(Debug, Clone, Copy)]
struct Estimate {
    mean_us: f64,
    p95_us: f64,
    sampled: bool,
}

/// Latency estimates of a pager's sponsors, and the budget of hedges.
#[derive(Debug, Clone)]
pub struct HedgePolicy {
    estimates: Vec<Estimate>,
    budget: f64,
}

impl HedgePolicy {
    /// A policy without experience: it hedges late.
    #[must_use]
    pub fn new(sponsors: usize) -> Self {
        let mut policy = Self { estimates: Vec::new(), budget: BURST };
        policy.resize(sponsors);
        policy
    }

    /// Makes room for this many sponsors.
    pub fn resize(&mut self, sponsors: usize) {
        let new = Estimate { mean_us: 0.0, p95_us: HEDGE_US.1 as f64 / 4.0, sampled: false };
        self.estimates.resize(sponsors, new);
    }

    /// A sponsor answered a read after `us` microseconds.
    pub fn sample(&mut self, sponsor: u8, us: f64) {
        self.budget = (self.budget + 1.0 / HEDGE_ONE_IN as f64).min(BURST);
        let e = &mut self.estimates[usize::from(sponsor)];
        e.sampled = true;
        e.mean_us = if e.mean_us == 0.0 { us } else { e.mean_us + (us - e.mean_us) * WEIGHT };
        // Stochastic approximation of a quantile: up 19 times as far as down, so that it rests
        // where 19 of 20 samples are below.
        let step = e.p95_us / 256.0;
        e.p95_us += if us > e.p95_us { 19.0 * step } else { -step };
        e.p95_us = e.p95_us.clamp(HEDGE_US.0 as f64, HEDGE_US.1 as f64);
    }

    /// Microseconds after which a read of this sponsor is overdue.
    #[must_use]
    pub fn delay_us(&self, sponsor: u8) -> u64 {
        self.estimates[usize::from(sponsor)].p95_us as u64
    }

    /// Takes one hedge out of the budget, if there is one.
    pub fn may_hedge(&mut self) -> bool {
        let may = self.budget >= 1.0;
        self.budget -= f64::from(u8::from(may));
        may
    }

    /// About every 100 ms: the smoothed latency of a sponsor, in microseconds. One that was asked
    /// nothing since is forgiven a little each time, so that it is tried again some day.
    pub fn tick(&mut self, sponsor: u8) -> u32 {
        let e = &mut self.estimates[usize::from(sponsor)];
        if !std::mem::take(&mut e.sampled) {
            e.mean_us *= 1.0 - FORGIVEN;
        }
        e.mean_us as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_delay_settles_where_one_read_in_twenty_is_above() {
        let mut policy = HedgePolicy::new(1);
        // A shuffled ramp from 400 to 1400 us: its 95th percentile is 1350.
        for i in 0..200_000u64 {
            policy.sample(0, 400.0 + (i * 7919 % 1000) as f64);
        }
        let delay = policy.delay_us(0);
        assert!((1250..1400).contains(&delay), "{delay}");
    }

    #[test]
    fn extra_traffic_is_bounded() {
        let mut policy = HedgePolicy::new(2);
        let mut hedged = 0;
        for _ in 0..10_000 {
            policy.sample(0, 1000.0);
            hedged += u64::from(policy.may_hedge());
        }
        assert!(hedged <= 10_000 / HEDGE_ONE_IN + BURST as u64, "{hedged}");
    }

    #[test]
    fn a_slow_sponsor_is_forgiven_when_it_is_not_asked() {
        let mut policy = HedgePolicy::new(2);
        policy.sample(0, 5000.0);
        assert_eq!(policy.tick(0), 5000);
        for _ in 0..50 {
            policy.tick(0);
        }
        assert!(policy.tick(0) < 50);
    }
}
