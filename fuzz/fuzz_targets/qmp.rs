#![no_main]
//! Any bytes from a QEMU control socket.

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| heca_vmm::fuzz::qmp(bytes));
