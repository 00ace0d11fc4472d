//! The guest stands still: its state goes to the target.

use std::time::{Duration, Instant};

use heca_api::{ExportInfo, MigrationMode, MigrationPhase};
use heca_vmm::qmp::{Qmp, QmpError};
use serde_json::Value;

use super::*;
use crate::vm::qemu::{self, failed};

/// Time for QEMU to stop the guest once it was asked to.
const STOP_TIME: Duration = Duration::from_secs(20);
/// Time for the state to be saved, sent and loaded.
const LOAD_TIME: Duration = Duration::from_secs(15);
/// Time for QEMU's own modes, which move the memory as well.
const QEMU_TIME: Duration = Duration::from_secs(900);
/// Time for the last pages of a safe migration, or of a pre-copy.
const REST_TIME: Duration = Duration::from_secs(20);

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// Waits until the migration of a QEMU has one of these states.
fn wait_status(
    qmp: &mut Qmp,
    wanted: &[&str],
    timeout: Duration,
    check: impl Fn() -> Result<(), ApiError>,
) -> Result<String, ApiError> {
    let deadline = Instant::now() + timeout;
    loop {
        match qmp.wait_event("MIGRATION", Duration::from_millis(50)) {
            Ok(event) => {
                let status = event.data["status"].as_str().unwrap_or_default();
                if wanted.contains(&status) {
                    return Ok(status.to_owned());
                }
                if matches!(status, "failed" | "cancelled") {
                    let found = qmp.execute("query-migrate", Value::Null).unwrap_or_default();
                    let why = found["error-desc"].as_str().unwrap_or("no reason given").to_owned();
                    return Err(ApiError::new("qemu-failed", format!("QEMU's migration {status}"))
                        .detail(why));
                }
            }
            Err(QmpError::Timeout { .. }) => check()?,
            Err(error) => return Err(failed(&error)),
        }
        if Instant::now() > deadline {
            let text = format!("QEMU did not get to {} in time", wanted.join(" or "));
            return Err(ApiError::new("qemu-slow", text));
        }
    }
}

impl Leave {
    /// Up to the point where only the right to run is missing. Any error leaves the guest here.
    pub(super) fn switch(
        self: &Arc<Self>,
        manager: &VmManager,
        prepared: &Prepared,
        ready: Option<Link>,
    ) -> Result<Handover, ApiError> {
        self.check()?;
        let uri = match (&prepared.qemu, ready) {
            (Some(uri), _) => uri.clone(),
            (None, Some(link)) => {
                format!("unix:{}", self.relay(manager, prepared.ticket, link)?.display())
            }
            (None, None) => return Err(ApiError::new("internal", "no way for QEMU's stream")),
        };
        if self.request.mode.is_qemu() {
            self.switch_qemu(&uri)?;
        } else {
            self.switch_memory(&uri)?;
        }
        Ok(Handover {
            id: self.id,
            to: self.to.clone(),
            boot: prepared.boot.clone(),
            state: Source::Holding,
            pager: prepared
                .pager
                .as_ref()
                .map(|address| Destination { address: address.clone(), ticket: prepared.ticket }),
        })
    }

    fn begin(&self, qmp: &mut Qmp, uri: &str) -> Result<(), ApiError> {
        let rate = self.request.bandwidth.map(|size| size.0);
        let parameters = qemu::parameters(self.request.max_downtime_ms, rate);
        let capabilities = qemu::capabilities(self.request.mode);
        let run = |qmp: &mut Qmp, command: &str, arguments| {
            qmp.execute(command, arguments).map(drop).map_err(|error| failed(&error))
        };
        run(qmp, "migrate-set-capabilities", capabilities)?;
        run(qmp, "migrate-set-parameters", parameters)?;
        // Of earlier attempts.
        qmp.take_events();
        // Also if the answer is late: QEMU may do it all the same.
        self.migrating.store(true, Ordering::SeqCst);
        run(qmp, "migrate", json!({ "uri": uri }))
    }

    fn switch_memory(&self, uri: &str) -> Result<(), ApiError> {
        let asked = Instant::now();
        let stopped = self.vm.with_qmp(|qmp| {
            self.begin(qmp, uri)?;
            self.enter(MigrationPhase::Switching);
            qmp.wait_event("STOP", STOP_TIME).map_err(|error| failed(&error))?;
            let stopped = Instant::now();
            wait_status(qmp, &["pre-switchover"], STOP_TIME, || self.check())?;
            Ok(stopped)
        })?;
        *lock(&self.stopped) = Some(stopped);
        let stop = ms(stopped.elapsed());
        if self.request.safe {
            self.wait_for(
                || Ok(self.unflushed()?.0 == 0),
                "the sponsors do not take the last pages",
            )?;
        }
        let begun = Instant::now();
        // From here on a successor of the pager would not know what the target was told.
        self.vm.switched.store(true, Ordering::SeqCst);
        let go_on = || {
            let go_on = json!({ "state": "pre-switchover" });
            self.vm.with_qmp(|qmp| {
                qmp.execute("migrate-continue", go_on).map(drop).map_err(|error| failed(&error))
            })
        };
        let tell = || self.pager::<ExportInfo>("/v1/export/switch", Some(&json!({})));
        let export = if self.request.safe {
            // Nothing may be looked at between the last page that was stored and the last list.
            let export = tell()?;
            go_on()?;
            export
        } else {
            // The target holds what QEMU looks at there until it was told of every page: so the
            // last look is taken while the state is on its way.
            go_on()?;
            tell()?
        };
        self.note(&export);
        let final_scan = ms(begun.elapsed());
        if self.request.mode == MigrationMode::Precopy {
            let at_once = serde_json::to_value(Release { at_once: true }).expect("plain data");
            self.pager::<()>("/v1/export/release", Some(&at_once))?;
        }
        let answer = Ask::AwaitLoaded { ms: LOAD_TIME.as_millis() as u64 };
        self.expect_loaded(&answer, LOAD_TIME)?;
        // Until then a lost connection would have QEMU go on with the guest by itself.
        self.vm.with_qmp(|qmp| wait_status(qmp, &["completed"], LOAD_TIME, || self.check()))?;
        let device_state = ms(begun.elapsed());
        if self.request.mode == MigrationMode::Precopy {
            let mut all_there = || match self.ask(&Ask::Import, ANSWER_TIMEOUT)? {
                Told::Import(import) => Ok(import.behind_pages == Some(0)),
                _ => Err(ApiError::new("target-confused", "the target's answer makes no sense")),
            };
            self.wait_for(&mut all_there, "the last pages do not get to the target")?;
        }
        self.check()?;
        let mut info = lock(&self.info);
        info.report.parts_ms.stop = stop;
        info.report.parts_ms.final_scan = final_scan;
        info.report.parts_ms.device_state = device_state;
        tracing::debug!(asked_ms = ms(asked.elapsed()), "ready to give the VM away");
        Ok(())
    }

    fn wait_for(
        &self,
        mut done: impl FnMut() -> Result<bool, ApiError>,
        problem: &str,
    ) -> Result<(), ApiError> {
        let deadline = Instant::now() + REST_TIME;
        while !done()? {
            self.check()?;
            if Instant::now() > deadline {
                return Err(ApiError::new("slow", problem.to_owned()));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    fn expect_loaded(&self, ask: &Ask, within: Duration) -> Result<(), ApiError> {
        match self.ask(ask, within + ANSWER_TIMEOUT)? {
            Told::Answer { answer: Answer::Loaded, .. } => Ok(()),
            _ => Err(ApiError::new("target-failed", "the target gave the VM up")),
        }
    }

    /// QEMU moves the memory, in a way of its own.
    fn switch_qemu(&self, uri: &str) -> Result<(), ApiError> {
        let postcopy = self.request.mode != MigrationMode::QemuPrecopy;
        self.vm.with_qmp(|qmp| {
            self.begin(qmp, uri)?;
            if postcopy {
                qmp.execute("migrate-start-postcopy", Value::Null).map_err(|e| failed(&e))?;
            }
            Ok(())
        })?;
        let wanted: &[&str] = if postcopy { &["postcopy-active"] } else { &["completed"] };
        let deadline = Instant::now() + QEMU_TIME;
        loop {
            // Let go of now and then: others want to talk to QEMU, too.
            let found = self.vm.with_qmp(|qmp| {
                let look = Duration::from_millis(500);
                match wait_status(qmp, wanted, look, || self.check()) {
                    Err(error) if error.code == "qemu-slow" => Ok(false),
                    other => other.map(|_| true),
                }
            })?;
            if found {
                break;
            }
            if Instant::now() > deadline {
                return Err(ApiError::new("qemu-slow", "QEMU's migration does not end"));
            }
        }
        let stop = self.vm.with_qmp(|qmp| {
            let stop = qmp.wait_event("STOP", ANSWER_TIMEOUT).map_err(|e| failed(&e))?;
            Ok(stop.time)
        })?;
        // The event's own time is by the wall clock.
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let since = now.unwrap_or_default().saturating_sub(stop);
        *lock(&self.stopped) = Instant::now().checked_sub(since);
        self.enter(MigrationPhase::Switching);
        let ask = Ask::AwaitLoaded { ms: LOAD_TIME.as_millis() as u64 };
        self.expect_loaded(&ask, LOAD_TIME)
    }

    /// QEMU's own post-copy goes on after the switch: until it says that it is done, this side is needed.
    pub(super) fn follow_qemu(&self) {
        loop {
            let ended = lock(&self.vm.running).as_ref().is_none_or(|r| r.qemu.wait(Duration::ZERO));
            if ended || *lock(&self.vm.resolution) == Some(false) {
                return;
            }
            let found = self.vm.with_qmp(|qmp| {
                qmp.execute("query-migrate", Value::Null).map_err(|error| failed(&error))
            });
            let found = match found {
                Ok(found) => found,
                Err(error) => {
                    *lock(&self.vm.problem) = Some(format!("QEMU does not answer: {error}"));
                    std::thread::sleep(RETRY.1);
                    continue;
                }
            };
            let ram = &found["ram"];
            {
                let mut info = lock(&self.info);
                info.remaining_bytes = ram["remaining"].as_u64().unwrap_or(0);
                info.report.memory_bytes = ram["transferred"].as_u64().unwrap_or(0);
                info.report.qemu_downtime_ms = found["downtime"].as_f64();
            }
            match found["status"].as_str().unwrap_or_default() {
                "completed" => return,
                "postcopy-active" => *lock(&self.vm.problem) = None,
                status => {
                    *lock(&self.vm.problem) =
                        Some(format!("QEMU's post-copy does not go on ({status})"));
                }
            }
            std::thread::sleep(LOOK_AFTER);
        }
    }

    /// The guest goes on here: QEMU forgets the migration, the pager thaws.
    pub(super) fn take_back(&self) {
        let aborted = self.pager::<()>("/v1/export/abort", Some(&json!({})));
        if let Err(error) = aborted {
            tracing::debug!("the pager was not told that the VM stays: {error}");
        }
        self.vm.switched.store(false, Ordering::SeqCst);
        if self.migrating.load(Ordering::SeqCst) && !self.vm.resume() {
            return;
        }
        let mut state = lock(&self.vm.state);
        if *state == VmState::Leaving {
            *state = VmState::Running;
        }
        drop(state);
        *lock(&self.vm.problem) = None;
    }
}
