//! Replays the fuzzer's corpus, so that what it found once stays mended on every build.

use std::fs;
use std::path::Path;

use heca_agent::store::format::{
    FormatError, META_BYTES, decode_metas, decode_region_file, decode_store_file,
};

#[test]
fn corpus_of_store_files_replays() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus/store_files");
    let mut missing = vec![
        "sound region",
        "json",
        "format",
        "duplicate",
        "range",
        "quota",
        "lease",
        "sound store",
        "sound metadata",
        "zero page",
        "sealed page",
        "broken metadata",
    ];
    let mut see = |kind| missing.retain(|&k| k != kind);
    for entry in fs::read_dir(&corpus).expect("the corpus is in the repository") {
        let path = entry.expect("readable").path();
        println!("{}", path.display());
        let bytes = fs::read(path).expect("readable");
        heca_agent::fuzz::store_files(&bytes);
        see(match decode_region_file(&bytes) {
            Ok(_) => "sound region",
            Err(FormatError::Json(_)) => "json",
            Err(FormatError::Format { .. }) => "format",
            Err(FormatError::DuplicateExtent(_)) => "duplicate",
            Err(FormatError::ExtentRange(_)) => "range",
            Err(FormatError::Quota(_)) => "quota",
            Err(FormatError::Lease(_)) => "lease",
            Err(other) => panic!("no name for {other:?}"),
        });
        if decode_store_file(&bytes).is_ok() {
            see("sound store");
        }
        let Ok(metas) = decode_metas(&bytes) else { continue };
        if bytes.len() >= META_BYTES {
            see(if metas.broken.is_empty() { "sound metadata" } else { "broken metadata" });
        }
        if metas.pages.iter().any(|page| page.is_present() && page.is_zero()) {
            see("zero page");
        }
        if metas.pages.iter().any(|page| page.is_sealed()) {
            see("sealed page");
        }
    }
    // An empty corpus, or one of an older format, would replay nothing and still pass.
    assert!(missing.is_empty(), "no file in the corpus of the kinds {missing:?}");
}
