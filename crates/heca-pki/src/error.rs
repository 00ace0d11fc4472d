//! What can go wrong.

use std::io;
use std::path::{Path, PathBuf};

use rustls::{AlertDescription, CertificateError};

use crate::TokenError;

/// Why an operation on a pool or an identity failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file or directory cannot be used.
    #[error("cannot {what} {}: {source}", path.display())]
    Io {
        /// What was attempted.
        what: &'static str,
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A pool is there already.
    #[error("{} already holds a pool; choose another directory", dir.display())]
    PoolExists {
        /// Where.
        dir: PathBuf,
    },
    /// A file does not hold what it should.
    #[error("{} is damaged: {what}; restore it from a backup", path.display())]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// The text is not a join token.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// No such token was made here, or so long ago that it was forgotten.
    #[error("this pool does not know that token; make a new one")]
    TokenUnknown,
    /// Tokens work once.
    #[error("that token has been used already; make a new one")]
    TokenUsed,
    /// Tokens work for a limited time.
    #[error("that token has expired; make a new one")]
    TokenExpired,
    /// The token names another host.
    #[error("that token was made for host `{wanted}`, not for `{name}`")]
    TokenName {
        /// Whom it was made for.
        wanted: String,
        /// Who asked.
        name: String,
    },
    /// Not a host name.
    #[error(
        "`{name}` cannot name a host: 1 to 63 of a-z, 0-9 and `-`, not at the ends, \
         and neither `heca-host` nor `heca-pool`"
    )]
    Name {
        /// What was given.
        name: String,
    },
    /// Another host has that name.
    #[error(
        "a host named `{name}` is in the pool; choose another name, revoke that host, \
         or make a token for that very name if this is the same host, reinstalled"
    )]
    NameTaken {
        /// Which.
        name: String,
    },
    /// No valid certificate has that name.
    #[error("no host named `{name}` has a valid certificate; it must join (again)")]
    HostUnknown {
        /// Which.
        name: String,
    },
    /// The certificate request is unusable.
    #[error("unusable certificate request: {what}")]
    Request {
        /// Why.
        what: String,
    },
    /// The enrolment server cannot be reached, or is not to be trusted.
    #[error("enrolment server {address}: {source}")]
    Network {
        /// Where.
        address: String,
        /// Why.
        source: io::Error,
    },
    /// The enrolment server said no.
    #[error("enrolment server {address} refused: {text}")]
    Refused {
        /// Where.
        address: String,
        /// Its words.
        text: String,
    },
    /// Keys or certificates could not be made or used.
    #[error("cannot make or use a certificate: {what}")]
    Crypto {
        /// Why.
        what: String,
    },
}

impl Error {
    pub(crate) fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { what, path, source }
    }

    pub(crate) fn damaged(path: &Path, what: impl ToString) -> Self {
        Self::Damaged { path: path.to_owned(), what: what.to_string() }
    }
}

impl From<rcgen::Error> for Error {
    fn from(error: rcgen::Error) -> Self {
        Self::Crypto { what: error.to_string() }
    }
}

impl From<rustls::Error> for Error {
    fn from(error: rustls::Error) -> Self {
        Self::Crypto { what: error.to_string() }
    }
}

/// Why two hosts do not talk. Inside the [`io::Error`] of [`crate::Channel`]; get it back with
/// `error.get_ref().and_then(|e| e.downcast_ref::<TlsError>())`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// The peer's certificate comes from another CA.
    #[error("the peer's certificate is not of this pool; the peer must join this pool")]
    PeerForeign,
    /// The peer's certificate is too old.
    #[error("the peer's certificate has expired; renew it there, or join again; check both clocks")]
    PeerExpired,
    /// The peer's certificate is too new.
    #[error("the peer's certificate is not valid yet; check the clocks of both hosts")]
    PeerNotYetValid,
    /// The peer was revoked.
    #[error("the peer's certificate was revoked; it has to join the pool again")]
    PeerRevoked,
    /// The peer has a certificate of the pool, for something else.
    #[error("the peer's certificate is for another purpose; is the address right?")]
    PeerRole,
    /// The peer has no certificate.
    #[error("the peer showed no certificate; it must join this pool")]
    PeerAnonymous,
    /// The peer does not speak TLS.
    #[error("the peer speaks plaintext, not TLS; it must join this pool and use TLS, too")]
    Plaintext,
    /// The peer refuses our CA.
    #[error("the peer does not accept this host's certificate: not of its pool; join that pool")]
    OwnForeign,
    /// The peer says that our certificate expired.
    #[error("the peer says that this host's certificate has expired; renew it; check both clocks")]
    OwnExpired,
    /// The peer says that we are revoked.
    #[error("the peer says that this host's certificate was revoked; join the pool again")]
    OwnRevoked,
    /// The peer asks for a certificate.
    #[error("the peer requires a certificate of its pool; join that pool")]
    OwnMissing,
    /// The peer is a part of heca, but not the right one.
    #[error("the peer speaks another protocol; is the port right (pages, enrolment)?")]
    Protocol,
    /// The peer went away.
    #[error("the peer closed the connection during the TLS handshake; does it use TLS?")]
    Closed,
    /// The peer is silent.
    #[error("the TLS handshake took too long; is the peer alive and does it use TLS?")]
    Timeout,
    /// Something else.
    #[error("TLS: {0}")]
    Other(String),
}

impl From<&rustls::Error> for TlsError {
    fn from(error: &rustls::Error) -> Self {
        use CertificateError as C;
        use rustls::Error as E;
        match error {
            E::InvalidCertificate(error) => match error {
                C::UnknownIssuer | C::BadSignature => Self::PeerForeign,
                C::Expired | C::ExpiredContext { .. } => Self::PeerExpired,
                C::NotValidYet | C::NotValidYetContext { .. } => Self::PeerNotYetValid,
                C::Revoked => Self::PeerRevoked,
                C::NotValidForName
                | C::NotValidForNameContext { .. }
                | C::InvalidPurpose
                | C::InvalidPurposeContext { .. } => Self::PeerRole,
                other => Self::Other(format!("the peer's certificate is unusable: {other}")),
            },
            E::NoCertificatesPresented => Self::PeerAnonymous,
            E::AlertReceived(alert) => match alert {
                AlertDescription::UnknownCA | AlertDescription::DecryptError => Self::OwnForeign,
                AlertDescription::CertificateExpired => Self::OwnExpired,
                AlertDescription::CertificateRevoked => Self::OwnRevoked,
                AlertDescription::CertificateRequired => Self::OwnMissing,
                AlertDescription::NoApplicationProtocol => Self::Protocol,
                other => Self::Other(format!("the peer gave up: {other:?}")),
            },
            E::NoApplicationProtocol => Self::Protocol,
            other => Self::Other(other.to_string()),
        }
    }
}

impl From<TlsError> for io::Error {
    fn from(error: TlsError) -> Self {
        let kind = match error {
            TlsError::Timeout => io::ErrorKind::TimedOut,
            TlsError::Closed => io::ErrorKind::ConnectionAborted,
            TlsError::Plaintext | TlsError::Protocol | TlsError::Other(_) => {
                io::ErrorKind::InvalidData
            }
            _ => io::ErrorKind::PermissionDenied,
        };
        Self::new(kind, error)
    }
}
