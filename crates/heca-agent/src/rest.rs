//! REST API of the agent.

use std::sync::Arc;

use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use heca_api::{
    AgentInfo, ApiError, Drain, MigrateRequest, MigrationInfo, Resize, ResolveMigration,
    SponsorAddress, Stop, Upgrade, VmInfo, VmRequest,
};
use heca_types::ByteSize;

use crate::agent::Agent;

/// An [`ApiError`] as an answer.
#[derive(Debug)]
pub struct Failure(ApiError);

impl From<ApiError> for Failure {
    fn from(error: ApiError) -> Self {
        Self(error)
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let status = match self.0.code.as_str() {
            "no-such-vm" | "no-migration" => StatusCode::NOT_FOUND,
            "name-taken" => StatusCode::CONFLICT,
            "internal" => StatusCode::INTERNAL_SERVER_ERROR,
            _ => StatusCode::UNPROCESSABLE_ENTITY,
        };
        (status, Json(self.0)).into_response()
    }
}

type Shared = Arc<Agent>;

/// Routes of the whole API, for the unix socket.
pub fn routes(agent: Shared) -> Router {
    Router::new()
        .route("/v1/agent", get(info))
        .route("/v1/vms", get(list).post(create))
        .route("/v1/vms/{name}", get(show))
        .route("/v1/vms/{name}/stop", post(stop))
        .route("/v1/vms/{name}/resize", post(resize))
        .route("/v1/vms/{name}/sponsors", post(add_sponsor))
        .route("/v1/vms/{name}/migrate", post(migrate))
        .route("/v1/vms/{name}/migration", get(migration))
        .route("/v1/vms/{name}/migration/cancel", post(cancel_migration))
        .route("/v1/vms/{name}/migration/resolve", post(resolve_migration))
        .route("/v1/drain", post(drain))
        .route("/v1/upgrade", post(upgrade))
        .route("/metrics", get(metrics))
        .with_state(agent)
}

/// Routes that may be reached over the network: figures only.
pub fn metrics_routes(agent: Shared) -> Router {
    Router::new().route("/metrics", get(metrics)).with_state(agent)
}

/// Runs blocking work away from the threads that serve requests. The work runs to its end even if
/// the client goes away, so that nothing is left half done.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<Json<T>, Failure> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => Ok(Json(result?)),
        Err(error) => Err(ApiError::new("internal", "the agent failed on this request")
            .detail(error.to_string())
            .into()),
    }
}

async fn info(State(agent): State<Shared>) -> Json<AgentInfo> {
    let usage = agent.sponsor().map(|server| server.store().usage());
    Json(AgentInfo {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        sponsor: agent.sponsor().map(|server| server.address().to_string()),
        offer: ByteSize(usage.map_or(0, |u| u.offer)),
        reserved: ByteSize(usage.map_or(0, |u| u.reserved)),
        stored: ByteSize(usage.map_or(0, |u| u.stored)),
        regions: usage.map_or(0, |u| u.regions),
        vms: agent.vms().names().len() as u64,
        draining: agent.sponsor().is_some_and(|server| server.store().is_draining()),
        pressed: agent.sponsor().is_some_and(|server| server.store().is_pressed()),
        host: agent.host_name(),
        migration: agent.migration_address().map(|address| address.to_string()),
    })
}

async fn list(State(agent): State<Shared>) -> Result<Json<Vec<VmInfo>>, Failure> {
    let mut infos = Vec::new();
    for name in agent.vms().names() {
        if let Ok(info) = agent.vms().info(&name).await {
            infos.push(info);
        }
    }
    Ok(Json(infos))
}

async fn create(
    State(agent): State<Shared>,
    Json(request): Json<VmRequest>,
) -> Result<Json<VmInfo>, Failure> {
    let name = request.name.clone();
    let worker = agent.clone();
    let Json(()) = blocking(move || worker.vms().create(&request)).await?;
    Ok(Json(agent.vms().info(&name).await?))
}

async fn show(
    State(agent): State<Shared>,
    Path(name): Path<String>,
) -> Result<Json<VmInfo>, Failure> {
    Ok(Json(agent.vms().info(&name).await?))
}

async fn stop(
    State(agent): State<Shared>,
    Path(name): Path<String>,
    Json(stop): Json<Stop>,
) -> Result<Json<VmInfo>, Failure> {
    blocking(move || agent.vms().stop(&name, stop.grace_ms)).await
}

async fn resize(
    State(agent): State<Shared>,
    Path(name): Path<String>,
    Json(resize): Json<Resize>,
) -> Result<Json<VmInfo>, Failure> {
    agent.vms().resize(&name, &resize).await?;
    Ok(Json(agent.vms().info(&name).await?))
}

async fn add_sponsor(
    State(agent): State<Shared>,
    Path(name): Path<String>,
    Json(sponsor): Json<SponsorAddress>,
) -> Result<Json<VmInfo>, Failure> {
    agent.vms().add_sponsor(&name, &sponsor).await?;
    Ok(Json(agent.vms().info(&name).await?))
}

async fn migrate(
    State(agent): State<Shared>,
    Path(name): Path<String>,
    Json(request): Json<MigrateRequest>,
) -> Result<Json<MigrationInfo>, Failure> {
    blocking(move || agent.vms().migrate(&name, &request)).await
}

async fn migration(
    State(agent): State<Shared>,
    Path(name): Path<String>,
) -> Result<Json<MigrationInfo>, Failure> {
    Ok(Json(agent.vms().migration(&name)?))
}

async fn cancel_migration(
    State(agent): State<Shared>,
    Path(name): Path<String>,
) -> Result<Json<MigrationInfo>, Failure> {
    blocking(move || agent.vms().cancel_migration(&name)).await
}

async fn resolve_migration(
    State(agent): State<Shared>,
    Path(name): Path<String>,
    Json(resolve): Json<ResolveMigration>,
) -> Result<Json<()>, Failure> {
    blocking(move || agent.vms().resolve_migration(&name, resolve.run_here)).await
}

async fn drain(
    State(agent): State<Shared>,
    Json(drain): Json<Drain>,
) -> Result<Json<AgentInfo>, Failure> {
    let Some(server) = agent.sponsor() else {
        return Err(ApiError::new("no-sponsor", "this host lends no memory").into());
    };
    server.store().set_draining(drain.drain).map_err(|error| {
        ApiError::new("io", "cannot write down that the sponsor is drained")
            .detail(error.to_string())
    })?;
    Ok(info(State(agent)).await)
}

async fn upgrade(
    State(agent): State<Shared>,
    Json(upgrade): Json<Upgrade>,
) -> Result<Json<()>, Failure> {
    blocking(move || agent.upgrade(&upgrade.program)).await
}

async fn metrics(State(agent): State<Shared>) -> String {
    let mut text = crate::metrics::Text::default();
    if let Some(server) = agent.sponsor() {
        text.sponsor(server);
    }
    for name in agent.vms().names() {
        let Ok(info) = agent.vms().info(&name).await else { continue };
        text.vm(&info);
        if let Some(stats) = &info.pager {
            text.pager(stats);
        }
    }
    text.finish()
}
