//! End-to-end checksum of a page.

use crc_fast::{CrcAlgorithm, Digest};
use heca_types::limits::PAGE_BYTES;
use heca_types::{PageIndex, PageVersion};

/// CRC-32C over a page's bytes, its index and its version.
///
/// The demander computes it when it writes a page back and compares it when it reads the page
/// again, so it covers wire, sponsor memory and store. With index and version inside, a sponsor
/// that answers with another page, or with an old version of the right one, is noticed too.
#[must_use]
pub fn page_checksum(page: PageIndex, version: PageVersion, bytes: &[u8]) -> u32 {
    let mut digest = Digest::new(CrcAlgorithm::Crc32Iscsi);
    digest.update(bytes);
    let mut tail = [0u8; 12];
    tail[..8].copy_from_slice(&page.0.to_le_bytes());
    tail[8..].copy_from_slice(&version.0.to_le_bytes());
    digest.update(&tail);
    // CRC-32C fits the low half; the crate widens every CRC to 64 bits.
    digest.finalize() as u32
}

/// Whether every byte of a page is zero. Pages differ early as a rule, so the first words are
/// looked at alone.
#[must_use]
pub fn is_zero_page(bytes: &[u8]) -> bool {
    debug_assert_eq!(bytes.len() % PAGE_BYTES, 0);
    let (head, tail) = bytes.split_at(bytes.len().min(64));
    head.iter().all(|&b| b == 0)
        && tail.chunks(256).all(|chunk| chunk.iter().fold(0, |all, &b| all | b) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksum_is_crc32c() {
        // The check value of CRC-32C ("123456789") pins the polynomial; the page checksum of no
        // bytes at index and version 0 is the CRC of twelve zero bytes.
        let check = crc_fast::checksum(CrcAlgorithm::Crc32Iscsi, b"123456789");
        assert_eq!(check, 0xE306_9283);
        let zeros = crc_fast::checksum(CrcAlgorithm::Crc32Iscsi, &[0; 12]) as u32;
        assert_eq!(page_checksum(PageIndex(0), PageVersion(0), &[]), zeros);
    }

    #[test]
    fn checksum_depends_on_place_and_version() {
        let bytes = [7u8; PAGE_BYTES];
        let sum = page_checksum(PageIndex(1), PageVersion(1), &bytes);
        assert_ne!(sum, page_checksum(PageIndex(2), PageVersion(1), &bytes));
        assert_ne!(sum, page_checksum(PageIndex(1), PageVersion(2), &bytes));
    }

    #[test]
    fn one_set_bit_anywhere_is_not_zero() {
        let mut page = [0u8; PAGE_BYTES];
        assert!(is_zero_page(&page));
        for position in [0, 63, 64, 319, 320, 2048, PAGE_BYTES - 1] {
            page[position] = 0x80;
            assert!(!is_zero_page(&page), "byte {position}");
            page[position] = 0;
        }
    }
}
