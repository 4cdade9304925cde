//! The constraint of one generation: where in the answer it holds, and the grammar there.

use ternion_core::{ConstraintStart, Error, Result, text::Tokenizer};

use super::Grammar;

/// A constraint beside its generation.
pub(crate) struct Running {
    /// As it was compiled; each start takes a copy.
    grammar: Grammar,
    /// The text after which the grammar holds; empty if it holds from the start on.
    awaited: String,
    /// The answer may end without the text.
    optional: bool,
    /// The grammar holds each time that the text appears.
    repeats: bool,
    /// The token with which the answer may begin a thought; the text is then what ends it.
    thought: Option<u32>,
    state: State,
}

enum State {
    /// The answer is free. Holds the end of its text, in which the awaited text may have begun.
    Free { end: String },
    /// The grammar holds. `at_start`: a line break may still come before it.
    Held { grammar: Grammar, at_start: bool },
}

/// The tokens that end an answer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct EndTokens<'a> {
    /// Those of the model.
    pub(crate) eos: &'a [u32],
    /// Those of the request.
    pub(crate) stop: &'a [u32],
}

impl Running {
    pub(crate) fn new(grammar: Grammar, start: ConstraintStart, tokenizer: &Tokenizer) -> Self {
        let (mut thought, mut optional, mut repeats) = (None, false, false);
        let awaited = match start {
            ConstraintStart::AfterText(text) => text,
            ConstraintStart::AfterThought { start, end } => {
                thought = tokenizer.token_id(&start);
                if thought.is_some() { end } else { String::new() }
            }
            ConstraintStart::Once(text) => {
                optional = true;
                text
            }
            ConstraintStart::EachTime(text) => {
                (optional, repeats) = (true, true);
                text
            }
            _ => String::new(),
        };
        let state = if awaited.is_empty() || thought.is_some() {
            State::Held { grammar: grammar.clone(), at_start: false }
        } else {
            State::Free { end: String::new() }
        };
        Self { grammar, awaited, optional, repeats, thought, state }
    }

    /// Forbids the tokens that cannot come next: their logits become `-inf`.
    ///
    /// # Errors
    /// Where the grammar reaches one of its limits.
    pub(crate) fn restrict(&mut self, logits: &mut [f32], ends: EndTokens<'_>) -> Result<()> {
        match &mut self.state {
            State::Held { grammar, at_start } => {
                let breaks = if *at_start { with_logits(grammar.line_breaks(), logits) } else { Vec::new() };
                let thought = with_logits(self.thought.as_slice(), logits);
                let stops = with_logits(ends.stop, logits);
                grammar.restrict(logits)?;
                // A stop token may come only where the answer may end, also if the grammar allows its text.
                let stop = grammar.can_end();
                for (id, logit) in stops {
                    logits[id as usize] = if stop { logit } else { f32::NEG_INFINITY };
                }
                for (id, logit) in breaks.into_iter().chain(thought) {
                    logits[id as usize] = logit;
                }
            }
            State::Free { end } => {
                if !self.optional {
                    forbid(ends.eos, logits);
                    forbid(ends.stop, logits);
                }
                // The grammar begins with a whole token, so no token may go beyond the awaited text.
                for (at, _) in self.awaited.char_indices() {
                    let (begun, rest) = self.awaited.split_at(at);
                    if end.ends_with(begun) {
                        forbid(&self.grammar.tokens_beyond(rest), logits);
                    }
                }
            }
        }
        Ok(())
    }

    /// The tokens that must come next, in their order; none where there is a choice.
    pub(crate) fn forced(&mut self) -> Vec<u32> {
        match &mut self.state {
            State::Held { grammar, at_start: false } if self.thought.is_none() => grammar.forced(),
            _ => Vec::new(),
        }
    }

    /// Follows a token that does not end the answer. `text` is what becomes certain with it, or the name of a special token.
    /// `true` if the answer is complete and nothing can follow.
    ///
    /// # Errors
    /// Where the token is not allowed, and where the grammar reaches one of its limits.
    pub(crate) fn accept(&mut self, id: u32, text: &str) -> Result<bool> {
        match &mut self.state {
            State::Held { .. } if self.thought.take_if(|start| *start == id).is_some() => {
                self.state = State::Free { end: String::new() };
                Ok(false)
            }
            State::Held { grammar, at_start } => {
                self.thought = None;
                let may_be_break = std::mem::take(at_start) && grammar.line_breaks().contains(&id);
                if may_be_break && !grammar.allows(id) {
                    return Ok(false);
                }
                grammar.push(id)?;
                let complete = grammar.must_end();
                if complete && self.repeats {
                    self.state = State::Free { end: String::new() };
                    return Ok(false);
                }
                Ok(complete)
            }
            State::Free { end } => {
                end.push_str(text);
                match end.split_once(&self.awaited) {
                    Some((_, "")) => {
                        self.state = State::Held { grammar: self.grammar.clone(), at_start: !self.optional };
                    }
                    Some((_, rest)) => {
                        let message = format!(
                            "constraint: a token has `{rest}` after `{}`, where the constraint begins",
                            self.awaited
                        );
                        return Err(Error::backend(message));
                    }
                    None => keep_end(end, self.awaited.len() - 1),
                }
                Ok(false)
            }
        }
    }

    /// Whether the answer may end here.
    pub(crate) fn is_complete(&mut self) -> bool {
        match &mut self.state {
            State::Held { grammar, .. } => grammar.can_end(),
            State::Free { .. } => self.optional,
        }
    }
}

/// The tokens that the model has, with their logits.
fn with_logits(ids: &[u32], logits: &[f32]) -> Vec<(u32, f32)> {
    ids.iter().filter_map(|&id| Some((id, *logits.get(id as usize)?))).collect()
}

fn forbid(ids: &[u32], logits: &mut [f32]) {
    for &id in ids {
        if let Some(logit) = logits.get_mut(id as usize) {
            *logit = f32::NEG_INFINITY;
        }
    }
}

/// Drops all but the last `count` bytes, and of a character that this would cut the rest as well.
fn keep_end(text: &mut String, count: usize) {
    let least = text.len().saturating_sub(count);
    let from = (least..=text.len()).find(|&at| text.is_char_boundary(at)).unwrap_or(text.len());
    text.drain(..from);
}
