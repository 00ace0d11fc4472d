//! QEMU's version number.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A version of QEMU. Ordered, so `version >= QemuVersion { major: 8, minor: 1, micro: 0 }` works.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct QemuVersion {
    /// First number, 7 in 7.2.22.
    pub major: u32,
    /// Second number, 2 in 7.2.22.
    pub minor: u32,
    /// Third number, 22 in 7.2.22.
    pub micro: u32,
}

impl QemuVersion {
    /// Finds the version in the output of `qemu-system-x86_64 --version`.
    #[must_use]
    pub fn from_banner(text: &str) -> Option<Self> {
        let (_, rest) = text.split_once("version ")?;
        let word = rest.split(|c: char| !c.is_ascii_digit() && c != '.').next()?;
        let mut numbers = word.split('.');
        let major = numbers.next()?.parse().ok()?;
        let minor = numbers.next()?.parse().ok()?;
        let micro = match numbers.next() {
            Some(number) => number.parse().ok()?,
            None => 0,
        };
        Some(Self { major, minor, micro })
    }
}

impl fmt::Display for QemuVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn banners_of_real_builds_parse() {
        for (text, expected) in [
            ("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)\nCopyright", "7.2.22"),
            ("QEMU emulator version 10.0.13", "10.0.13"),
            ("QEMU emulator version 9.1.50-rc1 (v9.1.0-123-gabc)", "9.1.50"),
            ("QEMU emulator version 11.0", "11.0.0"),
        ] {
            let version = QemuVersion::from_banner(text).expect(text);
            assert_eq!(version.to_string(), expected);
        }
    }

    #[test]
    fn other_text_is_no_version() {
        for text in ["", "version ", "version x.y", "bash 5.2", "version 99999999999.1.1"] {
            assert_eq!(QemuVersion::from_banner(text), None, "{text}");
        }
    }
}
