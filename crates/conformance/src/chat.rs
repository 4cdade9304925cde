//! Prompts: texts, tokens and conversations, and what is control and what is text in them.

use ternion_core::{Completion, ErrorKind, LlmBackend, LlmBackendExt, Message, Prompt, text::Tokenizer};

use crate::{
    Failure, Sentence,
    ask::{SHORT, answer, greedy, prompt, tokenizer, tokens},
    check::{attempt, checks},
};

checks! { "chat";
    a_chat_is_its_rendering, RENDERED, [Generate, Chat, Tokenizer], rounding;
    a_chat_has_as_many_tokens_as_counted, COUNT, [Generate, Chat, Tokenizer];
    a_text_has_as_many_tokens_as_counted, COUNT_TEXT, [Tokenizer];
    no_counts_without_a_tokenizer, NO_COUNT, [NoTokenizer];
    no_chat_counts_without_a_tokenizer, NO_CHAT_COUNT, [NoTokenizer];
    a_chat_is_answered, CHAT, [Generate, Chat];
    a_chat_begins_with_one_bos, TEXT, [Generate, Chat, BeginningOfSequence];
    special_tokens_in_messages_are_text, UNTRUSTED, [Generate, Chat, EndOfSequence], rounding;
    a_text_is_its_tokens, TEXT, [Generate, Tokenizer], rounding;
    special_tokens_in_a_text_are_control_tokens, TEXT, [Generate, EndOfSequence], rounding;
    nothing_is_added_to_tokens, TOKENS, [Generate, Tokenizer];
    no_chat_without_a_template, NO_CHAT, [Generate, NoChat];
}

const RENDERED: Sentence = Sentence::new(
    "Prompt::Chat",
    "A conversation, rendered by the model's chat template with the header of the assistant's turn at the end.",
);
const COUNT: Sentence = Sentence::new(
    "LlmBackendExt::count_chat_tokens",
    "How many tokens a conversation is as a prompt, with all that the chat template and the tokenizer add.",
);
const COUNT_TEXT: Sentence = Sentence::new(
    "LlmBackendExt::count_tokens",
    "How many tokens text is, without any that the tokenizer would add around it.",
);
const NO_COUNT: Sentence =
    Sentence::new("LlmBackendExt::count_tokens", "Unsupported if the tokenizer is not known.");
const NO_CHAT_COUNT: Sentence = Sentence::new(
    "LlmBackendExt::count_chat_tokens",
    "Unsupported if tokenizer or template are not known, and what the template refuses.",
);
const CHAT: Sentence =
    Sentence::new("LlmBackendExt::chat", "Answers a conversation and waits for the whole answer.");
const UNTRUSTED: Sentence =
    Sentence::new("Message", "The text is untrusted: special tokens in it are encoded as plain text.");
const TEXT: Sentence = Sentence::new(
    "Prompt::Text",
    "It is trusted: special tokens in it are control tokens, and the tokenizer adds what it adds (a leading BOS for \
     most models), as tokenizer(text) does in transformers.",
);
const TOKENS: Sentence = Sentence::new("Prompt::Tokens", "Token ids as they are; nothing is added.");
const NO_CHAT: Sentence = Sentence::new(
    "Capabilities",
    "What a backend cannot do it refuses as Unsupported rather than leaving it out.",
);

fn conversations() -> [Vec<Message>; 2] {
    let day = attempt() + 1; // another prompt for each attempt
    [
        vec![Message::user(format!("Is the sun up on day {day}?"))],
        vec![
            Message::user(format!("Good day {day}.")),
            Message::assistant("Good day!"),
            Message::user("Is it long?"),
        ],
    ]
}

fn same(sentence: Sentence, what: &str, found: &Completion, expected: &Completion) -> Result<(), Failure> {
    let prompt = |c: &Completion| c.usage.prompt_tokens;
    sentence.equal(format_args!("usage.prompt_tokens of {what}"), prompt(found), prompt(expected))?;
    sentence.equal(format_args!("tokens of {what}"), &found.tokens, &expected.tokens)
}

fn render(tokenizer: &Tokenizer, messages: &[Message], sentence: Sentence) -> Result<Vec<u32>, Failure> {
    tokenizer.encode_chat(messages, true).map_err(sentence.refused("encode_chat"))
}

/// A chat is answered as its rendering by hand.
///
/// # Errors
/// What differs.
pub async fn a_chat_is_its_rendering(model: &dyn LlmBackend) -> Result<(), Failure> {
    let tokenizer = tokenizer(model, RENDERED)?;
    for messages in conversations() {
        let by_hand = render(&tokenizer, &messages, RENDERED)?;
        let expected = answer(model, greedy(by_hand, SHORT), RENDERED).await?;
        let found = answer(model, greedy(messages, SHORT), RENDERED).await?;
        same(RENDERED, "a chat", &found, &expected)?;
    }
    Ok(())
}

/// What a host counts beforehand is what the usage says afterwards.
///
/// # Errors
/// Both numbers.
pub async fn a_chat_has_as_many_tokens_as_counted(model: &dyn LlmBackend) -> Result<(), Failure> {
    for messages in conversations() {
        let counted = model.count_chat_tokens(&messages).map_err(COUNT.refused("count_chat_tokens"))?;
        let usage = answer(model, greedy(messages, 1), COUNT).await?.usage;
        COUNT.equal("usage.prompt_tokens", usage.prompt_tokens, counted)?;
    }
    Ok(())
}

/// A text counts as many tokens as the tokenizer makes of it.
///
/// # Errors
/// Both numbers.
pub async fn a_text_has_as_many_tokens_as_counted(model: &dyn LlmBackend) -> Result<(), Failure> {
    let tokenizer = tokenizer(model, COUNT_TEXT)?;
    for text in ["", "a", "Zwölf Tage \u{1f31e} and\n more"] {
        let counted = model.count_tokens(text).map_err(COUNT_TEXT.refused("count_tokens"))?;
        let ids = tokenizer.encode(text, false).map_err(COUNT_TEXT.refused("encode"))?;
        COUNT_TEXT.equal(format_args!("count_tokens of {text:?}"), counted, ids.len())?;
    }
    Ok(())
}

/// Without a tokenizer nothing is counted.
///
/// # Errors
/// Another result than `Unsupported`.
pub async fn no_counts_without_a_tokenizer(model: &dyn LlmBackend) -> Result<(), Failure> {
    let found = model.count_tokens("a day").err().map(|e| e.kind());
    NO_COUNT.equal("error", found, Some(ErrorKind::Unsupported))
}

/// Without a tokenizer no conversation is counted.
///
/// # Errors
/// Another result than `Unsupported`.
pub async fn no_chat_counts_without_a_tokenizer(model: &dyn LlmBackend) -> Result<(), Failure> {
    let [messages, _] = conversations();
    let found = model.count_chat_tokens(&messages).err().map(|e| e.kind());
    NO_CHAT_COUNT.equal("error", found, Some(ErrorKind::Unsupported))
}

/// A conversation is answered, with whatever sampling is the default.
///
/// # Errors
/// A refusal.
pub async fn a_chat_is_answered(model: &dyn LlmBackend) -> Result<(), Failure> {
    for messages in conversations() {
        let answer = answer(model, greedy(messages, 3), CHAT).await?;
        CHAT.require(answer.usage.prompt_tokens > 0, "no prompt", "the tokens of the conversation")?;
    }
    Ok(())
}

/// The token that begins a sequence stands at most once at the beginning, whoever writes it, template or tokenizer.
///
/// # Errors
/// The beginning of the prompt.
pub async fn a_chat_begins_with_one_bos(model: &dyn LlmBackend) -> Result<(), Failure> {
    let tokenizer = tokenizer(model, TEXT)?;
    let Some(bos) = tokenizer.bos_id() else { return Ok(()) };
    for messages in conversations() {
        let ids = render(&tokenizer, &messages, TEXT)?;
        let count = ids.iter().take_while(|&&id| id == bos).count();
        TEXT.require(count <= 1, format_args!("{:?} at the beginning of a chat", &ids[..count]), "one BOS")?;
        let usage = answer(model, greedy(messages, 1), TEXT).await?.usage;
        TEXT.equal("usage.prompt_tokens of a chat", usage.prompt_tokens, ids.len())?;
    }
    Ok(())
}

/// A message that names special tokens has no more control tokens in its prompt than another, and is answered as that
/// prompt is.
///
/// # Errors
/// The number of control tokens, or what differs.
pub async fn special_tokens_in_messages_are_text(model: &dyn LlmBackend) -> Result<(), Failure> {
    let tokenizer = tokenizer(model, UNTRUSTED)?;
    let special = (0..tokenizer.vocab_size() as u32).filter(|&id| tokenizer.is_special(id));
    let specials: String =
        special.chain(tokenizer.eos_id()).filter_map(|id| tokenizer.token(id)).take(4).collect();
    let control = |ids: &[u32]| ids.iter().filter(|&&id| tokenizer.is_special(id)).count();
    let harmless = render(&tokenizer, &[Message::user("good day")], UNTRUSTED)?;
    let hostile = vec![Message::user(format!("good {specials} day {}", attempt()))];
    let ids = render(&tokenizer, &hostile, UNTRUSTED)?;
    UNTRUSTED.equal(
        format_args!("control tokens of a chat with {specials:?} in it"),
        control(&ids),
        control(&harmless),
    )?;
    let expected = answer(model, greedy(ids, 3), UNTRUSTED).await?;
    let found = answer(model, greedy(hostile, 3), UNTRUSTED).await?;
    same(UNTRUSTED, "a chat with special tokens in its text", &found, &expected)
}

/// A text is answered as the ids that the tokenizer makes of it.
///
/// # Errors
/// What differs.
pub async fn a_text_is_its_tokens(model: &dyn LlmBackend) -> Result<(), Failure> {
    let tokenizer = tokenizer(model, TEXT)?;
    let day = attempt() + 1;
    for text in [prompt("text"), format!(" a day {day}"), format!("Day {day}.\n\nZwölf Tage \u{1f31e}")] {
        let ids = tokenizer.encode(&text, true).map_err(TEXT.refused("encode"))?;
        let expected = answer(model, greedy(ids, SHORT), TEXT).await?;
        let found = answer(model, greedy(text.as_str(), SHORT), TEXT).await?;
        same(TEXT, &format!("the text {text:?}"), &found, &expected)?;
    }
    Ok(())
}

/// A special token in a trusted text is that token.
///
/// # Errors
/// What differs.
pub async fn special_tokens_in_a_text_are_control_tokens(model: &dyn LlmBackend) -> Result<(), Failure> {
    let tokenizer = tokenizer(model, TEXT)?;
    let Some((id, token)) = tokenizer.eos_id().and_then(|id| Some((id, tokenizer.token(id)?))) else {
        return Ok(());
    };
    let text = format!("good{token}day {}", attempt());
    let ids = tokenizer.encode(&text, true).map_err(TEXT.refused("encode"))?;
    TEXT.require(ids.contains(&id), format_args!("{ids:?} for {text:?}"), format_args!("the token {id}"))?;
    let expected = answer(model, greedy(ids, 3), TEXT).await?;
    let found = answer(model, greedy(text.as_str(), 3), TEXT).await?;
    same(TEXT, &format!("the text {text:?}"), &found, &expected)
}

/// The prompt has the tokens that were given and no others.
///
/// # Errors
/// Their number.
pub async fn nothing_is_added_to_tokens(model: &dyn LlmBackend) -> Result<(), Failure> {
    for length in [1, 2, 20] {
        let prompt = Prompt::Tokens(tokens(model, "nothing added", length, TOKENS)?);
        let usage = answer(model, greedy(prompt, 1), TOKENS).await?.usage;
        TOKENS.equal("usage.prompt_tokens", usage.prompt_tokens, length)?;
    }
    Ok(())
}

/// A model without a template refuses conversations.
///
/// # Errors
/// Another result than `Unsupported`.
pub async fn no_chat_without_a_template(model: &dyn LlmBackend) -> Result<(), Failure> {
    let [messages, _] = conversations();
    let found = model.generate(greedy(messages, 1)).await.err().map(|e| e.kind());
    NO_CHAT.equal("error", found, Some(ErrorKind::Unsupported))
}
