//! Embeddings: their number, order and length, that inputs do not depend on each other, and what is refused.

use ternion_core::{
    EmbedInput, EmbedRequest, Embedding, Embeddings, Error, ErrorKind, InputTruncation, LlmBackend,
};

use crate::{Failure, Sentence, check::checks};

checks! { "embeddings";
    the_capability_says_whether_there_are_embeddings, CAPABILITY, [];
    vectors_are_what_the_model_says, VECTORS, [Embed];
    inputs_do_not_depend_on_each_other, ALONE, [Embed];
    tokens_are_taken_as_they_are, TOKENS, [Embed, Tokenizer];
    inputs_that_are_too_long_are_refused_or_cut, TOO_LONG, [Embed, Tokenizer];
    empty_inputs_are_refused, EMPTY, [Embed];
    lengths_are_checked, DIMENSIONS, [Embed];
    a_cancelled_request_is_cancelled, CANCELLED, [Embed];
}

const CAPABILITY: Sentence = Sentence::new(
    "LlmBackend::embed",
    "Unsupported without the capability; ModelInfo::embedding tells how a model with it makes embeddings.",
);
const VECTORS: Sentence = Sentence::new(
    "LlmBackend::embed",
    "One Embedding for each input, in their order, of the length that EmbeddingInfo tells, and of the norm 1 where it says so.",
);
const ALONE: Sentence =
    Sentence::new("LlmBackend::embed", "An input's vector does not depend on the others of its request.");
const TOKENS: Sentence = Sentence::new(
    "EmbedInput::Tokens",
    "Token ids as they go into the model, with nothing put around them; a text gets what the tokenizer puts around it.",
);
const TOO_LONG: Sentence = Sentence::new(
    "LlmBackend::embed",
    "An input that is longer than context_length is refused or cut, as the request says, and one that was cut is marked.",
);
const EMPTY: Sentence = Sentence::new("LlmBackend::embed", "At least one input, none of them empty.");
const DIMENSIONS: Sentence = Sentence::new(
    "EmbedRequest::dimensions",
    "The length of the vectors, for models that are trained for it.",
);
const CANCELLED: Sentence = Sentence::new("LlmBackend::embed", "Cancelling the token gives Cancelled.");

/// Texts that no model takes for the same.
const TEXTS: [&str; 3] = ["One, two, three.", "A", "The quick brown fox jumps over the lazy dog."];

/// What two ways of computing one vector may differ by, of its norm.
const TOLERANCE: f64 = 1e-3;

fn norm(values: &[f32]) -> f64 {
    values.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt()
}

fn same(a: &[f32], b: &[f32]) -> bool {
    let difference: Vec<f32> = a.iter().zip(b).map(|(a, b)| a - b).collect();
    a.len() == b.len() && norm(&difference) <= TOLERANCE * norm(b)
}

async fn embed(
    model: &dyn LlmBackend,
    request: EmbedRequest,
    sentence: Sentence,
) -> Result<Embeddings, Failure> {
    model.embed(request).await.map_err(sentence.refused("embed"))
}

async fn one(
    model: &dyn LlmBackend,
    input: impl Into<EmbedInput>,
    sentence: Sentence,
) -> Result<Embedding, Failure> {
    let mut found = embed(model, EmbedRequest::new([input.into()]), sentence).await?.items;
    sentence.equal("embeddings", found.len(), 1)?;
    Ok(found.remove(0))
}

/// An error of this kind that names its operation.
fn refused(
    outcome: Result<Embeddings, Error>,
    kind: ErrorKind,
    what: &str,
    sentence: Sentence,
) -> Result<(), Failure> {
    match outcome {
        Ok(_) => Err(sentence.broken(format!("{what}: success"), format!("{kind:?}"))),
        Err(error) => {
            let found = format!("{what}: the error `{error}`");
            sentence.require(error.kind() == kind, &found, format!("{kind:?}"))?;
            sentence.require(error.operation() == "embed", found, "the operation `embed`")
        }
    }
}

/// The description and the method say the same.
///
/// # Errors
/// A capability without a description, or a method that works without either.
pub async fn the_capability_says_whether_there_are_embeddings(model: &dyn LlmBackend) -> Result<(), Failure> {
    let info = model.info();
    if info.capabilities.embed {
        return CAPABILITY.require(
            info.embedding.is_some(),
            "no `embedding` in the info",
            "how it makes them",
        );
    }
    CAPABILITY.require(info.embedding.is_none(), "an `embedding` without the capability", "none")?;
    refused(model.embed(EmbedRequest::new(["a"])).await, ErrorKind::Unsupported, "embed", CAPABILITY)
}

/// Number, length, norm and usage.
///
/// # Errors
/// Vectors that are not what the model says.
pub async fn vectors_are_what_the_model_says(model: &dyn LlmBackend) -> Result<(), Failure> {
    let info = model.info();
    let Some(embedding) = &info.embedding else { return Ok(()) };
    let found = embed(model, EmbedRequest::new(TEXTS), VECTORS).await?;
    VECTORS.equal("embeddings", found.items.len(), TEXTS.len())?;
    for (text, item) in TEXTS.iter().zip(&found.items) {
        if embedding.dimensions > 0 {
            VECTORS.equal(format!("values of {text:?}"), item.values.len(), embedding.dimensions)?;
        }
        let finite = item.values.iter().all(|x| x.is_finite());
        VECTORS.require(
            finite && norm(&item.values) > 0.0,
            format!("{text:?}: no direction"),
            "finite numbers",
        )?;
        if embedding.normalized {
            let length = norm(&item.values);
            VECTORS.require((length - 1.0).abs() < 1e-3, format!("{text:?}: the norm {length}"), "1")?;
        }
        VECTORS.require(!item.truncated, format!("{text:?}: marked as cut"), "a whole one")?;
    }
    let tokens: usize = found.items.iter().map(|item| item.tokens).sum();
    VECTORS.equal("tokens in the usage", found.usage.prompt_tokens, tokens)?;
    let differ = !same(&found.items[0].values, &found.items[2].values);
    VECTORS.require(differ, "the same vector for two texts", "two vectors")
}

/// Alone or with others, before or behind them.
///
/// # Errors
/// A vector that differs.
pub async fn inputs_do_not_depend_on_each_other(model: &dyn LlmBackend) -> Result<(), Failure> {
    let mut reversed = TEXTS;
    reversed.reverse();
    let together = embed(model, EmbedRequest::new(TEXTS), ALONE).await?.items;
    let turned = embed(model, EmbedRequest::new(reversed), ALONE).await?.items;
    for (i, text) in TEXTS.iter().enumerate() {
        let alone = one(model, *text, ALONE).await?;
        let others = [&together[i], &turned[TEXTS.len() - 1 - i]];
        let alike = others.iter().all(|other| same(&other.values, &alone.values));
        ALONE.require(alike, format!("{text:?}: another vector beside other inputs"), "the same")?;
    }
    Ok(())
}

/// A text is its tokens with what is put around them.
///
/// # Errors
/// A vector that differs.
pub async fn tokens_are_taken_as_they_are(model: &dyn LlmBackend) -> Result<(), Failure> {
    let Some(tokenizer) = model.tokenizer() else { return Ok(()) };
    for text in TEXTS {
        let (before, after) = tokenizer.added_around();
        let plain = tokenizer.encode_plain(text).map_err(TOKENS.refused("encode_plain"))?;
        let tokens = [before, &plain, after].concat();
        let (of_text, of_tokens) =
            (one(model, text, TOKENS).await?, one(model, tokens.clone(), TOKENS).await?);
        TOKENS.equal(format!("tokens of {text:?}"), of_text.tokens, tokens.len())?;
        let alike = same(&of_text.values, &of_tokens.values);
        TOKENS.require(alike, format!("{text:?}: another vector of its tokens"), "the same")?;
    }
    Ok(())
}

/// More tokens than the context.
///
/// # Errors
/// An input that is taken as a whole, or one that is cut elsewhere.
pub async fn inputs_that_are_too_long_are_refused_or_cut(model: &dyn LlmBackend) -> Result<(), Failure> {
    const MOST: usize = 4096;
    let context = model.info().limits.context_length;
    let Some(tokenizer) = model.tokenizer().filter(|_| (1..=MOST).contains(&context)) else { return Ok(()) };
    let ids = tokenizer.encode_plain(TEXTS[2]).map_err(TOO_LONG.refused("encode_plain"))?;
    let tokens: Vec<u32> = ids.iter().copied().cycle().take(context + 3).collect();
    let request = EmbedRequest::new([tokens.clone()]);
    refused(model.embed(request.clone()).await, ErrorKind::ContextOverflow, "too long", TOO_LONG)?;
    for (truncation, kept) in
        [(InputTruncation::End, &tokens[..context]), (InputTruncation::Start, &tokens[3..])]
    {
        let cut = embed(model, request.clone().with_truncation(truncation), TOO_LONG).await?.items.remove(0);
        TOO_LONG.require(cut.truncated, format!("{truncation:?}: not marked"), "`truncated`")?;
        TOO_LONG.equal("tokens", cut.tokens, context)?;
        let expected = one(model, kept.to_vec(), TOO_LONG).await?;
        let alike = same(&cut.values, &expected.values);
        TOO_LONG.require(alike, format!("{truncation:?}: another vector"), "that of what is left")?;
    }
    Ok(())
}

/// No input, and an input without text.
///
/// # Errors
/// Success, and errors of another kind.
pub async fn empty_inputs_are_refused(model: &dyn LlmBackend) -> Result<(), Failure> {
    let inputs: [Vec<EmbedInput>; 3] = [vec![], vec!["a".into(), "".into()], vec![Vec::new().into()]];
    for inputs in inputs {
        let what = format!("{inputs:?}");
        refused(model.embed(EmbedRequest::new(inputs)).await, ErrorKind::InvalidRequest, &what, EMPTY)?;
    }
    Ok(())
}

/// A length that no model has, and the model's own.
///
/// # Errors
/// Vectors of another length.
pub async fn lengths_are_checked(model: &dyn LlmBackend) -> Result<(), Failure> {
    let info = model.info();
    let Some(embedding) = info.embedding.as_ref().filter(|embedding| embedding.dimensions > 0) else {
        return Ok(());
    };
    let own = embedding.dimensions;
    for wrong in [0, own + 1] {
        let request = EmbedRequest::new(["a"]).with_dimensions(wrong);
        refused(model.embed(request).await, ErrorKind::InvalidRequest, &format!("{wrong}"), DIMENSIONS)?;
    }
    let whole = embed(model, EmbedRequest::new(["a"]).with_dimensions(own), DIMENSIONS).await?;
    DIMENSIONS.equal("values", whole.items[0].values.len(), own)?;
    let shorter = match &embedding.shortened {
        None if own > 1 => {
            let request = EmbedRequest::new(["a"]).with_dimensions(own - 1);
            return refused(model.embed(request).await, ErrorKind::Unsupported, "a shorter one", DIMENSIONS);
        }
        None => return Ok(()),
        Some(lengths) => lengths.iter().copied().find(|length| *length < own).unwrap_or(own.div_ceil(2)),
    };
    let short = embed(model, EmbedRequest::new(["a"]).with_dimensions(shorter), DIMENSIONS).await?;
    let values = &short.items[0].values;
    DIMENSIONS.equal("values", values.len(), shorter)?;
    let scale = norm(&whole.items[0].values[..shorter]) / norm(values);
    let scaled: Vec<f32> = values.iter().map(|x| (f64::from(*x) * scale) as f32).collect();
    let alike = same(&scaled, &whole.items[0].values[..shorter]);
    DIMENSIONS.require(alike, "another direction", "the first values of the whole vector")
}

/// A token that is cancelled before.
///
/// # Errors
/// Success, and errors of another kind.
pub async fn a_cancelled_request_is_cancelled(model: &dyn LlmBackend) -> Result<(), Failure> {
    let request = EmbedRequest::new(TEXTS);
    request.cancel.cancel();
    refused(model.embed(request).await, ErrorKind::Cancelled, "cancelled", CANCELLED)
}
