//! Stop strings that may lie across tokens, special ones included.

use std::ops::Range;

/// Passes text through and holds back what may be the beginning of a stop string.
///
/// A special token has no text in the answer, but its name counts for stop strings: `<|im_end|>\n<|im_start|>user` is a
/// usual one. So stop strings are looked for in two views of the text: with the names, as transformers does it, and without
/// them, so that no answer has a stop string in it.
#[derive(Debug, Default)]
pub struct StopMatcher {
    stops: Vec<String>,
    named: View,
    plain: View,
    /// Text of the answer that is not certain yet.
    held: String,
    /// Bytes of the answer before `held`.
    passed: usize,
}

impl StopMatcher {
    /// Matches any of `stops`, none of which is empty.
    pub fn new(stops: Vec<String>) -> Self {
        Self { stops, ..Self::default() }
    }

    /// Whether there are any stop strings.
    pub fn has_stops(&self) -> bool {
        !self.stops.is_empty()
    }

    /// Takes the next piece; returns the text that is certain, and the stop string if one is complete. After that
    /// nothing more may be pushed.
    pub fn push(&mut self, piece: &str) -> (String, Option<String>) {
        if !self.has_stops() {
            return (piece.to_owned(), None);
        }
        self.held.push_str(piece);
        let named = self.named.push(&self.stops, piece, false);
        let plain = self.plain.push(&self.stops, piece, false);
        self.give(named.into_iter().chain(plain).min_by_key(|found| (found.end, found.start)))
    }

    /// Takes the name of a special token, which counts for stop strings and is no text. Returns what
    /// [`push`](Self::push) does.
    pub fn push_hidden(&mut self, name: &str) -> (String, Option<String>) {
        let found = self.named.push(&self.stops, name, true);
        self.give(found)
    }

    fn give(&mut self, found: Option<Match>) -> (String, Option<String>) {
        let certain = found.as_ref().map_or(self.named.passed.min(self.plain.passed), |found| found.start);
        let text = self.held.drain(..certain - self.passed).collect();
        self.passed = certain;
        if found.is_some() {
            self.held.clear();
        }
        (text, found.map(|found| found.stop))
    }

    /// The text that is still held, when no more comes.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// A stop string that is complete, with its place in the answer in bytes.
struct Match {
    start: usize,
    end: usize,
    stop: String,
}

/// The end of a text in which stop strings are looked for.
#[derive(Debug, Default)]
struct View {
    /// What may be the beginning of a stop string.
    held: String,
    /// The parts of `held` that are no text of the answer, in order.
    hidden: Vec<Range<usize>>,
    /// Bytes of the answer before `held`.
    passed: usize,
}

impl View {
    fn push(&mut self, stops: &[String], piece: &str, is_hidden: bool) -> Option<Match> {
        let start = self.held.len();
        self.held.push_str(piece);
        if is_hidden {
            self.hidden.push(start..self.held.len());
        }
        // The match that is complete first counts; of several with one end, the longest. That is what one would find
        // character by character, so it does not depend on how the text is cut into pieces.
        let found = stops
            .iter()
            .filter_map(|stop| self.held.find(stop.as_str()).map(|at| (at + stop.len(), at, stop)))
            .min_by_key(|&(end, at, _)| (end, at));
        if let Some((end, at, stop)) = found {
            return Some(Match { start: self.in_answer(at), end: self.in_answer(end), stop: stop.clone() });
        }
        let certain = self.held.len() - longest_beginning(stops, &self.held);
        self.passed = self.in_answer(certain);
        self.held.drain(..certain);
        self.hidden.retain_mut(|range| {
            *range = range.start.saturating_sub(certain)..range.end.saturating_sub(certain);
            range.start < range.end
        });
        None
    }

    /// The place in the answer of a place in `held`.
    fn in_answer(&self, at: usize) -> usize {
        let hidden = self.hidden.iter().map(|range| range.end.min(at).saturating_sub(range.start));
        self.passed + at - hidden.sum::<usize>()
    }
}

/// Bytes at the end of `text` that are the beginning of some stop string.
fn longest_beginning(stops: &[String], text: &str) -> usize {
    let longest = stops.iter().map(String::len).max().unwrap_or(0).saturating_sub(1);
    let from = text.len().saturating_sub(longest);
    (from..text.len())
        .filter(|&at| text.is_char_boundary(at))
        .find(|&at| stops.iter().any(|stop| stop.starts_with(&text[at..])))
        .map_or(0, |at| text.len() - at)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Feeds `text` in pieces of `size` characters; returns what came out and the stop string.
    fn run(stops: &[&str], text: &str, size: usize) -> (String, Option<String>) {
        let mut matcher = StopMatcher::new(stops.iter().map(|s| (*s).to_owned()).collect());
        let mut out = String::new();
        let chars: Vec<char> = text.chars().collect();
        for piece in chars.chunks(size) {
            let (certain, stop) = matcher.push(&piece.iter().collect::<String>());
            out.push_str(&certain);
            if stop.is_some() {
                return (out, stop);
            }
        }
        out.push_str(&matcher.finish());
        (out, None)
    }

    #[test]
    fn matches_lie_across_pieces_of_any_size() {
        for size in 1..12 {
            assert_eq!(
                run(&["\n\nUser:"], "Hi.\n\nUser: x", size),
                ("Hi.".into(), Some("\n\nUser:".into())),
                "{size}"
            );
            assert_eq!(run(&["ab", "c"], "xaac", size), ("xaa".into(), Some("c".into())), "{size}");
            assert_eq!(run(&["aab"], "aaab", size), ("a".into(), Some("aab".into())), "{size}");
            assert_eq!(run(&["été"], "un été", size), ("un ".into(), Some("été".into())), "{size}");
            let (long, short) = ("a b c d", "b c");
            let first_complete = ("a ".into(), Some(short.into()));
            assert_eq!(run(&[long, short], "a b c d", size), first_complete, "{size}");
            assert_eq!(run(&["c", "b c"], "a b c", size), first_complete, "{size}");
            assert_eq!(run(&["stop"], "sto", size), ("sto".into(), None), "{size}");
        }
    }

    #[test]
    fn only_a_possible_beginning_is_held() {
        let mut matcher = StopMatcher::new(vec!["END".into()]);
        assert_eq!(matcher.push("one E"), ("one ".into(), None));
        assert_eq!(matcher.push("N"), (String::new(), None));
        assert_eq!(matcher.push("T"), ("ENT".into(), None));
        assert_eq!(matcher.push("END"), (String::new(), Some("END".into())));
    }

    /// Feeds tokens, of which those in angle brackets are special; returns what came out and the stop string.
    fn run_tokens(stops: &[&str], tokens: &[&str]) -> (String, Option<String>) {
        let mut matcher = StopMatcher::new(stops.iter().map(|s| (*s).to_owned()).collect());
        let mut out = String::new();
        for token in tokens {
            let (certain, stop) =
                if token.starts_with("<|") { matcher.push_hidden(token) } else { matcher.push(token) };
            out.push_str(&certain);
            if stop.is_some() {
                return (out, stop);
            }
        }
        out.push_str(&matcher.finish());
        (out, None)
    }

    // The answers are those of transformers' StopStringCriteria, cut before the stop string, without special tokens.
    #[test]
    fn names_of_special_tokens_count_and_do_not_show() {
        let chat = ["Yes", ".", "<|im_end|>", "\n", "<|im_start|>", "user", "\n"];
        for (stop, text) in [
            ("<|im_end|>", "Yes."),
            ("<|im_end|>\n<|im_start|>user", "Yes."),
            ("<|im_start|>", "Yes.\n"),
            (".<|im_end|>", "Yes"),
            ("\n<|im", "Yes."),
            ("end", "Yes."),
            ("er\n", "Yes.\nus"),
        ] {
            assert_eq!(run_tokens(&[stop], &chat), (text.to_owned(), Some(stop.to_owned())), "{stop:?}");
        }
        // No answer has a stop string in it, whatever stands between its parts.
        assert_eq!(run_tokens(&["\nus"], &chat), ("Yes.".to_owned(), Some("\nus".to_owned())));
        assert_eq!(run_tokens(&["a\n"], &["a", "<|x|>", "b", "a", "<|x|>", "\n"]).0, "ab");
        for stops in [&["<|im_end|>\n<|im_start|>system"][..], &["never"], &[]] {
            assert_eq!(run_tokens(stops, &chat), ("Yes.\nuser\n".to_owned(), None), "{stops:?}");
        }
        // Text that is written like a special token is text, and matches as well.
        assert_eq!(run_tokens(&["|x|>"], &["a<", "|x", "|> b"]), ("a<".to_owned(), Some("|x|>".to_owned())));
    }
}
