//! Prompts in which not all text is trusted: conversations and segments.

use std::{borrow::Cow, collections::HashMap};

use serde_json::{Map, Value};
use tokenizers::{OffsetReferential, OffsetType};

use super::{
    Tokenizer,
    control::{choose_sentinel, mark},
    tokenizer::guarded,
};
use crate::{
    ChatOptions, Content, ContentPart, Error, Message, Prompt, Result, Segment, ToolCall, answer::described,
};

/// What a chat template is run with.
#[derive(Clone)]
pub(super) struct ChatInput<'a> {
    pub(super) messages: Cow<'a, [Message]>,
    /// For each message the arguments of its tool calls, parsed.
    pub(super) arguments: Vec<Vec<Value>>,
    pub(super) tools: Vec<Cow<'a, Map<String, Value>>>,
    pub(super) args: Cow<'a, Map<String, Value>>,
    pub(super) add_generation_prompt: bool,
}

/// What a text of the input is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum TextKind {
    /// A word that templates compare with others: a role, a name, a key, a type.
    Word,
    /// Free text.
    Free,
}

impl<'a> ChatInput<'a> {
    pub(super) fn new(messages: &'a [Message], options: &'a ChatOptions) -> Self {
        let parsed = |message: &Message| message.tool_calls.iter().map(ToolCall::parsed_arguments).collect();
        Self {
            messages: messages.into(),
            arguments: messages.iter().map(parsed).collect(),
            tools: options.offered_tools().iter().map(|tool| Cow::Borrowed(tool.as_json())).collect(),
            args: Cow::Borrowed(&options.template_args),
            add_generation_prompt: options.add_generation_prompt,
        }
    }

    /// All texts, in any order.
    pub(super) fn texts(&self) -> Vec<&str> {
        let mut texts = Vec::new();
        for message in self.messages.iter() {
            texts.push(message.role.as_str());
            texts.extend(message.content.pieces());
            texts.extend(message.name.as_deref());
            texts.extend(message.tool_call_id.as_deref());
            texts.extend(message.reasoning.as_deref());
            for call in &message.tool_calls {
                texts.push(call.name.as_str());
                texts.extend(call.id.as_deref());
            }
        }
        self.arguments.iter().flatten().for_each(|json| texts_of_json(json, &mut texts));
        for json in self.tools.iter().chain([&self.args]) {
            texts_of_object(json, &mut texts);
        }
        texts
    }

    /// The same input with all texts changed.
    fn map(&self, mut change: impl FnMut(TextKind, &str) -> String) -> ChatInput<'static> {
        use TextKind::{Free, Word};
        let messages = self.messages.iter().map(|message| {
            let mut word = |text: &Option<String>| text.as_ref().map(|text| change(Word, text));
            let (name, tool_call_id) = (word(&message.name), word(&message.tool_call_id));
            let mut mapped = Message::new(
                change(Word, &message.role),
                message.content.map(&mut |text| change(Free, text)),
            );
            (mapped.name, mapped.tool_call_id) = (name, tool_call_id);
            mapped.reasoning = message.reasoning.as_ref().map(|text| change(Free, text));
            mapped.tool_calls.clone_from(&message.tool_calls);
            for call in &mut mapped.tool_calls {
                call.id = call.id.as_ref().map(|id| change(Word, id));
                call.name = change(Word, &call.name);
            }
            mapped
        });
        let messages = messages.collect::<Vec<_>>();
        let mapped =
            |calls: &Vec<Value>| calls.iter().map(|json| map_json(json, Free, &mut change)).collect();
        ChatInput {
            messages: messages.into(),
            arguments: self.arguments.iter().map(mapped).collect(),
            tools: self.tools.iter().map(|tool| Cow::Owned(map_object(tool, Word, &mut change))).collect(),
            args: Cow::Owned(map_object(&self.args, Word, &mut change)),
            add_generation_prompt: self.add_generation_prompt,
        }
    }

    /// The same conversation with the least text that a template needs: no text that could be, or become, a control
    /// token.
    fn neutral(&self) -> ChatInput<'static> {
        let is_harmless = |c: char| c.is_ascii_alphanumeric() || " _-.".contains(c);
        self.map(|kind, text| match kind {
            TextKind::Word => text.chars().map(|c| if is_harmless(c) { c } else { 'x' }).collect(),
            TextKind::Free if text.trim().is_empty() => text.to_owned(),
            TextKind::Free => "x".to_owned(),
        })
    }
}

fn texts_of_object<'a>(object: &'a Map<String, Value>, texts: &mut Vec<&'a str>) {
    for (key, value) in object {
        texts.push(key);
        texts_of_json(value, texts);
    }
}

fn texts_of_json<'a>(json: &'a Value, texts: &mut Vec<&'a str>) {
    match json {
        Value::String(text) => texts.push(text),
        Value::Array(items) => items.iter().for_each(|item| texts_of_json(item, texts)),
        Value::Object(object) => texts_of_object(object, texts),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

fn map_object(
    object: &Map<String, Value>,
    kind: TextKind,
    change: &mut impl FnMut(TextKind, &str) -> String,
) -> Map<String, Value> {
    let mut mapped = Map::new();
    for (key, value) in object {
        let key = change(TextKind::Word, key);
        mapped.insert(key, map_json(value, kind, change));
    }
    mapped
}

fn map_json(json: &Value, kind: TextKind, change: &mut impl FnMut(TextKind, &str) -> String) -> Value {
    match json {
        Value::String(text) => change(kind, text).into(),
        Value::Array(items) => items.iter().map(|item| map_json(item, kind, change)).collect(),
        Value::Object(object) => map_object(object, kind, change).into(),
        Value::Null | Value::Bool(_) | Value::Number(_) => json.clone(),
    }
}

/// A rendered chat.
struct Rendered {
    text: String,
    /// Stands in each text of the input that looked as if it had control tokens.
    sentinel: Option<char>,
}

impl Tokenizer {
    /// The ids of a prompt, with all that the chat template and the tokenizer add.
    ///
    /// # Errors
    /// As [`encode`](Self::encode) and [`encode_chat_with`](Self::encode_chat_with).
    pub fn encode_prompt(&self, prompt: &Prompt, options: &ChatOptions) -> Result<Vec<u32>> {
        match prompt {
            Prompt::Text(text) => self.encode(text, true),
            Prompt::Segments(segments) => self.encode_segments(segments, true),
            Prompt::Tokens(tokens) => Ok(tokens.clone()),
            Prompt::Chat(messages) => self.encode_chat_with(messages, options),
        }
    }

    /// The ids of segments as one text. Special tokens in trusted segments are control tokens; those that an untrusted
    /// segment has, or completes, are text. With `add_special` the tokenizer adds what it adds.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_segments(&self, segments: &[Segment], add_special: bool) -> Result<Vec<u32>> {
        let breaks: Vec<_> = segments
            .iter()
            .map(|segment| if segment.trusted { Vec::new() } else { self.control.breaks(&segment.text) })
            .collect();
        if breaks.iter().all(Vec::is_empty) && (!self.always_mark || segments.iter().all(|s| s.trusted)) {
            let text: String = segments.iter().map(|segment| segment.text.as_str()).collect();
            return self.encode(&text, add_special);
        }
        let sentinel = choose_sentinel(segments.iter().map(|segment| segment.text.as_str()));
        let marked: String = segments
            .iter()
            .zip(&breaks)
            .map(|(segment, breaks)| mark(&segment.text, breaks, sentinel))
            .collect();
        let ids = guarded(|| self.encode_marked(&marked, sentinel), Error::invalid_request)?;
        let (before, after) = self.added_around();
        Ok(if add_special { [before, &ids, after].concat() } else { ids })
    }

    /// The prompt for a conversation, as `apply_chat_template(messages, tokenize=False)` gives it. The template sees
    /// special tokens in messages as text that is none of its special tokens.
    ///
    /// # Errors
    /// As [`render_chat_with`](Self::render_chat_with).
    pub fn render_chat(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        self.render_chat_with(messages, &ChatOptions::default().with_generation_prompt(add_generation_prompt))
    }

    /// [`render_chat`](Self::render_chat) with tools and further variables for the template.
    ///
    /// # Errors
    /// [`Unsupported`](crate::ErrorKind::Unsupported) without a template or with one that uses what is not
    /// implemented, [`InvalidRequest`](crate::ErrorKind::InvalidRequest) where the template refuses the messages,
    /// [`InvalidModel`](crate::ErrorKind::InvalidModel) where it fails.
    pub fn render_chat_with(&self, messages: &[Message], options: &ChatOptions) -> Result<String> {
        let messages = self.described(messages, options);
        let input = ChatInput::new(&messages, options);
        let rendered = self.render(&input, options.continue_final_message)?;
        Ok(match rendered.sentinel {
            Some(sentinel) => rendered.text.replace(sentinel, ""),
            None => rendered.text,
        })
    }

    /// The ids of [`render_chat`](Self::render_chat), with a BOS in front if the tokenizer adds one to texts and the
    /// template has not written it. Special tokens of the template are control tokens; whatever is written in role
    /// and content of a message is plain text, so that nobody can end their turn or speak as somebody else.
    ///
    /// # Errors
    /// As [`encode_chat_with`](Self::encode_chat_with).
    pub fn encode_chat(&self, messages: &[Message], add_generation_prompt: bool) -> Result<Vec<u32>> {
        self.encode_chat_with(messages, &ChatOptions::default().with_generation_prompt(add_generation_prompt))
    }

    /// [`encode_chat`](Self::encode_chat) with tools and further variables for the template, whose texts are plain text
    /// as well.
    ///
    /// # Errors
    /// As [`render_chat_with`](Self::render_chat_with) and [`encode`](Self::encode). Also
    /// [`InvalidRequest`](crate::ErrorKind::InvalidRequest) where the template makes a control token of the text of a
    /// message, for example by replacing a part of it.
    pub fn encode_chat_with(&self, messages: &[Message], options: &ChatOptions) -> Result<Vec<u32>> {
        let messages = self.described(messages, options);
        let input = ChatInput::new(&messages, options);
        let Rendered { text, sentinel } = self.render(&input, options.continue_final_message)?;
        let mut ids = match sentinel {
            Some(sentinel) => guarded(|| self.encode_marked(&text, sentinel), Error::invalid_request)?,
            None => self.encode(&text, false)?,
        };
        self.check_genuine(&input, &ids)?;
        let (before, _) = self.added_around();
        if !ids.starts_with(before) {
            ids.splice(0..0, before.iter().copied());
        }
        Ok(ids)
    }

    /// How many tokens a conversation is as a prompt: the length of [`encode_chat`](Self::encode_chat) with the
    /// header of the assistant's turn.
    ///
    /// # Errors
    /// As [`encode_chat`](Self::encode_chat).
    pub fn count_chat(&self, messages: &[Message]) -> Result<usize> {
        self.encode_chat(messages, true).map(|ids| ids.len())
    }

    /// The conversation with its tools and calls as text, where the template does not print them.
    fn described<'a>(&self, messages: &'a [Message], options: &ChatOptions) -> Cow<'a, [Message]> {
        let describes = self.answer_format().is_some_and(|format| format.describes_tools);
        if !describes || options.tools.is_empty() {
            return messages.into();
        }
        described(messages, options.offered_tools()).into()
    }

    /// Renders with marks in each text that looks as if it had control tokens.
    fn render(&self, input: &ChatInput<'_>, continue_final_message: bool) -> Result<Rendered> {
        let template = self.template.as_ref().ok_or_else(|| {
            Error::unsupported("the model has no chat template").with_operation("render chat")
        })?;
        let texts = input.texts();
        let is_marked = self.always_mark || texts.iter().any(|text| !self.control.breaks(text).is_empty());
        if !is_marked && !continue_final_message {
            return Ok(Rendered { text: template.render(input)?, sentinel: None });
        }
        let sentinel = choose_sentinel(texts.into_iter().chain(template.texts()));
        let mut marked = input.map(|_, text| mark(text, &self.control.breaks(text), sentinel));
        if !continue_final_message {
            return Ok(Rendered { text: template.render(&marked)?, sentinel: Some(sentinel) });
        }
        marked.add_generation_prompt = false;
        // Two sentinels and a space: the space shows whether the template trims the message.
        let end = String::from_iter([sentinel, sentinel]);
        append(marked.messages.to_mut(), &format!("{end} "));
        let mut text = template.render(&marked)?;
        let Some(at) = text.rfind(&end) else {
            return Err(Error::invalid_request(
                "chat.continue_final_message: the chat template does not print the last message as it is",
            )
            .with_operation("render chat"));
        };
        let is_trimmed = !text[at + end.len()..].starts_with(' ');
        text.truncate(at);
        if is_trimmed {
            text.truncate(text.trim_end().len());
        }
        Ok(Rendered { text, sentinel: Some(sentinel) })
    }

    /// Checks that `ids` have no more control tokens than the template writes without any text of messages.
    ///
    /// Marks tell what the template passes on from what it writes. They do not tell what it makes of text: a template that
    /// replaces or cuts parts of a message could be led to write a control token.
    fn check_genuine(&self, input: &ChatInput<'_>, ids: &[u32]) -> Result<()> {
        let Some(template) = &self.template else { return Ok(()) };
        if !self.has_control(ids) {
            return Ok(());
        }
        let neutral = template.render(&input.neutral()).map_err(|e| {
            Error::invalid_request(
                "messages: the chat template makes its control tokens depend on their text",
            )
            .with_source(e)
        })?;
        let mut written: HashMap<u32, usize> = HashMap::new();
        let splits =
            self.inner.get_added_vocabulary().extract_and_normalize(self.inner.get_normalizer(), &neutral);
        for (_, _, tokens) in splits.get_splits(OffsetReferential::Original, OffsetType::Byte) {
            for token in tokens.iter().flatten() {
                *written.entry(token.id).or_default() += 1;
            }
        }
        for &id in ids.iter().filter(|&&id| self.is_control(id)) {
            match written.get_mut(&id) {
                Some(count) if *count > 0 => *count -= 1,
                _ => {
                    return Err(Error::invalid_request(format!(
                        "messages: the chat template makes the control token `{}` of their text",
                        self.token(id).unwrap_or_default()
                    ))
                    .with_operation("encode"));
                }
            }
        }
        Ok(())
    }

    /// The ids of a rendered chat in which special tokens with a sentinel in them are text.
    fn encode_marked(&self, marked: &str, sentinel: char) -> Result<Vec<u32>> {
        let added = self.inner.get_added_vocabulary();
        let splits = added.extract_and_normalize(self.inner.get_normalizer(), marked);
        let mut genuine = Vec::new();
        let mut done = 0;
        for (_, (start, end), tokens) in splits.get_splits(OffsetReferential::Original, OffsetType::Byte) {
            let Some([token]) = tokens.as_deref() else { continue };
            if start >= done && self.is_genuine(marked, start, end, token.id, sentinel) {
                genuine.push((start, end, token.id));
                done = end;
            }
        }
        if self.always_mark
            && let Some(ids) = self.encode_normalized(marked, &genuine, sentinel)?
        {
            return Ok(ids);
        }
        let mut ids = Vec::new();
        let mut done = 0;
        for (start, end, id) in genuine {
            ids.extend(self.encode_text(&marked[done..start], done == 0, sentinel)?);
            ids.push(id);
            done = end;
        }
        ids.extend(self.encode_text(&marked[done..], done == 0, sentinel)?);
        Ok(ids)
    }

    /// The ids where special tokens are found in text that is already normalized: the text around a token must not be
    /// normalized once more on its own, which for a `Prepend` would put its prefix behind each token. `None` where a
    /// token of the template cannot be told from text this way.
    fn encode_normalized(
        &self,
        marked: &str,
        genuine: &[(usize, usize, u32)],
        sentinel: char,
    ) -> Result<Option<Vec<u32>>> {
        let clean = marked.replace(sentinel, "");
        let before = |at: usize| at - marked[..at].matches(sentinel).count() * sentinel.len_utf8();
        let expected = genuine.iter().filter(|(.., id)| self.is_control(*id)).count();
        let mut genuine = genuine.iter().map(|&(start, end, id)| (before(start), before(end), id)).peekable();

        let added = self.inner.get_added_vocabulary();
        let splits = added.extract_and_normalize(self.inner.get_normalizer(), &clean);
        let mut ids = Vec::new();
        let mut run = String::new();
        let mut first = true;
        for (text, (start, end), tokens) in splits.get_splits(OffsetReferential::Original, OffsetType::Byte) {
            let id = match tokens.as_deref() {
                Some([token]) if !self.is_special(token.id) => token.id,
                Some([token]) if genuine.next_if_eq(&(start, end, token.id)).is_some() => token.id,
                _ => {
                    run.push_str(text);
                    continue;
                }
            };
            ids.extend(self.encode_parts(std::mem::take(&mut run).into(), first)?);
            ids.push(id);
            first = false;
        }
        ids.extend(self.encode_parts(run.into(), first)?);
        let control = ids.iter().filter(|&&id| self.is_control(id)).count();
        let all_found = genuine.peek().is_none();
        Ok((all_found && control == expected).then_some(ids))
    }

    /// Whether the special token that was found at `start..end` was written by the template.
    fn is_genuine(&self, marked: &str, start: usize, end: usize, id: u32, sentinel: char) -> bool {
        let added = self.inner.get_added_vocabulary().get_added_tokens_decoder();
        let (Some(token), Some(found)) = (added.get(&id), marked.get(start..end)) else { return false };
        let enclosed = token.content.chars().nth(1).is_none()
            && marked[..start].ends_with(sentinel)
            && marked[end..].starts_with(sentinel);
        // Some tokens take the white space around them; and normalizing may make a token of other text.
        token.special && !enclosed && found.trim() == token.content.trim()
    }

    /// The ids of the text between two control tokens.
    fn encode_text(&self, marked: &str, first: bool, sentinel: char) -> Result<Vec<u32>> {
        let clean: Cow<'_, str> =
            if marked.contains(sentinel) { marked.replace(sentinel, "").into() } else { marked.into() };
        let ids = self.encode_segment(&clean, first)?;
        if self.has_control(&ids) { self.encode_pieces(marked, first, sentinel) } else { Ok(ids) }
    }

    /// The ids of text for vocabularies whose model makes control tokens of plain text (Unigram does): the pieces
    /// between sentinels are encoded on their own, none of which is a whole control token.
    pub(super) fn encode_pieces(&self, marked: &str, first: bool, sentinel: char) -> Result<Vec<u32>> {
        let mut ids = Vec::new();
        for piece in marked.split(sentinel) {
            ids.extend(self.encode_segment(piece, first && ids.is_empty())?);
        }
        match ids.iter().find(|&&id| self.is_control(id)) {
            Some(&id) => Err(Error::invalid_request(format!(
                "the tokenizer makes the control token `{}` of plain text",
                self.token(id).unwrap_or_default()
            ))
            .with_operation("encode")),
            None => Ok(ids),
        }
    }
}

/// Adds text to the end of the last message.
fn append(messages: &mut [Message], text: &str) {
    let Some(last) = messages.last_mut() else { return };
    match &mut last.content {
        Content::Parts(parts) if !parts.is_empty() => {
            if let Some(ContentPart::Text { text: part }) = parts.last_mut() {
                part.push_str(text);
            }
        }
        content => *content = Content::Text(std::mem::take(content).into_text() + text),
    }
}
