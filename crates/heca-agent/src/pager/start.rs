//! Taking over the memory of a process, and going on where a former pager ended.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{Receiver, bounded, unbounded};
use heca_api::ApiError;
use heca_core::pager::{Config, Pager, Protection};
use heca_core::placement::Layout;
use heca_sys::attach::{self, Attached};
use heca_sys::journal::Journal;
use heca_sys::uffd::{Features, Modes, Userfaultfd};
use heca_types::limits::{EXTENT_PAGES, PAGE_BYTES, REGION_BYTES_MAX};
use heca_types::{Epoch, ExtentIndex, PageIndex, PageVersion};
use rustix::fs::{FallocateFlags, SeekFrom, fallocate};

use super::engine::{self, Engine};
use super::evictor::{self, Evictor, Unmapper};
use super::handover::behind::Behind;
use super::handover::bitmap::Bitmap;
use super::handover::import::Incoming;
use super::keeper::Mailbox;
use super::preflight::{self, Target};
use super::rebuilder::Rebuilder;
use super::remote::Remote;
use super::waker::Waker;
use super::{PagerConfig, PagerHandle, check_budget, io_error};
use crate::link::{Link, Security};
use crate::seal::{SealKey, Sealer};

/// Header words of the journal.
const REMOTE_FD: usize = 0;
const WRITE_PROTECT: usize = 1;
const OWNER_PID: usize = 2;
/// Bit of a page's version in the journal: the page was dropped from local memory.
pub(super) const DROPPED: u32 = 1 << 31;
/// Bit of a page's version in the journal: the page is still with the region's former owner,
/// whatever the RAM file has for it.
pub(super) const BEHIND: u32 = 1 << 30;
/// Not zero once the former owner told of every page, for a region that came from one.
pub(super) const SWITCHED: usize = 5;
/// Not zero once the region has a newer owner.
pub(super) const FENCED: usize = 4;
/// One bit for each sponsor that ever acknowledged a page.
pub(super) const STORED: usize = 3;

/// Where a pager keeps what its successor must know: beside the RAM file, and so on tmpfs.
#[must_use]
pub fn journal_path(ram_file: &Path) -> PathBuf {
    let mut name = ram_file.as_os_str().to_owned();
    name.push(".journal");
    name.into()
}

/// Takes over the memory of a process. On any error nothing is changed, neither in the process nor
/// on the sponsors. With `resume`, goes on where a former pager of the process ended, however that
/// came.
///
/// # Errors
/// Everything that makes paging impossible or unsafe, with what to do about it.
pub fn start(config: &PagerConfig) -> Result<PagerHandle, ApiError> {
    let security = Security::load(config.identity.as_deref())?;
    let (setup, opened) = set_up(config, security)?;
    let (remote, resume) = (setup.remote.clone(), config.resume);
    let (controls, lanes) = opened.into_iter().map(Option::unzip).unzip();
    let started = attach_and_run(setup, controls, lanes);
    started.map_err(|(error, controls)| {
        remote.stop();
        if !resume {
            remote.close_regions(controls);
            let _ = std::fs::remove_file(journal_path(&config.ram_file));
        }
        error
    })
}

/// Everything up to the connections: nothing is changed in the process.
fn set_up(
    config: &PagerConfig,
    security: Security,
) -> Result<(Setup, Vec<Option<super::remote::Connected>>), ApiError> {
    let budget_pages = check_budget(config.local)?;
    let seal = match &config.seal_key {
        Some(path) => {
            let key = SealKey::load(path).map_err(|error| io_error("read the page key", &error))?;
            Some(Arc::new(Sealer::new(&key, config.region)))
        }
        None => None,
    };
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
    let path = journal_path(&config.ram_file);
    let identity = config.region.to_bytes();
    let journal = if config.resume {
        Journal::open(&path, pages, extents, identity)
    } else {
        refuse_living_journal(config, &path)?;
        let _ = std::fs::remove_file(&path);
        Journal::create(&path, pages, extents, identity)
    };
    let journal = Arc::new(journal.map_err(|error| {
        io_error("use the journal of the pager", &error).hint(format!("see {}", path.display()))
    })?);
    if journal.number(FENCED) != 0 {
        let text = "the memory has a newer owner: this process must not go on with it";
        return Err(
            ApiError::new("fenced", text).hint("stop the VM here: `heca vm stop NAME --now`")
        );
    }
    if config.resume && config.import.is_some() && journal.number(SWITCHED) == 0 {
        let text = "the VM's memory did not get here in full: it cannot go on here";
        return Err(ApiError::new("not-switched", text).hint("it stays where it came from"));
    }
    let mut config = config.clone();
    let eviction = if config.resume {
        // What the former pager may still have under way must not count any more.
        config.epoch = Epoch(journal.epoch() + 1);
        preflight::same_protection(config.eviction, journal.number(WRITE_PROTECT) == 1)
    } else {
        config.eviction
    };
    journal.set_epoch(config.epoch.0);
    let (unmapper, method) = preflight::choose_unmapper(eviction, config.pid, features)?;
    let protection = unmapper.protection();
    let was_write_protect = journal.number(WRITE_PROTECT) == 1;
    if config.resume && was_write_protect != (protection == Protection::WriteProtect) {
        let text = "pages can no longer be taken from the guest as the former pager did";
        return Err(ApiError::new("eviction-unusable", text).hint("turn swap off: `swapoff -a`"));
    }
    journal.set_number(WRITE_PROTECT, u64::from(protection == Protection::WriteProtect));
    let ram = Arc::new(preflight::open_ram(&config.ram_file, &target)?);

    let mut core = Pager::new(Config {
        pages,
        budget_pages,
        protection,
        replicas: config.replicas as u8,
        layout,
        weights,
        prefetch: config.prefetch,
        mutation: None,
    });
    // All of them from the beginning: a sponsor that is added later changes how the layout of a
    // later start comes out.
    for extent in (0..extents).map(ExtentIndex) {
        if config.resume {
            core.adopt_extent(extent, journal.extent(extent.0)).map_err(|error| {
                ApiError::new("bad-journal", "the former pager's journal is damaged")
                    .detail(error.to_string())
            })?;
        } else {
            journal.set_extent(extent.0, core.extent_record(extent));
        }
    }
    let connected = Remote::connect(&config, security, core.layout(), journal.clone());
    let (remote, opened) = connected.inspect_err(|error| {
        if error.code == "fenced" {
            stop_process(config.pid);
        }
    })?;
    let setup = Setup {
        config: config.clone(),
        target,
        features,
        unmapper,
        method,
        protection,
        ram,
        core,
        journal: journal.clone(),
        seal,
        remote: remote.clone(),
        pages,
    };
    Ok((setup, opened))
}

/// What is still in local memory must not be changed in two places.
fn stop_process(pid: i32) {
    use rustix::process::{Signal, pidfd_send_signal};
    let stopped = heca_sys::process::open_pidfd(pid)
        .and_then(|pidfd| pidfd_send_signal(&pidfd, Signal::STOP).map_err(Into::into));
    if let Err(error) = stopped {
        tracing::error!(%error, pid, "the fenced process is not stopped");
    }
}

/// A journal of a pager that ended while its process lives must not be overwritten.
fn refuse_living_journal(config: &PagerConfig, path: &Path) -> Result<(), ApiError> {
    let Some(words) = Journal::peek(path) else { return Ok(()) };
    let (pid, fd) = (words[OWNER_PID], words[REMOTE_FD]);
    let is_ours = pid == config.pid as u64 && attach::is_userfaultfd(config.pid, fd as i32);
    if !is_ours {
        return Ok(());
    }
    Err(ApiError::new(
        "pager-before",
        format!("the memory of process {pid} is paged already, or its pager ended in a crash"),
    )
    .detail(path.display().to_string())
    .hint("a VM's pager is started again by its agent; its pages are safe"))
}

struct Setup {
    config: PagerConfig,
    target: Target,
    features: Features,
    unmapper: Unmapper,
    method: &'static str,
    protection: Protection,
    ram: Arc<File>,
    core: Pager,
    journal: Arc<Journal>,
    seal: super::lane::Seal,
    remote: Remote,
    pages: u64,
}

/// A process that is taken over, before anything is known of its memory: that of a VM which comes
/// from another host.
pub(super) struct Prepared {
    setup: Setup,
    attached: Attached,
    controls: Vec<Option<Link>>,
    lanes: Vec<Option<super::remote::Lanes>>,
    pub(super) uffd: Arc<Userfaultfd>,
    pub(super) ram: Arc<File>,
    pub(super) journal: Arc<Journal>,
    /// Its machine, in which nothing is known of any page.
    pub(super) core: Pager,
}

impl Prepared {
    /// Takes over the faults of a process and connects to its sponsors, without opening its region:
    /// that is still another owner's.
    ///
    /// # Errors
    /// As [`start`].
    pub(super) fn new(config: &PagerConfig, security: Security) -> Result<Self, ApiError> {
        let (setup, opened) = set_up(config, security)?;
        let (controls, lanes) = opened.into_iter().map(Option::unzip).unzip();
        let attached = attach(&setup)?;
        let uffd = attached.uffd.try_clone().map_err(|e| io_error("use the userfaultfd", &e))?;
        Ok(Self {
            uffd: Arc::new(uffd),
            ram: setup.ram.clone(),
            journal: setup.journal.clone(),
            core: setup.core.clone(),
            setup,
            attached,
            controls,
            lanes,
        })
    }

    /// Pages in the region.
    pub(super) fn pages(&self) -> u64 {
        self.setup.pages
    }

    /// What is paged.
    pub(super) fn target(&self) -> Target {
        self.setup.target
    }

    /// Starts the threads of a pager, with all that the machine knows by now.
    ///
    /// # Errors
    /// Threads that cannot be started.
    pub(super) fn run(mut self, incoming: Incoming) -> Result<PagerHandle, ApiError> {
        self.setup.core = self.core;
        let remote_fd = self.attached.remote_fd;
        let stored = self.journal.number(STORED);
        self.setup.remote.set_extents(self.setup.core.layout(), stored);
        let stopped = self.attached.stopped;
        let mut handle = run(self.setup, &self.uffd, stopped, self.lanes, Some(incoming))?;
        handle.remote_fd = remote_fd;
        handle.keep_all(self.controls);
        Ok(handle)
    }
}

type Failed = (ApiError, Vec<Option<Link>>);

fn attach_and_run(
    setup: Setup,
    controls: Vec<Option<Link>>,
    lanes: Vec<Option<super::remote::Lanes>>,
) -> Result<PagerHandle, Failed> {
    let (config, target) = (setup.config.clone(), setup.target);
    let attached = match attach(&setup) {
        Ok(attached) => attached,
        Err(error) => return Err((error, controls)),
    };
    let uffd = Arc::new(attached.uffd);
    let remote_fd = attached.remote_fd;
    let resume = config.resume;
    let abandon = |error: ApiError| {
        if !resume {
            let _ = uffd.unregister(target.base, target.len);
            let _ = attach::close_remote(config.pid, remote_fd);
        }
        error
    };
    match run(setup, &uffd, attached.stopped, lanes, None) {
        Err(error) => Err((abandon(error), controls)),
        Ok(mut handle) => {
            handle.remote_fd = remote_fd;
            handle.keep_all(controls);
            Ok(handle)
        }
    }
}

/// Gets the process's page faults, and learns what is in its memory.
fn attach(setup: &Setup) -> Result<Attached, ApiError> {
    let (config, target, journal) = (&setup.config, &setup.target, &setup.journal);
    if config.resume {
        let remote_fd = journal.number(REMOTE_FD) as i32;
        let uffd = attach::userfaultfd_again(config.pid, remote_fd)
            .map_err(|error| attach_error(config, &error))?;
        return Ok(Attached { uffd, remote_fd, stopped: Duration::ZERO });
    }
    let attached = attach::userfaultfd(config.pid).map_err(|error| attach_error(config, &error))?;
    let prepared = register(&attached.uffd, target, setup.features, setup.protection)
        // A stopped guest may have been mapped by somebody else while we connected.
        .and_then(|()| preflight::refuse_second_mapper(target));
    if let Err(error) = prepared {
        let _ = attached.uffd.unregister(target.base, target.len);
        let _ = attach::close_remote(config.pid, attached.remote_fd);
        return Err(error);
    }
    journal.set_number(REMOTE_FD, attached.remote_fd as u64);
    journal.set_number(OWNER_PID, config.pid as u64);
    Ok(attached)
}

/// Starts the threads.
fn run(
    setup: Setup,
    uffd: &Arc<Userfaultfd>,
    stopped: Duration,
    lanes: Vec<Option<super::remote::Lanes>>,
    incoming: Option<Incoming>,
) -> Result<PagerHandle, ApiError> {
    let Setup { config, target, mut core, ram, remote, journal, .. } = setup;
    let incoming = match incoming {
        Some(incoming) => Some(incoming),
        None => adopt_pages(&ram, setup.pages, &journal, &mut core)
            .map_err(|error| io_error("look for pages in the RAM file", &error))?
            .map(|missing| {
                let (ram, journal) = (ram.clone(), journal.clone());
                let behind = Behind::again(missing, ram, journal, uffd.clone(), target);
                Incoming {
                    behind: Arc::new(behind),
                    unmapped: Bitmap::default(),
                    order: Vec::new(),
                }
            }),
    };
    let behind = incoming.as_ref().map(|incoming| incoming.behind.clone());
    let ram_again = ram.clone();
    let pidfd = heca_sys::process::open_pidfd(config.pid)
        .map_err(|error| io_error("watch the process", &error))?;
    let eventfd =
        || Waker::new().map(Arc::new).map_err(|error| io_error("make an eventfd", &error));
    let (waker, evictor_waker) = (eventfd()?, eventfd()?);
    let (messages, inbox) = unbounded();
    let (jobs, jobs_inbox) = unbounded();
    let (pulls, pulls_inbox) = unbounded();
    let mailbox = Mailbox { messages: messages.clone(), waker: waker.clone() };
    let mut data_lanes = Vec::new();
    let mut write_lanes = Vec::new();
    for lanes in lanes {
        let (data, write) = lanes.map(|l| ((l.demand, l.prefetch), l.write_back)).unzip();
        data_lanes.push(data);
        write_lanes.push(write);
    }
    let evictor = Evictor::new(
        evictor::Context {
            uffd: uffd.clone(),
            ram: ram.clone(),
            target,
            region: config.region,
            remote: remote.clone(),
            seal: setup.seal.clone(),
        },
        setup.unmapper,
        write_lanes,
        (jobs_inbox, evictor_waker.clone()),
        (messages.clone(), waker.clone()),
    )
    .map_err(|error| io_error("open the page map", &error))?;
    let engine = Engine::new(
        core,
        engine::Context {
            uffd: uffd.clone(),
            ram,
            target,
            pidfd: pidfd.try_clone().map_err(|e| io_error("watch the process", &e))?,
            name: config.name.clone(),
            method: setup.method,
            replicas: config.replicas,
            region: config.region,
            stopped,
            spin: Duration::from_micros(config.spin_us),
            remote: remote.clone(),
            journal,
            seal: setup.seal,
            pulls,
            resumed: config.resume,
            incoming,
        },
        data_lanes,
        (inbox, waker.clone()),
        (jobs, evictor_waker),
    )
    .map_err(|error| io_error("start the engine", &error))?;
    let rebuilder = Rebuilder::new(remote.clone(), pulls_inbox, mailbox.clone());
    let (threads, ended) =
        start_threads(engine, evictor, rebuilder).inspect_err(|_| remote.stop())?;
    let handle = PagerHandle {
        messages,
        waker,
        ended,
        remote,
        target,
        remote_fd: 0,
        uffd: uffd.clone(),
        pidfd,
        threads,
        keepers: std::sync::Mutex::default(),
        journal: journal_path(&config.ram_file),
        ram: ram_again,
        region: config.region,
        behind,
        handed_over: std::sync::atomic::AtomicBool::new(false),
    };
    Ok(handle)
}

fn start_threads(
    engine: Engine,
    evictor: Evictor,
    rebuilder: Rebuilder,
) -> Result<(Vec<JoinHandle<()>>, Receiver<()>), ApiError> {
    let (end, ended) = bounded(0);
    let spawn = |name: &str, work: Box<dyn FnOnce() + Send>| {
        std::thread::Builder::new()
            .name(name.into())
            .spawn(work)
            .map_err(|error| io_error("start a thread", &error))
    };
    // The engine last, and only if all others run: once it began, pages may leave the process. The
    // others end by themselves when it does not come, as its end of their channels goes away.
    let mut threads = vec![
        spawn("evictor", Box::new(move || evictor.run()))?,
        spawn("rebuilder", Box::new(move || rebuilder.run()))?,
    ];
    let run = move || {
        engine.run();
        drop(end);
    };
    threads.push(spawn("engine", Box::new(run))?);
    Ok((threads, ended))
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

/// Pages that have content already are resident; those that have none and were stored by a former
/// pager are remote. Called after registration: whatever appears later comes through the pager.
///
/// Returns the pages that are behind, if the VM came from another host and some are.
fn adopt_pages(
    ram: &File,
    pages: u64,
    journal: &Journal,
    core: &mut Pager,
) -> std::io::Result<Option<Vec<u64>>> {
    let mut behind = Vec::new();
    for page in 0..pages {
        let word = journal.version(page);
        if word & BEHIND != 0 {
            behind.push(page);
            core.adopt_behind(PageIndex(page), PageVersion(word & !(BEHIND | DROPPED)));
        }
    }
    if let Some(page) = journal.filling() {
        // Perhaps written half. Nobody has seen it: it was not mapped yet.
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(ram, flags, PageIndex(page).offset(), PAGE_BYTES as u64)?;
        journal.set_filling(None);
    }
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
            let version = journal.version(page) & !DROPPED;
            if version & BEHIND != 0 {
                continue;
            }
            journal.set_version(page, version);
            core.adopt_resident(PageIndex(page), PageVersion(version));
        }
        offset = hole;
    }
    for page in 0..pages {
        let version = journal.version(page);
        if version != 0 && version & BEHIND == 0 {
            let dropped = version & DROPPED != 0;
            core.adopt_absent(PageIndex(page), PageVersion(version & !DROPPED), dropped);
        }
    }
    Ok((!behind.is_empty()).then_some(behind))
}
