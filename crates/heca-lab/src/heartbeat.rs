//! The heartbeat of a guest, as seen from outside: when it did not run, and for how long.

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::tap::{Tap, lock};

/// One byte of the heartbeat.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tick {
    /// When it came.
    pub at: Instant,
    /// The connection that it came over: each QEMU has one, and they count up.
    pub connection: u64,
    /// Its number, modulo 256.
    pub number: u8,
}

/// How long a guest stood still around a switch from one QEMU to another.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Gap {
    /// From the last tick of the one to the first of the other, in milliseconds; none if the ticks
    /// all came from one.
    pub across_ms: Option<f64>,
    /// The longest time between two ticks from the switch on, in milliseconds, the switch included.
    pub longest_ms: f64,
    /// Ticks that never came.
    pub lost: u64,
    /// Ticks that came twice, or out of order.
    pub doubled: u64,
}

impl Gap {
    /// The longer of both, in milliseconds: what the guest's users saw.
    #[must_use]
    pub fn ms(&self) -> f64 {
        self.across_ms.unwrap_or(0.0).max(self.longest_ms)
    }
}

/// Listens for the heartbeat that `appmembench --heartbeat` sends through a device of its guest.
/// Needs 32 bytes for each tick, 16 kB for each second.
#[derive(Debug)]
pub struct Heartbeat {
    tap: Tap,
    ticks: Arc<Mutex<Vec<Tick>>>,
    since: Instant,
}

/// How long after the switch of a guest its pauses are still put down to the migration.
pub const AFTER_SWITCH: Duration = Duration::from_secs(2);

impl Heartbeat {
    /// Listens on this path.
    ///
    /// # Errors
    /// A path that is in use or too long.
    pub fn listen(path: &Path) -> anyhow::Result<Self> {
        let ticks = Arc::<Mutex<Vec<Tick>>>::default();
        let sink = ticks.clone();
        let take = move |connection, at, bytes: &[u8]| {
            let new = bytes.iter().map(|&number| Tick { at, connection, number });
            lock(&sink).extend(new);
        };
        Ok(Self { tap: Tap::new(path, "heartbeat", Box::new(take))?, ticks, since: Instant::now() })
    }

    /// The arguments that give QEMU the device.
    #[must_use]
    pub fn qemu_arguments(&self) -> Vec<String> {
        let path = self.tap.path().to_string_lossy().replace(',', ",,");
        let chardev = format!("socket,id=tick,path={path}");
        ["-chardev", &chardev, "-device", "pci-serial,chardev=tick"].map(str::to_owned).into()
    }

    /// How long it has been listening.
    #[must_use]
    pub fn age(&self) -> Duration {
        self.since.elapsed()
    }

    /// Number of ticks so far.
    #[must_use]
    pub fn count(&self) -> usize {
        lock(&self.ticks).len()
    }

    /// The newest tick.
    #[must_use]
    pub fn last(&self) -> Option<Tick> {
        lock(&self.ticks).last().copied()
    }

    /// The ticks of a time.
    #[must_use]
    pub fn ticks(&self, from: Instant, to: Instant) -> Vec<Tick> {
        let ticks = lock(&self.ticks);
        let first = ticks.partition_point(|tick| tick.at < from);
        let end = ticks.partition_point(|tick| tick.at <= to);
        ticks.get(first..end).unwrap_or_default().to_vec()
    }

    /// The longest time without a tick; the ends of the time count as ticks.
    #[must_use]
    pub fn longest_gap(&self, from: Instant, to: Instant) -> Duration {
        let ticks = self.ticks(from, to);
        let times: Vec<Instant> = std::iter::once(from)
            .chain(ticks.iter().map(|tick| tick.at))
            .chain(std::iter::once(to))
            .collect();
        times.windows(2).map(|pair| pair[1].duration_since(pair[0])).max().unwrap_or_default()
    }

    /// How long the guest stood still in a migration that began and ended at these times. Look a
    /// little more than [`AFTER_SWITCH`] after its end, so that the ticks are there.
    #[must_use]
    pub fn gap(&self, begun: Instant, ended: Instant) -> Option<Gap> {
        gap_of(&self.ticks(begun, ended + AFTER_SWITCH), ended)
    }

    /// When the last tick came over one connection, and the first over the next.
    #[must_use]
    pub fn switch(&self, begun: Instant, ended: Instant) -> Option<(Instant, Instant)> {
        let ticks = self.ticks(begun, ended + AFTER_SWITCH);
        switch_of(&ticks).map(|position| (ticks[position - 1].at, ticks[position].at))
    }
}

/// Position of the first tick of another connection.
fn switch_of(ticks: &[Tick]) -> Option<usize> {
    ticks.windows(2).position(|pair| pair[0].connection != pair[1].connection).map(|i| i + 1)
}

fn gap_of(ticks: &[Tick], ended: Instant) -> Option<Gap> {
    if ticks.len() < 2 {
        return None;
    }
    let ms = |from: &Tick, to: &Tick| to.at.duration_since(from.at).as_secs_f64() * 1e3;
    let switch = switch_of(ticks);
    // Without a switch the guest is where it was: all of the time counts.
    let first = switch.map_or(0, |switch| switch - 1);
    let until = switch.map_or(ended, |switch| ticks[switch].at) + AFTER_SWITCH;
    let after = ticks[first..].windows(2).take_while(|pair| pair[0].at <= until);
    let longest_ms = after.map(|pair| ms(&pair[0], &pair[1])).fold(0.0, f64::max);
    let mut gap = Gap {
        across_ms: switch.map(|switch| ms(&ticks[switch - 1], &ticks[switch])),
        longest_ms,
        lost: 0,
        doubled: 0,
    };
    for pair in ticks.windows(2) {
        match pair[1].number.wrapping_sub(pair[0].number) {
            1 => {}
            0 | 128.. => gap.doubled += 1,
            step => gap.lost += u64::from(step) - 1,
        }
    }
    Some(gap)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use super::*;

    fn tick(base: Instant, ms: u64, connection: u64, number: u8) -> Tick {
        Tick { at: base + Duration::from_millis(ms), connection, number }
    }

    #[test]
    fn the_gap_is_the_longer_of_the_switch_and_what_follows() {
        let base = Instant::now();
        let mut ticks: Vec<Tick> = (0..50).map(|i| tick(base, i * 2, 1, i as u8)).collect();
        // A pause before the switch is the pre-copy's, not the switch's.
        ticks.iter_mut().skip(20).for_each(|tick| tick.at += Duration::from_millis(500));
        ticks.push(tick(base, 630, 2, 50));
        ticks.push(tick(base, 632, 2, 51));
        let ended = base + Duration::from_millis(700);
        let gap = gap_of(&ticks, ended).expect("ticks");
        assert!((gap.across_ms.expect("a switch") - 32.0).abs() < 1e-6);
        assert!((gap.ms() - 32.0).abs() < 1e-6);
        ticks.push(tick(base, 900, 2, 52));
        let gap = gap_of(&ticks, ended).expect("ticks");
        assert!((gap.ms() - 268.0).abs() < 1e-6, "a pause after the switch counts");
        ticks.push(tick(base, 5000, 2, 53));
        ticks.push(tick(base, 9000, 2, 54));
        let gap = gap_of(&ticks, ended).expect("ticks");
        assert!((gap.ms() - 4100.0).abs() < 1e-6, "one that begins in time counts, later ones not");
        assert_eq!((gap.lost, gap.doubled), (0, 0));
    }

    #[test]
    fn lost_and_doubled_ticks_are_counted() {
        let base = Instant::now();
        let numbers = [254u8, 255, 0, 3, 3, 4, 2, 3];
        let ticks: Vec<Tick> =
            numbers.iter().zip(0..).map(|(&number, i)| tick(base, i, 1, number)).collect();
        let gap = gap_of(&ticks, base).expect("ticks");
        assert_eq!((gap.lost, gap.doubled, gap.across_ms), (2, 2, None));
        assert_eq!(gap_of(&ticks[..1], base), None);
    }

    #[test]
    fn ticks_of_all_connections_are_taken_in_their_order() -> anyhow::Result<()> {
        let path = std::env::temp_dir().join(format!("heca-tick-{}", std::process::id()));
        let heartbeat = Heartbeat::listen(&path)?;
        let begun = Instant::now();
        let wait = |count: usize| {
            while heartbeat.count() < count {
                assert!(begun.elapsed() < Duration::from_secs(10), "{}", heartbeat.count());
                std::thread::sleep(Duration::from_millis(1));
            }
        };
        let mut source = UnixStream::connect(&path)?;
        let mut target = UnixStream::connect(&path)?;
        source.write_all(&[1])?;
        wait(1);
        source.write_all(&[2])?;
        wait(2);
        drop(source);
        std::thread::sleep(Duration::from_millis(30));
        target.write_all(&[3])?;
        wait(3);
        heartbeat.tap.send(b"!")?;
        let ended = Instant::now();
        let gap = heartbeat.gap(begun, ended).expect("ticks");
        assert!(gap.across_ms.expect("a switch") >= 29.0, "{gap:?}");
        assert_eq!((gap.lost, gap.doubled), (0, 0));
        assert!(heartbeat.longest_gap(begun, ended) >= Duration::from_millis(29));
        assert!(heartbeat.switch(begun, ended).is_some());
        drop(heartbeat);
        assert!(!path.exists());
        Ok(())
    }
}
