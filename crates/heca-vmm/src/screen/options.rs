//! QEMU's option syntax: `-name key=value,key=value` and the JSON that libvirt writes instead.

use serde_json::Value;

/// Pairs each option with its value; an option without one gets an empty value.
///
/// QEMU decides by a table whether an option takes a value. Here a word that begins with a dash is
/// an option unless it follows `-append`, so an option that this code has never heard of cannot
/// hide the one behind it.
pub(super) fn split_options(arguments: &[String]) -> impl Iterator<Item = (&str, &str)> {
    let mut rest = arguments.iter().map(String::as_str).peekable();
    std::iter::from_fn(move || {
        loop {
            let Some(name) = option_name(rest.next()?) else {
                continue;
            };
            let takes_any = name == "append";
            let value = rest.next_if(|next| takes_any || option_name(next).is_none());
            return Some((name, value.unwrap_or_default()));
        }
    })
}

fn option_name(argument: &str) -> Option<&str> {
    let name = argument.strip_prefix('-')?;
    Some(name.strip_prefix('-').unwrap_or(name)).filter(|name| !name.is_empty())
}

/// The value of an option, as keys and values. Nested JSON becomes dotted keys, as in QEMU itself.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Properties {
    pairs: Vec<(String, String)>,
    unreadable: bool,
}

impl Properties {
    pub(super) fn parse(text: &str, implied_key: &str) -> Self {
        let mut properties = Self::default();
        if text.trim_start().starts_with('{') {
            properties.add_json("", text);
            return properties;
        }
        for (number, part) in split_commas(text).into_iter().enumerate() {
            match part.split_once('=') {
                Some((key, value)) => properties.add(key, value),
                None if number == 0 => properties.add(implied_key, &part),
                // The old short forms: `share` is share=on, `noshare` is share=off.
                None => {
                    properties.add(&part, "on");
                    if let Some(key) = part.strip_prefix("no") {
                        properties.add(key, "off");
                    }
                }
            }
        }
        properties
    }

    fn add(&mut self, key: &str, value: &str) {
        if let Some(json) = value.strip_prefix("json:") {
            self.add_json(key, json);
        }
        self.pairs.push((key.to_owned(), value.to_owned()));
    }

    fn add_json(&mut self, key: &str, text: &str) {
        match serde_json::from_str(text) {
            Ok(value) => self.flatten(key, &value),
            Err(error) => {
                tracing::debug!(%error, text, "unreadable json on a qemu command line");
                self.unreadable = true;
            }
        }
    }

    fn flatten(&mut self, key: &str, value: &Value) {
        let below = |part: &str| {
            if key.is_empty() { part.to_owned() } else { format!("{key}.{part}") }
        };
        match value {
            Value::Object(members) => {
                members.iter().for_each(|(part, value)| self.flatten(&below(part), value));
            }
            Value::Array(items) => {
                let numbered = items.iter().enumerate();
                numbered
                    .for_each(|(number, value)| self.flatten(&below(&number.to_string()), value));
            }
            Value::String(text) => self.add(key, text),
            Value::Bool(flag) => self.add(key, if *flag { "on" } else { "off" }),
            Value::Number(number) => self.add(key, &number.to_string()),
            Value::Null => {}
        }
    }

    /// Whether part of the value is JSON that only QEMU can read: it also takes single quotes.
    pub(super) fn is_unreadable(&self) -> bool {
        self.unreadable
    }

    /// The value of a key; the last one, as in QEMU, if it is given twice.
    pub(super) fn get(&self, key: &str) -> Option<&str> {
        self.pairs.iter().rev().find(|(name, _)| name == key).map(|(_, value)| value.as_str())
    }

    pub(super) fn is_on(&self, key: &str) -> bool {
        self.get(key).is_some_and(is_on)
    }

    /// All values of a key, at any depth: `driver` finds `file.driver` too.
    pub(super) fn anywhere(&self, key: &str) -> impl Iterator<Item = &str> {
        let nested = format!(".{key}");
        let found = self.pairs.iter().filter(move |(name, _)| {
            name.ends_with(&nested) || (name.len() + 1 == nested.len() && nested.ends_with(name))
        });
        found.map(|(_, value)| value.as_str())
    }
}

pub(super) fn is_on(value: &str) -> bool {
    matches!(value, "on" | "yes" | "true" | "y")
}

/// Splits at commas; two commas in a row are one comma of the value.
fn split_commas(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut characters = text.chars().peekable();
    while let Some(character) = characters.next() {
        if character == ',' && characters.next_if_eq(&',').is_none() {
            parts.push(String::new());
        } else if let Some(part) = parts.last_mut() {
            part.push(character);
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(line: &str) -> Vec<(String, String)> {
        let arguments: Vec<String> = line.split(' ').map(str::to_owned).collect();
        split_options(&arguments).map(|(n, v)| (n.to_owned(), v.to_owned())).collect()
    }

    #[test]
    fn options_are_paired_with_their_values() {
        let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        assert_eq!(
            split("qemu -S --object a,b=c disk.img -append -m -serial - -mem-prealloc"),
            [
                pair("S", ""),
                pair("object", "a,b=c"),
                pair("append", "-m"),
                pair("serial", "-"),
                pair("mem-prealloc", "")
            ]
        );
        assert_eq!(split(""), []);
    }

    #[test]
    fn both_syntaxes_give_the_same_keys() {
        let text =
            Properties::parse("file,cache.direct=on,filename=a,,b,x=1,x=2,ro,nowait", "driver");
        assert_eq!(text.get("driver"), Some("file"));
        assert_eq!(text.get("filename"), Some("a,b"));
        assert_eq!(text.get("x"), Some("2"));
        assert!(text.is_on("cache.direct") && text.is_on("ro") && !text.is_on("wait"));
        let json = r#"{"driver":"qcow2","file":{"driver":"nvme","cache":{"direct":true}},"n":[7]}"#;
        let json = Properties::parse(json, "driver");
        assert!(json.is_on("file.cache.direct"));
        assert_eq!(json.anywhere("cache.direct").collect::<Vec<_>>(), ["on"]);
        assert_eq!(json.anywhere("driver").collect::<Vec<_>>(), ["qcow2", "nvme"]);
        assert_eq!(json.get("n.0"), Some("7"));
        assert_eq!(text.anywhere("irect").count() + text.anywhere("direct,").count(), 0);
        let nested =
            Properties::parse(r#"file=json:{"driver":"raw",,"cache":{"direct":true}}"#, "x");
        assert!(nested.is_on("file.cache.direct"), "{nested:?}");
    }

    #[test]
    fn broken_text_is_read_without_panic() {
        for text in ["", ",", ",,,", "=", "{", "{\"a\":", "json:{", "a=json:[", "no", "\u{e9},=,"] {
            let _ = Properties::parse(text, "type");
        }
    }
}
