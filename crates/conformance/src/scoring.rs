//! Scores, logits and log-probabilities: one model behind all three.

use ternion_core::{
    ErrorKind, GenerateRequest, LlmBackend, LogitsRequest, ScoreRequest, TokenScore, logprob::log_softmax_at,
};

use crate::{
    Failure, Sentence,
    ask::{SHORT, answer, drawn, greedy, prompt, tokens},
    check::checks,
};

checks! { "scoring";
    one_score_for_each_token, ONE_EACH, [Score, Tokenizer];
    scores_are_the_log_probabilities_of_generation, SAME, [Generate, Score, Logprobs, Tokenizer], rounding;
    log_probabilities_come_before_penalties_and_temperature, RAW, [Generate, Score, Logprobs, Tokenizer], rounding;
    greedy_tokens_have_rank_0, RANK, [Generate, Score, Tokenizer], rounding;
    the_top_tokens_are_the_most_probable, TOP, [Score, Tokenizer], ranges;
    a_score_depends_on_what_stands_before, START, [Score, Tokenizer];
    scores_are_those_of_the_logits, RAW_LOGITS, [Score, Logits, Tokenizer], rounding;
    logits_are_a_row_for_each_position, ROWS, [Logits, Tokenizer];
    logits_from_a_start_are_the_last_rows, FIRST, [Logits, Tokenizer], rounding;
    log_probabilities_only_where_asked_for, ASKED, [Generate, Logprobs];
    no_scores_without_the_capability, NO_SCORE, [NoScore];
    no_logits_without_the_capability, NO_LOGITS, [NoLogits];
    no_log_probabilities_without_the_capability, NO_LOGPROBS, [Generate, NoLogprobs];
}

const ONE_EACH: Sentence = Sentence::new(
    "LlmBackend::score",
    "One TokenScore for each of tokens[start..], from the model's raw logits",
);
const SAME: Sentence = Sentence::new(
    "LlmBackend::score",
    "the same numbers, but for the rounding of float sums in another order, that generate reports as logprob for the \
     same tokens.",
);
const RAW: Sentence = Sentence::new(
    "GenerateParams::logprobs",
    "Report with each token its log-probability under the model (before penalties and temperature).",
);
const RANK: Sentence = Sentence::new(
    "TokenScore::rank",
    "How many tokens are more probable; 0 means that greedy decoding would choose it.",
);
const TOP: Sentence = Sentence::new(
    "TokenScore::top",
    "The most probable tokens with their log-probabilities, best first, as many as were asked for.",
);
const START: Sentence = Sentence::new(
    "ScoreRequest::start",
    "The first token to score, at least 1: a token is scored given all that stand before it.",
);
const RAW_LOGITS: Sentence = ONE_EACH;
const ROWS: Sentence = Sentence::new(
    "LlmBackend::logits",
    "The raw logits at the positions from start on, [tokens.len() - start, vocab_size] row after row.",
);
const FIRST: Sentence =
    Sentence::new("LogitsRequest::start", "The first position whose logits are returned.");
const ASKED: Sentence = Sentence::new(
    "Event::Token",
    "The natural logarithm of its probability under the model, if it was asked for.",
);
const NO_SCORE: Sentence =
    Sentence::new("LlmBackend::score", "As generate; Unsupported without the capability.");
const NO_LOGITS: Sentence =
    Sentence::new("LlmBackend::logits", "Backends that cannot see logits do not have it.");
const NO_LOGPROBS: Sentence = Sentence::new(
    "Capabilities",
    "What a backend cannot do it refuses as Unsupported rather than leaving it out.",
);

/// What two ways to the same number may differ by: sums of floats in another order.
pub(crate) const TOLERANCE: f32 = 1e-3;

/// Nothing if no element differs by more than the tolerance.
pub(crate) fn close(sentence: Sentence, what: &str, found: &[f32], expected: &[f32]) -> Result<(), Failure> {
    sentence.equal(format_args!("number of {what}"), found.len(), expected.len())?;
    for (i, (a, b)) in found.iter().zip(expected).enumerate() {
        let equal = a == b || (a - b).abs() <= TOLERANCE;
        sentence.require(
            equal,
            format_args!("{what}: {a} at index {i}"),
            format_args!("{b}, with a tolerance of {TOLERANCE},"),
        )?;
    }
    Ok(())
}

async fn score(
    model: &dyn LlmBackend,
    request: ScoreRequest,
    sentence: Sentence,
) -> Result<Vec<TokenScore>, Failure> {
    Ok(model.score(request).await.map_err(sentence.refused("score"))?.tokens)
}

async fn logits(
    model: &dyn LlmBackend,
    request: LogitsRequest,
    sentence: Sentence,
) -> Result<Vec<f32>, Failure> {
    model.logits(request).await.map_err(sentence.refused("logits"))
}

fn logprobs(scores: &[TokenScore]) -> Vec<f32> {
    scores.iter().map(|score| score.logprob).collect()
}

/// As many scores as tokens from `start` on, of these tokens, none more probable than 1.
///
/// # Errors
/// What is missing or impossible.
pub async fn one_score_for_each_token(model: &dyn LlmBackend) -> Result<(), Failure> {
    let sequence = tokens(model, "each token", 24, ONE_EACH)?;
    for start in [1, 7, 23] {
        let scores = score(model, ScoreRequest::new(sequence.clone(), start), ONE_EACH).await?;
        let ids: Vec<u32> = scores.iter().map(|s| s.id).collect();
        ONE_EACH.equal("tokens", &ids[..], &sequence[start..])?;
        let possible = scores.iter().all(|s| s.logprob <= 0.0);
        ONE_EACH.require(possible, format_args!("{:?}", logprobs(&scores)), "numbers of at most 0")?;
    }
    Ok(())
}

/// The answer of a request, scored.
async fn scored(
    model: &dyn LlmBackend,
    request: GenerateRequest,
    prompt: &[u32],
    sentence: Sentence,
) -> Result<(Vec<f32>, Vec<TokenScore>), Failure> {
    let answer = answer(model, request.with_logprobs(), sentence).await?;
    sentence.equal("number of logprobs", answer.logprobs.len(), answer.tokens.len())?;
    let sequence = [prompt, &answer.tokens].concat();
    let scores = score(model, ScoreRequest::new(sequence, prompt.len()), sentence).await?;
    Ok((answer.logprobs, scores))
}

/// Generated tokens have the log-probabilities that the same tokens are scored with.
///
/// # Errors
/// The number that differs.
pub async fn scores_are_the_log_probabilities_of_generation(model: &dyn LlmBackend) -> Result<(), Failure> {
    let prompt = tokens(model, "generation", 16, SAME)?;
    let (logprobs_found, scores) = scored(model, greedy(prompt.clone(), SHORT), &prompt, SAME).await?;
    close(SAME, "logprobs of a greedy answer", &logprobs_found, &logprobs(&scores))
}

/// The same for tokens that were drawn at a high temperature, with a bias and penalties.
///
/// # Errors
/// The number that differs.
pub async fn log_probabilities_come_before_penalties_and_temperature(
    model: &dyn LlmBackend,
) -> Result<(), Failure> {
    let prompt = tokens(model, "raw", 16, RAW)?;
    let mut sampling = drawn(Some(3));
    sampling.presence_penalty = Some(1.0);
    sampling.repetition_penalty = Some(1.5);
    sampling.logit_bias.insert(prompt[prompt.len() - 1], 2.0);
    let request = greedy(prompt.clone(), SHORT).with_sampling(sampling);
    let (logprobs_found, scores) = scored(model, request, &prompt, RAW).await?;
    close(RAW, "logprobs of a drawn answer", &logprobs_found, &logprobs(&scores))
}

/// No token is more probable than the one that greedy decoding takes.
///
/// # Errors
/// The ranks.
pub async fn greedy_tokens_have_rank_0(model: &dyn LlmBackend) -> Result<(), Failure> {
    let prompt = tokens(model, "rank", 16, RANK)?;
    let answer = answer(model, greedy(prompt.clone(), SHORT), RANK).await?;
    let sequence = [&prompt[..], &answer.tokens].concat();
    let scores = score(model, ScoreRequest::new(sequence, prompt.len()), RANK).await?;
    let ranks: Vec<usize> = scores.iter().map(|s| s.rank).collect();
    RANK.equal("ranks of greedy tokens", ranks, vec![0; answer.tokens.len()])
}

/// The lists have the length that was asked for, are sorted, and agree with rank and log-probability.
///
/// # Errors
/// What does not.
pub async fn the_top_tokens_are_the_most_probable(model: &dyn LlmBackend) -> Result<(), Failure> {
    let sequence = tokens(model, "top", 12, TOP)?;
    let vocab = model.info().limits.vocab_size;
    for top in [0, 1, 5, 100] {
        for scored in score(model, ScoreRequest::new(sequence.clone(), 1).with_top(top), TOP).await? {
            TOP.equal("length of top", scored.top.len(), top.min(vocab))?;
            let sorted = scored.top.windows(2).all(|pair| pair[0].logprob >= pair[1].logprob);
            TOP.require(sorted, format_args!("{:?}", scored.top), "best first")?;
            if let Some(place) = scored.top.iter().position(|token| token.id == scored.id) {
                TOP.equal("the token's place in top", place, scored.rank)?;
                TOP.equal("the token's logprob in top", scored.top[place].logprob, scored.logprob)?;
            } else {
                TOP.require(scored.rank >= top, format_args!("rank {} outside of top", scored.rank), top)?;
            }
        }
    }
    Ok(())
}

/// Scores from a later start on are the end of those from an earlier one, and a longer beginning changes them.
///
/// # Errors
/// The number that differs.
pub async fn a_score_depends_on_what_stands_before(model: &dyn LlmBackend) -> Result<(), Failure> {
    let sequence = tokens(model, "before", 24, START)?;
    let all = score(model, ScoreRequest::new(sequence.clone(), 1), START).await?;
    let late = score(model, ScoreRequest::new(sequence.clone(), 16), START).await?;
    close(START, "logprobs from a later start", &logprobs(&late), &logprobs(&all[15..]))?;
    let without = score(model, ScoreRequest::new(sequence[8..].to_vec(), 8), START).await?;
    let same = logprobs(&without) == logprobs(&late);
    START.require(!same, "the same logprobs without the first 8 tokens", "others")
}

/// A score is the logarithm of the softmax of the row of logits before it.
///
/// # Errors
/// The number that differs.
pub async fn scores_are_those_of_the_logits(model: &dyn LlmBackend) -> Result<(), Failure> {
    let vocab = model.info().limits.vocab_size;
    let sequence = tokens(model, "of the logits", 24, RAW_LOGITS)?;
    let scores = score(model, ScoreRequest::new(sequence.clone(), 1), RAW_LOGITS).await?;
    let rows = logits(model, LogitsRequest::new(sequence.clone()), RAW_LOGITS).await?;
    let by_hand: Vec<f32> = rows
        .chunks_exact(vocab)
        .zip(&sequence[1..])
        .map(|(row, &id)| log_softmax_at(row, id as usize))
        .collect();
    close(RAW_LOGITS, "logprobs", &logprobs(&scores), &by_hand)
}

/// As many rows as positions, of finite numbers that are not all the same.
///
/// # Errors
/// The shape, or the row.
pub async fn logits_are_a_row_for_each_position(model: &dyn LlmBackend) -> Result<(), Failure> {
    let vocab = model.info().limits.vocab_size;
    for length in [1, 2, 24] {
        let sequence = tokens(model, "rows", length, ROWS)?;
        let rows = logits(model, LogitsRequest::new(sequence), ROWS).await?;
        ROWS.equal("number of logits", rows.len(), length * vocab)?;
        for (position, row) in rows.chunks_exact(vocab).enumerate() {
            let numbers = row.iter().all(|l| !l.is_nan() && *l != f32::INFINITY);
            let differ = row.iter().any(|l| l != &row[0]);
            ROWS.require(numbers && differ, format_args!("the row at {position}"), "numbers that differ")?;
        }
    }
    Ok(())
}

/// The rows from a start on are the last rows of all.
///
/// # Errors
/// The logit that differs.
pub async fn logits_from_a_start_are_the_last_rows(model: &dyn LlmBackend) -> Result<(), Failure> {
    let vocab = model.info().limits.vocab_size;
    let sequence = tokens(model, "last rows", 24, FIRST)?;
    let all = logits(model, LogitsRequest::new(sequence.clone()), FIRST).await?;
    for start in [0, 1, 13, 23] {
        let some = logits(model, LogitsRequest::new(sequence.clone()).with_start(start), FIRST).await?;
        close(FIRST, &format!("logits from {start} on"), &some, &all[start * vocab..])?;
    }
    Ok(())
}

/// Each token has one where they were asked for, and none where not.
///
/// # Errors
/// The number of them.
pub async fn log_probabilities_only_where_asked_for(model: &dyn LlmBackend) -> Result<(), Failure> {
    let request = greedy(prompt("asked"), SHORT);
    let without = answer(model, request.clone(), ASKED).await?;
    ASKED.equal("number of logprobs without asking", without.logprobs.len(), 0)?;
    let with = answer(model, request.with_logprobs(), ASKED).await?;
    ASKED.equal("number of logprobs", with.logprobs.len(), with.tokens.len())?;
    ASKED.equal("tokens with logprobs", with.tokens, without.tokens)?;
    let possible = with.logprobs.iter().all(|l| *l <= 0.0);
    ASKED.require(possible, format_args!("{:?}", with.logprobs), "numbers of at most 0")
}

/// A backend that does not score says so.
///
/// # Errors
/// Another result than `Unsupported`.
pub async fn no_scores_without_the_capability(model: &dyn LlmBackend) -> Result<(), Failure> {
    let found = model.score(ScoreRequest::new(vec![0, 0], 1)).await.err().map(|e| e.kind());
    NO_SCORE.equal("error", found, Some(ErrorKind::Unsupported))
}

/// A backend that does not give logits says so.
///
/// # Errors
/// Another result than `Unsupported`.
pub async fn no_logits_without_the_capability(model: &dyn LlmBackend) -> Result<(), Failure> {
    let found = model.logits(LogitsRequest::new(vec![0])).await.err().map(|e| e.kind());
    NO_LOGITS.equal("error", found, Some(ErrorKind::Unsupported))
}

/// A backend without log-probabilities refuses requests for them rather than leaving them out.
///
/// # Errors
/// Another result than `Unsupported`.
pub async fn no_log_probabilities_without_the_capability(model: &dyn LlmBackend) -> Result<(), Failure> {
    let request = greedy(prompt("none"), 1).with_logprobs();
    let found = model.generate(request).await.err().map(|e| e.kind());
    NO_LOGPROBS.equal("error", found, Some(ErrorKind::Unsupported))
}
