//! The sponsors of one pager: opening regions, renewing leases, connecting again.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use heca_api::{ApiError, PagerStats, SponsorStats};
use heca_core::placement::Layout;
use heca_types::limits::{CONNECT_TIMEOUT_MS, EXTENT_BYTES, RECONNECT_PAUSE_MS};
use heca_types::{ExtentIndex, StoreId};
use heca_wire::{Body, Header, Kind, Open, Role, encode_open};

use super::PagerConfig;
use super::engine::Message;
use super::waker::Waker;
use crate::link::{Link, LinkError};

const TIMEOUT: Duration = Duration::from_millis(CONNECT_TIMEOUT_MS);
const MANAGER_PERIOD: Duration = Duration::from_millis(100);

/// The data connections to one sponsor.
#[derive(Debug)]
pub(super) struct Lanes {
    pub(super) demand: Link,
    pub(super) prefetch: Link,
    pub(super) write_back: Link,
}

#[derive(Debug, Default)]
#[allow(clippy::struct_field_names, reason = "units of what is counted")]
pub(super) struct Traffic {
    pub(super) pages_fetched: AtomicU64,
    pub(super) pages_stored: AtomicU64,
    pub(super) bytes_received: AtomicU64,
    pub(super) bytes_sent: AtomicU64,
}

#[derive(Debug)]
struct Status {
    up: bool,
    reason: Option<String>,
}

#[derive(Debug)]
struct Peer {
    address: String,
    extents: Vec<ExtentIndex>,
    store: Mutex<Option<StoreId>>,
    control: Mutex<Option<Link>>,
    status: Mutex<Status>,
    traffic: Traffic,
}

#[derive(Debug)]
struct Inner {
    config: PagerConfig,
    extent_count: u32,
    peers: Vec<Peer>,
    stopping: AtomicBool,
    last_stats: Mutex<Option<PagerStats>>,
}

/// Shared by the threads of a pager.
#[derive(Debug, Clone)]
pub(super) struct Remote(Arc<Inner>);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An error with its causes, in one line.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text.push_str(&format!(": {inner}"));
        cause = inner.source();
    }
    text
}

impl Remote {
    /// Connects to all sponsors and opens the region on each.
    ///
    /// # Errors
    /// Any sponsor that cannot be reached or refuses; what was opened is closed again.
    pub(super) fn connect(
        config: &PagerConfig,
        layout: &Layout,
    ) -> Result<(Self, Vec<Lanes>), ApiError> {
        let peers = config.sponsors.iter().enumerate().map(|(i, sponsor)| Peer {
            address: sponsor.address.clone(),
            extents: layout.extents_of(i as u8).collect(),
            store: Mutex::default(),
            control: Mutex::default(),
            status: Mutex::new(Status { up: true, reason: None }),
            traffic: Traffic::default(),
        });
        let remote = Self(Arc::new(Inner {
            config: config.clone(),
            extent_count: layout.len(),
            peers: peers.collect(),
            stopping: AtomicBool::new(false),
            last_stats: Mutex::default(),
        }));
        let mut lanes = Vec::new();
        let mut stores = Vec::new();
        for (position, peer) in remote.0.peers.iter().enumerate() {
            let opened = remote.open(position).map_err(|error| sponsor_error(peer, &error));
            let same_store = opened.is_ok() && stores.contains(&*lock(&peer.store));
            let outcome = opened.and_then(|(opened, _)| {
                if same_store {
                    return Err(ApiError::new(
                        "same-sponsor",
                        format!("sponsor {} is one of the others under another name", peer.address),
                    )
                    .hint("replicas need sponsors of their own: name each host once"));
                }
                Ok(opened)
            });
            match outcome {
                Ok(opened) => {
                    stores.push(*lock(&peer.store));
                    lanes.push(opened);
                }
                Err(error) => {
                    remote.close_regions();
                    return Err(error);
                }
            }
        }
        Ok((remote, lanes))
    }

    /// Connects to one sponsor, opens the region there, and returns the data connections and
    /// whether the sponsor lost pages that it held.
    fn open(&self, position: usize) -> Result<(Lanes, bool), LinkError> {
        let (config, peer) = (&self.0.config, &self.0.peers[position]);
        let connect = |role| Link::connect(&peer.address, role, config.owner);
        let (mut control, hello) = connect(Role::Control)?;
        let known = lock(&peer.store).replace(hello.store);
        let new_store = known.is_some_and(|known| known != hello.store);
        let open = Open {
            owner: config.owner,
            quota_bytes: peer.extents.len() as u64 * EXTENT_BYTES,
            lease_ms: config.lease_ms,
        };
        let header = Header::new(Kind::Open, config.region, config.epoch, 1);
        encode_open(header, &open, self.0.extent_count, &peer.extents, control.output());
        let ack = control.request(TIMEOUT, |_, body| match body {
            Body::OpenAck(ack) => Some(*ack),
            _ => None,
        })?;
        *lock(&peer.control) = Some(control);
        let lanes = Lanes {
            demand: connect(Role::Demand)?.0,
            prefetch: connect(Role::Prefetch)?.0,
            write_back: connect(Role::WriteBack)?.0,
        };
        let nothing_held =
            ack.stored_pages == 0 && peer.traffic.pages_stored.load(Ordering::Relaxed) > 0;
        Ok((lanes, new_store || nothing_held))
    }

    pub(super) fn traffic(&self, sponsor: u8) -> &Traffic {
        &self.0.peers[usize::from(sponsor)].traffic
    }

    pub(super) fn address(&self, sponsor: u8) -> &str {
        &self.0.peers[usize::from(sponsor)].address
    }

    /// Notes that a sponsor cannot be used; the manager tries to get it back.
    pub(super) fn mark_down(&self, sponsor: u8, reason: String) {
        let peer = &self.0.peers[usize::from(sponsor)];
        let mut status = lock(&peer.status);
        status.up = false;
        status.reason = Some(reason);
    }

    pub(super) fn sponsor_stats(&self) -> Vec<SponsorStats> {
        let total: usize = self.0.peers.iter().map(|peer| peer.extents.len()).sum();
        let stats = self.0.peers.iter().map(|peer| {
            let status = lock(&peer.status);
            SponsorStats {
                address: peer.address.clone(),
                up: status.up,
                down_reason: status.reason.clone(),
                extents: peer.extents.len() as u32,
                share: peer.extents.len() as f64 / total.max(1) as f64,
                pages_fetched: peer.traffic.pages_fetched.load(Ordering::Relaxed),
                pages_stored: peer.traffic.pages_stored.load(Ordering::Relaxed),
                bytes_received: peer.traffic.bytes_received.load(Ordering::Relaxed),
                bytes_sent: peer.traffic.bytes_sent.load(Ordering::Relaxed),
            }
        });
        stats.collect()
    }

    pub(super) fn keep_stats(&self, stats: PagerStats) {
        *lock(&self.0.last_stats) = Some(stats);
    }

    pub(super) fn last_stats(&self) -> Option<PagerStats> {
        lock(&self.0.last_stats).take()
    }

    /// Ends the manager thread.
    pub(super) fn stop(&self) {
        self.0.stopping.store(true, Ordering::Relaxed);
    }

    /// Gives up the region on every sponsor that can be reached.
    pub(super) fn close_regions(&self) {
        for peer in &self.0.peers {
            let Some(mut control) = lock(&peer.control).take() else { continue };
            let config = &self.0.config;
            Header::new(Kind::Close, config.region, config.epoch, 2).encode_empty(control.output());
            let closed =
                control.request(TIMEOUT, |header, _| (header.kind == Kind::CloseAck).then_some(()));
            if let Err(error) = closed {
                tracing::warn!(
                    sponsor = peer.address,
                    "region not closed, its lease will run out: {}",
                    chain(&error)
                );
            }
        }
    }

    /// The thread that renews leases before they run out. It does nothing else: a sponsor that
    /// does not answer a connection attempt must not cost the others their leases.
    pub(super) fn renew_leases(&self, engine: &Sender<Message>, waker: &Waker) {
        let renew_every = Duration::from_millis(self.0.config.lease_ms / 3);
        let mut renewed = Instant::now();
        while !self.0.stopping.load(Ordering::Relaxed) {
            std::thread::sleep(MANAGER_PERIOD);
            if renewed.elapsed() >= renew_every {
                renewed = Instant::now();
                self.renew_all(engine, waker);
            }
        }
    }

    /// The thread that gets sponsors back.
    pub(super) fn reconnect(&self, engine: &Sender<Message>, waker: &Waker) {
        let mut tried = Instant::now();
        while !self.0.stopping.load(Ordering::Relaxed) {
            std::thread::sleep(MANAGER_PERIOD);
            if tried.elapsed() >= Duration::from_millis(RECONNECT_PAUSE_MS) {
                self.get_back(engine, waker);
                tried = Instant::now();
            }
        }
    }

    fn renew_all(&self, engine: &Sender<Message>, waker: &Waker) {
        for (position, peer) in self.0.peers.iter().enumerate() {
            if !lock(&peer.status).up {
                continue;
            }
            let mut control = lock(&peer.control);
            let Some(link) = control.as_mut() else {
                // Up without a way to renew: it has to be opened again.
                let reason = "the control connection was lost".to_owned();
                let lost = Message::LinkLost { sponsor: position as u8, reason };
                if engine.send(lost).is_ok() {
                    waker.wake();
                }
                continue;
            };
            let config = &self.0.config;
            Header::new(Kind::Renew, config.region, config.epoch, 3).encode_empty(link.output());
            let renewed =
                link.request(TIMEOUT, |header, _| (header.kind == Kind::RenewAck).then_some(()));
            if let Err(error) = renewed {
                *control = None;
                let reason = format!("lease not renewed: {}", chain(&error));
                let lost = Message::LinkLost { sponsor: position as u8, reason };
                if engine.send(lost).is_ok() {
                    waker.wake();
                }
            }
        }
    }

    fn get_back(&self, engine: &Sender<Message>, waker: &Waker) {
        for (position, peer) in self.0.peers.iter().enumerate() {
            if lock(&peer.status).up || self.0.stopping.load(Ordering::Relaxed) {
                continue;
            }
            match self.open(position) {
                Ok((lanes, emptied)) => {
                    if emptied {
                        tracing::error!(sponsor = peer.address, "sponsor lost the pages it held");
                    }
                    tracing::info!(sponsor = peer.address, "sponsor is back");
                    {
                        let mut status = lock(&peer.status);
                        status.up = true;
                        status.reason = None;
                    }
                    let (sponsor, lanes) = (position as u8, Box::new(lanes));
                    let up = Message::LinksUp { sponsor, lanes, emptied };
                    if engine.send(up).is_ok() {
                        waker.wake();
                    }
                }
                Err(error) => {
                    let reason = chain(&error);
                    tracing::debug!(sponsor = peer.address, "still down: {reason}");
                    lock(&peer.status).reason = Some(reason);
                }
            }
        }
    }
}

fn sponsor_error(peer: &Peer, error: &LinkError) -> ApiError {
    match error {
        LinkError::Refused { status, text } => ApiError::new(
            "sponsor-refused",
            format!("sponsor {} refuses the region: {text}", peer.address),
        )
        .detail(status.to_string()),
        error => {
            ApiError::new("sponsor-unreachable", format!("sponsor {} cannot be used", peer.address))
                .detail(chain(error))
                .hint("check that an agent with --offer runs there and that the address is right")
        }
    }
}
