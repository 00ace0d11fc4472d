//! The certificate authority of a pool.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose, PublicKeyData, SanType,
};
use rustls::pki_types::CertificateDer;
use serde::{Deserialize, Serialize};
use uuid::Uuid;
use zeroize::Zeroizing;

use crate::state::{CURRENT_KEY, FORMAT, HostRecord, META, Meta, NEW_KEY, State, TokenRecord};
use crate::util::{check_host_name, date, facts, hex, lock, make_dir, random, sha256, unix, write};
use crate::{Error, HOST_ROLE, JoinToken, POOL_ROLE};

/// How long a host's certificate is valid, days.
pub const CERT_DAYS: u64 = 30;
/// How long a CA certificate is valid, days.
pub const CA_DAYS: u64 = 3650;
/// How long a revocation list is valid, days. It is made anew daily, when somebody asks.
pub const CRL_DAYS: u64 = 7;
/// Certificates begin this long before they are made, seconds: the clocks of hosts differ.
pub(crate) const BACKDATE_SECS: u64 = 300;
/// Seconds.
pub(crate) const DAY: u64 = 86_400;
/// How long expired certificates and tokens stay on record, seconds.
const MEMORY_SECS: u64 = 30 * DAY;

/// What a host gets when it joins or renews. No secret in it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct IssuedCert {
    /// The host's certificate and, after a rotation, what leads to older CAs. PEM.
    pub chain_pem: String,
    /// The pool's CA certificates. PEM.
    pub ca_pem: String,
    /// The pool's revocation lists. PEM.
    pub crl_pem: String,
    /// Which pool.
    pub pool_id: Uuid,
}

/// A pool's CA in a directory. Every call reads the directory, under its lock: several processes
/// may use it at a time.
#[derive(Clone)]
pub struct Pool {
    dir: PathBuf,
    id: Uuid,
    name: String,
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { dir, id, name } = self;
        f.debug_struct("Pool").field("dir", dir).field("id", id).field("name", name).finish()
    }
}

impl Pool {
    /// Makes a pool with a new CA. `name` is for people.
    ///
    /// # Errors
    /// [`Error::PoolExists`] if the directory holds one; [`Error::Io`].
    pub fn init(dir: &Path, name: &str) -> Result<Self, Error> {
        make_dir(dir)?;
        let guard = lock(dir)?;
        // Where a key is, was a pool, even if its other files are gone.
        if dir.join(META).exists() || dir.join(CURRENT_KEY).exists() {
            return Err(Error::PoolExists { dir: dir.to_owned() });
        }
        let now = unix(SystemTime::now());
        let id = Uuid::new_v4();
        let name = name.to_owned();
        let meta = Meta { format: FORMAT, id, name, generation: 1, crl_number: 0, crl_made: 0 };
        let mut state = State::empty(dir, guard, meta);
        let (params, key) = (ca_params(&state.meta, now), new_key()?);
        let cert = params.self_signed(&*key)?;
        write(&dir.join(CURRENT_KEY), Zeroizing::new(key.serialize_pem()).as_bytes())?;
        state.add_ca(cert.into(), &mut vec![(dir.join(CURRENT_KEY), key)])?;
        state.save_cas()?;
        state.save_issued()?;
        state.save_tokens()?;
        state.renew_crls(now)?; // writes pool.json, the last file
        Ok(Self { dir: dir.to_owned(), id, name: state.meta.name })
    }

    /// Opens the pool in a directory.
    ///
    /// # Errors
    /// [`Error::Io`] if there is none, [`Error::Damaged`].
    pub fn open(dir: &Path) -> Result<Self, Error> {
        let meta = State::load(dir)?.meta;
        Ok(Self { dir: dir.to_owned(), id: meta.id, name: meta.name })
    }

    /// Identity of the pool.
    #[must_use]
    pub fn id(&self) -> Uuid {
        self.id
    }

    /// Name of the pool, for people.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The certificates issued to hosts, oldest first; those long expired are forgotten.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Damaged`].
    pub fn hosts(&self) -> Result<Vec<HostRecord>, Error> {
        Ok(State::load(&self.dir)?.issued)
    }

    /// Makes a token for one host to join within `ttl`. `address` (`HOST:PORT`) is where the
    /// enrolment server listens, as hosts reach it. With `name` only the host of that name may
    /// use it, and it may do so although it is in the pool already: a host that was reinstalled.
    ///
    /// # Errors
    /// [`Error::Token`] for a bad address, [`Error::Name`] for a bad name, [`Error::Io`].
    pub fn token(
        &self,
        address: &str,
        ttl: Duration,
        name: Option<&str>,
    ) -> Result<JoinToken, Error> {
        name.map_or(Ok(()), check_host_name)?;
        let mut state = State::load(&self.dir)?;
        let now = unix(SystemTime::now());
        let ca = &state.cas[0];
        let token = JoinToken::new(sha256(&ca.der), address)?;
        let record = TokenRecord {
            hash: hex(&sha256(token.secret())),
            ca: ca.fingerprint.clone(),
            expires: now.saturating_add(ttl.as_secs()),
            name: name.map(str::to_owned),
            used: None,
        };
        state.tokens.retain(|old| old.expires.saturating_add(MEMORY_SECS) > now);
        state.tokens.push(record);
        state.save_tokens()?;
        Ok(token)
    }

    /// Lets a host join: takes the token's secret and the host's certificate request. Exactly
    /// one call succeeds with a token; a refused one does not use it up.
    ///
    /// # Errors
    /// [`Error::TokenUnknown`], [`Error::TokenUsed`], [`Error::TokenExpired`],
    /// [`Error::TokenName`], [`Error::Name`], [`Error::NameTaken`], [`Error::Request`].
    pub fn redeem(
        &self,
        secret: &[u8],
        csr_pem: &str,
        host_name: &str,
    ) -> Result<IssuedCert, Error> {
        self.redeem_at(secret, csr_pem, host_name, unix(SystemTime::now()))
    }

    pub(crate) fn redeem_at(
        &self,
        secret: &[u8],
        csr_pem: &str,
        host_name: &str,
        now: u64,
    ) -> Result<IssuedCert, Error> {
        check_host_name(host_name)?;
        let key = parse_request(csr_pem)?;
        let name = host_name.to_owned();
        let mut state = State::load(&self.dir)?;
        let hash = hex(&sha256(secret));
        let known = state.tokens.iter_mut().find(|token| token.hash == hash);
        let token = known.ok_or(Error::TokenUnknown)?;
        if token.used.is_some() {
            return Err(Error::TokenUsed);
        }
        if token.expires <= now {
            return Err(Error::TokenExpired);
        }
        match token.name.clone() {
            Some(wanted) if wanted != name => return Err(Error::TokenName { wanted, name }),
            None if state.issued.iter().any(|host| host.name == name && host.is_valid(now)) => {
                return Err(Error::NameTaken { name });
            }
            _ => {}
        }
        // First of all: a crash must not leave a token that works again.
        token.used = Some(now);
        state.save_tokens()?;
        self.issue(&mut state, &key, host_name, now)
    }

    /// Issues a new certificate to a host. `peer_name` is the name in the verified, unrevoked
    /// certificate that it authenticated with.
    ///
    /// # Errors
    /// [`Error::HostUnknown`] if the host has no valid certificate, [`Error::Request`].
    pub fn renew(&self, peer_name: &str, csr_pem: &str) -> Result<IssuedCert, Error> {
        let now = unix(SystemTime::now());
        check_host_name(peer_name)?;
        let key = parse_request(csr_pem)?;
        let mut state = State::load(&self.dir)?;
        if !state.issued.iter().any(|host| host.name == peer_name && host.is_valid(now)) {
            return Err(Error::HostUnknown { name: peer_name.to_owned() });
        }
        self.issue(&mut state, &key, peer_name, now)
    }

    fn issue(
        &self,
        state: &mut State,
        key: &impl PublicKeyData,
        name: &str,
        now: u64,
    ) -> Result<IssuedCert, Error> {
        use ExtendedKeyUsagePurpose::{ClientAuth, ServerAuth};
        let not_after = now + CERT_DAYS * DAY;
        let mut serial = random::<16>();
        serial[0] = serial[0] & 0x3f | 0x40; // positive, and of full length
        let mut params = leaf_params(name, &[HOST_ROLE, name], now, not_after)?;
        params.extended_key_usages = vec![ServerAuth, ClientAuth];
        params.serial_number = Some(serial.to_vec().into());
        let ca = &state.cas[0];
        let cert = params.signed_by(key, &ca.issuer()?)?;
        let record = HostRecord {
            serial: hex(&serial),
            name: name.to_owned(),
            ca: ca.fingerprint.clone(),
            not_after,
            revoked: None,
        };
        state.issued.retain(|old| old.not_after + MEMORY_SECS > now);
        state.issued.push(record);
        state.save_issued()?;
        let chain = std::iter::once(cert.der()).chain(&state.cross).map(|der| &**der);
        Ok(IssuedCert {
            chain_pem: crate::util::pem_certs(chain),
            ca_pem: state.bundle(),
            crl_pem: state.crls(unix(SystemTime::now()))?,
            pool_id: self.id,
        })
    }

    /// A certificate for the enrolment server, for a day, with a key that is never stored. Its
    /// chain ends with the CA certificates, for hosts that know one by its fingerprint only.
    pub(crate) fn issue_server(
        &self,
    ) -> Result<(Vec<CertificateDer<'static>>, Zeroizing<Vec<u8>>), Error> {
        let state = State::load(&self.dir)?;
        let now = unix(SystemTime::now());
        let key = new_key()?;
        let mut params = leaf_params(POOL_ROLE, &[POOL_ROLE], now, now + DAY)?;
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let cert = params.signed_by(&*key, &state.cas[0].issuer()?)?;
        let mut chain = vec![cert.into()];
        chain.extend(state.cross);
        chain.extend(state.cas.into_iter().map(|ca| ca.der));
        Ok((chain, Zeroizing::new(key.serialize_der())))
    }

    /// The trust bundle and the revocation lists, both PEM.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Damaged`].
    pub fn trust(&self) -> Result<(String, String), Error> {
        let mut state = State::load(&self.dir)?;
        Ok((state.bundle(), state.crls(unix(SystemTime::now()))?))
    }

    /// The revocation lists, one of each CA whose key is there, PEM; made anew if they are older
    /// than a day.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Damaged`].
    pub fn crl(&self) -> Result<String, Error> {
        Ok(self.trust()?.1)
    }

    /// Makes a new CA, which issues from now on. The old one stays in the trust bundle, and signs
    /// the new one for hosts that do not know the new one yet.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Damaged`].
    pub fn rotate_ca(&self) -> Result<(), Error> {
        let mut state = State::load(&self.dir)?;
        let now = unix(SystemTime::now());
        let old = state.cas[0].issuer()?;
        state.meta.generation += 1;
        let (params, key) = (ca_params(&state.meta, now), new_key()?);
        let cert = params.self_signed(&*key)?;
        let cross = params.signed_by(&*key, &old)?;
        let old_key = Zeroizing::new(old.key().serialize_pem());
        drop(old);
        // Keys first, under their final or provisional names: whatever is in the bundle has one.
        let (current, new) = (self.dir.join(CURRENT_KEY), self.dir.join(NEW_KEY));
        let kept = self.dir.join(format!("ca-key-old-{}.pem", state.meta.generation - 1));
        write(&kept, old_key.as_bytes())?;
        write(&new, Zeroizing::new(key.serialize_pem()).as_bytes())?;
        state.save_meta()?;
        state.add_ca(cert.into(), &mut vec![(current.clone(), key)])?;
        state.cas.rotate_right(1);
        state.cross.insert(0, cross.into());
        state.save_cas()?;
        fs::rename(&new, &current).map_err(Error::io("replace", &current))?;
        state.renew_crls(now)?;
        Ok(())
    }

    /// Forgets old CAs, and their keys, that no unexpired certificate and no usable token needs.
    /// Returns how many.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Damaged`].
    pub fn prune_ca(&self) -> Result<usize, Error> {
        self.prune_ca_at(unix(SystemTime::now()))
    }

    pub(crate) fn prune_ca_at(&self, now: u64) -> Result<usize, Error> {
        let mut state = State::load(&self.dir)?;
        let hosts = state.issued.iter().filter(|host| host.not_after > now).map(|host| &host.ca);
        let tokens = state.tokens.iter().filter(|token| token.used.is_none());
        let tokens = tokens.filter(|token| token.expires > now).map(|token| &token.ca);
        let needed: Vec<&String> = hosts.chain(tokens).collect();
        // Only the oldest go: a CA in between leads from older ones to newer ones.
        let last = state.cas.iter().rposition(|ca| needed.contains(&&ca.fingerprint));
        let gone = state.cas.split_off(last.unwrap_or(0) + 1);
        let subjects: Vec<&[u8]> = state.cas.iter().map(|ca| &*ca.facts.subject).collect();
        let led_on = |cross: &CertificateDer<'_>| {
            facts(cross).is_some_and(|facts| subjects.contains(&&*facts.issuer))
        };
        let mut cross = std::mem::take(&mut state.cross);
        cross.retain(led_on);
        state.cross = cross;
        if !gone.is_empty() {
            state.save_cas()?;
            state.renew_crls(unix(SystemTime::now()))?;
            for (path, _) in gone.iter().filter_map(|ca| ca.key.as_ref()) {
                fs::remove_file(path).map_err(Error::io("remove", path))?;
            }
        }
        Ok(gone.len())
    }

    /// Revokes all valid certificates of a host and makes new revocation lists. Returns how many
    /// certificates. Hosts refuse it as soon as they have the new lists ([`crate::fetch_crl`]).
    ///
    /// # Errors
    /// [`Error::HostUnknown`] if it has none.
    pub fn revoke(&self, host: &str) -> Result<usize, Error> {
        let mut state = State::load(&self.dir)?;
        let now = unix(SystemTime::now());
        let mut count = 0;
        for cert in state.issued.iter_mut().filter(|cert| cert.name == host && cert.is_valid(now)) {
            cert.revoked = Some(now);
            count += 1;
        }
        if count == 0 {
            return Err(Error::HostUnknown { name: host.to_owned() });
        }
        state.save_issued()?;
        state.renew_crls(now)?;
        Ok(count)
    }
}

/// A new ECDSA P-256 key.
pub(crate) fn new_key() -> Result<Zeroizing<KeyPair>, Error> {
    Ok(Zeroizing::new(KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?))
}

/// Only the public key of a request counts; the pool decides about everything else.
fn parse_request(csr_pem: &str) -> Result<rcgen::PublicKey, Error> {
    let request = CertificateSigningRequestParams::from_pem(csr_pem)
        .map_err(|error| Error::Request { what: error.to_string() })?;
    let key = request.public_key;
    if *key.algorithm() != rcgen::PKCS_ECDSA_P256_SHA256 {
        return Err(Error::Request { what: "the key must be ECDSA P-256".to_owned() });
    }
    Ok(key)
}

fn leaf_params(
    name: &str,
    dns_names: &[&str],
    now: u64,
    not_after: u64,
) -> Result<CertificateParams, Error> {
    let mut params = CertificateParams::default();
    params.not_before = date(now - BACKDATE_SECS);
    params.not_after = date(not_after);
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    for name in dns_names {
        params.subject_alt_names.push(SanType::DnsName((*name).try_into()?));
    }
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

/// The subject is unlike that of every other CA, of this pool or another: it is how a
/// certificate's issuer and its revocation list are found.
fn ca_params(meta: &Meta, now: u64) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.not_before = date(now - BACKDATE_SECS);
    params.not_after = date(now + CA_DAYS * DAY);
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, meta.id.to_string());
    let name = format!("heca pool CA {}", meta.generation);
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.use_authority_key_identifier_extension = true;
    params
}
