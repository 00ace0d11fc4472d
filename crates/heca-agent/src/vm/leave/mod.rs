//! VMs that go to other hosts.
//!
//! Up to the grant, every failure ends in [`Leave::take_back`]: the guest goes on here as if nothing
//! had happened. After it only the target's answers count, see [`heca_core::handover`].

mod copy;
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
use heca_types::OwnerId;
use heca_types::limits::PAGE_BYTES;
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
}

/// `HOST` or `HOST:PORT`.
fn with_port(to: &str) -> String {
    let has_port = to.rsplit_once(':').is_some_and(|(host, port)| {
        port.parse::<u16>().is_ok() && (!host.contains(':') || host.ends_with(']'))
    });
    if has_port { to.to_owned() } else { format!("{to}:{MIGRATION_PORT}") }
}

fn is_over(vm: &Vm) -> bool {
    lock(&vm.leave).as_ref().is_none_or(|leave| lock(&leave.info).phase.is_over())
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
        let to = with_port(&request.to);
        if request.safe && (request.mode.is_qemu() || !request.mode.is_postcopy()) {
            let text = format!("--safe does not go with --mode {}", request.mode.name());
            return Err(ApiError::new("bad-request", text)
                .hint("it is a way of its own: all memory goes to the sponsors"));
        }
        if lock(&vm.request).encrypt && self.identity.is_none() {
            let text = "a VM whose pages are sealed moves over TLS only";
            return Err(ApiError::new("needs-tls", text)
                .hint("put both hosts into a pool: `heca pool --help`"));
        }
        let mut held = lock(&vm.leave);
        if held.as_ref().is_some_and(|leave| !lock(&leave.info).phase.is_over()) {
            let text = format!("`{name}` is on its way already");
            return Err(ApiError::new("moves-already", text)
                .hint(format!("`heca vm migration {name}` shows how far it is")));
        }
        let behind =
            call::<heca_api::ImportInfo>(vm.pager_socket(), "/v1/import", None, ANSWER_TIMEOUT);
        if behind.is_ok_and(|import| !import.done) {
            let text = format!("`{name}` has just come: part of its memory is still on its way");
            return Err(ApiError::new("still-comes", text).hint("try again in a moment"));
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
        let leave = Arc::new(Leave {
            id: Uuid::new_v4(),
            vm: vm.clone(),
            request: request.clone(),
            to,
            begun: Instant::now(),
            cancelled: AtomicBool::new(false),
            device_bytes: Arc::default(),
            migrating: AtomicBool::new(false),
            stopped: Mutex::default(),
            info: Mutex::new(info.clone()),
        });
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
        let undecided = |record: &super::Record| {
            record.handover.as_ref().is_some_and(|h| h.state == Source::Granting)
        };
        if !lock(&vm.record).as_ref().is_some_and(undecided) {
            let text = format!("it is known where `{name}` runs: there is nothing to decide");
            return Err(ApiError::new("decided", text));
        }
        tracing::warn!(vm = name, run_here, "an operator says where the VM goes on");
        *lock(&vm.resolution) = Some(run_here);
        Ok(())
    }

    /// Goes on with a VM that a former agent was giving away.
    pub(super) fn adopt_leave(self: &Arc<Self>, vm: &Arc<Vm>, handover: &Handover) {
        let name = lock(&vm.request).name.clone();
        let leave = Arc::new(Leave {
            id: handover.id,
            vm: vm.clone(),
            request: MigrateRequest {
                to: handover.to.clone(),
                mode: Default::default(),
                max_downtime_ms: heca_api::default_downtime_ms(),
                bandwidth: None,
                safe: false,
            },
            to: handover.to.clone(),
            begun: Instant::now(),
            cancelled: AtomicBool::new(false),
            device_bytes: Arc::default(),
            migrating: AtomicBool::new(false),
            stopped: Mutex::default(),
            info: Mutex::new(MigrationInfo {
                name: name.clone(),
                to: handover.to.clone(),
                mode: Default::default(),
                phase: MigrationPhase::Unconfirmed,
                elapsed_s: 0.0,
                resident_bytes: 0,
                remaining_bytes: 0,
                report: Default::default(),
                error: None,
            }),
        });
        *lock(&vm.leave) = Some(leave.clone());
        lock(&self.leaves).insert(name, leave.clone());
        let (manager, handover) = (self.clone(), handover.clone());
        std::thread::spawn(move || leave.go_on(&manager, handover));
    }
}

impl Leave {
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

    fn check(&self) -> Result<(), ApiError> {
        if self.cancelled.load(Ordering::SeqCst) {
            return Err(ApiError::new("cancelled", "cancelled"));
        }
        let running = lock(&self.vm.running);
        match &*running {
            Some(running) if !running.qemu.wait(Duration::ZERO) => Ok(()),
            _ => Err(ApiError::new("ended", "the VM ended while it was about to move")),
        }
    }

    fn run(self: &Arc<Self>, manager: &Arc<VmManager>) {
        let begun = self.prepare(manager);
        let (mut peer, prepared, ready) = match begun {
            Ok(begun) => begun,
            Err(error) => return self.fail(None, error),
        };
        if let Err(error) = self.copy(&prepared) {
            return self.fail(Some(&mut peer), error);
        }
        match self.switch(manager, &mut peer, &prepared, ready) {
            Err(error) => self.fail(Some(&mut peer), error),
            Ok(handover) => self.grant(manager, Some(peer), handover),
        }
    }

    /// Has the target get ready. Returns the connections to it.
    fn prepare(
        self: &Arc<Self>,
        manager: &VmManager,
    ) -> Result<(Peer, Prepared, Option<Link>), ApiError> {
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
        let seal_key = match (&region, request.encrypt) {
            (Some(_), true) => Some(
                std::fs::read(vm.seal_key())
                    .map_err(|error| io_error("read", &vm.seal_key(), &error))?,
            ),
            _ => None,
        };
        let mut peer = Peer::connect(&self.to, manager.owner, &manager.security)?;
        let prepare = Prepare {
            id: self.id,
            request,
            accel: lock(&vm.accel).clone(),
            mode,
            max_downtime_ms: self.request.max_downtime_ms,
            region,
            seal_key,
        };
        let told = peer.ask(&Ask::Prepare(Box::new(prepare)), PREPARE_TIMEOUT)?;
        let Told::Prepared(prepared) = told else {
            return Err(ApiError::new("target-confused", "the target's answer makes no sense"));
        };
        // Made in advance, so that nothing is connected while the guest stands still.
        let ready = match prepared.qemu {
            Some(_) => None,
            None => Some(self.connect_stream(manager, prepared.ticket)?),
        };
        Ok((peer, prepared, ready))
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
        let (leave, manager_owner, security) = (self.clone(), ticket, manager.security.clone());
        let work = move || {
            let mut ready = Some(ready);
            for stream in listener.incoming().flatten() {
                if is_over(&leave.vm) {
                    return;
                }
                let link = match ready.take() {
                    Some(link) => Ok(link),
                    None => Link::connect(&leave.to, Role::DeviceState, manager_owner, &security)
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
    fn fail(&self, peer: Option<&mut Peer>, error: ApiError) {
        let cancelled = error.code == "cancelled";
        tracing::warn!(
            vm = self.name(),
            detail = error.detail.clone().unwrap_or_default(),
            "the VM stays here: {error}"
        );
        self.take_back();
        if let Some(peer) = peer {
            // It will lose patience by itself, too; and it never got the right to run.
            let _ = peer.ask(&Ask::GiveUp { id: self.id }, ANSWER_TIMEOUT);
        }
        lock(&self.info).error = Some(error);
        let phase = if cancelled { MigrationPhase::Cancelled } else { MigrationPhase::Failed };
        self.enter(phase);
        self.unblock_relay();
    }

    /// Whoever waits for QEMU's stream sees that the migration is over.
    fn unblock_relay(&self) {
        let path = self.vm.dir.join("migrate.sock");
        let _ = std::os::unix::net::UnixStream::connect(&path);
        let _ = std::fs::remove_file(&path);
    }

    /// The right to run is given away, and the target is asked until it is known where it is.
    fn grant(
        self: &Arc<Self>,
        manager: &Arc<VmManager>,
        peer: Option<Peer>,
        mut handover: Handover,
    ) {
        let actions = handover.state.hear(Answer::Loaded, true);
        debug_assert_eq!(actions, [SourceAction::Record, SourceAction::Grant]);
        if let Err(error) = self.record(Some(&handover)) {
            // Not written down, so not given away.
            return self.fail(None, error);
        }
        self.settle(manager, peer, handover);
    }

    fn record(&self, handover: Option<&Handover>) -> Result<(), ApiError> {
        self.vm.change_record(|record| record.handover = handover.cloned())
    }

    /// Asks until the target has said where the guest runs.
    fn settle(self: &Arc<Self>, manager: &Arc<VmManager>, peer: Option<Peer>, handover: Handover) {
        let mut handover = handover;
        let mut peer = peer;
        let mut pause = RETRY.0;
        loop {
            let asked = Instant::now();
            let answer = match &mut peer {
                Some(known) => known.ask(&Ask::Grant { id: self.id }, ANSWER_TIMEOUT),
                None => Peer::connect(&self.to, manager.owner, &manager.security).and_then(|new| {
                    peer.insert(new).ask(&Ask::Grant { id: self.id }, ANSWER_TIMEOUT)
                }),
            };
            let answer = match answer {
                Ok(Told::Answer { answer: Answer::Running, took_ms, .. }) => {
                    self.note_downtime(asked, took_ms);
                    Ok(Answer::Running)
                }
                // A host that was started anew does not know what it did before.
                Ok(Told::Answer { answer: Answer::Dropped, boot, .. }) if boot != handover.boot => {
                    Err("its host was started anew".to_owned())
                }
                Ok(Told::Answer { answer, .. }) => Ok(answer),
                Ok(_) => Err("its answer makes no sense".to_owned()),
                Err(error) => {
                    Err(format!("{error}: {}", error.detail.as_deref().unwrap_or_default()))
                }
            };
            let answer = match (answer, lock(&self.vm.resolution).take()) {
                (_, Some(true)) => Answer::Dropped,
                (_, Some(false)) => Answer::Running,
                (Ok(answer), None) => answer,
                (Err(reason), None) => {
                    peer = None;
                    self.unconfirmed(&reason);
                    std::thread::sleep(pause);
                    pause = (pause * 2).min(RETRY.1);
                    continue;
                }
            };
            for action in handover.state.hear(answer, true) {
                match action {
                    SourceAction::Record => {
                        let state = (handover.state != Source::Holding).then_some(&handover);
                        if let Err(error) = self.record(state) {
                            tracing::error!(vm = self.name(), "not written down: {error}");
                        }
                    }
                    // By going round once more.
                    SourceAction::Grant => std::thread::sleep(LOOK),
                    SourceAction::Resume => {
                        let error = ApiError::new("target-failed", "the target gave the VM back");
                        return self.fail(None, error);
                    }
                    SourceAction::GiveUp => return self.gone(manager, peer, handover),
                }
            }
        }
    }

    /// The guest runs on the target since a moment ago.
    fn note_downtime(&self, asked: Instant, took_ms: Option<(f64, f64)>) {
        let stopped = *lock(&self.stopped);
        let mut info = lock(&self.info);
        if info.report.downtime_ms.is_some() || info.phase == MigrationPhase::Unconfirmed {
            return;
        }
        info.report.downtime_ms = stopped.map(|at| at.elapsed().as_secs_f64() * 1e3);
        let whole = asked.elapsed().as_secs_f64() * 1e3;
        let (takeover, resume) = took_ms.unwrap_or((whole, 0.0));
        // The way there and back is part of it.
        info.report.parts_ms.takeover = takeover + (whole - takeover - resume).max(0.0);
        info.report.parts_ms.resume = resume;
    }

    fn unconfirmed(&self, reason: &str) {
        let name = self.name();
        if lock(&self.info).phase != MigrationPhase::Unconfirmed {
            self.enter(MigrationPhase::Unconfirmed);
        }
        *lock(&self.vm.state) = VmState::Leaving;
        *lock(&self.vm.problem) = Some(format!(
            "it is not known whether the VM runs on {}: {reason}. It is held here until that host \
             answers. If it never will: `heca vm migrate-resolve {name} --run-here` (only if it \
             does not run there!) or `--gone`",
            self.to
        ));
    }

    /// The guest runs on the target. What is behind follows.
    fn gone(self: &Arc<Self>, manager: &Arc<VmManager>, peer: Option<Peer>, handover: Handover) {
        {
            let mut info = lock(&self.info);
            info.error = None;
        }
        *lock(&self.vm.state) = VmState::Leaving;
        *lock(&self.vm.problem) = None;
        self.enter(MigrationPhase::Following);
        if handover.pager.is_some() {
            let release = serde_json::to_value(Release { at_once: false }).expect("plain data");
            let _ = self.pager::<()>("/v1/export/release", Some(&release));
            self.follow();
        } else {
            self.follow_qemu();
        }
        let mut peer = peer;
        let forget = Ask::Forget { id: self.id };
        let told = match &mut peer {
            Some(peer) => peer.ask(&forget, ANSWER_TIMEOUT),
            None => Peer::connect(&self.to, manager.owner, &manager.security)
                .and_then(|mut peer| peer.ask(&forget, ANSWER_TIMEOUT)),
        };
        if let Err(error) = told {
            tracing::debug!("the target was not told that it need not remember: {error}");
        }
        lock(&self.info).report.total_s = Some(self.begun.elapsed().as_secs_f64());
        self.unblock_relay();
        manager.remove_left(&self.vm);
        lock(&self.info).remaining_bytes = 0;
        self.enter(MigrationPhase::Completed);
    }

    /// Waits until the target has all of the memory.
    fn follow(&self) {
        loop {
            match self.pager::<ExportInfo>("/v1/export", None) {
                Ok(export) => {
                    self.note(&export);
                    *lock(&self.vm.problem) = export.reason.clone();
                    if export.stage == ExportStage::Done {
                        return;
                    }
                }
                // It is being replaced.
                Err(error) => tracing::debug!("no figures of what is behind: {error}"),
            }
            std::thread::sleep(LOOK_AFTER);
        }
    }

    /// Goes on for an agent that ended.
    fn go_on(self: &Arc<Self>, manager: &Arc<VmManager>, handover: Handover) {
        match handover.state {
            Source::Given => self.gone(manager, None, handover),
            _ => self.settle(manager, None, handover),
        }
    }
}
