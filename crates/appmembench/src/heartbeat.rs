//! One byte every 2 ms to a device that the host listens to: whoever runs the guest sees when it
//! did not run.
//!
//! The bytes count up, so that the host sees none lost and none doubled.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Time between two beats.
pub const PERIOD: Duration = Duration::from_millis(2);
/// QEMU's `pci-serial`.
const PCI_SERIAL: (&str, &str) = ("0x1b36", "0x0002");

/// The ports of QEMU's `pci-serial` as a file. Cloud kernels have no `/dev/port`, and a terminal in
/// between would cost an interrupt for each byte; through this file a byte is one `out`.
///
/// # Errors
/// No such device.
pub fn find() -> io::Result<PathBuf> {
    let read = |path: PathBuf| fs::read_to_string(path).unwrap_or_default();
    for entry in fs::read_dir("/sys/bus/pci/devices")? {
        let device = entry?.path();
        let is = |name: &str, id: &str| read(device.join(name)).trim() == id;
        if is("vendor", PCI_SERIAL.0) && is("device", PCI_SERIAL.1) {
            return Ok(device.join("resource0"));
        }
    }
    Err(io::Error::new(io::ErrorKind::NotFound, "no pci-serial"))
}

/// Beats without end, before everything else that the machine has to do.
///
/// # Errors
/// A device that cannot be written.
pub fn run(path: &Path) -> io::Result<()> {
    // Linux: of this thread alone. Who may not, beats as well as it can.
    let _ = rustix::process::setpriority_process(None, -20);
    let mut file = File::options().write(true).open(path)?;
    let is_stream = !file.metadata()?.file_type().is_file();
    let mut next = Instant::now();
    for beat in 0u64.. {
        let byte = [beat as u8];
        if is_stream {
            file.write_all(&byte)?;
        } else {
            file.write_all_at(&byte, 0)?;
        }
        next += PERIOD;
        let now = Instant::now();
        // What was missed is missed: a burst would hide it.
        if next < now {
            next = now + PERIOD;
        }
        std::thread::sleep(next - now);
    }
    Ok(())
}
