//! Everything Hecatonchire knows about QEMU itself: how to start a virtual machine whose RAM can be
//! paged ([`command_line`]), how to talk to it ([`qmp`]), what makes a running one unfit for remote
//! memory ([`screen`]), and what this host can run ([`host`]).
//!
//! Nothing here touches guest memory, and nothing is asynchronous: callers that have a runtime put
//! these calls on a blocking thread.
#![forbid(unsafe_code)]

pub mod command_line;
pub mod fuzz;
pub mod host;
pub mod qmp;
pub mod screen;
mod version;

pub use version::QemuVersion;
