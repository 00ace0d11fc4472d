//! The engine's connections: requests out, replies in, what is late, what is lost.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use heca_core::pager::{Event, FetchClass, FetchError};
use heca_types::{PageIndex, Status};

use super::super::evictor::Job;
use super::super::lane::{Answer, Asked, ReadLane};
use super::super::remote::{Command, Lanes, chain};
use super::{Ask, Context, Engine, SponsorLanes};
use crate::link::{Link, LinkError};

/// A sponsor from which nothing came for this long while reads wait for it is avoided.
const SUSPICION: Duration = Duration::from_millis(10);
/// Time after which a page that was asked for ahead, and that a thread waits for, is late.
const PREFETCH_LATE: Duration = Duration::from_millis(5);

impl Engine {
    pub(super) fn take_replies(&mut self) -> bool {
        let mut busy = false;
        for sponsor in 0..self.lanes.len() {
            let Some(mut lanes) = self.lanes[sponsor].take() else { continue };
            let id = sponsor as u8;
            let mut outcome = Ok(());
            for (lane, class) in [
                (&mut lanes.demand, FetchClass::Demand),
                (&mut lanes.prefetch, FetchClass::Prefetch),
            ] {
                if lane.is_waiting() && outcome.is_ok() {
                    match lane.receive(|asked, answer| self.take_page(id, class, asked, answer)) {
                        Ok(any) => {
                            busy |= any;
                            if any {
                                self.heard[sponsor].0 = Instant::now();
                            }
                        }
                        Err(error) => outcome = Err(error),
                    }
                }
            }
            self.lanes[sponsor] = Some(lanes);
            if let Err(error) = outcome {
                self.lose_link(id, &error);
            } else if self.heard[sponsor].1 && busy {
                self.clear_suspicion(id);
            }
        }
        busy
    }

    /// A connection failed: because a newer owner has the region, or for other reasons.
    fn lose_link(&mut self, sponsor: u8, error: &LinkError) {
        match error {
            // A connection from before this owner took the region over: what was asked on it may
            // have met the takeover. A newer owner is heard of on the next one.
            LinkError::Refused { status: Status::StaleEpoch, .. }
                if self.lanes[usize::from(sponsor)].as_ref().is_some_and(|lanes| {
                    lanes.demand.opened_under != self.context.remote.epoch()
                }) =>
            {
                self.lose(sponsor, chain(error));
            }
            LinkError::Refused { status: Status::StaleEpoch, .. } => self.fence(chain(error)),
            error => self.lose(sponsor, chain(error)),
        }
    }

    /// The region is another one's now: nothing may be read or written any more, and the process
    /// is stopped: it must not go on in two places.
    pub(super) fn fence(&mut self, reason: String) {
        if self.moving.is_handed_over() {
            // As it should be: the VM runs on its next host.
            for sponsor in 0..self.lanes.len() as u8 {
                self.lose(sponsor, reason.clone());
            }
            self.fenced = Some(reason);
            return;
        }
        if !self.context.remote.fence() {
            return;
        }
        tracing::error!(vm = self.context.name, "fenced: {reason}");
        // What is still in local memory must not be changed in two places either.
        let stopped =
            rustix::process::pidfd_send_signal(&self.context.pidfd, rustix::process::Signal::STOP);
        if let Err(error) = stopped {
            tracing::error!(%error, "the fenced process is not stopped");
        }
        for sponsor in 0..self.lanes.len() as u8 {
            self.lose(sponsor, reason.clone());
        }
        self.fenced = Some(reason);
    }

    fn clear_suspicion(&mut self, sponsor: u8) {
        let (heard, suspect) = &mut self.heard[usize::from(sponsor)];
        if *suspect && heard.elapsed() < SUSPICION {
            *suspect = false;
            self.dispatch(Event::SponsorSuspect { sponsor, suspect: false }, None);
        }
    }

    /// Has reads that take long asked elsewhere, too, and avoids sponsors that say nothing at all.
    pub(super) fn look_for_overdue(&mut self, now: Instant) {
        if self.lanes.iter().flatten().count() < 2 {
            return;
        }
        for position in 0..self.lanes.len() {
            let sponsor = position as u8;
            let Some(lanes) = &self.lanes[position] else { continue };
            let Some(oldest) = lanes.demand.oldest() else { continue };
            let delay = Duration::from_micros(self.hedge.delay_us(sponsor));
            let (heard, suspect) = self.heard[position];
            let silent = now - oldest > SUSPICION.max(delay * 4) && heard < oldest;
            if silent && !suspect {
                self.heard[position].1 = true;
                self.dispatch(Event::SponsorSuspect { sponsor, suspect: true }, None);
            }
            let suspect = self.heard[position].1;
            let Some(since) = now.checked_sub(delay) else { continue };
            while let Some(lanes) = &mut self.lanes[position] {
                let overdue = lanes.demand.next_due().is_some_and(|sent| sent < since);
                if !overdue || !(suspect || self.hedge.may_hedge()) {
                    break;
                }
                let Some(page) = lanes.demand.take_overdue(since) else { break };
                self.dispatch(Event::Late { page, sponsor }, None);
            }
        }
    }

    /// A thread may wait for a page that was asked for ahead of it: that, too, is asked elsewhere
    /// when it takes long.
    pub(super) fn look_for_late_prefetches(&mut self, now: Instant) {
        let Some(since) = now.checked_sub(PREFETCH_LATE) else { return };
        for position in 0..self.lanes.len() {
            let Some(lanes) = &self.lanes[position] else { continue };
            let waited_for = lanes.prefetch.pages_before(since);
            let pages: Vec<PageIndex> =
                waited_for.filter(|page| self.seen.contains_key(page)).collect();
            let sponsor = position as u8;
            for page in pages {
                self.dispatch(Event::Late { page, sponsor }, None);
            }
        }
    }

    /// When the next read in flight becomes overdue.
    pub(super) fn next_due(&self) -> Option<Instant> {
        if self.lanes.iter().flatten().count() < 2 {
            // Nobody else could be asked: no timer, which would cost each fault some microseconds.
            return None;
        }
        let due = |(position, lanes): (usize, &Option<SponsorLanes>)| {
            let delay = Duration::from_micros(self.hedge.delay_us(position as u8));
            Some(lanes.as_ref()?.demand.next_due()? + delay)
        };
        self.lanes.iter().enumerate().filter_map(due).min()
    }

    fn take_page(&mut self, sponsor: u8, class: FetchClass, asked: Asked, answer: Answer<'_>) {
        let page = asked.page;
        match answer {
            Ok(bytes) => {
                let arrived = Instant::now();
                let seen = self.seen.get(&page).copied();
                let version = asked.version;
                if class == FetchClass::Demand {
                    // Bulk takes longer by nature, and is not what hedges are for.
                    self.hedge.sample(sponsor, (arrived - asked.sent).as_secs_f64() * 1e6);
                }
                self.dispatch(Event::Fetched { page, version, sponsor }, Some(bytes));
                let traffic = &self.traffic[usize::from(sponsor)];
                traffic.pages_fetched.fetch_add(1, Ordering::Relaxed);
                if let Some(seen) = seen {
                    self.statistics.remote_fault(seen, asked.sent, arrived);
                }
            }
            Err(error) => {
                if error == FetchError::Corrupt {
                    let sponsor = self.context.remote.address(sponsor);
                    tracing::error!(%page, sponsor, "page arrived with a wrong checksum");
                }
                self.dispatch(Event::FetchFailed { page, sponsor, error }, None);
            }
        }
    }

    /// A sponsor cannot be used any more: the machine hears that first, then what was lost.
    pub(super) fn lose(&mut self, sponsor: u8, reason: String) {
        if self.drop_lanes(sponsor) {
            let address = self.context.remote.address(sponsor);
            tracing::warn!(sponsor = address, "sponsor lost: {reason}");
            self.context.remote.mark_down(sponsor, reason);
        }
    }

    /// Gives up the connections to a sponsor, if there are any, and what was asked on them.
    fn drop_lanes(&mut self, sponsor: u8) -> bool {
        let Some(lanes) = self.lanes[usize::from(sponsor)].take() else { return false };
        self.count_traffic(sponsor, &lanes);
        self.dispatch(Event::SponsorDown { sponsor }, None);
        let _ = self.jobs.send(Job::LinkDown { sponsor });
        self.evictor_waker.wake();
        for page in lanes.demand.abandon().chain(lanes.prefetch.abandon()) {
            let error = FetchError::Lost;
            self.dispatch(Event::FetchFailed { page, sponsor, error }, None);
        }
        true
    }

    pub(super) fn gain(&mut self, sponsor: u8, lanes: Lanes, emptied: bool) {
        if self.fenced.is_some() {
            return;
        }
        // The loss of what was there before was not told, or is still on its way.
        self.drop_lanes(sponsor);
        let _ = self.jobs.send(Job::LinkUp { sponsor, link: Box::new(lanes.write_back) });
        let links = (lanes.demand, lanes.prefetch);
        self.lanes[usize::from(sponsor)] = Some(self.context.lanes(sponsor, links));
        self.heard[usize::from(sponsor)] = (Instant::now(), false);
        // What moved elsewhere just while it came back. A part that it is only now asked to take is
        // not among them: what is under way to a sponsor ends when that one is lost.
        for extent in self.context.remote.extents(sponsor) {
            if self.core.layout().replicas(extent).position(sponsor).is_none() {
                self.context.remote.command(sponsor, Command::Release(extent));
            }
        }
        if emptied {
            self.dispatch(Event::SponsorEmptied { sponsor }, None);
        }
        self.dispatch(Event::SponsorUp { sponsor }, None);
    }

    fn count_traffic(&self, sponsor: u8, lanes: &SponsorLanes) {
        let traffic = &self.traffic[usize::from(sponsor)];
        for lane in [&lanes.demand, &lanes.prefetch] {
            traffic.bytes_received.fetch_add(lane.link.bytes_received, Ordering::Relaxed);
            traffic.bytes_sent.fetch_add(lane.link.bytes_sent, Ordering::Relaxed);
        }
    }

    /// Sends requests and hands batches to the evictor.
    pub(super) fn flush(&mut self) {
        self.asks.reverse();
        while let Some(ask) = self.asks.pop() {
            let Ask { page, version, sponsor, class } = ask;
            match (&mut self.lanes[usize::from(sponsor)], class) {
                (Some(lanes), FetchClass::Demand) => lanes.demand.ask(page, version),
                (Some(lanes), FetchClass::Prefetch) => lanes.prefetch.ask(page, version),
                // It was lost since; the machine knows and asks another one.
                (None, _) => {
                    let error = FetchError::Lost;
                    self.dispatch(Event::FetchFailed { page, sponsor, error }, None);
                }
            }
        }
        for sponsor in 0..self.lanes.len() {
            let Some(lanes) = &mut self.lanes[sponsor] else { continue };
            let sent = lanes.demand.flush().and_then(|()| lanes.prefetch.flush());
            if let Err(error) = sent {
                self.lose_link(sponsor as u8, &error);
            }
        }
        self.send_jobs();
    }

    /// Bytes received and sent on the read connections that are open now.
    pub(super) fn live_bytes(&self) -> (u64, u64) {
        self.lanes.iter().flatten().fold((0, 0), |(received, sent), lanes| {
            let links = [&lanes.demand.link, &lanes.prefetch.link];
            links.iter().fold((received, sent), |(r, s), link| {
                (r + link.bytes_received, s + link.bytes_sent)
            })
        })
    }

    pub(super) fn look_at_idle_lanes(&mut self) {
        for sponsor in 0..self.lanes.len() {
            let Some(lanes) = &mut self.lanes[sponsor] else { continue };
            let mut outcome: Result<(), LinkError> = Ok(());
            for lane in [&mut lanes.demand, &mut lanes.prefetch] {
                if !lane.is_waiting() {
                    let received = lane.receive(|_, _| {});
                    outcome = outcome.and(received.map(|_| ()));
                }
            }
            if let Err(error) = outcome {
                self.lose_link(sponsor as u8, &error);
            }
        }
    }
}

impl Context {
    pub(super) fn lanes(&self, sponsor: u8, (demand, prefetch): (Link, Link)) -> SponsorLanes {
        let region = self.region;
        let peer = self.remote.peer(sponsor);
        SponsorLanes {
            demand: ReadLane::new(demand, peer.clone(), region, false, self.seal.clone()),
            prefetch: ReadLane::new(prefetch, peer, region, true, self.seal.clone()),
        }
    }
}
