//! Live migration: what is asked for, how far it is, what it cost.

use std::str::FromStr;

use heca_types::ByteSize;
use serde::{Deserialize, Serialize};

use crate::vm::ApiError;

/// Port of the target's agent, if the one who moves a VM names none.
pub const MIGRATION_PORT: u16 = 7902;

/// How a VM's memory gets to the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MigrationMode {
    /// A bounded pre-copy of local pages, then post-copy.
    #[default]
    Hybrid,
    /// Switch at once; pages follow.
    Postcopy,
    /// Rounds of dirty pages until the rest fits the downtime; nothing follows the switch.
    Precopy,
    /// QEMU's own pre-copy.
    QemuPrecopy,
    /// QEMU's own post-copy.
    QemuPostcopy,
    /// QEMU's own post-copy with a channel of its own for the pages that the guest waits for.
    QemuPostcopyPreempt,
}

impl MigrationMode {
    /// Every mode.
    pub const ALL: [Self; 6] = [
        Self::Hybrid,
        Self::Postcopy,
        Self::Precopy,
        Self::QemuPrecopy,
        Self::QemuPostcopy,
        Self::QemuPostcopyPreempt,
    ];

    /// Name on the command line and in results.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Hybrid => "hybrid",
            Self::Postcopy => "postcopy",
            Self::Precopy => "precopy",
            Self::QemuPrecopy => "qemu-precopy",
            Self::QemuPostcopy => "qemu-postcopy",
            Self::QemuPostcopyPreempt => "qemu-postcopy-preempt",
        }
    }

    /// Whether QEMU moves the memory.
    #[must_use]
    pub const fn is_qemu(self) -> bool {
        matches!(self, Self::QemuPrecopy | Self::QemuPostcopy | Self::QemuPostcopyPreempt)
    }

    /// Whether pages may follow the switch.
    #[must_use]
    pub const fn is_postcopy(self) -> bool {
        !matches!(self, Self::Precopy | Self::QemuPrecopy)
    }
}

impl FromStr for MigrationMode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL.into_iter().find(|mode| mode.name() == text).ok_or_else(|| {
            let names: Vec<_> = Self::ALL.iter().map(|mode| mode.name()).collect();
            format!("`{text}`: choose one of {}", names.join(", "))
        })
    }
}

/// A migration to begin.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MigrateRequest {
    /// Where the target's agent takes in VMs: `HOST` or `HOST:PORT`.
    pub to: String,
    /// How memory gets there.
    #[serde(default)]
    pub mode: MigrationMode,
    /// Longest time that the guest should stand still, in milliseconds: pre-copy goes on until the
    /// rest fits into it.
    #[serde(default = "default_downtime_ms")]
    pub max_downtime_ms: u64,
    /// Bound of what is sent, in bytes a second.
    #[serde(default)]
    pub bandwidth: Option<ByteSize>,
    /// Keep every page in two places until done: what is local goes to the sponsors, not to the
    /// target, so that not even the end of the source's host after the switch loses a page.
    #[serde(default)]
    pub safe: bool,
}

/// Default of [`MigrateRequest::max_downtime_ms`].
#[must_use]
pub fn default_downtime_ms() -> u64 {
    50
}

/// How far a migration is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MigrationPhase {
    /// The target gets ready; the guest runs here.
    Preparing,
    /// Pages are copied while the guest runs here.
    Copying,
    /// The guest stands still.
    Switching,
    /// The guest runs on the target; pages follow.
    Following,
    /// All is done; nothing is left here.
    Completed,
    /// It came to nothing; the guest runs here as before.
    Failed,
    /// As `Failed`, because somebody asked for it.
    Cancelled,
    /// The right to run was given to the target, and whether it got it is not known: the guest is
    /// held here until the target answers.
    Unconfirmed,
}

impl MigrationPhase {
    /// Whether nothing will happen any more.
    #[must_use]
    pub const fn is_over(self) -> bool {
        matches!(self, Self::Completed | Self::Failed | Self::Cancelled)
    }
}

/// A migration, as the source's agent knows it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MigrationInfo {
    /// The VM.
    pub name: String,
    /// Where to.
    pub to: String,
    /// How.
    pub mode: MigrationMode,
    /// How far.
    pub phase: MigrationPhase,
    /// Time since it began, in seconds; up to its end once that came.
    pub elapsed_s: f64,
    /// Bytes of guest memory that were local here when it began; 0 in QEMU's own modes.
    pub resident_bytes: u64,
    /// Bytes of guest memory that are still to come, as far as known.
    pub remaining_bytes: u64,
    /// What was measured so far.
    pub report: MigrationReport,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<ApiError>,
}

/// What a migration cost.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct MigrationReport {
    /// Passes of pre-copy over the guest's memory.
    pub rounds: u32,
    /// Pages sent by the source's pager, duplicates included.
    pub pages_sent: u64,
    /// Pages sent after the switch.
    pub pages_sent_after: u64,
    /// Pages that were behind at the switch: each must be sent once.
    pub pages_unique_after: u64,
    /// Pages of zeros, or of one word over and over, that were named, not sent.
    pub zero_pages: u64,
    /// Pages that the target's guest waited for.
    pub demand_pages: u64,
    /// Bytes of memory on the wire between the two hosts, frames and lists included.
    pub memory_bytes: u64,
    /// Bytes of device state, and of what else QEMU sent.
    pub device_state_bytes: u64,
    /// Time from the guest's last instruction on the source to its first on the target, in
    /// milliseconds, as the two agents saw it; none before the switch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime_ms: Option<f64>,
    /// Its parts, in milliseconds.
    #[serde(default)]
    pub parts_ms: DowntimeParts,
    /// What QEMU calls the downtime, in milliseconds (its own modes only).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub qemu_downtime_ms: Option<f64>,
    /// Time from the beginning until the source was needed no longer, in seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total_s: Option<f64>,
}

/// Where the downtime went, in milliseconds. Some parts overlap.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct DowntimeParts {
    /// QEMU stopped the guest and drained its devices.
    pub stop: f64,
    /// The last scan for dirty pages, and the list to the target.
    pub final_scan: f64,
    /// Device state saved, sent and loaded; overlaps with the final scan.
    pub device_state: f64,
    /// The target takes over: commit, sponsors, epoch.
    pub takeover: f64,
    /// The target's QEMU started the guest.
    pub resume: f64,
}

/// Says where a VM goes on whose target will never answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResolveMigration {
    /// Here: it does not run on the target. Else it does, and is to be forgotten here.
    pub run_here: bool,
}

/// How far the memory of a VM that moves is, as the source's pager knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ExportStage {
    /// Pages are sent while the guest runs here.
    Copying,
    /// The target was told of every page; what is behind is sent.
    Switched,
    /// The target has everything.
    Done,
    /// The connection broke before the switch, or the VM stays.
    Failed,
}

/// Figures of the memory of a VM that moves, from the source's pager. Counts are of pages.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportInfo {
    /// How far.
    pub stage: ExportStage,
    /// What is wrong, if something is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Waiting to be sent before the switch.
    pub queued_pages: u64,
    /// Behind, and not sent yet.
    pub behind_pages: u64,
    /// Sent, over all.
    pub pages_sent: u64,
    /// Of these, pages of zeros or of one word over and over, which were only named.
    pub zero_pages: u64,
    /// Sent since the switch.
    pub pages_sent_after: u64,
    /// Behind at the switch.
    pub pages_unique_after: u64,
    /// Sent because the target's guest waited for them.
    pub demand_pages: u64,
    /// Bytes on the wire, of all connections between the two pagers.
    pub bytes: u64,
}

/// Begins to send a VM's memory to the pager of its next host; from the agent to its pager.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportRequest {
    /// Where that pager listens.
    pub address: String,
    /// What this one names itself by.
    pub ticket: heca_types::OwnerId,
    /// The epoch that the target was told of: a pager under another one is not the one meant.
    pub epoch: heca_types::Epoch,
    /// Bound of what is sent, in bytes a second.
    pub bytes_per_s: Option<u64>,
}

/// How far the memory of a VM that comes is, as the target's pager knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImportInfo {
    /// Pages that came after the switch, those that came twice counted twice.
    pub received_pages: u64,
    /// Pages that are behind; none before the source told of every page.
    pub behind_pages: Option<u64>,
    /// Whether the source is needed no longer.
    pub done: bool,
}

/// Has a pager store everything that is local on the sponsors and keep it here, or stop to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flush {
    /// Whether to from now on.
    pub on: bool,
}

/// Has a pager look for pages that were written since the last time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Look {
    /// Whether what the target lacks is to be sent.
    pub send: bool,
}

/// Answer to [`Look`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Written {
    /// Pages that were written.
    pub pages: u64,
}

/// Has a pager send what is behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Release {
    /// Whether the target waits for that before its guest runs.
    pub at_once: bool,
}
