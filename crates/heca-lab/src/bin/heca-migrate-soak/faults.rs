//! What goes wrong while a guest moves.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::rig::Rig;

/// A kind of fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The target's QEMU is killed, before the guest runs there.
    TargetQemu,
    /// A pager is killed.
    TargetPager,
    SourcePager,
    /// An agent is killed, and started again.
    TargetAgent,
    SourceAgent,
    /// A host is cut off for two seconds.
    TargetLink,
    SourceLink,
    /// A sponsor is killed, and started again.
    Sponsor,
}

impl Fault {
    pub(crate) const ALL: [Self; 8] = [
        Self::TargetQemu,
        Self::TargetPager,
        Self::SourcePager,
        Self::TargetAgent,
        Self::SourceAgent,
        Self::TargetLink,
        Self::SourceLink,
        Self::Sponsor,
    ];

    const fn name(self) -> &'static str {
        match self {
            Self::TargetQemu => "target-qemu-kill",
            Self::TargetPager => "target-pager-kill",
            Self::SourcePager => "source-pager-kill",
            Self::TargetAgent => "target-agent-kill",
            Self::SourceAgent => "source-agent-kill",
            Self::TargetLink => "target-link-cut",
            Self::SourceLink => "source-link-cut",
            Self::Sponsor => "sponsor-kill",
        }
    }

    /// Does it. Returns whether there was anything to do it to.
    pub(crate) fn inject(self, rig: &mut Rig, random: &mut Random) -> anyhow::Result<bool> {
        let (source, target) = (rig.source(), rig.target());
        match self {
            Self::TargetQemu => kill_waiting_qemu(rig),
            Self::TargetPager => Ok(kill(rig.pager(target))),
            Self::SourcePager => Ok(kill(rig.pager(source))),
            Self::TargetAgent => rig.restart_agent(target),
            Self::SourceAgent => rig.restart_agent(source),
            Self::TargetLink => rig.cut(target),
            Self::SourceLink => rig.cut(source),
            Self::Sponsor => {
                let sponsor = rig.sponsors()[random.below(rig.sponsors().len() as u64) as usize];
                rig.restart_agent(sponsor)
            }
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Fault {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL.into_iter().find(|fault| fault.name() == text).ok_or_else(|| {
            let names: Vec<_> = Self::ALL.iter().map(|fault| fault.name()).collect();
            format!("`{text}`: one of {}", names.join(", "))
        })
    }
}

fn kill(pid: Option<i32>) -> bool {
    let pid = pid.and_then(Pid::from_raw);
    pid.is_some_and(|pid| kill_process(pid, Signal::KILL).is_ok())
}

/// A QEMU that runs the guest is the guest: to kill it is no fault that a move could survive. It is
/// stopped first, so that it cannot begin to be that one while we look.
fn kill_waiting_qemu(rig: &mut Rig) -> anyhow::Result<bool> {
    let Some(pid) = rig.arriving_qemu().and_then(Pid::from_raw) else { return Ok(false) };
    kill_process(pid, Signal::STOP)?;
    std::thread::sleep(Duration::from_millis(5));
    let waits = rig.arriving_qemu().is_some() && !rig.has_arrived();
    kill_process(pid, if waits { Signal::KILL } else { Signal::CONT })?;
    Ok(waits)
}

/// xorshift64* (Vigna 2016).
#[derive(Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) % bound.max(1)
    }

    pub(crate) fn fault(&mut self) -> Fault {
        Fault::ALL[self.below(Fault::ALL.len() as u64) as usize]
    }

    /// Arguments of a move.
    pub(crate) fn mode(&mut self) -> &'static [&'static str] {
        match self.below(8) {
            0..4 => &["--mode", "hybrid"],
            4 | 5 => &["--mode", "postcopy"],
            6 => &["--mode", "precopy"],
            _ => &["--safe"],
        }
    }
}
