//! One VM: its files, its record, what is told of it.

use std::fs;
use std::path::PathBuf;

use heca_api::{ApiError, PagerStats, Resize, VmInfo};
use heca_vmm::command_line::VmPaths;

use super::{EXIT_TIMEOUT, Record, Vm, io_error, lock};
use crate::pager::journal_path;

impl Vm {
    pub(super) fn paths(&self) -> VmPaths {
        VmPaths {
            ram_file: self.ram_file.clone(),
            qmp_socket: self.dir.join("qmp.sock"),
            console_socket: self.dir.join("console.sock"),
            console_log: self.dir.join("console.log"),
        }
    }

    /// Where QEMU waits for the state of a VM that comes.
    pub(super) fn incoming_socket(&self) -> PathBuf {
        self.dir.join("incoming.sock")
    }

    /// Whether no migration of the VM is under way.
    pub(super) fn is_at_home(&self) -> bool {
        lock(&self.leave).as_ref().is_none_or(|leave| leave.info().phase.is_over())
    }

    pub(super) fn pager_socket(&self) -> PathBuf {
        self.dir.join("pager.sock")
    }

    pub(super) fn pager_last(&self) -> PathBuf {
        self.dir.join("pager-last.json")
    }

    pub(super) fn record(&self) -> PathBuf {
        self.dir.join("vm.json")
    }

    /// The key that pages are sealed with.
    pub(super) fn seal_key(&self) -> PathBuf {
        self.dir.join("page.key")
    }

    pub(super) fn write_record(&self, record: &Record) -> Result<(), ApiError> {
        let mut held = lock(&self.record);
        self.store_record(record)?;
        *held = Some(record.clone());
        Ok(())
    }

    pub(super) fn store_record(&self, record: &Record) -> Result<(), ApiError> {
        let (path, new) = (self.record(), self.dir.join("vm.json.new"));
        let bytes = serde_json::to_vec(record).expect("plain data can be written as JSON");
        fs::write(&new, bytes)
            .and_then(|()| fs::rename(&new, &path))
            .map_err(|error| io_error("write", &path, &error))
    }

    /// The pager has this budget now.
    pub(super) fn note_budget(&self, resize: &Resize) -> Result<(), ApiError> {
        {
            let mut request = lock(&self.request);
            (request.local, request.auto_local) = (resize.local, resize.auto_local);
        }
        self.change_record(|record| {
            (record.request.local, record.request.auto_local) = (resize.local, resize.auto_local);
            record.config.local = resize.local;
        })
    }

    /// Changes what is written down about the VM; what could not be written has not changed.
    pub(super) fn change_record(&self, change: impl FnOnce(&mut Record)) -> Result<(), ApiError> {
        let mut held = lock(&self.record);
        let Some(mut record) = held.clone() else {
            // Its files may be those of another VM of this name by now.
            return Err(ApiError::new("ended", "the VM ended"));
        };
        change(&mut record);
        self.store_record(&record)?;
        *held = Some(record);
        Ok(())
    }

    /// Frees what only a running VM needs; logs and last figures stay.
    pub(super) fn clean_up_runtime(&self) {
        let paths = self.paths();
        for file in [
            &paths.ram_file,
            &paths.qmp_socket,
            &paths.console_socket,
            &self.pager_socket(),
            &self.incoming_socket(),
            &self.record(),
            &self.dir.join("pager.json"),
            &self.seal_key(),
            &journal_path(&paths.ram_file),
        ] {
            let _ = fs::remove_file(file);
        }
    }

    pub(super) fn kill_all(&self) {
        lock(&self.qmp).take();
        let Some(running) = lock(&self.running).take() else { return };
        running.qemu.kill();
        if let Some(pager) = running.pager
            && !pager.wait(EXIT_TIMEOUT)
        {
            // It waits for a sponsor that does not answer; the leases will run out.
            pager.kill();
        }
    }

    pub(super) fn info(&self, pager: Option<PagerStats>) -> VmInfo {
        let request = lock(&self.request).clone();
        let paths = self.paths();
        let state = *lock(&self.state);
        let running = lock(&self.running);
        let restarts = *lock(&self.restarts);
        let encrypted = request.encrypt;
        let fenced = pager.as_ref().and_then(|stats| stats.fenced.as_ref());
        let fenced =
            fenced.map(|why| format!("its memory has a newer owner; it is stopped: {why}"));
        VmInfo {
            name: request.name,
            state,
            memory: request.memory,
            local: request.local,
            auto_local: request.auto_local,
            replicas: request.replicas,
            vcpus: request.vcpus,
            accel: lock(&self.accel).clone(),
            qemu_pid: running.as_ref().map(|r| r.qemu.pid),
            pager_pid: running.as_ref().and_then(|r| r.pager.as_ref()).map(|p| p.pid),
            console: paths.console_socket,
            console_log: paths.console_log,
            pager: pager.or_else(|| lock(&self.last_stats).clone()),
            pager_restarts: restarts.count,
            pager_pause_ms: restarts.pause.map(|pause| pause.as_secs_f64() * 1e3),
            encrypted,
            migration: lock(&self.leave).as_ref().map(|leave| leave.info().phase),
            problem: lock(&self.problem).clone().or(fenced),
        }
    }
}
