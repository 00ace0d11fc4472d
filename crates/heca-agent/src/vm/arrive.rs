//! VMs that come from other hosts.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use heca_api::{ApiError, Client, ImportInfo, MigrationMode, VmState};
use heca_core::handover::{Answer, Target, TargetAction, TargetEvent};
use heca_types::{Epoch, OwnerId, RegionId};
use heca_vmm::command_line::VmSpec;
use heca_vmm::host;
use serde_json::{Value, json};
use uuid::Uuid;

use super::launch::{connect_qmp, spec_of, start_pager, start_qemu};
use super::process::identity;
use super::qemu::failed;
use super::watch::{replace_pager, watch};
use super::{Record, Running, Vm, VmManager, create_private, io_error, lock};
use crate::migrate::{Prepare, Prepared, boot_id};
use crate::pager::{ImportConfig, PagerConfig, check_budget};

/// Time for a source whose connection broke to come back before the VM stays there.
const RETURN_TIME: Duration = Duration::from_secs(20);
/// Longest wait for one more event of QEMU before its processes are looked at.
const EVENT_LOOK: Duration = Duration::from_millis(50);
/// VMs that may be on their way here at a time.
const ARRIVALS_MAX: usize = 16;

/// A VM on its way to this host.
#[derive(Debug)]
pub(crate) struct Arrival {
    id: Uuid,
    vm: Arc<Vm>,
    mode: MigrationMode,
    state: Mutex<Target>,
    ticket: OwnerId,
    /// When the source was heard last.
    heard: Mutex<Instant>,
    /// Time to take the memory over, and to have the guest go on, in milliseconds.
    took_ms: Mutex<Option<(f64, f64)>>,
}

fn qemu_error(error: &heca_vmm::qmp::QmpError) -> ApiError {
    ApiError::new("qemu-failed", "the target's QEMU does not do as it is told")
        .detail(error.to_string())
}

/// Asks a VM's pager, from a thread that is not one of the runtime's.
pub(super) fn call<T: serde::de::DeserializeOwned>(
    socket: PathBuf,
    path: &str,
    body: Option<&Value>,
    timeout: Duration,
) -> Result<T, ApiError> {
    let silent = |detail: String| {
        ApiError::new("pager-silent", "the VM's pager does not answer").detail(detail)
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| silent(error.to_string()))?;
    let client = Client::new(&socket);
    let answer = runtime.block_on(async {
        let answer = async {
            match body {
                Some(body) => client.post(path, body).await,
                None => client.get(path).await,
            }
        };
        tokio::time::timeout(timeout, answer).await
    });
    match answer {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(heca_api::ClientError::Refused(error))) => Err(error),
        Ok(Err(error)) => Err(silent(error.to_string())),
        Err(_) => Err(silent(format!("no answer for {} s", timeout.as_secs()))),
    }
}

/// What a host wrote down about VMs that came: one file each, until the source has heard of it.
fn tombstone(manager: &VmManager, id: Uuid) -> PathBuf {
    manager.arrived_dir.join(id.to_string())
}

impl VmManager {
    /// Gets ready for a VM: QEMU that waits for its state, a pager that waits for its memory.
    /// `hold` is told of the arrival as soon as there is something to be cleaned up.
    pub(crate) fn prepare(
        self: &Arc<Self>,
        prepare: Prepare,
        local: SocketAddr,
        hold: &mut dyn FnMut(Arc<Arrival>),
    ) -> Result<Prepared, ApiError> {
        let request = &prepare.request;
        self.refuse_if_closing()?;
        let expected = |arrival: &&Arc<Arrival>| {
            matches!(*lock(&arrival.state), Target::Waiting | Target::Loaded)
        };
        let known: Vec<Arc<Arrival>> = lock(&self.arrivals).values().cloned().collect();
        if known.iter().any(|arrival| arrival.id == prepare.id) {
            return Err(ApiError::new("bad-request", "a move under this name is under way"));
        }
        if known.iter().filter(expected).count() >= ARRIVALS_MAX {
            let text = format!("{ARRIVALS_MAX} VMs are on their way to this host already");
            return Err(ApiError::new("too-many", text).hint("try again later"));
        }
        check_budget(request.local)?;
        if let Some(bounds) = &request.auto_local {
            bounds.check(request.memory)?;
        }
        let accel = match prepare.accel.as_str() {
            "kvm" => host::AccelChoice::Kvm,
            _ => host::AccelChoice::Tcg,
        };
        let accel = host::choose_accel(accel)
            .map_err(|error| ApiError::new("no-accel", error.to_string()))?;
        // Before its name becomes a path.
        let spec = spec_of(request, accel)?;
        let vm = Arc::new(self.describe(request));
        *lock(&vm.accel) = prepare.accel.clone();
        *lock(&vm.state) = VmState::Arriving;
        self.claim_name(&vm)?;
        let arrival = Arc::new(Arrival {
            id: prepare.id,
            vm: vm.clone(),
            mode: prepare.mode,
            state: Mutex::new(Target::Waiting),
            ticket: OwnerId::random(),
            heard: Mutex::new(Instant::now()),
            took_ms: Mutex::default(),
        });
        lock(&self.arrivals).insert(prepare.id, arrival.clone());
        hold(arrival.clone());
        match self.get_ready(&arrival, &prepare, spec, local) {
            Ok(prepared) => Ok(prepared),
            Err(error) => {
                let _ = self.hear(prepare.id, TargetEvent::GiveUp);
                Err(error)
            }
        }
    }

    fn get_ready(
        &self,
        arrival: &Arrival,
        prepare: &Prepare,
        mut spec: VmSpec,
        local: SocketAddr,
    ) -> Result<Prepared, ApiError> {
        let (vm, request) = (&arrival.vm, &prepare.request);
        spec.extra_args.extend(["-incoming".to_owned(), "defer".to_owned()]);
        let qemu = host::find_qemu(request.qemu.as_deref())
            .map_err(|error| ApiError::new("no-qemu", error.to_string()))?;
        let paths = self.make_files(vm)?;
        let process = start_qemu(vm, &spec, &qemu, &paths)?;
        *lock(&vm.running) = Some(Running { qemu: process.clone(), pager: None });
        if let Some(key) = &prepare.seal_key {
            create_private(&vm.seal_key())
                .and_then(|mut file| std::io::Write::write_all(&mut file, key))
                .map_err(|error| io_error("write", &vm.seal_key(), &error))?;
        } else if request.encrypt && prepare.region.is_none() {
            crate::seal::SealKey::generate()
                .and_then(|key| key.save(&vm.seal_key()))
                .map_err(|error| io_error("write", &vm.seal_key(), &error))?;
        }
        let import = prepare.region.as_ref().map(|region| ImportConfig {
            listen: SocketAddr::new(local.ip(), 0).to_string(),
            ticket: arrival.ticket,
            stores: region.stores.clone(),
        });
        let region = prepare.region.as_ref();
        let config = PagerConfig {
            region: region.map_or_else(RegionId::random, |region| region.region),
            epoch: region.map_or(Epoch(1), |region| region.epoch),
            import,
            ..self.pager_config(vm, request, process.pid)
        };
        let mut record = Record {
            request: request.clone(),
            accel: prepare.accel.clone(),
            qemu: identity(&process),
            pager: None,
            config: config.clone(),
            incoming: Some(arrival.id),
            arrived: None,
            handover: None,
        };
        vm.write_record(&record)?;
        let mut qmp = connect_qmp(vm, &process)?;
        let mut listens = None;
        if config.import.is_some() {
            let (pager, address) = start_pager(vm, &config, |_| {})?;
            record.pager = Some(identity(&pager));
            *lock(&vm.running) = Some(Running { qemu: process, pager: Some(pager) });
            // The same one for every pager of this VM: the source comes back to it.
            if let (Some(import), Some(address)) = (&mut record.config.import, &address) {
                import.listen.clone_from(address);
            }
            listens = address;
            vm.write_record(&record)?;
        }
        let own = Self::listen(&mut qmp, arrival, prepare, self.identity.is_none(), local)
            .map_err(|error| qemu_error(&error))?;
        *lock(&vm.qmp) = Some(qmp);
        tracing::info!(vm = request.name, id = %arrival.id, "a VM is about to come");
        Ok(Prepared { pager: listens, ticket: arrival.ticket, qemu: own, boot: boot_id() })
    }

    /// Has QEMU wait for its state: on a unix socket, or, where it moves the memory itself and
    /// nothing is to be encrypted, on a port of its own.
    fn listen(
        qmp: &mut heca_vmm::qmp::Qmp,
        arrival: &Arrival,
        prepare: &Prepare,
        plaintext: bool,
        local: SocketAddr,
    ) -> Result<Option<String>, heca_vmm::qmp::QmpError> {
        let capabilities = super::qemu::capabilities(prepare.mode);
        qmp.execute("migrate-set-capabilities", capabilities)?;
        if !(prepare.mode.is_qemu() && plaintext) {
            let socket = arrival.vm.incoming_socket();
            let uri = format!("unix:{}", socket.display());
            qmp.execute("migrate-incoming", json!({ "uri": uri }))?;
            return Ok(None);
        }
        qmp.execute("migrate-incoming", json!({ "uri": format!("tcp:{}:0", local.ip()) }))?;
        let found = qmp.execute("query-migrate", Value::Null)?;
        let port = found["socket-address"][0]["port"].as_str().unwrap_or("0").to_owned();
        Ok(Some(format!("tcp:{}:{port}", local.ip())))
    }

    /// Connects to the QEMU that a stream is for.
    pub(crate) fn incoming_stream(&self, ticket: OwnerId) -> Result<UnixStream, ApiError> {
        let arrivals = lock(&self.arrivals);
        let arrival = arrivals.values().find(|arrival| arrival.ticket == ticket).cloned();
        drop(arrivals);
        let Some(arrival) = arrival else {
            return Err(ApiError::new("no-migration", "no VM is expected under this ticket"));
        };
        let socket = arrival.vm.incoming_socket();
        UnixStream::connect(&socket).map_err(|error| io_error("connect to", &socket, &error))
    }

    /// Waits until QEMU has the guest's state.
    pub(crate) fn await_loaded(
        &self,
        arrival: &Arrival,
        timeout: Duration,
    ) -> Result<Answer, ApiError> {
        let deadline = Instant::now() + timeout;
        let lost = |what: &str| ApiError::new("target-failed", what.to_owned());
        let loaded = |status: &str| {
            // After QEMU's own post-copy began the guest may run, and its memory follows.
            status == "completed" || (arrival.mode.is_postcopy() && status == "postcopy-active")
        };
        while *lock(&arrival.state) == Target::Waiting {
            let mut held = lock(&arrival.vm.qmp);
            let qmp = held.as_mut().ok_or_else(|| lost("the target gave the VM up"))?;
            match qmp.wait_event("MIGRATION", EVENT_LOOK) {
                Ok(event) => match event.data["status"].as_str().unwrap_or_default() {
                    "failed" => {
                        return Err(lost("the target's QEMU cannot load the guest's state"));
                    }
                    status if loaded(status) => {
                        drop(held);
                        self.await_memory(arrival, deadline)?;
                        let _ = lock(&arrival.state).step(TargetEvent::StateLoaded);
                    }
                    _ => {}
                },
                Err(heca_vmm::qmp::QmpError::Timeout { .. }) => {}
                Err(error) => return Err(qemu_error(&error)),
            }
            arrival.check_alive()?;
            if Instant::now() > deadline {
                return Err(lost("the guest's state did not come in time"));
            }
        }
        arrival.check_alive()?;
        match *lock(&arrival.state) {
            Target::Loaded => Ok(Answer::Loaded),
            Target::Running => Ok(Answer::Running),
            Target::Waiting | Target::Dropped => Ok(Answer::Dropped),
        }
    }

    /// Waits until the source has told of every page: QEMU may have got its state without a look at the
    /// guest's memory.
    fn await_memory(&self, arrival: &Arrival, deadline: Instant) -> Result<(), ApiError> {
        while !arrival.mode.is_qemu() && self.import_info(arrival)?.behind_pages.is_none() {
            arrival.check_alive()?;
            if Instant::now() > deadline {
                let text = "the guest's memory did not come in time";
                return Err(ApiError::new("target-failed", text));
            }
            std::thread::sleep(Duration::from_micros(500));
        }
        Ok(())
    }

    /// How much of the memory is here.
    pub(crate) fn import_info(&self, arrival: &Arrival) -> Result<ImportInfo, ApiError> {
        call(arrival.vm.pager_socket(), "/v1/import", None, Duration::from_secs(5))
    }

    /// What a source says about the right to run.
    pub(crate) fn hear(self: &Arc<Self>, id: Uuid, event: TargetEvent) -> Result<Answer, ApiError> {
        let known = lock(&self.arrivals).get(&id).cloned();
        let Some(arrival) = known else {
            let ran = tombstone(self, id).exists();
            return Ok(if ran { Answer::Running } else { Answer::Dropped });
        };
        *lock(&arrival.heard) = Instant::now();
        // Held until it is decided and written down; what follows from it may take longer.
        let mut state = lock(&arrival.state);
        let mut event = event;
        if event == TargetEvent::Grant && *state == Target::Loaded {
            // What can be known before the right is taken is no reason to lose a VM.
            if let Err(error) = arrival.check_alive() {
                tracing::error!(vm = lock(&arrival.vm.request).name, "not taken over: {error}");
                event = TargetEvent::GiveUp;
            }
        }
        let before = *state;
        let actions = state.step(event);
        let after = *state;
        if actions.contains(&TargetAction::Record) && after == Target::Running {
            // That one was dropped is what no record says.
            if let Err(error) = self.record_arrival(&arrival) {
                *state = before;
                return Err(error);
            }
        }
        drop(state);
        let mut said = None;
        for action in actions {
            match *action {
                TargetAction::Record => {}
                TargetAction::Run => {
                    self.run_arrival(&arrival);
                    // What is written down answers from here on.
                    lock(&self.arrivals).remove(&id);
                }
                TargetAction::Remove => self.remove_arrival(&arrival),
                TargetAction::Answer(answer) => said = Some(answer),
            }
        }
        match (said, after) {
            (Some(answer), _) => Ok(answer),
            (None, Target::Running) => Ok(Answer::Running),
            (None, Target::Dropped) => Ok(Answer::Dropped),
            (None, Target::Waiting | Target::Loaded) => {
                Err(ApiError::new("not-yet", "the guest's state is not here yet"))
            }
        }
    }

    /// Whether it was written down that a VM came.
    pub(super) fn has_arrived(&self, id: Uuid) -> bool {
        tombstone(self, id).exists()
    }

    /// Whether a VM that came still needs its former host.
    pub(crate) fn needs_source(&self, id: Uuid) -> bool {
        let vms: Vec<Arc<Vm>> = lock(&self.vms).values().cloned().collect();
        let is = |vm: &&Arc<Vm>| {
            *lock(&vm.state) != VmState::Stopped
                && lock(&vm.record)
                    .as_ref()
                    .is_some_and(|record| record.arrived.is_some_and(|(came, _)| came == id))
        };
        let Some(vm) = vms.iter().find(is) else { return false };
        let import: Result<ImportInfo, ApiError> =
            call(vm.pager_socket(), "/v1/import", None, Duration::from_secs(2));
        // A pager that does not answer is being replaced, and its successor may want some.
        import.map_or(true, |import| !import.done && import.behind_pages != Some(0))
    }

    /// The file is what counts, to this agent and to its successor; it is there in full or not at all.
    fn record_arrival(&self, arrival: &Arrival) -> Result<(), ApiError> {
        let came = |record: &mut Record, came: bool| {
            record.arrived = came.then_some((arrival.id, arrival.mode));
        };
        arrival.vm.change_record(|record| came(record, true))?;
        let (path, new) =
            (tombstone(self, arrival.id), self.arrived_dir.join(format!("{}.new", arrival.id)));
        let written = fs::create_dir_all(&self.arrived_dir)
            .and_then(|()| fs::write(&new, b"running\n"))
            .and_then(|()| fs::rename(&new, &path));
        if let Err(error) = written {
            let _ = arrival.vm.change_record(|record| came(record, false));
            return Err(io_error("write", &path, &error));
        }
        if let Err(error) = arrival.vm.change_record(|record| record.incoming = None) {
            tracing::warn!("a record is not up to date, which does no harm: {error}");
        }
        Ok(())
    }

    /// The guest may run here, and from here on nowhere else.
    fn run_arrival(self: &Arc<Self>, arrival: &Arrival) {
        let vm = &arrival.vm;
        let name = lock(&vm.request).name.clone();
        let begun = Instant::now();
        if arrival.mode.is_qemu() {
            self.resume_guest(vm, &name);
            self.page_arrival(vm, arrival.mode, &name);
        } else {
            let commit = Some(json!({}));
            let committed: Result<(), ApiError> = call(
                vm.pager_socket(),
                "/v1/import/commit",
                commit.as_ref(),
                Duration::from_secs(10),
            );
            if let Err(error) = committed {
                tracing::error!(vm = name, "the pager ended at the last moment: {error}");
                let running = lock(&vm.running);
                let held = running.as_ref().map(|r| (r.qemu.clone(), r.pager.clone()));
                drop(running);
                if let Some((qemu, pager)) = held {
                    if let Some(pager) = pager {
                        pager.kill();
                    }
                    replace_pager(vm, &qemu, Instant::now());
                }
            }
            let committed = begun.elapsed();
            self.resume_guest(vm, &name);
            let resumed = begun.elapsed() - committed;
            let ms = |time: Duration| time.as_secs_f64() * 1e3;
            *lock(&arrival.took_ms) = Some((ms(committed), ms(resumed)));
        }
        *lock(&vm.state) = VmState::Running;
        watch(vm);
        tracing::info!(vm = name, "the VM runs here now");
    }

    fn resume_guest(&self, vm: &Arc<Vm>, name: &str) {
        let gone_on = vm.with_qmp(|qmp| {
            qmp.cont().map_err(|error| failed(&error))?;
            // Switches and neighbours learn where the guest is now.
            let announce = json!({ "initial": 10, "max": 200, "rounds": 5, "step": 50 });
            let _ = qmp.execute("announce-self", announce);
            Ok(())
        });
        if let Err(error) = gone_on {
            tracing::error!(vm = name, "the guest does not go on yet: {error}");
            let vm = vm.clone();
            vm.resuming.store(true, Ordering::SeqCst);
            std::thread::spawn(move || {
                if vm.resume() {
                    *lock(&vm.problem) = None;
                }
                vm.resuming.store(false, Ordering::SeqCst);
            });
        }
    }

    /// A guest whose memory QEMU moved gets its pager now; where memory still follows, once it is
    /// all here, as QEMU watches the memory itself until then.
    pub(super) fn page_arrival(self: &Arc<Self>, vm: &Arc<Vm>, mode: MigrationMode, name: &str) {
        let vm = vm.clone();
        let (name, postcopy) = (name.to_owned(), mode.is_postcopy());
        let work = move || {
            let still_follows = || {
                let found = vm.with_qmp(|qmp| {
                    qmp.execute("query-migrate", Value::Null).map_err(|error| failed(&error))
                });
                found.is_ok_and(|found| found["status"] == "postcopy-active")
            };
            while postcopy && still_follows() {
                std::thread::sleep(Duration::from_millis(20));
            }
            let Some(record) = lock(&vm.record).clone() else { return };
            match start_pager(&vm, &record.config, |_| {}) {
                Ok((pager, _)) => {
                    let started = identity(&pager);
                    if let Some(running) = &mut *lock(&vm.running) {
                        running.pager = Some(pager);
                    }
                    let _ = vm.change_record(|record| record.pager = Some(started));
                }
                Err(error) => {
                    let detail = error.detail.clone().unwrap_or_default();
                    tracing::error!(vm = name, "no pager: {error}: {detail}");
                    *lock(&vm.problem) =
                        Some(format!("all of its memory is local: no pager: {error}"));
                }
            }
        };
        std::thread::spawn(work);
    }

    fn remove_arrival(&self, arrival: &Arrival) {
        let vm = &arrival.vm;
        // Whoever waits for QEMU lets go of it when it is gone. The pager is first: what it would
        // give back in the end is not this host's.
        if let Some(running) = &*lock(&vm.running) {
            if let Some(pager) = &running.pager {
                pager.kill();
            }
            running.qemu.kill();
        }
        vm.kill_all();
        *lock(&vm.state) = VmState::Stopped;
        self.forget(vm);
        lock(&self.arrivals).remove(&arrival.id);
        tracing::info!(id = %arrival.id, "the VM that was to come stays where it is");
    }

    /// The source's connection ended: it gets some time to come back.
    pub(crate) fn wait_for_source(self: &Arc<Self>, arrival: &Arc<Arrival>) {
        let since = Instant::now();
        loop {
            if !matches!(*lock(&arrival.state), Target::Waiting | Target::Loaded) {
                return;
            }
            if *lock(&arrival.heard) > since {
                // Another connection looks after it; that one's end is waited for in its turn.
                return self.wait_longer(arrival);
            }
            if since.elapsed() > RETURN_TIME || self.refuse_if_closing().is_err() {
                let _ = self.hear(arrival.id, TargetEvent::GiveUp);
                return;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn wait_longer(self: &Arc<Self>, arrival: &Arc<Arrival>) {
        while matches!(*lock(&arrival.state), Target::Waiting | Target::Loaded) {
            let quiet = lock(&arrival.heard).elapsed();
            if quiet > RETURN_TIME || self.refuse_if_closing().is_err() {
                let _ = self.hear(arrival.id, TargetEvent::GiveUp);
                return;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// The source asks no more.
    pub(crate) fn forget_arrival(&self, id: Uuid) {
        lock(&self.arrivals).remove(&id);
        let _ = fs::remove_file(tombstone(self, id));
    }

    /// Ends what is on its way here, for an agent that ends.
    pub(super) fn drop_arrivals(self: &Arc<Self>) {
        let ids: Vec<Uuid> = lock(&self.arrivals).keys().copied().collect();
        for id in ids {
            let _ = self.hear(id, TargetEvent::GiveUp);
        }
    }
}

impl Arrival {
    /// Time to take the memory over, and to have the guest go on, in milliseconds.
    pub(crate) fn took_ms(&self) -> Option<(f64, f64)> {
        *lock(&self.took_ms)
    }

    fn check_alive(&self) -> Result<(), ApiError> {
        let running = lock(&self.vm.running);
        let dead = |what: &str| {
            let log = self.vm.dir.join(format!("{what}.log"));
            ApiError::new("target-failed", format!("the target's {what} ended"))
                .detail(format!("see {} there", log.display()))
        };
        let Some(running) = &*running else { return Err(dead("qemu")) };
        if running.qemu.wait(Duration::ZERO) {
            return Err(dead("qemu"));
        }
        match &running.pager {
            Some(pager) if pager.wait(Duration::ZERO) => Err(dead("pager")),
            _ => Ok(()),
        }
    }
}
