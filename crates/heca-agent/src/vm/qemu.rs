//! What QEMU is told for a migration.

use std::time::{Duration, Instant};

use heca_api::{ApiError, MigrationMode};
use heca_vmm::qmp::{Qmp, QmpError};
use serde_json::{Value, json};

use super::{QMP_TIMEOUT, Vm, lock};

/// States of a QEMU whose guest is held for a migration, or after one.
const HELD: [&str; 4] = ["paused", "prelaunch", "inmigrate", "postmigrate"];

/// Time for QEMU's monitor to answer a new connection.
const CONNECT_TIME: Duration = Duration::from_secs(5);
/// Time for a guest to go on, before QEMU is asked once more.
const RESUME_TIME: Duration = Duration::from_secs(10);
/// Pauses between two attempts to have a guest go on: the first, and the longest.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));
/// Code of an error after which a connection to QEMU's monitor is of no use.
const MONITOR_LOST: &str = "monitor-lost";

pub(super) fn failed(error: &QmpError) -> ApiError {
    let code = match error {
        QmpError::Timeout { .. } | QmpError::Command { .. } => "qemu-failed",
        _ => MONITOR_LOST,
    };
    ApiError::new(code, "QEMU does not do as it is told").detail(error.to_string())
}

impl Vm {
    /// Talks to QEMU's monitor, over a new connection if there is none. One that was lost is
    /// given up.
    pub(super) fn with_qmp<T>(
        &self,
        work: impl FnOnce(&mut Qmp) -> Result<T, ApiError>,
    ) -> Result<T, ApiError> {
        let mut held = lock(&self.qmp);
        let qmp = match &mut *held {
            Some(qmp) => qmp,
            None => {
                let connected = Qmp::connect(&self.paths().qmp_socket, CONNECT_TIME);
                let mut qmp = connected.map_err(|error| failed(&error))?;
                qmp.set_timeout(QMP_TIMEOUT);
                held.insert(qmp)
            }
        };
        let outcome = work(qmp);
        if outcome.as_ref().is_err_and(|error| error.code == MONITOR_LOST) {
            *held = None;
        }
        outcome
    }

    /// Has a guest that is held go on, until it does. Returns whether it runs: not if QEMU ended.
    pub(super) fn resume(&self) -> bool {
        let mut pause = PAUSES.0;
        loop {
            let error = match self.with_qmp(|qmp| resume(qmp, RESUME_TIME)) {
                Ok(()) => return true,
                Err(error) => error,
            };
            let name = lock(&self.request).name.clone();
            tracing::error!(vm = name, "the guest does not go on: {error}");
            *lock(&self.problem) = Some(format!("the guest does not go on: {error}"));
            let qemu = lock(&self.running).as_ref().map(|running| running.qemu.clone());
            if qemu.is_none_or(|qemu| qemu.wait(pause)) {
                return false;
            }
            pause = (pause * 2).min(PAUSES.1);
        }
    }
}

/// Has QEMU forget a migration, and a guest that is held for one go on.
///
/// # Errors
/// A QEMU that is silent, or does not go on in time.
fn resume(qmp: &mut Qmp, patience: Duration) -> Result<(), ApiError> {
    let _ = qmp.execute("migrate_cancel", Value::Null);
    let deadline = Instant::now() + patience;
    loop {
        let status = qmp.query_status().map_err(|error| failed(&error))?;
        let found = qmp.execute("query-migrate", Value::Null).unwrap_or_default();
        // One that is still under way could stop the guest again.
        let over = matches!(
            found["status"].as_str(),
            // Pages of a guest that came may still follow.
            None | Some("none" | "cancelled" | "failed" | "completed" | "postcopy-active")
        );
        match status.as_str() {
            held if HELD.contains(&held) => {
                if let Err(error) = qmp.cont() {
                    tracing::debug!("not yet: {error}");
                }
            }
            // It is about to go on by itself, or to end.
            "finish-migrate" => {}
            _ if over => return Ok(()),
            _ => {}
        }
        if Instant::now() > deadline {
            return Err(ApiError::new("qemu-slow", format!("QEMU stays {status}")));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Arguments of `migrate-set-capabilities`, the same on both sides. All that matter are named, as an
/// earlier attempt may have set others.
pub(super) fn capabilities(mode: MigrationMode) -> Value {
    let postcopy = matches!(mode, MigrationMode::QemuPostcopy | MigrationMode::QemuPostcopyPreempt);
    let list = [
        ("events", true),
        ("return-path", true),
        // The memory that is a named file is not QEMU's business.
        ("x-ignore-shared", !mode.is_qemu()),
        ("pause-before-switchover", !mode.is_qemu()),
        // Disks are the target's once the guest goes on there: until then the source may want them back.
        ("late-block-activate", !mode.is_qemu()),
        ("postcopy-ram", postcopy),
        ("postcopy-preempt", mode == MigrationMode::QemuPostcopyPreempt),
    ];
    let list: Vec<Value> = list
        .into_iter()
        .map(|(capability, state)| json!({ "capability": capability, "state": state }))
        .collect();
    json!({ "capabilities": list })
}

/// Arguments of `migrate-set-parameters`. QEMU's own bound of 1 Gbit/s would be the longest part of
/// the downtime.
pub(super) fn parameters(max_downtime_ms: u64, bytes_per_s: Option<u64>) -> Value {
    const UNBOUNDED: u64 = 12_500_000_000;
    json!({
        "downtime-limit": max_downtime_ms.clamp(1, 2_000_000),
        "max-bandwidth": bytes_per_s.unwrap_or(UNBOUNDED),
    })
}
