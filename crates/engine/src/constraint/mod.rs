//! Constraints of answers: from a request to a grammar that runs beside its generation.
//!
//! [`plan`] says what an answer must look like, and from where on. [`Grammars`] compiles that for the model's vocabulary, before
//! the request is queued and never on the engine's thread. A [`Running`] constraint then masks the logits of each step, follows
//! the tokens, and names those that it forces.
//!
//! The mask is computed for every token. To sample freely first and to compute the mask only for a refused token is cheaper, but
//! it draws from another distribution as soon as top-k or top-p cut it off. A mask takes microseconds, a step milliseconds.

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

use ternion_core::{Constraint, ConstraintStart, GenerateParams};

pub(crate) use grammar::{Grammar, Grammars};
pub(crate) use running::{EndTokens, Running};

/// What an answer to a request must look like, and from where on.
pub(crate) fn plan(params: &GenerateParams) -> Option<(Constraint, ConstraintStart)> {
    params.constraint.clone().map(|constraint| (constraint, ConstraintStart::Immediately))
}
