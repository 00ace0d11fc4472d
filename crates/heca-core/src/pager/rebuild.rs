//! Redundancy: which extents lack a replica, and how they get one.
//!
//! One extent is worked on at a time. Its target gets every write from the beginning on; pages
//! that were stored before are copied from sponsor to sponsor, and a page that the target has in
//! the right version already is not moved. Only when nothing is missing does the target count as
//! complete. A sponsor that wants to be rid of an extent keeps its role until then, so that
//! redundancy never drops for a move.

use std::collections::BTreeMap;

use heca_types::limits::{EXTENT_PAGES, PULLS_IN_FLIGHT_MAX};
use heca_types::{ExtentIndex, PageIndex, PageVersion};

use super::machine::{DIRTY, PREFETCHED, Pager, State, WANTED};
use super::{Action, FetchClass, Mutation};
use crate::placement::ReplicaSet;

/// Ticks between two looks for work when the last one found none, or failed.
const PAUSE_TICKS: u64 = 30;
/// Pages that one step looks at: a fault must not wait for long.
const LOOKS_PER_STEP: usize = 2048;

/// The extent that is worked on.
#[derive(Debug, Clone)]
pub(super) struct Rebuild {
    extent: ExtentIndex,
    to: u8,
    /// The sponsor that is replaced.
    instead_of: Option<u8>,
    /// Whether the target holds the extent: before, nothing is sent to it.
    copying: bool,
    attempt: u32,
    /// Pages of the extent looked at so far.
    looked_at: u64,
    /// Copies under way, with the number of sources tried before.
    in_flight: BTreeMap<u64, u8>,
    again: Vec<(u64, u8)>,
    failed: bool,
}

fn drop_bit(mask: u8, position: u8, last: u8) -> u8 {
    let moved = (mask >> last & 1) << position;
    let rest = mask & !(1 << position) & !(1 << last);
    if position == last { rest } else { rest | moved }
}

impl Pager {
    /// Number of sponsors that the layout may speak of.
    #[must_use]
    pub fn sponsors(&self) -> u8 {
        self.config.weights.len() as u8
    }

    /// One more sponsor, which counts as down until `SponsorUp`. Returns its number.
    pub fn add_sponsor(&mut self, weight: u32) -> u8 {
        self.config.weights.push(weight);
        self.held.push(0);
        self.latency_us.push(0);
        self.sponsors() - 1
    }

    /// Replica sets as they are now.
    #[must_use]
    pub fn layout(&self) -> &crate::placement::Layout {
        &self.config.layout
    }

    /// Replicas of an extent that missed a write and do not count, one bit each.
    #[must_use]
    pub fn stale(&self, extent: ExtentIndex) -> u8 {
        self.stale[extent.0 as usize]
    }

    /// Whether copies are under way, or about to be.
    #[must_use]
    pub fn is_rebuilding(&self) -> bool {
        self.rebuild.is_some()
    }

    pub(super) fn count_holdings(&mut self) {
        self.held.fill(0);
        for number in 0..self.config.layout.len() {
            for &sponsor in self.config.layout.replicas(ExtentIndex(number)).sponsors() {
                self.held[usize::from(sponsor)] += 1;
            }
        }
    }

    /// Replicas of the extent that are incomplete but get every write.
    pub(super) fn filling_mask(&self, extent: ExtentIndex) -> u8 {
        match &self.rebuild {
            Some(r) if r.copying && r.extent == extent => {
                let position = self.config.layout.replicas(extent).position(r.to);
                position.map_or(0, |p| 1 << p)
            }
            _ => 0,
        }
    }

    fn mask_of(set: ReplicaSet, sponsors: u16) -> u8 {
        let bits = set.sponsors().iter().enumerate();
        bits.filter(|&(_, &s)| sponsors >> s & 1 == 1).fold(0, |mask, (i, _)| mask | 1 << i)
    }

    /// (extents with a replica away or incomplete, extents with a replica that is to leave)
    pub(super) fn redundancy(&self) -> (u64, u64) {
        let (mut degraded, mut leaving) = (0, 0);
        for number in 0..self.config.layout.len() {
            let set = self.config.layout.replicas(ExtentIndex(number));
            let complete = Self::mask_of(set, self.up) & !self.stale[number as usize];
            degraded += u64::from(complete.count_ones() < u32::from(self.config.replicas));
            leaving += u64::from(Self::mask_of(set, self.leaving) != 0);
        }
        (degraded, leaving)
    }

    /// Something changed that may allow work.
    pub(super) fn look_for_rebuilds(&mut self) {
        self.rebuild_pause = 0;
        self.refused = 0;
    }

    fn pause(&mut self) {
        self.rebuild_pause = self.ticks + PAUSE_TICKS;
    }

    /// Whether [`super::Event::Work`] would get on with a rebuild right now.
    #[must_use]
    pub fn has_work(&self) -> bool {
        self.restore_next.is_none()
            && !self.frozen
            && match &self.rebuild {
                Some(r) => {
                    r.copying
                        && r.in_flight.len() < PULLS_IN_FLIGHT_MAX
                        && r.looked_at < EXTENT_PAGES
                }
                None => self.rebuild_pause == 0,
            }
    }

    /// Starts or goes on with the work, a bounded part of it. Only to be called while no install
    /// is outstanding.
    pub(super) fn rebuild_more(&mut self, out: &mut Vec<Action>) {
        // The next owner was told, or is about to be, who holds what.
        if self.frozen {
            return;
        }
        if self.restore_next.is_some() {
            self.abort_rebuild(out);
            return;
        }
        if self.rebuild.is_none() && self.ticks >= self.rebuild_pause {
            self.refused = 0;
            self.plan(out);
        }
        let Some(mut r) = self.rebuild.take() else { return };
        if r.copying {
            self.copy_more(&mut r, out);
            let early = self.config.mutation == Some(Mutation::RebuildEarly);
            let all = r.looked_at == EXTENT_PAGES && r.again.is_empty();
            if all && (r.in_flight.is_empty() || early) {
                if r.failed && !early {
                    self.rebuild_failed.push(r.extent);
                    self.rebuild = Some(r);
                    self.abort_rebuild(out);
                } else {
                    self.complete(&r, out);
                }
                return;
            }
        }
        self.rebuild = Some(r);
    }

    fn copy_more(&mut self, r: &mut Rebuild, out: &mut Vec<Action>) {
        let first = u64::from(r.extent.0) * EXTENT_PAGES;
        for _ in 0..LOOKS_PER_STEP {
            if r.in_flight.len() >= PULLS_IN_FLIGHT_MAX {
                return;
            }
            let (number, tries) = match r.again.pop() {
                Some(again) => again,
                None if r.looked_at < EXTENT_PAGES => {
                    r.looked_at += 1;
                    (first + r.looked_at - 1, 0)
                }
                None => return,
            };
            if number >= self.config.pages {
                continue;
            }
            let page = PageIndex(number);
            let p = *self.page(page);
            match p.state {
                // Stored anew, to the target as well, before it is dropped.
                State::Resident | State::Unmapping => {
                    self.page(page).flags |= DIRTY;
                    continue;
                }
                // Sent to the target, or taken back when it is seen that it was not.
                State::Storing | State::Poisoned => continue,
                // Dirty when it arrives.
                State::Behind => continue,
                // All zeros, whatever sponsors have.
                State::Untouched => continue,
                _ if p.version == 0 => continue,
                State::Standby | State::Punching | State::Remote | State::Fetching => {}
            }
            let Some(from) = self.source(r.extent, r.to, tries) else {
                if p.state == State::Standby {
                    // The copies went bad, but the page is here: it is stored anew.
                    self.standby.remove(&mut self.links, page.0);
                    self.make_resident(page, DIRTY);
                } else {
                    r.failed = true;
                }
                continue;
            };
            r.in_flight.insert(number, tries);
            let (version, to, attempt) = (PageVersion(p.version), r.to, r.attempt);
            out.push(Action::Pull { page, version, from, to, attempt });
        }
    }

    /// The replica to copy from after `tries` others failed: complete ones first.
    fn source(&self, extent: ExtentIndex, to: u8, tries: u8) -> Option<u8> {
        let set = self.config.layout.replicas(extent);
        let up = Self::mask_of(set, self.up);
        let stale = self.stale[extent.0 as usize];
        let choose = |mask: u8| {
            let bits = set.sponsors().iter().enumerate();
            bits.filter(move |&(i, &s)| mask >> i & 1 == 1 && s != to).map(|(_, &s)| s)
        };
        choose(up & !stale).chain(choose(up & stale)).nth(usize::from(tries))
    }

    fn plan(&mut self, out: &mut Vec<Action>) {
        if self.frozen {
            return;
        }
        self.pause();
        let extents = self.config.layout.len();
        let from = self.rebuild_cursor;
        if self.up == 0 {
            return;
        }
        for urgent in [true, false] {
            for number in (from..extents).chain(0..from) {
                let extent = ExtentIndex(number);
                let failed = self.rebuild_failed.contains(&extent);
                if !failed && self.plan_extent(extent, urgent, out) {
                    self.rebuild_cursor = number;
                    return;
                }
            }
        }
        // Those that lacked a source must not keep others waiting: they come last, in turn.
        for extent in std::mem::take(&mut self.rebuild_failed) {
            let begun = self.rebuild.is_some();
            if begun {
                self.rebuild_failed.push(extent);
            } else if !self.plan_extent(extent, true, out) {
                self.plan_extent(extent, false, out);
            }
        }
    }

    /// Starts work on an extent if it needs some and it is possible.
    fn plan_extent(&mut self, extent: ExtentIndex, urgent: bool, out: &mut Vec<Action>) -> bool {
        let set = self.config.layout.replicas(extent);
        let stale = self.stale[extent.0 as usize];
        let up = Self::mask_of(set, self.up);
        let leaving = Self::mask_of(set, self.leaving);
        let complete = up & !stale;
        if set.count() > self.config.replicas {
            // A move that was interrupted.
            // What has gaps and will not be filled, or is not coming back, is of no use beside a
            // complete one, and would keep the extent from another target.
            let hopeless = stale & (leaving | !up) | Self::mask_of(set, self.lost) & !up;
            let spare = (0..set.count()).find(|&p| {
                let useless = (stale | leaving | !up) >> p & 1 == 1;
                let rest = (complete & !(1 << p)).count_ones();
                let enough = rest >= u32::from(self.config.replicas);
                useless && enough || hopeless >> p & 1 == 1 && rest > 0
            });
            if let Some(position) = spare {
                let sponsor = set.sponsors()[usize::from(position)];
                self.drop_replica(extent, position, out);
                self.release(extent, sponsor, out);
                return false;
            }
        }
        if urgent {
            // One that is to leave is filled only if there is no complete one to move from.
            let fill = stale & up & if complete == 0 { 0xf } else { !leaving };
            let in_place = (0..set.count()).find(|&p| fill >> p & 1 == 1);
            if let Some(position) = in_place.filter(|&p| up & !(1 << p) != 0) {
                let to = set.sponsors()[usize::from(position)];
                self.begin(extent, to, None, true);
                return true;
            }
        }
        let gone = if urgent { Self::mask_of(set, self.lost) & !up } else { leaving & up };
        if gone == 0 || complete == 0 || set.count() > self.config.replicas {
            return false;
        }
        let old = set.sponsors()[gone.trailing_zeros() as usize];
        let Some(to) = self.pick(set) else { return false };
        self.begin(extent, to, Some(old), false);
        self.holds.push((extent, to));
        out.push(Action::Hold { extent, sponsor: to });
        true
    }

    fn begin(&mut self, extent: ExtentIndex, to: u8, instead_of: Option<u8>, copying: bool) {
        self.attempt = self.attempt.wrapping_add(1);
        self.rebuild = Some(Rebuild {
            extent,
            to,
            instead_of,
            copying,
            attempt: self.attempt,
            looked_at: 0,
            in_flight: BTreeMap::new(),
            again: Vec::new(),
            failed: false,
        });
    }

    /// The sponsor with the smallest load for its weight that may take one more extent.
    fn pick(&self, set: ReplicaSet) -> Option<u8> {
        let out = self.leaving | self.refused | self.suspect;
        (0..self.sponsors())
            .filter(|&s| self.up >> s & 1 == 1 && out >> s & 1 == 0 && set.position(s).is_none())
            .min_by_key(|&s| {
                let s = usize::from(s);
                (self.held[s] + 1) * 1_000_000 / u64::from(self.config.weights[s].max(1))
            })
    }

    pub(super) fn held_answer(
        &mut self,
        extent: ExtentIndex,
        sponsor: u8,
        ok: bool,
        out: &mut Vec<Action>,
    ) {
        if let Some(asked) = self.holds.iter().position(|&h| h == (extent, sponsor)) {
            self.holds.remove(asked);
        }
        if self.holds.contains(&(extent, sponsor)) {
            // It was asked again since, perhaps after a release: that answer counts.
            return;
        }
        let current =
            self.rebuild.take_if(|r| (r.extent, r.to, r.copying) == (extent, sponsor, false));
        let Some(mut r) = current else {
            if ok && self.config.layout.replicas(extent).position(sponsor).is_none() {
                self.release(extent, sponsor, out);
            }
            return;
        };
        if !ok {
            self.refused |= 1 << sponsor;
            self.counters.rebuild_failures += 1;
            // Another sponsor may have room.
            self.plan(out);
            return;
        }
        let set = self.config.layout.replicas(extent);
        let old = r.instead_of.and_then(|old| set.position(old).map(|p| (old, p)));
        let wanted = old.is_some_and(|(old, _)| (self.leaving | !self.up) >> old & 1 == 1);
        // The next owner does not know of this one: it is let go.
        let grown = set.with(sponsor).filter(|_| wanted && !self.frozen);
        let (Some(grown), Some((old, position))) = (grown, old) else {
            self.release(extent, sponsor, out);
            return;
        };
        self.config.layout.set(extent, grown);
        self.stale[extent.0 as usize] |= 1 << (grown.count() - 1);
        self.held[usize::from(sponsor)] += 1;
        r.copying = true;
        self.rebuild = Some(r);
        if self.up >> old & 1 == 0 && self.rest_is_complete(extent, position) {
            // It is away: its place is taken at once.
            self.drop_replica(extent, position, out);
        }
        self.changed.push(extent);
    }

    pub(super) fn pulled(&mut self, page: PageIndex, attempt: u32, ok: bool) {
        let Some(r) = &mut self.rebuild else { return };
        if r.attempt != attempt {
            return;
        }
        let Some(tries) = r.in_flight.remove(&page.0) else { return };
        if ok {
            self.counters.rebuilt_pages += 1;
        } else {
            r.again.push((page.0, tries + 1));
        }
    }

    fn complete(&mut self, r: &Rebuild, out: &mut Vec<Action>) {
        let set = self.config.layout.replicas(r.extent);
        let Some(position) = set.position(r.to) else { return };
        self.stale[r.extent.0 as usize] &= !(1 << position);
        self.counters.rebuilt_extents += 1;
        self.changed.push(r.extent);
        let old = r.instead_of.and_then(|old| set.position(old).map(|p| (old, p)));
        self.counters.moved_extents += u64::from(r.instead_of.is_some());
        if let Some((old, position)) = old {
            self.drop_replica(r.extent, position, out);
            self.release(r.extent, old, out);
        }
        // More to do, perhaps.
        self.rebuild_pause = 0;
    }

    pub(super) fn abort_rebuild(&mut self, out: &mut Vec<Action>) {
        let Some(r) = self.rebuild.take() else { return };
        self.counters.rebuild_failures += 1;
        self.pause();
        let set = self.config.layout.replicas(r.extent);
        let spare = set.position(r.to).filter(|&position| {
            // It got every write: while the others have gaps, it may be the only one with a page.
            set.count() > self.config.replicas && self.rest_is_complete(r.extent, position)
        });
        if let (true, Some(position)) = (r.copying, spare) {
            self.drop_replica(r.extent, position, out);
            self.release(r.extent, r.to, out);
        }
    }

    /// Whether a replica beside this one has no gap, and can be reached.
    fn rest_is_complete(&self, extent: ExtentIndex, position: u8) -> bool {
        let up = Self::mask_of(self.config.layout.replicas(extent), self.up);
        up & !(1 << position) & !self.stale[extent.0 as usize] != 0
    }

    /// A sponsor went away.
    pub(super) fn rebuild_lost(&mut self, sponsor: u8, out: &mut Vec<Action>) {
        if self.rebuild.as_ref().is_some_and(|r| r.to == sponsor) {
            self.abort_rebuild(out);
        }
    }

    fn release(&mut self, extent: ExtentIndex, sponsor: u8, out: &mut Vec<Action>) {
        if self.up >> sponsor & 1 == 1 {
            out.push(Action::Release { extent, sponsor });
        }
    }

    /// Takes a replica out of the set of an extent, and out of what is under way for its pages.
    fn drop_replica(&mut self, extent: ExtentIndex, position: u8, out: &mut Vec<Action>) {
        let set = self.config.layout.replicas(extent);
        let last = set.count() - 1;
        self.held[usize::from(set.sponsors()[usize::from(position)])] -= 1;
        self.config.layout.set(extent, set.without(position));
        let stale = &mut self.stale[extent.0 as usize];
        *stale = drop_bit(*stale, position, last);
        self.changed.push(extent);
        let first = u64::from(extent.0) * EXTENT_PAGES;
        let halves = |byte: u8| {
            drop_bit(byte & 0xf, position, last) | drop_bit(byte >> 4, position, last) << 4
        };
        for number in first..(first + EXTENT_PAGES).min(self.config.pages) {
            let page = PageIndex(number);
            let p = self.page(page);
            match p.state {
                State::Storing => {
                    p.store = halves(p.store);
                    self.settle(page);
                }
                State::Fetching => {
                    p.fetch = halves(p.fetch);
                    let nobody = p.fetch & 0xf == 0;
                    let prefetch = p.has(PREFETCHED) && !p.has(WANTED);
                    if nobody {
                        let class =
                            if prefetch { FetchClass::Prefetch } else { FetchClass::Demand };
                        self.ask(page, class, out);
                    }
                }
                _ => {}
            }
        }
    }
}
