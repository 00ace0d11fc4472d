//! Replays the fuzzer's corpus, so that what it found once stays mended on every build.

use std::fs;
use std::path::Path;

use heca_pki::{JoinToken, TokenError};

#[test]
fn corpus_of_join_tokens_replays() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus/join_token");
    let mut missing = vec!["sound", "prefix", "character", "checksum", "version", "address"];
    for entry in fs::read_dir(&corpus).expect("the corpus is in the repository") {
        let path = entry.expect("readable").path();
        println!("{}", path.display());
        let bytes = fs::read(path).expect("readable");
        heca_pki::fuzz::token(&bytes);
        let kind = match JoinToken::parse(&String::from_utf8_lossy(&bytes)) {
            Ok(_) => "sound",
            Err(TokenError::Prefix) => "prefix",
            Err(TokenError::Character { .. }) => "character",
            Err(TokenError::Checksum) => "checksum",
            Err(TokenError::Version { .. }) => "version",
            Err(TokenError::Address { .. }) => "address",
            Err(other) => panic!("no name for {other:?}"),
        };
        missing.retain(|&k| k != kind);
    }
    // An empty corpus, or one of an older format, would replay nothing and still pass.
    assert!(missing.is_empty(), "no token in the corpus of the kinds {missing:?}");
}
