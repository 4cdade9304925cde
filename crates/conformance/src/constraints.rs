//! Constraints: answers of a given form, and what is refused.

use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::json;
use ternion_core::{Constraint, Error, ErrorKind, GenerateRequest, LlmBackend, LlmBackendExt};

use crate::{
    Failure, Sentence,
    ask::{answer, drawn, prompt},
    check::checks,
};

checks! { "constraints";
    answers_have_the_form_that_was_asked_for, FORM, [Generate, Constraints];
    a_value_is_extracted, EXTRACT, [Generate, Constraints];
    an_answer_that_is_cut_off_says_so, CUT_OFF, [Generate, Constraints];
    what_cannot_be_enforced_is_refused, REFUSED, [Generate, Constraints];
    no_constraints_without_the_capability, NONE, [Generate, NoConstraints];
}

const FORM: Sentence = Sentence::new(
    "Constraint",
    "A backend with the capability constraints lets the model choose only tokens with which the answer can still become \
     what the constraint describes, and lets the answer end only where it is complete.",
);
const EXTRACT: Sentence = Sentence::new(
    "LlmBackendExt::extract",
    "Answers with a value: generates JSON under the schema of T, and reads a T from it.",
);
const CUT_OFF: Sentence = Sentence::new(
    "DoneEvent::constraint_complete",
    "Some(false) for an answer that was cut off, by max_tokens, a full context, a stop string or a cancellation.",
);
const REFUSED: Sentence = Sentence::new(
    "Constraint",
    "What a backend cannot enforce it refuses as InvalidRequest, or as Unsupported where another backend could.",
);
const NONE: Sentence = Sentence::new(
    "Capabilities::constraints",
    "What a backend cannot do it refuses as Unsupported rather than leaving it out.",
);

fn constrained(own: &str, constraint: Constraint) -> GenerateRequest {
    // Draws, for the most probable token of a model may be the same for ever.
    GenerateRequest::new(prompt(own)).with_constraint(constraint).with_sampling(drawn(None))
}

/// Whether this kind of constraint is none that the backend can enforce. A JSON schema every one can.
fn is_not_taken(constraint: &Constraint, error: &Error) -> bool {
    error.kind() == ErrorKind::Unsupported && !matches!(constraint, Constraint::JsonSchema(_))
}

/// Short answers of each kind; a remote backend may refuse one that its server has no field for.
///
/// # Errors
/// An answer of another form.
pub async fn answers_have_the_form_that_was_asked_for(model: &dyn LlmBackend) -> Result<(), Failure> {
    type Test = fn(&str) -> bool;
    let texts = vec!["yes".to_owned(), "no".to_owned(), "perhaps, perhaps".to_owned()];
    let schema = json!({ "enum": [12, "é"] });
    let lark = "start: \"(\" DIGIT \")\"\nDIGIT: /[0-9]/";
    let cases: [(Constraint, Test); 4] = [
        (Constraint::Choice(texts), |text| ["yes", "no", "perhaps, perhaps"].contains(&text)),
        (Constraint::Regex("[ab]{3}".into()), |text| {
            text.len() == 3 && text.bytes().all(|b| matches!(b, b'a' | b'b'))
        }),
        (Constraint::JsonSchema(schema), |text| ["12", "\"é\""].contains(&text.trim())),
        (Constraint::Lark(lark.to_owned()), |text| {
            text.len() == 3 && text.starts_with('(') && text.ends_with(')')
        }),
    ];
    for (constraint, is_form) in cases {
        let request = constrained("form", constraint.clone());
        if model.validate(&request).await.is_err_and(|error| is_not_taken(&constraint, &error)) {
            continue;
        }
        let found = answer(model, request, FORM).await?;
        let text = &found.text;
        FORM.require(is_form(text), format_args!("`{text}`"), format_args!("{constraint:?}"))?;
        FORM.equal("constraint_complete", found.constraint_complete, Some(true))?;
    }
    Ok(())
}

#[derive(Deserialize, JsonSchema)]
enum Answer {
    Yes,
    No,
}

/// A value of a type of Rust.
///
/// # Errors
/// Why there is none.
pub async fn a_value_is_extracted(model: &dyn LlmBackend) -> Result<(), Failure> {
    let request = GenerateRequest::new(prompt("value")).with_sampling(drawn(None));
    let value: Answer = model.extract(request).await.map_err(EXTRACT.refused("extract"))?;
    match value {
        Answer::Yes | Answer::No => Ok(()),
    }
}

/// A limit that ends the answer within a number that must be longer.
///
/// # Errors
/// What the end says.
pub async fn an_answer_that_is_cut_off_says_so(model: &dyn LlmBackend) -> Result<(), Failure> {
    let schema = Constraint::JsonSchema(json!({ "type": "string", "minLength": 100 }));
    let request = constrained("cut", schema).with_max_tokens(3);
    let found = answer(model, request, CUT_OFF).await?;
    CUT_OFF.equal("constraint_complete", found.constraint_complete, Some(false))
}

/// A regular expression and a schema that cannot be read.
///
/// # Errors
/// What came instead of the refusal.
pub async fn what_cannot_be_enforced_is_refused(model: &dyn LlmBackend) -> Result<(), Failure> {
    for constraint in [
        Constraint::Regex("a(b".into()),
        Constraint::JsonSchema(json!({ "type": "nonsense" })),
        Constraint::Choice(Vec::new()),
    ] {
        let what = format!("{constraint:?}");
        match model.generate(constrained("refused", constraint.clone())).await {
            Ok(_) => return Err(REFUSED.broken(format_args!("{what}: accepted"), "InvalidRequest")),
            Err(error) if is_not_taken(&constraint, &error) => {}
            Err(error) => {
                REFUSED.equal(format_args!("error for {what}"), error.kind(), ErrorKind::InvalidRequest)?;
            }
        }
    }
    Ok(())
}

/// Any JSON object, of a backend that cannot constrain answers.
///
/// # Errors
/// What came instead of the refusal.
pub async fn no_constraints_without_the_capability(model: &dyn LlmBackend) -> Result<(), Failure> {
    match model.generate(constrained("none", Constraint::JsonObject)).await {
        Ok(_) => Err(NONE.broken("an answer", "Unsupported")),
        Err(error) => NONE.equal("error", error.kind(), ErrorKind::Unsupported),
    }
}
