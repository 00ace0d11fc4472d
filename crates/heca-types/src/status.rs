//! Outcome codes of the wire protocol.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Outcome of a request to a sponsor. The numbers are part of the wire format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[repr(u16)]
pub enum Status {
    /// The request was carried out.
    Ok = 0,
    /// The peers share no protocol version.
    VersionUnsupported = 1,
    /// The frame breaks the format, or is not allowed at this point.
    Malformed = 2,
    /// A named limit would be exceeded.
    TooLarge = 3,
    /// The sponsor holds no such region, or no longer: its lease ran out.
    UnknownRegion = 4,
    /// The region has a newer owner (a higher epoch).
    StaleEpoch = 5,
    /// Another owner holds the region under this very epoch.
    OwnerMismatch = 6,
    /// The sponsor's offer does not have room for the region.
    OverOffer = 7,
    /// The write would exceed the region's quota.
    OverQuota = 8,
    /// The page lies outside the extents of the region that this sponsor holds.
    OutOfRange = 9,
    /// The page's bytes do not match their checksum.
    ChecksumMismatch = 10,
    /// The sponsor's store failed; its log says why.
    StoreFailed = 11,
    /// The sponsor is shutting down.
    ShuttingDown = 12,
    /// The sponsor holds a newer version of the page.
    Superseded = 13,
    /// The source sponsor cannot be reached or does not have the page in this version.
    Unavailable = 14,
    /// The sponsor is being emptied or short of memory and takes no new extents.
    Draining = 15,
}

impl Status {
    /// Every code, in order of its number.
    pub const ALL: [Self; 16] = [
        Self::Ok,
        Self::VersionUnsupported,
        Self::Malformed,
        Self::TooLarge,
        Self::UnknownRegion,
        Self::StaleEpoch,
        Self::OwnerMismatch,
        Self::OverOffer,
        Self::OverQuota,
        Self::OutOfRange,
        Self::ChecksumMismatch,
        Self::StoreFailed,
        Self::ShuttingDown,
        Self::Superseded,
        Self::Unavailable,
        Self::Draining,
    ];

    /// The code with this number, if there is one.
    #[must_use]
    pub fn from_code(code: u16) -> Option<Self> {
        Self::ALL.get(usize::from(code)).copied()
    }

    /// The number on the wire.
    #[must_use]
    pub const fn code(self) -> u16 {
        self as u16
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ok => "ok",
            Self::VersionUnsupported => "no common protocol version",
            Self::Malformed => "malformed frame",
            Self::TooLarge => "a limit would be exceeded",
            Self::UnknownRegion => "unknown region, or its lease ran out",
            Self::StaleEpoch => "stale epoch: the region has a newer owner",
            Self::OwnerMismatch => "the region belongs to another owner",
            Self::OverOffer => "the sponsor's offer has no room for the region",
            Self::OverQuota => "the region's quota is used up",
            Self::OutOfRange => "page outside of the extents held here",
            Self::ChecksumMismatch => "checksum mismatch",
            Self::StoreFailed => "the sponsor's store failed",
            Self::ShuttingDown => "the sponsor is shutting down",
            Self::Superseded => "the sponsor holds a newer version of the page",
            Self::Unavailable => "the source sponsor does not have the page in this version",
            Self::Draining => "the sponsor takes no new extents",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_their_position() {
        for (position, status) in Status::ALL.into_iter().enumerate() {
            assert_eq!(usize::from(status.code()), position);
            assert_eq!(Status::from_code(status.code()), Some(status));
        }
        assert_eq!(Status::from_code(16), None);
    }
}
