//! For a model that is made to fail: what a failure of the engine looks like from outside.
//!
//! These checks are not in the list of all, because no healthy model passes them; a backend's own tests call them with a
//! model whose engine fails while it computes.

use ternion_core::{DoneEvent, Event, LlmBackend};

use crate::{
    Failure, Sentence,
    ask::{endless, idle, prompt, soon, start},
};

const ENDS: Sentence =
    Sentence::new("LlmBackend::generate", "In the stream: failures of the engine, after which it ends.");

/// Tokens may come, then an error that names its operation, then nothing more; the sequence is free.
///
/// # Errors
/// `Done`, an event after the error, or a sequence that stays in use.
pub async fn a_failure_ends_the_stream(model: &dyn LlmBackend) -> Result<(), Failure> {
    let mut stream = start(model, endless(prompt("failure")), ENDS).await?;
    loop {
        match soon("an event", ENDS, stream.next()).await? {
            Some(Ok(Event::Done(DoneEvent { finish_reason, .. }))) => {
                return Err(ENDS.broken(format_args!("the end ({finish_reason:?})"), "an error"));
            }
            Some(Ok(_)) => {}
            Some(Err(error)) => {
                ENDS.equal("operation of the error", error.operation(), "generate")?;
                break;
            }
            None => return Err(ENDS.broken("the end of the stream without an error", "an error")),
        }
    }
    for _ in 0..3 {
        if let Some(event) = soon("the end", ENDS, stream.next()).await? {
            return Err(ENDS.broken(format_args!("{event:?} after the error"), "nothing"));
        }
    }
    idle(model, ENDS).await
}
