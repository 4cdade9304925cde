//! The plan for a text that is worked through in chunks: the task, the text, where it is cut, and what each step may take.

use super::{
    Chunked, ContextPolicy, ContextReport, Dropped,
    budget::answer_room,
    fit::Asked,
    parts::{segments, text_of},
    prompts::{self, Values},
};
use crate::{
    ChatOptions, Error, ErrorKind, Message, Prompt, Result,
    text::{Chunk, ChunkOptions, Tokenizer, chunks},
};

/// Stands for the number of a part until that is known.
const MANY: usize = 9_999;
/// How often chunks are made smaller, where templates and texts merge to more tokens than they have apart.
const ATTEMPTS: usize = 8;

/// Which of the two ways.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    MapReduce,
    Refine,
}

/// What to do with the long text.
#[derive(Debug)]
struct Task {
    text: String,
    /// The host wrote it.
    trusted: bool,
}

/// What is to be done with a long text.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) way: Way,
    options: Chunked,
    /// The prompts are conversations, with these messages before.
    system: Option<Vec<Message>>,
    task: Task,
    text: String,
    chat: ChatOptions,
    pub(super) chunks: Vec<Chunk>,
    /// The most tokens of each answer but the last.
    pub(super) answer_tokens: usize,
    /// The most tokens of any prompt.
    pub(super) limit: usize,
    pub(super) report: ContextReport,
}

impl Plan {
    /// Plans the work for a prompt of `prompt_tokens`.
    ///
    /// # Errors
    /// [`ContextOverflow`](ErrorKind::ContextOverflow) where nothing is left for chunks,
    /// [`InvalidRequest`](ErrorKind::InvalidRequest) where it is not known what to do with the text.
    pub(super) fn make(tokenizer: &Tokenizer, asked: &Asked, prompt_tokens: usize) -> Result<Self> {
        let Asked { prompt, chat, document, policy, max_tokens, context } = asked;
        let (way, options) = match policy {
            ContextPolicy::Refine(options) => (Way::Refine, options.clone()),
            ContextPolicy::MapReduce(options) => (Way::MapReduce, options.clone()),
            other => return Err(Error::unsupported(format!("`{}` does not work in steps", other.name()))),
        };
        if chat.continue_final_message {
            return Err(Error::invalid_request(format!(
                "chat.continue_final_message: the policy `{}` makes new messages; another policy expected",
                policy.name()
            )));
        }
        let reserve = answer_room(options.reserve, *max_tokens, *context, 4)?;
        let answer_tokens = answer_room(options.answer_tokens, *max_tokens, *context, 8)?;
        let limit = context - reserve.max(answer_tokens);
        let report = ContextReport::new(policy.name(), prompt_tokens, limit);
        let apart = take_apart(tokenizer, prompt, *document, options.task.as_deref())?;
        let PromptParts { system, task, text, dropped } = apart;
        let chat = chat.clone();
        let mut plan =
            Self { way, options, system, task, text, chat, chunks: Vec::new(), answer_tokens, limit, report };
        plan.report.dropped = dropped;
        plan.cut(tokenizer)?;
        plan.report.chunks.clone_from(&plan.chunks);
        Ok(plan)
    }

    /// How many tokens a prompt of the plan is.
    fn count(&self, tokenizer: &Tokenizer, prompt: &Prompt) -> Result<usize> {
        tokenizer.encode_prompt(prompt, &self.chat).map(|ids| ids.len())
    }

    /// Cuts the text so that every prompt with a chunk is within the limit.
    fn cut(&mut self, tokenizer: &Tokenizer) -> Result<()> {
        let empty = Values { part: MANY, parts: MANY, ..Values::default() };
        let mut overhead = self.count(tokenizer, &self.first(&empty))?;
        if self.way == Way::Refine {
            overhead = overhead.max(self.count(tokenizer, &self.next(&empty))? + self.answer_tokens);
        } else {
            // Two answers must fit into a prompt that makes one of them.
            let combined = self.count(tokenizer, &self.next(&empty))? + 2 * self.answer_tokens + 2;
            if combined > self.limit {
                return Err(self.no_room(&format!("two answers of {} tokens", self.answer_tokens), combined));
            }
        }
        let mut most =
            self.options.chunk_tokens.unwrap_or(usize::MAX).min(self.limit.saturating_sub(overhead));
        for _ in 0..ATTEMPTS {
            if most == 0 {
                break;
            }
            let overlap = self.options.overlap.unwrap_or(most / 16);
            let options = ChunkOptions::new(most).with_overlap(overlap).with_kind(self.options.chunk_kind);
            self.chunks = chunks(tokenizer, &self.text, &options)?;
            let excess = self.excess(tokenizer)?;
            if excess == 0 {
                return Ok(());
            }
            most = most.saturating_sub(excess);
        }
        Err(self.no_room("a chunk with the template and the task", overhead + 1))
    }

    /// By how much the largest prompt with a chunk is over the limit.
    fn excess(&self, tokenizer: &Tokenizer) -> Result<usize> {
        let mut most = 0;
        for part in 0..self.chunks.len() {
            let tokens = match self.way {
                Way::Refine if part > 0 => {
                    self.count(tokenizer, &self.chunk_prompt(part, ""))? + self.answer_tokens
                }
                _ => self.count(tokenizer, &self.chunk_prompt(part, ""))?,
            };
            most = most.max(tokens);
        }
        Ok(most.saturating_sub(self.limit))
    }

    fn no_room(&self, what: &str, tokens: usize) -> Error {
        Error::new(
            ErrorKind::ContextOverflow,
            format!(
                "{what}: at least {tokens} tokens; {} fit into the context with room for an answer",
                self.limit
            ),
        )
        .with("policy", &self.report.policy)
    }

    /// The prompt for a chunk; `answer` is the one so far.
    pub(super) fn chunk_prompt(&self, part: usize, answer: &str) -> Prompt {
        let text = self.chunks.get(part).map_or("", |chunk| chunk.of(&self.text));
        let values = Values { text, answer, part: part + 1, parts: self.chunks.len(), ..Values::default() };
        if self.way == Way::Refine && part > 0 { self.next(&values) } else { self.first(&values) }
    }

    /// The prompts that make one answer each of the answers of a group, as many as fit into each. All are
    /// in one where that is possible.
    ///
    /// # Errors
    /// Those of the tokenizer and of the template, and where not even two answers fit.
    pub(super) fn combine(&self, tokenizer: &Tokenizer, answers: &[String]) -> Result<Vec<Prompt>> {
        let mut prompts = Vec::new();
        let mut rest = answers;
        while !rest.is_empty() {
            let prompt = |n: usize| {
                let text = rest[..n].join("\n\n");
                self.next(&Values { text: &text, part: 1, parts: 1, ..Values::default() })
            };
            // The most that fit; two always should.
            let (mut fits, mut too_many) = (0, rest.len() + 1);
            while fits + 1 < too_many {
                let middle =
                    if fits == 0 && too_many > rest.len() { rest.len() } else { fits.midpoint(too_many) };
                if self.count(tokenizer, &prompt(middle))? <= self.limit {
                    fits = middle;
                } else {
                    too_many = middle;
                }
            }
            if fits < 2.min(rest.len()) {
                return Err(self.no_room("two answers", self.count(tokenizer, &prompt(2.min(rest.len())))?));
            }
            prompts.push(prompt(fits));
            rest = &rest[fits..];
        }
        Ok(prompts)
    }

    /// An answer within the tokens that a step plans with, and whether it had to be cut: the text of a token that is no
    /// character may take several tokens.
    ///
    /// # Errors
    /// Those of the tokenizer.
    pub(super) fn within(&self, tokenizer: &Tokenizer, answer: String) -> Result<(String, bool)> {
        let piece = super::parts::Piece::new(tokenizer, &answer, 0..answer.len())?;
        if piece.len() <= self.answer_tokens {
            return Ok((answer, false));
        }
        let mut keep = self.answer_tokens;
        loop {
            let cut = piece.cut(&answer, keep..piece.len());
            let kept = &answer[..cut.start];
            if keep == 0 || tokenizer.encode_plain(kept)?.len() <= self.answer_tokens {
                return Ok((kept.to_owned(), true));
            }
            keep -= 1;
        }
    }

    fn first(&self, values: &Values<'_>) -> Prompt {
        let default = if self.way == Way::Refine { prompts::START } else { prompts::MAP };
        self.prompt(self.options.first_prompt.as_deref().unwrap_or(default), values)
    }

    fn next(&self, values: &Values<'_>) -> Prompt {
        let default = if self.way == Way::Refine { prompts::REFINE } else { prompts::COMBINE };
        self.prompt(self.options.next_prompt.as_deref().unwrap_or(default), values)
    }

    fn prompt(&self, template: &str, values: &Values<'_>) -> Prompt {
        let task = Values { task: &self.task.text, task_is_trusted: self.task.trusted, ..*values };
        let filled = prompts::fill(template, &task);
        match &self.system {
            Some(system) => {
                Prompt::Chat(system.iter().cloned().chain([Message::user(text_of(&filled))]).collect())
            }
            None => Prompt::Segments(filled),
        }
    }
}

/// What a prompt consists of.
struct PromptParts {
    system: Option<Vec<Message>>,
    /// What to do with the long text.
    task: Task,
    /// The long text.
    text: String,
    dropped: Vec<Dropped>,
}

/// # Errors
/// [`InvalidRequest`](ErrorKind::InvalidRequest) where there is no task or no text.
fn take_apart(
    tokenizer: &Tokenizer,
    prompt: &Prompt,
    document: Option<usize>,
    default_task: Option<&str>,
) -> Result<PromptParts> {
    let task_or_default = |task: &str, trusted: bool| match task.trim() {
        "" => Task { text: default_task.unwrap_or_default().to_owned(), trusted: true },
        task => Task { text: task.to_owned(), trusted },
    };
    let nothing_to_do = || {
        Error::invalid_request(
            "prompt: it is not said what to do with the long text; give that as the last message and the text as `document`, or a \
             system message",
        )
    };
    match prompt {
        Prompt::Text(_) | Prompt::Segments(_) => {
            let segments = segments(prompt.clone());
            let text = text_of(&segments);
            let (long, task) = text.split_at(document.unwrap_or(text.len()));
            // The document is the first segment.
            let trusted = segments.iter().skip(1).all(|segment| segment.trusted);
            let task = task_or_default(task, trusted);
            if task.text.is_empty() {
                return Err(nothing_to_do());
            }
            Ok(PromptParts { system: None, task, text: long.to_owned(), dropped: Vec::new() })
        }
        Prompt::Tokens(_) => Err(Error::unsupported(
            "prompt: tokens cannot be worked through in chunks; text or a chat expected",
        )),
        Prompt::Chat(messages) => {
            let is_system = |m: &Message| m.role == "system";
            let texts: Vec<_> = messages.iter().map(|m| m.content.text()).collect();
            let last = messages.iter().rposition(|m| m.role == "user");
            let longest = (0..messages.len()).filter(|&i| !is_system(&messages[i]));
            let Some(long) = document.and(last).or_else(|| longest.max_by_key(|&i| (texts[i].len(), i)))
            else {
                return Err(Error::invalid_request("prompt: only system messages; a user message expected"));
            };
            let (text, rest) = texts[long].split_at(document.unwrap_or(texts[long].len()));
            let task = match last {
                Some(last) if last != long => &texts[last],
                _ => rest,
            };
            let task = task_or_default(task, false);
            let system: Vec<Message> = messages.iter().filter(|m| is_system(m)).cloned().collect();
            if task.text.is_empty() && system.is_empty() {
                return Err(nothing_to_do());
            }
            let mut dropped = Vec::new();
            for (i, message) in messages.iter().enumerate() {
                if !is_system(message) && i != long && Some(i) != last && !texts[i].is_empty() {
                    let tokens = tokenizer.encode_plain(&texts[i])?.len();
                    dropped.push(Dropped { message: Some(i), start: 0, end: texts[i].len(), tokens });
                }
            }
            Ok(PromptParts { system: Some(system), task, text: text.to_owned(), dropped })
        }
    }
}
