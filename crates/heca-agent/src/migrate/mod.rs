//! What the agents of two hosts say to each other about a VM that moves between them.
//!
//! One connection carries questions and answers, as JSON in blob frames: the source asks, the
//! target answers. Another one, made in advance, carries QEMU's stream. Both are TLS where the
//! host is in a pool, and begin with a hello as those to sponsors do.

pub(crate) mod listener;
pub(crate) mod relay;

use std::time::{Duration, Instant};

use heca_api::{ApiError, ImportInfo, MigrationMode, VmRequest};
use heca_core::handover::Answer;
use heca_types::limits::FRAME_PAYLOAD_MAX;
use heca_types::{Epoch, OwnerId, RegionId};
use heca_wire::{Body, Header, Kind, Role, encode_blob};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::link::{Link, LinkError, Security};
use crate::pager::chain;

/// What is known of a region beside its pages.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegionInfo {
    /// The region.
    pub region: RegionId,
    /// Epoch of its present owner.
    pub epoch: Epoch,
    /// Identities of its sponsors' stores, in order; zeros for unknown ones.
    pub stores: Vec<[u8; 16]>,
}

/// A VM that wants to come.
// No `Debug`: it may carry a key.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Prepare {
    /// Names this attempt.
    pub(crate) id: Uuid,
    pub(crate) request: VmRequest,
    pub(crate) accel: String,
    pub(crate) mode: MigrationMode,
    /// None if QEMU moves the memory: the VM gets a region of its own then.
    pub(crate) region: Option<RegionInfo>,
    /// Content of the file of the key that pages are sealed with.
    pub(crate) seal_key: Option<Vec<u8>>,
}

/// What a source asks.
#[derive(Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Ask {
    /// Get ready.
    Prepare(Box<Prepare>),
    /// Say when QEMU has the guest's state, or after this time.
    AwaitLoaded { ms: u64 },
    /// How much of the memory is there?
    Import,
    /// The right to run.
    Grant { id: Uuid },
    /// Where is the right to run?
    Query { id: Uuid },
    /// The source keeps the guest.
    GiveUp { id: Uuid },
    /// Does the VM that came still need its former host?
    Needs { id: Uuid },
    /// The source has heard that the guest runs on the target, and asks no more.
    Forget { id: Uuid },
}

/// What a target answers.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Told {
    Prepared(Prepared),
    /// Whose answer: an agent that was started anew, on a host that was, may not know what it did.
    Answer {
        answer: Answer,
        boot: String,
        /// Time to take the memory over, and to have the guest go on, in milliseconds.
        #[serde(default)]
        took_ms: Option<(f64, f64)>,
    },
    Import(ImportInfo),
    /// Whether the VM needs its former host.
    Needs {
        source: bool,
        boot: String,
    },
    Failed(ApiError),
    Done,
}

/// Where a target waits for the rest.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Prepared {
    /// Where the pager listens; none if QEMU moves the memory.
    pub(crate) pager: Option<String>,
    /// What pager and QEMU's stream name themselves by.
    pub(crate) ticket: OwnerId,
    /// Where QEMU itself listens, if its stream takes no detour.
    pub(crate) qemu: Option<String>,
    /// Tells one life of the host from the next.
    pub(crate) boot: String,
}

/// Tells one life of this host from the next.
pub(crate) fn boot_id() -> String {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    id.trim().to_owned()
}

fn append(value: &impl Serialize, out: &mut Vec<u8>) -> Result<(), LinkError> {
    let bytes = serde_json::to_vec(value).map_err(std::io::Error::other)?;
    if bytes.len() > FRAME_PAYLOAD_MAX {
        return Err(std::io::Error::other("a message that is too long").into());
    }
    let region = RegionId::from_bytes([0; 16]);
    encode_blob(Header::new(Kind::Blob, region, Epoch(0), 0), &bytes, out);
    Ok(())
}

/// A source's connection to a target's agent.
#[derive(Debug)]
pub(crate) struct Peer {
    link: Link,
}

impl Peer {
    pub(crate) fn connect(to: &str, owner: OwnerId, security: &Security) -> Result<Self, ApiError> {
        let link = Link::connect(to, Role::Migration, owner, security);
        let (link, _) = link.map_err(|error| {
            ApiError::new("target-unreachable", format!("the agent at {to} cannot be reached"))
                .detail(chain(&error))
                .hint("the target's agent takes in VMs with --migration-listen ADDRESS:PORT")
        })?;
        Ok(Self { link })
    }

    /// Asks and waits for the answer, at most this long.
    pub(crate) fn ask(&mut self, ask: &Ask, timeout: Duration) -> Result<Told, ApiError> {
        let lost = |error: LinkError| {
            ApiError::new("target-silent", "the target's agent does not answer")
                .detail(chain(&error))
        };
        append(ask, self.link.output()).map_err(lost)?;
        let bytes = self.link.request(timeout, |_, body| match body {
            Body::Blob(bytes) => Some(bytes.to_vec()),
            _ => None,
        });
        let told = serde_json::from_slice(&bytes.map_err(lost)?);
        match told {
            Ok(Told::Failed(error)) => Err(error),
            Ok(told) => Ok(told),
            Err(error) => Err(lost(std::io::Error::other(error).into())),
        }
    }
}

/// Waits for the next question on a target's connection, until then.
pub(crate) fn next_ask(link: &mut Link, deadline: Instant) -> Result<Ask, LinkError> {
    loop {
        if let Some((header, body)) = link.next_frame()? {
            let Body::Blob(bytes) = body else {
                return Err(LinkError::Unexpected { found: header.kind });
            };
            return serde_json::from_slice(bytes)
                .map_err(|error| std::io::Error::other(error).into());
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(std::io::Error::from(std::io::ErrorKind::TimedOut).into());
        }
        link.set_timeout(Some(left))?;
        match link.receive_blocking() {
            Err(LinkError::Io(error)) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            other => other?,
        }
    }
}

/// Answers on a target's connection.
pub(crate) fn tell(link: &mut Link, told: &Told) -> Result<(), LinkError> {
    append(told, link.output())?;
    link.flush_blocking()
}
