//! Two hosts that a guest goes between, and two that sponsor it.

use std::io::Read;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use heca_api::{MIGRATION_PORT, MigrationInfo, MigrationMode, MigrationPhase, VmState};
use heca_lab::{AFTER_SWITCH, Appmembench, Gap, Heartbeat, Lab, MeasuredGuest, start_moving_hosts};
use heca_types::ByteSize;
use rustix::process::{Pid, Signal, kill_process};

use super::MigrateArguments;

/// Hosts that sponsor.
const SPONSORS: [usize; 2] = [3, 4];
/// Longest time for the guest to fill its memory, or to become small.
const START: Duration = Duration::from_secs(180);
/// Longest time for a migration that is told to end to do so.
const GRACE: Duration = Duration::from_secs(20);
const LOOK: Duration = Duration::from_millis(10);

/// What was seen of one migration.
#[derive(Debug, Clone)]
pub(super) struct Seen {
    pub(super) begun: Instant,
    pub(super) ended: Instant,
    /// The last tick before the switch, and the first after it.
    pub(super) switch: Option<(Instant, Instant)>,
    pub(super) gap: Option<Gap>,
    /// What the agent says; none if it said nothing that can be read.
    pub(super) info: Option<MigrationInfo>,
    /// Why it does not count.
    pub(super) problem: Option<String>,
    /// Bytes that the guest found wrong meanwhile.
    pub(super) wrong_bytes: u64,
}

/// The guest of the moment.
#[derive(Debug)]
struct Guest {
    name: String,
    at: usize,
    heartbeat: Heartbeat,
    appmembench: Appmembench,
}

/// The hosts, and the guest on one of the first two.
#[derive(Debug)]
pub(super) struct Rig {
    guest: Option<Guest>,
    guests: usize,
    /// Bytes that the guests before found wrong.
    wrong_bytes: u64,
    /// Bytes that they verified.
    verified_bytes: u64,
    memory: ByteSize,
    qemu: PathBuf,
    qemu_downtime: String,
    initrd: PathBuf,
    interrupted: Arc<AtomicBool>,
    /// After the rest, so that it goes last.
    lab: Lab,
}

impl Rig {
    pub(super) fn new(
        memory: ByteSize,
        qemu: PathBuf,
        arguments: &MigrateArguments,
        interrupted: Arc<AtomicBool>,
    ) -> anyhow::Result<Self> {
        let mut lab = Lab::new(4)?;
        for number in 1..=4 {
            lab.set_rate(number, Some(arguments.link_mbit))?;
        }
        start_moving_hosts(&mut lab, 4, ByteSize(memory.0 * 2), None)?;
        let initrd = lab.dir().join("initrd");
        Appmembench::write_image(&initrd, lab.dir())?;
        Ok(Self {
            guest: None,
            guests: 0,
            wrong_bytes: 0,
            verified_bytes: 0,
            memory,
            qemu,
            qemu_downtime: arguments.qemu_downtime.clone(),
            initrd,
            interrupted,
            lab,
        })
    }

    /// Lets time pass.
    pub(super) fn pass(&self, time: Duration) -> anyhow::Result<()> {
        let until = Instant::now() + time;
        loop {
            ensure!(!self.interrupted.load(Ordering::Relaxed), "interrupted");
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            std::thread::sleep(left.min(Duration::from_millis(50)));
        }
    }

    fn guest(&self) -> anyhow::Result<&Guest> {
        self.guest.as_ref().context("no guest runs")
    }

    /// Starts a guest that is idle, in place of the one before.
    pub(super) fn start_guest(&mut self, local: ByteSize) -> anyhow::Result<()> {
        self.stop_guest();
        self.guests += 1;
        let number = self.guests;
        let socket = |kind: &str| self.lab.dir().join(format!("{kind}{number}.sock"));
        let guest = Guest {
            name: format!("guest{number}"),
            at: 1,
            heartbeat: Heartbeat::listen(&socket("tick"))?,
            appmembench: Appmembench::listen(&socket("figures"))?,
        };
        let start = MeasuredGuest {
            name: &guest.name,
            memory: self.memory,
            local,
            sponsors: &SPONSORS,
            encrypt: false,
            qemu: Some(&self.qemu),
            initrd: &self.initrd,
        };
        start.start(&mut self.lab, guest.at, &guest.heartbeat, &guest.appmembench)?;
        self.guest = Some(guest);
        Ok(())
    }

    /// Ends the guest, wherever it is.
    pub(super) fn stop_guest(&mut self) {
        let Some(guest) = self.guest.take() else { return };
        self.wrong_bytes += guest.appmembench.wrong_bytes();
        self.verified_bytes += guest.appmembench.verified_bytes();
        for host in [1, 2] {
            if self.lab.host(host).vm(&guest.name).is_ok() {
                let _ = self.lab.host(host).heca(&["vm", "stop", &guest.name, "--now"]);
            }
        }
    }

    /// Has the guest run `appmembench` with these arguments, and waits until it writes.
    pub(super) fn load(&self, arguments: &str) -> anyhow::Result<()> {
        self.guest()?.appmembench.start(arguments, START)
    }

    /// Figures of the guest so far.
    pub(super) fn lines(&self) -> Vec<heca_lab::Line> {
        self.guest.as_ref().map(|guest| guest.appmembench.lines()).unwrap_or_default()
    }

    /// Bytes that guests found wrong so far.
    pub(super) fn wrong_bytes(&self) -> u64 {
        let now = self.guest.as_ref().map_or(0, |guest| guest.appmembench.wrong_bytes());
        self.wrong_bytes + now
    }

    /// Bytes that guests verified that are gone.
    pub(super) fn verified_bytes(&self) -> u64 {
        self.verified_bytes
    }

    /// Waits until the guest tells of a second of work that began after now: its program may be dead
    /// while its heartbeat is not.
    pub(super) fn wait_for_work(&self) -> anyhow::Result<()> {
        let now = Instant::now();
        while self.lines().iter().filter(|line| line.at > now).count() < 2 {
            ensure!(now.elapsed() < GRACE, "the guest beats, but its program tells nothing");
            self.pass(Duration::from_millis(50))?;
        }
        Ok(())
    }

    /// Whether the guest beats.
    pub(super) fn is_alive(&self) -> bool {
        let last = self.guest.as_ref().and_then(|guest| guest.heartbeat.last());
        last.is_some_and(|tick| tick.at.elapsed() < Duration::from_secs(1))
    }

    /// Makes the guest's local budget small and waits until its memory is on sponsors.
    pub(super) fn shrink(&mut self, local: ByteSize) -> anyhow::Result<()> {
        let (name, at) = self.guest().map(|guest| (guest.name.clone(), guest.at))?;
        let budget = local.0.to_string();
        self.lab.host(at).heca_ok(&["vm", "resize", &name, "--local", &budget])?;
        let deadline = Instant::now() + START;
        loop {
            let gauges = self.lab.host(at).vm(&name)?.pager.map(|pager| pager.gauges);
            if gauges.is_some_and(|gauges| gauges.local_pages <= local.pages()) {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "{name} does not become smaller");
            self.pass(Duration::from_millis(200))?;
        }
    }

    /// Moves the guest to the other host, and looks at it until the pauses that follow are over.
    /// A migration that takes longer than the bound is told to end.
    pub(super) fn migrate(
        &mut self,
        mode: MigrationMode,
        safe: bool,
        bound: Duration,
    ) -> anyhow::Result<Seen> {
        ensure!(self.is_alive(), "the guest does not run");
        let (name, at) = self.guest().map(|guest| (guest.name.clone(), guest.at))?;
        let wrong_before = self.wrong_bytes();
        let target = 3 - at;
        let to = format!("{}:{MIGRATION_PORT}", self.lab.host(target).address());
        let mut command = self.lab.host(at).command(&heca_lab::heca_binary()?);
        command.args(["vm", "migrate", &name, "--to", &to, "--mode", mode.name(), "--json"]);
        if mode.is_qemu() {
            command.args(["--max-downtime", &self.qemu_downtime]);
        }
        if safe {
            command.arg("--safe");
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let begun = Instant::now();
        let mut child = command.spawn().context("start heca vm migrate")?;
        let in_time = wait(&mut child, begun + bound, &self.interrupted)?;
        if !in_time {
            let _ = kill_process(Pid::from_child(&child), Signal::INT);
            if !wait(&mut child, Instant::now() + GRACE, &AtomicBool::new(false))? {
                let _ = child.kill();
            }
        }
        let ended = Instant::now();
        let (mut said, mut complaint) = (Vec::new(), String::new());
        child.stdout.take().context("output is piped")?.read_to_end(&mut said)?;
        child.stderr.take().context("output is piped")?.read_to_string(&mut complaint)?;
        let succeeded = child.wait()?.success();
        self.pass(AFTER_SWITCH + Duration::from_millis(200))?;

        let info = last_json(&said);
        let there = self.lab.host(target).vm(&name).is_ok_and(|vm| vm.state == VmState::Running);
        let guest = self.guest.as_mut().context("a guest")?;
        if there {
            guest.at = target;
        }
        let phase = info.as_ref().map(|info: &MigrationInfo| info.phase);
        let problem = match phase {
            _ if !in_time => Some(format!("not done after {} s", bound.as_secs())),
            Some(MigrationPhase::Completed) if succeeded && there => None,
            _ => Some(format!("it ended as {phase:?}: {}", complaint.trim())),
        };
        Ok(Seen {
            begun,
            ended,
            switch: guest.heartbeat.switch(begun, ended),
            gap: guest.heartbeat.gap(begun, ended).filter(|_| problem.is_none()),
            info,
            problem,
            wrong_bytes: self.wrong_bytes() - wrong_before,
        })
    }
}

/// Waits for a process; whether it ended in time.
fn wait(child: &mut Child, deadline: Instant, interrupted: &AtomicBool) -> anyhow::Result<bool> {
    loop {
        if child.try_wait()?.is_some() {
            return Ok(true);
        }
        if interrupted.load(Ordering::Relaxed) {
            let _ = child.kill();
            bail!("interrupted");
        }
        if Instant::now() > deadline {
            return Ok(false);
        }
        std::thread::sleep(LOOK);
    }
}

/// The last of the objects in this text that is what is wanted.
fn last_json<T: serde::de::DeserializeOwned>(text: &[u8]) -> Option<T> {
    let values = serde_json::Deserializer::from_slice(text).into_iter::<serde_json::Value>();
    values.map_while(Result::ok).filter_map(|value| serde_json::from_value(value).ok()).last()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_word_counts() {
        let text = br#"{"a":1}
            {"a":2} 7"#;
        let found: Option<std::collections::BTreeMap<String, u8>> = last_json(text);
        assert_eq!(found.and_then(|map| map.get("a").copied()), Some(2));
        assert_eq!(last_json::<u8>(b"not json"), None);
    }
}
