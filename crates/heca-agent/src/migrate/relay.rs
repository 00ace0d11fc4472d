//! QEMU's stream over a connection between two agents: QEMU speaks to a unix socket on each side, and
//! needs neither TLS nor a port of its own.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};

use heca_types::{Epoch, RegionId};
use heca_wire::{Body, Header, Kind, encode_blob};
use rustix::event::{PollFd, PollFlags, poll};

use crate::link::{Link, LinkError};

const CHUNK: usize = 128 << 10;

/// Carries bytes both ways until both sides ended, or one broke. An empty frame is the end of one
/// side's bytes. Counts what came from QEMU.
pub(crate) fn run(
    link: &mut Link,
    mut qemu: UnixStream,
    counted: &AtomicU64,
) -> Result<(), LinkError> {
    let region = RegionId::from_bytes([0; 16]);
    let header = Header::new(Kind::Blob, region, Epoch(0), 0);
    let mut buffer = vec![0; CHUNK];
    let (mut qemu_open, mut peer_open) = (true, true);
    link.set_timeout(None)?;
    while qemu_open || peer_open {
        let mut fds = [
            PollFd::from_borrowed_fd(
                link.as_fd(),
                if peer_open { PollFlags::IN } else { PollFlags::empty() },
            ),
            PollFd::from_borrowed_fd(
                qemu.as_fd(),
                if qemu_open { PollFlags::IN } else { PollFlags::empty() },
            ),
        ];
        poll(&mut fds, None).map_err(std::io::Error::from)?;
        let (from_peer, from_qemu) = (!fds[0].revents().is_empty(), !fds[1].revents().is_empty());
        if from_qemu && qemu_open {
            let bytes = qemu.read(&mut buffer)?;
            counted.fetch_add(bytes as u64, Ordering::Relaxed);
            encode_blob(header, &buffer[..bytes], link.output());
            link.flush_blocking()?;
            qemu_open = bytes > 0;
        } else if from_qemu {
            // It is gone altogether: nobody takes what the peer sends.
            return Ok(());
        }
        if from_peer && !take(link, &mut qemu, &mut peer_open)? {
            return Err(LinkError::Closed);
        }
    }
    Ok(())
}

/// Takes in what the peer sent. Returns whether its end is well.
fn take(link: &mut Link, qemu: &mut UnixStream, peer_open: &mut bool) -> Result<bool, LinkError> {
    if !*peer_open {
        return Ok(false);
    }
    link.receive()?;
    while let Some((header, body)) = link.next_frame()? {
        let Body::Blob(bytes) = body else {
            return Err(LinkError::Unexpected { found: header.kind });
        };
        if bytes.is_empty() {
            *peer_open = false;
            let _ = qemu.shutdown(Shutdown::Write);
        } else {
            qemu.write_all(bytes)?;
        }
    }
    Ok(true)
}
