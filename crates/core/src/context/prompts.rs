//! The messages of the steps: a template with `{name}` for each thing that is put in.

use std::borrow::Cow;

use crate::{Error, Result, Segment};

/// For each chunk.
pub(super) const MAP: &str =
    "{task}\n\nBelow is part {part} of {parts} of a longer text. Do this for this part alone.\n\n{text}";
/// For the answers to the chunks.
pub(super) const COMBINE: &str = "{task}\n\nThe text was read in parts. Below are the answers for its parts, in order. Make one answer of them.\n\n{text}";
/// For the first chunk of a rolling answer.
pub(super) const START: &str = "{task}\n\nBelow is part {part} of {parts} of a longer text. Do this as far as this part allows.\n\n{text}";
/// For the further ones.
pub(super) const REFINE: &str = "{task}\n\nBelow are the answer so far and part {part} of {parts} of the text. Give the whole answer anew, with what this \
     part adds.\n\nAnswer so far:\n{answer}\n\nPart {part} of {parts}:\n{text}";

/// What is put into a template.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Values<'a> {
    pub(super) task: &'a str,
    /// Whether the host wrote the task.
    pub(super) task_is_trusted: bool,
    /// Untrusted.
    pub(super) text: &'a str,
    /// Untrusted.
    pub(super) answer: &'a str,
    pub(super) part: usize,
    pub(super) parts: usize,
}

/// The template, which is trusted, with the values in it. It is gone through once, so that nothing in the values is taken
/// for a name.
pub(super) fn fill(template: &str, values: &Values<'_>) -> Vec<Segment> {
    let mut filled = Vec::new();
    let mut rest = template;
    while let Some(at) = rest.find('{') {
        push(&mut filled, &rest[..at], true);
        rest = &rest[at..];
        let value = name(rest).and_then(|name| Some((name, value(name, values)?)));
        if let Some((name, (value, trusted))) = value {
            push(&mut filled, &value, trusted);
            rest = &rest[name.len() + 2..];
        } else {
            push(&mut filled, "{", true);
            rest = &rest[1..];
        }
    }
    push(&mut filled, rest, true);
    if values.task.is_empty() {
        // A task that is not there leaves no gap.
        while let Some(first) = filled.first_mut() {
            first.text = first.text.trim_start().to_owned();
            if !first.text.is_empty() {
                break;
            }
            filled.remove(0);
        }
    }
    filled
}

fn push(segments: &mut Vec<Segment>, text: &str, trusted: bool) {
    match segments.last_mut() {
        _ if text.is_empty() => {}
        Some(last) if last.trusted == trusted => last.text.push_str(text),
        _ => segments.push(Segment { text: text.to_owned(), trusted }),
    }
}

/// A value, and whether it is trusted.
fn value<'a>(name: &str, values: &Values<'a>) -> Option<(Cow<'a, str>, bool)> {
    Some(match name {
        "task" => (values.task.into(), values.task_is_trusted),
        "text" => (values.text.into(), false),
        "answer" => (values.answer.into(), false),
        "part" => (values.part.to_string().into(), true),
        "parts" => (values.parts.to_string().into(), true),
        _ => return None,
    })
}

/// The name at the beginning of `{name}...`.
fn name(text: &str) -> Option<&str> {
    let end = text.find('}')?;
    text.get(1..end)
}

/// Checks that a template has what it is for.
pub(super) fn validate(key: &str, template: Option<&str>, needed: &[&str]) -> Result<()> {
    let Some(template) = template else { return Ok(()) };
    match needed.iter().find(|name| !template.contains(&format!("{{{name}}}"))) {
        Some(name) => Err(Error::invalid_config(format!(
            "{key}: has no `{{{name}}}`, which stands for what it is about"
        ))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::context::parts::text_of;

    #[test]
    fn names_are_replaced_once_and_other_braces_stay() {
        let values =
            Values { task: "T", task_is_trusted: true, text: "{task} {", answer: "A", part: 2, parts: 3 };
        let text = |template: &str, values: &Values<'_>| text_of(&fill(template, values));
        assert_eq!(text("{task}: {part}/{parts} {text}{answer} {x} {", &values), "T: 2/3 {task} {A {x} {");
        assert_eq!(text("{task}\n\n{text}", &Values { text: "\n x", ..Values::default() }), "x");
        let trusted = |s: &Segment| s.trusted;
        assert_eq!(
            fill("{task}: {part} {text}{answer} .", &values).iter().map(trusted).collect::<Vec<_>>(),
            [true, false, true]
        );
        assert!(validate("k", Some("no text"), &["text"]).unwrap_err().to_string().contains("`{text}`"));
        validate("k", Some(REFINE), &["text", "answer"]).unwrap();
    }
}
