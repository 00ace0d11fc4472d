//! One page in a frame.

use heca_types::limits::{PAGE_BYTES, REGION_BYTES_MAX};
use heca_types::{PageIndex, PageVersion, Status};
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::header::{DecodeError, Kind};

/// Flags of a page entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct EntryFlags(pub u32);

impl EntryFlags {
    /// The page's content is all zeros; no data follows for it.
    pub const ZERO: Self = Self(1);
    /// The sponsor holds no content for the page; no data follows for it.
    pub const ABSENT: Self = Self(2);
    /// The content is encrypted and opaque to the sponsor. With [`Self::ZERO`] it is the sealed
    /// fact that the page is all zeros: no data, but a tag.
    pub const SEALED: Self = Self(4);

    /// The content is one word over and over, the first eight bytes of the tag; no data follows for
    /// it. Between the hosts that a VM moves between only: sponsors refuse it.
    pub const SAME: Self = Self(8);

    /// Every flag that this build knows.
    pub const ALL: Self = Self(Self::ZERO.0 | Self::ABSENT.0 | Self::SEALED.0 | Self::SAME.0);

    /// Whether all bits of `other` are set.
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// These and those of `other`.
    #[must_use]
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether 4096 bytes of data belong to the entry in a frame that carries data.
    #[must_use]
    pub const fn has_data(self) -> bool {
        self.0 & (Self::ZERO.0 | Self::ABSENT.0 | Self::SAME.0) == 0
    }
}

/// One page in a frame: 40 bytes.
#[derive(
    FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Debug, Clone, Copy, PartialEq, Eq,
)]
#[repr(C)]
pub struct PageEntry {
    page: U64,
    version: U32,
    checksum: U32,
    flags: U32,
    status: U16,
    reserved: U16,
    tag: [u8; 16],
}

const _: () = assert!(size_of::<PageEntry>() == 40);

impl PageEntry {
    /// An entry with flags, checksum and tag zero and status `Ok`.
    #[must_use]
    pub fn new(page: PageIndex, version: PageVersion) -> Self {
        Self {
            page: U64::new(page.0),
            version: U32::new(version.0),
            checksum: U32::ZERO,
            flags: U32::ZERO,
            status: U16::ZERO,
            reserved: U16::ZERO,
            tag: [0; 16],
        }
    }

    /// The same with a checksum.
    #[must_use]
    pub fn with_checksum(mut self, checksum: u32) -> Self {
        self.checksum = U32::new(checksum);
        self
    }

    /// The same with flags.
    #[must_use]
    pub fn with_flags(mut self, flags: EntryFlags) -> Self {
        self.flags = U32::new(flags.0);
        self
    }

    /// The same with an outcome.
    #[must_use]
    pub fn with_status(mut self, status: Status) -> Self {
        self.status = U16::new(status.code());
        self
    }

    /// The same with the authentication tag of an encrypted page.
    #[must_use]
    pub fn with_tag(mut self, tag: [u8; 16]) -> Self {
        self.tag = tag;
        self
    }

    /// The page.
    #[must_use]
    pub fn page(&self) -> PageIndex {
        PageIndex(self.page.get())
    }

    /// Version of the content.
    #[must_use]
    pub fn version(&self) -> PageVersion {
        PageVersion(self.version.get())
    }

    /// Checksum of the content; see [`crate::page_checksum`].
    #[must_use]
    pub fn checksum(&self) -> u32 {
        self.checksum.get()
    }

    /// Flags.
    #[must_use]
    pub fn flags(&self) -> EntryFlags {
        EntryFlags(self.flags.get())
    }

    /// Outcome for this page.
    #[must_use]
    pub fn status(&self) -> Status {
        Status::from_code(self.status.get()).unwrap_or(Status::Malformed)
    }

    /// Authentication tag of an encrypted page; zeros if the page is not encrypted.
    #[must_use]
    pub fn tag(&self) -> [u8; 16] {
        self.tag
    }

    /// Checks what must hold for an entry of any frame.
    pub(crate) fn check(&self, kind: Kind) -> Result<(), DecodeError> {
        if self.flags.get() & !EntryFlags::ALL.0 != 0 || self.reserved.get() != 0 {
            return Err(DecodeError::Reserved { kind });
        }
        if Status::from_code(self.status.get()).is_none() {
            return Err(DecodeError::Status { code: self.status.get() });
        }
        if self.page.get() >= REGION_BYTES_MAX / PAGE_BYTES as u64 {
            return Err(DecodeError::Field { kind, what: "page beyond the largest region" });
        }
        Ok(())
    }
}
