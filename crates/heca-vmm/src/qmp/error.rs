//! What can go wrong between this client and QEMU.

use std::io;
use std::path::PathBuf;

/// Why a QMP call failed.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// Nobody listens on the socket, or it may not be used.
    #[error(
        "cannot connect to the qemu control socket {path}: {source}; check that qemu runs with \
         -qmp unix:{path},server=on,wait=off and that this user may open the socket",
        path = .path.display()
    )]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the kernel said last.
        source: io::Error,
    },
    /// What listens on the socket is not QEMU.
    #[error(
        "{path} does not greet like a qemu control socket, it sent `{text}`; check that the path \
         is a -qmp socket and not a console or a human monitor",
        path = .path.display()
    )]
    Greeting {
        /// The socket.
        path: PathBuf,
        /// The start of what came instead.
        text: String,
    },
    /// QEMU did not answer in time. The connection can still be used.
    #[error(
        "qemu at {path} did not deliver {what} in time; it may be stopped, overloaded or waiting \
         for a memory page",
        path = .path.display()
    )]
    Timeout {
        /// The socket.
        path: PathBuf,
        /// The command or event waited for.
        what: String,
    },
    /// The connection is gone. Connect again, or look why QEMU ended.
    #[error(
        "the control connection {path} closed before {what} was done; qemu has ended or restarted, \
         see its log",
        path = .path.display()
    )]
    Closed {
        /// The socket.
        path: PathBuf,
        /// The command or event waited for.
        what: String,
    },
    /// The socket failed in another way.
    #[error("the control connection {path} failed during {what}: {source}", path = .path.display())]
    Io {
        /// The socket.
        path: PathBuf,
        /// The command or event waited for.
        what: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// QEMU refused the command.
    #[error("qemu refused {command}: {desc} ({class})")]
    Command {
        /// The command.
        command: String,
        /// QEMU's error class, such as `GenericError` or `CommandNotFound`.
        class: String,
        /// QEMU's own words.
        desc: String,
    },
    /// The peer sent something that is not QMP.
    #[error("qemu sent something that is not qmp ({what}): `{text}`; connect again")]
    Malformed {
        /// What is wrong with it.
        what: String,
        /// The start of it.
        text: String,
    },
}
