//! Inspects a QEMU command line, whoever wrote it, for what cannot work with remote memory.
//!
//! The rules come from measurements: a page that a device or a second process holds while it is
//! evicted loses data *silently*, so such machines are refused rather than run. Devices added later
//! over QMP are not on the command line and have to be checked by whoever adds them.

mod devices;
mod memory;
mod options;
#[cfg(test)]
mod tests;

use std::fmt;

use serde::{Deserialize, Serialize};

use options::{Properties, split_options};

/// How bad a [`Finding`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Works, with a limit that the operator should know.
    Warning,
    /// The machine must not be given remote memory.
    Refuse,
}

/// One thing on the command line that does not go with remote memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// Whether the machine can be used all the same.
    pub severity: Severity,
    /// The part of the command line, such as `-device vfio-pci`.
    pub what: String,
    /// Why it does not work.
    pub why: String,
    /// What to change.
    pub fix: String,
}

impl Finding {
    fn refuse(what: impl Into<String>, why: &str, fix: &str) -> Self {
        Self { severity: Severity::Refuse, what: what.into(), why: why.into(), fix: fix.into() }
    }

    fn warning(what: impl Into<String>, why: &str, fix: &str) -> Self {
        Self { severity: Severity::Warning, ..Self::refuse(what, why, fix) }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}; {}", self.what, self.why, self.fix)
    }
}

/// Looks at QEMU's arguments, with or without the program's name in front, and lists what cannot
/// work with remote memory, what concerns RAM first. An empty list means that the machine will do.
#[must_use]
pub fn screen_qemu_arguments(arguments: &[String]) -> Vec<Finding> {
    let options: Vec<(&str, Properties)> = split_options(arguments)
        .map(|(name, value)| (name, Properties::parse(value, implied_key(name))))
        .collect();
    let mut findings = memory::screen(&options);
    findings.extend(options.iter().filter_map(|(name, value)| devices::screen(name, value)));
    findings
}

/// Splits the content of `/proc/PID/cmdline` into arguments. Bytes that are not UTF-8 are replaced.
#[must_use]
pub fn split_cmdline(content: &[u8]) -> Vec<String> {
    let content = content.strip_suffix(&[0]).unwrap_or(content);
    if content.is_empty() {
        return Vec::new();
    }
    content.split(|&byte| byte == 0).map(|a| String::from_utf8_lossy(a).into_owned()).collect()
}

/// The key that the first word of an option's value belongs to.
fn implied_key(option: &str) -> &'static str {
    match option {
        "object" => "qom-type",
        "device" | "blockdev" => "driver",
        "m" => "size",
        _ => "type",
    }
}
