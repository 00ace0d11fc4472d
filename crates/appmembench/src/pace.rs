//! How many pages are due, and what part of them was written in time.

/// Length of a step, in microseconds.
pub const STEP_US: u64 = 100_000;
/// How far ahead of time pages are due, so that a step is full when it ends although the writer
/// sleeps between its writes.
const LEAD_US: u64 = 2_000;

/// The pace of a writer. All times are microseconds since its start.
///
/// What was not written within its step is not due any more, so no step can make good for another.
#[derive(Debug)]
pub struct Pace {
    pages_per_s: f64,
    step: u64,
    written: u64,
}

impl Pace {
    /// A pace that begins with the next step.
    pub fn new(pages_per_s: f64, now_us: u64) -> Self {
        Self { pages_per_s, step: now_us.div_ceil(STEP_US), written: 0 }
    }

    /// Pages that the step asks for. Fractions are spread over the steps.
    fn quota(&self, step: u64) -> u64 {
        let until = |step: u64| (self.pages_per_s * (step * STEP_US) as f64 / 1e6) as u64;
        until(step + 1) - until(step)
    }

    /// Ends the steps that are over: tells for each what part of its pages was written, 0 to 1.
    pub fn advance(&mut self, now_us: u64, mut ended: impl FnMut(f64)) {
        while self.step < now_us / STEP_US {
            let quota = self.quota(self.step);
            ended(if quota == 0 { 1.0 } else { (self.written as f64 / quota as f64).min(1.0) });
            self.written = 0;
            self.step += 1;
        }
    }

    /// Pages that should have been written by now within this step, and were not.
    pub fn due(&self, now_us: u64) -> u64 {
        let into = (now_us + LEAD_US).saturating_sub(self.step * STEP_US).min(STEP_US);
        let wanted = (self.quota(self.step) * into).div_ceil(STEP_US);
        wanted.saturating_sub(self.written)
    }

    /// Counts written pages.
    pub fn wrote(&mut self, pages: u64) {
        self.written += pages;
    }

    /// End of the last step that is over.
    pub fn ended_us(&self) -> u64 {
        self.step * STEP_US
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(pace: &mut Pace, now_us: u64) -> Vec<f64> {
        let mut parts = Vec::new();
        pace.advance(now_us, |part| parts.push(part));
        parts
    }

    #[test]
    fn a_step_is_full_if_all_was_written() {
        let mut pace = Pace::new(1000.0, 0);
        assert_eq!(pace.due(48_000), 50);
        pace.wrote(50);
        assert_eq!((pace.due(48_000), pace.due(98_000), pace.due(100_000)), (0, 50, 50));
        pace.wrote(50);
        assert_eq!(ended(&mut pace, 100_000), [1.0]);
        assert_eq!(pace.due(100_000), 2);
    }

    #[test]
    fn what_was_missed_is_not_made_good() {
        let mut pace = Pace::new(1000.0, 0);
        pace.wrote(25);
        assert_eq!(ended(&mut pace, 350_000), [0.25, 0.0, 0.0]);
        assert_eq!(pace.due(348_000), 50, "this step's, not those of the steps before");
        pace.wrote(400);
        assert_eq!(ended(&mut pace, 400_000), [1.0], "never more than all");
        assert_eq!(pace.ended_us(), 400_000);
    }

    #[test]
    fn slow_paces_are_spread() {
        let mut pace = Pace::new(2.5, 0);
        let mut written = 0;
        for ms in 0..10_000 {
            pace.advance(ms * 1000, |part| assert!((part - 1.0).abs() < 1e-9));
            let due = pace.due(ms * 1000);
            pace.wrote(due);
            written += due;
        }
        assert!((24..=25).contains(&written), "{written}");
        let mut late = Pace::new(1000.0, 70_000);
        assert_eq!((ended(&mut late, 130_000).len(), late.due(70_000)), (0, 0));
        assert_eq!(ended(&mut Pace::new(0.0, 0), 100_000), [1.0]);
    }
}
