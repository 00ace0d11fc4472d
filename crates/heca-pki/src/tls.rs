//! TLS configurations of a host.

use std::fmt;
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::SystemTime;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig, version::TLS13};

use crate::{Error, HOST_ROLE, HostIdentity};

/// ALPN name of the page protocol.
pub const ALPN_PAGES: &[u8] = b"heca/2";
/// ALPN name of the enrolment protocol.
pub const ALPN_ENROL: &[u8] = b"heca-enrol/1";

/// A host's TLS 1.3 configurations for connections to and from other hosts. Both sides show a
/// certificate of the pool; revocation lists are obeyed, even outdated ones, so that pages flow
/// while the enrolment server is away. No early data. Clients do not resume sessions: each
/// connection verifies its peer anew.
///
/// Clones share the configurations, and [`Self::reload`] replaces them for all.
#[derive(Clone)]
pub struct TlsContext {
    dir: Arc<Path>,
    configs: Arc<RwLock<Arc<Configs>>>,
}

pub(crate) struct Configs {
    name: String,
    not_after: SystemTime,
    pub(crate) client: Arc<ClientConfig>,
    pub(crate) server: Arc<ServerConfig>,
    server_verifier: Arc<WebPkiServerVerifier>,
    client_verifier: Arc<dyn ClientCertVerifier>,
}

impl fmt::Debug for TlsContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsContext")
            .field("dir", &self.dir)
            .field("name", &self.configs().name)
            .finish_non_exhaustive()
    }
}

impl TlsContext {
    /// Makes configurations from an identity.
    ///
    /// # Errors
    /// [`Error::Crypto`] if a certificate or revocation list is unusable.
    pub fn new(identity: &HostIdentity) -> Result<Self, Error> {
        let configs = Arc::new(RwLock::new(Arc::new(Configs::new(identity)?)));
        Ok(Self { dir: identity.dir().into(), configs })
    }

    /// Reads the identity anew from its directory; new connections use it. When this fails the
    /// old configurations stay. Established connections go on: see [`crate::Channel::recheck`].
    ///
    /// # Errors
    /// Those of [`HostIdentity::load`] and [`Self::new`].
    pub fn reload(&self) -> Result<(), Error> {
        let configs = Arc::new(Configs::new(&HostIdentity::load(&self.dir)?)?);
        *self.configs.write().unwrap_or_else(PoisonError::into_inner) = configs;
        Ok(())
    }

    /// Name of this host.
    #[must_use]
    pub fn name(&self) -> String {
        self.configs().name.clone()
    }

    /// End of the validity of the certificate in use.
    #[must_use]
    pub fn not_after(&self) -> SystemTime {
        self.configs().not_after
    }

    pub(crate) fn configs(&self) -> Arc<Configs> {
        self.configs.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Configs {
    fn new(identity: &HostIdentity) -> Result<Self, Error> {
        let roots = Arc::new(identity.roots.clone());
        let server_verifier = server_verifier(roots.clone(), identity.crls.clone())?;
        let client_verifier = client_verifier(roots, identity.crls.clone(), false)?;
        let chain = identity.chain.clone();
        let mut client = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])?
            .with_webpki_verifier(server_verifier.clone())
            .with_client_auth_cert(chain.clone(), identity.key())?;
        client.alpn_protocols = vec![ALPN_PAGES.to_vec()];
        harden(&mut client);
        let mut server = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])?
            .with_client_cert_verifier(client_verifier.clone())
            .with_single_cert(chain, identity.key())?;
        server.alpn_protocols = vec![ALPN_PAGES.to_vec()];
        server.send_tls13_tickets = 1; // what `Channel::connect` waits for
        Ok(Self {
            name: identity.name().to_owned(),
            not_after: identity.not_after(),
            client: Arc::new(client),
            server: Arc::new(server),
            server_verifier,
            client_verifier,
        })
    }

    /// Verifies a peer's chain again, as of now.
    pub(crate) fn verify(
        &self,
        peer_is_server: bool,
        chain: &[CertificateDer<'_>],
    ) -> Result<(), rustls::Error> {
        let (leaf, rest) = chain.split_first().ok_or(rustls::Error::NoCertificatesPresented)?;
        let now = UnixTime::now();
        if peer_is_server {
            let name = server_name(HOST_ROLE);
            self.server_verifier.verify_server_cert(leaf, rest, &name, &[], now).map(drop)
        } else {
            self.client_verifier.verify_client_cert(leaf, rest, now).map(drop)
        }
    }
}

pub(crate) fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// # Panics
/// Not for the names of this crate.
pub(crate) fn server_name(role: &'static str) -> ServerName<'static> {
    ServerName::try_from(role).expect("a role is a DNS name")
}

/// Names are fixed, so there is nothing to tell by SNI, and a cache of sessions by name would mix
/// hosts.
pub(crate) fn harden(client: &mut ClientConfig) {
    client.enable_sni = false;
    client.resumption = rustls::client::Resumption::disabled();
}

pub(crate) fn server_verifier(
    roots: Arc<RootCertStore>,
    crls: Vec<CertificateRevocationListDer<'static>>,
) -> Result<Arc<WebPkiServerVerifier>, Error> {
    WebPkiServerVerifier::builder_with_provider(roots, provider())
        .with_crls(crls)
        .allow_unknown_revocation_status() // which is that of CAs without a list
        .build()
        .map_err(|error| Error::Crypto { what: error.to_string() })
}

pub(crate) fn client_verifier(
    roots: Arc<RootCertStore>,
    crls: Vec<CertificateRevocationListDer<'static>>,
    anonymous: bool,
) -> Result<Arc<dyn ClientCertVerifier>, Error> {
    let builder = WebPkiClientVerifier::builder_with_provider(roots, provider())
        .with_crls(crls)
        .allow_unknown_revocation_status();
    let builder = if anonymous { builder.allow_unauthenticated() } else { builder };
    builder.build().map_err(|error| Error::Crypto { what: error.to_string() })
}
