//! A pool's directory, as read and written under its lock.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use rcgen::{CertificateRevocationListParams, Issuer, KeyIdMethod, KeyPair, RevokedCertParams};
use rustls::pki_types::CertificateDer;
use serde::{Deserialize, Serialize};
use uuid::Uuid;
use zeroize::Zeroizing;

use crate::pool::{BACKDATE_SECS, CRL_DAYS, DAY};
use crate::util::{self, Facts, date, facts, hex, parse_pem, pem_certs, sha256, unhex};
use crate::{Error, util::read};

/// Version of the files.
pub(crate) const FORMAT: u32 = 1;
pub(crate) const META: &str = "pool.json";
pub(crate) const CURRENT_KEY: &str = "ca-key.pem";
pub(crate) const NEW_KEY: &str = "ca-key-new.pem";
const BUNDLE: &str = "ca.pem";
const CROSS: &str = "ca-cross.pem";
const ISSUED: &str = "issued.json";
const TOKENS: &str = "tokens.json";
const CRL: &str = "crl.pem";

/// `pool.json`.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Meta {
    pub(crate) format: u32,
    pub(crate) id: Uuid,
    pub(crate) name: String,
    /// How many CA keys were made so far.
    pub(crate) generation: u32,
    /// Number of the last CRL.
    pub(crate) crl_number: u64,
    /// When it was made, seconds since 1970.
    pub(crate) crl_made: u64,
}

/// A certificate that a pool issued to a host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostRecord {
    /// Serial number, hexadecimal.
    pub serial: String,
    /// Name of the host.
    pub name: String,
    /// SHA-256 of the issuing CA's certificate, hexadecimal.
    pub ca: String,
    /// End of validity, seconds since 1970.
    pub not_after: u64,
    /// When it was revoked, seconds since 1970.
    pub revoked: Option<u64>,
}

impl HostRecord {
    /// Whether the certificate is neither revoked nor expired at `now`, seconds since 1970.
    #[must_use]
    pub fn is_valid(&self, now: u64) -> bool {
        self.revoked.is_none() && self.not_after > now
    }
}

/// An entry of `tokens.json`.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct TokenRecord {
    /// SHA-256 of the secret, hexadecimal.
    pub(crate) hash: String,
    /// SHA-256 of the CA certificate that it names, hexadecimal.
    pub(crate) ca: String,
    /// Seconds since 1970.
    pub(crate) expires: u64,
    /// The only host that may use it.
    pub(crate) name: Option<String>,
    /// When it was used, seconds since 1970.
    pub(crate) used: Option<u64>,
}

/// A CA of the pool, with its key if that is still there.
pub(crate) struct Ca {
    pub(crate) der: CertificateDer<'static>,
    pub(crate) facts: Facts,
    /// SHA-256 of `der`, hexadecimal.
    pub(crate) fingerprint: String,
    pub(crate) key: Option<(PathBuf, Zeroizing<KeyPair>)>,
}

impl Ca {
    pub(crate) fn issuer(&self) -> Result<Issuer<'static, &KeyPair>, Error> {
        let (_, key) = self.key.as_ref().ok_or_else(|| Error::Crypto {
            what: format!("the key of `{}` is missing; restore it", self.facts.name),
        })?;
        Ok(Issuer::from_ca_cert_der(&self.der, &**key)?)
    }
}

/// Everything in the directory. Whoever has one holds the lock.
pub(crate) struct State {
    dir: PathBuf,
    _lock: File,
    pub(crate) meta: Meta,
    /// Newest first; never empty.
    pub(crate) cas: Vec<Ca>,
    /// Newer CAs, signed by older ones; newest first.
    pub(crate) cross: Vec<CertificateDer<'static>>,
    pub(crate) issued: Vec<HostRecord>,
    pub(crate) tokens: Vec<TokenRecord>,
}

impl State {
    pub(crate) fn load(dir: &Path) -> Result<Self, Error> {
        let lock = util::lock(dir)?;
        let meta: Meta = json(&dir.join(META))?;
        if meta.format != FORMAT {
            let what = format!("format {}, this heca knows {FORMAT}", meta.format);
            return Err(Error::damaged(&dir.join(META), what));
        }
        let mut keys = Vec::new();
        for entry in fs::read_dir(dir).map_err(Error::io("list", dir))? {
            let path = entry.map_err(Error::io("list", dir))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if name.starts_with("ca-key") && name.ends_with(".pem") {
                let key = KeyPair::from_pem(&read(&path)?);
                let key = Zeroizing::new(key.map_err(|error| Error::damaged(&path, error))?);
                keys.push((path, key));
            }
        }
        let mut state = Self {
            _lock: lock,
            meta,
            cas: Vec::new(),
            cross: certs(&dir.join(CROSS))?,
            issued: json(&dir.join(ISSUED))?,
            tokens: json(&dir.join(TOKENS))?,
            dir: dir.to_owned(),
        };
        for der in certs(&dir.join(BUNDLE))? {
            state.add_ca(der, &mut keys)?;
        }
        if state.cas.is_empty() {
            return Err(Error::damaged(&dir.join(BUNDLE), "no certificate in it"));
        }
        Ok(state)
    }

    /// A state without anything in it yet, of which nothing is on disk.
    pub(crate) fn empty(dir: &Path, lock: File, meta: Meta) -> Self {
        let (cas, cross, issued, tokens) = Default::default();
        Self { dir: dir.to_owned(), _lock: lock, meta, cas, cross, issued, tokens }
    }

    /// Appends a CA, with the one of the keys that belongs to it.
    pub(crate) fn add_ca(
        &mut self,
        der: CertificateDer<'static>,
        keys: &mut Vec<(PathBuf, Zeroizing<KeyPair>)>,
    ) -> Result<(), Error> {
        let facts = facts(&der)
            .ok_or_else(|| Error::damaged(&self.dir.join(BUNDLE), "not a CA certificate"))?;
        let at = keys.iter().position(|(_, key)| key.public_key_raw() == facts.key);
        let key = at.map(|at| keys.swap_remove(at));
        self.cas.push(Ca { fingerprint: hex(&sha256(&der)), der, facts, key });
        Ok(())
    }

    pub(crate) fn save_meta(&self) -> Result<(), Error> {
        save(&self.dir.join(META), &self.meta)
    }

    pub(crate) fn save_issued(&self) -> Result<(), Error> {
        save(&self.dir.join(ISSUED), &self.issued)
    }

    pub(crate) fn save_tokens(&self) -> Result<(), Error> {
        save(&self.dir.join(TOKENS), &self.tokens)
    }

    /// Writes the trust bundle and the cross certificates.
    pub(crate) fn save_cas(&self) -> Result<(), Error> {
        util::write(&self.dir.join(CROSS), pem_certs(self.cross.iter().map(|c| &**c)).as_bytes())?;
        util::write(&self.dir.join(BUNDLE), self.bundle().as_bytes())
    }

    /// The CA certificates as PEM.
    pub(crate) fn bundle(&self) -> String {
        pem_certs(self.cas.iter().map(|ca| &*ca.der))
    }

    /// Writes a CRL of each CA whose key is there; returns them as PEM.
    pub(crate) fn renew_crls(&mut self, now: u64) -> Result<String, Error> {
        let mut text = String::new();
        self.meta.crl_number += 1;
        for ca in self.cas.iter().filter(|ca| ca.key.is_some()) {
            let revoked = self.issued.iter().filter(|host| host.ca == ca.fingerprint);
            let revoked_certs = revoked
                .filter_map(|host| {
                    Some(RevokedCertParams {
                        revocation_time: date(host.revoked?),
                        serial_number: unhex(&host.serial)?.into(),
                        reason_code: None,
                        invalidity_date: None,
                    })
                })
                .collect();
            let crl = CertificateRevocationListParams {
                this_update: date(now - BACKDATE_SECS),
                next_update: date(now + CRL_DAYS * DAY),
                crl_number: self.meta.crl_number.into(),
                issuing_distribution_point: None,
                revoked_certs,
                key_identifier_method: KeyIdMethod::Sha256,
            };
            text += &crl.signed_by(&ca.issuer()?)?.pem()?;
        }
        util::write(&self.dir.join(CRL), text.as_bytes())?;
        self.meta.crl_made = now;
        self.save_meta()?;
        Ok(text)
    }

    /// The CRLs as PEM, made anew if they are older than a day.
    pub(crate) fn crls(&mut self, now: u64) -> Result<String, Error> {
        if now.abs_diff(self.meta.crl_made) > DAY {
            return self.renew_crls(now);
        }
        Ok(read(&self.dir.join(CRL))?.to_string())
    }
}

fn certs(path: &Path) -> Result<Vec<CertificateDer<'static>>, Error> {
    parse_pem(&read(path)?, path)
}

fn json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T, Error> {
    serde_json::from_str(&read(path)?).map_err(|error| Error::damaged(path, error))
}

fn save(path: &Path, value: &impl Serialize) -> Result<(), Error> {
    let mut text = serde_json::to_vec_pretty(value).map_err(|error| Error::damaged(path, error))?;
    text.push(b'\n');
    util::write(path, &text)
}
