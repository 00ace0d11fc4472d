//! Everything that needs `unsafe`: userfaultfd, attaching to a running process, remote madvise,
//! shared mappings. Every other crate of the workspace forbids unsafe code.
//!
//! Linux 6.7 or newer, x86-64 (injection needs register names of the architecture; the rest is
//! portable).

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
compile_error!("heca-sys supports Linux on x86-64 only for now");

pub mod attach;
pub mod confine;
mod inject;
pub mod journal;
pub mod map;
pub mod pagemap;
pub mod process;
pub mod ring;
pub mod uffd;
pub mod zap;
