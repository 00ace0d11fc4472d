#![no_main]
//! Any bytes from the network.

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| heca_wire::fuzz::frames(bytes));
