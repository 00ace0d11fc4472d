//! A sponsor gets pages from another one: how a replica is rebuilt without its owner in between.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use heca_core::sponsor::Refusal;
use heca_types::limits::{PAGE_BYTES, PULL_TIMEOUT_MS, RECONNECT_PAUSE_MS, SPONSORS_MAX};
use heca_types::{OwnerId, PageVersion, Status};
use heca_wire::{
    EntryFlags, Header, Kind, PageEntry, PullRequest, Role, encode_pages, page_checksum,
};

use super::pages::store_entry;
use crate::link::{Link, LinkError, Security};
use crate::store::{Store, StoredRegion};

/// A page that a source answered with, and its bytes unless it is all zeros.
type Page = (PageEntry, Option<Box<[u8]>>);

/// Connects to a sponsor that pages are copied from. The one place where such connections begin.
fn connect_source(address: &str, owner: OwnerId, security: &Security) -> Result<Link, LinkError> {
    Link::connect(address, Role::Rebuild, owner, security).map(|(link, _)| link)
}

fn unavailable(text: String) -> Refusal {
    Refusal { status: Status::Unavailable, text }
}

/// Connections from one serving connection to the sponsors that it pulls from.
pub(super) struct Sources {
    owner: OwnerId,
    security: Security,
    links: HashMap<String, Link>,
    /// When connecting failed. Requests that wait in line behind the one which waited for a dead
    /// host do not wait for it again, each by itself.
    failed: HashMap<String, Instant>,
    requests: u64,
}

impl Sources {
    pub(super) fn new(owner: OwnerId, security: Security) -> Self {
        Self { owner, security, links: HashMap::new(), failed: HashMap::new(), requests: 0 }
    }

    /// Carries out a pull; returns the outcome for each entry, in their order.
    ///
    /// The source is asked while the region is not held: a slow one must not delay a takeover.
    /// Storing checks the epoch again.
    ///
    /// # Errors
    /// A region or an epoch that is not the current one, at the beginning or at the end.
    pub(super) fn pull(
        &mut self,
        store: &Store,
        header: &Header,
        request: &PullRequest<'_>,
    ) -> Result<Vec<Result<(), Refusal>>, Refusal> {
        let mut missing = Vec::new();
        let mut outcomes = store.with_region(header.region, header.epoch, |region| {
            let look = |entry| match is_stored(region, entry) {
                Ok(true) => Some(Ok(())),
                Ok(false) => {
                    missing.push(PageEntry::new(entry.page(), entry.version()));
                    None
                }
                Err(refusal) => Some(Err(refusal)),
            };
            Ok(request.entries.iter().map(look).collect::<Vec<_>>())
        })?;
        let fetched = if missing.is_empty() {
            Ok(Vec::new())
        } else {
            self.fetch(header, &missing, request.source)
        };
        store.with_region(header.region, header.epoch, |region| {
            let mut pages = fetched.as_ref().map(|pages| pages.iter());
            for (entry, outcome) in request.entries.iter().zip(&mut outcomes) {
                if outcome.is_some() {
                    continue;
                }
                *outcome = Some(match &mut pages {
                    Ok(pages) => pages
                        .next()
                        .ok_or_else(|| unavailable("the source left a page out".to_owned()))
                        .and_then(|page| keep(store, region, header, entry, page, request.source)),
                    Err(refusal) => Err((*refusal).clone()),
                });
            }
            Ok(())
        })?;
        Ok(outcomes.into_iter().flatten().collect())
    }

    /// Reads pages from a source, in the order of `wanted`. After any fault the connection is
    /// given up: a late answer would be taken for that of the next request.
    fn fetch(
        &mut self,
        header: &Header,
        wanted: &[PageEntry],
        source: &str,
    ) -> Result<Vec<Page>, Refusal> {
        let failed = |error: &LinkError| {
            let cause = std::error::Error::source(error);
            let cause = cause.map(|cause| format!(": {cause}")).unwrap_or_default();
            tracing::warn!(source, region = %header.region, "pull failed: {error}{cause}");
            unavailable(format!("the source {source} failed: {error}{cause}"))
        };
        let pause = Duration::from_millis(RECONNECT_PAUSE_MS);
        self.failed.retain(|_, since| since.elapsed() < pause);
        if self.failed.contains_key(source) {
            return Err(unavailable(format!("the source {source} could not be reached just now")));
        }
        self.requests += 1;
        let known = self.links.remove(source).map(|mut link| {
            let pages = read_from(&mut link, header, self.requests, wanted);
            (link, pages)
        });
        let (link, pages) = match known {
            // The source was started again since: that is no failure of the pull.
            Some((_, Err(error))) if error.is_lost_connection() => {
                self.ask_anew(header, wanted, source)
            }
            Some((link, pages)) => pages.map(|pages| (link, pages)),
            None => self.ask_anew(header, wanted, source),
        }
        .map_err(|error| failed(&error))?;
        if self.links.len() >= SPONSORS_MAX {
            // A region has no more sponsors than this: the others are of the past.
            self.links.clear();
        }
        self.links.insert(source.to_owned(), link);
        Ok(pages)
    }

    /// Reads pages from a source on a new connection.
    fn ask_anew(
        &mut self,
        header: &Header,
        wanted: &[PageEntry],
        source: &str,
    ) -> Result<(Link, Vec<Page>), LinkError> {
        let connected = connect_source(source, self.owner, &self.security);
        let mut link = connected.inspect_err(|_| {
            self.failed.insert(source.to_owned(), Instant::now());
        })?;
        let pages = read_from(&mut link, header, self.requests, wanted)?;
        Ok((link, pages))
    }
}

fn read_from(
    link: &mut Link,
    header: &Header,
    request: u64,
    wanted: &[PageEntry],
) -> Result<Vec<Page>, LinkError> {
    let asked = Header::new(Kind::Read, header.region, header.epoch, request);
    encode_pages(asked, wanted, &[], link.output());
    link.request(Duration::from_millis(PULL_TIMEOUT_MS), |answer, body| match body {
        heca_wire::Body::Pages(list)
            if answer.kind == Kind::ReadReply
                && answer.request == request
                && list
                    .entries()
                    .iter()
                    .map(PageEntry::page)
                    .eq(wanted.iter().map(PageEntry::page)) =>
        {
            Some(list.iter().map(|(entry, bytes)| (*entry, bytes.map(Box::from))).collect())
        }
        _ => None,
    })
}

/// Whether the page is stored here in the version wanted, so that nothing needs to be copied.
fn is_stored(region: &StoredRegion, wanted: &PageEntry) -> Result<bool, Refusal> {
    let (page, version) = (wanted.page(), wanted.version());
    if version == PageVersion::NEVER {
        let text = format!("{page}: version 0 means that the page was never written");
        return Err(Refusal { status: Status::Malformed, text });
    }
    let mut bytes = Vec::new();
    let meta = region.read(page, version, &mut bytes)?;
    if !meta.is_present() || meta.version < version.0 {
        return Ok(false);
    }
    if meta.version > version.0 {
        let text = format!("{page} is stored in version {}, {} is wanted", meta.version, version.0);
        return Err(Refusal { status: Status::Superseded, text });
    }
    // A sponsor that was killed while it stored a newer version may have that one's bytes under
    // the version wanted. It must not count as a replica.
    Ok(meta.is_zero() || page_checksum(page, version, &bytes) == meta.checksum)
}

/// Checks a page that came from a source and stores it.
fn keep(
    store: &Store,
    region: &StoredRegion,
    header: &Header,
    wanted: &PageEntry,
    (entry, bytes): &Page,
    source: &str,
) -> Result<(), Refusal> {
    let page = wanted.page();
    debug_assert!(bytes.as_ref().is_none_or(|bytes| bytes.len() == PAGE_BYTES));
    let held = entry.status() == Status::Ok && !entry.flags().contains(EntryFlags::ABSENT);
    if !held || entry.version() != wanted.version() {
        let text = format!("{source} does not have {page} in version {}", wanted.version().0);
        return Err(unavailable(text));
    }
    store_entry(store, region, header, entry, bytes.as_deref()).map_err(|refusal| {
        match refusal.status {
            // The writer is not to blame for what the source sent.
            Status::ChecksumMismatch | Status::Malformed => {
                tracing::error!(source, "pull: {refusal}");
                unavailable(format!("{source}: {refusal}"))
            }
            _ => refusal,
        }
    })
}
