//! What QEMU is told for a migration.

use heca_api::MigrationMode;
use serde_json::{Value, json};

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
