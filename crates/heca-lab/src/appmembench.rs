//! A guest that runs `appmembench`: its image, what to tell it, what it tells.

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::ensure;
use serde::Deserialize;

use crate::guest::{GuestImage, find_appmembench};
use crate::tap::{Tap, lock};

/// What the guest does: it beats, and runs `appmembench` with the words of each line that comes
/// through its second serial port, instead of what it ran before. All that this says goes back.
const INIT: &str = "
/bin/appmembench --idle --heartbeat auto &
/bin/busybox stty -F /dev/ttyS1 raw -echo
exec </dev/ttyS1 >/dev/ttyS1 2>&1
echo '{\"up\":true}'
running=
while read -r words; do
  [ -n \"$running\" ] && kill $running && wait $running
  running=
  if [ -n \"$words\" ]; then
    /bin/appmembench $words &
    running=$!
  fi
done
echo 'appmembench: WRONG end of the second serial port'
sleep 100000
";

/// What the shell says of a program that it was told to end.
const ENDED: &str = "Terminated";

/// One line of figures.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Figures {
    /// When it was written, in seconds of the guest's clock since its program began.
    pub t: f64,
    /// End of the last step, in seconds of the same clock.
    pub end: f64,
    /// Bytes of pages that are to be written each second.
    pub asked: f64,
    /// Bytes of pages that were written in each second.
    pub reached: f64,
    /// For each step of 100 ms: the part of the writes asked for that was done, 0 to 1.
    pub steps: Vec<f64>,
    /// Pages verified so far, before they were written.
    pub verified_pages: u64,
    /// Pages verified so far, all of their bytes.
    pub scrubbed_pages: u64,
    /// Bytes that were wrong so far.
    pub wrong_bytes: u64,
}

/// Figures, and when they came.
#[derive(Debug, Clone)]
pub struct Line {
    /// When the last byte of it came.
    pub at: Instant,
    /// What it says.
    pub figures: Figures,
}

/// The second serial port of a guest that runs `appmembench`.
#[derive(Debug)]
pub struct Appmembench {
    tap: Tap,
    said: Arc<Mutex<Said>>,
}

#[derive(Debug, Default)]
struct Said {
    partial: Vec<u8>,
    up: bool,
    ready: u64,
    lines: Vec<Line>,
    complaints: Vec<String>,
    wrong_bytes_before: u64,
}

impl Said {
    /// A line may begin in one QEMU and end in the next: the bytes are put together as they come.
    fn take(&mut self, at: Instant, bytes: &[u8]) {
        for &byte in bytes {
            if byte == b'\n' {
                let line = String::from_utf8_lossy(&self.partial).trim().to_owned();
                self.partial.clear();
                self.take_line(at, &line);
            } else {
                self.partial.push(byte);
            }
        }
    }

    fn take_line(&mut self, at: Instant, line: &str) {
        if let Ok(figures) = serde_json::from_str::<Figures>(line) {
            self.lines.push(Line { at, figures });
        } else if line.contains("\"up\":true") {
            self.up = true;
        } else if line.contains("\"ready\":true") {
            self.wrong_bytes_before += self.wrong_bytes_now();
            self.lines.clear();
            self.ready += 1;
        } else if !line.is_empty() && line != ENDED {
            self.complaints.push(line.to_owned());
        }
    }

    fn wrong_bytes_now(&self) -> u64 {
        self.lines.last().map_or(0, |line| line.figures.wrong_bytes)
    }
}

impl Appmembench {
    /// Listens on this path.
    ///
    /// # Errors
    /// A path that is in use or too long.
    pub fn listen(path: &Path) -> anyhow::Result<Self> {
        let said = Arc::<Mutex<Said>>::default();
        let sink = said.clone();
        let take = move |_, at, bytes: &[u8]| lock(&sink).take(at, bytes);
        Ok(Self { tap: Tap::new(path, "appmembench", Box::new(take))?, said })
    }

    /// Writes the guest's initial RAM disk.
    ///
    /// # Errors
    /// Programs that are not there.
    pub fn write_image(path: &Path, scratch: &Path) -> anyhow::Result<()> {
        let mut image = GuestImage::new()?;
        image.stripped_program("appmembench", &find_appmembench()?, scratch)?;
        image.write(INIT, path)
    }

    /// The arguments that give QEMU the second serial port.
    #[must_use]
    pub fn qemu_arguments(&self) -> Vec<String> {
        let path = self.tap.path().to_string_lossy().replace(',', ",,");
        let chardev = format!("socket,id=figures,path={path}");
        ["-chardev", &chardev, "-serial", "chardev:figures"].map(str::to_owned).into()
    }

    fn wait(
        &self,
        bound: Duration,
        what: &str,
        done: impl Fn(&Said) -> bool,
    ) -> anyhow::Result<()> {
        let deadline = Instant::now() + bound;
        while !done(&lock(&self.said)) {
            self.check()?;
            ensure!(Instant::now() < deadline, "the guest is not {what} in {} s", bound.as_secs());
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Waits until the guest is up; it does nothing then.
    ///
    /// # Errors
    /// It does not come up in time.
    pub fn wait_up(&self, bound: Duration) -> anyhow::Result<()> {
        self.wait(bound, "up", |said| said.up)
    }

    /// Has the guest run `appmembench` with these arguments, and waits until its memory is filled.
    ///
    /// # Errors
    /// It does not get ready in time.
    pub fn start(&self, arguments: &str, bound: Duration) -> anyhow::Result<()> {
        let before = lock(&self.said).ready;
        self.tap.send(format!("{arguments}\n").as_bytes())?;
        self.wait(bound, "ready", |said| said.ready > before)
    }

    /// Waits until the guest tells of what it did from now on: its memory was verified up to here.
    ///
    /// # Errors
    /// It says nothing in time, or something is wrong.
    pub fn wait_line(&self, bound: Duration) -> anyhow::Result<()> {
        let now = Instant::now();
        // It tells once a second; the line after the next one begins after now.
        self.wait(bound, "done with another second of work", |said| {
            said.lines.iter().rev().take_while(|line| line.at > now).count() > 1
        })?;
        self.check()
    }

    /// Has the guest do nothing.
    ///
    /// # Errors
    /// The guest is gone.
    pub fn stop(&self) -> anyhow::Result<()> {
        self.tap.send(b"\n")
    }

    /// The figures since the program was ready.
    #[must_use]
    pub fn lines(&self) -> Vec<Line> {
        lock(&self.said).lines.clone()
    }

    /// Bytes that were wrong so far, of all programs.
    #[must_use]
    pub fn wrong_bytes(&self) -> u64 {
        let said = lock(&self.said);
        said.wrong_bytes_before + said.wrong_bytes_now()
    }

    /// Bytes that were verified since the program was ready.
    #[must_use]
    pub fn verified_bytes(&self) -> u64 {
        let said = lock(&self.said);
        let pages = said
            .lines
            .last()
            .map_or(0, |line| line.figures.verified_pages + line.figures.scrubbed_pages);
        pages * 4096
    }

    /// Whether all is well in the guest.
    ///
    /// # Errors
    /// Its complaints, or wrong bytes.
    pub fn check(&self) -> anyhow::Result<()> {
        let wrong = self.wrong_bytes();
        let said = lock(&self.said);
        ensure!(said.complaints.is_empty(), "the guest says: {}", said.complaints.join("; "));
        ensure!(wrong == 0, "the guest read {wrong} wrong bytes");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &[u8] =
        b"{\"t\":1.02,\"end\":1.0,\"asked\":10,\"reached\":9,\"steps\":[1.000,0.5],\
        \"verified_pages\":1,\"scrubbed_pages\":2,\"wrong_bytes\":3}\r\n";

    #[test]
    fn lines_are_put_together_and_sorted() {
        let mut said = Said::default();
        let at = Instant::now();
        said.take(at, b"\r\n{\"up\":true}\r\n{\"ready\":true,\"pages\":4,\"asked\":10}\r\n");
        assert_eq!((said.up, said.ready, said.complaints.len()), (true, 1, 0));
        said.take(at, &LINE[..30]);
        said.take(at, &LINE[30..]);
        assert_eq!(said.lines.len(), 1);
        assert_eq!(said.lines[0].figures.steps, [1.0, 0.5]);
        said.take(at, b"appmembench: WRONG page 3\n{\"ready\":true}\n");
        assert_eq!((said.complaints.len(), said.lines.len(), said.wrong_bytes_before), (1, 0, 3));
    }
}
