//! Who may run a guest that moves: two hosts, the machines of [`heca_core::handover`], and messages
//! that are lost, late, doubled and out of order. Agents die between any two of their actions, and
//! know then only what they wrote down. The guests do not die with them.

use std::collections::BTreeMap;

use heca_core::handover::{Answer, Source, SourceAction, Target, TargetAction, TargetEvent};
use heca_core::invariants::{MG_1, MG_2};
use heca_core::pager::Mutation;

use crate::oracle::{Check, fail};
use crate::report::{Mark, Stats};
use crate::rng::Rng;

/// Guests that one world moves, one after the other.
const GUESTS: usize = 6;
/// Steps in which messages are lost and agents die.
const TROUBLE_STEPS: usize = 400;
/// Steps in which a healed world must come to rest.
const HEAL_STEPS: usize = 20_000;
/// Messages that the network keeps: more of them only repeat.
const MESSAGES_MAX: usize = 40;

/// Number of an attempt to move the guest. Every message has it; those of another are not heard.
type Attempt = u32;

#[derive(Debug, Clone, Copy)]
enum Message {
    /// To the target: get ready.
    Begin,
    Grant,
    Ask,
    GiveUp,
    /// To the source.
    Answer(Answer),
}

#[derive(Debug)]
struct Giver {
    alive: bool,
    state: Source,
    /// The attempt that is under way, or was last.
    attempt: Attempt,
    /// Whether it is under way.
    moving: bool,
    /// The guest stands still, and may be given away.
    give: bool,
    record: (Attempt, Source),
    guest_runs: bool,
    /// There is no guest any more.
    gave_up: bool,
}

#[derive(Debug, Default)]
struct Taker {
    alive: bool,
    known: BTreeMap<Attempt, Target>,
    records: BTreeMap<Attempt, Target>,
    guest_runs: bool,
}

#[derive(Debug)]
struct Right<'a> {
    rng: &'a mut Rng,
    stats: &'a mut Stats,
    lines: Option<&'a mut Vec<String>>,
    mutation: Option<Mutation>,
    trouble: bool,
    cut: bool,
    attempts: Attempt,
    source: Giver,
    target: Taker,
    /// QEMU's stream of the guest's state, if it is unbroken: the attempt that it is of.
    stream: Option<Attempt>,
    messages: Vec<(Attempt, Message)>,
}

/// Moves some guests; `lines` gets what happened to the last one.
pub(crate) fn run(
    seed: u64,
    mutation: Option<Mutation>,
    stats: &mut Stats,
    mut lines: Option<&mut Vec<String>>,
) -> Check {
    let mut rng = Rng::new(crate::rng::mix(!seed));
    for _ in 0..GUESTS {
        if let Some(lines) = &mut lines {
            lines.clear();
        }
        Right::new(&mut rng, stats, lines.as_deref_mut(), mutation).run()?;
    }
    Ok(())
}

impl<'a> Right<'a> {
    fn new(
        rng: &'a mut Rng,
        stats: &'a mut Stats,
        lines: Option<&'a mut Vec<String>>,
        mutation: Option<Mutation>,
    ) -> Self {
        let source = Giver {
            alive: true,
            state: Source::Holding,
            attempt: 0,
            moving: false,
            give: false,
            record: (0, Source::Holding),
            guest_runs: true,
            gave_up: false,
        };
        Self {
            rng,
            stats,
            lines,
            mutation,
            trouble: true,
            cut: false,
            attempts: 0,
            source,
            target: Taker { alive: true, ..Taker::default() },
            stream: None,
            messages: Vec::new(),
        }
    }

    fn note(&mut self, line: impl FnOnce() -> String) {
        if let Some(lines) = &mut self.lines {
            lines.push(line());
        }
    }

    fn run(mut self) -> Check {
        for _ in 0..self.rng.range(TROUBLE_STEPS / 4, TROUBLE_STEPS) {
            self.step()?;
        }
        self.note(|| "world   heals".into());
        self.trouble = false;
        self.cut = false;
        self.restart_source();
        self.restart_target();
        self.stats.checked(MG_2);
        for _ in 0..HEAL_STEPS {
            if self.is_settled() {
                return Ok(());
            }
            self.step()?;
        }
        let detail = format!(
            "source {:?}, its guest runs: {}; target {:?}, its guest runs: {}",
            self.source.state, self.source.guest_runs, self.target.known, self.target.guest_runs
        );
        fail(MG_2, None, detail)
    }

    /// Whether exactly one runs, and both know it.
    fn is_settled(&self) -> bool {
        match self.source.state {
            Source::Holding => self.source.guest_runs && !self.target.guest_runs,
            Source::Granting => false,
            Source::Given => self.source.gave_up && self.target.guest_runs,
        }
    }

    fn step(&mut self) -> Check {
        match self.rng.below(16) {
            0 if self.trouble => self.kill_source(),
            1 if self.trouble => self.kill_target(),
            2 => self.restart_source(),
            3 => self.restart_target(),
            4 if self.trouble && self.rng.one_in(4) => self.cut = !self.cut,
            5 | 6 => self.source_moves()?,
            7 => self.source_waits()?,
            8 => self.target_loads()?,
            9 if self.rng.one_in(8) => self.target_waits()?,
            _ => self.message_arrives()?,
        }
        self.check()
    }

    /// MG-1, for guests that run and for agents that would let them.
    fn check(&mut self) -> Check {
        self.stats.checked(MG_1);
        let Giver { alive, state, record, guest_runs, .. } = self.source;
        let source = if alive { state } else { record.1 }.may_run();
        let known = if self.target.alive { &self.target.known } else { &self.target.records };
        let target = known.values().any(|state| state.may_run());
        let here = source || guest_runs;
        let there = target || self.target.guest_runs;
        if here && there {
            let detail = format!(
                "the source may run the guest: {source}, and does: {guest_runs}; the target may: \
                 {target}, and does: {}",
                self.target.guest_runs
            );
            return fail(MG_1, None, detail);
        }
        Ok(())
    }

    fn send(&mut self, attempt: Attempt, message: Message) {
        if self.messages.len() < MESSAGES_MAX {
            self.messages.push((attempt, message));
        }
    }

    fn message_arrives(&mut self) -> Check {
        if self.messages.is_empty() {
            return Ok(());
        }
        let chosen = self.rng.below(self.messages.len());
        let (attempt, message) = self.messages[chosen];
        let twice = self.trouble && self.rng.one_in(4);
        if !twice {
            self.messages.swap_remove(chosen);
        }
        if self.cut || (self.trouble && self.rng.one_in(4)) {
            if matches!(message, Message::Grant) {
                self.stats.mark(Mark::GrantLost);
            }
            return Ok(());
        }
        match message {
            Message::Answer(answer) => self.source_hears(attempt, answer),
            _ if !self.target.alive => Ok(()),
            Message::Begin => {
                let busy = self.target.known.values().any(|&s| s == Target::Running);
                if !busy {
                    self.target.known.entry(attempt).or_insert(Target::Waiting);
                }
                Ok(())
            }
            Message::Grant => self.target_hears(attempt, TargetEvent::Grant),
            Message::Ask => self.target_hears(attempt, TargetEvent::Asked),
            Message::GiveUp => self.target_hears(attempt, TargetEvent::GiveUp),
        }
    }

    /// Whether an agent dies before its next action.
    fn dies(&mut self) -> bool {
        self.trouble && self.rng.one_in(12)
    }

    fn kill_source(&mut self) {
        if self.source.alive {
            if self.source.state == Source::Granting {
                self.stats.mark(Mark::SourceDiedGranting);
            }
            self.note(|| "source  dies".into());
            self.source.alive = false;
            self.stream = None;
        }
    }

    /// The agent goes by what it wrote down. Only while it holds the right may it let a guest go on
    /// that stands still.
    fn restart_source(&mut self) {
        if self.source.alive {
            return;
        }
        let s = &mut self.source;
        s.alive = true;
        (s.attempt, s.state) = s.record;
        s.moving = s.state == Source::Granting;
        s.give = false;
        s.guest_runs |= s.state.may_run();
        s.gave_up |= s.state == Source::Given;
        self.note(|| "source  starts again".into());
    }

    fn kill_target(&mut self) {
        if self.target.alive {
            self.note(|| "target  dies".into());
            self.target.alive = false;
            self.stream = None;
        }
    }

    fn restart_target(&mut self) {
        if self.target.alive {
            return;
        }
        let t = &mut self.target;
        t.alive = true;
        t.known = t.records.clone();
        if t.known.values().any(|state| state.may_run()) && !t.guest_runs {
            t.guest_runs = true;
            self.stats.mark(Mark::RanAfterRestart);
        }
        self.note(|| "target  starts again".into());
    }

    /// The source goes on with the migration, or ends it while it may.
    fn source_moves(&mut self) -> Check {
        let Giver { alive, state, moving, give, attempt, .. } = self.source;
        if !alive || state != Source::Holding {
            return Ok(());
        }
        if !moving {
            if !self.trouble {
                return Ok(());
            }
            self.attempts += 1;
            let attempt = self.attempts;
            self.source.attempt = attempt;
            self.source.moving = true;
            self.note(|| format!("source  begins attempt {attempt}"));
            self.send(attempt, Message::Begin);
        } else if self.rng.one_in(6) || (!self.trouble && self.rng.one_in(2)) {
            self.note(|| format!("source  ends attempt {attempt} and goes on"));
            self.source.moving = false;
            self.source.give = false;
            self.source.guest_runs = true;
            self.send(attempt, Message::GiveUp);
        } else if give {
            // Its first message may be lost.
            self.send(attempt, Message::Begin);
        } else {
            self.note(|| format!("source  stops the guest for attempt {attempt}"));
            self.source.give = true;
            self.source.guest_runs = false;
            self.stream = Some(attempt);
        }
        Ok(())
    }

    /// Nothing was heard for a while.
    fn source_waits(&mut self) -> Check {
        let Giver { alive, state, attempt, moving, .. } = self.source;
        if !alive || !moving || state == Source::Given {
            return Ok(());
        }
        let silent = state == Source::Granting && self.rng.one_in(4);
        if silent && self.mutation == Some(Mutation::ResumeOnSilence) {
            self.source.state = Source::Holding;
            return self.source_acts(attempt, &[SourceAction::Record, SourceAction::Resume]);
        }
        self.send(attempt, Message::Ask);
        Ok(())
    }

    fn source_hears(&mut self, attempt: Attempt, answer: Answer) -> Check {
        let s = &mut self.source;
        if !s.alive || s.attempt != attempt {
            return Ok(());
        }
        let before = s.state;
        let actions = s.state.hear(answer, s.give);
        self.note(|| format!("source  hears {answer:?} of attempt {attempt}: {actions:?}"));
        if (before, answer) == (Source::Granting, Answer::Dropped) {
            self.stats.mark(Mark::RightGivenBack);
        }
        self.source_acts(attempt, actions)
    }

    fn source_acts(&mut self, attempt: Attempt, actions: &[SourceAction]) -> Check {
        for action in actions {
            if self.dies() {
                self.kill_source();
                return Ok(());
            }
            match action {
                SourceAction::Record => self.source.record = (attempt, self.source.state),
                SourceAction::Grant => {
                    self.stats.mark(Mark::Grant);
                    self.send(attempt, Message::Grant);
                }
                SourceAction::Resume => {
                    self.source.moving = false;
                    self.source.give = false;
                    self.source.guest_runs = true;
                }
                SourceAction::GiveUp => self.source.gave_up = true,
            }
            self.check()?;
        }
        Ok(())
    }

    /// The stream of the guest's state comes to its end. There is one for each attempt.
    fn target_loads(&mut self) -> Check {
        let Some(attempt) = self.stream else { return Ok(()) };
        if self.cut || self.target.known.get(&attempt) != Some(&Target::Waiting) {
            return Ok(());
        }
        self.stream = None;
        self.target_hears(attempt, TargetEvent::StateLoaded)
    }

    /// The target loses patience, if it may.
    fn target_waits(&mut self) -> Check {
        let pending =
            |&(_, &state): &(&Attempt, &Target)| matches!(state, Target::Waiting | Target::Loaded);
        match self.target.known.iter().find(pending) {
            Some((&attempt, _)) if self.target.alive => {
                self.target_hears(attempt, TargetEvent::GiveUp)
            }
            _ => Ok(()),
        }
    }

    fn target_hears(&mut self, attempt: Attempt, event: TargetEvent) -> Check {
        let known = self.target.known.contains_key(&attempt);
        let event = if known {
            event
        } else {
            // It was never here, or only in the memory of an agent that died. That it will not run
            // is written down before it is said: its beginning may still be on its way.
            self.stats.mark(Mark::AttemptUnknown);
            TargetEvent::GiveUp
        };
        let state = self.target.known.entry(attempt).or_insert(Target::Waiting);
        let before = *state;
        let mut actions = state.step(event).to_vec();
        self.note(|| format!("target  hears {event:?} of attempt {attempt}: {actions:?}"));
        match (before, event) {
            (Target::Dropped, TargetEvent::Grant) => self.stats.mark(Mark::LateGrant),
            (Target::Running, TargetEvent::Grant) => self.stats.mark(Mark::RepeatedGrant),
            _ => {}
        }
        let rash = self.mutation == Some(Mutation::RunBeforeRecord);
        if rash && actions.contains(&TargetAction::Run) {
            actions.swap(0, 1);
        }
        for action in actions {
            if self.dies() {
                self.stats.mark(Mark::TargetDiedAmidActions);
                self.kill_target();
                return Ok(());
            }
            match action {
                TargetAction::Record => {
                    self.target.records.insert(attempt, self.target.known[&attempt]);
                }
                TargetAction::Run => self.target.guest_runs = true,
                TargetAction::Remove => {}
                TargetAction::Answer(answer) => self.send(attempt, Message::Answer(answer)),
            }
            self.check()?;
        }
        Ok(())
    }
}
