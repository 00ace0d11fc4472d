//! How a guest's performance went over time.
//!
//! The guest tells of its steps by its own clock, which stands still while it is moved. A line of
//! figures comes as soon as it is written: so each line says how the two clocks stand to each other.

use std::time::Instant;

use heca_lab::Line;

/// Length of a guest's steps and of a curve's, in seconds.
pub(super) const STEP_S: f64 = 0.1;

/// A step of the guest, by the host's clock in seconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Step {
    from: f64,
    to: f64,
    part: f64,
}

/// Seconds from one moment to another, negative if it was before.
pub(super) fn seconds(from: Instant, to: Instant) -> f64 {
    match to.checked_duration_since(from) {
        Some(after) => after.as_secs_f64(),
        None => -from.duration_since(to).as_secs_f64(),
    }
}

/// The steps of all lines, by the host's clock; zero is `base`. Where the guest stopped to be moved
/// between two lines, the steps before that are placed by the clocks as the line before found them.
pub(super) fn steps(lines: &[Line], stops: &[Instant], base: Instant) -> Vec<Step> {
    let mut steps = Vec::new();
    let mut before: Option<(f64, f64)> = None;
    for line in lines {
        let at = seconds(base, line.at);
        let offset = at - line.figures.t;
        let moved = before.and_then(|(last_at, last_offset)| {
            let mut stops = stops.iter().map(|&stop| seconds(base, stop));
            let stop = stops.rfind(|stop| (last_at..at).contains(stop))?;
            Some((stop, last_offset))
        });
        let count = line.figures.steps.len();
        for (position, &part) in line.figures.steps.iter().enumerate() {
            let end = line.figures.end - (count - 1 - position) as f64 * STEP_S;
            let offset = match moved {
                Some((stop, earlier)) if end + earlier <= stop => earlier,
                _ => offset,
            };
            steps.push(Step { from: end + offset - STEP_S, to: end + offset, part });
        }
        before = Some((at, offset));
    }
    steps
}

/// Mean performance in each tenth of a second from a time on. Time that no step covers, between two
/// that do, is time in which the guest did not run. None before the first and after the last step.
pub(super) fn resample(steps: &[Step], from: f64, count: usize) -> Vec<Option<f64>> {
    let (Some(first), Some(last)) = (steps.first(), steps.last()) else { return vec![None; count] };
    (0..count)
        .map(|bin| {
            let begin = from + bin as f64 * STEP_S;
            let end = begin + STEP_S;
            if begin < first.from || end > last.to {
                return None;
            }
            let covered = |step: &Step| (step.to.min(end) - step.from.max(begin)).max(0.0);
            let done: f64 = steps.iter().map(|step| covered(step) * step.part).sum();
            Some((done / STEP_S).min(1.0))
        })
        .collect()
}

/// Mean of the known values.
pub(super) fn mean(values: impl IntoIterator<Item = Option<f64>>) -> Option<f64> {
    let known: Vec<f64> = values.into_iter().flatten().collect();
    (!known.is_empty()).then(|| known.iter().sum::<f64>() / known.len() as f64)
}

/// The middle of several curves, where any is known.
pub(super) fn middle(curves: &[Vec<Option<f64>>]) -> Vec<Option<f64>> {
    let count = curves.iter().map(Vec::len).max().unwrap_or(0);
    (0..count)
        .map(|bin| {
            let known: Vec<f64> =
                curves.iter().filter_map(|curve| curve.get(bin).copied().flatten()).collect();
            (!known.is_empty()).then(|| crate::bench::median(known))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use heca_lab::Figures;

    use super::*;

    fn line(base: Instant, at: f64, t: f64, steps: &[f64]) -> Line {
        let figures = Figures {
            t,
            end: t,
            asked: 1.0,
            reached: 1.0,
            steps: steps.to_vec(),
            verified_pages: 0,
            scrubbed_pages: 0,
            wrong_bytes: 0,
        };
        Line { at: base + Duration::from_secs_f64(at), figures }
    }

    fn close(value: Option<f64>, expected: f64) -> bool {
        value.is_some_and(|value| (value - expected).abs() < 1e-6)
    }

    #[test]
    fn a_gap_is_time_without_performance() {
        let base = Instant::now();
        // The guest stands still from 11.5 to 11.8: its clock is 0.3 s late afterwards.
        let lines = [line(base, 11.0, 1.0, &[1.0; 10]), line(base, 12.3, 2.0, &[1.0; 10])];
        let stop = base + Duration::from_secs_f64(11.5001);
        let steps = steps(&lines, &[stop], base);
        let curve = resample(&steps, 10.0, 24);
        assert!(close(curve[0], 1.0) && close(curve[14], 1.0), "{curve:?}");
        let sum: f64 = curve.iter().flatten().sum();
        assert!((sum - 20.0).abs() < 0.01, "{sum} of 20 steps");
        assert!(close(curve[22], 1.0) && curve[23].is_none(), "{curve:?}");
        assert!(curve[15..18].iter().all(|&part| close(part, 0.0)), "{curve:?}");
    }

    #[test]
    fn steps_are_spread_over_the_curve() {
        let base = Instant::now();
        let lines = [line(base, 0.25, 0.2, &[1.0, 0.0])];
        let steps = steps(&lines, &[], base);
        assert_eq!(steps.len(), 2);
        let curve = resample(&steps, 0.0, 4);
        assert!(curve[0].is_none(), "it begins in the middle of the first bin");
        assert!(close(curve[1], 0.5), "{curve:?}");
        assert!(resample(&[], 0.0, 2).iter().all(Option::is_none));
    }

    #[test]
    fn curves_are_joined_where_they_are_known() {
        let joined =
            middle(&[vec![Some(1.0), None], vec![Some(3.0), Some(5.0)], vec![Some(2.0), None]]);
        assert_eq!(joined, [Some(2.0), Some(5.0)]);
        assert_eq!(mean([Some(1.0), None, Some(3.0)]), Some(2.0));
        assert_eq!(mean([None]), None);
    }

    #[test]
    fn moments_before_are_negative() {
        let base = Instant::now();
        let later = base + Duration::from_secs(2);
        assert!((seconds(later, base) + 2.0).abs() < 1e-9);
    }
}
