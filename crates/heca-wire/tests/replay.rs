//! Replays the fuzzer's corpus, so that what it found once stays mended on every build.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use heca_wire::{HEADER_BYTES, Header, Kind, decode_body};

#[test]
fn corpus_decodes_without_panic() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus/frames");
    let mut decoded = BTreeSet::new();
    for entry in fs::read_dir(&corpus).expect("the corpus is in the repository") {
        let bytes = fs::read(entry.expect("readable").path()).expect("readable");
        heca_wire::fuzz::frames(&bytes);
        let Some((head, payload)) = bytes.split_first_chunk::<HEADER_BYTES>() else { continue };
        let Ok(header) = Header::decode(head) else { continue };
        if decode_body(&header, payload).is_ok() {
            decoded.insert(header.kind as u16);
        }
    }
    // A corpus of an older format would replay nothing and still pass.
    let missing: Vec<_> = Kind::ALL.iter().filter(|&&k| !decoded.contains(&(k as u16))).collect();
    assert!(missing.is_empty(), "no sound frame in the corpus of the kinds {missing:?}");
}
