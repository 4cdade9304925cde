//! Constraints of answers: from a request to a grammar that runs beside its generation.
//!
//! [`plan`] says what an answer must look like, and from where on. [`Grammars`] compiles that for the model's vocabulary, before
//! the request is queued and never on the engine's thread. Calls of tools are grammars as well. A [`Running`] constraint then masks the logits of each step, follows
//! the tokens, and names those that it forces.
//!
//! The mask is computed for every token. To sample freely first and to compute the mask only for a refused token is cheaper, but
//! it draws from another distribution as soon as top-k or top-p cut it off. A mask takes microseconds, a step milliseconds.

mod calls;
#[cfg(feature = "constraints")]
mod compile;
#[cfg(feature = "constraints")]
mod grammar;
#[cfg(not(feature = "constraints"))]
#[path = "no_grammar.rs"]
mod grammar;
mod running;
#[cfg(feature = "constraints")]
mod schema;
#[cfg(feature = "constraints")]
mod vocabulary;

#[cfg(all(test, feature = "constraints"))]
#[allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]
mod tests;

#[cfg(all(test, feature = "constraints"))]
#[allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]
mod limits_tests;

use std::time::{Duration, Instant};

use ternion_core::{
    Constraint, ConstraintStart, Error, ErrorKind, GenerateParams, Prompt, Result, Tool,
    answer::{AnswerFormat, Thought},
    text::Tokenizer,
};

pub(crate) use grammar::{Grammar, Grammars};
pub(crate) use running::{EndTokens, Running};

/// Whether [`plan`] may compile a grammar.
pub(crate) fn takes_long(params: &GenerateParams) -> bool {
    params.constraint.is_some() || params.chat.offers_tools()
}

/// What the answer to a request must look like, and from where on: what its constraint says, and that calls of tools are valid
/// or must come. `thought`: what the prompt says about the thought, after which both hold.
///
/// # Errors
/// [`InvalidRequest`](ternion_core::ErrorKind::InvalidRequest) for what cannot be enforced.
pub(crate) fn plan(
    params: &GenerateParams,
    tokenizer: &Tokenizer,
    thought: Thought,
    grammars: &Grammars,
) -> Result<Option<(Grammar, ConstraintStart)>> {
    let format = tokenizer.answer_format().filter(|_| matches!(params.prompt, Prompt::Chat(_)));
    let start = format.map_or(ConstraintStart::Immediately, |format| after_thought(format, thought));
    if let Some(format) = format
        && Grammars::is_supported(tokenizer)
        && !params.ignore_eos
    {
        let tools = params.chat.offered_tools();
        for tool in tools {
            Grammars::prepared(&calls::parameters(tool)).map_err(|error| of_tool(tool, &error))?;
        }
        let other = params.constraint.as_ref();
        if let Some((lark, start)) = calls::constraint(&params.chat, format, other, start.clone(), tokenizer)?
        {
            let grammar = grammars.compile(&Constraint::Lark(lark));
            let grammar = grammar.map_err(|error| match error.kind() {
                ErrorKind::InvalidRequest => blame(tools, grammars, &error),
                _ => error,
            })?;
            return Ok(Some((grammar, start)));
        }
    }
    let Some(constraint) = &params.constraint else { return Ok(None) };
    Ok(Some((grammars.compile(constraint)?, start)))
}

/// Where the answer itself begins.
fn after_thought(format: &AnswerFormat, thought: Thought) -> ConstraintStart {
    match (&format.reasoning, thought) {
        (Some(tags), Thought::Open) => ConstraintStart::AfterText(tags.end.clone()),
        (Some(tags), Thought::Possible) => {
            ConstraintStart::AfterThought { start: tags.start.clone(), end: tags.end.clone() }
        }
        _ => ConstraintStart::Immediately,
    }
}

/// The error for calls that cannot be enforced: of the tool that is to blame, if there is one and it is found soon.
fn blame(tools: &[Tool], grammars: &Grammars, error: &Error) -> Error {
    const SOON: Duration = Duration::from_secs(2);
    let start = Instant::now();
    let failing = tools.iter().take_while(|_| start.elapsed() < SOON).find_map(|tool| {
        let error = grammars.compile(&Constraint::JsonSchema(calls::parameters(tool))).err()?;
        (error.kind() == ErrorKind::InvalidRequest).then(|| of_tool(tool, &error))
    });
    failing.unwrap_or_else(|| {
        let reason = error.message().trim_start_matches("constraint: ");
        Error::new(error.kind(), format!("chat.tools: calls cannot be enforced: {reason}"))
    })
}

fn of_tool(tool: &Tool, error: &Error) -> Error {
    let reason = error.message().trim_start_matches("constraint: ");
    Error::new(error.kind(), format!("chat.tools: the parameters of `{}`: {reason}", tool.name()))
}
