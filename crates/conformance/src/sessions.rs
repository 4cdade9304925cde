//! Sessions in the prompt cache: what is kept is found, and a backend without a prompt cache says so.

use ternion_core::{Error, ErrorKind, LlmBackend};

use crate::{Failure, Sentence, check::checks};

checks! { "sessions";
    a_session_is_kept_or_refused, SAVES, [];
    a_session_that_is_not_there_is_told, LOADS, [];
}

const SAVES: Sentence = Sentence::new(
    "LlmBackend::save_session",
    "Keeps tokens under a name in the model's prompt cache, so that load_session finds them; Unsupported without one.",
);
const LOADS: Sentence = Sentence::new(
    "LlmBackend::load_session",
    "NotFound where there is no such session of this model; Unsupported without a prompt cache.",
);

/// The session that the checks save.
const NAME: &str = "ternion-conformance";

/// An error of this kind that names its operation.
fn refused(
    outcome: Result<impl Sized, Error>,
    kind: ErrorKind,
    operation: &str,
    sentence: Sentence,
) -> Result<(), Failure> {
    match outcome {
        Ok(_) => Err(sentence.broken(format!("{operation}: success"), format!("{kind:?}"))),
        Err(error) => {
            let found = format!("{operation}: the error `{error}`");
            sentence.require(error.kind() == kind, &found, format!("{kind:?}"))?;
            sentence.require(error.operation() == operation, found, format!("the operation `{operation}`"))
        }
    }
}

/// What is saved is found again; without a prompt cache both methods say so. No tokens are no session.
///
/// # Errors
/// A session that is lost or changed, and errors of another kind.
pub async fn a_session_is_kept_or_refused(model: &dyn LlmBackend) -> Result<(), Failure> {
    let tokens = vec![0, 1, 0];
    match model.save_session(NAME, tokens.clone()).await {
        Err(error) if error.kind() == ErrorKind::Unsupported => {
            refused(Err::<(), _>(error), ErrorKind::Unsupported, "save_session", SAVES)?;
            refused(model.load_session(NAME).await, ErrorKind::Unsupported, "load_session", SAVES)
        }
        Err(error) => Err(SAVES.broken(format!("the error `{error}`"), "success")),
        Ok(()) => {
            let found = model.load_session(NAME).await;
            let found = found.map_err(|error| SAVES.broken(format!("the error `{error}`"), "the tokens"))?;
            SAVES.require(found == tokens, format!("{found:?}"), format!("{tokens:?}"))?;
            let nothing = model.save_session(NAME, Vec::new()).await;
            refused(nothing, ErrorKind::InvalidRequest, "save_session", SAVES)
        }
    }
}

/// A name under which nothing was saved.
///
/// # Errors
/// Tokens that nobody saved, and errors of another kind.
pub async fn a_session_that_is_not_there_is_told(model: &dyn LlmBackend) -> Result<(), Failure> {
    let missing = model.load_session("ternion-conformance-missing").await;
    let kind = match &missing {
        Err(error) if error.kind() == ErrorKind::Unsupported => ErrorKind::Unsupported,
        _ => ErrorKind::NotFound,
    };
    refused(missing, kind, "load_session", LOADS)
}
