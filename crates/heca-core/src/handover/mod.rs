//! Handing a running VM over to another host: who may run it, and what is told of its memory.
//!
//! The right to run is a token that exists once. It is where the guest runs; [`Source`] gives it
//! away by one message, the grant, and [`Target`] takes it by getting that message:
//!
//! ```text
//! Source   Holding --target is loaded--> Granting --"runs"--> Given
//!             ^                             |
//!             +-------- "never got it" -----+
//! Target   Waiting --> Loaded --grant--> Running
//!             |           |
//!             +-----------+--lost patience, or told to--> Dropped
//! ```
//!
//! - While `Holding`, the source may go on with the guest at any time, and the target may not run
//!   it. Any failure up to here leaves the source as it was.
//! - `Granting` is written down before the grant leaves. From then on the source does not run the
//!   guest until the target says that it never got the grant and never will.
//! - The target writes down `Running` before the guest runs there, and `Dropped` is for good. So
//!   each of its answers stays true.
//! - No answer is no reason for anything: the source asks again. A target that was lost together
//!   with its memory cannot answer; then a person has to say where the guest goes on.
//!
//! What the caller owes:
//! - Each attempt has an id of its own, all messages bear it, and a machine gets only those of its
//!   attempt. An answer of an earlier attempt would be taken for one of this one.
//! - A target that is told to give up, is asked or is granted something of an attempt that it does
//!   not know (perhaps it knew, and died before it wrote anything down) takes that for `GiveUp` of
//!   one that is `Waiting`: `Dropped` is written down before it is said, as the attempt's beginning
//!   may still be on its way.
//! - An agent that starts again has the state that it wrote down: a source without a record holds
//!   the right, and one that holds it may let a guest go on that stands still; a target that wrote
//!   down `Running` lets the guest run.
//!
//! Neither side looks at a clock for this, and neither needs a third one.

mod pages;

pub use pages::{BadRecords, PageRecord, PageRecords, encode_records};

use serde::{Deserialize, Serialize};

/// Where the right to run is, as the host knows that gives it away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Source {
    /// Here.
    Holding,
    /// On its way; perhaps it arrived.
    Granting,
    /// On the target.
    Given,
}

/// What the target said last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// It has the guest's state and waits for the right to run.
    Loaded,
    /// The guest runs there, or ran there.
    Running,
    /// The guest never ran there and never will.
    Dropped,
}

/// What the source has to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SourceAction {
    /// Write down the state as it is now, before any later action.
    Record,
    /// Send the grant; again and again until it is answered.
    Grant,
    /// Let the guest go on here.
    Resume,
    /// Forget the guest: it is another host's.
    GiveUp,
}

impl Source {
    /// Takes an answer of the target and says what is to be done, in this order. `give` is whether
    /// the source is ready to give the right away, should it be asked to.
    #[must_use]
    pub fn hear(&mut self, answer: Answer, give: bool) -> &'static [SourceAction] {
        use SourceAction::{GiveUp, Grant, Record, Resume};
        match (*self, answer) {
            (Self::Holding, Answer::Loaded) if give => {
                *self = Self::Granting;
                &[Record, Grant]
            }
            // It lost the grant, or has not seen it yet.
            (Self::Granting, Answer::Loaded) => &[Grant],
            (Self::Granting, Answer::Running) => {
                *self = Self::Given;
                &[Record, GiveUp]
            }
            (Self::Granting, Answer::Dropped) => {
                *self = Self::Holding;
                &[Record, Resume]
            }
            (Self::Given, Answer::Running) => &[GiveUp],
            // Of an earlier attempt, or of somebody who is confused: the right is here.
            (Self::Holding, _) => &[],
            // Never said after `Running`.
            (Self::Given, Answer::Loaded | Answer::Dropped) => &[],
        }
    }

    /// Whether the guest may run here.
    #[must_use]
    pub const fn may_run(self) -> bool {
        matches!(self, Self::Holding)
    }
}

/// Where the right to run is, as the host knows that wants it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Target {
    /// The guest's state is not here yet.
    Waiting,
    /// Everything is here but the right to run.
    Loaded,
    /// The right to run is here.
    Running,
    /// The guest never ran here and never will.
    Dropped,
}

/// What a target hears.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TargetEvent {
    /// QEMU has the guest's state.
    StateLoaded,
    /// The right to run.
    Grant,
    /// The source wants the guest back, or anything failed here, or nothing was heard for too long.
    GiveUp,
    /// The source wants to know.
    Asked,
}

/// What a target has to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TargetAction {
    /// Write down the state as it is now, before any later action.
    Record,
    /// Take the memory over and let the guest run.
    Run,
    /// Remove what was prepared.
    Remove,
    /// Tell the source.
    Answer(Answer),
}

impl Target {
    /// Takes an event and says what is to be done, in this order.
    #[must_use]
    pub fn step(&mut self, event: TargetEvent) -> &'static [TargetAction] {
        use TargetAction::{Answer as Say, Record, Remove, Run};
        match (*self, event) {
            (Self::Waiting, TargetEvent::StateLoaded) => {
                *self = Self::Loaded;
                &[Say(Answer::Loaded)]
            }
            (Self::Loaded, TargetEvent::Grant) => {
                *self = Self::Running;
                &[Record, Run, Say(Answer::Running)]
            }
            (Self::Loaded, TargetEvent::Asked) => &[Say(Answer::Loaded)],
            (Self::Running, TargetEvent::Grant | TargetEvent::Asked) => &[Say(Answer::Running)],
            // The right that was taken is not given back by being told so.
            (Self::Running, TargetEvent::GiveUp | TargetEvent::StateLoaded) => &[],
            (Self::Waiting | Self::Loaded, TargetEvent::GiveUp) => {
                *self = Self::Dropped;
                &[Record, Remove, Say(Answer::Dropped)]
            }
            (Self::Dropped, TargetEvent::Grant | TargetEvent::Asked | TargetEvent::GiveUp) => {
                &[Say(Answer::Dropped)]
            }
            // Nobody grants before it heard `Loaded`.
            (Self::Waiting, TargetEvent::Grant | TargetEvent::Asked) => &[],
            (Self::Loaded | Self::Dropped, TargetEvent::StateLoaded) => &[],
        }
    }

    /// Whether the guest may run here.
    #[must_use]
    pub const fn may_run(self) -> bool {
        matches!(self, Self::Running)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_right_to_run_moves_once() {
        let (mut source, mut target) = (Source::Holding, Target::Waiting);
        assert_eq!(target.step(TargetEvent::Grant), []);
        assert_eq!(target.step(TargetEvent::StateLoaded), [TargetAction::Answer(Answer::Loaded)]);
        assert_eq!(source.hear(Answer::Loaded, false), []);
        assert_eq!(source.hear(Answer::Loaded, true), [SourceAction::Record, SourceAction::Grant]);
        assert!(!source.may_run() && !target.may_run());
        assert_eq!(target.step(TargetEvent::Grant)[..2], [TargetAction::Record, TargetAction::Run]);
        assert_eq!(target.step(TargetEvent::GiveUp), []);
        assert_eq!(source.hear(Answer::Running, true)[1], SourceAction::GiveUp);
        assert!(!source.may_run() && target.may_run());
    }

    #[test]
    fn a_target_that_gave_up_gives_the_right_back_for_good() {
        let (mut source, mut target) = (Source::Granting, Target::Loaded);
        assert_eq!(
            target.step(TargetEvent::GiveUp).last(),
            Some(&TargetAction::Answer(Answer::Dropped))
        );
        // The grant comes late.
        assert_eq!(target.step(TargetEvent::Grant), [TargetAction::Answer(Answer::Dropped)]);
        assert_eq!(
            source.hear(Answer::Dropped, true),
            [SourceAction::Record, SourceAction::Resume]
        );
        assert!(source.may_run() && !target.may_run());
    }
}
