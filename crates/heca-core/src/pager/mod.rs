//! States of a region's pages, and what each event does to them.
//!
//! ```text
//!             fault: Zero                 chosen as victim: Unmap
//! Untouched ---------------> Resident --------------------------> Unmapping
//!     ^                       ^  ^  ^                              |     |
//!     | Punched (was zero)    |  |  |      fault: Continue         |     | Sent
//!     |                       |  |  +------------------------------+     v
//!  Punching <--- Standby -----+  +-------------------------------- Storing
//!     |     Punch   ^   fault: Continue    fault: Continue            |
//!     | Punched     +--------- all live replicas acknowledged --------+
//!     v             |
//!   Remote ------> Fetching ----> Resident          (demand: Copy)
//!           Fetch      +--------> Standby           (prefetch: Fill)
//! ```
//!
//! The pages in use are a FIFO list. Eviction takes the oldest and its neighbours, unmaps them without
//! freeing them, stores what is dirty, and parks them in `Standby`: still in local memory, with a valid remote
//! copy. Standby is the inactive list: a touch there costs a minor fault and moves the page back
//! to the end of the FIFO, so pages in use are found without access bits, and room for a fault is
//! made by `Punch` alone, never by waiting for the network.
//!
//! `Punch` is the point of no return, and only the machine orders it, for pages that nobody mapped
//! since their unmapping was verified. Any touch before that cancels the eviction. A late result of
//! a cancelled attempt is told from a current one by the version, which rises at each attempt.
//!
//! A region that was handed over by another owner has pages that are `Behind`: they are still in the
//! former owner's memory. A fault there asks for the page (`Demand`); `Arrived` makes it `Resident`.
//! They hold their frames from the beginning. See [`Pager::holding`] for the former owner's side.
//!
//! Contract with the caller:
//! - install actions (`Copy`, `Fill`, `Zero`, `Continue`, `Unprotect`) are carried out at once and
//!   answered with `Installed` before any other event; `Copy` and `Fill` use the reply that the
//!   `Fetched` event came from;
//! - the answers to one `Unmap` come in order: `Unmapped` first, then `Stored` or `StoreFailed`
//!   for each replica that it was sent to;
//! - each `Hold` gets one answer, and a sponsor carries out `Hold` and `Release` in their order; those
//!   of a connection that was lost are not carried out after the next `SponsorUp`;
//! - `SponsorDown` comes before the `FetchFailed` and `StoreFailed` of what was in flight there.

mod evict;
mod fetch;
mod handover;
mod list;
mod machine;
mod rebuild;
mod recover;
mod stream;
#[cfg(test)]
mod tests;
mod touch;

use heca_types::{ExtentIndex, PageIndex, PageVersion};
use serde::{Deserialize, Serialize};

pub use handover::Holding;
pub use machine::Pager;
pub use recover::BadRecord;

use crate::placement::Layout;

/// How eviction keeps the guest from writing to a page that is being stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Protection {
    /// The mapping is zapped and the next touch is held as a minor fault. Dirty pages are known by
    /// the kernel's asynchronous write-protect bit, which is read after the zap.
    Zap,
    /// The page stays mapped but synchronously write-protected. Dirty pages are known because
    /// their first write is a fault.
    WriteProtect,
}

/// An invariant that is broken on purpose, to show that the tests would notice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mutation {
    /// A page touched while it is being stored counts as clean (breaks PG-1).
    ForgetDirty,
    /// A page is dropped after the first acknowledgement (breaks PG-2).
    PunchEarly,
    /// A fault on a page that is being fetched fetches it again (breaks PG-3).
    FetchTwice,
    /// A fault on a page that is being dropped is forgotten (breaks PG-4 and PG-5).
    ForgetFault,
    /// Fetches ignore the budget (breaks PG-6).
    IgnoreBudget,
    /// Sponsors accept older epochs (breaks EP-1).
    AcceptStaleEpoch,
    /// A late answer counts although the page changed since it was asked for (breaks PG-1).
    HedgeAnyVersion,
    /// A replica counts as complete while copies to it are still under way (breaks RB-1).
    RebuildEarly,
    /// After a crash of the pager, pages that are not in local memory count as never written
    /// (breaks PG-1).
    RecoverAsZero,
    /// Before a migration's switch, a page that the last scan does not see counts as not written
    /// (breaks PG-1).
    FinalScanTrusts,
    /// A page counts as sent in its current content only after it was read for sending, over a
    /// write that was seen meanwhile (breaks PG-1).
    MarkAfterRead,
    /// A page that was behind is recorded as arrived only after the guest can write to it
    /// (breaks MG-3 and PG-1).
    ArriveLate,
    /// Marks of writes that a migration takes from the kernel are forgotten (breaks PG-1 and PG-2).
    WrittenForgets,
    /// The source of a migration takes silence for a refusal (breaks MG-1).
    ResumeOnSilence,
    /// The target of a migration lets the guest run before it wrote that down (breaks MG-1).
    RunBeforeRecord,
}

impl Mutation {
    /// Every mutation.
    pub const ALL: [Self; 15] = [
        Self::ForgetDirty,
        Self::PunchEarly,
        Self::FetchTwice,
        Self::ForgetFault,
        Self::IgnoreBudget,
        Self::AcceptStaleEpoch,
        Self::HedgeAnyVersion,
        Self::RebuildEarly,
        Self::RecoverAsZero,
        Self::FinalScanTrusts,
        Self::MarkAfterRead,
        Self::ArriveLate,
        Self::WrittenForgets,
        Self::ResumeOnSilence,
        Self::RunBeforeRecord,
    ];
}

/// Settings of a pager.
#[derive(Debug, Clone)]
pub struct Config {
    /// Replicas that each extent should have.
    pub replicas: u8,
    /// Pages in the region.
    pub pages: u64,
    /// Pages that may be local at a time.
    pub budget_pages: u64,
    /// How eviction holds writers.
    pub protection: Protection,
    /// Replica set of each extent.
    pub layout: Layout,
    /// Share of each sponsor; extents may move to any of them.
    pub weights: Vec<u32>,
    /// Whether sequential streams are fetched ahead.
    pub prefetch: bool,
    /// Break an invariant on purpose.
    pub mutation: Option<Mutation>,
}

/// Kind of a page fault as the kernel names it. The machine decides by its own page state; the
/// kind only says which write-protect faults need their protection lifted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultKind {
    /// No page there.
    Missing,
    /// A page there that is not mapped.
    Minor,
    /// A write to a write-protected page.
    WriteProtect,
}

/// Why a fetch brought nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FetchError {
    /// The sponsor does not have the page in the version asked for.
    Absent,
    /// The bytes do not match their checksum.
    Corrupt,
    /// The sponsor refused.
    Refused,
    /// The connection was lost before the answer came.
    Lost,
}

/// An install action that was carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Install {
    /// See [`Action::Copy`].
    Copy,
    /// See [`Action::Fill`].
    Fill,
    /// See [`Action::Zero`].
    Zero,
    /// See [`Action::Continue`].
    Continue,
    /// See [`Action::Unprotect`].
    Unprotect,
}

/// What the kernel said to an install action.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InstallResult {
    /// Done; waiting threads are awake.
    Ok,
    /// The page is there already (`EEXIST`).
    Exists,
    /// The owner's address space is changing (`EAGAIN`): try again.
    Again,
    /// There is no page to map (`EFAULT` of `UFFDIO_CONTINUE`): the owner discarded it.
    Hole,
    /// No memory for the page.
    NoMemory,
    /// The owner is gone (`ESRCH`).
    Gone,
}

/// Outcome of an [`Action::Unmap`]. Masks have one bit for each sponsor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unmapped {
    /// The page is still mapped; nothing was sent.
    Mapped,
    /// The page was not written since it was installed; nothing was sent.
    Clean,
    /// The page was sent to these sponsors.
    Sent(u16),
    /// The page is all zeros; these sponsors were told (none if none ever had it).
    Zero(u16),
    /// The page could not be read; nothing was sent.
    Failed,
}

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// A thread waits on a page.
    Fault {
        /// Where.
        page: PageIndex,
        /// Why.
        kind: FaultKind,
    },
    /// A reply with the version asked for and a good checksum is at hand.
    Fetched {
        /// The page.
        page: PageIndex,
        /// The version that was asked for.
        version: PageVersion,
        /// Who sent it.
        sponsor: u8,
    },
    /// The answer to a fetch that a thread waits for is overdue: ask another replica, too.
    Late {
        /// The page.
        page: PageIndex,
        /// Who was asked.
        sponsor: u8,
    },
    /// A fetch failed.
    FetchFailed {
        /// The page.
        page: PageIndex,
        /// The sponsor asked.
        sponsor: u8,
        /// Why.
        error: FetchError,
    },
    /// An install action was carried out.
    Installed {
        /// The page.
        page: PageIndex,
        /// The action.
        what: Install,
        /// Its result.
        result: InstallResult,
    },
    /// A victim was unmapped, and sent where it had to be.
    Unmapped {
        /// The page.
        page: PageIndex,
        /// The attempt, as in the action.
        version: PageVersion,
        /// How it went.
        outcome: Unmapped,
    },
    /// A replica stored a page.
    Stored {
        /// The page.
        page: PageIndex,
        /// The attempt.
        version: PageVersion,
        /// Who.
        sponsor: u8,
    },
    /// A replica did not store a page.
    StoreFailed {
        /// The page.
        page: PageIndex,
        /// The attempt.
        version: PageVersion,
        /// Who.
        sponsor: u8,
    },
    /// A page was freed, or could not be.
    Punched {
        /// The page.
        page: PageIndex,
        /// Whether it is free now.
        ok: bool,
    },
    /// A sponsor cannot be reached.
    SponsorDown {
        /// Which.
        sponsor: u8,
    },
    /// A sponsor can be reached again, with the store it had.
    SponsorUp {
        /// Which.
        sponsor: u8,
    },
    /// A sponsor that was down lost what it held. Comes before its `SponsorUp`.
    SponsorEmptied {
        /// Which.
        sponsor: u8,
    },
    /// A sponsor that was down stays away: its extents may go elsewhere. `SponsorUp` takes it back.
    SponsorLost {
        /// Which.
        sponsor: u8,
    },
    /// A sponsor is slow to answer anything: others are asked first.
    SponsorSuspect {
        /// Which.
        sponsor: u8,
        /// Whether it is under suspicion now.
        suspect: bool,
    },
    /// A sponsor wants to be rid of what it holds: it is being emptied, or its host runs short.
    SponsorLeaving {
        /// Which.
        sponsor: u8,
        /// Whether it wants to now.
        leaving: bool,
    },
    /// How long a sponsor takes to answer a read, in microseconds: a smoothed figure.
    Latency {
        /// Which.
        sponsor: u8,
        /// The figure.
        us: u32,
    },
    /// Answer to [`Action::Hold`].
    Held {
        /// The extent.
        extent: ExtentIndex,
        /// Who was asked.
        sponsor: u8,
        /// Whether it holds the extent now.
        ok: bool,
    },
    /// Answer to [`Action::Pull`].
    Pulled {
        /// The page.
        page: PageIndex,
        /// As in the action.
        attempt: u32,
        /// Whether the target has the page in this or a newer version now.
        ok: bool,
    },
    /// The local budget changes.
    SetBudget {
        /// New budget, in pages.
        pages: u64,
    },
    /// Bring every page back to local memory, to let the owner go on without a pager.
    Restore,
    /// A page that was behind is in the RAM file now, in full. It may be mapped already.
    Arrived {
        /// The page.
        page: PageIndex,
    },
    /// The connection to the region's former owner is back: ask again for the pages that threads
    /// wait for.
    SourceBack,
    /// Store everything that is local and keep it in local memory, unmapped, or stop to.
    Flush {
        /// Whether to from now on.
        on: bool,
    },
    /// The region is being handed over: nothing is taken from the guest and nothing is stored, and
    /// the budget does not bind, until this is lifted.
    Freeze {
        /// Whether to from now on.
        on: bool,
    },
    /// Time passed: retry what waits for memory, look for extents to rebuild.
    Tick,
    /// There is time to go on with a rebuild; see [`Pager::has_work`].
    Work,
}

/// Who waits for a fetch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FetchClass {
    /// A thread of the guest.
    Demand,
    /// Nobody yet.
    Prefetch,
}

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Ask a sponsor for a page.
    Fetch {
        /// The page.
        page: PageIndex,
        /// The version that the reply must have.
        version: PageVersion,
        /// Whom to ask.
        sponsor: u8,
        /// On which connection.
        class: FetchClass,
    },
    /// Install the reply at hand write-protected, map it and wake (`UFFDIO_COPY`).
    Copy {
        /// The page.
        page: PageIndex,
    },
    /// Put the reply at hand into the RAM file without mapping it.
    Fill {
        /// The page.
        page: PageIndex,
    },
    /// Install a writable page of zeros and wake (`UFFDIO_ZEROPAGE`).
    Zero {
        /// The page.
        page: PageIndex,
    },
    /// Map the page that is in the RAM file and wake (`UFFDIO_CONTINUE`).
    Continue {
        /// The page.
        page: PageIndex,
        /// Whether to map it write-protected, so that a write is noticed.
        protect: bool,
    },
    /// Lift synchronous write protection and wake (`UFFDIO_WRITEPROTECT`).
    Unprotect {
        /// The page.
        page: PageIndex,
    },
    /// Ask the region's former owner for a page that is behind.
    Demand {
        /// The page.
        page: PageIndex,
    },
    /// Wake threads that wait on the page; they look again (`UFFDIO_WAKE`).
    Wake {
        /// The page.
        page: PageIndex,
    },
    /// Give every access to the page a memory error (`UFFDIO_POISON`), as its content is lost.
    Poison {
        /// The page.
        page: PageIndex,
    },
    /// Unmap the page (or write-protect it), see whether it is dirty, and store it if so.
    Unmap {
        /// The page.
        page: PageIndex,
        /// Version to store it under.
        version: PageVersion,
        /// Store it even if the kernel calls it clean.
        dirty: bool,
        /// Sponsors to store it on, one bit each.
        sponsors: u16,
    },
    /// Free the page's local memory. Version and `zero` are to be written down before the page goes;
    /// that it went counts until it is brought back.
    Punch {
        /// The page.
        page: PageIndex,
        /// The version that the sponsors hold.
        version: PageVersion,
        /// The page is all zeros: nobody needs to be asked for it.
        zero: bool,
    },
    /// The replica set of an extent, or what is known of its gaps, changed: write down
    /// [`Pager::extent_record`] before anything that comes later.
    Extent {
        /// The extent.
        extent: ExtentIndex,
    },
    /// Ask a sponsor to hold an extent.
    Hold {
        /// The extent.
        extent: ExtentIndex,
        /// Whom to ask.
        sponsor: u8,
    },
    /// Tell a sponsor that it need not hold an extent any longer. Nobody waits for an answer.
    Release {
        /// The extent.
        extent: ExtentIndex,
        /// Whom to tell.
        sponsor: u8,
    },
    /// Have one sponsor get a page from another.
    Pull {
        /// The page.
        page: PageIndex,
        /// The version wanted.
        version: PageVersion,
        /// Who has it.
        from: u8,
        /// Who gets it.
        to: u8,
        /// Tells answers to copies that were given up from current ones.
        attempt: u32,
    },
}

/// Counts since the start. Every field but the gauges only rises.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "each name says what is counted")]
pub struct Counters {
    pub faults: u64,
    pub faults_missing: u64,
    pub faults_minor: u64,
    pub faults_write_protect: u64,
    pub zero_installs: u64,
    pub demand_fetches: u64,
    pub prefetches: u64,
    pub prefetches_used: u64,
    pub prefetches_wasted: u64,
    pub standby_hits: u64,
    #[serde(default)]
    pub mapped_ahead: u64,
    pub faults_stalled: u64,
    pub faults_blocked: u64,
    pub evicted_clean_pages: u64,
    pub evicted_dirty_pages: u64,
    pub evicted_zero_pages: u64,
    pub punched_pages: u64,
    pub cancelled_unmapping: u64,
    pub cancelled_storing: u64,
    pub skipped_mapped: u64,
    pub store_failures: u64,
    pub late_results: u64,
    pub fetch_retries: u64,
    pub corrupt_replies: u64,
    pub fetched_from_stale: u64,
    pub install_exists: u64,
    pub install_again: u64,
    pub install_no_memory: u64,
    pub owner_discards: u64,
    pub faults_while_fetching: u64,
    pub faults_while_punching: u64,
    pub punch_failures: u64,
    pub poisoned_pages: u64,
    pub hedged_fetches: u64,
    pub hedges_won: u64,
    pub rebuilt_pages: u64,
    pub rebuilt_extents: u64,
    pub moved_extents: u64,
    pub rebuild_failures: u64,
    #[serde(default)]
    pub behind_demands: u64,
    #[serde(default)]
    pub behind_arrived: u64,
}

/// Where the region's pages are now, in pages.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gauges {
    /// Pages in the region.
    pub pages: u64,
    /// Local budget.
    pub budget_pages: u64,
    /// Frames in use: everything local, and room taken by fetches in flight.
    pub local_pages: u64,
    /// Of these, in use by the guest.
    pub resident_pages: u64,
    /// Of these, kept as a cache in front of the sponsors.
    pub standby_pages: u64,
    /// Pages that are only on sponsors.
    pub remote_pages: u64,
    /// Pages never touched, or known to be zeros.
    pub untouched_pages: u64,
    /// Faults that wait for a free frame.
    pub stalled_faults: u64,
    /// Faults that wait for a sponsor.
    pub blocked_faults: u64,
    /// Pages whose content is lost.
    pub poisoned_pages: u64,
    /// Pages that are still with the region's former owner.
    #[serde(default)]
    pub behind_pages: u64,
    /// Extents of the region.
    pub extents: u64,
    /// Extents with a replica that is away or incomplete.
    pub degraded_extents: u64,
    /// Extents with a replica on a sponsor that wants to be rid of it.
    pub leaving_extents: u64,
}
