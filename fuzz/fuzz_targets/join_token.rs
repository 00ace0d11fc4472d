#![no_main]
//! Any text given as a join token.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use libfuzzer_sys::{fuzz_mutator, fuzz_target, fuzzer_mutate};
use ring::digest::{SHA256, digest};

const PREFIX: &[u8] = b"heca1.";
const CHECKSUM: usize = 4;

fuzz_target!(|bytes: &[u8]| heca_pki::fuzz::token(bytes));

// Three times in four it changes what is inside of a token and writes its checksum anew: random
// bytes would never get past that.
fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    if !seed.is_multiple_of(4)
        && let Some(text) = data[..size].strip_prefix(PREFIX)
        && let Ok(mut bytes) = URL_SAFE_NO_PAD.decode(text)
        && bytes.len() >= CHECKSUM
        && let Some(room) = ((max_size - PREFIX.len()) / 4 * 3).checked_sub(CHECKSUM)
        && room >= bytes.len()
    {
        bytes.truncate(bytes.len() - CHECKSUM);
        let payload = bytes.len();
        bytes.resize(room, 0);
        let payload = fuzzer_mutate(&mut bytes, payload, room);
        bytes.truncate(payload);
        let checksum = digest(&SHA256, &bytes);
        bytes.extend_from_slice(&checksum.as_ref()[..CHECKSUM]);
        let text = URL_SAFE_NO_PAD.encode(&bytes);
        let end = PREFIX.len() + text.len();
        data[PREFIX.len()..end].copy_from_slice(text.as_bytes());
        return end;
    }
    fuzzer_mutate(data, size, max_size)
});
