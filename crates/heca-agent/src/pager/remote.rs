//! The sponsors of one pager: opening regions, signs of life, connecting again.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, unbounded};
use heca_api::{ApiError, PagerStats, SponsorAddress, SponsorStats};
use heca_core::placement::Layout;
use heca_sys::journal::Journal;
use heca_types::limits::{CONNECT_TIMEOUT_MS, EXTENT_BYTES, SPONSORS_MAX};
use heca_types::{Epoch, ExtentIndex, StoreId};
use heca_wire::{Body, Header, Kind, Open, Role, encode_open, encode_release};

use super::PagerConfig;
use super::start::{FENCED, STORED};
use crate::link::{Link, LinkError, Security};

pub(super) const TIMEOUT: Duration = Duration::from_millis(CONNECT_TIMEOUT_MS);
/// Time that a pager which goes on where another ended spends on sponsors before it serves.
const RESUME_TIME: Duration = Duration::from_secs(4);

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
pub(super) struct Status {
    pub(super) up: bool,
    pub(super) reason: Option<String>,
    pub(super) leaving: bool,
}

/// What the keeper of a sponsor is asked to tell it.
#[derive(Debug, Clone)]
pub(super) enum Command {
    Hold(ExtentIndex),
    Release(ExtentIndex),
    /// The region has this owner now.
    TakeOver(Sender<u8>),
}

#[derive(Debug)]
pub(super) struct Peer {
    pub(super) address: String,
    pub(super) extents: Mutex<BTreeSet<ExtentIndex>>,
    store: Mutex<Option<StoreId>>,
    /// The sponsor should have pages of ours: an empty region means that it lost them.
    expects_pages: AtomicBool,
    pub(super) commands: (Sender<Command>, Receiver<Command>),
    pub(super) status: Mutex<Status>,
    pub(super) traffic: Arc<Traffic>,
    /// The epoch under which the sponsor knows this owner.
    epoch: AtomicU64,
}

#[derive(Debug)]
pub(super) struct Inner {
    pub(super) config: PagerConfig,
    pub(super) security: Security,
    extent_count: u32,
    /// The epoch of this owner.
    epoch: AtomicU64,
    /// The region is still another owner's: it is read under that one's epoch, and not opened.
    visiting: AtomicBool,
    peers: RwLock<Vec<Arc<Peer>>>,
    journal: Arc<Journal>,
    pub(super) stopping: AtomicBool,
    /// A newer owner has the region: nothing is asked for any more.
    fenced: AtomicBool,
    last_stats: Mutex<Option<PagerStats>>,
}

/// Shared by the threads of a pager.
#[derive(Debug, Clone)]
pub(super) struct Remote(pub(super) Arc<Inner>);

/// A sponsor that could be reached: its control connection and its data connections.
pub(super) type Connected = (Link, Lanes);

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An error with its causes, in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text.push_str(&format!(": {inner}"));
        cause = inner.source();
    }
    text
}

impl Peer {
    fn new(address: &SponsorAddress, extents: BTreeSet<ExtentIndex>, epoch: Epoch) -> Self {
        Self {
            address: address.address.clone(),
            extents: Mutex::new(extents),
            store: Mutex::default(),
            expects_pages: AtomicBool::new(false),
            commands: unbounded(),
            status: Mutex::new(Status { up: true, reason: None, leaving: false }),
            traffic: Arc::default(),
            epoch: AtomicU64::new(epoch.0),
        }
    }

    /// Identity of its store; zeros while that is unknown.
    pub(super) fn store_id(&self) -> [u8; 16] {
        lock(&self.store).map_or([0; 16], StoreId::to_bytes)
    }

    /// The epoch to name in requests.
    pub(super) fn epoch(&self) -> Epoch {
        Epoch(self.epoch.load(Ordering::SeqCst))
    }

    /// Whether a sponsor that has so many pages of ours lost what it held.
    pub(super) fn lost_pages(&self, stored_pages: u64) -> bool {
        let expected = self.expects_pages.load(Ordering::Relaxed);
        stored_pages == 0 && expected && !lock(&self.extents).is_empty()
    }

    /// Whether the sponsor was told that it need not hold the extent: what is refused of that one
    /// was under way meanwhile.
    pub(super) fn gave_up(&self, extent: ExtentIndex) -> bool {
        !lock(&self.extents).contains(&extent)
    }

    fn quota_bytes(extents: usize) -> u64 {
        extents as u64 * EXTENT_BYTES
    }
}

impl Remote {
    /// Connects to all sponsors and opens the region on each. A pager that goes on where another
    /// ended does with those that answer; the others are `None`.
    ///
    /// # Errors
    /// Any sponsor that cannot be reached or refuses; what was opened is closed again.
    pub(super) fn connect(
        config: &PagerConfig,
        security: Security,
        layout: &Layout,
        journal: Arc<Journal>,
    ) -> Result<(Self, Vec<Option<Connected>>), ApiError> {
        let peers = config.sponsors.iter().enumerate().map(|(i, sponsor)| {
            let peer = Peer::new(sponsor, layout.extents_of(i as u8).collect(), config.epoch);
            if let Some(import) = config.import.as_ref().filter(|_| !config.resume) {
                let known = import.stores.get(i).copied().unwrap_or_default();
                *lock(&peer.store) = (known != [0; 16]).then(|| StoreId::from_bytes(known));
            }
            if config.resume {
                let known = journal.store(i as u8);
                *lock(&peer.store) = (known != [0; 16]).then(|| StoreId::from_bytes(known));
                let stored = journal.number(STORED) >> i & 1 == 1;
                peer.expects_pages.store(stored, Ordering::Relaxed);
            }
            Arc::new(peer)
        });
        let remote = Self(Arc::new(Inner {
            config: config.clone(),
            security,
            extent_count: layout.len(),
            epoch: AtomicU64::new(config.epoch.0),
            visiting: AtomicBool::new(config.import.is_some() && !config.resume),
            peers: RwLock::new(peers.collect()),
            journal,
            stopping: AtomicBool::new(false),
            fenced: AtomicBool::new(false),
            last_stats: Mutex::default(),
        }));
        let mut opened: Vec<Option<Connected>> = Vec::new();
        let begun = Instant::now();
        for position in 0..config.sponsors.len() as u8 {
            let peer = remote.peer(position);
            // Pages wait for those that answer: their keepers go on with the others.
            let tolerant = config.resume || remote.is_visiting();
            let late = tolerant && begun.elapsed() > RESUME_TIME;
            let outcome = if late { Err(LinkError::Closed) } else { remote.open(position) };
            match outcome {
                Ok((mut connected, emptied, store)) => {
                    if config.resume {
                        let unneeded = remote.not_held(&peer);
                        if let Err(error) = remote.release(&mut connected.0, &peer, &unneeded) {
                            tracing::debug!("not released: {}", chain(&error));
                        }
                    }
                    lock(&peer.status).up = !emptied;
                    if !emptied {
                        remote.meet(position, store);
                    }
                    // One that lost its pages is introduced by its keeper, which says so.
                    opened.push((!emptied).then_some(connected));
                }
                // A newer owner is no reason to try again later.
                Err(error) if config.resume && is_fenced(&error) => {
                    remote.fence();
                    let text = "the memory has a newer owner: this process must not go on with it";
                    return Err(ApiError::new("fenced", text).detail(chain(&error)));
                }
                Err(error) if tolerant => {
                    let mut status = lock(&peer.status);
                    status.up = false;
                    status.reason = Some(chain(&error));
                    opened.push(None);
                }
                Err(error) => {
                    remote.close_regions(opened.into_iter().map(|o| o.map(|(c, _)| c)).collect());
                    return Err(sponsor_error(&peer, &error));
                }
            }
        }
        Ok((remote, opened))
    }

    pub(super) fn peer(&self, position: u8) -> Arc<Peer> {
        let peers = self.0.peers.read().unwrap_or_else(PoisonError::into_inner);
        peers[usize::from(position)].clone()
    }

    pub(super) fn peers(&self) -> Vec<Arc<Peer>> {
        self.0.peers.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// One more sponsor, which holds nothing yet. Returns its number.
    ///
    /// # Errors
    /// Too many sponsors, or one that is known already.
    pub(super) fn add(&self, sponsor: &SponsorAddress) -> Result<u8, ApiError> {
        let mut peers = self.0.peers.write().unwrap_or_else(PoisonError::into_inner);
        if peers.iter().any(|peer| peer.address == sponsor.address) {
            let text = format!("{} is a sponsor of this VM already", sponsor.address);
            return Err(ApiError::new("sponsor-known", text));
        }
        if peers.len() == SPONSORS_MAX {
            let text = format!("a VM has {SPONSORS_MAX} sponsors at the most");
            return Err(ApiError::new("too-many-sponsors", text));
        }
        let peer = Peer::new(sponsor, BTreeSet::new(), self.epoch());
        lock(&peer.status).up = false;
        peers.push(Arc::new(peer));
        Ok((peers.len() - 1) as u8)
    }

    /// Opens the region on one sponsor, or opens it again with the extents that are wanted now.
    pub(super) fn open_region(&self, control: &mut Link, peer: &Peer) -> Result<u64, LinkError> {
        let config = &self.0.config;
        let extents: Vec<ExtentIndex> = lock(&peer.extents).iter().copied().collect();
        let open = Open {
            owner: config.owner,
            quota_bytes: Peer::quota_bytes(extents.len()),
            lease_ms: config.lease_ms,
        };
        let epoch = self.epoch();
        let header = Header::new(Kind::Open, config.region, epoch, 1);
        encode_open(header, &open, self.0.extent_count, &extents, control.output());
        let stored_pages = control.request(TIMEOUT, |_, body| match body {
            Body::OpenAck(ack) => Some(ack.stored_pages),
            _ => None,
        })?;
        peer.epoch.store(epoch.0, Ordering::SeqCst);
        Ok(stored_pages)
    }

    /// The epoch of this owner; sponsors may not have heard of it yet, see [`Peer::epoch`].
    pub(super) fn epoch(&self) -> Epoch {
        Epoch(self.0.epoch.load(Ordering::SeqCst))
    }

    /// Whether the region is still another owner's.
    pub(super) fn is_visiting(&self) -> bool {
        self.0.visiting.load(Ordering::SeqCst)
    }

    /// The region has this owner from now on, under the next epoch: has all sponsors that can be
    /// reached told so, and waits for their answers, at most `patience` long. The others are told
    /// when they are back.
    pub(super) fn take_over(&self, patience: Duration) {
        let epoch = Epoch(self.epoch().0 + 1);
        self.0.journal.set_epoch(epoch.0);
        self.0.epoch.store(epoch.0, Ordering::SeqCst);
        self.0.visiting.store(false, Ordering::SeqCst);
        let (told, answers) = unbounded();
        for position in 0..self.peers().len() as u8 {
            self.command(position, Command::TakeOver(told.clone()));
        }
        drop(told);
        let deadline = Instant::now() + patience;
        // Ends when every keeper dropped its end.
        while let Ok(answer) = answers.recv_deadline(deadline) {
            tracing::debug!(?answer, "told of the takeover");
        }
    }

    /// What the sponsors hold, as the former owner knew it when it handed the region over, and
    /// which of them have pages, one bit each.
    pub(super) fn set_extents(&self, layout: &Layout, stored: u64) {
        for (position, peer) in self.peers().iter().enumerate() {
            *lock(&peer.extents) = layout.extents_of(position as u8).collect();
            peer.expects_pages.store(stored >> position & 1 == 1, Ordering::Relaxed);
        }
    }

    /// Tells a sponsor which extents it need not hold any longer.
    pub(super) fn release(
        &self,
        control: &mut Link,
        peer: &Peer,
        extents: &[ExtentIndex],
    ) -> Result<(), LinkError> {
        let config = &self.0.config;
        let release = Open {
            owner: config.owner,
            quota_bytes: Peer::quota_bytes(lock(&peer.extents).len()),
            lease_ms: config.lease_ms,
        };
        let header = Header::new(Kind::Release, config.region, peer.epoch(), 4);
        encode_release(header, &release, self.0.extent_count, extents, control.output());
        control.request(TIMEOUT, |header, _| (header.kind == Kind::ReleaseAck).then_some(()))
    }

    /// Connects to one sponsor, opens the region there, and returns the connections and whether
    /// the sponsor lost pages that it held. [`Self::meet`] has to follow once that was dealt with.
    pub(super) fn open(&self, position: u8) -> Result<(Connected, bool, StoreId), LinkError> {
        let (config, peer) = (&self.0.config, self.peer(position));
        let connect = |role| Link::connect(&peer.address, role, config.owner, &self.0.security);
        let (mut control, hello) = connect(Role::Control)?;
        // Before anything is asked of it: what is released for one would be gone for the other.
        for (number, other) in self.peers().iter().enumerate() {
            let same = *lock(&other.store) == Some(hello.store);
            if number != usize::from(position) && same {
                return Err(LinkError::SameSponsor { other: other.address.clone() });
            }
        }
        let idle = lock(&peer.extents).is_empty();
        // One that holds nothing may still have something from before, under an older epoch.
        let stored_pages = if self.is_visiting() {
            // Not asked for what it holds: whether it lost that is seen by its identity.
            u64::MAX
        } else if idle && !config.resume {
            0
        } else {
            self.open_region(&mut control, &peer)?
        };
        let lanes = Lanes {
            demand: connect(Role::Demand)?.0,
            prefetch: connect(Role::Prefetch)?.0,
            write_back: connect(Role::WriteBack)?.0,
        };
        let new_store = lock(&peer.store).is_some_and(|known| known != hello.store);
        let holds_some = !lock(&peer.extents).is_empty();
        let emptied = (holds_some && new_store) || peer.lost_pages(stored_pages);
        Ok(((control, lanes), emptied, hello.store))
    }

    /// Remembers whose pages a sponsor has: should it come back as another one, it lost them.
    pub(super) fn meet(&self, position: u8, store: StoreId) {
        *lock(&self.peer(position).store) = Some(store);
        self.0.journal.set_store(position, store.to_bytes());
    }

    /// The replica set of an extent changed. A sponsor that is away and lost its part in it is not
    /// asked to hold it again when it comes back.
    pub(super) fn forget_extent(&self, extent: ExtentIndex, sponsors: &[u8]) {
        for (position, peer) in self.peers().iter().enumerate() {
            if !sponsors.contains(&(position as u8)) && !lock(&peer.status).up {
                lock(&peer.extents).remove(&extent);
            }
        }
    }

    /// Extents that a sponsor is to hold, as far as it was told.
    pub(super) fn extents(&self, sponsor: u8) -> Vec<ExtentIndex> {
        lock(&self.peer(sponsor).extents).iter().copied().collect()
    }

    /// Extents of the region that a sponsor need not hold: what it may still have from before.
    pub(super) fn not_held(&self, peer: &Peer) -> Vec<ExtentIndex> {
        let held = lock(&peer.extents);
        (0..self.0.extent_count).map(ExtentIndex).filter(|e| !held.contains(e)).collect()
    }

    /// The engine has dealt with the loss of what a sponsor held.
    pub(super) fn forget_losses(&self, position: u8) {
        let peer = self.peer(position);
        peer.expects_pages.store(false, Ordering::Relaxed);
    }

    /// A sponsor acknowledged pages, or copied some: it must have some from here on.
    pub(super) fn note_stored(&self, sponsor: u8) {
        let stored = self.0.journal.number(STORED);
        if stored >> sponsor & 1 == 0 {
            self.0.journal.set_number(STORED, stored | 1 << sponsor);
        }
        self.peer(sponsor).expects_pages.store(true, Ordering::Relaxed);
    }

    pub(super) fn traffic(&self, sponsor: u8) -> Arc<Traffic> {
        self.peer(sponsor).traffic.clone()
    }

    pub(super) fn command(&self, sponsor: u8, command: Command) {
        let _ = self.peer(sponsor).commands.0.send(command);
    }

    pub(super) fn address(&self, sponsor: u8) -> String {
        self.peer(sponsor).address.clone()
    }

    /// Notes that a sponsor cannot be used; its keeper tries to get it back.
    pub(super) fn mark_down(&self, sponsor: u8, reason: String) {
        let peer = self.peer(sponsor);
        let mut status = lock(&peer.status);
        status.up = false;
        status.reason = Some(reason);
    }

    pub(super) fn sponsor_stats(&self) -> Vec<SponsorStats> {
        let peers = self.peers();
        let total: usize = peers.iter().map(|peer| lock(&peer.extents).len()).sum();
        let stats = peers.iter().map(|peer| {
            let extents = lock(&peer.extents).len();
            let status = lock(&peer.status);
            SponsorStats {
                address: peer.address.clone(),
                up: status.up,
                down_reason: status.reason.clone(),
                leaving: status.leaving,
                extents: extents as u32,
                share: extents as f64 / total.max(1) as f64,
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

    /// Ends the keepers.
    pub(super) fn stop(&self) {
        self.0.stopping.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.0.stopping.load(Ordering::Relaxed)
    }

    /// A newer owner has the region. Returns whether that is news.
    pub(super) fn fence(&self) -> bool {
        self.0.journal.set_number(FENCED, 1);
        !self.0.fenced.swap(true, Ordering::SeqCst)
    }

    pub(super) fn is_fenced(&self) -> bool {
        self.0.fenced.load(Ordering::SeqCst)
    }

    /// Gives up the region on every sponsor that can be reached; not one that is still another
    /// owner's.
    pub(super) fn close_regions(&self, controls: Vec<Option<Link>>) {
        if self.is_visiting() {
            return;
        }
        let config = &self.0.config;
        for (peer, control) in self.peers().iter().zip(controls) {
            let connected = match control {
                Some(control) => Ok(control),
                None if lock(&peer.extents).is_empty() => continue,
                None => Link::connect(&peer.address, Role::Control, config.owner, &self.0.security)
                    .map(|(link, _)| link),
            };
            let closed = connected.and_then(|mut control| {
                let header = Header::new(Kind::Close, config.region, peer.epoch(), 2);
                header.encode_empty(control.output());
                control.request(TIMEOUT, |header, _| (header.kind == Kind::CloseAck).then_some(()))
            });
            match closed {
                Ok(()) => {}
                Err(LinkError::Refused { status: heca_types::Status::UnknownRegion, .. }) => {}
                Err(error) => tracing::warn!(
                    sponsor = peer.address,
                    "region not closed, its lease will run out: {}",
                    chain(&error)
                ),
            }
        }
    }
}

/// Whether a refusal says that the region has a newer owner.
pub(super) fn is_fenced(error: &LinkError) -> bool {
    use heca_types::Status::{OwnerMismatch, StaleEpoch};
    matches!(error, LinkError::Refused { status: StaleEpoch | OwnerMismatch, .. })
}

fn sponsor_error(peer: &Peer, error: &LinkError) -> ApiError {
    match error {
        LinkError::Refused { status, text } => ApiError::new(
            "sponsor-refused",
            format!("sponsor {} refuses the region: {text}", peer.address),
        )
        .detail(status.to_string()),
        LinkError::SameSponsor { other } => ApiError::new(
            "same-sponsor",
            format!("sponsor {} is {other} under another name", peer.address),
        )
        .hint("replicas need sponsors of their own: name each host once"),
        error => {
            ApiError::new("sponsor-unreachable", format!("sponsor {} cannot be used", peer.address))
                .detail(chain(error))
                .hint("check that an agent with --offer runs there and that the address is right")
        }
    }
}
