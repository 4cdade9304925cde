//! A JSON value that comes character by character.

/// Values that are nested more deeply are no arguments of a tool. The same bound as in `serde_json`.
const MAX_DEPTH: usize = 128;

/// The longest number or literal.
const MAX_WORD: usize = 64;

/// What a character means for the value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fed {
    /// The value goes on.
    More,
    /// The value ends with this character.
    Last,
    /// The value has ended before this character: a number does not say where it ends.
    Ended,
    /// This character cannot stand here.
    Invalid,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    Value,
    FirstElement,
    FirstKey,
    Key,
    Colon,
    Separator,
    Text {
        is_key: bool,
    },
    Escape {
        is_key: bool,
    },
    /// Hexadecimal digits of `\u` that are still to come.
    Hex {
        is_key: bool,
        left: u8,
    },
    /// A number, `true`, `false` or `null`.
    Word,
    End,
}

/// Checks one JSON value as it comes. Control characters in strings are taken and written as escapes, since models forget to
/// escape line breaks.
#[derive(Debug, Clone)]
pub(super) struct JsonScanner {
    at: At,
    /// The open objects (`true`) and arrays.
    open: Vec<bool>,
    word: String,
}

impl JsonScanner {
    pub(super) fn new() -> Self {
        Self { at: At::Value, open: Vec::new(), word: String::new() }
    }

    /// Whether the next character is within a string.
    pub(super) fn is_in_text(&self) -> bool {
        matches!(self.at, At::Text { .. } | At::Escape { .. } | At::Hex { .. })
    }

    /// Takes the next character, and adds it to `text` unless it is no part of the value.
    pub(super) fn feed(&mut self, c: char, text: &mut String) -> Fed {
        if self.at == At::Word {
            if c.is_ascii_alphanumeric() || "+-.".contains(c) {
                self.word.push(c);
                text.push(c);
                return if self.word.len() > MAX_WORD { Fed::Invalid } else { Fed::More };
            }
            if serde_json::from_str::<serde_json::Value>(&self.word).is_err() {
                return Fed::Invalid;
            }
            if self.open.is_empty() {
                return Fed::Ended;
            }
            self.at = At::Separator;
        }
        let next = self.next(c);
        match next {
            None => Fed::Invalid,
            Some(at) => {
                let in_text = matches!(self.at, At::Text { .. });
                self.at = at;
                if in_text && c.is_control() {
                    // A control character as JSON writes it, without the quotes around it.
                    let escaped = serde_json::Value::from(c.to_string()).to_string();
                    text.push_str(escaped.trim_matches('"'));
                } else {
                    text.push(c);
                }
                if at == At::End { Fed::Last } else { Fed::More }
            }
        }
    }

    fn next(&mut self, c: char) -> Option<At> {
        match self.at {
            At::Text { is_key } => Some(match c {
                '"' if is_key => At::Colon,
                '"' => self.after_value(),
                '\\' => At::Escape { is_key },
                _ => self.at,
            }),
            At::Escape { is_key } => match c {
                'u' => Some(At::Hex { is_key, left: 4 }),
                '"' | '\\' | '/' | 'b' | 'f' | 'n' | 'r' | 't' => Some(At::Text { is_key }),
                _ => None,
            },
            At::Hex { is_key, left } => c.is_ascii_hexdigit().then_some(match left {
                1 => At::Text { is_key },
                _ => At::Hex { is_key, left: left - 1 },
            }),
            _ if matches!(c, ' ' | '\t' | '\n' | '\r') => Some(self.at),
            At::FirstElement if c == ']' => Some(self.close()),
            At::Value | At::FirstElement => self.value(c),
            At::FirstKey if c == '}' => Some(self.close()),
            At::FirstKey | At::Key => (c == '"').then_some(At::Text { is_key: true }),
            At::Colon => (c == ':').then_some(At::Value),
            At::Separator => match (c, self.open.last()) {
                (',', Some(true)) => Some(At::Key),
                (',', Some(false)) => Some(At::Value),
                ('}', Some(true)) | (']', Some(false)) => Some(self.close()),
                _ => None,
            },
            At::Word | At::End => None,
        }
    }

    fn value(&mut self, c: char) -> Option<At> {
        match c {
            '{' | '[' if self.open.len() == MAX_DEPTH => None,
            '{' => {
                self.open.push(true);
                Some(At::FirstKey)
            }
            '[' => {
                self.open.push(false);
                Some(At::FirstElement)
            }
            '"' => Some(At::Text { is_key: false }),
            '-' | '0'..='9' | 't' | 'f' | 'n' => {
                self.word = c.to_string();
                Some(At::Word)
            }
            _ => None,
        }
    }

    fn close(&mut self) -> At {
        self.open.pop();
        self.after_value()
    }

    fn after_value(&self) -> At {
        if self.open.is_empty() { At::End } else { At::Separator }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is taken of a text, and how it ends.
    fn scan(json: &str) -> (String, Fed) {
        let (mut scanner, mut text) = (JsonScanner::new(), String::new());
        for c in json.chars() {
            match scanner.feed(c, &mut text) {
                Fed::More => {}
                end => return (text, end),
            }
        }
        (text, Fed::More)
    }

    #[test]
    fn values_end_where_they_end() {
        for value in [
            "{}",
            "[]",
            r#""a\"b""#,
            r#"{"a": [1, -2.5e3, true, null, {"b": "é\u00e9"}], "c": {}}"#,
            "[[], {}]",
        ] {
            assert_eq!(scan(&format!("{value}, x")), (value.to_owned(), Fed::Last), "{value}");
            assert_eq!(scan(&value[..value.len() - 1]).1, Fed::More, "{value}");
        }
        assert_eq!(scan("12}"), ("12".to_owned(), Fed::Ended));
        assert_eq!(scan("true"), ("true".to_owned(), Fed::More));
    }

    #[test]
    fn what_is_no_json_is_found_at_once() {
        for (json, taken) in [
            ("{a", "{"),
            ("[1,]", "[1,"),
            ("{\"a\" 1", "{\"a\" "),
            ("[1}", "[1"),
            ("\"\\x", "\"\\"),
            ("[01]", "[01"),
        ] {
            assert_eq!(scan(json), (taken.to_owned(), Fed::Invalid), "{json}");
        }
        assert_eq!(scan(&"[".repeat(1000)).1, Fed::Invalid);
    }

    #[test]
    fn line_breaks_in_strings_become_escapes() {
        let (text, end) = scan("{\"a\": \"1\n2\"}");
        assert_eq!((text.as_str(), end), (r#"{"a": "1\n2"}"#, Fed::Last));
    }
}
