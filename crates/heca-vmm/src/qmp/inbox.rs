//! What has come from QEMU and is not read yet: bytes, then lines, then messages.

use super::QmpError;
use super::events::EventQueue;
use super::message::{Message, decode, excerpt};

/// What one step through the bytes gave.
#[derive(Debug, PartialEq)]
pub(crate) enum Step {
    /// There is no whole line; more bytes are needed.
    Starved,
    /// A line that needs no answer: an event, which is in the queue now, or nothing at all.
    Kept,
    /// Anything else.
    Message(Message),
}

/// Cuts bytes into lines and reads them. It does no I/O.
#[derive(Debug)]
pub(crate) struct Inbox {
    buffer: Vec<u8>,
    /// How much of `buffer` is known to hold no line end.
    scanned: usize,
    limit: usize,
    /// Events that nobody took yet.
    pub(super) events: EventQueue,
}

impl Inbox {
    /// An empty one. A line may have `limit` bytes, its end not counted.
    pub(crate) fn new(limit: usize) -> Self {
        Self { buffer: Vec::new(), scanned: 0, limit, events: EventQueue::default() }
    }

    /// Adds bytes as they came.
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// How many bytes wait to be read.
    #[cfg(test)]
    pub(super) fn unread(&self) -> usize {
        self.buffer.len()
    }

    /// Reads the next line if there is a whole one. After an error the bytes that follow have no
    /// meaning any more.
    pub(crate) fn step(&mut self) -> Result<Step, QmpError> {
        let Some(line) = self.next_line()? else { return Ok(Step::Starved) };
        if line.trim_ascii().is_empty() {
            return Ok(Step::Kept);
        }
        Ok(match decode(&line)? {
            Message::Event(event) => {
                self.events.push(line.len(), event);
                Step::Kept
            }
            message => Step::Message(message),
        })
    }

    fn next_line(&mut self) -> Result<Option<Vec<u8>>, QmpError> {
        let fresh = &self.buffer[self.scanned..];
        let end = fresh.iter().position(|&byte| byte == b'\n').map(|at| self.scanned + at);
        self.scanned = end.unwrap_or(self.buffer.len());
        // Also of a line that came whole: what is refused must not depend on how bytes arrive.
        if self.scanned > self.limit {
            return Err(QmpError::Malformed {
                what: format!("a line longer than {} bytes", self.limit),
                text: excerpt(&self.buffer[..self.scanned]),
            });
        }
        let Some(end) = end else { return Ok(None) };
        let rest = self.buffer.split_off(end + 1);
        self.scanned = 0;
        Ok(Some(std::mem::replace(&mut self.buffer, rest)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_holds_for_a_line_that_comes_whole_and_for_one_that_comes_in_pieces() {
        const LINE: &[u8] = b"{\"event\":\"A\"}";
        for piece in 1..=LINE.len() + 1 {
            for (limit, fits) in [(LINE.len(), true), (LINE.len() - 1, false)] {
                let mut inbox = Inbox::new(limit);
                let mut last = Ok(Step::Starved);
                for bytes in [LINE, b"\n"].concat().chunks(piece) {
                    inbox.push(bytes);
                    last = inbox.step();
                    if last.is_err() {
                        break;
                    }
                }
                assert_eq!(last.is_ok_and(|step| step == Step::Kept), fits, "pieces of {piece}");
            }
        }
    }
}
