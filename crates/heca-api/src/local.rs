//! How much of a VM's memory may be local.

use std::str::FromStr;

use heca_types::ByteSize;
use heca_types::limits::{BUDGET_PAGES_MIN, PAGE_BYTES};
use serde::{Deserialize, Serialize};

use crate::vm::ApiError;

/// Bounds of a budget that follows what the VM needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AutoLocal {
    /// Smallest budget.
    pub min: ByteSize,
    /// Largest budget.
    pub max: ByteSize,
}

impl AutoLocal {
    /// Checks that the bounds make sense for a VM.
    ///
    /// # Errors
    /// A smallest budget that is too small, bounds in the wrong order or beyond the VM's memory.
    pub fn check(&self, memory: ByteSize) -> Result<(), ApiError> {
        let least = ByteSize(BUDGET_PAGES_MIN * PAGE_BYTES as u64);
        let Self { min, max } = self;
        let wrong = if *min < least {
            format!("a local budget of {min} is too small: give at least {least}")
        } else if max < min {
            format!("a local budget from {min} to {max} is no range")
        } else if *max > memory {
            format!("a local budget of {max} is more than the VM's {memory}")
        } else {
            return Ok(());
        };
        Err(ApiError::new("bad-budget", wrong))
    }
}

/// `SIZE`, `auto` or `auto:MIN..MAX`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LocalChoice {
    /// So much.
    Fixed(ByteSize),
    /// What the VM needs, within bounds; without bounds anything that makes sense.
    Auto(Option<AutoLocal>),
}

impl LocalChoice {
    /// The budget to begin with, and the bounds of one that follows the VM's needs. `now` is the
    /// budget that it has, if it runs.
    #[must_use]
    pub fn resolve(self, memory: ByteSize, now: Option<ByteSize>) -> (ByteSize, Option<AutoLocal>) {
        match self {
            Self::Fixed(local) => (local, None),
            Self::Auto(bounds) => {
                let least = ByteSize(BUDGET_PAGES_MIN * PAGE_BYTES as u64);
                let bounds = bounds.unwrap_or(AutoLocal { min: least.min(memory), max: memory });
                // A quarter is as good a guess as any; it is corrected within seconds.
                let begin = now.unwrap_or(ByteSize(memory.0 / 4));
                let begin = begin.clamp(bounds.min.min(bounds.max), bounds.max);
                (begin, Some(bounds))
            }
        }
    }
}

impl FromStr for LocalChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "auto" {
            return Ok(Self::Auto(None));
        }
        let Some(bounds) = text.strip_prefix("auto:") else {
            return text.parse().map(Self::Fixed).map_err(|error| format!("{error}"));
        };
        let (min, max) = bounds
            .split_once("..")
            .ok_or_else(|| format!("`{text}` has no bounds: write auto, or as in auto:256M..4G"))?;
        let size = |text: &str| text.parse::<ByteSize>().map_err(|error| format!("{error}"));
        Ok(Self::Auto(Some(AutoLocal { min: size(min)?, max: size(max)? })))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn budgets_parse() {
        let size = |mib| ByteSize(mib * MIB);
        let bounds = AutoLocal { min: size(64), max: size(512) };
        for (text, choice) in [
            ("256M", LocalChoice::Fixed(size(256))),
            ("auto", LocalChoice::Auto(None)),
            ("auto:64M..512M", LocalChoice::Auto(Some(bounds))),
        ] {
            assert_eq!(text.parse(), Ok(choice), "{text}");
        }
        for text in ["", "automatic", "auto:64M", "auto:..", "auto:64M..x"] {
            assert!(text.parse::<LocalChoice>().is_err(), "{text}");
        }
    }

    #[test]
    fn automatic_budgets_begin_within_their_bounds() {
        let memory = ByteSize(1024 * MIB);
        let (begin, bounds) = LocalChoice::Auto(None).resolve(memory, None);
        assert_eq!((begin.0, bounds.expect("auto").max), (256 * MIB, memory));
        let bounds = AutoLocal { min: ByteSize(64 * MIB), max: ByteSize(128 * MIB) };
        let choice = LocalChoice::Auto(Some(bounds));
        assert_eq!(choice.resolve(memory, None).0.0, 128 * MIB);
        assert_eq!(choice.resolve(memory, Some(ByteSize(MIB))).0.0, 64 * MIB);
        assert!(bounds.check(memory).is_ok());
        for (min, max) in [(1, 128), (128, 64), (64, 2048)] {
            let bounds = AutoLocal { min: ByteSize(min * MIB), max: ByteSize(max * MIB) };
            assert!(bounds.check(memory).is_err(), "{min}..{max}");
        }
    }
}
