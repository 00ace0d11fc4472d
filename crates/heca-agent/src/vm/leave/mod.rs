//! VMs that go to other hosts.
//!
//! Up to the grant, every failure ends in [`Leave::take_back`]: the guest goes on here as if nothing
//! had happened. After it only the target's answers count, see [`heca_core::handover`].

mod copy;
mod grant;
mod switch;

use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use heca_api::{
    ApiError, ExportInfo, ExportRequest, ExportStage, MIGRATION_PORT, MigrateRequest,
    MigrationInfo, MigrationPhase, Release, VmState,
};
use heca_core::handover::{Answer, Source, SourceAction};
use heca_types::limits::PAGE_BYTES;
use heca_types::{Epoch, OwnerId};
use heca_wire::Role;
use serde::{Deserialize, Serialize};
use serde_json::json;
use uuid::Uuid;

use super::arrive::call;
use super::{Vm, VmManager, io_error, lock};
use crate::link::Link;
use crate::migrate::{Ask, Peer, Prepare, Prepared, RegionInfo, Told, relay};
use crate::pager::{Destination, chain};

/// Time for the target to start QEMU and a pager.
const PREPARE_TIMEOUT: Duration = Duration::from_secs(60);
/// Time for the target to answer anything that is quick.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// Pauses between two attempts to hear from a target that is silent: the first, and the longest.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));
/// A target that hears nothing for a while gives the VM up: it is asked something now and then.
const KEEP_ALIVE: Duration = Duration::from_secs(10);
/// How often the source looks how far the memory is.
const LOOK: Duration = Duration::from_millis(5);
/// The same after the switch.
const LOOK_AFTER: Duration = Duration::from_millis(50);

/// What is written down about a VM whose right to run is given away.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Handover {
    pub(super) id: Uuid,
    pub(super) to: String,
    /// The life of the target's host in which it was asked.
    pub(super) boot: String,
    pub(super) state: Source,
    /// The target's pager, for what is behind; none if QEMU moves the memory.
    pub(super) pager: Option<Destination>,
}

/// A migration of a VM of this host.
#[derive(Debug)]
pub(crate) struct Leave {
    id: Uuid,
    vm: Arc<Vm>,
    request: MigrateRequest,
    to: String,
    begun: Instant,
    cancelled: AtomicBool,
    device_bytes: Arc<AtomicU64>,
    /// Whether QEMU was told to migrate.
    migrating: AtomicBool,
    /// When the guest was stopped.
    stopped: Mutex<Option<Instant>>,
    info: Mutex<MigrationInfo>,
    /// The target's agent.
    peer: Mutex<Option<Peer>>,
    /// When it was asked last.
    asked: Mutex<Instant>,
    /// Nobody is to listen for QEMU's stream any more.
    over: AtomicBool,
    /// The epoch of the region that the target was told of.
    epoch: Mutex<Option<Epoch>>,
}

/// `HOST` or `HOST:PORT`.
fn with_port(to: &str) -> String {
    let has_port = to.rsplit_once(':').is_some_and(|(host, port)| {
        port.parse::<u16>().is_ok() && (!host.contains(':') || host.ends_with(']'))
    });
    if has_port { to.to_owned() } else { format!("{to}:{MIGRATION_PORT}") }
}

impl VmManager {
    /// Begins to move a VM to another host.
    ///
    /// # Errors
    /// An unknown name, a VM that does not run or moves already.
    pub(crate) fn migrate(
        self: &Arc<Self>,
        name: &str,
        request: &MigrateRequest,
    ) -> Result<MigrationInfo, ApiError> {
        let vm = self.find(name)?;
        let _starting = lock(&vm.starting);
        let state = *lock(&vm.state);
        if state != VmState::Running {
            let text = format!("`{name}` cannot move now: it is not running ({state:?})");
            return Err(ApiError::new("not-running", text));
        }
        if vm.resuming.load(Ordering::SeqCst) {
            let text = format!("`{name}` cannot move now: its guest does not go on yet");
            return Err(ApiError::new("held", text).hint("`heca vm show` tells why"));
        }
        let to = with_port(&request.to);
        if request.safe && (request.mode.is_qemu() || !request.mode.is_postcopy()) {
            let text = format!("--safe does not go with --mode {}", request.mode.name());
            return Err(ApiError::new("bad-request", text)
                .hint("it is a way of its own: all memory goes to the sponsors"));
        }
        if request.safe && lock(&vm.request).replicas < 2 {
            let text = "--safe keeps every page in two places: this VM has one replica";
            return Err(ApiError::new("bad-request", text));
        }
        if lock(&vm.request).encrypt && self.identity.is_none() {
            let text = "a VM whose pages are sealed moves over TLS only";
            return Err(ApiError::new("needs-tls", text)
                .hint("put both hosts into a pool: `heca pool --help`"));
        }
        let import: Result<heca_api::ImportInfo, ApiError> =
            call(vm.pager_socket(), "/v1/import", None, ANSWER_TIMEOUT);
        if import.is_ok_and(|import| !import.done && import.behind_pages != Some(0)) {
            let text = format!("`{name}` has just come: part of its memory is still on its way");
            return Err(ApiError::new("still-comes", text).hint("try again in a moment"));
        }
        let mut held = lock(&vm.leave);
        if held.as_ref().is_some_and(|leave| !lock(&leave.info).phase.is_over()) {
            let text = format!("`{name}` is on its way already");
            return Err(ApiError::new("moves-already", text)
                .hint(format!("`heca vm migration {name}` shows how far it is")));
        }
        let info = MigrationInfo {
            name: name.to_owned(),
            to: to.clone(),
            mode: request.mode,
            phase: MigrationPhase::Preparing,
            elapsed_s: 0.0,
            resident_bytes: 0,
            remaining_bytes: 0,
            report: Default::default(),
            error: None,
        };
        let leave = Arc::new(Leave::new(Uuid::new_v4(), &vm, request, info.clone()));
        // What was decided about an earlier move is not about this one.
        lock(&vm.resolution).take();
        *held = Some(leave.clone());
        lock(&self.leaves).insert(name.to_owned(), leave.clone());
        let manager = self.clone();
        let run = move || leave.run(&manager);
        std::thread::Builder::new()
            .name("migrate".into())
            .spawn(run)
            .map_err(|error| ApiError::new("io", "no thread").detail(error.to_string()))?;
        Ok(info)
    }

    /// How far the last migration of a VM from this host is.
    ///
    /// # Errors
    /// There was none.
    pub(crate) fn migration(&self, name: &str) -> Result<MigrationInfo, ApiError> {
        let leave = self.leave(name)?;
        Ok(leave.info())
    }

    fn leave(&self, name: &str) -> Result<Arc<Leave>, ApiError> {
        lock(&self.leaves).get(name).cloned().ok_or_else(|| {
            ApiError::new("no-migration", format!("no VM `{name}` moved from this host"))
        })
    }

    /// Keeps a VM here that is about to move.
    ///
    /// # Errors
    /// It does not move, or runs on the target already.
    pub(crate) fn cancel_migration(&self, name: &str) -> Result<MigrationInfo, ApiError> {
        let leave = self.leave(name)?;
        leave.cancelled.store(true, Ordering::SeqCst);
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            let info = leave.info();
            match info.phase {
                MigrationPhase::Cancelled | MigrationPhase::Failed => return Ok(info),
                MigrationPhase::Following
                | MigrationPhase::Completed
                | MigrationPhase::Unconfirmed => {
                    let text = format!("`{name}` cannot be kept: it was handed over");
                    return Err(ApiError::new("too-late", text));
                }
                _ if Instant::now() > deadline => {
                    return Err(ApiError::new("silent", "the migration does not end"));
                }
                _ => std::thread::sleep(LOOK),
            }
        }
    }

    /// Decides for a VM whose target will never answer where it goes on. Only a person can know
    /// that the guest does not run there.
    ///
    /// # Errors
    /// A VM about which there is nothing to decide.
    pub(crate) fn resolve_migration(
        self: &Arc<Self>,
        name: &str,
        run_here: bool,
    ) -> Result<(), ApiError> {
        let vm = self.find(name)?;
        let state = lock(&vm.record).as_ref().and_then(|r| Some(r.handover.as_ref()?.state));
        match (state, run_here) {
            (Some(Source::Granting), _) | (Some(Source::Given), false) => {}
            (Some(Source::Given), true) => {
                let text = format!("`{name}` runs on its target: that one said so");
                return Err(ApiError::new("decided", text));
            }
            _ => {
                let text = format!("it is known where `{name}` runs: there is nothing to decide");
                return Err(ApiError::new("decided", text));
            }
        }
        let stats: Result<heca_api::PagerStats, ApiError> =
            call(vm.pager_socket(), "/v1/stats", None, ANSWER_TIMEOUT);
        if run_here && stats.is_ok_and(|stats| stats.fenced.is_some()) {
            let text = format!("`{name}` was taken over: its sponsors have a newer owner");
            return Err(ApiError::new("taken-over", text));
        }
        let record = lock(&vm.record);
        if record.as_ref().is_none_or(|record| record.handover.is_none()) {
            let text = format!("it is known where `{name}` runs by now");
            return Err(ApiError::new("decided", text));
        }
        tracing::warn!(vm = name, run_here, "an operator says where the VM goes on");
        *lock(&vm.resolution) = Some(run_here);
        Ok(())
    }

    /// Goes on with a VM that a former agent was giving away.
    pub(super) fn adopt_leave(self: &Arc<Self>, vm: &Arc<Vm>, handover: &Handover) {
        let name = lock(&vm.request).name.clone();
        let request = MigrateRequest {
            to: handover.to.clone(),
            mode: Default::default(),
            max_downtime_ms: heca_api::default_downtime_ms(),
            bandwidth: None,
            safe: false,
        };
        let info = MigrationInfo {
            name: name.clone(),
            to: handover.to.clone(),
            mode: Default::default(),
            phase: MigrationPhase::Unconfirmed,
            elapsed_s: 0.0,
            resident_bytes: 0,
            remaining_bytes: 0,
            report: Default::default(),
            error: None,
        };
        let leave = Arc::new(Leave::new(handover.id, vm, &request, info));
        // Should the guest stay, QEMU has a migration to forget.
        leave.migrating.store(true, Ordering::SeqCst);
        *lock(&vm.leave) = Some(leave.clone());
        lock(&self.leaves).insert(name, leave.clone());
        let (manager, handover) = (self.clone(), handover.clone());
        std::thread::spawn(move || leave.go_on(&manager, handover));
    }
}

impl Leave {
    fn new(id: Uuid, vm: &Arc<Vm>, request: &MigrateRequest, info: MigrationInfo) -> Self {
        Self {
            id,
            vm: vm.clone(),
            request: request.clone(),
            to: info.to.clone(),
            begun: Instant::now(),
            cancelled: AtomicBool::new(false),
            device_bytes: Arc::default(),
            migrating: AtomicBool::new(false),
            stopped: Mutex::default(),
            info: Mutex::new(info),
            peer: Mutex::default(),
            asked: Mutex::new(Instant::now()),
            over: AtomicBool::new(false),
            epoch: Mutex::default(),
        }
    }

    /// Asks the target's agent over the connection that there is.
    fn ask(&self, ask: &Ask, timeout: Duration) -> Result<Told, ApiError> {
        *lock(&self.asked) = Instant::now();
        let none = || ApiError::new("target-silent", "there is no connection to the target");
        lock(&self.peer).as_mut().ok_or_else(none)?.ask(ask, timeout)
    }

    fn name(&self) -> String {
        lock(&self.vm.request).name.clone()
    }

    fn enter(&self, phase: MigrationPhase) {
        let mut info = lock(&self.info);
        info.phase = phase;
        info.elapsed_s = self.begun.elapsed().as_secs_f64();
        tracing::info!(vm = info.name, to = info.to, ?phase, "migration");
    }

    /// Figures of this moment.
    pub(super) fn info(&self) -> MigrationInfo {
        let mut info = lock(&self.info);
        if !info.phase.is_over() {
            info.elapsed_s = self.begun.elapsed().as_secs_f64();
        }
        info.report.device_state_bytes = self.device_bytes.load(Ordering::Relaxed);
        info.clone()
    }

    fn note(&self, export: &ExportInfo) {
        let mut info = lock(&self.info);
        let left = match export.stage {
            ExportStage::Copying => export.queued_pages,
            _ => export.behind_pages,
        };
        info.remaining_bytes = left * PAGE_BYTES as u64;
        let report = &mut info.report;
        report.pages_sent = export.pages_sent;
        report.pages_sent_after = export.pages_sent_after;
        report.pages_unique_after = export.pages_unique_after;
        report.zero_pages = export.zero_pages;
        report.demand_pages = export.demand_pages;
        report.memory_bytes = export.bytes;
    }

    fn pager<T: serde::de::DeserializeOwned>(
        &self,
        path: &str,
        body: Option<&serde_json::Value>,
    ) -> Result<T, ApiError> {
        call(self.vm.pager_socket(), path, body, Duration::from_secs(40))
    }

    /// Whether there is a reason to stop; before the grant.
    fn check(&self) -> Result<(), ApiError> {
        if self.cancelled.load(Ordering::SeqCst) {
            return Err(ApiError::new("cancelled", "cancelled"));
        }
        if lock(&self.asked).elapsed() > KEEP_ALIVE {
            match self.ask(&Ask::Query { id: self.id }, ANSWER_TIMEOUT) {
                Ok(Told::Answer { answer: Answer::Dropped, .. }) => {
                    let text = "the target gave the VM up";
                    return Err(ApiError::new("target-failed", text));
                }
                Ok(_) => {}
                // It waits for the guest's state, as it should.
                Err(error) if error.code == "not-yet" => {}
                Err(error) => return Err(error),
            }
        }
        let running = lock(&self.vm.running);
        let Some(running) = running.as_ref().filter(|r| !r.qemu.wait(Duration::ZERO)) else {
            return Err(ApiError::new("ended", "the VM ended while it was about to move"));
        };
        match &running.pager {
            Some(pager) if !pager.wait(Duration::ZERO) => Ok(()),
            _ => Err(ApiError::new("pager-ended", "the VM's pager ended; it is being replaced")),
        }
    }

    fn run(self: &Arc<Self>, manager: &Arc<VmManager>) {
        let outcome = self.prepare(manager).and_then(|(prepared, ready)| {
            self.copy(&prepared)?;
            self.switch(manager, &prepared, ready)
        });
        match outcome {
            Ok(handover) => self.grant(manager, handover),
            Err(error) => self.fail(error),
        }
    }

    /// Has the target get ready. Returns where it waits, and the connection for QEMU's stream.
    fn prepare(
        self: &Arc<Self>,
        manager: &VmManager,
    ) -> Result<(Prepared, Option<Link>), ApiError> {
        self.check()?;
        let vm = &self.vm;
        let mode = self.request.mode;
        let mut request = lock(&vm.request).clone();
        if let Some(record) = &*lock(&vm.record) {
            // In the order in which the pager numbers them.
            request.sponsors.clone_from(&record.config.sponsors);
        }
        let region = match mode.is_qemu() {
            true => None,
            false => Some(self.pager::<RegionInfo>("/v1/region", None)?),
        };
        *lock(&self.epoch) = region.as_ref().map(|region| region.epoch);
        let seal_key = match (&region, request.encrypt) {
            (Some(_), true) => Some(
                std::fs::read(vm.seal_key())
                    .map_err(|error| io_error("read", &vm.seal_key(), &error))?,
            ),
            _ => None,
        };
        let peer = Peer::connect(&self.to, manager.owner, &manager.security)?;
        *lock(&self.peer) = Some(peer);
        let prepare = Prepare {
            id: self.id,
            request,
            accel: lock(&vm.accel).clone(),
            mode,
            region,
            seal_key,
        };
        let told = self.ask(&Ask::Prepare(Box::new(prepare)), PREPARE_TIMEOUT)?;
        let Told::Prepared(prepared) = told else {
            return Err(ApiError::new("target-confused", "the target's answer makes no sense"));
        };
        // Made in advance, so that nothing is connected while the guest stands still.
        let ready = match prepared.qemu {
            Some(_) => None,
            None => Some(self.connect_stream(manager, prepared.ticket)?),
        };
        Ok((prepared, ready))
    }

    fn connect_stream(&self, manager: &VmManager, ticket: OwnerId) -> Result<Link, ApiError> {
        let link = Link::connect(&self.to, Role::DeviceState, ticket, &manager.security);
        link.map(|(link, _)| link).map_err(|error| {
            ApiError::new("target-unreachable", "no connection for QEMU's stream")
                .detail(chain(&error))
        })
    }

    /// Listens for QEMU's stream and carries it to the target, one connection or several.
    fn relay(
        self: &Arc<Self>,
        manager: &VmManager,
        ticket: OwnerId,
        ready: Link,
    ) -> Result<PathBuf, ApiError> {
        let path = self.vm.dir.join("migrate.sock");
        let _ = std::fs::remove_file(&path);
        let listener =
            UnixListener::bind(&path).map_err(|error| io_error("listen on", &path, &error))?;
        let (leave, ticket, security) = (self.clone(), ticket, manager.security.clone());
        let work = move || {
            let mut ready = Some(ready);
            for stream in listener.incoming().flatten() {
                if leave.over.load(Ordering::SeqCst) {
                    return;
                }
                let link = match ready.take() {
                    Some(link) => Ok(link),
                    None => Link::connect(&leave.to, Role::DeviceState, ticket, &security)
                        .map(|(link, _)| link),
                };
                let counted = leave.device_bytes.clone();
                std::thread::spawn(move || {
                    let outcome = link.and_then(|mut link| relay::run(&mut link, stream, &counted));
                    if let Err(error) = outcome {
                        tracing::debug!("QEMU's stream: {}", chain(&error));
                    }
                });
            }
        };
        std::thread::Builder::new()
            .name("migrate-relay".into())
            .spawn(work)
            .map_err(|error| ApiError::new("io", "no thread").detail(error.to_string()))?;
        Ok(path)
    }

    /// Before the grant: the guest goes on here.
    fn fail(&self, error: ApiError) {
        let cancelled = error.code == "cancelled";
        tracing::warn!(
            vm = self.name(),
            detail = error.detail.clone().unwrap_or_default(),
            "the VM stays here: {error}"
        );
        self.take_back();
        // It will lose patience by itself, too; and it never got the right to run.
        let _ = self.ask(&Ask::GiveUp { id: self.id }, ANSWER_TIMEOUT);
        lock(&self.info).error = Some(error);
        let phase = if cancelled { MigrationPhase::Cancelled } else { MigrationPhase::Failed };
        self.enter(phase);
        self.unblock_relay();
    }

    /// Whoever waits for QEMU's stream sees that the migration is over.
    fn unblock_relay(&self) {
        self.over.store(true, Ordering::SeqCst);
        let path = self.vm.dir.join("migrate.sock");
        let _ = std::os::unix::net::UnixStream::connect(&path);
        let _ = std::fs::remove_file(&path);
    }
}
