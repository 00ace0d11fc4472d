//! Local budgets that follow what VMs need: how long they waited for pages is looked at every second,
//! see [`heca_core::budget`].

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use heca_api::{PagerStats, Resize, VmState};
use heca_core::budget::{Demand, plan};
use heca_types::ByteSize;
use heca_types::limits::PAGE_BYTES;
use serde_json::json;

use super::arrive::call;
use super::{Vm, VmManager, lock};

/// How often budgets are looked at.
const PERIOD: Duration = Duration::from_secs(1);
/// Time for a pager to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);
/// Part of the host's memory that budgets leave alone, if nothing else was asked for.
const KEEP_FREE_PART: u64 = 32;

/// What was seen of a VM's pager last: for how long it runs, how long threads waited, both in seconds,
/// and when that was.
type Seen = (f64, f64, Instant);

/// Starts the thread that looks after automatic budgets. It ends with the manager. `keep_free` bytes
/// of the host's memory stay free; with 0 a thirty-second part of what is available now.
///
/// # Errors
/// Those of starting a thread.
pub(super) fn spawn(manager: &Arc<VmManager>, keep_free: u64) -> io::Result<()> {
    let dir = manager.memory_dir.clone();
    let available = move || crate::pressure::available(&dir);
    let keep_free = match keep_free {
        0 => available().unwrap_or(0) / KEEP_FREE_PART,
        bytes => bytes,
    };
    let manager: Weak<VmManager> = Arc::downgrade(manager);
    let work = move || {
        let mut seen = HashMap::new();
        loop {
            std::thread::sleep(PERIOD);
            let Some(manager) = manager.upgrade() else { return };
            let vms = manager.automatic();
            if vms.is_empty() {
                seen.clear();
                continue;
            }
            match available() {
                Ok(left) => look(&vms, left as i64 - keep_free as i64, &mut seen),
                Err(error) => tracing::debug!(%error, "cannot tell how much memory is left"),
            }
        }
    };
    std::thread::Builder::new().name("budgets".into()).spawn(work).map(drop)
}

impl VmManager {
    /// Running VMs whose budget follows their needs.
    fn automatic(&self) -> Vec<Arc<Vm>> {
        let is = |vm: &&Arc<Vm>| {
            *lock(&vm.state) == VmState::Running
                && vm.is_at_home()
                && lock(&vm.request).auto_local.is_some()
        };
        lock(&self.vms).values().filter(is).cloned().collect()
    }
}

/// How a VM fared since the last look; none the first time, and after its pager was replaced.
fn demand(vm: &Vm, seen: &mut HashMap<String, Seen>) -> Option<Demand> {
    let (name, bounds) = {
        let request = lock(&vm.request);
        (request.name.clone(), request.auto_local?)
    };
    let stats: PagerStats = call(vm.pager_socket(), "/v1/stats", None, ANSWER_TIMEOUT).ok()?;
    let now = Instant::now();
    let before = seen.insert(name, (stats.uptime_s, stats.stall_s, now));
    let (_, stall, at) = before.filter(|(uptime, ..)| *uptime < stats.uptime_s)?;
    let stall = (stats.stall_s - stall) / (now - at).as_secs_f64();
    Some(Demand {
        budget: stats.gauges.budget_pages,
        local: stats.gauges.local_pages,
        min: bounds.min.pages(),
        max: bounds.max.pages(),
        stall: stall.clamp(0.0, 1.0),
    })
}

fn look(vms: &[Arc<Vm>], room_bytes: i64, seen: &mut HashMap<String, Seen>) {
    let demands: Vec<(&Arc<Vm>, Demand)> =
        vms.iter().filter_map(|vm| Some((vm, demand(vm, seen)?))).collect();
    let figures: Vec<Demand> = demands.iter().map(|(_, demand)| *demand).collect();
    let room = room_bytes / PAGE_BYTES as i64;
    // What budgets allow and nobody has taken yet is free memory only in name.
    let promised: u64 = figures.iter().map(|vm| vm.budget.saturating_sub(vm.local)).sum();
    let room = if room >= 0 { (room - promised as i64).max(0) } else { room };
    let planned = plan(&figures, room);
    for ((vm, demand), pages) in demands.into_iter().zip(planned) {
        // What is not worth a word.
        if pages.abs_diff(demand.budget) <= demand.budget / 1000 {
            continue;
        }
        if let Err(error) = resize(vm, ByteSize(pages * PAGE_BYTES as u64)) {
            let name = lock(&vm.request).name.clone();
            tracing::warn!(vm = name, "the local budget stays as it is: {error}");
        }
    }
}

fn resize(vm: &Vm, local: ByteSize) -> Result<(), heca_api::ApiError> {
    let _sizing = vm.sizing.blocking_lock();
    let auto_local = lock(&vm.request).auto_local;
    // It was given a fixed one meanwhile.
    let Some(bounds) = auto_local else { return Ok(()) };
    let resize = Resize { local, auto_local: Some(bounds) };
    let () = call(vm.pager_socket(), "/v1/resize", Some(&json!(resize)), ANSWER_TIMEOUT)?;
    tracing::debug!(vm = lock(&vm.request).name, %local, "local budget");
    vm.note_budget(&resize)
}
