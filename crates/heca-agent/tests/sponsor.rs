//! A real sponsor over TCP: what it stores, what it refuses, what it frees.
#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use heca_agent::link::{Link, LinkError, Security};
use heca_agent::sponsor::SponsorServer;
use heca_agent::store::Store;
use heca_types::limits::{EXTENT_BYTES, FRAME_PAYLOAD_MAX, PAGE_BYTES};
use heca_types::{ByteSize, Epoch, ExtentIndex, OwnerId, PageIndex, PageVersion, RegionId, Status};
use heca_wire::{
    Body, EntryFlags, HEADER_BYTES, Header, Kind, Open, PageEntry, Pong, PongFlags, Role,
    encode_open, encode_pages, encode_pull, encode_release, page_checksum,
};

const TIMEOUT: Duration = Duration::from_secs(5);

struct Dir(PathBuf);

impl Dir {
    fn new(name: &str) -> Self {
        let dir = Path::new("/dev/shm").join(format!("heca-test-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        Self(dir)
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn sponsor(dir: &Dir, offer: u64) -> SponsorServer {
    let store = Store::open(&dir.0, ByteSize(offer)).unwrap();
    SponsorServer::start(store, "127.0.0.1:0", Duration::ZERO, Security::Plaintext).unwrap()
}

/// An entry of a reply and its data.
type Page = (PageEntry, Option<Vec<u8>>);

struct Client {
    link: Link,
    owner: OwnerId,
    region: RegionId,
    epoch: Epoch,
}

impl Client {
    fn connect(server: &SponsorServer, role: Role) -> Self {
        let owner = OwnerId::from_bytes([9; 16]);
        let (link, _) =
            Link::connect(&server.address().to_string(), role, owner, &Security::Plaintext)
                .unwrap();
        Self { link, owner, region: RegionId::from_bytes([1; 16]), epoch: Epoch(1) }
    }

    fn header(&self, kind: Kind) -> Header {
        Header::new(kind, self.region, self.epoch, 77)
    }

    fn open(&mut self, quota_bytes: u64, lease_ms: u64) -> Result<u64, LinkError> {
        self.open_extents(&[0, 2], quota_bytes, lease_ms)
    }

    fn open_extents(
        &mut self,
        extents: &[u32],
        quota_bytes: u64,
        lease_ms: u64,
    ) -> Result<u64, LinkError> {
        let open = Open { owner: self.owner, quota_bytes, lease_ms };
        let extents: Vec<_> = extents.iter().map(|&e| ExtentIndex(e)).collect();
        encode_open(self.header(Kind::Open), &open, 8, &extents, self.link.output());
        self.link.request(TIMEOUT, |_, body| match body {
            Body::OpenAck(ack) => Some(ack.stored_pages),
            _ => None,
        })
    }

    fn pages(
        &mut self,
        kind: Kind,
        entries: &[PageEntry],
        data: &[u8],
    ) -> Result<Vec<Page>, LinkError> {
        encode_pages(self.header(kind), entries, data, self.link.output());
        self.link.request(TIMEOUT, |_, body| match body {
            Body::Pages(list) => {
                Some(list.iter().map(|(e, d)| (*e, d.map(<[u8]>::to_vec))).collect())
            }
            _ => None,
        })
    }

    fn release(&mut self, extents: &[u32], quota_bytes: u64) -> Result<(), LinkError> {
        let release = Open { owner: self.owner, quota_bytes, lease_ms: 60_000 };
        let extents: Vec<_> = extents.iter().map(|&e| ExtentIndex(e)).collect();
        encode_release(self.header(Kind::Release), &release, 8, &extents, self.link.output());
        self.acknowledged(Kind::ReleaseAck)
    }

    /// Sends a request without payload.
    fn simple(&mut self, kind: Kind, ack: Kind) -> Result<(), LinkError> {
        self.header(kind).encode_empty(self.link.output());
        self.acknowledged(ack)
    }

    fn acknowledged(&mut self, ack: Kind) -> Result<(), LinkError> {
        self.link.request(TIMEOUT, |header, _| (header.kind == ack).then_some(()))
    }

    fn ping(&mut self, region: RegionId) -> Result<Pong, LinkError> {
        Header { region, ..self.header(Kind::Ping) }.encode_empty(self.link.output());
        self.link.request(TIMEOUT, |_, body| match body {
            Body::Pong(pong) => Some(*pong),
            _ => None,
        })
    }

    fn pull(&mut self, pages: &[(u64, u32)], source: &str) -> Result<Vec<Status>, LinkError> {
        let entries: Vec<_> =
            pages.iter().map(|&(p, v)| PageEntry::new(PageIndex(p), PageVersion(v))).collect();
        encode_pull(self.header(Kind::Pull), &entries, source, self.link.output());
        self.link.request(TIMEOUT, |header, body| match body {
            Body::Pages(list) if header.kind == Kind::PullAck => {
                assert!(
                    list.entries()
                        .iter()
                        .map(PageEntry::page)
                        .eq(entries.iter().map(PageEntry::page))
                );
                Some(list.entries().iter().map(PageEntry::status).collect())
            }
            _ => None,
        })
    }

    /// Writes an encrypted page, of bytes or of zeros.
    fn write_sealed(&mut self, page: u64, version: u32, tag: u8, bytes: Option<&[u8]>) -> Status {
        let (page, version) = (PageIndex(page), PageVersion(version));
        let zero = if bytes.is_none() { EntryFlags::ZERO } else { EntryFlags::default() };
        let entry = PageEntry::new(page, version)
            .with_checksum(page_checksum(page, version, bytes.unwrap_or(&[0; PAGE_BYTES])))
            .with_flags(EntryFlags::SEALED.union(zero))
            .with_tag([tag; 16]);
        self.pages(Kind::Write, &[entry], bytes.unwrap_or_default()).unwrap()[0].0.status()
    }

    fn entry(&mut self, kind: Kind, page: u64, version: u32) -> Page {
        let entry = PageEntry::new(PageIndex(page), PageVersion(version));
        self.pages(kind, &[entry], &[]).unwrap().remove(0)
    }

    fn write(&mut self, page: u64, version: u32, byte: u8) -> Result<Status, LinkError> {
        let bytes = [byte; PAGE_BYTES];
        let (page, version) = (PageIndex(page), PageVersion(version));
        let entry =
            PageEntry::new(page, version).with_checksum(page_checksum(page, version, &bytes));
        Ok(self.pages(Kind::Write, &[entry], &bytes)?[0].0.status())
    }

    fn read(&mut self, page: u64, version: u32) -> Result<Option<u8>, LinkError> {
        let entry = PageEntry::new(PageIndex(page), PageVersion(version));
        let reply = self.pages(Kind::Read, &[entry], &[])?.remove(0);
        let (entry, data) = reply;
        Ok(data.map(|bytes| {
            assert_eq!(entry.checksum(), page_checksum(entry.page(), entry.version(), &bytes));
            assert!(bytes.iter().all(|&b| b == bytes[0]));
            bytes[0]
        }))
    }
}

fn refused<T: std::fmt::Debug>(result: Result<T, LinkError>) -> (Status, String) {
    match result {
        Err(LinkError::Refused { status, text }) => (status, text),
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
fn pages_come_back_in_the_version_asked_for() {
    let dir = Dir::new("roundtrip");
    let server = sponsor(&dir, 1 << 30);
    let mut control = Client::connect(&server, Role::Control);
    assert_eq!(control.open(2 * EXTENT_BYTES, 60_000).unwrap(), 0);
    assert_eq!(control.write(5, 1, 0xaa).unwrap(), Status::Ok);
    assert_eq!(control.read(5, 1).unwrap(), Some(0xaa));
    assert_eq!(control.write(5, 2, 0xbb).unwrap(), Status::Ok);
    assert_eq!(control.read(5, 1).unwrap(), None, "an old version is not served as a new one");
    assert_eq!(control.read(5, 2).unwrap(), Some(0xbb));
    assert_eq!(control.write(5, 1, 0xcc).unwrap(), Status::Superseded);
    assert_eq!(control.read(5, 2).unwrap(), Some(0xbb), "a late write changes nothing");
    assert_eq!(control.read(6, 1).unwrap(), None, "a page never stored");
}

#[test]
fn zero_pages_take_no_memory_and_discard_frees() {
    let dir = Dir::new("zero");
    let server = sponsor(&dir, 1 << 30);
    let mut client = Client::connect(&server, Role::Control);
    client.open(2 * EXTENT_BYTES, 60_000).unwrap();
    client.write(1, 1, 3).unwrap();
    client.write(2, 1, 4).unwrap();
    assert_eq!(server.store().usage().stored, 2 * PAGE_BYTES as u64);
    let (page, version) = (PageIndex(1), PageVersion(2));
    let zero = PageEntry::new(page, version)
        .with_flags(EntryFlags::ZERO)
        .with_checksum(page_checksum(page, version, &[0; PAGE_BYTES]));
    client.pages(Kind::Write, &[zero], &[]).unwrap();
    assert_eq!(server.store().usage().stored, PAGE_BYTES as u64);
    let asked = PageEntry::new(PageIndex(1), PageVersion(2));
    let (entry, data) = client.pages(Kind::Read, &[asked], &[]).unwrap().remove(0);
    assert_eq!((entry.flags(), data), (EntryFlags::ZERO, None));
    let gone = PageEntry::new(PageIndex(2), PageVersion(1));
    client.pages(Kind::Discard, &[gone], &[]).unwrap();
    assert_eq!(server.store().usage().stored, 0);
    let (entry, _) = client.pages(Kind::Stat, &[gone], &[]).unwrap().remove(0);
    assert_eq!(entry.flags(), EntryFlags::ABSENT);
}

#[test]
fn a_region_over_the_offer_is_refused_in_words() {
    let dir = Dir::new("offer");
    let server = sponsor(&dir, 3 * EXTENT_BYTES);
    let mut client = Client::connect(&server, Role::Control);
    let (status, text) = refused(client.open(4 * EXTENT_BYTES, 60_000));
    assert_eq!(status, Status::OverOffer);
    assert!(text.contains("256 MiB asked for, 192 of 192 MiB") && text.contains("raise"), "{text}");
    client.open(2 * EXTENT_BYTES, 60_000).unwrap();
    client.region = RegionId::from_bytes([2; 16]);
    let (status, text) = refused(client.open(2 * EXTENT_BYTES, 60_000));
    assert_eq!(status, Status::OverOffer);
    assert!(text.contains("64 of 192 MiB"), "{text}");
}

#[test]
fn writes_over_the_quota_or_outside_the_extents_are_refused() {
    let dir = Dir::new("quota");
    let server = sponsor(&dir, 1 << 30);
    let mut client = Client::connect(&server, Role::Control);
    client.open(2 * PAGE_BYTES as u64, 60_000).unwrap();
    assert_eq!(client.write(0, 1, 1).unwrap(), Status::Ok);
    assert_eq!(client.write(1, 1, 1).unwrap(), Status::Ok);
    assert_eq!(client.write(2, 1, 1).unwrap(), Status::OverQuota);
    assert_eq!(client.write(1, 2, 1).unwrap(), Status::Ok, "a page stored already may change");
    let outside = EXTENT_BYTES / PAGE_BYTES as u64;
    assert_eq!(client.write(outside, 1, 1).unwrap(), Status::OutOfRange);
}

#[test]
fn a_new_epoch_fences_the_old_owner_off() {
    let dir = Dir::new("epoch");
    let server = sponsor(&dir, 1 << 30);
    let mut old = Client::connect(&server, Role::Control);
    old.open(2 * EXTENT_BYTES, 60_000).unwrap();
    old.write(1, 1, 1).unwrap();
    let mut new = Client::connect(&server, Role::Control);
    new.epoch = Epoch(2);
    assert_eq!(new.open(2 * EXTENT_BYTES, 60_000).unwrap(), 1, "the pages stay");
    assert_eq!(refused(old.write(1, 2, 2)).0, Status::StaleEpoch);
    assert_eq!(refused(old.read(1, 1)).0, Status::StaleEpoch);
    assert_eq!(refused(old.open(2 * EXTENT_BYTES, 60_000)).0, Status::StaleEpoch);
    old.header(Kind::Close).encode_empty(old.link.output());
    assert_eq!(refused(old.link.request(TIMEOUT, |_, _| Some(()))).0, Status::StaleEpoch);
    assert_eq!(new.read(1, 1).unwrap(), Some(1));
}

#[test]
fn a_page_that_changed_on_the_wire_is_refused() {
    let dir = Dir::new("crc");
    let server = sponsor(&dir, 1 << 30);
    let mut client = Client::connect(&server, Role::Control);
    client.open(2 * EXTENT_BYTES, 60_000).unwrap();
    let mut bytes = [5u8; PAGE_BYTES];
    let (page, version) = (PageIndex(1), PageVersion(1));
    let entry = PageEntry::new(page, version).with_checksum(page_checksum(page, version, &bytes));
    bytes[100] ^= 1;
    let reply = client.pages(Kind::Write, &[entry], &bytes).unwrap();
    assert_eq!(reply[0].0.status(), Status::ChecksumMismatch);
    assert_eq!(client.read(1, 1).unwrap(), None);
}

#[test]
fn pages_survive_a_restart_of_the_sponsor() {
    let dir = Dir::new("restart");
    let first = sponsor(&dir, 1 << 30);
    let id = first.store().id();
    let mut client = Client::connect(&first, Role::Control);
    client.open(2 * EXTENT_BYTES, 60_000).unwrap();
    let last = 3 * EXTENT_BYTES / PAGE_BYTES as u64 - 1;
    client.write(7, 3, 7).unwrap();
    client.write(last, 1, 8).unwrap();
    drop(client);
    drop(first);
    let second = sponsor(&dir, 1 << 30);
    assert_eq!(second.store().id(), id);
    assert_eq!(second.store().usage().stored, 2 * PAGE_BYTES as u64);
    assert_eq!(second.store().usage().reserved, 2 * EXTENT_BYTES);
    let mut client = Client::connect(&second, Role::Demand);
    assert_eq!(client.read(7, 3).unwrap(), Some(7));
    assert_eq!(client.read(last, 1).unwrap(), Some(8));
    client.epoch = Epoch(0);
    assert_eq!(refused(client.read(7, 3)).0, Status::StaleEpoch, "the epoch survives, too");
}

#[test]
fn a_lease_that_runs_out_frees_what_it_held() {
    let dir = Dir::new("lease");
    let server = sponsor(&dir, 1 << 30);
    let mut client = Client::connect(&server, Role::Control);
    client.open(2 * EXTENT_BYTES, 1_000).unwrap();
    client.write(1, 1, 1).unwrap();
    // Renewal keeps it alive beyond its length.
    let renewed_until = Instant::now() + Duration::from_millis(1500);
    while Instant::now() < renewed_until {
        client.header(Kind::Renew).encode_empty(client.link.output());
        client.link.request(TIMEOUT, |h, _| (h.kind == Kind::RenewAck).then_some(())).unwrap();
        std::thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(client.read(1, 1).unwrap(), Some(1));
    let deadline = Instant::now() + Duration::from_secs(10);
    while server.store().usage().regions > 0 {
        assert!(Instant::now() < deadline, "the lease does not run out");
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(server.store().usage().reserved, 0);
    assert_eq!(refused(client.read(1, 1)).0, Status::UnknownRegion);
    let left: Vec<_> = std::fs::read_dir(&dir.0).unwrap().flatten().collect();
    assert_eq!(left.len(), 1, "only the store's identity is left: {left:?}");
}

/// Sends raw bytes after a good greeting and returns the error frame that answers them.
fn answer_to(server: &SponsorServer, bytes: &[u8]) -> Option<(Status, String)> {
    let mut stream = TcpStream::connect(server.address()).unwrap();
    stream.set_read_timeout(Some(TIMEOUT)).unwrap();
    let mut hello = Vec::new();
    let owner = OwnerId::from_bytes([9; 16]);
    heca_wire::Hello { version_min: 2, version_max: 2, role: Role::Demand, owner }
        .encode(&mut hello);
    stream.write_all(&hello).unwrap();
    let mut ack = [0u8; HEADER_BYTES];
    stream.read_exact(&mut ack).unwrap();
    let ack = Header::decode(&ack).unwrap();
    stream.read_exact(&mut vec![0; ack.payload_bytes as usize]).unwrap();
    stream.write_all(bytes).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut reply = Vec::new();
    stream.read_to_end(&mut reply).unwrap();
    let (head, text) = reply.split_first_chunk::<HEADER_BYTES>()?;
    let head = Header::decode(head).unwrap();
    assert_eq!(head.kind, Kind::Error);
    Some((head.status, String::from_utf8(text.to_vec()).unwrap()))
}

#[test]
fn broken_frames_are_answered_and_end_the_connection() {
    let dir = Dir::new("broken");
    let server = sponsor(&dir, 1 << 30);
    let region = RegionId::from_bytes([1; 16]);
    let good = Header::new(Kind::Read, region, Epoch(1), 1);
    let mut foreign = good.encode();
    foreign[..4].copy_from_slice(b"GET ");
    let mut newer = good.encode();
    newer[4] = 9;
    let mut flipped = good.encode();
    flipped[30] ^= 4;
    let oversize = Header { payload_bytes: FRAME_PAYLOAD_MAX as u32 + 1, ..good }.encode();
    let crowded = Header { count: 65, ..good }.encode();
    let short = Header { count: 2, payload_bytes: 0, ..good }.encode();
    for (bytes, status, word) in [
        (foreign, Status::Malformed, "not a Hecatonchire frame"),
        (newer, Status::VersionUnsupported, "version 9"),
        (flipped, Status::Malformed, "checksum"),
        (oversize, Status::TooLarge, "payload"),
        (crowded, Status::TooLarge, "65 entries"),
        (short, Status::Malformed, "expected 80"),
    ] {
        let (found, text) = answer_to(&server, &bytes).expect("an answer");
        assert_eq!(found, status, "{text}");
        assert!(text.contains(word), "{text}");
    }
    // A frame cut off by the end of the connection has no answer, and harms nobody.
    assert_eq!(answer_to(&server, &good.encode()[..40]), None);
    let mut client = Client::connect(&server, Role::Control);
    client.open(EXTENT_BYTES, 60_000).unwrap();
}

#[test]
fn a_peer_without_a_common_version_is_told_so() {
    let dir = Dir::new("version");
    let server = sponsor(&dir, 1 << 30);
    let mut stream = TcpStream::connect(server.address()).unwrap();
    let mut hello = Vec::new();
    let owner = OwnerId::from_bytes([9; 16]);
    heca_wire::Hello { version_min: 7, version_max: 8, role: Role::Demand, owner }
        .encode(&mut hello);
    stream.write_all(&hello).unwrap();
    let mut reply = Vec::new();
    stream.read_to_end(&mut reply).unwrap();
    let head = Header::decode(reply.first_chunk().unwrap()).unwrap();
    assert_eq!(head.status, Status::VersionUnsupported);
}

#[test]
fn a_store_outside_of_tmpfs_is_refused() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let error = Store::open(dir.path(), ByteSize(1 << 30)).unwrap_err();
    assert!(error.to_string().contains("not on tmpfs"), "{error}");
}

fn address(server: &SponsorServer) -> String {
    server.address().to_string()
}

/// A source with pages of each kind, and an empty target, both with extents 0 and 2 of a region.
fn pair(name: &str) -> (Dir, Dir, SponsorServer, SponsorServer, Client, Client) {
    let (from, to) = (Dir::new(&format!("{name}-from")), Dir::new(&format!("{name}-to")));
    let (source, target) = (sponsor(&from, 1 << 30), sponsor(&to, 1 << 30));
    let mut writer = Client::connect(&source, Role::Control);
    let mut puller = Client::connect(&target, Role::Control);
    writer.open(2 * EXTENT_BYTES, 60_000).unwrap();
    puller.open(2 * EXTENT_BYTES, 60_000).unwrap();
    (from, to, source, target, writer, puller)
}

#[test]
fn a_pull_copies_pages_as_they_are() {
    let (_from, _to, source, target, mut writer, mut puller) = pair("pull");
    let sealed: Vec<u8> = (0..PAGE_BYTES).map(|i| (i * 7) as u8).collect();
    writer.write(1, 3, 0x11).unwrap();
    assert_eq!(writer.write_sealed(2, 4, 0x22, Some(&sealed)), Status::Ok);
    assert_eq!(writer.write_sealed(3, 5, 0x33, None), Status::Ok);
    let (page, version) = (PageIndex(4), PageVersion(6));
    let zero = PageEntry::new(page, version)
        .with_flags(EntryFlags::ZERO)
        .with_checksum(page_checksum(page, version, &[0; PAGE_BYTES]));
    writer.pages(Kind::Write, &[zero], &[]).unwrap();

    let wanted = [(1, 3), (2, 4), (3, 5), (4, 6), (9, 1), (1, 2), (1, 9), (1 << 20, 1), (1, 0)];
    let statuses = puller.pull(&wanted, &address(&source)).unwrap();
    use Status::{Malformed, Ok, OutOfRange, Unavailable};
    assert_eq!(
        statuses,
        [Ok, Ok, Ok, Ok, Unavailable, Unavailable, Unavailable, OutOfRange, Malformed]
    );
    for (page, version) in [(1, 3), (2, 4), (3, 5), (4, 6)] {
        for kind in [Kind::Read, Kind::Stat] {
            let (theirs, ours) =
                (writer.entry(kind, page, version), puller.entry(kind, page, version));
            assert_eq!(theirs, ours, "{kind:?} of page {page}");
        }
    }
    let (entry, data) = puller.entry(Kind::Read, 2, 4);
    assert_eq!((entry.flags(), entry.tag()), (EntryFlags::SEALED, [0x22; 16]));
    assert_eq!(data.unwrap(), sealed);
    let (entry, data) = puller.entry(Kind::Read, 3, 5);
    assert_eq!(entry.flags(), EntryFlags::SEALED.union(EntryFlags::ZERO));
    assert_eq!((entry.tag(), data), ([0x33; 16], None));
    assert_eq!(target.store().usage().stored, 2 * PAGE_BYTES as u64);
    // A connection for rebuilding may pull and read, but not open or release.
    let mut rebuild = Client::connect(&target, Role::Rebuild);
    assert_eq!(rebuild.read(1, 3).unwrap(), Some(0x11));
    assert_eq!(rebuild.pull(&[(1, 3)], &address(&source)).unwrap(), [Ok]);
    assert!(rebuild.release(&[0], 0).is_err());
    let mut demand = Client::connect(&target, Role::Demand);
    assert!(demand.pull(&[(1, 3)], &address(&source)).is_err(), "demand reads wait for no pull");
}

#[test]
fn a_pull_moves_a_full_frame_and_asks_only_for_what_is_missing() {
    let (_from, _to, source, target, mut writer, mut puller) = pair("pull-full");
    for page in 0..64 {
        writer.write(page, 2, page as u8).unwrap();
    }
    for page in 0..32 {
        puller.write(page, 2, page as u8).unwrap();
    }
    puller.write(63, 3, 9).unwrap();
    let wanted: Vec<_> = (0..64).map(|page| (page, 2)).collect();
    let statuses = puller.pull(&wanted, &address(&source)).unwrap();
    assert!(statuses[..63].iter().all(|&status| status == Status::Ok), "{statuses:?}");
    assert_eq!(statuses[63], Status::Superseded, "the target has a newer version");
    assert_eq!(puller.read(63, 3).unwrap(), Some(9));
    for page in 0..63 {
        assert_eq!(puller.read(page, 2).unwrap(), Some(page as u8));
    }
    let read = source.counters().pages_read.load(std::sync::atomic::Ordering::Relaxed);
    assert_eq!(read, 31, "the 32 that match, and the newer one, are not transferred");
    let pulled = target.counters().pages_pulled.load(std::sync::atomic::Ordering::Relaxed);
    assert_eq!(pulled, 63);
    // A source is not even connected to when nothing is missing; the sponsor itself is a source
    // like any other.
    assert_eq!(puller.pull(&[(5, 2)], "192.0.2.1:1").unwrap(), [Status::Ok]);
    assert_eq!(puller.pull(&[(70, 1)], &address(&target)).unwrap(), [Status::Unavailable]);
}

#[test]
fn a_pull_from_a_source_that_fails_is_unavailable() {
    let (_from, to, source, target, mut writer, mut puller) = pair("pull-dead");
    writer.write(1, 1, 1).unwrap();
    let dead = address(&source);
    assert_eq!(puller.pull(&[(1, 1)], &dead).unwrap(), [Status::Ok]);
    // The source dies while a connection to it is kept.
    source.disconnect();
    for _ in 0..3 {
        assert_eq!(puller.pull(&[(2, 1)], &dead).unwrap(), [Status::Unavailable]);
    }
    for address in ["nobody", "no.such.host.invalid:1", "\0"] {
        assert_eq!(puller.pull(&[(2, 1)], address).unwrap(), [Status::Unavailable]);
    }
    // One that accepts and says nothing costs the time to agree on a version.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let silent = silent.local_addr().unwrap().to_string();
    assert_eq!(puller.pull(&[(2, 1)], &silent).unwrap(), [Status::Unavailable]);
    // One under another epoch has nothing for this one.
    let other_dir = Dir::new("pull-dead-other");
    let other = sponsor(&other_dir, 1 << 30);
    let mut newer = Client::connect(&other, Role::Control);
    newer.epoch = Epoch(2);
    newer.open(2 * EXTENT_BYTES, 60_000).unwrap();
    newer.write(2, 1, 1).unwrap();
    assert_eq!(puller.pull(&[(2, 1)], &address(&other)).unwrap(), [Status::Unavailable]);
    assert_eq!(puller.read(1, 1).unwrap(), Some(1));
    assert_eq!(target.store().usage().stored, PAGE_BYTES as u64);
    drop(to);
}

/// The pages file of the only region in a store.
fn pages_file(dir: &Dir) -> PathBuf {
    let mut files = std::fs::read_dir(&dir.0).unwrap().map(|entry| entry.unwrap().path());
    files.find(|path| path.extension().is_some_and(|e| e == "pages")).unwrap()
}

fn memory_of(path: &Path) -> u64 {
    std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(path).unwrap()) * 512
}

const PER_EXTENT: u64 = EXTENT_BYTES / PAGE_BYTES as u64;

#[test]
fn damaged_bytes_are_neither_pulled_nor_taken_for_a_replica() {
    use std::os::unix::fs::FileExt;
    let (from, to, source, _target, mut writer, mut puller) = pair("pull-crc");
    for client in [&mut writer, &mut puller] {
        client.write(1, 1, 1).unwrap();
    }
    writer.write(2, 1, 2).unwrap();
    // As after a kill between a page's bytes and its metadata: old metadata over new bytes.
    let metas = PER_EXTENT * 32;
    let damage = |dir: &Dir, page: u64| {
        let file = std::fs::File::options().write(true).open(pages_file(dir)).unwrap();
        file.write_all_at(b"damage", metas + page * PAGE_BYTES as u64).unwrap();
    };
    damage(&to, 1);
    assert_eq!(puller.pull(&[(1, 1)], &address(&source)).unwrap(), [Status::Ok]);
    assert_eq!(puller.read(1, 1).unwrap(), Some(1), "copied although the version matched");
    damage(&from, 2);
    assert_eq!(puller.pull(&[(2, 1)], &address(&source)).unwrap(), [Status::Unavailable]);
    assert_eq!(puller.read(2, 1).unwrap(), None);
}

#[test]
fn a_release_frees_memory_and_its_slots_show_nothing_old() {
    let dir = Dir::new("release");
    let server = sponsor(&dir, 1 << 30);
    let mut client = Client::connect(&server, Role::Control);
    client.open_extents(&[0, 1, 2], 3 * EXTENT_BYTES, 60_000).unwrap();
    for page in 0..100 {
        client.write(page, 1, 0xaa).unwrap();
        client.write(PER_EXTENT + page, 1, 0xbb).unwrap();
    }
    let usage = server.store().usage();
    assert_eq!((usage.stored, usage.reserved), (200 * PAGE_BYTES as u64, 3 * EXTENT_BYTES));
    let before = memory_of(&pages_file(&dir));
    for _ in 0..2 {
        client.release(&[0, 5], 2 * EXTENT_BYTES).unwrap();
        let usage = server.store().usage();
        assert_eq!((usage.stored, usage.reserved), (100 * PAGE_BYTES as u64, 2 * EXTENT_BYTES));
    }
    assert!(memory_of(&pages_file(&dir)) <= before - 100 * PAGE_BYTES as u64);
    assert_eq!(client.write(1, 2, 1).unwrap(), Status::OutOfRange);
    assert_eq!(client.read(PER_EXTENT + 1, 1).unwrap(), Some(0xbb), "the others stay");
    // Another extent takes the slot; nothing of the first comes with it, nor after a restart.
    let length = std::fs::metadata(pages_file(&dir)).unwrap().len();
    client.open_extents(&[7], 3 * EXTENT_BYTES, 60_000).unwrap();
    assert_eq!(std::fs::metadata(pages_file(&dir)).unwrap().len(), length, "the slot is reused");
    assert_eq!(client.write(7 * PER_EXTENT, 1, 0xcc).unwrap(), Status::Ok);
    let mut slot = vec![0; (PER_EXTENT * 32) as usize + 100 * PAGE_BYTES];
    let file = std::fs::File::open(pages_file(&dir)).unwrap();
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut slot, 0).unwrap();
    let data = &slot[(PER_EXTENT * 32) as usize..];
    assert!(data[..PAGE_BYTES].iter().all(|&b| b == 0xcc), "the new extent's page");
    assert!(slot[32..].iter().filter(|&&b| b != 0).count() == PAGE_BYTES, "scrubbed");
    let nothing_old = |client: &mut Client| {
        for page in 1..100 {
            assert_eq!(client.read(7 * PER_EXTENT + page, 1).unwrap(), None);
        }
        assert_eq!(client.read(7 * PER_EXTENT, 1).unwrap(), Some(0xcc));
        assert_eq!(client.read(PER_EXTENT + 1, 1).unwrap(), Some(0xbb));
    };
    nothing_old(&mut client);
    client.release(&[2], 2 * EXTENT_BYTES).unwrap();
    drop((client, server));
    let server = sponsor(&dir, 1 << 30);
    let mut client = Client::connect(&server, Role::Control);
    nothing_old(&mut client);
    assert_eq!(server.store().usage().reserved, 2 * EXTENT_BYTES);
    // The last extents close the region; doing so again finds it gone.
    client.release(&[1, 7], 0).unwrap();
    assert_eq!(refused(client.release(&[1, 7], 0)).0, Status::UnknownRegion);
    let usage = server.store().usage();
    assert_eq!((usage.regions, usage.reserved, usage.stored), (0, 0, 0));
    assert_eq!(std::fs::read_dir(&dir.0).unwrap().count(), 1, "the files are gone");
}

#[test]
fn a_release_is_for_the_owner_and_leaves_room_for_metadata() {
    let dir = Dir::new("release-owner");
    let server = sponsor(&dir, 1 << 30);
    let mut client = Client::connect(&server, Role::Control);
    client.open_extents(&[0, 1, 2, 3], 4 * EXTENT_BYTES, 60_000).unwrap();
    let (status, text) = refused(client.release(&[0], 4096));
    assert_eq!(status, Status::OverQuota);
    assert!(text.contains("3 extents") && text.contains("512 KiB"), "{text}");
    client.release(&[0, 1], 4096).unwrap();
    client.epoch = Epoch(0);
    assert_eq!(refused(client.release(&[2], 0)).0, Status::StaleEpoch);
    client.epoch = Epoch(1);
    client.owner = OwnerId::from_bytes([8; 16]);
    assert_eq!(refused(client.release(&[2], 0)).0, Status::OwnerMismatch);
}

#[test]
fn a_draining_sponsor_takes_nothing_new_and_remembers_it() {
    let dir = Dir::new("drain");
    let server = sponsor(&dir, 1 << 30);
    let mut client = Client::connect(&server, Role::Control);
    client.open(2 * EXTENT_BYTES, 60_000).unwrap();
    client.write(1, 1, 1).unwrap();
    server.store().set_draining(true).unwrap();
    let id = server.store().id();
    drop((client, server));

    let server = sponsor(&dir, 1 << 30);
    assert!(server.store().is_draining() && server.store().id() == id);
    let mut client = Client::connect(&server, Role::Control);
    let (status, text) = refused(client.open_extents(&[0, 1, 2], 3 * EXTENT_BYTES, 60_000));
    assert_eq!(status, Status::Draining);
    assert!(text.contains("another sponsor"), "{text}");
    client.region = RegionId::from_bytes([2; 16]);
    assert_eq!(refused(client.open(EXTENT_BYTES, 60_000)).0, Status::Draining);
    client.region = RegionId::from_bytes([1; 16]);
    assert_eq!(client.open(2 * EXTENT_BYTES, 60_000).unwrap(), 1, "the same epoch");
    client.epoch = Epoch(2);
    assert_eq!(client.open(2 * EXTENT_BYTES, 60_000).unwrap(), 1, "a takeover");
    assert_eq!(client.write(2, 1, 2).unwrap(), Status::Ok, "what is held is served as ever");
    server.store().set_draining(false).unwrap();
    server.store().set_pressed(true);
    assert_eq!(refused(client.open_extents(&[1], 3 * EXTENT_BYTES, 60_000)).0, Status::Draining);
    server.store().set_pressed(false);
    client.open_extents(&[1], 3 * EXTENT_BYTES, 60_000).unwrap();
    drop((client, server));
    assert!(!sponsor(&dir, 1 << 30).store().is_draining());
}

#[test]
fn a_ping_is_answered_on_every_connection_and_fences() {
    let dir = Dir::new("ping");
    let server = sponsor(&dir, 1 << 30);
    let nil = RegionId::from_bytes([0; 16]);
    for role in [Role::Control, Role::Demand, Role::Prefetch, Role::WriteBack, Role::Rebuild] {
        let mut client = Client::connect(&server, role);
        let pong = client.ping(nil).unwrap();
        assert_eq!(pong.flags, PongFlags::default());
        assert_eq!((pong.store, pong.free_bytes), (server.store().id(), 1 << 30));
        let region = client.region;
        assert_eq!(refused(client.ping(region)).0, Status::UnknownRegion);
    }
    let mut old = Client::connect(&server, Role::Control);
    old.open(2 * EXTENT_BYTES, 60_000).unwrap();
    let region = old.region;
    assert_eq!(old.ping(region).unwrap().free_bytes, (1 << 30) - 2 * EXTENT_BYTES);
    server.store().set_pressed(true);
    assert_eq!(old.ping(region).unwrap().flags, PongFlags::PRESSED);
    server.store().set_draining(true).unwrap();
    assert_eq!(old.ping(nil).unwrap().flags.0, PongFlags::PRESSED.0 | PongFlags::DRAINING.0);
    let mut new = Client::connect(&server, Role::Control);
    new.epoch = Epoch(2);
    new.open(2 * EXTENT_BYTES, 60_000).unwrap();
    assert_eq!(refused(old.ping(region)).0, Status::StaleEpoch);
    old.ping(nil).unwrap();
    new.ping(region).unwrap();
}

#[test]
fn an_old_owner_that_lives_on_is_refused_everything() {
    let (_from, _to, source, target, mut old, _) = pair("fence");
    let mut old_data = Client::connect(&source, Role::WriteBack);
    old.write(1, 1, 1).unwrap();
    old.read(1, 1).unwrap();
    // Requests that the sponsor has not read yet when the new owner comes: the frames are sent
    // but for their last byte, which follows after the takeover.
    let mut queued = Vec::new();
    let bytes = [7u8; PAGE_BYTES];
    for page in 0..20 {
        let (page, version) = (PageIndex(page), PageVersion(9));
        let entry =
            PageEntry::new(page, version).with_checksum(page_checksum(page, version, &bytes));
        encode_pages(old_data.header(Kind::Write), &[entry], &bytes, &mut queued);
    }
    let frame = queued.len() / 20;
    old_data.link.output().extend_from_slice(&queued[..frame - 1]);
    old_data.link.flush_blocking().unwrap();

    let mut new = Client::connect(&source, Role::Control);
    new.epoch = Epoch(2);
    new.owner = OwnerId::from_bytes([9; 16]);
    assert_eq!(new.open(2 * EXTENT_BYTES, 60_000).unwrap(), 1);
    old_data.link.output().extend_from_slice(&queued[frame - 1..]);
    for _ in 0..20 {
        let answer = old_data.link.request(TIMEOUT, |_, _| Some(()));
        assert_eq!(refused(answer).0, Status::StaleEpoch, "what was queued");
    }

    let entry = PageEntry::new(PageIndex(1), PageVersion(1));
    for client in [&mut old, &mut old_data] {
        let region = client.region;
        assert_eq!(refused(client.read(1, 1)).0, Status::StaleEpoch);
        assert_eq!(refused(client.write(1, 2, 2)).0, Status::StaleEpoch);
        assert_eq!(refused(client.pages(Kind::Discard, &[entry], &[])).0, Status::StaleEpoch);
        assert_eq!(refused(client.pages(Kind::Stat, &[entry], &[])).0, Status::StaleEpoch);
        assert_eq!(refused(client.simple(Kind::Renew, Kind::RenewAck)).0, Status::StaleEpoch);
        assert_eq!(refused(client.ping(region)).0, Status::StaleEpoch);
    }
    assert_eq!(refused(old.pull(&[(1, 1)], &address(&target))).0, Status::StaleEpoch);
    assert_eq!(refused(old.release(&[0], 0)).0, Status::StaleEpoch);
    assert_eq!(refused(old.simple(Kind::Close, Kind::CloseAck)).0, Status::StaleEpoch);
    assert_eq!(refused(old.open(2 * EXTENT_BYTES, 60_000)).0, Status::StaleEpoch);
    assert_eq!(new.read(1, 1).unwrap(), Some(1), "nothing of all that was carried out");
    assert_eq!(source.store().usage().stored, PAGE_BYTES as u64);
}

#[test]
fn a_takeover_waits_for_no_pull_and_the_pull_stores_nothing_after_it() {
    let (_from, _to, _source, target, _writer, mut old) = pair("pull-fence");
    // A source that answers the greeting, and a read only when it is told to.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let source = listener.local_addr().unwrap().to_string();
    let (go, gone) = std::sync::mpsc::channel::<()>();
    let fake = std::thread::spawn(move || {
        let mut link = Link::accept(listener.accept().unwrap().0, &Security::Plaintext).unwrap();
        let mut wait = || loop {
            if let Some((header, _)) = link.next_frame().unwrap() {
                break header;
            }
            link.receive_blocking().unwrap();
        };
        let hello = wait();
        let store = heca_types::StoreId::random();
        let mut ack = Vec::new();
        heca_wire::HelloAck { version: 2, store, free_bytes: 0 }.encode(&hello, &mut ack);
        link.output().extend_from_slice(&ack);
        link.flush_blocking().unwrap();
        let read = loop {
            if let Some((header, _)) = link.next_frame().unwrap() {
                break header;
            }
            link.receive_blocking().unwrap();
        };
        assert_eq!((read.kind, read.epoch), (Kind::Read, Epoch(1)));
        gone.recv().unwrap();
        let (page, version, bytes) = (PageIndex(1), PageVersion(1), [5; PAGE_BYTES]);
        let entry =
            PageEntry::new(page, version).with_checksum(page_checksum(page, version, &bytes));
        encode_pages(read.reply(Kind::ReadReply, Status::Ok), &[entry], &bytes, link.output());
        link.flush_blocking().unwrap();
    });
    let pull = std::thread::spawn(move || old.pull(&[(1, 1)], &source));
    std::thread::sleep(Duration::from_millis(200));
    let mut new = Client::connect(&target, Role::Control);
    new.epoch = Epoch(2);
    let begin = Instant::now();
    new.open(2 * EXTENT_BYTES, 60_000).unwrap();
    assert!(begin.elapsed() < Duration::from_secs(1), "the takeover waited for the pull");
    go.send(()).unwrap();
    assert_eq!(refused(pull.join().unwrap()).0, Status::StaleEpoch);
    fake.join().unwrap();
    assert_eq!(new.read(1, 1).unwrap(), None);
}

#[test]
fn a_restart_keeps_tags_and_leaves_broken_pages_out() {
    use std::os::unix::fs::FileExt;
    let dir = Dir::new("tags");
    let server = sponsor(&dir, 1 << 30);
    let mut client = Client::connect(&server, Role::Control);
    client.open(2 * EXTENT_BYTES, 60_000).unwrap();
    let sealed = vec![0x5a; PAGE_BYTES];
    client.write_sealed(1, 1, 0x11, Some(&sealed));
    client.write_sealed(2, 2, 0x22, None);
    client.write(3, 3, 3).unwrap();
    drop((client, server));
    let file = std::fs::File::options().write(true).open(pages_file(&dir)).unwrap();
    file.write_all_at(&[0xff], 3 * 32 + 8).unwrap();
    let server = sponsor(&dir, 1 << 30);
    let mut client = Client::connect(&server, Role::Demand);
    let (entry, data) = client.entry(Kind::Read, 1, 1);
    assert_eq!((entry.flags(), entry.tag()), (EntryFlags::SEALED, [0x11; 16]));
    assert_eq!(data.unwrap(), sealed);
    let (entry, _) = client.entry(Kind::Stat, 2, 2);
    assert_eq!(entry.flags(), EntryFlags::SEALED.union(EntryFlags::ZERO));
    assert_eq!((entry.tag(), entry.version()), ([0x22; 16], PageVersion(2)));
    assert_eq!(client.entry(Kind::Stat, 3, 3).0.flags(), EntryFlags::ABSENT);
    assert_eq!(server.store().usage().stored, PAGE_BYTES as u64);
}

#[test]
fn writes_that_contradict_themselves_are_malformed() {
    let dir = Dir::new("contradict");
    let server = sponsor(&dir, 1 << 30);
    let mut client = Client::connect(&server, Role::Control);
    client.open(2 * EXTENT_BYTES, 60_000).unwrap();
    assert_eq!(client.write(1, 0, 1).unwrap(), Status::Malformed, "version 0 means never");
    let sealed_absent = EntryFlags::SEALED.union(EntryFlags::ABSENT);
    let entry = PageEntry::new(PageIndex(1), PageVersion(1));
    let zero = page_checksum(PageIndex(1), PageVersion(1), &[0; PAGE_BYTES]);
    for entry in [
        entry.with_flags(EntryFlags::ABSENT),
        entry.with_flags(sealed_absent).with_checksum(zero),
        entry.with_flags(EntryFlags::ZERO.union(EntryFlags::ABSENT)).with_checksum(zero),
        entry.with_flags(EntryFlags::ZERO).with_checksum(zero).with_tag([1; 16]),
    ] {
        let reply = client.pages(Kind::Write, &[entry], &[]).unwrap();
        assert_eq!(reply[0].0.status(), Status::Malformed, "{entry:?}");
    }
    assert_eq!(client.read(1, 1).unwrap(), None);
}

#[test]
fn a_store_of_another_format_is_refused_by_name() {
    let dir = Dir::new("format");
    drop(sponsor(&dir, 1 << 30));
    let path = dir.0.join("store.json");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replace("\"format\":2", "\"format\":1")).unwrap();
    let error = format!("{:#}", Store::open(&dir.0, ByteSize(1 << 30)).unwrap_err());
    for word in ["store.json", "format 1", "reads format 2", "empty directory"] {
        assert!(error.contains(word), "{error}");
    }
}

#[test]
fn a_region_that_was_left_out_leaves_nothing_to_the_next_of_its_name() {
    let dir = Dir::new("left-out");
    let server = sponsor(&dir, 1 << 30);
    let mut client = Client::connect(&server, Role::Control);
    client.open(2 * EXTENT_BYTES, 60_000).unwrap();
    client.write(1, 1, 1).unwrap();
    drop((client, server));
    std::fs::write(pages_file(&dir).with_extension("json"), "{").unwrap();
    let server = sponsor(&dir, 1 << 30);
    let mut client = Client::connect(&server, Role::Control);
    assert_eq!(client.open(2 * EXTENT_BYTES, 60_000).unwrap(), 0);
    client.write(2, 1, 2).unwrap();
    drop((client, server));
    let server = sponsor(&dir, 1 << 30);
    let mut client = Client::connect(&server, Role::Control);
    assert_eq!(client.read(1, 1).unwrap(), None, "of the former region");
    assert_eq!(client.read(2, 1).unwrap(), Some(2));
}

#[test]
fn a_slot_that_was_released_and_not_scrubbed_is_scrubbed_at_the_next_start() {
    use std::os::unix::fs::FileExt;
    let dir = Dir::new("unscrubbed");
    let server = sponsor(&dir, 1 << 30);
    let mut client = Client::connect(&server, Role::Control);
    client.open_extents(&[0, 1], 2 * EXTENT_BYTES, 60_000).unwrap();
    client.write(5, 1, 0xaa).unwrap();
    let slot = pages_file(&dir);
    let mut old = vec![0; (PER_EXTENT * 32) as usize + 6 * PAGE_BYTES];
    std::fs::File::open(&slot).unwrap().read_exact_at(&mut old, 0).unwrap();
    client.release(&[0], EXTENT_BYTES).unwrap();
    drop((client, server));
    // As if it had been killed before the scrubbing.
    std::fs::File::options().write(true).open(&slot).unwrap().write_all_at(&old, 0).unwrap();
    for _ in 0..2 {
        let server = sponsor(&dir, 1 << 30);
        assert_eq!(server.store().usage().stored, 0);
        let mut client = Client::connect(&server, Role::Control);
        client.open_extents(&[7], 2 * EXTENT_BYTES, 60_000).unwrap();
        assert_eq!(client.entry(Kind::Stat, 7 * PER_EXTENT + 5, 1).0.flags(), EntryFlags::ABSENT);
        let mut now = vec![0; old.len()];
        std::fs::File::open(&slot).unwrap().read_exact_at(&mut now, 0).unwrap();
        assert!(now.iter().all(|&b| b == 0));
    }
}
