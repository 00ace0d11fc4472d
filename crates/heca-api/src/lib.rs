//! Types of the agent's REST API, and a client for it.
//!
//! The agent serves JSON over HTTP on a unix socket (rights of the socket file decide who may use
//! it). A pager serves the part about itself in the same way to its agent.
#![forbid(unsafe_code)]

mod client;
mod local;
mod migrate;
mod stats;
mod vm;

pub use client::{Client, ClientError};
pub use local::{AutoLocal, LocalChoice};
pub use migrate::{
    DowntimeParts, ExportInfo, ExportRequest, ExportStage, Flush, ImportInfo, Look, MIGRATION_PORT,
    MigrateRequest, MigrationInfo, MigrationMode, MigrationPhase, MigrationReport, Release,
    ResolveMigration, Written, default_downtime_ms,
};
pub use stats::{Latency, PagerStats, Quantiles, Rates, SponsorStats};
pub use vm::{
    AccelChoice, AgentInfo, ApiError, Boot, Drain, EvictionChoice, Network, PagerState, Resize,
    SponsorAddress, Stop, Upgrade, VmInfo, VmRequest, VmState,
};
