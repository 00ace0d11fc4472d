//! The pager as a process of its own: reports to its agent, answers on a unix socket.

use std::io::Write;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::extract::State;
use axum::routing::{get, post};
use axum::{Json, Router};
use heca_api::{
    ApiError, ExportInfo, ExportRequest, ExportStage, Flush, ImportInfo, Look, PagerState,
    PagerStats, Release, Resize, SponsorAddress, Written,
};
use heca_core::pager::Event;
use heca_sys::confine::{self, FOREIGN, PAGER, Profile};

use super::engine::Message;
use super::handover::export::{self, Export, Follower};
use super::handover::import::Importer;
use super::remote::lock;
use super::{Destination, PagerConfig, PagerHandle, start};
use crate::migrate::RegionInfo;
use crate::rest::Failure;

/// What a pager process is: its own pager, or one that is to come, or what is left of one.
struct Server {
    handle: Option<PagerHandle>,
    importer: Option<Arc<Importer>>,
    export: Mutex<Option<Arc<Export>>>,
    follower: Option<Follower>,
}

type Shared = Arc<Server>;

impl Server {
    fn start(config: &PagerConfig) -> Result<(Self, Option<SocketAddr>), ApiError> {
        let mut server =
            Self { handle: None, importer: None, export: Mutex::default(), follower: None };
        let mut address = None;
        if config.follow.is_some() {
            server.follower = Some(export::follow(config)?);
        } else if config.import.is_some() && !config.resume {
            let (importer, listens) = Importer::start(config)?;
            server.importer = Some(importer);
            address = Some(listens);
        } else {
            let handle = start(config)?;
            match (&config.import, handle.behind.clone()) {
                (Some(_), Some(behind)) => {
                    server.importer = Some(Importer::again(config, behind, handle)?);
                }
                _ => server.handle = Some(handle),
            }
        }
        Ok((server, address))
    }

    /// The pager, if it serves faults by now.
    fn pager(&self) -> Option<&PagerHandle> {
        self.handle.as_ref().or_else(|| self.importer.as_ref()?.handle())
    }

    fn needs_pager(&self) -> Result<&PagerHandle, ApiError> {
        self.pager().ok_or_else(|| ApiError::new("no-pager", "this process serves no faults (yet)"))
    }

    fn importer(&self) -> Result<&Arc<Importer>, ApiError> {
        let none = || ApiError::new("no-import", "this VM does not come from another host");
        self.importer.as_ref().ok_or_else(none)
    }

    fn export(&self) -> Result<Arc<Export>, ApiError> {
        let none = || ApiError::new("no-export", "this VM goes to no other host");
        lock(&self.export).clone().ok_or_else(none)
    }

    /// Waits until there is nothing to be done any more.
    fn wait(&self, pid: i32) {
        let pidfd = heca_sys::process::open_pidfd(pid);
        loop {
            if let Some(pager) = self.pager() {
                let _ = pager.ended().recv();
                return;
            }
            if let Some(follower) = &self.follower {
                if follower.info().stage == ExportStage::Done {
                    // Until the agent has seen it.
                    std::thread::sleep(Duration::from_secs(5));
                    return;
                }
                std::thread::sleep(Duration::from_millis(100));
                continue;
            }
            if self.importer.as_ref().is_some_and(|importer| importer.has_failed()) {
                return;
            }
            match &pidfd {
                Ok(pidfd) if !super::pidfd_ends(pidfd, Duration::from_millis(100)) => {}
                // QEMU ended before its memory came.
                _ => return,
            }
        }
    }

    fn finish(self) -> Option<PagerStats> {
        let importer = self.importer.and_then(|importer| {
            // Its threads hold it until their connections are gone.
            importer.end_session();
            let mut importer = importer;
            for _ in 0..100 {
                match Arc::try_unwrap(importer) {
                    Ok(importer) => return Some(importer),
                    Err(held) => importer = held,
                }
                std::thread::sleep(Duration::from_millis(10));
            }
            None
        });
        self.handle.or_else(|| importer?.into_handle())?.finish()
    }
}

/// Serves the page faults of one process until it ends. Tells on standard output, in one line of
/// JSON, whether it could begin. When the process ended the last figures are written to `last`.
///
/// # Errors
/// Whatever kept the pager from beginning (reported on standard output, too).
pub fn serve(config: &PagerConfig, socket: &Path, last: &Path) -> Result<(), ApiError> {
    // The guest would stand still without this process: it ends with the guest, not by a signal.
    heca_sys::process::ignore_endings();
    super::protect_process();
    if let Err(error) = confine::drop_capabilities(PAGER | FOREIGN) {
        tracing::warn!(%error, "privileges are not reduced");
    }
    let outcome = Server::start(config);
    // Attaching needs calls that are never needed again.
    if let Err(error) = confine::no_new_privs().and_then(|()| confine::seccomp(Profile::Serve)) {
        tracing::warn!(%error, "system calls are not restricted");
    }
    let state = match &outcome {
        Ok((_, listens)) => PagerState::Ready { listens: listens.map(|a| a.to_string()) },
        Err(error) => PagerState::Failed { error: error.clone() },
    };
    let mut line = serde_json::to_vec(&state).expect("plain data can be written as JSON");
    line.push(b'\n');
    let mut out = std::io::stdout().lock();
    let told = out.write_all(&line).and_then(|()| out.flush());
    drop(out);
    let server = Arc::new(outcome?.0);
    if let Err(error) = told {
        tracing::warn!(%error, "the agent does not listen");
    }
    let served = run_server(&server, config.pid, socket);
    if let Err(error) = served {
        // Without its socket the pager still serves the guest.
        tracing::error!(%error, "no control socket");
    }
    server.wait(config.pid);
    let _ = std::fs::remove_file(socket);
    let Ok(server) = Arc::try_unwrap(server) else { return Ok(()) };
    if let Some(stats) = server.finish() {
        let bytes = serde_json::to_vec(&stats).expect("plain data can be written as JSON");
        // The directory is gone if the agent cleaned up already.
        let _ = std::fs::write(last, bytes);
    }
    Ok(())
}

fn run_server(server: &Shared, pid: i32, socket: &Path) -> std::io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let _ = std::fs::remove_file(socket);
        let listener = tokio::net::UnixListener::bind(socket)?;
        let app = Router::new()
            .route("/v1/stats", get(stats))
            .route("/v1/resize", post(resize))
            .route("/v1/sponsors", post(add_sponsor))
            .route("/v1/region", get(region))
            .route("/v1/flush", post(flush))
            .route("/v1/export", get(export_info).post(export_start))
            .route("/v1/export/look", post(export_look))
            .route("/v1/export/switch", post(export_switch))
            .route("/v1/export/release", post(export_release))
            .route("/v1/export/abort", post(export_abort))
            .route("/v1/import", get(import_info))
            .route("/v1/import/commit", post(import_commit))
            .route("/metrics", get(metrics))
            .with_state(server.clone());
        let server = server.clone();
        let end = async move {
            let _ = tokio::task::spawn_blocking(move || server.wait(pid)).await;
        };
        tokio::select! {
            served = axum::serve(listener, app) => served,
            () = end => Ok(()),
        }
    })
}

/// Runs work that waits for other threads away from the one that serves requests.
async fn blocking<T: Send + 'static>(
    server: Shared,
    work: impl FnOnce(&Server) -> Result<T, ApiError> + Send + 'static,
) -> Result<Json<T>, Failure> {
    match tokio::task::spawn_blocking(move || work(&server)).await {
        Ok(outcome) => Ok(Json(outcome?)),
        Err(error) => Err(ApiError::new("internal", "the pager failed on this request")
            .detail(error.to_string())
            .into()),
    }
}

async fn region(State(server): State<Shared>) -> Result<Json<RegionInfo>, Failure> {
    Ok(Json(server.needs_pager()?.region_info()))
}

async fn flush(
    State(server): State<Shared>,
    Json(flush): Json<Flush>,
) -> Result<Json<()>, Failure> {
    server.needs_pager()?.send(Message::Event(Event::Flush { on: flush.on }));
    Ok(Json(()))
}

async fn export_info(State(server): State<Shared>) -> Result<Json<ExportInfo>, Failure> {
    if let Some(follower) = &server.follower {
        return Ok(Json(follower.info()));
    }
    Ok(Json(server.export()?.info()))
}

async fn export_start(
    State(server): State<Shared>,
    Json(request): Json<ExportRequest>,
) -> Result<Json<()>, Failure> {
    blocking(server, move |server| {
        let pager = server.needs_pager()?;
        let ExportRequest { address, ticket, epoch, bytes_per_s } = request;
        let to = Destination { address, ticket };
        let started = Export::start(pager, to, (epoch, bytes_per_s))?;
        *lock(&server.export) = Some(Arc::new(started));
        Ok(())
    })
    .await
}

async fn export_look(
    State(server): State<Shared>,
    Json(look): Json<Look>,
) -> Result<Json<Written>, Failure> {
    blocking(server, move |server| {
        let pages = server.export()?.look(server.needs_pager()?, look.send)?;
        Ok(Written { pages })
    })
    .await
}

async fn export_switch(State(server): State<Shared>) -> Result<Json<ExportInfo>, Failure> {
    blocking(server, move |server| {
        let export = server.export()?;
        export.switch(server.needs_pager()?)?;
        Ok(export.info())
    })
    .await
}

async fn export_release(
    State(server): State<Shared>,
    Json(release): Json<Release>,
) -> Result<Json<()>, Failure> {
    let export = server.export()?;
    if release.at_once {
        export.release_now()
    } else {
        export.release()
    }
    Ok(Json(()))
}

async fn export_abort(State(server): State<Shared>) -> Result<Json<()>, Failure> {
    let pager = server.needs_pager()?;
    pager.send(Message::Event(Event::Flush { on: false }));
    if let Some(export) = lock(&server.export).take() {
        export.abort(pager);
    }
    Ok(Json(()))
}

async fn import_info(State(server): State<Shared>) -> Result<Json<ImportInfo>, Failure> {
    let Some(importer) = &server.importer else {
        // Nothing was behind when this pager began.
        let pager = server.needs_pager()?;
        let behind_pages = Some(pager.behind.as_ref().map_or(0, |behind| behind.left()));
        return Ok(Json(ImportInfo { received_pages: 0, behind_pages, done: true }));
    };
    Ok(Json(ImportInfo {
        received_pages: importer.received(),
        behind_pages: importer.behind(),
        done: importer.is_done(),
    }))
}

async fn import_commit(State(server): State<Shared>) -> Result<Json<()>, Failure> {
    blocking(server, |server| server.importer()?.commit()).await
}

async fn current(server: Shared) -> Result<PagerStats, Failure> {
    let stats = blocking(server, |server| {
        let ended = || ApiError::new("pager-ended", "the pager is ending");
        server.needs_pager()?.stats().ok_or_else(ended)
    });
    Ok(stats.await?.0)
}

async fn stats(State(server): State<Shared>) -> Result<Json<PagerStats>, Failure> {
    Ok(Json(current(server).await?))
}

async fn metrics(State(server): State<Shared>) -> Result<String, Failure> {
    let mut text = crate::metrics::Text::default();
    text.pager(&current(server).await?);
    Ok(text.finish())
}

async fn add_sponsor(
    State(server): State<Shared>,
    Json(sponsor): Json<SponsorAddress>,
) -> Result<Json<()>, Failure> {
    server.needs_pager()?.add_sponsor(&sponsor)?;
    Ok(Json(()))
}

async fn resize(
    State(server): State<Shared>,
    Json(resize): Json<Resize>,
) -> Result<Json<()>, Failure> {
    server.needs_pager()?.resize(resize.local)?;
    Ok(Json(()))
}
