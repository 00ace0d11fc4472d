//! Entry points for fuzzing; each must return for every input.

use crate::JoinToken;

/// Parses arbitrary bytes as a join token; what parses must encode to the same text.
///
/// # Panics
/// When it does not.
pub fn token(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    if let Ok(token) = JoinToken::parse(&text) {
        assert_eq!(token.encode().as_str(), text.trim(), "a token has one text form");
    }
}
