//! The host daemon.

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use heca_api::ApiError;
use heca_types::ByteSize;
use heca_types::limits::{
    DETECT_MS_DEFAULT, REBUILD_AFTER_MS_DEFAULT, REBUILD_BYTES_PER_S_DEFAULT,
};
use tokio::net::{TcpListener, UnixListener};
use tokio::signal::unix::{SignalKind, signal};

use crate::link::Security;
use crate::migrate;
use crate::pressure;
use crate::rest;
use crate::sponsor::SponsorServer;
use crate::store::Store;
use crate::vm::VmManager;

/// Settings of an agent.
#[derive(Debug, Clone)]
pub struct AgentConfig {
    /// Directory of its socket and of its VMs' logs.
    pub run_dir: PathBuf,
    /// Directory on tmpfs for guest RAM and sponsored pages.
    pub memory_dir: PathBuf,
    /// Bytes to sponsor; zero for none.
    pub offer: ByteSize,
    /// Where the sponsor listens.
    pub listen: String,
    /// Where metrics are served over TCP, if anywhere.
    pub metrics: Option<String>,
    /// How long sponsor threads and pagers poll before they sleep.
    pub spin: Duration,
    /// Lease that pagers of this host ask for, in milliseconds.
    pub lease_ms: u64,
    /// Directory of the host's identity in a pool; without one, connections are plaintext.
    pub identity: Option<PathBuf>,
    /// Memory of the host below which the sponsor gives extents back; zero for never.
    pub keep_free: ByteSize,
    /// How pagers of this host deal with sponsors that fail.
    pub failover: Failover,
    /// Where VMs of other hosts are taken in, if anywhere.
    pub migration_listen: Option<String>,
}

/// Times and bounds of failover and rebuild.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Failover {
    /// Time without a sign of life after which a sponsor counts as dead, in milliseconds.
    pub detect_ms: u64,
    /// Time that a sponsor may be away before its extents go elsewhere, in milliseconds.
    pub rebuild_after_ms: u64,
    /// Bound of the traffic of rebuilding one VM's memory, in bytes a second.
    pub rebuild_bytes_per_s: u64,
}

impl Default for Failover {
    fn default() -> Self {
        Self {
            detect_ms: DETECT_MS_DEFAULT,
            rebuild_after_ms: REBUILD_AFTER_MS_DEFAULT,
            rebuild_bytes_per_s: REBUILD_BYTES_PER_S_DEFAULT,
        }
    }
}

/// A running agent.
#[derive(Debug)]
pub struct Agent {
    sponsor: Option<SponsorServer>,
    vms: Arc<VmManager>,
    migration: Option<SocketAddr>,
    security: Security,
    upgrade: tokio::sync::Notify,
}

impl Agent {
    /// The sponsor, if memory is on offer.
    #[must_use]
    pub fn sponsor(&self) -> Option<&SponsorServer> {
        self.sponsor.as_ref()
    }

    /// Name of the host in its pool.
    #[must_use]
    pub fn host_name(&self) -> Option<String> {
        match &self.security {
            Security::Plaintext => None,
            Security::Tls(tls) => Some(tls.name()),
        }
    }

    /// Replaces the pagers' programs, and then this one's, by another build. VMs go on.
    ///
    /// # Errors
    /// A program that cannot be run.
    pub fn upgrade(&self, program: &Path) -> Result<(), ApiError> {
        let version = std::process::Command::new(program).arg("--version").output();
        let runs = version.as_ref().is_ok_and(|output| output.status.success());
        if !runs {
            let text = format!("{} cannot be run", program.display());
            let detail = match version {
                Ok(output) => String::from_utf8_lossy(&output.stderr).trim().to_owned(),
                Err(error) => error.to_string(),
            };
            return Err(ApiError::new("bad-program", text).detail(detail));
        }
        self.vms.replace_pagers(program)?;
        self.upgrade.notify_one();
        Ok(())
    }

    /// Where VMs of other hosts are taken in.
    #[must_use]
    pub fn migration_address(&self) -> Option<SocketAddr> {
        self.migration
    }

    /// The host's VMs.
    #[must_use]
    pub fn vms(&self) -> &Arc<VmManager> {
        &self.vms
    }
}

const PRESSURE_PERIOD: Duration = Duration::from_millis(500);
/// How often the identity is looked after, and how often while that fails.
const IDENTITY_PERIOD: Duration = Duration::from_secs(600);

/// Renews the host's certificate in time, and fetches who was revoked.
fn keep_identity(tls: heca_pki::TlsContext, dir: PathBuf) {
    let keep = move || loop {
        let identity = heca_pki::HostIdentity::load(&dir).and_then(|identity| {
            if identity.needs_renewal(std::time::SystemTime::now()) {
                heca_pki::renew(&dir)
            } else {
                heca_pki::fetch_crl(&dir)
            }
        });
        match identity.and_then(|_| tls.reload()) {
            Ok(()) => tracing::debug!("identity is up to date"),
            // It stays valid for days: the pool's enrolment service may be away for a while.
            Err(error) => tracing::warn!("identity not refreshed: {error}"),
        }
        std::thread::sleep(IDENTITY_PERIOD);
    };
    if let Err(error) = std::thread::Builder::new().name("identity".into()).spawn(keep) {
        tracing::error!(%error, "the identity will not be renewed");
    }
}

/// Becomes another program, with the same arguments and the same process id.
fn become_program(program: &Path) -> anyhow::Error {
    use std::os::unix::process::CommandExt;
    tracing::info!(program = %program.display(), "becoming another program");
    let error = std::process::Command::new(program).args(std::env::args_os().skip(1)).exec();
    anyhow::Error::new(error).context(format!("run {}", program.display()))
}

/// Makes a directory that only this user may enter, or sees that it is one: under a directory that
/// everybody may write to, somebody else may have been there first.
fn own_directory(dir: &Path) -> anyhow::Result<()> {
    use std::os::unix::fs::MetadataExt;
    std::fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
    let metadata = std::fs::symlink_metadata(dir)?;
    anyhow::ensure!(
        metadata.is_dir() && metadata.uid() == rustix::process::geteuid().as_raw(),
        "{} belongs to somebody else: remove it, or choose another --memory-dir",
        dir.display()
    );
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o700))?;
    Ok(())
}

/// Removes a file when dropped.
struct Removed(PathBuf);

impl Drop for Removed {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Path of an agent's socket.
#[must_use]
pub fn socket_path(run_dir: &Path) -> PathBuf {
    run_dir.join("agent.sock")
}

/// Runs an agent until it is told to end (SIGINT or SIGTERM). Then its VMs are stopped; pages that
/// it sponsors for others stay in its store for its next life.
///
/// # Errors
/// Directories, addresses or stores that cannot be used.
pub async fn run(config: AgentConfig) -> anyhow::Result<()> {
    // Before anything is made: a signal from here on ends in an orderly way.
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let run_dir = &config.run_dir;
    std::fs::create_dir_all(run_dir).with_context(|| format!("create {}", run_dir.display()))?;
    std::fs::set_permissions(run_dir, std::fs::Permissions::from_mode(0o700))?;
    let socket = socket_path(run_dir);
    if std::os::unix::net::UnixStream::connect(&socket).is_ok() {
        anyhow::bail!(
            "an agent answers at {} already; end it, or choose another --run-dir",
            socket.display()
        );
    }
    let _ = std::fs::remove_file(&socket);
    let security = Security::load(config.identity.as_deref())?;
    own_directory(&config.memory_dir)?;
    let store_dir = config.memory_dir.join("store");
    let sponsor = if config.offer.0 > 0 {
        let store = Store::open(&store_dir, config.offer)?;
        let server = SponsorServer::start(store, &config.listen, config.spin, security.clone())
            .with_context(|| format!("listen on {}", config.listen))?;
        tracing::info!(address = %server.address(), offer = %config.offer, "sponsoring memory");
        Some(server)
    } else {
        None
    };
    let _pressure = match &sponsor {
        Some(server) if config.keep_free.0 > 0 => {
            let store = server.store().clone();
            Some(pressure::spawn(store, config.keep_free.0, PRESSURE_PERIOD)?)
        }
        _ => None,
    };
    if let Security::Tls(tls) = &security {
        keep_identity(tls.clone(), config.identity.clone().unwrap_or_default());
    }
    let vms = VmManager::new(&config, security.clone())?;
    let migration = match &config.migration_listen {
        Some(address) => {
            let bound = migrate::listener::start(address, vms.clone(), security.clone())
                .with_context(|| format!("take in VMs on {address}"))?;
            tracing::info!(address = %bound, "taking in VMs of other hosts");
            Some(bound)
        }
        None => None,
    };
    let upgrade = tokio::sync::Notify::new();
    let agent = Arc::new(Agent { sponsor, vms, migration, security, upgrade });
    let listener =
        UnixListener::bind(&socket).with_context(|| format!("listen on {}", socket.display()))?;
    let _removed = Removed(socket.clone());
    std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o600))?;
    if let Some(address) = &config.metrics {
        let listener = TcpListener::bind(address)
            .await
            .with_context(|| format!("serve metrics on {address}"))?;
        let app = rest::metrics_routes(agent.clone());
        tokio::spawn(async move { axum::serve(listener, app).await });
    }
    tracing::info!(socket = %socket.display(), "agent is ready");
    let app = rest::routes(agent.clone());
    tokio::select! {
        served = axum::serve(listener, app) => served?,
        _ = terminate.recv() => tracing::info!("terminated"),
        _ = interrupt.recv() => tracing::info!("interrupted"),
        () = agent.upgrade.notified() => {
            // The answer is on its way.
            tokio::time::sleep(Duration::from_millis(200)).await;
            return Err(become_program(&agent.vms().program()));
        }
    }
    let ending = agent.clone();
    tokio::task::spawn_blocking(move || ending.vms().stop_all()).await?;
    if let Some(server) = agent.sponsor() {
        let usage = server.store().usage();
        if usage.regions == 0 {
            let _ = std::fs::remove_dir_all(&store_dir);
        } else {
            tracing::info!(
                regions = usage.regions,
                "sponsored pages stay in {} for the next start",
                store_dir.display()
            );
        }
    }
    let _ = std::fs::remove_dir(&config.memory_dir);
    Ok(())
}
