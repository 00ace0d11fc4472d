#![no_main]
//! Any bytes in the files of a store.

use heca_agent::store::format::{RegionFile, decode_region_file};
use heca_types::limits::{LEASE_MS_MAX, LEASE_MS_MIN, REGION_BYTES_MAX, REGION_EXTENTS_MAX};
use heca_types::{Epoch, ExtentIndex, OwnerId};
use libfuzzer_sys::{fuzz_mutator, fuzz_target, fuzzer_mutate};

fuzz_target!(|bytes: &[u8]| heca_agent::fuzz::store_files(bytes));

// Every second time it changes one field of a description, if it has got one.
fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    if seed.is_multiple_of(2)
        && let Ok(mut file) = decode_region_file(&data[..size])
    {
        change(&mut file, &mut Dice(seed.into()));
        if let Ok(bytes) = serde_json::to_vec(&file)
            && bytes.len() <= max_size
        {
            data[..bytes.len()].copy_from_slice(&bytes);
            return bytes.len();
        }
    }
    fuzzer_mutate(data, size, max_size)
});

/// Changes one field; often to a value at a limit, on either side of it.
fn change(file: &mut RegionFile, dice: &mut Dice) {
    match dice.below(8) {
        0 => file.owner = OwnerId::from_bytes([dice.below(256) as u8; 16]),
        1 => file.epoch = Epoch(dice.number(&[0, 1, u64::MAX])),
        2 => file.quota_bytes = dice.number(&[0, REGION_BYTES_MAX, REGION_BYTES_MAX + 1]),
        3 => file.lease_ms = dice.number(&[LEASE_MS_MIN - 1, LEASE_MS_MIN, LEASE_MS_MAX]),
        4 => file.slots.extend_from_within(..file.slots.len().min(8)),
        5 => drop(file.slots.pop()),
        kind => {
            let near = [0, 1, REGION_EXTENTS_MAX - 1, REGION_EXTENTS_MAX].map(u64::from);
            let extent = ExtentIndex(dice.number(&near) as u32);
            let slot = (!dice.below(4).is_multiple_of(4)).then_some(extent);
            let position = dice.below(file.slots.len() as u64 + 1) as usize;
            match file.slots.get_mut(position) {
                Some(old) if kind == 6 => *old = slot,
                _ => file.slots.insert(position, slot),
            }
        }
    }
}

/// Numbers that follow from a seed.
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// One of these, or any number.
    fn number(&mut self, likely: &[u64]) -> u64 {
        let position = self.below(likely.len() as u64 + 1) as usize;
        likely.get(position).copied().unwrap_or_else(|| self.next())
    }
}
