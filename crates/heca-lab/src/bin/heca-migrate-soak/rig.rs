//! Two hosts that a guest goes between, three that sponsor it.

use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use heca_api::{MIGRATION_PORT, MigrationInfo, VmState};
use heca_lab::{
    Appmembench, Heartbeat, Lab, LabPool, MeasuredGuest, heca_binary, start_moving_hosts,
};
use heca_types::ByteSize;

use crate::Arguments;

const VM: &str = "guest";
const SPONSORS: [usize; 3] = [3, 4, 5];
/// Longest time for the guest to fill its memory.
const START: Duration = Duration::from_secs(180);
/// Longest time for a move, a fault included.
const MOVE: Duration = Duration::from_secs(90);
/// Longest time until the guest tells of its work again.
const WORK: Duration = Duration::from_secs(30);
/// Time that a host is cut off.
const CUT: Duration = Duration::from_secs(2);
/// Time that an agent is away.
const AWAY: Duration = Duration::from_millis(300);
const LOOK: Duration = Duration::from_millis(20);

/// Where the guest is after a move.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ended {
    Moved,
    Stayed,
}

pub(crate) struct Rig {
    heartbeat: Heartbeat,
    appmembench: Appmembench,
    at: usize,
    command: Option<Child>,
    cut: Option<(usize, Instant)>,
    _pool: Option<LabPool>,
    lab: Lab,
}

impl Rig {
    pub(crate) fn start(arguments: &Arguments) -> anyhow::Result<Self> {
        let mut lab = Lab::new(5)?;
        let pool = (!arguments.plain).then(|| LabPool::new(&mut lab, 5)).transpose()?;
        start_moving_hosts(&mut lab, 5, ByteSize(arguments.memory.0 * 2), pool.as_ref())?;
        let initrd = lab.dir().join("initrd");
        Appmembench::write_image(&initrd, lab.dir())?;
        let heartbeat = Heartbeat::listen(&lab.dir().join("tick.sock"))?;
        let appmembench = Appmembench::listen(&lab.dir().join("figures.sock"))?;
        let guest = MeasuredGuest {
            name: VM,
            memory: arguments.memory,
            local: arguments.local,
            sponsors: &SPONSORS,
            encrypt: pool.is_some(),
            qemu: arguments.qemu.as_deref(),
            initrd: &initrd,
        };
        guest.start(&mut lab, 1, &heartbeat, &appmembench)?;
        let rig =
            Self { heartbeat, appmembench, at: 1, command: None, cut: None, _pool: pool, lab };
        let working_set = arguments.working_set.0 >> 10;
        let load = format!("--working-set {working_set}K --rate {}", arguments.rate);
        rig.appmembench.start(&load, START)?;
        Ok(rig)
    }

    /// The host that the guest is on, as far as known.
    pub(crate) fn source(&self) -> usize {
        self.at
    }

    pub(crate) fn target(&self) -> usize {
        3 - self.at
    }

    pub(crate) fn sponsors(&self) -> &'static [usize] {
        &SPONSORS
    }

    pub(crate) fn pager(&mut self, host: usize) -> Option<i32> {
        self.lab.host(host).vm(VM).ok()?.pager_pid
    }

    /// The target's QEMU while it waits for the guest.
    pub(crate) fn arriving_qemu(&mut self) -> Option<i32> {
        let target = self.target();
        let vm = self.lab.host(target).vm(VM).ok()?;
        vm.qemu_pid.filter(|_| vm.state == VmState::Arriving)
    }

    /// Whether the target has written down that the guest is its own.
    pub(crate) fn has_arrived(&mut self) -> bool {
        let target = self.target();
        let dir = self.lab.host(target).run_dir().join("arrived");
        std::fs::read_dir(dir).is_ok_and(|entries| entries.count() > 0)
    }

    pub(crate) fn restart_agent(&mut self, host: usize) -> anyhow::Result<bool> {
        self.lab.host(host).kill_agent();
        std::thread::sleep(AWAY);
        self.lab.host(host).restart_agent()?;
        Ok(true)
    }

    pub(crate) fn cut(&mut self, host: usize) -> anyhow::Result<bool> {
        self.lab.set_link(host, false)?;
        self.cut = Some((host, Instant::now()));
        Ok(true)
    }

    /// Ends what a fault left.
    pub(crate) fn heal(&mut self) -> anyhow::Result<()> {
        if let Some((host, since)) = self.cut.take() {
            std::thread::sleep(CUT.saturating_sub(since.elapsed()));
            self.lab.set_link(host, true)?;
        }
        Ok(())
    }

    /// Begins a move to the other host.
    pub(crate) fn begin(&mut self, mode: &[&str], more: &[&str]) -> anyhow::Result<()> {
        let target = self.target();
        let to = format!("{}:{MIGRATION_PORT}", self.lab.host(target).address());
        let mut command = self.lab.host(self.at).command(&heca_binary()?);
        command.args(["vm", "migrate", VM, "--to", &to, "--json"]).args(mode).args(more);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        self.command = Some(command.spawn().context("start heca vm migrate")?);
        Ok(())
    }

    /// Waits until the guest runs on one host and is known to no other. Without a fault that must be
    /// the target.
    pub(crate) fn end(&mut self, with_fault: bool) -> anyhow::Result<Ended> {
        let child = self.command.take().context("a move was begun")?;
        if self.cut.is_some() {
            self.heal()?;
        }
        let output = wait(child)?;
        let deadline = Instant::now() + MOVE;
        let state = |rig: &mut Self, host: usize| rig.lab.host(host).vm(VM).ok().map(|vm| vm.state);
        loop {
            let (here, there) = (state(self, self.at), state(self, self.target()));
            match (here, there) {
                (None, Some(VmState::Running)) => {
                    self.at = self.target();
                    return Ok(Ended::Moved);
                }
                (Some(VmState::Running), None) if with_fault => return Ok(Ended::Stayed),
                (Some(VmState::Running), None) => {
                    let info: Option<MigrationInfo> = serde_json::from_slice(&output.stdout).ok();
                    let words = String::from_utf8_lossy(&output.stderr).into_owned();
                    bail!("it stayed without a fault: {info:#?} {words}");
                }
                _ if Instant::now() > deadline => {
                    bail!("after {} s the guest is here {here:?}, there {there:?}", MOVE.as_secs())
                }
                _ => std::thread::sleep(LOOK),
            }
        }
    }

    /// Waits until the guest has gone on for a while.
    pub(crate) fn wait_for_beats(&mut self) -> anyhow::Result<()> {
        let before = self.heartbeat.count();
        let deadline = Instant::now() + Duration::from_secs(30);
        while self.heartbeat.count() < before + 100 {
            ensure!(Instant::now() < deadline, "the guest does not go on");
            std::thread::sleep(LOOK);
        }
        Ok(())
    }

    pub(crate) fn check(&mut self) -> anyhow::Result<()> {
        self.appmembench.check()?;
        ensure!(self.at_most_one_ran(), "two hosts ran the guest at once");
        let vm = self.lab.host(self.at).vm(VM)?;
        ensure!(vm.problem.is_none(), "{:?}", vm.problem);
        Ok(())
    }

    pub(crate) fn longest_gap(&self, from: Instant) -> f64 {
        self.heartbeat.longest_gap(from, Instant::now()).as_secs_f64() * 1e3
    }

    pub(crate) fn is_alive(&self) -> bool {
        self.heartbeat.last().is_some_and(|tick| tick.at.elapsed() < Duration::from_secs(2))
    }

    pub(crate) fn beats(&self) -> usize {
        self.heartbeat.count()
    }

    /// No QEMU's beat comes after one of its successor.
    pub(crate) fn at_most_one_ran(&self) -> bool {
        let all = self.heartbeat.ticks(Instant::now() - self.heartbeat.age(), Instant::now());
        let mut seen: Vec<u64> = Vec::new();
        for tick in all {
            match seen.last() {
                Some(&last) if last == tick.connection => {}
                _ if seen.contains(&tick.connection) => return false,
                _ => seen.push(tick.connection),
            }
        }
        true
    }

    pub(crate) fn wrong_bytes(&self) -> u64 {
        self.appmembench.wrong_bytes()
    }

    pub(crate) fn verified_bytes(&self) -> u64 {
        self.appmembench.verified_bytes()
    }

    /// Waits until the guest has verified some of its memory since now.
    pub(crate) fn wait_for_work(&self) -> anyhow::Result<()> {
        self.appmembench.wait_line(WORK)
    }

    /// Whether the command that moves the guest is still at it.
    pub(crate) fn is_moving(&mut self) -> anyhow::Result<bool> {
        match &mut self.command {
            Some(command) => Ok(command.try_wait()?.is_none()),
            None => Ok(false),
        }
    }

    /// The ends of all logs.
    pub(crate) fn logs(&mut self) -> String {
        let mut text = String::new();
        for host in [1, 2] {
            let dir = self.lab.host(host).run_dir().join("vms").join(VM);
            let files =
                [self.lab.host(host).agent_log(), dir.join("pager.log"), dir.join("qemu.log")];
            for file in files {
                let content = std::fs::read_to_string(&file).unwrap_or_default();
                let from = content.len().saturating_sub(3000);
                let tail = content.get(from..).unwrap_or(&content);
                text.push_str(&format!("--- host {host}, {}\n{tail}\n", file.display()));
            }
        }
        text
    }
}

fn wait(mut child: Child) -> anyhow::Result<std::process::Output> {
    let deadline = Instant::now() + MOVE;
    while child.try_wait()?.is_none() {
        if Instant::now() > deadline {
            let _ = child.kill();
            bail!("the command does not end");
        }
        std::thread::sleep(LOOK);
    }
    Ok(child.wait_with_output()?)
}
