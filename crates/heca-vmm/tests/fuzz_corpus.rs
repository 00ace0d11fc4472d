//! Replays the fuzzer's corpus, so that what it found once stays mended on every build.

use std::fs;
use std::path::Path;

#[test]
fn corpus_of_control_sockets_replays() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus/qmp");
    let mut replayed = 0;
    for entry in fs::read_dir(&corpus).expect("the corpus is in the repository") {
        let path = entry.expect("readable").path();
        println!("{}", path.display());
        heca_vmm::fuzz::qmp(&fs::read(path).expect("readable"));
        replayed += 1;
    }
    assert!(replayed > 0, "the corpus is empty");
}
