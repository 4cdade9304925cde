//! `truncate`: drops a part of what does not fit, by tokens and between characters.

use std::ops::Range;

use super::{
    ContextPolicy, DropFrom, Dropped, Truncate,
    budget::cannot_fit,
    parts::{Piece, is_token_boundary, prompt_of, segments, text_of, without},
};
use crate::{ChatOptions, Content, Message, Prompt, Result, text::Tokenizer};

/// Tokens more than needed that may be dropped.
const SLACK: usize = 2;
/// How often it is tried with fewer.
const MAX_TRIES: usize = 24;

/// Drops as much of `prompt` as is over `limit` tokens; `document` is the length of the document at the beginning of its text
/// or of its last user message. Returns it with what was dropped.
///
/// # Errors
/// [`ContextOverflow`](crate::ErrorKind::ContextOverflow) where what must be kept is over the limit alone.
pub(super) fn truncate(
    tokenizer: &Tokenizer,
    prompt: Prompt,
    chat: &ChatOptions,
    document: Option<usize>,
    policy: &Truncate,
    limit: usize,
) -> Result<(Prompt, Vec<Dropped>)> {
    match prompt {
        Prompt::Tokens(tokens) => {
            let (tokens, dropped) = cut_tokens(tokenizer, &tokens, policy, limit)?;
            Ok((Prompt::Tokens(tokens), dropped))
        }
        Prompt::Text(_) | Prompt::Segments(_) => {
            let segments = segments(prompt);
            let text = text_of(&segments);
            let piece = Piece::of_segments(tokenizer, &segments, document.unwrap_or(text.len()))?;
            let mut count = 0;
            let found = search(piece.len(), limit, |drop| {
                let cut = piece.cut(&text, region(policy.drop, piece.len(), drop));
                let shorter = without(&segments, &cut);
                count = tokenizer.encode_segments(&shorter, true)?.len();
                let tokens = piece.tokens_in(&cut);
                let dropped = Dropped { message: None, start: cut.start, end: cut.end, tokens };
                Ok((count, (prompt_of(shorter), vec![dropped])))
            })?;
            found.ok_or_else(|| cannot_fit(&ContextPolicy::Truncate(policy.clone()), "prompt", count, limit))
        }
        Prompt::Chat(messages) => {
            let (messages, dropped) =
                Conversation::new(tokenizer, messages, chat, document, policy)?.fit(limit)?;
            Ok((Prompt::Chat(messages), dropped))
        }
    }
}

/// The tokens to drop, `drop` of `total`.
fn region(from: DropFrom, total: usize, drop: usize) -> Range<usize> {
    let drop = drop.min(total);
    match from {
        DropFrom::OldestTurns | DropFrom::Head => 0..drop,
        DropFrom::Tail => total - drop..total,
        DropFrom::Middle => {
            let start = (total - drop) / 2;
            start..start + drop
        }
    }
}

/// The fewest of `total` tokens to drop, nearly, for the count that `attempt` returns to be within `limit`; `None` if not even all
/// of them suffice. Tokens merge anew at a cut, and turns that are gone take their part of the template with them, so that
/// it is not known beforehand.
fn search<T>(
    total: usize,
    limit: usize,
    mut attempt: impl FnMut(usize) -> Result<(usize, T)>,
) -> Result<Option<T>> {
    let (mut count, mut found) = attempt(0)?;
    if count <= limit {
        return Ok(Some(found));
    }
    // Too few with its count; enough with its count and what it gives.
    let mut few = (0, count);
    let mut enough: Option<(usize, usize, T)> = None;
    let mut drop = (count - limit).min(total);
    for tries in 0.. {
        (count, found) = attempt(drop)?;
        if count <= limit {
            enough = Some((drop, count, found));
        } else {
            few = (drop, count);
        }
        match &enough {
            None if drop >= total => break,
            None => drop = (drop + count - limit).min(total),
            Some((most, least, _)) => {
                if limit - least <= SLACK || most - few.0 <= 1 || tries >= MAX_TRIES {
                    break;
                }
                // Where a line between both reaches the limit, and by turns in the middle.
                let line = (few.1 - limit).saturating_mul(most - few.0).div_ceil(few.1 - least);
                let guess = if tries % 2 == 0 { few.0 + line } else { few.0.midpoint(*most) };
                drop = guess.clamp(few.0 + 1, most - 1);
            }
        }
    }
    Ok(enough.map(|(_, _, found)| found))
}

fn cut_tokens(
    tokenizer: &Tokenizer,
    tokens: &[u32],
    policy: &Truncate,
    limit: usize,
) -> Result<(Vec<u32>, Vec<Dropped>)> {
    // The token that begins every sequence is none of the text.
    let first = usize::from(tokens.first().is_some_and(|&t| Some(t) == tokenizer.bos_id()));
    let drop = tokens.len() - limit.min(tokens.len());
    if first + drop > tokens.len() {
        return Err(cannot_fit(&ContextPolicy::Truncate(policy.clone()), "prompt", first, limit));
    }
    let cut = region(policy.drop, tokens.len() - first, drop);
    let (mut start, mut end) = (cut.start + first, cut.end + first);
    while start > first && !is_token_boundary(tokenizer, tokens, start)? {
        start -= 1;
    }
    while end < tokens.len() && !is_token_boundary(tokenizer, tokens, end)? {
        end += 1;
    }
    let kept = [&tokens[..start], &tokens[end..]].concat();
    Ok((kept, vec![Dropped { message: None, start, end, tokens: end - start }]))
}

/// A conversation of which parts may be dropped.
struct Conversation<'a> {
    tokenizer: &'a Tokenizer,
    chat: &'a ChatOptions,
    policy: &'a Truncate,
    messages: Vec<Message>,
    /// The texts of the messages.
    texts: Vec<String>,
    /// For each message the part that may be cut.
    pieces: Vec<Option<Piece>>,
    /// The messages of each turn before the last user message, without system messages.
    turns: Vec<Vec<usize>>,
    /// The message that begins with the document.
    document: Option<usize>,
}

impl<'a> Conversation<'a> {
    fn new(
        tokenizer: &'a Tokenizer,
        messages: Vec<Message>,
        chat: &'a ChatOptions,
        document: Option<usize>,
        policy: &'a Truncate,
    ) -> Result<Self> {
        let last = messages.iter().rposition(|m| m.role == "user").unwrap_or(0);
        let mut turns: Vec<Vec<usize>> = Vec::new();
        let mut pieces = Vec::with_capacity(messages.len());
        let texts: Vec<_> = messages.iter().map(|message| message.content.text().into_owned()).collect();
        for (i, (message, content)) in messages.iter().zip(&texts).enumerate() {
            let cuttable = if message.role == "system" || i > last {
                None
            } else if i < last {
                match turns.last_mut() {
                    Some(turn) if message.role != "user" => turn.push(i),
                    _ => turns.push(vec![i]),
                }
                Some(0..content.len())
            } else if policy.cut_last_message {
                Some(0..content.len())
            } else {
                document.map(|length| 0..length)
            };
            pieces.push(cuttable.map(|bytes| Piece::new(tokenizer, content, bytes)).transpose()?);
        }
        let document = document.map(|_| last);
        Ok(Self { tokenizer, chat, policy, messages, texts, pieces, turns, document })
    }

    fn count(&self, messages: &[Message]) -> Result<usize> {
        self.tokenizer.encode_chat_with(messages, self.chat).map(|ids| ids.len())
    }

    fn fit(&self, limit: usize) -> Result<(Vec<Message>, Vec<Dropped>)> {
        let mut least = 0;
        if self.policy.drop == DropFrom::OldestTurns {
            // The fewest turns that suffice, if all of them do.
            let (mut few, mut many) = (0, self.turns.len());
            let mut found = None;
            while few <= many {
                let middle = if found.is_none() { many } else { few.midpoint(many) };
                let cuts = self.without_turns(middle);
                let messages = self.apply(&cuts);
                least = self.count(&messages)?;
                if least <= limit {
                    found = Some((messages, self.dropped(&cuts)));
                    let Some(fewer) = middle.checked_sub(1) else { break };
                    many = fewer;
                } else if found.is_none() {
                    break;
                } else {
                    few = middle + 1;
                }
            }
            if let Some(found) = found {
                return Ok(found);
            }
        }
        // By tokens: of all that may be cut, or, where whole turns are gone already, of the last message.
        let gone = if self.policy.drop == DropFrom::OldestTurns { self.turns.len() } else { 0 };
        let before = self.without_turns(gone);
        let total = self.lengths(&before).sum();
        let found = search(total, limit, |drop| {
            let cuts = self.cuts(&before, region(self.policy.drop, total, drop));
            let messages = self.apply(&cuts);
            least = self.count(&messages)?;
            Ok((least, (messages, self.dropped(&cuts))))
        })?;
        found.ok_or_else(|| {
            let policy = ContextPolicy::Truncate(self.policy.clone());
            cannot_fit(&policy, "the system message and the last user message", least, limit)
        })
    }

    /// The cuts that drop the first `count` turns.
    fn without_turns(&self, count: usize) -> Vec<Option<Range<usize>>> {
        let mut cuts = vec![None; self.messages.len()];
        for &i in self.turns[..count].iter().flatten() {
            cuts[i] = Some(0..self.texts[i].len());
        }
        cuts
    }

    /// For each message how many tokens can still be cut.
    fn lengths(&self, cuts: &[Option<Range<usize>>]) -> impl Iterator<Item = usize> {
        self.pieces.iter().zip(cuts).map(|(piece, cut)| match (piece, cut) {
            (Some(piece), None) => piece.len(),
            _ => 0,
        })
    }

    /// The cuts that drop `tokens` of all that can be cut, besides what `before` drops.
    fn cuts(&self, before: &[Option<Range<usize>>], tokens: Range<usize>) -> Vec<Option<Range<usize>>> {
        let mut cuts = before.to_vec();
        let mut at = 0;
        for (i, length) in self.lengths(before).enumerate() {
            let own = tokens.start.clamp(at, at + length) - at..tokens.end.clamp(at, at + length) - at;
            at += length;
            if let Some(piece) = self.pieces[i].as_ref().filter(|_| !own.is_empty()) {
                cuts[i] = Some(piece.cut(&self.texts[i], own));
            }
        }
        cuts
    }

    /// The messages without what is cut. A turn that has nothing left is dropped as a whole, so that roles still alternate.
    fn apply(&self, cuts: &[Option<Range<usize>>]) -> Vec<Message> {
        let is_gone = |i: &usize| match (&self.pieces[*i], &cuts[*i]) {
            (Some(piece), Some(cut)) => piece.is_all(cut),
            _ => self.texts[*i].is_empty(),
        };
        let gone: Vec<usize> =
            self.turns.iter().filter(|turn| turn.iter().all(is_gone)).flatten().copied().collect();
        let kept = self.messages.iter().zip(cuts).enumerate().filter(|(i, _)| !gone.contains(i));
        kept.map(|(i, (message, cut))| {
            let mut message = message.clone();
            if let Some(cut) = cut {
                let text = &self.texts[i];
                message.content = Content::Text([&text[..cut.start], &text[cut.end..]].concat());
            }
            message
        })
        .collect()
    }

    fn dropped(&self, cuts: &[Option<Range<usize>>]) -> Vec<Dropped> {
        let of = |(i, cut): (usize, &Option<Range<usize>>)| {
            let (cut, piece) = (cut.as_ref()?, self.pieces[i].as_ref()?);
            let message = (self.document != Some(i)).then_some(i);
            Some(Dropped { message, start: cut.start, end: cut.end, tokens: piece.tokens_in(cut) })
        };
        cuts.iter().enumerate().filter_map(of).collect()
    }
}
