//! What happened, kept in a compact form until somebody asks.

use std::collections::VecDeque;

use heca_core::handover::PageRecord;
use heca_core::pager::{Action, Event, FaultKind};
use heca_core::placement::ReplicaSet;

use crate::migration::Phase;

const RECORDS_MAX: usize = 400_000;
const LINES_MAX: usize = 60;

#[derive(Debug, Clone, Copy)]
pub(crate) enum What {
    ToPager(Event),
    FromPager(Action),
    Adopted { value: u64 },
    Read { vcpu: usize, value: u64 },
    Write { vcpu: usize, value: u64 },
    Blocked { vcpu: usize, kind: FaultKind },
    PoisonHit { vcpu: usize },
    Zapped { took: bool },
    Protected,
    ReadForStore { value: u64 },
    Dropped,
    SponsorStored { sponsor: u8, version: u32, value: u64 },
    SponsorRefused { sponsor: u8, version: u32 },
    SponsorServed { sponsor: u8, version: u32 },
    CopyRotted { sponsor: u8 },
    Crashed { sponsor: u8 },
    Restarted { sponsor: u8 },
    Cut { sponsor: u8 },
    Connected { sponsor: u8, epoch: u64 },
    Emptied { sponsor: u8 },
    Held { sponsor: u8, extent: u32, ok: bool },
    Released { sponsor: u8, extent: u32, ok: bool },
    PullRead { from: u8, to: u8, version: u32, value: Option<u64> },
    Extent { extent: u32, set: ReplicaSet, stale: u8 },
    PagerCrashed,
    Recovered { epoch: u64 },
    KernelUnmapped,
    OwnerDiscarded,
    Zombie { sponsor: u8 },
    MemoryFull { full: bool },
    Heal,
    Migration(Phase),
    MigrationEnds { moved: bool },
    Collected,
    ReadToSend { value: u64 },
    Told(PageRecord),
    SentBehind { value: u64 },
    BroughtBehind { value: u64 },
    LinkCut,
}

#[derive(Debug, Clone, Copy)]
struct Record {
    tick: u64,
    page: Option<u64>,
    what: What,
}

/// Newest records of a run.
#[derive(Debug, Default)]
pub(crate) struct History {
    records: VecDeque<Record>,
}

impl History {
    pub(crate) fn push(&mut self, tick: u64, page: Option<u64>, what: What) {
        if self.records.len() == RECORDS_MAX {
            self.records.pop_front();
        }
        self.records.push_back(Record { tick, page, what });
    }

    /// The newest lines that concern a page and its sponsors (or, without a page, everything).
    pub(crate) fn lines(&self, page: Option<u64>, sponsors: &[u8]) -> Vec<String> {
        let concerns = |record: &&Record| match (page, record.page) {
            (None, _) => true,
            (Some(page), Some(other)) => page == other,
            (Some(_), None) => record.what.sponsor().is_none_or(|s| sponsors.contains(&s)),
        };
        let mut lines: Vec<String> = self
            .records
            .iter()
            .rev()
            .filter(concerns)
            .take(LINES_MAX)
            .map(|r| format!("{:>8}  {}", r.tick, r.what.text()))
            .collect();
        lines.reverse();
        lines
    }
}

impl What {
    /// The sponsor that an entry without a page is about.
    fn sponsor(self) -> Option<u8> {
        match self {
            Self::ToPager(Event::SponsorDown { sponsor } | Event::SponsorUp { sponsor })
            | Self::Crashed { sponsor }
            | Self::Cut { sponsor }
            | Self::Connected { sponsor, .. }
            | Self::Emptied { sponsor }
            | Self::Held { sponsor, .. }
            | Self::Released { sponsor, .. }
            | Self::Restarted { sponsor } => Some(sponsor),
            Self::ToPager(
                Event::SponsorLost { sponsor }
                | Event::SponsorEmptied { sponsor }
                | Event::SponsorSuspect { sponsor, .. }
                | Event::SponsorLeaving { sponsor, .. }
                | Event::Held { sponsor, .. }
                | Event::Latency { sponsor, .. },
            )
            | Self::FromPager(Action::Hold { sponsor, .. } | Action::Release { sponsor, .. }) => {
                Some(sponsor)
            }
            _ => None,
        }
    }

    fn text(self) -> String {
        match self {
            Self::ToPager(event) => format!("-> pager    {event:?}"),
            Self::FromPager(action) => format!("<- pager    {action:?}"),
            Self::Adopted { value } => format!("owner       had {value:#x} before the pager came"),
            Self::Read { vcpu, value } => format!("vcpu {vcpu}      read {value:#x}"),
            Self::Write { vcpu, value } => format!("vcpu {vcpu}      wrote {value:#x}"),
            Self::Blocked { vcpu, kind } => format!("vcpu {vcpu}      blocked ({kind:?})"),
            Self::PoisonHit { vcpu } => format!("vcpu {vcpu}      memory error"),
            Self::Zapped { took } => format!("evictor     zapped, took effect: {took}"),
            Self::Protected => "evictor     write-protected".into(),
            Self::ReadForStore { value } => format!("evictor     read {value:#x}"),
            Self::Dropped => "evictor     dropped the page".into(),
            Self::SponsorStored { sponsor, version, value } => {
                format!("sponsor {sponsor}   stored version {version} = {value:#x}")
            }
            Self::SponsorRefused { sponsor, version } => {
                format!("sponsor {sponsor}   refused version {version}")
            }
            Self::SponsorServed { sponsor, version } => {
                format!("sponsor {sponsor}   was asked for version {version}")
            }
            Self::CopyRotted { sponsor } => format!("sponsor {sponsor}   copy rotted"),
            Self::Crashed { sponsor } => format!("sponsor {sponsor}   crashed"),
            Self::Restarted { sponsor } => format!("sponsor {sponsor}   restarted"),
            Self::Cut { sponsor } => format!("sponsor {sponsor}   connections cut"),
            Self::Connected { sponsor, epoch } => {
                format!("sponsor {sponsor}   connected, epoch {epoch}")
            }
            Self::Emptied { sponsor } => format!("sponsor {sponsor}   lost what it held"),
            Self::Held { sponsor, extent, ok } => {
                format!("sponsor {sponsor}   holds extent {extent}: {ok}")
            }
            Self::Released { sponsor, extent, ok } => {
                format!("sponsor {sponsor}   forgets extent {extent}: {ok}")
            }
            Self::PullRead { from, to, version, value } => {
                format!("sponsor {from}   read version {version} for {to}: {value:x?}")
            }
            Self::Extent { extent, set, stale } => {
                format!("journal     extent {extent} on {:?}, gaps {stale:#b}", set.sponsors())
            }
            Self::PagerCrashed => "pager       crashed".into(),
            Self::Recovered { epoch } => format!("pager       new, epoch {epoch}"),
            Self::KernelUnmapped => "kernel      removed the mapping unasked".into(),
            Self::OwnerDiscarded => "owner       discarded the page".into(),
            Self::Zombie { sponsor } => format!("old owner   wrote to sponsor {sponsor}"),
            Self::MemoryFull { full } => format!("kernel      out of memory: {full}"),
            Self::Heal => "world       heals".into(),
            Self::Migration(phase) => format!("migration   {phase:?}"),
            Self::MigrationEnds { moved: true } => "migration   is done".into(),
            Self::MigrationEnds { moved: false } => "migration   comes to nothing".into(),
            Self::Collected => "source      takes the mark of a write".into(),
            Self::ReadToSend { value } => format!("source      read {value:#x} to send it"),
            Self::Told(record) => format!("source      tells {record:?}"),
            Self::SentBehind { value } => format!("source      sends {value:#x}"),
            Self::BroughtBehind { value } => format!("target      got {value:#x}"),
            Self::LinkCut => "source      is cut off".into(),
        }
    }
}
