//! The decisions of Hecatonchire as pure state machines.
//!
//! Nothing here does I/O, reads a clock, draws a random number or starts a thread: a machine gets
//! events and returns actions. The same code runs under the real pager, under property tests and
//! in the deterministic simulation.
//!
//! - [`budget`]: local budgets that follow what VMs need.
//! - [`pager`]: states of a region's pages; faults, fetches, eviction, prefetch.
//! - [`handover`]: who may run a VM that moves, and what is told of its memory.
//! - [`hedge`]: when a read is asked of a second replica.
//! - [`sponsor`]: who may use which region; epochs, leases, quotas, page versions.
//! - [`placement`]: which sponsors hold which extents.
//! - [`invariants`]: the properties that must hold, each with its id.
#![forbid(unsafe_code)]

pub mod budget;
pub mod handover;
pub mod hedge;
pub mod invariants;
pub mod pager;
pub mod placement;
pub mod sponsor;
