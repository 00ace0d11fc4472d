//! A host's identity in a pool: its key, its certificate, and whom it trusts.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{
    CertificateDer, CertificateRevocationListDer, PrivateKeyDer, PrivatePkcs8KeyDer,
};
use rustls::sign::CertifiedKey;
use serde::{Deserialize, Serialize};
use uuid::Uuid;
use zeroize::{Zeroize, Zeroizing};

use crate::util::{self, Facts, facts, parse_pem, unix};
use crate::{Error, IssuedCert, tls};

const CHAIN: &str = "host.pem";
const KEY: &str = "host-key.pem";
/// Where a new key waits while its certificate is written.
const NEW_KEY: &str = "host-key-new.pem";
const BUNDLE: &str = "ca.pem";
const CRL: &str = "crl.pem";
const INFO: &str = "host.json";

/// `host.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Info {
    pub(crate) name: String,
    pub(crate) pool_id: Uuid,
    /// Where to renew, `HOST:PORT`.
    pub(crate) address: String,
}

/// A host's membership of a pool, read from a directory.
pub struct HostIdentity {
    dir: PathBuf,
    info: Info,
    facts: Facts,
    pub(crate) chain: Vec<CertificateDer<'static>>,
    key: Zeroizing<Vec<u8>>,
    pub(crate) roots: RootCertStore,
    pub(crate) crls: Vec<CertificateRevocationListDer<'static>>,
}

impl fmt::Debug for HostIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostIdentity")
            .field("dir", &self.dir)
            .field("info", &self.info)
            .field("not_after", &self.facts.not_after)
            .field("key", &"(hidden)")
            .finish_non_exhaustive()
    }
}

impl HostIdentity {
    /// Reads the identity in a directory.
    ///
    /// # Errors
    /// [`Error::Io`] if the host has not joined a pool, [`Error::Damaged`].
    pub fn load(dir: &Path) -> Result<Self, Error> {
        let mut attempt = 0;
        loop {
            // A renewal replaces certificate and key one after the other.
            let mut result = Self::load_with(dir, KEY);
            if result.is_err() && dir.join(NEW_KEY).exists() {
                result = Self::load_with(dir, NEW_KEY).or(result);
            }
            attempt += 1;
            if result.is_ok() || attempt == 3 {
                return result;
            }
        }
    }

    fn load_with(dir: &Path, key: &str) -> Result<Self, Error> {
        let read = |name| util::read(&dir.join(name));
        let info = serde_json::from_str(&read(INFO)?)
            .map_err(|error| Error::damaged(&dir.join(INFO), error))?;
        let (chain, key) = (read(CHAIN)?, parse_key(&read(key)?, &dir.join(key))?);
        Self::new(dir, info, &chain, key, &read(BUNDLE)?, &read(CRL)?)
    }

    /// Puts an identity together, and checks that its parts belong together. Nothing is written.
    pub(crate) fn new(
        dir: &Path,
        info: Info,
        chain_pem: &str,
        key: Zeroizing<Vec<u8>>,
        ca_pem: &str,
        crl_pem: &str,
    ) -> Result<Self, Error> {
        let path = dir.join(CHAIN);
        let chain: Vec<CertificateDer<'static>> = parse_pem(chain_pem, &path)?;
        let facts = chain.first().and_then(|cert| facts(cert));
        let facts = facts.ok_or_else(|| Error::damaged(&path, "no certificate in it"))?;
        if facts.name != info.name {
            let what = format!("it is of `{}`, not of `{}`", facts.name, info.name);
            return Err(Error::damaged(&path, what));
        }
        let mut roots = RootCertStore::empty();
        for ca in parse_pem(ca_pem, &dir.join(BUNDLE))? {
            roots.add(ca).map_err(|error| Error::damaged(&dir.join(BUNDLE), error))?;
        }
        if roots.is_empty() {
            return Err(Error::damaged(&dir.join(BUNDLE), "no certificate in it"));
        }
        let crls = parse_pem(crl_pem, &dir.join(CRL))?;
        let identity = Self { dir: dir.to_owned(), info, facts, chain, key, roots, crls };
        let pair = CertifiedKey::from_der(identity.chain.clone(), identity.key(), &tls::provider());
        pair.map_err(|error| Error::damaged(&path, format!("not for {KEY}: {error}")))?;
        Ok(identity)
    }

    /// Writes the identity that `cert` makes of a new key, so that a reader finds a complete one
    /// at any time.
    pub(crate) fn store(
        dir: &Path,
        info: Info,
        key_pem: &str,
        cert: &IssuedCert,
    ) -> Result<Self, Error> {
        let key = parse_key(key_pem, &dir.join(KEY))?;
        let (chain, ca, crl) = (&cert.chain_pem, &cert.ca_pem, &cert.crl_pem);
        let identity = Self::new(dir, info, chain, key, ca, crl)?;
        util::make_dir(dir)?;
        let _lock = util::lock(dir)?;
        let json = serde_json::to_vec_pretty(&identity.info)
            .map_err(|error| Error::damaged(&dir.join(INFO), error))?;
        if Self::load_with(dir, KEY).is_err() && Self::load_with(dir, NEW_KEY).is_ok() {
            // An earlier renewal was cut off before its last step.
            fs::rename(dir.join(NEW_KEY), dir.join(KEY)).map_err(Error::io("replace", dir))?;
        }
        util::write(&dir.join(NEW_KEY), key_pem.as_bytes())?;
        Self::store_trust(dir, ca, crl)?;
        util::write(&dir.join(CHAIN), chain.as_bytes())?;
        util::write(&dir.join(INFO), &json)?;
        fs::rename(dir.join(NEW_KEY), dir.join(KEY)).map_err(Error::io("replace", dir))?;
        Ok(identity)
    }

    /// Writes the trust bundle and the revocation lists.
    pub(crate) fn store_trust(dir: &Path, ca_pem: &str, crl_pem: &str) -> Result<(), Error> {
        util::write(&dir.join(BUNDLE), ca_pem.as_bytes())?;
        util::write(&dir.join(CRL), crl_pem.as_bytes())
    }

    pub(crate) fn info(&self) -> &Info {
        &self.info
    }

    /// The private key; a copy, which rustls takes.
    pub(crate) fn key(&self) -> PrivateKeyDer<'static> {
        PrivatePkcs8KeyDer::from(self.key.to_vec()).into()
    }

    /// Where it is kept.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Name of this host.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.info.name
    }

    /// Which pool it belongs to.
    #[must_use]
    pub fn pool_id(&self) -> Uuid {
        self.info.pool_id
    }

    /// Enrolment server, `HOST:PORT`.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.info.address
    }

    /// End of the certificate's validity.
    #[must_use]
    pub fn not_after(&self) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(self.facts.not_after)
    }

    /// How long the certificate is still valid at `now`; zero if it has expired.
    #[must_use]
    pub fn expires_in(&self, now: SystemTime) -> Duration {
        self.not_after().duration_since(now).unwrap_or_default()
    }

    /// Whether two thirds of the certificate's life are over at `now`.
    #[must_use]
    pub fn needs_renewal(&self, now: SystemTime) -> bool {
        let life = self.facts.not_after.saturating_sub(self.facts.not_before);
        unix(now) >= self.facts.not_before + life / 3 * 2
    }
}

fn parse_key(pem: &str, path: &Path) -> Result<Zeroizing<Vec<u8>>, Error> {
    let mut der = PrivateKeyDer::from_pem_slice(pem.as_bytes())
        .map_err(|error| Error::damaged(path, error))?;
    let key = Zeroizing::new(der.secret_der().to_vec());
    der.zeroize();
    Ok(key)
}
