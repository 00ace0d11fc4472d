//! One thread for each sponsor: signs of life, leases, connecting again.
//!
//! A sponsor counts as dead when it gives no sign of life for the detection time. To be wrong here
//! costs a connection and the copying of what was missed meanwhile, never a byte.

use std::time::{Duration, Instant};

use crossbeam_channel::{RecvTimeoutError, Sender};
use heca_core::pager::Event;
use heca_types::limits::{HEARTBEAT_MS, RECONNECT_PAUSE_MS};
use heca_types::{ExtentIndex, Status};
use heca_wire::{Body, Header, Kind, Pong, PongFlags};

use std::sync::Arc;

use super::engine::Message;
use super::remote::{Command, Remote, TIMEOUT, chain, is_fenced, lock};
use super::waker::Waker;
use crate::link::{Link, LinkError};

const HEARTBEAT: Duration = Duration::from_millis(HEARTBEAT_MS);
/// How often the identity is read again, and the peer looked up among the revoked.
const RECHECK: Duration = Duration::from_secs(30);
/// How often a keeper without a connection looks around.
const IDLE: Duration = Duration::from_millis(20);

/// Where messages for the engine go.
#[derive(Debug, Clone)]
pub(super) struct Mailbox {
    pub(super) messages: Sender<Message>,
    pub(super) waker: Arc<Waker>,
}

impl Mailbox {
    pub(super) fn send(&self, message: Message) {
        if self.messages.send(message).is_ok() {
            self.waker.wake();
        }
    }
}

pub(super) struct Keeper {
    remote: Remote,
    position: u8,
    control: Option<Link>,
    engine: Mailbox,
    renewed: Instant,
    checked: Instant,
    recheck: bool,
    tried: Instant,
    /// Since when the sponsor is away; `None` once its loss was told.
    away_since: Option<Instant>,
}

impl Keeper {
    pub(super) fn new(
        remote: Remote,
        position: u8,
        control: Option<Link>,
        engine: Mailbox,
    ) -> Self {
        let now = Instant::now();
        Self {
            remote,
            position,
            control,
            engine,
            renewed: now,
            checked: now,
            recheck: false,
            // The first attempt of one that is away comes at once.
            tried: now.checked_sub(Duration::from_secs(60)).unwrap_or(now),
            away_since: Some(now),
        }
    }

    /// Runs until the pager ends; returns the control connection, to close the region with.
    pub(super) fn run(mut self) -> Option<Link> {
        let peer = self.remote.peer(self.position);
        while !self.remote.is_stopping() {
            let pause = if self.control.is_some() { HEARTBEAT } else { IDLE };
            let command = match peer.commands.1.recv_timeout(pause) {
                Ok(command) => Some(command),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => break,
            };
            if self.remote.is_fenced() {
                self.control = None;
                continue;
            }
            if self.checked.elapsed() >= RECHECK {
                (self.checked, self.recheck) = (Instant::now(), true);
                // The agent renews the identity and fetches who was revoked. Also while nobody can
                // be reached: an identity that expired may be the reason.
                if self.position == 0 {
                    self.remote.0.security.reload();
                }
            }
            let up = lock(&peer.status).up;
            match self.control.take() {
                Some(link) if up => self.keep(link, command),
                // The engine gave it up.
                Some(_) => {
                    self.away_since = Some(Instant::now());
                    self.refuse(command);
                }
                None if up => {
                    self.lose("the control connection was lost".to_owned());
                    self.refuse(command);
                }
                None => {
                    self.refuse(command);
                    self.get_back();
                }
            }
        }
        self.control
    }

    fn keep(&mut self, mut link: Link, command: Option<Command>) {
        let outcome = match command {
            Some(Command::Hold(extent)) => self.hold(&mut link, extent),
            Some(Command::Release(extent)) => self.release(&mut link, extent),
            Some(Command::TakeOver(told)) => {
                let peer = self.remote.peer(self.position);
                let opened = self.remote.open_region(&mut link, &peer);
                // As one that is back without its pages, before the guest may read any.
                if opened.as_ref().is_ok_and(|&stored| peer.lost_pages(stored)) {
                    self.lose("it lost the pages it held".to_owned());
                    let _ = told.send(self.position);
                    return;
                }
                let _ = told.send(self.position);
                opened.map(|_| ())
            }
            None => self.heartbeat(&mut link),
        };
        match outcome {
            Ok(()) => self.control = Some(link),
            Err(error) if is_fenced(&error) => self.fence(&error),
            Err(error) => self.lose(format!("no sign of life: {}", chain(&error))),
        }
    }

    fn heartbeat(&mut self, link: &mut Link) -> Result<(), LinkError> {
        let config = &self.remote.0.config;
        let peer = self.remote.peer(self.position);
        let idle = lock(&peer.extents).is_empty();
        let region = if idle { heca_types::RegionId::from_bytes([0; 16]) } else { config.region };
        Header::new(Kind::Ping, region, peer.epoch(), 5).encode_empty(link.output());
        let timeout = Duration::from_millis(config.detect_ms);
        if self.recheck {
            self.recheck = false;
            link.recheck(&self.remote.0.security)?;
        }
        let pong: Pong = link.request(timeout, |_, body| match body {
            Body::Pong(pong) => Some(*pong),
            _ => None,
        })?;
        let leaving =
            pong.flags.contains(PongFlags::DRAINING) || pong.flags.contains(PongFlags::PRESSED);
        let changed = {
            let mut status = lock(&peer.status);
            std::mem::replace(&mut status.leaving, leaving) != leaving
        };
        if changed {
            tracing::info!(sponsor = peer.address, leaving, "sponsor changes its mind");
            let sponsor = self.position;
            self.engine.send(Message::Event(Event::SponsorLeaving { sponsor, leaving }));
        }
        let idle = idle || self.remote.is_visiting();
        if !idle && self.renewed.elapsed() >= Duration::from_millis(config.lease_ms / 3) {
            self.renewed = Instant::now();
            let epoch = peer.epoch();
            Header::new(Kind::Renew, config.region, epoch, 3).encode_empty(link.output());
            link.request(TIMEOUT, |header, _| (header.kind == Kind::RenewAck).then_some(()))?;
        }
        Ok(())
    }

    fn hold(&mut self, link: &mut Link, extent: ExtentIndex) -> Result<(), LinkError> {
        let peer = self.remote.peer(self.position);
        lock(&peer.extents).insert(extent);
        let opened = self.remote.open_region(link, &peer);
        let ok = opened.is_ok();
        if !ok {
            lock(&peer.extents).remove(&extent);
        }
        self.held(extent, ok);
        match opened {
            // It says no, and goes on with what it holds.
            Err(LinkError::Refused { status, text }) if status != Status::StaleEpoch => {
                tracing::info!(sponsor = peer.address, "extent not taken: {text}");
                Ok(())
            }
            other => other.map(|_| ()),
        }
    }

    fn release(&mut self, link: &mut Link, extent: ExtentIndex) -> Result<(), LinkError> {
        let peer = self.remote.peer(self.position);
        lock(&peer.extents).remove(&extent);
        self.remote.release(link, &peer, &[extent])
    }

    fn held(&self, extent: ExtentIndex, ok: bool) {
        let sponsor = self.position;
        self.engine.send(Message::Event(Event::Held { extent, sponsor, ok }));
    }

    /// A command for a sponsor that is away.
    fn refuse(&self, command: Option<Command>) {
        match command {
            Some(Command::Hold(extent)) => self.held(extent, false),
            Some(Command::Release(extent)) => {
                lock(&self.remote.peer(self.position).extents).remove(&extent);
            }
            // It is told when it is back.
            Some(Command::TakeOver(_)) | None => {}
        }
    }

    fn lose(&mut self, reason: String) {
        self.control = None;
        self.away_since = Some(Instant::now());
        self.tried = Instant::now();
        self.remote.mark_down(self.position, reason.clone());
        self.engine.send(Message::LinkLost { sponsor: self.position, reason });
    }

    fn fence(&mut self, error: &LinkError) {
        self.control = None;
        self.engine.send(Message::Fenced { reason: chain(error) });
    }

    fn get_back(&mut self) {
        let after = Duration::from_millis(self.remote.0.config.rebuild_after_ms);
        if self.away_since.is_some_and(|since| since.elapsed() >= after) {
            self.away_since = None;
            let sponsor = self.position;
            self.engine.send(Message::Event(Event::SponsorLost { sponsor }));
        }
        if self.tried.elapsed() < Duration::from_millis(RECONNECT_PAUSE_MS) {
            return;
        }
        let peer = self.remote.peer(self.position);
        match self.remote.open(self.position) {
            Ok(((mut control, lanes), emptied, store)) => {
                self.remote.meet(self.position, store);
                if emptied {
                    tracing::error!(sponsor = peer.address, "sponsor lost the pages it held");
                    self.remote.forget_losses(self.position);
                }
                if !self.remote.is_visiting() {
                    let unneeded = self.remote.not_held(&peer);
                    if let Err(error) = self.remote.release(&mut control, &peer, &unneeded) {
                        tracing::debug!(sponsor = peer.address, "not released: {}", chain(&error));
                    }
                }
                tracing::info!(sponsor = peer.address, "sponsor is back");
                {
                    let mut status = lock(&peer.status);
                    status.up = true;
                    status.reason = None;
                }
                self.control = Some(control);
                self.renewed = Instant::now();
                let sponsor = self.position;
                self.engine.send(Message::LinksUp { sponsor, lanes: Box::new(lanes), emptied });
            }
            Err(error) if is_fenced(&error) => self.fence(&error),
            Err(error) => {
                let reason = chain(&error);
                tracing::debug!(sponsor = peer.address, "still down: {reason}");
                lock(&peer.status).reason = Some(reason);
            }
        }
        self.tried = Instant::now();
    }
}
