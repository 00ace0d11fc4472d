//! The pager of one VM or process: the data path.
//!
//! | thread | does |
//! |---|---|
//! | engine | owns the state machine; takes faults, reads replies, installs pages |
//! | evictor | unmaps victims, reads and sends dirty pages, takes acknowledgements, frees pages |
//! | sponsors | renews leases, connects again to sponsors that went away |
//!
//! Only the engine changes page state. The others report to it by messages, so there is no lock
//! in the fault path.

mod engine;
mod evictor;
mod lane;
mod preflight;
mod remote;
mod server;
mod statistics;
mod waker;

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, TryRecvError, bounded};
use heca_api::{ApiError, EvictionChoice, PagerStats, SponsorAddress};
use heca_core::pager::{Config, Protection};
use heca_core::placement::Layout;
use heca_sys::attach;
use heca_sys::pagemap::Pagemap;
use heca_sys::uffd::{Features, Modes, Userfaultfd};
use heca_types::limits::{BUDGET_PAGES_MIN, EXTENT_PAGES, PAGE_BYTES, REGION_BYTES_MAX};
use heca_types::{ByteSize, Epoch, OwnerId, PageIndex, RegionId};
use rustix::fs::SeekFrom;
use serde::{Deserialize, Serialize};

pub(crate) use preflight::swap_is_on;
pub use server::serve;

use engine::{Engine, Message};
use evictor::{Evictor, Unmapper};
use preflight::Target;
use remote::Remote;
use waker::Waker;

/// What a pager needs to know.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
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

/// Takes over the memory of a process. On any error nothing is changed, neither in the process nor
/// on the sponsors.
///
/// # Errors
/// Everything that makes paging impossible or unsafe, with what to do about it.
pub fn start(config: &PagerConfig) -> Result<PagerHandle, ApiError> {
    let budget_pages = check_budget(config.local)?;
    let target = preflight::find_target(config.pid, &config.ram_file)?;
    if target.len > REGION_BYTES_MAX {
        return Err(ApiError::new("region-too-large", "the memory is larger than 16 TiB"));
    }
    let pages = target.len / PAGE_BYTES as u64;
    let weights: Vec<u32> = config.sponsors.iter().map(|s| s.weight).collect();
    let extents = pages.div_ceil(EXTENT_PAGES) as u32;
    let layout = Layout::spread(extents, &weights, config.replicas)
        .map_err(|error| ApiError::new("placement", error.to_string()))?;
    let features = preflight::check_kernel()?;
    let (unmapper, method) = preflight::choose_unmapper(config.eviction, config.pid, features)?;
    let protection = unmapper.protection();
    let ram = Arc::new(preflight::open_ram(&config.ram_file, &target)?);

    let (remote, lanes) = Remote::connect(config, &layout)?;
    match attach_and_run(Setup {
        config,
        target,
        layout,
        features,
        unmapper,
        method,
        protection,
        ram,
        lanes,
        remote: remote.clone(),
        budget_pages,
        pages,
    }) {
        Ok(handle) => Ok(handle),
        Err(error) => {
            remote.close_regions();
            Err(error)
        }
    }
}

struct Setup<'a> {
    config: &'a PagerConfig,
    target: Target,
    layout: Layout,
    features: Features,
    unmapper: Unmapper,
    method: &'static str,
    protection: Protection,
    ram: Arc<File>,
    lanes: Vec<remote::Lanes>,
    remote: Remote,
    budget_pages: u64,
    pages: u64,
}

fn attach_and_run(setup: Setup<'_>) -> Result<PagerHandle, ApiError> {
    let Setup { config, target, layout, ram, remote, .. } = setup;
    let sponsors = config.sponsors.len() as u8;
    let mut core = heca_core::pager::Pager::new(Config {
        pages: setup.pages,
        budget_pages: setup.budget_pages,
        protection: setup.protection,
        layout: layout.clone(),
        sponsors,
        prefetch: config.prefetch,
        mutation: None,
    });
    let attached = attach::userfaultfd(config.pid).map_err(|error| attach_error(config, &error))?;
    let uffd = Arc::new(attached.uffd);
    let abandon = |error: ApiError| {
        let _ = uffd.unregister(target.base, target.len);
        let _ = attach::close_remote(config.pid, attached.remote_fd);
        error
    };
    register(&uffd, &target, setup.features, setup.protection).map_err(abandon)?;
    // A stopped guest may have been mapped by somebody else while we connected.
    preflight::refuse_second_mapper(&target).map_err(abandon)?;

    adopt_present_pages(&ram, setup.pages, &mut core)
        .map_err(|error| abandon(io_error("look for pages in the RAM file", &error)))?;
    let pidfd = heca_sys::process::open_pidfd(config.pid)
        .map_err(|error| abandon(io_error("watch the process", &error)))?;

    let waker = Arc::new(Waker::new().map_err(|e| abandon(io_error("make an eventfd", &e)))?);
    let evictor_waker =
        Arc::new(Waker::new().map_err(|e| abandon(io_error("make an eventfd", &e)))?);
    let (messages, inbox) = crossbeam_channel::unbounded();
    let (jobs, jobs_inbox) = crossbeam_channel::unbounded();
    let mut data_lanes = Vec::new();
    let mut write_lanes = Vec::new();
    for lanes in setup.lanes {
        data_lanes.push((lanes.demand, lanes.prefetch));
        write_lanes.push(lanes.write_back);
    }
    let evictor = Evictor::new(
        evictor::Context {
            uffd: uffd.clone(),
            ram: ram.clone(),
            target,
            layout: layout.clone(),
            region: config.region,
            epoch: config.epoch,
            remote: remote.clone(),
        },
        setup.unmapper,
        write_lanes,
        (jobs_inbox, evictor_waker.clone()),
        (messages.clone(), waker.clone()),
    )
    .map_err(|error| abandon(io_error("open the page map", &error)))?;
    let engine = Engine::new(
        core,
        engine::Context {
            uffd: uffd.clone(),
            ram,
            target,
            pidfd: pidfd.try_clone().map_err(|e| abandon(io_error("watch the process", &e)))?,
            name: config.name.clone(),
            method: setup.method,
            replicas: config.replicas,
            region: config.region,
            epoch: config.epoch,
            stopped: attached.stopped,
            spin: Duration::from_micros(config.spin_us),
            remote: remote.clone(),
        },
        data_lanes,
        (inbox, waker.clone()),
        (jobs, evictor_waker),
    )
    .map_err(|error| abandon(io_error("start the engine", &error)))?;

    let (end, ended) = bounded(0);
    let spawn = |name: &str, work: Box<dyn FnOnce() + Send>| {
        std::thread::Builder::new()
            .name(name.into())
            .spawn(work)
            .map_err(|error| io_error("start a thread", &error))
    };
    let (renewer, manager) = (remote.clone(), remote.clone());
    let to_engine = (messages.clone(), waker.clone());
    let to_engine2 = to_engine.clone();
    // The engine last, and only if all others run: once it began, pages may leave the process. The
    // others end by themselves when it does not come, as its end of their channels goes away.
    let others = || {
        Ok(vec![
            spawn("evictor", Box::new(move || evictor.run()))?,
            spawn("leases", Box::new(move || renewer.renew_leases(&to_engine.0, &to_engine.1)))?,
            spawn("sponsors", Box::new(move || manager.reconnect(&to_engine2.0, &to_engine2.1)))?,
        ])
    };
    let all = others().and_then(|mut threads: Vec<_>| {
        let run = move || {
            engine.run();
            drop(end);
        };
        threads.push(spawn("engine", Box::new(run))?);
        Ok(threads)
    });
    let threads = all.map_err(|error| {
        remote.stop();
        abandon(error)
    })?;
    Ok(PagerHandle {
        messages,
        waker,
        ended,
        remote,
        target,
        remote_fd: attached.remote_fd,
        uffd,
        pidfd,
        threads,
    })
}

fn io_error(what: &str, error: &std::io::Error) -> ApiError {
    ApiError::new("io", format!("cannot {what}")).detail(error.to_string())
}

fn attach_error(config: &PagerConfig, error: &std::io::Error) -> ApiError {
    let message = format!(
        "cannot take over the page faults of process {} ({})",
        config.pid,
        heca_sys::process::command_name(config.pid)
    );
    let hint = match error.raw_os_error() {
        Some(1) => {
            "run as root, and detach any debugger from the process (a process has one \
                    tracer at a time); `heca doctor` checks the rest"
        }
        Some(3) => "the process ended; start it again",
        _ => "run `heca doctor`",
    };
    ApiError::new("attach-failed", message).detail(error.to_string()).hint(hint)
}

fn register(
    uffd: &Userfaultfd,
    target: &Target,
    available: Features,
    protection: Protection,
) -> Result<(), ApiError> {
    let mut wanted = Features::PAGEFAULT_FLAG_WP
        .union(Features::MISSING_SHMEM)
        .union(Features::MINOR_SHMEM)
        .union(Features::WP_HUGETLBFS_SHMEM)
        .union(Features::WP_UNPOPULATED)
        .union(Features::POISON);
    if protection == Protection::Zap {
        wanted = wanted.union(Features::WP_ASYNC);
    }
    uffd.enable(wanted.intersection(available))
        .map_err(|error| io_error("set userfaultfd features", &error))?;
    let modes = Modes::MISSING.union(Modes::MINOR).union(Modes::WP);
    uffd.register(target.base, target.len, modes).map_err(|error| {
        let busy = error.raw_os_error() == Some(16);
        let hint = if busy {
            "another pager watches this memory already; end that one first"
        } else {
            "the memory must be a shared mapping of a file on tmpfs, such as /dev/shm"
        };
        ApiError::new("register-failed", "userfaultfd cannot watch this memory")
            .detail(error.to_string())
            .hint(hint)
    })
}

/// Pages that have content already are resident. Called after registration: whatever appears
/// later comes through the pager.
fn adopt_present_pages(
    ram: &File,
    pages: u64,
    core: &mut heca_core::pager::Pager,
) -> std::io::Result<()> {
    let mut offset = 0;
    let end = pages * PAGE_BYTES as u64;
    while offset < end {
        let data = match rustix::fs::seek(ram, SeekFrom::Data(offset)) {
            Ok(data) => data,
            Err(rustix::io::Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let hole = rustix::fs::seek(ram, SeekFrom::Hole(data))?.min(end);
        for page in data / PAGE_BYTES as u64..hole.div_ceil(PAGE_BYTES as u64) {
            core.adopt_resident(PageIndex(page));
        }
        offset = hole;
    }
    Ok(())
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
        self.end(gone)
    }

    fn end(mut self, close: bool) -> Option<PagerStats> {
        self.remote.stop();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        if close {
            self.remote.close_regions();
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
