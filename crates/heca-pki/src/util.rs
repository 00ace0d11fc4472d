//! Files, locks, PEM, and what is read from certificates.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ring::digest;
use ring::rand::{SecureRandom, SystemRandom};
use rustix::fs::FlockOperation;
use rustls::pki_types::pem::PemObject;
use time::OffsetDateTime;
use x509_parser::prelude::{FromDer, X509Certificate};
use zeroize::Zeroizing;

use crate::{Error, HOST_ROLE, POOL_ROLE};

pub(crate) fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut out = [0; 32];
    out.copy_from_slice(digest::digest(&digest::SHA256, bytes).as_ref());
    out
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(crate) fn unhex(text: &str) -> Option<Vec<u8>> {
    let pairs = text.as_bytes().chunks(2);
    pairs.map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()).collect()
}

/// Random bytes from the kernel.
///
/// # Panics
/// If the kernel has none, which does not happen after boot.
pub(crate) fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    SystemRandom::new().fill(&mut bytes).expect("the kernel gives random bytes");
    bytes
}

/// Seconds since 1970.
pub(crate) fn unix(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |age| age.as_secs())
}

pub(crate) fn date(unix: u64) -> OffsetDateTime {
    let seconds = i64::try_from(unix).unwrap_or(i64::MAX);
    OffsetDateTime::from_unix_timestamp(seconds).unwrap_or(OffsetDateTime::UNIX_EPOCH)
}

/// Whether a text can name a host: 1 to 63 of `a-z`, `0-9` and `-`, no `-` at either end, and
/// not a reserved name.
///
/// # Errors
/// [`Error::Name`].
pub fn check_host_name(name: &str) -> Result<(), Error> {
    let good = (1..=63).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !name.starts_with('-')
        && !name.ends_with('-')
        && name != HOST_ROLE
        && name != POOL_ROLE;
    if good { Ok(()) } else { Err(Error::Name { name: name.to_owned() }) }
}

/// Makes a directory that only its owner can enter, with its parents.
pub(crate) fn make_dir(dir: &Path) -> Result<(), Error> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(dir);
    made.map_err(Error::io("create directory", dir))
}

/// Replaces a file at once; only its owner can read it.
pub(crate) fn write(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let dir = path.parent().unwrap_or(Path::new("."));
    let temp = dir.join(format!(".{}.tmp", hex(&random::<8>())));
    let result = (|| {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temp)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temp, path)?;
        File::open(dir)?.sync_all()
    })();
    if result.is_err() {
        let _ = fs::remove_file(&temp);
    }
    result.map_err(Error::io("write", path))
}

pub(crate) fn read(path: &Path) -> Result<Zeroizing<String>, Error> {
    fs::read_to_string(path).map(Zeroizing::new).map_err(Error::io("read", path))
}

/// Holds the directory's lock until dropped. Excludes other threads, too: each call opens the
/// directory anew, and the lock belongs to the open file.
pub(crate) fn lock(dir: &Path) -> Result<File, Error> {
    let file = File::open(dir).map_err(Error::io("open", dir))?;
    loop {
        match rustix::fs::flock(&file, FlockOperation::LockExclusive) {
            Ok(()) => return Ok(file),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(Error::io("lock", dir)(error.into())),
        }
    }
}

pub(crate) fn pem(label: &str, der: &[u8]) -> String {
    let mut out = format!("-----BEGIN {label}-----\n");
    for line in STANDARD.encode(der).as_bytes().chunks(64) {
        out.push_str(&String::from_utf8_lossy(line));
        out.push('\n');
    }
    out + &format!("-----END {label}-----\n")
}

pub(crate) fn pem_certs<'a>(ders: impl IntoIterator<Item = &'a [u8]>) -> String {
    ders.into_iter().map(|der| pem("CERTIFICATE", der)).collect()
}

/// All objects of one kind in a PEM text; `path` is for the error.
pub(crate) fn parse_pem<T: PemObject>(text: &str, path: &Path) -> Result<Vec<T>, Error> {
    T::pem_slice_iter(text.as_bytes())
        .collect::<Result<_, _>>()
        .map_err(|error| Error::damaged(path, error))
}

/// What heca reads from a certificate.
pub(crate) struct Facts {
    /// Common name.
    pub(crate) name: String,
    /// Seconds since 1970.
    pub(crate) not_before: u64,
    /// Seconds since 1970.
    pub(crate) not_after: u64,
    /// The public key's bits.
    pub(crate) key: Vec<u8>,
    /// DER form of the subject.
    pub(crate) subject: Vec<u8>,
    /// DER form of the issuer.
    pub(crate) issuer: Vec<u8>,
}

/// Reads a certificate. It is not verified here.
pub(crate) fn facts(der: &[u8]) -> Option<Facts> {
    let (_, cert) = X509Certificate::from_der(der).ok()?;
    let name = cert.subject().iter_common_name().next()?.as_str().ok()?.to_owned();
    let seconds = |time: x509_parser::time::ASN1Time| u64::try_from(time.timestamp()).unwrap_or(0);
    Some(Facts {
        name,
        not_before: seconds(cert.validity().not_before),
        not_after: seconds(cert.validity().not_after),
        key: cert.public_key().subject_public_key.data.to_vec(),
        subject: cert.subject().as_raw().to_vec(),
        issuer: cert.issuer().as_raw().to_vec(),
    })
}
