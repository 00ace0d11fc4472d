//! The target's bulk connections: pages into the RAM file, and after the switch into the guest's memory.

use std::io::IoSlice;
use std::sync::PoisonError;

use heca_core::pager::Event;
use heca_types::PageIndex;
use heca_types::limits::PAGE_BYTES;
use heca_wire::{Body, Kind, PageList};

use super::import::{Importer, Stage, protocol};
use super::transfer::{Content, content, page_buffer, punch};
use super::{Tag, be_nice};
use crate::link::{Link, LinkError};
use crate::pager::engine::Message;
use crate::pager::remote::{chain, lock};

impl Importer {
    /// A bulk connection.
    pub(super) fn receive(&self, mut link: Link) {
        be_nice();
        let mut switched = *lock(&self.stage.0) == Stage::Switched;
        let outcome = loop {
            match self.take_frame(&mut link, &mut switched) {
                Ok(()) => {}
                Err(error) => break error,
            }
        };
        if !matches!(outcome, LinkError::Closed) {
            tracing::debug!("a connection of the source ended: {}", chain(&outcome));
        }
        // Whatever is wrong with it: the source connects anew.
        link.shut_down();
    }

    fn take_frame(&self, link: &mut Link, switched: &mut bool) -> Result<(), LinkError> {
        while !link.has_frame()? {
            link.receive_blocking()?;
        }
        let Some((header, body)) = link.next_frame()? else { return Ok(()) };
        match body {
            Body::Pages(list) if header.kind == Kind::Write => {
                if *switched {
                    self.bring(&list)
                } else {
                    self.store(&list)
                }
            }
            Body::Pages(list) if header.kind == Kind::Discard && !*switched => {
                let filled = lock(&self.filled);
                let prepared = lock(&self.prepared);
                let (Some(filled), Some(prepared)) = (&*filled, &*prepared) else {
                    return Err(protocol("pages after the switch"));
                };
                for entry in list.entries() {
                    let page = entry.page().0;
                    self.check(page)?;
                    self.known.clear(page);
                    if filled.clear(page) {
                        punch(&prepared.ram, page, 1)?;
                    }
                }
                Ok(())
            }
            Body::Blob(_) if header.request == Tag::Barrier as u64 && !*switched => {
                *lock(&self.barriers.0) += 1;
                self.barriers.1.notify_all();
                let (stage, changed) = &self.stage;
                let stage = changed
                    .wait_while(lock(stage), |stage| *stage == Stage::Receiving)
                    .unwrap_or_else(PoisonError::into_inner);
                if *stage == Stage::Failed {
                    return Err(LinkError::Closed);
                }
                *switched = true;
                Ok(())
            }
            _ => Err(LinkError::Unexpected { found: header.kind }),
        }
    }

    fn check(&self, page: u64) -> Result<(), LinkError> {
        if page < self.pages { Ok(()) } else { Err(protocol("a page beyond the region")) }
    }

    /// Before the switch: into the file.
    fn store(&self, list: &PageList<'_>) -> Result<(), LinkError> {
        // Held by the switch only for as long as it takes to take them.
        let (ram, filled) = {
            let prepared = lock(&self.prepared);
            let Some(prepared) = &*prepared else { return Err(protocol("pages after the switch")) };
            (prepared.ram.clone(), &self.filled)
        };
        let mut run: Vec<IoSlice<'_>> = Vec::with_capacity(list.entries().len());
        let mut first = 0;
        let flush = |run: &mut Vec<IoSlice<'_>>, first: u64| -> Result<(), LinkError> {
            if run.is_empty() {
                return Ok(());
            }
            let pages = first..first + run.len() as u64;
            if let Some(filled) = &*lock(filled) {
                filled.set_range(pages.clone());
            }
            write_run(&ram, run, first)?;
            self.known.set_range(pages);
            lock(&self.arrivals).push((first, run.len() as u64));
            run.clear();
            Ok(())
        };
        let mut room = page_buffer();
        for (entry, data) in list.iter() {
            let page = entry.page().0;
            self.check(page)?;
            let content = content(entry, data, &mut room);
            let content = content.ok_or_else(|| protocol("a page is damaged"))?;
            if !matches!(content, Content::Bytes(_)) || page != first + run.len() as u64 {
                flush(&mut run, first)?;
                first = page;
            }
            match content {
                Content::Bytes(bytes) => run.push(IoSlice::new(bytes)),
                Content::Room => {
                    flush(&mut vec![IoSlice::new(&room[..])], page)?;
                    first = page + 1;
                }
                Content::Zeros => {
                    let held = lock(filled);
                    if held.as_ref().is_some_and(|filled| filled.clear(page)) {
                        punch(&ram, page, 1)?;
                    }
                    drop(held);
                    self.known.set(page);
                    first = page + 1;
                }
            }
        }
        flush(&mut run, first)
    }

    /// After the switch: into the guest's memory.
    fn bring(&self, list: &PageList<'_>) -> Result<(), LinkError> {
        let (Some(behind), Some(handle)) = (self.behind.get(), self.handle.get()) else {
            return Err(protocol("pages before the switch"));
        };
        let mut brought: Vec<PageIndex> = Vec::with_capacity(list.entries().len());
        let mut room = page_buffer();
        let mut outcome = Ok(());
        for (entry, data) in list.iter() {
            let bytes = match content(entry, data, &mut room) {
                Some(Content::Zeros) => None,
                Some(Content::Bytes(bytes)) => Some(bytes),
                Some(Content::Room) => Some(&room[..]),
                None => {
                    outcome = Err(protocol("a page is damaged"));
                    break;
                }
            };
            match behind.bring(entry.page(), bytes) {
                Ok(true) => brought.push(entry.page()),
                Ok(false) => {}
                Err(error) => {
                    outcome = Err(error.into());
                    break;
                }
            }
        }
        // Those that were taken are told of whatever became of the others: nobody sends them again.
        for run in brought.chunk_by(|a, b| a.0 + 1 == b.0) {
            let _ = behind.map(run[0].0..run[0].0 + run.len() as u64);
        }
        let events = brought.into_iter().map(|page| Event::Arrived { page }).collect();
        handle.mailbox().send(Message::Events(events));
        outcome
    }
}

fn write_run(ram: &std::fs::File, run: &[IoSlice<'_>], first: u64) -> std::io::Result<()> {
    let mut offset = PageIndex(first).offset();
    let mut left = run.len() * PAGE_BYTES;
    let mut at = 0;
    while left > 0 {
        let written = rustix::io::pwritev(ram, &run[at..], offset)?;
        // Whole pages: tmpfs ends early only when it has no memory.
        if written == 0 || !written.is_multiple_of(PAGE_BYTES) {
            return Err(std::io::ErrorKind::StorageFull.into());
        }
        offset += written as u64;
        left -= written;
        at += written / PAGE_BYTES;
    }
    Ok(())
}
