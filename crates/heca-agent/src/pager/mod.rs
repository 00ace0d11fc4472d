//! The pager of one VM or process: the data path.
//!
//! | thread | does |
//! |---|---|
//! | engine | owns the state machine; takes faults, reads replies, installs pages |
//! | evictor | unmaps victims, reads and sends dirty pages, takes acknowledgements, frees pages |
//! | rebuilder | has sponsors copy pages from each other |
//! | keepers, one a sponsor | ask for signs of life, renew leases, connect again |
//!
//! Only the engine changes page state. The others report to it by messages, so there is no lock
//! in the fault path.

mod engine;
mod evictor;
mod handover;
mod keeper;
mod lane;
mod preflight;
mod rebuilder;
mod remote;
mod server;
mod start;
mod statistics;
mod waker;

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, TryRecvError, bounded};
use heca_api::{ApiError, EvictionChoice, PagerStats, SponsorAddress};
use heca_sys::attach;
use heca_sys::pagemap::Pagemap;
use heca_sys::uffd::Userfaultfd;
use heca_types::limits::{
    BUDGET_PAGES_MIN, DETECT_MS_DEFAULT, LEASE_MS_DEFAULT, PAGE_BYTES, REBUILD_AFTER_MS_DEFAULT,
    REBUILD_BYTES_PER_S_DEFAULT,
};
use heca_types::{ByteSize, Epoch, OwnerId, RegionId};
use serde::{Deserialize, Serialize};

pub(crate) use preflight::swap_is_on;
pub use server::serve;
pub use start::{journal_path, start};

use engine::Message;
use handover::behind::Behind;
use keeper::{Keeper, Mailbox};
use preflight::Target;
pub(crate) use remote::chain;
use remote::{Remote, lock};
use waker::Waker;

use crate::link::Link;
use crate::migrate::RegionInfo;

/// What a pager needs to know.
// Unknown fields are allowed: a VM outlives an upgrade, and the way back.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PagerConfig {
    /// Name in logs and metrics.
    pub name: String,
    /// Process whose memory is paged.
    pub pid: i32,
    /// The file that backs the memory, on tmpfs.
    pub ram_file: PathBuf,
    /// The region.
    pub region: RegionId,
    /// This demander.
    pub owner: OwnerId,
    /// Fencing token.
    pub epoch: Epoch,
    /// Part of the memory that may be local at a time.
    pub local: ByteSize,
    /// Sponsors that hold each extent.
    pub replicas: usize,
    /// The sponsors.
    pub sponsors: Vec<SponsorAddress>,
    /// How pages are taken from the guest.
    pub eviction: EvictionChoice,
    /// Whether sequential streams are fetched ahead.
    pub prefetch: bool,
    /// Lease asked for, in milliseconds.
    pub lease_ms: u64,
    /// How long the engine polls for work before it sleeps, in microseconds.
    pub spin_us: u64,
    /// Go on where a former pager of the process ended. The epoch is one above that one's.
    #[serde(default)]
    pub resume: bool,
    /// Directory of the host's identity for TLS; plaintext without one.
    #[serde(default)]
    pub identity: Option<PathBuf>,
    /// File of the key that pages are sealed with before they leave; not sealed without one.
    #[serde(default)]
    pub seal_key: Option<PathBuf>,
    /// Time without a sign of life after which a sponsor counts as dead, in milliseconds.
    #[serde(default = "default_detect_ms")]
    pub detect_ms: u64,
    /// Time that a sponsor may be away before its extents go elsewhere, in milliseconds.
    #[serde(default = "default_rebuild_after_ms")]
    pub rebuild_after_ms: u64,
    /// Bound of the traffic of rebuilding, in bytes a second.
    #[serde(default = "default_rebuild_bytes_per_s")]
    pub rebuild_bytes_per_s: u64,
    /// The VM comes from another host: its pager sends what it has, and what is behind follows.
    #[serde(default)]
    pub import: Option<ImportConfig>,
    /// The VM went to another host: nothing is paged any more, only what is behind is sent.
    #[serde(default)]
    pub follow: Option<Destination>,
}

/// What the pager of a VM that comes from another host needs to know beside all others.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ImportConfig {
    /// Where to listen for the source's pager; with port 0 for any.
    pub listen: String,
    /// What the source's pager names itself by.
    pub ticket: OwnerId,
    /// Identities of the sponsors' stores as the source knows them; zeros for unknown ones.
    pub stores: Vec<[u8; 16]>,
}

/// Where the pager of the VM's next host is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Destination {
    /// Where it listens.
    pub address: String,
    /// What this pager names itself by.
    pub ticket: OwnerId,
}

fn default_detect_ms() -> u64 {
    DETECT_MS_DEFAULT
}

fn default_rebuild_after_ms() -> u64 {
    REBUILD_AFTER_MS_DEFAULT
}

fn default_rebuild_bytes_per_s() -> u64 {
    REBUILD_BYTES_PER_S_DEFAULT
}

impl PagerConfig {
    /// A configuration with defaults for what is not named: a new region, plaintext, two replicas.
    #[must_use]
    pub fn new(
        pid: i32,
        ram_file: PathBuf,
        local: ByteSize,
        sponsors: Vec<SponsorAddress>,
    ) -> Self {
        Self {
            name: format!("pid-{pid}"),
            pid,
            ram_file,
            region: RegionId::random(),
            owner: OwnerId::random(),
            epoch: Epoch(1),
            local,
            replicas: 2,
            sponsors,
            eviction: EvictionChoice::Auto,
            prefetch: true,
            lease_ms: LEASE_MS_DEFAULT,
            spin_us: 0,
            resume: false,
            identity: None,
            seal_key: None,
            detect_ms: DETECT_MS_DEFAULT,
            rebuild_after_ms: REBUILD_AFTER_MS_DEFAULT,
            rebuild_bytes_per_s: REBUILD_BYTES_PER_S_DEFAULT,
            import: None,
            follow: None,
        }
    }
}

/// A pager that serves faults. Dropping the handle does not stop it.
#[derive(Debug)]
pub struct PagerHandle {
    messages: Sender<Message>,
    waker: Arc<Waker>,
    ended: Receiver<()>,
    remote: Remote,
    target: Target,
    remote_fd: i32,
    uffd: Arc<Userfaultfd>,
    pidfd: OwnedFd,
    threads: Vec<JoinHandle<()>>,
    keepers: Mutex<Vec<JoinHandle<Option<Link>>>>,
    journal: PathBuf,
    ram: Arc<std::fs::File>,
    region: RegionId,
    /// Pages that a former owner still has.
    behind: Option<Arc<Behind>>,
    /// The next owner was told of every page: the region is not ours to give back.
    handed_over: std::sync::atomic::AtomicBool,
}

/// Score that keeps the kernel from choosing the pager when memory is short.
const OOM_SCORE: &str = "-900";

/// Longest time between the loss of a process's memory and its end.
const END_TIMEOUT: Duration = Duration::from_secs(10);

/// Makes this process fit to serve page faults: its memory stays out of swap, it is the last to be
/// chosen when memory is short, and a panic of any of its threads ends all of it. Half a pager
/// would serve some faults and forget others; without a pager the guest stands still, and its
/// pages stay on the sponsors.
pub fn protect_process() {
    if let Err(error) = heca_sys::process::lock_memory() {
        tracing::warn!(%error, "memory is not locked: faults may wait for swap");
    }
    let _ = std::fs::write("/proc/self/oom_score_adj", OOM_SCORE);
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        report(panic);
        std::process::abort();
    }));
}

/// Checks that `local` is a budget that can work.
///
/// # Errors
/// A budget below the smallest one.
pub fn check_budget(local: ByteSize) -> Result<u64, ApiError> {
    let pages = local.pages();
    if pages < BUDGET_PAGES_MIN {
        return Err(ApiError::new(
            "budget-too-small",
            format!("a local budget of {local} is too small"),
        )
        .hint(format!("give at least {}", ByteSize(BUDGET_PAGES_MIN * PAGE_BYTES as u64))));
    }
    Ok(pages)
}

fn io_error(what: &str, error: &std::io::Error) -> ApiError {
    ApiError::new("io", format!("cannot {what}")).detail(error.to_string())
}

impl PagerHandle {
    fn send(&self, message: Message) {
        if self.messages.send(message).is_ok() {
            self.waker.wake();
        }
    }

    /// Figures; `None` once the pager ended.
    #[must_use]
    pub fn stats(&self) -> Option<PagerStats> {
        let (reply, answer) = bounded(1);
        self.send(Message::Stats(reply));
        let mut stats = answer.recv_timeout(Duration::from_secs(5)).ok()?;
        let Target { pid, base, len, .. } = self.target;
        stats.dirty_pages =
            Pagemap::open(pid).and_then(|map| map.count_written(base, base + len)).ok();
        Some(stats)
    }

    /// Changes the local budget. Pages beyond a smaller one are evicted in the background.
    ///
    /// # Errors
    /// A budget below the smallest one.
    pub fn resize(&self, local: ByteSize) -> Result<(), ApiError> {
        let pages = check_budget(local)?;
        self.send(Message::Event(heca_core::pager::Event::SetBudget { pages }));
        Ok(())
    }

    /// Starts the keeper of a sponsor.
    fn keep(&self, position: u8, control: Option<Link>, mailbox: &Mailbox) {
        let keeper = Keeper::new(self.remote.clone(), position, control, mailbox.clone());
        let name = format!("keeper-{position}");
        match std::thread::Builder::new().name(name).spawn(move || keeper.run()) {
            Ok(thread) => lock(&self.keepers).push(thread),
            Err(error) => {
                let reason = format!("no thread for it: {error}");
                mailbox.send(Message::LinkLost { sponsor: position, reason });
            }
        }
    }

    /// What the region's next owner must know beside its pages.
    fn region_info(&self) -> RegionInfo {
        let stores = self.remote.peers().iter().map(|peer| peer.store_id()).collect();
        RegionInfo { region: self.region, epoch: self.remote.epoch(), stores }
    }

    fn mailbox(&self) -> Mailbox {
        Mailbox { messages: self.messages.clone(), waker: self.waker.clone() }
    }

    fn keep_all(&self, controls: Vec<Option<Link>>) {
        for (position, control) in controls.into_iter().enumerate() {
            self.keep(position as u8, control, &self.mailbox());
        }
    }

    /// One more sponsor. It gets extents when one of the others is lost or leaves.
    ///
    /// # Errors
    /// Too many sponsors, or one that is known already.
    pub fn add_sponsor(&self, sponsor: &SponsorAddress) -> Result<(), ApiError> {
        let position = self.remote.add(sponsor)?;
        let mailbox = self.mailbox();
        mailbox.send(Message::Sponsor { weight: sponsor.weight });
        self.keep(position, None, &mailbox);
        Ok(())
    }

    /// Becomes disconnected when the process ended or the pager was detached.
    #[must_use]
    pub fn ended(&self) -> &Receiver<()> {
        &self.ended
    }

    /// Waits for the process to end, gives up the regions on the sponsors, and returns the last
    /// figures. Should the pager end before the process does, the sponsors keep their pages.
    pub fn finish(self) -> Option<PagerStats> {
        let _ = self.ended.recv();
        // A process that is being killed loses its memory before it counts as ended.
        let gone = pidfd_ends(&self.pidfd, END_TIMEOUT);
        if !gone {
            let pid = self.target.pid;
            tracing::error!(pid, "the pager ends while the process lives; sponsors keep its pages");
        }
        let ours = !self.handed_over.load(std::sync::atomic::Ordering::SeqCst);
        self.end(gone && ours)
    }

    fn end(mut self, close: bool) -> Option<PagerStats> {
        self.remote.stop();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        let keepers = std::mem::take(&mut *lock(&self.keepers));
        let controls = keepers.into_iter().map(|keeper| keeper.join().ok().flatten()).collect();
        if close {
            self.remote.close_regions(controls);
            let _ = std::fs::remove_file(&self.journal);
        }
        self.remote.last_stats()
    }

    /// Brings every page back to local memory and lets the process go on without a pager.
    /// `progress` gets the pages that are still remote, about ten times a second; it may end the
    /// attempt by returning `false`, which leaves the pager as it was, only with all the budget.
    ///
    /// Returns the last figures, if there are any: none if the process ended meanwhile and left
    /// none.
    ///
    /// # Errors
    /// The attempt was ended, or pages could not be brought back.
    pub fn detach(
        self,
        mut progress: impl FnMut(u64) -> bool,
    ) -> Result<Option<PagerStats>, Box<(Self, String)>> {
        self.send(Message::Event(heca_core::pager::Event::Restore));
        let begun = Instant::now();
        let stats = loop {
            if matches!(self.ended.try_recv(), Err(TryRecvError::Disconnected)) {
                return Ok(self.finish());
            }
            let (reply, answer) = bounded(1);
            self.send(Message::IsRestored(reply));
            if answer.recv_timeout(Duration::from_secs(1)) == Ok(true) {
                break self.stats();
            }
            let remote = self.stats().map_or(0, |stats| stats.gauges.remote_pages);
            if !progress(remote) {
                let waited = begun.elapsed().as_secs();
                let problem = format!("given up after {waited} s, {remote} pages remote");
                return Err(Box::new((self, problem)));
            }
            std::thread::sleep(Duration::from_millis(100));
        };
        if let Err(error) = self.uffd.unregister(self.target.base, self.target.len) {
            return Err(Box::new((self, format!("unregister: {error}"))));
        }
        let _ = attach::close_remote(self.target.pid, self.remote_fd);
        self.send(Message::Stop);
        let _ = self.ended.recv();
        let last = self.end(true);
        Ok(stats.or(last))
    }
}

/// Whether the process behind a descriptor ends within this time.
pub(crate) fn pidfd_ends(pidfd: &OwnedFd, within: Duration) -> bool {
    let mut fds =
        [rustix::event::PollFd::from_borrowed_fd(pidfd.as_fd(), rustix::event::PollFlags::IN)];
    let within = rustix::time::Timespec {
        tv_sec: within.as_secs() as i64,
        tv_nsec: i64::from(within.subsec_nanos()),
    };
    matches!(rustix::event::poll(&mut fds, Some(&within)), Ok(1))
}
