//! What becomes of a VM's processes: QEMU's end is the VM's, a pager's end is not.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use heca_api::VmState;
use heca_core::handover::Source;

use super::launch::start_pager;
use super::process::{Process, identity, wait_any};
use super::{EXIT_TIMEOUT, Restarts, Vm, lock};
use crate::pager::Destination;

/// How often a watcher looks that can do nothing but wait.
const LOOK: Duration = Duration::from_millis(50);
/// When a VM ends its pager may be gone first, by a little.
const END_GAP: Duration = Duration::from_millis(20);
/// Pause after the first attempt to start a pager that failed, and the longest.
const RETRY_PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// Watches a VM's processes until QEMU ends. A pager that ends before is replaced.
pub(super) fn watch(vm: &Arc<Vm>) {
    let vm = vm.clone();
    std::thread::spawn(move || {
        loop {
            let (qemu, pager) = match &*lock(&vm.running) {
                Some(running) => (running.qemu.clone(), running.pager.clone()),
                None => return,
            };
            match &pager {
                Some(pager) => wait_any(&[&qemu, pager], Duration::from_secs(5)),
                None => wait_any(&[&qemu], LOOK),
            }
            let (handover, is_gone) = match &*lock(&vm.record) {
                Some(record) => (record.handover.clone(), record.leaves_memory()),
                None => (None, false),
            };
            // What is behind is in the RAM file: it does not need QEMU. Where it is not known yet
            // whether the guest runs there, it may be the only copy.
            if qemu.wait(Duration::ZERO) && !is_gone {
                finish(pager.as_deref());
                break;
            }
            let lost = Instant::now();
            let pager_ended = pager.as_ref().is_none_or(|pager| pager.wait(Duration::ZERO));
            if !pager_ended || (!is_gone && qemu.wait(END_GAP)) {
                if is_gone {
                    std::thread::sleep(LOOK);
                }
                continue;
            }
            if lock(&vm.running).is_none() {
                return;
            }
            match handover.map(|handover| (handover.state, handover.pager)) {
                // What the target was told is not to be changed by a successor.
                None if vm.switched.load(Ordering::SeqCst) => std::thread::sleep(LOOK),
                None => {
                    if pager.is_none() && *lock(&vm.state) == VmState::Running {
                        // QEMU brought its memory here, and it gets its first pager just now.
                        std::thread::sleep(LOOK);
                        continue;
                    }
                    replace_pager(&vm, &qemu, lost);
                }
                Some((state, Some(to))) if state == Source::Given || qemu.wait(Duration::ZERO) => {
                    follow(&vm, to);
                }
                // Nobody knows yet whose the memory is; QEMU may have to go on with it.
                Some(_) => std::thread::sleep(LOOK),
            }
        }
        end(&vm);
    });
}

fn finish(pager: Option<&Process>) {
    if let Some(pager) = pager
        && !pager.wait(EXIT_TIMEOUT)
    {
        pager.kill();
    }
}

/// The VM is another host's, which still lacks some of its memory.
fn follow(vm: &Vm, to: Destination) {
    let Some(mut record) = lock(&vm.record).clone() else { return };
    record.config.follow = Some(to);
    match start_pager(vm, &record.config, |_| {}) {
        Ok((pager, _)) => {
            let started = identity(&pager);
            let _ = vm.change_record(|record| record.pager = Some(started));
            match &mut *lock(&vm.running) {
                Some(running) => running.pager = Some(pager),
                // The target needed nothing more, and the VM is gone.
                None => pager.kill(),
            }
        }
        Err(error) => {
            tracing::error!("what is behind cannot be sent yet: {error}");
            std::thread::sleep(RETRY_PAUSES.0);
        }
    }
}

/// Starts pagers until one serves, or QEMU ends.
pub(super) fn replace_pager(vm: &Vm, qemu: &Process, lost: Instant) {
    let name = lock(&vm.request).name.clone();
    tracing::error!(vm = name, "the pager is gone: the guest waits at its next fault");
    let mut pause = RETRY_PAUSES.0;
    loop {
        let Some(mut record) = lock(&vm.record).clone() else { return };
        if !enter(vm, VmState::PagerLost) {
            return;
        }
        record.config.resume = true;
        // Should this agent end now, the next one knows of the pager.
        let started = |pager: &Process| {
            let started = identity(pager);
            if let Err(error) = vm.change_record(|record| record.pager = Some(started)) {
                tracing::error!(vm = name, "not written down: {error}");
            }
        };
        match start_pager(vm, &record.config, started) {
            Ok((pager, _)) => {
                let pause = lost.elapsed();
                if let Some(running) = &mut *lock(&vm.running) {
                    running.pager = Some(pager);
                } else {
                    // The VM was stopped meanwhile.
                    pager.kill();
                    return;
                }
                tracing::warn!(
                    vm = name,
                    pause_ms = pause.as_millis() as u64,
                    "a new pager serves"
                );
                *lock(&vm.problem) = None;
                enter(vm, VmState::Running);
                let mut restarts = lock(&vm.restarts);
                *restarts = Restarts { count: restarts.count + 1, pause: Some(pause) };
                return;
            }
            Err(error) => {
                let detail = error.detail.clone().unwrap_or_default();
                if qemu.wait(pause) {
                    return;
                }
                tracing::error!(vm = name, "no new pager yet: {error}: {detail}");
                *lock(&vm.problem) = Some(format!(
                    "the pager ended and cannot be started again: {error}. The guest waits; see {}",
                    vm.dir.join("pager.log").display()
                ));
                pause = (pause * 2).min(RETRY_PAUSES.1);
            }
        }
    }
}

/// Changes the state of a VM that has not ended.
pub(super) fn enter(vm: &Vm, state: VmState) -> bool {
    let mut now = lock(&vm.state);
    if *now == VmState::Stopped {
        return false;
    }
    *now = state;
    true
}

/// QEMU and pager ended. Done once: later the name, and with it the files, may be another VM's.
pub(super) fn end(vm: &Vm) {
    let mut state = lock(&vm.state);
    if *state == VmState::Stopped {
        return;
    }
    if let Ok(bytes) = fs::read(vm.pager_last())
        && let Ok(stats) = serde_json::from_slice(&bytes)
    {
        *lock(&vm.last_stats) = Some(stats);
    }
    lock(&vm.record).take();
    vm.clean_up_runtime();
    lock(&vm.qmp).take();
    lock(&vm.running).take();
    *state = VmState::Stopped;
}
