//! The switch: the target's pager goes on with what the source's told it.

use std::collections::VecDeque;

use heca_core::handover::{PageRecord, PageRecords};
use heca_core::invariants::{PG_1, PG_2};
use heca_core::pager::{Config, Event, Pager};
use heca_types::{Epoch, ExtentIndex, PageIndex};

use crate::evictor::Evictor;
use crate::guest::{FaultMessage, Vcpu};
use crate::kernel::Kernel;
use crate::migration::Phase;
use crate::network::{LANES, Lane, Note, Pulling, Request};
use crate::oracle::{Check, Oracle, fail};
use crate::params::{BUDGET_MAX, BUDGET_MIN};
use crate::recovery::Journal;
use crate::report::{Mark, SIM_1};
use crate::world::{Known, World};

/// The pager's end of the connections to a sponsor.
#[derive(Debug, Default)]
struct Link {
    up: bool,
    lanes: [Lane; LANES],
    pulling: VecDeque<Pulling>,
    held_up: Vec<(u64, Note)>,
}

/// What there is once for each host. The world has the one that a pager is at work on.
#[derive(Debug)]
pub(crate) struct Host {
    pager: Pager,
    config: Config,
    pub(crate) kernel: Kernel,
    journal: Journal,
    known: Vec<Known>,
    evictor: Evictor,
    taken: VecDeque<FaultMessage>,
    messages: VecDeque<FaultMessage>,
    vcpus: Vec<Vcpu>,
    inbox: VecDeque<Note>,
    oracle: Oracle,
    pulled_from: Vec<Option<(u8, u32)>>,
    links: Vec<Link>,
}

impl World {
    pub(crate) fn is_loading(&self) -> bool {
        self.phase() == Some(Phase::Loading)
    }

    /// Whether the target's QEMU begins no further reads.
    pub(crate) fn has_loaded(&self) -> bool {
        let over = self.migration.as_ref().is_some_and(|m| self.tick >= m.until);
        over && self.is_loading()
    }

    fn swap_host(&mut self, host: &mut Host) {
        use std::mem::swap;
        swap(&mut self.pager, &mut host.pager);
        swap(&mut self.config, &mut host.config);
        swap(&mut self.kernel, &mut host.kernel);
        swap(&mut self.journal, &mut host.journal);
        swap(&mut self.known, &mut host.known);
        swap(&mut self.evictor, &mut host.evictor);
        swap(&mut self.taken, &mut host.taken);
        swap(&mut self.guest.messages, &mut host.messages);
        swap(&mut self.guest.vcpus, &mut host.vcpus);
        swap(&mut self.inbox, &mut host.inbox);
        self.oracle.swap_host(&mut host.oracle);
        swap(&mut self.pulled_from, &mut host.pulled_from);
        for (node, link) in self.nodes.iter_mut().zip(&mut host.links) {
            swap(&mut node.up, &mut link.up);
            swap(&mut node.lanes, &mut link.lanes);
            swap(&mut node.pulling, &mut link.pulling);
            swap(&mut node.held_up, &mut link.held_up);
        }
    }

    /// A pager and its journal from what the source told, over what it sent.
    fn next_host(
        &mut self,
        mut kernel: Kernel,
        list: &[u8],
        extents: &[u64],
    ) -> Result<Host, String> {
        let slots = self.params.slots.len();
        let mut config = self.config.clone();
        if self.rng.one_in(2) {
            config.budget_pages = self.rng.range(BUDGET_MIN, BUDGET_MAX) as u64;
        }
        let mut pager = Pager::new(config.clone());
        for &weight in &self.added {
            pager.add_sponsor(weight);
        }
        let mut journal = Journal::new(slots, extents.len());
        let mut known = Vec::new();
        for (number, &record) in extents.iter().enumerate() {
            let extent = ExtentIndex(number as u32);
            pager.adopt_extent(extent, record).map_err(|error| error.to_string())?;
            journal.extents[number] = record;
            known.push((pager.layout().replicas(extent), pager.stale(extent)));
        }
        for run in PageRecords::new(list, self.params.pages) {
            let (pages, record) = run.map_err(|error| error.to_string())?;
            for page in pages.map(PageIndex) {
                match record {
                    PageRecord::Zero(version) => pager.adopt_absent(page, version, false),
                    PageRecord::Remote(version) => pager.adopt_absent(page, version, true),
                    PageRecord::Sent(version) => pager.adopt_resident(page, version),
                    PageRecord::Behind(version) => pager.adopt_behind(page, version),
                }
                let Some(slot) = self.slot_if_used(page) else { continue };
                journal.versions[slot] = record.version();
                journal.dropped[slot] = matches!(record, PageRecord::Remote(_));
                journal.behind[slot] = matches!(record, PageRecord::Behind(_));
                if !matches!(record, PageRecord::Sent(_)) {
                    kernel.punch(slot);
                } else if kernel.frame(slot).content.is_none() {
                    return Err(format!("{page} was told as sent, and is not here"));
                }
                // A page that is lost is lost to the next owner, too.
                if self.kernel.frame(slot).poisoned {
                    kernel.poison(slot);
                }
            }
        }
        let mut oracle = Oracle::new(slots, config.budget_pages);
        oracle.adopted(pager.gauges().local_pages);
        let mut vcpus = self.guest.vcpus.clone();
        vcpus.iter_mut().for_each(Vcpu::try_again);
        Ok(Host {
            pager,
            config,
            kernel,
            journal,
            known,
            evictor: Evictor::default(),
            taken: VecDeque::new(),
            messages: VecDeque::new(),
            vcpus,
            inbox: VecDeque::new(),
            oracle,
            pulled_from: vec![None; slots],
            links: self.nodes.iter().map(|_| Link::default()).collect(),
        })
    }

    /// The target gets its pager. It may read from sponsors, under the source's epoch.
    pub(crate) fn load(&mut self) -> Check {
        self.actions_left = None;
        self.check_still_true()?;
        let Some(mut migration) = self.migration.take() else { return Ok(()) };
        let mut kernel = migration.prepared.clone();
        for parcel in migration.tracker.wire.drain(..) {
            parcel.arrive(&mut kernel);
        }
        let mut host = match self.next_host(kernel, &migration.list, &migration.extents) {
            Ok(host) => host,
            Err(error) => return fail(SIM_1, None, error),
        };
        self.swap_host(&mut host);
        migration.source = Some(Box::new(host));
        migration.phase = Phase::Loading;
        migration.until = self.tick + self.rng.range(0, 300) as u64;
        migration.following.begin(&self.journal.behind);
        for (sponsor, node) in self.nodes.iter_mut().enumerate() {
            node.emptied_untold |= migration.emptied_before >> sponsor & 1 == 1;
        }
        self.migration = Some(migration);
        // What the source has of a page that it told as remote does not come along.
        (0..self.params.slots.len()).for_each(|slot| self.recount_lost(slot));
        self.note(None, crate::history::What::Migration(Phase::Loading));
        self.deliver(Event::Freeze { on: true }.into())?;
        self.meet_sponsors()
    }

    /// What was told stays true while the source waits: its content is where it was.
    fn check_still_true(&mut self) -> Check {
        let Some(migration) = &self.migration else { return Ok(()) };
        for run in PageRecords::new(&migration.list, self.params.pages) {
            let Ok((pages, record)) = run else { continue };
            for page in pages.map(PageIndex) {
                let Some(slot) = self.slot_if_used(page) else { continue };
                let local = self.kernel.frame(slot).content.is_some();
                let gone = self.oracle.expected[slot].discarded;
                let kept = match record {
                    PageRecord::Behind(_) | PageRecord::Sent(_) => local || gone,
                    PageRecord::Remote(version) => local || self.pager.holding(page).1 == version,
                    PageRecord::Zero(_) => true,
                };
                if !kept {
                    let now = self.pager.holding(page);
                    return fail(SIM_1, page, format!("{record:?} was told, now it is {now:?}"));
                }
            }
        }
        Ok(())
    }

    /// PG-1 and PG-2 for every page in the moment of the takeover: what comes from the source or was
    /// sent is current, what comes from sponsors is there.
    fn check_handed_over(&mut self) -> Check {
        let Some(migration) = self.migration.take() else { return Ok(()) };
        let mut result = Ok(());
        for slot in 0..self.params.slots.len() {
            let frame = self.kernel.frame(slot);
            let source = migration.source.as_ref().map(|source| source.kernel.frame(slot));
            let value = if self.journal.behind[slot] {
                source.and_then(|frame| frame.content).unwrap_or(0)
            } else if frame.content.is_none() && self.journal.dropped[slot] {
                // What the source still has of it goes now.
                result = result.and_then(|()| self.check_on_sponsors(slot));
                continue;
            } else {
                frame.content.unwrap_or(0)
            };
            self.stats.checked(PG_1);
            let expected = self.oracle.expected[slot];
            if !expected.allows(value) && !frame.poisoned {
                let detail =
                    format!("{value:#x} is handed over, written was {:#x}", expected.value);
                result = result.and(fail(PG_1, self.page(slot), detail));
            }
        }
        self.migration = Some(migration);
        result
    }

    fn check_on_sponsors(&mut self, slot: usize) -> Check {
        self.stats.checked(PG_2);
        self.recount_lost(slot);
        let (page, version) = (self.page(slot), self.journal.versions[slot]);
        let expected = self.oracle.expected[slot];
        let set = self.pager.layout().replicas(page.extent());
        let has = |&s: &u8| {
            let stored = self.nodes[usize::from(s)].store[slot].filter(|s| s.version == version);
            stored.is_some_and(|stored| expected.allows(stored.value))
        };
        let excused = self.oracle.lost[slot] || expected.discarded;
        if excused || set.sponsors().iter().any(has) {
            return Ok(());
        }
        let detail = format!("told as remote in version {}, but no sponsor has it", version.0);
        fail(PG_2, page, detail)
    }

    /// The target is granted the right to run: it takes the sponsors over, and the guest goes on.
    pub(crate) fn commit(&mut self) -> Check {
        self.actions_left = None;
        self.check_handed_over()?;
        let old = self.epoch;
        self.epoch = Epoch(old.0 + 1);
        self.leave_source(old);
        for sponsor in 0..self.nodes.len() {
            let name = sponsor as u8;
            if self.nodes[sponsor].up {
                for lane in 0..LANES {
                    for request in std::mem::take(&mut self.nodes[sponsor].lanes[lane].requests) {
                        self.lose_request(name, request);
                    }
                }
                if self.rng.one_in(6) || !self.connect(sponsor) {
                    self.disconnect(sponsor);
                }
            } else if self.nodes[sponsor].alive && !self.rng.one_in(6) && self.connect(sponsor) {
                self.inbox.push_back(Event::SponsorUp { sponsor: name }.into());
            }
        }
        if let Some(migration) = &mut self.migration {
            migration.phase = Phase::Following;
            self.stats.mark(if migration.safe { Mark::CommittedSafe } else { Mark::Committed });
        }
        self.note(None, crate::history::What::Migration(Phase::Following));
        self.guest.stopped = false;
        if self.rates().pager_crash != 0 && self.rng.one_in(8) {
            // The right to run is here for good: the next pager takes over what this one began to.
            self.stats.mark(Mark::CrashAmidTakeover);
            self.pager_crashes();
            return Ok(());
        }
        self.deliver(Event::Freeze { on: false }.into())?;
        for number in 0..self.known.len() {
            self.check_complete_replicas(ExtentIndex(number as u32))?;
        }
        Ok(())
    }

    /// The source is no owner any more. What it had on its way to sponsors may still be read there,
    /// under its epoch.
    fn leave_source(&mut self, epoch: Epoch) {
        let Some(migration) = &mut self.migration else { return };
        let Some(source) = &mut migration.source else { return };
        self.stats.add_counters(source.pager.counters());
        let slots = &self.params.slots;
        let mut stores = Vec::new();
        for victim in source.evictor.victims() {
            let Ok(slot) = slots.binary_search(&victim.page.0) else { continue };
            let value = source.kernel.frame(slot).content.unwrap_or(0);
            let store = Request::Store { slot, version: victim.version, value };
            stores.push((victim.sponsors, store));
        }
        let mut left = Vec::new();
        for (sponsor, link) in source.links.iter_mut().enumerate() {
            let lanes = std::mem::take(&mut link.lanes);
            let node = &mut self.nodes[sponsor];
            node.late.extend(lanes.into_iter().flat_map(|l| l.requests).map(|r| (epoch, r)));
            let to = stores.iter().filter(|(mask, _)| mask >> sponsor & 1 == 1);
            node.late.extend(to.map(|&(_, store)| (epoch, store)));
            left.push((sponsor, std::mem::take(&mut link.pulling)));
        }
        for (sponsor, pulling) in left {
            self.keep_pulls(sponsor, pulling);
        }
    }

    /// The target is gone before it was granted the right to run.
    pub(crate) fn back_to_source(&mut self, mut source: Host, broken: u16, emptied: u16) {
        self.stats.add_counters(self.pager.counters());
        self.actions_left = None;
        self.swap_host(&mut source);
        for slot in 0..self.params.slots.len() {
            self.oracle.lost[slot] &= !self.is_local(slot);
        }
        for sponsor in 0..self.nodes.len() {
            let name = sponsor as u8;
            let lost = broken >> sponsor & 1 == 1 || !self.nodes[sponsor].alive;
            if self.nodes[sponsor].up && lost {
                self.disconnect(sponsor);
            }
            let empty = |note: &Note| note.event == Event::SponsorEmptied { sponsor: name };
            if emptied >> sponsor & 1 == 1 {
                self.inbox.push_back(Event::SponsorEmptied { sponsor: name }.into());
            }
            self.nodes[sponsor].emptied_untold |= self.inbox.iter().any(empty);
            let leaving = self.nodes[sponsor].leaving;
            self.inbox.push_back(Event::SponsorLeaving { sponsor: name, leaving }.into());
        }
    }
}
