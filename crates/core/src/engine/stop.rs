//! Stop strings that may lie across tokens.

/// Passes text through and holds back what may be the beginning of a stop string.
#[derive(Debug, Default)]
pub(crate) struct StopMatcher {
    stops: Vec<String>,
    held: String,
}

impl StopMatcher {
    pub(crate) fn new(stops: Vec<String>) -> Self {
        Self { stops, held: String::new() }
    }

    /// Takes the next piece; returns the text that is certain, and the stop string if one is complete. After that
    /// nothing more may be pushed.
    pub(crate) fn push(&mut self, piece: &str) -> (String, Option<String>) {
        if self.stops.is_empty() {
            return (piece.to_owned(), None);
        }
        self.held.push_str(piece);
        // The match that is complete first counts; of several with one end, the longest. That is what one would find
        // character by character, so it does not depend on how the text is cut into pieces.
        let found = self
            .stops
            .iter()
            .filter_map(|stop| self.held.find(stop.as_str()).map(|at| (at, stop)))
            .min_by_key(|&(at, stop)| (at + stop.len(), at));
        if let Some((at, stop)) = found {
            let stop = stop.clone();
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), Some(stop));
        }
        let keep = self.longest_beginning();
        let certain = self.held.len() - keep;
        (self.held.drain(..certain).collect(), None)
    }

    /// The text that is still held, when no more comes.
    pub(crate) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Bytes at the end of the held text that are the beginning of some stop string.
    fn longest_beginning(&self) -> usize {
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0).saturating_sub(1);
        let from = self.held.len().saturating_sub(longest);
        (from..self.held.len())
            .filter(|&at| self.held.is_char_boundary(at))
            .find(|&at| self.stops.iter().any(|stop| stop.starts_with(&self.held[at..])))
            .map_or(0, |at| self.held.len() - at)
    }
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
}
