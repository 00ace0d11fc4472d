//! The files of a store, as bytes: how they are written and read back.
//!
//! Everything here is a function of bytes alone and total: any input gives a value or an error.

use std::collections::HashSet;

use heca_types::limits::{
    EXTENT_BYTES, EXTENT_PAGES, LEASE_MS_MAX, LEASE_MS_MIN, REGION_BYTES_MAX, REGION_EXTENTS_MAX,
};
use heca_types::{Epoch, ExtentIndex, OwnerId, PageVersion, StoreId};
use serde::{Deserialize, Serialize};

/// The format that this build writes, and the only one that it reads.
pub const FORMAT: u32 = 2;
/// Metadata of one page, in bytes.
pub const META_BYTES: usize = 32;
/// Metadata of one extent, in bytes.
pub const SLOT_META_BYTES: u64 = EXTENT_PAGES * META_BYTES as u64;
/// One slot: the metadata of an extent and its pages, in bytes.
pub const SLOT_BYTES: u64 = SLOT_META_BYTES + EXTENT_BYTES;

const PRESENT: u32 = 1;
const ZERO: u32 = 2;
const SEALED: u32 = 4;

/// Why bytes are not a file of a store.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    /// Not the JSON that was expected.
    #[error("not a description that this build wrote: {0}")]
    Json(String),
    /// Written by another version.
    #[error(
        "format {found}, this build reads format {FORMAT} only: its pages cannot be taken back. \
         Empty the directory of the store, or choose an empty directory"
    )]
    Format {
        /// The format found.
        found: u32,
    },
    /// One extent in two slots.
    #[error("extent {} is in two slots", .0.0)]
    DuplicateExtent(ExtentIndex),
    /// An extent beyond the largest region.
    #[error("extent {} lies beyond the largest region", .0.0)]
    ExtentRange(ExtentIndex),
    /// More slots than a region can have extents.
    #[error("{0} slots; {REGION_EXTENTS_MAX} are allowed")]
    TooManySlots(usize),
    /// A quota above the largest region.
    #[error("quota of {0} bytes; {REGION_BYTES_MAX} are allowed")]
    Quota(u64),
    /// A lease that no sponsor grants.
    #[error("lease of {0} ms; {LEASE_MS_MIN} to {LEASE_MS_MAX} are allowed")]
    Lease(u64),
    /// Metadata of no whole number of pages, or of more than an extent has.
    #[error("{0} bytes of metadata; multiples of {META_BYTES} up to {SLOT_META_BYTES} are allowed")]
    MetaSize(usize),
    /// Metadata of a page that contradicts itself.
    #[error("metadata of a page: {0}")]
    Meta(&'static str),
}

/// Metadata of one page.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PageMeta {
    /// Version of the content.
    pub version: u32,
    /// Its checksum.
    pub checksum: u32,
    flags: u32,
    /// Authentication tag of an encrypted page, else zeros.
    pub tag: [u8; 16],
}

impl PageMeta {
    /// Metadata of content that is all zeros (`zero`) or not. `seal` is the tag of an encrypted
    /// page.
    #[must_use]
    pub fn new(version: PageVersion, checksum: u32, zero: bool, seal: Option<[u8; 16]>) -> Self {
        let flags = PRESENT | if zero { ZERO } else { 0 } | seal.map_or(0, |_| SEALED);
        Self { version: version.0, checksum, flags, tag: seal.unwrap_or_default() }
    }

    /// Whether the store has content for the page.
    #[must_use]
    pub fn is_present(self) -> bool {
        self.flags & PRESENT != 0
    }

    /// Whether that content is all zeros, for which no bytes are kept.
    #[must_use]
    pub fn is_zero(self) -> bool {
        self.flags & ZERO != 0
    }

    /// Whether that content is encrypted.
    #[must_use]
    pub fn is_sealed(self) -> bool {
        self.flags & SEALED != 0
    }

    /// Whether the store keeps bytes for the page.
    #[must_use]
    pub fn has_bytes(self) -> bool {
        self.is_present() && !self.is_zero()
    }

    /// As it stands in the file.
    #[must_use]
    pub fn encode(self) -> [u8; META_BYTES] {
        let mut bytes = [0; META_BYTES];
        bytes[..4].copy_from_slice(&self.version.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.checksum.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.flags.to_le_bytes());
        bytes[16..].copy_from_slice(&self.tag);
        bytes
    }

    /// Reads what [`Self::encode`] wrote.
    ///
    /// # Errors
    /// Unknown flags, set reserved bytes, or fields that contradict each other.
    pub fn decode(bytes: &[u8; META_BYTES]) -> Result<Self, FormatError> {
        let word = |at: usize| {
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        let mut tag = [0; 16];
        tag.copy_from_slice(&bytes[16..]);
        let meta = Self { version: word(0), checksum: word(4), flags: word(8), tag };
        let broken = if meta.flags & !(PRESENT | ZERO | SEALED) != 0 {
            "unknown flags"
        } else if word(12) != 0 {
            "reserved bytes are set"
        } else if !meta.is_present() && meta != Self::default() {
            "fields of a page without content are set"
        } else if meta.is_present() && meta.version == PageVersion::NEVER.0 {
            "content in version 0, which means that there is none"
        } else if !meta.is_sealed() && meta.tag != [0; 16] {
            "a tag of a page that is not encrypted"
        } else {
            return Ok(meta);
        };
        Err(FormatError::Meta(broken))
    }
}

/// Metadata of the pages of one slot, read back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Metas {
    /// One for each page; the default, which is "absent", for a page whose metadata is broken.
    pub pages: Box<[PageMeta]>,
    /// Pages whose metadata is broken, by their position, in rising order.
    pub broken: Vec<usize>,
    /// What is wrong with the first of them.
    pub first_error: Option<FormatError>,
}

/// Reads the metadata of a slot. One broken page does not cost the others.
///
/// # Errors
/// Bytes of no whole number of pages, or of more than an extent has.
pub fn decode_metas(bytes: &[u8]) -> Result<Metas, FormatError> {
    let (chunks, rest) = bytes.as_chunks::<META_BYTES>();
    if !rest.is_empty() || bytes.len() as u64 > SLOT_META_BYTES {
        return Err(FormatError::MetaSize(bytes.len()));
    }
    let (mut broken, mut first_error) = (Vec::new(), None);
    let decode = |(position, chunk)| match PageMeta::decode(chunk) {
        Ok(meta) => meta,
        Err(error) => {
            broken.push(position);
            first_error.get_or_insert(error);
            PageMeta::default()
        }
    };
    let pages = chunks.iter().enumerate().map(decode).collect();
    Ok(Metas { pages, broken, first_error })
}

/// Description of a region: `ID.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegionFile {
    /// [`FORMAT`].
    pub format: u32,
    /// Who owns it.
    pub owner: OwnerId,
    /// Fencing token.
    pub epoch: Epoch,
    /// Bytes reserved.
    pub quota_bytes: u64,
    /// Life without renewal, in milliseconds.
    pub lease_ms: u64,
    /// Extent in each slot of the pages file, in order of the slots. A slot that was released has
    /// none.
    pub slots: Vec<Option<ExtentIndex>>,
}

/// Identity of a store: `store.json`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoreFile {
    /// [`FORMAT`].
    pub format: u32,
    /// Identity of the content.
    pub id: StoreId,
    /// Whether the store is being emptied.
    pub draining: bool,
}

/// What every format has: another one is named as such, whatever else is in the file.
#[derive(Deserialize)]
struct AnyFormat {
    format: u32,
}

fn decode_json<T: for<'a> Deserialize<'a>>(bytes: &[u8]) -> Result<T, FormatError> {
    let json = |error: serde_json::Error| FormatError::Json(error.to_string());
    let AnyFormat { format: found } = serde_json::from_slice(bytes).map_err(json)?;
    if found != FORMAT {
        return Err(FormatError::Format { found });
    }
    serde_json::from_slice(bytes).map_err(json)
}

/// Reads the description of a region.
///
/// # Errors
/// See [`FormatError`].
pub fn decode_region_file(bytes: &[u8]) -> Result<RegionFile, FormatError> {
    let file: RegionFile = decode_json(bytes)?;
    if file.slots.len() > REGION_EXTENTS_MAX as usize {
        return Err(FormatError::TooManySlots(file.slots.len()));
    }
    if file.quota_bytes > REGION_BYTES_MAX {
        return Err(FormatError::Quota(file.quota_bytes));
    }
    if !(LEASE_MS_MIN..=LEASE_MS_MAX).contains(&file.lease_ms) {
        return Err(FormatError::Lease(file.lease_ms));
    }
    let mut seen = HashSet::new();
    for &extent in file.slots.iter().flatten() {
        if extent.0 >= REGION_EXTENTS_MAX {
            return Err(FormatError::ExtentRange(extent));
        }
        if !seen.insert(extent) {
            return Err(FormatError::DuplicateExtent(extent));
        }
    }
    Ok(file)
}

/// Reads the identity of a store.
///
/// # Errors
/// See [`FormatError`].
pub fn decode_store_file(bytes: &[u8]) -> Result<StoreFile, FormatError> {
    decode_json(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region() -> RegionFile {
        RegionFile {
            format: FORMAT,
            owner: OwnerId::from_bytes([1; 16]),
            epoch: Epoch(3),
            quota_bytes: 1 << 30,
            lease_ms: 60_000,
            slots: vec![Some(ExtentIndex(4)), None, Some(ExtentIndex(0))],
        }
    }

    fn again(file: &RegionFile) -> Result<RegionFile, FormatError> {
        decode_region_file(&serde_json::to_vec(file).expect("serializes"))
    }

    #[test]
    fn descriptions_round_trip_and_their_fields_are_checked() {
        assert_eq!(again(&region()), Ok(region()));
        let twice = RegionFile { slots: vec![Some(ExtentIndex(4)); 2], ..region() };
        assert_eq!(again(&twice), Err(FormatError::DuplicateExtent(ExtentIndex(4))));
        let beyond = ExtentIndex(REGION_EXTENTS_MAX);
        let far = RegionFile { slots: vec![Some(beyond)], ..region() };
        assert_eq!(again(&far), Err(FormatError::ExtentRange(beyond)));
        let slots = REGION_EXTENTS_MAX as usize + 1;
        let many = RegionFile { slots: vec![None; slots], ..region() };
        assert_eq!(again(&many), Err(FormatError::TooManySlots(slots)));
        let quota_bytes = REGION_BYTES_MAX + 1;
        let rich = RegionFile { quota_bytes, ..region() };
        assert_eq!(again(&rich), Err(FormatError::Quota(quota_bytes)));
        for lease_ms in [0, LEASE_MS_MAX + 1, u64::MAX] {
            let odd = RegionFile { lease_ms, ..region() };
            assert_eq!(again(&odd), Err(FormatError::Lease(lease_ms)));
        }
    }

    #[test]
    fn another_format_is_named_whatever_else_it_has() {
        for text in [r#"{"format":1,"id":"x"}"#, r#"{"format":1,"slots":[],"more":{}}"#] {
            for error in [
                decode_region_file(text.as_bytes()).expect_err("format 1"),
                decode_store_file(text.as_bytes()).expect_err("format 1"),
            ] {
                assert_eq!(error, FormatError::Format { found: 1 });
                assert!(error.to_string().contains("empty directory"), "{error}");
            }
        }
        for text in ["", "{}", "[", "{\"format\":2}", "{\"format\":-1}", "\u{0}"] {
            let error = decode_store_file(text.as_bytes()).expect_err(text);
            assert!(matches!(error, FormatError::Json(_)), "{error}");
        }
    }

    #[test]
    fn metadata_round_trips() {
        let tag = [7; 16];
        for meta in [
            PageMeta::default(),
            PageMeta::new(PageVersion(1), 9, false, None),
            PageMeta::new(PageVersion(u32::MAX), 9, true, None),
            PageMeta::new(PageVersion(2), 0, false, Some(tag)),
            PageMeta::new(PageVersion(3), 1, true, Some(tag)),
        ] {
            assert_eq!(PageMeta::decode(&meta.encode()), Ok(meta));
        }
    }

    #[test]
    fn broken_metadata_costs_its_own_page_only() {
        let good = PageMeta::new(PageVersion(5), 9, false, None).encode();
        let sealed = PageMeta::new(PageVersion(5), 9, false, Some([7; 16])).encode();
        let broken = |mut bytes: [u8; META_BYTES], position: usize, value: u8| {
            bytes[position] = value;
            bytes
        };
        let bad = [
            (broken(good, 8, 9), "unknown flags"),
            (broken(good, 11, 1), "unknown flags"),
            (broken(good, 12, 1), "reserved"),
            (broken(good, 8, 0), "without content"),
            (broken(good, 8, 2), "without content"),
            (broken(good, 0, 0), "version 0"),
            (broken(sealed, 8, 1), "not encrypted"),
        ];
        for (bytes, word) in bad {
            let error = PageMeta::decode(&bytes).expect_err(word);
            assert!(error.to_string().contains(word), "{error}");
            let metas = decode_metas(&[good, bytes, sealed].concat()).expect("the size is right");
            assert_eq!(metas.broken, [1]);
            assert_eq!(metas.first_error, Some(error));
            assert!(metas.pages[0].has_bytes() && metas.pages[2].is_sealed());
            assert_eq!(metas.pages[1], PageMeta::default());
        }
        assert_eq!(decode_metas(&good[..31]), Err(FormatError::MetaSize(31)));
        let long = vec![0; SLOT_META_BYTES as usize + META_BYTES];
        assert_eq!(decode_metas(&long), Err(FormatError::MetaSize(long.len())));
    }
}
