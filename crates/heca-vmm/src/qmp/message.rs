//! What a QMP peer sends: one JSON object a line.

use std::time::Duration;

use serde_json::Value;

use super::QmpError;
use crate::QemuVersion;

/// Something QEMU reported by itself.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Name, such as `MIGRATION` or `SHUTDOWN`.
    pub name: String,
    /// Its data; an empty object if it has none.
    pub data: Value,
    /// When QEMU sent it, since the Unix epoch by the host's clock; zero if QEMU did not say.
    pub time: Duration,
}

/// One line from the peer.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Message {
    Greeting(QemuVersion),
    Event(Event),
    Return {
        id: u64,
        value: Value,
    },
    /// `id` is absent when QEMU could not read the command it answers.
    Error {
        id: Option<u64>,
        class: String,
        desc: String,
    },
    /// An answer to a command that this client did not send, or gave up on in another life.
    Unrelated,
}

/// Reads one line. Never panics, whatever the bytes are.
pub(super) fn decode(line: &[u8]) -> Result<Message, QmpError> {
    let malformed = |what: &str| QmpError::Malformed { what: what.to_owned(), text: excerpt(line) };
    let value: Value = serde_json::from_slice(line).map_err(|e| malformed(&e.to_string()))?;
    let Value::Object(mut object) = value else {
        return Err(malformed("not a json object"));
    };
    if let Some(greeting) = object.get("QMP") {
        let version = version_of(&greeting["version"]);
        return version
            .map(Message::Greeting)
            .ok_or_else(|| malformed("a greeting without a version"));
    }
    if let Some(name) = object.get("event") {
        let name = name.as_str().ok_or_else(|| malformed("an event whose name is not text"))?;
        let name = name.to_owned();
        let time = time_of(object.get("timestamp"));
        let data = object.remove("data").unwrap_or_else(|| Value::Object(Default::default()));
        return Ok(Message::Event(Event { name, data, time }));
    }
    let id = object.get("id").map(Value::as_u64);
    if id == Some(None) {
        return Ok(Message::Unrelated);
    }
    let id = id.flatten();
    if let Some(error) = object.get("error") {
        let text = |key: &str| plain(error[key].as_str().unwrap_or("(none given)"));
        return Ok(Message::Error { id, class: text("class"), desc: text("desc") });
    }
    match (id, object.remove("return")) {
        (Some(id), Some(value)) => Ok(Message::Return { id, value }),
        (None, Some(_)) => Err(malformed("an answer without the id of its command")),
        (_, None) => Err(malformed("neither an answer nor an event")),
    }
}

/// Reads the `version` object of the greeting, which is also the answer to `query-version`.
pub(super) fn version_of(value: &Value) -> Option<QemuVersion> {
    let number =
        |key: &str| value["qemu"][key].as_u64().and_then(|number| u32::try_from(number).ok());
    Some(QemuVersion { major: number("major")?, minor: number("minor")?, micro: number("micro")? })
}

fn time_of(timestamp: Option<&Value>) -> Duration {
    let part = |key: &str| timestamp.and_then(|t| t[key].as_u64()).unwrap_or(0);
    Duration::from_secs(part("seconds")).saturating_add(Duration::from_micros(part("microseconds")))
}

/// The start of a line, for an error text; without characters that would steer a terminal.
pub(super) fn excerpt(line: &[u8]) -> String {
    const LIMIT: usize = 160;
    let text = String::from_utf8_lossy(&line[..line.len().min(LIMIT)]);
    let mut text = plain(text.trim_end());
    if line.len() > LIMIT {
        text.push_str("...");
    }
    text
}

/// The same text without characters that would steer a terminal.
fn plain(text: &str) -> String {
    text.replace(char::is_control, "\u{fffd}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn real_lines_decode() {
        let greeting = br#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7},
            "package": "Debian"}, "capabilities": ["oob"]}}"#;
        let version = QemuVersion { major: 7, minor: 2, micro: 22 };
        assert_eq!(decode(greeting).unwrap(), Message::Greeting(version));
        let event = br#"{"timestamp": {"seconds": 5, "microseconds": 250000}, "event": "STOP"}"#;
        let Message::Event(event) = decode(event).unwrap() else { panic!("not an event") };
        assert_eq!((event.name.as_str(), event.time), ("STOP", Duration::from_millis(5250)));
        assert_eq!(event.data, serde_json::json!({}));
        let foreign = br#"{"return": {}, "id": "libvirt-12"}"#;
        assert_eq!(decode(foreign).unwrap(), Message::Unrelated);
    }

    #[test]
    fn a_refusal_does_not_steer_a_terminal() {
        let line = br#"{"id": 2, "error": {"class": "\u001b[31mC", "desc": "a\nb\u009b1m"}}"#;
        let Message::Error { class, desc, .. } = decode(line).unwrap() else { panic!("no error") };
        assert_eq!((class.as_str(), desc.as_str()), ("\u{fffd}[31mC", "a\u{fffd}b\u{fffd}1m"));
    }

    #[test]
    fn broken_lines_are_errors_and_huge_times_saturate() {
        for line in [
            &b""[..],
            b"[]",
            b"\xff\xfe",
            b"{}",
            br#"{"QMP": 3}"#,
            br#"{"QMP": {"version": {"qemu": {"major": -1, "minor": 2, "micro": 99999999999}}}}"#,
            br#"{"event": 7}"#,
            br#"{"return": {}}"#,
            br#"{"id": 4}"#,
        ] {
            let error = decode(line).expect_err(&excerpt(line));
            assert!(matches!(error, QmpError::Malformed { .. }), "{error}");
        }
        let late = br#"{"event":"A","timestamp":{"seconds":18446744073709551615,
            "microseconds":18446744073709551615}}"#;
        assert!(matches!(decode(late), Ok(Message::Event(e)) if e.time == Duration::MAX));
        assert!(decode("[".repeat(1 << 20).as_bytes()).is_err());
    }

    #[test]
    fn arbitrary_garbage_never_panics() {
        const SEED: &[u8] = br#"{"QMP":{"version":{"qemu":{"major":7,"minor":2,"micro":0}}},
            "event":"X","timestamp":{"seconds":1,"microseconds":2},"data":{},"id":3,
            "return":{},"error":{"class":"C","desc":"D"}}"#;
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut random = move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as usize
        };
        for round in 0..20_000 {
            let mut line = SEED.to_vec();
            if round % 3 == 0 {
                line = (0..random() % 200).map(|_| random() as u8).collect();
            } else {
                for _ in 0..=random() % 4 {
                    let at = random() % line.len();
                    match random() % 3 {
                        0 => line[at] = random() as u8,
                        1 => line.truncate(at.max(1)),
                        _ => drop(line.drain(at..(at + random() % 30).min(line.len() - 1).max(at))),
                    }
                }
            }
            let _ = decode(&line);
        }
    }
}
