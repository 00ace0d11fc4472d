//! Encryption of pages before they leave the host: sponsors see no plaintext and cannot alter,
//! swap or replay pages unnoticed.
//!
//! AES-256-GCM with a key of its own for each region, derived from the host's [`SealKey`]. A nonce
//! is made of what the seal is about: kind (page or zero), page, version. It is never repeated
//! with other content because **a version of a page names one content for ever**: versions only
//! rise, also over a crash of the pager and a move of the VM, as the journal keeps them. To seal
//! two contents under one version is the caller's bug, and a grave one: it gives away the XOR of
//! the two and lets a sponsor forge seals. So whoever sends a version twice (a second replica, a
//! new connection) sends the bytes that were sealed the first time, or seals bytes that cannot
//! have changed since: sealing is deterministic.
//!
//! The opener names the version that it expects, from its own tables and never from the reply, so
//! that an older seal of the same page does not open either. What a sponsor still learns is which
//! pages are written when, which of them are zero, and it can refuse to answer.

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use heca_types::limits::{PAGE_BYTES, REGION_BYTES_MAX};
use heca_types::{PageIndex, PageVersion, RegionId};
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, Tag, UnboundKey};
use ring::hkdf::{HKDF_SHA256, Salt};
use ring::rand::{SecureRandom, SystemRandom};
use zeroize::Zeroizing;

/// Size of a key, in bytes.
const KEY_BYTES: usize = 32;
/// Size of the tag that proves a page, in bytes.
pub const TAG_BYTES: usize = 16;
/// First part of the label under which region keys are derived; a change of the format of seals
/// needs another one.
const LABEL: &[u8] = b"heca page 1";
const PAGES_MAX: u64 = REGION_BYTES_MAX / PAGE_BYTES as u64;
/// Permissions of a key file that let others than its owner in.
const OTHERS: u32 = 0o077;

// The last byte of the page in a nonce tells the kinds apart, so no page may reach into it.
const _: () = assert!(PAGES_MAX <= 1 << 56);

/// The secret of a host, or of a group of hosts between which VMs move. Wiped when dropped.
pub struct SealKey(Zeroizing<[u8; KEY_BYTES]>);

impl SealKey {
    /// A fresh random key.
    ///
    /// # Errors
    /// If the kernel gives no random bytes.
    pub fn generate() -> io::Result<Self> {
        let mut bytes = Zeroizing::new([0; KEY_BYTES]);
        SystemRandom::new()
            .fill(bytes.as_mut())
            .map_err(|_| io::Error::other("the kernel gives no random bytes"))?;
        Ok(Self(bytes))
    }

    /// Reads a key from a file that [`SealKey::save`] wrote.
    ///
    /// # Errors
    /// Those of the file; `PermissionDenied` if others than its owner may use it; `InvalidData` if
    /// it is not 32 bytes long.
    pub fn load(path: &Path) -> io::Result<Self> {
        let mut file = File::open(path)?;
        if file.metadata()?.mode() & OTHERS != 0 {
            let text = format!("{}: a key that others may use; chmod 600", path.display());
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
        }
        let mut bytes = Zeroizing::new([0; KEY_BYTES]);
        let fits = match file.read_exact(bytes.as_mut()) {
            Ok(()) => file.read(&mut [0])? == 0,
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => false,
            Err(error) => return Err(error),
        };
        if !fits {
            let text = format!("{}: a key is {KEY_BYTES} bytes long", path.display());
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        Ok(Self(bytes))
    }

    /// Writes the key to a new file that only its owner may use.
    ///
    /// # Errors
    /// Those of the file; `AlreadyExists`: a key that may be in use is never replaced.
    pub fn save(&self, path: &Path) -> io::Result<()> {
        let mut file = File::options().write(true).create_new(true).mode(0o600).open(path)?;
        file.write_all(self.0.as_ref())?;
        file.sync_all()
    }
}

impl fmt::Debug for SealKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SealKey(..)")
    }
}

/// What a sponsor gave is not what it was given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("version {} of {page} was altered: its seal does not open", version.0)]
pub struct Altered {
    /// The page that was asked for.
    pub page: PageIndex,
    /// The version that was asked for.
    pub version: PageVersion,
}

#[derive(Clone, Copy)]
enum What {
    Page,
    Zero,
}

impl What {
    fn label(self) -> &'static [u8; 4] {
        match self {
            Self::Page => b"page",
            Self::Zero => b"zero",
        }
    }
}

/// Seals and opens the pages of one region. Threads may share it.
pub struct Sealer(LessSafeKey);

impl fmt::Debug for Sealer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Sealer(..)")
    }
}

impl Sealer {
    /// Derives the key of a region. The copies that the cipher keeps are not wiped.
    #[must_use]
    pub fn new(key: &SealKey, region: RegionId) -> Self {
        // The key is uniform already, so that no salt is needed (RFC 5869, 3.1).
        let secret = Salt::new(HKDF_SHA256, &[]).extract(key.0.as_ref());
        let region = region.to_bytes();
        let info = [LABEL, region.as_slice()];
        let derived = secret.expand(&info, &AES_256_GCM).expect("32 bytes are within the limit");
        Self(LessSafeKey::new(UnboundKey::from(derived)))
    }

    /// Encrypts the content of a page in place and returns the tag that proves it. The same
    /// version must not be used for other content, see the module.
    ///
    /// # Panics
    /// If the page lies beyond the largest region.
    #[must_use]
    pub fn seal(&self, page: PageIndex, version: PageVersion, bytes: &mut [u8]) -> [u8; TAG_BYTES] {
        self.seal_as(What::Page, page, version, bytes)
    }

    /// The tag that proves that a page is all zeros in this version, for which no bytes are sent.
    ///
    /// # Panics
    /// If the page lies beyond the largest region.
    #[must_use]
    pub fn seal_zero(&self, page: PageIndex, version: PageVersion) -> [u8; TAG_BYTES] {
        self.seal_as(What::Zero, page, version, &mut [])
    }

    /// Decrypts the content of a page in place, if it is what was sealed for this page and
    /// version.
    ///
    /// # Errors
    /// [`Altered`]; the bytes are zeros then.
    pub fn open(
        &self,
        page: PageIndex,
        version: PageVersion,
        bytes: &mut [u8],
        tag: &[u8; TAG_BYTES],
    ) -> Result<(), Altered> {
        self.open_as(What::Page, page, version, bytes, tag)
    }

    /// Checks the claim that a page is all zeros in this version.
    ///
    /// # Errors
    /// [`Altered`].
    pub fn open_zero(
        &self,
        page: PageIndex,
        version: PageVersion,
        tag: &[u8; TAG_BYTES],
    ) -> Result<(), Altered> {
        self.open_as(What::Zero, page, version, &mut [], tag)
    }

    fn seal_as(
        &self,
        what: What,
        page: PageIndex,
        version: PageVersion,
        bytes: &mut [u8],
    ) -> [u8; TAG_BYTES] {
        assert!(page.0 < PAGES_MAX, "{page} lies beyond the largest region");
        let aad = Aad::from(statement(what, page, version));
        let tag = self
            .0
            .seal_in_place_separate_tag(nonce(what, page, version), aad, bytes)
            .expect("a page is within the cipher's limit of 64 GiB");
        tag.as_ref().try_into().expect("the cipher's tags have 16 bytes")
    }

    fn open_as(
        &self,
        what: What,
        page: PageIndex,
        version: PageVersion,
        bytes: &mut [u8],
        tag: &[u8; TAG_BYTES],
    ) -> Result<(), Altered> {
        let altered = Altered { page, version };
        // Nothing beyond was ever sealed, and such a number would reach into the kind's byte.
        if page.0 >= PAGES_MAX {
            bytes.fill(0);
            return Err(altered);
        }
        let aad = Aad::from(statement(what, page, version));
        let nonce = nonce(what, page, version);
        let opened = self.0.open_in_place_separate_tag(nonce, aad, Tag::from(*tag), bytes, 0..);
        if opened.is_ok() {
            return Ok(());
        }
        // What the cipher leaves behind is unspecified; nobody is to take it for a page.
        bytes.fill(0);
        Err(altered)
    }
}

/// Page (7 bytes), kind (1), version (4). With the kind in it, a page and a zero claim of one
/// version would not share a nonce, should a caller ever make both.
fn nonce(what: What, page: PageIndex, version: PageVersion) -> Nonce {
    let mut bytes = [0; NONCE_LEN];
    bytes[..8].copy_from_slice(&page.0.to_le_bytes());
    bytes[7] = match what {
        What::Page => 0,
        What::Zero => 1,
    };
    bytes[8..].copy_from_slice(&version.0.to_le_bytes());
    Nonce::assume_unique_for_key(bytes)
}

/// What a tag proves besides the content.
fn statement(what: What, page: PageIndex, version: PageVersion) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(what.label());
    bytes[4..12].copy_from_slice(&page.0.to_le_bytes());
    bytes[12..].copy_from_slice(&version.0.to_le_bytes());
    bytes
}

#[cfg(test)]
mod tests;
