//! Newtypes for the things that are counted and named.

use std::fmt;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::limits::EXTENT_PAGES;

/// A page of a region: its byte offset divided by the page size.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
pub struct PageIndex(pub u64);

impl PageIndex {
    /// The extent that holds this page.
    #[must_use]
    pub const fn extent(self) -> ExtentIndex {
        ExtentIndex((self.0 / EXTENT_PAGES) as u32)
    }

    /// Position of the page inside its extent, in pages.
    #[must_use]
    pub const fn within_extent(self) -> usize {
        (self.0 % EXTENT_PAGES) as usize
    }

    /// Byte offset of the page in its region.
    #[must_use]
    pub const fn offset(self) -> u64 {
        self.0 * crate::limits::PAGE_BYTES as u64
    }
}

impl fmt::Display for PageIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "page {:#x}", self.0)
    }
}

/// A 64 MiB slice of a region: the unit that is placed on a set of replicas.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
pub struct ExtentIndex(pub u32);

/// Version of one page's content. Raised each time the page is written back; 0 means that no
/// sponsor was ever sent the page, so that its remote content is all zeros.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
pub struct PageVersion(pub u32);

impl PageVersion {
    /// The version of a page that no sponsor was ever sent.
    pub const NEVER: Self = Self(0);
    /// The largest version: a bit is left for those who keep versions.
    pub const MAX: Self = Self(u32::MAX >> 1);

    /// The next version.
    ///
    /// # Panics
    /// After 2^31 - 1 write-backs of one page: at one write-back per 10 us that is 5 hours of
    /// nothing else, on one page. Wrapping would let an old write pass for a new one.
    #[must_use]
    pub fn next(self) -> Self {
        assert!(self.0 < Self::MAX.0, "a page was written back 2^31 times");
        Self(self.0 + 1)
    }
}

/// Fencing token of a region. Raised at each change of owner; sponsors refuse an older one.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
pub struct Epoch(pub u64);

macro_rules! uuid_newtype {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(
            Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
        )]
        pub struct $name(pub Uuid);

        impl $name {
            /// A fresh random id.
            #[must_use]
            pub fn random() -> Self {
                Self(Uuid::new_v4())
            }

            /// The 16 bytes that go on the wire.
            #[must_use]
            pub fn to_bytes(self) -> [u8; 16] {
                *self.0.as_bytes()
            }

            /// Reads the id from its 16 bytes on the wire.
            #[must_use]
            pub const fn from_bytes(bytes: [u8; 16]) -> Self {
                Self(Uuid::from_bytes(bytes))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

uuid_newtype!(
    /// One address space whose pages are pooled: the RAM of one VM, or one file of a process.
    RegionId
);
uuid_newtype!(
    /// The demander that holds a region.
    OwnerId
);
uuid_newtype!(
    /// One life of a sponsor's page store. A store that lost its content gets a new id.
    StoreId
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_knows_its_extent() {
        let page = PageIndex(EXTENT_PAGES + 3);
        assert_eq!(page.extent(), ExtentIndex(1));
        assert_eq!(page.within_extent(), 3);
        assert_eq!(page.offset(), (EXTENT_PAGES + 3) * 4096);
    }

    #[test]
    fn ids_survive_the_wire() {
        let id = RegionId::random();
        assert_eq!(RegionId::from_bytes(id.to_bytes()), id);
    }
}
