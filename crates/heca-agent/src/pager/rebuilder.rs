//! The thread that has sponsors copy pages from each other, within a bound on the traffic.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crossbeam_channel::Receiver;
use heca_core::pager::Event;
use heca_types::limits::{COPY_TIMEOUT_MS, FRAME_PAGES_MAX, PAGE_BYTES};
use heca_types::{PageIndex, PageVersion, Status};
use heca_wire::{Body, Header, Kind, PageEntry, Role, encode_pull};

use super::engine::Message;
use super::keeper::Mailbox;
use super::remote::{Remote, chain};
use crate::link::{Link, LinkError};

/// A page to copy.
#[derive(Debug, Clone, Copy)]
pub(super) struct PullJob {
    pub(super) page: PageIndex,
    pub(super) version: PageVersion,
    pub(super) from: u8,
    pub(super) to: u8,
    pub(super) attempt: u32,
}

pub(super) struct Rebuilder {
    remote: Remote,
    jobs: Receiver<PullJob>,
    engine: Mailbox,
    links: HashMap<u8, Link>,
}

impl Rebuilder {
    pub(super) fn new(remote: Remote, jobs: Receiver<PullJob>, engine: Mailbox) -> Self {
        Self { remote, jobs, engine, links: HashMap::new() }
    }

    /// Runs until the engine is gone.
    pub(super) fn run(mut self) {
        let mut next = None;
        loop {
            let first: PullJob = match next.take() {
                Some(job) => job,
                None => match self.jobs.recv() {
                    Ok(job) => job,
                    Err(_) => return,
                },
            };
            let mut batch = vec![first];
            while batch.len() < FRAME_PAGES_MAX {
                match self.jobs.try_recv() {
                    Ok(job) if (job.from, job.to) == (first.from, first.to) => batch.push(job),
                    Ok(job) => {
                        next = Some(job);
                        break;
                    }
                    Err(_) => break,
                }
            }
            let begun = Instant::now();
            let copied = self.copy(&batch);
            let events = batch.iter().enumerate().map(|(i, job)| Event::Pulled {
                page: job.page,
                attempt: job.attempt,
                ok: copied.as_ref().is_some_and(|ok| ok[i]),
            });
            self.engine.send(Message::Events(events.collect()));
            self.slow_down(batch.len(), begun);
        }
    }

    /// Waits as long as the bound on the traffic calls for.
    fn slow_down(&self, pages: usize, begun: Instant) {
        let bytes = (pages * PAGE_BYTES) as f64;
        let due = Duration::from_secs_f64(
            bytes / self.remote.0.config.rebuild_bytes_per_s.max(1 << 20) as f64,
        );
        std::thread::sleep(due.saturating_sub(begun.elapsed()));
    }

    fn copy(&mut self, batch: &[PullJob]) -> Option<Vec<bool>> {
        let to = batch.first()?.to;
        let known = self.links.contains_key(&to);
        let mut outcome = self.ask(batch);
        if known && outcome.as_ref().is_err_and(LinkError::is_lost_connection) {
            // The target was started again since: that is no failure of the copy.
            self.links.remove(&to);
            outcome = self.ask(batch);
        }
        if let Err(error) = &outcome {
            self.links.remove(&to);
            let target = self.remote.address(to);
            tracing::debug!(target, "pages not copied: {}", chain(error));
        }
        outcome.ok()
    }

    fn ask(&mut self, batch: &[PullJob]) -> Result<Vec<bool>, LinkError> {
        let inner = &self.remote.0;
        let (from, to) = (batch[0].from, batch[0].to);
        let source = self.remote.address(from);
        let link = match self.links.entry(to) {
            std::collections::hash_map::Entry::Occupied(known) => known.into_mut(),
            std::collections::hash_map::Entry::Vacant(new) => {
                let address = self.remote.address(to);
                let owner = inner.config.owner;
                new.insert(Link::connect(&address, Role::Rebuild, owner, &inner.security)?.0)
            }
        };
        let entries: Vec<PageEntry> =
            batch.iter().map(|job| PageEntry::new(job.page, job.version)).collect();
        let header = Header::new(Kind::Pull, inner.config.region, self.remote.epoch(), 6);
        encode_pull(header, &entries, &source, link.output());
        let timeout = Duration::from_millis(COPY_TIMEOUT_MS);
        let answers = link.request(timeout, |header, body| match body {
            Body::Pages(list) if header.kind == Kind::PullAck => {
                let entries = list.entries().iter();
                Some(entries.map(|e| (e.page(), e.status())).collect::<Vec<_>>())
            }
            _ => None,
        })?;
        self.remote.note_stored(to);
        let ok = batch.iter().enumerate().map(|(i, job)| {
            // A newer version on the target was written by ourselves.
            let answer = answers.get(i).filter(|(page, _)| *page == job.page);
            matches!(answer, Some((_, Status::Ok | Status::Superseded)))
        });
        Ok(ok.collect())
    }
}
