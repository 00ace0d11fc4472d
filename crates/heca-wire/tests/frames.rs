//! Round trips of every frame, and every way to break one.
#![allow(clippy::unwrap_used)]

use heca_types::limits::{FRAME_PAGES_MAX, FRAME_PAYLOAD_MAX, PAGE_BYTES};
use heca_types::{Epoch, ExtentIndex, OwnerId, PageIndex, PageVersion, RegionId, Status, StoreId};
use heca_wire::{
    Body, DecodeError, EntryFlags, HEADER_BYTES, Header, Hello, HelloAck, Kind, Open, OpenAck,
    PageEntry, Role, decode_body, encode_open, encode_pages,
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
        Hello { version_min: 1, version_max: 3, role: Role::WriteBack, owner: OwnerId::random() };
    let mut frame = Vec::new();
    hello.encode(&mut frame);
    let (head, payload) = split(&frame);
    assert!(matches!(decode_body(&head, payload), Ok(Body::Hello(got)) if got == hello));

    let ack = HelloAck { version: 1, store: StoreId::random(), free_bytes: 1 << 40 };
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
    fn pages_round_trip(pages in proptest::collection::vec((0u64..1 << 32, any::<u32>(), 0u32..3), 0..FRAME_PAGES_MAX)) {
        let entries: Vec<_> = pages.iter().map(|&(page, version, flags)| {
            PageEntry::new(PageIndex(page), PageVersion(version))
                .with_checksum(version ^ 5)
                .with_flags(EntryFlags(flags))
                .with_status(Status::OutOfRange)
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
        for (i, (entry, data)) in list.iter().enumerate() {
            prop_assert_eq!(data.is_some(), entry.flags().has_data());
            if let Some(data) = data {
                prop_assert!(data.len() == PAGE_BYTES && data.iter().all(|&b| b == i as u8));
            }
        }
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
    fn arbitrary_bytes_never_panic(head in any::<[u8; HEADER_BYTES]>(), kind in 0usize..17, count in 0u32..80, payload in proptest::collection::vec(any::<u8>(), 0..4096)) {
        let _ = Header::decode(&head);
        let mut valid = header(Kind::ALL[kind]);
        valid.count = count;
        if let Ok(Body::Pages(list)) = decode_body(&valid, &payload) {
            prop_assert!(list.iter().count() <= 80);
        }
    }
}
