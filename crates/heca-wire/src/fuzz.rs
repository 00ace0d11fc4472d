//! Entry point of the fuzzer, and of the test that replays what it found.

use heca_types::limits::{FRAME_PAGES_MAX, PAGE_BYTES};

use crate::header::repair;
use crate::{Body, HEADER_BYTES, Header, decode_body, encode_pages, encode_pull};

/// Decodes a stream of frames as a peer would, and checks what must hold for anything that is
/// accepted: sizes within limits, and the same bytes when page frames are encoded again.
///
/// # Panics
/// When one of these does not hold.
pub fn frames(mut stream: &[u8]) {
    while let Some((head, rest)) = stream.split_first_chunk::<HEADER_BYTES>() {
        // As it came, and with a good checksum: random bytes would never get past that.
        let _ = Header::decode(head);
        let mut head = *head;
        repair(&mut head);
        let Ok(header) = Header::decode(&head) else { return };
        let len = header.payload_bytes as usize;
        let Some((payload, rest)) = rest.split_at_checked(len) else { return };
        stream = rest;
        let Ok(body) = decode_body(&header, payload) else { continue };
        match body {
            Body::Pages(list) => {
                assert!(list.entries().len() <= FRAME_PAGES_MAX);
                let mut data = Vec::new();
                for (entry, bytes) in list.iter() {
                    assert!(
                        bytes.is_none_or(|b| b.len() == PAGE_BYTES && entry.flags().has_data())
                    );
                    data.extend_from_slice(bytes.unwrap_or_default());
                }
                let mut again = Vec::new();
                encode_pages(header, list.entries(), &data, &mut again);
                assert_eq!(again[..HEADER_BYTES], head[..]);
                assert_eq!(again[HEADER_BYTES..], *payload);
            }
            Body::Pull(pull) => {
                let mut again = Vec::new();
                encode_pull(header, pull.entries, pull.source, &mut again);
                assert_eq!(again[..HEADER_BYTES], head[..]);
                assert_eq!(again[HEADER_BYTES..], *payload);
            }
            Body::Pong(pong) => {
                let mut again = Vec::new();
                pong.encode(&header, &mut again);
                assert_eq!(again[HEADER_BYTES..], *payload);
            }
            Body::Open(open) | Body::Release(open) => {
                assert!(open.extents().all(|e| e.0 < header.count))
            }
            Body::Hello(hello) => assert!(hello.version_min <= hello.version_max),
            Body::HelloAck(_) | Body::OpenAck(_) | Body::Error(_) | Body::Blob(_) | Body::Empty => {
            }
        }
    }
}
