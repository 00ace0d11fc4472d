//! Ids, units, limits and error codes that every Hecatonchire crate shares.
//!
//! This crate has no behaviour of its own: newtypes that keep page indexes, versions and epochs
//! apart, the parser of sizes that people type (`4G`), and every bound of the system in [`limits`].
#![forbid(unsafe_code)]

mod ids;
pub mod limits;
mod size;
mod status;

pub use ids::{Epoch, ExtentIndex, OwnerId, PageIndex, PageVersion, RegionId, StoreId};
pub use size::{ByteSize, ParseSizeError};
pub use status::Status;
