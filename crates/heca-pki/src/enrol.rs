//! The enrolment protocol: how a host joins a pool and keeps its certificate fresh.
//!
//! Over TLS 1.3, one request and one answer per connection, each a 4-byte little-endian length
//! and JSON.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rcgen::{CertificateParams, KeyPair};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::version::TLS13;
use rustls::{
    CertificateError, ClientConfig, ClientConnection, DigitallySignedStruct, RootCertStore,
    ServerConfig, ServerConnection, SignatureScheme,
};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::host::Info;
use crate::pool::new_key;
use crate::tls::{ALPN_ENROL, client_verifier, harden, provider, server_name, server_verifier};
use crate::util::{check_host_name, parse_pem, sha256};
use crate::{Channel, Error, HostIdentity, IssuedCert, JoinToken, POOL_ROLE, Pool};

/// For each of: connecting, handshake, request, answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// Connections served at a time; more are closed at once.
const CONNECTIONS_MAX: usize = 64;
/// Bytes.
const REQUEST_MAX: usize = 64 * 1024;
/// Bytes. Revocation lists grow.
const ANSWER_MAX: usize = 4 * 1024 * 1024;

#[derive(Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case")]
enum Request {
    /// With a token; the client has no certificate.
    Join { secret: Zeroizing<String>, name: String, csr_pem: String },
    /// With a certificate, whose host gets another.
    Renew { csr_pem: String },
    /// From anybody.
    Crl {},
}

#[derive(Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "kebab-case")]
enum Answer {
    Cert(IssuedCert),
    Trust { ca_pem: String, crl_pem: String },
    Refused { text: String },
}

/// Answers hosts that join or renew, in threads of its own, until dropped.
#[derive(Debug)]
pub struct EnrolServer {
    listener: Arc<TcpListener>,
    address: SocketAddr,
    thread: Option<JoinHandle<()>>,
}

impl EnrolServer {
    /// Serves the pool in `pool_dir` at `address` (`HOST:PORT`; port 0 picks a free one).
    ///
    /// # Errors
    /// If there is no usable pool in the directory, or the address is not free.
    pub fn start(pool_dir: &Path, address: &str) -> io::Result<Self> {
        let pool = Pool::open(pool_dir).map_err(io::Error::other)?;
        pool.issue_server().map_err(io::Error::other)?; // so that a lost key is noticed now
        let listener = Arc::new(TcpListener::bind(address)?);
        let address = listener.local_addr()?;
        let accepting = listener.clone();
        let thread = thread::Builder::new()
            .name("enrol".to_owned())
            .spawn(move || accept_loop(&accepting, &pool))?;
        Ok(Self { listener, address, thread: Some(thread) })
    }

    /// Where it listens.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for EnrolServer {
    fn drop(&mut self) {
        // Linux wakes an accept by this. Connections end by themselves, soon.
        let _ = rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn accept_loop(listener: &TcpListener, pool: &Pool) {
    let active = Arc::new(AtomicUsize::new(0));
    loop {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => return, // shut down
            Err(_) => {
                thread::sleep(Duration::from_millis(50)); // out of descriptors, perhaps
                continue;
            }
        };
        if active.fetch_add(1, Ordering::Relaxed) >= CONNECTIONS_MAX {
            active.fetch_sub(1, Ordering::Relaxed);
            continue;
        }
        let (slot, pool) = (Slot(active.clone()), pool.clone());
        // A thread that cannot be made gives its slot back, too: it drops the closure.
        let _ = thread::Builder::new().name("enrol-peer".to_owned()).spawn(move || {
            let _slot = slot;
            let _ = serve(stream, &pool); // the peer's trouble, and told to the peer
        });
    }
}

/// One of the connections served at a time.
struct Slot(Arc<AtomicUsize>);

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn serve(stream: TcpStream, pool: &Pool) -> io::Result<()> {
    let config = server_config(pool).map_err(io::Error::other)?;
    let connection = ServerConnection::new(Arc::new(config)).map_err(io::Error::other)?;
    let mut channel = Channel::handshake(stream, connection.into(), ALPN_ENROL, PATIENCE)?;
    let request = receive(&mut channel, REQUEST_MAX)?;
    let answer = match serde_json::from_slice::<Request>(&request) {
        Ok(request) => answer(pool, channel.peer_name(), request),
        Err(error) => Err(Error::Request { what: error.to_string() }),
    };
    let answer = answer.unwrap_or_else(|error| Answer::Refused { text: error.to_string() });
    send(&mut channel, &answer)?;
    channel.close();
    Ok(())
}

fn answer(pool: &Pool, peer: Option<&str>, request: Request) -> Result<Answer, Error> {
    Ok(match request {
        Request::Join { secret, name, csr_pem } => {
            let secret = STANDARD.decode(secret.as_bytes()).map(Zeroizing::new);
            let secret = secret.map_err(|_| Error::TokenUnknown)?;
            Answer::Cert(pool.redeem(&secret, &csr_pem, &name)?)
        }
        Request::Renew { csr_pem } => {
            let what = "renewing needs the host's present certificate; join again".to_owned();
            let peer = peer.ok_or(Error::Request { what })?;
            Answer::Cert(pool.renew(peer, &csr_pem)?)
        }
        Request::Crl {} => {
            let (ca_pem, crl_pem) = pool.trust()?;
            Answer::Trust { ca_pem, crl_pem }
        }
    })
}

/// Made for each connection: CAs, revocations and the certificate are always the present ones.
fn server_config(pool: &Pool) -> Result<ServerConfig, Error> {
    let (ca_pem, crl_pem) = pool.trust()?;
    let mut roots = RootCertStore::empty();
    for ca in parse_pem(&ca_pem, Path::new("ca.pem"))? {
        roots.add(ca)?;
    }
    let crls = parse_pem(&crl_pem, Path::new("crl.pem"))?;
    let verifier = client_verifier(Arc::new(roots), crls, true)?;
    let (chain, key) = pool.issue_server()?;
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, PrivatePkcs8KeyDer::from(key.to_vec()).into())?;
    config.alpn_protocols = vec![ALPN_ENROL.to_vec()];
    config.send_tls13_tickets = 1;
    Ok(config)
}

/// Joins the pool that a token is of, as `host_name`, and writes the identity to `dir`. The
/// private key is made here and stays here.
///
/// # Errors
/// [`Error::Name`], [`Error::Network`], [`Error::Refused`] with the pool's reason, [`Error::Io`].
pub fn join(token: &JoinToken, host_name: &str, dir: &Path) -> Result<HostIdentity, Error> {
    check_host_name(host_name)?;
    crate::util::make_dir(dir)?; // before the token is used up
    let verifier = Pinned { fingerprint: *token.fingerprint() };
    let config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    let (key, csr_pem) = request_for(host_name)?;
    let secret = Zeroizing::new(STANDARD.encode(token.secret()));
    let request = Request::Join { secret, name: host_name.to_owned(), csr_pem };
    let cert = ask_cert(token.address(), config, &request)?;
    let info = Info {
        name: host_name.to_owned(),
        pool_id: cert.pool_id,
        address: token.address().to_owned(),
    };
    HostIdentity::store(dir, info, &Zeroizing::new(key.serialize_pem()), &cert)
}

/// Gets a new certificate, for a new key, for the host whose identity is in `dir`.
///
/// # Errors
/// [`Error::Network`] (also if the present certificate is expired or revoked),
/// [`Error::Refused`], [`Error::Io`].
pub fn renew(dir: &Path) -> Result<HostIdentity, Error> {
    let identity = HostIdentity::load(dir)?;
    let config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .with_webpki_verifier(server_verifier(
            Arc::new(identity.roots.clone()),
            identity.crls.clone(),
        )?)
        .with_client_auth_cert(identity.chain.clone(), identity.key())?;
    let (key, csr_pem) = request_for(identity.name())?;
    let cert = ask_cert(identity.address(), config, &Request::Renew { csr_pem })?;
    let info = identity.info().clone();
    HostIdentity::store(dir, info, &Zeroizing::new(key.serialize_pem()), &cert)
}

/// Gets the pool's present CA certificates and revocation lists for the identity in `dir`. Do
/// this often: it is how a host learns of revocations.
///
/// # Errors
/// [`Error::Network`], [`Error::Refused`], [`Error::Io`].
pub fn fetch_crl(dir: &Path) -> Result<HostIdentity, Error> {
    let identity = HostIdentity::load(dir)?;
    let address = identity.address();
    let config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .with_webpki_verifier(server_verifier(Arc::new(identity.roots.clone()), Vec::new())?)
        .with_no_client_auth();
    match ask(address, config, &Request::Crl {})? {
        Answer::Trust { ca_pem, crl_pem } => {
            let _lock = crate::util::lock(dir)?;
            HostIdentity::store_trust(dir, &ca_pem, &crl_pem)?;
        }
        _ => return Err(nonsense(address)),
    }
    HostIdentity::load(dir)
}

fn request_for(name: &str) -> Result<(Zeroizing<KeyPair>, String), Error> {
    let key = new_key()?;
    let csr = CertificateParams::new(vec![name.to_owned()])?.serialize_request(&*key)?.pem()?;
    Ok((key, csr))
}

fn ask_cert(address: &str, config: ClientConfig, request: &Request) -> Result<IssuedCert, Error> {
    match ask(address, config, request)? {
        Answer::Cert(cert) => Ok(cert),
        _ => Err(nonsense(address)),
    }
}

fn nonsense(address: &str) -> Error {
    let source = io::Error::new(io::ErrorKind::InvalidData, "it answered nonsense");
    Error::Network { address: address.to_owned(), source }
}

fn ask(address: &str, mut config: ClientConfig, request: &Request) -> Result<Answer, Error> {
    config.alpn_protocols = vec![ALPN_ENROL.to_vec()];
    harden(&mut config);
    let exchange = || {
        let stream = connect(address)?;
        let connection = ClientConnection::new(Arc::new(config), server_name(POOL_ROLE));
        let connection = connection.map_err(io::Error::other)?;
        let mut channel = Channel::handshake(stream, connection.into(), ALPN_ENROL, PATIENCE)?;
        send(&mut channel, request)?;
        Ok(serde_json::from_slice(&receive(&mut channel, ANSWER_MAX)?)?)
    };
    match exchange() {
        Ok(Answer::Refused { text }) => Err(Error::Refused { address: address.to_owned(), text }),
        Ok(answer) => Ok(answer),
        Err(source) => Err(Error::Network { address: address.to_owned(), source }),
    }
}

fn connect(address: &str) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in address.to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, PATIENCE) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn send(channel: &mut Channel, message: &impl Serialize) -> io::Result<()> {
    let json = Zeroizing::new(serde_json::to_vec(message)?);
    let length = u32::try_from(json.len()).map_err(io::Error::other)?;
    let deadline = Instant::now() + PATIENCE;
    channel.send_all(&length.to_le_bytes(), deadline)?;
    channel.send_all(&json, deadline)
}

fn receive(channel: &mut Channel, max: usize) -> io::Result<Zeroizing<Vec<u8>>> {
    let deadline = Instant::now() + PATIENCE;
    let mut length = [0; 4];
    channel.recv_all(&mut length, deadline)?;
    let length = u32::from_le_bytes(length) as usize;
    if length > max {
        let text = format!("a message of {length} bytes, more than {max}");
        return Err(io::Error::new(io::ErrorKind::InvalidData, text));
    }
    let mut message = Zeroizing::new(vec![0; length]);
    channel.recv_all(&mut message, deadline)?;
    Ok(message)
}

/// Trusts the one CA of a fingerprint, which the server has to send along.
#[derive(Debug)]
struct Pinned {
    fingerprint: [u8; 32],
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        chain: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let pinned = chain.iter().find(|cert| sha256(cert) == self.fingerprint);
        let pinned = pinned.ok_or(CertificateError::UnknownIssuer)?;
        let mut roots = RootCertStore::empty();
        roots.add(pinned.clone().into_owned())?;
        server_verifier(Arc::new(roots), Vec::new())
            .map_err(|error| rustls::Error::General(error.to_string()))?
            .verify_server_cert(leaf, chain, name, ocsp, now)
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2 is not spoken".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let schemes = provider().signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, signature, &schemes)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}
