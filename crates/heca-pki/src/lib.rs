//! Who belongs to a pool: its certificate authority, join tokens, enrolment, and TLS channels.
//!
//! A pool has one directory with the key of its CA ([`Pool`]); [`EnrolServer`] answers for it.
//! A host enters with a one-time [`JoinToken`] ([`join`]) and keeps a [`HostIdentity`], which
//! [`renew`] and [`fetch_crl`] keep fresh. [`TlsContext`] turns the identity into TLS 1.3 with
//! certificates required both ways, and [`Channel`] is a socket that speaks it or plain TCP.
//!
//! What holds throughout:
//!
//! - Private keys never leave the machine that made them; tokens are stored as hashes only.
//! - A peer's name is the common name of its verified certificate, never an address or a claim.
//! - Every pool certificate of a host carries the DNS name [`HOST_ROLE`], that of the enrolment
//!   server [`POOL_ROLE`] instead, so neither passes for the other.
//! - Files are mode 0600 in directories of mode 0700, and replaced whole.
#![forbid(unsafe_code)]

mod channel;
mod enrol;
mod error;
pub mod fuzz;
mod host;
mod pool;
mod state;
#[cfg(test)]
mod tests;
mod tls;
mod token;
mod util;

pub use channel::Channel;
pub use enrol::{EnrolServer, fetch_crl, join, renew};
pub use error::{Error, TlsError};
pub use host::HostIdentity;
pub use pool::{CA_DAYS, CERT_DAYS, CRL_DAYS, IssuedCert, Pool};
pub use state::HostRecord;
pub use tls::{ALPN_ENROL, ALPN_PAGES, TlsContext};
pub use token::{JoinToken, TokenError};
pub use util::check_host_name;

/// DNS name in the certificate of every host; what clients verify servers against.
pub const HOST_ROLE: &str = "heca-host";
/// DNS name, and common name, in the certificate of the enrolment server.
pub const POOL_ROLE: &str = "heca-pool";
