//! VMs and what is asked for them.

use std::path::PathBuf;
use std::str::FromStr;

use heca_types::ByteSize;
use serde::{Deserialize, Serialize};

use crate::local::AutoLocal;
use crate::stats::PagerStats;

/// A sponsor and its weight: `HOST:PORT` or `HOST:PORT=WEIGHT`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SponsorAddress {
    /// `HOST:PORT`.
    pub address: String,
    /// Share of the extents, relative to the other sponsors.
    pub weight: u32,
}

impl FromStr for SponsorAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (address, weight) = match text.split_once('=') {
            Some((address, weight)) => {
                let weight = weight.parse().ok().filter(|&w| w > 0).ok_or_else(|| {
                    format!("`{weight}` is not a weight: write a whole number from 1, as in =2")
                })?;
                (address, weight)
            }
            None => (text, 1),
        };
        let port = address.rsplit_once(':').and_then(|(host, port)| {
            (!host.is_empty()).then(|| port.parse::<u16>().ok()).flatten()
        });
        if port.is_none() {
            return Err(format!(
                "`{address}` is not a sponsor: write HOST:PORT or HOST:PORT=WEIGHT"
            ));
        }
        Ok(Self { address: address.to_owned(), weight })
    }
}

/// How pages are taken from the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EvictionChoice {
    /// The best of the following that works here.
    #[default]
    Auto,
    /// `process_madvise(MADV_PAGEOUT)`; needs swap to be off.
    Pageout,
    /// An io_uring inside the owner.
    Uring,
    /// Synchronous write protection.
    WriteProtect,
}

impl FromStr for EvictionChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "auto" => Ok(Self::Auto),
            "pageout" => Ok(Self::Pageout),
            "uring" => Ok(Self::Uring),
            "write-protect" => Ok(Self::WriteProtect),
            _ => Err(format!("`{text}`: choose auto, pageout, uring or write-protect")),
        }
    }
}

/// What runs the guest's processors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AccelChoice {
    /// KVM where it works, else TCG.
    #[default]
    Auto,
    /// Hardware virtualisation.
    Kvm,
    /// QEMU's translator.
    Tcg,
}

impl FromStr for AccelChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "auto" => Ok(Self::Auto),
            "kvm" => Ok(Self::Kvm),
            "tcg" => Ok(Self::Tcg),
            _ => Err(format!("`{text}`: choose auto, kvm or tcg")),
        }
    }
}

/// The guest's network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Network {
    /// None.
    #[default]
    None,
    /// QEMU's user-mode network: out only.
    User,
}

impl FromStr for Network {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "none" => Ok(Self::None),
            "user" => Ok(Self::User),
            _ => Err(format!("`{text}`: choose none or user")),
        }
    }
}

/// What the guest starts from.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Boot {
    /// Kernel image, started without a boot loader.
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk for it.
    pub initrd: Option<PathBuf>,
    /// Its command line.
    #[serde(default)]
    pub append: String,
    /// Disk images, raw or qcow2 by their ending.
    #[serde(default)]
    pub disks: Vec<PathBuf>,
}

/// A VM to start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmRequest {
    /// Unique on the host.
    pub name: String,
    /// Guest RAM.
    pub memory: ByteSize,
    /// Part of it that may be in local memory at a time.
    pub local: ByteSize,
    /// Bounds within which that follows what the VM needs; none if it stays.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub auto_local: Option<AutoLocal>,
    /// Sponsors that hold each extent.
    pub replicas: usize,
    /// The sponsors.
    pub sponsors: Vec<SponsorAddress>,
    /// Guest processors.
    pub vcpus: u32,
    /// What runs them.
    #[serde(default)]
    pub accel: AccelChoice,
    /// What to start.
    pub boot: Boot,
    /// The guest's network.
    #[serde(default)]
    pub network: Network,
    /// How pages are taken from the guest.
    #[serde(default)]
    pub eviction: EvictionChoice,
    /// Whether sequential streams are fetched ahead.
    pub prefetch: bool,
    /// Whether pages are sealed before they leave, so that sponsors see no plaintext.
    #[serde(default)]
    pub encrypt: bool,
    /// QEMU program; found on the path if not given.
    #[serde(default)]
    pub qemu: Option<PathBuf>,
    /// Further arguments for QEMU.
    #[serde(default)]
    pub qemu_args: Vec<String>,
}

/// State of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VmState {
    /// QEMU is up, its memory is not taken over yet.
    Starting,
    /// The guest runs.
    Running,
    /// The pager is gone, and a new one is being started: until then the guest stands still at
    /// its next fault. Nothing is lost.
    PagerLost,
    /// It comes from another host, where it still runs.
    Arriving,
    /// It was handed over to another host; what is left here goes away by itself.
    Leaving,
    /// QEMU ended.
    Stopped,
}

/// A VM, as the agent knows it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VmInfo {
    /// Unique on the host.
    pub name: String,
    /// State.
    pub state: VmState,
    /// Guest RAM.
    pub memory: ByteSize,
    /// Local budget.
    pub local: ByteSize,
    /// Bounds within which that follows what the VM needs; none if it stays.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub auto_local: Option<AutoLocal>,
    /// Replicas of each extent.
    pub replicas: usize,
    /// Guest processors.
    pub vcpus: u32,
    /// `kvm` or `tcg`.
    pub accel: String,
    /// Process id of QEMU.
    pub qemu_pid: Option<i32>,
    /// Process id of the pager.
    pub pager_pid: Option<i32>,
    /// Socket of the serial console.
    pub console: PathBuf,
    /// Log of the serial console.
    pub console_log: PathBuf,
    /// Figures of the pager; the last ones if it ended.
    pub pager: Option<PagerStats>,
    /// Times that a pager had to be started again.
    #[serde(default)]
    pub pager_restarts: u64,
    /// Time from the loss of the last pager until the next one served faults, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pager_pause_ms: Option<f64>,
    /// Whether pages are sealed before they leave.
    #[serde(default)]
    pub encrypted: bool,
    /// How far its last move to another host came; none if there was none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub migration: Option<crate::migrate::MigrationPhase>,
    /// What went wrong, if something did.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub problem: Option<String>,
}

/// A new local budget.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Resize {
    /// Part of the guest RAM that may be in local memory.
    pub local: ByteSize,
    /// Bounds within which that follows what the VM needs; none if it is to stay.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub auto_local: Option<AutoLocal>,
}

/// How to stop a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stop {
    /// Milliseconds that the guest gets to shut down before it is ended; 0 ends it at once.
    pub grace_ms: u64,
}

/// State of a pager towards its agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "state")]
pub enum PagerState {
    /// It serves faults, or waits for the memory of a VM that comes.
    Ready {
        /// Where it listens for the pager of the VM's former host.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        listens: Option<String>,
    },
    /// It could not begin.
    Failed {
        /// Why, and what to do.
        error: ApiError,
    },
}

/// What an agent tells about itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentInfo {
    /// Version of the program.
    pub version: String,
    /// Where its sponsor listens, if it offers memory.
    pub sponsor: Option<String>,
    /// Bytes offered.
    pub offer: ByteSize,
    /// Bytes that regions have reserved.
    pub reserved: ByteSize,
    /// Bytes stored.
    pub stored: ByteSize,
    /// Regions held.
    pub regions: u64,
    /// VMs on this host.
    pub vms: u64,
    /// Whether the sponsor is being emptied.
    #[serde(default)]
    pub draining: bool,
    /// Whether the host is short of memory, so that the sponsor gives extents back.
    #[serde(default)]
    pub pressed: bool,
    /// Name in the pool; none without TLS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// Where VMs of other hosts are taken in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub migration: Option<String>,
}

/// Empties a sponsor, or stops to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Drain {
    /// Whether what the sponsor holds is to move to others.
    pub drain: bool,
}

/// Replaces the running programs by another build.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Upgrade {
    /// The new program.
    pub program: PathBuf,
}

/// An error that says what was wrong and what to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// Stable name for programs.
    pub code: String,
    /// What was wrong.
    pub message: String,
    /// Where, and the cause.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub detail: Option<String>,
    /// What to do.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub hint: Option<String>,
}

impl ApiError {
    /// An error without detail and hint.
    #[must_use]
    pub fn new(code: &str, message: impl Into<String>) -> Self {
        Self { code: code.to_owned(), message: message.into(), detail: None, hint: None }
    }

    /// The same with a detail.
    #[must_use]
    pub fn detail(mut self, detail: impl Into<String>) -> Self {
        self.detail = Some(detail.into());
        self
    }

    /// The same with a hint.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sponsors_parse_with_and_without_weight() {
        let plain: SponsorAddress = "h1:7900".parse().expect("valid");
        assert_eq!((plain.address.as_str(), plain.weight), ("h1:7900", 1));
        let weighted: SponsorAddress = "10.0.0.1:7900=3".parse().expect("valid");
        assert_eq!(weighted.weight, 3);
        let v6: SponsorAddress = "[::1]:7900".parse().expect("valid");
        assert_eq!(v6.address, "[::1]:7900");
    }

    #[test]
    fn sponsors_that_are_not_say_how_to_write_them() {
        for text in ["h1", ":7900", "h1:port", "h1:7900=0", "h1:7900=x"] {
            let error = text.parse::<SponsorAddress>().expect_err(text);
            assert!(error.contains("write"), "{text}: {error}");
        }
    }
}
