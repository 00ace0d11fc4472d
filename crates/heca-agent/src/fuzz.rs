//! Entry points of the fuzzer, for bytes that come back from files.

use crate::store::format::{
    META_BYTES, PageMeta, decode_metas, decode_region_file, decode_store_file,
};

/// Reads bytes as each of the files of a store. What is accepted must come back from its own
/// encoding as the same value.
///
/// # Panics
/// When it does not.
pub fn store_files(data: &[u8]) {
    if let Ok(file) = decode_region_file(data) {
        let bytes = serde_json::to_vec(&file).expect("a description serializes");
        assert_eq!(decode_region_file(&bytes), Ok(file));
    }
    if let Ok(file) = decode_store_file(data) {
        let bytes = serde_json::to_vec(&file).expect("an identity serializes");
        assert_eq!(decode_store_file(&bytes), Ok(file));
    }
    // No input is too odd in its length to be of use for the metadata.
    let whole = data.len() - data.len() % META_BYTES;
    if let Ok(metas) = decode_metas(&data[..whole]) {
        assert_eq!(metas.broken.is_empty(), metas.first_error.is_none());
        for (position, (meta, bytes)) in
            metas.pages.iter().zip(data.as_chunks::<META_BYTES>().0).enumerate()
        {
            if metas.broken.binary_search(&position).is_ok() {
                assert_eq!(*meta, PageMeta::default());
            } else {
                assert_eq!(meta.encode(), *bytes);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn odd_files_are_refused_without_a_panic() {
        let region = r#"{"format":2,"owner":"01010101-0101-0101-0101-010101010101","epoch":1,
            "quota_bytes":1,"lease_ms":1000,"slots":[0,null,2]}"#;
        assert!(decode_region_file(region.as_bytes()).is_ok());
        for end in 0..=region.len() {
            store_files(&region.as_bytes()[..end]);
        }
        for position in 0..region.len() {
            let mut bytes = region.as_bytes().to_vec();
            bytes[position] ^= 0x11;
            store_files(&bytes);
        }
        for byte in 0..=u8::MAX {
            store_files(&[byte; 3 * META_BYTES + 1]);
        }
        store_files(&b"[".repeat(10_000));
    }
}
