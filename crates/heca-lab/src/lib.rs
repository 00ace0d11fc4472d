//! Several hosts on one machine.
//!
//! A [`Lab`] is a set of network namespaces joined by a bridge, with an agent in each that is
//! asked to run one. Everything that a lab makes goes away when it is dropped, also when a test
//! panics: processes, namespaces, files on tmpfs. Needs root and iproute2.
#![forbid(unsafe_code)]

mod appmembench;
mod cluster;
mod console;
mod cpio;
mod guest;
mod heartbeat;
mod host;
mod moving;
mod net;
mod pool;
mod signals;
mod tap;

pub use appmembench::{Appmembench, Figures, Line};
pub use cluster::{Cluster, ClusterOptions, Look};
pub use console::{Console, Sample};
pub use guest::{GuestImage, find_appmembench, find_kernel, find_qemu10};
pub use heartbeat::{AFTER_SWITCH, Gap, Heartbeat, Tick};
pub use host::{AgentOptions, Host, heca_binary, target_dir};
pub use moving::{MeasuredGuest, start_moving_hosts};
pub use net::Lab;
pub use pool::LabPool;
pub use signals::catch_signals;
