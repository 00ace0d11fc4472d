//! Round trips of every frame, and every way to break one.
#![allow(clippy::unwrap_used)]

use heca_types::limits::{ADDRESS_BYTES_MAX, FRAME_PAGES_MAX, FRAME_PAYLOAD_MAX, PAGE_BYTES};
use heca_types::{Epoch, ExtentIndex, OwnerId, PageIndex, PageVersion, RegionId, Status, StoreId};
use heca_wire::{
    Body, DecodeError, EntryFlags, HEADER_BYTES, Header, Hello, HelloAck, Kind, Open, OpenAck,
    PageEntry, Pong, PongFlags, Role, decode_body, encode_open, encode_pages, encode_pull,
    encode_release,
};
use proptest::prelude::*;

fn header(kind: Kind) -> Header {
    Header::new(kind, RegionId::from_bytes([7; 16]), Epoch(3), 42)
}

fn split(frame: &[u8]) -> (Header, &[u8]) {
    let (head, payload) = frame.split_first_chunk::<HEADER_BYTES>().unwrap();
    let header = Header::decode(head).unwrap();
    assert_eq!(header.payload_bytes as usize, payload.len());
    (header, payload)
}

#[test]
fn hello_and_its_answer_round_trip() {
    let hello =
        Hello { version_min: 2, version_max: 3, role: Role::Rebuild, owner: OwnerId::random() };
    let mut frame = Vec::new();
    hello.encode(&mut frame);
    let (head, payload) = split(&frame);
    assert!(matches!(decode_body(&head, payload), Ok(Body::Hello(got)) if got == hello));

    let ack = HelloAck { version: 2, store: StoreId::random(), free_bytes: 1 << 40 };
    let mut frame = Vec::new();
    ack.encode(&head, &mut frame);
    let (head, payload) = split(&frame);
    assert!(matches!(decode_body(&head, payload), Ok(Body::HelloAck(got)) if got == ack));
}

#[test]
fn open_carries_its_extents() {
    let open = Open { owner: OwnerId::random(), quota_bytes: 1 << 30, lease_ms: 60_000 };
    let extents = [ExtentIndex(0), ExtentIndex(7), ExtentIndex(8), ExtentIndex(16)];
    let mut frame = Vec::new();
    encode_open(header(Kind::Open), &open, 17, &extents, &mut frame);
    let (head, payload) = split(&frame);
    let Ok(Body::Open(request)) = decode_body(&head, payload) else { panic!("not an open") };
    assert_eq!(request.open, open);
    assert_eq!(request.extents().collect::<Vec<_>>(), extents);

    let ack = OpenAck { lease_ms: 5, stored_pages: 9 };
    let mut frame = Vec::new();
    ack.encode(&head, &mut frame);
    let (head, payload) = split(&frame);
    assert!(matches!(decode_body(&head, payload), Ok(Body::OpenAck(got)) if got == ack));
}

#[test]
fn ping_and_its_answer_round_trip() {
    let mut frame = Vec::new();
    header(Kind::Ping).encode_empty(&mut frame);
    let (head, payload) = split(&frame);
    assert_eq!(head.kind, Kind::Ping);
    assert!(matches!(decode_body(&head, payload), Ok(Body::Empty)));
    assert!(matches!(decode_body(&head, &[0]), Err(DecodeError::PayloadSize { .. })));

    for flags in [0, PongFlags::DRAINING.0, PongFlags::PRESSED.0, 3] {
        let pong = Pong { flags: PongFlags(flags), free_bytes: 5 << 30, store: StoreId::random() };
        let mut frame = Vec::new();
        pong.encode(&head, &mut frame);
        let (head, payload) = split(&frame);
        assert_eq!((head.kind, head.request), (Kind::Pong, 42));
        assert!(matches!(decode_body(&head, payload), Ok(Body::Pong(got)) if got == pong));
        for (position, value) in [(0, 4), (7, 1)] {
            let mut broken = payload.to_vec();
            broken[position] = value;
            let found = decode_body(&head, &broken).unwrap_err();
            assert_eq!(found, DecodeError::Reserved { kind: Kind::Pong });
        }
        let cut = decode_body(&head, &payload[..31]);
        assert!(matches!(cut, Err(DecodeError::PayloadSize { expected: 32, .. })));
    }
}

#[test]
fn release_names_extents_as_open_does() {
    let release = Open { owner: OwnerId::random(), quota_bytes: 1 << 30, lease_ms: 60_000 };
    let extents = [ExtentIndex(1), ExtentIndex(9)];
    let mut frame = Vec::new();
    encode_release(header(Kind::Open), &release, 10, &extents, &mut frame);
    let (head, payload) = split(&frame);
    let Ok(Body::Release(request)) = decode_body(&head, payload) else { panic!("not a release") };
    assert_eq!(request.open, release);
    assert_eq!(request.extents().collect::<Vec<_>>(), extents);
    let mut broken = payload.to_vec();
    *broken.last_mut().unwrap() |= 0b1000;
    assert!(matches!(decode_body(&head, &broken), Err(DecodeError::Field { .. })));
    let short = &payload[..payload.len() - 1];
    assert!(matches!(decode_body(&head, short), Err(DecodeError::PayloadSize { .. })));
    let mut frame = Vec::new();
    head.reply(Kind::ReleaseAck, Status::Ok).encode_empty(&mut frame);
    let (head, payload) = split(&frame);
    assert!(matches!(decode_body(&head, payload), Ok(Body::Empty)));
}

#[test]
fn a_pull_without_a_proper_address_is_refused() {
    let entries = [PageEntry::new(PageIndex(1), PageVersion(1))];
    let mut frame = Vec::new();
    encode_pull(header(Kind::Pull), &entries, "a:1", &mut frame);
    let (head, payload) = split(&frame);
    let entry = &payload[..size_of::<PageEntry>()];
    let with = |address: &[u8]| [entry, address].concat();
    for (payload, word) in [
        (with(b""), "empty or too long"),
        (with(&[b'x'; ADDRESS_BYTES_MAX + 1]), "empty or too long"),
        (with(b"host\xff:1"), "UTF-8"),
    ] {
        let error = decode_body(&head, &payload).unwrap_err();
        assert!(error.to_string().contains(word), "{error}");
    }
    assert!(decode_body(&head, &with(&[b'x'; ADDRESS_BYTES_MAX])).is_ok());
    let cut = decode_body(&head, &entry[..39]);
    assert!(matches!(cut, Err(DecodeError::PayloadSize { expected: 40, .. })));
}

#[test]
fn each_field_of_an_entry_is_checked() {
    let entries = [PageEntry::new(PageIndex(1), PageVersion(1))];
    for kind in [Kind::Read, Kind::Pull] {
        let mut frame = Vec::new();
        if kind == Kind::Pull {
            encode_pull(header(kind), &entries, "a:1", &mut frame);
        } else {
            encode_pages(header(kind), &entries, &[], &mut frame);
        }
        let (head, good) = split(&frame);
        let refused = |position: usize, value: u8| {
            let mut payload = good.to_vec();
            payload[position] = value;
            decode_body(&head, &payload).unwrap_err()
        };
        assert_eq!(refused(16, 16), DecodeError::Reserved { kind });
        assert_eq!(refused(19, 1), DecodeError::Reserved { kind });
        assert_eq!(refused(20, 99), DecodeError::Status { code: 99 });
        assert_eq!(refused(22, 1), DecodeError::Reserved { kind });
        assert!(matches!(refused(4, 1), DecodeError::Field { .. }));
    }
}

#[test]
fn pages_of_zeros_of_one_word_and_absent_ones_have_no_data() {
    let (zero, absent, sealed) = (EntryFlags::ZERO, EntryFlags::ABSENT, EntryFlags::SEALED);
    assert!(EntryFlags::default().has_data() && sealed.has_data());
    for flags in [zero, absent, EntryFlags::SAME, sealed.union(zero), sealed.union(absent)] {
        assert!(!flags.has_data(), "{flags:?}");
    }
}

#[test]
fn bits_beyond_the_last_extent_are_refused() {
    let open = Open { owner: OwnerId::random(), quota_bytes: 0, lease_ms: 0 };
    let mut frame = Vec::new();
    encode_open(header(Kind::Open), &open, 3, &[], &mut frame);
    *frame.last_mut().unwrap() = 0b1000;
    let (head, payload) = split(&frame);
    assert!(matches!(decode_body(&head, payload), Err(DecodeError::Field { .. })));
}

#[test]
fn errors_are_cut_at_a_character() {
    let mut frame = Vec::new();
    header(Kind::Read).encode_error(Status::OverOffer, &"é".repeat(2000), &mut frame);
    let (head, payload) = split(&frame);
    assert_eq!((head.status, head.request), (Status::OverOffer, 42));
    let Ok(Body::Error(text)) = decode_body(&head, payload) else { panic!("not an error") };
    assert_eq!(text.chars().count(), 512);
}

#[test]
fn each_header_field_is_checked() {
    let good = header(Kind::Read).encode();
    let refused = |position: usize, value: u8, fix_checksum: bool| {
        let mut bytes = good;
        bytes[position] = value;
        if fix_checksum {
            bytes[20..24].fill(0);
            let sum = crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, &bytes) as u32;
            bytes[20..24].copy_from_slice(&sum.to_le_bytes());
        }
        Header::decode(&bytes).unwrap_err()
    };
    assert!(matches!(refused(0, b'X', false), DecodeError::Magic { .. }));
    assert_eq!(refused(4, 9, false), DecodeError::Version { version: 9 });
    assert!(matches!(refused(24, 0xff, false), DecodeError::HeaderChecksum { .. }));
    assert_eq!(refused(6, 99, true), DecodeError::Kind { code: 99 });
    assert_eq!(refused(8, 99, true), DecodeError::Status { code: 99 });
    assert_eq!(refused(10, 1, true), DecodeError::Reserved { kind: Kind::Read });
    assert_eq!(refused(63, 1, true), DecodeError::Reserved { kind: Kind::Read });
    assert!(matches!(refused(19, 1, true), DecodeError::PayloadTooLarge { .. }));
    assert!(matches!(refused(13, 1, true), DecodeError::TooManyEntries { count: 256, .. }));
}

#[test]
fn a_full_write_fits_a_frame() {
    let entries: Vec<_> =
        (0..FRAME_PAGES_MAX as u64).map(|i| PageEntry::new(PageIndex(i), PageVersion(1))).collect();
    let data = vec![1u8; FRAME_PAGES_MAX * PAGE_BYTES];
    let mut frame = Vec::new();
    encode_pages(header(Kind::Write), &entries, &data, &mut frame);
    assert!(frame.len() - HEADER_BYTES <= FRAME_PAYLOAD_MAX);
    let (head, payload) = split(&frame);
    assert!(matches!(decode_body(&head, payload), Ok(Body::Pages(_))));
}

proptest! {
    #[test]
    fn pages_round_trip(pages in proptest::collection::vec((0u64..1 << 32, any::<u32>(), 0u32..8, any::<[u8; 16]>()), 0..FRAME_PAGES_MAX)) {
        let entries: Vec<_> = pages.iter().map(|&(page, version, flags, tag)| {
            PageEntry::new(PageIndex(page), PageVersion(version))
                .with_checksum(version ^ 5)
                .with_flags(EntryFlags(flags))
                .with_status(Status::OutOfRange)
                .with_tag(tag)
        }).collect();
        let data: Vec<u8> = entries.iter().enumerate()
            .filter(|(_, e)| e.flags().has_data())
            .flat_map(|(i, _)| vec![i as u8; PAGE_BYTES])
            .collect();
        let mut frame = Vec::new();
        encode_pages(header(Kind::ReadReply), &entries, &data, &mut frame);
        let (head, payload) = split(&frame);
        let Ok(Body::Pages(list)) = decode_body(&head, payload) else { panic!("not pages") };
        prop_assert_eq!(list.entries(), &entries[..]);
        prop_assert!(list.entries().iter().zip(&pages).all(|(e, p)| e.tag() == p.3));
        for (i, (entry, data)) in list.iter().enumerate() {
            prop_assert_eq!(data.is_some(), entry.flags().has_data());
            if let Some(data) = data {
                prop_assert!(data.len() == PAGE_BYTES && data.iter().all(|&b| b == i as u8));
            }
        }
    }

    #[test]
    fn pulls_round_trip(pages in proptest::collection::vec((0u64..1 << 32, any::<u32>()), 0..=FRAME_PAGES_MAX), source in "[a-z0-9.:\\[\\]]{1,256}") {
        let entries: Vec<_> = pages.iter()
            .map(|&(page, version)| PageEntry::new(PageIndex(page), PageVersion(version)))
            .collect();
        let mut frame = Vec::new();
        encode_pull(header(Kind::Read), &entries, &source, &mut frame);
        let (head, payload) = split(&frame);
        let Ok(Body::Pull(pull)) = decode_body(&head, payload) else { panic!("not a pull") };
        prop_assert_eq!((pull.entries, pull.source), (&entries[..], &source[..]));
    }

    #[test]
    fn a_page_frame_cut_anywhere_is_refused(count in 1usize..8, cut in 1usize..9000) {
        let entries: Vec<_> =
            (0..count as u64).map(|i| PageEntry::new(PageIndex(i), PageVersion(1))).collect();
        let mut frame = Vec::new();
        encode_pages(header(Kind::Write), &entries, &vec![0; count * PAGE_BYTES], &mut frame);
        let (head, payload) = split(&frame);
        let cut = cut.min(payload.len());
        let is_size_error = matches!(
            decode_body(&head, &payload[..payload.len() - cut]),
            Err(DecodeError::PayloadSize { .. })
        );
        prop_assert!(is_size_error);
    }

    #[test]
    fn arbitrary_bytes_never_panic(head in any::<[u8; HEADER_BYTES]>(), kind in 0..Kind::ALL.len(), count in 0u32..80, payload in proptest::collection::vec(any::<u8>(), 0..4096)) {
        let _ = Header::decode(&head);
        let mut valid = header(Kind::ALL[kind]);
        valid.count = count;
        if let Ok(Body::Pages(list)) = decode_body(&valid, &payload) {
            prop_assert!(list.iter().count() <= 80);
        }
    }
}

/// The example in `docs/protocol.md`, byte by byte.
#[test]
fn the_documented_read_is_encoded_so() {
    let mut frame = Vec::new();
    let entry = PageEntry::new(PageIndex(5), PageVersion(9));
    encode_pages(header(Kind::Read), &[entry], &[], &mut frame);
    let text = include_str!("../../../docs/protocol.md");
    let example = text.split("## Example").nth(1).unwrap();
    let documented: Vec<u8> = example
        .lines()
        .filter(|line| line.len() > 6 && line[..4].bytes().all(|b| b.is_ascii_hexdigit()))
        .flat_map(|line| line[6..].split("   ").next().unwrap().split_whitespace())
        .map(|byte| u8::from_str_radix(byte, 16).unwrap())
        .collect();
    assert_eq!(frame, documented);
}
