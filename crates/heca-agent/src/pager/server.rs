//! The pager as a process of its own: reports to its agent, answers on a unix socket.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use axum::extract::State;
use axum::routing::{get, post};
use axum::{Json, Router};
use heca_api::{ApiError, PagerState, PagerStats, Resize, SponsorAddress};
use heca_sys::confine::{self, FOREIGN, PAGER, Profile};

use super::{PagerConfig, PagerHandle, start};
use crate::rest::Failure;

type Shared = Arc<PagerHandle>;

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
    let outcome = start(config);
    // Attaching needs calls that are never needed again.
    if let Err(error) = confine::no_new_privs().and_then(|()| confine::seccomp(Profile::Serve)) {
        tracing::warn!(%error, "system calls are not restricted");
    }
    let state = match &outcome {
        Ok(_) => PagerState::Ready,
        Err(error) => PagerState::Failed { error: error.clone() },
    };
    let mut line = serde_json::to_vec(&state).expect("plain data can be written as JSON");
    line.push(b'\n');
    let mut out = std::io::stdout().lock();
    let told = out.write_all(&line).and_then(|()| out.flush());
    drop(out);
    let handle = Arc::new(outcome?);
    if let Err(error) = told {
        tracing::warn!(%error, "the agent does not listen");
    }
    let served = run_server(&handle, socket);
    if let Err(error) = served {
        // Without its socket the pager still serves the guest.
        tracing::error!(%error, "no control socket");
    }
    let _ = handle.ended().recv();
    let _ = std::fs::remove_file(socket);
    let Ok(handle) = Arc::try_unwrap(handle) else { return Ok(()) };
    if let Some(stats) = handle.finish() {
        let bytes = serde_json::to_vec(&stats).expect("plain data can be written as JSON");
        // The directory is gone if the agent cleaned up already.
        let _ = std::fs::write(last, bytes);
    }
    Ok(())
}

fn run_server(handle: &Shared, socket: &Path) -> std::io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let _ = std::fs::remove_file(socket);
        let listener = tokio::net::UnixListener::bind(socket)?;
        let app = Router::new()
            .route("/v1/stats", get(stats))
            .route("/v1/resize", post(resize))
            .route("/v1/sponsors", post(add_sponsor))
            .route("/metrics", get(metrics))
            .with_state(handle.clone());
        let ended = handle.ended().clone();
        let end = async move {
            // The channel never carries a value: it disconnects when the engine ends.
            let _ = tokio::task::spawn_blocking(move || ended.recv()).await;
        };
        tokio::select! {
            served = axum::serve(listener, app) => served,
            () = end => Ok(()),
        }
    })
}

async fn current(handle: Shared) -> Result<PagerStats, Failure> {
    let stats = tokio::task::spawn_blocking(move || handle.stats()).await;
    stats.ok().flatten().ok_or_else(|| ApiError::new("pager-ended", "the pager is ending").into())
}

async fn stats(State(handle): State<Shared>) -> Result<Json<PagerStats>, Failure> {
    Ok(Json(current(handle).await?))
}

async fn metrics(State(handle): State<Shared>) -> Result<String, Failure> {
    let mut text = crate::metrics::Text::default();
    text.pager(&current(handle).await?);
    Ok(text.finish())
}

async fn add_sponsor(
    State(handle): State<Shared>,
    Json(sponsor): Json<SponsorAddress>,
) -> Result<Json<()>, Failure> {
    handle.add_sponsor(&sponsor)?;
    Ok(Json(()))
}

async fn resize(
    State(handle): State<Shared>,
    Json(resize): Json<Resize>,
) -> Result<Json<()>, Failure> {
    handle.resize(resize.local)?;
    Ok(Json(()))
}
