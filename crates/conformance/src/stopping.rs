//! Stop strings and the other ways in which an answer ends.

use ternion_core::{FinishReason, LlmBackend, TokenEvent};

use crate::{
    Failure, Sentence,
    ask::{SHORT, answer, answer_in_pieces, events, greedy, prompt, tokenizer},
    check::{checks, end_token},
};

checks! { "stopping";
    a_stop_string_ends_the_answer, STOP, [Generate], rounding;
    stop_strings_lie_across_tokens, ACROSS, [Generate], rounding;
    the_first_complete_stop_string_counts, ACROSS, [Generate], rounding;
    of_one_end_the_longest_stop_string_counts, ACROSS, [Generate], rounding;
    a_beginning_of_a_stop_string_comes_out_at_the_end, HELD, [Generate], rounding;
    max_tokens_end_the_answer, MAX_TOKENS, [Generate];
    an_end_of_sequence_is_counted_but_not_shown, EOS, [Generate, EndOfSequence], rounding;
    ignore_eos_goes_on, IGNORE_EOS, [Generate, EndOfSequence], rounding, ranges;
    names_of_special_tokens_are_stop_strings, NAMES, [Generate, EndOfSequence], ranges;
    a_stop_token_ends_the_answer, STOP_TOKEN, [Generate, Tokenizer], rounding;
}

const STOP: Sentence = Sentence::new(
    "FinishReason::StopString",
    "This stop string appeared; it and what follows are no part of the answer.",
);
const ACROSS: Sentence = Sentence::new(
    "GenerateParams::stop",
    "The answer ends before the one of these that is complete first, of several that end at the same place before \
     the longest, however the text is cut into tokens.",
);
const HELD: Sentence = Sentence::new("Event::Done", "Text that was held back and is certain now.");
const MAX_TOKENS: Sentence = Sentence::new("FinishReason::MaxTokens", "max_tokens were generated.");
const EOS: Sentence = Sentence::new(
    "FinishReason::EndOfSequence",
    "The model chose an end-of-sequence token. It is counted in the usage but is no part of the answer.",
);
const IGNORE_EOS: Sentence = Sentence::new(
    "GenerateParams::ignore_eos",
    "Go on past the model's end-of-sequence tokens (for measurements).",
);

const NAMES: Sentence = Sentence::new(
    "GenerateParams::stop",
    "Special tokens have no text in the answer, but their names count here: <|im_end|> and \
     <|im_end|>\\n<|im_start|>user are stop strings like others.",
);
const STOP_TOKEN: Sentence = Sentence::new(
    "FinishReason::StopToken",
    "The model chose this token, one of the request's stop tokens. It is counted in the usage but is no part of the answer.",
);

/// The bias that makes a token the most probable one of any model.
const ALWAYS: f32 = 1e30;

/// What is left of `text` before the stop string that is complete first, and that stop string.
fn cut<'a>(text: &'a str, stops: &'a [String]) -> Option<(&'a str, &'a str)> {
    let ends = text.char_indices().map(|(at, c)| at + c.len_utf8());
    ends.into_iter().find_map(|end| {
        let complete = stops.iter().filter(|stop| text[..end].ends_with(stop.as_str()));
        complete.max_by_key(|stop| stop.len()).map(|stop| (&text[..end - stop.len()], stop.as_str()))
    })
}

/// Asks for the same answer once more with these stop strings, which are in it.
async fn ends_before(
    model: &dyn LlmBackend,
    request: &ternion_core::GenerateRequest,
    text: &str,
    stops: &[String],
    sentence: Sentence,
) -> Result<(), Failure> {
    let Some((rest, stop)) = cut(text, stops) else {
        return Err(sentence.broken(format_args!("{stops:?} not in {text:?}"), "a stop string of the answer"));
    };
    let answer = answer(model, request.clone().with_stop(stops.iter().cloned()), sentence).await?;
    let asked = format!("stop strings {stops:?} in {text:?}");
    let ended = FinishReason::StopString(stop.to_owned());
    sentence.equal(format_args!("finish_reason of {asked}"), answer.finish_reason, ended)?;
    sentence.equal(format_args!("text of {asked}"), answer.text.as_str(), rest)
}

fn first_char(text: &str) -> &str {
    text.char_indices().nth(1).map_or(text, |(at, _)| &text[..at])
}

fn last_char(text: &str) -> &str {
    text.char_indices().next_back().map_or(text, |(at, _)| &text[at..])
}

/// A piece of the answer as stop string.
///
/// # Errors
/// An answer that goes on, or has the stop string in it.
pub async fn a_stop_string_ends_the_answer(model: &dyn LlmBackend) -> Result<(), Failure> {
    let (request, pieces) = answer_in_pieces(model, "stop", STOP).await?;
    let text = pieces.concat();
    for piece in [&pieces[1], &pieces[pieces.len() - 1]] {
        ends_before(model, &request, &text, std::slice::from_ref(piece), STOP).await?;
    }
    Ok(())
}

/// Stop strings made of the end of one piece and the beginning of the next, and of more than two pieces.
///
/// # Errors
/// A stop string that was missed or cut off elsewhere.
pub async fn stop_strings_lie_across_tokens(model: &dyn LlmBackend) -> Result<(), Failure> {
    let (request, pieces) = answer_in_pieces(model, "across", ACROSS).await?;
    let text = pieces.concat();
    for pair in pieces.windows(2) {
        let stop = [last_char(&pair[0]), first_char(&pair[1])].concat();
        ends_before(model, &request, &text, &[stop], ACROSS).await?;
    }
    for three in pieces.windows(3).take(4) {
        let stop = [last_char(&three[0]), &three[1], first_char(&three[2])].concat();
        ends_before(model, &request, &text, &[stop], ACROSS).await?;
    }
    Ok(())
}

/// A long stop string that begins earlier, and a short one within it that is complete earlier.
///
/// # Errors
/// An answer that ends elsewhere.
pub async fn the_first_complete_stop_string_counts(model: &dyn LlmBackend) -> Result<(), Failure> {
    let (request, pieces) = answer_in_pieces(model, "first", ACROSS).await?;
    let text = pieces.concat();
    let long = pieces[..4].concat();
    let short = [last_char(&pieces[1]), first_char(&pieces[2])].concat();
    let never = "\u{1}never\u{1}".to_owned();
    ends_before(model, &request, &text, &[long.clone(), short.clone(), never.clone()], ACROSS).await?;
    ends_before(model, &request, &text, &[never, short, long], ACROSS).await
}

/// Of two stop strings with one end, the longer, in whatever order they are given.
///
/// # Errors
/// An answer that ends elsewhere.
pub async fn of_one_end_the_longest_stop_string_counts(model: &dyn LlmBackend) -> Result<(), Failure> {
    let (request, pieces) = answer_in_pieces(model, "longest", ACROSS).await?;
    let text = pieces.concat();
    let long = pieces[..3].concat();
    let short = [last_char(&pieces[1]), &pieces[2]].concat();
    ends_before(model, &request, &text, &[long.clone(), short.clone()], ACROSS).await?;
    ends_before(model, &request, &text, &[short, long], ACROSS).await
}

/// The answer's end looks like the beginning of a stop string, which then does not come.
///
/// # Errors
/// A text that lacks its end.
pub async fn a_beginning_of_a_stop_string_comes_out_at_the_end(
    model: &dyn LlmBackend,
) -> Result<(), Failure> {
    let (request, pieces) = answer_in_pieces(model, "held", HELD).await?;
    let text = pieces.concat();
    let stop = format!("{}{}\u{1}never", pieces[pieces.len() - 2], pieces[pieces.len() - 1]);
    let answer = answer(model, request.with_stop([stop.as_str()]), HELD).await?;
    let stopped = matches!(answer.finish_reason, FinishReason::StopString(_));
    HELD.require(!stopped, format_args!("{:?}", answer.finish_reason), "another reason")?;
    HELD.equal(format_args!("text with the stop string {stop:?}"), answer.text, text)
}

/// As many tokens as were asked for, and not one more.
///
/// # Errors
/// Another number, or another reason.
pub async fn max_tokens_end_the_answer(model: &dyn LlmBackend) -> Result<(), Failure> {
    for max_tokens in [1, 2, 5] {
        let answer = answer(model, greedy(prompt("max"), max_tokens), MAX_TOKENS).await?;
        MAX_TOKENS.equal("tokens", answer.tokens.len(), max_tokens)?;
        MAX_TOKENS.equal("finish_reason", answer.finish_reason, FinishReason::MaxTokens)?;
    }
    Ok(())
}

/// An end-of-sequence token that a bias makes certain is the answer's only token and has no text.
///
/// # Errors
/// Another end, or a text.
pub async fn an_end_of_sequence_is_counted_but_not_shown(model: &dyn LlmBackend) -> Result<(), Failure> {
    let Some(eos) = end_token(model) else { return Ok(()) };
    let mut request = greedy(prompt("eos"), SHORT);
    request.params.ignore_eos = false;
    request.params.sampling.logit_bias.insert(eos, ALWAYS);
    let answer = answer(model, request, EOS).await?;
    EOS.equal("finish_reason", answer.finish_reason, FinishReason::EndOfSequence)?;
    EOS.equal("tokens", answer.tokens, vec![eos])?;
    EOS.equal("usage.completion_tokens", answer.usage.completion_tokens, 1)?;
    EOS.equal("text", answer.text.as_str(), "")
}

/// The same with `ignore_eos` goes on to the limit.
///
/// # Errors
/// Another end.
pub async fn ignore_eos_goes_on(model: &dyn LlmBackend) -> Result<(), Failure> {
    let Some(eos) = end_token(model) else { return Ok(()) };
    let mut request = greedy(prompt("ignore"), 4);
    request.params.sampling.logit_bias.insert(eos, ALWAYS);
    let events = events(model, request, IGNORE_EOS).await?;
    let ids: Vec<u32> = events
        .iter()
        .filter_map(|event| match event {
            ternion_core::Event::Token(TokenEvent { id, .. }) => Some(*id),
            _ => None,
        })
        .collect();
    IGNORE_EOS.equal("tokens", ids, vec![eos; 4])
}

/// An end-of-sequence token that a bias makes certain, its name as stop string, and twice its name.
///
/// # Errors
/// An answer that goes on, or has the name in it.
pub async fn names_of_special_tokens_are_stop_strings(model: &dyn LlmBackend) -> Result<(), Failure> {
    let Some(eos) = end_token(model) else { return Ok(()) };
    let Some(name) = tokenizer(model, NAMES)?.token(eos) else { return Ok(()) };
    for count in [1, 2] {
        let stop = name.repeat(count);
        let mut request = greedy(prompt("names"), SHORT).with_stop([stop.as_str()]);
        request.params.sampling.logit_bias.insert(eos, ALWAYS);
        let answer = answer(model, request, NAMES).await?;
        let ended = FinishReason::StopString(stop.clone());
        NAMES.equal(format_args!("finish_reason of {stop:?}"), answer.finish_reason, ended)?;
        NAMES.equal("tokens", answer.tokens, vec![eos; count])?;
        NAMES.equal("text", answer.text.as_str(), "")?;
    }
    Ok(())
}

/// Each token of an answer as stop token of the same answer.
///
/// # Errors
/// An answer that goes on, or has the token's text in it.
pub async fn a_stop_token_ends_the_answer(model: &dyn LlmBackend) -> Result<(), Failure> {
    let request = greedy(prompt("stop token"), SHORT);
    let whole = answer(model, request.clone(), STOP_TOKEN).await?.tokens;
    for (at, token) in whole.iter().enumerate() {
        if whole[..at].contains(token) {
            continue;
        }
        let stopped = answer(model, request.clone().with_stop_tokens([*token]), STOP_TOKEN).await?;
        STOP_TOKEN.equal("finish_reason", stopped.finish_reason, FinishReason::StopToken(*token))?;
        STOP_TOKEN.equal("tokens", &stopped.tokens[..], &whole[..=at])?;
        STOP_TOKEN.equal("usage.completion_tokens", stopped.usage.completion_tokens, at + 1)?;
        if at > 0 {
            let mut shorter = request.clone();
            shorter.params.max_tokens = Some(at);
            let before = answer(model, shorter, STOP_TOKEN).await?.text;
            STOP_TOKEN.equal("text", stopped.text, before)?;
        }
    }
    Ok(())
}
