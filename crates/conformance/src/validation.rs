//! Checking a request without starting it: `validate` agrees with `generate`, whatever the backend is doing.

use ternion_core::{ErrorKind, GenerateRequest, LlmBackend, Message, Prompt, Result, context::ContextPolicy};

use crate::{
    Failure, Sentence,
    ask::{RunningRequests, endless, greedy, idle, prompt, soon, start, too_long},
    check::checks,
    limits::fill,
};

checks! { "validation";
    validate_agrees_with_generate, AGREES, [Generate];
    validate_starts_nothing, STARTS, [Generate];
    a_full_queue_refuses_no_check, QUEUE, [Generate, SmallQueue];
    a_request_that_waits_is_judged_the_same, WAITS, [Generate, SmallQueue];
}

const AGREES: Sentence = Sentence::new(
    "LlmBackend::validate",
    "Makes the checks that generate makes of the request, in the same order.",
);
const STARTS: Sentence = Sentence::new("LlmBackend::validate", "Checks a request without starting it.");
const QUEUE: Sentence = Sentence::new(
    "LlmBackend::validate",
    "What the backend is doing at the moment does not matter: a full queue refuses nothing here.",
);
const WAITS: Sentence = Sentence::new(
    "LlmBackend::validate",
    "A layer that lets a request wait calls this first, so that a request is judged in the same way whether it has to \
     wait or not.",
);

/// Requests that backends accept and refuse for all reasons that there are, with what is special about each.
fn samples(model: &dyn LlmBackend) -> Vec<(&'static str, GenerateRequest)> {
    let text = || greedy(prompt("validate"), 2);
    let chat = |text: &str| greedy(vec![Message::user(text)], 2);
    let mut samples = vec![
        ("a text", text()),
        ("a conversation", chat("validate")),
        ("an empty text", greedy("", 2)),
        ("an empty conversation", greedy(Vec::<Message>::new(), 2)),
        ("an empty list of tokens", greedy(Vec::<u32>::new(), 2)),
        ("tokens", greedy(vec![0], 2)),
        ("an unknown token", greedy(vec![0, u32::MAX], 2)),
        ("max_tokens 0", greedy(prompt("validate"), 0)),
        ("an empty stop string", text().with_stop([""])),
        ("max_tokens 0 and an empty stop string", greedy(prompt("validate"), 0).with_stop([""])),
        ("an empty text and max_tokens 0", greedy("", 0)),
        ("log-probabilities", text().with_logprobs()),
        ("a text that is too long", greedy(too_long(model), 2)),
        ("a conversation that is too long", chat(&too_long(model))),
        ("a short document", chat("What is it about?").with_document("The sun is up.")),
        ("an empty document", chat("What is it about?").with_document("")),
        ("a document with tokens", greedy(vec![0], 2).with_document("The sun is up.")),
        ("a long document", chat("What is it about?").with_document(too_long(model))),
    ];
    for (what, change) in [
        (
            "a temperature below 0",
            (|r| r.params.sampling.temperature = Some(-1.0)) as fn(&mut GenerateRequest),
        ),
        ("a top_p of 0", |r| r.params.sampling.top_p = Some(0.0)),
        ("a bias of NaN", |r| {
            r.params.sampling.logit_bias.insert(0, f32::NAN);
        }),
        ("a bias for an unknown token", |r| {
            r.params.sampling.logit_bias.insert(u32::MAX, 1.0);
        }),
    ] {
        let mut request = text();
        change(&mut request);
        samples.push((what, request));
    }
    for policy in ["reject", "truncate", "truncate-middle", "sliding", "map-reduce", "refine"] {
        let Ok(parsed) = policy.parse::<ContextPolicy>() else { continue };
        let with = |request: GenerateRequest| request.with_context_policy(parsed.clone());
        samples.push(("a text with a policy of its own", with(text())));
        samples.push(("a long text with a policy of its own", with(greedy(too_long(model), 2))));
        let long = chat("What is it about?").with_document(too_long(model));
        samples.push(("a long document with a policy of its own", with(long)));
        samples.push(("a policy and max_tokens 0", with(greedy(too_long(model), 0))));
    }
    samples
}

/// What a request is judged to be: nothing, or the kind and the message of its error.
type Verdict = Option<(ErrorKind, String)>;

fn verdict<T>(result: Result<T>) -> Verdict {
    result.err().map(|e| (e.kind(), e.message().to_owned()))
}

/// What `generate` says of a request. Where it says that it is busy, it is asked until it is not.
async fn generated(
    model: &dyn LlmBackend,
    request: &GenerateRequest,
    sentence: Sentence,
) -> Result<Verdict, Failure> {
    let judged = async {
        loop {
            let mut own = request.clone();
            own.cancel = request.cancel.child_token();
            let cancel = own.cancel.clone();
            let verdict = verdict(model.generate(own).await);
            // Not only by dropping the stream: that is a check of its own.
            cancel.cancel();
            if verdict.as_ref().is_none_or(|(kind, _)| *kind != ErrorKind::Busy) {
                return verdict;
            }
            tokio::time::sleep(std::time::Duration::from_millis(2)).await;
        }
    };
    soon("generate", sentence, judged).await
}

/// The same verdict on good and bad requests of all kinds.
///
/// # Errors
/// The two verdicts, where they differ.
pub async fn validate_agrees_with_generate(model: &dyn LlmBackend) -> Result<(), Failure> {
    for (what, request) in samples(model) {
        let checked = verdict(model.validate(&request).await);
        let expected = generated(model, &request, AGREES).await?;
        AGREES.equal(format_args!("validate of {what}"), checked, expected)?;
    }
    idle(model, AGREES).await
}

/// Statistics stay what they are, and the same request is generated after its check as without one.
///
/// # Errors
/// What has changed.
pub async fn validate_starts_nothing(model: &dyn LlmBackend) -> Result<(), Failure> {
    idle(model, STARTS).await?;
    let request = greedy(prompt("starts nothing"), 2);
    let before = model.stats();
    for _ in 0..3 {
        model.validate(&request).await.map_err(STARTS.refused("validate"))?;
    }
    STARTS.equal("stats", model.stats(), before)?;
    let checked = start(model, request.clone(), STARTS).await?.collect().await;
    let fresh = start(model, greedy(prompt("starts nothing"), 2), STARTS).await?.collect().await;
    let (checked, fresh) =
        (checked.map_err(STARTS.refused("the stream"))?, fresh.map_err(STARTS.refused("the stream"))?);
    STARTS.equal("usage.prompt_tokens", checked.usage.prompt_tokens, fresh.usage.prompt_tokens)
}

/// A check while `generate` says that it is busy.
///
/// # Errors
/// Its refusal.
pub async fn a_full_queue_refuses_no_check(model: &dyn LlmBackend) -> Result<(), Failure> {
    let held = fill(model, "check", QUEUE).await?;
    let checked = soon("validate", QUEUE, model.validate(&greedy(prompt("full"), 2))).await;
    held.cancel_all(model, QUEUE).await?;
    checked?.map_err(QUEUE.refused("validate"))
}

/// The verdicts of an idle backend are those of one whose sequences are all taken.
///
/// # Errors
/// The two verdicts, where they differ.
pub async fn a_request_that_waits_is_judged_the_same(model: &dyn LlmBackend) -> Result<(), Failure> {
    let limits = model.info().limits.clone();
    if limits.max_queued == 0 {
        return Ok(());
    }
    let mut expected = Vec::new();
    for (_, request) in samples(model) {
        expected.push(generated(model, &request, WAITS).await?);
    }
    idle(model, WAITS).await?;
    let mut held = RunningRequests::default();
    for i in 0..limits.max_sequences {
        let request = endless(Prompt::from(prompt(&format!("taken {i}"))));
        held.add(request.clone(), start(model, request, WAITS).await?);
    }
    let mut outcome = Ok(());
    for ((what, request), expected) in samples(model).into_iter().zip(expected) {
        let found = generated(model, &request, WAITS).await?;
        outcome = WAITS.equal(format_args!("{what}, while all sequences are taken"), found, expected);
        if outcome.is_err() {
            break;
        }
    }
    soon("the end", WAITS, held.cancel_all(model, WAITS)).await??;
    outcome
}
