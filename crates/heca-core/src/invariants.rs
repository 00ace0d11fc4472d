//! The properties that must always hold. Each has an id that the simulation, the tests, the debug
//! assertions and the documentation share.

/// One property.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Invariant {
    /// Short stable name.
    pub id: &'static str,
    /// What must hold.
    pub text: &'static str,
}

/// A read by the guest returns its last write.
pub const PG_1: Invariant =
    Invariant { id: "PG-1", text: "a guest read returns the guest's last write of that page" };
/// No page is dropped before it is safe elsewhere.
pub const PG_2: Invariant = Invariant {
    id: "PG-2",
    text: "no page is dropped before all live replicas acknowledged its newest content",
};
/// Fetches are not duplicated.
pub const PG_3: Invariant = Invariant {
    id: "PG-3",
    text: "for one fetch of a page no replica is asked twice, and at most two at a time",
};
/// Faults are answered.
pub const PG_4: Invariant =
    Invariant { id: "PG-4", text: "every page fault is woken or poisoned, none is forgotten" };
/// Progress.
pub const PG_5: Invariant =
    Invariant { id: "PG-5", text: "once faults heal, every page fault resolves" };
/// The budget is a bound, not a hint.
pub const PG_6: Invariant = Invariant {
    id: "PG-6",
    text: "local pages never exceed the budget, and only shrink after it was lowered",
};
/// Fencing.
pub const EP_1: Invariant =
    Invariant { id: "EP-1", text: "sponsors refuse requests under an older epoch" };
/// Failure domains.
pub const PL_1: Invariant =
    Invariant { id: "PL-1", text: "replicas of an extent sit on distinct sponsors" };
/// Promises are kept.
pub const PL_2: Invariant =
    Invariant { id: "PL-2", text: "a sponsor never promises more than its offer" };

/// Redundancy is not assumed.
pub const RB_1: Invariant = Invariant {
    id: "RB-1",
    text: "a replica that counts as complete holds every stored page in its newest version",
};
/// Redundancy comes back.
pub const RB_2: Invariant = Invariant {
    id: "RB-2",
    text: "once faults heal, every extent gets back its number of complete replicas",
};

/// A VM runs once.
pub const MG_1: Invariant =
    Invariant { id: "MG-1", text: "never do two hosts have the right to run a VM" };
/// A VM is not lost on its way.
pub const MG_2: Invariant = Invariant {
    id: "MG-2",
    text: "once faults heal, exactly one of source and target runs the VM",
};
/// Nothing is sent twice.
pub const MG_3: Invariant = Invariant {
    id: "MG-3",
    text: "after the switch a page is taken from the source once, before the guest can see it",
};

/// Every invariant.
pub const ALL: [Invariant; 14] =
    [PG_1, PG_2, PG_3, PG_4, PG_5, PG_6, EP_1, PL_1, PL_2, RB_1, RB_2, MG_1, MG_2, MG_3];
