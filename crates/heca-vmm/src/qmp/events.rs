//! Events that came while the client waited for something else.

use std::collections::VecDeque;

use super::Event;

/// Most events kept for [`Qmp::take_events`](super::Qmp::take_events).
pub const EVENTS_MAX: usize = 1024;
/// Most bytes of event lines kept, so that few huge events are bounded as well.
pub const EVENT_BYTES_MAX: usize = 4 << 20;

/// A queue that forgets its oldest events rather than grow.
#[derive(Debug, Default)]
pub(super) struct EventQueue {
    events: VecDeque<(usize, Event)>,
    bytes: usize,
    dropped: u64,
}

impl EventQueue {
    pub(super) fn push(&mut self, line_bytes: usize, event: Event) {
        self.bytes += line_bytes;
        self.events.push_back((line_bytes, event));
        while self.events.len() > EVENTS_MAX || self.bytes > EVENT_BYTES_MAX {
            let Some((bytes, _)) = self.events.pop_front() else {
                break;
            };
            self.bytes -= bytes;
            self.dropped += 1;
        }
    }

    /// Removes the oldest event of this name.
    pub(super) fn take(&mut self, name: &str) -> Option<Event> {
        let at = self.events.iter().position(|(_, event)| event.name == name)?;
        let (bytes, event) = self.events.remove(at)?;
        self.bytes -= bytes;
        Some(event)
    }

    pub(super) fn take_all(&mut self) -> Vec<Event> {
        self.bytes = 0;
        self.events.drain(..).map(|(_, event)| event).collect()
    }

    pub(super) fn dropped(&self) -> u64 {
        self.dropped
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn event(name: &str) -> Event {
        Event { name: name.to_owned(), data: serde_json::json!({}), time: Duration::ZERO }
    }

    #[test]
    fn the_queue_is_bounded_by_count_and_by_bytes() {
        let mut queue = EventQueue::default();
        for number in 0..EVENTS_MAX + 5 {
            queue.push(1, event(&number.to_string()));
        }
        assert_eq!(queue.dropped(), 5);
        let kept = queue.take_all();
        assert_eq!((kept.len(), kept[0].name.as_str()), (EVENTS_MAX, "5"));
        for _ in 0..10 {
            queue.push(EVENT_BYTES_MAX / 2, event("BIG"));
        }
        assert_eq!((queue.events.len(), queue.dropped()), (2, 13));
        assert!(queue.take("BIG").is_some() && queue.take("OTHER").is_none());
        assert_eq!(queue.bytes, EVENT_BYTES_MAX / 2);
    }
}
