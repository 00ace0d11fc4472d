//! Life cycle of the VMs of a host.

mod adopt;
mod arrive;
mod auto;
mod launch;
mod leave;
mod process;
mod qemu;
mod state;
mod watch;

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use heca_api::{
    AccelChoice, ApiError, Client, MigrationMode, PagerStats, Resize, SponsorAddress, VmInfo,
    VmRequest, VmState,
};
use heca_types::OwnerId;
use heca_types::limits::SPONSORS_MAX;
use heca_vmm::command_line::{VmPaths, VmSpec};
use heca_vmm::host;
use heca_vmm::qmp::{Qmp, QmpError};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::agent::{AgentConfig, Failover};
use crate::link::Security;
use crate::pager::{PagerConfig, check_budget};
use crate::seal::SealKey;

pub(crate) use arrive::Arrival;
pub(crate) use leave::Leave;

use launch::{connect_qmp, spec_of, start_pager, start_qemu};
use leave::Handover;
use process::{Process, identity};
use watch::{end, watch};

const QMP_TIMEOUT: Duration = Duration::from_secs(30);
const PAGER_START_TIMEOUT: Duration = Duration::from_secs(30);
const EXIT_TIMEOUT: Duration = Duration::from_secs(10);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What is written down about a VM, for an agent that starts while it runs.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Record {
    request: VmRequest,
    accel: String,
    qemu: (i32, u64),
    /// `None` while the VM is being started.
    pager: Option<(i32, u64)>,
    /// For the next pager, should this one end.
    config: PagerConfig,
    /// It comes from another host and may not run here yet.
    #[serde(default)]
    incoming: Option<Uuid>,
    /// The attempt that brought it from another host, and how.
    #[serde(default)]
    arrived: Option<(Uuid, MigrationMode)>,
    /// It goes to another host, and the right to run may be there.
    #[serde(default)]
    handover: Option<Handover>,
}

impl Record {
    /// Whether another host may still want memory of the VM, and runs it, as far as is known.
    fn leaves_memory(&self) -> bool {
        self.handover.as_ref().is_some_and(|handover| handover.pager.is_some())
    }
}

#[derive(Debug)]
struct Running {
    qemu: Arc<Process>,
    pager: Option<Arc<Process>>,
}

#[derive(Debug)]
struct Vm {
    request: Mutex<VmRequest>,
    dir: PathBuf,
    ram_file: PathBuf,
    accel: Mutex<String>,
    /// Held while the VM is being started.
    starting: Mutex<()>,
    state: Mutex<VmState>,
    problem: Mutex<Option<String>>,
    running: Mutex<Option<Running>>,
    qmp: Mutex<Option<Qmp>>,
    last_stats: Mutex<Option<PagerStats>>,
    record: Mutex<Option<Record>>,
    restarts: Mutex<Restarts>,
    /// Held while a sponsor is added.
    adding: tokio::sync::Mutex<()>,
    /// What pagers are started from.
    program: Arc<Mutex<PathBuf>>,
    /// Its last move to another host, or the one under way.
    leave: Mutex<Option<Arc<Leave>>>,
    /// What an operator decided about a move whose target is silent: whether it runs here.
    resolution: Mutex<Option<bool>>,
    /// A thread has the guest go on, which is held.
    resuming: AtomicBool,
    /// Held while the budget is changed.
    sizing: tokio::sync::Mutex<()>,
    /// A target was told of every page: the pager may not be replaced, unless the VM stays.
    switched: AtomicBool,
}

#[derive(Debug, Clone, Copy, Default)]
struct Restarts {
    count: u64,
    pause: Option<Duration>,
}

/// The VMs of a host.
#[derive(Debug)]
pub struct VmManager {
    run_dir: PathBuf,
    memory_dir: PathBuf,
    spin: Duration,
    lease_ms: u64,
    owner: OwnerId,
    identity: Option<PathBuf>,
    failover: Failover,
    program: Arc<Mutex<PathBuf>>,
    vms: Mutex<BTreeMap<String, Arc<Vm>>>,
    security: Security,
    /// VMs on their way here.
    arrivals: Mutex<HashMap<Uuid, Arc<Arrival>>>,
    /// What is written down about VMs that came.
    arrived_dir: PathBuf,
    /// The last move of each VM from here, also of those that are gone.
    leaves: Mutex<BTreeMap<String, Arc<Leave>>>,
    /// Set when the agent ends: no VM is started any more.
    closing: AtomicBool,
}

fn io_error(what: &str, path: &Path, error: &std::io::Error) -> ApiError {
    ApiError::new("io", format!("cannot {what} {}", path.display())).detail(error.to_string())
}

/// A new file that only its owner can read.
fn create_private(path: &Path) -> std::io::Result<File> {
    File::options().write(true).create_new(true).mode(0o600).open(path)
}

fn pager_error(name: &str, error: heca_api::ClientError) -> ApiError {
    match error {
        heca_api::ClientError::Refused(error) => error,
        error => ApiError::new("pager-silent", format!("the pager of `{name}` does not answer"))
            .detail(error.to_string()),
    }
}

fn no_such_vm(name: &str) -> ApiError {
    ApiError::new("no-such-vm", format!("there is no VM `{name}` on this host"))
        .hint("`heca vm list` shows the VMs")
}

impl VmManager {
    /// Takes back the VMs that a former agent left running, and cleans up after those that ended.
    ///
    /// # Errors
    /// Directories that cannot be made, or guest RAM not on tmpfs.
    pub fn new(config: &AgentConfig, security: Security) -> anyhow::Result<Arc<Self>> {
        let manager = Arc::new(Self {
            run_dir: config.run_dir.join("vms"),
            memory_dir: config.memory_dir.clone(),
            spin: config.spin,
            lease_ms: config.lease_ms,
            owner: OwnerId::random(),
            identity: config.identity.clone(),
            failover: config.failover,
            program: Arc::new(Mutex::new(std::env::current_exe()?)),
            vms: Mutex::default(),
            security,
            arrivals: Mutex::default(),
            arrived_dir: config.run_dir.join("arrived"),
            leaves: Mutex::default(),
            closing: AtomicBool::new(false),
        });
        fs::create_dir_all(&manager.run_dir)?;
        manager.adopt_all();
        auto::spawn(&manager, config.keep_free.0)?;
        Ok(manager)
    }

    fn describe(&self, request: &VmRequest) -> Vm {
        Vm {
            dir: self.run_dir.join(&request.name),
            ram_file: self.memory_dir.join(format!("{}.ram", request.name)),
            request: Mutex::new(request.clone()),
            accel: Mutex::default(),
            starting: Mutex::default(),
            state: Mutex::new(VmState::Starting),
            problem: Mutex::default(),
            running: Mutex::default(),
            qmp: Mutex::default(),
            last_stats: Mutex::default(),
            record: Mutex::default(),
            restarts: Mutex::default(),
            adding: tokio::sync::Mutex::default(),
            program: self.program.clone(),
            leave: Mutex::default(),
            resolution: Mutex::default(),
            resuming: AtomicBool::new(false),
            sizing: tokio::sync::Mutex::default(),
            switched: AtomicBool::new(false),
        }
    }

    /// Names of all VMs.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        lock(&self.vms).keys().cloned().collect()
    }

    fn find(&self, name: &str) -> Result<Arc<Vm>, ApiError> {
        lock(&self.vms).get(name).cloned().ok_or_else(|| no_such_vm(name))
    }

    /// What is known about a VM, with its pager's figures of this moment.
    ///
    /// # Errors
    /// An unknown name.
    pub async fn info(&self, name: &str) -> Result<VmInfo, ApiError> {
        let vm = self.find(name)?;
        let stats = match *lock(&vm.state) {
            VmState::Running | VmState::Starting => Some(vm.pager_socket()),
            VmState::PagerLost | VmState::Arriving | VmState::Leaving | VmState::Stopped => None,
        };
        let stats = match stats {
            Some(socket) => {
                let client = Client::new(&socket);
                tokio::time::timeout(Duration::from_secs(5), client.get("/v1/stats")).await
            }
            None => return Ok(vm.info(None)),
        };
        Ok(vm.info(stats.ok().and_then(Result::ok)))
    }

    /// Changes a VM's local budget.
    ///
    /// # Errors
    /// An unknown name, a budget that is too small, a pager that does not answer.
    pub async fn resize(&self, name: &str, resize: &Resize) -> Result<(), ApiError> {
        let vm = self.find(name)?;
        check_budget(resize.local)?;
        if let Some(bounds) = &resize.auto_local {
            bounds.check(lock(&vm.request).memory)?;
        }
        let _sizing = vm.sizing.lock().await;
        let answer = Client::new(&vm.pager_socket()).post::<()>("/v1/resize", resize).await;
        answer.map_err(|error| pager_error(name, error))?;
        vm.note_budget(resize)
    }

    /// Gives a VM one more sponsor.
    ///
    /// # Errors
    /// An unknown name, a sponsor that is known already, a pager that does not answer.
    pub async fn add_sponsor(&self, name: &str, sponsor: &SponsorAddress) -> Result<(), ApiError> {
        let vm = self.find(name)?;
        // One at a time: the pager numbers sponsors as the record does.
        let _adding = vm.adding.lock().await;
        let known =
            |record: &Record| record.config.sponsors.iter().any(|s| s.address == sponsor.address);
        let count = lock(&vm.record).as_ref().map_or(0, |record| record.config.sponsors.len());
        if count >= SPONSORS_MAX && !lock(&vm.record).as_ref().is_some_and(known) {
            let text = format!("a VM has {SPONSORS_MAX} sponsors at the most");
            return Err(ApiError::new("too-many-sponsors", text));
        }
        // Written down first: the next pager must know each sponsor that this one may use.
        if !lock(&vm.record).as_ref().is_some_and(known) {
            vm.change_record(|record| {
                record.request.sponsors.push(sponsor.clone());
                record.config.sponsors.push(sponsor.clone());
            })?;
            lock(&vm.request).sponsors.push(sponsor.clone());
        }
        // All of them, in order: an earlier attempt may not have reached the pager.
        let all = lock(&vm.record).as_ref().map(|record| record.config.sponsors.clone());
        for sponsor in all.unwrap_or_default() {
            let answer = Client::new(&vm.pager_socket()).post::<()>("/v1/sponsors", &sponsor).await;
            match answer {
                Err(heca_api::ClientError::Refused(error)) if error.code == "sponsor-known" => {}
                answer => answer.map_err(|error| pager_error(name, error))?,
            }
        }
        Ok(())
    }

    /// What pagers are started from.
    #[must_use]
    pub fn program(&self) -> PathBuf {
        lock(&self.program).clone()
    }

    /// Has every VM go on with a pager of another build. Waits until all of them serve again.
    ///
    /// # Errors
    /// A VM whose new pager does not come up; the agent goes on trying.
    pub fn replace_pagers(&self, program: &Path) -> Result<(), ApiError> {
        *lock(&self.program) = program.to_owned();
        for name in self.names() {
            let Ok(vm) = self.find(&name) else { continue };
            let _starting = lock(&vm.starting);
            if *lock(&vm.state) != VmState::Running || !vm.is_at_home() {
                tracing::warn!(vm = name, "moves: its pager is not replaced");
                continue;
            }
            let pager = lock(&vm.running).as_ref().and_then(|running| running.pager.clone());
            let (Some(pager), before) = (pager, lock(&vm.restarts).count) else { continue };
            // A pager that is killed loses nothing, and is started again by who watches it.
            pager.kill();
            let deadline = Instant::now() + PAGER_START_TIMEOUT;
            while lock(&vm.restarts).count == before && *lock(&vm.state) != VmState::Stopped {
                if Instant::now() > deadline {
                    let text = format!("the new pager of `{name}` does not come up");
                    let log = vm.dir.join("pager.log");
                    return Err(ApiError::new("pager-failed", text)
                        .detail(format!("see {}", log.display())));
                }
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        Ok(())
    }

    /// Starts a VM: QEMU with its processors stopped, then the pager, then the guest. If any step
    /// fails nothing is left behind.
    ///
    /// # Errors
    /// Everything that can be wrong with the request or the host, with what to do about it.
    pub fn create(&self, request: &VmRequest) -> Result<(), ApiError> {
        check_budget(request.local)?;
        if let Some(bounds) = &request.auto_local {
            bounds.check(request.memory)?;
        }
        let accel = host::choose_accel(match request.accel {
            AccelChoice::Auto => host::AccelChoice::Auto,
            AccelChoice::Kvm => host::AccelChoice::Kvm,
            AccelChoice::Tcg => host::AccelChoice::Tcg,
        })
        .map_err(|error| ApiError::new("no-accel", error.to_string()))?;
        let spec = spec_of(request, accel)?;
        let qemu = host::find_qemu(request.qemu.as_deref())
            .map_err(|error| ApiError::new("no-qemu", error.to_string()))?;
        if request.sponsors.is_empty() {
            return Err(ApiError::new("no-sponsors", "a VM needs sponsors for its remote memory")
                .hint("give --sponsor HOST:PORT at least once for each replica"));
        }
        let vm = Arc::new(self.describe(request));
        *lock(&vm.accel) = format!("{accel:?}").to_lowercase();
        // From before anybody can find the VM: whoever stops it waits for this.
        let starting = lock(&vm.starting);
        self.claim_name(&vm)?;
        if let Err(error) = self.start(&vm, request, &spec, &qemu) {
            vm.kill_all();
            self.forget(&vm);
            // A stop that waits has nothing left to do.
            *lock(&vm.state) = VmState::Stopped;
            return Err(error);
        }
        watch(&vm);
        drop(starting);
        Ok(())
    }

    fn claim_name(&self, vm: &Arc<Vm>) -> Result<(), ApiError> {
        let name = lock(&vm.request).name.clone();
        let mut vms = lock(&self.vms);
        let known = vms.get(&name);
        if known.is_some_and(|known| !matches!(*lock(&known.state), VmState::Stopped)) {
            return Err(ApiError::new(
                "name-taken",
                format!("a VM `{name}` exists on this host already"),
            )
            .hint(format!("stop it with `heca vm stop {name}`, or choose another name")));
        }
        vms.insert(name, vm.clone());
        Ok(())
    }

    /// Settings of a VM's pager, for a region of its own.
    fn pager_config(&self, vm: &Vm, request: &VmRequest, pid: i32) -> PagerConfig {
        PagerConfig {
            name: request.name.clone(),
            owner: self.owner,
            replicas: request.replicas,
            eviction: request.eviction,
            prefetch: request.prefetch,
            lease_ms: self.lease_ms,
            spin_us: self.spin.as_micros() as u64,
            identity: self.identity.clone(),
            seal_key: request.encrypt.then(|| vm.seal_key()),
            detect_ms: self.failover.detect_ms,
            rebuild_after_ms: self.failover.rebuild_after_ms,
            rebuild_bytes_per_s: self.failover.rebuild_bytes_per_s,
            ..PagerConfig::new(pid, vm.ram_file.clone(), request.local, request.sponsors.clone())
        }
    }

    /// Removes a VM that runs on another host now: its memory is that one's.
    fn remove_left(&self, vm: &Arc<Vm>, give_back: bool) {
        if let Some(running) = lock(&vm.running).take() {
            let pager = running.pager.as_ref();
            // The pager first, or it would give the region back.
            if let Some(pager) = pager.filter(|_| !give_back) {
                pager.kill();
            }
            running.qemu.kill();
            if let Some(pager) = pager
                && !pager.wait(EXIT_TIMEOUT)
            {
                pager.kill();
            }
        }
        end(vm);
        self.forget(vm);
    }

    /// Removes a VM that has ended, with its files, unless its name is in use again.
    fn forget(&self, vm: &Arc<Vm>) {
        let name = lock(&vm.request).name.clone();
        let mut vms = lock(&self.vms);
        if vms.get(&name).is_some_and(|current| Arc::ptr_eq(current, vm)) {
            vm.clean_up_runtime();
            let _ = fs::remove_dir_all(&vm.dir);
            vms.remove(&name);
        }
    }

    fn refuse_if_closing(&self) -> Result<(), ApiError> {
        if self.closing.load(Ordering::SeqCst) {
            return Err(ApiError::new("closing", "the agent is ending"));
        }
        Ok(())
    }

    /// Makes a VM's directory and its memory file, which nobody else can read, not even for a moment.
    fn make_files(&self, vm: &Vm) -> Result<VmPaths, ApiError> {
        fs::create_dir_all(&self.memory_dir)
            .map_err(|error| io_error("create", &self.memory_dir, &error))?;
        if !crate::store::is_tmpfs(&self.memory_dir).unwrap_or(false) {
            let text = format!("{} is not on tmpfs", self.memory_dir.display());
            return Err(ApiError::new("not-tmpfs", text)
                .hint("start the agent with --memory-dir on tmpfs, such as /dev/shm/heca"));
        }
        let _ = fs::remove_dir_all(&vm.dir);
        fs::create_dir_all(&vm.dir).map_err(|error| io_error("create", &vm.dir, &error))?;
        let paths = vm.paths();
        create_private(&paths.ram_file)
            .map_err(|error| io_error("create", &paths.ram_file, &error))?;
        Ok(paths)
    }

    fn start(
        &self,
        vm: &Arc<Vm>,
        request: &VmRequest,
        spec: &VmSpec,
        qemu: &Path,
    ) -> Result<(), ApiError> {
        let paths = self.make_files(vm)?;
        self.refuse_if_closing()?;
        let qemu_process = start_qemu(vm, spec, qemu, &paths)?;
        *lock(&vm.running) = Some(Running { qemu: qemu_process.clone(), pager: None });
        if request.encrypt {
            SealKey::generate()
                .and_then(|key| key.save(&vm.seal_key()))
                .map_err(|error| io_error("write", &vm.seal_key(), &error))?;
        }

        let config = self.pager_config(vm, request, qemu_process.pid);
        let mut record = Record {
            request: request.clone(),
            accel: lock(&vm.accel).clone(),
            qemu: identity(&qemu_process),
            pager: None,
            config: config.clone(),
            incoming: None,
            arrived: None,
            handover: None,
        };
        vm.write_record(&record)?;
        let mut qmp = connect_qmp(vm, &qemu_process)?;
        let (pager, _) = start_pager(vm, &config, |_| {})?;
        record.pager = Some(identity(&pager));
        *lock(&vm.running) = Some(Running { qemu: qemu_process, pager: Some(pager) });
        vm.write_record(&record)?;
        self.refuse_if_closing()?;
        qmp.cont().map_err(|error| ApiError::new("qemu-failed", error.to_string()))?;
        *lock(&vm.qmp) = Some(qmp);
        *lock(&vm.state) = VmState::Running;
        tracing::info!(vm = request.name, "VM runs");
        Ok(())
    }

    /// Stops a VM and forgets it. A running guest gets `grace_ms` to shut down by itself.
    ///
    /// # Errors
    /// An unknown name.
    pub fn stop(&self, name: &str, grace_ms: u64) -> Result<VmInfo, ApiError> {
        let vm = self.find(name)?;
        self.refuse_if_moving(&vm, name)?;
        let _starting = lock(&vm.starting);
        let qemu = lock(&vm.running).as_ref().map(|running| running.qemu.clone());
        if let Some(qemu) = qemu {
            let tell = |command: fn(&mut Qmp) -> Result<(), QmpError>| {
                !qemu.wait(Duration::ZERO)
                    && vm.with_qmp(|qmp| command(qmp).map_err(|e| qemu::failed(&e))).is_ok()
            };
            if grace_ms > 0 && tell(Qmp::system_powerdown) {
                qemu.wait(Duration::from_millis(grace_ms));
            }
            if tell(Qmp::quit) {
                qemu.wait(Duration::from_secs(5));
            }
        }
        vm.kill_all();
        end(&vm);
        let info = vm.info(None);
        self.forget(&vm);
        tracing::info!(vm = name, "VM stopped");
        Ok(info)
    }

    /// A VM that is about to move is kept first; one that was handed over is not ours to stop.
    fn refuse_if_moving(&self, vm: &Vm, name: &str) -> Result<(), ApiError> {
        match *lock(&vm.state) {
            VmState::Leaving => {
                return Err(ApiError::new("moves", format!("`{name}` was handed to another host"))
                    .hint(format!("`heca vm migration {name}` tells where it is")));
            }
            VmState::Arriving => {
                return Err(ApiError::new("moves", format!("`{name}` is about to come"))
                    .hint("cancel its migration on the host where it runs"));
            }
            _ => {}
        }
        if !vm.is_at_home() {
            let _ = self.cancel_migration(name)?;
        }
        Ok(())
    }

    /// Stops all VMs at once, and lets no new one start.
    pub fn stop_all(self: &Arc<Self>) {
        self.closing.store(true, Ordering::SeqCst);
        self.drop_arrivals();
        for name in self.names() {
            let _ = self.stop(&name, 0);
        }
    }
}
