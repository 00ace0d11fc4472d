//! What QEMU is told for a migration.

use std::time::{Duration, Instant};

use heca_api::{ApiError, MigrationMode};
use heca_vmm::qmp::{Qmp, QmpError};
use serde_json::{Value, json};

/// States of a QEMU whose guest is held for a migration, or after one.
const HELD: [&str; 4] = ["paused", "prelaunch", "inmigrate", "postmigrate"];

pub(super) fn failed(error: &QmpError) -> ApiError {
    ApiError::new("qemu-failed", "QEMU does not do as it is told").detail(error.to_string())
}

/// Has QEMU forget a migration, and a guest that is held for one go on.
///
/// # Errors
/// A QEMU that is silent, or does not go on in time.
pub(super) fn resume(qmp: &mut Qmp, patience: Duration) -> Result<(), ApiError> {
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
