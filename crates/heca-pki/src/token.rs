//! One-time tokens that let a host join a pool.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use zeroize::Zeroizing;

use crate::util::{hex, random, sha256};

/// What every token begins with.
const PREFIX: &str = "heca1.";
/// Version of the bytes inside.
const VERSION: u8 = 1;
/// Version, fingerprint, secret, length of the address.
const FIXED: usize = 1 + 32 + 32 + 1;
const CHECKSUM: usize = 4;

/// Why a text is not a join token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TokenError {
    /// It begins differently.
    #[error("this is not a join token: it must begin with `{PREFIX}`; copy it whole")]
    Prefix,
    /// A character cannot be part of a token.
    #[error("character {position} of the token cannot be part of one; copy it again, whole")]
    Character {
        /// Counted from 1.
        position: usize,
    },
    /// The checksum is wrong.
    #[error("the token was changed or cut short on its way; copy it again, whole")]
    Checksum,
    /// Made by another version of heca.
    #[error("the token has version {version}, this heca knows {VERSION}; update heca on this host")]
    Version {
        /// What it says.
        version: u8,
    },
    /// The address is unusable.
    #[error("`{address}` is no enrolment address; it must be HOST:PORT with at most 255 bytes")]
    Address {
        /// What was given.
        address: String,
    },
}

/// What a host needs to join a pool, once: where to go, whom to trust there, and a secret.
///
/// Text form: `heca1.` and base64url without padding of: version (1 byte), SHA-256 of the CA
/// certificate (32), secret (32), length of the address (1), address `HOST:PORT`, and the first
/// four bytes of the SHA-256 of all that.
#[derive(Clone)]
pub struct JoinToken {
    fingerprint: [u8; 32],
    secret: Zeroizing<[u8; 32]>,
    address: String,
}

impl JoinToken {
    /// Makes a token with a fresh secret.
    ///
    /// # Errors
    /// [`TokenError::Address`] if `address` is not `HOST:PORT`.
    pub(crate) fn new(fingerprint: [u8; 32], address: &str) -> Result<Self, TokenError> {
        check_address(address)?;
        let secret = Zeroizing::new(random());
        Ok(Self { fingerprint, secret, address: address.to_owned() })
    }

    /// Reads the text form; white space around it is ignored.
    ///
    /// # Errors
    /// See [`TokenError`]. Never panics.
    pub fn parse(text: &str) -> Result<Self, TokenError> {
        let body = text.trim().strip_prefix(PREFIX).ok_or(TokenError::Prefix)?;
        let bytes = Zeroizing::new(URL_SAFE_NO_PAD.decode(body).map_err(|error| match error {
            base64::DecodeError::InvalidByte(at, _) => {
                TokenError::Character { position: PREFIX.len() + at + 1 }
            }
            _ => TokenError::Checksum,
        })?);
        if bytes.len() < FIXED + CHECKSUM {
            return Err(TokenError::Checksum);
        }
        let (payload, checksum) = bytes.split_at(bytes.len() - CHECKSUM);
        if sha256(payload)[..CHECKSUM] != *checksum {
            return Err(TokenError::Checksum);
        }
        if payload[0] != VERSION {
            return Err(TokenError::Version { version: payload[0] });
        }
        let (head, address) = payload.split_at(FIXED);
        let address = String::from_utf8_lossy(address).into_owned();
        if address.len() != usize::from(head[FIXED - 1]) {
            return Err(TokenError::Address { address });
        }
        check_address(&address)?;
        let mut token = Self { fingerprint: [0; 32], secret: Zeroizing::new([0; 32]), address };
        token.fingerprint.copy_from_slice(&head[1..33]);
        token.secret.copy_from_slice(&head[33..65]);
        Ok(token)
    }

    /// The text form. It is a secret until the token is used or expired.
    #[must_use]
    pub fn encode(&self) -> Zeroizing<String> {
        let mut bytes = Zeroizing::new(Vec::with_capacity(FIXED + self.address.len() + CHECKSUM));
        bytes.push(VERSION);
        bytes.extend_from_slice(&self.fingerprint);
        bytes.extend_from_slice(self.secret.as_slice());
        bytes.push(self.address.len() as u8); // at most 255: check_address
        bytes.extend_from_slice(self.address.as_bytes());
        let checksum = sha256(&bytes);
        bytes.extend_from_slice(&checksum[..CHECKSUM]);
        Zeroizing::new(format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(bytes.as_slice())))
    }

    /// Address of the enrolment server, `HOST:PORT`.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// SHA-256 of the DER form of the pool's CA certificate.
    #[must_use]
    pub fn fingerprint(&self) -> &[u8; 32] {
        &self.fingerprint
    }

    /// The secret that [`crate::Pool::redeem`] takes.
    #[must_use]
    pub fn secret(&self) -> &[u8; 32] {
        &self.secret
    }
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinToken")
            .field("fingerprint", &hex(&self.fingerprint))
            .field("secret", &"(hidden)")
            .field("address", &self.address)
            .finish()
    }
}

fn check_address(address: &str) -> Result<(), TokenError> {
    let good = address.len() <= 255
        && address.bytes().all(|b| b.is_ascii_graphic())
        && address.rsplit_once(':').is_some_and(|(host, port)| {
            !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port != 0)
        });
    if good { Ok(()) } else { Err(TokenError::Address { address: address.to_owned() }) }
}
