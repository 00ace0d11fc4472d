//! The part of the kernel that a pager deals with: page cache, mappings, userfaultfd.

use heca_core::pager::{FaultKind, Install, InstallResult};

#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Frame {
    /// What the page cache holds; `None` is a hole in the RAM file.
    pub(crate) content: Option<u64>,
    pub(crate) mapped: bool,
    /// The uffd-wp bit. It survives a zap, as a marker.
    pub(crate) wp: bool,
    pub(crate) poisoned: bool,
}

/// What became of an access.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Touch {
    /// Allowed, on this content.
    Done(u64),
    Fault(FaultKind),
    Poisoned,
}

#[derive(Debug, Clone)]
pub(crate) struct Kernel {
    frames: Vec<Frame>,
    present: u64,
    /// Whether a write to a protected page clears the bit without asking (`WP_ASYNC`).
    wp_async: bool,
}

impl Kernel {
    pub(crate) fn new(slots: usize, wp_async: bool) -> Self {
        Self { frames: vec![Frame::default(); slots], present: 0, wp_async }
    }

    pub(crate) fn frame(&self, slot: usize) -> &Frame {
        &self.frames[slot]
    }

    pub(crate) fn wp_async(&self) -> bool {
        self.wp_async
    }

    /// Pages in the page cache.
    pub(crate) fn present(&self) -> u64 {
        self.present
    }

    /// An access by a vCPU; `write` is the value to write.
    pub(crate) fn touch(&mut self, slot: usize, write: Option<u64>) -> Touch {
        let frame = &mut self.frames[slot];
        if frame.poisoned {
            return Touch::Poisoned;
        }
        let Some(content) = frame.content else {
            return Touch::Fault(FaultKind::Missing);
        };
        if !frame.mapped {
            return Touch::Fault(FaultKind::Minor);
        }
        let Some(value) = write else {
            return Touch::Done(content);
        };
        if frame.wp && !self.wp_async {
            return Touch::Fault(FaultKind::WriteProtect);
        }
        frame.wp = false;
        frame.content = Some(value);
        Touch::Done(value)
    }

    /// Carries out an install action; `value` is what `Copy` and `Fill` bring.
    pub(crate) fn install(
        &mut self,
        slot: usize,
        what: Install,
        value: u64,
        protect: bool,
    ) -> InstallResult {
        let frame = &mut self.frames[slot];
        let hole = frame.content.is_none();
        match what {
            Install::Copy | Install::Fill | Install::Zero if !hole => InstallResult::Exists,
            Install::Copy | Install::Fill | Install::Zero => {
                frame.content = Some(if what == Install::Zero { 0 } else { value });
                frame.mapped = what != Install::Fill;
                frame.wp = what == Install::Copy;
                self.present += 1;
                InstallResult::Ok
            }
            Install::Continue if hole => InstallResult::Hole,
            Install::Continue if frame.mapped => InstallResult::Exists,
            Install::Continue => {
                frame.mapped = true;
                frame.wp = protect;
                InstallResult::Ok
            }
            Install::Unprotect => {
                frame.wp = false;
                InstallResult::Ok
            }
        }
    }

    /// A page that was there before the pager.
    pub(crate) fn adopt(&mut self, slot: usize, value: u64) {
        self.frames[slot] = Frame { content: Some(value), mapped: true, ..Frame::default() };
        self.present += 1;
    }

    /// A plain write to the RAM file, past all mappings.
    pub(crate) fn write(&mut self, slot: usize, value: u64) {
        let content = &mut self.frames[slot].content;
        self.present += u64::from(content.replace(value).is_none());
    }

    pub(crate) fn poison(&mut self, slot: usize) {
        self.frames[slot].poisoned = true;
    }

    /// Removes the mapping; the page and its protection bit stay.
    pub(crate) fn zap(&mut self, slot: usize) {
        self.frames[slot].mapped = false;
    }

    pub(crate) fn protect(&mut self, slot: usize) {
        let frame = &mut self.frames[slot];
        frame.wp |= frame.mapped;
    }

    /// Frees the page: by the pager (punch) or by the owner (balloon).
    pub(crate) fn punch(&mut self, slot: usize) {
        let frame = &mut self.frames[slot];
        self.present -= u64::from(frame.content.is_some());
        *frame = Frame { poisoned: frame.poisoned, ..Frame::default() };
    }
}
