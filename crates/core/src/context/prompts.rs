//! The messages of the steps: a template with `{name}` for each thing that is put in.

use crate::{Error, Result};

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
    pub(super) text: &'a str,
    pub(super) answer: &'a str,
    pub(super) part: usize,
    pub(super) parts: usize,
}

/// The template with the values in it. It is gone through once, so that nothing in the values is taken for a name.
pub(super) fn fill(template: &str, values: &Values<'_>) -> String {
    let mut filled = String::with_capacity(template.len() + values.text.len() + values.answer.len());
    let mut rest = template;
    while let Some(at) = rest.find('{') {
        filled.push_str(&rest[..at]);
        rest = &rest[at..];
        let value = name(rest).and_then(|name| Some((name, value(name, values)?)));
        if let Some((name, value)) = value {
            filled.push_str(&value);
            rest = &rest[name.len() + 2..];
        } else {
            filled.push('{');
            rest = &rest[1..];
        }
    }
    filled.push_str(rest);
    // A task that is not there leaves no gap.
    if values.task.is_empty() { filled.trim_start().to_owned() } else { filled }
}

fn value(name: &str, values: &Values<'_>) -> Option<String> {
    Some(match name {
        "task" => values.task.to_owned(),
        "text" => values.text.to_owned(),
        "answer" => values.answer.to_owned(),
        "part" => values.part.to_string(),
        "parts" => values.parts.to_string(),
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

    #[test]
    fn names_are_replaced_once_and_other_braces_stay() {
        let values = Values { task: "T", text: "{task} {", answer: "A", part: 2, parts: 3 };
        assert_eq!(fill("{task}: {part}/{parts} {text}{answer} {x} {", &values), "T: 2/3 {task} {A {x} {");
        assert_eq!(fill("{task}\n\n{text}", &Values { text: "x", ..Values::default() }), "x");
        assert!(validate("k", Some("no text"), &["text"]).unwrap_err().to_string().contains("`{text}`"));
        validate("k", Some(REFINE), &["text", "answer"]).unwrap();
    }
}
