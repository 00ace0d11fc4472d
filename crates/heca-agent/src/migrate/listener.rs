//! Takes in VMs of other hosts.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use heca_api::ApiError;
use heca_core::handover::{Answer, TargetEvent};
use heca_types::limits::CONNECT_TIMEOUT_MS;
use heca_types::{OwnerId, StoreId};
use heca_wire::{Body, DecodeError, HelloAck, Kind, Role, VERSION_MAX, VERSION_MIN};

use super::{Ask, Told, boot_id, next_ask, relay, tell};
use crate::link::{Link, LinkError, Security};
use crate::pager::chain;
use crate::vm::{Arrival, VmManager};

/// A source that is silent for this long while its VM is being prepared keeps the VM.
const PATIENCE: Duration = Duration::from_secs(60);
/// Connections at a time.
const CONNECTIONS_MAX: usize = 64;

/// Listens for other hosts' agents.
///
/// # Errors
/// Those of listening.
pub(crate) fn start(
    address: &str,
    vms: Arc<VmManager>,
    security: Security,
) -> std::io::Result<SocketAddr> {
    let listener = TcpListener::bind(address)?;
    let bound = listener.local_addr()?;
    let live = Arc::new(());
    let accept = move || {
        for stream in listener.incoming() {
            let Ok(stream) = stream else {
                std::thread::sleep(Duration::from_millis(50));
                continue;
            };
            if Arc::strong_count(&live) > CONNECTIONS_MAX {
                tracing::warn!("{CONNECTIONS_MAX} connections of agents: refused one more");
                continue;
            }
            let (vms, security, token) = (vms.clone(), security.clone(), live.clone());
            let serve = move || {
                let _token = token;
                match serve(stream, &vms, &security) {
                    Ok(()) | Err(LinkError::Closed) => {}
                    Err(error) => tracing::warn!("connection of an agent: {}", chain(&error)),
                }
            };
            if let Err(error) = std::thread::Builder::new().name("migrate-conn".into()).spawn(serve)
            {
                tracing::warn!(%error, "a connection of an agent is not served");
            }
        }
    };
    std::thread::Builder::new().name("migrate-accept".into()).spawn(accept)?;
    Ok(bound)
}

fn serve(stream: TcpStream, vms: &Arc<VmManager>, security: &Security) -> Result<(), LinkError> {
    let local = stream.local_addr()?;
    let mut link = Link::accept(stream, security)?;
    link.set_timeout(Some(Duration::from_millis(CONNECT_TIMEOUT_MS)))?;
    while !link.has_frame()? {
        link.receive_blocking()?;
    }
    let Some((header, Body::Hello(hello))) = link.next_frame()? else {
        let what = "the first frame of a connection must be a hello";
        return Err(DecodeError::Field { kind: Kind::Hello, what }.into());
    };
    if hello.version_min > VERSION_MAX || hello.version_max < VERSION_MIN {
        return Err(DecodeError::Version { version: hello.version_min }.into());
    }
    if !matches!(hello.role, Role::Migration | Role::DeviceState) {
        let what = "this port takes in VMs; pages are served elsewhere";
        header.encode_error(heca_types::Status::Malformed, what, link.output());
        let _ = link.flush_blocking();
        return Err(DecodeError::Field { kind: Kind::Hello, what }.into());
    }
    let ack = HelloAck { version: VERSION_MAX, store: StoreId::from_bytes([0; 16]), free_bytes: 0 };
    ack.encode(&header, link.output());
    link.flush_blocking()?;
    link.set_timeout(None)?;
    match hello.role {
        Role::DeviceState => carry(&mut link, vms, hello.owner),
        _ => converse(&mut link, vms, local),
    }
}

fn carry(link: &mut Link, vms: &VmManager, ticket: OwnerId) -> Result<(), LinkError> {
    let stream = vms.incoming_stream(ticket).map_err(std::io::Error::other)?;
    relay::run(link, stream, &AtomicU64::new(0))
}

/// Answers one source, about one VM as a rule.
fn converse(link: &mut Link, vms: &Arc<VmManager>, local: SocketAddr) -> Result<(), LinkError> {
    let mut arrival: Option<Arc<Arrival>> = None;
    let outcome = loop {
        let ask = match next_ask(link, Instant::now() + PATIENCE) {
            Ok(ask) => ask,
            Err(error) => break Err(error),
        };
        let told = match ask {
            Ask::Prepare(_) if arrival.is_some() => {
                Told::Failed(ApiError::new("one-each", "this connection has prepared a VM already"))
            }
            Ask::Prepare(prepare) => {
                match vms.prepare(*prepare, local, &mut |held| arrival = Some(held)) {
                    Ok(prepared) => Told::Prepared(prepared),
                    Err(error) => Told::Failed(error),
                }
            }
            ask => answer(vms, arrival.as_ref(), ask).unwrap_or_else(Told::Failed),
        };
        if let Err(error) = tell(link, &told) {
            break Err(error);
        }
    };
    // The source may come back with a new connection; until then nothing is decided.
    if let Some(arrival) = arrival {
        vms.wait_for_source(&arrival);
    }
    outcome
}

fn answer(
    vms: &Arc<VmManager>,
    arrival: Option<&Arc<Arrival>>,
    ask: Ask,
) -> Result<Told, ApiError> {
    let none = || ApiError::new("no-migration", "this connection prepared no VM");
    let say = |answer: Answer| Told::Answer { answer, boot: boot_id(), took_ms: None };
    Ok(match ask {
        Ask::AwaitLoaded { ms } => {
            say(vms.await_loaded(arrival.ok_or_else(none)?, Duration::from_millis(ms))?)
        }
        Ask::Import => Told::Import(vms.import_info(arrival.ok_or_else(none)?)?),
        Ask::Grant { id } => {
            let answer = vms.hear(id, TargetEvent::Grant)?;
            let took_ms = arrival.and_then(|arrival| arrival.took_ms());
            Told::Answer { answer, boot: boot_id(), took_ms }
        }
        Ask::Query { id } => say(vms.hear(id, TargetEvent::Asked)?),
        Ask::GiveUp { id } => say(vms.hear(id, TargetEvent::GiveUp)?),
        Ask::Needs { id } => Told::Needs { source: vms.needs_source(id), boot: boot_id() },
        Ask::Forget { id } => {
            vms.forget_arrival(id);
            Told::Done
        }
        Ask::Prepare(_) => return Err(none()),
    })
}
