//! What an answer must look like, on the command line.

use std::path::PathBuf;

use clap::Args;
use ternion::Constraint;

use crate::failure::{Failure, Outcome};
use crate::input::TextSource;

/// What the answer must look like; one of these.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Constraint")]
#[group(multiple = false)]
pub(crate) struct ConstraintArgs {
    /// JSON that is valid against the JSON schema in this file. The model does not see the schema: say in the prompt what is wanted.
    #[arg(long, value_name = "FILE")]
    json_schema: Option<PathBuf>,
    /// Any JSON object.
    #[arg(long)]
    json_object: bool,
    /// Text that matches this regular expression as a whole.
    #[arg(long, value_name = "REGEX", allow_hyphen_values = true)]
    regex: Option<String>,
    /// One of these texts, which commas separate. May be repeated.
    #[arg(long, value_name = "TEXTS", value_delimiter = ',', allow_hyphen_values = true)]
    choice: Vec<String>,
    /// Text of the grammar in this file, in the syntax of Lark.
    #[arg(long, value_name = "FILE")]
    lark: Option<PathBuf>,
}

impl ConstraintArgs {
    /// The constraint, with the file that it names.
    pub(crate) fn read(&self) -> Outcome<Option<Constraint>> {
        if let Some(path) = &self.json_schema {
            let text = TextSource::new(None, Some(path)).read("JSON schema")?;
            let schema = serde_json::from_str(&text)
                .map_err(|e| Failure::usage(format!("{}: is no JSON: {e}", path.display())))?;
            return Ok(Some(Constraint::JsonSchema(schema)));
        }
        if let Some(path) = &self.lark {
            return Ok(Some(Constraint::Lark(TextSource::new(None, Some(path)).read("grammar")?)));
        }
        if let Some(regex) = &self.regex {
            return Ok(Some(Constraint::Regex(regex.clone())));
        }
        if !self.choice.is_empty() {
            return Ok(Some(Constraint::Choice(self.choice.clone())));
        }
        Ok(self.json_object.then_some(Constraint::JsonObject))
    }
}
