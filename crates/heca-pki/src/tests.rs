//! Hosts that join, talk, and are refused, over localhost.

mod channel;
mod identity;

use std::io;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, SystemTime};

use tempfile::TempDir;

use crate::host::Info;
use crate::{Channel, EnrolServer, HostIdentity, Pool, TlsContext, TlsError, join};

const SECOND: Duration = Duration::from_secs(1);
const HOUR: Duration = Duration::from_secs(3600);

/// A pool, its enrolment server, and room for hosts.
struct Lab {
    dir: TempDir,
    pool: Pool,
    server: EnrolServer,
}

impl Lab {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let pool = Pool::init(&dir.path().join("pool"), "lab").unwrap();
        let server = EnrolServer::start(&dir.path().join("pool"), "127.0.0.1:0").unwrap();
        Self { dir, pool, server }
    }

    fn address(&self) -> String {
        self.server.local_addr().to_string()
    }

    fn host_dir(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn join(&self, name: &str) -> TlsContext {
        let token = self.pool.token(&self.address(), HOUR, None).unwrap();
        TlsContext::new(&join(&token, name, &self.host_dir(name)).unwrap()).unwrap()
    }

    /// A host that joined so many days ago.
    fn join_in_the_past(&self, name: &str, days: u64) -> TlsContext {
        let token = self.pool.token(&self.address(), HOUR, None).unwrap();
        let key = crate::pool::new_key().unwrap();
        let csr = rcgen::CertificateParams::default().serialize_request(&*key).unwrap();
        let now = crate::util::unix(SystemTime::now()) - days * 86_400;
        let cert = self.pool.redeem_at(token.secret(), &csr.pem().unwrap(), name, now).unwrap();
        let info = Info { name: name.to_owned(), pool_id: cert.pool_id, address: self.address() };
        let dir = self.host_dir(name);
        let identity = HostIdentity::store(&dir, info, &key.serialize_pem(), &cert).unwrap();
        TlsContext::new(&identity).unwrap()
    }
}

/// A client's and a server's end of a TCP connection.
fn tcp() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (client, listener.accept().unwrap().0)
}

/// What a handshake gives on both sides.
fn shake(client: &TlsContext, server: &TlsContext) -> (io::Result<Channel>, io::Result<Channel>) {
    let (a, b) = tcp();
    let server = server.clone();
    let accepting = thread::spawn(move || Channel::accept(b, &server, 5 * SECOND));
    (Channel::connect(a, client, 5 * SECOND), accepting.join().unwrap())
}

fn talk(client: &TlsContext, server: &TlsContext) -> (Channel, Channel) {
    let (a, b) = shake(client, server);
    let (a, b) = (a.unwrap(), b.unwrap());
    assert_eq!((a.peer_name(), b.peer_name()), (Some(&*server.name()), Some(&*client.name())));
    (a, b)
}

/// Why client and server did not talk.
fn refusal(client: &TlsContext, server: &TlsContext) -> (TlsError, TlsError) {
    let (a, b) = shake(client, server);
    (reason(a), reason(b))
}

fn reason<T>(result: io::Result<T>) -> TlsError {
    let error = result.err().expect("refused");
    error.get_ref().and_then(|e| e.downcast_ref::<TlsError>()).expect("a TLS error").clone()
}

fn copy(from: &Path, to: &Path, files: &[&str]) {
    std::fs::create_dir_all(to).unwrap();
    for file in files {
        std::fs::copy(from.join(file), to.join(file)).unwrap();
    }
}
