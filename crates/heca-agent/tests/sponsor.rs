//! A real sponsor over TCP: what it stores, what it refuses, what it frees.
#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use heca_agent::link::{Link, LinkError};
use heca_agent::sponsor::SponsorServer;
use heca_agent::store::Store;
use heca_types::limits::{EXTENT_BYTES, FRAME_PAYLOAD_MAX, PAGE_BYTES};
use heca_types::{ByteSize, Epoch, ExtentIndex, OwnerId, PageIndex, PageVersion, RegionId, Status};
use heca_wire::{
    Body, EntryFlags, HEADER_BYTES, Header, Kind, Open, PageEntry, Role, encode_open, encode_pages,
    page_checksum,
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
    SponsorServer::start(store, "127.0.0.1:0", Duration::ZERO).unwrap()
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
        let (link, _) = Link::connect(&server.address().to_string(), role, owner).unwrap();
        Self { link, owner, region: RegionId::from_bytes([1; 16]), epoch: Epoch(1) }
    }

    fn header(&self, kind: Kind) -> Header {
        Header::new(kind, self.region, self.epoch, 77)
    }

    fn open(&mut self, quota_bytes: u64, lease_ms: u64) -> Result<u64, LinkError> {
        let open = Open { owner: self.owner, quota_bytes, lease_ms };
        let extents = [ExtentIndex(0), ExtentIndex(2)];
        encode_open(self.header(Kind::Open), &open, 3, &extents, self.link.output());
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
    heca_wire::Hello { version_min: 1, version_max: 1, role: Role::Demand, owner }
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
        (short, Status::Malformed, "expected 48"),
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
