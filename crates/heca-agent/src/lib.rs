//! What runs on a host: the memory sponsor, the pagers of its VMs, and the life cycle of the VMs.
//!
//! The data plane (sponsor connections, pager threads) is plain threads and blocking or polled
//! sockets; the control plane (REST over a unix socket, metrics) runs on tokio. They meet at
//! bounded channels.
#![forbid(unsafe_code)]

pub mod agent;
pub mod doctor;
pub mod fuzz;
pub mod latency;
pub mod link;
pub mod metrics;
mod migrate;
pub mod pager;
pub mod pressure;
pub mod rest;
pub mod seal;
pub mod sponsor;
pub mod store;
pub mod vm;
