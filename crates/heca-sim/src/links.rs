//! What moves on the connections, and what sponsors do with it.

use heca_core::pager::{Event, FetchError};
use heca_types::{Epoch, ExtentIndex, PageVersion, Status};

use crate::history::What;
use crate::network::{LANES, Note, PULLS, PullStart, Pulling, Request};
use crate::oracle::Check;
use crate::report::Mark;
use crate::world::World;

const FRAMES_PER_STEP: usize = 6;
/// Copies between sponsors travel in large batches.
const PULLS_PER_STEP: usize = 64;

impl World {
    /// Some frames of one connection move on, in one direction.
    pub(crate) fn network_step(&mut self) -> Check {
        let from = self.rng.below(self.nodes.len());
        let mut order = (0..self.nodes.len()).map(|i| (from + i) % self.nodes.len());
        let Some(sponsor) = order.find(|&s| self.nodes[s].can_move(self.tick)) else {
            return Ok(());
        };
        let node = &self.nodes[sponsor];
        let frozen = node.lanes[PULLS].frozen_until > self.tick;
        if !node.pulling.is_empty() && !frozen && self.rng.one_in(2) {
            for _ in 0..self.rng.range(1, PULLS_PER_STEP) {
                self.finish_pull(sponsor);
            }
            return Ok(());
        }
        let first = self.rng.below(LANES);
        let back = self.rng.one_in(2);
        for lane in (0..LANES).map(|i| (first + i) % LANES) {
            let queues = &self.nodes[sponsor].lanes[lane];
            let waiting = if back { queues.replies.len() } else { queues.requests.len() };
            if waiting == 0 || queues.frozen_until > self.tick {
                continue;
            }
            let most = if lane == PULLS { PULLS_PER_STEP } else { FRAMES_PER_STEP };
            for _ in 0..self.rng.range(1, most).min(waiting) {
                let queues = &mut self.nodes[sponsor].lanes[lane];
                if back {
                    self.inbox.extend(queues.replies.pop_front());
                } else if let Some(request) = queues.requests.pop_front() {
                    let reply = self.serve(sponsor, request)?;
                    self.nodes[sponsor].lanes[lane].replies.extend(reply);
                    self.hold_up(sponsor, lane, request);
                }
            }
            return Ok(());
        }
        Ok(())
    }

    /// Perhaps an answer to a fetch is held up: that of a slow sponsor, which is noticed or not.
    fn hold_up(&mut self, sponsor: usize, lane: usize, request: Request) {
        let rate = self.rates().slow_answer;
        if !matches!(request, Request::Fetch { .. }) || !self.rng.one_in(rate) {
            return;
        }
        let Some(note) = self.nodes[sponsor].lanes[lane].replies.pop_back() else { return };
        self.stats.mark(Mark::AnswerHeldUp);
        let until = self.tick + self.rng.range(300, 6000) as u64;
        self.nodes[sponsor].held_up.push((until, note));
        if self.rng.one_in(8) {
            let (sponsor, suspect) = (sponsor as u8, true);
            self.inbox.push_back(Event::SponsorSuspect { sponsor, suspect }.into());
        }
    }

    fn serve(
        &mut self,
        sponsor: usize,
        request: Request,
    ) -> Result<Option<Note>, crate::oracle::Failure> {
        let name = sponsor as u8;
        let epoch = self.epoch;
        Ok(match request {
            Request::Fetch { slot, version } => Some(self.serve_fetch(sponsor, slot, version)),
            Request::Store { slot, version, value } => {
                let page = self.page(slot);
                let rate = self.rates().store_refused;
                let refused = self.rng.one_in(rate);
                if refused {
                    self.stats.mark(Mark::StoreRefused);
                    self.note(page, What::SponsorRefused { sponsor: name, version: version.0 });
                }
                let ok = !refused && self.store(sponsor, epoch, slot, version, value);
                let sponsor = name;
                Some(if ok {
                    Event::Stored { page, version, sponsor }.into()
                } else {
                    Event::StoreFailed { page, version, sponsor }.into()
                })
            }
            Request::Hold { extent } => {
                let ok = self.hold(sponsor, epoch, extent);
                self.check_offer(sponsor)?;
                Some(Event::Held { extent, sponsor: name, ok }.into())
            }
            Request::Release { extent } => {
                self.release(sponsor, epoch, extent);
                self.check_offer(sponsor)?;
                None
            }
            Request::Pull { slot, version, from, attempt } => {
                self.start_pull(sponsor, slot, version, (from, attempt))
            }
        })
    }

    fn serve_fetch(&mut self, sponsor: usize, slot: usize, version: PageVersion) -> Note {
        let name = sponsor as u8;
        let page = self.page(slot);
        self.note(page, What::SponsorServed { sponsor: name, version: version.0 });
        let answer = self.nodes[sponsor].read(self.epoch, page, slot, version);
        match self.spoil(sponsor, slot, version).map_or(answer, Err) {
            Ok(reply) => Note { event: Event::Fetched { page, version, sponsor: name }, reply },
            Err(error) => {
                self.oracle.failed[slot] |= 1 << name;
                Event::FetchFailed { page, sponsor: name, error }.into()
            }
        }
    }

    pub(crate) fn store(
        &mut self,
        sponsor: usize,
        epoch: Epoch,
        slot: usize,
        version: PageVersion,
        value: u64,
    ) -> bool {
        let page = self.page(slot);
        let result = self.nodes[sponsor].write(epoch, page, slot, (version, value));
        let (sponsor, number) = (sponsor as u8, version.0);
        self.note(
            page,
            match result {
                Ok(()) => What::SponsorStored { sponsor, version: number, value },
                Err(_) => What::SponsorRefused { sponsor, version: number },
            },
        );
        result.is_ok()
    }

    fn hold(&mut self, sponsor: usize, epoch: Epoch, extent: ExtentIndex) -> bool {
        let node = &mut self.nodes[sponsor];
        let full = node.full && !node.extents().contains(&extent);
        let ok = !full && node.open(self.tick, epoch, &[extent], &self.params.slots).is_ok();
        if !ok {
            self.stats.mark(Mark::HoldRefused);
        }
        self.note(None, What::Held { sponsor: sponsor as u8, extent: extent.0, ok });
        ok
    }

    fn release(&mut self, sponsor: usize, epoch: Epoch, extent: ExtentIndex) -> bool {
        let node = &mut self.nodes[sponsor];
        let ok = node.release(self.tick, epoch, extent, &self.params.slots).is_ok();
        if ok {
            self.stats.mark(Mark::Released);
        }
        self.note(None, What::Released { sponsor: sponsor as u8, extent: extent.0, ok });
        ok
    }

    /// A sponsor is asked to get a page: it looks at what it has, and reads at the source.
    fn start_pull(
        &mut self,
        sponsor: usize,
        slot: usize,
        version: PageVersion,
        (from, attempt): (u8, u32),
    ) -> Option<Note> {
        let page = self.page(slot);
        let epoch = self.epoch;
        let answer = |ok| Some(Event::Pulled { page, attempt, ok }.into());
        match self.nodes[sponsor].start_pull(epoch, page, slot, version) {
            PullStart::Present => {
                self.stats.mark(Mark::PullPresent);
                return answer(true);
            }
            PullStart::Refused => {
                self.stats.mark(Mark::PullFailed);
                return answer(false);
            }
            PullStart::Read => {}
        }
        let source = &self.nodes[usize::from(from)];
        let rate = self.rates().pull_fails;
        let value = if source.alive && !self.rng.one_in(rate) {
            self.nodes[usize::from(from)].read(epoch, page, slot, version).ok()
        } else {
            None
        };
        self.note(page, What::PullRead { from, to: sponsor as u8, version: version.0, value });
        if self.chaos && self.rng.one_in(60) {
            let until = self.tick + self.rng.range(200, 2000) as u64;
            self.nodes[sponsor].lanes[PULLS].frozen_until = until;
        }
        let pulling = Pulling { slot, version, attempt, epoch, value };
        self.nodes[sponsor].pulling.push_back(pulling);
        None
    }

    /// What was read at the source is written here.
    fn finish_pull(&mut self, sponsor: usize) {
        let Some(pulling) = self.nodes[sponsor].pulling.pop_front() else { return };
        let Pulling { slot, version, attempt, epoch, value } = pulling;
        let page = self.page(slot);
        let ok = value.is_some_and(|value| {
            match self.nodes[sponsor].write(epoch, page, slot, (version, value)) {
                Ok(()) => {
                    self.stats.mark(Mark::PullCopied);
                    let (sponsor, version) = (sponsor as u8, version.0);
                    self.note(page, What::SponsorStored { sponsor, version, value });
                    true
                }
                Err(refusal) if refusal.status == Status::Superseded => {
                    self.stats.mark(Mark::PullSuperseded);
                    true
                }
                Err(_) => false,
            }
        });
        if !ok {
            self.stats.mark(Mark::PullFailed);
        }
        let answer = Event::Pulled { page, attempt, ok }.into();
        self.nodes[sponsor].lanes[PULLS].replies.push_back(answer);
    }

    /// Perhaps an error in place of a good reply. Only if another sponsor can help, and once for
    /// each time that a page is brought in, so that the page must not be given up.
    fn spoil(&mut self, sponsor: usize, slot: usize, version: PageVersion) -> Option<FetchError> {
        let rate = self.rates().corrupt;
        if !self.rng.one_in(rate) || self.oracle.spoilt[slot] {
            return None;
        }
        if !self.helped_by_another(sponsor, slot, version) {
            return None;
        }
        self.oracle.spoilt[slot] = true;
        self.stats.mark(Mark::FetchSpoilt);
        Some(self.rng.pick(&[FetchError::Corrupt, FetchError::Absent, FetchError::Refused]))
    }

    pub(crate) fn helped_by_another(
        &self,
        sponsor: usize,
        slot: usize,
        version: PageVersion,
    ) -> bool {
        let set = self.pager.layout().replicas(self.page(slot).extent());
        set.sponsors()
            .iter()
            .map(|&s| usize::from(s))
            .filter(|&s| s != sponsor && self.oracle.failed[slot] >> s & 1 == 0)
            .any(|s| self.nodes[s].can_serve(slot, version))
    }

    /// A frame of a lost connection is read at last, perhaps one of an owner that is no more.
    pub(crate) fn late_frame(&mut self, sponsor: usize) -> Check {
        if !self.nodes[sponsor].alive || self.nodes[sponsor].late.is_empty() {
            return Ok(());
        }
        let (epoch, request) = self.nodes[sponsor].late.remove(0);
        let fenced = epoch < self.nodes[sponsor].epoch;
        let (slot, what, done) = match request {
            Request::Store { slot, version, value } => {
                (Some(slot), "a late write", self.store(sponsor, epoch, slot, version, value))
            }
            Request::Fetch { slot, version } => {
                let answer = self.nodes[sponsor].read(epoch, self.page(slot), slot, version);
                (Some(slot), "a late read", answer != Err(FetchError::Refused))
            }
            Request::Pull { slot, version, from, .. } => {
                let page = self.page(slot);
                let start = self.nodes[sponsor].start_pull(epoch, page, slot, version);
                let source = self.nodes[usize::from(from)].read(epoch, page, slot, version);
                if let (PullStart::Read, Ok(value)) = (start, source) {
                    self.store(sponsor, epoch, slot, version, value);
                }
                (Some(slot), "a late copy", start != PullStart::Refused)
            }
            Request::Hold { extent } => (None, "a late hold", self.hold(sponsor, epoch, extent)),
            Request::Release { extent } => {
                (None, "a late release", self.release(sponsor, epoch, extent))
            }
        };
        let page = slot.map(|slot| self.page(slot));
        if fenced {
            self.check_refused(page, what, !done)?;
            self.stats.mark(Mark::LateOldEpochRefused);
        } else if done && epoch < self.epoch {
            self.stats.mark(Mark::LateOldEpochExecuted);
        } else if matches!(request, Request::Store { .. }) {
            self.stats.mark(if done { Mark::LateFrame } else { Mark::LateRefused });
        }
        self.check_offer(sponsor)
    }
}
