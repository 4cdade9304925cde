//! The pieces that an answer is cut into.

use crate::{Event, ToolCallEvent};

use super::id::call_id;

/// What a piece of an answer is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Meaning {
    /// Tags, the JSON around names and arguments, and white space beside tags.
    Syntax,
    /// Text that is meant to be read.
    Text,
    /// A part of a thought.
    Reasoning,
    /// The beginning of a call.
    Call { index: usize, name: String },
    /// A part of a call's arguments as JSON.
    Arguments { index: usize, delta: String },
}

/// A piece of an answer. `raw` is what the model wrote: all of them together are the whole answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) raw: String,
    pub(super) meaning: Meaning,
}

/// Pieces in order. Neighbours of the same meaning become one.
#[derive(Debug, Clone, Default)]
pub(super) struct Pieces(Vec<Piece>);

impl Pieces {
    pub(super) fn add(&mut self, raw: &str, meaning: Meaning) {
        if let Some(last) = self.0.last_mut() {
            let joined = match (&mut last.meaning, &meaning) {
                (Meaning::Arguments { index, delta }, Meaning::Arguments { index: same, delta: more })
                    if index == same =>
                {
                    delta.push_str(more);
                    true
                }
                (Meaning::Call { .. } | Meaning::Arguments { .. }, _) => false,
                (before, now) => before == now,
            };
            if joined {
                last.raw.push_str(raw);
                return;
            }
        }
        self.0.push(Piece { raw: raw.to_owned(), meaning });
    }

    pub(super) fn add_text(&mut self, raw: &str, meaning: Meaning) {
        if !raw.is_empty() {
            self.add(raw, meaning);
        }
    }

    pub(super) fn take(&mut self) -> Vec<Piece> {
        std::mem::take(&mut self.0)
    }
}

impl Piece {
    /// What a reader gets of it.
    pub(super) fn into_event(self) -> Option<Event> {
        match self.meaning {
            Meaning::Syntax => None,
            Meaning::Text => Some(Event::text(self.raw)),
            Meaning::Reasoning => Some(Event::reasoning(self.raw)),
            Meaning::Call { index, name } => Some(ToolCallEvent::start(index, call_id(), name).into()),
            Meaning::Arguments { index, delta } => Some(ToolCallEvent::arguments(index, delta).into()),
        }
    }
}

/// The calls that are being read: what was taken of them and is no piece yet.
#[derive(Debug, Clone)]
pub(super) struct CallWriter {
    pub(super) raw: String,
    pub(super) index: usize,
    /// Whether the current call has been announced. From then on it cannot become text any more.
    pub(super) announced: bool,
}

impl CallWriter {
    pub(super) fn new(index: usize, opening: &str) -> Self {
        Self { raw: opening.to_owned(), index, announced: false }
    }

    pub(super) fn announce(&mut self, name: &str, pieces: &mut Pieces) {
        pieces
            .add(&std::mem::take(&mut self.raw), Meaning::Call { index: self.index, name: name.to_owned() });
        self.announced = true;
    }

    pub(super) fn arguments(&mut self, delta: &str, pieces: &mut Pieces) {
        if !delta.is_empty() {
            let meaning = Meaning::Arguments { index: self.index, delta: delta.to_owned() };
            pieces.add(&std::mem::take(&mut self.raw), meaning);
        }
    }

    /// The end of a call, after which another may follow.
    pub(super) fn end(&mut self, pieces: &mut Pieces) {
        pieces.add_text(&std::mem::take(&mut self.raw), Meaning::Syntax);
        if std::mem::take(&mut self.announced) {
            self.index += 1;
        }
    }
}
