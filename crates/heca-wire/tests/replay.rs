//! Replays the fuzzer's corpus, so that what it found once stays mended on every build.

use std::fs;
use std::path::Path;

#[test]
fn corpus_decodes_without_panic() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus/frames");
    let mut files = 0;
    for entry in fs::read_dir(&corpus).expect("the corpus is in the repository") {
        let path = entry.expect("readable").path();
        heca_wire::fuzz::frames(&fs::read(&path).expect("readable"));
        files += 1;
    }
    assert!(files >= 17, "{files} files in the corpus; one for each kind of frame at least");
}
