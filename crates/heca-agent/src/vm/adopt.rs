//! VMs that a former agent of this host left running.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use heca_api::{ApiError, MigrationMode, VmState};
use serde_json::json;

use super::arrive::call;
use super::process::Process;
use super::watch::watch;
use super::{Record, Running, Vm, VmManager, lock};

impl VmManager {
    /// Takes them back, and cleans up after those that ended.
    pub(super) fn adopt_all(self: &Arc<Self>) {
        for entry in fs::read_dir(&self.run_dir).into_iter().flatten().flatten() {
            let dir = entry.path();
            let record = match fs::read(dir.join("vm.json")) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    let dir = dir.display();
                    tracing::error!(%error, "the record of a VM in {dir} cannot be read: left alone");
                    continue;
                }
                Err(_) => {
                    // It ended, or never began.
                    let _ = fs::remove_dir_all(&dir);
                    continue;
                }
                Ok(bytes) => serde_json::from_slice::<Record>(&bytes),
            };
            let record = match record {
                Ok(record) => record,
                Err(error) => {
                    // Perhaps its VM runs: nothing of it is touched.
                    let dir = dir.display();
                    tracing::error!(%error, "the record of a VM in {dir} cannot be read: left alone");
                    continue;
                }
            };
            let vm = Arc::new(self.describe(&record.request));
            let pager =
                record.pager.and_then(|(pid, time)| Process::adopt(pid, time).ok().flatten());
            let pager = pager.map(Arc::new);
            let qemu = match Process::adopt(record.qemu.0, record.qemu.1) {
                Ok(Some(qemu)) => qemu,
                // What its next host lacks is in the RAM file.
                Ok(None) if record.leaves_memory() && vm.ram_file.exists() => {
                    Process::ended(record.qemu.0)
                }
                Ok(None) => {
                    vm.clean_up_runtime();
                    let _ = fs::remove_dir_all(&dir);
                    continue;
                }
                Err(error) => {
                    let dir = dir.display();
                    tracing::error!(%error, "cannot tell whether the VM in {dir} runs: left alone");
                    continue;
                }
            };
            // One that came is ours from the moment in which that was written down.
            let expected = record.incoming.is_some_and(|id| !self.has_arrived(id));
            let unfinished = record.pager.is_none() && record.arrived.is_none();
            if expected || unfinished {
                // The agent ended while it started this VM, or while it was about to come: the guest
                // has not run here yet.
                if let Some(pager) = &pager {
                    pager.kill();
                }
                qemu.kill();
                vm.clean_up_runtime();
                let _ = fs::remove_dir_all(&dir);
                continue;
            }
            tracing::info!(vm = record.request.name, "took back a running VM");
            *lock(&vm.record) = Some(record.clone());
            *lock(&vm.accel) = record.accel;
            // One whose pager is gone gets a new one at once, from who watches it.
            let served = pager.is_some() || record.pager.is_none();
            *lock(&vm.state) = if served { VmState::Running } else { VmState::PagerLost };
            *lock(&vm.running) = Some(Running { qemu: Arc::new(qemu), pager });
            if record.handover.is_some() {
                *lock(&vm.state) = VmState::Leaving;
            }
            watch(&vm);
            match &record.handover {
                Some(handover) => self.adopt_leave(&vm, handover),
                // The former agent may have ended amid a move.
                None => {
                    let arrived = record.arrived.map(|(_, mode)| mode);
                    self.see_that_it_runs(&vm, arrived, record.pager.is_none());
                }
            }
            lock(&self.vms).insert(record.request.name, vm);
        }
    }

    /// Has a guest go on that a former agent of this host was about to move, or to take over: the
    /// right to run is here.
    pub(super) fn see_that_it_runs(
        self: &Arc<Self>,
        vm: &Arc<Vm>,
        arrived: Option<MigrationMode>,
        has_no_pager: bool,
    ) {
        let (manager, vm) = (self.clone(), vm.clone());
        // A move that begins meanwhile would meet this.
        vm.resuming.store(true, Ordering::SeqCst);
        std::thread::spawn(move || {
            let name = lock(&vm.request).name.clone();
            let quick = Duration::from_secs(10);
            let tell = |path: &str| -> Result<(), ApiError> {
                call(vm.pager_socket(), path, Some(&json!({})), quick)
            };
            if arrived.is_some() {
                match tell("/v1/import/commit") {
                    Err(error) if error.code == "not-switched" => {
                        *lock(&vm.problem) = Some(format!("the guest cannot go on: {error}"));
                        return;
                    }
                    outcome => tracing::debug!(vm = name, ?outcome, "told to take over"),
                }
                let _ = vm.change_record(|record| record.incoming = None);
            }
            let _ = tell("/v1/export/abort");
            let resumed = vm.resume();
            vm.resuming.store(false, Ordering::SeqCst);
            if !resumed {
                return;
            }
            *lock(&vm.problem) = None;
            if has_no_pager && let Some(mode) = arrived {
                manager.page_arrival(&vm, mode, &name);
            }
        });
    }
}
