//! The pager locks its memory before it probes how pages can be taken from the guest. The lock once
//! made the probe fail, and every VM fell back to the io_uring. Alone in its process, as the lock
//! is for all of it.

use heca_sys::{process, zap};

#[test]
fn the_probe_is_not_misled_by_locked_memory() {
    let before = zap::page_out_works().expect("the probe runs");
    process::lock_memory().expect("tests run as root");
    assert_eq!(zap::page_out_works().expect("the probe runs"), before);
}
