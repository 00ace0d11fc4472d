//! The host daemon.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use heca_types::ByteSize;
use tokio::net::{TcpListener, UnixListener};
use tokio::signal::unix::{SignalKind, signal};

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
}

/// A running agent.
#[derive(Debug)]
pub struct Agent {
    sponsor: Option<SponsorServer>,
    vms: VmManager,
}

impl Agent {
    /// The sponsor, if memory is on offer.
    #[must_use]
    pub fn sponsor(&self) -> Option<&SponsorServer> {
        self.sponsor.as_ref()
    }

    /// The host's VMs.
    #[must_use]
    pub fn vms(&self) -> &VmManager {
        &self.vms
    }
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
    let store_dir = config.memory_dir.join("store");
    let sponsor = if config.offer.0 > 0 {
        let store = Store::open(&store_dir, config.offer)?;
        let server = SponsorServer::start(store, &config.listen, config.spin)
            .with_context(|| format!("listen on {}", config.listen))?;
        tracing::info!(address = %server.address(), offer = %config.offer, "sponsoring memory");
        Some(server)
    } else {
        None
    };
    let vms = VmManager::new(&config)?;
    let agent = Arc::new(Agent { sponsor, vms });
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
