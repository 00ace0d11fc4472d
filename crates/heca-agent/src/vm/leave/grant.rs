//! The right to run goes to the target, and then what is behind.

use super::*;
use crate::vm::watch::enter;

/// How often a target that does not take what is behind is asked whether it still wants it.
const ASK_AGAIN: Duration = Duration::from_secs(2);

impl Leave {
    /// The right to run is given away, and the target is asked until it is known where it is.
    pub(super) fn grant(self: &Arc<Self>, manager: &Arc<VmManager>, mut handover: Handover) {
        let actions = handover.state.hear(Answer::Loaded, true);
        debug_assert_eq!(actions, [SourceAction::Record, SourceAction::Grant]);
        if let Err(error) = self.record(Some(&handover)) {
            // Not written down, so not given away.
            return self.fail(error);
        }
        self.settle(manager, handover);
    }

    fn record(&self, handover: Option<&Handover>) -> Result<(), ApiError> {
        self.vm.change_record(|record| record.handover = handover.cloned())
    }

    /// Asks, over a new connection if need be.
    fn ask_again(&self, manager: &VmManager, ask: &Ask) -> Result<Told, ApiError> {
        let mut peer = lock(&self.peer);
        let known = match &mut *peer {
            Some(known) => known,
            None => peer.insert(Peer::connect(&self.to, manager.owner, &manager.security)?),
        };
        let told = known.ask(ask, ANSWER_TIMEOUT);
        // A refusal comes over a connection that is well; to make a new one does no harm.
        if told.is_err() {
            *peer = None;
        }
        told
    }

    /// What the target says about the right to run, when it is granted or taken back.
    fn ask_for_answer(&self, manager: &VmManager, ask: &Ask, boot: &str) -> Result<Answer, String> {
        let asked = Instant::now();
        match self.ask_again(manager, ask) {
            Ok(Told::Answer { answer: Answer::Running, took_ms, .. }) => {
                self.note_downtime(asked, took_ms);
                Ok(Answer::Running)
            }
            // A host that was started anew does not know what it did before.
            Ok(Told::Answer { answer: Answer::Dropped, boot: now, .. }) if now != boot => {
                Err("its host was started anew".to_owned())
            }
            Ok(Told::Answer { answer, .. }) => Ok(answer),
            Ok(_) => Err("its answer makes no sense".to_owned()),
            Err(error) => Err(format!("{error}: {}", error.detail.as_deref().unwrap_or_default())),
        }
    }

    /// Asks until the target has said where the guest runs.
    fn settle(self: &Arc<Self>, manager: &Arc<VmManager>, handover: Handover) {
        let mut handover = handover;
        let mut pause = RETRY.0;
        loop {
            // Before the target hears anything: a grant that gets there although nobody hears of it
            // must not be followed by the guest going on here.
            let decided = lock(&self.vm.resolution).take();
            let ask = match decided {
                Some(true) => Ask::GiveUp { id: self.id },
                _ => Ask::Grant { id: self.id },
            };
            let answer = match (self.ask_for_answer(manager, &ask, &handover.boot), decided) {
                // What the target knows is better than what anybody says.
                (Ok(answer @ (Answer::Running | Answer::Dropped)), _) => answer,
                (_, Some(true)) => Answer::Dropped,
                (_, Some(false)) => Answer::Running,
                (Ok(answer), None) => answer,
                (Err(reason), None) => {
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
                            // The next agent will ask the target, which says the same again.
                            tracing::error!(vm = self.name(), "not written down: {error}");
                            if let Some(record) = &mut *lock(&self.vm.record) {
                                record.handover = state.cloned();
                            }
                        }
                    }
                    // By going round once more.
                    SourceAction::Grant => std::thread::sleep(LOOK),
                    SourceAction::Resume => {
                        let error = ApiError::new("target-failed", "the target gave the VM back");
                        return self.fail(error);
                    }
                    SourceAction::GiveUp => return self.gone(manager, &handover),
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
        enter(&self.vm, VmState::Leaving);
        *lock(&self.vm.problem) = Some(format!(
            "it is not known whether the VM runs on {}: {reason}. It is held here until that host \
             answers. If it never will: `heca vm migrate-resolve {name} --run-here` (only if it \
             does not run there!) or `--gone`",
            self.to
        ));
    }

    /// The guest runs on the target. What is behind follows.
    fn gone(self: &Arc<Self>, manager: &Arc<VmManager>, handover: &Handover) {
        lock(&self.info).error = None;
        enter(&self.vm, VmState::Leaving);
        *lock(&self.vm.problem) = None;
        self.enter(MigrationPhase::Following);
        let by_qemu = handover.pager.is_none();
        if by_qemu {
            self.follow_qemu();
        } else {
            self.follow(manager, &handover.boot);
        }
        lock(&self.info).report.total_s = Some(self.begun.elapsed().as_secs_f64());
        self.unblock_relay();
        lock(&self.vm.resolution).take();
        // Where QEMU moved the memory, the region is still this host's to give back.
        manager.remove_left(&self.vm, by_qemu);
        // Not before: as long as there is a record here, somebody may ask what became of it.
        let forget = Ask::Forget { id: self.id };
        let told = self.ask_again(manager, &forget).or_else(|_| self.ask_again(manager, &forget));
        if let Err(error) = told {
            tracing::debug!("the target was not told that it need not remember: {error}");
        }
        lock(&self.peer).take();
        lock(&self.info).remaining_bytes = 0;
        self.enter(MigrationPhase::Completed);
    }

    /// Waits until the target has all of the memory, or needs it no longer.
    fn follow(&self, manager: &VmManager, boot: &str) {
        let release = serde_json::to_value(Release { at_once: false }).expect("plain data");
        let mut released = false;
        let mut asked = Instant::now();
        loop {
            released = released || self.pager::<()>("/v1/export/release", Some(&release)).is_ok();
            let export = self.pager::<ExportInfo>("/v1/export", None);
            let away = match &export {
                Ok(export) => {
                    self.note(export);
                    lock(&self.vm.problem).clone_from(&export.reason);
                    if export.stage == ExportStage::Done {
                        return;
                    }
                    export.reason.is_some()
                }
                // It is being replaced.
                Err(error) => {
                    tracing::debug!("no figures of what is behind: {error}");
                    true
                }
            };
            if *lock(&self.vm.resolution) == Some(false) {
                return;
            }
            if away && asked.elapsed() > ASK_AGAIN {
                asked = Instant::now();
                let told = self.ask_again(manager, &Ask::Needs { id: self.id });
                match told {
                    Ok(Told::Needs { source: false, boot: now }) if now == boot => return,
                    _ => {}
                }
            }
            std::thread::sleep(LOOK_AFTER);
        }
    }

    /// Goes on for an agent that ended.
    pub(super) fn go_on(self: &Arc<Self>, manager: &Arc<VmManager>, handover: Handover) {
        match handover.state {
            Source::Given => self.gone(manager, &handover),
            _ => self.settle(manager, handover),
        }
    }
}
