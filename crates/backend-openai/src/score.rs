//! Scores of given tokens, from `prompt_logprobs` or from `echo` with `logprobs`.

use serde_json::{Value, json};
use ternion_core::{Error, Result, TokenLogprob, TokenScore};

use crate::{
    body::{Common, Input, base},
    probe::{Echo, Scoring},
    wire::{Choice, Chunk, best, map},
};

/// How the tokens of a request lie in it.
///
/// A server with `prompt_logprobs` generates a token behind the prompt, for which a full context has no room. There the last token is
/// not sent but is the only one that may be generated: its log-probability is that of the model without this restriction.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tokens<'a> {
    pub(crate) prompt: &'a [u32],
    /// Generated behind it.
    pub(crate) last: Option<u32>,
}

impl<'a> Tokens<'a> {
    /// `context` is how many tokens the server takes.
    pub(crate) fn new(tokens: &'a [u32], scoring: Scoring, context: usize) -> Self {
        match tokens {
            [prompt @ .., last] if scoring == Scoring::PromptLogprobs && tokens.len() == context => {
                Self { prompt, last: Some(*last) }
            }
            prompt => Self { prompt, last: None },
        }
    }

    fn len(self) -> usize {
        self.prompt.len() + usize::from(self.last.is_some())
    }
}

/// The body of a request that scores `tokens`, with the `top` most probable ones at each place.
pub(crate) fn body(common: &Common, scoring: Scoring, tokens: Tokens<'_>, top: usize) -> Value {
    let mut body = base(common, &Input::Tokens(tokens.prompt.to_vec()));
    let max_tokens = usize::from(!matches!(scoring, Scoring::Echo(Echo { alone: true, .. })));
    for (key, value) in
        [("max_tokens", json!(max_tokens)), ("temperature", json!(0)), ("stream", json!(false))]
    {
        body.insert(key.into(), value);
    }
    if let Scoring::Echo(echo) = scoring {
        body.insert("echo".into(), true.into());
        // At least one, for the rank.
        body.insert("logprobs".into(), top.max(1).into());
        if echo.with_ids {
            body.insert("return_tokens_as_token_ids".into(), true.into());
        }
    } else {
        body.insert("prompt_logprobs".into(), top.into());
        if let Some(last) = tokens.last {
            body.insert("allowed_token_ids".into(), json!([last]));
            body.insert("logprobs".into(), top.max(1).into());
            body.insert("return_tokens_as_token_ids".into(), true.into());
        }
    }
    Value::Object(body)
}

/// The scores of `tokens[start..]` in a response.
///
/// # Errors
/// [`Backend`](ternion_core::ErrorKind::Backend) where the response does not have them.
pub(crate) fn read(
    response: &Value,
    scoring: Scoring,
    tokens: Tokens<'_>,
    start: usize,
    top: usize,
) -> Result<Vec<TokenScore>> {
    let chunk: Chunk = serde::Deserialize::deserialize(response)
        .map_err(|error| Error::backend("the response with scores cannot be read").with_source(error))?;
    let choice = chunk.choices.into_iter().flatten().next();
    let choice = choice.ok_or_else(|| Error::backend("the response with scores has no choice"))?;
    (start..tokens.len())
        .map(|at| {
            let (found, token) = if let (None, Some(last)) = (tokens.prompt.get(at), tokens.last) {
                (of_answer(&choice, last, top), last)
            } else {
                let found = match scoring {
                    Scoring::Echo(echo) => of_echo(&choice, tokens.prompt, at, top, echo.with_ids),
                    _ => of_prompt(&choice, tokens.prompt, at, top),
                };
                (found, tokens.prompt[at])
            };
            found.ok_or_else(|| {
                Error::backend(format!("the response has no score of the token {token} at index {at}"))
            })
        })
        .collect()
}

fn of_prompt(choice: &Choice, tokens: &[u32], at: usize, top: usize) -> Option<TokenScore> {
    let all = choice.prompt_logprobs.as_ref().filter(|all| all.len() == tokens.len())?;
    let place = all.get(at)?.as_ref()?;
    let own = place.get(&tokens[at].to_string())?;
    let logprob = own.logprob? as f32;
    let others = place
        .iter()
        .filter_map(|(id, found)| Some(TokenLogprob::new(id.parse().ok()?, found.logprob? as f32)));
    let others: Vec<TokenLogprob> = others.collect();
    let rank = match own.rank {
        Some(rank) => rank.saturating_sub(1) as usize,
        None => others.iter().filter(|other| other.logprob > logprob).count(),
    };
    Some(TokenScore::new(tokens[at], logprob, rank).with_top(best(others, top)))
}

/// The token that was generated. Its rank is exact up to the number of alternatives.
fn of_answer(choice: &Choice, last: u32, top: usize) -> Option<TokenScore> {
    let logprobs = choice.logprobs.as_ref()?;
    let logprob = (*logprobs.token_logprobs.as_ref()?.first()?)?;
    let others = map(logprobs.top_logprobs.as_ref()?.first()?.as_ref()?);
    // A server that ignores the restriction generates another token.
    others.iter().find(|other| other.id == last && other.logprob == logprob as f32)?;
    let rank = others.iter().filter(|other| other.logprob > logprob as f32).count();
    Some(TokenScore::new(last, logprob as f32, rank).with_top(best(others, top)))
}

/// The rank is exact up to the number of alternatives, and that number where the token is not among them.
fn of_echo(choice: &Choice, tokens: &[u32], at: usize, top: usize, with_ids: bool) -> Option<TokenScore> {
    let logprobs = choice.logprobs.as_ref()?;
    let all = logprobs.token_logprobs.as_ref().filter(|all| all.len() >= tokens.len())?;
    // The first token has none: that is how the prompt is told from the answer.
    if all.first()?.is_some() {
        return None;
    }
    let logprob = (*all.get(at)?)?;
    let place = logprobs.top_logprobs.as_ref()?.get(at)?.as_ref()?;
    let rank = place.values().flatten().filter(|other| **other > logprob).count();
    let others = map(place);
    if with_ids && others.is_empty() {
        return None;
    }
    Some(TokenScore::new(tokens[at], logprob as f32, rank).with_top(best(others, top)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn whole(tokens: &[u32]) -> Tokens<'_> {
        Tokens::new(tokens, Scoring::PromptLogprobs, 100)
    }

    /// As vLLM 0.32 answers.
    #[test]
    fn the_last_token_of_a_full_context_is_the_answer() {
        let tokens = Tokens::new(&[5, 9, 11], Scoring::PromptLogprobs, 3);
        assert_eq!((tokens.prompt, tokens.last), (&[5, 9][..], Some(11)));
        let mut response = json!({"choices": [{"text": ",",
            "logprobs": {"tokens": ["token_id:11"], "token_logprobs": [-8.5],
                         "top_logprobs": [{"token_id:11": -8.5, "token_id:603": -4.75}]},
            "prompt_logprobs": [null, {"9": {"logprob": -7.5, "rank": 784}, "945": {"logprob": -4.25, "rank": 1}}]}]});
        let scores = read(&response, Scoring::PromptLogprobs, tokens, 1, 1).unwrap();
        let found: Vec<_> = scores.iter().map(|score| (score.id, score.logprob, score.rank)).collect();
        assert_eq!(found, [(9, -7.5, 783), (11, -8.5, 1)]);
        assert_eq!(scores[1].top, [TokenLogprob::new(603, -4.75)]);
        // A server that generates another token has not scored this one.
        response["choices"][0]["logprobs"] = json!({"tokens": ["token_id:603"], "token_logprobs": [-4.75],
            "top_logprobs": [{"token_id:603": -4.75}]});
        assert!(read(&response, Scoring::PromptLogprobs, tokens, 1, 1).is_err());
        // With room for a token, and by `echo`, all are in the prompt.
        assert!(Tokens::new(&[5, 9, 11], Scoring::PromptLogprobs, 4).last.is_none());
        assert!(Tokens::new(&[5, 9, 11], echo(true), 3).last.is_none());
    }

    fn echo(with_ids: bool) -> Scoring {
        Scoring::Echo(Echo { with_ids, alone: false })
    }

    #[test]
    fn prompt_logprobs_have_ranks_from_1() {
        let response = json!({"choices": [{"text": "x", "prompt_logprobs": [
            null,
            {"5": {"logprob": -2.0, "rank": 3, "decoded_token": "a"}, "9": {"logprob": -0.5, "rank": 1}},
            {"7": {"logprob": -0.25, "rank": 1, "decoded_token": "b"}}]}]});
        let scores = read(&response, Scoring::PromptLogprobs, whole(&[1, 5, 7]), 1, 1).unwrap();
        assert_eq!((scores[0].id, scores[0].logprob, scores[0].rank), (5, -2.0, 2));
        assert_eq!(scores[0].top, [TokenLogprob::new(9, -0.5)]);
        assert_eq!((scores[1].rank, scores[1].top.len()), (0, 1));
        assert_eq!(read(&response, Scoring::PromptLogprobs, whole(&[1, 5, 7]), 2, 0).unwrap()[0].top, []);
        // Of other tokens there is no score, and none is made up.
        assert!(read(&response, Scoring::PromptLogprobs, whole(&[1, 6, 7]), 1, 1).is_err());
    }

    #[test]
    fn echo_has_the_prompt_before_the_answer() {
        let response = json!({"choices": [{"text": "a b c d", "logprobs": {
            "tokens": ["token_id:1", "token_id:5", "token_id:7", "token_id:2"],
            "token_logprobs": [null, -2.0, -0.25, -0.1],
            "top_logprobs": [null, {"token_id:9": -0.5, "token_id:5": -2.0}, {"token_id:7": -0.25}, {"token_id:2": -0.1}]}}]});
        let scores = read(&response, echo(true), whole(&[1, 5, 7]), 1, 2).unwrap();
        assert_eq!((scores[0].rank, scores[1].rank), (1, 0));
        assert_eq!(scores[0].top, [TokenLogprob::new(9, -0.5), TokenLogprob::new(5, -2.0)]);
        // A server that ignores `echo` gives the answer's tokens alone, all with a log-probability.
        let ignored = json!({"choices": [{"logprobs": {"token_logprobs": [-1.0, -1.0, -1.0],
                             "top_logprobs": [{"a": -1.0}, {"a": -1.0}, {"a": -1.0}]}}]});
        assert!(read(&ignored, echo(false), whole(&[1, 5, 7]), 1, 0).is_err());
    }
}
